"""The picture of a sweep: accuracy against what was swept, and round by round."""

from collections.abc import Sequence
from math import ceil
from statistics import fmean, stdev
from typing import BinaryIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from fedsim.report.plot import LEGEND_WIDTH
from fedsim.report.runs import shortened
from fedsim.sweep.grid import short_keys, shown_value
from fedsim.sweep.results import Results, Row, Setting

MIN_LOG_RATIO = 4  # of the largest value to the smallest, for a logarithmic axis
MAX_LISTED_SETTINGS = 20  # where there are more than two keys
MAX_LEGEND_CURVES = 12
MAX_NUMBERED_CELLS = 100  # of a heat map that shows its numbers


def draw(results: Results, path: BinaryIO) -> None:
    """Write a PNG: one key as a line or dots, two as a heat map, more as the best; seeds as a band."""
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    keys, settings = results.keys, results.settings
    if keys == ["seed"]:
        settings = [Setting(row.point, [row]) for row in results.rows]
    if len(keys) == 1:
        _against(left, keys[0], settings)
    elif len(keys) == 2:
        _heat_map(left, results, settings)
    else:
        _listed(left, settings, short_keys(results.sweep.grid.axes))
    _curves(right, settings, results)
    lines, names = right.get_legend_handles_labels()
    if names:
        columns = max(LEGEND_WIDTH // (max(map(len, names)) + 8), 1)
        figure.set_size_inches(10, 4.4 + 0.2 * ceil(len(names) / columns))
        legend = figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar in a name is a dollar
    title = f"{len(results.rows)} points over {', '.join(results.sweep.grid.axes)}"
    figure.suptitle(shortened(title, 80), weight="bold", parse_math=False)
    figure.savefig(path, format="png")


def _against(axes: Axes, key: str, settings: Sequence[Setting]) -> None:
    """Last test accuracy, with its mean and standard deviation over seeds, against one key."""
    known = [(s, found) for s in settings if (found := s.over_seeds("test_accuracy"))]
    values = [setting.point[key] for setting, _ in known]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numeric:
        order = np.argsort(values)
        known, values = [known[i] for i in order], [values[i] for i in order]
    x = values if numeric else list(range(len(values)))
    mean, std = np.array([found for _, found in known]).reshape(-1, 2).T
    axes.plot(x, mean, marker="o", linestyle="-" if numeric and key != "seed" else "")
    if std.any():
        axes.fill_between(x, mean - std, mean + std, alpha=0.2, linewidth=0)
    for position, (setting, _) in zip(x, known, strict=True):
        dots = [value for row in setting.finished if (value := row.figures["test_accuracy"]) is not None]
        axes.plot([position] * len(dots), dots, marker=".", linestyle="", color="0.4", alpha=0.6)
    if numeric and min(values, default=0) > 0 and max(values) / min(values) >= MIN_LOG_RATIO:
        axes.set_xscale("log")
    if len(x) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(x))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticklabels([shortened(shown_value(value), 16) for value in values])
    _finish(axes, "Last test accuracy", key)


def _heat_map(axes: Axes, results: Results, settings: Sequence[Setting]) -> None:
    """Last test accuracy, or its mean over seeds, by two keys; empty where all failed."""
    rows, columns = (results.sweep.grid.axes[key] for key in results.keys)
    means = [found[0] if (found := s.over_seeds("test_accuracy")) else np.nan for s in settings]
    cells = np.array(means).reshape(len(rows), len(columns))
    image = axes.imshow(cells, aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, format=PercentFormatter(xmax=1))
    axes.set_xticks(range(len(columns)), [shortened(shown_value(value), 12) for value in columns])
    axes.set_yticks(range(len(rows)), [shortened(shown_value(value), 16) for value in rows])
    low, high = (np.nanmin(cells), np.nanmax(cells)) if np.isfinite(cells).any() else (0, 1)
    for (i, j), value in np.ndenumerate(cells):
        if cells.size <= MAX_NUMBERED_CELLS:
            shade = "white" if np.isnan(value) or value < (low + high) / 2 else "black"
            text = "failed" if np.isnan(value) else f"{100 * value:.1f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="0.4" if text == "failed" else shade)
    axes.set(title="Last test accuracy")
    axes.set_ylabel(results.keys[0], parse_math=False)
    axes.set_xlabel(results.keys[1], parse_math=False)


def _listed(axes: Axes, settings: Sequence[Setting], short: dict[str, str]) -> None:
    """The best settings, as a list."""
    known = [(s, found) for s in settings if (found := s.over_seeds("test_accuracy"))]
    best = sorted(known, key=lambda pair: -pair[1][0])[:MAX_LISTED_SETTINGS]
    y = list(range(len(best)))
    axes.errorbar([m for _, (m, _) in best], y, xerr=[d for _, (_, d) in best], fmt="o")
    axes.set_yticks(y, [shortened(_name(setting, short), 40) for setting, _ in best], fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(alpha=0.3)
    axes.set(title="Last test accuracy" + (f", the best {len(best)}" if len(best) < len(settings) else ""))


def _curves(axes: Axes, settings: Sequence[Setting], results: Results) -> None:
    """Test accuracy by round: a colour a setting, and over seeds the mean in a band of a standard deviation."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(settings)))
    short = short_keys(results.sweep.grid.axes)
    for setting, colour in zip(settings, shades, strict=True):
        rounds, mean, std = _curve(setting.rows)
        label = (
            shortened(_name(setting, short), LEGEND_WIDTH // 2)
            if rounds and len(settings) <= MAX_LEGEND_CURVES
            else None
        )
        axes.plot(rounds, mean, color=colour, label=label, marker="o" if len(rounds) == 1 else "", linewidth=1.4)
        if any(std):
            axes.fill_between(
                rounds, np.subtract(mean, std), np.add(mean, std), color=colour, alpha=0.2, linewidth=0
            )
    if results.sweep.target is not None:
        axes.axhline(results.sweep.target, linewidth=1, color="0.3", linestyle="--")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _finish(axes, "Test accuracy", "round")


def _curve(rows: Sequence[Row]) -> tuple[list[int], list[float], list[float]]:
    """The rounds that all runs tested, with the mean and the standard deviation over the runs."""
    curves = [dict(zip(*row.run.curve("test_accuracy"), strict=True)) for row in rows if row.run]
    rounds = sorted(set.intersection(*map(set, curves))) if curves else []
    values = [[curve[number] for curve in curves] for number in rounds]
    return rounds, [fmean(v) for v in values], [stdev(v) if len(v) > 1 else 0.0 for v in values]


def _name(setting: Setting, short: dict[str, str]) -> str:
    return ",".join(f"{short[key]}={shown_value(value)}" for key, value in setting.point.items()) or "all"


def _finish(axes: Axes, title: str, xlabel: str) -> None:
    axes.set(title=title)
    axes.set_xlabel(xlabel, parse_math=False)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
