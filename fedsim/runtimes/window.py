"""Parallel calls in a pool of threads, a bounded number at a time."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_window(
    pool: ThreadPoolExecutor,
    call: Callable[[Item], Result],
    items: Iterable[Item],
    limit: Callable[[], int],
    stop: Callable[[], None] = lambda: None,
) -> Generator[list[Result], None, None]:
    """Yield the results of `call` for all items as they finish, in lists.

    At most about `limit()` calls run or wait at a time, so that finished results do not pile up. After an error or
    an interrupt it calls `stop()`, starts no more calls, and waits for the running ones.
    """
    running, upcoming = set[Future[Result]](), iter(items)
    try:
        while True:
            for item in upcoming:
                running.add(pool.submit(call, item))
                if len(running) >= limit():
                    break
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield [future.result() for future in done]
    finally:
        stop()
        for future in running:
            future.cancel()
        wait(running)
