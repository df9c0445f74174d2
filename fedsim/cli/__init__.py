"""One command, `fedsim`. Exit status: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted."""

import atexit
import sys

from fedsim.cli.interrupts import STATUS, Interrupted, exit_on_interrupt, ignore_interrupts, raise_on_interrupt

LESS_MEMORY = "lower local.batch_size, evaluate.batch_size or runtime.workers, or take a smaller model"


def main() -> None:
    """The console script."""
    exit_on_interrupt()
    from fedsim.cli.commands import app  # which takes a moment, in which a signal may arrive
    from fedsim.errors import ClientError, ConfigError, RoundError, is_interrupt, out_of_memory, reason

    try:
        app()
    except ConfigError as error:
        _leave(str(error), 2)
    except (Interrupted, KeyboardInterrupt):
        _leave("interrupted", STATUS)
    except Exception as error:
        if is_interrupt(error):
            _leave("interrupted", STATUS)
        known = isinstance(error, ClientError | RoundError)
        if out_of_memory(error):
            _leave(f"{error if known else f'out of memory: {reason(error)}'}; {LESS_MEMORY}", 1)
        if known:
            _leave(str(error), 1)
        if isinstance(error, OSError):
            _leave(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        raise
    finally:
        raise_on_interrupt()
        atexit.register(ignore_interrupts)


def _leave(message: str, status: int) -> None:
    from fedsim.errors import printable

    print(f"fedsim: {printable(message)}", file=sys.stderr)
    raise SystemExit(status)
