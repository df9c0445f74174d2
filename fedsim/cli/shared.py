"""What several commands share: the console, and arguments that they take."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(soft_wrap=True)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, such as strategy.mu=0.1")
]
NewFolder = Annotated[
    Path | None, typer.Option(help="a new folder for the results; runs/NAME-1 and so on if not given")
]
