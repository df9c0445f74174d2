"""One command, `fedsim`. Exit status: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted."""

import sys

from fedsim.cli.interrupts import STATUS, Interrupted, exit_on_interrupt, raise_on_interrupt


def main() -> None:
    """The console script."""
    exit_on_interrupt()
    from fedsim.cli.commands import app  # which takes a moment, in which a signal may arrive
    from fedsim.errors import ClientError, ConfigError, RoundError

    try:
        app()
    except ConfigError as error:
        _leave(str(error), 2)
    except (ClientError, RoundError) as error:
        _leave(str(error), 1)
    except OSError as error:
        _leave(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Interrupted:
        _leave("interrupted", STATUS)
    finally:
        raise_on_interrupt()


def _leave(message: str, status: int) -> None:
    from fedsim.errors import printable

    print(f"fedsim: {printable(message)}", file=sys.stderr)
    raise SystemExit(status)
