"""Flower's ClientApp: a node under Flower's own SuperNode, which starts a process for every message.

What must outlast a process is stored on the node's disk.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.base.files import expanded
from fedsim.errors import ConfigError, one_line
from fedsim.experiment.checkpoint import versions
from fedsim.experiment.config import overridden
from fedsim.flower import flower_strategies, wire
from fedsim.flower.messages import Hello, Invitation, Joined, failure
from fedsim.flower.node import Node, NodeSettings
from fedsim.flower.node_process import respond

app = ClientApp()

LOCK_SHARE = 0.9  # of a message's time to live, to wait until another run's process has ended
CLIENT_APP_RAISED = 2  # an error code of Flower's
FLOWER_KEYS = ("partition-id", "num-partitions")  # that Flower's own examples have in a node's config


@app.query()
def join(message: Message, context: Context) -> Message:
    """Accept an invitation, or refuse it with a reason."""
    return answer(message, context, lambda node: respond(node, message.content))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Carry out an order of fedsim's, or train for a strategy of Flower's own."""
    if flower_strategies.is_from_flower(message.content):
        return answer(message, context, lambda node: flower_strategies.train(node, message, context))
    return answer(message, context, lambda node: respond(node, message.content))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate for a strategy of Flower's own; fedsim sends its evaluations as orders."""
    return answer(message, context, lambda node: flower_strategies.evaluate(node, message, context))


def answer(message: Message, context: Context, work: Callable[[Node], RecordDict]) -> Message:
    """The answer to a message of the node in this context; raises nothing."""
    try:
        with Node(settings_of(context.node_config), LOCK_SHARE * message.metadata.ttl) as node:
            return Message(work(node), reply_to=message)
    except (ValueError, OSError) as error:
        return refusal(message, context, one_line(error))


def settings_of(config: Mapping[str, Any]) -> NodeSettings:
    """A node's settings from its --node-config; raises ConfigError.

    `config` is the path of a NODE.yaml. Other keys, such as data.name, replace its settings, or are all.
    """
    own = {key: value for key, value in config.items() if key not in ("config", *FLOWER_KEYS)}
    if "config" in config:
        return NodeSettings.read(expanded(Path(str(config["config"])), "config"), own)
    if not own:
        raise ConfigError('--node-config: should be config="NODE.yaml", the path of the node\'s settings')
    return NodeSettings.of(overridden({}, own))


def refusal(message: Message, context: Context, why: str) -> Message:
    """The answer of a node that could not start."""
    try:
        kind = wire.kind(message.content)
    except ValueError:  # a message of Flower's own
        return Message(Error(CLIENT_APP_RAISED, why), reply_to=message)
    if kind not in (Hello.__name__, Invitation.__name__):
        return Message(wire.record(failure(why)), reply_to=message)
    name = str(context.node_config.get("name", f"node {context.node_id}"))
    return Message(wire.record(Joined(name, versions(), why)), reply_to=message)
