"""Pictures of a partition: a table for the terminal, and a PNG for the folder of a run.

Shapes: N clients, L labels.
"""

from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.markup import escape
from rich.table import Table

from fedsim.data.dataset import Ints
from fedsim.data.federated import FederatedData
from fedsim.data.partition import label_counts

MAX_NAME_LENGTH = 24  # of a client in the table
MAX_TABLE_CLIENTS = 20  # clients with a row of their own in the table
MAX_DISC_CLIENTS = 30  # up to so many clients and labels, each pair has a disc; with more there is a heat map
MAX_HEAT_MAP_COLUMNS = 800  # with more clients, several share a column
BARS = "▁▂▃▄▅▆▇█"
MAX_BARS = 32  # characters of a client's label mix
COLOUR, COLOUR_MAP = "#1f4e79", "Blues"


def label_table(data: FederatedData) -> Table:
    """Examples and labels of the first clients, then quantiles over all clients; at most 80 columns wide."""
    of_clients = data.owners >= 0
    labels, owners = data.labels.cpu().numpy()[of_clients], data.owners[of_clients]
    sizes = np.bincount(owners, minlength=data.num_clients)
    pairs = np.unique(owners * data.num_classes + labels)
    kinds = np.bincount(pairs // data.num_classes, minlength=data.num_clients)
    num_listed = min(MAX_TABLE_CLIENTS, data.num_clients)
    listed = owners < num_listed
    counts = label_counts(labels[listed], owners[listed], num_listed, data.num_classes)

    mix = f"label 0 to {data.num_classes - 1}"
    table = Table(title=f"{data.num_clients:,} clients, {len(labels):,} examples, {data.num_classes} labels")
    for heading in ("client", "examples", "labels"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(mix, no_wrap=True)
    for client, row in enumerate(counts):
        last = client == len(counts) - 1
        name = f"{client} {data.client_names[client]}"[:MAX_NAME_LENGTH] if data.client_names else str(client)
        table.add_row(escape(name), f"{sizes[client]:,}", str(kinds[client]), _bars(row), end_section=last)
    if data.num_clients > MAX_TABLE_CLIENTS:
        for name, q in (("min", 0), ("25 %", 0.25), ("median", 0.5), ("75 %", 0.75), ("max", 1)):
            table.add_row(
                name, f"{np.quantile(sizes, q):,.0f}", f"{np.quantile(kinds, q):,.0f}", "", end_section=q == 1
            )
    everything = np.bincount(labels, minlength=data.num_classes)
    table.add_row("all", f"{len(labels):,}", str(np.count_nonzero(everything)), _bars(everything))
    return table


def draw(labels: Ints, owners: Ints, classes: int, path: Path) -> None:
    """Writes a PNG of the labels and the number of examples of each client. Shapes: labels and owners (n,)."""
    clients = int(owners.max()) + 1
    counts = label_counts(labels, owners, clients, classes)
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    figure.suptitle(f"{clients:,} clients, {counts.sum():,} examples, {classes} labels")
    if max(clients, classes) <= MAX_DISC_CLIENTS:
        sizes, mix = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
        _draw_sizes(sizes, counts)
        _draw_discs(mix, counts)
    else:
        mix, sizes = figure.subplots(2, 1, height_ratios=(3, 1.4))
        _draw_heat_map(figure, mix, counts)
        _draw_size_histogram(sizes, counts.sum(1))
    mix.set_ylabel("label")
    if classes <= MAX_DISC_CLIENTS:
        mix.set_yticks(range(classes))
    figure.savefig(path, format="png")


def _bars(counts: Ints) -> str:
    """One bar for each label, as high as it has examples; with many labels, neighbours share a bar."""
    cuts = np.linspace(0, len(counts), min(len(counts), MAX_BARS) + 1).astype(np.int64)[:-1]
    heights = np.add.reduceat(counts, cuts) / np.diff(cuts, append=len(counts))
    # Rounded up, so that the bar of every label that has examples is visible.
    steps = np.ceil(heights * len(BARS) / heights.max()).astype(np.int64)
    return "".join(BARS[step - 1] if step else " " for step in steps)


def _draw_sizes(axes: Axes, counts: Ints) -> None:
    axes.bar(np.arange(len(counts)), counts.sum(1), color=COLOUR, width=0.7)
    _style(axes)
    axes.set_ylabel("examples")


def _draw_discs(axes: Axes, counts: Ints) -> None:
    client, label = np.nonzero(counts)
    distance = min(570 / len(counts), 270 / counts.shape[1])  # about the points between two neighbours
    area = (0.95 * distance) ** 2
    axes.scatter(client, label, s=area * counts[client, label] / counts.max(), color=COLOUR, linewidths=0)
    axes.set_xlabel(f"client (the largest disc: {counts.max():,} examples of one label)")
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.set_ylim(-0.6, counts.shape[1] - 0.4)
    axes.set_xticks(range(len(counts)))
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    _style(axes)


def _draw_heat_map(figure: Figure, axes: Axes, counts: Ints) -> None:
    """The share of each label among a client's examples; clients are ordered by their most frequent label."""
    share = counts / counts.sum(1, keepdims=True)
    order = np.lexsort((-share.max(1), share.argmax(1)))
    cuts = np.linspace(0, len(order), min(len(order), MAX_HEAT_MAP_COLUMNS) + 1).astype(np.int64)
    mean = np.add.reduceat(share[order], cuts[:-1]) / np.diff(cuts)[:, None]
    clients, classes = counts.shape
    picture = axes.imshow(
        mean.T,
        aspect="auto",
        origin="lower",
        cmap=COLOUR_MAP,
        norm=PowerNorm(0.5, vmin=0, vmax=1),  # the same scale in all pictures; small shares are visible
        interpolation="nearest",
        extent=(0, clients, -0.5, classes - 0.5),
    )
    axes.set_xlabel("clients, ordered by their most frequent label")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.colorbar(picture, ax=axes, label="share of a client's examples", pad=0.01)


def _draw_size_histogram(axes: Axes, sizes: Ints) -> None:
    low, high = int(sizes.min()), int(sizes.max())
    step = ceil((high - low + 1) / min(50, 10 + len(sizes) // 10))
    axes.hist(sizes, bins=(np.arange(low, high + step + 1, step) - 0.5).tolist(), color=COLOUR, rwidth=0.9)
    axes.set_xlabel(f"examples a client (from {low:,} to {high:,}, median {np.median(sizes):,.0f})")
    axes.set_ylabel("clients")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    if high - low < 5:
        axes.set_xlim(low - 3, high + 3)
    _style(axes)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
