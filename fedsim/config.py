"""An experiment: YAML to validated settings to objects; what is wrong is one line, before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import nn

from fedsim.availability import Availability
from fedsim.catalogue import Options, Spec, options_of, validated
from fedsim.cohort import COHORTS
from fedsim.data import AUGMENTATIONS, DATASETS, PARTITIONS, Dataset, FederatedData
from fedsim.data.augment import MIXERS
from fedsim.data.federated import set_apart, without
from fedsim.data.noise import LabelNoise
from fedsim.errors import ConfigError
from fedsim.hooks import HOOKS, Hook
from fedsim.hooks.checkpointing import Checkpointing
from fedsim.hooks.results import Results
from fedsim.losses import LOSSES
from fedsim.models import options as models
from fedsim.models.weights import fill
from fedsim.reading import parse, read_yaml
from fedsim.recalibration import Recalibrate
from fedsim.recipe import Distillation, Recipe
from fedsim.runtimes import RUNTIMES, Runtime
from fedsim.schedules import SCHEDULES
from fedsim.simulation import Failures, Simulation
from fedsim.store import ClientStore
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.strategy import Strategy
from fedsim.task import Task
from fedsim.types import Count, Decay, Seed, Stream, random


class Evaluate(Options):
    """When and how the global model is tested, and whether each client's own model is.

    In `train` mode batch norm has the statistics of the batch that is tested, and dropout drops.
    """

    every: Count = 1
    batch_size: Count = 500
    clients: bool = False
    mode: Literal["eval", "train"] = "eval"


class Federation(Options):
    """The part of `data` that is not the dataset's."""

    clients: Count
    partition: Spec | str = "iid"
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.0
    crop: Count | None = None  # pixels a side, about the centre, where no augmentation has made them that size
    # Of the training examples, the server's own; all where clients are elsewhere.
    public: Annotated[float, Ge(0), Lt(1)] | Literal["all"] = 0.0
    label_noise: Spec | None = None
    partition_seed: Seed | None = None  # of the division: owners, holdout, public, label_noise; the run's if null


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
    runtime: Spec | str = "auto"
    failures: Spec = {}
    availability: Spec | None = None
    checkpoint: Spec = {}
    client_store: Spec = {}
    recalibrate: Spec | None = None
    ema: Decay | None = None
    hooks: list[Spec | str] = ["stop_on_non_finite", "tensorboard", "curves"]


def load(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, override by dotted keys, validate and resolve; raises ConfigError."""
    values = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    return resolve(overridden(values, overrides or {}))


def resolve(values: Mapping[str, Any]) -> Config:
    """The config with all defaults filled in."""
    config = validated(Config, values)
    data = DATASETS.resolve(config.data, also=Federation)
    return config.model_copy(
        update={
            "data": data
            | {
                "partition": PARTITIONS.resolve(data["partition"]),
                "label_noise": _options(LabelNoise, data["label_noise"], "data.label_noise"),
            },
            "model": models.resolve(config.model),
            "strategy": STRATEGIES.resolve(config.strategy),
            "cohort": COHORTS.resolve(config.cohort),
            "local": _resolve_local(config),
            "runtime": RUNTIMES.resolve(config.runtime),
            "failures": _options(Failures, config.failures, "failures"),
            "availability": _options(Availability, config.availability, "availability"),
            "recalibrate": _options(Recalibrate, config.recalibrate, "recalibrate"),
            "checkpoint": _options(Checkpointing, config.checkpoint, "checkpoint"),
            "client_store": _options(ClientStore, config.client_store, "client_store"),
            "hooks": [HOOKS.resolve(hook, f"hooks[{i}]") for i, hook in enumerate(config.hooks)],
        }
    )


def build_dataset(config: Config) -> Dataset:
    """The dataset of a resolved config; raises ConfigError."""
    return DATASETS.make({k: v for k, v in config.data.items() if k not in Federation.model_fields}, Dataset)


def build_data(config: Config, dataset: Dataset | None = None) -> FederatedData:
    """The dataset of a resolved config, unless it is given, and who holds what; raises ConfigError."""
    shared = {key: config.data[key] for key in Federation.model_fields}
    dataset = build_dataset(config) if dataset is None else dataset
    dataset.check_parts("train", "test")
    seed = config.seed if shared["partition_seed"] is None else shared["partition_seed"]
    stream = random(seed, Stream.PARTITION)
    if shared["public"] == "all":
        raise ConfigError("data.public: all leaves nothing to clients that are simulated; a share of them does")
    public = set_apart(dataset, shared["public"], seed)
    owners = PARTITIONS.make(shared["partition"], np.ndarray, without(dataset, public), shared["clients"], stream)
    data = FederatedData(
        dataset,
        owners,
        clients=shared["clients"],
        holdout=shared["holdout"],
        public=public,
        crop=shared["crop"],
        seed=seed,
    )
    noise = shared["label_noise"]
    return data if noise is None else LabelNoise(**noise).applied(data, seed)


def build_server_data(config: Config) -> FederatedData:
    """The same where clients hold theirs themselves: for tests, and of `data.public` the server's own."""
    shared, dataset = {key: config.data[key] for key in ("clients", "crop", "public")}, build_dataset(config)
    dataset.check_parts("test")
    seed = config.seed if config.data["partition_seed"] is None else config.data["partition_seed"]
    public = set_apart(dataset, shared.pop("public"), seed)
    return FederatedData(dataset, None, public=public, seed=seed, **shared)


def build(
    config: Config,
    data: FederatedData | None = None,
    runtime: Callable[[Task, FederatedData], Runtime] | None = None,
) -> Simulation:
    """The simulation of a resolved config, with its data and runtime unless they are given; raises ConfigError."""
    if data is None:
        elsewhere = getattr(RUNTIMES.load(RUNTIMES.resolve(config.runtime)["name"]), "elsewhere", False)
        data = build_server_data(config) if elsewhere else build_data(config)
    data.check_augment(config.local["augment"])
    recipe = build_recipe(config.local)
    task = build_task(config.model, recipe, config.seed, data.shape, data.num_classes)
    return Simulation(
        STRATEGIES.make(config.strategy, Strategy),
        task,
        data,
        (runtime or RUNTIMES.bind(config.runtime))(task, data),
        COHORTS.bind(config.cohort),
        recipe,
        failures=Failures(**config.failures),
        availability=None if config.availability is None else Availability(**config.availability),
        clients=ClientStore(**config.client_store),
        recalibrate=None if config.recalibrate is None else Recalibrate(**config.recalibrate),
        ema=config.ema,
        seed=config.seed,
        config=config.model_dump(mode="json", include={"seed", "model", "strategy", "local", "failures"}),
    )


def build_recipe(local: Spec) -> Recipe:
    """How clients train by a resolved `local`; raises ConfigError."""
    return Recipe(
        SCHEDULES.bind(local["schedule"]),
        LOSSES.bind(local["loss"]),
        [AUGMENTATIONS.bind(spec) for spec in local["augment"]],
        **dict(recipe_options(local)),
    )


def build_task(
    model: Spec | str, recipe: Recipe, seed: int, shape: tuple[int, ...], classes: int, *, sent: bool = False
) -> Task:
    """What is learned of examples of `shape`; raises ConfigError.

    Where the weights are `sent` afterwards, a teacher is left as its initialisation has it, and no file is read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random(seed, Stream.MODEL).integers(2**63)))
        network = models.make(model, shape, classes)
        teacher = _teacher(model, recipe.distillation, shape, classes, sent)
    return Task(
        network,
        shape,
        classes,
        channels_last=recipe.channels_last,
        recompute=recipe.activation_checkpointing,
        teacher=teacher,
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


def overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """With others in the place of some values, by dotted keys; raises ConfigError."""
    for key, value in sorted(overrides.items(), key=lambda pair: pair[0].count(".")):
        values = _override(values, key.split("."), value, key)
    return values


def _override(values: Mapping[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**values, head: value}
    below = values.get(head)
    below = {} if below is None else {"name": below} if isinstance(below, str) else below
    if not isinstance(below, Mapping):
        raise ConfigError(f"{key}: {head} is {below!r}, which has no keys below it")
    return {**values, head: _override(below, rest, value, key)}


def _options(target: Callable[..., Any], values: Spec | None, at: str) -> Spec | None:
    """With the defaults filled in; a part that is not wanted stays null."""
    return None if values is None else validated(options_of(target), values, at).model_dump(mode="json")


def recipe_options(local: Spec) -> Options:
    """What `local` says besides its components."""
    own = {key: value for key, value in local.items() if key not in ("schedule", "loss", "augment")}
    return validated(options_of(Recipe), own, "local")


def _resolve_local(config: Config) -> Spec:
    recipe = recipe_options(config.local).model_dump(mode="json")
    schedule = _run_long(config.local.get("schedule", "constant"), config.rounds - recipe["warmup"])
    augment = config.local.get("augment", [])
    if not isinstance(augment, list):
        raise ConfigError(f"local.augment: {augment!r} should be a list, such as [flip, random_crop]")
    specs = [AUGMENTATIONS.resolve(spec, f"local.augment[{i}]") for i, spec in enumerate(augment)]
    if recipe["noisy_labels"] and (mixing := MIXERS & {spec["name"] for spec in specs}):
        raise ConfigError(
            f"local.noisy_labels: cannot tell which label is wrong after {min(mixing)}; one of the two"
        )
    loss = LOSSES.resolve(config.local.get("loss", "cross_entropy"))
    distillation = recipe["distillation"]
    if distillation and distillation["model"] is not None:
        recipe["distillation"] = distillation | {"model": _resolve_teacher(distillation["model"])}
    return recipe | {"schedule": SCHEDULES.resolve(schedule), "loss": loss, "augment": specs}


def _teacher(
    model: Spec | str, distillation: Distillation | None, shape: tuple[int, ...], classes: int, sent: bool
) -> nn.Module | None:
    """The network that clients distil from, where it is not the global model."""
    if distillation is None or isinstance(distillation.teacher, str):
        if distillation and distillation.model is not None:
            raise ConfigError("local.distillation.model: needs a file in local.distillation.teacher")
        return None
    spec, at = distillation.model, "local.distillation.model"
    if spec is None:
        whole, at = models.resolve(model), "model"
        spec = {key: value for key, value in whole.items() if key not in models.training(whole)}
    network = models.make(spec, shape, classes, at)
    if not sent:
        fill(network, distillation.teacher, "local.distillation.teacher")
    return network.eval().requires_grad_(False)


def _resolve_teacher(model: Spec | str) -> Spec:
    at = "local.distillation.model"
    spec = models.resolve(model, at)
    if idle := models.training(spec):
        raise ConfigError(f"{at}.{next(iter(idle))}: is nothing to a teacher, which is all in its file")
    return spec


def _run_long(schedule: Any, rounds: int) -> Any:
    """A schedule that has a length and is not told one lasts as long as the run."""
    spec = {"name": schedule} if isinstance(schedule, str) else schedule
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        timed = "rounds" in options_of(SCHEDULES.load(spec["name"], "local.schedule.name")).model_fields
        return {**({"rounds": max(rounds, 1)} if timed else {}), **spec}
    return spec
