"""A node's files: for each run the plan, the initial tensors, and its client's states by version.

A state is a safetensors file that is complete or absent, and lists the earlier versions that the run may go back
to. Nothing in it is executed, and a file whose checksum is wrong is refused.

What servers can make a node keep is bounded: the bytes of all runs together, the runs that begin in a day, and the
states of a run. It is checked before anything is written.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import save

from fedsim.base.files import DRAFT, check_folder, lock_in, open_tensors, remove, untied_copies, write
from fedsim.base.reading import MAX_YAML_BYTES, open_regular, parse_json
from fedsim.errors import ConfigError, one_line
from fedsim.types import State, described, form_of

RUN = re.compile(r"[0-9a-f]{32}")
PLAN, INITIAL = "plan.json", "initial.safetensors"
FINISHED = "finished"  # an empty file in the folder of a run that has reached its end
NEW_RUNS = ".new-runs.json"  # how many runs have begun today
VERSION = re.compile(r"state-([0-9]{9})\.safetensors")
DAY = 24 * 3600.0  # seconds
MARK_DIGITS = 15  # hexadecimal
BLOCK = 4096  # bytes; a file or folder takes a multiple of it
MOST_UNCOUNTED = 8  # states that are kept of those newer than the last one that counts

Keep = Literal["last", "all", "nothing"]


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
    for `forget_after` days are deleted, at the start and when another run begins. All runs together take at most
    `max_disk` bytes, and at most `max_new_runs` begin in a day.
    """

    def __init__(
        self,
        folder: Path,
        forget_after: float,
        lock_timeout: float = 0.0,
        *,
        max_disk: float = inf,
        max_new_runs: float = inf,
    ):
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock_in(folder)
            self._lock.acquire(timeout=lock_timeout)
            _delete_drafts(folder)
        except Timeout:
            raise ConfigError(
                f"state: {folder}: another process uses it; only one node of a name may run"
            ) from None
        except OSError as error:
            raise ConfigError(f"state: {folder}: {error.strerror}") from None
        self.forget_after, self.max_disk, self.max_new_runs = forget_after, max_disk, max_new_runs
        self._sizes = dict[str, int]()  # bytes on disk at most, by run
        self._forget()

    def close(self) -> None:
        """Release the folder for another process."""
        self._lock.release()

    def has(self, run: str) -> bool:
        """Whether the node has joined a run, and not forgotten it."""
        return self._home(run).is_dir()

    def admit(self, run: str) -> None:
        """Raise ConfigError if the run would be new, and as many as may have begun today."""
        if not self.has(run) and (begun := self._new_runs()) >= self.max_new_runs:
            most = f"allowed on this node: up to {self.max_new_runs} a day"
            raise ConfigError(f"allow.max_new_runs: {begun} new runs have begun today (UTC); {most}")

    def join(self, run: str, plan: str, initial: State) -> None:
        """Store a run's plan and initial tensors, or nothing; raises OSError, and ConfigError for a full quota."""
        self.admit(run)
        home, new, own = self._home(run), not self.has(run), untied_copies(initial)
        joined = self.joined(run)
        if joined is None or (joined[0], _digest(joined[1])) != (plan, _digest(own)):
            contents = {INITIAL: _content(own, {})[0], PLAN: plan.encode()}
            replaced = sum(_on_disk(path.lstat().st_size) for name in contents if (path := home / name).exists())
            self.check_room(run, *map(len, contents.values()), less=replaced)
            try:
                for name in contents:  # so that a plan and the tensors of another one are never together
                    (home / name).unlink(missing_ok=True)
                if new:
                    self._count_new_run()
                home.mkdir(exist_ok=True)
                for name, content in contents.items():
                    write(home / name, content)
            except BaseException:
                if new:
                    shutil.rmtree(home, ignore_errors=True)
                self._measure()
                raise
        self.touch(run)
        self._forget()

    def joined(self, run: str) -> tuple[str, State] | None:
        """A run's plan and initial tensors; None if they are absent or damaged."""
        home = self._home(run)
        try:
            return read_plan(home), _read(home / INITIAL)[0]
        except (OSError, ValueError):
            return None

    def touch(self, run: str) -> None:
        """Record that the run has had a message now, and so goes on."""
        (self._home(run) / FINISHED).unlink(missing_ok=True)
        os.utime(self._home(run))

    def check_room(self, run: str, *lengths: int, less: int = 0) -> None:
        """Raise ConfigError unless files of these lengths may be added to the run's.

        `less` are the bytes of files that are deleted before.
        """
        wanted = sum(map(_on_disk, lengths)) - less
        self._measure([run])
        if sum(self._sizes.values()) + wanted <= self.max_disk:
            return
        self._measure()  # the owner may have deleted some
        if (held := sum(self._sizes.values())) + wanted > self.max_disk:
            most = f"allowed on this node: up to {self.max_disk:,}"
            most += "; fedsim node NODE.yaml --runs lists them, and --forget RUN deletes one"
            raise ConfigError(f"allow.max_disk: {wanted:,} bytes do not fit beside {held:,} of its runs; {most}")

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
            why = "was it deleted, by --forget, keep: nothing or by hand?"
            way = "restore the folder `state` from a backup, or start another run"
            raise ValueError(f"state {version} of client {client} is not here; {why} {way}") from None
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"state {version} of client {client} is broken: {one_line(error)}") from None

    def store(self, run: str, client: int, version: int, kept: StoredState) -> StoredState:
        """Store a client's state, and return it with its mark.

        Raises OSError, ConfigError for a full quota, and ValueError for some dtypes.
        """
        about = {"client": str(client), "earlier": " ".join(map(str, kept.earlier))}
        content, mark = _content(untied_copies(kept.state), about)
        self.check_room(run, len(content))
        write(self._path(run, version), content)
        self._sizes[run] += _on_disk(len(content))
        return kept._replace(mark=mark)

    def prune(self, run: str, version: int, needed: Collection[int]) -> None:
        """Delete states that are not in `needed`: all that are older than `version`, and of newer ones most.

        The newer ones are of answers that did not count, such as those that came too late; the last written stay.
        """
        idle = {v: path for v, path in states(self._home(run)).items() if v not in {version, *needed}}
        newer = sorted((path for v, path in idle.items() if v > version), key=_written)
        _delete([path for v, path in idle.items() if v < version] + newer[:-MOST_UNCOUNTED])

    def finish(self, run: str, version: int, keep: Keep) -> None:
        """Delete what `keep` does not keep of a run that has ended, with this version of the client's state.

        The state that was written last stays as well, so that no server's message makes a node lose it. Raises
        OSError.
        """
        home = self._home(run)
        if not home.is_dir():
            return
        if keep == "nothing":
            forget(self.folder, run)
        else:
            if keep == "last":
                found = states(home)
                last = max(found.values(), key=_written, default=None)
                _delete([path for v, path in found.items() if v != version and path != last])
                _delete([home / INITIAL])  # a server that goes on with the run sends it again
            (home / FINISHED).touch()
            os.utime(home)
        self._measure([run])

    def forget_stateless(self, run: str) -> None:
        """Delete a run of which there is no state, because the node cannot take part in it. Raises OSError."""
        if not states(self._home(run)):
            forget(self.folder, run)
            self._measure([run])

    def _forget(self) -> None:
        for run in runs(self.folder):
            with suppress(OSError):  # its owner deletes it now, too
                if time.time() - (self.folder / run).stat().st_mtime > self.forget_after * DAY:
                    forget(self.folder, run)
        self._measure()

    def _measure(self, of: Iterable[str] | None = None) -> None:
        """Measure what these runs take, by default all."""
        if of is None:
            self._sizes, of = {}, runs(self.folder)
        self._sizes |= {run: size(self.folder / run) for run in of}

    def _new_runs(self) -> int:
        """How many runs have begun today."""
        with suppress(OSError, ValueError), open_regular(self.folder / NEW_RUNS) as file:
            match parse_json(file.read(BLOCK)):
                case {"day": day, "runs": int(begun)} if day == _today():
                    return begun
        return 0

    def _count_new_run(self) -> None:
        about = {"day": _today(), "runs": self._new_runs() + 1}
        write(self.folder / NEW_RUNS, json.dumps(about).encode())

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


def runs(folder: Path) -> list[str]:
    """The ids of the runs in a node's folder; raises OSError."""
    return sorted(path.name for path in folder.iterdir() if RUN.fullmatch(path.name))


def states(home: Path) -> dict[int, Path]:
    """The files of a run's states, by version; raises OSError."""
    return {int(found[1]): path for path in home.iterdir() if (found := VERSION.fullmatch(path.name))}


def size(home: Path) -> int:
    """The bytes that a run's folder takes on the disk; 0 if there is none."""
    total = 0
    with suppress(OSError), os.scandir(home) as entries:  # its owner may delete it now
        total += BLOCK
        total += sum(_on_disk(entry.stat(follow_symlinks=False).st_size) for entry in entries)
    return total


def read_plan(home: Path) -> str:
    """The text of a run's plan; raises OSError, and ValueError for bytes that are no text."""
    with open_regular(home / PLAN) as file:
        return file.read(4 * MAX_YAML_BYTES).decode()


def forget(folder: Path, run: str) -> None:
    """Delete a run, also under a process that works for it: it is there whole, or not at all. Raises OSError."""
    away = folder / f".{run}{DRAFT}"
    shutil.rmtree(away, ignore_errors=True)
    (folder / run).rename(away)
    shutil.rmtree(away)


def _delete_drafts(folder: Path) -> None:
    """Delete what a process that was killed has left half written or half deleted; raises OSError."""
    of_runs = [draft for run in runs(folder) for draft in (folder / run).glob(f"*{DRAFT}")]
    for draft in (*folder.glob(f".*{DRAFT}"), *of_runs):
        remove(draft)


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _on_disk(length: int) -> int:
    """The bytes that a file of this length takes."""
    return max(-(-length // BLOCK), 1) * BLOCK


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _content(state: State, about: dict[str, str]) -> tuple[bytes, int]:
    """The bytes of a state's file, and the state's mark; raises ValueError for some dtypes."""
    digest = _digest(state)
    try:
        content = save(state, about | {"sha256": _checksum(about, digest)})
    except KeyError as error:
        raise ValueError(f"{error} cannot be written to disk, so it cannot be part of a client's state") from error
    return content, int(digest[:MARK_DIGITS], 16)


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
