"""FedOpt: an optimiser of torch.optim on the server takes the mean update as its negative gradient.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, Algorithm 1. https://arxiv.org/abs/2003.00295

Reddi's own rules, of Algorithm 2, are fedadam, fedyogi and fedadagrad; torch's differ: they correct the bias of m
and v, and v starts at 0. Algorithm 1 weights all clients equally; `weights: examples` weights them by n_k.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsim import ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, Decay, Divisor, NonNegative, Positive

OPTIMIZERS = {  # and the options that they have
    "sgd": (torch.optim.SGD, ("momentum", "nesterov", "weight_decay")),
    "adam": (torch.optim.Adam, ("betas", "eps", "weight_decay")),
    "adamw": (torch.optim.AdamW, ("betas", "eps", "weight_decay")),
    "adagrad": (torch.optim.Adagrad, ("eps", "weight_decay")),
    "rmsprop": (torch.optim.RMSprop, ("alpha", "eps", "momentum", "weight_decay")),
}


@dataclass(frozen=True, kw_only=True)
class FedOpt(Strategy):
    """FedOpt: the mean update is the negative gradient of an optimiser on the server (Reddi 2021).

    The options are those of torch.optim, but `eps` has Reddi's degree of adaptivity as its default, and torch has
    1e-8. With `optimizer: sgd, server_lr: 1` this is FedAvg.
    """

    optimizer: Literal["sgd", "adam", "adamw", "adagrad", "rmsprop"] = "adam"
    server_lr: Positive = 0.01
    momentum: Decay = 0.0
    nesterov: bool = False
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    alpha: Decay = 0.99
    eps: Divisor = 1e-3
    weight_decay: NonNegative = 0.0
    weights: Literal["uniform", "examples"] = "uniform"

    sends = {"delta": CHANGE}
    min_clients = 0

    def check(self, recipe: Recipe, layout: Layout) -> None:
        for name in ("momentum", "nesterov", "betas", "alpha", "eps"):
            if name not in OPTIMIZERS[self.optimizer][1] and getattr(self, name) != getattr(FedOpt, name):
                users = " and ".join(each for each, (_, options) in OPTIMIZERS.items() if name in options)
                raise ConfigError(f"strategy.{name}: belongs to {users}; strategy.optimizer is {self.optimizer}")
        if self.nesterov and not self.momentum:
            raise ConfigError("strategy.nesterov: needs strategy.momentum above 0")

    def init_server(self, model: Tensor) -> State:
        made = self.stepped(model, torch.zeros_like(model), {})  # has the names and shapes of what it keeps
        return {name: torch.zeros_like(value) for name, value in made.items()} | {"model": model}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]
        y = local.train(x)
        return Update({"delta": y - x}, weight=1.0 if self.weights == "uniform" else local.num_examples)

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return 1.0 if self.weights == "uniform" else num_examples

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        kept = {name: value for name, value in server.items() if name != "model"}
        return self.stepped(server["model"], -mean["delta"], kept)

    def stepped(self, model: Tensor, gradient: Tensor, kept: State) -> State:
        """The model and the optimiser's state after a step."""
        rule, options = OPTIMIZERS[self.optimizer]
        x = model.clone()
        x.grad = gradient
        optimizer = rule([x], lr=self.server_lr, **{name: getattr(self, name) for name in options})
        optimizer.state[x] |= {name: value if value.dim() else value.cpu() for name, value in kept.items()}
        optimizer.step()
        return {"model": x} | {name: value for name, value in optimizer.state[x].items() if value is not None}
