"""What a node keeps on its disk: of each run the plan, the initial tensors and its client's states, by version.

A state is a safetensors file that is whole or not there, and names the earlier ones that the run may go back to.
Nothing in it is executed, and one that is not what was written is refused.
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
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsim.base.files import DRAFT, untied_copies, write
from fedsim.base.reading import MAX_YAML_BYTES, open_regular
from fedsim.errors import ConfigError, one_line
from fedsim.types import State, described, form_of

RUN = re.compile(r"[0-9a-f]{32}")
PLAN, INITIAL = "plan.json", "initial.safetensors"
VERSION = re.compile(r"state-(\d{9})\.safetensors")
DAY = 24 * 3600.0  # seconds
MARK = 15  # hexadecimal digits


class Kept(NamedTuple):
    """A client's state, the earlier versions that counted and are still there, ascending, and its mark.

    By the mark, 60 bits of a digest, who names a version also says which: a round may have been repeated.
    """

    state: State
    earlier: tuple[int, ...] = ()
    mark: int = 0


class Keeping:
    """A node's folder, which one process at a time has.

    Raises ConfigError where another one has it, after so many seconds of `patience`. Runs that nobody has asked
    for in `forget_after` days go, at the start and when another begins.
    """

    def __init__(self, folder: Path, forget_after: float, patience: float = 0.0):
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise ConfigError(f"state: {folder}: another process has it; one node of a name at a time") from None
        except OSError as error:
            raise ConfigError(f"state: {folder}: {error.strerror}") from None
        self.forget_after = forget_after
        self._forget()

    def close(self) -> None:
        """Let another process have it."""
        self._lock.release()

    def join(self, run: str, plan: str, initial: State) -> None:
        """Keep what a run is; raises OSError."""
        home = self._home(run)
        home.mkdir(exist_ok=True)
        for draft in home.glob(f"*{DRAFT}"):  # of a process that was killed
            draft.unlink()
        for name in (PLAN, INITIAL):  # of another plan: never beside this one
            (home / name).unlink(missing_ok=True)
        _write(home / INITIAL, initial, {})
        write(home / PLAN, plan.encode())
        self._forget()

    def joined(self, run: str) -> tuple[str, State] | None:
        """A run's plan and initial tensors, if they are there and whole."""
        home = self._home(run)
        try:
            with open_regular(home / PLAN) as file:
                plan = file.read(4 * MAX_YAML_BYTES).decode()
            return plan, _read(home / INITIAL)[0]
        except (OSError, ValueError):
            return None

    def touch(self, run: str) -> None:
        """Have the run asked for just now."""
        utime(self._home(run))

    def load(self, run: str, client: int, version: int, mark: int) -> Kept:
        """A client's state; raises ValueError, saying what is wrong, where it is not the one that is meant."""
        try:
            state, about, found = _read(self._path(run, version))
            if about["client"] != str(client):
                raise ValueError(f"belongs to client {about['client']}")
            if found != mark:
                raise ValueError("is of a round that was repeated since")
            return Kept(state, tuple(int(each) for each in about["earlier"].split()), found)
        except FileNotFoundError:
            raise ValueError(f"state {version} of client {client} is not here; was its folder deleted?") from None
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"state {version} of client {client} is broken: {one_line(error)}") from None

    def store(self, run: str, client: int, version: int, kept: Kept) -> Kept:
        """Keep a client's state, which has a mark then; raises OSError, and ValueError for a strange type."""
        about = {"client": str(client), "earlier": " ".join(map(str, kept.earlier))}
        return kept._replace(mark=_write(self._path(run, version), kept.state, about))

    def prune(self, run: str, version: int, needed: Sequence[int]) -> None:
        """Delete the states before `version` that are not `needed`."""
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
            raise ValueError(f"run: {run[:40]!r} is no run's id")
        return self.folder / run


def needed(version: int, earlier: Sequence[int], checkpoints: Sequence[int]) -> tuple[int, ...]:
    """Of a state and the earlier ones that counted, those that a run needs that may go back to `checkpoints`.

    Each is a number of rounds, and needs the newest version up to it; `version` itself is needed for now.
    """
    counted = sorted({version, *earlier} - {0})
    newest = (max((each for each in counted if each <= rounds), default=version) for rounds in checkpoints)
    return tuple(sorted({version, *newest} - {0}))


def _write(path: Path, state: State, about: dict[str, str]) -> int:
    """Returns the state's mark."""
    own = untied_copies(state)
    digest = _digest(own)
    try:
        content = save(own, about | {"sha256": _sealed(about, digest)})
    except KeyError as error:
        raise ValueError(f"{error} cannot be written to disk, and so no client can keep it") from error
    write(path, content)
    return int(digest[:MARK], 16)


def _read(path: Path) -> tuple[State, dict[str, str], int]:
    """Tensors, what is told of them, and their mark; raises OSError, and ValueError for other contents."""
    open_regular(path).close()
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(one_line(error)) from None
    digest = _digest(state)
    if about.pop("sha256", "") != _sealed(about, digest):
        raise ValueError("is not what it was when it was written")
    return state, about, int(digest[:MARK], 16)


def _sealed(about: dict[str, str], digest: str) -> str:
    return hashlib.sha256(f"{sorted(about.items())} {digest}".encode()).hexdigest()


def _digest(state: State) -> str:
    digest = hashlib.sha256(described(form_of(state)).encode())
    for _, value in sorted(state.items()):
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
