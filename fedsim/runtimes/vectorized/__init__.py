"""Clients of a cohort as one batch of networks: their weights are (C, P), and one kernel computes for all of them.

Each chunk of clients is a batch for `torch.func.vmap`, of clients with similar numbers of steps. The results of a
chunk depend only on its clients, and equal those of single clients up to rounding.
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
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import CommonError, Train, Work, keyed_only
from fedsim.federated.fold import Fold
from fedsim.federated.runtime import Call, Item, Outcomes, Results, Runtime
from fedsim.runtimes.cuda import make_gpus_deterministic, new_stream, on_stream
from fedsim.runtimes.slots import check_workers
from fedsim.runtimes.threads import Threads
from fedsim.runtimes.vectorized.compute import Client, updates
from fedsim.runtimes.vectorized.graph import Graphs, capturable
from fedsim.runtimes.vectorized.probe import bytes_per_client, check_batchable, check_options
from fedsim.runtimes.window import in_window
from fedsim.training.batched.layers import ConvMethod
from fedsim.training.batched.objective import Network
from fedsim.training.recipe import Recipe
from fedsim.training.task import Task
from fedsim.types import Count, Job, Outcome, Report, State, Update

MAX_CLIENTS_ON_CPU = 64  # clients in a batch
MIN_CLIENTS_ON_CPU = 4
CACHED_WEIGHT_BYTES = 2**24  # of weights in a batch on a CPU; more would not fit in the cache
MAX_CLIENTS_ON_GPU = 256
MEMORY_FRACTION = 0.35  # of the memory; a CUDA graph takes as much again, and the data are there, too
WINDOW_CHUNKS = 32  # clients of so many chunks are sorted by their numbers of steps


class Row(NamedTuple):
    """A client, and the index of the call that it belongs to."""

    call: int
    job: Job


class Vectorized(Runtime):
    """Chunks of clients as one batch of networks; equal to the other runtimes up to rounding.

    `chunk` is the number of clients in a batch; `auto` is as many as fit in memory. `conv` says how convolutions
    are computed: as matrix products (`im2col`), or as one grouped convolution (`grouped`), as `vmap` does; `auto`
    is `grouped` on a CPU and `im2col` on a GPU. Each of the `workers` threads trains one chunk at a time, on a GPU
    in its own stream. With `graphs`, a GPU runs a chunk as one CUDA graph if possible: without augmentation, with
    data on the device, and with dropout only if the clients have equally many examples.
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
        self.threads = Threads(task, data, device=device)  # for all work except training
        self.devices, self.home = self.threads.devices, self.threads.home
        on_cpu = self.home.type == "cpu"
        if workers == "auto":
            workers = cores() if on_cpu else len(self.devices)
        check_workers(workers)
        self.conv: ConvMethod = conv if conv != "auto" else "grouped" if on_cpu else "im2col"
        if not on_cpu:
            make_gpus_deterministic()
        self.task, self.num_workers, self.chunk, self.graphs = task, workers, chunk, graphs
        self.data = self.threads.data
        self.pool = ThreadPoolExecutor(workers, "chunk")
        self.local = threading.local()
        self.worker_number = count()  # index of the next worker
        self.fit_in_memory: dict[int, int] = {}  # clients in a chunk, by batch size
        self.max_clients = MAX_CLIENTS_ON_GPU
        self.all_graphs: list[Graphs] = []  # by worker
        self.first_chunk: AbstractContextManager[object] = threading.Lock()

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
            yield from self.threads.run(work, server, jobs, aggregator)
            return
        call = Call(work, server, [], aggregator)
        for _, partial, reports in self._run([call], [work], (Row(0, job) for job in jobs)):
            yield partial, reports

    def map(self, work: Work, server: State, items: Iterable[Item]) -> Outcomes[Item]:
        return self.threads.map(work, server, items)

    def run_many(self, calls: Sequence[Call]) -> list[list[tuple[Partial, list[Report]]]]:
        """A list of what `run` yields for each call; calls that differ only in seed, state or lr share batches."""
        results: list[list[tuple[Partial, list[Report]]]] = [[] for _ in calls]
        alike: dict[object, list[int]] = {}
        for i, call in enumerate(calls):
            if isinstance(call.work, Train):
                settings = repr((call.work.strategy, replace(call.work.recipe, lr=1.0), len(call.work.cohort)))
                alike.setdefault(settings, []).append(i)
            else:
                results[i] += self.threads.run(*call)
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
        """Partial sums and reports, with the index of their call."""
        on_device = {d: [{n: t.to(d) for n, t in c.server.items()} for c in calls] for d in self.devices}
        folds: dict[tuple[int, int], Fold] = {}  # by thread and call
        size = self._size(works[0])

        def run_chunk(chunk: list[Row]) -> list[tuple[int, Report]]:
            if not hasattr(self.local, "network"):
                self._start_worker()
            network: Network = self.local.network
            with on_stream(self.local.stream):
                servers = on_device[network.device]
                clients = [Client(works[i], works[i].download(servers[i], job), job) for i, job in chunk]
                began, done = perf_counter(), list[tuple[int, Report]]()
                # Alone: PyTorch 2.15 may crash if two threads use convolutions for the first time.
                with self.first_chunk:
                    outcomes = self._attempt(network, clients)
                self.first_chunk = nullcontext()
                each = (perf_counter() - began) / len(chunk)
                data = self.data[network.device]
                for (i, job), client, outcome in zip(chunk, clients, outcomes, strict=True):
                    key = threading.get_ident(), i
                    if key not in folds:
                        folds[key] = Fold(calls[i].aggregator)
                    report = folds[key].add(job, _checked(outcome, client, data), began)
                    done.append((i, report._replace(seconds=each)))
            return done

        chunks = self._chunks(rows, size, works[0].recipe)
        with closing(in_window(self.pool, run_chunk, chunks, lambda: 2 * self.workers)) as finished:
            for i, report in (pair for done in finished for chunk in done for pair in chunk):
                yield i, calls[i].aggregator.fold([]), [report]
        for (_, i), fold in folds.items():
            yield i, fold.partial, []

    def _size(self, work: Train) -> int:
        """The number of clients in a batch; on one machine always the same, unless memory ran out."""
        if self.chunk != "auto":
            return min(self.chunk, self.max_clients)
        batch = work.recipe.batch_size_of(int(self.data[self.home].sizes.max())) + work.recipe.min_batch - 1
        if batch not in self.fit_in_memory:
            need = bytes_per_client(self.task, work, self.conv == "im2col", batch)
            self.fit_in_memory[batch] = max(1, int(MEMORY_FRACTION * _memory(self.home) / (self.workers * need)))
        fit_in_cache = max(CACHED_WEIGHT_BYTES // self.task.initial_model.nbytes, MIN_CLIENTS_ON_CPU)
        return min(
            self.fit_in_memory[batch],
            self.max_clients,
            *([fit_in_cache, MAX_CLIENTS_ON_CPU] if self.home.type == "cpu" else []),
        )

    def _chunks(self, rows: Iterator[Row], size: int, recipe: Recipe) -> Iterator[list[Row]]:
        """Chunks of `size` clients, most steps first; it sorts a bounded number of clients at a time."""
        sizes = self.threads.data[self.home].sizes

        def longest(row: Row) -> tuple[int, int]:
            n = int(sizes[row.job.client_id])
            return -recipe.num_steps(n), -n

        while window := list(islice(rows, WINDOW_CHUNKS * size)):
            window.sort(key=longest)
            parts = -(-len(window) // size)
            if self.chunk == "auto":  # equally many for each worker
                parts = min(-(-parts // self.workers) * self.workers, len(window))
            ends = [len(window) * i // parts for i in range(parts + 1)]
            yield from (window[a:b] for a, b in pairwise(ends))

    def _attempt(self, network: Network, batch: Sequence[Client]) -> list[Outcome]:
        """The update or error of each client; a batch that fails is halved until the failing client is found."""
        try:
            work = batch[0].work
            return list(keyed_only(work, network.task, network.device, lambda: self._updates(network, batch)))
        except (CommonError, KeyboardInterrupt):
            raise
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                return [error]
            self.max_clients = min(self.max_clients, max(1, len(batch) // 2))
            warnings.warn(
                f"runtime.chunk: out of memory with {len(batch)} clients, continuing with {self.max_clients}",
                stacklevel=2,
            )
        except BaseException as error:
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
            self.all_graphs.append(self.local.graphs)
        graphs: Graphs = self.local.graphs
        return graphs(batch)

    def _start_worker(self) -> None:
        device = self.devices[next(self.worker_number) % len(self.devices)]
        if device.type == "cpu":
            torch.set_num_threads(1)  # this thread's
        self.local.network = Network(self.task, device, self.conv)
        self.local.stream = new_stream(device)


def _checked(outcome: Outcome, client: Client, data: FederatedData) -> Outcome:
    """The update, or an error if it cannot be used. Raises CommonError."""
    if not isinstance(outcome, BaseException):
        work, server, job = client
        try:
            work.check_update(outcome, job, len(data.rows(job.client_id)), server["model"].dtype)
        except CommonError:
            raise
        except Exception as error:
            return error
    return outcome


def _memory(device: torch.device) -> int:
    """All bytes of a device, used ones too, because the free bytes differ from run to run."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory()
