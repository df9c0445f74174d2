"""MimeLite: the server's momentum, which does not change within a round, is a part of each client's steps.

Karimireddy et al., Breaking the Centralized Barrier for Cross-Device Federated Learning, NeurIPS 2021,
Algorithm 1. https://arxiv.org/abs/2008.03606

Differs: momentum is the only base optimiser. The recipe's own momentum and weight decay, which the paper has not,
apply to the step U(g, m). The paper averages uniformly; with `weights: examples` clients count by n_k, as in
TensorFlow Federated, and beta 0 gives FedAvg's model.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, LIKE_MODEL, Decay


@dataclass(frozen=True, kw_only=True)
class MimeLite(Strategy):
    """MimeLite: clients step by (1 - beta) g + beta m; m is a running mean of full gradients (Karimireddy 2021).

    Clients count equally, or by their `examples`, n_k. Each client takes one more pass over its examples.
    """

    beta: Decay = 0.9
    weights: Literal["uniform", "examples"] = "uniform"

    broadcast: ClassVar[tuple[str, ...]] = ("model", "m")
    sends = {"delta": CHANGE, "c": LIKE_MODEL}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if recipe.precision == "fp16":
            raise ConfigError("local.precision: mimelite sends gradients unscaled; use bf16 or fp32")
        if recipe.distillation or recipe.noisy_labels:
            name = "distillation" if recipe.distillation else "noisy_labels"
            raise ConfigError(f"local.{name}: mimelite: the full gradient is that of the labels; use null")

    def init_server(self, model: Tensor) -> State:
        return {"model": model, "m": torch.zeros_like(model)}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, m, beta = server["model"], server["m"], self.beta
        y = local.train(x, correct=lambda g, w: (1 - beta) * g + beta * m)  # U(g, m)
        c_k, _ = local.separate("full gradient").gradient(x)
        weight = local.num_examples if self.weights == "examples" else 1.0
        return Update({"delta": y - x, "c": c_k}, weight)

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return num_examples if self.weights == "examples" else 1.0

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        m = (1 - self.beta) * mean["c"] + self.beta * server["m"]  # V(c, m)
        return {"model": server["model"] + mean["delta"], "m": m}
