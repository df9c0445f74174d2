"""In what order clients are handed to workers: the longest first, by how long they took before.

A cohort is over when its last client is, so a long one that starts last has the other workers wait. Longest first
takes at most 4/3 - 1/(3m) of the shortest time that m workers need (Graham, Bounds on Multiprocessing Timing
Anomalies, 1969). What clients compute depends on none of this, so no checkpoint holds it.
"""

from collections import OrderedDict
from collections.abc import Mapping

MOST = 2**16  # clients that are remembered, those measured last


class Pace:
    """Seconds a step, of each client that was measured, and of all of them."""

    def __init__(self) -> None:
        self._of: OrderedDict[int, float] = OrderedDict()  # the last measured last
        self._seconds, self._steps = 0.0, 0

    def measured(self, client: int, steps: int, seconds: float) -> None:
        """Remember what a client took."""
        self._of[client] = seconds / steps
        self._of.move_to_end(client)
        if len(self._of) > MOST:
            self._of.popitem(last=False)
        self._seconds += seconds
        self._steps += steps

    def order(self, steps: Mapping[int, int]) -> list[int]:
        """The clients whose `steps` these are, the longest first, and of two as long the lower id first.

        One that is not remembered is thought to be as fast as all were on average.
        """
        usual = self._seconds / self._steps if self._seconds else 1.0
        return sorted(steps, key=lambda client: (-steps[client] * self._of.get(client, usual), client))
