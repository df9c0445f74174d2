"""Commands that show which client holds which data, what a config can name, and whether a run is whole."""

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.interrupts import raise_on_interrupt
from fedsim.cli.shared import AsJson, ConfigPath, Settings, console, errors, print_json
from fedsim.errors import printable


def partition(
    config: ConfigPath,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="the picture; NAME-partition.png if not given")] = None,
    shards: Annotated[
        Path | None, typer.Option(metavar="DIR", help="a new folder for files of each client's own examples")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which client holds which data: a table, and a picture of labels and sizes."""
    from fedsim.data.partition import content_hash
    from fedsim.data.picture import draw, label_table
    from fedsim.experiment.build import build_data, build_dataset
    from fedsim.experiment.config import load, parse_overrides
    from fedsim.experiment.folder import describe
    from fedsim.report.plot import check_drawable

    loaded = load(config, parse_overrides(settings or []))
    raise_on_interrupt()
    out = out or Path(f"{config.stem}-partition.png")
    check_drawable(out, "--out")
    dataset = build_dataset(loaded)
    data = build_data(loaded, dataset)
    if shards is not None:
        from fedsim.flower.shards import server_data, write_shards

        write_shards(data, shards)
    wrong = int((data.labels != data.true_labels).sum())
    draw(data.labels.numpy(), data.owners, data.num_classes, out)
    if as_json:
        print_json(describe(data) | {"wrong_labels": wrong, "picture": str(out), "shards": shards and str(shards)})
        return
    console.print(label_table(data))
    if public := len(data.public):
        console.out(f"public: {public:,} more examples are the server's own")
    if new := len(data.new_clients):
        examples = int((data.owners < -1).sum())
        console.out(f"new clients: {new:,} more, with {examples:,} examples, do not train (evaluate.new_clients)")
    if wrong:
        console.out(f"label noise: {wrong:,} of {len(data.labels):,} labels are wrong")
    console.out(f"hash:    {content_hash(data.owners)}\npicture: {out}")
    if shards is not None:
        console.out(f"shards:  {shards}, a k.npz and a k.yaml for each client k: fedsim node k.yaml")
        console.out(f"server:  fedsim serve {config} 'data={server_data(data, dataset, shards)}'", highlight=False)


def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help="strategies, models, datasets, ...; all if not given")
    ] = None,
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="such as 'fed*'; one name shows its options")
    ] = "*",
    as_json: AsJson = False,
) -> None:
    """List what a config can name: strategies, models, datasets, partitions and so on."""
    from fedsim.listing import document, listing

    raise_on_interrupt()
    if as_json:
        print_json(document(kind, pattern))
        return
    for part in listing(kind, pattern):
        console.print(part, markup=False, highlight=False)


def check(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, or of a sweep")],
    as_json: AsJson = False,
) -> None:
    """Say what a run's folder holds, whether that is whole, and what to do next; changes nothing."""
    from dataclasses import asdict

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from fedsim.experiment.check import check_run
    from fedsim.experiment.checked import parts_table
    from fedsim.sweep.check import check_sweep
    from fedsim.sweep.folder import is_sweep

    raise_on_interrupt()
    columns = TextColumn("{task.description}"), BarColumn(bar_width=18), DownloadColumn()
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("checkpoints", total=None)
        look = check_sweep if is_sweep(folder) else check_run
        found = look(folder, lambda done, total: progress.update(bar, completed=done, total=total))
    if as_json:
        about = {"whole": not (found.faults or found.spares), "usable": not found.faults}
        print_json(asdict(found) | about | {"verdict": found.verdict, "next": found.next})
    else:
        console.print(parts_table(found))
        console.out(f"{printable(found.verdict)}\nnext: {printable(found.next)}", highlight=False)
    if found.faults:
        raise typer.Exit(1)
