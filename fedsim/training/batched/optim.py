"""The optimisers of `fedsim.training.optim`, one tensor at a time and in place, by what `vmap` has rules for.

A learning rate may be a number, or one () of each client's own.
"""

from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from fedsim.training.batched.layers import add_product
from fedsim.training.recipe import Recipe

Rate = float | Tensor


class Rule(Protocol):
    """An optimiser without a state of its own."""

    slots: int  # how many tensors its state has, of the weights' shape; they start at 0

    def __call__(self, w: Tensor, g: Tensor, state: list[Tensor], lr: Rate, number: int, decay: float) -> None:
        """Step `number`, from 1: changes `w` and `state`; `g` is only read."""


def make_rule(recipe: Recipe) -> Rule:
    """The recipe's."""
    if recipe.optimizer == "sgd":
        return SGD(recipe.momentum, recipe.nesterov)
    if recipe.optimizer == "lars":
        return LARS(recipe.momentum, recipe.trust)
    return Adam(recipe.betas, recipe.eps, recipe.optimizer == "adamw")


class SGD:
    """torch.optim.SGD."""

    def __init__(self, momentum: float, nesterov: bool):
        self.momentum, self.nesterov = momentum, nesterov
        self.slots = 1 if momentum else 0

    def __call__(self, w: Tensor, g: Tensor, state: list[Tensor], lr: Rate, number: int, decay: float) -> None:
        g = torch.add(g, w, alpha=decay) if decay else g
        if self.momentum:
            v = state[0].mul_(self.momentum).add_(g)
            g = torch.add(g, v, alpha=self.momentum) if self.nesterov else v
        _add(w, -lr, g)


class Adam:
    """torch.optim.Adam, or AdamW where the decay is `decoupled`."""

    slots = 2

    def __init__(self, betas: tuple[float, float], eps: float, decoupled: bool):
        self.betas, self.eps, self.decoupled = betas, eps, decoupled

    def __call__(self, w: Tensor, g: Tensor, state: list[Tensor], lr: Rate, number: int, decay: float) -> None:
        (m, v), (beta1, beta2) = state, self.betas
        if decay and self.decoupled:
            w.mul_(1 - lr * decay)
        elif decay:
            g = torch.add(g, w, alpha=decay)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g.square(), alpha=1 - beta2)
        scale = v.sqrt().div_(sqrt(1 - beta2**number)).add_(self.eps)
        _add(w, -lr / (1 - beta1**number), m / scale)


class LARS:
    """You et al. 2017; see `fedsim.training.optim.LARS`."""

    slots = 1

    def __init__(self, momentum: float, trust: float):
        self.momentum, self.trust = momentum, trust

    def __call__(self, w: Tensor, g: Tensor, state: list[Tensor], lr: Rate, number: int, decay: float) -> None:
        step = torch.add(g, w, alpha=decay) if decay else g
        if w.dim() > 1:
            w_norm, g_norm = w.norm(), g.norm()
            rate = self.trust * w_norm / (g_norm + decay * w_norm)
            step = step * torch.where((w_norm > 0) & (g_norm > 0), rate, torch.ones_like(w_norm))
        _add(state[0].mul_(self.momentum), lr, step)
        w.sub_(state[0])


def shrunk(gradients: list[Tensor], norm: float) -> list[Tensor]:
    """To the L2 norm `norm`, together, where theirs is larger; as `fedsim.training.optim.clipped`."""
    total = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    shrink = (norm / (total + 1e-6)).clamp(max=1)
    return [g * shrink for g in gradients]


def _add(w: Tensor, factor: Rate, g: Tensor) -> None:
    if isinstance(factor, Tensor):
        add_product(w, factor, g)
    else:
        w.add_(g, alpha=factor)
