"""Clients one after the other, in the calling thread: for debugging, and as the reference for other runtimes."""

from collections.abc import Iterable
from time import perf_counter

from fedsim.base.devices import devices, one_thread
from fedsim.data import FederatedData
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Work
from fedsim.federated.fold import Fold
from fedsim.federated.runtime import Item, Outcomes, Results, Runtime
from fedsim.runtimes.worker import Worker
from fedsim.training.task import Task
from fedsim.types import Job, State


class Serial(Runtime):
    """One client at a time, in the calling thread, so that debuggers and tracebacks show the client's code.

    With `graphs`, training steps on a GPU are captured as CUDA graphs, if the recipe allows it.
    """

    def __init__(self, task: Task, data: FederatedData, /, *, graphs: bool = True, device: str = "auto"):
        self.home = devices(device)[0]
        self.worker = Worker(task, data.to(self.home), self.home, graphs=graphs)

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        fold = Fold(aggregator)
        for job in jobs:
            with one_thread():
                began = perf_counter()
                report = fold.add(job, self.worker.run(work, server, job), began)
            yield aggregator.fold([]), [report]
        yield fold.partial, []

    def map(self, work: Work, server: State, items: Iterable[Item]) -> Outcomes[Item]:
        for item in items:
            with one_thread():
                outcome = self.worker.run(work, server, item)
            yield item, outcome
