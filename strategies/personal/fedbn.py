"""FedBN: the parameters of normalisation layers stay at the client.

Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021.
https://arxiv.org/abs/2102.07623
"""

from dataclasses import dataclass

from torch import Tensor

from fedsim import Buffers, ConfigError, Layout, LocalObjective, Recipe, State, Update
from fedsim.types import CHANGE

from ..averaging.fedavg import FedAvg
from .personal import own_model, refuse_recalibrated, update_with_private


@dataclass(frozen=True, kw_only=True)
class FedBN(FedAvg):
    """FedBN: FedAvg of all layers except normalisation layers, which stay at each client (Li 2021).

    The private parameters are those of normalisation layers, or with `private` those with one of the given parts
    in their dotted names. A client stores only these entries, not a whole model. Batch-norm statistics are
    private, too, unless `buffers` says otherwise.
    """

    private: tuple[str, ...] = ()
    buffers: Buffers = "private"

    sends = {"delta": CHANGE}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if not len(self.entries(layout)):
            which = f"with {' or '.join(self.private)} in its name" if self.private else "of a norm"
            raise ConfigError(f"strategy.private: the network trains no parameter {which}; model cnn_bn has some")
        refuse_recalibrated(self.buffers)

    def init_client(self, model: Tensor, layout: Layout) -> State:
        return {"private": model[self.entries(layout)]}

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        return own_model(server, client, self.entries(layout))

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        return update_with_private(self.entries(local.layout), super().client_update, server, client, local)

    def entries(self, layout: Layout) -> Tensor:
        """The positions of the private entries in the model."""
        chosen = set(self.private)
        kept = layout.mask(lambda name: bool(chosen & set(name.split("."))) if chosen else name in layout.norms)
        return kept.nonzero().squeeze(1)
