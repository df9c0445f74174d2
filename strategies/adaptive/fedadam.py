"""FedAdam, FedYogi, FedAdagrad: an adaptive optimiser on the server takes the mean update as its gradient.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, Algorithm 2. https://arxiv.org/abs/2003.00295
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import LocalObjective, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, Decay, Divisor, Positive


@dataclass(frozen=True, kw_only=True)
class FedAdam(Strategy):
    """FedAdam: the mean update is the gradient of Adam on the server (Reddi 2021)."""

    server_lr: Positive = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Divisor = 1e-3  # degree of adaptivity

    sends = {"delta": CHANGE}
    min_clients = 0

    def init_server(self, model: Tensor) -> State:
        return {"model": model, "m": torch.zeros_like(model), "v": torch.full_like(model, self.tau**2)}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]
        y = local.train(x)
        return Update({"delta": y - x}, weight=local.num_examples)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        delta = mean["delta"]
        m = self.beta1 * server["m"] + (1 - self.beta1) * delta
        v = self.second_moment(server["v"], delta.square())
        model = server["model"] + self.server_lr * m / (v.sqrt() + self.tau)
        return {"model": model, "m": m, "v": v}

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """FedYogi: FedAdam whose second moment changes by additive, not multiplicative steps (Reddi 2021)."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedAdam):
    """FedAdagrad: FedAdam whose second moment is the sum of all squares so far (Reddi 2021)."""

    beta1: Decay = 0.0

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square
