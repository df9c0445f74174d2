"""How the tensors of an answer travel: as they are, in fewer bytes with the same bits, or rounded.

Rounding is with error feedback (Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014; Karimireddy et
al., Error Feedback Fixes SignSGD, ICML 2019): a client sends q(m + e) and keeps e' = m + e - q(m + e) for its next
message, so that what its messages sum to is never further from the truth than one rounding.

Rounding is to the nearest: with error feedback it ends where stochastic rounding does, without random numbers.
"""

import zlib
from collections.abc import Callable
from itertools import accumulate
from math import isfinite, prod
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.base.catalogue import unknown
from fedsim.errors import one_line
from fedsim.federated.aggregate import largest
from fedsim.types import State

Transport = Literal["exact", "lossless", "bf16", "int8"]
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
ROUNDED: tuple[Transport, ...] = ("bf16", "int8")  # the others keep every bit

BLOCK = 1024  # entries that share a scale in int8; tensors with fewer go as they are
BUFFERS = "buffers"  # batch-norm statistics go as they are: a variance must not become negative
SAMPLE = 2**15  # bytes of a plane that tell whether it deflates
WORTH = 0.97  # of its bytes
DEFLATES = 1032  # times: the most that zlib can
DIMENSIONS = 64  # the most that torch computes with

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}

Bytes = npt.NDArray[np.uint8]


class Coded(NamedTuple):
    """One tensor as it travels: its type, its shape, and its bytes in a coding, which is a transport's name.

    A `coding` other than the message's transport is no error: each tensor goes by what suits it. Numbers are
    little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    coding: str
    data: bytes


Encoded = dict[str, Coded]


def encode(state: State, transport: str, residual: State | None = None) -> tuple[Encoded, State]:
    """A message as it travels, and what rounding left of it: the `residual` of the client's next message.

    Only float32 tensors of at least 1,024 entries are rounded, and no batch-norm statistics. Raises ValueError for
    an unknown transport, a type that cannot travel, or a residual of another shape, and ArithmeticError where what
    should be rounded is not finite, or too large to be.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: {unknown(transport, TRANSPORTS)}")
    encoded, left = Encoded(), State()
    for name, tensor in state.items():
        value = tensor.detach().cpu()
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"{one_line(name)}: {dtype} does not travel; allowed: {', '.join(DTYPES)}")
        coding, data = "exact", b""
        if transport in ROUNDED and dtype == "float32" and name != BUFFERS and value.numel() >= BLOCK:
            coding = transport
            data, left[name] = _rounded(name, value, coding, None if residual is None else residual.get(name))
        elif transport == "lossless" and len(planes := _planes(value)) < value.nbytes:
            coding, data = "lossless", planes
        else:
            data = _bytes(value).tobytes()
        encoded[name] = Coded(dtype, tuple(value.shape), coding, data)
    return encoded, left


def decode(encoded: Encoded, most: int | None = None) -> State:
    """The message again; raises ValueError, in one line, where its bytes are not what they say they are.

    Nothing is believed before it is checked: memory that is taken is what the bytes there are can fill, and with
    `most` no more than so many bytes for the whole message.
    """
    state, total = State(), 0
    for name, coded in encoded.items():
        try:
            total += _checked_size(coded)
            if most is not None and total > most:
                raise ValueError(f"the message has more than {most} bytes")
            state[name] = DECODERS[coded.coding](coded).reshape(coded.shape)
        except ValueError as error:
            raise ValueError(f"{one_line(name)}: {error}") from None
    return state


def _checked_size(coded: Coded) -> int:
    """Bytes of the tensor, once they agree with those that came."""
    dtype, shape, coding, data = coded
    if dtype not in DTYPES:
        raise ValueError(f"type {one_line(repr(dtype))} is unknown; allowed: {', '.join(DTYPES)}")
    if coding not in DECODERS:
        raise ValueError(f"coding {one_line(repr(coding))} is unknown; allowed: {', '.join(DECODERS)}")
    whole = all(type(length) is int and length >= 0 for length in shape)
    if not whole or len(shape) > DIMENSIONS or prod(max(length, 1) for length in shape) >= 2**60:
        raise ValueError(f"{one_line(repr(shape))} is no shape of a tensor")
    if coding in ROUNDED and dtype != "float32":
        raise ValueError(f"{dtype} does not travel as {coding}")
    entries, size = prod(shape), prod(shape) * DTYPES[dtype].itemsize
    if coding == "lossless":
        fits = size <= DEFLATES * len(data)
    else:
        fits = len(data) == {"exact": size, "bf16": 2 * entries, "int8": entries + 4 * _blocks(entries)}[coding]
    if not fits:
        raise ValueError(f"{len(data)} bytes are no {dtype} {tuple(shape)} as {coding}")
    return size


# As they are


def _bytes(value: Tensor) -> Bytes:
    """Of a tensor, entry by entry; they share its memory where they can."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor(data: Bytes, dtype: torch.dtype) -> Tensor:
    """The reverse, in the memory of `data`."""
    if dtype == torch.bool and (data > 1).any():
        raise ValueError("bool has other values than 0 and 1")
    return (
        torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
    )  # torch views no nothing


def _exact(coded: Coded) -> Tensor:
    return _tensor(np.frombuffer(coded.data, np.uint8).copy(), DTYPES[coded.dtype])


# Byte planes: the signs and exponents of all entries lie together, and deflate; so do the zeros that end y - x


def _planes(value: Tensor) -> bytes:
    """The lengths of the planes, first bytes first, as uint64, and the planes, deflated where that saves bytes."""
    data = _bytes(value).reshape(-1, value.itemsize).T
    planes = [_deflated(np.ascontiguousarray(plane)) for plane in data]
    return np.array([len(plane) for plane in planes], "<u8").tobytes() + b"".join(planes)


def _deflated(plane: Bytes) -> bytes:
    """As short as it gets; a plane of noise is not tried as a whole."""
    middle = max(0, (len(plane) - SAMPLE) // 2)
    sample = plane[middle : middle + SAMPLE]
    if len(_deflate(sample)) > WORTH * len(sample):
        return plane.tobytes()
    return min(_deflate(plane), plane.tobytes(), key=len)


def _deflate(data: Bytes) -> bytes:
    # Noise with a skewed histogram has no repetitions but runs of zeros: looking for others only takes time.
    stream = zlib.compressobj(strategy=zlib.Z_RLE)
    return stream.compress(data.data) + stream.flush()


def _lossless(coded: Coded) -> Tensor:
    dtype = DTYPES[coded.dtype]
    entries, head = prod(coded.shape), 8 * dtype.itemsize
    if len(coded.data) < head:
        raise ValueError("the planes have no lengths")
    lengths = [int(length) for length in np.frombuffer(coded.data, "<u8", dtype.itemsize)]
    if sum(lengths) + head != len(coded.data) or max(lengths) > entries:
        raise ValueError("the planes have other lengths")
    whole, rest = np.empty((entries, dtype.itemsize), np.uint8), memoryview(coded.data)
    for i, (first, length) in enumerate(zip(accumulate(lengths, initial=head), lengths, strict=False)):
        plane = rest[first : first + length]
        whole[:, i] = np.frombuffer(plane if length == entries else _inflated(plane, entries), np.uint8)
    return _tensor(whole.reshape(-1), dtype)


def _inflated(plane: memoryview, entries: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(plane, entries + 1)
    except zlib.error as error:
        raise ValueError(f"a plane does not inflate: {error}") from None
    if len(data) != entries or not stream.eof or stream.unused_data:
        raise ValueError("a plane inflates to another length")
    return data


# Rounded


def _rounded(name: str, value: Tensor, coding: str, residual: Tensor | None) -> tuple[bytes, Tensor]:
    """q(m + e) in bytes, and what it leaves."""
    if residual is not None and residual.shape != value.shape:
        raise ValueError(f"{one_line(name)}: has shape {tuple(value.shape)}, its residual {tuple(residual.shape)}")
    wanted = value if residual is None else value + residual.to(value)
    if not isfinite(largest(wanted)):
        raise ArithmeticError(f"{one_line(name)} is not finite")
    data = (_to_bf16 if coding == "bf16" else _to_int8)(wanted.reshape(-1))
    left = wanted - DECODERS[coding](Coded("float32", tuple(value.shape), coding, data)).reshape(value.shape)
    if not isfinite(largest(left)):
        raise ArithmeticError(f"{one_line(name)} is too large for {coding}")
    return data, left


def _to_bf16(vector: Tensor) -> bytes:
    """To the nearest, ties to even."""
    return _bytes(vector.bfloat16()).tobytes()


def _bf16(coded: Coded) -> Tensor:
    return _tensor(np.frombuffer(coded.data, np.uint8).copy(), torch.bfloat16).float()


def _to_int8(vector: Tensor) -> bytes:
    """A scale for each block, its largest magnitude / 127, as float32; then how many of it each entry is."""
    blocks = torch.nn.functional.pad(vector, (0, -len(vector) % BLOCK)).reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    levels = (blocks / scales.where(scales > 0, 1)).round_().clamp_(-127, 127).to(torch.int8)
    return _bytes(scales).tobytes() + _bytes(levels.reshape(-1)[: len(vector)]).tobytes()


def _int8(coded: Coded) -> Tensor:
    entries = prod(coded.shape)
    cut = 4 * _blocks(entries)
    scales = torch.from_numpy(np.frombuffer(coded.data, "<f4", _blocks(entries)).copy())
    if not (torch.isfinite(scales) & (scales >= 0)).all():
        raise ValueError("a scale is negative or not finite")
    levels = torch.from_numpy(np.frombuffer(coded.data, np.int8, offset=cut).copy())
    return levels.float().mul_(scales.repeat_interleave(BLOCK)[:entries])


def _blocks(entries: int) -> int:
    return -(-entries // BLOCK)


DECODERS: dict[Any, Callable[[Coded], Tensor]] = {
    "exact": _exact,
    "lossless": _lossless,
    "bf16": _bf16,
    "int8": _int8,
}
