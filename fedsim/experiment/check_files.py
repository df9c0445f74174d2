"""The files of a run, each looked at for itself; what is wrong with one is one of FAULTS."""

import errno
import os
import re
import struct
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

from fedsim.base.machine import memory
from fedsim.base.reading import read_regular

FAULTS = (ValueError, OSError, TypeError, KeyError, OverflowError, RecursionError)
MAX_ENTRIES = 100_000  # of a folder
MAX_EVENT_BYTES = 2048  # that the figures of a round take; TensorBoard's check sum is slow

NODE_RUN = re.compile("[0-9a-f]{32}")
PNG = b"\x89PNG\r\n\x1a\n"


class NotCheckedError(Exception):
    """Why something could not be checked."""


class UnusableError(Exception):
    """What is damaged that a checkpoint needs, which itself is whole."""


def entries(folder: Path) -> list[str]:
    """The names in a folder, up to one more than are allowed."""
    with os.scandir(folder) as found:
        return [entry.name for entry in islice(found, MAX_ENTRIES + 1)]


def content_of(path: Path, most: int | None = None) -> bytes:
    """The bytes of a regular file, of at most `most` of them, by default of half of this machine's memory."""
    try:
        return read_regular(path, memory() // 2 if most is None else most)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise NotCheckedError(error.strerror) from None
        raise


def check_nodes(runtime: Mapping[str, Any] | None, clients: int | None) -> int:
    """How many nodes a checkpoint needs; raises ValueError where what it says of them cannot be."""
    if not runtime or runtime.get("name") != "flower":
        return 0
    names: Any = runtime.get("nodes")
    sizes: Any = runtime.get("sizes")
    if not (_all(str, names) and _all(int, sizes)):
        raise ValueError("does not name its nodes")
    if not len(names) == len(sizes) == len({*map(str, names)}) == (len(names) if clients is None else clients):
        raise ValueError("does not name each node once, with its number of examples")
    if not NODE_RUN.fullmatch(str(runtime.get("run"))):
        raise ValueError("does not name the run as its nodes know it")
    return len(names)


def _all(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def check_png(content: bytes) -> None:
    """Raise ValueError where a chunk does not have its check sum, or the last one is no end."""
    at, kind = len(PNG), b""
    while content.startswith(PNG) and kind != b"IEND":
        end = at + 12 + int.from_bytes(content[at : at + 4])
        kind, chunk, crc = content[at + 4 : at + 8], content[at + 4 : end - 4], content[end - 4 : end]
        if not kind or crc32(chunk) != int.from_bytes(crc) or len(crc) < 4:
            raise ValueError("is damaged")
        at = end
    if not kind or at != len(content):
        raise ValueError("is no PNG")


def count_events(content: bytes, most: int) -> int:
    """How many events TensorBoard's file has; raises ValueError where one does not have its check sums.

    There are at most `most` of them.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    if len(content) > most * MAX_EVENT_BYTES:
        raise ValueError(f"has {len(content):,} bytes, more than the events of {most - 1} rounds take")
    at, count = 0, 0
    while at < len(content):
        length = content[at : at + 8]
        end = at + 16 + int.from_bytes(length, "little")
        sums = struct.pack("<II", masked_crc32c(length), masked_crc32c(content[at + 12 : end - 4]))
        if sums != content[at + 8 : at + 12] + content[end - 4 : end]:
            raise ValueError("is damaged")
        at, count = end, count + 1
    return count
