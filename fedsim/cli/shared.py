"""What several commands share: the console, arguments that they take, and how they print JSON."""

import json
import sys
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(soft_wrap=True)
errors = Console(soft_wrap=True, stderr=True)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, such as strategy.mu=0.1")
]
NewFolder = Annotated[
    Path | None, typer.Option(help="a new folder for the results; runs/NAME-1 and so on if not given")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="one JSON document instead of a table; all else goes to standard error")
]


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one document of a command with --json; numbers that JSON lacks are null."""
    sys.stdout.write(json.dumps(_plain(document), indent=1, default=str) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
