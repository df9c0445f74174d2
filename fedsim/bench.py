"""How fast clients train: fedsim's runtimes against plain PyTorch loops, sides in turn in one run.

Every side takes the same client steps: those of the config's first round. The plain loops are what one writes
without a framework (nn.Module, torch.optim, float tensors sliced per batch), in one process with all cores and in
one process a core, the data already there. They neither average nor hash nor report; fedsim's sides do all of it.
Where `local.augment` names something, more sides train on augmented batches, or only make them.
"""

import copy
import json
import multiprocessing
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn import functional as F

from fedsim.bench_input import FEDSIM, TORCHVISION, input_line, input_sides, places
from fedsim.catalogue import Spec
from fedsim.checkpoint import Checkpoints
from fedsim.config import Config, build
from fedsim.errors import ConfigError
from fedsim.files import File
from fedsim.local import LocalObjective
from fedsim.runtimes.worker import cores
from fedsim.simulation import Simulation
from fedsim.store import ClientStore
from fedsim.strategy import Strategy
from fedsim.types import RoundInfo, State, Stream, Update, random

Side = Callable[[], object]  # one pass over the round's client steps

FP32: Spec = {"precision": "fp32", "channels_last": False}
PLAIN: Spec = {  # what the plain loops know, of the options that they have not
    "loss": {"name": "cross_entropy", "smoothing": 0.0, "spread": "all"},
    "augment": [],
    "accumulate": 1,
    "activation_checkpointing": False,
    "oversample": False,
    "class_weights": None,
    "distillation": None,
    "noisy_labels": None,
    "decay": "all",
    "lr_every": "round",
}
SERIAL = "fedsim serial"
THREADS = "fedsim threads"
AUGMENTED = "fedsim threads, augmented"
IDLE = "fedsim threads, clients that take no step"
CHECKPOINT = "a checkpoint of what a round changed"
NO_STEPS = {IDLE, CHECKPOINT, FEDSIM, TORCHVISION}


def bench(config: Config, repeats: int, console: Console, out: Path | None = None) -> None:
    """Time a config's first round; prints a table and, with `out`, writes the seconds of every pass as JSON."""
    if out is not None and out.exists():
        raise ConfigError(f"--out: {out} exists; name another file")
    simulation = _simulation(config, "serial", FP32)
    sizes, home = simulation.data.sizes, simulation.runtime.home
    steps = sum(simulation.recipe.num_steps(int(sizes[k])) for k in simulation.sample())
    with ExitStack() as stack:
        sides = {name: stack.enter_context(side) for name, side in _sides(config, simulation).items()}
        seconds = _in_turn(sides, repeats, console)
    plain = min((name for name in seconds if name.startswith("plain")), key=lambda name: median(seconds[name]))
    machine = torch.cuda.get_device_name(home) if home.type == "cuda" else f"{cores()} CPU cores"
    title = f"{steps} client steps a pass; {machine}, torch {torch.__version__}"
    table = Table(
        "side", title=title, caption=f"ratio: times as fast as '{plain}', turn by turn", box=box.SIMPLE_HEAD
    )
    for heading in ("seconds", "steps/s", "ratio"):
        table.add_column(heading, justify="right")
    for name, times in seconds.items():
        ratio = median(p / t for p, t in zip(seconds[plain], times, strict=True))
        speed = ("", "") if name in NO_STEPS else (f"{steps / median(times):,.0f}", f"{ratio:.2f}")
        table.add_row(name, f"{median(times):.3f}", *speed)
    console.print(table)
    augmented = AUGMENTED in seconds
    left_out = [key for key, value in PLAIN.items() if config.local[key] != value]
    if everywhere := [f"local.{key}" for key in left_out if not (augmented and key == "augment")]:
        console.out(f"left out on all sides: {', '.join(everywhere)}")
    if augmented:
        console.out("left out on all sides but the augmented ones: local.augment")
        console.out(input_line(seconds, SERIAL, steps))
    share = median(c / t for c, t in zip(seconds[CHECKPOINT], seconds[THREADS], strict=True))
    console.out(f"a checkpoint takes {share:.1%} of a round of '{THREADS}'")
    if out is not None:
        found = {
            "steps": steps,
            "machine": machine,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        out.write_text(json.dumps(found | {"seconds": seconds}, indent=1) + "\n")


def _sides(config: Config, simulation: Simulation) -> dict[str, AbstractContextManager[Side]]:
    sides: dict[str, AbstractContextManager[Side]] = {"plain loop, one process": _one_process(simulation)}
    if simulation.runtime.home.type == "cpu":
        sides["plain loop, a process a core"] = _processes(config)
    sides[SERIAL] = _runtime(config, "serial", FP32)
    sides[THREADS] = _runtime(config, "threads", FP32)
    if len(simulation.task.shape) == 3:
        sides["fedsim threads, channels-last"] = _runtime(config, "threads", {**FP32, "channels_last": True})
        bf16 = {"precision": "bf16", "channels_last": True}
        sides["fedsim threads, channels-last, bf16"] = _runtime(config, "threads", bf16)
        if config.local["augment"]:
            augmented = {**FP32, "augment": config.local["augment"]}
            sides[AUGMENTED] = _runtime(config, "threads", augmented)
            sides |= input_sides(config, _simulation(config, "serial", augmented))
    return sides | {IDLE: _runtime(config, "threads", FP32, Idle()), CHECKPOINT: _checkpoint(config)}


def _in_turn(sides: dict[str, Side], repeats: int, console: Console) -> dict[str, list[float]]:
    """Seconds a pass, after one that is not counted; the sides take turns, so that noise falls on all."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("passes", total=(repeats + 1) * len(sides))
        for turn in range(repeats + 1):
            for name, side in sides.items():
                start = perf_counter()
                side()
                if turn:
                    seconds[name].append(perf_counter() - start)
                progress.advance(bar)
    return seconds


@dataclass(frozen=True, kw_only=True)
class Idle(Strategy):
    """Clients send what FedAvg's send but take no step: what it takes is the round's own cost."""

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        return Update({"delta": server["model"] - server["model"]}, weight=local.num_examples, client=client)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] + mean["delta"]}


@contextmanager
def _runtime(config: Config, name: str, local: Spec, strategy: Strategy | None = None) -> Iterator[Side]:
    simulation = _simulation(config, name, local)
    simulation.strategy = strategy or simulation.strategy
    server = simulation.server

    def side() -> None:
        simulation.number, simulation.server, simulation.clients = 0, server, ClientStore()
        simulation.round()

    yield side


@contextmanager
def _checkpoint(config: Config) -> Iterator[Side]:
    """After a round, of the server and the clients that took part; in the working folder, where runs lie."""
    simulation = _simulation(config, "threads", FP32)
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


def _simulation(config: Config, runtime: str, local: Spec) -> Simulation:
    device = config.runtime.get("device", "auto") if isinstance(config.runtime, dict) else "auto"
    if config.local["optimizer"] == "lars":
        raise ConfigError("local.optimizer: torch has no lars that a plain loop could use; bench with sgd")
    update = {"runtime": {"name": runtime, "device": device}, "local": config.local | PLAIN | local}
    return build(config.model_copy(update=update))


class PlainLoop:
    """The clients of the first round, each trained from the initial weights, as one would without a framework."""

    def __init__(self, simulation: Simulation):
        data, task, self.recipe = simulation.data, simulation.task, simulation.recipe
        home, self.seed = simulation.runtime.home, simulation.seed
        self.net = copy.deepcopy(task.network).to(home).train()
        self.initial = copy.deepcopy(self.net.state_dict())
        self.clients = {k: _moved(data.batch(torch.from_numpy(data.rows(k))), home) for k in simulation.sample()}

    def __call__(self, clients: Iterable[int]) -> None:
        """Train each of them."""
        for client in clients:
            self.train(client)

    def train(self, client: int) -> None:
        """The client's epochs or steps."""
        recipe, (x, y) = self.recipe, self.clients[client]
        self.net.load_state_dict(self.initial)
        optimizer, stream = self.optimizer(), random(self.seed, Stream.BATCHES, 0, client)
        for rows in places(recipe, len(y), stream, x.device):
            optimizer.zero_grad()
            F.cross_entropy(self.net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip_norm)
            optimizer.step()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

    def optimizer(self) -> torch.optim.Optimizer:
        """torch.optim's for the recipe."""
        r, parameters, lr = self.recipe, self.net.parameters(), self.recipe.lr_at(0)
        if r.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr, r.momentum, weight_decay=r.weight_decay, nesterov=r.nesterov)
        kind = torch.optim.Adam if r.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, lr, r.betas, r.eps, r.weight_decay)


@contextmanager
def _one_process(simulation: Simulation) -> Iterator[Side]:
    loop = PlainLoop(simulation)
    yield lambda: loop(loop.clients)


@contextmanager
def _processes(config: Config) -> Iterator[Side]:
    """Clients dealt to one process a core, each with one thread, network and data of its own."""
    processes = cores()
    clients = _simulation(config, "serial", FP32).sample()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_start_process, initargs=(config,)) as pool:
        yield lambda: list(pool.map(_in_process, clients))


def _start_process(config: Config) -> None:
    global _loop
    torch.set_num_threads(1)
    _loop = PlainLoop(_simulation(config, "serial", FP32))


def _in_process(client: int) -> None:
    _loop.train(client)


_loop: PlainLoop  # of a process of the pool


def _moved(batch: tuple[torch.Tensor, torch.Tensor], home: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0].to(home), batch[1].to(home)
