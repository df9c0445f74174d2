"""A study of waiting: from the start of a process to the end of its first round, in fedsim and in Flower."""

import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import yaml
from rich.console import Console

from fedsim.bench.figures import Column, Result
from fedsim.bench.programs import PEERS, Program, check_peers, command
from fedsim.bench.simulations import FP32, simulated
from fedsim.bench.turns import compared, reported
from fedsim.experiment.config import Config

FEDSIM = "fedsim run"


def startup(config: Config, repeats: int, console: Console) -> Result:
    """`fedsim run` as the config has it, and Flower's simulation of the same round, in fp32.

    Flower's side need not read the data nor make the network: it finds both in a file. The first turn, in which
    the machine may read the programs from disk, does not count.
    """
    check_peers(["flower"], "--study startup")
    flower = PEERS["flower"].label
    with TemporaryDirectory(prefix="fedsim-bench-") as temporary:
        folder, runs = Path(temporary), count()
        theirs = command("flower", simulated(config, "serial", FP32), folder)
        written = folder / "config.yaml"
        twice = {"rounds": 2, "evaluate": {**config.evaluate.model_dump(), "every": 2}}  # the first is not tested
        written.write_text(yaml.safe_dump(config.model_dump(mode="json") | twice))
        call = [sys.executable, "-c", "from fedsim.cli import main; main()", "run", str(written), "--out"]
        sides = {
            FEDSIM: lambda: _first_round(FEDSIM, [*call, str(folder / f"run-{next(runs)}")], "round"),
            flower: lambda: _first_round(flower, theirs, "done"),
        }
        seconds = reported(sides, repeats, console)
    return Result(
        "startup",
        "seconds to the end of the first round",
        [Column("side", "side"), *(Column(key, key, ".2f") for key in ("seconds", "least", "most", "ratio"))],
        [{"side": name} | compared(seconds, name, flower) for name in seconds],
        f"from the start of a process; ratio: times as fast as '{flower}', turn by turn",
    )


def _first_round(label: str, command: Sequence[str], word: str) -> float:
    """Seconds until the process says that its first round is over; its end takes more, and does not count."""
    began = perf_counter()
    with Program(label, command) as process:
        process.ask()
        process.answer(word)
        took = perf_counter() - began
        process.stop()
    return took
