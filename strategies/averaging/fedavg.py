"""FedAvg: average the models that the clients trained.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
Algorithm 1. https://arxiv.org/abs/1602.05629
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedsim import LocalObjective, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, Positive


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """FedAvg: average the clients' models, weighted by n_k (McMahan 2017).

    The paper sums n_k / n w_k over all K clients, although only m of them train in a round. With `average:
    cohort`, n counts the examples of the cohort. With `population`, n counts all examples, and clients that did
    not train count with the global model. Batch-norm statistics are the mean over the cohort in both cases.
    With `weights: uniform` all clients count equally.
    """

    server_lr: Positive = 1.0
    average: Literal["cohort", "population"] = "cohort"
    weights: Literal["examples", "uniform"] = "examples"

    sends = {"delta": CHANGE}
    min_clients: ClassVar[int] = 0

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]
        y = local.train(x)
        return Update({"delta": y - x}, weight=self.weight(local))

    def weight(self, local: LocalObjective) -> Tensor | float:
        """The weight of a client's update."""
        return local.num_examples if self.weights == "examples" else 1.0

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return num_examples if self.weights == "examples" else 1.0

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        share = info.share if self.weights == "examples" else info.participation
        step = self.server_lr * (share if self.average == "population" else 1.0)
        return {"model": server["model"] + step * mean["delta"]}
