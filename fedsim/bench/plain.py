"""The plain loops: nn.Module, torch.optim and float tensors sliced per batch, as one writes them by oneself."""

import copy
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.base.machine import cores
from fedsim.bench.peers.client_loop import Client, Workload, train
from fedsim.bench.simulations import FP32, simulated
from fedsim.bench.turns import Side
from fedsim.experiment.config import Config
from fedsim.federated.simulation import Simulation
from fedsim.training.recipe import Recipe
from fedsim.types import Stream, random

LARGE = {"cpu": 256, "cuda": 4096}  # examples in a batch that keeps the device busy


def batch_rows(recipe: Recipe, n: int, stream: np.random.Generator, device: torch.device) -> Iterator[Tensor]:
    """(B,) for each step of a client, which of its `n` examples make the batch; as fedsim draws them."""
    sizes = recipe.batch_sizes(n)
    epochs = (torch.from_numpy(stream.permutation(n)[: sum(sizes)]).to(device) for _ in count())
    return islice(chain.from_iterable(torch.split(epoch, sizes) for epoch in epochs), recipe.num_steps(n))


def workload(simulation: Simulation) -> Workload:
    """The clients of the first round, on the runtime's device, with the network and the optimiser they train."""
    home, recipe = simulation.runtime.home, simulation.recipe
    optimizer, options = _optimizer(recipe)
    return {
        "network": copy.deepcopy(simulation.task.network).to(home).train(),
        "clients": [_client(simulation, k) for k in simulation.sample()],
        "optimizer": optimizer,
        "options": options,
        "clip_norm": recipe.clip_norm,
    }


class PlainLoop:
    """The clients of the first round, each trained from the initial weights, one after the other."""

    def __init__(self, simulation: Simulation):
        self.workload = workload(simulation)
        self.net = self.workload["network"]
        self.initial = copy.deepcopy(self.net.state_dict())
        self.clients = dict(zip(simulation.sample(), self.workload["clients"], strict=True))

    def __call__(self, clients: Iterable[int]) -> None:
        """Train each of them."""
        for client in clients:
            self.train(client)

    def train(self, client: int) -> None:
        """The client's epochs or steps."""
        train(self.workload, self.clients[client], self.initial)


@contextmanager
def one_process(simulation: Simulation) -> Iterator[Side]:
    """One client after the other, with all cores or the GPU."""
    loop = PlainLoop(simulation)

    def side() -> None:
        with _any_kernels():
            loop(loop.clients)

    yield side


@contextmanager
def processes(config: Config) -> Iterator[Side]:
    """Clients dealt to one process a core, each with one thread, network and data of its own."""
    clients = simulated(config, "serial", FP32).sample()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores(), spawn, initializer=_start_process, initargs=(config,)) as pool:
        yield lambda: list(pool.map(_in_process, clients))


@contextmanager
def large_batches(simulation: Simulation) -> Iterator[Side]:
    """As many examples as all clients' steps have, in batches that keep the device busy: what it can do at all."""
    loop = PlainLoop(simulation)
    clients, home = loop.clients.values(), simulation.runtime.home
    x, y = (torch.cat([client[name] for client in clients]) for name in ("x", "y"))
    seen = sum(len(rows) for client in clients for rows in client["steps"])
    rows = torch.arange(seen, device=home) % len(y)
    steps = list(torch.split(rows, LARGE[home.type]))

    def side() -> None:
        with _any_kernels():
            train(loop.workload, {"x": x, "y": y, "steps": steps}, loop.initial)

    yield side


@contextmanager
def _any_kernels() -> Iterator[None]:
    """PyTorch as it comes: fedsim has it choose kernels that repeat themselves, which on a GPU may be slower."""
    repeats, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(repeats, warn_only=warns)


def _client(simulation: Simulation, client: int) -> Client:
    data, home = simulation.data, simulation.runtime.home
    x, y = (part.to(home) for part in data.batch(torch.from_numpy(data.rows(client))))
    stream = random(simulation.seed, Stream.BATCHES, 0, client)
    return {"x": x, "y": y, "steps": list(batch_rows(simulation.recipe, len(y), stream, home))}


def _optimizer(recipe: Recipe) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    common: dict[str, Any] = {"lr": recipe.lr_at(0), "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD, common | {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind, common | {"betas": recipe.betas, "eps": recipe.eps}


def _start_process(config: Config) -> None:
    global _loop
    torch.set_num_threads(1)
    _loop = PlainLoop(simulated(config, "serial", FP32))


def _in_process(client: int) -> None:
    _loop.train(client)


_loop: PlainLoop  # of a process of the pool
