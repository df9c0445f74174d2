"""Encodings of an answer's tensors: unchanged, compressed without loss, or rounded.

Rounding uses error feedback (Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014; Karimireddy et
al., Error Feedback Fixes SignSGD, ICML 2019): a client sends q(m + e) and keeps e' = m + e - q(m + e) for its next
message, so that the sum of its messages differs from the exact sum by one rounding error at most.

Of an entry of which a message covers only some positions, these are sent, and its mask as bits or as positions.

Rounding is to the nearest: with error feedback it converges as stochastic rounding does, without random numbers.
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
from fedsim.federated.positions import WHERE, mask_sizes
from fedsim.types import State

Transport = Literal["exact", "lossless", "bf16", "int8"]
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
ROUNDED: tuple[Transport, ...] = ("bf16", "int8")  # the others are exact

MASKS = "bits", "indices"  # codings of masks
BLOCK = 1024  # entries that share a scale in int8; smaller tensors are not rounded
BUFFERS = "buffers"  # batch-norm statistics are not rounded: a variance must not become negative
SAMPLE_BYTES = 2**15  # of a plane, compressed first to see whether compression is worth it
WORTH = 0.97  # the largest compressed size of the sample, relative to its bytes, that is worth it
MOST_COMPRESSION = 1032  # bytes from one byte: the most that zlib can reach
MOST_DIMENSIONS = 64  # that torch supports

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}

Bytes = npt.NDArray[np.uint8]


class Coded(NamedTuple):
    """An encoded tensor: its dtype, its shape, and its bytes in a coding, which is the name of a transport.

    `coding` may differ from the message's transport: some tensors are not compressed or rounded, and masks have
    codings of their own. Numbers are little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    coding: str
    data: bytes


Encoded = dict[str, Coded]


def encode(state: State, transport: str, residual: State | None = None) -> tuple[Encoded, State]:
    """An encoded message and its rounding errors, which are the `residual` of the client's next message.

    Only float32 tensors of at least 1,024 entries are rounded, and no batch-norm statistics. Raises ValueError for
    an unknown transport, a dtype that cannot be sent, or a residual of another shape, and ArithmeticError if
    values to be rounded are not finite, or too large for it.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: {unknown(transport, TRANSPORTS)}")
    encoded, left = Encoded(), State()
    for name, tensor in state.items():
        whole = tensor.detach().cpu()
        dtype = str(whole.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"{one_line(name)}: {dtype} cannot be sent; allowed: {', '.join(DTYPES)}")
        if name.startswith(WHERE):
            encoded[name] = _mask(whole)
            continue
        covered = state[WHERE + name].cpu().bool() if WHERE + name in state else None
        value = whole if covered is None else whole[covered]
        coding, data = "exact", b""
        if transport in ROUNDED and dtype == "float32" and name != BUFFERS and whole.numel() >= BLOCK:
            coding = transport
            before = None if residual is None else residual.get(name)
            data, left[name] = _rounded(name, whole, coding, before, covered)
        elif transport == "lossless" and len(planes := _planes(value)) < value.nbytes:
            coding, data = "lossless", planes
        else:
            data = _bytes(value).tobytes()
        encoded[name] = Coded(dtype, tuple(value.shape), coding, data)
    return encoded, left


def decode(encoded: Encoded, most: int | None = None) -> State:
    """The decoded message; raises ValueError, in one line, if its bytes do not fit its dtypes and shapes.

    Everything is checked before it is used: the memory taken is at most what the received bytes can fill, and at
    most `most` bytes for the whole message.
    """
    state, total = State(), 0
    for name, coded in encoded.items():
        try:
            total += _checked_size(coded)
            if most is not None and total > most:
                raise ValueError(f"the message is larger than {most} bytes")
            state[name] = DECODERS[coded.coding](coded).reshape(coded.shape)
        except ValueError as error:
            raise ValueError(f"{one_line(name)}: {error}") from None
    for name in [name for name in state if name.startswith(WHERE)]:
        mask, values = state[name].bool(), state.get(entry := name.removeprefix(WHERE))
        if values is None or values.shape != (int(mask.sum()),):
            raise ValueError(f"{one_line(name)}: there are not as many values as positions")
        total += mask.numel() * values.itemsize
        if most is not None and total > most:
            raise ValueError(f"the message is larger than {most} bytes")
        state[entry] = torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
    return state


def _checked_size(coded: Coded) -> int:
    """The size of the decoded tensor in bytes; raises ValueError unless the received bytes fit it."""
    dtype, shape, coding, data = coded
    if dtype not in DTYPES:
        raise ValueError(f"dtype {one_line(repr(dtype))} is unknown; allowed: {', '.join(DTYPES)}")
    if coding not in DECODERS:
        raise ValueError(f"coding {one_line(repr(coding))} is unknown; allowed: {', '.join(DECODERS)}")
    whole = all(type(length) is int and length >= 0 for length in shape)
    if not whole or len(shape) > MOST_DIMENSIONS or prod(max(length, 1) for length in shape) >= 2**60:
        raise ValueError(f"{one_line(repr(shape))} is not a shape of a tensor")
    if coding in ROUNDED and dtype != "float32":
        raise ValueError(f"{dtype} cannot be sent as {coding}")
    if coding in MASKS and dtype != "uint8":
        raise ValueError(f"{dtype} is no mask, and cannot be sent as {coding}")
    entries, size = prod(shape), prod(shape) * DTYPES[dtype].itemsize
    if coding == "lossless":
        fits = size <= MOST_COMPRESSION * len(data)
    elif coding == "indices":
        fits = len(data) % 4 == 0 and len(data) <= 4 * entries
    else:
        lengths = {"exact": size, "bf16": 2 * entries, "int8": entries + 4 * _blocks(entries)}
        fits = len(data) == (lengths | {"bits": -(-entries // 8)})[coding]
    if not fits:
        raise ValueError(f"{len(data)} bytes do not fit {dtype} {tuple(shape)} as {coding}")
    return size


# Exact


def _bytes(value: Tensor) -> Bytes:
    """A tensor's bytes, entry by entry; they share its memory if possible."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor(data: Bytes, dtype: torch.dtype) -> Tensor:
    """The reverse of `_bytes`; it shares the memory of `data`."""
    if dtype == torch.bool and (data > 1).any():
        raise ValueError("bool has values other than 0 and 1")
    if not data.size:  # which torch cannot view as another dtype
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(data).view(dtype)


def _exact(coded: Coded) -> Tensor:
    return _tensor(np.frombuffer(coded.data, np.uint8).copy(), DTYPES[coded.dtype])


# Lossless, by byte planes: the first bytes of all entries, with sign and exponent, are stored together and
# compress well; so do the last ones, which in y - x are often zero


def _planes(value: Tensor) -> bytes:
    """The lengths of the planes as uint64, then the planes, compressed where that saves bytes."""
    data = _bytes(value).reshape(-1, value.itemsize).T
    planes = [_deflated(np.ascontiguousarray(plane)) for plane in data]
    return np.array([len(plane) for plane in planes], "<u8").tobytes() + b"".join(planes)


def _deflated(plane: Bytes) -> bytes:
    """A plane, compressed if that saves bytes; a plane of noise is recognised by a sample."""
    middle = max(0, (len(plane) - SAMPLE_BYTES) // 2)
    sample = plane[middle : middle + SAMPLE_BYTES]
    if len(_deflate(sample)) > WORTH * len(sample):
        return plane.tobytes()
    return min(_deflate(plane), plane.tobytes(), key=len)


def _deflate(data: Bytes) -> bytes:
    # Skewed noise has no repetitions except runs of zeros; searching for others only takes time.
    stream = zlib.compressobj(strategy=zlib.Z_RLE)
    return stream.compress(data.data) + stream.flush()


def _lossless(coded: Coded) -> Tensor:
    dtype = DTYPES[coded.dtype]
    entries, head = prod(coded.shape), 8 * dtype.itemsize
    if len(coded.data) < head:
        raise ValueError("the lengths of the planes are missing")
    lengths = [int(length) for length in np.frombuffer(coded.data, "<u8", dtype.itemsize)]
    if sum(lengths) + head != len(coded.data) or max(lengths) > entries:
        raise ValueError("the lengths of the planes are wrong")
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
        raise ValueError(f"a plane cannot be decompressed: {error}") from None
    if len(data) != entries or not stream.eof or stream.unused_data:
        raise ValueError("a plane has the wrong length after decompression")
    return data


# Rounded


def _rounded(
    name: str, value: Tensor, coding: str, residual: Tensor | None, covered: Tensor | None
) -> tuple[bytes, Tensor]:
    """q(m + e) in bytes, and the rounding error m + e - q(m + e); what is not covered waits with its e."""
    if residual is not None and residual.shape != value.shape:
        raise ValueError(
            f"{one_line(name)}: has shape {tuple(value.shape)}, but its residual has {tuple(residual.shape)}"
        )
    wanted = value if residual is None else value + residual.to(value)
    sent = wanted if covered is None else wanted[covered]
    if not isfinite(largest(sent)):
        raise ArithmeticError(f"{one_line(name)} is not finite")
    data = (_to_bf16 if coding == "bf16" else _to_int8)(sent.reshape(-1))
    left = sent - DECODERS[coding](Coded("float32", tuple(sent.shape), coding, data)).reshape(sent.shape)
    if not isfinite(largest(left)):
        raise ArithmeticError(f"{one_line(name)} is too large for {coding}")
    return data, left if covered is None else wanted.masked_scatter(covered, left)


def _to_bf16(vector: Tensor) -> bytes:
    """To the nearest, ties to even."""
    return _bytes(vector.bfloat16()).tobytes()


def _bf16(coded: Coded) -> Tensor:
    return _tensor(np.frombuffer(coded.data, np.uint8).copy(), torch.bfloat16).float()


def _to_int8(vector: Tensor) -> bytes:
    """Each block's scale, its largest magnitude / 127, as float32; then each entry / scale, rounded, as int8."""
    blocks = torch.nn.functional.pad(vector, (0, -len(vector) % BLOCK)).reshape(_blocks(len(vector)), BLOCK)
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


# Masks of what a message covers


def _mask(mask: Tensor) -> Coded:
    """A mask in the coding that takes fewer bytes."""
    sizes = mask_sizes(mask.numel(), int(mask.count_nonzero()))
    coding, flat = min(sizes, key=sizes.__getitem__), mask.reshape(-1).numpy()
    data = np.packbits(flat) if coding == "bits" else np.flatnonzero(flat).astype("<i4")
    return Coded("uint8", tuple(mask.shape), coding, data.tobytes())


def _bits(coded: Coded) -> Tensor:
    return torch.from_numpy(np.unpackbits(np.frombuffer(coded.data, np.uint8), count=prod(coded.shape)))


def _indices(coded: Coded) -> Tensor:
    places = np.frombuffer(coded.data, "<i4").astype(np.int64)
    if (np.diff(places, prepend=-1, append=prod(coded.shape)) <= 0).any():
        raise ValueError("positions should ascend, within the entry")
    return torch.zeros(prod(coded.shape), dtype=torch.uint8).index_fill_(0, torch.from_numpy(places), 1)


DECODERS: dict[Any, Callable[[Coded], Tensor]] = {
    "exact": _exact,
    "lossless": _lossless,
    "bf16": _bf16,
    "int8": _int8,
    "bits": _bits,
    "indices": _indices,
}
