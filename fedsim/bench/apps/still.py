"""Clients that take no step and networks of any size, for nodes: `still:Still`, `still:vector`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim import LocalObjective, RoundInfo, State, Strategy, Update
from fedsim.types import Count


@dataclass(frozen=True, kw_only=True)
class Still(Strategy):
    """Clients send the model, times a small number: what no client has sent before.

    Flower stores content by its hash, and sends nothing twice.
    """

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        return Update({"delta": -0.01 * (1 + local.client_id) * server["model"]}, weight=1.0, client=client)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] + mean["delta"]}


class Vector(nn.Module):
    """Parameters, some of which are every example's logits."""

    def __init__(self, parameters: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(parameters))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, classes) logits of (B, ...)."""
        return self.weight[: self.classes].expand(len(x), self.classes)


def vector(shape: tuple[int, ...], classes: int, /, *, parameters: Count) -> nn.Module:
    """A network of so many parameters that hardly computes."""
    return Vector(parameters, classes)
