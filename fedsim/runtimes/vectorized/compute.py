"""The updates of C clients in a round: `client_update`, written for one client, under `torch.func.vmap`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.data import FederatedData
from fedsim.federated.client import Train, private_buffers, states_are_only_read
from fedsim.training.batched.cohort import ClientJob, Cohort
from fedsim.training.batched.objective import BatchedObjective, Network
from fedsim.types import Job, State, Update


class Client(NamedTuple):
    """One client of a batch: its work, the server's state that it downloads, and its job."""

    work: Train
    server: State
    job: Job


class Computed(NamedTuple):
    """The results of C clients, each (C, ...)."""

    message: State
    weight: Tensor
    client: State
    metrics: State

    def rows(self) -> list[Update]:
        """One update a client: rows of these tensors; weights and metrics are on the host."""
        weight, metrics = self.weight.cpu(), {name: value.cpu() for name, value in self.metrics.items()}
        return [
            Update(_row(self.message, i), weight[i], _row(self.client, i), _row(metrics, i))
            for i in range(len(weight))
        ]


def compute(network: Network, work: Train, cohort: Cohort, server: State, own: State, clients: State) -> Computed:
    """The results of all clients, computed in one batch.

    `server` is the server's state, if all clients share it. If the clients belong to different runs, `own`
    (C, ...) has their servers' states instead. `clients` (C, ...) are the clients' states. An exception of the
    strategy is raised for all clients together.
    """

    def compute_one(index: Tensor, own: State, client: State) -> tuple[State, Tensor, State, State]:
        broadcast = server | own
        home = client if work.strategy.buffers == "private" else broadcast
        own_buffers = private_buffers(client, network.task)
        local = BatchedObjective(network, cohort, index, home["buffers"], own_buffers)
        update = work.client_update(broadcast, client, local, local.draws if work.own_code else None)
        network.draws |= local.draws.used
        weight = update.weight
        if not isinstance(weight, Tensor):  # made on the device: a copy from the host cannot be captured
            weight = network.like.new_full((), weight, dtype=torch.double)
        return update.message, weight.double(), update.client, update.metrics

    index = torch.arange(len(cohort.client_jobs), device=network.device)
    with states_are_only_read(server | own, clients):
        return Computed(*vmap(compute_one)(index, own, clients))


def inputs(batch: Sequence[Client], device: torch.device) -> tuple[State, State, State]:
    """The arguments `server`, `own` and `clients` of `compute`."""
    server = batch[0].server
    shared = all(client.server is server for client in batch)
    own = {} if shared else stacked([client.server for client in batch], device)
    return server if shared else {}, own, stacked([client.job.client or {} for client in batch], device)


def client_jobs(batch: Sequence[Client]) -> list[ClientJob]:
    """The clients, as `Cohort` takes them."""
    return [ClientJob(each.work.recipe, each.work.seed, each.job, each.work.cohort) for each in batch]


def updates(network: Network, data: FederatedData, batch: Sequence[Client]) -> list[Update]:
    """The update of each client, computed in one batch."""
    cohort = Cohort(data, client_jobs(batch), network.like)
    return compute(network, batch[0].work, cohort, *inputs(batch, network.device)).rows()


def stacked(states: Sequence[State], device: torch.device) -> State:
    """Each entry of the states, stacked: (C, ...)."""
    return {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}


def _row(state: State, i: int) -> State:
    return {name: value[i] for name, value in state.items()}
