"""FedRep: each client trains its own head on the shared body, and then the body below its head.

Collins et al., Exploiting Shared Representations for Personalized Federated Learning, ICML 2021, Algorithm 1.
https://arxiv.org/abs/2102.07078

Differs: heads start from the initial model, not at random for each client; means are weighted by n_k.
"""

from dataclasses import dataclass

from torch import Tensor

from fedsim import Layout, LocalObjective, Recipe, State, Update
from fedsim.types import CHANGE, Count

from ..averaging.fedavg import FedAvg
from .fedbabu import check_head, head_mask
from .personal import own_model, refuse_recalibrated


@dataclass(frozen=True, kw_only=True)
class FedRep(FedAvg):
    """FedRep: `head_epochs` epochs of the client's own head, then the body by `local` (Collins 2021).

    The head is `model.head`, by default the last linear layer; it never changes in the global model, so evaluate
    each client's own model, with `evaluate.clients`. `local.epochs` are those of the body.
    """

    head_epochs: Count = 10

    sends = {"delta": CHANGE}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        check_head(layout, "fedrep")
        refuse_recalibrated(self.buffers)

    def init_client(self, model: Tensor, layout: Layout) -> State:
        return {"private": model[self.entries(layout)]}

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        return own_model(server, client, self.entries(layout))

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, entries = server["model"], self.entries(local.layout).to(server["model"].device)
        head = head_mask(local.layout, x)
        with_head = local.separate("head", epochs=self.head_epochs).train(
            own_model(server, client, entries), only=head
        )
        y = local.train(with_head, only=~head)
        private = {"private": with_head[entries]}
        return Update({"delta": y - x}, self.weight(local), client=private, where={"delta": ~head})

    def entries(self, layout: Layout) -> Tensor:
        """The positions of the head's entries in the model."""
        return layout.mask(layout.head.__contains__).nonzero().squeeze(1)
