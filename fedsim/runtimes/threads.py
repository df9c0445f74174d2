"""Clients side by side in threads: one network a worker, shared data, no processes.

PyTorch computes without the interpreter's lock, so threads keep all cores, or one GPU, busy; processes could not
share the data, nor several of them a GPU without switching context.
"""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Literal

import torch

from fedsim.aggregate import Aggregator, Partial
from fedsim.data import FederatedData
from fedsim.local import check_precision
from fedsim.runtimes.worker import Worker, cores, devices
from fedsim.task import Task
from fedsim.types import Count, Job, Report, State
from fedsim.work import Train, Work

WORKERS_PER_GPU = 4


class Threads:
    """Several clients at once in a pool of threads; several GPUs take turns.

    Each worker has a network of its own, on the CPU one intra-op thread, on a GPU one stream. `auto` is a worker
    a core, or four a GPU. Workers merge what their clients send, so that memory does not grow with the cohort.
    """

    def __init__(
        self,
        task: Task,
        data: FederatedData,
        /,
        *,
        workers: Count | Literal["auto"] = "auto",
        device: str = "auto",
    ):
        self.devices = devices(device)
        self.home = self.devices[0]
        if workers == "auto":
            on_cpu = self.home.type == "cpu"
            workers = cores() if on_cpu else WORKERS_PER_GPU * len(self.devices)
        self.task, self.workers = task, workers
        self.data = {device: data.to(device) for device in self.devices}
        self.pool = ThreadPoolExecutor(workers, "client")
        self.local = threading.local()
        self.number = count()  # of the next worker
        self.first: AbstractContextManager[object] = threading.Lock()

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
        partials: dict[int, Partial] = {}  # by thread

        def run_one(job: Job) -> Report:
            if not hasattr(self.local, "worker"):  # no initializer: the pool would keep this object alive for ever
                self._start_worker()
            worker: Worker = self.local.worker
            stream: torch.cuda.Stream | None = self.local.stream
            if stream:
                stream.wait_stream(torch.cuda.default_stream(stream.device))  # which holds the broadcast
            with torch.cuda.stream(stream) if stream else nullcontext():
                me, broadcast = threading.get_ident(), on_device[worker.replica.device]
                so_far = partials.get(me)
                with self.first:  # alone: PyTorch 2.15 on a CPU may crash where two threads first use convolutions
                    partials[me], report = worker.run(work, broadcast, job, aggregator, tolerant, so_far)
                self.first = nullcontext()
            if stream:
                stream.synchronize()
            return report

        running: set[Future[Report]] = set()
        upcoming = iter(jobs)
        try:
            while True:
                for job in upcoming:  # a bounded window: what is finished does not pile up
                    running.add(self.pool.submit(run_one, job))
                    if len(running) >= 2 * self.workers:
                        break
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield aggregator.fold([]), [future.result() for future in done]
        finally:  # of an error or an interrupt: start no more, wait for those under way
            for future in running:
                future.cancel()
            wait(running)
        for partial in partials.values():
            yield partial, []

    def _start_worker(self) -> None:
        device = self.devices[next(self.number) % len(self.devices)]
        if device.type == "cpu":
            torch.set_num_threads(1)  # this thread's
        self.local.worker = Worker(self.task, self.data[device], device)
        self.local.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
