"""FedSAM: clients step by the gradient at the worst point near their weights, so that they find flat minima.

Qu et al., Generalized Federated Learning via Sharpness Aware Minimization, ICML 2022, Algorithm 1.
https://arxiv.org/abs/2206.02618

The paper averages uniformly. With `weights: examples` clients count by n_k, and rho 0 is FedAvg.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedsim import Batch, ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class FedSAM(Strategy):
    """FedSAM: the gradient at w + rho g / |g|, where g is that at w, of the same mini-batch (Qu 2022).

    Clients count equally, or by their `examples`, n_k. Each step computes two gradients.
    """

    rho: NonNegative = 0.05
    server_lr: Positive = 1.0
    weights: Literal["uniform", "examples"] = "uniform"

    sends = {"delta": CHANGE}
    min_clients = 0

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if recipe.precision == "fp16":
            raise ConfigError("local.precision: fedsam computes gradients unscaled; use bf16 or fp32")

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]

        def sharpness_aware(w: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            g, f = local.gradient(w, batch)
            worst = w + self.rho * g / g.norm().clamp(min=1e-12)
            return local.gradient(worst, batch)[0], f

        y = local.train(x, gradient=sharpness_aware)
        return Update({"delta": y - x}, weight=local.num_examples if self.weights == "examples" else 1.0)

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return num_examples if self.weights == "examples" else 1.0

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] + self.server_lr * mean["delta"]}
