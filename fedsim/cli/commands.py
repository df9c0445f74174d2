"""All commands by name, in the order of `fedsim --help`."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from fedsim.cli.federations import certificates, flower_app, node, nodes, serve
from fedsim.cli.inspection import list_, partition
from fedsim.cli.interrupts import Interrupted
from fedsim.cli.measurement import bench, export, profile
from fedsim.cli.runs import compare, resume, run, sweep

COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "serve": serve,
    "node": node,
    "nodes": nodes,
    "app": flower_app,
    "resume": resume,
    "sweep": sweep,
    "partition": partition,
    "compare": compare,
    "list": list_,
    "bench": bench,
    "profile": profile,
    "export": export,
    "certificates": certificates,
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated learning: simulate it, study non-IID data, take it to real machines.",
)


def _interruptible(function: Callable[..., None]) -> Callable[..., None]:
    """The same command, which an interrupt ends with `Interrupted`: typer's own status has no message."""

    @wraps(function)
    def call(**arguments: Any) -> None:
        try:
            function(**arguments)
        except KeyboardInterrupt:
            raise Interrupted from None

    return call


for name, function in COMMANDS.items():
    app.command(name)(_interruptible(function))
