"""FedNova: average the clients' changes per unit of local work, so that more steps do not count for more.

Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, NeurIPS 2020,
sections 4 and 4.1. https://arxiv.org/abs/2007.07481

Differs: there is no momentum on the server. With mu > 0 the paper has tau_eff = sum of p_i |a_i|_1, and the
authors' code the mean number of steps, sum of p_i tau_i, which is `tau_eff: steps`. With momentum and mu together
the code's coefficients are not those of its steps, so this is refused.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsim import Batch, ConfigError, Layout, LocalObjective, Recipe, RoundInfo, State, Strategy, Update
from fedsim.types import LIKE_MODEL, Entry, NonNegative


@dataclass(frozen=True, kw_only=True)
class FedNova(Strategy):
    """FedNova: average normalised changes, and move by the mean work tau_eff; with mu also proximal (Wang 2020).

    With equal numbers of steps it is FedAvg. Clients with few steps count as much as those with many, so with very
    unequal numbers it needs a smaller learning rate than FedAvg. Batch-norm statistics are averaged as in FedAvg.
    """

    mu: NonNegative = 0.0
    tau_eff: Literal["coefficients", "steps"] = "coefficients"

    sends = {"d": LIKE_MODEL, "work": Entry(shape=(), dtype=torch.float64)}
    min_clients = 0

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if recipe.optimizer != "sgd":
            raise ConfigError("local.optimizer: fednova knows only the coefficients of sgd")
        if recipe.nesterov:
            raise ConfigError("local.nesterov: fednova knows only the coefficients of plain momentum")
        if recipe.lr_every == "step":
            raise ConfigError("local.lr_every: fednova needs one lr a round")
        if recipe.precision == "fp16":
            raise ConfigError("local.precision: fednova counts steps, and fp16 skips some; use bf16 or fp32")
        if self.mu and recipe.momentum:
            raise ConfigError("strategy.mu: fednova takes momentum or mu, not both; set local.momentum=0")
        if self.mu * recipe.peak_lr >= 1:
            raise ConfigError(f"strategy.mu: {self.mu:g} times the learning rate must be below 1")

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        x = server["model"]

        def proximal_loss(w: Tensor, batch: Batch) -> Tensor:
            return local.loss(w, batch) + self.mu / 2 * (w - x).square().sum()

        y = local.train(x, loss=proximal_loss if self.mu else None)
        a = self.coefficients(local)
        work = local.num_steps.double() if self.tau_eff == "steps" else a
        return Update({"d": (y - x) / a, "work": work}, weight=local.num_examples)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] + mean["work"] * mean["d"]}  # tau_eff times the sum of p_i d_i

    def coefficients(self, local: LocalObjective) -> Tensor:
        """() |a_i|_1, the sum of the coefficients with which the client's gradients enter y - x."""
        tau, rho = local.num_steps.double(), local.recipe.momentum
        if self.mu:
            eta_mu = (self.mu * local.lr + torch.zeros_like(tau)).clamp(min=1e-300)  # 0 where a schedule has ended
            return -torch.expm1(tau * torch.log1p(-eta_mu)) / eta_mu  # (1 - (1 - eta mu)^tau) / (eta mu)
        return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
