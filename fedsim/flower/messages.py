"""The messages between a server and a node: names, numbers and tensors."""

import re
from typing import Literal, NamedTuple

from fedsim.flower.transport import Encoded, Transport
from fedsim.types import State

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a node
FORMAT = 3  # of all these messages; server and node must have the same
FINISHED_WAIT = 20.0  # seconds that nodes have to hear of a run's end: Flower's SuperNodes take six to nine


class Hello(NamedTuple):
    """Asks a node for its name."""


class Invitation(NamedTuple):
    """Asks a node to join a run: what it must know of an experiment before it can work."""

    run: str  # the fedsim run's id, which outlives the Flower runs that carry it
    plan: str  # JSON of a Plan
    initial: State  # "model" (P,), "buffers" (Q,) and "constant.NAME" for each of Task.constants()


class Joined(NamedTuple):
    """A node's name, and the reason if it does not take part in the run that it was invited to.

    A node that takes part agrees to its numbers of examples for this run.
    """

    name: str
    versions: dict[str, str]  # of fedsim, torch, numpy and Python on the node
    error: str | None = None  # None if the node takes part
    examples: int = 0  # n_k, that it trains on
    tested: int = 0  # examples that it evaluates its own model on
    notes: tuple[str, ...] = ()  # what the other side should know, one line each


class Order(NamedTuple):
    """One client's work in one round."""

    run: str
    plan: str  # SHA-256 of the plan's JSON
    task: Literal["survey", "train", "evaluate"]
    round: int  # from 0
    client: int
    version: int  # of the client's state: 0 for the initial one, r + 1 for the one after round r
    mark: int  # identifies the content of that state; 0 for the initial one
    checkpoints: tuple[int, ...]  # rounds that a run may go back to; each needs the last valid state before it
    transport: Transport  # of the answer
    batch_size: int  # of an evaluation
    train_mode: bool  # whether an evaluation has the network in training mode
    server: State  # what the strategy broadcasts, and buffers (Q,)
    cohort: tuple[int, ...] = ()  # the clients that have an order for this task, ascending; none for an evaluation


class Answer(NamedTuple):
    """A node's result, or the reason why it has none."""

    message: Encoded  # encoded by the order's transport; rounding errors stay with the client's state
    weight: float
    metrics: dict[str, float]
    examples: int  # n_k, of a survey or a training
    version: int  # of the state that the node keeps now; 0 if the strategy keeps none
    mark: int  # of that state; 0 if there is none
    seconds: float  # that the node took
    error: str | None = None
    lost: bool = False  # the node does not have the plan and must be invited first


class Finished(NamedTuple):
    """Tells a node that a run has reached its end; the node answers with the same.

    The owner's settings say what the node keeps. A run may still be made longer, from the state of this version.
    """

    run: str
    version: int  # of the client's state at the end; 0 if it has none


def failure(error: str, *, lost: bool = False, seconds: float = 0.0) -> Answer:
    """The answer of a node that could not carry out an order."""
    return Answer({}, 0.0, {}, 0, 0, 0, seconds, error, lost)
