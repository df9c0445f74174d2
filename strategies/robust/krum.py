"""Krum and multi-Krum: the update that is nearest to its neighbours, or the mean of the best ones.

Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017, sections 4
and 6. https://arxiv.org/abs/1703.02757

Differs: the paper's clients send one gradient; here they train, and the rule chooses among their updates. Of
batch-norm statistics, which the paper does not have, the server takes the coordinate-wise median: a client whose
update is chosen may still lie about its statistics. Distances are sums of squared differences in float64, since
|a|^2 + |b|^2 - 2 ab in float32, as some libraries have it, is noise where updates are nearly alike.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from fedsim import LocalObjective, RoundInfo, Rows, State, Strategy, Update
from fedsim.types import CHANGE, Count, Positive

from .median import coordinate_median

COLUMNS = 2**13  # whose differences are computed at once, so that it takes little memory beside the rows


@dataclass(frozen=True, kw_only=True)
class Krum(Strategy):
    """Krum: of all updates the one nearest to its neighbours; all weights are equal (Blanchard 2017).

    Of n clients, `attackers` (f) may be hostile; a round needs n > 2 f + 2. An update's score is the sum of its
    squared distances to the n - f - 2 nearest others. The server takes the mean of the `choose` updates with the
    lowest scores: 1 is Krum, more is multi-Krum, up to n - f. The server keeps all messages of a round, so its
    memory grows with the cohort.
    """

    attackers: Annotated[int, Ge(0)] = 1
    choose: Count = 1
    server_lr: Positive = 1.0

    sends = {"delta": CHANGE}
    aggregator: ClassVar[Rows] = Rows()

    @property
    def min_clients(self) -> int:  # type: ignore[override]
        """The smallest n with 2 f + 2 < n and choose <= n - f."""
        return max(2 * self.attackers + 3, self.choose + self.attackers)

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]
        y = local.train(x)
        return Update({"delta": y - x}, weight=1.0)

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return 1.0

    def server_update(self, server: State, rows: State, info: RoundInfo) -> State:
        deltas = rows["delta"]
        chosen = deltas[self.chosen(deltas)].mean(0, dtype=torch.float64)
        return {"model": server["model"] + self.server_lr * chosen.to(deltas.dtype)}

    def server_buffers(self, rows: Tensor, info: RoundInfo) -> Tensor:
        return coordinate_median(rows)

    def chosen(self, deltas: Tensor) -> Tensor:
        """(choose,) the places of the rows (C, P) with the lowest scores; of equal ones, the first."""
        nearest = len(deltas) - self.attackers - 2
        others = squared_distances(deltas).fill_diagonal_(inf)
        scores = others.sort(dim=1).values[:, :nearest].sum(1)
        return scores.sort(stable=True).indices[: self.choose].sort().values


def squared_distances(rows: Tensor) -> Tensor:
    """(C, C) in float64, of rows (C, P)."""
    found = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in torch.split(rows, COLUMNS, 1):
        columns = part.double()
        for i in range(1, len(rows)):
            found[i, :i] += (columns[:i] - columns[i]).square_().sum(1)
    return found + found.T
