"""Pictures of runs: loss and accuracy, round by round."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedsim.base.files import check_writable
from fedsim.errors import ConfigError
from fedsim.report.runs import RunRecord, differences, labels, shortened

Look = dict[str, Any]  # of a Line2D

TRAIN: Look = {"linewidth": 0.9, "alpha": 0.6}
TEST: Look = {"linewidth": 1.8}
TARGET: Look = {"linewidth": 1, "color": "0.3", "linestyle": "--"}
DASHES = ("-", "--", ":", "-.")  # the next one after every ten runs, as there are ten colours
LEGEND_WIDTH = 110  # letters in a line of the legend, about


def check_drawable(path: Path, at: str) -> None:
    """Raise ConfigError that begins with `at` where no PNG can be written; called before the work is done."""
    if path.suffix.lower() not in ("", ".png"):
        raise ConfigError(f"{at}: {path} should end with .png; pictures are PNG files")
    check_writable(path, at)


def curves(runs: Sequence[RunRecord], path: Path | str | BinaryIO, target: float | None = None) -> None:
    """Write a PNG to `path`, a file or its name: loss and accuracy against rounds, the runs over each other.

    `target` is an accuracy from 0 to 1, drawn as a dashed line. What a run did not measure is left out.
    """
    names = [shortened(label, LEGEND_WIDTH // 2) for label in labels(runs)]
    figure = Figure(figsize=(10, 4.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    loss, accuracy = figure.subplots(1, 2)
    _panel(loss, "Loss", runs, {"train_loss": TRAIN, "test_loss": TEST})
    _panel(accuracy, "Test accuracy", runs, {"test_accuracy": TEST})
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))

    alone = len(runs) == 1
    entries = [] if alone else [(name, _colour(number) | TEST) for number, name in enumerate(names)]
    shade: Look = _colour(0) if alone else {"color": "0.3"}
    entries += [("training", shade | TRAIN), ("test", shade | TEST)]
    if target is not None:
        accuracy.axhline(target, **TARGET)
        entries += [(f"target {100 * target:g}%", TARGET)]
    _legend(figure, entries)
    figure.suptitle(names[0] if alone else _title(runs), weight="bold", parse_math=False)
    figure.savefig(path, format="png")


def _panel(axes: Axes, title: str, runs: Sequence[RunRecord], looks: Mapping[str, Look]) -> None:
    for number, run in enumerate(runs):
        for key, look in looks.items():
            rounds, values = run.curve(key)
            marker = "o" if len(rounds) == 1 else ""  # one point makes no line
            axes.plot(rounds, values, marker=marker, **_colour(number), **look)
    axes.set(title=title, xlabel="round")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not any(run.curve(key)[0] for run in runs for key in looks):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center")


def _colour(number: int) -> Look:
    return {"color": f"C{number % 10}", "linestyle": DASHES[number // 10 % len(DASHES)]}


def _title(runs: Sequence[RunRecord]) -> str:
    keys = ", ".join(differences(runs))
    return shortened(f"{len(runs)} runs" + (f" that differ in {keys}" if keys else ""), LEGEND_WIDTH * 3 // 4)


def _legend(figure: Figure, entries: Sequence[tuple[str, Look]]) -> None:
    """Below the panels, in as many columns as fit; the figure grows by its height."""
    columns = min(len(entries), LEGEND_WIDTH // (max(len(name) for name, _ in entries) + 8))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * ceil(len(entries) / columns))
    lines = [Line2D([], [], label=name, **look) for name, look in entries]
    legend = figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar in a name is a dollar
