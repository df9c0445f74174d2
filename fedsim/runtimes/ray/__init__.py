"""Clients in the processes of a Ray cluster, on one machine or many, with the same results as in one process.

Network and data are sent to each machine once, and all its actors map them. An actor adds up the messages of its
clients and returns one sum at the end of the run, so the traffic to the driver grows with the number of actors,
not with the cohort. Ray itself is imported when the runtime is created.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le

from fedsim.data import FederatedData
from fedsim.errors import ConfigError
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train, Work
from fedsim.federated.runtime import Item, Outcomes, Results, Runtime
from fedsim.training.task import Task
from fedsim.types import Count, Job, State

if TYPE_CHECKING:
    from fedsim.runtimes.ray.dispatch import Dispatch


class Ray(Runtime):
    """Clients in parallel in the processes of a Ray cluster, on one machine or many.

    `address: null` uses the cluster that this process has joined, or else starts a local Ray, which ends with this
    process; `auto` is the cluster on this machine, and host:port any other. Each actor takes `cpus` CPUs, and
    `gpus` GPUs, which may be a fraction of one. `actors: auto` is as many as the cluster has room for. Actors end
    with the experiment, or with this object. If an actor or a machine dies, it is replaced and its clients of the
    round run again; a client whose actors die three times counts as failed. Raises ConfigError if the cluster
    cannot run them.
    """

    def __init__(
        self,
        task: Task,
        data: FederatedData,
        /,
        *,
        actors: Count | Literal["auto"] = "auto",
        address: str | None = None,
        cpus: Annotated[float, Gt(0)] = 1.0,
        gpus: Annotated[float, Ge(0), Le(1)] = 0.0,
    ):
        from fedsim.runtimes.ray.cluster import counted, join, resources, room
        from fedsim.runtimes.ray.pool import Pool

        self.home = torch.device("cpu")
        if cpus > 1 and cpus % 1:
            raise ConfigError(f"runtime.cpus: {cpus:g} must be a whole number, or less than 1, as Ray requires")
        join(address)
        most = room(cpus, gpus)
        self.actors = most if actors == "auto" else actors
        if not 1 <= self.actors <= most:
            needs = counted(cpus, "CPU") + (f" and {counted(gpus, 'GPU')}" if gpus else "")
            raise ConfigError(
                f"runtime.actors: {actors}, each with {needs}; the cluster, {resources()}, has room for {most}"
            )
        self.pool = Pool(task, data, self.actors, cpus, gpus)

    @property
    def workers(self) -> int:
        return self.actors

    def check(self, work: Train) -> None:
        self.pool.check(work)

    def close(self) -> None:
        """End the actors, which frees their place in the cluster; the next run starts new ones."""
        self.pool.close()

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        return self._dispatch(work, server, jobs, aggregator).run()

    def map(self, work: Work, server: State, items: Iterable[Item]) -> Outcomes[Item]:
        return self._dispatch(work, server, items, None).map()

    def _dispatch(
        self, work: Work, server: State, items: Iterable[Any], aggregator: Aggregator | None
    ) -> "Dispatch":
        from fedsim.runtimes.ray.actor import Order
        from fedsim.runtimes.ray.dispatch import Dispatch

        self.pool.open()
        return Dispatch(self.pool, Order(work, server, aggregator), items)
