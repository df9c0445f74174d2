"""Modules under the names that they had in release 0.1: `from fedsim.task import Layout` works as before.

`fedsim.config` stays. The others are there for one release more.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {  # where the names of each are now
    "aggregate": ("federated.aggregate",),
    "availability": ("federated.availability",),
    "catalogue": ("base.catalogue",),
    "checkpoint": ("experiment.checkpoint",),
    "cohort": ("federated.cohort",),
    "config": ("experiment.config", "experiment.build"),
    "files": ("base.files",),
    "hooks": ("experiment.hooks", "experiment.hook"),
    "local": ("training.objective", "training.local", "training.precision"),
    "losses": ("training.losses",),
    "objective": ("training.objective", "training.example_loss"),
    "optim": ("training.optim",),
    "plot": ("report.plot",),
    "progress": ("experiment.progress",),
    "recipe": ("training.recipe",),
    "schedules": ("training.schedules",),
    "simulation": ("federated.simulation",),
    "store": ("federated.store",),
    "strategies.fedadam": ("strategies.adaptive.fedadam",),
    "strategies.fedavg": ("strategies.averaging.fedavg",),
    "strategies.fedbn": ("strategies.personal.fedbn",),
    "strategies.fedprox": ("strategies.drift.fedprox",),
    "strategies.fedsgd": ("strategies.averaging.fedsgd",),
    "strategies.scaffold": ("strategies.drift.scaffold",),
    "strategy": ("federated.strategy",),
    "task": ("training.task", "training.layout", "training.replica"),
    "work": ("federated.client",),
}


class Moved(MetaPathFinder, Loader):
    """Finds the old names, and makes of each a module whose attributes are those of the new ones."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == "fedsim" and module in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        homes = MOVED[module.__name__.partition(".")[2]]

        def attribute(name: str) -> Any:
            if name == "__all__":
                return [name for home in homes for name in dir(import_module(f"fedsim.{home}")) if name[0] != "_"]
            if name.startswith("__"):  # asked while other modules are being imported
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            for home in homes:
                if hasattr(found := import_module(f"fedsim.{home}"), name):
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = attribute  # type: ignore[method-assign]


sys.meta_path.insert(0, Moved())  # before a folder that an older checkout left with nothing but __pycache__
