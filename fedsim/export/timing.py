"""How fast networks are, beside what they cost (cost.py): latency for a batch, and throughput.

Latencies are of whole batches in evaluation, after passes that do not count. Networks and batch sizes take turns,
so that noise falls on all. Where torch.distributed is initialised, throughput is that of all processes, each with
a copy; the command measures one device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import distributed, nn

from fedsim.base.devices import devices
from fedsim.base.machine import cores
from fedsim.errors import ConfigError, one_line
from fedsim.experiment.config import parse_overrides
from fedsim.export.cost import Cost, cost, zeros
from fedsim.export.fusion import fused
from fedsim.export.trained import load_trained, make_network
from fedsim.models import MODELS, Reference
from fedsim.report.runs import read_run
from fedsim.training.precision import AUTOCAST

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, **AUTOCAST}
WARM_UP = 2  # passes that do not count
PERCENTILES = (50, 90, 95, 99)
UNKNOWN = Cost(0, 0, 0)


class Latency(NamedTuple):
    """Seconds for a batch, their mean and percentiles; and examples a second."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    throughput: float


@dataclass
class Profile:
    """A network, what it costs, and how long its passes took."""

    label: str
    network: nn.Module
    shape: tuple[int, ...]  # of an example
    accuracy: float | None = None  # on the test set of the run that trained it
    cost: Cost = UNKNOWN
    seconds: dict[int, list[float]] = field(default_factory=dict)  # every pass, by batch size

    def latency(self, batch: int) -> Latency:
        """Over all passes with that many examples."""
        return latency(self.seconds[batch], batch)


def latency(seconds: Sequence[float], batch: int) -> Latency:
    """Of passes over `batch` examples each; percentiles are interpolated, and throughput is of all processes."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    mean = float(np.mean(seconds))
    p50, p90, p95, p99 = map(float, np.percentile(seconds, PERCENTILES))
    return Latency(mean, p50, p90, p95, p99, world * batch / mean)


def profiles(
    words: Sequence[str], runs: Sequence[Path], shape: tuple[int, ...] | None = None, classes: int | None = None
) -> list[Profile]:
    """Networks by name or pattern, each with the KEY=VALUE options behind it, and those of runs.

    Their examples are of `shape`, or what the network was published for; those of a run are its own. Raises
    ConfigError.
    """
    found = []
    for name, settings in _groups(words):
        for entry in _matches(name):
            given = getattr(MODELS.load(entry, "profile"), "reference", None) or Reference((), 0, 0)
            own, count = shape or given.shape, classes or given.classes
            if not (own and count):
                raise ConfigError(f"--shape: {entry} has no size of its own; give --shape and --classes")
            network = make_network({"name": entry, **parse_overrides(settings)}, own, count)
            found.append(Profile(" ".join([entry, *settings]), network, own))
    for run in runs:
        rounds, accuracies = read_run(run).curve("test_accuracy")
        network, _, example, _ = load_trained(run)
        found.append(Profile(run.resolve().name, network, example.shape, accuracies[-1] if rounds else None))
    if not found:
        raise ConfigError("profile: nothing to measure; give a MODEL such as resnet18, or a run with --runs")
    return found


def measure(
    found: Sequence[Profile],
    batches: Sequence[int],
    console: Console,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    channels_last: bool = False,
    fuse: bool = False,
    repeats: int = 20,
) -> None:
    """Fill in each profile's cost, and the seconds of `repeats` passes at each batch size.

    Weights and examples are of `precision`; what training keeps is counted as under autocast to it. Raises
    ConfigError.
    """
    dtype = DTYPES[precision]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("networks", total=len(found) * (1 + len(batches) * (WARM_UP + repeats)))
        sides = list[tuple[Profile, int, Callable[[], object]]]()
        for profile in found:
            network = fused(profile.network, profile.shape) if fuse else profile.network.eval()
            profile.cost = cost(profile.network.to(device), profile.shape, None if precision == "fp32" else dtype)
            profile.seconds = {batch: [] for batch in batches}
            with _runs(profile.label, device):
                network = network.to(device, dtype)
                for batch in batches:
                    sides.append((profile, batch, _side(network, (batch, *profile.shape), channels_last)))
            progress.advance(bar)
        for turn in range(WARM_UP + repeats):
            for profile, batch, side in sides:
                with _runs(profile.label, device):
                    seconds = _timed(side, device)
                if turn >= WARM_UP:
                    profile.seconds[batch].append(seconds)
                progress.advance(bar)


def machine(device: torch.device) -> str:
    """What is measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads on {cores()} CPU cores"


def place(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one. Raises ConfigError."""
    try:
        return devices(name)[0]
    except ConfigError as error:
        raise ConfigError(str(error).replace("runtime.device", "--device")) from None


def numbers(text: str, at: str) -> tuple[int, ...]:
    """`3,32,32` as (3, 32, 32); raises ConfigError that begins with `at`."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        allowed = "whole numbers >= 1, of at most nine digits, with commas between them"
        raise ConfigError(f"{at}: {text!r} should be {allowed}, such as 3,32,32")
    return tuple(map(int, parts))


def _groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each model with the settings behind it."""
    groups = list[tuple[str, list[str]]]()
    for word in words:
        if "=" not in word:
            groups.append((word, []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise ConfigError(f"profile: {word!r} should stand behind the MODEL whose option it is")
    return groups


def _matches(name: str) -> list[str]:
    if not set(name) & set("*?["):
        return [name]
    if not (matches := [entry for entry in MODELS if fnmatchcase(entry, name)]):
        raise ConfigError(f"profile: none of the models matches {name!r}; there are {', '.join(MODELS)}")
    return matches


def _side(network: nn.Module, shape: tuple[int, ...], channels_last: bool) -> Callable[[], object]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(zeros(network, ()))
    if channels_last and x.dim() == 4:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    def side() -> object:
        with torch.inference_mode():
            return network(x)

    return side


@contextmanager
def _runs(label: str, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # too little memory, or a layer that has no such precision there
        raise ConfigError(f"profile: {label} cannot run on {device}: {one_line(error)}") from error


def _timed(side: Callable[[], object], device: torch.device) -> float:
    start = perf_counter()
    side()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start
