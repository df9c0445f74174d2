"""The learning rate over rounds, as a factor on `local.lr`."""

from math import cos, pi
from typing import Protocol

from fedsim.catalogue import Catalogue
from fedsim.types import Count, Positive


class Schedule(Protocol):
    """A factor for each round, counted from 0."""

    def __call__(self, number: int, /) -> float: ...


def constant(number: int, /) -> float:
    """The same learning rate in every round."""
    return 1.0


def step(number: int, /, *, every: Count, factor: Positive = 0.1) -> float:
    """Times `factor` after every so many rounds."""
    return factor ** (number // every)


def exponential(number: int, /, *, factor: Positive) -> float:
    """Times `factor` after each round; McMahan 2017 has 0.99 on CIFAR-10."""
    return factor**number


def cosine(number: int, /, *, rounds: Count) -> float:
    """(1 + cos(pi t / T)) / 2 over T = `rounds` rounds, then 0 (Loshchilov & Hutter 2017, no restarts)."""
    return (1 + cos(pi * min(number / rounds, 1))) / 2


SCHEDULES = Catalogue(
    "local.schedule",
    "fedsim",
    {name: f"schedules:{name}" for name in ("constant", "step", "exponential", "cosine")},
)
