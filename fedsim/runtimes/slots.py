"""How many clients run at once, where that changes while they run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Slots:
    """A number of slots, counted from 0; a thread that finds none free waits for one."""

    def __init__(self, number: int):
        self.number = number
        self._taken: set[int] = set()
        self._change = threading.Condition()

    @contextmanager
    def take(self) -> Iterator[tuple[int, int]]:
        """The lowest free slot, and how many slots there were when it was taken."""
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
        """Have `after` slots, if there are `before`; returns whether there were. Slots in use stay until free."""
        with self._change:
            if self.number != before:
                return False
            self.number = after
            self._change.notify_all()
            return True
