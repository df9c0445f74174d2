"""Mime: the server's momentum moves the clients, and each local step is corrected by the gradient of all.

Karimireddy et al., Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning, 2020, Algorithm 1.
https://arxiv.org/abs/2008.03606

The mean gradient c at the model comes from a survey of the cohort before its training. The paper's means count
clients equally, and `weights: examples` counts them by n_k, as FedAvg does.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import Batch, ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, LIKE_MODEL, Decay


@dataclass(frozen=True, kw_only=True)
class Mime(Strategy):
    """Mime: local steps with the server's momentum and the mean gradient of the cohort (Karimireddy 2020).

    `beta` is the server's momentum. Clients count equally, or by their `weights: examples`.
    """

    beta: Decay = 0.9
    weights: Literal["uniform", "examples"] = "uniform"

    broadcast: ClassVar[tuple[str, ...]] = ("model", "c", "s")
    sends = {"delta": CHANGE}
    survey_sends = {"g": LIKE_MODEL}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if recipe.momentum:
            raise ConfigError("local.momentum: mime has the server's momentum; set strategy.beta")
        if recipe.precision == "fp16":
            raise ConfigError("local.precision: mime sends gradients unscaled; use bf16 or fp32")
        if recipe.distillation or recipe.noisy_labels:
            name = "distillation" if recipe.distillation else "noisy_labels"
            raise ConfigError(f"local.{name}: mime: the gradient of the survey is that of the labels; use null")

    def init_server(self, model: Tensor) -> State:
        return {"model": model, "c": torch.zeros_like(model), "s": torch.zeros_like(model)}

    def survey(self, server: State, client: State, local: LocalObjective) -> Update:
        return Update({"g": local.gradient(server["model"])[0]}, self.weight(local))

    def surveyed(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"c": mean["g"]}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, c, s = server["model"], server["c"], server["s"]

        def gradient(y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:  # both with one dropout mask
            g, f = local.gradient(y, batch)
            return g - local.gradient(x, batch)[0] + c, f

        y = local.train(x, gradient=gradient, correct=lambda g, w: (1 - self.beta) * g + self.beta * s)
        return Update({"delta": y - x}, self.weight(local))

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        s = (1 - self.beta) * server["c"] + self.beta * server["s"]
        return {"model": server["model"] + mean["delta"], "s": s}

    def weight(self, local: LocalObjective) -> Tensor | float:
        return local.num_examples if self.weights == "examples" else 1.0

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return num_examples if self.weights == "examples" else 1.0

    def survey_steps(self, num_steps: int, epoch_steps: int) -> int:
        return epoch_steps
