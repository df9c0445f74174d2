"""An experiment: YAML to validated settings to objects; what is wrong is one line, before anything runs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import yaml
from annotated_types import Ge, Lt
from torch import nn

from fedsim.catalogue import Options, Spec, options_of, validated
from fedsim.cohort import COHORTS
from fedsim.data import DATASETS, PARTITIONS, Dataset, FederatedData
from fedsim.errors import ConfigError
from fedsim.local import Recipe
from fedsim.models import MODELS
from fedsim.runtimes import RUNTIMES
from fedsim.schedules import SCHEDULES
from fedsim.simulation import Failures, Simulation
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
            "failures": validated(options_of(Failures), config.failures, "failures").model_dump(),
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
        seed=config.seed,
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file; raises ConfigError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text in UTF-8") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: should hold a mapping of settings, such as `rounds: 100`")
    return values


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["strategy.mu=0.1"]` as `{"strategy.mu": 0.1}`; values are YAML. Raises ConfigError."""
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (all(key.split(".")) and equals):
            raise ConfigError(f"{pair!r} should be KEY=VALUE, such as local.lr=0.1")
        overrides[key] = _parse(value, f"{key}: {value!r}")
    return overrides


MERGE = "tag:yaml.org,2002:merge"  # of the key <<


class Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as in YAML 1.2, and a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what a plain loader would silently let the last one win."""
        keys = list[Any]()
        for key in (key for key, _ in node.value if key.tag != MERGE):
            keys.append(self.construct_object(key, deep=True))
            if keys.count(keys[-1]) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {keys[-1]!r} stands twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, at: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text.strip() else ""
        raise ConfigError(f"{at}{line}: is not YAML: {' '.join(str(error.problem).split())}") from None
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:  # of dates and numbers too
        raise ConfigError(f"{at}: is not YAML: {str(error).splitlines()[0]}") from None


def _override(values: Mapping[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**values, head: value}
    below = values.get(head, {})
    below = {"name": below} if isinstance(below, str) else below
    if not isinstance(below, Mapping):
        raise ConfigError(f"{key}: {head} is {below!r}, which has no keys below it")
    return {**values, head: _override(below, rest, value, key)}


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
