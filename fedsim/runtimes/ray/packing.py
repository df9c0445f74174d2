"""Pickling of objects for other processes: tensors are separate arrays, which several processes can share."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray import cloudpickle
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedsim.errors import ConfigError

Bytes = npt.NDArray[np.uint8]
Packed = tuple[bytes, list[Bytes]]  # a pickle without its arrays, and these arrays, which Ray maps without a copy

Pickler: Any = cloudpickle.Pickler  # it has no type annotations


def pack(content: object, *, files: bool = False) -> Packed:
    """Pickle `content`; with `files`, tensors in read-only mapped files are replaced by the file's path."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(files, stream, protocol=5, buffer_callback=buffers.append).dump(content)
    return stream.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def unpack(packed: Packed, *, own: bool = False) -> Any:
    """Unpickle; tensors get their `own` memory, or share the memory of the arrays and must not be written."""
    content, arrays = packed
    return pickle.loads(content, buffers=[array.copy() for array in arrays] if own else arrays)


class _Pickler(Pickler):  # type: ignore[misc]
    def __init__(self, files: bool, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.files = files
        self.storages: dict[
            int, tuple[Any, Tensor]
        ] = {}  # by address, so that views of one storage stay views of one

    def reducer_override(self, value: Any) -> Any:
        plain = type(value) is Tensor and value.layout == torch.strided and not value.is_meta
        if plain and not (value.requires_grad or value.is_quantized):
            return _reduced(self.storages, self.files, value)
        return super().reducer_override(value)


def _reduced(storages: dict[int, tuple[Any, Tensor]], files: bool, tensor: Tensor) -> Any:
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    if not files and tensor.untyped_storage().nbytes() > 2 * tensor.nbytes:  # the tensor is a small part of it
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    if address not in storages:
        place = _file_of(address) if files else None
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        array = _Mapped(*place, storage.nbytes()) if place else whole.numpy()
        storages[address] = array, tensor  # keeps the tensor alive, so that its address stays valid
    layout = tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()
    return _tensor, (storages[address][0], *layout)


def _tensor(array: Bytes, dtype: torch.dtype, offset: int, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    storage = from_dlpack(array).untyped_storage()  # the only way to use a read-only array without a warning
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


class _Mapped:
    """Represents bytes of a file; unpickling maps the file again."""

    def __init__(self, path: str, offset: int, length: int):
        self.path, self.offset, self.length = path, offset, length

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int, int, int]]:
        return _map, (self.path, self.offset, self.length, Path(self.path).stat().st_size)


def _map(path: str, offset: int, length: int, size: int) -> Bytes:
    try:
        if Path(path).stat().st_size == size:
            return np.memmap(path, np.uint8, "r", offset, (length,))
    except OSError:
        pass
    raise ConfigError(f"data: {path} does not exist; mapped examples must have the same path on each machine")


def _file_of(address: int) -> tuple[str, int] | None:
    """The file that is mapped read-only at this address, and the offset in it; None if there is none."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux: mapped tensors are copied
        return None
    for line in maps:
        where, mode, offset, _, inode, *path = line.split(maxsplit=5)
        first, last = (int(number, 16) for number in where.split("-"))
        if first <= address < last:
            mapped = inode != "0" and "w" not in mode and path and not path[0].endswith(" (deleted)")
            return (path[0], int(offset, 16) + address - first) if mapped else None
    return None
