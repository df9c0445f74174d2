"""FedDC: each client keeps how far it has drifted from the global model, and the server adds the drift back.

Gao et al., FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction, CVPR 2022,
Algorithm 1. https://arxiv.org/abs/2203.11751

Differs: where the paper has the sum over all clients, `drift: cohort` has the mean over those who take part. The
authors' code has `control: variates`, `drift: all` and `weights: uniform`, and divides alpha by n_k N / n.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import LIKE_MODEL, Entry, NonNegative


@dataclass(frozen=True, kw_only=True)
class FedDC(Strategy):
    """FedDC: drift variables, a penalty and a gradient correction (Gao 2022).

    `control` says what corrects the gradient: the difference between the last `updates` of this client and of the
    cohort, divided by K lr, or SCAFFOLD's control `variates`. The server adds the mean `drift` of the cohort, or
    of all clients, in which those not seen so far have 0. Clients count by their `examples`,
    n_k, or equally (`uniform`).
    """

    alpha: NonNegative = 0.01
    control: Literal["updates", "variates"] = "updates"
    drift: Literal["cohort", "all"] = "cohort"
    weights: Literal["examples", "uniform"] = "examples"

    broadcast: ClassVar[tuple[str, ...]] = ("model", "g")

    @property
    def sends(self) -> Mapping[str, Entry]:  # type: ignore[override]
        """By `drift` and `control`. delta is no CHANGE: the client keeps the same one."""
        sent = {"delta": True, "h": self.drift == "cohort", "delta_g": self.control == "variates"}
        return {name: LIKE_MODEL for name, used in sent.items() if used}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if recipe.optimizer != "sgd":
            raise ConfigError("local.optimizer: feddc: (y - x) / (K lr) is a mean gradient only with sgd")
        if recipe.momentum:
            raise ConfigError("local.momentum: feddc: (y - x) / (K lr) is a mean gradient only without it")
        if recipe.lr_every == "step":
            raise ConfigError("local.lr_every: feddc: (y - x) / (K lr) needs one lr a round")
        if recipe.precision == "fp16":
            raise ConfigError("local.precision: feddc counts K steps, and fp16 skips some; use bf16 or fp32")

    def init_server(self, model: Tensor) -> State:
        return {"model": model, "g": torch.zeros_like(model), "h": torch.zeros_like(model)}

    def init_client(self, model: Tensor, layout: Layout) -> State:
        return {"g": torch.zeros_like(model), "h": torch.zeros_like(model)}  # the last update, and the drift

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, g, g_k, h_k = server["model"], server["g"], client["g"], client["h"]
        k_lr = local.num_steps * local.lr
        per_step = torch.where(k_lr > 0, 1 / k_lr, 0)  # 0 where a schedule has ended
        control = (g_k - g) * per_step if self.control == "updates" else g_k - g
        y = local.train(x, correct=lambda d, w: d + self.alpha * (w + h_k - x) + control)
        delta, h_new = y - x, h_k + (y - x)
        g_new = delta if self.control == "updates" else torch.where(k_lr > 0, g_k - g + per_step * delta, g_k)
        message = {"delta": delta}
        if self.drift == "cohort":
            message["h"] = h_new
        if self.control == "variates":
            message["delta_g"] = g_new - g_k
        weight = local.num_examples if self.weights == "examples" else 1.0
        return Update(message, weight, client={"g": g_new, "h": h_new})

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return num_examples if self.weights == "examples" else 1.0

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        delta = mean["delta"]
        h = mean["h"] if self.drift == "cohort" else server["h"] + self.part(info) * delta
        g = delta if self.control == "updates" else server["g"] + self.part(info) * mean["delta_g"]
        return {"model": server["model"] + delta + h, "g": g, "h": h}

    def part(self, info: RoundInfo) -> float:
        """The cohort's part of the population, by the weights of the mean."""
        return info.share if self.weights == "examples" else info.participation
