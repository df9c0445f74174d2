"""Atomic writes: after a kill, or on a full disk, a file has its new content or its old one, never a part."""

import errno
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
from filelock import FileLock, Timeout
from torch import Tensor

from fedsim.base.machine import memory
from fedsim.base.reading import open_regular
from fedsim.errors import ConfigError, printable

DRAFT = ".draft"  # the suffix of a file or folder that is being written
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class File:
    """The name, length and SHA-256 of a file, or of its first `bytes` bytes where it has grown since."""

    name: str
    bytes: Annotated[int, Ge(0)]
    sha256: str


def write(path: Path, content: bytes, *, sync_name: bool = True) -> File:
    """Write `content` to `path` atomically; it is on the disk when this returns.

    Without `sync_name` the file's name reaches the disk only when its folder is next synchronised.
    """
    draft = path.with_name(path.name + DRAFT)
    try:
        with naming(path), draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_folder(path.parent)
    return File(path.name, len(content), hashlib.sha256(content).hexdigest())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError of the block name the file: those of a write or of a synchronisation do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def create(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Create `folder` with these files, all or nothing; raises OSError, as where it exists and is not empty."""
    draft = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}{DRAFT}")
    draft.mkdir(parents=True)
    made = draft
    try:
        for name, content in contents.items():
            write(draft / name, content)
        made = draft.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def check_writable(path: Path, at: str) -> None:
    """Raise ConfigError that begins with `at` where no file can be written; called before the work is done."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{at}: {path} cannot be written; is there such a folder?")


def locked(folder: Path) -> FileLock:
    """The lock of a folder, which this process holds until it releases it.

    Raises ConfigError where another process holds it, where the file system has no locks, and where the folder's
    name is not UTF-8: safetensors cannot open a file in it.
    """
    check_name(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"{folder}: another process is running it") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        why = getattr(error, "strerror", None) or error
        way = "use a folder on a file system with locks, such as a local disk"
        raise ConfigError(f"{folder / '.lock'}: cannot be locked: {why}; {way}") from None
    return lock


def check_name(folder: Path) -> None:
    """Raise ConfigError where the name of a folder is not UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{printable(folder)}: its name is not UTF-8; name another folder") from None


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk, so that they survive a loss of power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(folder)
    finally:
        os.close(folder)


def read(folder: Path, file: File) -> bytes:
    """The content of a file; raises ValueError, which says why, where it has changed since it was written."""
    with _open_checked(folder, file) as stream:
        content = stream.read(file.bytes)
    _check_digest(file, hashlib.sha256(content).hexdigest())
    return content


def verify(folder: Path, file: File) -> None:
    """Raise the same errors as `read`, without loading the file into memory."""
    digest, rest = hashlib.sha256(), file.bytes  # a log may have grown, and only its beginning counts
    with _open_checked(folder, file) as stream:
        while block := stream.read(min(rest, 2**20)):
            digest.update(block)
            rest -= len(block)
    _check_digest(file, digest.hexdigest())


def _open_checked(folder: Path, file: File) -> BufferedReader:
    try:
        stream = open_regular(folder / file.name)
    except FileNotFoundError as error:
        raise ValueError(f"{file.name}: {error.strerror}") from None
    length = os.fstat(stream.fileno()).st_size
    if length < file.bytes or length > memory():
        stream.close()
        limit = f"it should have {file.bytes}" if length < file.bytes else "more than this machine's memory"
        raise ValueError(f"{file.name} has {length} bytes; {limit}")
    return stream


def _check_digest(file: File, digest: str) -> None:
    if digest != file.sha256:
        raise ValueError(f"{file.name} has changed since it was written")


def untied_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors on the CPU, no two of which share memory: safetensors refuses tied tensors."""
    seen, own = set[int](), dict[str, Tensor]()
    for name, value in tensors.items():
        value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        alone = value.untyped_storage().nbytes() == value.nbytes and value.data_ptr() not in seen
        own[name] = value if alone else value.clone()
        seen.add(own[name].data_ptr())
    return own


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    received = list[int]()

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    with ExitStack() as usual_handlers:
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                usual_handlers.callback(signal.signal, number, handler)
                signal.signal(number, remember)
        yield
    for delayed in received:  # not reached where the block has raised: then that error ends the run
        signal.raise_signal(delayed)
