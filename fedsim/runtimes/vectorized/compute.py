"""What each of C clients computes in a round: the strategy, written for one client, under `torch.func.vmap`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.data import FederatedData
from fedsim.federated.client import Train, check_message, states_are_only_read
from fedsim.training.batched.cohort import Cohort, Member
from fedsim.training.batched.objective import BatchedObjective, Network
from fedsim.types import Job, State, Update


class Client(NamedTuple):
    """One client of a batch: what it does, what it is sent, and its job."""

    work: Train
    server: State
    job: Job


class Computed(NamedTuple):
    """What C clients computed, (C, ...) each."""

    message: State
    weight: Tensor
    client: State
    metrics: State

    def rows(self) -> list[Update]:
        """By client: rows of the same tensors, numbers on the host."""
        weight, metrics = self.weight.cpu(), {name: value.cpu() for name, value in self.metrics.items()}
        return [
            Update(_row(self.message, i), weight[i], _row(self.client, i), _row(metrics, i))
            for i in range(len(weight))
        ]


def compute(network: Network, work: Train, cohort: Cohort, server: State, own: State, clients: State) -> Computed:
    """What each client computes, all in one batch.

    `server` is what they share of the server's state; `own`, of each (C, ...), comes in the place of it where rows
    belong to different runs. `clients` (C, ...) is what they kept. Raises, for all, what the strategy raises.
    """

    def one(index: Tensor, own: State, client: State) -> tuple[State, Tensor, State, State]:
        broadcast = server | own
        home = client if work.strategy.buffers == "private" else broadcast
        local = BatchedObjective(network, cohort, index, home["buffers"])
        update = work.client_update(broadcast, client, local)
        check_message(update)
        weight = update.weight if isinstance(update.weight, Tensor) else network.like.new_full((), update.weight)
        return update.message, weight.to(network.like), update.client, update.metrics

    index = torch.arange(len(cohort.members), device=network.device)
    with states_are_only_read(server | own, clients):
        return Computed(*vmap(one)(index, own, clients))


def inputs(batch: Sequence[Client], device: torch.device) -> tuple[State, State, State]:
    """Of `compute`: what the clients share of the server's state, what they do not, and what they kept."""
    server = batch[0].server
    shared = all(client.server is server for client in batch)
    own = {} if shared else stacked([client.server for client in batch], device)
    return server if shared else {}, own, stacked([client.job.client or {} for client in batch], device)


def members(batch: Sequence[Client]) -> list[Member]:
    """What a cohort has to know of the clients."""
    return [Member(client.work.recipe, client.work.seed, client.job) for client in batch]


def updates(network: Network, data: FederatedData, batch: Sequence[Client]) -> list[Update]:
    """What each client computes, all in one batch."""
    cohort = Cohort(data, members(batch), network.like)
    return compute(network, batch[0].work, cohort, *inputs(batch, network.device)).rows()


def stacked(states: Sequence[State], device: torch.device) -> State:
    """(C, ...) of each name."""
    return {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}


def _row(state: State, i: int) -> State:
    return {name: value[i] for name, value in state.items()}
