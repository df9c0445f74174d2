"""The results of a sweep: figures of each point, means over seeds, tables and files."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean, stdev
from textwrap import fill
from typing import Any, Self

from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.base.files import write
from fedsim.errors import ConfigError, one_line
from fedsim.report.runs import ABSENT, WIDTH, RunRecord, read_run, rounds_to
from fedsim.sweep.folder import PointRun, Sweep
from fedsim.sweep.grid import Point, short_keys, shown_value

FIGURES = {  # header and format of each; of a point, and as mean and standard deviation over seeds
    "test_accuracy": ("last\naccuracy", "{:.2%}"),
    "best_test_accuracy": ("best\naccuracy", "{:.2%}"),
    "test_loss": ("test\nloss", "{:.4f}"),
    "rounds_to_target": ("rounds\nto {}", "{:,.1f}"),
    "seconds": ("seconds", "{:,.1f}"),
}


@dataclass(frozen=True)
class Row:
    """One point: its figures, None where there are none, and why it failed, if it did."""

    name: str
    point: Point
    run: RunRecord | None
    figures: dict[str, float | None]
    failure: str | None = None

    @classmethod
    def of(cls, point: PointRun, target: float | None, failure: str | None) -> Self:
        """From the files in the point's folder."""
        try:
            run = read_run(point.folder)
        except ConfigError as error:  # it failed before it had one, or a file is broken
            why = failure or (one_line(error) if point.begun else "has no results")
            return cls(point.name, point.point, None, dict.fromkeys(FIGURES), why)
        rounds, accuracies = run.curve("test_accuracy")
        figures: dict[str, float | None] = {
            "test_accuracy": accuracies[-1] if accuracies else None,
            "best_test_accuracy": max(accuracies, default=None),
            "test_loss": next(reversed(run.curve("test_loss")[1]), None),
            "rounds_to_target": None if target is None else rounds_to(target, rounds, accuracies),
            "seconds": sum(row["seconds"] for row in run.rounds),
        }
        return cls(point.name, point.point, run, figures, failure)


@dataclass(frozen=True)
class Setting:
    """Points that differ in the seed only."""

    point: Point  # without the seed
    rows: list[Row]

    @property
    def finished(self) -> list[Row]:
        """Those that did not fail."""
        return [row for row in self.rows if row.failure is None]

    def over_seeds(self, figure: str) -> tuple[float, float] | None:
        """Mean and sample standard deviation of the finished; None where one of them lacks it."""
        values = [value for row in self.finished if (value := row.figures[figure]) is not None]
        if not values or len(values) < len(self.finished):
            return None
        return fmean(values), stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Results:
    """The results of all points of a sweep that has ended."""

    sweep: Sweep
    rows: list[Row]

    @classmethod
    def of(cls, sweep: Sweep, failures: dict[str, str]) -> Self:
        """From the folders of the points; `failures` says why some failed."""
        return cls(sweep, [Row.of(point, sweep.target, failures.get(point.name)) for point in sweep.points])

    @property
    def keys(self) -> list[str]:
        """What is compared: the swept keys but the seed, unless it is the only one."""
        return [key for key in self.sweep.grid.axes if key != "seed"] or ["seed"]

    @property
    def seeds(self) -> bool:
        """Whether there are several seeds of each setting."""
        return "seed" in self.sweep.grid.axes

    @property
    def settings(self) -> list[Setting]:
        """The points by what they have besides the seed."""
        found = dict[str, Setting]()
        for row in self.rows:
            point = {key: value for key, value in row.point.items() if key != "seed"}
            found.setdefault(json.dumps(point, default=str), Setting(point, [])).rows.append(row)
        return list(found.values())

    @property
    def best(self) -> Row | None:
        """The finished point with the highest last accuracy, and of several the lowest loss."""
        return max(
            (row for row in self.rows if row.failure is None and row.figures["test_accuracy"] is not None),
            key=lambda row: (row.figures["test_accuracy"], -_or(row.figures["test_loss"], inf)),
            default=None,
        )

    def tables(self) -> list[Table]:
        """A row a point, and with several seeds one more a setting; 80 columns wide."""
        return [self._points(), *([self._means()] if self.seeds else [])]

    def save(self) -> None:
        """Write sweep.json and results.csv into the sweep's folder."""
        content = json.dumps(self.document(), indent=1, default=str).encode() + b"\n"
        write(self.sweep.folder / "sweep.json", content)
        write(self.sweep.folder / "results.csv", self._csv().encode())

    def _shown_figures(self) -> dict[str, tuple[str, str]]:
        target = self.sweep.target
        return {
            name: (header.format(f"{100 * target:g}%") if target is not None else header, form)
            for name, (header, form) in FIGURES.items()
            if target is not None or name != "rounds_to_target"
        }

    def _points(self) -> Table:
        failed = [f"{row.name} failed: {row.failure}" for row in self.rows if row.failure]
        marked = ["* the best last accuracy"] if self.best else []
        table = _table("point", [*marked, *failed])
        table.add_column("rounds", justify="right", no_wrap=True)
        for header, _ in self._shown_figures().values():
            table.add_column(header, justify="right", no_wrap=True)
        for row in self.rows:
            mark = " *" if self.best and row.name == self.best.name else ""
            cells = [
                ABSENT if (value := row.figures[name]) is None else form.format(value)
                for name, (_, form) in self._shown_figures().items()
            ]
            done = row.run.rounds[-1]["round"] if row.run and row.run.rounds else 0
            table.add_row(
                Text(row.name + mark), "failed" if row.failure else str(done), *cells, style="bold" if mark else ""
            )
        return table

    def _means(self) -> Table:
        short, settings = short_keys(self.sweep.grid.axes), self.settings
        table = _table("over seeds", ["mean ± standard deviation"])
        left_out = ("best_test_accuracy", "seconds")  # to leave room for the names; sweep.json has them
        figures = {name: shown for name, shown in self._shown_figures().items() if name not in left_out}
        table.add_column("seeds", justify="right", no_wrap=True)
        for header, _ in figures.values():
            table.add_column(header, justify="right")
        means = [setting.over_seeds("test_accuracy") for setting in settings]
        best = max((mean for mean in means if mean), default=None)
        for setting, mean in zip(settings, means, strict=True):
            name = ",".join(f"{short[key]}={shown_value(value)}" for key, value in setting.point.items())
            cells = [_spread(setting.over_seeds(figure), form) for figure, (_, form) in figures.items()]
            mark = " *" if mean and mean == best and len(settings) > 1 else ""
            table.add_row(
                Text((name or "all") + mark), str(len(setting.finished)), *cells, style="bold" if mark else ""
            )
        return table

    def document(self) -> dict[str, Any]:
        """What sweep.json holds."""
        means = [
            setting.point
            | {"seeds": len(setting.finished)}
            | {
                name: None if (found := setting.over_seeds(name)) is None else {"mean": found[0], "std": found[1]}
                for name in FIGURES
            }
            for setting in self.settings
        ]
        return {
            "grid": self.sweep.grid.axes,
            "settings": self.sweep.grid.fixed,
            "target": self.sweep.target,
            "best": self.best.name if self.best else None,
            "points": [
                {"point": row.name, **row.point, **row.figures, "failure": row.failure} for row in self.rows
            ],
            "over_seeds": means if self.seeds else None,
        }

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["point", *self.sweep.grid.axes, *FIGURES, "failure"])
        for row in self.rows:
            values = [shown_value(value) for value in row.point.values()]
            figures = ["" if value is None else value for value in row.figures.values()]
            writer.writerow([row.name, *values, *figures, row.failure or ""])
        return text.getvalue()


def _table(what: str, notes: Sequence[str]) -> Table:
    caption = "\n".join(fill(note, WIDTH, subsequent_indent="  ") for note in notes)
    table = Table(width=WIDTH, box=box.SIMPLE, caption=Text(caption) if notes else None, caption_justify="left")
    table.add_column(what, ratio=1, overflow="fold")
    return table


def _spread(found: tuple[float, float] | None, form: str) -> str:
    if found is None:
        return ABSENT
    mean, deviation = (form.format(value) for value in found)
    return f"{mean.removesuffix('%')} ±{deviation}"


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
