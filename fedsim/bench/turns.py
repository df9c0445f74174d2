"""Passes timed in turns, so that what else the machine does falls on all sides; ratios are taken turn by turn."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import track

from fedsim.errors import ConfigError

Key = TypeVar("Key")
Gives = TypeVar("Gives")
Side = Callable[[], object]  # one pass over the round's client steps
Seconds = dict[Key, list[float]]  # of each side's passes, turn by turn
Row = dict[str, Any]


class Spread(NamedTuple):
    """Of one figure over the turns."""

    median: float
    low: float
    high: float


def reported(
    sides: Mapping[Key, Callable[[], float]], repeats: int, console: Console, warm_up: int = 1
) -> Seconds[Key]:
    """The seconds that each side returns, in `repeats` turns after `warm_up` ones that do not count."""
    seconds: Seconds[Key] = {name: [] for name in sides}
    passes = [(turn, name) for turn in range(warm_up + repeats) for name in sides]
    for turn, name in track(passes, "passes", console=console, transient=True):
        took = sides[name]()
        if turn >= warm_up:
            seconds[name].append(took)
    return seconds


def in_turn(sides: Mapping[Key, Side], repeats: int, console: Console) -> Seconds[Key]:
    """The seconds of each side's passes, in `repeats` turns after one that does not count."""

    def clocked(side: Side) -> float:
        start = perf_counter()
        side()
        return perf_counter() - start

    return reported({name: partial(clocked, side) for name, side in sides.items()}, repeats, console)


def timed(
    cases: Mapping[Key, AbstractContextManager[Callable[[], Gives]]],
    repeats: int,
    console: Console,
    notes: list[str] | None = None,
) -> tuple[Seconds[Key], dict[Key, Gives]]:
    """Seconds of each case's passes, and what the last one returned.

    With `notes` a case that raises ConfigError at its start becomes a note, unless all do.
    """
    entered, refused, last = dict[Key, Callable[[], Gives]](), list[str](), dict[Key, Gives]()
    with ExitStack() as stack:
        for name, case in cases.items():
            try:
                entered[name] = stack.enter_context(case)
            except ConfigError as error:
                if notes is None:
                    raise
                refused.append(f"{name}: {error}")
        if not entered:
            raise ConfigError(refused[0])
        if notes is not None:
            notes += [f"left out: {each}" for each in refused]

        def keep(name: Key) -> None:
            last[name] = entered[name]()

        return in_turn({name: partial(keep, name) for name in entered}, repeats, console), last


def times_as_fast(seconds: Seconds[Key], name: Key, base: Key) -> Spread:
    """How many times as fast as `base` a side is, turn by turn."""
    return spread([b / s for b, s in zip(seconds[base], seconds[name], strict=True)])


def compared(seconds: Seconds[Key], name: Key, base: Key, *, slower: bool = False) -> Row:
    """A side's median and passes, and how many times as fast, or as slow, as `base` it is."""
    ratio = times_as_fast(seconds, base, name) if slower else times_as_fast(seconds, name, base)
    times = seconds[name]
    row: Row = {"seconds": median(times), "passes": times, "least": min(times), "most": max(times)}
    return row | {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def spread(values: list[float]) -> Spread:
    """Median, least and greatest."""
    return Spread(median(values), min(values), max(values))
