"""From a resolved config to objects: data, task, recipe, hooks, simulation; an error is one line."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.base.catalogue import Spec
from fedsim.base.devices import one_thread
from fedsim.base.global_draws import keyed_globals
from fedsim.base.modes import own_modes
from fedsim.data import AUGMENTATIONS, DATASETS, PARTITIONS, Dataset, FederatedData
from fedsim.data.federated import checked_owners, public_mask, without_rows
from fedsim.data.noise import LabelNoise
from fedsim.errors import ConfigError, border
from fedsim.experiment.config import Config, DataOptions, num_new_clients, recipe_options
from fedsim.experiment.hook import Hook, check_hooks
from fedsim.experiment.hooks import HOOKS
from fedsim.federated.availability import Availability
from fedsim.federated.cohort import COHORTS
from fedsim.federated.recalibration import Recalibrate
from fedsim.federated.runtime import Runtime
from fedsim.federated.simulation import Failures, Simulation
from fedsim.federated.store import ClientStore
from fedsim.federated.strategy import Strategy
from fedsim.models import options as models
from fedsim.models.weights import load_weights
from fedsim.runtimes import RUNTIMES, runtime_class
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.training.losses import LOSSES
from fedsim.training.recipe import Distillation, Recipe
from fedsim.training.schedules import SCHEDULES
from fedsim.training.small_batches import check_evaluation
from fedsim.training.task import Task
from fedsim.types import Stream, random


def build_dataset(config: Config) -> Dataset:
    """The dataset of a resolved config; raises ConfigError."""
    own = {"name", *DATASETS.options(config.data["name"]).model_fields}  # also one that DataOptions has
    with keyed_globals(0, Stream.DATASET):
        return DATASETS.make({key: value for key, value in config.data.items() if key in own}, Dataset)


def build_data(config: Config, dataset: Dataset | None = None) -> FederatedData:
    """The dataset of a resolved config, unless it is given, and who holds what; raises ConfigError."""
    shared = {key: config.data[key] for key in DataOptions.model_fields}
    dataset = build_dataset(config) if dataset is None else dataset
    dataset.check_parts("train", "test")
    seed = config.seed if shared["partition_seed"] is None else shared["partition_seed"]
    stream = random(seed, Stream.PARTITION)
    if shared["public"] == "all":
        raise ConfigError("data.public: all leaves simulated clients without examples; give a share such as 0.1")
    public = public_mask(dataset, shared["public"], seed)
    rest = without_rows(dataset, public)
    with keyed_globals(seed, Stream.PARTITION):
        owners = PARTITIONS.make(shared["partition"], np.ndarray, rest, shared["clients"], stream)
    with border(f"data.partition.name: {shared['partition']['name']}", ConfigError):
        owners = checked_owners(owners, len(rest.y_train), shared["clients"])
    data = FederatedData(
        dataset,
        owners,
        clients=shared["clients"],
        new_clients=num_new_clients(config),
        holdout=shared["holdout"],
        public=public,
        crop=shared["crop"],
        seed=seed,
    )
    noise = shared["label_noise"]
    return data if noise is None else LabelNoise(**noise).applied(data, seed)


def build_server_data(config: Config) -> FederatedData:
    """The server's data where clients have data of their own: test examples, and those of `data.public`."""
    if config.evaluate.new_clients:
        raise ConfigError("evaluate.new_clients: nodes join by themselves; leave it out on real machines")
    shared, dataset = {key: config.data[key] for key in ("clients", "crop", "public")}, build_dataset(config)
    dataset.check_parts("test")
    seed = config.seed if config.data["partition_seed"] is None else config.data["partition_seed"]
    public = public_mask(dataset, shared.pop("public"), seed)
    return FederatedData(dataset, None, public=public, seed=seed, **shared)


@own_modes()
def build(
    config: Config,
    data: FederatedData | None = None,
    runtime: Callable[[Task, FederatedData], Runtime] | None = None,
) -> Simulation:
    """The simulation of a resolved config, with its data and runtime unless they are given; raises ConfigError."""
    if data is None:
        elsewhere = runtime_class(config.runtime).elsewhere
        data = build_server_data(config) if elsewhere else build_data(config)
    data.check_augment(config.local["augment"])
    recipe = build_recipe(config.local)
    task = build_task(config.model, recipe, config.seed, data.shape, data.num_classes, data.trial_examples())
    if config.evaluate.mode == "train":
        check_evaluation(task, data, config.evaluate.batch_size, clients=config.evaluate.clients)
    return Simulation(
        STRATEGIES.make(config.strategy, Strategy),
        task,
        data,
        runtime(task, data)
        if runtime
        else RUNTIMES.make(config.runtime, runtime_class(config.runtime), task, data),
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
    model: Spec | str,
    recipe: Recipe,
    seed: int,
    shape: tuple[int, ...],
    classes: int,
    examples: Tensor | None = None,
    *,
    sent: bool = False,
) -> Task:
    """The network and what it learns from, for examples of `shape`; raises ConfigError.

    The network is tried on `examples` (n, *shape), by default on random ones. Where a teacher's weights are
    `sent` later, it keeps its initial ones, and its file is not read.
    """
    with keyed_globals(seed, Stream.MODEL), one_thread():
        torch.manual_seed(int(random(seed, Stream.MODEL).integers(2**63)))
        network = models.make(model, shape, classes)
        teacher = _teacher(model, recipe.distillation, shape, classes, sent)
    if recipe.precision != "fp32" and any(p.dtype == torch.float64 for p in network.parameters()):
        raise ConfigError(f"local.precision: {recipe.precision} needs a float32 network, and this one has float64")
    return Task(
        network,
        shape,
        classes,
        channels_last=recipe.channels_last,
        recompute=recipe.activation_checkpointing,
        teacher=teacher,
        buffers=models.buffer_words(model),
        head=models.head(model),
        examples=examples,
    )


def build_hooks(config: Config) -> list[Hook]:
    """The hooks that a resolved config names; raises ConfigError."""
    return check_hooks(HOOKS.make(hook, Hook, at=f"hooks[{i}]") for i, hook in enumerate(config.hooks))


def _teacher(
    model: Spec | str, distillation: Distillation | None, shape: tuple[int, ...], classes: int, sent: bool
) -> nn.Module | None:
    """The network that clients distil from; None where it is the global model, or where there is none."""
    if distillation is None or isinstance(distillation.teacher, str):
        if distillation and distillation.model is not None:
            raise ConfigError("local.distillation.model: needs a file in local.distillation.teacher")
        return None
    spec, at = distillation.model, "local.distillation.model"
    if spec is None:
        whole, at = models.resolve(model), "model"
        spec = {key: value for key, value in whole.items() if key not in models.training_options(whole)}
    network = models.make(spec, shape, classes, at)
    if not sent:
        load_weights(network, distillation.teacher, "local.distillation.teacher")
    return network.eval().requires_grad_(False)
