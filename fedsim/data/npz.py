"""Your own arrays: one .npz file, or a folder of .npy files that stay on disk."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.types import Count

Array = npt.NDArray[Any]
Channels = Literal["last", "first"]
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
NAMES = ("x_train", "y_train", "x_test", "y_test")


def npz(
    *,
    path: Path,
    channels: Channels = "last",
    classes: Count | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Dataset:
    """Your own arrays: an .npz file, or a folder of .npy files, memory-mapped.

    Arrays: x_train, y_train, x_test, y_test, and owner if training examples have natural clients. x of 4
    dimensions are images, (n, height, width, C) or with `channels: first` (n, C, height, width); uint8 of 3
    dimensions are grey images, (n, height, width); anything else is taken as it is. y and owner are whole
    numbers, (n,). `classes` defaults to the highest label plus one.

    The x of a folder are never read as a whole, so they may be larger than memory; they are uint8 or float32.
    """
    mapped = path.is_dir()
    arrays = _folder(path) if mapped else _file(path)
    missing = [name for name in NAMES if name not in arrays]
    if missing:
        raise ConfigError(f"data.path: {path} has no {' and no '.join(missing)}; it needs {', '.join(NAMES)}")
    try:
        y = {name: _numbers(name, arrays[name]) for name in ("y_train", "y_test", "owner") if name in arrays}
        return Dataset(
            _examples("x_train", arrays["x_train"], channels, mapped),
            y["y_train"],
            _examples("x_test", arrays["x_test"], channels, mapped),
            y["y_test"],
            classes=classes or 1 + max(int(y[name].numpy().max(initial=0)) for name in ("y_train", "y_test")),
            mean=mean,
            std=std,
            owner=y.get("owner"),
            mapped=mapped,
        )
    except ValueError as error:
        raise ConfigError(f"data.path: {path}: {error}") from None


def _file(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in (*NAMES, "owner") if name in archive}
    except FileNotFoundError:
        raise ConfigError(f"data.path: {path}: no such file or folder") from None
    except (*UNREADABLE, TypeError, AttributeError) as error:  # the last two: a single array, no archive
        raise ConfigError(f"data.path: {path} is no .npz of plain arrays ({_reason(error)})") from error


def _folder(path: Path) -> dict[str, Array]:
    arrays = {}
    for file in (path / f"{name}.npy" for name in (*NAMES, "owner")):
        if not file.exists():
            continue
        try:
            # Mode "c" would count the whole file against memory, and fail for one that is larger.
            arrays[file.stem] = np.load(file, mmap_mode="r", allow_pickle=False)
        except UNREADABLE as error:
            raise ConfigError(f"data.path: {file} is no readable plain array ({_reason(error)})") from error
    return arrays


def _examples(name: str, array: Array, channels: Channels, mapped: bool) -> Tensor:
    """`array` in NCHW; a view of it if `mapped`."""
    if array.dtype not in (np.uint8, np.float32):
        if mapped or array.dtype.kind != "f":
            raise ConfigError(f"{name} is {array.dtype}; allowed: uint8 or float32")
        array = array.astype(np.float32)
    # The one way to share a read-only array without a warning: batches are copies, nobody writes to x.
    x = from_dlpack(array) if mapped else torch.from_numpy(array)
    if x.ndim == 3 and x.dtype == torch.uint8:
        x = x.unsqueeze(1)
    elif x.ndim == 4 and channels == "last":
        x = x.permute(0, 3, 1, 2)
    return x if mapped else x.contiguous()


def _numbers(name: str, array: Array) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name} is {array.dtype}; allowed: whole numbers")
    return torch.from_numpy(array.astype(np.int64))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
