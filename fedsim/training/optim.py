"""Local optimisers, in place on lists of tensors: the same numbers as torch.optim, without its bookkeeping.

A list holds either the network's parameters one by one, or the one flat vector that they are views of. Weight
decay is for the tensors that `decayed` has true for, in the order of the lists, or for all.
"""

from math import sqrt
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


class Optimizer(Protocol):
    """What changes weights; knows of one client at a time."""

    @property
    def state(self) -> list[Tensor]:
        """What it keeps between two steps."""

    def reset(self) -> None:
        """Forget the last client, and stay where it is in memory."""

    def step(self, weights: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        """One step, in place. `gradients` are only read: autograd may hand out one tensor twice."""


class SGD:
    """torch.optim.SGD: v = m v + g; w -= lr v, or lr (g + m v) with Nesterov; g holds the weight decay."""

    def __init__(self, momentum: float, nesterov: bool, weight_decay: float, decayed: list[bool] | None = None):
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.decayed = decayed
        self.velocity: list[Tensor] = []

    @property
    def state(self) -> list[Tensor]:
        return self.velocity

    def reset(self) -> None:
        for v in self.velocity:
            v.zero_()

    def step(self, weights: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        if self.momentum:
            self.velocity = self.velocity or [torch.zeros_like(w) for w in weights]
            torch._foreach_mul_(self.velocity, self.momentum)
            torch._foreach_add_(self.velocity, gradients)
            if self.weight_decay:
                velocity = _chosen(self.velocity, self.decayed)
                torch._foreach_add_(velocity, _chosen(weights, self.decayed), alpha=self.weight_decay)
        if self.momentum and not self.nesterov:
            torch._foreach_add_(weights, self.velocity, alpha=-lr)
            return
        if self.weight_decay:
            torch._foreach_mul_(_chosen(weights, self.decayed), 1 - lr * self.weight_decay)
        torch._foreach_add_(weights, gradients, alpha=-lr)
        if self.nesterov:
            torch._foreach_add_(weights, self.velocity, alpha=-lr * self.momentum)


class Adam:
    """torch.optim.Adam, or AdamW where the decay is `decoupled` from the gradient."""

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
        decayed: list[bool] | None = None,
    ):
        self.betas, self.eps, self.weight_decay, self.decoupled = betas, eps, weight_decay, decoupled
        self.decayed = decayed
        self.m: list[Tensor] = []
        self.v: list[Tensor] = []
        self.steps = 0

    @property
    def state(self) -> list[Tensor]:
        return self.m + self.v

    def reset(self) -> None:
        self.steps = 0

    def step(self, weights: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        g, (beta1, beta2) = gradients, self.betas
        if not self.steps:
            self.m = [torch.zeros_like(w) for w in weights]
            self.v = [torch.zeros_like(w) for w in weights]
        self.steps += 1
        if self.weight_decay and self.decoupled:
            torch._foreach_mul_(_chosen(weights, self.decayed), 1 - lr * self.weight_decay)
        elif self.weight_decay:
            decayed = self.decayed or [True] * len(g)
            b = self.weight_decay
            g = [torch.add(gi, w, alpha=b) if d else gi for gi, w, d in zip(g, weights, decayed, strict=True)]
        torch._foreach_lerp_(self.m, g, 1 - beta1)
        torch._foreach_mul_(self.v, beta2)
        torch._foreach_addcmul_(self.v, g, g, value=1 - beta2)
        scale = torch._foreach_sqrt(self.v)
        torch._foreach_div_(scale, sqrt(1 - beta2**self.steps))
        torch._foreach_add_(scale, self.eps)
        torch._foreach_addcdiv_(weights, self.m, scale, value=-lr / (1 - beta1**self.steps))


class LARS:
    """Layer-wise adaptive rates for very large batches (You et al. 2017, https://arxiv.org/abs/1708.03888).

    v = m v + lr l (g + b w), w -= v, with the layer's own rate l = trust |w| / (|g| + b |w|), where b is the
    weight decay. Layers that are 0, and tensors of one axis (biases and norms), have l = 1, as in practice.
    """

    def __init__(self, momentum: float, weight_decay: float, trust: float, decayed: list[bool] | None = None):
        self.momentum, self.weight_decay, self.trust, self.decayed = momentum, weight_decay, trust, decayed
        self.velocity: list[Tensor] = []

    @property
    def state(self) -> list[Tensor]:
        return self.velocity

    def reset(self) -> None:
        for v in self.velocity:
            v.zero_()

    def step(self, weights: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        self.velocity = self.velocity or [torch.zeros_like(w) for w in weights]
        torch._foreach_mul_(self.velocity, self.momentum)
        for i, (v, w, g) in enumerate(zip(self.velocity, weights, gradients, strict=True)):
            b = self.weight_decay if self.decayed is None or self.decayed[i] else 0.0
            v.add_((g + b * w) * self.rate(w, g, b), alpha=lr)
        torch._foreach_sub_(weights, self.velocity)

    def rate(self, w: Tensor, g: Tensor, b: float) -> Tensor | float:
        """() the layer's own rate."""
        if w.dim() < 2:
            return 1.0
        w_norm, g_norm = w.norm(), g.norm()
        rate = self.trust * w_norm / (g_norm + b * w_norm)
        return torch.where((w_norm > 0) & (g_norm > 0), rate, 1.0)


def clipped(gradients: list[Tensor], norm: float) -> list[Tensor]:
    """Shrunk together to the L2 norm `norm`, where theirs is larger; as torch.nn.utils.clip_grad_norm_ has it."""
    shrink = (norm / (get_total_norm(gradients) + 1e-6)).clamp(max=1)
    return list(torch._foreach_mul(gradients, shrink))


def _chosen(tensors: list[Tensor], chosen: list[bool] | None) -> list[Tensor]:
    return tensors if chosen is None else [t for t, c in zip(tensors, chosen, strict=True) if c]


class LossScale:
    """Dynamic loss scaling for fp16, with the constants of torch.amp.GradScaler.

    Halved where a gradient overflows, doubled after 2,000 steps that did not (Micikevicius et al. 2018,
    https://arxiv.org/abs/1710.03740).
    """

    def __init__(self, scale: float):
        self.scale, self.good_steps = scale, 0

    def unscale(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """The gradients of the loss itself, or None where one overflowed and the step must be skipped."""
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            self.scale, self.good_steps = self.scale / 2, 0
            return None
        unscaled = list(torch._foreach_div(gradients, self.scale))
        self.good_steps += 1
        if self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0
        return unscaled
