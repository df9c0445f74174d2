"""FedAvgM: FedAvg with momentum on the server.

Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019,
section 4.2. https://arxiv.org/abs/1909.06335

The paper's momentum is Nesterov's, here `nesterov: true`; Flower's FedAvgM has the plain one, the default here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, Decay, Positive


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Strategy):
    """FedAvgM: the mean update enters a momentum, by which the model moves (Hsu 2019).

    In the long run an update moves the model 1 / (1 - beta) times as far as in FedAvg: with a large beta, lower
    `local.lr` or `server_lr`.
    """

    server_lr: Positive = 1.0
    beta: Decay = 0.9
    nesterov: bool = False

    sends = {"delta": CHANGE}
    min_clients = 0

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if self.nesterov and not self.beta:
            raise ConfigError("strategy.nesterov: needs strategy.beta above 0")

    def init_server(self, model: Tensor) -> State:
        return {"model": model, "v": torch.zeros_like(model)}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]
        y = local.train(x)
        return Update({"delta": y - x}, weight=local.num_examples)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        delta = mean["delta"]
        v = self.beta * server["v"] + delta
        step = delta + self.beta * v if self.nesterov else v
        return {"model": server["model"] + self.server_lr * step, "v": v}
