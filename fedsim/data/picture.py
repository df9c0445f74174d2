"""A partition at a glance: a table for the terminal and a picture for the run's folder.

Shapes: N clients, L labels.
"""

from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.table import Table

from fedsim.data.dataset import Ints
from fedsim.data.federated import FederatedData
from fedsim.data.partition import label_counts

LISTED = 20  # clients with a row of their own in the table
BUBBLES = 30  # clients and labels up to which a pair has a disc, its area the number of examples
COLUMNS = 800  # of the heat map; more clients share one
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32  # characters of a client's label mix
INK, PALE = "#1f4e79", "Blues"


def label_table(data: FederatedData) -> Table:
    """Examples and labels of the first clients, then quantiles over all; at most 80 columns wide."""
    held = data.owners >= 0
    labels, owners = data.labels.cpu().numpy()[held], data.owners[held]
    sizes = np.bincount(owners, minlength=data.num_clients)
    pairs = np.unique(owners * data.num_classes + labels)
    kinds = np.bincount(pairs // data.num_classes, minlength=data.num_clients)
    few = owners < LISTED
    counts = label_counts(labels[few], owners[few], min(LISTED, data.num_clients), data.num_classes)

    mix = f"label 0 to {data.num_classes - 1}"
    table = Table(title=f"{data.num_clients:,} clients, {len(labels):,} examples, {data.num_classes} labels")
    for heading in ("client", "examples", "labels"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(mix, no_wrap=True)
    for client, row in enumerate(counts):
        last = client == len(counts) - 1
        table.add_row(str(client), f"{sizes[client]:,}", str(kinds[client]), _bars(row), end_section=last)
    if data.num_clients > LISTED:
        for name, q in (
            ("min", 0),
            ("25 %", 0.25),
            ("median", 0.5),
            ("75 %", 0.75),
            ("max", 1),
        ):
            table.add_row(
                name, f"{np.quantile(sizes, q):,.0f}", f"{np.quantile(kinds, q):,.0f}", "", end_section=q == 1
            )
    everything = np.bincount(labels, minlength=data.num_classes)
    table.add_row("all", f"{len(labels):,}", str(np.count_nonzero(everything)), _bars(everything))
    return table


def draw(labels: Ints, owners: Ints, classes: int, path: Path) -> None:
    """Writes a PNG: who holds which labels, and how many examples. Shapes: labels and owners (n,)."""
    clients = int(owners.max()) + 1
    counts = label_counts(labels, owners, clients, classes)
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    figure.suptitle(f"{clients:,} clients, {counts.sum():,} examples, {classes} labels")
    if max(clients, classes) <= BUBBLES:
        sizes, mix = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
        _size_bars(sizes, counts)
        _bubbles(mix, counts)
    else:
        mix, sizes = figure.subplots(2, 1, height_ratios=(3, 1.4))
        _heat(figure, mix, counts)
        _size_histogram(sizes, counts.sum(1))
    mix.set_ylabel("label")
    if classes <= BUBBLES:
        mix.set_yticks(range(classes))
    figure.savefig(path, format="png")


def _bars(counts: Ints) -> str:
    """One bar a label, the tallest for the most frequent; neighbours share a bar where there are too many."""
    cuts = np.linspace(0, len(counts), min(len(counts), WIDTH) + 1).astype(np.int64)[:-1]
    heights = np.add.reduceat(counts, cuts) / np.diff(cuts, append=len(counts))
    steps = np.ceil(heights * len(BARS) / heights.max()).astype(np.int64)  # up: what is there is seen
    return "".join(BARS[step - 1] if step else " " for step in steps)


def _size_bars(axes: Axes, counts: Ints) -> None:
    axes.bar(np.arange(len(counts)), counts.sum(1), color=INK, width=0.7)
    _plain(axes)
    axes.set_ylabel("examples")


def _bubbles(axes: Axes, counts: Ints) -> None:
    client, label = np.nonzero(counts)
    room = min(570 / len(counts), 270 / counts.shape[1])  # points between two neighbours, roughly
    area = (0.95 * room) ** 2
    axes.scatter(client, label, s=area * counts[client, label] / counts.max(), color=INK, linewidths=0)
    axes.set_xlabel(f"client (the largest disc: {counts.max():,} examples of a label)")
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.set_ylim(-0.6, counts.shape[1] - 0.4)
    axes.set_xticks(range(len(counts)))
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    _plain(axes)


def _heat(figure: Figure, axes: Axes, counts: Ints) -> None:
    """The share of each label in a client, clients ordered by their main label."""
    share = counts / counts.sum(1, keepdims=True)
    order = np.lexsort((-share.max(1), share.argmax(1)))
    cuts = np.linspace(0, len(order), min(len(order), COLUMNS) + 1).astype(np.int64)
    mean = np.add.reduceat(share[order], cuts[:-1]) / np.diff(cuts)[:, None]
    clients, classes = counts.shape
    picture = axes.imshow(
        mean.T,
        aspect="auto",
        origin="lower",
        cmap=PALE,
        norm=PowerNorm(0.5, vmin=0, vmax=1),  # one scale for all pictures, with room at the pale end
        interpolation="nearest",
        extent=(0, clients, -0.5, classes - 0.5),
    )
    axes.set_xlabel("clients, ordered by the label they hold most of")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.colorbar(picture, ax=axes, label="share of a client's examples", pad=0.01)


def _size_histogram(axes: Axes, sizes: Ints) -> None:
    low, high = int(sizes.min()), int(sizes.max())
    step = ceil((high - low + 1) / min(50, 10 + len(sizes) // 10))
    axes.hist(sizes, bins=(np.arange(low, high + step + 1, step) - 0.5).tolist(), color=INK, rwidth=0.9)
    axes.set_xlabel(f"examples a client (from {low:,} to {high:,}, median {np.median(sizes):,.0f})")
    axes.set_ylabel("clients")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    if high - low < 5:
        axes.set_xlim(low - 3, high + 3)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
