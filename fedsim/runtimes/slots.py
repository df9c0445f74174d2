"""A number of slots for clients that run at once; the number may change while they run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedsim.errors import ConfigError

MAX_WORKERS = 4096  # threads; a process can hardly have more


def check_workers(workers: int) -> None:
    """Raise ConfigError for more workers than there can be threads."""
    if workers > MAX_WORKERS:
        raise ConfigError(f"runtime.workers: {workers}; allowed: up to {MAX_WORKERS}")


class Slots:
    """Slots, numbered from 0; a thread waits until one is free."""

    def __init__(self, number: int):
        self.number = number
        self._taken: set[int] = set()
        self._change = threading.Condition()

    @contextmanager
    def take(self) -> Iterator[tuple[int, int]]:
        """Take the lowest free slot; gives its number, and the number of slots at that time."""
        with self._change:
            self._change.wait_for(lambda: len(self._taken) < self.number)
            slot, number = min({*range(self.number)} - self._taken), self.number
            self._taken.add(slot)
        try:
            yield slot, number
        finally:
            with self._change:
                self._taken.remove(slot)
                self._change.notify_all()

    def change(self, before: int, after: int) -> bool:
        """Change from `before` to `after` slots; returns False if there are not `before`. Slots in use stay."""
        with self._change:
            if self.number != before:
                return False
            self.number = after
            self._change.notify_all()
            return True
