"""A study of the exact weighted mean: bytes of messages a second, against copying the same bytes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fedsim.base.devices import one_thread
from fedsim.base.machine import cores
from fedsim.bench.figures import Column, Found
from fedsim.bench.parts import FP32, Side, simulated, times_as_fast
from fedsim.bench.scaling import timed
from fedsim.experiment.config import Config
from fedsim.federated.aggregate import Partial, WeightedMean

MEAN, COPY = "exact weighted mean", "memory copy"


def aggregation(config: Config, repeats: int, console: Console) -> Found:
    """A cohort's messages, each the size of the config's network: by one thread, and by a thread a core."""
    simulation = simulated(config, "serial", FP32)
    length, clients = len(simulation.server["model"]), len(simulation.sample())
    messages = [torch.randn(length, generator=torch.Generator().manual_seed(k)) for k in range(clients)]
    size, counts = sum(message.nbytes for message in messages), sorted({1, cores()})
    cases: dict[str, AbstractContextManager[Side]] = {}
    for threads in counts:
        cases[f"{MEAN}, {threads}"] = _in_threads(messages, threads, _mean)
        cases[f"{COPY}, {threads}"] = _in_threads(messages, threads, _copier(messages))
    seconds, _ = timed(cases, repeats, console)
    rows: list[dict[str, Any]] = []
    for threads in counts:
        for what in (MEAN, COPY):
            name = f"{what}, {threads}"
            share = times_as_fast(seconds, name, f"{COPY}, {threads}")
            row = {"what": what, "threads": threads, "gb_per_second": size / median(seconds[name]) / 1e9}
            row |= {"share": share.median, "low": share.low, "high": share.high, "passes": seconds[name]}
            rows.append(row)
    return Found(
        "aggregation",
        f"{clients} messages of {length:,} float32, {size / 1e6:,.0f} MB",
        [
            Column("what", "what"),
            Column("threads", "threads"),
            Column("gb_per_second", "GB/s", ".2f"),
            Column("share", "share", ".0%"),
            Column("low", "least", ".0%"),
            Column("high", "most", ".0%"),
        ],
        rows,
        "bytes of messages a second; share: of the copy's, the median, the least and the most of the turns",
        more={"bytes": size},
    )


Work = Callable[[list[tuple[int, Tensor]]], Any]  # on some of the messages, each with its number


@contextmanager
def _in_threads(messages: list[Tensor], threads: int, work: Work) -> Iterator[Side]:
    """The messages dealt to so many threads; sums of messages become one, as in a round."""
    numbered = list(enumerate(messages))
    shares = [numbered[i::threads] for i in range(threads) if numbered[i::threads]]
    aggregator = WeightedMean()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def side() -> None:
            done = list(pool.map(work, shares))
            if work is _mean:
                with one_thread():
                    aggregator.result(reduce(aggregator.merge, done))

        yield side


def _mean(share: list[tuple[int, Tensor]]) -> Partial:
    return WeightedMean().fold((number, {"delta": message}, 1.0 + number) for number, message in share)


def _copier(messages: list[Tensor]) -> Work:
    room = [torch.zeros_like(message) for message in messages]

    def copy(share: list[tuple[int, Tensor]]) -> None:
        for number, message in share:
            room[number].copy_(message)

    return copy
