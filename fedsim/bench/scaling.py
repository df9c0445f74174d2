"""Studies of growth: how a round's time and memory change with actors, clients in all, and clients a cohort.

Each takes the config as it is, its runtime too, and varies one thing; cases take turns, and have a process each.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count, takewhile
from statistics import median

from rich.console import Console

from fedsim.base.machine import cores
from fedsim.bench.figures import HIGH, LOW, RATIO, SECONDS, STEPS, Column, Curve, Result
from fedsim.bench.own_process import own_process
from fedsim.bench.programs import PEERS, check_peers, program
from fedsim.bench.sides import ray, ray_name
from fedsim.bench.simulations import FP32, placed, rounds, simulated, steps_of
from fedsim.bench.turns import Row, Side, compared, spread, timed
from fedsim.errors import ConfigError
from fedsim.experiment.build import build_data
from fedsim.experiment.config import Config
from fedsim.runtimes import RUNTIMES

MAX_COHORT = 10_000
MS = 1000
MB = 1e6
MEMORY = Column("memory_mb", "memory MB", ",.0f")
MS_PER_CLIENT = Column("ms_per_client", "ms a client", ".3f")


def actors(config: Config, repeats: int, console: Console) -> Result:
    """Strong scaling: the config's round by 1, 2, 4 and so on Ray actors, up to the cores, a cluster each."""
    if "ray" not in RUNTIMES:
        raise ConfigError("--study: actors needs the ray runtime")
    simulation = simulated(config, "serial")
    kind, steps = simulation.runtime.home.type, steps_of(simulation)
    cases = {n: own_process(rounds, config, ray(n, kind)) for n in _powers(1, cores(), 2)}
    seconds, _ = timed(cases, repeats, console)
    rows: list[Row] = [{"actors": n, **compared(seconds, n, 1)} for n in cases]
    for row in rows:
        row |= {"steps_per_second": steps / row["seconds"], "efficiency": row["ratio"] / row["actors"]}
    return Result(
        "actors",
        f"{steps} client steps by Ray actors",
        [
            Column("actors", "actors"),
            SECONDS,
            STEPS,
            RATIO._replace(heading="speed-up"),
            LOW,
            HIGH,
            Column("efficiency", "efficiency", ".0%"),
        ],
        rows,
        "speed-up: times as fast as one actor, the median, the least and the most of the turns",
        curves=[Curve("actors", "ratio", "Strong scaling", ("actors", "times as fast as one"), ideal=True)],
    )


def population(config: Config, repeats: int, console: Console) -> Result:
    """The config's round among 100, 1,000, 10,000 clients and so on, up to one an example; a process each."""
    examples, runtime = len(build_data(config).labels), placed(config, config.runtime)
    cases = {
        n: own_process(rounds, config.model_copy(update={"data": config.data | {"clients": n}}), runtime)
        for n in _powers(100, examples)
    }
    base = 1000 if 1000 in cases else min(cases)
    seconds, memory = timed(cases, repeats, console)
    rows = [
        {"clients": n, "memory_mb": memory[n] / MB, "memory_ratio": memory[n] / memory[base]}
        | compared(seconds, n, base, slower=True)
        for n in cases
    ]
    return Result(
        "population",
        f"a round by population, {examples:,} examples",
        [
            Column("clients", "clients", ",d"),
            SECONDS._replace(form=".4f"),
            RATIO,
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


def cohort(config: Config, repeats: int, console: Console) -> Result:
    """Cohorts of 10, 100, 1,000 idle clients and so on, up to the population; a process each."""
    runtime, cases = placed(config, config.runtime), dict[int, AbstractContextManager[Callable[[], int]]]()
    for n in _powers(10, min(config.data["clients"], MAX_COHORT)):
        sized = config.model_copy(update={"cohort": {"name": "uniform", "size": n}})
        cases[n] = own_process(rounds, sized, runtime, None, True)
    seconds, memory = timed(cases, repeats, console)
    rows = [
        {"cohort": n, "memory_mb": memory[n] / MB, "ms_per_client": MS * median(times) / n}
        | {"seconds": median(times), "passes": times}
        for n, times in seconds.items()
    ]
    return Result(
        "cohort",
        "a round of idle clients",
        [Column("cohort", "cohort", ",d"), SECONDS, MS_PER_CLIENT, MEMORY],
        rows,
        "memory: a process's peak",
        curves=[
            Curve("cohort", "ms_per_client", "An idle client", ("clients in the cohort", "milliseconds")),
            Curve("cohort", "memory_mb", "Memory", ("clients in the cohort", "peak MB")),
        ],
    )


def idle(config: Config, repeats: int, console: Console) -> Result:
    """A cohort of clients that take no step, by each runtime and by Flower: what a client costs by itself."""
    simulation, notes = simulated(config, "serial", FP32), list[str]()
    clients, kind = len(simulation.sample()), simulation.runtime.home.type
    cases: dict[str, AbstractContextManager[Side]] = {
        f"fedsim {name}": rounds(config, name, FP32, True)
        for name in ("serial", "threads", "vectorized")
        if name in RUNTIMES
    }
    if "ray" in RUNTIMES:
        actors = min(2, cores())
        cases[ray_name(actors)] = own_process(rounds, config, ray(actors, kind), FP32, True)
    try:
        check_peers(["flower"], "left out")
        cases[PEERS["flower"].label] = program("flower", simulation, True)
    except ConfigError as error:
        notes.append(str(error))
    seconds, _ = timed(cases, repeats, console, notes)
    rows = list[Row]()
    for name, times in seconds.items():
        each = spread([MS * second / clients for second in times])
        row: Row = {"runtime": name, "ms_per_client": each.median, "low": each.low, "high": each.high}
        rows.append(row | {"seconds": median(times), "passes": times})
    return Result(
        "idle",
        f"{clients} idle clients, {simulation.server['model'].numel():,} parameters",
        [Column("runtime", "runtime"), SECONDS, MS_PER_CLIENT, LOW, HIGH],
        rows,
        "ms a client: the median, the least and the most of the turns",
        notes,
    )


def _powers(first: int, limit: int, factor: int = 10) -> list[int]:
    """`first`, `factor` times that and so on, up to `limit`; `limit` where it is less than `first`."""
    return list(takewhile(lambda n: n <= limit, (first * factor**i for i in count()))) or [limit]
