"""The options of the commands `serve`, `node` and `nodes`, and what they do."""

import json
import logging
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ByteSize
from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.base.reading import read_yaml
from fedsim.errors import ConfigError
from fedsim.flower import needs_flwr

WIDTH = 80  # of a table


def on_nodes(
    config: Path,
    *,
    superlink: str | None,
    ca: Path | None,
    insecure: bool,
    nodes: str | None,
    keys: Path | None,
) -> dict[str, Any]:
    """The overrides that make a config run on nodes; raises ConfigError."""
    runtime = read_yaml(config).get("runtime")
    name = runtime.get("name") if isinstance(runtime, dict) else runtime
    given = {
        "superlink": superlink,
        "ca": ca and str(ca),
        "insecure": insecure or None,
        "keys": keys and str(keys),
    }
    overrides: dict[str, Any] = {} if name == "flower" else {"runtime": {"name": "flower"}}
    overrides |= {f"runtime.{key}": value for key, value in given.items() if value is not None}
    if nodes is None:
        return overrides
    if nodes.isdecimal():
        return overrides | {"data.clients": int(nodes)}
    names = [each.strip() for each in nodes.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"--nodes: {nodes!r} should be a number, or different names such as a,b,c")
    return overrides | {"runtime.nodes": names, "data.clients": len(names)}


def work(path: Path, **given: Any) -> NoReturn:
    """Run a node until it is interrupted."""
    needs_flwr("fedsim node")
    from fedsim.flower.node import Node, NodeSettings
    from fedsim.flower.node_process import FewLines, serve
    from fedsim.flower.run_connection import address_of

    overrides = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    settings = NodeSettings.read(path, {name: value for name, value in overrides.items() if value is not None})
    superlink = address_of(settings.superlink, settings.ca, settings.insecure, "")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {settings.name}: %(message)s"))
    handler.addFilter(FewLines())
    log = logging.getLogger("fedsim")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        serve(Node(settings), superlink, settings.key)
    except KeyboardInterrupt:
        log.info("stopped")
        raise SystemExit(0) from None


def kept(path: Path, as_json: bool) -> Table | str:
    """The runs that a node keeps, as a table or as JSON; raises ConfigError. The node may be at work."""
    from fedsim.flower.kept_runs import kept_runs, short_ids
    from fedsim.flower.node import NodeSettings

    settings = NodeSettings.read(path)
    runs = [*kept_runs(settings.home)]
    if as_json:
        return json.dumps([run.shown() for run in runs], indent=2)
    most = settings.allow.max_disk.human_readable()
    caption = f"{_size(sum(run.bytes for run in runs))} of {most}, which allow.max_disk allows"
    shown = Table(width=WIDTH, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.caption, shown.caption_justify = caption, "left"
    for name in ("run", "joined", "last message"):
        shown.add_column(name, no_wrap=True)
    shown.add_column("trains")
    for name in ("round", "size", "ended"):
        shown.add_column(name, justify="right", no_wrap=True)
    for run, short in zip(runs, short_ids([run.run for run in runs]), strict=True):
        times = [_time(run.joined)[:10] if run.joined else "unknown", _time(run.last_message)]
        trains = f"{run.strategy}, {run.model}" if run.strategy else "unknown"
        about = ["" if run.round is None else str(run.round), _size(run.bytes), "yes" if run.finished else "no"]
        shown.add_row(*map(Text, (short, *times, trains, *about)))  # not as markup: servers choose the names
    return shown


def forgotten(path: Path, run: str) -> str:
    """Delete a run of a node, and say so; raises ConfigError. The node may be at work."""
    from fedsim.flower.kept_runs import forget
    from fedsim.flower.node import NodeSettings

    gone = forget(NodeSettings.read(path).home, run)
    return f"forgot {gone.run}: {_size(gone.bytes)}"


def _size(length: int) -> str:
    return ByteSize(length).human_readable()


def _time(seconds: float) -> str:
    """Of this machine's clock and place."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def table(folder: Path | None, address: str, ca: Path | None, insecure: bool) -> Table:
    """The nodes that a SuperLink knows; with a run's folder, their numbers of examples. Raises ConfigError."""
    needs_flwr("fedsim nodes")
    from fedsim.flower.node_list import node_rows
    from fedsim.flower.run_connection import address_of

    sizes = {} if folder is None else known_sizes(folder)
    shown = Table("node", "last seen", "examples", "versions")
    shown.add_column("Flower's number", no_wrap=True)
    for row in node_rows(address_of(address, ca, insecure, "--"), sizes):
        shown.add_row(*map(Text, row))  # not as markup: nodes choose their names
    return shown


def known_sizes(folder: Path) -> dict[str, int]:
    """The number of examples of each node of a run, by its last checkpoint; raises ConfigError."""
    from fedsim.experiment.checkpoint import Checkpoints
    from fedsim.experiment.folder import CHECKPOINTS

    saved, _ = Checkpoints(folder / CHECKPOINTS).latest(folder)
    choice = (saved[0].runtime if saved else None) or {}
    if choice.get("name") != "flower":
        raise ConfigError(f"{folder}: has no checkpoint of a run on nodes")
    return dict(zip(choice["nodes"], choice["sizes"], strict=True))
