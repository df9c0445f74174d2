"""A study of waiting: from the start of a process to the end of its first round, in fedsim and in Flower."""

import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

from fedsim.bench.figures import Column, Found
from fedsim.bench.parts import FP32, Seconds, simulated, times_as_fast
from fedsim.bench.programs import PEERS, Program, check_peers, command
from fedsim.experiment.config import Config

FEDSIM = "fedsim run"


def startup(config: Config, repeats: int, console: Console) -> Found:
    """`fedsim run` as the config has it, and Flower's simulation of the same round, in fp32.

    Flower's side need not read the data nor make the network: it finds both in a file. The first turn, in which
    the machine may read the programs from disk, does not count.
    """
    check_peers(["flower"], "--study startup")
    flower = PEERS["flower"].label
    seconds: Seconds = {FEDSIM: [], flower: []}
    with TemporaryDirectory(prefix="fedsim-bench-") as temporary:
        folder, runs = Path(temporary), count()
        theirs = command("flower", simulated(config, "serial", FP32), folder)
        written = folder / "config.yaml"
        twice = {"rounds": 2, "evaluate": {**config.evaluate.model_dump(), "every": 2}}  # the first is not tested
        written.write_text(yaml.safe_dump(config.model_dump(mode="json") | twice))
        call = [sys.executable, "-c", "from fedsim.cli import main; main()", "run", str(written), "--out"]
        for turn in track(range(repeats + 1), "turns", console=console, transient=True):
            ours = [*call, str(folder / f"run-{next(runs)}")]
            for name, took in ((FEDSIM, _first(FEDSIM, ours, "round")), (flower, _first(flower, theirs, "done"))):
                if turn:
                    seconds[name].append(took)
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        ratio = times_as_fast(seconds, name, flower)
        row = {"side": name, "seconds": median(times), "least": min(times), "most": max(times), "passes": times}
        rows.append(row | {"ratio": ratio.median, "low": ratio.low, "high": ratio.high})
    return Found(
        "startup",
        "seconds to the end of the first round",
        [
            Column("side", "side"),
            Column("seconds", "seconds", ".2f"),
            Column("least", "least", ".2f"),
            Column("most", "most", ".2f"),
            Column("ratio", "ratio", ".2f"),
        ],
        rows,
        f"from the start of a process; ratio: times as fast as '{flower}', turn by turn",
    )


def _first(label: str, command: Sequence[str], word: str) -> float:
    """Seconds until the process says that its first round is over; its end takes more, and does not count."""
    began = perf_counter()
    with Program(label, command) as process:
        process.ask()
        process.answer(word)
        took = perf_counter() - began
        process.stop()
    return took
