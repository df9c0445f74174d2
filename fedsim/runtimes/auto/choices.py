"""The fastest runtime for each network, recipe and machine, remembered between runs in a JSON file.

If the file is broken, from another version or not writable, that is no error: the runtimes are timed again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from fedsim.base.catalogue import Spec
from fedsim.base.files import write
from fedsim.base.machine import cores, cpu_name
from fedsim.base.reading import open_regular
from fedsim.base.version import VERSION
from fedsim.data import FederatedData
from fedsim.federated.client import Train
from fedsim.training.task import Task

MAX_FILE_BYTES = 2**20  # that are read
MAX_CHOICES = 500  # in the file, the newest
PLAIN = ConfigDict(extra="forbid", strict=True, frozen=True)


class Choice(BaseModel):
    """A runtime with all its options, and the reason for the choice as text."""

    model_config = PLAIN

    runtime: Spec
    why: str
    timed: bool = True


class _File(BaseModel):
    model_config = PLAIN

    format: Literal[1] = 1
    choices: dict[str, Choice] = {}


def path() -> Path:
    """Where choices are kept: fedsim/runtime.json in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "fedsim" / "runtime.json"


_of_this_process: dict[str, Choice] = {}  # choices that are not in the file


def recall(key: str) -> Choice | None:
    """The choice for a key, if there is one."""
    return _read().choices.get(key) or _of_this_process.get(key)


def remember(key: str, choice: Choice) -> None:
    """Save a choice in the file, if possible; if the machine is busy, keep it only in this process."""
    if busy():
        _of_this_process[key] = choice
        return
    with suppress(OSError, RuntimeError, Timeout):  # RuntimeError: if there is no home folder
        path().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path().with_suffix(".lock"), timeout=1):
            choices = _read().choices
            choices.pop(key, None)
            newest = dict([*choices.items(), (key, choice)][-MAX_CHOICES:])
            write(path(), _File(choices=newest).model_dump_json(indent=1).encode())


def busy() -> bool:
    """Whether more processes run than this machine has cores, so that timings are unreliable."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def key(
    work: Train, task: Task, data: FederatedData, clients: int, candidates: Sequence[Spec], device: torch.device
) -> str:
    """SHA-256 of all that a choice among `candidates` depends on; `clients` is the number of timed clients."""
    settings = {f.name: getattr(work.recipe, f.name) for f in fields(work.recipe)}
    about = {
        "candidates": candidates,
        "network": [_name(type(task.network)), repr(task.network), task.layout.shapes],
        "options": [task.channels_last, task.recompute, str(task.initial_model.dtype)],
        "example": data.form["shape"] + [data.form["dtype"]],
        "recipe": {name: value for name, value in settings.items() if name not in ("lr", "schedule")},
        "strategy": work.strategy,
        "scale": [int(np.median(data.sizes)), clients],
        "machine": [_machine(device), cores()],
        "versions": [VERSION, torch.__version__],
    }
    return hashlib.sha256(json.dumps(_plain(about), sort_keys=True).encode()).hexdigest()


def _read() -> _File:
    try:
        with open_regular(path(), links=True) as file:
            return _File.model_validate_json(file.read(MAX_FILE_BYTES))
    except (OSError, RuntimeError, ValidationError):
        return _File()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name(device)}"
    return cpu_name()


def _plain(value: Any) -> Any:
    """The value as JSON that is equal in every process: callables by name, other objects by their fields."""
    if isinstance(value, partial):
        return [_name(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, BaseModel):
        return [_name(type(value)), value.model_dump(mode="json")]
    if is_dataclass(value) and not isinstance(value, type):
        return [_name(type(value)), {f.name: _plain(getattr(value, f.name)) for f in fields(value)}]
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(each) for each in value]
    return _name(value) if callable(value) else repr(value)


def _name(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"
