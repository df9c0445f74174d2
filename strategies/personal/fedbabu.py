"""FedBABU: the clients train the body of the network and never its head, which each fine-tunes in the end.

Oh et al., FedBABU: Toward Enhanced Representation for Federated Image Classification, ICLR 2022, Algorithm 1.
https://arxiv.org/abs/2106.06042

The head keeps its initial weights in all rounds. For the evaluation a client fine-tunes the whole network.
"""

from dataclasses import dataclass

from torch import Tensor

from fedsim import ConfigError, Layout, LocalObjective, Recipe, State, Update
from fedsim.types import CHANGE, Count, Positive

from ..averaging.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedBABU(FedAvg):
    """FedBABU: FedAvg of all layers but the head, which stays as it was; fine-tuned for the evaluation (Oh 2022).

    The head is `model.head`, by default the last linear layer. For its own evaluation, with `evaluate.clients`, a
    client trains the whole network for `epochs` epochs, by `local` and its learning rate of the last round, or
    with `lr`: features that have grown around a fixed head may want a small one.
    """

    epochs: Count = 1
    lr: Positive | None = None

    sends = {"delta": CHANGE}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        check_head(layout, "fedbabu")

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]
        y = local.train(x, only=~head_mask(local.layout, x))
        return Update({"delta": y - x}, weight=self.weight(local))

    def personalise(self, server: State, client: State, local: LocalObjective) -> tuple[Tensor, Tensor]:
        tuned = local.separate("fine-tuning", epochs=self.epochs, lr=self.lr)
        return tuned.train(server["model"]), tuned.buffers


def check_head(layout: Layout, whose: str) -> None:
    """Raise ConfigError unless the network has a head, and more than that."""
    if not 0 < len(layout.head) < len(layout.shapes):
        raise ConfigError(f"model.head: {whose} needs a head that is some of the network's layers; name one")


def head_mask(layout: Layout, like: Tensor) -> Tensor:
    """(P,) bool: True for the entries of the head."""
    return layout.mask(layout.head.__contains__).to(like.device)
