"""A side in a process of its own: one Ray cluster a process is all that Ray allows, and memory is a process's."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from fedsim.bench.turns import Side
from fedsim.errors import ClientError, ConfigError, RoundError, located

SECONDS_TO_END = 30  # by itself, for a process


@contextmanager
def own_process(make: Callable[..., AbstractContextManager[Side]], *given: object) -> Iterator[Callable[[], int]]:
    """The side of `make(*given)` in a process of its own; each pass returns that process's peak memory, in bytes.

    `make` is a function of a module. Raises ConfigError, ClientError or RoundError as the side does.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, make, given), daemon=True)
    process.start()
    there.close()

    def side() -> int:
        here.send("pass")
        return _answer(here)

    try:
        _answer(here)
        yield side
    finally:
        here.close()
        process.join(SECONDS_TO_END)
        process.kill()
        process.join()


def peak_memory() -> int:
    """Bytes that this process had at most; unlike getrusage's, not those of the process it was forked from."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _answer(pipe: Connection) -> int:
    try:
        answer: int | Exception = pipe.recv()
    except EOFError:
        raise RoundError("the process of a side ended by itself; was it out of memory?") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(pipe: Connection, make: Callable[..., AbstractContextManager[Side]], given: tuple[object, ...]) -> None:
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # the other end has gone
        try:
            with make(*given) as side:
                pipe.send(peak_memory())
                while pipe.recv():
                    side()
                    pipe.send(peak_memory())
        except (ConfigError, ClientError, RoundError) as error:
            pipe.send(error)
        except EOFError:
            raise
        except Exception as error:
            pipe.send(RoundError(located(error)))
