"""Random experiments from the catalogues: each is refused in one line, or is one run in every runtime.

`python tests/test_fuzz.py FIRST LAST` tries the experiments of these seeds and says how many trained.
"""

import inspect
import operator
import sys
import warnings
from collections import Counter
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import odd_networks
import pytest
from pydantic import BaseModel

from fedsim import Hook, resume, run
from fedsim.base.catalogue import options_of
from fedsim.data import AUGMENTATIONS, PARTITIONS
from fedsim.errors import ClientError, ConfigError, RoundError
from fedsim.experiment.config import Checkpointing, Evaluate
from fedsim.federated.availability import Availability
from fedsim.federated.cohort import COHORTS
from fedsim.federated.recalibration import Recalibrate
from fedsim.federated.simulation import Failures
from fedsim.models import MODELS
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.training.losses import LOSSES
from fedsim.training.recipe import Recipe
from fedsim.training.schedules import SCHEDULES

CLIENTS, ROUNDS = 5, 2
QUICK = ("2nn", "cnn", "cnn_bn", "cifar_cnn", "shufflenet_v2")  # of the catalogue; the others take seconds
OWN = [name for name, made in vars(odd_networks).items() if inspect.isfunction(made)]
IMAGES = [
    {"name": "synthetic", "examples": 40, "test_examples": 9, "classes": 3, "shape": [1, 8, 8]},
    {"name": "synthetic", "examples": 23, "test_examples": 5, "classes": 4, "shape": [3, 16, 16], "noise": 0.0},
]
COLUMNS = {"name": "synthetic_iid", "devices": CLIENTS}  # with clients of its own
NUMBERS = (0, 1, 2, 3, 0.1, 0.5, 0.9)  # of which an option gets one that it allows
EXTREMES = (1e-30, 1e-8, 5, 100, 1e8)
PATTERNS = ("*weight", "*bias", "*", "nothing*")
BELONGS = {
    "betas": "adam",
    "eps": "adam",
    "trust": "lars",
    "momentum": "sgd",
    "nesterov": "sgd",
}  # to an optimizer
SAID = (ConfigError, ClientError, RoundError)


class Draw:
    """Random settings; the same ones for the same seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one(self, values: Any) -> Any:
        values = list(values)
        return values[self.rng.integers(len(values))]

    def options(self, target: Any, probability: float = 0.25, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """Some of the options of a callable or schema, each with a value of its type."""
        is_schema = isinstance(target, type) and issubclass(target, BaseModel)
        fields = (target if is_schema else options_of(target)).model_fields
        drawn = {}
        for name, field in fields.items():
            if name not in without and (field.is_required() or self.chance(probability)):
                value = self.value(field.annotation, field.metadata)
                if value is not ...:
                    drawn[name] = value
        return drawn

    def entry(self, catalogue: Any, among: Any = None) -> dict[str, Any]:
        """An entry of a catalogue with some of its options; around another where it has an `inner`."""
        name = self.one(among or catalogue)
        drawn = {"name": name} | self.options(catalogue.load(name), without=("inner",))
        if "inner" in options_of(catalogue.load(name)).model_fields:
            drawn["inner"] = self.entry(catalogue)
        return drawn

    def value(self, kind: Any, bounds: Any = ()) -> Any:
        """A value of a type with these bounds; ... where there is none to draw, such as a path."""
        origin, parts = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self.value(parts[0], parts[1:])
        if origin in (Union, UnionType):
            return self.value(self.one(parts), bounds)
        if origin is Literal:
            return self.one(parts)
        if origin in (list, tuple) and parts[0] is int:
            return self.rng.permutation(CLIENTS)[: self.one(range(1, 4))].tolist()  # some clients
        if origin is list and parts[0] is str:
            return [self.one(PATTERNS)]
        if origin in (list, tuple):
            drawn = [self.value(part) for part in (parts[:1] * 3 if origin is list or parts[-1] is ... else parts)]
            return ... if ... in drawn else drawn
        if kind in (bool, NoneType):
            return self.chance(0.5) if kind is bool else None
        if kind is str:
            return ...
        if kind in (int, float):
            numbers = EXTREMES if self.chance(0.03) else NUMBERS
            return self.one([n for n in numbers if isinstance(n, int | kind) and _allowed(n, bounds)] or [1])
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return self.options(kind)
        return ...


def _allowed(number: float, bounds: Any) -> bool:
    signs = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    return all(sign(number, getattr(b, key)) for b in bounds for key, sign in signs.items() if hasattr(b, key))


def experiment(seed: int, models: Any = QUICK) -> dict[str, Any]:
    """The random config of a seed."""
    draw = Draw(seed)
    name = f"odd_networks:{draw.one(OWN)}" if draw.chance(0.6) else draw.one(models)
    images = name in MODELS or draw.chance(0.8)
    data = draw.one(IMAGES) if images else COLUMNS
    partitions = [partition for partition in PARTITIONS if partition != "natural" or not images]
    data |= {"clients": CLIENTS, "partition": draw.entry(PARTITIONS, partitions)}
    for key, values in (("holdout", [0.2, 0.5]), ("public", [0.1, 0.4]), ("crop", [5, 8])):
        if draw.chance(0.07):
            data |= {key: draw.one(values)}
    local = draw.options(Recipe, 0.05) | {"lr": draw.one([0.01, 0.1]), "batch_size": draw.one([2, 4, 7, "full"])}
    fitting = local.get("optimizer", "sgd")
    if local.get("precision") != "fp16":
        local.pop("loss_scale", None)
    local = {
        key: value for key, value in local.items() if BELONGS.get(key, fitting) in fitting or draw.chance(0.1)
    }
    for key, catalogue in (("schedule", SCHEDULES), ("loss", LOSSES)):
        if draw.chance(0.2):
            local[key] = draw.entry(catalogue)
    if images and draw.chance(0.25):
        local["augment"] = [draw.entry(AUGMENTATIONS)]
    strategy = draw.entry(STRATEGIES)
    some = {
        "failures": lambda: draw.options(Failures, without=("time_limit",)),
        "availability": lambda: draw.options(Availability),
        "evaluate": lambda: draw.options(Evaluate),
        "checkpoint": lambda: draw.options(Checkpointing),
        "ema": lambda: draw.one([0.0, 0.5, 0.99]),
    }
    settings = {key: make() for key, make in some.items() if draw.chance(0.12)}
    if strategy.get("buffers") == "recalibrated" or draw.chance(0.02):
        settings["recalibrate"] = draw.options(Recalibrate)
    return settings | {
        "seed": seed,
        "rounds": ROUNDS,
        "data": data,
        "model": {"name": name} | draw.options(MODELS.load(name), 0.1 if name in MODELS else 0.5),
        "strategy": strategy,
        "cohort": draw.one(
            [draw.entry(COHORTS), {"name": "uniform", "fraction": 0.5}, {"name": "uniform", "size": 3}]
        ),
        "local": local,
        "hooks": [],
    }


class Stop(Hook):
    """Interrupts the run after its first round."""

    def after_round(self, run, record):
        if record["round"] == 1:
            raise KeyboardInterrupt


def outcome(config: dict[str, Any], folder: Any, *, stop: bool = False, **runtime: Any) -> Any:
    """What a run shows to the bit, or the error that it ended with; with `stop` it is resumed after a round."""
    config = config | {"runtime": {"device": "cpu"} | runtime}
    try:
        done = run(config, out=folder, hooks=[Stop()] if stop else [])
        if done.interrupted:
            done = resume(folder)
    except SAID as error:
        return error
    return [{k: v for k, v in record.items() if k != "seconds"} for record in done.rounds]


def check(config: dict[str, Any], folder: Any, *, vectorized: bool = False) -> str:
    """Raise AssertionError unless the law holds; returns how the experiment ended."""
    with warnings.catch_warnings(action="ignore"):
        serial = outcome(config, folder / "serial", name="serial")
        threads = outcome(config, folder / "threads", stop=True, name="threads", workers=2)
        if vectorized:
            _check_vectorized(config, folder, serial)
    if isinstance(serial, Exception):
        assert type(threads) is type(serial), f"serial: {serial!r}; threads: {threads!r}"
        assert "\n" not in str(serial), serial
        assert len(str(serial)) < 800, serial
        return type(serial).__name__
    assert not isinstance(threads, Exception), threads
    assert threads == serial
    return "trained"


def _check_vectorized(config: dict[str, Any], folder: Any, serial: Any) -> None:
    """It may refuse more, and never trains what serial refuses; what it trains, it trains again the same."""
    whole = outcome(config, folder / "whole", name="vectorized")
    if isinstance(serial, ConfigError) or isinstance(whole, Exception):
        assert isinstance(whole, SAID), f"serial: {serial!r}; vectorized trained it"
        return
    assert not isinstance(serial, Exception), f"serial: {serial!r}; vectorized trained it"
    assert outcome(config, folder / "halves", stop=True, name="vectorized") == whole


@pytest.mark.parametrize("seed", range(36))
def test_an_experiment_is_refused_in_a_line_or_is_one_run(seed, tmp_path):
    check(experiment(seed), tmp_path, vectorized=seed % 3 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 4000))
def test_thousands_of_experiments(seed, tmp_path):
    check(experiment(seed), tmp_path, vectorized=seed % 3 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in QUICK])
def test_every_network(name, tmp_path):
    check(experiment(list(MODELS).index(name), models=[name]), tmp_path)


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    ended = Counter[str]()
    for number in range(*map(int, sys.argv[1:3])):
        with tempfile.TemporaryDirectory() as made:
            try:
                how = check(experiment(number), Path(made), vectorized=number % 3 == 0)
            except Exception as error:  # whatever it is, the next seed is tried
                how = f"FAILED {type(error).__name__}"
                print(f"seed {number}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        ended[how] += 1
    print(dict(ended))
