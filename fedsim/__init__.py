"""Federated learning: simulate it, study non-IID data, take it to real machines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.errors import ClientError as ClientError
    from fedsim.errors import ConfigError as ConfigError
    from fedsim.errors import RoundError as RoundError
    from fedsim.experiment import Result as Result
    from fedsim.experiment import resume as resume
    from fedsim.experiment import run as run
    from fedsim.hooks import Hook as Hook
    from fedsim.local import LocalObjective as LocalObjective
    from fedsim.recipe import Recipe as Recipe
    from fedsim.simulation import Simulation as Simulation
    from fedsim.strategy import Strategy as Strategy
    from fedsim.strategy import Wrapper as Wrapper
    from fedsim.task import Task as Task
    from fedsim.types import Batch as Batch
    from fedsim.types import RoundInfo as RoundInfo
    from fedsim.types import State as State
    from fedsim.types import Update as Update

HOMES = {  # imported when first asked for, since torch takes seconds and `fedsim --help` needs none of it
    "errors": ("ClientError", "ConfigError", "RoundError"),
    "experiment": ("Result", "resume", "run"),
    "hooks": ("Hook",),
    "local": ("LocalObjective",),
    "recipe": ("Recipe",),
    "simulation": ("Simulation",),
    "strategy": ("Strategy", "Wrapper"),
    "task": ("Task",),
    "types": ("Batch", "RoundInfo", "State", "Update"),
}
HOME = {name: module for module, names in HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOME])
