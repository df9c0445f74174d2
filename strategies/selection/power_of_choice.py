"""Power-of-choice: of the candidates of a round, those with the largest losses train.

Cho et al., Client Selection in Federated Learning: Convergence Analysis and Power-of-Choice Selection Strategies,
2020, section 4. https://arxiv.org/abs/2010.01243

The candidates are the cohort: the paper's d candidates, drawn with the probabilities p_k, are `cohort:
{name: by_examples, size: d}`. Its rpow-d, which asks nobody and goes by the losses of earlier trainings, is
`cohort: largest_loss` with `strategy: {name: fedavg, weights: uniform}`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedsim import LocalObjective, RoundInfo, Rows, State, Update
from fedsim.types import NUMBER, Count

from ..averaging.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class PowerOfChoice(FedAvg):
    """Power-of-choice: the `size` (m) clients of the cohort with the largest F_k train; equal weights (Cho 2020).

    F_k is the loss of the global model over all examples of a client. Where fewer than `size` clients answer, all
    of them train. The mean of the clients' models is unweighted, since the candidates are meant to be drawn with
    the probabilities p_k.
    """

    size: Count
    weights: Literal["examples", "uniform"] = "uniform"

    survey_aggregator: ClassVar[Rows] = Rows()
    survey_sends = {"loss": NUMBER}
    min_clients = 1

    def survey(self, server: State, client: State, local: LocalObjective) -> Update:
        return Update({"loss": local.loss(server["model"])}, weight=1.0)

    def select(self, server: State, rows: State, info: RoundInfo) -> list[int]:
        order = rows["loss"].argsort(descending=True, stable=True)  # of equal losses, the lower id first
        return [info.cohort[i] for i in order[: self.size].tolist()]
