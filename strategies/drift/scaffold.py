"""SCAFFOLD: correct each client's drift with control variates.

Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020, Algorithm 1.
https://arxiv.org/abs/1910.06378

Differs: nothing by default, which is the paper's option II; `control: full_gradient` is its option I. The code of
NIID-Bench (Li et al. 2022, https://arxiv.org/abs/2102.02079) has `correction: after_step` and momentum, with
which the fixed point is only near the minimum of the mean loss; there, clients count by their examples.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, LIKE_MODEL, Positive


@dataclass(frozen=True, kw_only=True)
class Scaffold(Strategy):
    """SCAFFOLD: control variates correct the clients' drift; all weights are equal (Karimireddy 2020).

    A client's new `control` variate is the mean gradient of its `steps`, (x - y) / (K lr) (option II), or the
    `full_gradient` of F_k at x (option I), for which it takes one more pass over its examples. The `correction`
    is a part of each `gradient`, or is added `after_step`, outside of momentum, weight decay and clipping, which
    are then allowed.
    """

    server_lr: Positive = 1.0
    control: Literal["steps", "full_gradient"] = "steps"
    correction: Literal["gradient", "after_step"] = "gradient"

    broadcast: ClassVar[tuple[str, ...]] = ("model", "c")
    sends = {"delta": CHANGE, "delta_c": LIKE_MODEL}
    min_clients = 0

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if recipe.precision == "fp16":
            raise ConfigError("local.precision: scaffold counts K steps, and fp16 skips some; use bf16 or fp32")
        if recipe.lr_every == "step" and (self.control == "steps" or self.correction == "after_step"):
            raise ConfigError("local.lr_every: scaffold: (x - y) / (K lr) needs one lr a round")
        if self.control == "full_gradient":
            if recipe.distillation or recipe.noisy_labels:
                name = "distillation" if recipe.distillation else "noisy_labels"
                raise ConfigError(f"local.{name}: scaffold: the full gradient is that of the labels; use null")
            return
        if recipe.optimizer != "sgd":
            raise ConfigError("local.optimizer: scaffold: (x - y) / (K lr) is a mean gradient only with sgd")
        for name in ("momentum", "weight_decay", "clip_norm"):
            if self.correction == "gradient" and getattr(recipe, name):
                raise ConfigError(f"local.{name}: scaffold: (x - y) / (K lr) is a mean gradient only without it")

    def init_server(self, model: Tensor) -> State:
        return {"model": model, "c": torch.zeros_like(model)}

    def init_client(self, model: Tensor, layout: Layout) -> State:
        return {"c": torch.zeros_like(model)}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, c, c_k = server["model"], server["c"], client["c"]
        if self.correction == "gradient":
            y = local.train(x, correct=lambda g, w: g - c_k + c)  # line 10
        else:
            y = local.train(x, after_step=lambda w: w - local.lr * (c - c_k))
        k_lr = local.num_steps * local.lr  # 0 where a schedule has ended: x does not move, and neither does c_k
        c_new = torch.where(k_lr > 0, c_k - c + (x - y) / k_lr, c_k)  # line 12
        if self.control == "full_gradient":
            c_new, _ = local.separate("full gradient").gradient(x)
        return Update({"delta": y - x, "delta_c": c_new - c_k}, weight=1.0, client={"c": c_new})

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return 1.0

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {
            "model": server["model"] + self.server_lr * mean["delta"],
            "c": server["c"] + info.participation * mean["delta_c"],  # |S| / N, line 17
        }
