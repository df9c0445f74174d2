"""Clients in parallel in threads: one network for each worker, shared data, no processes.

PyTorch releases the interpreter's lock while it computes, so threads can use all cores or a whole GPU. Processes
could not share the data, and several processes on a GPU would have to switch contexts.
"""

import threading
import warnings
from collections.abc import Callable, Generator, Iterable
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
from fedsim.federated.runtime import Item, Outcomes, Results, Runtime
from fedsim.runtimes.cuda import on_stream
from fedsim.runtimes.slots import Slots, check_workers
from fedsim.runtimes.window import in_window
from fedsim.runtimes.worker import Worker
from fedsim.training.graphs import CAPTURING
from fedsim.training.task import Task
from fedsim.types import Count, Job, Outcome, Report, State, Update

Result = TypeVar("Result")

MAX_WORKERS_PER_GPU = 8  # one stream each; all share one interpreter
GPU_MEMORY_FRACTION = 0.9  # of the free memory that workers may use
SUM_BYTES_PER_BYTE = 40  # for exact sums, and for messages that are not added yet


class Threads(Runtime):
    """Several clients in parallel in a pool of threads; workers are spread over all GPUs.

    Each worker has its own network, and one intra-op thread on a CPU, or one stream on a GPU. `workers: auto` is
    one worker for each core. On GPUs, `auto` first trains one client alone, and then uses as many workers as fit
    in memory, up to 8 for each GPU. If clients still run out of memory, the number of workers is halved, and these
    clients run again. Workers add up the messages of their clients, so memory does not grow with the cohort. With
    `graphs`, training steps on a GPU are captured as CUDA graphs, if the recipe allows it.
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
            max_workers = min(cores(), MAX_WORKERS_PER_GPU) * len(self.devices) if on_gpu else cores()
        else:
            check_workers(workers)
            max_workers = workers
        self.measuring = workers == "auto" and on_gpu  # until the first client has trained
        if self.measuring:
            torch.cuda.reset_peak_memory_stats(self.home)
        self.reserved_before = torch.cuda.memory_reserved(self.home) if self.measuring else 0
        self.slots, self.max_workers = Slots(1 if self.measuring else max_workers), max_workers
        self.networks: dict[int, Worker] = {}  # by slot
        self.pool = ThreadPoolExecutor(max_workers, "client")
        self.first_client: AbstractContextManager[object] = threading.Lock()

    @property
    def workers(self) -> int:
        """How many clients run in parallel from now on."""
        return self.slots.number

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        folds: dict[int, Fold] = {}  # by slot

        def fold(slot: int, job: Job, outcome: Outcome, began: float) -> Report:
            if slot not in folds:
                folds[slot] = Fold(aggregator)
            report = folds[slot].add(job, outcome, began)
            if self.measuring and isinstance(work, Train) and isinstance(outcome, Update):
                self._set_workers_by_memory(sum(value.nbytes for value in outcome.message.values()))
            return report

        with closing(self._each(work, server, jobs, fold)) as finished:
            for report in finished:
                yield aggregator.fold([]), [report]
        for total in folds.values():
            yield total.partial, []

    def map(self, work: Work, server: State, items: Iterable[Item]) -> Outcomes[Item]:
        return self._each(work, server, items, lambda slot, item, outcome, began: (item, outcome))

    def _each(
        self,
        work: Work,
        server: State,
        items: Iterable[Item],
        finish: Callable[[int, Item, Outcome, float], Result],
    ) -> Generator[Result, None, None]:
        """The results of `finish(slot, item, outcome, began)`, called in the thread of the slot."""
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
                    # Alone: PyTorch 2.15 may crash if two threads use convolutions for the first time.
                    with self.first_client:
                        outcome = worker.run(work, on_device[worker.replica.device], item)
                    self.first_client = nullcontext()
                    if not (isinstance(outcome, torch.OutOfMemoryError) and workers > 1):
                        with on_stream(worker.stream):
                            return finish(slot, item, outcome, began)
                    cause = one_line(outcome)
                    del outcome, worker  # frees the memory of the client
                    self.networks.pop(slot, None)
                self._shrink(workers, cause)

        with closing(in_window(self.pool, run_one, items, lambda: 2 * self.workers, stopped.set)) as finished:
            for results in finished:
                yield from results

    def _add_worker(self, slot: int) -> Worker:
        device = self.devices[slot % len(self.devices)]
        worker = self.networks[slot] = Worker(self.task, self.data[device], device, graphs=self.graphs)
        return worker

    def _set_workers_by_memory(self, message_bytes: int) -> None:
        """Use as many workers as fit, by the memory that the first one took; each sums messages of this size."""
        self.measuring = False
        worker_bytes = max(
            torch.cuda.max_memory_reserved(self.home) - self.reserved_before + SUM_BYTES_PER_BYTE * message_bytes,
            1,
        )
        fit = [
            int(GPU_MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]) // worker_bytes
            for device in self.devices
        ]
        fit[0] += 1  # the first worker, whose memory is in use already
        self.slots.change(1, min(max(min(fit), 1) * len(self.devices), self.max_workers))

    def _shrink(self, before: int, cause: str) -> None:
        """Halve the number of workers, unless another client has already changed it from `before`."""
        if self.slots.change(before, before // 2):
            warnings.warn(
                f"runtime.workers: out of memory with {before} workers, continuing with {before // 2}; {cause}",
                RuntimeWarning,
                stacklevel=2,
            )
        for slot in [slot for slot in list(self.networks) if slot >= self.workers]:
            self.networks.pop(slot, None)  # its network is freed when its client is done
        if self.home.type == "cuda":
            with CAPTURING:
                torch.cuda.empty_cache()
