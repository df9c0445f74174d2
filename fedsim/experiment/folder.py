"""The folder of a run: its config, its rounds, its checkpoints and its results."""

import hashlib
import json
import os
from collections.abc import Callable
from glob import escape
from math import isfinite
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from torch import Tensor

from fedsim.base.files import File, check_name, create, locked, read, remove, sync_folder, write
from fedsim.base.reading import read_regular, read_yaml
from fedsim.data import FederatedData
from fedsim.data.partition import content_hash, label_counts
from fedsim.errors import ConfigError, RoundError, one_line
from fedsim.experiment import model_file
from fedsim.experiment.checkpoint import Checkpoints
from fedsim.experiment.config import Config
from fedsim.experiment.round_log import NAME as LOG
from fedsim.experiment.round_log import RoundLog, read_rounds
from fedsim.training.layout import Order

CONFIG, PARTITION, CHECKPOINTS = "config.yaml", "partition.json", "checkpoints"  # in a run's folder
MODEL, EMA, SUMMARY = "model.safetensors", "ema.safetensors", "summary.json"  # at its end
MAX_LISTED_CLASSES = 1000  # up to this number partition.json names them
MAX_LISTED_CLIENTS = 1000  # up to this number partition.json counts the labels of each client


class RunFolder:
    """The folder of a run, locked by this process; raises ConfigError where another process has locked it.

    From the start it holds config.yaml and partition.json; rounds.jsonl gains a line in each round, and the other
    files are written at the end.
    """

    def __init__(self, path: Path):
        self.path, self.checkpoints = path, Checkpoints(path / CHECKPOINTS)
        self._lock = locked(path)
        self._log: RoundLog | None = None  # until it is known with which rounds it begins
        self.partition: str | None = None  # SHA-256 of partition.json

    @classmethod
    def create(cls, path: Path, config: Config, data: FederatedData) -> Self:
        """A new folder; raises ConfigError where it exists, for a run is never overwritten."""
        if path.exists():
            raise ConfigError(f"{path}: exists, and a run is never overwritten; name another folder")
        check_name(path)
        try:
            create(path, {CONFIG: _yaml(config), PARTITION: (partition := _json(describe(data)))})
        except OSError as error:
            raise ConfigError(f"{path}: cannot be made: {error.strerror}; name a folder with --out") from None
        folder = cls(path)
        folder._log = RoundLog(path)
        folder.partition = hashlib.sha256(partition).hexdigest()
        return folder

    @classmethod
    def number(cls, stem: str, config: Config, data: FederatedData) -> Self:
        """A new folder runs/STEM-N, with N above all that exist, also where others make one at the same time."""
        while True:
            names = [path.name.removeprefix(f"{stem}-") for path in Path("runs").glob(f"{escape(stem)}-*")]
            number = max((int(name) for name in names if name.isdecimal()), default=0) + 1
            path = Path("runs") / f"{stem}-{number}"
            try:
                return cls.create(path, config, data)
            except ConfigError:
                if not path.exists():
                    raise
                # another run has made it first

    @property
    def begun(self) -> bool:
        """Whether rounds.jsonl has a round."""
        log = self.path / LOG
        return log.is_file() and log.stat().st_size > 0

    def go_on(
        self,
        config: Config,
        data: FederatedData,
        log: File | None,
        check: Callable[[list[dict[str, Any]]], None] = lambda records: None,
    ) -> list[dict[str, Any]]:
        """Write a resumed run's config, cut rounds.jsonl to `log`, and return its records; raises ConfigError.

        `check` is called with the records before anything is written.
        """
        content = read(self.path, log) if log else b""
        try:
            records = list(read_rounds(content, data.num_clients))
        except ValueError as error:
            raise ConfigError(f"{self.path / LOG}: broken: {one_line(error)}") from None
        check(records)
        if log and (self.path / LOG).stat().st_size > log.bytes:
            self._forget_end()
        self._log = RoundLog(self.path, content)
        partition = _json(describe(data))
        self.partition = hashlib.sha256(partition).hexdigest()
        for name, wanted in ((CONFIG, _yaml(config)), (PARTITION, partition)):
            if not _holds(self.path / name, wanted):
                write(self.path / name, wanted)
        return records

    def round(self, record: dict[str, Any]) -> None:
        """Add a line to rounds.jsonl; raises RoundError where somebody else has changed it.

        From then on a run that is made longer is not finished; where that fails earlier, it still is.
        """
        assert self._log
        try:
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:  # because of what a hook added
            raise RoundError(f"round {record['round']}: rounds.jsonl cannot hold it: {error}") from None
        self._forget_end()
        self._log.add(line)

    def _forget_end(self) -> None:
        """Delete summary.json, which is of other rounds than there will be."""
        if os.path.lexists(self.path / SUMMARY):
            remove(self.path / SUMMARY)
            sync_folder(self.path)

    def log(self) -> File:
        """The length and hash of rounds.jsonl so far, which is on disk then; raises what `round` raises."""
        assert self._log
        return self._log.saved()

    def finish(
        self,
        model: dict[str, Tensor],
        ema: dict[str, Tensor] | None,
        order: Order,
        summary: dict[str, Any] | None,
    ) -> None:
        """The global model, its running mean if there is one, and where the run reached its end, summary.json."""
        write(self.path / MODEL, model_file.content(model, order))
        if ema is not None:
            write(self.path / EMA, model_file.content(ema, order))
        if summary is not None:
            write(self.path / SUMMARY, _json(summary))

    def close(self) -> None:
        """Unlock it for other processes."""
        if self._log:
            self._log.close()
        self._lock.release()


def _holds(path: Path, content: bytes) -> bool:
    """Whether it is a file with just this in it."""
    try:
        return read_regular(path, len(content)) == content
    except OSError:
        return False


def read_config(path: Path) -> dict[str, Any]:
    """What config.yaml of a run's folder says; raises ConfigError."""
    return read_yaml(path / CONFIG, links=False)


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON can hold it: numbers of numpy and torch become plain ones, and not finite ones null."""
    one = {k: isinstance(v, np.generic) or (isinstance(v, Tensor) and v.numel() == 1) for k, v in record.items()}
    plain = {k: v.item() if one[k] else v for k, v in record.items()}
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in plain.items()}


def describe(data: FederatedData) -> dict[str, Any]:
    """How the data is divided: a hash of it, quantiles of sizes, counts of labels, for few clients those of each.

    `examples` counts all training examples, of which `public` are the server's, without those of `new_clients`,
    who do not train; `example` is the form of each one. Where each client is an owner that the dataset names,
    there are their names, and so are those of the classes. Where clients have data of their own, only their
    number is known.
    """
    shared = {
        "clients": data.num_clients,
        "public": len(data.public),
        "classes": data.num_classes,
        "example": data.form,
    }
    if data.new_clients:
        shared["new_clients"] = len(data.new_clients)
    if 0 < len(data.class_names) <= MAX_LISTED_CLASSES:
        shared["class_names"] = list(data.class_names)
    if data.clients_are_remote:
        return shared | {"examples": None}
    sizes, labels = data.sizes, data.labels.cpu().numpy()
    few = data.num_clients <= MAX_LISTED_CLIENTS
    counts = label_counts(labels, data.owners, data.num_clients, data.num_classes) if few else None
    return {
        **shared,
        "hash": content_hash(data.owners),
        "examples": int((data.owners >= -1).sum()),
        "training_examples": {
            "smallest": int(sizes.min()),
            "quartiles": np.quantile(sizes, (0.25, 0.5, 0.75)).tolist(),
            "mean": float(sizes.mean()),
            "largest": int(sizes.max()),
        },
        "labels": np.bincount(labels[data.owners >= 0], minlength=data.num_classes).tolist(),
        "labels_by_client": None if counts is None else counts.tolist(),
        **({"client_names": list(data.client_names)} if few and data.client_names else {}),
    }


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode() + b"\n"


def _yaml(config: Config) -> bytes:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
