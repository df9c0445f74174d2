"""Clients of a cohort as one batch of networks: their weights are (C, P), and one kernel computes for all of them.

Chunks of clients are batches for `torch.func.vmap`, of similar numbers of steps each; a chunk's results depend on
nothing but its clients. They equal a single client's up to rounding.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from itertools import count, islice, pairwise
from time import perf_counter
from typing import Literal, NamedTuple

import torch

from fedsim.base.devices import one_thread
from fedsim.base.machine import cores, memory
from fedsim.data import FederatedData
from fedsim.errors import ConfigError, RoundError
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import Train, Work, check_update
from fedsim.federated.fold import Fold
from fedsim.federated.runtime import Call, Item, Results, Runtime
from fedsim.runtimes.cuda import new_stream, on_stream, repeat_on_gpus
from fedsim.runtimes.threads import Threads
from fedsim.runtimes.vectorized.compute import Client, updates
from fedsim.runtimes.vectorized.graph import Graphs, capturable
from fedsim.runtimes.vectorized.probe import bytes_per_client, check_batchable, check_options
from fedsim.runtimes.window import in_window
from fedsim.training.batched.layers import ConvMethod
from fedsim.training.batched.objective import Network
from fedsim.training.recipe import Recipe
from fedsim.training.task import Task
from fedsim.types import Count, Job, Report, State, Update

MAX_CLIENTS_ON_CPU = 64  # clients in a batch
MIN_CLIENTS_ON_CPU = 4
CACHE = 2**24  # bytes of weights in a batch on a CPU: with more, memory is what it waits for
MAX_CLIENTS_ON_GPU = 256
SHARE = 0.35  # of the memory: a graph has as much of its own, and there are the data
WINDOW = 32  # chunks, of whose clients those with as many steps go together


class Row(NamedTuple):
    """A client, and the place of the call that it belongs to."""

    call: int
    job: Job


class Vectorized(Runtime):
    """Chunks of clients as one batch of networks; equal to the other runtimes up to rounding.

    `chunk` is how many clients make a batch; `auto` takes what memory allows. `conv` is how their convolutions
    are computed: as products of matrices (`im2col`), or as one grouped convolution (`grouped`), as `vmap` does;
    `auto` is `grouped` on a CPU and `im2col` on a GPU. Each of `workers` threads takes a chunk at a time, on a GPU
    on a stream of its own. With `graphs` a GPU is given a chunk's work as one CUDA graph where it can be: no
    augmentation, data on the device, and dropout only where its clients have as many examples each.
    """

    exact = False
    batches_runs = True

    def __init__(
        self,
        task: Task,
        data: FederatedData,
        /,
        *,
        chunk: Count | Literal["auto"] = "auto",
        conv: Literal["auto", "im2col", "grouped"] = "auto",
        workers: Count | Literal["auto"] = "auto",
        graphs: bool = True,
        device: str = "auto",
    ):
        self.singly = Threads(task, data, device=device)  # for all works but training
        self.devices, self.home = self.singly.devices, self.singly.home
        on_cpu = self.home.type == "cpu"
        if workers == "auto":
            workers = cores() if on_cpu else len(self.devices)
        self.conv: ConvMethod = conv if conv != "auto" else "grouped" if on_cpu else "im2col"
        if not on_cpu:
            repeat_on_gpus()
        self.task, self.num_workers, self.chunk, self.graphs = task, workers, chunk, graphs
        self.data = self.singly.data
        self.pool = ThreadPoolExecutor(workers, "chunk")
        self.local = threading.local()
        self.number = count()  # of the next worker
        self.fits: dict[int, int] = {}  # how many clients memory allows, by batch size
        self.most = MAX_CLIENTS_ON_GPU
        self.recorded: list[Graphs] = []  # by worker
        self.first: AbstractContextManager[object] = threading.Lock()

    @property
    def workers(self) -> int:
        return self.num_workers

    def check(self, work: Train) -> None:
        check_options(work)
        super().check(work)
        with one_thread():
            check_batchable(Network(self.task, self.home, self.conv), self.data[self.home], work)

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        if not isinstance(work, Train):
            yield from self.singly.run(work, server, jobs, aggregator)
            return
        call = Call(work, server, [], aggregator)
        for _, partial, reports in self._run([call], [work], (Row(0, job) for job in jobs)):
            yield partial, reports

    def map(
        self, work: Work, server: State, items: Iterable[Item]
    ) -> Iterator[tuple[Item, Update | BaseException]]:
        return self.singly.map(work, server, items)

    def run_many(self, calls: Sequence[Call]) -> list[list[tuple[Partial, list[Report]]]]:
        """What `run` yields for each call; those that differ only in seed, state and lr go as one batch."""
        results: list[list[tuple[Partial, list[Report]]]] = [[] for _ in calls]
        alike: dict[object, list[int]] = {}
        for i, call in enumerate(calls):
            if isinstance(call.work, Train):
                settings = repr((call.work.strategy, replace(call.work.recipe, lr=1.0)))
                alike.setdefault(settings, []).append(i)
            else:
                results[i] += self.singly.run(*call)
        for places in alike.values():
            together = [calls[i] for i in places]
            works = [call.work for call in together if isinstance(call.work, Train)]
            rows = (Row(place, job) for place, call in enumerate(together) for job in call.jobs)
            for place, partial, reports in self._run(together, works, rows):
                results[places[place]].append((partial, reports))
        return results

    def _run(
        self, calls: Sequence[Call], works: Sequence[Train], rows: Iterator[Row]
    ) -> Iterator[tuple[int, Partial, list[Report]]]:
        """Partial results and reports, with the place of their call."""
        on_device = {d: [{n: t.to(d) for n, t in c.server.items()} for c in calls] for d in self.devices}
        folds: dict[tuple[int, int], Fold] = {}  # by thread and call
        size = self._size(works[0])

        def run_chunk(chunk: list[Row]) -> list[tuple[int, Report]]:
            if not hasattr(self.local, "network"):
                self._start_worker()
            network: Network = self.local.network
            with on_stream(self.local.stream):
                servers = on_device[network.device]
                clients = [Client(works[i], servers[i], job) for i, job in chunk]
                began, done = perf_counter(), list[tuple[int, Report]]()
                with self.first:  # alone: PyTorch 2.15 on a CPU may crash where two threads first use convolutions
                    outcomes = self._attempt(network, clients)
                self.first = nullcontext()
                each = (perf_counter() - began) / len(chunk)
                for (i, job), outcome in zip(chunk, outcomes, strict=True):
                    key = threading.get_ident(), i
                    if key not in folds:
                        folds[key] = Fold(calls[i].aggregator)
                    report = folds[key].add(job, _sound(outcome, job), began)
                    done.append((i, report._replace(seconds=each)))
            return done

        chunks = self._chunks(rows, size, works[0].recipe)
        with closing(in_window(self.pool, run_chunk, chunks, lambda: 2 * self.workers)) as finished:
            for i, report in (pair for done in finished for chunk in done for pair in chunk):
                yield i, calls[i].aggregator.fold([]), [report]
        for (_, i), fold in folds.items():
            yield i, fold.partial, []

    def _size(self, work: Train) -> int:
        """How many clients make a batch; on one machine always the same, unless memory ran out."""
        if self.chunk != "auto":
            return min(self.chunk, self.most)
        batch = work.recipe.batch_size_of(int(self.data[self.home].sizes.max()))
        if batch not in self.fits:
            need = bytes_per_client(self.task, work, self.conv == "im2col", batch)
            self.fits[batch] = max(1, int(SHARE * _memory(self.home) / (self.workers * need)))
        near = max(CACHE // self.task.initial_model.nbytes, MIN_CLIENTS_ON_CPU)
        return min(self.fits[batch], self.most, *([near, MAX_CLIENTS_ON_CPU] if self.home.type == "cpu" else []))

    def _chunks(self, rows: Iterator[Row], size: int, recipe: Recipe) -> Iterator[list[Row]]:
        """Chunks of `size` clients, those of most steps first; looks at a bounded number of clients at a time."""
        sizes = self.singly.data[self.home].sizes

        def longest(row: Row) -> tuple[int, int]:
            n = int(sizes[row.job.client_id])
            return -recipe.num_steps(n), -n

        while window := list(islice(rows, WINDOW * size)):
            window.sort(key=longest)
            parts = -(-len(window) // size)
            if self.chunk == "auto":  # as much work for each
                parts = min(-(-parts // self.workers) * self.workers, len(window))
            ends = [len(window) * i // parts for i in range(parts + 1)]
            yield from (window[a:b] for a, b in pairwise(ends))

    def _attempt(self, network: Network, batch: Sequence[Client]) -> list[Update | Exception]:
        """What each client computes, or why not: a batch that fails is halved, down to the client at fault."""
        try:
            return list(self._updates(network, batch))
        except (ConfigError, RoundError):
            raise
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                return [error]
            self.most = min(self.most, max(1, len(batch) // 2))
            warnings.warn(
                f"runtime.chunk: {len(batch)} clients need too much memory; from now on {self.most}",
                stacklevel=2,
            )
        except Exception as error:
            if len(batch) == 1:
                return [error]
        half = len(batch) // 2
        return self._attempt(network, batch[:half]) + self._attempt(network, batch[half:])

    def _updates(self, network: Network, batch: Sequence[Client]) -> list[Update]:
        data = self.data[network.device]
        if not self.graphs or network.device.type != "cuda" or not capturable(data, batch[0].work):
            return updates(network, data, batch)
        if not hasattr(self.local, "graphs"):
            self.local.graphs = Graphs(network, data)
            self.recorded.append(self.local.graphs)
        graphs: Graphs = self.local.graphs
        return graphs(batch)

    def _start_worker(self) -> None:
        device = self.devices[next(self.number) % len(self.devices)]
        if device.type == "cpu":
            torch.set_num_threads(1)  # this thread's
        self.local.network = Network(self.task, device, self.conv)
        self.local.stream = new_stream(device)


def _sound(outcome: Update | Exception, job: Job) -> Update | Exception:
    """The update, or why a client could not go on from it."""
    if not isinstance(outcome, Exception):
        try:
            check_update(outcome, job.client or {})
        except ArithmeticError as error:
            return error
    return outcome


def _memory(device: torch.device) -> int:
    """All bytes of a device, of which some may be in use: what is free differs from run to run."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory()
