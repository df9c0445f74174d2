"""fedsim's simulations with another runtime or recipe, for sides to run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedsim.base.catalogue import Spec, options_of
from fedsim.bench.turns import Side
from fedsim.errors import ConfigError
from fedsim.experiment.build import build
from fedsim.experiment.config import Config
from fedsim.federated.simulation import Simulation
from fedsim.federated.store import ClientStore
from fedsim.federated.strategy import Strategy
from fedsim.runtimes import RUNTIMES
from fedsim.training.objective import LocalObjective
from fedsim.types import RoundInfo, State, Update

FP32: Spec = {"precision": "fp32", "channels_last": False}
PLAIN: Spec = {  # values of the options that a plain loop does not have
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


@dataclass(frozen=True, kw_only=True)
class Idle(Strategy):
    """FedAvg whose clients take no step, so that the time is the round's own cost."""

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
    simulation = build(config.model_copy(update=changes))
    for client, why in simulation.left_out.items():
        raise ConfigError(f"data.partition: client {client} {why}; bench needs clients that can all train")
    return simulation


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
