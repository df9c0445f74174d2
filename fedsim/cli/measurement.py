"""Commands that measure the engine and networks, and write a network for use elsewhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedsim.cli.interrupts import raise_on_interrupt
from fedsim.cli.shared import AsJson, ConfigPath, Settings, console, errors, print_json
from fedsim.errors import ConfigError


def bench(
    config: ConfigPath,
    settings: Settings = None,
    repeats: Annotated[int, typer.Option(min=1, help="counted passes of each side, in turn")] = 5,
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
    as_json: AsJson = False,
) -> None:
    """Time a config's client steps against plain PyTorch loops and other simulators, in turn, and print ratios."""
    from fedsim.experiment.config import load, parse_overrides

    loaded = load(config, parse_overrides(settings or []))
    raise_on_interrupt()
    from fedsim.bench import bench as measure  # which takes seconds, and a wrong config none
    from fedsim.bench.figures import document

    found = measure(
        loaded,
        repeats,
        errors if as_json else console,
        out,
        peers=[name.strip() for name in peers.split(",") if name.strip()],
        sides=sides or [],
        studies=study or [],
        drawing=picture,
    )
    if as_json:
        print_json(document(found, loaded))


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
    repeats: Annotated[int, typer.Option(min=1, help="counted passes; p99 needs about 100")] = 20,
    out: Annotated[Path, typer.Option(help="the picture")] = Path("profile.png"),
    as_json: AsJson = False,
) -> None:
    """Show what networks cost: parameters, FLOPs, memory of training, latency and throughput."""
    from fedsim.base.files import check_writable
    from fedsim.export.drawing import picture
    from fedsim.export.tables import document, tables
    from fedsim.export.timing import measure, numbers, place, profiles

    raise_on_interrupt()
    check_writable(out, "--out")
    shown = errors if as_json else console
    chosen, batches = place(device), numbers(batch, "--batch")
    found = profiles(models or [], runs or [], None if shape is None else numbers(shape, "--shape"), classes)
    measure(
        found,
        batches,
        shown,
        device=chosen,
        precision=precision,
        channels_last=channels_last,
        fuse=fused,
        repeats=repeats,
    )
    picture(found, out)
    if as_json:
        print_json(document(found, chosen, precision) | {"picture": str(out)})
        return
    for table in tables(found, chosen, precision):
        console.print(table)
    console.out(f"picture: {out}")


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    format: Annotated[
        Literal["onnx", "torch", "safetensors", "tensorrt"], typer.Option(help="torch is torch.export's .pt2")
    ] = "onnx",
    out: Annotated[Path | None, typer.Option(help="a new file; RUN/export.onnx and so on if not given")] = None,
    fused: Annotated[bool, typer.Option(help="fold batch norm into convolutions")] = True,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="the written network takes raw uint8 examples")
    ] = False,
    ema: Annotated[bool, typer.Option("--ema", help="the running mean of the global model")] = False,
    batch: Annotated[str, typer.Option(help="examples a pass: a number, or dynamic for any")] = "dynamic",
    check: Annotated[bool, typer.Option(help="run the file, and compare what it gives")] = True,
) -> None:
    """Write a run's network for use elsewhere: ONNX, torch.export, safetensors or TensorRT."""
    from fedsim.export.formats import trtexec
    from fedsim.export.write import export as write

    raise_on_interrupt()
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
