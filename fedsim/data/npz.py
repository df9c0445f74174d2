"""Your own arrays: one .npz file, or a folder of .npy files that stay on disk."""

import io
import logging
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

from fedsim.base.machine import check_memory
from fedsim.base.reading import open_regular
from fedsim.data.dataset import Dataset, difference_of_classes, owners_by_name
from fedsim.errors import ConfigError, printable, reason
from fedsim.types import Count

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]
Channels = Literal["last", "first"]
EXAMPLES = ("x_train", "x_test")
LABELS = ("y_train", "y_test")
COMMON_CHANNELS = (1, 2, 3, 4)
REQUIRED = ("x_train", "y_train", "x_test", "y_test")
TEXTS = ("owner", "class_names")  # arrays that may be text
MAX_HEADER_BYTES = 2**14  # numpy reads no longer header
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy writes these; others unpack without bound
NUMBERS_PER_BLOCK = 2**20  # that are compared at once
AS_FOLDER = "save the arrays as a folder of .npy files, whose x are not read as a whole"
MAX_GUESSED_CLASSES = 10_000  # classes that the highest label may imply where there are fewer examples


def npz(
    *,
    path: Path,
    channels: Channels | None = None,
    classes: Count | list[str] | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Dataset:
    """Your own arrays: an .npz file, or a folder of .npy files, memory-mapped.

    The arrays are x_train, y_train, x_test, y_test, and `owner` if training examples have natural clients. An x of
    4 dimensions holds images, (n, height, width, C), or with `channels: first` (n, C, height, width); where it is
    null, it is last, but shapes that look like first are refused. A uint8 x of 3 dimensions holds grey images,
    (n, height, width). Any other x is used as it is, with float64 rounded to float32. y (n,) are whole numbers;
    owner (n,) are whole numbers or text. `classes` is a number, by default the highest label plus one, or names in
    the order of the labels; the arrays may also have the names, as `class_names` (classes,).

    A machine that only trains, or only tests, needs only the x and y for that. The x of a folder are never read as
    a whole, so they may be larger than memory; they should be uint8 or float32.
    """
    mapped = os.path.isdir(path)
    with warnings.catch_warnings(action="ignore"):  # numpy warns of headers that Python 2 wrote
        arrays = _map_folder(path) if mapped else _read_archive(path, channels)
    missing = [name for name in REQUIRED if name not in arrays]
    if missing and set(missing) not in ({"x_train", "y_train"}, {"x_test", "y_test"}):
        raise ConfigError(
            f"data.path: {printable(path)} has no {' and no '.join(missing)}; it needs {', '.join(REQUIRED)}, "
            "or one of these pairs of x and y"
        )
    try:
        y = {name: _integers(name, arrays[name]) for name in LABELS if name in arrays}
        owner, names = _owners(arrays["owner"]) if "owner" in arrays else (None, ())
        class_names = _class_names(arrays.get("class_names"), classes)
        number = classes if isinstance(classes, int) else None
        x = {name: _examples(name, arrays[name], channels, mapped) for name in EXAMPLES if name in arrays}
        no_examples, no_labels = next(iter(x.values()))[:0], torch.empty(0, dtype=torch.int64)
        return Dataset(
            x.get("x_train", no_examples),
            y.get("y_train", no_labels),
            x.get("x_test", no_examples),
            y.get("y_test", no_labels),
            classes=len(class_names) or number or _count_classes(*(y[name] for name in LABELS if name in y)),
            mean=mean,
            std=std,
            owner=owner,
            mapped=mapped,
            owner_names=names,
            class_names=class_names,
        )
    except ValueError as error:
        raise ConfigError(f"data.path: {printable(path)}: {error}") from None
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where memory is short
        raise ConfigError(f"data.path: {printable(path)} does not fit into memory ({reason(error)})") from error


def _read_archive(path: Path, channels: Channels | None) -> dict[str, Array]:
    """The arrays of an .npz file, read into memory."""
    try:
        with open_regular(path, links=True) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive)
            needed = 0
            for name, member in members.items():
                with archive.open(member) as stream:
                    needed += _memory_needed(name, stream, member.file_size, channels)
            check_memory(f"data.path: {printable(path)} needs", needed, AS_FOLDER)
            return {name: _read(archive, member) for name, member in members.items()}
    except FileNotFoundError:
        raise ConfigError(f"data.path: {printable(path)}: no such file or folder") from None
    except ConfigError:
        raise
    except Exception as error:  # a broken archive raises anything
        what = f"not an .npz file of plain arrays ({reason(error)})"
        raise ConfigError(f"data.path: {printable(path)} is {what}") from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive that are used, by the name of the array."""
    members = dict[str, zipfile.ZipInfo]()
    wanted = {f"{name}.npy": name for name in (*REQUIRED, *TEXTS)}
    for member in archive.infolist():
        if name := wanted.get(member.filename):
            if name in members:
                raise ValueError(f"{name} appears twice")
            if member.compress_type not in COMPRESSIONS:
                raise ValueError(f"{name} is compressed by a method that numpy does not write")
            members[name] = member
    return members


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _map_folder(path: Path) -> dict[str, Array]:
    """The arrays of a folder of .npy files, memory-mapped."""
    arrays, total = dict[str, Array](), 0
    for file in (path / f"{name}.npy" for name in (*REQUIRED, *TEXTS)):
        if not os.path.lexists(file):
            continue
        try:
            with open_regular(file, links=True) as stream:
                needed = _memory_needed(file.stem, stream, os.fstat(stream.fileno()).st_size)
            total += 0 if file.stem in EXAMPLES else needed
            # The kernel counts a file that is mapped with mode "c" as memory, and refuses one that is larger.
            arrays[file.stem] = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # a broken header raises anything
            raise ConfigError(
                f"data.path: {printable(file)} is not a readable plain array ({reason(error)})"
            ) from error
    check_memory(f"data.path: {printable(path)} needs", total, "use a part of it")
    return arrays


def _memory_needed(name: str, stream: IO[bytes], length: int, channels: Channels | None = "first") -> int:
    """The bytes that an array needs, both as read and as a tensor.

    Raises ValueError where the .npy file in `stream`, of `length` bytes, is shorter than its header says.
    """
    shape, fortran, dtype, begin = _header(io.BytesIO(stream.read(MAX_HEADER_BYTES)))
    if dtype.kind not in "biuf" and not (name in TEXTS and dtype.kind == "U" and dtype.itemsize):
        raise ValueError(f"{name} is {dtype}; allowed: numbers{' or text' if name in TEXTS else ''}")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or begin + count * dtype.itemsize > length:
        raise ValueError(f"{name} is shorter than its header says, {dtype} {shape}")
    if name not in EXAMPLES:
        return count * (dtype.itemsize + 8)
    unchanged = dtype in (np.uint8, np.float32) and not fortran and (len(shape) != 4 or channels == "first")
    return count * (dtype.itemsize + (0 if unchanged else 1 if dtype == np.uint8 else 4))


def _header(start: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """The shape, Fortran order and type that a .npy file's header claims, and the offset of the first number."""
    try:
        version = np.lib.format.read_magic(start)
        if version not in HEADER_READERS:
            raise ValueError(f"version {version} of .npy; allowed: {', '.join(map(str, HEADER_READERS))}")
        shape, fortran, dtype = HEADER_READERS[version](start)
    except ValueError:
        raise
    except Exception as error:  # a header that is not a Python literal raises anything, even MemoryError
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from error
    return shape, fortran, dtype, start.tell()


def _count_classes(*labels: Tensor) -> int:
    classes = 1 + max(int(y.numpy().max(initial=0)) for y in labels)
    examples = sum(y.numel() for y in labels)
    if classes > max(examples, MAX_GUESSED_CLASSES):
        raise ConfigError(f"the highest of {examples} labels is {classes - 1}; if that is right, set data.classes")
    return classes


def _examples(name: str, array: Array, channels: Channels | None, mapped: bool) -> Tensor:
    """`array` as a tensor, images as (n, C, height, width); a view of it if `mapped`."""
    if not (array.ndim and array.size):
        raise ConfigError(f"{name} is {array.dtype} {array.shape}; it should hold at least one example")
    if array.dtype not in (np.uint8, np.float32):
        if mapped or array.dtype.kind != "f":
            raise ConfigError(f"{name} is {array.dtype}; allowed: uint8 or float32")
        array = _as_float32(name, array)
    if mapped and not array.flags.aligned:
        raise ConfigError(f"{name} is not aligned for {array.dtype} in its file; np.save writes aligned files")
    # torch.from_numpy would warn that the array is read-only; nothing writes to x, since batches are copies.
    x = from_dlpack(array) if mapped else torch.from_numpy(array)
    if x.ndim == 3 and x.dtype == torch.uint8:
        x = x.unsqueeze(1)
    elif x.ndim == 4 and (channels or _guess_channels(name, x)) == "last":
        x = x.permute(0, 3, 1, 2)
    return x if mapped else x.contiguous()


def _as_float32(name: str, array: Array) -> Array:
    """`array` rounded to float32, which is logged where numbers change; raises ConfigError for too large ones."""
    rounded, change = np.empty(array.shape, np.float32), 0.0
    rows = max(1, NUMBERS_PER_BLOCK // array[0].size)
    with np.errstate(over="ignore", invalid="ignore"):
        for block in (slice(i, i + rows) for i in range(0, len(array), rows)):
            rounded[block] = array[block]
            change = max(change, float(np.abs(array[block] - rounded[block]).max()))
    if change == np.inf:
        raise ConfigError(f"{name} is {array.dtype}, and has numbers that are too large for float32")
    if change:
        what = f"data.path: {name} is {array.dtype} and becomes float32"
        log.warning("%s, by which its numbers change by up to %.2g", what, change)
    return rounded


def _guess_channels(name: str, x: Tensor) -> Channels:
    """Last, unless the shape of the images looks as if channels came first; then raises ConfigError."""
    if x.shape[1] in COMMON_CHANNELS and x.shape[3] not in COMMON_CHANNELS:
        way_out = f"set data.channels to first, or to last if they have {x.shape[3]} channels"
        raise ConfigError(f"{name} has images of shape {tuple(x.shape[1:])}; {way_out}")
    return "last"


def _owners(array: Array) -> tuple[Tensor, tuple[str, ...]]:
    """The owners in `array`, as numbers from 0, and their names; none where `array` holds such numbers."""
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise ConfigError(f"owner is {array.dtype} {array.shape}; allowed: whole numbers or text (n,)")
    if array.dtype.kind != "U" and array.min(initial=0) < 0:
        raise ConfigError(f"owner has numbers from {array.min()}; allowed: numbers from 0")
    owners, names = owners_by_name(array)
    dense = list(names) == [str(i) for i in range(len(names))]
    return owners, () if dense else tuple(map(printable, names))


def _class_names(array: Array | None, classes: int | list[str] | None) -> tuple[str, ...]:
    """The names of the classes by `array` or the option `classes`, if any; raises ConfigError if both differ."""
    given = tuple(classes) if isinstance(classes, list) else ()
    if array is None:
        return given
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ConfigError(f"class_names is {array.dtype} {array.shape}; allowed: text (classes,)")
    names = tuple(map(str, array.tolist()))
    if isinstance(classes, int) and classes != len(names):
        raise ConfigError(f"class_names has {len(names)} names, and data.classes is {classes}")
    if given and (difference := difference_of_classes(given, names, "in data.classes", "in the file")):
        way = "leave data.classes out, or write the file's labels and class_names in that order"
        raise ConfigError(f"{difference}; {way}")
    return names


def _integers(name: str, array: Array) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name} is {array.dtype}; allowed: whole numbers")
    return torch.from_numpy(array.astype(np.int64))
