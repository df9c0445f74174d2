"""What a node would offer a federation: `fedsim node NODE.yaml --check`, without a server and without a trace."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from fedsim.base.catalogue import Spec
from fedsim.errors import ConfigError, printable
from fedsim.flower.kept_runs import kept_runs, size_text
from fedsim.flower.node import NodeSettings, opened
from fedsim.report.runs import WIDTH

NAMED = "strategies", "models", "losses", "schedules", "augmentations"  # in `allow`: lists of names
MOST_NAMES = 20  # of classes that the table shows


class Offer(NamedTuple):
    """A node's settings and data, as they are on its machine."""

    name: str
    device: str
    examples: int  # n_k, that it trains on
    tested: int  # examples that it evaluates its own model on
    held_out: bool  # whether these are others than the first
    shape: list[int]  # of an example
    dtype: str
    classes: int
    class_names: list[str]  # none where only numbers are known
    mean: list[float] | None  # None: the federation's
    std: list[float] | None
    allow: Spec  # in it null allows all that comes with fedsim
    superlink: str
    ca: str | None
    insecure: bool
    key: str | None
    state: str  # the folder of the node's own states
    runs: int  # that it keeps
    disk_used: int  # bytes of these runs
    disk_free: int  # bytes, of the disk


def offer(settings: NodeSettings) -> Offer:
    """What a node has to offer; raises ConfigError where it could not start. It may be at work meanwhile."""
    from fedsim.flower.internals import key_pair
    from fedsim.flower.run_connection import address_of

    insecure = settings.insecure or settings.ca is None  # neither of them: one comes with the command
    address_of(settings.superlink, settings.ca, insecure, "")
    if settings.key:
        key_pair(settings.key)
    free, runs = _free(settings.home), [*kept_runs(settings.home)]
    device, data = opened(settings)
    n, tested = len(data.y_train), len(data.y_test)
    given = settings.data if isinstance(settings.data, dict) else {}
    own = any(given.get(name) is not None for name in ("mean", "std"))
    return Offer(
        settings.name,
        str(device),
        n,
        tested or n,
        bool(tested),
        [*data.x_train.shape[1:]],
        str(data.x_train.dtype).removeprefix("torch."),
        data.classes,
        [*data.class_names],
        [*data.mean] if own else None,
        [*data.std] if own else None,
        settings.allow.model_dump(mode="json"),
        settings.superlink,
        str(settings.ca) if settings.ca else None,
        settings.insecure,
        str(settings.key) if settings.key else None,
        str(settings.home),
        len(runs),
        sum(run.bytes for run in runs),
        free,
    )


def offer_table(found: Offer) -> Table:
    """A row for each thing to know, 80 columns wide."""
    table = Table(width=WIDTH, box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for name, text in _rows(found):
        table.add_row(name, Text(printable(text)))
    return table


def _rows(found: Offer) -> list[tuple[str, str]]:
    shown = found.class_names[:MOST_NAMES]
    more = [f"{len(found.class_names) - MOST_NAMES} more"] if len(found.class_names) > MOST_NAMES else []
    tests = f"{found.tested:,} others for tests" if found.held_out else "no others for tests"
    limits = {name: f"{value:,}" for name, value in found.allow.items() if name not in NAMED}
    limits |= {name: size_text(found.allow[name]) for name in ("max_bytes", "max_disk")}
    trust = (
        f"TLS, ca {found.ca}" if found.ca else "plain HTTP" if found.insecure else "neither ca nor insecure is set"
    )
    used = f"{found.runs} runs, {size_text(found.disk_used)} of {size_text(found.allow['max_disk'])}"
    return [
        ("name", found.name),
        ("examples", f"{found.examples:,} to train on, {tests}; {found.dtype} {found.shape}"),
        (
            "classes",
            f"{found.classes}: {', '.join([*shown, *more])}" if shown else f"{found.classes}, without names",
        ),
        ("mean, std", "the federation's" if found.mean is None else f"{found.mean}, {found.std}"),
        ("device", found.device),
        *((name, _names(found.allow[name])) for name in NAMED),
        ("limits", ", ".join(f"{name} {value}" for name, value in limits.items())),
        ("superlink", f"{found.superlink}, {trust}, {f'key {found.key}' if found.key else 'no key'}"),
        ("state", f"{found.state}: {used}; {size_text(found.disk_free)} of the disk are free"),
    ]


def _names(allowed: list[str] | None) -> str:
    return "all that come with fedsim" if allowed is None else ", ".join(allowed) or "none"


def _free(home: Path) -> int:
    """The bytes that are free where the node's folder is or will be; raises ConfigError where it cannot be."""
    there = next(path for path in (home, *home.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(f"state: {there}: is no folder in which this user can write")
    return shutil.disk_usage(there).free
