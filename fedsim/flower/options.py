"""The options of the commands `serve`, `node` and `nodes`, and what they do."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedsim.base.catalogue import Spec
from fedsim.base.reading import read_yaml
from fedsim.errors import ConfigError
from fedsim.flower import needs_flwr

if TYPE_CHECKING:
    from fedsim.flower.kept_runs import KeptRun
    from fedsim.flower.node import NodeSettings
    from fedsim.flower.node_list import Known
    from fedsim.flower.offer import Offer


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


def node_settings(path: Path, **given: Any) -> "NodeSettings":
    """The settings of a node's file, with what is `given` on the command line; raises ConfigError."""
    from fedsim.flower.node import NodeSettings

    overrides = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return NodeSettings.read(path, {name: value for name, value in overrides.items() if value is not None})


def checked_node(path: Path, **given: Any) -> "Offer":
    """What a node would offer a federation, without a server; raises ConfigError where it could not start."""
    needs_flwr("fedsim node")
    from fedsim.flower.offer import offer

    return offer(node_settings(path, **given))


def work(path: Path, **given: Any) -> NoReturn:
    """Run a node until it is interrupted."""
    needs_flwr("fedsim node")
    from fedsim.flower.node import Node
    from fedsim.flower.node_process import FewLines, serve
    from fedsim.flower.run_connection import address_of

    settings = node_settings(path, **given)
    superlink = address_of(settings.superlink, settings.ca, settings.insecure, "")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {settings.name}: %(message)s"))
    handler.addFilter(FewLines())
    log = logging.getLogger("fedsim")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        serve(Node(settings), superlink, settings.key)
    except KeyboardInterrupt:
        log.info("stopped")
        raise SystemExit(0) from None
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def kept(path: Path) -> tuple[list["KeptRun"], int]:
    """The runs that a node keeps, and the bytes that they may take; raises ConfigError. It may be at work."""
    from fedsim.flower.kept_runs import kept_runs
    from fedsim.flower.node import NodeSettings

    settings = NodeSettings.read(path)
    return [*kept_runs(settings.home)], settings.allow.max_disk


def forgotten(path: Path, run: str) -> str:
    """Delete a run of a node, and say so; raises ConfigError. The node may be at work."""
    from fedsim.flower.kept_runs import forget, size_text
    from fedsim.flower.node import NodeSettings

    gone = forget(NodeSettings.read(path).home, run)
    return f"forgot {gone.run}: {size_text(gone.bytes)}"


def shown_nodes(
    folder: Path | None, superlink: str | None, ca: Path | None, insecure: bool
) -> tuple[str, list["Known"]]:
    """A SuperLink's address, and the nodes that it knows; raises ConfigError.

    With a run's folder, their numbers of examples; and what is not given is as that run has it.
    """
    needs_flwr("fedsim nodes")
    from fedsim.flower.node_list import known_nodes
    from fedsim.flower.run_connection import address_of

    runtime = {} if folder is None else runtime_of(folder)
    if ca is None and not insecure:
        ca, insecure = runtime.get("ca"), runtime.get("insecure", False)
    address = superlink or runtime.get("superlink", "127.0.0.1:8000")
    sizes = {} if folder is None else known_sizes(folder)
    return address, [*known_nodes(address_of(address, ca and Path(ca), insecure, "--"), sizes)]


def runtime_of(folder: Path) -> Spec:
    """`runtime` in the config.yaml of a run on nodes; raises ConfigError."""
    from fedsim.experiment.folder import read_config
    from fedsim.runtimes import RUNTIMES

    runtime = read_config(folder).get("runtime")
    if not (isinstance(runtime, dict) and runtime.get("name") == "flower"):  # nothing else is looked up
        raise ConfigError(f"{folder}: is no run on nodes")
    return RUNTIMES.resolve(runtime, f"{folder / 'config.yaml'}: runtime")


def known_sizes(folder: Path) -> dict[str, int]:
    """The number of examples of each node of a run, by its last checkpoint; raises ConfigError."""
    from fedsim.experiment.check_files import check_nodes
    from fedsim.experiment.checkpoint import Checkpoints
    from fedsim.experiment.folder import CHECKPOINTS

    saved, _ = Checkpoints(folder / CHECKPOINTS).latest(folder)
    choice = (saved[0].runtime if saved else None) or {}
    if choice.get("name") != "flower":
        raise ConfigError(f"{folder}: has no checkpoint of a run on nodes")
    try:
        check_nodes(choice, None)
    except ValueError as error:
        raise ConfigError(f"{folder}: its newest checkpoint {error}") from None
    return dict(zip(choice["nodes"], choice["sizes"], strict=True))
