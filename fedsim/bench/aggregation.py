"""A study of the exact weighted mean: bytes of messages a second, against copying the same bytes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fedsim.base.devices import one_thread
from fedsim.base.machine import cores
from fedsim.bench.figures import Column, Result
from fedsim.bench.simulations import FP32, simulated
from fedsim.bench.turns import Row, Side, compared, timed
from fedsim.experiment.config import Config
from fedsim.federated.aggregate import Partial, WeightedMean

MEAN, COPY = "exact weighted mean", "memory copy"
Numbered = list[tuple[int, Tensor]]  # messages, each with its client


def aggregation(config: Config, repeats: int, console: Console) -> Result:
    """A cohort's messages, each the size of the config's network: by one thread, and by a thread a core."""
    simulation = simulated(config, "serial", FP32)
    length, clients = len(simulation.server["model"]), len(simulation.sample())
    messages = [(k, torch.randn(length, generator=torch.Generator().manual_seed(k))) for k in range(clients)]
    copies = [torch.zeros(length) for _ in messages]
    size, counts = sum(message.nbytes for _, message in messages), sorted({1, cores()})

    def copy(share: Numbered) -> None:
        for number, message in share:
            copies[number].copy_(message)

    cases = dict[tuple[str, int], AbstractContextManager[Side]]()
    for threads in counts:
        cases[MEAN, threads] = _in_threads(messages, threads, _fold, _total)
        cases[COPY, threads] = _in_threads(messages, threads, copy, list)
    seconds, _ = timed(cases, repeats, console)
    rows = list[Row]()
    for what, threads in cases:
        row = compared(seconds, (what, threads), (COPY, threads))
        speed = {"what": what, "threads": threads, "gb_per_second": size / row["seconds"] / 1e9}
        rows.append(speed | {"share": row["ratio"]} | {key: row[key] for key in ("low", "high", "passes")})
    return Result(
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
        extra={"bytes": size},
    )


@contextmanager
def _in_threads(
    messages: Numbered, threads: int, work: Callable[[Numbered], Any], end: Callable[[list[Any]], object]
) -> Iterator[Side]:
    """`work` on a share of the messages in each thread, and `end` on what they return."""
    shares = [share for i in range(threads) if (share := messages[i::threads])]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda: end(list(pool.map(work, shares)))


def _fold(share: Numbered) -> Partial:
    return WeightedMean().fold((number, {"delta": message}, 1.0 + number) for number, message in share)


def _total(sums: list[Partial]) -> None:
    """Sums of messages become one, as in a round."""
    mean = WeightedMean()
    with one_thread():
        mean.result(reduce(mean.merge, sums))
