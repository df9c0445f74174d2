"""One command, `fedsim`. Exit status: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fedsim.errors import ClientError, ConfigError, RoundError, printable

if TYPE_CHECKING:
    from fedsim.experiment.run import Run

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
    from fedsim.experiment.config import load, parse_overrides
    from fedsim.experiment.run import Run

    _execute(Run.start(load(config, parse_overrides(settings or [])), out, config.stem))


@app.command()
def serve(
    config: ConfigPath,
    settings: Settings = None,
    superlink: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Flower's SuperLink")] = None,
    ca: Annotated[Path | None, typer.Option(help="the certificate of the SuperLink's authority")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain HTTP, without a certificate")] = False,
    nodes: Annotated[
        str | None, typer.Option(metavar="N | A,B,C", help="how many nodes, or the names of those that take part")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="a folder of NAME.pub: a name belongs to the owner of its key")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder for the results; runs/NAME-1 and so on if not given")
    ] = None,
) -> None:
    """Train a federation of nodes on other machines, over Flower; `fedsim resume` goes on with it."""
    from fedsim.experiment.config import load, parse_overrides
    from fedsim.experiment.run import Run
    from fedsim.flower.options import on_nodes

    chosen = on_nodes(config, superlink=superlink, ca=ca, insecure=insecure, nodes=nodes, keys=keys)
    _execute(Run.start(load(config, chosen | parse_overrides(settings or [])), out, config.stem))


@app.command()
def node(
    settings: Annotated[Path, typer.Argument(metavar="NODE.yaml", help="the node's name, data and so on")],
    superlink: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Flower's SuperLink")] = None,
    ca: Annotated[Path | None, typer.Option(help="the certificate of the SuperLink's authority")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain HTTP, without a certificate")] = False,
    key: Annotated[Path | None, typer.Option(help="the node's private key, if the SuperLink asks for one")] = None,
) -> None:
    """Be a client with data of its own, for whoever drives the federation, until interrupted."""
    from fedsim.flower.options import work

    work(settings, superlink=superlink, ca=ca, insecure=insecure or None, key=key)


@app.command()
def nodes(
    folder: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="a run's folder, for what nodes have told in it")
    ] = None,
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Flower's SuperLink")] = "127.0.0.1:8000",
    ca: Annotated[Path | None, typer.Option(help="the certificate of the SuperLink's authority")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain HTTP, without a certificate")] = False,
) -> None:
    """Show the nodes of a federation: names, when they were last seen, and how much data, as far as told."""
    from fedsim.flower.options import table

    console.print(table(folder, superlink, ca, insecure))


@app.command(name="app")
def flower_app(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="a new folder for it")],
    settings: Settings = None,
) -> None:
    """Write an experiment as a Flower app, for `flwr run` and Flower's own SuperNodes."""
    from fedsim.base.reading import read_yaml
    from fedsim.experiment.config import overridden, parse_overrides
    from fedsim.flower.app import checked, write_app
    from fedsim.flower.options import on_nodes

    chosen = on_nodes(config, superlink=None, ca=None, insecure=False, nodes=None, keys=None)
    values = overridden(read_yaml(config), chosen | parse_overrides(settings or []))
    checked(values)
    console.out(f"app: {write_app(out, config.stem, values)}", highlight=False)
    console.out(f"run: flwr run {out} SUPERLINK --stream", highlight=False)
    console.out("how it ended: flwr ls SUPERLINK --format json", highlight=False)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, or of a sweep")],
    settings: Settings = None,
    force: Annotated[bool, typer.Option(help="take settings that change the result, too")] = False,
) -> None:
    """Go on with a run that was stopped or killed, as if it had not been; rounds=200 makes it longer."""
    from fedsim.experiment.config import parse_overrides
    from fedsim.experiment.run import Run
    from fedsim.sweep.folder import is_sweep

    if is_sweep(folder):
        from fedsim.sweep import resume as go_on

        if settings or force:
            raise ConfigError(
                f"{folder}: is a sweep, whose settings are in its sweep.yaml; resume it without others"
            )
        raise typer.Exit(go_on(folder, console))
    resumed = Run.resume(folder, parse_overrides(settings or []), force)
    for note in resumed.notes:
        print(f"fedsim: {printable(note)}", file=sys.stderr)
    _execute(resumed)


def _execute(run: "Run") -> None:
    from fedsim.experiment.progress import Bar, Plain
    from fedsim.experiment.run import execute

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
def sweep(
    config: ConfigPath,
    settings: Annotated[
        list[str], typer.Argument(metavar="KEY=V1,V2,...", help="such as local.lr=0.05,0.1 seed=0..4 rounds=50")
    ],
    out: Annotated[
        Path | None, typer.Option(help="a folder for the results; one with the same sweep is gone on with")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="an accuracy from 0 to 1: how many rounds did each take to it?")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="points at a time; by cores or GPUs if not given")
    ] = None,
) -> None:
    """Run all combinations of settings: as one batch where that is possible, or side by side."""
    from fedsim.sweep import sweep as run_all

    raise typer.Exit(run_all(config, settings, out, target, jobs, console))


@app.command()
def partition(
    config: ConfigPath,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="the picture; NAME-partition.png if not given")] = None,
    shards: Annotated[
        Path | None, typer.Option(metavar="DIR", help="a new folder for files of each client's own examples")
    ] = None,
) -> None:
    """Show who holds what: a table, and a picture of labels and sizes by client."""
    from fedsim.data.partition import content_hash
    from fedsim.data.picture import draw, label_table
    from fedsim.experiment.build import build_data, build_dataset
    from fedsim.experiment.config import load, parse_overrides

    loaded = load(config, parse_overrides(settings or []))
    dataset = build_dataset(loaded)
    data = build_data(loaded, dataset)
    if shards is not None:
        from fedsim.flower.shards import server_data, write_shards

        write_shards(data, shards)
    out = out or Path(f"{config.stem}-partition.png")
    console.print(label_table(data))
    if public := len(data.public):
        console.out(f"public: {public:,} more examples are the server's own")
    if wrong := int((data.labels != data.true_labels).sum()):
        console.out(f"label noise: {wrong:,} of {len(data.labels):,} labels are wrong")
    draw(data.labels.numpy(), data.owners, data.num_classes, out)
    console.out(f"hash:    {content_hash(data.owners)}\npicture: {out}")
    if shards is not None:
        console.out(f"shards:  {shards}, a k.npz and a k.yaml for each client k: fedsim node k.yaml")
        console.out(f"server:  fedsim serve {config} 'data={server_data(data, dataset, shards)}'", highlight=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    target: Annotated[
        float | None, typer.Option(help="an accuracy from 0 to 1: how long did each take to it?")
    ] = None,
    out: Annotated[Path, typer.Option(help="the picture")] = Path("compare.png"),
) -> None:
    """Set runs side by side: curves over each other, rounds and bytes to a target accuracy."""
    from fedsim.report.plot import curves
    from fedsim.report.runs import compare as table
    from fedsim.report.runs import read_run

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

    for part in listing(kind, pattern):
        console.print(part, markup=False, highlight=False)


@app.command()
def bench(
    config: ConfigPath,
    settings: Settings = None,
    repeats: Annotated[int, typer.Option(min=1, help="passes that count, the sides in turn")] = 5,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures, every pass's too")] = None,
    peers: Annotated[str, typer.Option(help="other simulators to compare with: flower, pfl")] = "",
    sides: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="only these, such as '*threads*'; may be given again"),
    ] = None,
    study: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="actors, population, cohort, idle, aggregation, startup or flower instead; may be given again",
        ),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="of a study; next to the JSON if not given")] = None,
) -> None:
    """Time a config's client steps against plain PyTorch loops and other simulators, in turn, and print ratios."""
    from fedsim.bench import bench as measure
    from fedsim.experiment.config import load, parse_overrides

    measure(
        load(config, parse_overrides(settings or [])),
        repeats,
        console,
        out,
        peers=[name.strip() for name in peers.split(",") if name.strip()],
        sides=sides or [],
        studies=study or [],
        drawing=picture,
    )


@app.command()
def profile(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL [KEY=VALUE]...", help="such as resnet18, '*resnext*' or resnet50 variant=d"),
    ] = None,
    runs: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="a run's network, too; may be given again")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="of an example, such as 3,224,224; a model's own if not given")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="a model's own if not given")] = None,
    batch: Annotated[str, typer.Option(help="examples a pass, such as 1,32")] = "1,32",
    device: Annotated[str, typer.Option(help="such as cpu or cuda:0; auto is a GPU if there is one")] = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="of weights and examples")] = "fp32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="images in channels-last order")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="with batch norm folded into convolutions")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="passes that count; p99 wants a hundred")] = 20,
    out: Annotated[Path, typer.Option(help="the picture")] = Path("profile.png"),
    json: Annotated[Path | None, typer.Option(help="a JSON file for the figures, every pass's too")] = None,
) -> None:
    """Show what networks cost: parameters, FLOPs, memory of training, latency and throughput."""
    from fedsim.export.drawing import picture
    from fedsim.export.tables import save, tables
    from fedsim.export.timing import measure, numbers, place, profiles
    from fedsim.export.write import check_writable

    if json is not None and json.exists():
        raise ConfigError(f"--json: {json} exists; name another file")
    for path, at in ((out, "--out"), (json, "--json")):
        if path is not None:
            check_writable(path, at)
    chosen, batches = place(device), numbers(batch, "--batch")
    found = profiles(models or [], runs or [], None if shape is None else numbers(shape, "--shape"), classes)
    measure(
        found,
        batches,
        console,
        device=chosen,
        precision=precision,
        channels_last=channels_last,
        fuse=fused,
        repeats=repeats,
    )
    for table in tables(found, chosen, precision):
        console.print(table)
    picture(found, out)
    console.out(f"picture: {out}")
    if json is not None:
        save(json, found, chosen, precision)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    format: Annotated[
        Literal["onnx", "torch", "safetensors", "tensorrt"], typer.Option(help="torch is torch.export's .pt2")
    ] = "onnx",
    out: Annotated[Path | None, typer.Option(help="a new file; RUN/export.onnx and so on if not given")] = None,
    fused: Annotated[bool, typer.Option(help="fold batch norm into convolutions")] = True,
    normalise: Annotated[bool, typer.Option("--normalise", help="let it take raw examples, as uint8")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="the running mean of the global model")] = False,
    batch: Annotated[str, typer.Option(help="examples a pass: a number, or dynamic for any")] = "dynamic",
    check: Annotated[bool, typer.Option(help="run the file, and compare what it gives")] = True,
) -> None:
    """Write a run's network for use elsewhere: ONNX, torch.export, safetensors or TensorRT."""
    from fedsim.export.formats import trtexec
    from fedsim.export.write import export as write

    if batch != "dynamic" and not (batch.isdecimal() and int(batch)):
        raise ConfigError(f"--batch: {batch!r} should be a whole number >= 1, or dynamic")
    size = None if batch == "dynamic" else int(batch)
    made = write(folder, format, out, fuse=fused, normalise=normalise, ema=ema, batch=size, check=check)
    console.out(f"{format}: {made.path}, {made.bytes / 1e6:,.2f} MB")
    if made.difference is not None:
        console.out(f"checked: its outputs differ by {made.difference:.1e} of the largest")
    else:
        console.out("not checked" + (": ONNX Runtime is not installed" if check and format == "onnx" else ""))
    if format == "onnx":
        console.out(f"TensorRT: {trtexec(made.path, made.shape, size)}")


@app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="new, or one of earlier to add nodes to")],
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="a name or address that nodes know the server by; may be given again"),
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a node that gets a pair of keys; may be given again")
    ] = None,
    days: Annotated[int, typer.Option(help="that the server's certificate holds")] = 825,
    renew: Annotated[
        bool, typer.Option("--renew", help="the server's certificate anew, from the CA in DIR, for the same key")
    ] = False,
) -> None:
    """Make what a federation over Flower needs: a CA, the server's certificate, and a key for each node."""
    from fedsim.flower.certificates import make

    for made in make(folder, server or [], node or [], days, renew):
        console.out(f"{made.path}: {made.place}", highlight=False)


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
