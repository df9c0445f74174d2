"""Random numbers in a network's forward pass, from a generator of the client's own.

torch's global generator is shared by threads: what one client draws from it depends on the others. Inside
this mode, dropout of any kind and torch's samplers take theirs from the given generator instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class KeyedDraws(TorchFunctionMode):
    """While active in this thread, draws come from `generator`; `used` tells whether there were any."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator, self.used = generator, False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return dropout(self._keep, DROPOUTS[func], *args, **kwargs)
        if func in SAMPLERS:
            self.used = True
            kwargs.setdefault("generator", self.generator)
        return func(*args, **kwargs)

    def _keep(self, shape: torch.Size, device: torch.device, probability: float) -> Tensor:
        self.used = True
        return torch.empty(shape, device=device).bernoulli_(probability, generator=self.generator)


Keep = Callable[[torch.Size, torch.device, float], Tensor]  # of each entry 1 with this probability, else 0


def dropout(
    keep: Keep, whole: int | None, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout of `x` (B, channels, ...) by draws of `keep`; all behind the first `whole` axes is kept together."""
    if not training or p == 0:
        return x
    shape = torch.Size(x.shape[:whole] + (1,) * (0 if whole is None else x.dim() - whole))
    kept = keep(shape, x.device, 1 - p).to(x.dtype).div(1 - p if p < 1 else 1)
    return x.mul_(kept) if inplace else x * kept


# What is dropped as a whole: single numbers (None), or all that lies behind the first two axes (B, channels).
DROPOUTS: dict[Callable[..., Any], int | None] = {
    F.dropout: None,
    torch.dropout: None,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
}
SAMPLERS = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
    Tensor.bernoulli,
    Tensor.bernoulli_,
    Tensor.uniform_,
    Tensor.normal_,
    Tensor.exponential_,
    Tensor.random_,
    Tensor.multinomial,
}
