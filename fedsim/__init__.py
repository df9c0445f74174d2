"""Federated learning: simulate it, study non-IID data, take it to real machines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsim import moved as moved

if TYPE_CHECKING:
    from fedsim.base.catalogue import Catalogue as Catalogue
    from fedsim.base.catalogue import matching as matching
    from fedsim.errors import ClientError as ClientError
    from fedsim.errors import ConfigError as ConfigError
    from fedsim.errors import RoundError as RoundError
    from fedsim.experiment.execute import Result as Result
    from fedsim.experiment.execute import resume as resume
    from fedsim.experiment.execute import run as run
    from fedsim.experiment.hook import Hook as Hook
    from fedsim.federated.federation import Federation as Federation
    from fedsim.federated.groups import GroupMeans as GroupMeans
    from fedsim.federated.message import check_changes as check_changes
    from fedsim.federated.rows import Rows as Rows
    from fedsim.federated.simulation import Simulation as Simulation
    from fedsim.federated.strategy import Buffers as Buffers
    from fedsim.federated.strategy import Strategy as Strategy
    from fedsim.federated.strategy import Wrapper as Wrapper
    from fedsim.training.layout import Layout as Layout
    from fedsim.training.objective import Correction as Correction
    from fedsim.training.objective import LocalObjective as LocalObjective
    from fedsim.training.objective import Loss as Loss
    from fedsim.training.objective import ObjectiveWrapper as ObjectiveWrapper
    from fedsim.training.objective import StepRules as StepRules
    from fedsim.training.recipe import Recipe as Recipe
    from fedsim.training.task import Task as Task
    from fedsim.types import CHANGE as CHANGE
    from fedsim.types import LIKE_MODEL as LIKE_MODEL
    from fedsim.types import NUMBER as NUMBER
    from fedsim.types import Batch as Batch
    from fedsim.types import Entry as Entry
    from fedsim.types import RoundInfo as RoundInfo
    from fedsim.types import State as State
    from fedsim.types import Update as Update

HOMES = {  # imported when first asked for, since torch takes seconds and `fedsim --help` needs none of it
    "base.catalogue": ("Catalogue", "matching"),
    "errors": ("ClientError", "ConfigError", "RoundError"),
    "experiment.execute": ("Result", "resume", "run"),
    "experiment.hook": ("Hook",),
    "federated.federation": ("Federation",),
    "federated.message": ("check_changes",),
    "federated.groups": ("GroupMeans",),
    "federated.rows": ("Rows",),
    "federated.simulation": ("Simulation",),
    "federated.strategy": ("Buffers", "Strategy", "Wrapper"),
    "training.layout": ("Layout",),
    "training.objective": ("Correction", "LocalObjective", "Loss", "ObjectiveWrapper", "StepRules"),
    "training.recipe": ("Recipe",),
    "training.task": ("Task",),
    "types": ("CHANGE", "LIKE_MODEL", "NUMBER", "Batch", "Entry", "RoundInfo", "State", "Update"),
}
HOME = {name: module for module, names in HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOME])
