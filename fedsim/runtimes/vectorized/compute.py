"""What each of C clients computes in a round: the strategy, written for one client, under `torch.func.vmap`."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.data import FederatedData
from fedsim.federated.client import check_message
from fedsim.training.batched.cohort import Cohort, Member
from fedsim.training.batched.objective import BatchedObjective, Network
from fedsim.training.local import LocalObjective
from fedsim.types import State, Update


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


def compute(network: Network, cohort: Cohort, server: State, own: State, clients: State) -> Computed:
    """What each client computes, all in one batch.

    `server` is what they share of the server's state; `own`, of each (C, ...), comes in the place of it where rows
    belong to different runs. `clients` (C, ...) is what they kept. Raises, for all, what the strategy raises.
    """
    work = cohort.members[0].work

    def one(index: Tensor, own: State, client: State) -> tuple[State, Tensor, State, State]:
        broadcast = server | own
        home = client if work.strategy.buffers == "private" else broadcast
        local = BatchedObjective(network, cohort, index, home["buffers"])
        update = work.client_update(broadcast, client, cast(LocalObjective, local))
        check_message(update)
        weight = update.weight if isinstance(update.weight, Tensor) else network.like.new_full((), update.weight)
        return update.message, weight.to(network.like), update.client, update.metrics

    versions = {name: value._version for name, value in clients.items()}
    index = torch.arange(len(cohort.members), device=network.device)
    computed = Computed(*vmap(one)(index, own, clients))
    if written := [name for name, value in clients.items() if value._version != versions[name]]:
        raise RuntimeError(f"client[{written[0]!r}] was written in place; states are only read")
    return computed


def inputs(members: Sequence[Member], device: torch.device) -> tuple[State, State, State]:
    """Of `compute`: what the members share of the server's state, what they do not, and what they kept."""
    server = members[0].server
    shared = all(m.server is server for m in members)
    own = {} if shared else stacked([m.server for m in members], device)
    return server if shared else {}, own, stacked([m.job.client or {} for m in members], device)


def updates(network: Network, data: FederatedData, members: Sequence[Member]) -> list[Update]:
    """What each client computes, all in one batch."""
    cohort = Cohort(data, members, network.like)
    return compute(network, cohort, *inputs(members, network.device)).rows()


def stacked(states: Sequence[State], device: torch.device) -> State:
    """(C, ...) of each name."""
    return {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}


def _row(state: State, i: int) -> State:
    return {name: value[i] for name, value in state.items()}
