"""Calls side by side in a pool of threads, a bounded number at a time."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_window(
    pool: ThreadPoolExecutor,
    call: Callable[[Item], Result],
    items: Iterable[Item],
    most: Callable[[], int],
    stop: Callable[[], None] = lambda: None,
) -> Generator[list[Result], None, None]:
    """What `call` gives for each item, as it comes: a bounded window, so that what is finished does not pile up.

    About `most()` are under way or waiting. After an error or an interrupt it asks those to `stop`, starts no
    more, and waits for those under way.
    """
    running, upcoming = set[Future[Result]](), iter(items)
    try:
        while True:
            for item in upcoming:
                running.add(pool.submit(call, item))
                if len(running) >= most():
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
