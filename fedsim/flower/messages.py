"""What a server and a node say to each other: names and numbers, and tensors."""

from typing import Literal, NamedTuple

from fedsim.flower.transport import Encoded, Transport
from fedsim.types import State

FORMAT = 1  # of all of these; both sides have to have the same


class Hello(NamedTuple):
    """Who are you?"""


class Invitation(NamedTuple):
    """To join a run: what of an experiment a node has to know before it can work."""

    run: str  # the fedsim run's id, which outlives the Flower runs that carry it
    plan: str  # JSON of a Plan
    initial: State  # "model" (P,), "buffers" (Q,) and "constant.NAME" for each of Task.constants()


class Joined(NamedTuple):
    """Who a node is; and whether it takes part in what it was invited to, or why not."""

    name: str
    versions: dict[str, str]  # of fedsim, torch, numpy and python there
    error: str | None = None  # why the node does not take part


class Order(NamedTuple):
    """One client's work in one round."""

    run: str
    plan: str  # SHA-256 of the plan's JSON
    task: Literal["train", "evaluate"]
    round: int  # from 0
    client: int
    version: int  # of the client's state: 0 for the initial one, r + 1 for the one after round r
    mark: int  # of that state, by which it is recognised; 0 for the initial one
    checkpoints: tuple[
        int, ...
    ]  # rounds that a run may go back to; each needs the last state that counted by then
    transport: Transport  # of the answer
    batch_size: int  # of an evaluation
    train_mode: bool  # the same
    server: State  # what the strategy broadcasts, and the buffers


class Answer(NamedTuple):
    """What a node computed, or why it did not."""

    message: Encoded  # by the order's transport; what rounding left of it stays with the client's state
    weight: float
    metrics: dict[str, float]
    examples: int  # n_k, of a training
    version: int  # of the state that it keeps now; 0 where the strategy keeps none
    mark: int  # the same
    seconds: float
    error: str | None = None
    lost: bool = False  # the node does not know the plan, and has to be invited first


def failure(error: str, *, lost: bool = False, seconds: float = 0.0) -> Answer:
    """The answer of a node that could not do it."""
    return Answer({}, 0.0, {}, 0, 0, 0, seconds, error, lost)
