"""Inside a `torch.func.vmap` over clients: how each client gets its row of tensors from outside the `vmap`.

Code under `vmap` is written for one client, and each tensor has a hidden axis of C clients. A
`torch.autograd.Function` with its own `vmap` method is the public way to access that axis.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _PerClient(torch.autograd.Function):
    @staticmethod
    def forward(client_index: Tensor, make: Callable[[], Tensor]) -> Tensor:
        raise NotImplementedError("per_client_value works only inside vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, client_index: Tensor, make: Callable[[], Tensor]) -> tuple[Tensor, int]:
        return make(), 0


def per_client_value(client_index: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Inside a `vmap` over clients: the client's row of `make()`, (C, ...), which is called outside the `vmap`.

    `client_index` may be any tensor that differs from client to client.
    """
    return _PerClient.apply(client_index, make)  # type: ignore[no-any-return]


def per_client_row(client_index: Tensor, stacked: Tensor) -> Tensor:
    """Inside a `vmap` over clients: the client's row of `stacked` (C, ...), without a copy."""
    return per_client_value(client_index, lambda: stacked.view_as(stacked))


class _PerClientDraws(torch.autograd.Function):
    @staticmethod
    def forward(client_index: Tensor, draw: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        raise NotImplementedError("per_client_draws works only inside vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, client_index: Tensor, draw: Callable[..., Tensor], *tensors: Tensor
    ) -> tuple[Tensor, int]:
        own = (clients_first(tensor, dim, info) for tensor, dim in zip(tensors, in_dims[2:], strict=True))
        return draw(*own), 0


def per_client_draws(client_index: Tensor, draw: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """As `per_client_value`, with `draw(*tensors)`: it gets the `tensors` of all clients, (C, ...)."""
    return _PerClientDraws.apply(client_index, draw, *tensors)  # type: ignore[no-any-return]


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
    """`w` += `factor` () * `g`, in place: `vmap` does not support addcmul_, which takes one pass over memory."""
    _AddProduct.apply(w, factor, g)


def clients_first(tensor: Tensor, dim: int | None, info: Any) -> Tensor:
    """The tensor (C, ...) with the axis of clients first; a tensor that all clients share is expanded."""
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
