"""What a run's folder holds, and whether that is whole: `fedsim check`.

It only reads. The folder may come from elsewhere: nothing is opened through a link, and what the config names as
`package.module:attribute` is not imported. Every file is hashed once, however many checkpoints refer to it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from fedsim.base.files import DRAFT, check_folder, is_locked
from fedsim.base.own_code import unread
from fedsim.base.reading import MAX_YAML_BYTES, parse, parse_json
from fedsim.errors import ConfigError, one_line
from fedsim.experiment import model_file
from fedsim.experiment.check_files import (
    FAULTS,
    MAX_ENTRIES,
    SHA256,
    NotCheckedError,
    check_nodes,
    check_png,
    check_record,
    content_of,
    count_events,
    entries,
    in_words,
)
from fedsim.experiment.checked import CheckedRun, Part, RunState
from fedsim.experiment.checkpoint import MAX_BYTES as MAX_CHECKPOINT_BYTES
from fedsim.experiment.checkpoint import NAME, Checkpoint, Named, changes, read_checkpoint
from fedsim.experiment.config import Config, load
from fedsim.experiment.figures import repeated
from fedsim.experiment.folder import CHECKPOINTS, Line
from fedsim.federated.simulation import fingerprint_of
from fedsim.report.runs import MAX_BYTES, parse_record
from fedsim.types import Count

MAX_CHECKPOINTS = 1000  # that are read, the newest ones
MAX_JSON_BYTES = 2**28  # of their files N.json
MODEL, EMA, LOG, SUMMARY = "model.safetensors", "ema.safetensors", "rounds.jsonl", "summary.json"
ON_NODES = ("flower", "ray")  # runtimes that need a package which may not be installed here

Progress = Callable[[int, int], None]  # bytes that are hashed, and how many will be


class Partition(BaseModel):
    """partition.json, as far as its numbers can be compared with each other."""

    model_config = ConfigDict(strict=True)

    clients: Count
    public: int
    classes: Count
    example: dict[str, Any]
    examples: int | None
    hash: str = "0" * 64
    labels: list[int] | None = None
    labels_by_client: list[list[int]] | None = None


class Saved(NamedTuple):
    """The fingerprints of the models in a checkpoint."""

    model: str
    ema: str | None


def check_run(folder: Path, progress: Progress = lambda done, total: None) -> CheckedRun:
    """Look at a run's folder; raises ConfigError where there is none."""
    if not (folder.is_dir() and os.path.lexists(folder / "config.yaml")):
        raise ConfigError(f"{folder}: is no folder of a run; it has no config.yaml")
    with unread():
        return _Check(folder, progress).checked()


class _Check:
    """One look at a folder. What several parts need is read once; what cannot be read raises in each of them."""

    def __init__(self, folder: Path, progress: Progress):
        self.folder, self.progress = folder, progress
        self.running = is_locked(folder)
        self.resumable = list[int]()
        self.done = 0  # bytes of the checkpoints' files

    def checked(self) -> CheckedRun:
        """All parts, in the order in which a run writes them."""
        parts = [
            _part("config.yaml", self.check_config),
            _part("partition.json", self.check_partition),
            _part(LOG, self.check_log),
            *self.checkpoint_parts(),
        ]
        if self.ended or self.has(MODEL):
            parts.append(_part(MODEL, self.check_model))
        if self.ended:
            parts += self.end_parts()
        if self.state == "finished":
            parts.append(_part(SUMMARY, self.check_summary))
        elif self.state == "interrupted" and self.over:
            parts.append(Part(SUMMARY, "missing", "all rounds are done; a resume writes it"))
        drafts = sorted(name for name in entries(self.folder) if name.endswith(DRAFT))
        if drafts and not self.running:
            parts.append(Part(drafts[0], "left over", "of a process that was killed"))
        planned = self.known_config.rounds if self.known_config else None
        resumable = self.resumable if self.known_config else []
        return CheckedRun(self.folder, self.state, parts, len(self.known_records), planned, resumable)

    def has(self, name: str) -> bool:
        """Whether something of that name is there."""
        return os.path.lexists(self.folder / name)

    @cached_property
    def state(self) -> RunState:
        """How the run ended; a model of another round than the last is of an earlier stop."""
        if self.running:
            return "running"
        if self.has(SUMMARY):
            return "finished"
        last = self.newest
        if not self.has(MODEL) or last is None or len(self.known_log) != last.log.bytes:
            return "killed"
        with suppress(*FAULTS, NotCheckedError):
            return "interrupted" if self.model == self.fingerprints.get(last.round) else "killed"
        return "interrupted"

    @property
    def ended(self) -> bool:
        """Whether it has written what a run writes at its end."""
        return self.state in ("finished", "interrupted")

    @property
    def over(self) -> bool:
        """Whether there are no rounds left."""
        config, last = self.known_config, self.newest
        stopped = last is not None and last.stopped is not None
        return stopped or (config is not None and len(self.known_records) >= config.rounds)

    # The config and the data

    @cached_property
    def values(self) -> Any:
        """What stands in config.yaml."""
        values = parse(content_of(self.folder / "config.yaml", MAX_YAML_BYTES).decode(), "config.yaml")
        if json.loads(json.dumps(values)) != values:
            raise ValueError("has keys or values that are none of a config")
        return values

    @cached_property
    def config(self) -> Config:
        """The config, with what it names as package.module:attribute left as it is."""
        if not isinstance(self.values, dict):
            raise ValueError("is not a mapping")
        runtime = self.values.get("runtime")
        elsewhere = isinstance(runtime, dict) and runtime.get("name") in ON_NODES
        return load(self.values | ({"runtime": "serial"} if elsewhere else {}))

    @cached_property
    def known_config(self) -> Config | None:
        """The config, if it can be read."""
        with suppress(*FAULTS, NotCheckedError):
            return self.config
        return None

    def check_config(self) -> str:
        """Against the schema, and against what the last checkpoint says."""
        config, last = self.config, self.newest
        if last and not self.running and self.values != last.config:  # a resume changes the config first
            result, free = changes(last.config, self.values)
            if wrong := result + (free or ["a mapping is empty"] if self.ended else []):
                raise ValueError(f"is not the run's: {wrong[0]}")
        own = [*dict.fromkeys(_own_names(config.model_dump(mode="json")))]
        return f"names {', '.join(own)}, which was not imported" if own else ""

    def check_partition(self) -> str:
        """Its sums, and its hash in the last checkpoint."""
        content = content_of(self.folder / "partition.json", MAX_BYTES)
        found = Partition.model_validate(parse_json(content))
        labels, table = found.labels, found.labels_by_client
        sums = [] if table is None else [sum(column) for column in zip(*table, strict=True)]
        faults = {
            f"has {found.clients} clients": self.clients not in (None, found.clients),
            "hash is no SHA-256": not SHA256.fullmatch(found.hash),
            "labels are not as many as classes": labels and len(labels) != found.classes,
            "labels are not as many as examples": labels and sum(labels) + found.public != found.examples,
            "labels_by_client has other sums": table is not None and sums != labels,
            "has changed since it was written": self.newest
            and not self.running
            and self.newest.partition not in (None, hashlib.sha256(content).hexdigest()),
        }
        for fault, holds in faults.items():
            if holds:
                raise ValueError(fault)
        examples = "" if found.examples is None else f", {found.examples:,} examples"
        return f"{found.clients:,} clients{examples}"

    @property
    def clients(self) -> int | None:
        """How many there are, by the config."""
        return self.known_config.data["clients"] if self.known_config else None

    # The rounds

    @cached_property
    def log(self) -> bytes:
        """What rounds.jsonl holds."""
        return content_of(self.folder / LOG, MAX_BYTES)

    @cached_property
    def known_log(self) -> bytes:
        """The same, and nothing where it cannot be read."""
        with suppress(*FAULTS, NotCheckedError):
            return self.log
        return b""

    @cached_property
    def rounds(self) -> tuple[list[dict[str, Any]], str | None]:
        """The whole lines of rounds.jsonl up to the first that is wrong, and what is wrong there."""
        found, clock = list[dict[str, Any]](), 0.0
        for number, line in enumerate(self.known_log.split(b"\n")[:-1], 1):
            try:
                record = Line.model_validate(parse_record(line)).model_dump()
                check_record(record, number, self.clients, clock)
            except FAULTS as error:
                return found, f"line {number}: {in_words(error)}"
            clock = record["clock"]
            found.append(record)
        return found, None

    @property
    def known_records(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl before one that is wrong."""
        return self.rounds[0]

    def check_log(self) -> str:
        """Every line, and that the last checkpoint knows all of them where the run has ended."""
        tail, (records, wrong) = self.log.rpartition(b"\n")[2], self.rounds
        if wrong:
            raise ValueError(wrong)
        if self.ended and tail:
            raise ValueError(f"its last line is cut after {len(tail)} bytes")
        if self.state == "finished" and self.newest and len(self.log) != self.newest.log.bytes:
            raise ValueError(f"has {len(self.log)} bytes; the last checkpoint knows {self.newest.log.bytes}")
        return f"{len(records)} rounds{', and a part of a line' if tail else ''}"

    # The checkpoints

    @cached_property
    def names(self) -> list[str]:
        """What lies in checkpoints/."""
        path = self.folder / CHECKPOINTS
        check_folder(path)
        names = entries(path)
        if len(names) > MAX_ENTRIES:
            raise NotCheckedError(f"has more than {MAX_ENTRIES:,} files")
        return names

    @cached_property
    def numbered(self) -> list[str]:
        """The names N.json, the newest first."""
        with suppress(*FAULTS, NotCheckedError):
            return sorted(filter(NAME.fullmatch, self.names), key=lambda name: -int(name.partition(".")[0]))
        return []

    @cached_property
    def read(self) -> dict[str, Checkpoint | Exception]:
        """By these names the checkpoint, or why there is none; not the older ones of very many."""
        found, room = dict[str, Checkpoint | Exception](), MAX_JSON_BYTES
        for name in self.numbered[:MAX_CHECKPOINTS]:
            path = self.folder / CHECKPOINTS / name
            try:
                room -= min(os.lstat(path).st_size, MAX_CHECKPOINT_BYTES)
                if room < 0:
                    break
                found[name] = read_checkpoint(path)
            except FAULTS as error:
                found[name] = error
        return found

    @cached_property
    def whole(self) -> list[Checkpoint]:
        """Those that are whole, whatever their files hold, the newest first."""
        return [each for each in self.read.values() if isinstance(each, Checkpoint)]

    @cached_property
    def newest(self) -> Checkpoint | None:
        """The newest of them."""
        return self.whole[0] if self.whole else None

    @cached_property
    def named(self) -> Named:
        """The files that they name."""
        folder = self.folder / CHECKPOINTS
        return Named(folder, self.folder / LOG, [folder / name for name in self.read])

    @cached_property
    def total(self) -> int:
        """The bytes of all of these."""
        return sum(
            {file.name: file.bytes for each in self.whole for file in (each.server, *each.clients)}.values()
        )

    def hashed(self, count: int) -> None:
        """Say how far it is."""
        self.done += count
        self.progress(self.done, self.total)

    @cached_property
    def saved(self) -> dict[str, Saved | Exception]:
        """The fingerprints of the models in the servers' files, by the files' names."""
        found = dict[str, Saved | Exception]()
        for each in self.whole:
            try:
                found[each.server.name] = self.saved_models(each)
            except (*FAULTS, NotCheckedError) as error:
                found[each.server.name] = error
        return found

    def saved_models(self, checkpoint: Checkpoint) -> Saved:
        """The fingerprints in one server's file."""
        content = content_of(self.folder / CHECKPOINTS / checkpoint.server.name)
        try:
            server = load_tensors(content)
            ema = {name: server[f"ema.{name}"] for name in ("model", "buffers")} if "ema.model" in server else None
            return Saved(fingerprint_of(server), None if ema is None else fingerprint_of(ema))
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{checkpoint.server.name}: is no server's state: {one_line(error)}") from None

    @cached_property
    def fingerprints(self) -> dict[int, str]:
        """That of the model after each round, by rounds.jsonl, by checkpoints where it has none."""
        found = dict[int, str]()
        for each in self.whole:
            if isinstance(saved := self.saved[each.server.name], Saved):
                found[each.round] = saved.model
        return found | {record["round"]: record["fingerprint"] for record in self.known_records}

    def checkpoint_parts(self) -> Iterator[Part]:
        """A part for each, then one for what belongs to none."""
        try:
            names = self.names
        except NotCheckedError as why:
            yield Part(CHECKPOINTS, "not checked", str(why))
            return
        except FAULTS as error:
            if self.state == "finished" or not isinstance(error, FileNotFoundError):
                yield _fault(CHECKPOINTS, error)
            return
        for name in self.read:
            part = _part(f"{CHECKPOINTS}/{name}", lambda name=name: self.check_checkpoint(name))  # type: ignore[misc]
            if self.running and not self.has(f"{CHECKPOINTS}/{name}"):
                continue  # the run has deleted it meanwhile
            yield part
        if self.state == "finished" and not self.read:
            yield Part(CHECKPOINTS, "missing", "the run cannot be made longer")
        if older := self.numbered[len(self.read) :]:
            yield Part(f"{CHECKPOINTS}/{older[0]}", "not checked", f"nor are {len(older) - 1:,} older ones")
            return
        needed = {file.name for each in self.whole for file in (each.server, *each.clients)}
        if not self.running and (others := sorted({*names} - needed - self.read.keys())):
            # A run that reaches its end leaves none; where a checkpoint cannot be read, they may be its files.
            state: Any = (
                "broken" if self.state == "finished" and len(self.whole) == len(self.read) else "left over"
            )
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            yield Part(f"{CHECKPOINTS}/{others[0]}{more}", state, "belongs to no checkpoint")

    def check_checkpoint(self, name: str) -> str:
        """Its files, and what they say beside each other; the run can be resumed where nothing is wrong."""
        found = self.read[name]
        if isinstance(found, Exception):
            raise found
        self.named.check(found, [found.server, *found.clients], self.hashed)
        saved, about = self.saved[found.server.name], f"after round {found.round}"
        last = found.last.model_dump()["fingerprint"] if found.last else self.fingerprints.get(found.round)
        if isinstance(saved, NotCheckedError):
            about += f"; its model was not compared: {found.server.name} {saved}"
        elif isinstance(saved, Exception):
            raise saved
        elif saved.model != last:
            raise ValueError(f"{found.server.name} holds another model than that of round {found.round}")
        nodes = check_nodes(found.runtime, self.clients)
        if self.known_config and (other := changes(found.config, self.values)[0]):
            return f"{about}, with other settings: {other[0]}"
        if nodes and found.clients and self.state == "finished" and found is not self.newest:
            return f"{about}; at the end of a run its nodes delete their states of it"
        self.resumable.append(found.round)
        states = f"; {len(found.clients)} files of clients' states" if found.clients else ""
        return f"{about}{states}{nodes}"

    # What is written at the end

    @cached_property
    def model(self) -> str:
        """The fingerprint of the tensors in model.safetensors."""
        return self.fingerprint_in(MODEL)

    def fingerprint_in(self, name: str) -> str:
        """That of the tensors in a file of a model."""
        vectors = model_file.vectors(content_of(self.folder / name))
        if vectors is None:
            if self.newest and self.newest.partition:  # by a version that writes both
                raise NotCheckedError("its network keeps some buffers out of files")
            raise NotCheckedError("it does not say where its tensors lie; an older version wrote it")
        return fingerprint_of(vectors)

    def check_model(self) -> str:
        """Its fingerprint against those of the rounds."""
        last = self.newest.round if self.newest else len(self.known_records)
        if self.model == self.fingerprints.get(last):
            return f"after round {last}"
        if self.ended:
            raise ValueError(f"is not the model after round {last}")
        earlier = [number for number, each in self.fingerprints.items() if each == self.model]
        return f"after round {max(earlier)}, from an earlier stop" if earlier else "from an earlier stop"

    def check_ema(self) -> str:
        """Its fingerprint against that in the last checkpoint."""
        found, last = self.fingerprint_in(EMA), self.newest
        saved = self.saved[last.server.name] if last else None
        if last is None or not isinstance(saved, Saved):
            raise NotCheckedError("there is no checkpoint to compare it with")
        if found != saved.ema:
            raise ValueError(f"is not the mean after round {last.round}")
        return f"after round {last.round}"

    def end_parts(self) -> Iterator[Part]:
        """What the config and its hooks ask for besides."""
        config = self.known_config
        if config is None:
            return
        if config.ema is not None:
            yield _part(EMA, self.check_ema)
        hooks = [hook["name"] for hook in config.hooks if isinstance(hook, dict)]
        if "curves" in hooks:
            yield _part("curves.png", self.check_picture)
        if "tensorboard" in hooks:
            yield _part("tensorboard/", self.check_events)

    def check_picture(self) -> str:
        """The check sums of its chunks."""
        check_png(content_of(self.folder / "curves.png", MAX_BYTES))
        return ""

    def check_events(self) -> str:
        """The check sums of its events, of which there is one a round after the first."""
        check_folder(folder := self.folder / "tensorboard")
        names = [name for name in entries(folder) if name.startswith("events.")]
        if len(names) != 1:
            raise ValueError(f"has {len(names)} files of events")
        count = count_events(content_of(folder / names[0], MAX_BYTES))
        if self.state == "finished" and count != len(self.known_records) + 1:
            raise ValueError(f"has the events of {count - 1} rounds")
        return ""

    def check_summary(self) -> str:
        """What follows from the rounds, and that the rest is numbers."""
        found = parse_json(content_of(self.folder / SUMMARY, MAX_BYTES))
        records, last = self.known_records, self.newest
        if not isinstance(found, Mapping):
            raise ValueError("is not a mapping")
        ema = self.known_config is not None and self.known_config.ema is not None
        known = repeated(records, ema=ema) | {"fingerprint": self.fingerprints.get(len(records))}
        if last:
            known["stopped"] = last.stopped
        for key, value in known.items():
            if key not in found or found[key] != value:
                raise ValueError(f"{key} is {one_line(found.get(key))}, by {LOG} it is {one_line(value)}")
        measured = [found.get(key) for key in ("seconds", "peak_memory_bytes")]
        if not all(isinstance(each, int | float) and each is not True and each >= 0 for each in measured):
            raise ValueError("seconds and peak_memory_bytes should be numbers")
        if not self.over and self.known_config:
            raise ValueError(f"has {len(records)} rounds, and the config {self.known_config.rounds}")
        return one_line(f"stopped: {found['stopped']}") if found["stopped"] else ""


def _part(name: str, look: Callable[[], str]) -> Part:
    try:
        return Part(name, "whole", look())
    except NotCheckedError as why:
        return Part(name, "not checked", str(why))
    except FAULTS as error:
        return _fault(name, error)


def _fault(name: str, error: Exception) -> Part:
    return Part(name, "missing") if isinstance(error, FileNotFoundError) else Part(name, "broken", in_words(error))


def _own_names(values: Any) -> Iterator[str]:
    """What a config names as package.module:attribute."""
    if isinstance(values, dict):
        if isinstance(name := values.get("name"), str) and ":" in name:
            yield name
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _own_names(value)
