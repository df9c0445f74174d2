"""The results of a benchmark: tables of 80 columns, a JSON file that says on what and with what, and pictures."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill
from typing import Any, BinaryIO, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from fedsim.base.devices import devices
from fedsim.base.machine import cores, cpu_name, memory
from fedsim.base.version import VERSION
from fedsim.experiment.config import Config
from fedsim.report.runs import ABSENT, WIDTH

PACKAGES = ("torch", "numpy", "ray", "flwr", "pfl")


class Column(NamedTuple):
    """Of a table: which figure of a row, its heading, and how it is written."""

    key: str
    heading: str
    form: str = ""


class Curve(NamedTuple):
    """Of a picture: a figure of all rows against another; `ideal` draws y = x, too."""

    x: str
    y: str
    title: str
    labels: tuple[str, str]
    ideal: bool = False


SECONDS, STEPS = Column("seconds", "seconds", ".3f"), Column("steps_per_second", "steps/s", ",.0f")
RATIO, LOW, HIGH = Column("ratio", "ratio", ".2f"), Column("low", "least", ".2f"), Column("high", "most", ".2f")


@dataclass
class Result:
    """One table with its figures, by name; a row holds more than is shown, such as the seconds of every pass."""

    name: str
    title: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    caption: str
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)


def show(result: Result, config: Config, console: Console) -> None:
    """Print the table, then its notes."""
    title = fill(f"{result.title}; {where(config)}, torch {torch.__version__}", WIDTH)
    table = Table(title=title, box=box.SIMPLE_HEAD, width=WIDTH, pad_edge=False, collapse_padding=True)
    first, *others = result.columns
    table.add_column(first.heading, ratio=1, overflow="fold")
    for column in others:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(*(_written(row.get(column.key), column.form) for column in result.columns))
    console.print(table)
    for note in [result.caption, *result.notes]:
        console.out(fill(note, WIDTH, break_on_hyphens=False), highlight=False)


def document(results: Sequence[Result], config: Config) -> dict[str, Any]:
    """All figures, the machine, the date, the versions and the config, as JSON has them."""
    tables = {f.name: f.extra | {"title": f.title, "rows": f.rows, "notes": f.notes} for f in results}
    return about(config) | {"config": config.model_dump(mode="json"), "found": tables}


def save(path: Path, results: Sequence[Result], config: Config) -> None:
    """A JSON file with all figures."""
    path.write_text(json.dumps(document(results, config), indent=1) + "\n")


def about(config: Config) -> dict[str, Any]:
    """When, on what and with what it is measured; how busy the machine was when it ended."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_name(),
            "cores": cores(),
            "memory_bytes": memory(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "load": os.getloadavg()[0],
        },
        "device": where(config),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def where(config: Config) -> str:
    """The device that the config trains on, in words."""
    name = config.runtime.get("device", "auto") if isinstance(config.runtime, Mapping) else "auto"
    home = devices(name)[0]
    return torch.cuda.get_device_name(home) if home.type == "cuda" else f"{cores()} CPU cores"


def picture(results: Sequence[Result], path: Path | str | BinaryIO) -> None:
    """A PNG with a panel for each curve, on logarithmic axes."""
    curves = [(each, curve) for each in results for curve in each.curves]
    columns = min(len(curves), 2)
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * lines), dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (each, curve) in zip(panels, curves, strict=False):
        _panel(axes, each, curve)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    figure.savefig(path, format="png")


def _panel(axes: Axes, result: Result, curve: Curve) -> None:
    points = [(row[curve.x], row[curve.y]) for row in result.rows if curve.y in row]
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "o-")
    if curve.ideal:
        axes.plot(x, x, "--", color="0.6", label="ideal")
        axes.legend(frameon=False)
    axes.set(title=curve.title, xlabel=curve.labels[0], ylabel=curve.labels[1], xscale="log", yscale="log")
    axes.set_ylim(bottom=min(y) / 2, top=max(y) * 2)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _written(value: Any, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def _versions() -> dict[str, str]:
    found = {"fedsim": VERSION}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
