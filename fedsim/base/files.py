"""Atomic writes: after a kill, or on a full disk, a file has its new content or its old one, never a part."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import FrameType
from typing import Annotated, Any
from uuid import uuid4

from annotated_types import Ge
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from fedsim.base.machine import memory
from fedsim.base.reading import open_regular
from fedsim.errors import ConfigError, printable

DRAFT = ".draft"  # the suffix of a file or folder that is being written
DRAFT_FOLDER = re.compile(r"\..+\.[0-9a-f]{8}" + re.escape(DRAFT), re.DOTALL)
DRAFT_SECONDS = 3600  # after which one of another process is of one that was killed
LOOK_SECONDS = 0.05  # for which someone who looks whether a folder is locked may hold its lock
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
    if os.path.lexists(draft):  # left by a kill, or a link
        remove(draft)
    try:
        with naming(path):
            with draft.open("xb") as file:
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
    """Have an OSError of the block name the file: those of a write name none, or a draft."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def create(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Create `folder` with these files, all or nothing; raises OSError, as where it exists and is not empty."""
    draft = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}{DRAFT}")
    draft.mkdir(parents=True)
    made = draft
    try:
        _remove_drafts(folder.parent, before=draft.stat().st_mtime - DRAFT_SECONDS)
        for name, content in contents.items():
            write(draft / name, content)
        made = draft.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _remove_drafts(parent: Path, before: float) -> None:
    """Delete the drafts of folders that a kill left here, which are those that nobody has written to for long."""
    with suppress(OSError):  # such as one that another process deletes now
        for name in os.listdir(parent):  # perhaps of thousands of runs
            if DRAFT_FOLDER.fullmatch(name) and (path := parent / name).lstat().st_mtime < before:
                shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete what has this name, if anything has: a file, a link but not what it leads to, or a whole folder."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if path.is_symlink() or not path.is_dir():
            raise
        shutil.rmtree(path)


def check_folder(path: Path) -> None:
    """Raise ConfigError where `path` exists and is no folder; a symbolic link to one is none, either."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISDIR(mode):
            what = "is a symbolic link" if stat.S_ISLNK(mode) else "is no folder"
            raise ConfigError(f"{path}: {what}, and should be a folder of its own")


def make_folder(path: Path) -> None:
    """Make a folder in another one, unless it is there; raises ConfigError where it is a link or a file."""
    check_folder(path)
    path.mkdir(exist_ok=True)


def expanded(path: Path, at: str) -> Path:
    """The path with a leading ~ or ~USER replaced by a home folder; raises ConfigError where there is none."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(f"{at}: {printable(path)}: there is no such home folder") from None


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
    lock = lock_in(folder)
    try:
        lock.acquire(timeout=LOOK_SECONDS, poll_interval=LOOK_SECONDS / 5)
    except Timeout:
        raise ConfigError(f"{folder}: another process is running it") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        why = getattr(error, "strerror", None) or error
        way = "use a folder on a file system with locks, such as a local disk"
        raise ConfigError(f"{folder / '.lock'}: cannot be locked: {why}; {way}") from None
    return lock


def lock_in(folder: Path) -> FileLock:
    """The lock of a folder, not yet held; raises ConfigError where its file is not an empty one: it will be."""
    path = folder / ".lock"
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or (found.st_nlink > 1 and found.st_size):
            raise ConfigError(f"{path}: is no lock, but another file or a link; delete it")
    return FileLock(path)


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of a folder; looking takes a moment, for which `locked` waits."""
    try:
        file = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(file)
    return False


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
    """The content of a file; raises ValueError, which says why, where it cannot be read or has changed since."""
    with _checked(folder, file) as stream:
        content = stream.read(file.bytes)
    _check_digest(file, hashlib.sha256(content).hexdigest())
    return content


def verify(
    folder: Path, file: File, known: dict[str, str], progress: Callable[[int], None] = lambda count: None
) -> None:
    """Raise the same errors as `read`, without loading the file into memory, and where it has grown.

    `known` has the digests of files by name, so that each is read once. `progress` is called with the number of
    bytes that were read.
    """
    with _checked(folder, file, whole=True) as stream:
        if file.name not in known:
            digest, rest = hashlib.sha256(), file.bytes
            while block := stream.read(min(rest, 2**20)):
                digest.update(block)
                rest -= len(block)
                progress(len(block))
            known[file.name] = digest.hexdigest()
    _check_digest(file, known[file.name])


@contextmanager
def _checked(folder: Path, file: File, *, whole: bool = False) -> Iterator[BufferedReader]:
    """The file, opened; raises ValueError for a length that cannot be, and in place of each OSError."""
    try:
        with open_regular(folder / file.name) as stream:
            length = os.fstat(stream.fileno()).st_size
            if length > memory():
                raise ValueError(f"{file.name} has {length} bytes; more than this machine's memory")
            if length < file.bytes or (whole and length > file.bytes):
                raise ValueError(f"{file.name} has {length} bytes; it should have {file.bytes}")
            yield stream
    except OSError as error:
        raise ValueError(f"{file.name}: {error.strerror}") from None


def _check_digest(file: File, digest: str) -> None:
    if digest != file.sha256:
        raise ValueError(f"{file.name} has changed since it was written")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, to read its tensors one by one; raises OSError for anything but a regular file."""
    open_regular(path).close()  # safetensors would follow a link, and wait for a pipe
    with safe_open(path, "pt") as file:
        yield file


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
