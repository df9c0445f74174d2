"""Clients of one round, and how one trains where there is no framework: PyTorch, and nothing else."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Client(TypedDict):
    """One client's examples, as a batch takes them, and which of them make each batch."""

    x: Tensor  # (n_k, ...)
    y: Tensor  # (n_k,)
    steps: list[Tensor]  # K of (B,)


class Workload(TypedDict):
    """What all sides train: the network with its initial weights, the clients, the optimiser."""

    network: nn.Module
    clients: list[Client]
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]  # of the optimiser
    clip_norm: float | None
    idle: NotRequired[bool]  # clients take no step


def train(workload: Workload, client: Client, weights: Mapping[str, Tensor]) -> None:
    """Train the workload's network from `weights`, a state dict, by the client's steps."""
    network, x, y = workload["network"], client["x"], client["y"]
    network.load_state_dict(weights)
    optimizer = workload["optimizer"](network.parameters(), **workload["options"])
    for rows in client["steps"]:
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        if workload["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(network.parameters(), workload["clip_norm"])
        optimizer.step()
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


@cache
def read(path: Path, device: str) -> Workload:
    """The workload of a file that fedsim wrote, on `device`; read once a process, which then has one thread."""
    torch.set_num_threads(1)
    workload: Workload = torch.load(path, map_location=device, weights_only=False)
    return workload
