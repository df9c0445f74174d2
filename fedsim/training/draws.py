"""Random numbers in a network's forward pass, drawn from a generator that belongs to one client.

All threads share torch's global generator, so a client's numbers from it would depend on the other clients. Inside
`KeyedDraws`, every kind of dropout and torch's samplers use the given generator instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class KeyedDraws(TorchFunctionMode):
    """While it is active in this thread, draws come from `generator`; `used` is True after the first draw."""

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


Keep = Callable[[torch.Size, torch.device, float], Tensor]  # (shape, device, p) -> each entry 1 with p, else 0


def dropout(
    keep: Keep, whole: int | None, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout of `x` (B, channels, ...) by the draws of `keep`.

    All entries behind the first `whole` axes share one draw; None means one draw for each entry.
    """
    if not training or p == 0:
        return x
    shape = torch.Size(x.shape[:whole] + (1,) * (0 if whole is None else x.dim() - whole))
    kept = keep(shape, x.device, 1 - p).to(x.dtype).div(1 - p if p < 1 else 1)
    return x.mul_(kept) if inplace else x * kept


# The argument `whole` of `dropout`: None for single entries, 2 for whole channels.
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
