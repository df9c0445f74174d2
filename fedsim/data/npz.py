"""Your own arrays: one .npz file, or a folder of .npy files that stay on disk."""

import io
import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedsim.base.machine import gigabytes, memory
from fedsim.base.reading import open_regular
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError, printable, reason
from fedsim.types import Count

Array = npt.NDArray[Any]
Channels = Literal["last", "first"]
NAMES = ("x_train", "y_train", "x_test", "y_test")
X = ("x_train", "x_test")
HEADER = 2**14  # bytes, in which the longest header fits that numpy reads
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # as numpy does; others unpack without bound
MOST_CLASSES = 10_000  # that few examples may imply


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

    A machine that only trains, or only tests, needs only that x and y. The x of a folder are never read as a
    whole, so they may be larger than memory; they are uint8 or float32.
    """
    mapped = os.path.isdir(path)
    with warnings.catch_warnings(action="ignore"):  # of numpy, about headers that Python 2 wrote
        arrays = _folder(path) if mapped else _file(path, channels)
    missing = [name for name in NAMES if name not in arrays]
    if missing and set(missing) not in ({"x_train", "y_train"}, {"x_test", "y_test"}):
        raise ConfigError(
            f"data.path: {printable(path)} has no {' and no '.join(missing)}; it needs {', '.join(NAMES)}, "
            "or one of the two pairs"
        )
    try:
        y = {name: _numbers(name, arrays[name]) for name in ("y_train", "y_test", "owner") if name in arrays}
        x = {name: _examples(name, arrays[name], channels, mapped) for name in X if name in arrays}
        form, none = next(iter(x.values())), torch.empty(0, dtype=torch.int64)
        x_train, x_test = (x.get(name, form[:0]) for name in X)
        return Dataset(
            x_train,
            y.get("y_train", none),
            x_test,
            y.get("y_test", none),
            classes=classes or _classes(*(y[name] for name in ("y_train", "y_test") if name in y)),
            mean=mean,
            std=std,
            owner=y.get("owner"),
            mapped=mapped,
        )
    except ValueError as error:
        raise ConfigError(f"data.path: {printable(path)}: {error}") from None
    except (MemoryError, RuntimeError) as error:  # the latter is torch's word for it
        raise ConfigError(f"data.path: {printable(path)} does not fit into memory ({reason(error)})") from error


def _file(path: Path, channels: Channels) -> dict[str, Array]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive)
            takes = 0
            for name, member in members.items():
                with archive.open(member) as stream:
                    takes += _takes(name, stream, member.file_size, channels)
            _fits(path, takes)
            return {name: _read(archive, member) for name, member in members.items()}
    except FileNotFoundError:
        raise ConfigError(f"data.path: {printable(path)}: no such file or folder") from None
    except ConfigError:
        raise
    except Exception as error:  # a broken archive raises anything
        raise ConfigError(f"data.path: {printable(path)} is no .npz of plain arrays ({reason(error)})") from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members = dict[str, zipfile.ZipInfo]()
    wanted = {f"{name}.npy": name for name in (*NAMES, "owner")}
    for member in archive.infolist():
        if name := wanted.get(member.filename):
            if name in members:
                raise ValueError(f"{name} stands twice")
            if member.compress_type not in PACKED:
                raise ValueError(f"{name} is packed in a way that numpy does not write")
            members[name] = member
    return members


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _folder(path: Path) -> dict[str, Array]:
    arrays, takes = dict[str, Array](), 0
    for file in (path / f"{name}.npy" for name in (*NAMES, "owner")):
        if not os.path.lexists(file):
            continue
        try:
            with open_regular(file) as stream:
                needed = _takes(file.stem, stream, os.fstat(stream.fileno()).st_size)
            takes += 0 if file.stem in X else needed
            # Mode "c" would count the whole file against memory, and fail for one that is larger.
            arrays[file.stem] = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # a broken header raises anything
            raise ConfigError(
                f"data.path: {printable(file)} is no readable plain array ({reason(error)})"
            ) from error
    _fits(path, takes)
    return arrays


def _takes(name: str, stream: IO[bytes], length: int, channels: Channels = "first") -> int:
    """Bytes of memory, as read and as a tensor; raises ValueError for what the `length` of a .npy cannot hold."""
    shape, dtype, begin = _header(io.BytesIO(stream.read(HEADER)))
    if dtype.kind not in "biuf":
        raise ValueError(f"{name} is {dtype}; allowed: numbers")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or begin + count * dtype.itemsize > length:
        raise ValueError(f"{name} holds less than it should, {dtype} {shape}")
    if name not in X:
        return count * (dtype.itemsize + 8)
    as_it_is = dtype in (np.uint8, np.float32) and not (len(shape) == 4 and channels == "last")
    return count * (dtype.itemsize + (0 if as_it_is else 1 if dtype == np.uint8 else 4))


def _header(start: io.BytesIO) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and type that a .npy file claims, and where its numbers begin."""
    try:
        version = np.lib.format.read_magic(start)
        if version not in HEADERS:
            raise ValueError(f"version {version} of .npy; allowed: {', '.join(map(str, HEADERS))}")
        shape, _, dtype = HEADERS[version](start)
    except ValueError:
        raise
    except Exception as error:  # what is no Python literal raises anything, even MemoryError
        raise ValueError(f"a header that cannot be read ({type(error).__name__})") from error
    return shape, dtype, start.tell()


def _fits(path: Path, takes: int) -> None:
    if takes > memory():
        raise ConfigError(
            f"data.path: {printable(path)} takes {gigabytes(takes)} of memory, "
            f"this machine has {gigabytes(memory())}; the x of a folder of .npy files are not read as a whole"
        )


def _classes(*labels: Tensor) -> int:
    classes = 1 + max(int(y.numpy().max(initial=0)) for y in labels)
    examples = sum(y.numel() for y in labels)
    if classes > max(examples, MOST_CLASSES):
        raise ConfigError(f"{examples} labels go up to {classes - 1}; set data.classes if so many are meant")
    return classes


def _examples(name: str, array: Array, channels: Channels, mapped: bool) -> Tensor:
    """`array` in NCHW; a view of it if `mapped`."""
    if not array.size:
        raise ConfigError(f"{name} is {array.dtype} {array.shape}: it holds no example")
    if array.dtype not in (np.uint8, np.float32):
        if mapped or array.dtype.kind != "f":
            raise ConfigError(f"{name} is {array.dtype}; allowed: uint8 or float32")
        array = array.astype(np.float32)
    if mapped and not array.flags.aligned:
        raise ConfigError(f"{name} starts where no {array.dtype} can; np.save writes it so that it can be mapped")
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
