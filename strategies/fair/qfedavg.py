"""q-FedAvg: a client counts for more, the larger its loss.

Li et al., Fair Resource Allocation in Federated Learning, ICLR 2020, Algorithm 2. https://arxiv.org/abs/1905.10497

The paper samples clients with probability p_k = n_k / n and adds their messages up equally. With cohorts that are
drawn uniformly, `weights: examples` stands for its p_k. F_k + 1e-10, for F_k = 0, is the authors' code's.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fedsim import ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import LIKE_MODEL, NUMBER, NonNegative


@dataclass(frozen=True, kw_only=True)
class QFedAvg(Strategy):
    """q-FedAvg: minimise the sum of F_k^(q + 1) / (q + 1), with larger q for more equal losses (Li 2020).

    F_k is the loss of the model that the client receives, over all of its examples. With q = 0 this is the
    unweighted mean of the clients' models.
    """

    q: NonNegative = 1.0
    weights: Literal["uniform", "examples"] = "uniform"

    sends = {"delta": LIKE_MODEL, "h": NUMBER}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if recipe.optimizer != "sgd":
            raise ConfigError("local.optimizer: qfedavg: 1 / lr estimates how fast gradients change only with sgd")
        if recipe.lr_every == "step":
            raise ConfigError("local.lr_every: qfedavg: the step 1 / L = lr needs one lr a round")

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        w, q = server["model"], self.q
        f = local.loss(w) + 1e-10  # F_k
        step = w - local.train(w)  # Delta w_k / L, with L = 1 / lr
        lr = torch.as_tensor(local.lr, dtype=f.dtype).clamp(min=1e-30)  # 0 where a schedule has ended
        # Both times 1 / L, which cancels: Delta_k and h_k of the paper have no value where lr is 0.
        h = q * f ** (q - 1) * step.square().sum() / lr + f**q
        return Update(
            {"delta": f**q * step, "h": h}, weight=1.0 if self.weights == "uniform" else local.num_examples
        )

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return 1.0 if self.weights == "uniform" else num_examples

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] - mean["delta"] / mean["h"]}
