"""The config of an experiment: from YAML to validated settings; an error is one line, before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BeforeValidator, Field

from fedsim.base.catalogue import (
    Catalogue,
    Options,
    Spec,
    UnknownKeyError,
    combined,
    nearest,
    options_of,
    validated,
)
from fedsim.base.files import uninterrupted
from fedsim.base.reading import parse, read_yaml
from fedsim.data import AUGMENTATIONS, DATASETS, PARTITIONS
from fedsim.data.augment import MIXERS
from fedsim.data.noise import LabelNoise
from fedsim.errors import ConfigError
from fedsim.experiment.hooks import HOOKS
from fedsim.federated.availability import Availability
from fedsim.federated.cohort import COHORTS
from fedsim.federated.recalibration import Recalibrate
from fedsim.federated.simulation import Failures
from fedsim.federated.store import ClientStore
from fedsim.models import MODELS
from fedsim.models import options as models
from fedsim.runtimes import RUNTIMES
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.training.losses import LOSSES
from fedsim.training.recipe import Distillation, Recipe
from fedsim.training.schedules import SCHEDULES
from fedsim.types import Count, Decay, Seed


class Evaluate(Options):
    """When and how the global model is tested, and whether each client's own model is.

    The share `new_clients` of all clients, at least one, is kept out of training; when the run has ended they
    evaluate their own models, for which strategies with models of clients start from a client's initial state.
    In `train` mode batch norm has the statistics of the batch that is tested, and dropout drops; a last batch of
    one example joins the one before.
    """

    every: Count = 1
    batch_size: Count = 500
    clients: bool = False
    mode: Literal["eval", "train"] = "eval"
    new_clients: Annotated[float, Ge(0), Lt(1)] = 0.0


class Checkpointing(Options):
    """Saves a checkpoint every so many rounds (null: only at the end), and whenever a run ends or is stopped.

    The newest `keep` checkpoints stay in `checkpoints/` of the run's folder.
    """

    every: Count | None = 1
    keep: Count = 3


class DataOptions(Options):
    """The options of `data` that every dataset has: how its examples are divided among clients and server."""

    clients: Count
    partition: Spec | str = "iid"
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.0
    crop: Count | None = None  # pixels a side, around the centre, where no augmentation changed the size
    # The share of the training examples that is the server's own; "all" where clients have data of their own.
    public: Annotated[float, Ge(0), Lt(1)] | Literal["all"] = 0.0
    label_noise: Spec | None = None
    partition_seed: Seed | None = None  # draws owners, holdout, public and label_noise; null: the run's seed


class LocalOptions(Options):
    """What `local` has besides the recipe's own settings; each is resolved by its catalogue."""

    schedule: Any = "constant"
    loss: Any = "cross_entropy"
    augment: Any = []


def _with_name(spec: Any) -> Any:
    """A bare name as a mapping, to which the options that all datasets have are added."""
    return {"name": spec} if isinstance(spec, str) else spec


class Config(Options):
    """A whole experiment; the mappings are `{name, ...}` of their catalogues, resolved."""

    seed: Seed = 0
    rounds: Annotated[Count, Field(examples=["30"])]
    data: Annotated[Spec, BeforeValidator(_with_name), Field(examples=["{name: digits, clients: 10}"])]
    model: Annotated[Spec | str, Field(examples=["cnn"])]
    strategy: Annotated[Spec | str, Field(examples=["fedavg"])]
    cohort: Annotated[Spec | str, Field(examples=["{name: uniform, fraction: 0.1}"])]
    local: Spec = {}
    evaluate: Evaluate = Evaluate()
    runtime: Spec | str = "auto"
    failures: Spec = {}
    availability: Spec | None = None
    checkpoint: Checkpointing = Checkpointing()
    client_store: Spec = {}
    recalibrate: Spec | None = None
    ema: Decay | None = None
    hooks: list[Spec | str] = ["stop_on_non_finite", "tensorboard", "curves"]


def num_new_clients(config: Config) -> int:
    """How many of `data.clients` are kept out of training; raises ConfigError where nobody would be left."""
    share, clients = config.evaluate.new_clients, config.data["clients"]
    if share and clients < 2:
        raise ConfigError("evaluate.new_clients: of 1 client none can be kept out of training; raise data.clients")
    return min(max(round(share * clients), 1), clients - 1) if share else 0


MAX_KEYS_MEANT = 3  # that an error names for one that does not exist
CATALOGUES: dict[str, Catalogue] = {  # by the key that names an entry
    "data": DATASETS,
    "data.partition": PARTITIONS,
    "model": MODELS,
    "strategy": STRATEGIES,
    "cohort": COHORTS,
    "local.schedule": SCHEDULES,
    "local.loss": LOSSES,
    "runtime": RUNTIMES,
}
SCHEMAS: dict[str, Callable[..., Any]] = {  # of the other mappings
    "": Config,
    "data": DataOptions,
    "model": models.CommonOptions,
    "local": Recipe,
    "evaluate": Evaluate,
    "failures": Failures,
    "availability": Availability,
    "checkpoint": Checkpointing,
    "client_store": ClientStore,
    "recalibrate": Recalibrate,
    "data.label_noise": LabelNoise,
    "local.distillation": Distillation,
}


def load(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, override by dotted keys, validate and resolve; raises ConfigError."""
    values = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    with uninterrupted():  # while modules are imported, a KeyboardInterrupt may become another error
        return resolve(overridden(values, overrides or {}))


def resolve(values: Mapping[str, Any]) -> Config:
    """The config with all defaults filled in; raises ConfigError, which says where an unknown key may belong."""
    try:
        return _resolved(values)
    except UnknownKeyError as error:
        meant = nearest(error.name, error.allowed) or keys_named(error.name, values, error.parent)
        raise ConfigError(error.message(meant)) from None


def _resolved(values: Mapping[str, Any]) -> Config:
    config = validated(Config, values)
    data = DATASETS.resolve(config.data, also=DataOptions)
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
            "client_store": _options(ClientStore, config.client_store, "client_store"),
            "hooks": [HOOKS.resolve(hook, f"hooks[{i}]") for i, hook in enumerate(config.hooks)],
        }
    )


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
    """The values with some replaced, by dotted keys; raises ConfigError.

    A bare name of a dataset keeps what all datasets have: data=cifar10 changes neither clients nor partition.
    """
    for key, value in sorted(overrides.items(), key=lambda pair: pair[0].count(".")):
        if key == "data" and isinstance(value, str) and isinstance(before := values.get(key), Mapping):
            value = {"name": value} | {k: v for k, v in before.items() if k in DataOptions.model_fields}
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
    """The values with the defaults filled in; null, for a part that is not wanted, stays null."""
    return None if values is None else validated(options_of(target), values, at).model_dump(mode="json")


def keys_named(name: str, values: Mapping[str, Any], parent: str = "") -> list[str]:
    """The dotted keys that end with `name`, or with the name nearest to it; those in use in `values`, if any are.

    Others come with the entry that has such an option. Of several those below `parent`, and none of many.
    """
    in_use, others = dict[str, list[str]](), dict[str, list[str]]()

    def add(keys: dict[str, list[str]], at: str, target: Callable[..., Any], of: str = "") -> None:
        for key in options_of(target).model_fields:
            keys.setdefault(key, []).append(f"{at}.{key}{of}".lstrip("."))

    for at, target in SCHEMAS.items():
        add(others if _at(values, at) is None else in_use, at, target)
    for at, catalogue in CATALOGUES.items():
        spec = _at(values, at)
        chosen = spec.get("name") if isinstance(spec, Mapping) else spec
        for entry in catalogue:
            of = "" if entry == chosen else f" of {entry}"
            add(others if of else in_use, at, catalogue.load(entry), of)
    meant = name if name in in_use or name in others else next(iter(nearest(name, in_use, 0.8)), "")
    found = [*dict.fromkeys(in_use.get(meant) or others.get(meant, []))]
    found = [key for key in found if parent and key.startswith(f"{parent}.")] or found
    return found if len(found) <= MAX_KEYS_MEANT else []


def _at(values: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split(".") if key else []:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def recipe_options(local: Spec) -> Options:
    """The options of `local` without its components: schedule, loss and augment."""
    own = {key: value for key, value in local.items() if key not in LocalOptions.model_fields}
    return validated(options_of(Recipe), own, "local")


def _resolve_local(config: Config) -> Spec:
    own = LocalOptions.model_fields
    checked = validated(combined(options_of(Recipe), LocalOptions), config.local, "local")
    recipe = checked.model_dump(mode="json", exclude={*own})
    local = {key: config.local.get(key, field.default) for key, field in own.items()}
    schedule, augment = _with_length(local["schedule"], config.rounds - recipe["warmup"]), local["augment"]
    if not isinstance(augment, list):
        raise ConfigError(f"local.augment: {augment!r} should be a list, such as [flip, random_crop]")
    specs = [AUGMENTATIONS.resolve(spec, f"local.augment[{i}]") for i, spec in enumerate(augment)]
    if recipe["noisy_labels"] and (mixing := MIXERS & {spec["name"] for spec in specs}):
        raise ConfigError(
            f"local.noisy_labels: cannot tell which label is wrong after {min(mixing)}; one of the two"
        )
    distillation = recipe["distillation"]
    if distillation and distillation["model"] is not None:
        recipe["distillation"] = distillation | {"model": _resolve_teacher(distillation["model"])}
    loss = LOSSES.resolve(local["loss"])
    return recipe | {"schedule": SCHEDULES.resolve(schedule), "loss": loss, "augment": specs}


def _resolve_teacher(model: Spec | str) -> Spec:
    at = "local.distillation.model"
    spec = models.resolve(model, at)
    if idle := models.training_options(spec):
        raise ConfigError(f"{at}.{next(iter(idle))}: has no effect on a teacher; its weights are in its file")
    return spec


def _with_length(schedule: Any, rounds: int) -> Any:
    """The schedule; one that has an option `rounds` lasts as long as the run unless that is set."""
    spec = {"name": schedule} if isinstance(schedule, str) else schedule
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        timed = "rounds" in SCHEDULES.options(spec["name"], "local.schedule.name").model_fields
        return {**({"rounds": max(rounds, 1)} if timed else {}), **spec}
    return spec
