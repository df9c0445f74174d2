"""Learning-rate schedules: a factor on `local.lr` at each time; time is in rounds and may be fractional."""

from math import cos, pi
from typing import Protocol

from fedsim.base.catalogue import Catalogue
from fedsim.types import Count, Positive


class Schedule(Protocol):
    """The factor at `time`, in rounds from 0."""

    def __call__(self, time: float, /) -> float: ...


def constant(time: float, /) -> float:
    """The same learning rate in every round."""
    return 1.0


def step(time: float, /, *, every: Count, factor: Positive = 0.1) -> float:
    """The learning rate is multiplied by `factor` after each `every` rounds."""
    return float(factor ** (time // every))


def exponential(time: float, /, *, factor: Positive) -> float:
    """The learning rate is multiplied by `factor` after each round; McMahan 2017 uses 0.99 on CIFAR-10."""
    return float(factor**time)


def cosine(time: float, /, *, rounds: Count) -> float:
    """(1 + cos(pi t / T)) / 2 over T = `rounds` rounds, then 0 (Loshchilov & Hutter 2017, no restarts)."""
    return (1 + cos(pi * min(time / rounds, 1))) / 2


SCHEDULES = Catalogue(
    "local.schedule",
    "fedsim.training",
    {name: f"schedules:{name}" for name in ("constant", "step", "exponential", "cosine")},
)
