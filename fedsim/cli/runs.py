"""Commands that run experiments, resume them and compare them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fedsim.cli.interrupts import STATUS, raise_on_interrupt
from fedsim.cli.shared import AsJson, ConfigPath, NewFolder, Settings, console, errors, print_json
from fedsim.errors import ClientError, ConfigError, RoundError, one_line, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from fedsim.experiment.start import Started
    from fedsim.sweep.results import Results


def run(
    config: ConfigPath,
    settings: Settings = None,
    out: NewFolder = None,
) -> None:
    """Train a federation, and write its results to a new folder."""
    from fedsim.experiment.config import load, parse_overrides
    from fedsim.experiment.start import new_run

    loaded = load(config, parse_overrides(settings or []))
    raise_on_interrupt()
    execute_and_show(new_run(loaded, out, config.stem))


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, or of a sweep")],
    settings: Settings = None,
    force: Annotated[bool, typer.Option(help="accept changed settings that change the result")] = False,
    as_json: AsJson = False,
) -> None:
    """Resume a run that was stopped or killed; it ends as if it had never stopped. rounds=200 makes it longer."""
    from fedsim.experiment.config import parse_overrides
    from fedsim.experiment.start import resumed_run
    from fedsim.sweep.folder import is_sweep

    if is_sweep(folder):
        from fedsim.sweep import resume as resume_sweep

        if settings or force:
            raise ConfigError(
                f"{folder}: is a sweep, whose settings are in its sweep.yaml; resume it without others"
            )
        raise_on_interrupt()
        show_sweep(lambda shown: resume_sweep(folder, shown), as_json)
    if as_json:
        raise ConfigError(f"--json: {folder} is no sweep; the results of a run are in its summary.json")
    overrides = parse_overrides(settings or [])
    raise_on_interrupt()
    execute_and_show(resumed_run(folder, overrides, force))


def sweep(
    config: ConfigPath,
    settings: Annotated[
        list[str], typer.Argument(metavar="KEY=V1,V2,...", help="such as local.lr=0.05,0.1 seed=0..4 rounds=50")
    ],
    out: Annotated[
        Path | None, typer.Option(help="a folder for the results; where it holds the same sweep, that is resumed")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="an accuracy from 0 to 1: how many rounds did each take to it?")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="combinations side by side; by cores or GPUs if not given")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run all combinations of settings: as one batch where that is possible, or side by side."""
    from fedsim.sweep import sweep as run_all

    raise_on_interrupt()
    show_sweep(lambda shown: run_all(config, settings, out, target, jobs, shown), as_json)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    target: Annotated[
        float | None, typer.Option(help="an accuracy from 0 to 1: how long did each take to it?")
    ] = None,
    out: Annotated[Path, typer.Option(help="the picture")] = Path("compare.png"),
    as_json: AsJson = False,
) -> None:
    """Compare runs: their curves in one picture, and rounds and bytes to a target accuracy."""
    from fedsim.report.plot import check_drawable, curves
    from fedsim.report.runs import compare as table
    from fedsim.report.runs import document, read_run

    if target is not None and not 0 < target < 1:
        raise ConfigError(f"--target: {target} should be between 0 and 1, such as 0.99")
    raise_on_interrupt()
    check_drawable(out, "--out")
    read = [read_run(folder) for folder in runs]
    if as_json:
        curves(read, out, target)
        print_json(document(read, target) | {"picture": str(out)})
        return
    console.print(table(read, target))
    curves(read, out, target)
    console.out(f"picture: {printable(out)}")


def show_sweep(run_all: "Callable[[Console], tuple[int, Results | None]]", as_json: bool) -> NoReturn:
    """Run a sweep, and end with its status; with `as_json` what it found is the only thing on standard output."""
    status, results = run_all(errors if as_json else console)
    if as_json and results:
        print_json(results.document())
    raise typer.Exit(status)


def execute_and_show(started: "Started") -> None:
    """Run to the end what was started, and show its progress and its results."""
    from fedsim.experiment.execute import execute
    from fedsim.experiment.progress import Bar, Plain

    run, hooks = started
    for note in run.notes:
        print(f"fedsim: {printable(note)}", file=sys.stderr)
    assert run.folder is not None
    folder = run.folder.path
    try:
        result = execute(run, [*hooks, Bar(console) if console.is_terminal else Plain(console)])
    except (ClientError, RoundError, OSError):
        if folder.is_dir():  # not deleted meanwhile
            way = f"once the cause is removed, fedsim resume {printable(folder)} continues"
            console.out(f"rounds done: {len(run.records)}; {way}")
        raise
    for line in run.warnings:
        print(f"fedsim: {printable(line)}; the other results are whole", file=sys.stderr)
    found = result.summary
    if found["test_accuracy"] is not None:
        console.out(
            f"test accuracy {found['test_accuracy']:.2%} (best {found['best_test_accuracy']:.2%}) "
            f"after {found['rounds']} rounds, {found['client_steps_per_second']:,.0f} client steps a second"
        )
    if "new_client_accuracy_mean" in found:
        worst = f"worst tenth {found['new_client_accuracy_worst_decile']:.2%}"
        console.out(
            f"{found['new_clients']} new clients: accuracy {found['new_client_accuracy_mean']:.2%} ({worst})"
        )
    if run.stopped:
        console.out(f"stopped: {one_line(run.stopped)}")
    if (folder / "curves.png").is_file():
        console.out(f"picture: {printable(folder / 'curves.png')}")
    console.out(f"results: {printable(folder)}")
    if result.interrupted:
        done = f"interrupted after round {found['rounds']} of {run.config.rounds}"
        print(f"fedsim: {done}; fedsim resume {printable(folder)} goes on", file=sys.stderr)
        raise typer.Exit(STATUS)
