"""The positions of named tensors in a flat vector."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The positions of named tensors in a flat vector (P,).

    With `channels_last`, weights of convolutions are stored in the order (out, height, width, in), in which
    convolutions over channels-last images read them.
    """

    shapes: dict[str, torch.Size]
    channels_last: bool = False
    norms: frozenset[str] = frozenset()  # names of the parameters of normalisation layers
    head: frozenset[str] = frozenset()  # names of the parameters of the head, `model.head`

    @property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes.values()]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of `vector` (P,), by name."""
        parts = torch.split(vector, self.sizes)
        return {name: self._shaped(p, s) for (name, s), p in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(P,) one vector with all tensors, each at its position."""
        dtype = next(iter(tensors.values())).dtype if tensors else torch.get_default_dtype()
        vector = torch.empty(sum(self.sizes), dtype=dtype)
        for name, view in self.split(vector).items():
            view.copy_(tensors[name].detach())
        return vector

    def mask(self, keep: Callable[[str], bool]) -> Tensor:
        """(P,) bool: True for the entries of tensors for whose name `keep` is true."""
        parts = [torch.full((size,), keep(name)) for name, size in zip(self.shapes, self.sizes, strict=True)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)

    def _shaped(self, part: Tensor, shape: torch.Size) -> Tensor:
        if self.channels_last and len(shape) == 4:
            out, channels, height, width = shape
            return part.view(out, height, width, channels).permute(0, 3, 1, 2)
        return part.view(shape)


class Order(NamedTuple):
    """The names of the tensors in the model (P,) and in the buffers (Q,), in their order."""

    model: list[str]
    buffers: list[str]
    channels_last: bool  # of the model, as in Layout
