"""Checkpoints: all that a run needs to go on as if it had never stopped.

Round N's is N.json, which names the other files with their lengths and SHA-256: the server's state, the segments
of the client store, and how much of rounds.jsonl there was. It is written last, so a checkpoint is whole or is not
there. Nothing in it is executed. Randomness has a key, so no generator is saved.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedsim.data import FederatedData
from fedsim.data.partition import content_hash
from fedsim.errors import ConfigError
from fedsim.files import DRAFT, File, apart, read, write
from fedsim.simulation import Round, Simulation
from fedsim.store import NAME as SEGMENT
from fedsim.types import Form, State, described, form_of

LARGEST = 2**28  # bytes of N.json
NAME = re.compile(r"\d{6,}\.json")
SERVER = re.compile(r"server-\d{6,}\.safetensors")
FREE = (  # settings that do not change what is learned, or only from now on
    *("rounds", "evaluate", "runtime", "failures", "checkpoint", "client_store", "hooks"),
    *("data.root", "data.path", "data.cache", "data.download"),
)


class Checkpoint(BaseModel):
    """What N.json holds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    round: Annotated[int, Ge(0)]  # that are done
    clock: float
    seconds: float  # that the run had taken
    last: dict[str, Any] | None  # the last round's result, where its line is not in rounds.jsonl yet
    config: dict[str, Any]
    versions: dict[str, str]
    data: str  # hash of labels and owners
    log: File  # rounds.jsonl, as far as it went
    server: File
    clients: list[File]  # the older first


class Checkpoints:
    """The checkpoints of one run, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._segments: dict[str, set[str]] = {}  # that each checkpoint needs

    def save(self, simulation: Simulation, log: File, keep: int, **about: Any) -> None:
        """Write what changed, and keep the newest so many; raises OSError, and leaves the others good.

        `about` has what else a Checkpoint holds: config, data, last, seconds.
        """
        self.folder.mkdir(exist_ok=True)
        clients = simulation.clients.flush()
        path = self.folder / f"server-{simulation.number:06}.safetensors"
        server = write(path, save(apart(simulation.server)), sync_name=False)
        checkpoint = Checkpoint(
            round=simulation.number,
            clock=simulation.clock,
            versions=versions(),
            log=log,
            server=server,
            clients=clients,
            **about,
        )
        write(self.folder / f"{simulation.number:06}.json", _signed(checkpoint))
        self._segments[f"{simulation.number:06}.json"] = {file.name for file in clients}
        self._sweep(simulation, keep)

    def latest(self, log_folder: Path) -> tuple[tuple[Checkpoint, State] | None, list[str]]:
        """The newest that is whole, with the server's state, and what is wrong with newer ones.

        None where there are no checkpoints; raises ConfigError where all are broken.
        """
        broken = list[str]()
        for path in self._found():
            try:
                checkpoint = _read(path)
                read(log_folder, checkpoint.log)
                for file in checkpoint.clients:
                    read(self.folder, file)
                return (checkpoint, load(read(self.folder, checkpoint.server))), broken
            except (ValueError, SafetensorError) as error:
                broken.append(f"{path}: broken checkpoint: {error}")
        if broken:
            raise ConfigError(f"{broken[0]}; no other is whole; delete {self.folder} to start over")
        return None, []

    def restore(self, simulation: Simulation, checkpoint: Checkpoint, server: State) -> None:
        """Put a new simulation where the checkpoint was made; raises ConfigError where it was of another kind."""
        _check_form(self.folder, "the server's state is", form_of(server), form_of(simulation.server))
        for path in self._found():
            try:
                self._segments[path.name] = {file.name for file in _read(path).clients}
            except ValueError:
                continue  # and never read again
        for path in self._found():
            if int(path.stem) > checkpoint.round:  # broken
                path.unlink()
        self._restore_clients(simulation, checkpoint.clients)
        simulation.server = {name: server[name].to(simulation.runtime.home) for name in simulation.server}
        simulation.number, simulation.clock = checkpoint.round, checkpoint.clock
        simulation.last = Round(**checkpoint.last) if checkpoint.last else None

    def start(self, simulation: Simulation) -> None:
        """Let a run begin that has no checkpoint; what one that was killed has left goes."""
        self.folder.mkdir(exist_ok=True)
        self._restore_clients(simulation, [])

    def _restore_clients(self, simulation: Simulation, files: list[File]) -> None:
        clients = simulation.clients
        clients.folder, clients.pinned = self.folder, set().union(*self._segments.values())
        try:
            clients.restore(files)
        except ValueError as error:
            raise ConfigError(f"{self.folder}: {error}") from None
        for client in list(clients)[:1]:
            _check_form(self.folder, "a client keeps", form_of(clients[client]), form_of(simulation.newcomer))

    def _found(self) -> list[Path]:
        """The newest first."""
        paths = [path for path in self.folder.glob("*.json") if NAME.fullmatch(path.name)]
        return sorted(paths, key=lambda path: int(path.stem), reverse=True)

    def _sweep(self, simulation: Simulation, keep: int) -> None:
        """Delete all but the newest checkpoints, and the files that only the deleted ones needed."""
        found = self._found()
        for path in found[keep:]:
            path.unlink()
            self._segments.pop(path.name, None)
        servers = {f"server-{path.stem}.safetensors" for path in found[:keep]}
        for path in self.folder.iterdir():
            if path.name.endswith(DRAFT) or (SERVER.fullmatch(path.name) and path.name not in servers):
                path.unlink()
        simulation.clients.pinned = set().union(*self._segments.values())
        simulation.clients.tidy()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The settings that differ: those that change the result, and those that do not."""
    a, b = dict(_flat(before)), dict(_flat(now))
    result, free = list[str](), list[str]()
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            was, new = (json.dumps(values[key]) if key in values else "not set" for values in (a, b))
            harmless = any(key == name or key.startswith(f"{name}.") for name in FREE)
            (free if harmless else result).append(f"{key}: {new}, and was {was}")
    return result, free


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def data_hash(data: FederatedData) -> str:
    """SHA-256 of the training labels and of who owns each example."""
    labels = data.labels.cpu().numpy().astype("<i8")
    return hashlib.sha256(content_hash(data.owners).encode() + labels.tobytes()).hexdigest()


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_form(folder: Path, what: str, found: Form, made: Form) -> None:
    if found != made:
        raise ConfigError(f"{folder}: {what} {described(found)}; by this config it would be {described(made)}")


def _signed(checkpoint: Checkpoint) -> bytes:
    values = checkpoint.model_dump(mode="json")
    return json.dumps({"sha256": _sha256(values), "checkpoint": values}, indent=1).encode()


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read(path: Path) -> Checkpoint:
    """Raises ValueError where it is not whole."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"is larger than {LARGEST} bytes")
        signed = json.loads(path.read_bytes())
        if signed["sha256"] != _sha256(signed["checkpoint"]):
            raise ValueError("is not what it was when it was written")
        checkpoint = Checkpoint.model_validate_json(json.dumps(signed["checkpoint"]))
    except OSError as error:
        raise ValueError(error.strerror) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (KeyError, TypeError, RecursionError):
        raise ValueError("is no checkpoint") from None
    files = [checkpoint.log, checkpoint.server, *checkpoint.clients]
    for file, name in zip(files, [re.compile("rounds.jsonl"), SERVER, *[SEGMENT] * len(files[2:])], strict=True):
        if not name.fullmatch(file.name):  # nor does it lead out of the folder
            raise ValueError(f"{file.name!r} is no name of such a file")
    return checkpoint
