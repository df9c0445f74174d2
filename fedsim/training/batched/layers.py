"""Layers that `vmap` alone cannot batch: batch norm with padding, random draws by client, fast convolutions.

Shapes: C clients, B examples of a client, with padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fedsim.errors import ConfigError
from fedsim.training.batched.per_client import clients_first, per_client_draws, per_client_value
from fedsim.training.draws import DROPOUTS, IN_PLACE, SAMPLERS, KeyedDraws, device_of, dropout

ConvMethod = Literal["im2col", "grouped"]
Pair = tuple[int, int]


class RaggedError(Exception):
    """The strategy needs clients with equally many examples in a batch: it runs them in smaller batches."""


@dataclass
class Padding:
    """Of the batches of this step: how many of the B examples of each client are no padding; None means all."""

    counts: list[int] | None = None  # (C,)
    mask: Tensor | None = None  # (B,) bool, the same for one client


class BatchedDraws(TorchFunctionMode):
    """While it is active in this thread, code under `vmap` draws as with `training.draws.KeyedDraws`.

    Each client draws from its own generator; in a step without examples it draws nothing.
    """

    def __init__(
        self,
        client_index: Tensor,
        draws: Sequence[KeyedDraws],
        padding: Padding,
        weights_shape: tuple[int],
    ):
        super().__init__()
        self.padding = padding
        self.client_index, self.draws, self.weights_shape = client_index, draws, weights_shape
        self.used = False

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
        if func not in SAMPLERS or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        drawn = self._sampled(func, args, kwargs)
        if func not in IN_PLACE:
            return drawn
        target: Tensor = args[0] if args else kwargs["tensor"]
        if not is_batchedtensor(target):
            raise _shared_target(func, "strategy")
        return target.copy_(drawn)

    def _sampled(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What each client draws with its own row of the tensors among the arguments."""
        leaves, structure = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        device = device_of(args, kwargs)

        def draw(client: int, *own: Tensor) -> Tensor:
            mine = list(leaves)
            for place, tensor in zip(places, own, strict=True):
                mine[place] = tensor.clone() if func in IN_PLACE else tensor
            args, kwargs = tree_unflatten(mine, structure)
            drawn: Tensor = func(*args, **kwargs | {"generator": self.draws[client].on(device)})
            return drawn

        return self._each(draw, *(leaves[i].detach() for i in places))

    def _keep(self, shape: torch.Size, device: torch.device, probability: float) -> Tensor:
        return self._each(
            lambda i: torch.empty(shape, device=device).bernoulli_(probability, generator=self.draws[i].on(device))
        )

    def _each(self, draw: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        self.used = True
        return per_client_draws(self.client_index, partial(self._all, draw), *tensors)

    def _all(self, draw: Callable[..., Tensor], *stacked: Tensor) -> Tensor:
        """(C, ...) the draws of all clients; `stacked` are tensors (C, ...). Raises RaggedError."""
        counts = self.padding.counts or [1] * len(self.draws)
        drawn = {i: draw(i, *(t[i] for t in stacked)) for i, count in enumerate(counts) if count}
        like = next(iter(drawn.values()))
        # In padded batches, only numbers and vectors (P,) are certainly not drawn one by one for the examples.
        if self.padding.counts and not (like.dim() == 0 or like.shape == self.weights_shape != (max(counts),)):
            raise RaggedError
        return torch.stack([drawn[i] if i in drawn else torch.zeros_like(like) for i in range(len(counts))])


def _shared_target(func: Callable[..., Any], whose: str) -> ConfigError:
    """The error for a draw in place that `vmap` loses."""
    name = getattr(func, "__name__", func)
    return ConfigError(
        f"{whose}: draws in place into a tensor that all clients share ({name}); runtime vectorized does not "
        "support that, threads does; or use torch.randn, torch.rand and others"
    )


class BatchedLayers(TorchFunctionMode):
    """While it is active in this thread, layers ignore padding, and each client draws from its own generator.

    Each client draws the same numbers as with `training.draws.KeyedDraws`: none for padding, and none in a step
    without examples.
    """

    def __init__(
        self, client_index: Tensor, generators: Sequence[torch.Generator], padding: Padding, conv: ConvMethod
    ):
        super().__init__()
        self.padding = padding
        self.client_index, self.generators, self.conv = client_index, generators, conv
        # Drawn into, but not written: `vmap` cannot, where clients share a tensor. What the call returns is right.
        self._unwritten = WeakValueDictionary[int, Tensor]()  # by id

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._unwritten and any(self._unwritten.get(id(leaf)) is leaf for leaf in tree_leaves((args, kwargs))):
            raise _shared_target(func, "model")
        if func is torch.conv2d and self.conv == "im2col":
            return conv2d(*args, **kwargs)
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is F.normalize and kwargs.get("out") is not None:  # which `vmap` lacks
            out: Tensor = kwargs.pop("out")
            return out.copy_(F.normalize(*args, **kwargs))
        if func in DROPOUTS:
            return dropout(self._keep, DROPOUTS[func], *args, **kwargs)
        if func in _IN_PLACE_SAMPLERS:
            drawn = self._draw(args[0].shape, args[0], lambda t, g: func(t, *args[1:], generator=g, **kwargs))
            if is_batchedtensor(args[0]):
                return args[0].copy_(drawn)
            self._unwritten[id(args[0])] = args[0]
            return drawn
        if func in _SHAPE_SAMPLERS:
            shape = torch.Size(args[0] if not isinstance(args[0], int) else args)
            fill = _SHAPE_SAMPLERS[func]
            like = torch.empty(0, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
            return self._draw(shape, like, lambda t, g: fill(t, generator=g))
        if func in _LIKE_SAMPLERS:
            fill, like = _LIKE_SAMPLERS[func], torch.empty_like(*args, **kwargs)
            return self._draw(like.shape, like, lambda t, g: fill(t, generator=g))
        if func in SAMPLERS:
            name = getattr(func, "__name__", str(func))
            raise ConfigError(f"model: draws with {name}; runtime vectorized does not support that, threads does")
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """F.batch_norm with the statistics of all rows but padding, in any precision."""
        mixed = running_mean is not None and x.dtype != running_mean.dtype  # not supported by its vmap rule
        if not mixed and (not training or self.padding.mask is None):
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        dims, channels = [0, *range(2, x.dim())], (1, -1, *(1,) * (x.dim() - 2))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if training:
            places = x[0, 0].numel() * len(x) // (len(x) if self.padding.mask is None else len(self.padding.mask))
            if 1 in (n * places for n in self.padding.counts or [len(x)]):
                raise ValueError("Expected more than 1 value per channel when training, and a client has 1")
            mean, var, count = _moments(wide, self.padding.mask, dims, channels)
            if running_mean is not None and running_var is not None:
                running_mean.mul_(1 - momentum).add_(momentum * mean.detach())
                running_var.mul_(1 - momentum).add_(momentum * var.detach() * count / (count - 1))
        else:
            assert running_mean is not None
            assert running_var is not None
            mean, var = running_mean, running_var
        y = (wide - mean.view(channels)) * (var + eps).rsqrt().view(channels)
        if weight is not None:
            y = y * weight.view(channels)
        if bias is not None:
            y = y + bias.view(channels)
        return y.to(x.dtype)

    def _keep(self, shape: torch.Size, device: torch.device, probability: float) -> Tensor:
        like = torch.empty(0, device=device)
        return self._draw(shape, like, lambda t, g: t.bernoulli_(probability, generator=g))

    def _draw(self, shape: torch.Size, like: Tensor, fill: Callable[[Tensor, torch.Generator], Any]) -> Tensor:
        """(C, B, ...) random numbers, where `shape` is (B, ...), drawn client by client."""
        counts = self.padding.counts or [1] * len(self.generators)
        full = max(counts)

        def drawn() -> Tensor:
            rows = like.new_zeros(len(counts), *shape)
            for row, generator, count in zip(rows, self.generators, counts, strict=True):
                own = row[: len(row) * count // full] if row.dim() else row  # an example may have several rows
                if count:
                    own.copy_(fill(like.new_empty(own.shape), generator))
            return rows

        return per_client_value(self.client_index, drawn)


def _moments(
    x: Tensor, mask: Tensor | None, dims: list[int], channels: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over the rows in `mask` (B,), and () the number of values."""
    own = _rows_like(mask, x) if mask is not None else x.new_ones(len(x), dtype=torch.bool)
    own = own.view(-1, *(1,) * (x.dim() - 1))
    count = own.sum() * (x[0, 0].numel() if x.dim() > 2 else 1)
    mean = torch.where(own, x, 0).sum(dims) / count.clamp(min=1)
    var = torch.where(own, (x - mean.view(channels)).square(), 0).sum(dims) / count.clamp(min=1)
    return mean, var, count


def _rows_like(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` (B,), repeated if `x` has several rows for each example."""
    return mask if len(mask) == len(x) else mask.repeat_interleave(len(x) // len(mask))


_IN_PLACE_SAMPLERS = {Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_}
_SHAPE_SAMPLERS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.rand: Tensor.uniform_,
    torch.randn: Tensor.normal_,
}
_LIKE_SAMPLERS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.rand_like: Tensor.uniform_,
    torch.randn_like: Tensor.normal_,
}


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """torch.conv2d of each client's `x` (B, ...) with its own weights, as matrix products (im2col)."""
    if isinstance(padding, str) or groups > 1:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    y: Tensor = _ConvIm2col.apply(x, weight, (_pair(stride), _pair(padding), _pair(dilation)))
    return y if bias is None else y + bias.view(-1, 1, 1)


ConvSettings = tuple[Pair, Pair, Pair]  # stride, padding, dilation


class _ConvIm2col(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, settings: ConvSettings) -> Tensor:
        return torch.conv2d(x, weight, None, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.settings = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, settings: ConvSettings) -> tuple[Tensor, int]:
        x = clients_first(x, in_dims[0], info)
        if in_dims[1] is None:  # the clients share the weights: one large batch
            y = torch.conv2d(x.flatten(0, 1), weight, None, *settings)
            return y.view(*x.shape[:2], *y.shape[1:]), 0
        weight = clients_first(weight, in_dims[1], info)
        y = torch.bmm(weight.flatten(2), _im2col(x, weight, settings))  # (C, out, B * places)
        return y.view(*weight.shape[:2], x.shape[1], *_output_size(x, weight, settings)).transpose(1, 2), 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        g_x, g_w = _ConvIm2colGradient.apply(gradient, x, weight, ctx.settings, (for_x, for_weight))
        return g_x if for_x else None, g_w if for_weight else None, None


class _ConvIm2colGradient(torch.autograd.Function):
    """The gradients with respect to input and weights; a gradient that is not needed is empty."""

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, weight: Tensor, settings: ConvSettings, needs: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        wanted = [*needs, False]
        g_x, g_w, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *settings, False, (0, 0), 1, wanted
        )
        return x.new_empty(0) if g_x is None else g_x, x.new_empty(0) if g_w is None else g_w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        settings: ConvSettings,
        needs: tuple[bool, bool],
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors = zip((gradient, x, weight), in_dims[:3], strict=True)
        gradient, x, weight = (clients_first(tensor, dim, info) for tensor, dim in tensors)
        flat = gradient.transpose(1, 2).flatten(2)  # (C, out, B * places)
        g_x, g_w = x.new_empty(len(x)), x.new_empty(len(x))
        if needs[1]:
            g_w = torch.bmm(flat, _im2col(x, weight, settings).mT).view(weight.shape)
        if needs[0]:
            g_x = _col2im(torch.bmm(weight.flatten(2).mT, flat), x, weight, settings)
        return (g_x, g_w), (0, 0)


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _output_size(x: Tensor, weight: Tensor, settings: ConvSettings) -> Pair:
    """Height and width of a convolution's output."""
    stride, padding, dilation = settings
    height, width = (
        (x.shape[-2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[-2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return height, width


def _im2col(x: Tensor, weight: Tensor, settings: ConvSettings) -> Tensor:
    """(C, in * kernel, B * places): the patch of the input for each place of the output."""
    stride, padding, dilation = settings
    height, width = _output_size(x, weight, settings)
    x = F.pad(x.transpose(1, 2), (padding[1], padding[1], padding[0], padding[0]))  # (C, in, B, H, W)
    c, i, b, h, w = x.stride()
    shape = (*x.shape[:2], *weight.shape[-2:], x.shape[2], height, width)
    strides = (c, i, h * dilation[0], w * dilation[1], b, h * stride[0], w * stride[1])
    return x.as_strided(shape, strides).reshape(x.shape[0], -1, x.shape[2] * height * width)


def _col2im(columns: Tensor, x: Tensor, weight: Tensor, settings: ConvSettings) -> Tensor:
    """(C, B, in, H, W): the adjoint of `_im2col`, which adds overlapping patches."""
    stride, padding, dilation = settings
    parts = columns.view(*columns.shape[:2], x.shape[1], -1).transpose(1, 2).flatten(0, 1)
    size, kernel = (x.shape[-2], x.shape[-1]), (weight.shape[-2], weight.shape[-1])
    return F.fold(parts, size, kernel, dilation, padding, stride).view(x.shape)
