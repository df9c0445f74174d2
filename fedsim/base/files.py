"""Files that are whole or not there: what a kill or a full disk leaves is what was there before."""

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import FrameType
from typing import Annotated
from uuid import uuid4

from annotated_types import Ge
from torch import Tensor

from fedsim.base.machine import memory
from fedsim.base.reading import open_regular

DRAFT = ".draft"  # ends the name of a file that is being written


@dataclass(frozen=True)
class File:
    """A file, or so many of its first bytes, by name and content."""

    name: str
    bytes: Annotated[int, Ge(0)]
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


def create(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Make a folder with these files, whole or not at all; raises OSError, as where it is there and not empty."""
    draft = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}{DRAFT}")
    draft.mkdir(parents=True)
    try:
        for name, content in contents.items():
            write(draft / name, content)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Let the names in a folder, too, outlive a loss of power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(folder: Path, file: File) -> bytes:
    """Its content; raises ValueError, saying what is wrong, where it is not what it was."""
    with _opened(folder, file) as opened:
        content = opened.read(file.bytes)
    _check(file, hashlib.sha256(content).hexdigest())
    return content


def verify(folder: Path, file: File) -> None:
    """The same without having it in memory."""
    digest, rest = hashlib.sha256(), file.bytes  # not all there is: of a log it is the beginning
    with _opened(folder, file) as opened:
        while block := opened.read(min(rest, 2**20)):
            digest.update(block)
            rest -= len(block)
    _check(file, digest.hexdigest())


def _opened(folder: Path, file: File) -> BufferedReader:
    try:
        opened = open_regular(folder / file.name)
    except FileNotFoundError as error:
        raise ValueError(f"{file.name}: {error.strerror}") from None
    length = os.fstat(opened.fileno()).st_size
    if length < file.bytes or length > memory():
        opened.close()
        raise ValueError(f"{file.name} has {length} bytes of {file.bytes}")
    return opened


def _check(file: File, digest: str) -> None:
    if digest != file.sha256:
        raise ValueError(f"{file.name} is not what it was when it was written")


def untied_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, each in memory of its own, as safetensors wants it: tied ones are copied."""
    seen, own = set[int](), dict[str, Tensor]()
    for name, value in tensors.items():
        value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
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

    with ExitStack() as usual:
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                usual.callback(signal.signal, number, handler)
                signal.signal(number, later)
        yield
    for each in came:  # unless what was under way failed, which ends the run anyway
        signal.raise_signal(each)
