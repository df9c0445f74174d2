"""Files that are whole or not there: what a kill or a full disk leaves is what was there before."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch import Tensor

DRAFT = ".draft"  # ends the name of a file that is being written


@dataclass(frozen=True)
class File:
    """A file, or so many of its first bytes, by name and content."""

    name: str
    bytes: int
    sha256: str


def write(path: Path, content: bytes, *, sync_name: bool = True) -> File:
    """Put `content` there, on disk when this returns; whoever looks sees all of it or what was there before.

    Without `sync_name` the file's name gets there with the next that is synchronised in its folder.
    """
    draft = path.with_name(path.name + DRAFT)
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:  # a write does not say where
            error.filename = str(path)
        raise
    if sync_name:
        sync_folder(path.parent)
    return File(path.name, len(content), hashlib.sha256(content).hexdigest())


def sync_folder(path: Path) -> None:
    """Let the names in a folder, too, outlive a loss of power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(folder: Path, file: File) -> bytes:
    """Its content; raises ValueError, saying what is wrong, where it is not what it was."""
    path = folder / file.name
    try:
        with path.open("rb") as opened:
            length = os.fstat(opened.fileno()).st_size
            if length < file.bytes:
                raise ValueError(f"{file.name} has {length} bytes of {file.bytes}")
            content = opened.read(file.bytes)
    except OSError as error:
        raise ValueError(f"{file.name}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise ValueError(f"{file.name} is not what it was when it was written")
    return content


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, each in memory of its own, as safetensors wants it: tied ones are copied."""
    seen, own = set[int](), dict[str, Tensor]()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        whole = value.untyped_storage().nbytes() == value.nbytes and value.data_ptr() not in seen
        own[name] = value if whole else value.clone()
        seen.add(own[name].data_ptr())
    return own


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until what is under way is whole."""
    if threading.current_thread() is not threading.main_thread():  # where signals are handled
        yield
        return
    came = list[int]()

    def later(number: int, frame: FrameType | None) -> None:
        came.append(number)

    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {number: handler for number, handler in usual.items() if callable(handler)}
    try:
        for number in usual:
            signal.signal(number, later)
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)
