"""The optimisers' operations under `torch.func.vmap`, which does not support all of torch's _foreach functions."""

import torch
from torch import Tensor

from fedsim.training.batched.per_client import add_product
from fedsim.training.optim import Foreach, Rate, Tensors


class VmapOps(Foreach):
    """The operations of `Foreach`, tensor by tensor; a factor may be a tensor () with a value for each client."""

    def mul_(self, a: Tensors, factor: Rate) -> None:
        for each in a:
            each.mul_(factor)

    def add_(self, a: Tensors, b: Tensors, factor: Rate = 1) -> None:
        for each, other in zip(a, b, strict=True):
            if isinstance(factor, Tensor):
                add_product(each, factor, other)
            else:
                each.add_(other, alpha=factor)

    def lerp_(self, a: Tensors, b: Tensors, weight: float) -> None:
        for each, other in zip(a, b, strict=True):
            each.mul_(1 - weight).add_(other, alpha=weight)

    def addcmul_(self, a: Tensors, b: Tensors, c: Tensors, factor: float) -> None:
        self.add_(a, [x * y for x, y in zip(b, c, strict=True)], factor)

    def addcdiv_(self, a: Tensors, b: Tensors, c: Tensors, factor: Rate) -> None:
        self.add_(a, [x / y for x, y in zip(b, c, strict=True)], factor)

    def div_(self, a: Tensors, divisor: float) -> None:
        for each in a:
            each.div_(divisor)

    def shift_(self, a: Tensors, summand: float) -> None:
        for each in a:
            each.add_(summand)

    def sqrt(self, a: Tensors) -> list[Tensor]:
        return [each.sqrt() for each in a]

    def mul(self, a: Tensors, factor: Rate) -> list[Tensor]:
        return [each * factor for each in a]

    def norm(self, a: Tensors) -> Tensor:
        return torch.stack([each.square().sum() for each in a]).sum().sqrt()
