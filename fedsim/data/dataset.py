"""Dataset: examples, labels, and the constants that normalise them."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Gt, Lt
from torch import Tensor

from fedsim.errors import ConfigError, one_line

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
MAX_SHOWN_NAME = 40  # characters of a class's name in a message
Fraction = Annotated[float, Gt(0), Lt(1)]  # of a whole, 0 and 1 excluded


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples, in CPU memory; raises ConfigError where they do not fit together.

    One of the two parts may be empty, on a machine that does not need it. Its x then has no rows, and the other
    part's shape and type.

    Shapes: n examples for training, t for test, C channels. x is uint8 (n, C, height, width), or float32 of any
    shape (n, ...). `mean` and `std` have one number for each channel, or one for all: for uint8 on the scale from
    0 to 1, for float32 in the units of the data. Where both are empty, uint8 is divided by 255 and float32 is not
    changed.

    `class_names` and `preparation`, how files became these numbers, say what labels and numbers mean. In a
    federation of several machines both are compared, where they are known.
    """

    x_train: Tensor
    y_train: Tensor  # (n,) int64, 0 <= y < classes
    x_test: Tensor
    y_test: Tensor  # (t,) int64
    classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    owner: Tensor | None = None  # (n,) int64, the natural client of each training example, from 0
    mapped: bool = False  # x lies in a read-only file, so only batches are copied to a device
    owner_names: tuple[str, ...] = ()  # of the owners, by number; none where only numbers are known
    class_names: tuple[str, ...] = ()  # of the classes, by label; none where only numbers are known
    preparation: str = ""

    def __post_init__(self) -> None:
        self._check_types()
        parts = {"train": (self.x_train, self.y_train), "test": (self.x_test, self.y_test)}
        present = {name: part for name, part in parts.items() if any(t.numel() for t in part)} or parts
        for name, (x, y) in present.items():
            self._check_examples(f"x_{name}", x)
            self._check_integers(f"y_{name}", y, len(x), self.classes)
        if self.x_train.shape[1:] != self.x_test.shape[1:] or self.x_train.dtype != self.x_test.dtype:
            raise ConfigError(
                f"x_train is {_type_and_shape(self.x_train)} and x_test is {_type_and_shape(self.x_test)}; "
                "their examples should have the same type and shape"
            )
        if self.owner is not None:
            end = len(self.owner_names) or len(self.x_train)
            self._check_integers("owner", self.owner, len(self.x_train), end)
        channels = self.x_train.shape[1] if self.x_train.ndim == 4 else 1
        if len(self.mean) != len(self.std) or len(self.mean) not in {0, 1, channels}:
            raise ConfigError(
                f"data.mean and data.std have {len(self.mean)} and {len(self.std)} numbers; "
                f"allowed: none, one, or one for each of the {channels} channels"
            )
        if len(self.class_names) not in {0, self.classes}:
            raise ConfigError(
                f"class_names has {len(self.class_names)} names; the data set has {self.classes} classes"
            )
        if any(s <= 0 for s in self.std):
            raise ConfigError(f"data.std: {list(self.std)} should have positive numbers only")

    def _check_types(self) -> None:
        tensors = {"x_train": self.x_train, "y_train": self.y_train, "x_test": self.x_test, "y_test": self.y_test}
        for name, value in (tensors | ({} if self.owner is None else {"owner": self.owner})).items():
            if not isinstance(value, Tensor) or value.device.type not in ("cpu", "meta"):  # meta: without_rows
                made = f"on {value.device}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
                raise ConfigError(f"{name} is {made}; it should be a tensor in CPU memory (torch.from_numpy)")
        if not isinstance(self.classes, int | np.integer) or self.classes < 1:
            raise ConfigError(f"classes is {self.classes!r}; it should be a whole number >= 1")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if not isinstance(numbers, Sequence) or not all(isinstance(x, Real) and isfinite(x) for x in numbers):
                raise ConfigError(f"{name} is {numbers!r}; it should be a tuple of finite numbers")
        if not isinstance(self.class_names, tuple) or not all(isinstance(name, str) for name in self.class_names):
            raise ConfigError(f"class_names is {one_line(repr(self.class_names))}; it should be a tuple of names")

    def check_parts(self, *names: str) -> None:
        """Raise ConfigError where one of the parts `names`, of train and test, has no examples."""
        parts = {"train": ("training", self.y_train), "test": ("test", self.y_test)}
        for word, y in (parts[name] for name in names):
            if not len(y):
                raise ConfigError(f"data: has no {word} examples, which are needed here")

    def _check_examples(self, name: str, x: Tensor) -> None:
        if x.ndim == 0 or x.numel() == 0:
            raise ConfigError(f"{name} is {_type_and_shape(x)}; it should hold at least one example")
        if not (x.dtype == torch.uint8 and x.ndim == 4) and x.dtype != torch.float32:
            raise ConfigError(f"{name} is {_type_and_shape(x)}; allowed: uint8 of 4 dimensions, or float32")
        # A mapped file may be too large to be read for a check; for uint8, isfinite() would only take memory.
        if not self.mapped and x.is_floating_point() and not x.isfinite().all():
            raise ConfigError(f"{name} has values that are not finite; allowed: finite numbers")

    @staticmethod
    def _check_integers(name: str, y: Tensor, length: int, end: int) -> None:
        if y.dtype != torch.int64 or y.shape != (length,):
            expected = f"int64 ({length},), one number for each example"
            raise ConfigError(f"{name} is {_type_and_shape(y)}; it should be {expected}")
        if not length:
            return
        low, high = y.aminmax()
        if low < 0 or high >= end:
            raise ConfigError(f"{name} has numbers from {low} to {high}; allowed: 0 to {end - 1}")


def owners_by_name(values: Sequence[object] | npt.NDArray[Any]) -> tuple[Tensor, tuple[str, ...]]:
    """(n,) owners numbered from 0 in the order of the `values` (n,), and their names."""
    names, owners = np.unique(np.asarray(values), return_inverse=True)
    return torch.from_numpy(owners), tuple(map(str, names.tolist()))


def composed(name: str) -> str:
    """A name with accented letters as one character each: file systems differ in how they store them."""
    return unicodedata.normalize("NFC", name)


def difference_of_classes(names: Sequence[str], others: Sequence[str], here: str, there: str) -> str:
    """In words, the first label that two lists of class names differ in; empty where they are the same."""
    for label, (name, other) in enumerate(zip(names, others, strict=False)):
        if name != other:
            return f"label {label} is {_short(name)} {here}, and {_short(other)} {there}"
    if len(names) != len(others):
        return f"{len(names)} classes {here}, and {len(others)} {there}"
    return ""


def _short(name: str) -> str:
    return repr(name if len(name) <= MAX_SHOWN_NAME else f"{name[: MAX_SHOWN_NAME - 3]}...")


def holdout_mask(groups: Ints, share: float, rng: np.random.Generator) -> Flags:
    """True for the rows to hold out: a random `share` of each group, rounded down, and never a whole group.

    Shapes: `groups` (n,), the group of each row, from 0; returns (n,).
    """
    sizes = np.bincount(groups)
    places = np.lexsort((rng.random(len(groups)), groups))  # sorted by group, in random order within it
    rank = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    quota = np.minimum(np.floor(share * sizes + 1e-9), sizes - 1)  # 1e-9: in floats 0.29 * 100 is 28.999...
    mask = np.empty(len(groups), dtype=np.bool_)
    mask[places] = rank < np.repeat(quota, sizes)
    return mask


def _type_and_shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
