"""FedDyn: two terms in each client's loss let the minima of all clients agree with that of the federation.

Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021, Algorithm 1.
https://arxiv.org/abs/2111.04263

Differs: a client takes the recipe's steps, where the paper has the minimum of its loss. The authors' code divides
alpha by n_k N / n, so that clients count by their examples; in the paper, and here, all have the same alpha. Their
code also has lr 0.1 with schedule exponential 0.998, weight_decay 0.001 and clip_norm 10.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import Layout, LocalObjective, RoundInfo, State, Strategy, Update
from fedsim.types import LIKE_MODEL, Positive


@dataclass(frozen=True, kw_only=True)
class FedDyn(Strategy):
    """FedDyn: F_k(w) - g_k w + alpha / 2 |w - x|^2 at each client; all weights are equal (Acar 2021)."""

    alpha: Positive = 0.01

    sends = {"delta": LIKE_MODEL}  # no CHANGE: the client keeps the same one in g

    def init_server(self, model: Tensor) -> State:
        return {"model": model, "h": torch.zeros_like(model)}

    def init_client(self, model: Tensor, layout: Layout) -> State:
        return {"g": torch.zeros_like(model)}  # the gradient of F_k at its last iterate

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, g_k, alpha = server["model"], client["g"], self.alpha
        y = local.train(x, correct=lambda g, w: g - g_k + alpha * (w - x))
        return Update({"delta": y - x}, weight=1.0, client={"g": g_k - alpha * (y - x)})

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return 1.0

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        h = server["h"] - self.alpha * info.participation * mean["delta"]  # the mean of g_k over all N clients
        return {"model": server["model"] + mean["delta"] - h / self.alpha, "h": h}
