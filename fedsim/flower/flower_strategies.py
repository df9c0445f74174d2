"""Strategies of Flower's own, such as its FedAdam, on fedsim's nodes.

They send a network's state_dict as "arrays" and numbers as "config", and expect a state_dict and metrics back.
The app's config says what a node does: `experiment` has `model`, `local`, `seed` and `strategy` as any config, and
may have `examples` with `classes`, `scale`, `shift` and `crop`, which replace those of the node's own data, and
`class_names`, which should be those of the node's own data. All of it is checked against what the node allows.
After its `start`, the ServerApp calls `tell_finished`.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.base.catalogue import Options, validated
from fedsim.data import Dataset, FederatedData
from fedsim.errors import ConfigError, located
from fedsim.experiment.build import build_recipe, build_task
from fedsim.federated.aggregate import WeightedMean
from fedsim.federated.message import moved_statistics
from fedsim.federated.strategy import downloads, surveys
from fedsim.flower import wire
from fedsim.flower.app import values_of
from fedsim.flower.messages import FINISHED_WAIT, Answer, Finished, Invitation, Order
from fedsim.flower.node import Node
from fedsim.flower.plan import Plan, digest, initial_of
from fedsim.flower.transport import decode
from fedsim.training.task import Task
from fedsim.types import TRAINED, Count

if TYPE_CHECKING:
    from flwr.serverapp import Grid

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # names of records in Flower's strategies
EXAMPLES = "num-examples"
ROUND = "server-round"  # from 1
BATCH_SIZE = 500  # of an evaluation


class ExampleOptions(Options):
    """The `examples` of an experiment: networks take x * scale - shift, of images the central (crop, crop)."""

    classes: Count | None = None
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    crop: Count | None = None
    class_names: tuple[str, ...] | None = None


def is_from_flower(content: RecordDict) -> bool:
    """Whether a message is from a strategy of Flower's own."""
    return wire.KEY not in content.config_records and ARRAYS in content.array_records


def train(node: Node, message: Message, context: Context) -> RecordDict:
    """Train: the state_dict after local training, and n_k; raises ValueError."""
    sent, task, answer = _work(node, message, context, "train")
    update = decode(answer.message)
    if update.keys() - {"buffers"} != {"delta"}:
        raise ConfigError(f"strategy: sends {', '.join(sorted(update))}; Flower's strategies take only models")
    found = task.layout.split(task.initial_model + update["delta"])
    buffers = update.get("buffers", task.initial_buffers)
    if "buffers" in update and node.role and node.role.parts.strategy.buffers_as_changes:
        buffers = moved_statistics(task.initial_buffers, buffers, task.buffer_layout)
    found |= task.buffer_layout.split(buffers)
    trained = ArrayRecord({name: found.get(name, value) for name, value in sent.items()})
    about = {name: value for name, value in answer.metrics.items() if name not in TRAINED} | {
        EXAMPLES: answer.examples
    }
    if {"loss", "examples"} <= answer.metrics.keys():  # the strategy may withhold them
        about["train_loss"] = answer.metrics["loss"] / answer.metrics["examples"]
    return RecordDict({ARRAYS: trained, METRICS: MetricRecord({**about})})


def evaluate(node: Node, message: Message, context: Context) -> RecordDict:
    """Evaluate: loss and accuracy on the node's test examples, or on its training examples if it has no others."""
    *_, answer = _work(node, message, context, "evaluate")
    found = answer.metrics
    n = found["examples"]
    about = {EXAMPLES: int(n), "loss": found["loss"] / n, "accuracy": found["correct"] / n}
    return RecordDict({METRICS: MetricRecord({**about})})


def tell_finished(grid: "Grid", run_id: int) -> None:
    """Tell the nodes that this Flower run has reached its end; they then keep of it what their owners want."""
    ended = Finished(_run(run_id), 0)
    grid.send_and_receive(
        [Message(wire.record(ended), dst_node_id=node, message_type="query") for node in grid.get_node_ids()],
        timeout=FINISHED_WAIT,
    )


def _run(run_id: int) -> str:
    """The id under which nodes keep what they have of a Flower run."""
    return hashlib.sha256(f"Flower run {run_id}".encode()).hexdigest()[:32]


def _work(node: Node, message: Message, context: Context, what: Any) -> tuple[dict[str, Tensor], Task, Answer]:
    """The state_dict that was sent, a task with these weights, and the node's answer to an equivalent order."""
    sent = _tensors(message.content, node.settings.allow.max_bytes)
    plan = _plan(node, values_of(context.run_config), sent)
    task = _task(plan, sent, node.shard(plan.examples).trial_examples())
    if task.initial_of("weights"):
        raise ConfigError("model: has spectral norms, whose vectors Flower's strategies would average")
    run, text = _run(context.run_id), plan.json_text()
    initial = initial_of(task)
    if error := node.join(Invitation(run, text, initial)).error:
        raise ConfigError(error)
    if node.role and node.role.initial_client:
        raise ConfigError(
            f"strategy: in {plan.strategy['name']} clients keep states, which Flower's strategies do not support"
        )
    if node.role and surveys(node.role.parts.strategy):
        raise ConfigError(
            f"strategy: {plan.strategy['name']} asks clients before they train, which Flower's strategies do not"
        )
    if node.role and downloads(node.role.parts.strategy):
        raise ConfigError(
            f"strategy: {plan.strategy['name']} sends each client something else, which Flower's strategies do not"
        )
    if node.role and not isinstance(node.role.parts.strategy.aggregator, WeightedMean):
        raise ConfigError(
            f"strategy: {plan.strategy['name']} needs more than one mean at the server, where Flower's own "
            "strategy is; set strategy: fedavg here, and the rule in the ServerApp"
        )
    answer = node.work(
        Order(
            run=run,
            plan=digest(text),
            task=what,
            round=_round(message.content.config_records.get(CONFIG, ConfigRecord())),
            client=_client(node, context.node_config),
            version=0,
            mark=0,
            checkpoints=(),
            transport="exact",
            batch_size=min(BATCH_SIZE, node.settings.allow.max_batch_size),
            train_mode=False,
            server={"model": task.initial_model, "buffers": task.initial_buffers},
        )
    )
    if answer.error is not None:
        raise ValueError(answer.error)
    return sent, task, answer


def _plan(node: Node, values: Mapping[str, Any], sent: dict[str, Tensor]) -> Plan:
    """The plan of an experiment on this node; looks up only names that the node allows. Raises ConfigError."""
    local = values.get("local", {})
    if not isinstance(local, dict) or "model" not in values:
        raise ConfigError("experiment: should have `model`, and `local` should be a mapping")
    augment = local.get("augment", [])
    components = {
        "schedule": _named(local.get("schedule", "constant")),
        "loss": _named(local.get("loss", "cross_entropy")),
        "augment": [_named(each) for each in augment] if isinstance(augment, list) else augment,
    }
    plan = validated(
        Plan,
        {
            "seed": values.get("seed", 0),
            "model": _named(values["model"]),
            "strategy": _named(values.get("strategy", "fedavg")),
            "local": local | components,
            "examples": _examples(node.dataset, values.get("examples", {})),
        },
        "experiment",
    )
    node.settings.allow.check_names(plan)
    node.settings.allow.check_numbers(plan, sent)
    return plan


def _examples(dataset: Dataset, given: Any) -> dict[str, Any]:
    """The form of this node's examples, with the experiment's `examples` applied; raises ConfigError."""
    if not isinstance(given, dict):
        raise ConfigError("experiment.examples: should be a mapping")
    options = validated(ExampleOptions, given, "experiment.examples").model_dump(mode="json", exclude_none=True)
    owners = np.zeros(len(dataset.y_train), dtype=np.int64)
    own = FederatedData(dataset, owners, clients=1, crop=options.get("crop"))
    return {**own.form, "classes": dataset.classes, "crop": None, **options}


def _named(spec: Any) -> Any:
    return {"name": spec} if isinstance(spec, str) else spec


def _tensors(content: RecordDict, most: int) -> dict[str, Tensor]:
    """A state_dict as it was sent; raises ValueError."""
    if ARRAYS not in content.array_records:
        raise ValueError(f"has no {ARRAYS!r}: it is neither from fedsim nor from a strategy of Flower's")
    record = content.array_records[ARRAYS]
    if (size := sum(len(array.data) for array in record.values())) > most:
        raise ValueError(f"arrays: have {size:,} bytes; allowed on this node: up to {most:,}")
    try:
        return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    except (TypeError, ValueError, MemoryError, EOFError, SyntaxError) as error:
        raise ValueError(f"arrays: cannot be read: {located(error)}") from None


def _task(plan: Plan, sent: Mapping[str, Tensor], examples: Tensor) -> Task:
    """The plan's network with the weights that were sent; raises ConfigError if they do not fit."""
    recipe, form = build_recipe(plan.local), plan.examples
    task = build_task(plan.model, recipe, plan.seed, form.shape, form.classes, examples, sent=True)
    own = task.network.state_dict()
    if own.keys() != sent.keys():
        if missing := sorted(own.keys() - sent.keys()):
            raise ConfigError(f"arrays: {missing[0]} of the experiment's model was not sent")
        raise ConfigError(f"arrays: {min(sent.keys() - own.keys())} is not in the experiment's model")
    for name, value in own.items():
        if value.shape != sent[name].shape:
            raise ConfigError(f"arrays: {name} is {tuple(sent[name].shape)} and should be {tuple(value.shape)}")
    task.network.load_state_dict(sent)
    loaded = task.network.state_dict()  # in the network's dtypes: Flower's strategies may send others
    task.initial_model = task.layout.flatten(loaded)
    task.initial_buffers = task.buffer_layout.flatten(loaded).to(task.initial_model.dtype)
    return task


def _round(config: ConfigRecord) -> int:
    if strange := sorted(config.keys() - {ROUND}):
        raise ValueError(
            f"config.{strange[0]}: is not supported by fedsim's nodes; set how they train in the app's experiment"
        )
    number = config.get(ROUND, 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"config.{ROUND}: {str(number)[:20]} should be a whole number from 1")
    return number - 1


def _client(node: Node, config: Mapping[str, Any]) -> int:
    """The client number, a key of its random numbers: partition-id, if set, or a number derived from its name."""
    if isinstance(number := config.get("partition-id"), int):
        return number
    return int.from_bytes(hashlib.sha256(node.settings.name.encode()).digest()[:3])
