"""How fast networks are, beside what they cost (cost.py): latency for a batch, and throughput.

Latencies are of whole batches in evaluation, after passes that do not count. Networks and batch sizes take turns,
so that noise falls on all. Where torch.distributed is initialised, throughput is that of all processes, each with
a copy; the command measures one device.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import distributed, nn

from fedsim.base.devices import devices
from fedsim.base.machine import cores
from fedsim.errors import ConfigError, one_line
from fedsim.experiment.config import parse_overrides
from fedsim.export.cost import Cost, cost, digits, short, size, zeros
from fedsim.export.fusion import fused
from fedsim.export.onnx import made, trained
from fedsim.models import MODELS, Reference
from fedsim.report.runs import ABSENT, WIDTH, read_run, shortened
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
class Subject:
    """A network, and what was found."""

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


def subjects(
    words: Sequence[str], runs: Sequence[Path], shape: tuple[int, ...] | None = None, classes: int | None = None
) -> list[Subject]:
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
            network = made({"name": entry, **parse_overrides(settings)}, own, count)
            found.append(Subject(" ".join([entry, *settings]), network, own))
    for run in runs:
        rounds, accuracies = read_run(run).curve("test_accuracy")
        network, _, example, _ = trained(run)
        found.append(Subject(run.resolve().name, network, example.shape, accuracies[-1] if rounds else None))
    if not found:
        raise ConfigError("profile: nothing to measure; give a MODEL such as resnet18, or a run with --runs")
    return found


def measure(
    found: Sequence[Subject],
    batches: Sequence[int],
    console: Console,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    channels_last: bool = False,
    fuse: bool = False,
    repeats: int = 20,
) -> None:
    """Let each subject know its cost, and the seconds of `repeats` passes at each batch size.

    Weights and examples are of `precision`; what training keeps is counted as under autocast to it. Raises
    ConfigError.
    """
    dtype = DTYPES[precision]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("networks", total=len(found) * (1 + len(batches) * (WARM_UP + repeats)))
        sides = list[tuple[Subject, int, Callable[[], object]]]()
        for subject in found:
            network = fused(subject.network, subject.shape) if fuse else subject.network.eval()
            subject.cost = cost(subject.network.to(device), subject.shape, None if precision == "fp32" else dtype)
            subject.seconds = {batch: [] for batch in batches}
            with _runs(subject.label, device):
                network = network.to(device, dtype)
                for batch in batches:
                    sides.append((subject, batch, _side(network, (batch, *subject.shape), channels_last)))
            progress.advance(bar)
        for turn in range(WARM_UP + repeats):
            for subject, batch, side in sides:
                with _runs(subject.label, device):
                    seconds = _timed(side, device)
                if turn >= WARM_UP:
                    subject.seconds[batch].append(seconds)
                progress.advance(bar)


def tables(found: Sequence[Subject], device: torch.device, precision: Precision) -> Iterator[Table]:
    """What the networks cost, and how long they took: two tables, 80 columns wide."""
    costs = _table("model", "examples", "parameters", "FLOPs", "activations", "accuracy")
    costs.caption = "FLOPs: multiply-adds; activations: what training keeps; both of one example"
    times = _table("model", "batch", "mean", *(f"p{p}" for p in PERCENTILES), "examples/s")
    times.caption = f"milliseconds a batch; {machine(device)}, {precision}"
    for subject in found:
        accuracy = ABSENT if subject.accuracy is None else f"{subject.accuracy:.2%}"
        figures = [f"{short(n)}{unit}" for n, unit in zip(subject.cost, ("", "", "B"), strict=True)]
        costs.add_row(subject.label, size(subject.shape), *figures, accuracy)
        for batch in subject.seconds:
            *seconds, throughput = subject.latency(batch)
            times.add_row(subject.label, str(batch), *(digits(1e3 * s) for s in seconds), digits(throughput))
    yield costs
    yield times


def save(path: Path, found: Sequence[Subject], device: torch.device, precision: Precision) -> None:
    """A JSON file with all figures, and the seconds of every pass."""
    models = [
        {
            "model": subject.label,
            "shape": subject.shape,
            "accuracy": subject.accuracy,
            **subject.cost._asdict(),
            "batches": [
                {"batch": batch, **subject.latency(batch)._asdict(), "seconds": seconds}
                for batch, seconds in subject.seconds.items()
            ],
        }
        for subject in found
    ]
    about = {"machine": machine(device), "torch": torch.__version__, "precision": precision}
    path.write_text(json.dumps(about | {"models": models}, indent=1) + "\n")


def picture(found: Sequence[Subject], path: Path | str | BinaryIO) -> None:
    """A PNG: throughput against latency; and against FLOPs accuracy, or parameters where no run has one."""
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    speed, price = figure.subplots(1, 2)
    runs = any(subject.accuracy is not None for subject in found)
    for number, subject in enumerate(found):
        colour, times = f"C{number % 10}", [subject.latency(batch) for batch in subject.seconds]
        x, y = [1e3 * time.mean for time in times], [time.throughput for time in times]
        speed.plot(x, y, "o-", color=colour, label=shortened(subject.label, 40))
        for batch, at in zip(subject.seconds, zip(x, y, strict=True), strict=True):
            _note(speed, str(batch), at)
        height = subject.accuracy if runs else subject.cost.parameters
        if height is not None:
            price.plot(subject.cost.flops, height, "o", color=colour)
            _note(price, shortened(subject.label, 24), (subject.cost.flops, height))
    speed.set(title="Throughput against latency", xlabel="milliseconds a batch", ylabel="examples a second")
    price.set(xlabel="FLOPs (multiply-adds of one example)", ylabel="test accuracy" if runs else "parameters")
    price.set_title(f"{'Accuracy' if runs else 'Parameters'} against FLOPs")
    for axes in (speed, price):
        axes.set(xscale="log", yscale="linear" if runs and axes is price else "log")
        axes.margins(0.15)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if runs:
        price.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    legend = figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar in a name is a dollar
    figure.savefig(path, format="png")


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


def _table(first: str, *others: str) -> Table:
    table = Table(width=WIDTH, box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column(first, ratio=1, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _note(axes: Axes, text: str, at: tuple[float, float]) -> None:
    axes.annotate(text, at, (4, 4), textcoords="offset points", fontsize=7, parse_math=False)
