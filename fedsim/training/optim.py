"""Local optimisers, in place on lists of tensors: the numbers of torch.optim, without its bookkeeping.

A list holds the network's parameters one by one, or only the flat vector that they are views of. Each update rule
is defined once, by a few operations on lists. `Foreach` implements these for one client, `batched.optim` for a
batch of clients under `torch.func.vmap`, where the learning rate may be a tensor () with a value for each client.
"""

from abc import ABC, abstractmethod
from math import sqrt

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

Rate = float | Tensor  # a number, or under vmap a tensor () with a value for each client
Tensors = list[Tensor]


class Foreach:
    """Operations on the lists of tensors of one client, by torch's fused _foreach functions."""

    def mul_(self, a: Tensors, factor: Rate) -> None:
        """a *= factor."""
        torch._foreach_mul_(a, factor)

    def add_(self, a: Tensors, b: Tensors, factor: Rate = 1) -> None:
        """a += factor * b."""
        torch._foreach_add_(a, b, alpha=factor)  # type: ignore[arg-type]

    def lerp_(self, a: Tensors, b: Tensors, weight: float) -> None:
        """a += weight * (b - a)."""
        torch._foreach_lerp_(a, b, weight)

    def addcmul_(self, a: Tensors, b: Tensors, c: Tensors, factor: float) -> None:
        """a += factor * b * c."""
        torch._foreach_addcmul_(a, b, c, value=factor)

    def addcdiv_(self, a: Tensors, b: Tensors, c: Tensors, factor: Rate) -> None:
        """a += factor * b / c."""
        torch._foreach_addcdiv_(a, b, c, value=factor)  # type: ignore[arg-type]

    def div_(self, a: Tensors, divisor: float) -> None:
        """a /= divisor."""
        torch._foreach_div_(a, divisor)

    def shift_(self, a: Tensors, summand: float) -> None:
        """a += summand."""
        torch._foreach_add_(a, summand)

    def sqrt(self, a: Tensors) -> list[Tensor]:
        """The square roots."""
        return list(torch._foreach_sqrt(a))

    def mul(self, a: Tensors, factor: Rate) -> list[Tensor]:
        """factor * a."""
        return list(torch._foreach_mul(a, factor))

    def norm(self, a: Tensors) -> Tensor:
        """() the L2 norm of all entries."""
        return get_total_norm(a)


FOREACH = Foreach()


class Optimizer(ABC):
    """Updates the weights of one client at a time.

    `decayed` says for each tensor whether weight decay applies to it; None applies it to all.
    """

    copies: int  # tensors of state for each tensor of weights

    def __init__(self, weight_decay: float, decayed: list[bool] | None = None, ops: Foreach = FOREACH):
        self.weight_decay, self.decayed, self.ops = weight_decay, decayed, ops
        self.state: list[list[Tensor]] = []  # `copies` lists of tensors, shaped as the weights

    def begin(self, weights: Tensors) -> None:
        """Reset the state for the next client, in place: captured CUDA graphs refer to its memory."""
        if not self.state:
            self.state = [[torch.zeros_like(w) for w in weights] for _ in range(self.copies)]
        for tensor in (tensor for tensors in self.state for tensor in tensors):
            tensor.zero_()

    @abstractmethod
    def step(self, weights: Tensors, gradients: Tensors, lr: Rate) -> None:
        """One step, in place. `gradients` are never written: autograd may return one tensor twice."""

    def _decayed(self, tensors: Tensors) -> Tensors:
        return tensors if self.decayed is None else [t for t, d in zip(tensors, self.decayed, strict=True) if d]


class SGD(Optimizer):
    """torch.optim.SGD: v = m v + g; w -= lr v, or lr (g + m v) with Nesterov; g includes the weight decay."""

    def __init__(
        self,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        decayed: list[bool] | None = None,
        ops: Foreach = FOREACH,
    ):
        super().__init__(weight_decay, decayed, ops)
        self.momentum, self.nesterov = momentum, nesterov
        self.copies = 1 if momentum else 0

    def step(self, weights: Tensors, gradients: Tensors, lr: Rate) -> None:
        ops, b = self.ops, self.weight_decay
        if self.momentum:
            (v,) = self.state
            ops.mul_(v, self.momentum)
            ops.add_(v, gradients)
            if b:
                ops.add_(self._decayed(v), self._decayed(weights), b)
            if not self.nesterov:
                ops.add_(weights, v, -lr)
                return
        if b:
            ops.mul_(self._decayed(weights), 1 - lr * b)
        ops.add_(weights, gradients, -lr)
        if self.nesterov:
            ops.add_(weights, v, -lr * self.momentum)


class Adam(Optimizer):
    """torch.optim.Adam, or AdamW if the weight decay is `decoupled` from the gradient."""

    copies = 2

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        weight_decay: float,
        decayed: list[bool] | None = None,
        ops: Foreach = FOREACH,
    ):
        super().__init__(weight_decay, decayed, ops)
        self.betas, self.eps, self.decoupled = betas, eps, decoupled
        self.steps = 0

    def begin(self, weights: Tensors) -> None:
        super().begin(weights)
        self.steps = 0

    def step(self, weights: Tensors, gradients: Tensors, lr: Rate) -> None:
        ops, g, (beta1, beta2), (m, v) = self.ops, gradients, self.betas, self.state
        self.steps += 1
        if self.weight_decay and self.decoupled:
            ops.mul_(self._decayed(weights), 1 - lr * self.weight_decay)
        elif self.weight_decay:
            g = self._with_decay(weights, gradients)
        ops.lerp_(m, g, 1 - beta1)
        ops.mul_(v, beta2)
        ops.addcmul_(v, g, g, 1 - beta2)
        scale = ops.sqrt(v)
        ops.div_(scale, sqrt(1 - beta2**self.steps))
        ops.shift_(scale, self.eps)
        ops.addcdiv_(weights, m, scale, -lr / (1 - beta1**self.steps))

    def _with_decay(self, weights: Tensors, gradients: Tensors) -> Tensors:
        b, decayed = self.weight_decay, self.decayed or [True] * len(gradients)
        return [torch.add(g, w, alpha=b) if d else g for g, w, d in zip(gradients, weights, decayed, strict=True)]


class LARS(Optimizer):
    """Layer-wise adaptive rates for very large batches (You et al. 2017, https://arxiv.org/abs/1708.03888).

    v = m v + lr l (g + b w), w -= v, with the layer's local rate l = trust |w| / (|g| + b |w|) and weight decay b.
    If w or g is 0, and for tensors of one axis (biases and norms), l = 1, as in common implementations.
    """

    copies = 1

    def __init__(
        self,
        momentum: float,
        trust: float,
        weight_decay: float,
        decayed: list[bool] | None = None,
        ops: Foreach = FOREACH,
    ):
        super().__init__(weight_decay, decayed, ops)
        self.momentum, self.trust = momentum, trust

    def step(self, weights: Tensors, gradients: Tensors, lr: Rate) -> None:
        (v,) = self.state
        decayed = self.decayed or [True] * len(weights)
        decays = [self.weight_decay if d else 0.0 for d in decayed]
        self.ops.mul_(v, self.momentum)
        for each, w, g, b in zip(v, weights, gradients, decays, strict=True):
            self.ops.add_([each], [(g + b * w) * self.rate(w, g, b)], lr)
        self.ops.add_(weights, v, -1)

    def rate(self, w: Tensor, g: Tensor, b: float) -> Tensor | float:
        """() the layer's local rate l."""
        if w.dim() < 2:
            return 1.0
        w_norm, g_norm = w.norm(), g.norm()
        rate = self.trust * w_norm / (g_norm + b * w_norm)
        return torch.where((w_norm > 0) & (g_norm > 0), rate, 1.0)


def clipped(gradients: Tensors, norm: float, ops: Foreach) -> list[Tensor]:
    """The gradients, scaled to a joint L2 norm of at most `norm`, as by torch.nn.utils.clip_grad_norm_."""
    return ops.mul(gradients, (norm / (ops.norm(gradients) + 1e-6)).clamp(max=1))


class LossScale:
    """Dynamic loss scaling for fp16, with the constants of torch.amp.GradScaler.

    The scale is halved when a gradient overflows, and doubled after 2,000 steps in a row without overflow
    (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
    """

    def __init__(self, scale: float):
        self.scale, self.good_steps = scale, 0

    def unscale(self, gradients: Tensors) -> list[Tensor] | None:
        """The gradients divided by the scale, or None if one overflowed and the step must be skipped."""
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            self.scale, self.good_steps = self.scale / 2, 0
            return None
        unscaled = list(torch._foreach_div(gradients, self.scale))
        self.good_steps += 1
        if self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0
        return unscaled
