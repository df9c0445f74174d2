"""Clients side by side in threads: one network a worker, shared data, no processes.

PyTorch computes without the interpreter's lock, so threads keep all cores, or one GPU, busy; processes could not
share the data, nor several of them a GPU without switching context.
"""

import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from time import perf_counter
from typing import Literal, TypeVar

import torch

from fedsim.base.devices import devices
from fedsim.base.machine import cores
from fedsim.data import FederatedData
from fedsim.errors import one_line
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train, Work
from fedsim.federated.fold import Fold
from fedsim.federated.runtime import Item, Results, Runtime
from fedsim.runtimes.cuda import on_stream
from fedsim.runtimes.slots import Slots
from fedsim.runtimes.window import in_window
from fedsim.runtimes.worker import Worker
from fedsim.training.graphs import CAPTURING
from fedsim.training.task import Task
from fedsim.types import Count, Job, Report, State, Update

Result = TypeVar("Result")
Outcome = Update | BaseException

MAX_WORKERS_PER_GPU = 8  # one stream each, and all in one interpreter
USED = 0.9  # of a GPU's free memory
SUMS = 40  # bytes that adding messages up takes for each byte of one: exact sums, and what waits to be added


class Threads(Runtime):
    """Several clients at once in a pool of threads; several GPUs take turns.

    Each worker has a network of its own, on the CPU one intra-op thread, on a GPU one stream. `auto` is a worker
    a core; on GPUs the first client trains alone, and `auto` is then as many as fit by the memory that it took, up
    to 8 each. Where clients run out of memory all the same, there are half as many workers from then on, and they
    run again. Workers merge what their clients send, so that memory does not grow with the cohort. With `graphs`,
    training steps on a GPU are captured as CUDA graphs where they can be.
    """

    def __init__(
        self,
        task: Task,
        data: FederatedData,
        /,
        *,
        workers: Count | Literal["auto"] = "auto",
        graphs: bool = True,
        device: str = "auto",
    ):
        self.devices = devices(device)
        self.home = self.devices[0]
        self.task, self.graphs = task, graphs
        self.data = {device: data.to(device) for device in self.devices}
        on_gpu = self.home.type == "cuda"
        if workers == "auto":
            most = min(cores(), MAX_WORKERS_PER_GPU) * len(self.devices) if on_gpu else cores()
        else:
            most = workers
        self.measures = workers == "auto" and on_gpu  # until the first client has trained
        if self.measures:
            torch.cuda.reset_peak_memory_stats(self.home)
        self.reserved = torch.cuda.memory_reserved(self.home) if self.measures else 0
        self.slots, self.most = Slots(1 if self.measures else most), most
        self.networks: dict[int, Worker] = {}  # by slot
        self.pool = ThreadPoolExecutor(most, "client")
        self.first: AbstractContextManager[object] = threading.Lock()

    @property
    def workers(self) -> int:
        """How many clients run side by side from now on."""
        return self.slots.number

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        folds: dict[int, Fold] = {}  # by slot

        def fold(slot: int, job: Job, outcome: Outcome, began: float) -> Report:
            if slot not in folds:
                folds[slot] = Fold(aggregator)
            report = folds[slot].add(job, outcome, began)
            if self.measures and isinstance(work, Train) and report.error is None:
                self._fill(report.bytes_up)
            return report

        with closing(self._each(work, server, jobs, fold)) as finished:
            for report in finished:
                yield aggregator.fold([]), [report]
        for total in folds.values():
            yield total.partial, []

    def map(self, work: Work, server: State, items: Iterable[Item]) -> Iterator[tuple[Item, Outcome]]:
        return self._each(work, server, items, lambda slot, item, outcome, began: (item, outcome))

    def _each(
        self,
        work: Work,
        server: State,
        items: Iterable[Item],
        then: Callable[[int, Item, Outcome, float], Result],
    ) -> Generator[Result, None, None]:
        """What `then` makes, in the slot's thread, of slot, item, outcome and the perf_counter when it began."""
        on_device = {device: {n: t.to(device) for n, t in server.items()} for device in self.devices}
        stopped = threading.Event()

        def run_one(item: Item) -> Result:
            if self.home.type == "cpu":
                torch.set_num_threads(1)  # this thread's
            while True:
                with self.slots.take() as (slot, workers):
                    if stopped.is_set():
                        raise CancelledError
                    worker, began = self.networks.get(slot) or self._add_worker(slot), perf_counter()
                    with (
                        self.first
                    ):  # alone: PyTorch 2.15 on a CPU may crash where two threads first use convolutions
                        outcome = worker.run(work, on_device[worker.replica.device], item)
                    self.first = nullcontext()
                    if not (isinstance(outcome, torch.OutOfMemoryError) and workers > 1):
                        with on_stream(worker.stream):
                            return then(slot, item, outcome, began)
                    cause = one_line(outcome)
                    del outcome, worker  # and with them what the client had
                    self.networks.pop(slot, None)
                self._shrink(workers, cause)

        with closing(in_window(self.pool, run_one, items, lambda: 2 * self.workers, stopped.set)) as finished:
            for results in finished:
                yield from results

    def _add_worker(self, slot: int) -> Worker:
        device = self.devices[slot % len(self.devices)]
        worker = self.networks[slot] = Worker(self.task, self.data[device], device, graphs=self.graphs)
        return worker

    def _fill(self, message: int) -> None:
        """Have as many workers as fit by what the first one took, with sums of messages of so many bytes."""
        self.measures = False
        one = max(torch.cuda.max_memory_reserved(self.home) - self.reserved + SUMS * message, 1)
        fit = [int(USED * torch.cuda.mem_get_info(device)[0]) // one for device in self.devices]
        fit[0] += 1  # the first one, which is there
        self.slots.change(1, min(max(min(fit), 1) * len(self.devices), self.most))

    def _shrink(self, before: int, cause: str) -> None:
        """Half as many workers as `before`, unless another client has seen to it."""
        if self.slots.change(before, before // 2):
            warnings.warn(
                f"runtime.workers: out of memory with {before} at once, going on with {before // 2}; {cause}",
                RuntimeWarning,
                stacklevel=2,
            )
        for slot in [slot for slot in list(self.networks) if slot >= self.workers]:
            self.networks.pop(slot, None)  # once the client there is done, its network goes
        if self.home.type == "cuda":
            with CAPTURING:
                torch.cuda.empty_cache()
