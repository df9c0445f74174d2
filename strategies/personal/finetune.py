"""Fine-tuning: each client trains the global model on its own examples before it uses it, and sends nothing of it.

Wang et al., Federated Evaluation of On-device Personalization, 2019, section 3. https://arxiv.org/abs/1910.10252
"""

from dataclasses import dataclass

from torch import Tensor

from fedsim import LocalObjective, State, Wrapper
from fedsim.types import Count, Positive


@dataclass(frozen=True, kw_only=True)
class FineTune(Wrapper):
    """Any strategy, whose clients fine-tune their own model for the evaluation (Wang 2019).

    They train all layers for `epochs` epochs, by `local` and its learning rate of the last round, or with `lr`.
    The rounds stay those of the `inner` strategy. The numbers are those of `evaluate.clients`.
    """

    epochs: Count = 1
    lr: Positive | None = None

    def personalise(self, server: State, client: State, local: LocalObjective) -> tuple[Tensor, Tensor]:
        model = self.inner.client_model(server, client, local.layout)
        tuned = local.separate("fine-tuning", epochs=self.epochs, lr=self.lr)
        return tuned.train(model), tuned.buffers
