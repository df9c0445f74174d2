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

from pydantic import ValidationError

from fedsim.base.machine import memory
from fedsim.base.reading import first_fault, read_regular
from fedsim.errors import one_line

FAULTS = (ValueError, OSError, TypeError, KeyError, OverflowError, RecursionError)
MAX_ENTRIES = 100_000  # of a folder

SHA256, NODE_RUN = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
PNG = b"\x89PNG\r\n\x1a\n"


class NotCheckedError(Exception):
    """Why something could not be checked."""


def in_words(error: Exception) -> str:
    """What is wrong, in a line."""
    if isinstance(error, ValidationError):
        return one_line(first_fault(error))
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return kind + one_line(getattr(error, "strerror", None) or error)


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


def check_record(record: dict[str, Any], number: int, clients: int | None, clock: float) -> None:
    """Raise ValueError where a round does not follow the one before it, or is of clients that there are not."""
    cohort = record["cohort"]
    if record["round"] != number:
        raise ValueError(f"is of round {record['round']}")
    if len({*cohort}) < len(cohort) or not all(k >= 0 and (clients is None or k < clients) for k in cohort):
        raise ValueError("cohort has a client twice, or one that there is not")
    if not {*record["failed"], *record["absent"]} <= {*map(str, cohort)}:
        raise ValueError("failed or absent has a client that is not in cohort")
    if not SHA256.fullmatch(record["fingerprint"]):
        raise ValueError("fingerprint is no SHA-256")
    accuracy = record.get("test_accuracy", 0.0)
    if not (isinstance(accuracy, int | float) and 0 <= accuracy <= 1):
        raise ValueError("test_accuracy should be from 0 to 1")
    if record["clock"] < clock:
        raise ValueError("clock goes back")


def check_nodes(runtime: Mapping[str, Any] | None, clients: int | None) -> str:
    """Which nodes a checkpoint needs, in words; raises ValueError where what it says of them cannot be."""
    if not runtime or runtime.get("name") != "flower":
        return ""
    names: Any = runtime.get("nodes")
    sizes: Any = runtime.get("sizes")
    if not (_all(str, names) and _all(int, sizes)):
        raise ValueError("does not name its nodes")
    if not len(names) == len(sizes) == len({*map(str, names)}) == (len(names) if clients is None else clients):
        raise ValueError("does not name each node once, with its number of examples")
    if not NODE_RUN.fullmatch(str(runtime.get("run"))):
        raise ValueError("does not name the run as its nodes know it")
    return f"; the states of {len(names)} nodes lie on the nodes, not checked"


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


def count_events(content: bytes) -> int:
    """How many events TensorBoard's file has; raises ValueError where one does not have its check sums."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    at, count = 0, 0
    while at < len(content):
        length = content[at : at + 8]
        end = at + 16 + int.from_bytes(length, "little")
        sums = struct.pack("<II", masked_crc32c(length), masked_crc32c(content[at + 12 : end - 4]))
        if sums != content[at + 8 : at + 12] + content[end - 4 : end]:
            raise ValueError("is damaged")
        at, count = end, count + 1
    return count
