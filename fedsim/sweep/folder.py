"""The folder of a sweep: sweep.yaml says what it is, and each point has a run's folder of its own in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock

from fedsim.base.catalogue import Spec
from fedsim.base.files import check_folder, check_name, create, locked, write
from fedsim.base.reading import read_yaml
from fedsim.errors import ConfigError
from fedsim.experiment.checkpoint import changes
from fedsim.experiment.config import Config, load
from fedsim.experiment.folder import read_config
from fedsim.runtimes import RUNTIMES
from fedsim.sweep.grid import Grid, Point

FILE = "sweep.yaml"


@dataclass(frozen=True)
class PointRun:
    """One point of a sweep and its run."""

    name: str
    point: Point
    config: Config
    folder: Path

    @property
    def runtime(self) -> Spec:
        """The runtime that its config names, with all options."""
        return RUNTIMES.resolve(self.config.runtime)

    @property
    def finished(self) -> bool:
        """Whether its run came to its end."""
        return (self.folder / "summary.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether its run was started, so that it can be resumed."""
        return (self.folder / "config.yaml").is_file()

    def check_config(self) -> None:
        """Raise ConfigError where its run was started with a config that changes the result of this point."""
        there = load(read_config(self.folder)).model_dump(mode="json")
        if wrong := changes(self.config.model_dump(mode="json"), there)[0]:
            raise ConfigError(f"{self.folder / 'config.yaml'}: is not this sweep's: {wrong[0]} in {FILE}")


@dataclass(frozen=True)
class Sweep:
    """A config as it was read, the grid over it, and where its runs lie; `target` is an accuracy from 0 to 1."""

    folder: Path
    config: dict[str, Any]
    grid: Grid
    target: float | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What sweep.yaml says; raises ConfigError."""
        values = read_yaml(folder / FILE, links=False)
        try:
            config, settings, axes = (dict(values[key]) for key in ("config", "settings", "grid"))
            target = None if values.get("target") is None else float(values["target"])
            if not all(isinstance(each, list) and each for each in axes.values()):
                raise TypeError
            if not all(isinstance(key, str) and all(key.split(".")) for key in [*config, *settings, *axes]):
                raise TypeError
            if target is not None and not 0 < target < 1:
                raise ValueError
        except (KeyError, OverflowError, TypeError, ValueError):
            raise ConfigError(f"{folder / FILE}: broken: should hold config, settings and grid") from None
        return cls(folder, config, Grid(axes, settings).checked(), target)

    @cached_property
    def points(self) -> list[PointRun]:
        """Every point with its config; raises ConfigError that names the point."""
        for name in self.grid.names:
            check_folder(self.folder / name)
        return [
            PointRun(name, point, self._config(name, point), self.folder / name)
            for name, point in zip(self.grid.names, self.grid.points, strict=True)
        ]

    def save(self) -> None:
        """Write sweep.yaml, into a new folder or this sweep's own; raises ConfigError where it is another's."""
        content = yaml.safe_dump(self._values, sort_keys=False).encode()
        check_name(self.folder)
        if not self.folder.exists():
            try:
                create(self.folder, {FILE: content})
            except OSError as error:
                if not self.folder.exists():  # unless another process made it first
                    way = "name a folder with --out"
                    raise ConfigError(f"{self.folder}: cannot be made: {error.strerror}; {way}") from None
        if not is_sweep(self.folder):
            raise ConfigError(f"{self.folder}: exists, and holds no sweep; name another folder")
        before = Sweep.read(self.folder)
        differ = [line for each in changes(before._values, self._values) for line in each]
        if differ := [line for line in differ if not line.startswith("target:")]:
            raise ConfigError(f"{self.folder}: holds another sweep, {differ[0]}; name another folder")
        if before.target != self.target:
            write(self.folder / FILE, content)

    def lock(self) -> FileLock:
        """Held while it runs; raises ConfigError where another process holds it."""
        return locked(self.folder)

    @property
    def _values(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "settings": self.grid.fixed,
            "grid": self.grid.axes,
            "target": self.target,
        }

    def _config(self, name: str, point: Mapping[str, Any]) -> Config:
        try:
            return load(self.config, {**self.grid.fixed, **point})
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


def new_folder(stem: str) -> Path:
    """runs/STEM-sweep-N, N above those of all that are there."""
    prefix = f"{stem}-sweep-"
    names = [path.name.removeprefix(prefix) for path in Path("runs").glob(f"{escape(prefix)}*")]
    return Path("runs") / f"{prefix}{max((int(name) for name in names if name.isdecimal()), default=0) + 1}"


def is_sweep(folder: Path) -> bool:
    """Whether it is the folder of a sweep."""
    return (folder / FILE).is_file()
