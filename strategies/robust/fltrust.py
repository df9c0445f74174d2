"""FLTrust: the server trains on a few clean examples of its own, and trusts updates that point where its own does.

Cao et al., FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping, NDSS 2021, Algorithm 2.
https://arxiv.org/abs/2012.13995

Differs: the server trains as a client does (`local`), on the examples of `data.public`. Of batch-norm statistics,
which the paper does not have, the server takes the coordinate-wise median.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim import LocalObjective, RoundInfo, Rows, State, Strategy, Update
from fedsim.types import CHANGE, Positive

from .median import coordinate_median


@dataclass(frozen=True, kw_only=True)
class FLTrust(Strategy):
    """FLTrust: updates weighted by their cosine with the server's own, and scaled to its length (Cao 2021)."""

    server_lr: Positive = 1.0

    sends = {"delta": CHANGE}
    aggregator: ClassVar[Rows] = Rows()
    uses_public: ClassVar[bool] = True

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]
        return Update({"delta": local.train(x) - x}, weight=1.0)

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return 1.0

    def server_update(self, server: State, rows: State, info: RoundInfo) -> State:
        x, public = server["model"], info.public
        return {"model": x + self.server_lr * trusted(rows["delta"], public.train(x) - x)}

    def server_buffers(self, rows: Tensor, info: RoundInfo) -> Tensor:
        return coordinate_median(rows)


def trusted(updates: Tensor, own: Tensor) -> Tensor:
    """(P,) the mean of updates (C, P), each as long as the server's `own` (P,), by its trust relu(cosine).

    It is 0 where nobody is trusted.
    """
    length, lengths = own.double().norm(), torch.stack([update.double().norm() for update in updates])
    cosines = torch.stack([update.double() @ own.double() for update in updates]) / lengths / length
    trust = torch.where((lengths > 0) & (length > 0), cosines, 0).relu()
    shares = torch.where(trust > 0, trust / trust.sum() * length / lengths, 0)
    mean = torch.zeros_like(own, dtype=torch.float64)
    for share, update in zip(shares, updates, strict=True):
        mean += share * update.double()  # in float64: a share may be too large for float32
    return mean.to(own.dtype)
