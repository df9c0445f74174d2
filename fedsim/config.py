"""An experiment: YAML to validated settings to objects; what is wrong is one line, before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import nn

from fedsim.availability import Availability
from fedsim.catalogue import Options, Spec, options_of, validated
from fedsim.cohort import COHORTS
from fedsim.data import DATASETS, PARTITIONS, Dataset, FederatedData
from fedsim.errors import ConfigError
from fedsim.hooks import HOOKS, Hook
from fedsim.hooks.checkpointing import Checkpointing
from fedsim.hooks.results import Results
from fedsim.local import Recipe
from fedsim.models import MODELS
from fedsim.reading import parse, read_yaml
from fedsim.runtimes import RUNTIMES
from fedsim.schedules import SCHEDULES
from fedsim.simulation import Failures, Simulation
from fedsim.store import ClientStore
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.strategy import Strategy
from fedsim.task import Task
from fedsim.types import Count, Seed, Stream, random


class Evaluate(Options):
    """When and how the global model is tested, and whether each client's own model is."""

    every: Count = 1
    batch_size: Count = 500
    clients: bool = False


class Federation(Options):
    """The part of `data` that is not the dataset's."""

    clients: Count
    partition: Spec | str = "iid"
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.0


class Config(Options):
    """A whole experiment; the mappings are `{name, ...}` of their catalogues, resolved."""

    seed: Seed = 0
    rounds: Count
    data: Spec
    model: Spec | str
    strategy: Spec | str
    cohort: Spec | str
    local: Spec = {}
    evaluate: Evaluate = Evaluate()
    runtime: Spec | str = "threads"
    failures: Spec = {}
    availability: Spec | None = None
    checkpoint: Spec = {}
    client_store: Spec = {}
    hooks: list[Spec | str] = ["stop_on_non_finite", "tensorboard", "curves"]


def load(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, override by dotted keys, validate and resolve; raises ConfigError."""
    values = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    for key, value in sorted((overrides or {}).items(), key=lambda pair: pair[0].count(".")):
        values = _override(values, key.split("."), value, key)
    return resolve(values)


def resolve(values: Mapping[str, Any]) -> Config:
    """The config with all defaults filled in."""
    config = validated(Config, values)
    data = DATASETS.resolve(config.data, also=Federation)
    recipe = _recipe_options(config).model_dump(mode="json")
    schedule = _run_long(config.local.get("schedule", "constant"), config.rounds - recipe["warmup"])
    return config.model_copy(
        update={
            "data": data | {"partition": PARTITIONS.resolve(data["partition"])},
            "model": MODELS.resolve(config.model),
            "strategy": STRATEGIES.resolve(config.strategy),
            "cohort": COHORTS.resolve(config.cohort),
            "local": recipe | {"schedule": SCHEDULES.resolve(schedule)},
            "runtime": RUNTIMES.resolve(config.runtime),
            "failures": _options(Failures, config.failures, "failures"),
            "availability": None
            if config.availability is None
            else _options(Availability, config.availability, "availability"),
            "checkpoint": _options(Checkpointing, config.checkpoint, "checkpoint"),
            "client_store": _options(ClientStore, config.client_store, "client_store"),
            "hooks": [HOOKS.resolve(hook, f"hooks[{i}]") for i, hook in enumerate(config.hooks)],
        }
    )


def build_data(config: Config) -> FederatedData:
    """The dataset of a resolved config, and who holds what; raises ConfigError."""
    shared = {key: config.data[key] for key in Federation.model_fields}
    dataset = DATASETS.make({k: v for k, v in config.data.items() if k not in shared}, Dataset)
    stream = random(config.seed, Stream.PARTITION)
    owners = PARTITIONS.make(shared["partition"], np.ndarray, dataset, shared["clients"], stream)
    return FederatedData(dataset, owners, clients=shared["clients"], holdout=shared["holdout"], seed=config.seed)


def build(config: Config) -> Simulation:
    """The simulation that a resolved config describes; raises ConfigError."""
    data = build_data(config)
    recipe = Recipe(SCHEDULES.bind(config.local["schedule"]), **dict(_recipe_options(config)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random(config.seed, Stream.MODEL).integers(2**63)))
        network = MODELS.make(config.model, nn.Module, data.shape, data.num_classes)
    task = Task(network, data.shape, data.num_classes, channels_last=recipe.channels_last)
    return Simulation(
        STRATEGIES.make(config.strategy, Strategy),
        task,
        data,
        RUNTIMES.bind(config.runtime)(task, data),
        COHORTS.bind(config.cohort),
        recipe,
        failures=Failures(**config.failures),
        availability=None if config.availability is None else Availability(**config.availability),
        clients=ClientStore(**config.client_store),
        seed=config.seed,
    )


def build_hooks(config: Config) -> list[Hook]:
    """The hooks that a resolved config names, and those that write checkpoints and results; raises ConfigError."""
    named = (HOOKS.make(hook, Hook, at=f"hooks[{i}]") for i, hook in enumerate(config.hooks))
    return [Checkpointing(**config.checkpoint), Results(), *named]


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["strategy.mu=0.1"]` as `{"strategy.mu": 0.1}`; values are YAML. Raises ConfigError."""
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (all(key.split(".")) and equals):
            raise ConfigError(f"{pair!r} should be KEY=VALUE, such as local.lr=0.1")
        overrides[key] = parse(value, f"{key}: {value!r}")
    return overrides


def _override(values: Mapping[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**values, head: value}
    below = values.get(head)
    below = {} if below is None else {"name": below} if isinstance(below, str) else below
    if not isinstance(below, Mapping):
        raise ConfigError(f"{key}: {head} is {below!r}, which has no keys below it")
    return {**values, head: _override(below, rest, value, key)}


def _options(target: Callable[..., Any], values: Spec, at: str) -> Spec:
    return validated(options_of(target), values, at).model_dump(mode="json")


def _recipe_options(config: Config) -> Options:
    """What `local` says besides its schedule, which is a component of its own."""
    local = {key: value for key, value in config.local.items() if key != "schedule"}
    return validated(options_of(Recipe), local, "local")


def _run_long(schedule: Any, rounds: int) -> Any:
    """A schedule that has a length and is not told one lasts as long as the run."""
    spec = {"name": schedule} if isinstance(schedule, str) else schedule
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        timed = "rounds" in options_of(SCHEDULES.load(spec["name"], "local.schedule.name")).model_fields
        return {**({"rounds": max(rounds, 1)} if timed else {}), **spec}
    return spec
