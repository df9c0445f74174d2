"""Clients one after the other, in the calling thread: for debugging, and as the reference."""

from collections.abc import Iterable, Iterator

from fedsim.base.devices import devices, one_thread
from fedsim.data import FederatedData
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import Train, Work
from fedsim.runtimes.worker import Worker
from fedsim.training.precision import check_precision
from fedsim.training.task import Task
from fedsim.types import Job, Report, State


class Serial:
    """One client at a time, in the calling thread: a debugger and a traceback lead to the client.

    With `graphs`, training steps on a GPU are captured as CUDA graphs where they can be.
    """

    exact = True

    def __init__(self, task: Task, data: FederatedData, /, *, graphs: bool = True, device: str = "auto"):
        self.home = devices(device)[0]
        self.workers = 1
        self.worker = Worker(task, data.to(self.home), self.home, graphs=graphs)

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
        total = aggregator.fold([])
        for job in jobs:
            with one_thread():
                total, report = self.worker.run(work, server, job, aggregator, tolerant, total)
            yield aggregator.fold([]), [report]
        yield total, []
