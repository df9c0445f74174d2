"""What is learned from: examples, labels and the constants that normalise them."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Gt, Lt
from torch import Tensor

from fedsim.errors import ConfigError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Part = Annotated[float, Gt(0), Lt(1)]  # of a whole, both ends excluded


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples, on the host; raises ConfigError where they do not fit together.

    One of the two may be missing, on a machine that has no use for it: x and y then hold no example, and x is of
    the other's form.

    Shapes: n examples for training, t for test, C channels. `x` is uint8, (n, C, height, width), or float32
    of any shape (n, ...). `mean` and `std` have one number for each channel or one for all, on the 0..1 scale
    for uint8, in the data's own units for float32; where both are empty, uint8 is divided by 255 and float32
    is left alone.
    """

    x_train: Tensor
    y_train: Tensor  # (n,) int64, 0 <= y < classes
    x_test: Tensor
    y_test: Tensor  # (t,) int64
    classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    owner: Tensor | None = None  # (n,) int64, the natural client of each training example, from 0
    mapped: bool = False  # x lies in a read-only file: it stays on the host, and only batches move

    def __post_init__(self) -> None:
        parts = {"train": (self.x_train, self.y_train), "test": (self.x_test, self.y_test)}
        there = {name: part for name, part in parts.items() if any(map(len, part))} or parts
        for name, (x, y) in there.items():
            self._check_examples(f"x_{name}", x)
            self._check_numbers(f"y_{name}", y, len(x), self.classes)
        if self.x_train.shape[1:] != self.x_test.shape[1:] or self.x_train.dtype != self.x_test.dtype:
            raise ConfigError(
                f"x_train is {_form(self.x_train)}, x_test {_form(self.x_test)}: examples should be alike"
            )
        if self.owner is not None:
            self._check_numbers("owner", self.owner, len(self.x_train), len(self.x_train))
        channels = self.x_train.shape[1] if self.x_train.ndim == 4 else 1
        if len(self.mean) != len(self.std) or len(self.mean) not in {0, 1, channels}:
            raise ConfigError(
                f"data.mean and data.std have {len(self.mean)} and {len(self.std)} numbers; "
                f"allowed: none, one each, or one for each of {channels} channels"
            )
        if any(s <= 0 for s in self.std):
            raise ConfigError(f"data.std: {list(self.std)} should be positive")

    def check_parts(self, *names: str) -> None:
        """Raise ConfigError where one of `train` and `test` is missing that is needed."""
        parts = {"train": ("training", self.y_train), "test": ("test", self.y_test)}
        for word, y in (parts[name] for name in names):
            if not len(y):
                raise ConfigError(f"data: has no {word} examples, which are needed here")

    def _check_examples(self, name: str, x: Tensor) -> None:
        if x.ndim == 0 or x.numel() == 0:
            raise ConfigError(f"{name} is {_form(x)}: it holds no example")
        if not (x.dtype == torch.uint8 and x.ndim == 4) and x.dtype != torch.float32:
            raise ConfigError(f"{name} is {_form(x)}; allowed: uint8 of 4 dimensions, or float32")
        # A mapped file is not read for a check; uint8 is finite, and to ask would take its size again.
        if not self.mapped and x.is_floating_point() and not x.isfinite().all():
            raise ConfigError(f"{name} has values that are not finite")

    @staticmethod
    def _check_numbers(name: str, y: Tensor, length: int, end: int) -> None:
        if y.dtype != torch.int64 or y.shape != (length,):
            raise ConfigError(f"{name} is {_form(y)}; it should be int64 ({length},), one number an example")
        if not length:
            return
        low, high = y.aminmax()
        if low < 0 or high >= end:
            raise ConfigError(f"{name} has numbers from {low} to {high}; allowed: 0 to {end - 1}")


def hold_back(groups: Ints, share: float, rng: np.random.Generator) -> Flags:
    """Which rows to set apart: a random `share` of each group, rounded down, and never a whole group.

    Shapes: `groups` (n,), the group of each row, from 0; returns (n,).
    """
    sizes = np.bincount(groups)
    places = np.lexsort((rng.random(len(groups)), groups))  # by group, at random within it
    rank = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    quota = np.minimum(np.floor(share * sizes + 1e-9), sizes - 1)  # 0.29 * 100 is 28.999...
    held = np.empty(len(groups), dtype=np.bool_)
    held[places] = rank < np.repeat(quota, sizes)
    return held


def _form(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
