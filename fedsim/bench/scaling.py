"""Studies of growth: how a round's time and memory change with actors, clients in all, and clients a cohort.

Each takes the config as it is, its runtime too, and varies one thing; cases take turns, and have a process each.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from itertools import count, takewhile
from statistics import median
from typing import Any, TypeVar

from rich.console import Console

from fedsim.base.catalogue import Spec
from fedsim.base.machine import cores
from fedsim.bench.apart import apart
from fedsim.bench.figures import Column, Curve, Found
from fedsim.bench.parts import (
    FP32,
    Seconds,
    Side,
    in_turn,
    placed,
    rounds,
    simulated,
    spread,
    steps_of,
    times_as_fast,
)
from fedsim.bench.programs import PEERS, check_peers, program
from fedsim.bench.sides import SECONDS, STEPS, ray, ray_name
from fedsim.errors import ConfigError
from fedsim.experiment.build import build_data
from fedsim.experiment.config import Config
from fedsim.runtimes import RUNTIMES

Row = dict[str, Any]
Gives = TypeVar("Gives")

MOST_IN_COHORT = 10_000
MS = 1000
MB = 1e6
MEMORY = Column("memory_mb", "memory MB", ",.0f")
LOW, HIGH = Column("low", "least", ".2f"), Column("high", "most", ".2f")


def actors(config: Config, repeats: int, console: Console) -> Found:
    """Strong scaling: the config's round by 1, 2, 4 and so on Ray actors, up to the cores, a cluster each."""
    if "ray" not in RUNTIMES:
        raise ConfigError("--study: actors needs the ray runtime")
    simulation = simulated(config, "serial")
    kind, steps = simulation.runtime.home.type, steps_of(simulation)
    numbers = list(takewhile(lambda n: n <= cores(), (2**i for i in count())))
    cases = {n: apart(rounds, config, ray(n, kind)) for n in numbers}
    seconds, _ = timed({str(n): case for n, case in cases.items()}, repeats, console)
    rows = [{"actors": n} | _compared(seconds, str(n), "1") for n in numbers]
    for row in rows:
        row |= {"steps_per_second": steps / row["seconds"], "efficiency": row["ratio"] / row["actors"]}
    return Found(
        "actors",
        f"{steps} client steps by Ray actors",
        [
            Column("actors", "actors"),
            SECONDS,
            STEPS,
            Column("ratio", "speed-up", ".2f"),
            LOW,
            HIGH,
            Column("efficiency", "efficiency", ".0%"),
        ],
        rows,
        "speed-up: times as fast as one actor, the median, the least and the most of the turns",
        curves=[Curve("actors", "ratio", "Strong scaling", ("actors", "times as fast as one"), ideal=True)],
    )


def population(config: Config, repeats: int, console: Console) -> Found:
    """The config's round among 100, 1,000, 10,000 clients and so on, up to one an example; a process each."""
    examples = len(build_data(config).labels)
    numbers = _powers(100, examples)
    cases = {n: apart(rounds, _changed(config, data={"clients": n}), _runtime(config)) for n in numbers}
    base = 1000 if 1000 in numbers else numbers[0]
    seconds, memory = timed({str(n): case for n, case in cases.items()}, repeats, console)
    rows = [
        {
            "clients": n,
            "memory_mb": memory[str(n)] / MB,
            "memory_ratio": memory[str(n)] / memory[str(base)],
            **_compared(seconds, str(n), str(base), slower=True),
        }
        for n in numbers
    ]
    return Found(
        "population",
        f"a round by population, {examples:,} examples",
        [
            Column("clients", "clients", ",d"),
            Column("seconds", "seconds", ".4f"),
            Column("ratio", "ratio", ".2f"),
            LOW,
            HIGH,
            MEMORY,
            Column("memory_ratio", "ratio", ".2f"),
        ],
        rows,
        f"ratio: to {base:,} clients, the median, the least and the most of the turns; memory: a process's peak",
        curves=[
            Curve("clients", "seconds", "A round", ("clients in all", "seconds")),
            Curve("clients", "memory_mb", "Memory", ("clients in all", "peak MB")),
        ],
    )


def cohort(config: Config, repeats: int, console: Console) -> Found:
    """Cohorts of 10, 100, 1,000 idle clients and so on, up to the population; a process each."""
    numbers = _powers(10, min(config.data["clients"], MOST_IN_COHORT))
    cases = {
        n: apart(rounds, _changed(config, cohort={"name": "uniform", "size": n}), _runtime(config), None, True)
        for n in numbers
    }
    seconds, memory = timed({str(n): case for n, case in cases.items()}, repeats, console)
    rows = [
        {"cohort": n, "memory_mb": memory[str(n)] / MB}
        | {"ms_per_client": MS * median(seconds[str(n)]) / n, "seconds": median(seconds[str(n)])}
        | {"passes": seconds[str(n)]}
        for n in numbers
    ]
    return Found(
        "cohort",
        "a round of idle clients",
        [Column("cohort", "cohort", ",d"), SECONDS, Column("ms_per_client", "ms a client", ".3f"), MEMORY],
        rows,
        "memory: a process's peak",
        curves=[
            Curve("cohort", "ms_per_client", "An idle client", ("clients in the cohort", "milliseconds")),
            Curve("cohort", "memory_mb", "Memory", ("clients in the cohort", "peak MB")),
        ],
    )


def idle(config: Config, repeats: int, console: Console) -> Found:
    """A cohort of clients that take no step, by each runtime and by Flower: what a client costs by itself."""
    simulation, notes = simulated(config, "serial", FP32), list[str]()
    cohort, home = simulation.sample(), simulation.runtime.home
    cases: dict[str, AbstractContextManager[Side]] = {
        f"fedsim {name}": rounds(config, name, FP32, True)
        for name in ("serial", "threads", "vectorized")
        if name in RUNTIMES
    }
    if "ray" in RUNTIMES:
        actors = min(2, cores())
        cases[ray_name(actors)] = apart(rounds, config, ray(actors, home.type), FP32, True)
    try:
        check_peers(["flower"], "left out")
        cases[PEERS["flower"].label] = program("flower", simulation, True)
    except ConfigError as error:
        notes.append(str(error))
    seconds, _ = timed(cases, repeats, console, notes)
    rows: list[Row] = []
    for name, times in seconds.items():
        each = spread([MS * second / len(cohort) for second in times])
        rows.append({"runtime": name, "ms_per_client": each.median, "low": each.low, "high": each.high})
        rows[-1] |= {"seconds": median(times), "passes": times}
    return Found(
        "idle",
        f"{len(cohort)} idle clients, {simulation.server['model'].numel():,} parameters",
        [Column("runtime", "runtime"), SECONDS, Column("ms_per_client", "ms a client", ".3f"), LOW, HIGH],
        rows,
        "ms a client: the median, the least and the most of the turns",
        notes,
    )


def timed(
    cases: Mapping[str, AbstractContextManager[Callable[[], Gives]]],
    repeats: int,
    console: Console,
    notes: list[str] | None = None,
) -> tuple[Seconds, dict[str, Gives]]:
    """Seconds of each case's passes, and what the last one returned; a case that is refused becomes a note."""
    with ExitStack() as stack:
        entered = dict[str, Callable[[], Gives]]()
        for name, case in cases.items():
            try:
                entered[name] = stack.enter_context(case)
            except ConfigError as error:
                if notes is None:
                    raise
                notes.append(f"left out: {name}: {error}")
        last = dict[str, Gives]()

        def keeping(name: str) -> Side:
            return lambda: last.update({name: entered[name]()})

        return in_turn({name: keeping(name) for name in entered}, repeats, console), last


def _runtime(config: Config) -> Spec:
    return placed(config, config.runtime)


def _changed(config: Config, **changes: Spec) -> Config:
    data = config.data | changes.pop("data", {})
    return config.model_copy(update={"data": data, **changes})


def _powers(first: int, limit: int) -> list[int]:
    """`first`, ten times that and so on, up to `limit`."""
    return list(takewhile(lambda n: n <= limit, (first * 10**i for i in count()))) or [limit]


def _compared(seconds: Seconds, name: str, base: str, slower: bool = False) -> Row:
    """A case's median, and how many times as fast, or as slow, as another it is."""
    ratio = times_as_fast(seconds, base, name) if slower else times_as_fast(seconds, name, base)
    row: Row = {"seconds": median(seconds[name]), "passes": seconds[name]}
    return row | {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
