"""Who answers, and when: simulated unreliability on a virtual clock.

Bonawitz et al., Towards Federated Learning at Scale: System Design, MLSys 2019: the server selects more clients
than it needs, takes the first that report, and closes the round at a deadline.
"""

from dataclasses import dataclass
from math import ceil
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Le

from fedsim.data.dataset import Floats, Ints
from fedsim.errors import ConfigError
from fedsim.types import Positive, Stream, random

Chance = Annotated[float, Ge(0), Le(1)]


class Attempt(NamedTuple):
    """What becomes of the clients that were selected for a round."""

    reporting: list[int]  # ids, ascending: whose updates count
    absent: dict[int, str]  # why, by client
    seconds: float  # of the virtual clock, until the round is closed


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Clients that drop out, stragglers, a deadline and over-selection (Bonawitz 2019).

    A selected client drops out of the round with probability `drop`, one for all or a list of one for each
    client. A step takes it `step_seconds` of the virtual clock, times `slowdown` for the share `stragglers` of
    all clients, times exp(`jitter` z) with z normal, anew each round. Selected are `over_selection` times as many
    as the cohort says; as many as it says count, those that report first, and none that reports after `deadline`
    seconds. Where fewer than `failures.min_clients` are left, the round is given up and the model stays as it was.
    """

    drop: Chance | list[Chance] = 0.0
    step_seconds: Positive = 0.1
    stragglers: Annotated[float, Ge(0), Le(1)] = 0.0
    slowdown: Annotated[float, Ge(1)] = 10.0
    jitter: Annotated[float, Ge(0), Le(10)] = 0.0
    deadline: Positive | None = None
    over_selection: Annotated[float, Ge(1)] = 1.0

    def check(self, num_clients: int) -> None:
        """Raise ConfigError where there is not one probability for each client."""
        if isinstance(self.drop, list) and len(self.drop) != num_clients:
            raise ConfigError(
                f"availability.drop: has {len(self.drop)} entries, and data.clients is {num_clients}"
            )

    def select(self, cohort: list[int], num_clients: int, seed: int, number: int) -> list[int]:
        """The cohort and, drawn from the others, as many more as `over_selection` asks for."""
        wanted = round(self.over_selection * len(cohort), 9)  # 1.1 * 100 is a little above 110
        more = ceil(min(wanted, num_clients)) - len(cohort)
        others = np.setdiff1d(np.arange(num_clients), cohort) if more else np.empty(0, np.int64)
        extra = random(seed, Stream.AVAILABILITY, number, 1).choice(others, more, replace=False)
        return sorted([*cohort, *extra.tolist()])

    def attempt(
        self, selected: list[int], steps: Ints, goal: int, num_clients: int, seed: int, number: int
    ) -> Attempt:
        """Who reports of those `selected`, whose `steps` stand in the same order, until `goal` have."""
        chance = random(seed, Stream.AVAILABILITY, number, 2).random(num_clients)[selected]
        drop = np.broadcast_to(np.asarray(self.drop, np.float64), num_clients)[selected]
        seconds = self._seconds(selected, steps, num_clients, seed, number)
        absent = {k: "dropped out" for k, out in zip(selected, chance < drop, strict=True) if out}
        order = sorted((s, k) for s, k in zip(seconds.tolist(), selected, strict=True) if k not in absent)
        limit = self.deadline or float("inf")
        last = limit * (1 + 1e-9)  # 3 * 0.1 is a little above 0.3
        reporting = dict([(k, s) for s, k in order if s <= last][:goal])
        for s, k in order:
            if s > last:
                absent[k] = f"missed the deadline of {limit:g} s: {s:.4g} s"
            elif k not in reporting:
                absent[k] = f"not needed: {goal} had reported"
        if len(reporting) == goal or not self.deadline:
            closed = max(reporting.values(), default=0.0)
        else:
            closed = self.deadline
        return Attempt(sorted(reporting), dict(sorted(absent.items())), closed)

    def _seconds(self, selected: list[int], steps: Ints, num_clients: int, seed: int, number: int) -> Floats:
        """Until each reports; a client's own whoever else is selected."""
        slow = random(seed, Stream.AVAILABILITY, 0, 0).random(num_clients)[selected] < self.stragglers
        z = random(seed, Stream.AVAILABILITY, number, 3).standard_normal(num_clients)[selected]
        slowness: Floats = np.where(slow, self.slowdown, 1.0) * np.exp(self.jitter * z)
        return self.step_seconds * steps * slowness
