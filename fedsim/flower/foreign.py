"""Strategies of Flower's own, such as its FedAdam, over fedsim's nodes.

They send a network's state_dict as "arrays" and numbers as "config", and want a state_dict and metrics back. What
a node is to do stands in the app's config: `experiment` has `model`, `local`, `seed` and `strategy` as any config
has, and may have `examples`: `classes`, `scale`, `shift` and `crop`, where a node's own data would have others.
All of it is held against what the node allows.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.base.catalogue import Options, validated
from fedsim.data import Dataset, FederatedData
from fedsim.errors import ConfigError, located
from fedsim.experiment.build import build_recipe, build_task
from fedsim.flower import wire
from fedsim.flower.app import values_of
from fedsim.flower.messages import Answer, Invitation, Order
from fedsim.flower.node import Node
from fedsim.flower.plan import Plan, digest, initial_of
from fedsim.flower.transport import decode
from fedsim.training.task import Task
from fedsim.types import Count

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # records, as Flower's strategies name them
EXAMPLES = "num-examples"
ROUND = "server-round"  # from 1
BATCH_SIZE = 500  # of an evaluation


class Told(Options):
    """What an experiment may say of examples: a network takes x * scale - shift, of images their centre."""

    classes: Count | None = None
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    crop: Count | None = None


def is_foreign(content: RecordDict) -> bool:
    """Whether a message is of a strategy of Flower's own."""
    return wire.KEY not in content.config_records and ARRAYS in content.array_records


def train(node: Node, message: Message, context: Context) -> RecordDict:
    """The state_dict after local training, and n_k; raises ValueError."""
    sent, task, answer = _work(node, message, context, "train")
    update = decode(answer.message)
    if update.keys() - {"buffers"} != {"delta"}:
        raise ConfigError(f"strategy: sends {', '.join(sorted(update))}; Flower's add up models, and nothing else")
    found = task.layout.split(task.initial_model + update["delta"])
    found |= task.buffer_layout.split(update.get("buffers", task.initial_buffers))
    trained = ArrayRecord({name: found.get(name, value) for name, value in sent.items()})
    loss = answer.metrics["loss"] / answer.metrics["examples"]
    return RecordDict({ARRAYS: trained, METRICS: MetricRecord({EXAMPLES: answer.examples, "train_loss": loss})})


def evaluate(node: Node, message: Message, context: Context) -> RecordDict:
    """Loss and accuracy on the node's test examples, or where it has none, on those for training."""
    *_, answer = _work(node, message, context, "evaluate")
    found = answer.metrics
    n = found["examples"]
    about = {EXAMPLES: int(n), "loss": found["loss"] / n, "accuracy": found["correct"] / n}
    return RecordDict({METRICS: MetricRecord({**about})})


def _work(node: Node, message: Message, context: Context, what: Any) -> tuple[dict[str, Tensor], Task, Answer]:
    """What was sent, the task that starts there, and what the node answers to the order that it amounts to."""
    plan = _plan(node, values_of(context.run_config))
    sent = _tensors(message.content, node.settings.allow.max_bytes)
    task = _task(plan, sent)
    run, text = hashlib.sha256(f"Flower run {context.run_id}".encode()).hexdigest()[:32], plan.json_text()
    initial = initial_of(task)
    if error := node.join(Invitation(run, text, initial)).error:
        raise ConfigError(error)
    if node.role and node.role.initial_client:
        raise ConfigError(
            f"strategy: in {plan.strategy['name']} clients keep states, which Flower's know nothing of"
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


def _plan(node: Node, values: Mapping[str, Any]) -> Plan:
    """What an experiment amounts to on this node; only what the node allows is looked up. Raises ConfigError."""
    local = values.get("local", {})
    if not isinstance(local, dict) or "model" not in values:
        raise ConfigError("experiment: should have a model, and local as a mapping")
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
    node.settings.allow.check_numbers(plan)
    return plan


def _examples(dataset: Dataset, said: Any) -> dict[str, Any]:
    """The form of this node's examples, with what the experiment says of them; raises ConfigError."""
    if not isinstance(said, dict):
        raise ConfigError("experiment.examples: should be a mapping")
    told = validated(Told, said, "experiment.examples").model_dump(mode="json", exclude_none=True)
    owners = np.zeros(len(dataset.y_train), dtype=np.int64)
    own = FederatedData(dataset, owners, clients=1, crop=told.get("crop"))
    return {**own.form, "classes": dataset.classes, "crop": None, **told}


def _named(spec: Any) -> Any:
    return {"name": spec} if isinstance(spec, str) else spec


def _tensors(content: RecordDict, most: int) -> dict[str, Tensor]:
    """A state_dict as it was sent; raises ValueError."""
    if ARRAYS not in content.array_records:
        raise ValueError(f"has no {ARRAYS!r}: it is neither of fedsim nor of a strategy of Flower's")
    record = content.array_records[ARRAYS]
    if (size := sum(len(array.data) for array in record.values())) > most:
        raise ValueError(f"arrays: {size:,} bytes are more than this node allows; allowed: up to {most:,}")
    try:
        return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    except (TypeError, ValueError, MemoryError, EOFError, SyntaxError) as error:
        raise ValueError(f"arrays: cannot be read: {located(error)}") from None


def _task(plan: Plan, sent: Mapping[str, Tensor]) -> Task:
    """The plan's network, with the weights that were sent; raises ConfigError where they are not its."""
    task = build_task(
        plan.model, build_recipe(plan.local), plan.seed, plan.examples.shape, plan.examples.classes, sent=True
    )
    own = task.network.state_dict()
    if own.keys() != sent.keys():
        odd = sorted(own.keys() ^ sent.keys())[0]
        raise ConfigError(f"arrays: {odd} is in one of what was sent and the experiment's model, and not in both")
    for name, value in own.items():
        if value.shape != sent[name].shape:
            raise ConfigError(f"arrays: {name} is {tuple(sent[name].shape)}, and should be {tuple(value.shape)}")
    task.network.load_state_dict(sent)
    loaded = task.network.state_dict()  # in the network's types: Flower's strategies may answer in others
    task.initial_model = task.layout.flatten(loaded)
    task.initial_buffers = task.buffer_layout.flatten(loaded).to(task.initial_model.dtype)
    return task


def _round(config: ConfigRecord) -> int:
    if strange := sorted(config.keys() - {ROUND}):
        raise ValueError(
            f"config.{strange[0]}: is nothing to fedsim's clients; the experiment says how they train"
        )
    number = config.get(ROUND, 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"config.{ROUND}: {str(number)[:20]} should be a whole number from 1")
    return number - 1


def _client(node: Node, config: Mapping[str, Any]) -> int:
    """What its mini-batches are drawn by: partition-id, if the node has one, or a number made of its name."""
    if isinstance(number := config.get("partition-id"), int):
        return number
    return int.from_bytes(hashlib.sha256(node.settings.name.encode()).digest()[:3])
