"""Simulated unreliable clients: which of them answer in a round, and when, on a virtual clock.

Bonawitz et al., Towards Federated Learning at Scale: System Design, MLSys 2019: the server selects more clients
than it needs, uses the first updates that arrive, and closes the round at a deadline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Le

from fedsim.data.dataset import Floats, Ints
from fedsim.errors import ConfigError
from fedsim.types import Positive, Stream, random

Chance = Annotated[float, Ge(0), Le(1)]
MAX_TIME = 1e12  # of the times and factors below, so that the virtual clock stays finite


class Attempt(NamedTuple):
    """Which of the selected clients report in a round."""

    reporting: list[int]  # ids, ascending, of the clients whose updates are used
    absent: dict[int, str]  # the reason, by client
    seconds: float  # of the virtual clock, until the round is closed
    client_seconds: Mapping[int, float] = {}  # until each of these clients reports


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Clients that drop out, stragglers, a deadline and over-selection (Bonawitz 2019).

    A selected client drops out of the round with probability `drop`: one number for all clients, or a list with
    one for each client. A step of a client takes `step_seconds` of the virtual clock, times `slowdown` for the
    fraction `stragglers` of all clients, times exp(`jitter` z) with z normal, drawn anew in each round. The server
    selects `over_selection` times as many clients as the cohort's size. It uses the updates of that many clients,
    those that report first, and none that comes after `deadline` seconds. With fewer than `failures.min_clients`
    updates the round is given up, and the model does not change.
    """

    drop: Chance | list[Chance] = 0.0
    step_seconds: Positive = 0.1
    stragglers: Annotated[float, Ge(0), Le(1)] = 0.0
    slowdown: Annotated[float, Ge(1)] = 10.0
    jitter: Annotated[float, Ge(0), Le(10)] = 0.0
    deadline: Positive | None = None
    over_selection: Annotated[float, Ge(1)] = 1.0

    def check(self, num_clients: int) -> None:
        """Raise ConfigError if `drop` is a list of another length than the clients', or the clock overflows."""
        for name in ("step_seconds", "slowdown", "deadline"):
            if (value := getattr(self, name) or 0.0) > MAX_TIME:
                raise ConfigError(f"availability.{name}: {value:g} is more than {MAX_TIME:g}")
        if isinstance(self.drop, list) and len(self.drop) != num_clients:
            raise ConfigError(f"availability.drop: has {len(self.drop)} entries, and {num_clients} clients train")

    def select(self, cohort: list[int], num_clients: int, seed: int, number: int) -> list[int]:
        """The cohort, and further clients drawn from the others, as many as `over_selection` asks for."""
        wanted = round(self.over_selection * len(cohort), 9)  # 1.1 * 100 is a little above 110
        more = ceil(min(wanted, num_clients)) - len(cohort)
        if not more:
            return sorted(cohort)
        places = random(seed, Stream.AVAILABILITY, number, 1).choice(
            num_clients - len(cohort), more, replace=False
        )
        others_below = np.sort(cohort) - np.arange(len(cohort))  # for each client of the cohort
        extra = places + np.searchsorted(others_below, places, side="right")
        return sorted([*cohort, *extra.tolist()])

    def attempt(self, selected: list[int], steps: Ints, goal: int, seed: int, number: int) -> Attempt:
        """Which of the `selected` clients, with these `steps` each, report until `goal` of them have."""
        chance = _uniform(selected, seed, number, 2)
        drop = np.array([self.drop[k] for k in selected] if isinstance(self.drop, list) else self.drop)
        seconds = self._seconds(selected, steps, seed, number)
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
            round_seconds = max(reporting.values(), default=0.0)
        else:
            round_seconds = self.deadline
        return Attempt(sorted(reporting), dict(sorted(absent.items())), round_seconds, reporting)

    def _seconds(self, selected: list[int], steps: Ints, seed: int, number: int) -> Floats:
        """(C,) the seconds until each client reports; a client's time does not depend on the other clients."""
        slow = _uniform(selected, seed, 0, 0) < self.stragglers
        z = [NORMAL.inv_cdf(max(u, 2.0**-54)) for u in _uniform(selected, seed, number, 3).tolist()]
        slowness: Floats = np.where(slow, self.slowdown, 1.0) * np.exp(self.jitter * np.array(z))
        return self.step_seconds * steps * slowness


NORMAL = NormalDist()


def _uniform(clients: list[int], seed: int, *key: int) -> Floats:
    """(C,) one uniform number for each of the ascending `clients`; the numbers of other clients are skipped."""
    stream = random(seed, Stream.AVAILABILITY, *key)
    bits, last = stream.bit_generator, -1
    assert isinstance(bits, np.random.PCG64)
    numbers = np.empty(len(clients))
    for i, client in enumerate(clients):
        bits.advance(client - last - 1)
        numbers[i], last = stream.random(), client
    return numbers
