"""Random numbers in a network's forward pass and in a strategy, drawn from a generator that belongs to one client.

All threads share torch's global generator, so a client's numbers from it would depend on the other clients. Inside
`KeyedDraws`, every kind of dropout and torch's samplers use the given generator instead.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import init
from torch.overrides import TorchFunctionMode

DrawsState = tuple[Tensor, dict[torch.device, torch.Generator]]  # of the generator, and those of other devices


class KeyedDraws(TorchFunctionMode):
    """While it is active in this thread, draws come from `generator`; `used` is True after the first draw.

    On another kind of device than that of `generator` they come from a second one with the same seed.
    """

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator, self.used = generator, False
        self._elsewhere: dict[torch.device, torch.Generator] = {}

    def begin(self, seed: int) -> None:
        """Begin the numbers of another client."""
        self.generator.manual_seed(seed)
        self._elsewhere = {}

    @property
    def state(self) -> DrawsState:
        """What the next draws depend on."""
        return self.generator.get_state(), self._elsewhere

    @state.setter
    def state(self, state: DrawsState) -> None:
        own, self._elsewhere = state
        self.generator.set_state(own)

    def on(self, device: torch.device | str | None) -> torch.Generator:
        """The generator for tensors on `device`, by default the CPU."""
        device = torch.device(device or "cpu")
        if device.type == self.generator.device.type:
            return self.generator
        if device not in self._elsewhere:
            seed = self.generator.initial_seed()
            self._elsewhere[device] = torch.Generator(device).manual_seed(seed)
        return self._elsewhere[device]

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
        if func in SAMPLERS and kwargs.get("generator") is None:
            self.used = True
            kwargs["generator"] = self.on(device_of(args, kwargs))
        return func(*args, **kwargs)

    def _keep(self, shape: torch.Size, device: torch.device, probability: float) -> Tensor:
        self.used = True
        return torch.empty(shape, device=device).bernoulli_(probability, generator=self.on(device))


def device_of(args: Iterable[Any], kwargs: dict[str, Any]) -> torch.device | str | None:
    """The device on which a sampler with these arguments draws; None where they do not say."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return kwargs.get("device") or next((tensor.device for tensor in tensors), None)


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
IN_PLACE = {
    Tensor.bernoulli_,
    Tensor.cauchy_,
    Tensor.exponential_,
    Tensor.geometric_,
    Tensor.log_normal_,
    Tensor.normal_,
    Tensor.random_,
    Tensor.uniform_,
    init.kaiming_uniform_,
    init.normal_,
    init.uniform_,
}
SAMPLERS = IN_PLACE | {
    torch.bernoulli,
    torch.binomial,
    torch.multinomial,
    torch.normal,
    torch.poisson,
    torch.rand,
    torch.rand_like,
    torch.randint,
    torch.randint_like,
    torch.randn,
    torch.randn_like,
    torch.randperm,
    torch._sample_dirichlet,
    torch._standard_gamma,
    Tensor.bernoulli,
    Tensor.multinomial,
}
