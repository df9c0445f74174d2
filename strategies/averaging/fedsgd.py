"""FedSGD: one gradient for each client and one step in each round.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
section 2. https://arxiv.org/abs/1602.05629
"""

from dataclasses import dataclass

from fedsim import ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import CHANGE


@dataclass(frozen=True, kw_only=True)
class FedSGD(Strategy):
    """FedSGD: average the gradients of F_k at the global model, take one step (McMahan 2017).

    This equals FedAvg with one epoch and the full batch. The gradient is computed batch by batch: in a network
    without batch norm and dropout, `local.batch_size` affects only the memory.
    """

    sends = {"step": CHANGE}  # w - y
    min_clients = 0

    def check(self, recipe: Recipe, layout: Layout) -> None:
        plain = Recipe(recipe.schedule)
        step = ("optimizer", "epochs", "steps", "momentum", "weight_decay", "clip_norm", "accumulate")
        for name in (*step, "distillation", "noisy_labels"):
            if getattr(recipe, name) != (needed := getattr(plain, name)):
                raise ConfigError(
                    f"local.{name}: fedsgd takes one plain gradient step a round, so this must be "
                    f"{'null' if needed is None else needed}; or use fedavg with local.batch_size=full"
                )
        if recipe.precision == "fp16":
            raise ConfigError("local.precision: fedsgd sends gradients unscaled; use bf16 or fp32")

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        g_k, _ = local.gradient(server["model"])
        return Update({"step": local.lr * g_k}, weight=local.num_examples)

    def max_steps(self, num_steps: int, epoch_steps: int) -> int:
        return epoch_steps

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] - mean["step"]}  # w - eta sum of n_k / n g_k
