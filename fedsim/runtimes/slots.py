"""How many clients run at once, where that changes while they run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Seats:
    """So many at a time, numbered from 0; who comes too many waits."""

    def __init__(self, number: int):
        self.number = number
        self._taken: set[int] = set()
        self._change = threading.Condition()

    @contextmanager
    def take(self) -> Iterator[tuple[int, int]]:
        """A seat, the lowest that is free, and how many there were when it was taken."""
        with self._change:
            self._change.wait_for(lambda: len(self._taken) < self.number)
            seat, number = min({*range(self.number)} - self._taken), self.number
            self._taken.add(seat)
        try:
            yield seat, number
        finally:
            with self._change:
                self._taken.remove(seat)
                self._change.notify_all()

    def change(self, before: int, after: int) -> bool:
        """Have `after` where there are still `before`; whoever sits stays until done. Tells whether there were."""
        with self._change:
            if self.number != before:
                return False
            self.number = after
            self._change.notify_all()
            return True
