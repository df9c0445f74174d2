"""One command, `fedsim`. Exit status: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedsim.errors import ClientError, ConfigError, RoundError, printable

if TYPE_CHECKING:
    from fedsim.experiment import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated learning: simulate it, study non-IID data, take it to real machines.",
)
console = Console(soft_wrap=True)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, such as strategy.mu=0.1")
]


@app.command()
def run(
    config: ConfigPath,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder for the results; runs/NAME-1 and so on if not given")
    ] = None,
) -> None:
    """Train a federation, and leave a folder with what came out."""
    from fedsim.config import load, parse_overrides
    from fedsim.experiment import Run

    _execute(Run.start(load(config, parse_overrides(settings or [])), out, config.stem))


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    settings: Settings = None,
    force: Annotated[bool, typer.Option(help="take settings that change the result, too")] = False,
) -> None:
    """Go on with a run that was stopped or killed, as if it had not been; rounds=200 makes it longer."""
    from fedsim.config import parse_overrides
    from fedsim.experiment import Run

    resumed = Run.resume(folder, parse_overrides(settings or []), force)
    for note in resumed.notes:
        print(f"fedsim: {printable(note)}", file=sys.stderr)
    _execute(resumed)


def _execute(run: "Run") -> None:
    from fedsim.experiment import execute
    from fedsim.progress import Bar, Plain

    assert run.folder is not None
    folder = run.folder.path
    try:
        result = execute(run, [Bar(console) if console.is_terminal else Plain(console)])
    except (ClientError, RoundError, OSError):
        console.out(f"rounds that are done: {len(run.records)}; fedsim resume {folder} goes on after them")
        raise
    found = result.summary
    if found["test_accuracy"] is not None:
        console.out(
            f"test accuracy {found['test_accuracy']:.2%} (best {found['best_test_accuracy']:.2%}) "
            f"after {found['rounds']} rounds, {found['client_steps_per_second']:,.0f} client steps a second"
        )
    if run.stopped:
        console.out(f"stopped: {run.stopped}")
    if (folder / "curves.png").exists():
        console.out(f"picture: {folder / 'curves.png'}")
    console.out(f"results: {folder}")
    if result.interrupted:
        done = f"interrupted after round {found['rounds']} of {run.config.rounds}"
        print(f"fedsim: {done}; fedsim resume {folder} goes on", file=sys.stderr)
        raise typer.Exit(130)


@app.command()
def partition(
    config: ConfigPath,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="the picture; NAME-partition.png if not given")] = None,
) -> None:
    """Show who holds what: a table, and a picture of labels and sizes by client."""
    from fedsim.config import build_data, load, parse_overrides
    from fedsim.data.partition import content_hash
    from fedsim.data.picture import draw, label_table

    data = build_data(load(config, parse_overrides(settings or [])))
    out = out or Path(f"{config.stem}-partition.png")
    console.print(label_table(data))
    draw(data.labels.numpy(), data.owners, data.num_classes, out)
    console.out(f"hash:    {content_hash(data.owners)}\npicture: {out}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    target: Annotated[
        float | None, typer.Option(help="an accuracy from 0 to 1: how long did each take to it?")
    ] = None,
    out: Annotated[Path, typer.Option(help="the picture")] = Path("compare.png"),
) -> None:
    """Set runs side by side: curves over each other, rounds and bytes to a target accuracy."""
    from fedsim.plot import curves
    from fedsim.report import compare as table
    from fedsim.report import read_run

    if target is not None and not 0 < target < 1:
        raise ConfigError(f"--target: {target} should be between 0 and 1, such as 0.99")
    read = [read_run(folder) for folder in runs]
    console.print(table(read, target))
    curves(read, out, target)
    console.out(f"picture: {out}")


@app.command(name="list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help="strategies, models, datasets, ...; all if not given")
    ] = None,
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="such as 'fed*'; one name shows its options")
    ] = "*",
) -> None:
    """List what a config can name: strategies, models, datasets, partitions and so on."""
    from fedsim.listing import listing

    for table in listing(kind, pattern):
        console.print(table)


@app.command()
def bench(
    config: ConfigPath,
    settings: Settings = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds a side, the sides in turn")] = 5,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures")] = None,
) -> None:
    """Time a config's client steps against plain PyTorch loops, sides in turn, and print ratios."""
    from fedsim.bench import bench as measure
    from fedsim.config import load, parse_overrides

    measure(load(config, parse_overrides(settings or [])), repeats, console, out)


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        app()
    except ConfigError as error:
        _leave(str(error), 2)
    except (ClientError, RoundError) as error:
        _leave(str(error), 1)
    except OSError as error:
        _leave(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def _leave(message: str, status: int) -> None:
    print(f"fedsim: {printable(message)}", file=sys.stderr)
    raise SystemExit(status)
