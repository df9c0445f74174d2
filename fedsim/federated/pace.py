"""The order in which clients are given to workers: the slowest first, by their times in earlier rounds.

A round ends with its last client, so all other workers would wait for a slow client that starts last. The order
slowest first takes at most 4/3 - 1/(3m) times the shortest possible time of m workers (Graham, Bounds on
Multiprocessing Timing Anomalies, 1969). Results do not depend on the order, so checkpoints do not contain it.
"""

from collections import OrderedDict
from collections.abc import Mapping

MAX_REMEMBERED_CLIENTS = 2**16  # clients whose times are kept, those measured last


class Pace:
    """The seconds a step of each measured client, and the average over all measurements."""

    def __init__(self) -> None:
        self._seconds_per_step: OrderedDict[int, float] = OrderedDict()  # the newest last
        self._seconds, self._steps = 0.0, 0

    def measured(self, client: int, steps: int, seconds: float) -> None:
        """Remember the seconds that a client took for its steps."""
        self._seconds_per_step[client] = seconds / steps
        self._seconds_per_step.move_to_end(client)
        if len(self._seconds_per_step) > MAX_REMEMBERED_CLIENTS:
            self._seconds_per_step.popitem(last=False)
        self._seconds += seconds
        self._steps += steps

    def order(self, steps: Mapping[int, int]) -> list[int]:
        """The clients of `steps`, the slowest first; of equally slow ones, the lower id first.

        A client that is not remembered is assumed to have the average speed.
        """
        average = self._seconds / self._steps if self._seconds else 1.0
        return sorted(
            steps, key=lambda client: (-steps[client] * self._seconds_per_step.get(client, average), client)
        )
