"""Checkpoints: all that a run needs to go on as if it had never stopped.

The checkpoint of round N is N.json. It names the other files with their lengths and SHA-256: the server's state,
the segments of the client store, and the part of rounds.jsonl that existed. It is written last, so a checkpoint is
whole or does not exist. Nothing in it is executed. Randomness has a key, so no generator is saved.
"""

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedsim.base.files import (
    DRAFT,
    File,
    check_folder,
    make_folder,
    read,
    remove,
    sync_folder,
    untied_copies,
    verify,
    write,
)
from fedsim.base.machine import memory
from fedsim.base.reading import first_fault, open_regular, parse_json, read_regular
from fedsim.base.version import VERSION
from fedsim.errors import ConfigError, one_line
from fedsim.experiment.round_log import FIELDS
from fedsim.experiment.round_log import NAME as LOG
from fedsim.federated.federation import SAVED
from fedsim.federated.message import check_stored
from fedsim.federated.simulation import Round, Simulation
from fedsim.federated.store import SEGMENT_NAME
from fedsim.types import State, form_of

MAX_BYTES = 2**25  # of N.json
MIN_LINE_BYTES, MAX_LINE_BYTES = 100, 2**28  # of rounds.jsonl, whose names alone have more than the first
NAME = re.compile(r"[0-9]{6,}\.json")
SERVER = re.compile(r"server-[0-9]{6,}\.safetensors")
HARMLESS_SETTINGS = (  # that do not change what is learned, or only from now on
    *("rounds", "runtime", "failures", "checkpoint", "client_store", "hooks"),
    *("evaluate.every", "evaluate.batch_size", "evaluate.clients", "evaluate.mode"),
    *("data.root", "data.path", "data.cache", "data.download"),
)

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Line: Any = create_model("Line", __config__=STRICT, **FIELDS)


class Checkpoint(BaseModel):
    """What N.json holds."""

    model_config = STRICT

    format: Literal[1] = 1
    round: Annotated[int, Ge(0)]  # how many are done
    clock: Annotated[float, Ge(0), Lt(1e300)]
    seconds: Annotated[float, Ge(0), Lt(1e300)]  # that the run has taken
    last: Line | None  # the last round's result, if rounds.jsonl has no line of it yet
    stopped: str | None  # why, where a hook or the strategy has ended the run
    config: dict[str, Any]
    versions: dict[str, str]
    data: str  # hash of labels and owners, and of the constants of the networks
    log: File  # rounds.jsonl, as far as it went
    server: File
    clients: list[File]  # the oldest first
    runtime: dict[str, Any] | None = None  # what `auto` chose, or the nodes of `flower`
    partition: str | None = None  # SHA-256 of partition.json; older versions did not write it

    @property
    def logged(self) -> int:
        """How many rounds rounds.jsonl had a line of."""
        return self.round - (self.last is not None)


class Checkpoints:
    """The checkpoints of one run, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._segments: dict[str, set[str]] = {}  # the segments that each checkpoint needs

    def save(self, simulation: Simulation, log: File, keep: int, **about: Any) -> None:
        """Write a checkpoint, and keep the newest `keep` ones; raises OSError, and leaves the others whole.

        Of the client store only what changed is written. `about` holds the other fields of Checkpoint: config,
        data, last, stopped, seconds.
        """
        make_folder(self.folder)
        clients = simulation.clients.flush()
        path = self.folder / f"server-{simulation.number:06}.safetensors"
        server = write(path, save(untied_copies(simulation.server | simulation.past.saved())), sync_name=False)
        checkpoint = Checkpoint(
            round=simulation.number,
            clock=simulation.clock,
            versions=versions(),
            log=log,
            server=server,
            clients=clients,
            runtime=simulation.runtime.choice,
            **about,
        )
        write(self.folder / f"{simulation.number:06}.json", _signed(checkpoint))
        self._segments[f"{simulation.number:06}.json"] = {file.name for file in clients}
        self._sweep(simulation, keep)

    @property
    def newest(self) -> int:
        """The round of the newest checkpoint, whole or not; 0 where there is none."""
        return max((int(path.stem) for path in self._found()), default=0)

    def latest(
        self, log_folder: Path, max_round: int | None = None
    ) -> tuple[tuple[Checkpoint, State] | None, list[str]]:
        """The newest whole checkpoint with the server's state, and what is wrong with newer ones, in words.

        With `max_round` the newest one of at most that round. None where there are no such checkpoints; raises
        ConfigError where all are broken. A file is read once, however many checkpoints name it.
        """
        found = [path for path in self._found() if max_round is None or int(path.stem) <= max_round]
        named, broken = Named(self.folder, log_folder / LOG, found), list[str]()
        for path in found:
            try:
                checkpoint = read_checkpoint(path)
                named.check(checkpoint)
                server = load(read(self.folder, checkpoint.server))
                return (checkpoint, server), [f"{line}; goes on after round {checkpoint.round}" for line in broken]
            except ConfigError:
                raise
            except (ValueError, KeyError, SafetensorError) as error:  # KeyError: a type that torch does not have
                broken.append(f"{path}: broken checkpoint: {one_line(error)}")
        if broken:
            raise ConfigError(f"{broken[0]}; no other is whole; {_way_out(log_folder, self.folder)}")
        return None, []

    def restore(self, simulation: Simulation, checkpoint: Checkpoint, server: State) -> None:
        """Give a new simulation the state of a checkpoint; raises ConfigError where that has another form."""
        past = {name: server[name] for name in SAVED if name in server}
        server = {name: value for name, value in server.items() if name not in past}
        try:
            check_stored("the server's state is", form_of(server), form_of(simulation.server))
            if past:
                simulation.past.restore(past)
        except ValueError as error:
            raise ConfigError(f"{self.folder}: {error}") from None
        for path in self._found():
            if int(path.stem) > checkpoint.round:  # broken
                remove(path)
        for path in self._found():
            with suppress(ValueError):  # this one is broken too, and will not be read again
                self._segments[path.name] = {file.name for file in read_checkpoint(path).clients}
        last = _last(checkpoint)
        self._restore_clients(simulation, checkpoint.clients, last.get("cohort", ()))
        simulation.server = {name: server[name].to(simulation.runtime.home) for name in simulation.server}
        simulation.number, simulation.clock = checkpoint.round, checkpoint.clock
        simulation.last = Round(**last) if last else None
        self._settle(simulation)

    def start(self, simulation: Simulation) -> None:
        """Prepare a run that begins with its first round: delete what an earlier, killed one left."""
        make_folder(self.folder)
        for path in self._found():
            remove(path)
        sync_folder(self.folder.parent)
        self._restore_clients(simulation, [])
        self._settle(simulation)

    def _restore_clients(self, simulation: Simulation, files: list[File], others: Iterable[int] = ()) -> None:
        clients = simulation.clients
        clients.folder, clients.pinned = self.folder, set().union(*self._segments.values())
        try:
            clients.restore(files)
            for client in list(clients)[:1]:
                check_stored("a client keeps", form_of(clients[client]), form_of(simulation.initial_client))
        except ValueError as error:
            raise ConfigError(f"{self.folder}: {error}") from None
        for client in [*clients, *others]:
            if not 0 <= client < simulation.data.num_clients:
                raise ConfigError(f"{self.folder}: knows of client {client}, and there is no such client")

    def _settle(self, simulation: Simulation) -> None:
        simulation.runtime.checkpointed_rounds([int(path.stem) for path in self._found()])

    def _found(self) -> list[Path]:
        """The files N.json, the newest first; raises ConfigError where their folder is none, or a link to one."""
        check_folder(self.folder)
        names = list[str]()
        with suppress(FileNotFoundError):
            names = [name for name in os.listdir(self.folder) if NAME.fullmatch(name)]
        return [self.folder / name for name in sorted(names, key=lambda name: int(name[:-5]), reverse=True)]

    def _sweep(self, simulation: Simulation, keep: int) -> None:
        """Delete all but the newest checkpoints, and the files that only the deleted ones needed."""
        found = self._found()
        for path in found[keep:]:
            remove(path)
            self._segments.pop(path.name, None)
        servers = {f"server-{path.stem}.safetensors" for path in found[:keep]}
        for path in self.folder.iterdir():
            if path.name.endswith(DRAFT) or (SERVER.fullmatch(path.name) and path.name not in servers):
                remove(path)
        simulation.clients.pinned = set().union(*self._segments.values())
        simulation.clients.tidy()
        self._settle(simulation)


class Named:
    """The files that checkpoints name, in `folder` and at `log`; each is read once, however many name it.

    Raises ConfigError where rounds.jsonl cannot be read, for then none of the checkpoints `found` can be used.
    """

    def __init__(self, folder: Path, log: Path, found: list[Path]):
        self.folder, self._logs, self._digests = folder, _logs(log, found), dict[str, str]()

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError where rounds.jsonl, or a file of clients' states, is not what it was."""
        self.check_log(checkpoint)
        for file in checkpoint.clients:
            verify(self.folder, file, self._digests)

    def check_log(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError where the lines that there were at a checkpoint are not what they were."""
        if checkpoint.logged not in self._logs:
            raise ValueError(f"{LOG} has fewer than {checkpoint.logged} rounds")
        if self._logs[checkpoint.logged] != checkpoint.log:
            raise ValueError(f"{LOG} has changed since it was written")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The settings that differ: those that change the result, and those that do not."""
    a, b = dict(_flat(before)), dict(_flat(now))
    result, free = list[str](), list[str]()
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            was, new = (json.dumps(values[key]) if key in values else "not set" for values in (a, b))
            harmless = any(key == name or key.startswith(f"{name}.") for name in HARMLESS_SETTINGS)
            (free if harmless else result).append(f"{key}: {new}, and was {was}")
    return result, free


def versions() -> dict[str, str]:
    """The versions of the packages on which results depend."""
    packages = {name: version(name) for name in ("torch", "numpy")}
    return {"fedsim": VERSION} | packages | {"python": platform.python_version()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _signed(checkpoint: Checkpoint) -> bytes:
    values = checkpoint.model_dump(mode="json")
    return json.dumps({"sha256": _sha256(values), "checkpoint": values}, indent=1).encode()


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _last(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.last.model_dump() if checkpoint.last else {}


def _logs(path: Path, found: list[Path]) -> dict[int, File]:
    """rounds.jsonl up to the end of some line, by the number of lines: all that these checkpoints may name.

    Raises ConfigError where it cannot be read.
    """
    logs = dict[int, File]()
    wanted = {int(each.stem) - more for each in found for more in (0, 1)}  # of one more there may be no line yet
    if not found:
        return logs
    try:
        with open_regular(path) as file:
            if (length := os.fstat(file.fileno()).st_size) > memory():
                raise OSError(errno.EFBIG, f"has {length} bytes; more than this machine's memory")
            digest, length = hashlib.sha256(), 0
            for rounds in range(max(wanted) + 1):
                if rounds in wanted:
                    logs[rounds] = File(LOG, length, digest.hexdigest())
                line = file.readline(MAX_LINE_BYTES)
                if len(line) < MIN_LINE_BYTES or not line.endswith(b"\n"):
                    break
                digest.update(line)
                length += len(line)
    except OSError as error:
        why = f"{path}: {error.strerror}; no checkpoint can be used without it"
        raise ConfigError(f"{why}; {_way_out(path.parent, found[0].parent)}") from None
    return logs


def _way_out(run: Path, checkpoints: Path) -> str:
    """What to do where no checkpoint can be used. Without any, a run starts over, and a finished one does not."""
    over = train_again(run) if (run / "summary.json").exists() else f"delete {checkpoints} to start over"
    return f"put the original files back, or {over}"


def train_again(run: Path) -> str:
    """How the rounds of a run are run anew, in another folder."""
    return f"train again: fedsim run {run / 'config.yaml'}"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read N.json; raises ValueError where it cannot be read, or is not whole."""
    try:
        signed = parse_json(read_regular(path, MAX_BYTES))
        if signed["sha256"] != _sha256(signed["checkpoint"]):
            raise ValueError("is not what it was when it was written")
        if signed["checkpoint"]["format"] != Checkpoint.model_fields["format"].default:
            raise ConfigError(
                f"{path}: was written by another version of fedsim, in format {signed['checkpoint']['format']}"
            )
        checkpoint = Checkpoint.model_validate_json(json.dumps(signed["checkpoint"]))
    except ConfigError:
        raise
    except OSError as error:
        raise ValueError(error.strerror) from None
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
    except (KeyError, TypeError, RecursionError):
        raise ValueError("is no checkpoint") from None
    if checkpoint.round != int(path.stem):
        raise ValueError(f"is of round {checkpoint.round}")
    if _last(checkpoint).get("round", checkpoint.round) != checkpoint.round:
        raise ValueError(f"has done {checkpoint.round} rounds, and its last one is another")
    server, segments = f"server-{checkpoint.round:06}.safetensors", [file.name for file in checkpoint.clients]
    wrong = [name for name in segments if not SEGMENT_NAME.fullmatch(name)]  # which may lead out of the folder
    wrong += [n for n, right in ((checkpoint.log.name, LOG), (checkpoint.server.name, server)) if n != right]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no name of such a file")
    if len(set(segments)) < len(segments):
        raise ValueError("names a file of clients' states twice")
    return checkpoint
