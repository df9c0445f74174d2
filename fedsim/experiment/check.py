"""What a run's folder holds, and whether that is whole: `fedsim check`.

It only reads. The folder may come from elsewhere: nothing is opened through a link, and what the config names as
`package.module:attribute` is not imported.

Of two files that disagree, the one whose own SHA-256 holds is right: a checkpoint decides on config.yaml,
partition.json, rounds.jsonl and the files that it names, and rounds.jsonl on summary.json. What cannot be
compared, because the other file is damaged, is not checked: each damage is one fault.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from fedsim.base.files import DRAFT, check_folder, is_locked
from fedsim.base.own_code import unread
from fedsim.base.reading import MAX_YAML_BYTES, in_words, parse, parse_json
from fedsim.errors import ConfigError, one_line
from fedsim.experiment import model_file
from fedsim.experiment.check_checkpoints import FoundCheckpoints, Models, Progress, files_of
from fedsim.experiment.check_files import (
    FAULTS,
    NotCheckedError,
    UnusableError,
    check_nodes,
    check_png,
    content_of,
    count_events,
    entries,
)
from fedsim.experiment.checked import EVENTS, PICTURE, CheckedRun, Numbers, Part, PartState, RunState
from fedsim.experiment.checkpoint import Checkpoint, changes
from fedsim.experiment.config import Config, load, num_new_clients
from fedsim.experiment.figures import repeated
from fedsim.experiment.folder import CHECKPOINTS, CONFIG, EMA, MODEL, PARTITION, SUMMARY
from fedsim.experiment.round_log import NAME as LOG
from fedsim.experiment.round_log import SHA256, read_rounds
from fedsim.experiment.run import Record
from fedsim.federated.simulation import fingerprint_of
from fedsim.report.runs import MAX_BYTES
from fedsim.types import Count

ON_NODES = ("flower", "ray")  # runtimes that need a package which may not be installed here


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


class Seen(NamedTuple):
    """What a whole part holds, in words, and the numbers among them."""

    about: str = ""
    numbers: Numbers | None = None


class Log(NamedTuple):
    """What rounds.jsonl holds."""

    records: list[Record]  # of the lines before the first that is wrong
    fault: Exception | None  # what is wrong, or why it was not read
    tail: int  # bytes of a last line that is not whole


def check_run(folder: Path, progress: Progress = lambda done, total: None) -> CheckedRun:
    """Look at a run's folder; raises ConfigError where there is none."""
    if not (folder.is_dir() and os.path.lexists(folder / CONFIG)):
        raise ConfigError(f"{folder}: is no folder of a run; it has no {CONFIG}")
    with unread():
        return _Check(folder, progress).checked()


class _Check:
    """One look at a folder, at one part after the other. Later ones are compared with earlier ones."""

    def __init__(self, folder: Path, progress: Progress):
        self.folder, self.running = folder, is_locked(folder)
        self.finished = not self.running and self.has(SUMMARY)
        self.saved = FoundCheckpoints(folder, self.finished, self.running, progress)
        self.newest = self.saved.newest
        self.parts = dict[str, Part]()
        self.resumable = list[int]()

    def checked(self) -> CheckedRun:
        """All parts, in the order in which a run writes them."""
        self.look(CONFIG, self.check_config)
        self.look(PARTITION, self.check_partition)
        self.look(LOG, self.check_log)
        self.look_at_checkpoints()
        if self.ended or self.has(MODEL):
            self.look(MODEL, self.check_model)
        if self.ended:
            self.look_at_end()
        drafts = sorted(name for name in entries(self.folder) if name.endswith(DRAFT))
        if drafts and not self.running:
            self.add(drafts[0], "left over", "of a process that was killed")
        planned = self.settings.rounds if self.settings else None
        resumable = [] if self.parts[CONFIG].damaged else self.resumable
        return CheckedRun(
            self.folder,
            self.state,
            [*self.parts.values()],
            self.rounds,
            planned,
            self.over,
            resumable,
            ended_by_strategy=any("stopped" in record for record in self.log[0][-1:]),
        )

    def has(self, name: str) -> bool:
        """Whether something of that name is there."""
        return os.path.lexists(self.folder / name)

    def add(
        self, name: str, state: PartState, about: str = "", numbers: Numbers | None = None, spare: bool = False
    ) -> None:
        """Add what was found."""
        self.parts[name] = Part(name, state, about, numbers or {}, spare)

    def look(self, name: str, check: Callable[[], Seen], spare: bool = False) -> None:
        """Add what `check` says of a part, or what it raises."""
        try:
            self.add(name, "whole", *check())
        except (*FAULTS, NotCheckedError, UnusableError) as error:
            self.add_fault(name, error, spare)

    def add_fault(self, name: str, error: Exception, spare: bool = False) -> None:
        """Add a part that is not whole, or of which this is not known."""
        if isinstance(error, NotCheckedError | UnusableError):
            self.add(name, "not checked" if isinstance(error, NotCheckedError) else "unusable", str(error))
        elif isinstance(error, FileNotFoundError):
            self.add(name, "missing", spare=spare)
        else:
            self.add(name, "broken", in_words(error), spare=spare)

    def need(self, name: str) -> None:
        """Raise NotCheckedError unless another part is whole."""
        if (state := self.parts[name].state) != "whole":
            raise NotCheckedError(f"{name} is {state}")

    def need_newest(self) -> Checkpoint | None:
        """The newest checkpoint, None where there is none; raises NotCheckedError where it is damaged."""
        if self.newest is None and self.saved.numbered:
            raise NotCheckedError(f"{CHECKPOINTS}/{self.saved.numbered[0]} is damaged")
        return None if self.running else self.newest  # a run may write a newer one now

    # How the run ended

    @cached_property
    def state(self) -> RunState:
        """How the run ended; a model of another round than the last is of an earlier stop."""
        if self.running or self.finished:
            return "running" if self.running else "finished"
        known = self.newest.log.bytes if self.newest else self.log_bytes
        if not self.has(MODEL) or not self.saved.numbered or self.log_bytes > known:
            return "killed"
        with suppress(*FAULTS, NotCheckedError):
            return "interrupted" if self.model == self.last_model[1] else "killed"
        return "interrupted"

    @property
    def ended(self) -> bool:
        """Whether it has written what a run writes at its end."""
        return self.state in ("finished", "interrupted")

    @property
    def rounds(self) -> int:
        """How many are done."""
        records, fault, _ = self.log
        return self.newest.logged if fault and self.newest else len(records)

    @property
    def over(self) -> bool:
        """Whether there are no rounds left."""
        stopped = self.newest is not None and self.newest.stopped is not None
        return stopped or (self.settings is not None and self.rounds >= self.settings.rounds)

    # The config and the data

    @cached_property
    def values(self) -> Any:
        """What stands in config.yaml."""
        values = parse(content_of(self.folder / CONFIG, MAX_YAML_BYTES).decode(), CONFIG)
        if json.loads(json.dumps(values)) != values:
            raise ValueError("has keys or values that are none of a config")
        return values

    def check_config(self) -> Seen:
        """Against the schema, and against what the last checkpoint says."""
        config, about = _loaded(self.values), list[str]()
        if newest := self.need_newest():
            result, free = changes(newest.config, self.values)
            if not (result or free) and self.values != newest.config:
                result = ["a mapping is empty"]
            if result:
                raise ValueError(f"is not the run's: {result[0]}")
            about += [f"changed since the last checkpoint: {change}" for change in free[:1]]  # as by a resume
        if own := [*dict.fromkeys(_own_names(config.model_dump(mode="json")))]:
            about.append(f"names {', '.join(own)}, which was not imported")
        return Seen("; ".join(about))

    @cached_property
    def settings(self) -> Config | None:
        """The run's config, if it is known: where config.yaml is damaged, it is in the newest checkpoint."""
        with suppress(*FAULTS, NotCheckedError):
            return _loaded(self.newest.config if self.newest and self.parts[CONFIG].damaged else self.values)
        return None

    @property
    def clients(self) -> int | None:
        """How many train, by the config."""
        return self.settings.data["clients"] - num_new_clients(self.settings) if self.settings else None

    def check_partition(self) -> Seen:
        """Its sums, and its hash in the last checkpoint."""
        content = content_of(self.folder / PARTITION, MAX_BYTES)
        found = Partition.model_validate(parse_json(content))
        labels, table = found.labels, found.labels_by_client
        sums = [] if table is None else [sum(column) for column in zip(*table, strict=True)]
        newest = self.need_newest()
        known = newest.partition if newest else None
        faults = {
            "has changed since it was written": known not in (None, hashlib.sha256(content).hexdigest()),
            f"has {found.clients} clients": self.clients not in (None, found.clients),
            "hash is no SHA-256": not SHA256.fullmatch(found.hash),
            "labels are not as many as classes": labels and len(labels) != found.classes,
            "labels are not as many as examples": labels and sum(labels) + found.public != found.examples,
            "labels_by_client has other sums": table is not None and sums != labels,
        }
        for fault, holds in faults.items():
            if holds:
                raise ValueError(fault)
        numbers = {"clients": found.clients}
        if found.examples is None:
            return Seen(f"{found.clients:,} clients", numbers)
        return Seen(
            f"{found.clients:,} clients, {found.examples:,} examples", numbers | {"examples": found.examples}
        )

    # The rounds

    @cached_property
    def log(self) -> Log:
        """What rounds.jsonl holds."""
        records, tail = list[Record](), 0
        fault: Exception | None = None
        try:
            content = content_of(self.folder / LOG, MAX_BYTES)
            tail = len(content) - content.rfind(b"\n") - 1
            for record in read_rounds(content, self.clients):
                records.append(record)
        except (*FAULTS, NotCheckedError) as error:
            fault = error
        if wrong := self.saved.log_fault:
            records = records[: self.saved.log_lines]
            fault = fault if isinstance(fault, FAULTS) else ValueError(wrong)
        return Log(records, fault, tail)

    @cached_property
    def log_bytes(self) -> int:
        """The length of rounds.jsonl."""
        with suppress(OSError):
            return os.lstat(self.folder / LOG).st_size
        return 0

    def check_log(self) -> Seen:
        """Every line, its hash in each checkpoint, and that the last one knows all of a finished run."""
        records, fault, tail = self.log
        if isinstance(fault, NotCheckedError):
            raise NotCheckedError(f"{fault}; its lines were not read, and checkpoints agree with it")
        if fault:
            raise fault
        if self.ended and tail:
            raise ValueError(f"its last line is cut after {tail} bytes")
        newest = self.need_newest()
        if self.finished and newest and self.log_bytes > newest.log.bytes:
            raise ValueError(f"has {len(records)} rounds; the last checkpoint knows {newest.logged}")
        more = {"bytes_of_a_part": tail} if tail else {}
        return Seen(
            f"{len(records)} rounds{', and a part of a line' if tail else ''}", {"rounds": len(records), **more}
        )

    @cached_property
    def fingerprints(self) -> dict[int, str]:
        """That of the model after each round, by checkpoints and by the right lines of rounds.jsonl."""
        models = {each.round: self.saved.models[each.server] for each in self.saved.whole}
        known = {number: found.model for number, found in models.items() if isinstance(found, Models)}
        return known | {record["round"]: record["fingerprint"] for record in self.log.records}

    @property
    def last_model(self) -> tuple[int, str]:
        """The round in which the run ended, and the fingerprint after it; raises NotCheckedError."""
        number = self.newest.round if self.newest else len(self.log.records)
        if (self.newest is None and self.log.fault) or number not in self.fingerprints:
            raise NotCheckedError(f"{LOG} is damaged")
        return number, self.fingerprints[number]

    # The checkpoints

    def look_at_checkpoints(self) -> None:
        """A part for each N.json, one for each damaged file that they name, and one for the rest."""
        saved = self.saved
        if saved.fault:
            if self.finished or not isinstance(saved.fault, FileNotFoundError):
                self.add_fault(CHECKPOINTS, saved.fault)
            return
        for name, found in saved.read.items():
            spare = bool(self.resumable)  # from a newer one
            self.look(f"{CHECKPOINTS}/{name}", partial(self.check_checkpoint, found), spare)
        needed = files_of(saved.whole)
        spare = self.newest is not None and self.newest.round in self.resumable
        for file in filter(saved.damaged.get, needed):
            state: PartState = "broken" if self.has(f"{CHECKPOINTS}/{file.name}") else "missing"
            self.add(f"{CHECKPOINTS}/{file.name}", state, saved.damaged[file], spare=spare)
        if self.finished and not saved.numbered:
            self.add(CHECKPOINTS, "missing", "the run cannot be made longer")
        if older := saved.numbered[len(saved.read) :]:
            about, numbers = f"nor are {len(older) - 1:,} older ones", {"checkpoints": len(older)}
            self.add(f"{CHECKPOINTS}/{older[0]}", "not checked", about, numbers)
        elif not self.running:
            self.add_rest(sorted({*saved.names} - {file.name for file in needed} - {*saved.numbered}))

    def add_rest(self, names: list[str]) -> None:
        """What belongs to no checkpoint, or to one that is damaged."""
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            whole = len(self.saved.whole) == len(self.saved.read)
            about = "belongs to no checkpoint" if whole else "belongs to no whole checkpoint"
            self.add(f"{CHECKPOINTS}/{names[0]}{more}", "left over", about, {"files": len(names)})

    def check_checkpoint(self, found: Checkpoint | Exception) -> Seen:
        """Its files, and what they say beside each other; the run can be resumed where nothing is wrong."""
        if isinstance(found, Exception):
            raise found
        log, damaged = self.parts[LOG], self.saved.damaged
        if found in self.saved.log_differs and found.logged <= self.saved.log_lines:
            raise ValueError(f"is of other rounds than {LOG}")
        if log.damaged and (found in self.saved.log_differs or found.logged > len(self.log.records)):
            raise UnusableError(f"{LOG} is {log.state}")
        if needed := [file.name for file in files_of([found]) if file in damaged]:
            raise UnusableError(f"{needed[0]} is damaged")
        about, numbers = f"after round {found.round}", {"round": found.round}
        models = self.saved.models[found.server]
        model = found.last.model_dump()["fingerprint"] if found.last else self.fingerprints.get(found.round)
        if isinstance(models, ValueError):
            raise models
        if isinstance(models, Exception):
            about += f"; its model was not compared: {found.server.name} {models}"
        elif models.model != model:
            raise ValueError(f"{found.server.name} holds another model than that of round {found.round}")
        nodes = check_nodes(found.runtime, self.clients)
        if not self.parts[CONFIG].damaged and (other := changes(found.config, self.values)[0]):
            return Seen(f"{about}, with other settings: {other[0]}", numbers)
        if nodes and found.clients and self.finished and found is not self.newest:
            return Seen(f"{about}; at the end of a run its nodes delete their states of it", numbers)
        self.resumable.append(found.round)
        if found.clients:
            about += f"; {len(found.clients)} files of clients' states"
            numbers["client_files"] = len(found.clients)
        if nodes:
            about += f"; what {nodes} nodes keep of it lies there, not checked"
            numbers["nodes"] = nodes
        return Seen(about, numbers)

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

    def check_model(self) -> Seen:
        """Its own hash, and its fingerprint against those of the rounds."""
        found, (number, last) = self.model, self.last_model
        if found == last:
            return _after(number)
        if self.ended:
            raise ValueError(f"is not the model after round {number}")
        earlier = [number for number, each in self.fingerprints.items() if each == found]
        about, numbers = _after(max(earlier)) if earlier else Seen()
        return Seen(f"{about}, from an earlier stop".lstrip(", "), numbers)

    def look_at_end(self) -> None:
        """What the config and its hooks ask for, and the summary."""
        hooks = [hook["name"] for hook in self.settings.hooks if isinstance(hook, dict)] if self.settings else []
        if self.settings and self.settings.ema is not None:
            self.look(EMA, self.check_ema)
        if "curves" in hooks:
            self.look(PICTURE, self.check_picture, spare=True)  # it repeats the rounds, as do the events
        if "tensorboard" in hooks:
            events = self.folder / EVENTS
            refused = events.is_symlink() or (events.exists() and not events.is_dir())  # by a resume
            self.look(EVENTS, self.check_events, spare=not refused)
        if self.finished:
            self.look(SUMMARY, self.check_summary)
        elif self.over:
            self.add(SUMMARY, "not written", "all rounds are done; a resume writes it")

    def check_ema(self) -> Seen:
        """Its own hash, and its fingerprint against that in the last checkpoint."""
        found, newest = self.fingerprint_in(EMA), self.need_newest()
        models = self.saved.models[newest.server] if newest and newest.server not in self.saved.damaged else None
        if newest is None or not isinstance(models, Models):
            raise NotCheckedError("there is no checkpoint to compare it with")
        if found != models.ema:
            raise ValueError(f"is not the mean after round {newest.round}")
        return _after(newest.round)

    def check_picture(self) -> Seen:
        """The check sums of its chunks."""
        check_png(content_of(self.folder / PICTURE, MAX_BYTES))
        return Seen()

    def check_events(self) -> Seen:
        """The check sums of its events, of which there is one a round after the first."""
        self.need(LOG)
        check_folder(folder := self.folder / EVENTS)
        names = [name for name in entries(folder) if name.startswith("events.")]
        if len(names) != 1:
            raise ValueError(f"has {len(names)} files of events")
        count = count_events(content_of(folder / names[0], MAX_BYTES), most=self.rounds + 1) - 1
        if self.finished and count != self.rounds:
            raise ValueError(f"has the events of {count} rounds")
        return Seen("", {"rounds": count})

    def check_summary(self) -> Seen:
        """What follows from the rounds, and that the rest is numbers."""
        found = parse_json(content_of(self.folder / SUMMARY, MAX_BYTES))
        if not isinstance(found, Mapping):
            raise ValueError("is not a mapping")
        measured = [found.get(key) for key in ("seconds", "peak_memory_bytes")]
        if not all(isinstance(each, int | float) and each is not True and each >= 0 for each in measured):
            raise ValueError("seconds and peak_memory_bytes should be numbers")
        self.need(LOG)
        records, ema = self.log.records, self.settings is not None and self.settings.ema is not None
        known = repeated(records, ema=ema) | {"fingerprint": self.fingerprints.get(len(records))}
        if self.newest:
            known["stopped"] = self.newest.stopped
        for key, value in known.items():
            if key not in found or found[key] != value:
                raise ValueError(f"{key} is {one_line(found.get(key))}, by {LOG} it is {one_line(value)}")
        return Seen(one_line(f"stopped: {found['stopped']}") if found["stopped"] else "", {"rounds": len(records)})


def _after(number: int) -> Seen:
    return Seen(f"after round {number}", {"round": number})


def _loaded(values: Any) -> Config:
    """The config, with what it names as package.module:attribute left as it is."""
    if not isinstance(values, dict):
        raise ValueError("is not a mapping")
    runtime = values.get("runtime")
    elsewhere = isinstance(runtime, dict) and runtime.get("name") in ON_NODES
    return load(values | ({"runtime": "serial"} if elsewhere else {}))


def _own_names(values: Any) -> Iterator[str]:
    """What a config names as package.module:attribute."""
    if isinstance(values, dict):
        if isinstance(name := values.get("name"), str) and ":" in name:
            yield name
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _own_names(value)
