"""A picture of networks' speeds and costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedsim.export.timing import Profile
from fedsim.report.runs import shortened


def picture(found: Sequence[Profile], path: Path | str | BinaryIO) -> None:
    """A PNG: throughput against latency; and against FLOPs accuracy, or parameters where no run has one."""
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    speed, price = figure.subplots(1, 2)
    runs = any(profile.accuracy is not None for profile in found)
    for number, profile in enumerate(found):
        colour, times = f"C{number % 10}", [profile.latency(batch) for batch in profile.seconds]
        x, y = [1e3 * time.mean for time in times], [time.throughput for time in times]
        speed.plot(x, y, "o-", color=colour, label=shortened(profile.label, 40))
        for batch, at in zip(profile.seconds, zip(x, y, strict=True), strict=True):
            _note(speed, str(batch), at)
        height = profile.accuracy if runs else profile.cost.parameters
        if height is not None:
            price.plot(profile.cost.flops, height, "o", color=colour)
            _note(price, shortened(profile.label, 24), (profile.cost.flops, height))
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


def _note(axes: Axes, text: str, at: tuple[float, float]) -> None:
    axes.annotate(text, at, (4, 4), textcoords="offset points", fontsize=7, parse_math=False)
