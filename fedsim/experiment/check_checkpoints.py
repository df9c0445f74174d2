"""What lies in a run's checkpoints/, each file compared with the SHA-256 that it has, or that names it."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load

from fedsim.base.files import File, check_folder, verify
from fedsim.errors import one_line
from fedsim.experiment.check_files import FAULTS, MAX_ENTRIES, NotCheckedError, content_of, entries
from fedsim.experiment.checkpoint import MAX_BYTES, NAME, SERVER, Checkpoint, Named, read_checkpoint
from fedsim.experiment.folder import CHECKPOINTS
from fedsim.experiment.round_log import NAME as LOG
from fedsim.federated.simulation import fingerprint_of

MAX_CHECKPOINTS = 1000  # that are read, the newest ones
MAX_JSON_BYTES = 2**28  # of their files N.json

Progress = Callable[[int, int], None]  # bytes that are hashed, and how many will be


class Models(NamedTuple):
    """The fingerprints of the models in a checkpoint."""

    model: str
    ema: str | None


class FoundCheckpoints:
    """The checkpoints of a run as they were found.

    N.json has its own SHA-256. Where that holds, N.json decides whether the files that it names are whole.
    """

    def __init__(self, run: Path, finished: bool, running: bool, progress: Progress):
        self.folder = run / CHECKPOINTS
        self.names = list[str]()
        self.fault: Exception | None = None  # why it is not known what lies there
        try:
            self.names = _names(self.folder)
        except (*FAULTS, NotCheckedError) as error:
            self.fault = error
        self.numbered = _numbered(self.names, finished)
        self.read = self._read()  # by their names, the newest first; not the older ones of very many
        self.log_lines = 0  # of rounds.jsonl, which are as some checkpoint knows them
        self.log_differs = list[Checkpoint]()  # those that know other lines
        self._compare_log(run / LOG)
        self.damaged = self._hash(progress)  # what is wrong with a file that they name
        self.models = {each.server: self._models(each.server) for each in self.whole}
        if running:  # it has deleted some meanwhile
            self.read = {name: each for name, each in self.read.items() if os.path.lexists(self.folder / name)}

    @property
    def whole(self) -> list[Checkpoint]:
        """Those whose N.json is whole, the newest first."""
        return [each for each in self.read.values() if isinstance(each, Checkpoint)]

    @property
    def newest(self) -> Checkpoint | None:
        """The newest of all, if its N.json is whole."""
        found = next(iter(self.read.values()), None)
        return found if isinstance(found, Checkpoint) else None

    def _read(self) -> dict[str, Checkpoint | Exception]:
        found, room = dict[str, Checkpoint | Exception](), MAX_JSON_BYTES
        for name in self.numbered[:MAX_CHECKPOINTS]:
            path = self.folder / name
            try:
                room -= min(os.lstat(path).st_size, MAX_BYTES)
                if room < 0:
                    break
                found[name] = read_checkpoint(path)
            except FAULTS as error:
                found[name] = error
        return found

    @property
    def log_fault(self) -> str | None:
        """What is wrong with rounds.jsonl by those that know more lines than are right, in words."""
        rounds = [each.round for each in self.log_differs if each.logged > self.log_lines]
        right = f"; its first {self.log_lines} lines are right" if self.log_lines else ""
        return f"has changed since the checkpoint of round {min(rounds)}{right}" if rounds else None

    def _compare_log(self, log: Path) -> None:
        try:
            named = Named(self.folder, log, [self.folder / name for name in self.read])
        except FAULTS:  # where it cannot be read
            self.log_differs = self.whole
            return
        for each in self.whole:
            try:
                named.check_log(each)
                self.log_lines = max(self.log_lines, each.logged)
            except ValueError:
                self.log_differs.append(each)

    def _hash(self, progress: Progress) -> dict[File, str]:
        """What is wrong with the files that are named, each of which is hashed once."""
        files, digests, done = files_of(self.whole), dict[str, str](), 0
        total = sum(file.bytes for file in files)

        def hashed(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        found = dict[File, str]()
        for file in files:
            try:
                verify(self.folder, file, digests, hashed)
            except ValueError as error:
                found[file] = one_line(error).removeprefix(file.name).lstrip(": ")
        return found

    def _models(self, server: File) -> Models | Exception:
        """The fingerprints in a server's state, or why they are not known."""
        try:
            state = load(content_of(self.folder / server.name))
            ema = {name: state[f"ema.{name}"] for name in ("model", "buffers")} if "ema.model" in state else None
            return Models(fingerprint_of(state), None if ema is None else fingerprint_of(ema))
        except (NotCheckedError, OSError) as error:
            return error
        except (*FAULTS, SafetensorError) as error:
            return ValueError(f"{server.name}: is no server's state: {one_line(error)}")


def files_of(checkpoints: Iterable[Checkpoint]) -> list[File]:
    """The files that they name, each once."""
    return list(dict.fromkeys(file for each in checkpoints for file in (each.server, *each.clients)))


def _names(folder: Path) -> list[str]:
    check_folder(folder)
    names = entries(folder)
    if len(names) > MAX_ENTRIES:
        raise NotCheckedError(f"has more than {MAX_ENTRIES:,} files")
    return names


def _numbered(names: list[str], finished: bool) -> list[str]:
    """The names N.json, the newest first, with those that a server's state shows to be missing."""
    found = {*filter(NAME.fullmatch, names)}
    if finished:  # before, a kill can leave a server's state alone
        found |= {
            name.replace("server-", "").replace(".safetensors", ".json")
            for name in filter(SERVER.fullmatch, names)
        }
    return sorted(found, key=lambda name: -int(name.partition(".")[0]))
