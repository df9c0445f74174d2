"""FedProx: keep each local model close to the global model.

Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, Algorithm 2.
https://arxiv.org/abs/1812.06127
"""

from dataclasses import dataclass

from torch import Tensor

from fedsim import Batch, LocalObjective, State, Update
from fedsim.types import CHANGE, NonNegative

from ..averaging.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedProx: FedAvg with mu / 2 |w - x|^2 added to each client's loss (Li 2020)."""

    mu: NonNegative = 0.01

    sends = {"delta": CHANGE}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]

        def proximal_loss(w: Tensor, batch: Batch) -> Tensor:
            return local.loss(w, batch) + self.mu / 2 * (w - x).square().sum()

        y = local.train(x, loss=proximal_loss)
        return Update({"delta": y - x}, weight=self.weight(local))
