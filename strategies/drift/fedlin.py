"""FedLin: each local step is corrected by the difference of the mean gradient and the client's own, at the model.

Mitra et al., Linear Convergence in Federated Learning: Tackling Client Heterogeneity and Sparse Gradients,
NeurIPS 2021, Algorithm 1 without sparsification. https://arxiv.org/abs/2102.07053

Differs: one learning rate for all clients; in the paper it falls with the number of a client's steps. The gradient
at the model is computed in the survey, and by each client once more in its training.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim import ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, LIKE_MODEL


@dataclass(frozen=True, kw_only=True)
class FedLin(Strategy):
    """FedLin: steps along g - grad F_k(x) + the mean of grad F_i(x); all weights are equal (Mitra 2021)."""

    broadcast: ClassVar[tuple[str, ...]] = ("model", "g")
    sends = {"delta": CHANGE}
    survey_sends = {"g": LIKE_MODEL}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if recipe.precision == "fp16":
            raise ConfigError("local.precision: fedlin sends gradients unscaled; use bf16 or fp32")

    def init_server(self, model: Tensor) -> State:
        return {"model": model, "g": torch.zeros_like(model)}

    def survey(self, server: State, client: State, local: LocalObjective) -> Update:
        return Update({"g": local.gradient(server["model"])[0]}, weight=1.0)

    def surveyed(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"g": mean["g"]}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, mean = server["model"], server["g"]
        own, _ = local.separate("survey", record=False).gradient(x)  # as in the survey, with its dropout masks
        y = local.train(x, correct=lambda g, w: g - own + mean)
        return Update({"delta": y - x}, weight=1.0)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] + mean["delta"]}

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return 1.0

    def survey_steps(self, num_steps: int, epoch_steps: int) -> int:
        return epoch_steps
