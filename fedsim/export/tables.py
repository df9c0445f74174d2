"""Networks' costs and speeds as two tables, 80 columns wide, and as JSON."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table

from fedsim.export.cost import digits, short, size
from fedsim.export.timing import PERCENTILES, Precision, Profile, machine
from fedsim.report.runs import ABSENT, WIDTH


def tables(found: Sequence[Profile], device: torch.device, precision: Precision) -> Iterator[Table]:
    """What the networks cost, and how long they took: two tables, 80 columns wide."""
    costs = _table("model", "examples", "parameters", "FLOPs", "activations", "accuracy")
    costs.caption = "FLOPs: multiply-adds; activations: what training keeps; both of one example"
    times = _table("model", "batch", "mean", *(f"p{p}" for p in PERCENTILES), "examples/s")
    times.caption = f"milliseconds a batch; {machine(device)}, {precision}"
    for profile in found:
        accuracy = ABSENT if profile.accuracy is None else f"{profile.accuracy:.2%}"
        figures = [f"{short(n)}{unit}" for n, unit in zip(profile.cost, ("", "", "B"), strict=True)]
        costs.add_row(profile.label, size(profile.shape), *figures, accuracy)
        for batch in profile.seconds:
            *seconds, throughput = profile.latency(batch)
            times.add_row(profile.label, str(batch), *(digits(1e3 * s) for s in seconds), digits(throughput))
    yield costs
    yield times


def document(found: Sequence[Profile], device: torch.device, precision: Precision) -> dict[str, Any]:
    """All figures, and the seconds of every pass."""
    models = [
        {
            "model": profile.label,
            "shape": profile.shape,
            "accuracy": profile.accuracy,
            **profile.cost._asdict(),
            "batches": [
                {"batch": batch, **profile.latency(batch)._asdict(), "seconds": seconds}
                for batch, seconds in profile.seconds.items()
            ],
        }
        for profile in found
    ]
    about = {"machine": machine(device), "torch": torch.__version__, "precision": precision}
    return about | {"models": models}


def _table(first: str, *others: str) -> Table:
    table = Table(width=WIDTH, box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column(first, ratio=1, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
