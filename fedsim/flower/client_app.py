"""A node of Flower's own SuperNode, which starts a process for every message: Flower's ClientApp.

What a process has to know of those before it is on the node's disk.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.errors import ConfigError, one_line
from fedsim.experiment.checkpoint import versions
from fedsim.experiment.config import overridden
from fedsim.flower import foreign, wire
from fedsim.flower.messages import Hello, Invitation, Joined, failure
from fedsim.flower.node import Node, NodeSettings
from fedsim.flower.station import respond

app = ClientApp()

PATIENCE = 0.9  # of a message's time to live, for the process of another run's to end
RAISED = 2  # Flower's code for a ClientApp that raises
FLOWERS = ("partition-id", "num-partitions")  # keys of a node's config that examples of Flower's have


@app.query()
def join(message: Message, context: Context) -> Message:
    """Accept an invitation, or say why not."""
    return answer(message, context, lambda node: respond(node, message.content))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Work by an order, or for a strategy of Flower's own."""
    if foreign.is_foreign(message.content):
        return answer(message, context, lambda node: foreign.train(node, message, context))
    return answer(message, context, lambda node: respond(node, message.content))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate for a strategy of Flower's own; fedsim's evaluations are orders."""
    return answer(message, context, lambda node: foreign.evaluate(node, message, context))


def answer(message: Message, context: Context, work: Callable[[Node], RecordDict]) -> Message:
    """What the node of this context makes of a message; it raises nothing."""
    try:
        with Node(settings_of(context.node_config), PATIENCE * message.metadata.ttl) as node:
            return Message(work(node), reply_to=message)
    except (ValueError, OSError) as error:
        return refusal(message, context, one_line(error))


def settings_of(config: Mapping[str, Any]) -> NodeSettings:
    """A node's settings, by its --node-config: `config` is a NODE.yaml, others stand in the place of its.

    Their keys are dotted, such as data.name; without a file they are all. Raises ConfigError.
    """
    own = {key: value for key, value in config.items() if key not in ("config", *FLOWERS)}
    if "config" in config:
        return NodeSettings.read(Path(str(config["config"])).expanduser(), own)
    if not own:
        raise ConfigError('--node-config: should be config="NODE.yaml", the path of the node\'s settings')
    return NodeSettings.of(overridden({}, own))


def refusal(message: Message, context: Context, why: str) -> Message:
    """The answer of a node that could not begin."""
    try:
        kind = wire.kind(message.content)
    except ValueError:  # of Flower's own
        return Message(Error(RAISED, why), reply_to=message)
    if kind not in (Hello.__name__, Invitation.__name__):
        return Message(wire.record(failure(why)), reply_to=message)
    name = str(context.node_config.get("name", f"node {context.node_id}"))
    return Message(wire.record(Joined(name, versions(), why)), reply_to=message)
