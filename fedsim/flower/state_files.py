"""A node's files: for each run the plan, the initial tensors, and its client's states by version.

A state is a safetensors file that is complete or absent, and lists the earlier versions that the run may go back
to. Nothing in it is executed, and a file whose checksum is wrong is refused.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from os import utime
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import save

from fedsim.base.files import DRAFT, check_folder, lock_in, open_tensors, remove, untied_copies, write
from fedsim.base.reading import MAX_YAML_BYTES, open_regular
from fedsim.errors import ConfigError, one_line
from fedsim.types import State, described, form_of

RUN = re.compile(r"[0-9a-f]{32}")
PLAN, INITIAL = "plan.json", "initial.safetensors"
VERSION = re.compile(r"state-(\d{9})\.safetensors")
DAY = 24 * 3600.0  # seconds
MARK_DIGITS = 15  # hexadecimal


class StoredState(NamedTuple):
    """A client's state; the earlier valid versions that are still stored, ascending; and the state's mark.

    The mark, 60 bits of a digest, identifies the content: a repeated round may store another state under the same
    version.
    """

    state: State
    earlier: tuple[int, ...] = ()
    mark: int = 0


class StateFiles:
    """A node's folder, used by one process at a time.

    Raises ConfigError if another process still uses it after `lock_timeout` seconds. Runs that have had no message
    for `forget_after` days are deleted, at the start and when another run begins.
    """

    def __init__(self, folder: Path, forget_after: float, lock_timeout: float = 0.0):
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock_in(folder)
            self._lock.acquire(timeout=lock_timeout)
        except Timeout:
            raise ConfigError(
                f"state: {folder}: another process uses it; only one node of a name may run"
            ) from None
        except OSError as error:
            raise ConfigError(f"state: {folder}: {error.strerror}") from None
        self.forget_after = forget_after
        self._forget()

    def close(self) -> None:
        """Release the folder for another process."""
        self._lock.release()

    def join(self, run: str, plan: str, initial: State) -> None:
        """Store a run's plan and initial tensors; raises OSError."""
        home = self._home(run)
        home.mkdir(exist_ok=True)
        for draft in home.glob(f"*{DRAFT}"):  # left by a process that was killed
            remove(draft)
        for name in (PLAN, INITIAL):  # so that a plan and the tensors of another one are never together
            (home / name).unlink(missing_ok=True)
        _write(home / INITIAL, initial, {})
        write(home / PLAN, plan.encode())
        self._forget()

    def joined(self, run: str) -> tuple[str, State] | None:
        """A run's plan and initial tensors; None if they are absent or damaged."""
        home = self._home(run)
        try:
            with open_regular(home / PLAN) as file:
                plan = file.read(4 * MAX_YAML_BYTES).decode()
            return plan, _read(home / INITIAL)[0]
        except (OSError, ValueError):
            return None

    def touch(self, run: str) -> None:
        """Record that the run has had a message now."""
        utime(self._home(run))

    def load(self, run: str, client: int, version: int, mark: int) -> StoredState:
        """The client's state of this version and mark; raises ValueError, with the reason, if it cannot be had."""
        try:
            state, about, found = _read(self._path(run, version))
            if about["client"] != str(client):
                raise ValueError(f"belongs to client {about['client']}")
            if found != mark:
                raise ValueError("was replaced when its round was repeated")
            return StoredState(state, tuple(int(each) for each in about["earlier"].split()), found)
        except FileNotFoundError:
            raise ValueError(f"state {version} of client {client} is not here; was its folder deleted?") from None
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"state {version} of client {client} is broken: {one_line(error)}") from None

    def store(self, run: str, client: int, version: int, kept: StoredState) -> StoredState:
        """Store a client's state, and return it with its mark; raises OSError, and ValueError for some dtypes."""
        about = {"client": str(client), "earlier": " ".join(map(str, kept.earlier))}
        return kept._replace(mark=_write(self._path(run, version), kept.state, about))

    def prune(self, run: str, version: int, needed: Sequence[int]) -> None:
        """Delete the states older than `version` that are not in `needed`."""
        for path in self._home(run).iterdir():
            found = VERSION.fullmatch(path.name)
            if found and int(found[1]) < version and int(found[1]) not in needed:
                with suppress(OSError):
                    path.unlink()

    def _forget(self) -> None:
        for run in [path for path in self.folder.iterdir() if RUN.fullmatch(path.name)]:
            if time.time() - run.stat().st_mtime > self.forget_after * DAY:
                shutil.rmtree(run, ignore_errors=True)

    def _path(self, run: str, version: int) -> Path:
        return self._home(run) / f"state-{version:09}.safetensors"

    def _home(self, run: str) -> Path:
        if not RUN.fullmatch(run):
            raise ValueError(f"run: {run[:40]!r} is not the id of a run")
        home = self.folder / run
        check_folder(home)
        return home


def needed(version: int, earlier: Sequence[int], checkpoints: Sequence[int]) -> tuple[int, ...]:
    """The versions to keep, of `version` and the `earlier` valid ones, so that a run can go back to a checkpoint.

    A checkpoint is a number of rounds, and needs the newest version up to it; `version` itself is needed for now.
    """
    valid = sorted({version, *earlier} - {0})
    newest = (max((each for each in valid if each <= rounds), default=version) for rounds in checkpoints)
    return tuple(sorted({version, *newest} - {0}))


def _write(path: Path, state: State, about: dict[str, str]) -> int:
    """Returns the state's mark."""
    own = untied_copies(state)
    digest = _digest(own)
    try:
        content = save(own, about | {"sha256": _checksum(about, digest)})
    except KeyError as error:
        raise ValueError(f"{error} cannot be written to disk, so it cannot be part of a client's state") from error
    write(path, content)
    return int(digest[:MARK_DIGITS], 16)


def _read(path: Path) -> tuple[State, dict[str, str], int]:
    """Tensors, their metadata, and their mark; raises OSError, and ValueError for a file that is not a state."""
    try:
        with open_tensors(path) as file:
            about = dict(file.metadata() or {})
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is not a mapping
    except SafetensorError as error:
        raise ValueError(one_line(error)) from None
    digest = _digest(state)
    if about.pop("sha256", "") != _checksum(about, digest):
        raise ValueError("its checksum is wrong")
    return state, about, int(digest[:MARK_DIGITS], 16)


def _checksum(about: dict[str, str], digest: str) -> str:
    return hashlib.sha256(f"{sorted(about.items())} {digest}".encode()).hexdigest()


def _digest(state: State) -> str:
    digest = hashlib.sha256(described(form_of(state)).encode())
    for _, value in sorted(state.items()):
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
