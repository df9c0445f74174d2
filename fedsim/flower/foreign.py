"""Strategies of Flower's own, such as its FedAdam, over fedsim's nodes.

They send a network's state_dict as "arrays" and numbers as "config", and want a state_dict and metrics back. What
a node is to do stands in the app's config: `experiment` has `model`, `local`, `seed` and `strategy` as any config
has, and may have `examples`, with `classes`, `scale` and `shift` where a node's data does not tell them. All of it
is held against what the node allows.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.catalogue import validated
from fedsim.config import build_recipe, build_task
from fedsim.data import FederatedData
from fedsim.errors import ConfigError, located
from fedsim.flower import wire
from fedsim.flower.app import values_of
from fedsim.flower.messages import Answer, Invitation, Order
from fedsim.flower.node import Node
from fedsim.flower.plan import Plan, digest, initial_of
from fedsim.flower.transport import decode
from fedsim.task import Task

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # records, as Flower's strategies name them
EXAMPLES = "num-examples"
ROUND = "server-round"  # from 1
BATCH_SIZE = 500  # of an evaluation


def is_foreign(content: RecordDict) -> bool:
    """Whether a message is of a strategy of Flower's own."""
    return wire.KEY not in content.config_records and ARRAYS in content.array_records


def train(node: Node, message: Message, context: Context) -> RecordDict:
    """The state_dict after local training, and n_k; raises ValueError."""
    sent, task, answer = _work(node, message, context, "train")
    update = decode(answer.message)
    if update.keys() - {"delta", "buffers"}:
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
    if node.member and node.member.newcomer:
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
    local, dataset = values.get("local", {}), node.dataset
    if not isinstance(local, dict) or "model" not in values:
        raise ConfigError("experiment: should have a model, and local as a mapping")
    augment = local.get("augment", [])
    own = FederatedData(dataset, np.zeros(len(dataset.y_train), dtype=np.int64), clients=1)
    about = {
        "schedule": _named(local.get("schedule", "constant")),
        "loss": _named(local.get("loss", "cross_entropy")),
    }
    told = values.get("examples", {})
    examples = {**own.form, "classes": dataset.classes, "crop": None, **(told if isinstance(told, dict) else {})}
    plan = validated(
        Plan,
        {
            "seed": values.get("seed", 0),
            "model": _named(values["model"]),
            "strategy": _named(values.get("strategy", "fedavg")),
            "local": local
            | about
            | {"augment": [*map(_named, augment)] if isinstance(augment, list) else augment},
            "examples": examples,
        },
        "experiment",
    )
    node.settings.allow.check_names(plan)
    node.settings.allow.check_numbers(plan)
    return plan


def _named(spec: Any) -> Any:
    return {"name": spec} if isinstance(spec, str) else spec


def _tensors(content: RecordDict, most: int) -> dict[str, Tensor]:
    """A state_dict as it was sent; raises ValueError."""
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
    number = config.get(ROUND, 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"config.{ROUND}: {str(number)[:20]} should be a whole number from 1")
    return number - 1


def _client(node: Node, config: Mapping[str, Any]) -> int:
    """What its mini-batches are drawn by: partition-id, if the node has one, or a number made of its name."""
    if isinstance(number := config.get("partition-id"), int):
        return number
    return int.from_bytes(hashlib.sha256(node.settings.name.encode()).digest()[:3])
