"""FedAvg: average the models that the clients trained.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
Algorithm 1. https://arxiv.org/abs/1602.05629
"""

from dataclasses import dataclass
from typing import Literal

from fedsim import LocalObjective, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, Positive


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """FedAvg: average the clients' models, weighted by n_k (McMahan 2017).

    The paper sums n_k / n w_k over all K clients, although only m of them train in a round. With `average:
    cohort`, n counts the examples of the cohort. With `population`, n counts all examples, and clients that did
    not train count with the global model. Batch-norm statistics are the mean over the cohort in both cases.
    """

    server_lr: Positive = 1.0
    average: Literal["cohort", "population"] = "cohort"

    sends = {"delta": CHANGE}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]
        y = local.train(x)
        return Update({"delta": y - x}, weight=local.num_examples)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        step = self.server_lr * (info.share if self.average == "population" else 1.0)
        return {"model": server["model"] + step * mean["delta"]}
