"""Inside a `torch.func.vmap` over clients: how each client gets values that are known outside of it.

Under `vmap` code is written for one client, and each tensor hides an axis of C clients. A
`torch.autograd.Function` with a `vmap` of its own is the public way to that axis.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _PerClient(torch.autograd.Function):
    @staticmethod
    def forward(one: Tensor, make: Callable[[], Tensor]) -> Tensor:
        raise NotImplementedError("outside vmap there is one client")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, one: Tensor, make: Callable[[], Tensor]) -> tuple[Tensor, int]:
        return make(), 0


def per_client_value(one: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Inside a `vmap` over clients: to each its own row of what `make` gives, (C, ...), outside of it.

    `one` is any tensor that differs from client to client.
    """
    return _PerClient.apply(one, make)  # type: ignore[no-any-return]


def per_client_row(one: Tensor, stacked: Tensor) -> Tensor:
    """Inside a `vmap` over clients: to each its own row of `stacked` (C, ...), without a copy."""
    return per_client_value(one, lambda: stacked.view_as(stacked))


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, factor: Tensor, g: Tensor) -> Tensor:
        return w.addcmul_(factor, g).new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, w: Tensor, factor: Tensor, g: Tensor) -> tuple[Tensor, None]:
        w, g = w.movedim(in_dims[0], 0), clients_first(g, in_dims[2], info)
        factor = clients_first(factor, in_dims[1], info).view(-1, *(1,) * (w.dim() - 1))
        return w.addcmul_(factor, g).new_empty(0), None


def add_product(w: Tensor, factor: Tensor, g: Tensor) -> None:
    """`w` += `factor` () * `g`, in place: `vmap` has no rule for addcmul_, which takes one pass over memory."""
    _AddProduct.apply(w, factor, g)


def clients_first(tensor: Tensor, dim: int | None, info: Any) -> Tensor:
    """The tensor (C, ...) with the axis of clients in front; where all clients share it, expanded."""
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
