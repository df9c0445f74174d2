"""Clients side by side in threads: one network a worker, shared data, no processes.

PyTorch computes without the interpreter's lock, so threads keep all cores, or one GPU, busy; processes could not
share the data, nor several of them a GPU without switching context.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Literal

import torch

from fedsim.base.devices import devices
from fedsim.base.machine import cores
from fedsim.data import FederatedData
from fedsim.errors import one_line
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import Train, Work
from fedsim.runtimes.slots import Seats
from fedsim.runtimes.window import in_window
from fedsim.runtimes.worker import Worker
from fedsim.training.graphs import CAPTURING
from fedsim.training.precision import check_precision
from fedsim.training.task import Task
from fedsim.types import Count, Job, Report, State

MOST_PER_GPU = 8  # workers: one stream each, and all in one interpreter
USED = 0.9  # of a GPU's free memory
SUMS = 40  # bytes that adding messages up takes for each byte of one: exact sums, and what waits to be added


class Threads:
    """Several clients at once in a pool of threads; several GPUs take turns.

    Each worker has a network of its own, on the CPU one intra-op thread, on a GPU one stream. `auto` is a worker
    a core; on GPUs the first client trains alone, and `auto` is then as many as fit by the memory that it took, up
    to 8 each. Where clients run out of memory all the same, there are half as many workers from then on, and they
    run again. Workers merge what their clients send, so that memory does not grow with the cohort. With `graphs`,
    training steps on a GPU are captured as CUDA graphs where they can be.
    """

    exact = True

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
            most = min(cores(), MOST_PER_GPU) * len(self.devices) if on_gpu else cores()
        else:
            most = workers
        self.measures = workers == "auto" and on_gpu  # until the first client has trained
        if self.measures:
            torch.cuda.reset_peak_memory_stats(self.home)
        self.reserved = torch.cuda.memory_reserved(self.home) if self.measures else 0
        self.seats, self.most = Seats(1 if self.measures else most), most
        self.crew: dict[int, Worker] = {}  # by seat
        self.pool = ThreadPoolExecutor(most, "client")
        self.first: AbstractContextManager[object] = threading.Lock()

    @property
    def workers(self) -> int:
        """How many clients run side by side from now on."""
        return self.seats.number

    def check(self, work: Train) -> None:
        check_precision(work.recipe.precision, self.home)

    def run(
        self,
        work: Work,
        server: State,
        jobs: Iterable[Job],
        aggregator: Aggregator,
        *,
        tolerant: bool = False,
    ) -> Iterator[tuple[Partial, list[Report]]]:
        on_device = {device: {n: t.to(device) for n, t in server.items()} for device in self.devices}
        partials: dict[int, Partial] = {}  # by seat
        stopped = threading.Event()

        def run_one(job: Job) -> Report:
            if self.home.type == "cpu":
                torch.set_num_threads(1)  # this thread's
            while True:
                with self.seats.take() as (seat, workers):
                    if stopped.is_set():
                        raise CancelledError
                    try:
                        report = run_on(seat, job, yields=workers > 1)
                        if self.measures and isinstance(work, Train) and report.error is None:
                            self._fill(report.bytes_up)
                        return report
                    except torch.OutOfMemoryError as error:
                        if workers == 1:
                            raise
                        cause = one_line(error)
                        self.crew.pop(seat, None)
                self._shrink(workers, cause)  # the error is gone by now, and with it what the client had

        def run_on(seat: int, job: Job, yields: bool) -> Report:
            worker = self.crew.get(seat) or self._hire(seat)
            broadcast, so_far = on_device[worker.replica.device], partials.get(seat)
            with self.first:  # alone: PyTorch 2.15 on a CPU may crash where two threads first use convolutions
                partials[seat], report = worker.run(
                    work, broadcast, job, aggregator, tolerant, so_far, yields=yields
                )
            self.first = nullcontext()
            return report

        with closing(in_window(self.pool, run_one, jobs, lambda: 2 * self.workers, stopped.set)) as finished:
            for reports in finished:
                yield aggregator.fold([]), reports
        for partial in partials.values():
            yield partial, []

    def _hire(self, seat: int) -> Worker:
        device = self.devices[seat % len(self.devices)]
        worker = self.crew[seat] = Worker(self.task, self.data[device], device, graphs=self.graphs)
        return worker

    def _fill(self, message: int) -> None:
        """Have as many workers as fit by what the first one took, with sums of messages of so many bytes."""
        self.measures = False
        one = max(torch.cuda.max_memory_reserved(self.home) - self.reserved + SUMS * message, 1)
        fit = [int(USED * torch.cuda.mem_get_info(device)[0]) // one for device in self.devices]
        fit[0] += 1  # the first one, which is there
        self.seats.change(1, min(max(min(fit), 1) * len(self.devices), self.most))

    def _shrink(self, before: int, cause: str) -> None:
        """Half as many workers as `before`, unless another client has seen to it."""
        if self.seats.change(before, before // 2):
            warnings.warn(
                f"runtime.workers: out of memory with {before} at once, going on with {before // 2}; {cause}",
                RuntimeWarning,
                stacklevel=2,
            )
        for seat in [seat for seat in list(self.crew) if seat >= self.workers]:
            self.crew.pop(seat, None)  # once the client there is done, its network goes
        if self.home.type == "cuda":
            with CAPTURING:
                torch.cuda.empty_cache()
