"""MOON: features of a client's examples stay near those of the global model, and away from its own last ones.

Li et al., Model-Contrastive Federated Learning, CVPR 2021, Algorithm 1 and equation 3.
https://arxiv.org/abs/2103.16257

z is what enters the network's head, `model.head`. The paper has a projection head there, two linear layers in
front of the last one: it belongs to the network, and is evaluated with it, so it is a matter of `model`, where a
network of your own has these layers. Without them, as in the networks of the catalogue, z are the features
themselves.

Differs: both frozen networks have the batch-norm statistics that the client received; in the authors' code each
has its own. The losses of auxiliary heads are left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim import Batch, ConfigError, Layout, LocalObjective, Recipe, State, Update
from fedsim.types import CHANGE, NonNegative, Positive

from ..averaging.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class Moon(FedAvg):
    """MOON: FedAvg with mu l_con added to each client's loss, which compares features (Li 2021).

    l_con = -log(exp(s_global / tau) / (exp(s_global / tau) + exp(s_previous / tau))), with the cosine similarities
    of an example's features to those of the global model and of the client's last model.
    """

    mu: NonNegative = 1.0
    tau: Positive = 0.5  # temperature

    sends = {"delta": CHANGE}

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if not layout.head:
            raise ConfigError("model.head: moon compares what enters the head; name a layer with parameters")
        if recipe.distillation:
            raise ConfigError("local.distillation: moon computes its loss of the labels alone; use null")

    def init_client(self, model: Tensor, layout: Layout) -> State:
        return {"last": model}

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x, frozen = server["model"], local.separate("frozen")

        def loss(w: Tensor, batch: Batch) -> Tensor:
            others = [frozen.features(v, batch.x)[0] for v in (x, client["last"])]
            z, logits = local.features(w, batch.x)
            similarities = [F.cosine_similarity(z.flatten(1), other.flatten(1)) for other in others]
            l_con = -(torch.stack(similarities, 1) / self.tau).log_softmax(1)[:, 0]
            return (local.label_losses(logits, batch) + self.mu * l_con).mean()

        y = local.train(x, loss=loss)
        return Update({"delta": y - x}, self.weight(local), client={"last": y})
