"""The sides of a benchmark: fedsim's runtimes, plain PyTorch loops and other simulators, all on the same steps.

Every side takes the client steps of the config's first round. The plain loops do them in one process with all
cores and in one process a core, the data already there. They neither average nor hash nor report; fedsim's sides
and the peers do all that they do. Where `local.augment` names something, more sides train on augmented batches, or
only make them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console

from fedsim.base.catalogue import Spec
from fedsim.base.files import File
from fedsim.base.machine import cores
from fedsim.bench.figures import SECONDS, STEPS, Column, Result
from fedsim.bench.inputs import FEDSIM, TORCHVISION, input_line, input_sides
from fedsim.bench.own_process import own_process
from fedsim.bench.plain import LARGE, large_batches, one_process, processes
from fedsim.bench.programs import PEERS, program
from fedsim.bench.simulations import FP32, PLAIN, rounds, simulated, steps_of
from fedsim.bench.turns import Seconds, Side, timed, times_as_fast
from fedsim.errors import ConfigError
from fedsim.experiment.checkpoint import Checkpoints
from fedsim.experiment.config import Config
from fedsim.federated.simulation import Simulation
from fedsim.runtimes import RUNTIMES

Sides = dict[str, AbstractContextManager[Side]]

SERIAL = "fedsim serial"
THREADS = "fedsim threads"
VECTORIZED = "fedsim vectorized"
AUGMENTED = "fedsim threads, augmented"
IDLE = "fedsim threads, idle clients"
CHECKPOINT = "a checkpoint after a round"
LARGE_BATCHES = "plain loop, large batches"
NO_STEPS = {IDLE, CHECKPOINT, FEDSIM, TORCHVISION, LARGE_BATCHES}


def compare(
    config: Config, repeats: int, console: Console, peers: Sequence[str] = (), patterns: Sequence[str] = ()
) -> Result:
    """Time the peers and the sides whose names fit a pattern, all if there are none; raises ConfigError."""
    simulation = simulated(config, "serial", FP32)
    patterns = patterns and [*patterns, *(PEERS[name].label for name in peers)]
    home, steps, notes = simulation.runtime.home, steps_of(simulation), list[str]()
    seconds, _ = timed(chosen(sides_of(config, simulation, peers), patterns), repeats, console, notes)
    bases = _bases(seconds)
    columns = [Column("side", "side"), SECONDS, STEPS]
    columns += [Column(key, heading, ".2f") for key, (heading, _) in bases.items()]
    rows = [_row(name, seconds, steps, bases) for name in seconds]
    caption = "; ".join(f"{heading}: times as fast as '{base}'" for heading, base in bases.values())
    if LARGE_BATCHES in seconds:
        caption += f", which has {LARGE[home.type]:,} examples a batch"
    notes += _notes(config, seconds, steps)
    return Result("sides", f"{steps} client steps a pass", columns, rows, caption, notes, {"steps": steps})


def sides_of(config: Config, simulation: Simulation, peers: Sequence[str] = ()) -> Sides:
    """All sides by name, not yet begun; `simulation` is the config's, in serial and fp32."""
    sides: Sides = {"plain loop, one process": one_process(simulation)}
    home = simulation.runtime.home
    if home.type == "cpu":
        sides["plain loop, a process a core"] = processes(config)
    sides[LARGE_BATCHES] = large_batches(simulation)
    sides[SERIAL] = rounds(config, "serial", FP32)
    sides[THREADS] = rounds(config, "threads", FP32)
    images = len(simulation.task.shape) == 3
    if images:
        sides["fedsim threads, channels-last"] = rounds(config, "threads", {**FP32, "channels_last": True})
        bf16 = {"precision": "bf16", "channels_last": True}
        sides["fedsim threads, channels-last, bf16"] = rounds(config, "threads", bf16)
    if "vectorized" in RUNTIMES:
        sides |= {name: rounds(config, spec, FP32) for name, spec in _vectorized(home.type, images).items()}
    if "ray" in RUNTIMES:
        for actors in sorted({1, min(2, cores())}):
            sides[ray_name(actors)] = own_process(rounds, config, ray(actors, home.type), FP32)
    if images and config.local["augment"]:
        augmented = {**FP32, "augment": config.local["augment"]}
        sides[AUGMENTED] = rounds(config, "threads", augmented)
        sides |= input_sides(config, simulated(config, "serial", augmented))
    sides |= {PEERS[name].label: program(name, simulation) for name in peers}
    return sides | {IDLE: rounds(config, "threads", FP32, True), CHECKPOINT: _checkpoint(config)}


def ray_name(actors: int) -> str:
    """What tables call the runtime with so many actors."""
    return f"fedsim ray, {actors} actor{'s' * (actors > 1)}"


def ray(actors: int, device: str) -> Spec:
    """The runtime's `{name, ...}`, with a core or a share of the GPU for each actor."""
    return {"name": "ray", "actors": actors} | ({} if device == "cpu" else {"gpus": 1 / actors})


def chosen(sides: Sides, patterns: Sequence[str]) -> Sides:
    """The sides whose names fit a pattern, such as '*threads*'; raises ConfigError where a pattern fits none."""

    def fits(name: str, pattern: str) -> bool:
        return fnmatchcase(name.lower(), pattern.lower())

    for pattern in patterns:
        if not any(fits(name, pattern) for name in sides):
            raise ConfigError(f"--sides: {pattern!r} matches none of: {'; '.join(sides)}")
    return {n: side for n, side in sides.items() if not patterns or any(fits(n, p) for p in patterns)}


def _vectorized(device: str, images: bool) -> dict[str, Spec]:
    """By name: what it takes by itself and, on a GPU, each way to convolve with and without graphs."""
    found: dict[str, Spec] = {VECTORIZED: {"name": "vectorized"}}
    if device == "cpu":
        return found
    for conv in ("im2col", "grouped") if images else ("auto",):
        for graphs in (True, False):
            name = ", ".join([VECTORIZED, *([conv] if images else []), "graphs" if graphs else "no graphs"])
            found[name] = {"name": "vectorized", "conv": conv, "graphs": graphs}
    return found


def _bases(seconds: Seconds[str]) -> dict[str, tuple[str, str]]:
    """What the sides are compared with: by key of the ratio its heading, and the side."""
    training = [name for name in seconds if name not in NO_STEPS]
    plain = [name for name in training if name.startswith("plain")] or training[:1]
    bases: dict[str, tuple[str, str]] = {}
    if plain:
        bases["ratio"] = ("ratio", min(plain, key=lambda name: median(seconds[name])))
    for name, peer in PEERS.items():
        if peer.label in seconds:
            bases[f"to_{name}"] = (f"/ {name}", peer.label)
    if LARGE_BATCHES in seconds:
        bases["share"] = ("share", LARGE_BATCHES)
    return bases


def _row(name: str, seconds: Seconds[str], steps: int, bases: dict[str, tuple[str, str]]) -> dict[str, object]:
    times = median(seconds[name])
    row: dict[str, object] = {"side": name, "seconds": times, "passes": seconds[name]}
    if name in NO_STEPS:
        return row
    ratios = {key: times_as_fast(seconds, name, base) for key, (_, base) in bases.items()}
    row |= {"steps_per_second": steps / times} | {key: ratio.median for key, ratio in ratios.items()}
    return row | {"spread": {key: [ratio.low, ratio.high] for key, ratio in ratios.items()}}


def _notes(config: Config, seconds: Seconds[str], steps: int) -> list[str]:
    notes = list[str]()
    augmented = AUGMENTED in seconds
    left_out = [key for key, value in PLAIN.items() if config.local[key] != value]
    if everywhere := [f"local.{key}" for key in left_out if not (augmented and key == "augment")]:
        notes.append(f"left out on all sides: {', '.join(everywhere)}")
    if augmented:
        notes.append("left out on all sides but the augmented ones: local.augment")
    if FEDSIM in seconds and SERIAL in seconds:
        notes.append(input_line(seconds, SERIAL, steps))
    if not any(name.startswith("plain") for name in seconds):
        notes.append("no plain loop was timed: --sides 'plain loop, *' adds them")
    if CHECKPOINT in seconds and THREADS in seconds:
        share = 1 / times_as_fast(seconds, CHECKPOINT, THREADS).median
        notes.append(f"a checkpoint takes {share:.1%} of a round of '{THREADS}'")
    return notes


@contextmanager
def _checkpoint(config: Config) -> Iterator[Side]:
    """After a round, of the server and the clients that took part; in the working folder, where runs lie."""
    simulation = simulated(config, "threads", FP32)
    simulation.round()
    changed, about = dict(simulation.clients), {"config": config.model_dump(mode="json"), "data": ""}
    with TemporaryDirectory(prefix=".fedsim-bench-", dir=".") as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.start(simulation)

        def side() -> None:
            for client, state in changed.items():
                simulation.clients.stage(client, state)
            simulation.clients.commit()
            checkpoints.save(
                simulation, File("rounds.jsonl", 0, ""), 3, last=None, stopped=None, seconds=0.0, **about
            )

        yield side
