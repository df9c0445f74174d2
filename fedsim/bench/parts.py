"""What the sides are made of: fedsim's simulations with another runtime or recipe, and turns that are timed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from fedsim.base.catalogue import Spec, options_of
from fedsim.errors import ConfigError
from fedsim.experiment.build import build
from fedsim.experiment.config import Config
from fedsim.federated.simulation import Simulation
from fedsim.federated.store import ClientStore
from fedsim.federated.strategy import Strategy
from fedsim.runtimes import RUNTIMES
from fedsim.training.objective import LocalObjective
from fedsim.types import RoundInfo, State, Update

Side = Callable[[], object]  # one pass over the round's client steps
Seconds = dict[str, list[float]]  # of each side's passes, turn by turn

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


class Spread(NamedTuple):
    """Of one figure over the turns."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Idle(Strategy):
    """Clients send what FedAvg's send but take no step: what it takes is the round's own cost."""

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        return Update({"delta": server["model"] - server["model"]}, weight=local.num_examples, client=client)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] + mean["delta"]}


def simulated(config: Config, runtime: Spec | str, local: Spec | None = None) -> Simulation:
    """The config's simulation in another runtime, on its own device; raises ConfigError.

    With `local`, training is what a plain loop can do, changed by these options.
    """
    changes: Spec = {"runtime": placed(config, runtime)}
    if local is not None:
        if config.local["optimizer"] == "lars":
            raise ConfigError("local.optimizer: torch has no lars that a plain loop could use; bench with sgd")
        changes["local"] = config.local | PLAIN | local
    return build(config.model_copy(update=changes))


def steps_of(simulation: Simulation) -> int:
    """Client steps of its first round."""
    sizes, recipe = simulation.data.sizes, simulation.recipe
    return sum(recipe.num_steps(int(sizes[k])) for k in simulation.sample())


def placed(config: Config, runtime: Spec | str) -> Spec:
    """The runtime's `{name, ...}` with the config's device, where it has one."""
    spec = {"name": runtime} if isinstance(runtime, str) else runtime
    device = config.runtime.get("device", "auto") if isinstance(config.runtime, dict) else "auto"
    takes = "device" in options_of(RUNTIMES.load(spec["name"])).model_fields
    return {"device": device} | spec if takes else spec


@contextmanager
def rounds(config: Config, runtime: Spec | str, local: Spec | None = None, idle: bool = False) -> Iterator[Side]:
    """The config's first round, again and again, by the `runtime`; `idle` clients take no step."""
    simulation = simulated(config, runtime, local)
    if idle:
        simulation.strategy = Idle()
    server = simulation.server

    def side() -> None:
        simulation.number, simulation.server, simulation.clients = 0, server, ClientStore()
        simulation.round()

    yield side


def in_turn(sides: Mapping[str, Side], repeats: int, console: Console) -> Seconds:
    """Seconds a pass, after one that is not counted; the sides take turns, so that noise falls on all."""
    seconds: Seconds = {name: [] for name in sides}
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


def times_as_fast(seconds: Seconds, name: str, base: str) -> Spread:
    """How many times as fast as `base` a side is, turn by turn."""
    return spread([b / s for b, s in zip(seconds[base], seconds[name], strict=True)])


def spread(values: list[float]) -> Spread:
    """Median, least and greatest."""
    return Spread(median(values), min(values), max(values))
