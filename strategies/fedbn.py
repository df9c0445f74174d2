"""FedBN: normalisation layers never leave the client.

Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021.
https://arxiv.org/abs/2102.07623
"""

from dataclasses import dataclass

from torch import Tensor

from fedsim import Buffers, ConfigError, Layout, LocalObjective, Recipe, State, Update

from .fedavg import FedAvg
from .personal import keeping, own_model, refuse_recalibrated


@dataclass(frozen=True, kw_only=True)
class FedBN(FedAvg):
    """FedBN: FedAvg of all layers but the normalisation layers, which stay with each client (Li 2021).

    Private are the parameters of normalisation layers, or with `private` those that have one of these parts in
    their dotted names; a client keeps only these entries, not a whole model. So are batch-norm statistics, unless
    `buffers` says otherwise.
    """

    private: tuple[str, ...] = ()
    buffers: Buffers = "private"

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
        return keeping(self.entries(local.layout), super().client_update, server, client, local)

    def entries(self, layout: Layout) -> Tensor:
        """The private entries of the model, as positions."""
        chosen = set(self.private)
        kept = layout.mask(lambda name: bool(chosen & set(name.split("."))) if chosen else name in layout.norms)
        return kept.nonzero().squeeze(1)
