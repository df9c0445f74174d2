"""AFL: minimise the loss of the worst mixture of the clients' data.

Mohri et al., Agnostic Federated Learning, ICML 2019, Algorithm 1 (Stochastic-AFL).
https://arxiv.org/abs/1902.00146

With `local: {steps: 1}` the model moves as in the paper: gamma_w is `local.lr`. More local steps save rounds.
Differs: F_k is over all examples of a client, not over one mini-batch; the model is the last one, not the mean of
all rounds' (see `ema`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim import Federation, LocalObjective, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, Entry, NonNegative


@dataclass(frozen=True, kw_only=True)
class AFL(Strategy):
    """AFL: weights lambda of the clients, which rise with their losses, on the simplex (Mohri 2019).

    All clients must answer in each round. Batch-norm statistics are the unweighted mean.
    """

    lr_lambda: NonNegative = 0.1

    broadcast: ClassVar[tuple[str, ...]] = ("model", "lambda")
    min_clients: ClassVar[Literal["all"]] = "all"
    sends = {"delta": CHANGE, "losses": Entry(like="lambda")}

    def init_server(self, model: Tensor, federation: Federation) -> State:  # type: ignore[override]
        n = federation.num_clients
        return {"model": model, "lambda": model.new_full((n,), 1 / n)}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, lambda_ = server["model"], server["lambda"]
        own = (torch.arange(len(lambda_), device=x.device) == local.client_id).to(x.dtype)  # one-hot
        delta = (own @ lambda_) * (local.train(x) - x)
        return Update({"delta": delta, "losses": own * local.loss(x)}, weight=1.0)

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return 1.0

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        n = info.num_clients
        lambda_ = nearest_on_simplex(server["lambda"] + self.lr_lambda * n * mean["losses"])
        return {"model": server["model"] + n * mean["delta"], "lambda": lambda_}


def nearest_on_simplex(v: Tensor) -> Tensor:
    """(N,) the nearest point with entries >= 0 and the sum 1 (Duchi 2008, https://doi.org/10.1145/1390156.1390191)."""
    u = v.sort(descending=True).values
    thresholds = (u.cumsum(0) - 1) / torch.arange(1, len(v) + 1, device=v.device)
    return (v - thresholds[(u > thresholds).sum() - 1]).clamp(min=0)
