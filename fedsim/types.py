"""The values that strategies, clients, runtimes and the server exchange, and keyed random numbers.

Shape letters, in all modules: P parameters, Q buffer entries, E epochs, S steps per epoch, B batch,
C clients in a cohort, N clients in the population, K steps of one client.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from math import isfinite
from numbers import Real
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from fedsim.errors import RoundError, WrongReturnError, one_line

State = dict[str, Tensor]  # named tensors: the state of the server or of a client, or the content of a message

# Ranges of hyper-parameters, checked wherever a config names them.
Count = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Divisor = Annotated[float, Ge(2.0**-126)]  # the smallest normal float32: no 0 to divide by
Share = Annotated[float, Gt(0), Le(1)]  # of a whole, 0 excluded
Decay = Annotated[float, Ge(0), Lt(1)]  # of a running mean

BufferWord = Literal["average", "server", "private"]  # what becomes of a buffer that training changes


def hash_into(digest: "hashlib._Hash", state: State) -> None:
    """Add the names and bytes of a state to `digest`; the order of its entries does not matter."""
    for name, value in sorted(state.items()):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy lacks types such as bfloat16
        digest.update(name.encode() + raw.numpy().tobytes())


Form = tuple[tuple[str, torch.Size, torch.dtype], ...]  # name, shape and type of each tensor, sorted by name


def form_of(state: State) -> Form:
    """The form of a state: the names, shapes and types of its tensors. Only states of equal form can be added."""
    return tuple((name, value.shape, value.dtype) for name, value in sorted(state.items()))


def described(form: Form) -> str:
    """A form as text, such as "c float32 (10,), delta float32 (10,)"."""
    return ", ".join(f"{n} {str(t).removeprefix('torch.')} {tuple(shape)}" for n, shape, t in form) or "nothing"


def same_values(a: object, b: Tensor) -> bool:
    """Whether `a` is a tensor with the form and the values of `b`; a NaN is equal to itself."""
    if a is b:
        return True
    if not isinstance(a, Tensor) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    x, y = (value.detach().contiguous().view(-1) for value in (a, b))
    return torch.equal(x, y) or torch.equal(x.view(torch.uint8), y.view(torch.uint8))  # bytes: for a NaN


class Entry(NamedTuple):
    """What a strategy declares of one entry of its messages.

    It has the form of the server's entry `like`, or the given shape and dtype. With `change` it is a change of the
    model on which nothing else depends, so that a wrapper may scale it, or add noise.
    """

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    change: bool = False
    like: str = "model"


CHANGE = Entry(change=True)
LIKE_MODEL = Entry()  # (P,)
NUMBER = Entry(shape=())


class Batch(NamedTuple):
    """A mini-batch of one client."""

    x: Tensor  # (B, ...)
    y: Tensor  # (B,)
    mixed_labels: Tensor | None = None  # (B,) labels of the examples that mixup or cutmix mixed in
    mix_weight: Tensor | None = None  # (B,) the weight of each example's own label: mixup's lambda
    label_error_prob: Tensor | None = None  # (B,) the probability that the label is wrong, with noisy_labels
    mask: Tensor | None = None  # (B,) False for rows of padding, which make all batches equally large

    @property
    def other(self) -> Tensor | None:
        """The old name of `mixed_labels`, for one release."""
        return self.mixed_labels

    @property
    def share(self) -> Tensor | None:
        """The old name of `mix_weight`, for one release."""
        return self.mix_weight

    @property
    def doubt(self) -> Tensor | None:
        """The old name of `label_error_prob`, for one release."""
        return self.label_error_prob

    def split(self, pieces: int) -> "list[Batch]":
        """Split the batch into `pieces` parts; their sizes differ by at most one example."""
        parts = [[None] * pieces if t is None else torch.tensor_split(t, pieces) for t in self]
        return [Batch(*piece) for piece in zip(*parts, strict=True)]


class Job(NamedTuple):
    """One client in one round. A job is small, so that it can be sent over a network."""

    client_id: int
    round: int
    client: State | None  # the client's state; None if the client keeps it on its own machine


class Update(NamedTuple):
    """The result of one client in one round."""

    message: State  # sent to the server, whose strategy sees only the aggregate of all messages
    weight: Tensor | float  # of the message in the mean: n_k, or 1.0
    client: State = {}  # the client's state, kept until it is sampled again
    metrics: dict[str, Any] = {}  # () tensors or floats, which are added up over the cohort
    group: Tensor | int | None = None  # int64 (): the client's group, for `GroupMeans`
    where: State = {}  # by entry, which of its positions the message covers: a mask, or int64 (m,) for m values

    def numbers(self) -> tuple[float, dict[str, float]]:
        """The weight and the metrics as plain numbers."""
        weight = self.weight.detach() if isinstance(self.weight, Tensor) else self.weight
        return float(weight), {name: float(value) for name, value in self.metrics.items()}


Outcome = Update | BaseException  # what a client's work gave, or the error that it ended with


class Report(NamedTuple):
    """What a runtime tells the simulation about one client, apart from the sum of messages."""

    client_id: int
    weight: float
    metrics: dict[str, float]
    client: State
    seconds: float
    bytes_up: int
    error: str | None = None  # why the client failed, in one line
    exception: BaseException | None = None  # the exception itself


TRAINED = ("loss", "examples", "steps")  # the metrics of a training that fedsim adds
METRIC_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
METRIC_NAMES = f"1 to 64 letters, digits, _, - and ., and none of {', '.join(TRAINED)}"
MAX_METRIC = 1e300  # of one client, in magnitude: there is then a sum over all


def is_metric_name(name: object) -> bool:
    """Whether it is METRIC_NAMES."""
    return isinstance(name, str) and bool(METRIC_NAME.fullmatch(name)) and name not in TRAINED


def is_number(value: object) -> bool:
    """Whether it is one real number, plain or a tensor; not a whole one too large for a float."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) and not (isinstance(value, int) and value.bit_length() > 1023)


@dataclass
class Records:
    """What a strategy's part at the server tells of a round: numbers by name, and why the run should end."""

    numbers: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None

    def add(self, name: str, value: Tensor | float) -> None:
        """Add a number; raises WrongReturnError unless it can be told."""
        if not is_metric_name(name):
            raise WrongReturnError(f"recorded {one_line(repr(name))}; a name should be {METRIC_NAMES}")
        if not (is_number(value) and isfinite(value)):
            raise WrongReturnError(f"recorded {name} as {one_line(repr(value))}; it should be one finite number")
        if name in self.numbers:
            raise WrongReturnError(f"recorded {name} twice in a round; each number needs a name of its own")
        self.numbers[name] = float(value)

    def stop(self, reason: str) -> None:
        """Have the run end; of several reasons the first counts. Raises WrongReturnError unless it is text."""
        if not (isinstance(reason, str) and reason.strip()):
            raise WrongReturnError(f"stopped the run for {one_line(repr(reason))}; the reason should be text")
        self.stopped = self.stopped or one_line(reason)


class RoundInfo(NamedTuple):
    """What the server knows about a round, apart from the aggregate."""

    number: int  # from 0
    cohort: list[int]  # ids of the clients whose updates are in the aggregate, ascending
    num_clients: int  # N
    generator: torch.Generator  # for server-side noise
    cohort_examples: int  # the sum of n_k over the cohort
    total_examples: int | None  # n, over all clients; None until every node has joined
    weights: Tensor = torch.empty(0, dtype=torch.float64)  # (C,) of their updates, in the order of `cohort`
    public: Any = None  # a LocalObjective over the server's own examples, for a strategy that `uses_public`
    federation: Any = None  # a Federation: sizes and last trainings of all clients, before this round
    metrics: Mapping[str, float] = {}  # sums over the cohort of the strategy's `metrics`
    records: Records | None = None  # where `record` and `stop` write; a round's own
    group_weights: Tensor = torch.empty(0, dtype=torch.float64)  # (G,) of each group's messages, of `GroupMeans`
    covered: State = {}  # by entry that `Update.where` names: the sum of weights at each position; of rows, masks

    @property
    def held(self) -> int:
        """The old name of `cohort_examples`, for one release."""
        return self.cohort_examples

    @property
    def examples(self) -> int | None:
        """The old name of `total_examples`, for one release."""
        return self.total_examples

    def record(self, name: str, value: Tensor | float) -> None:
        """Add a number to the round's `metrics` in rounds.jsonl, in the place of a sum of that name."""
        (self.records or Records()).add(name, value)

    def stop(self, reason: str) -> None:
        """End the run after this round; summary.json has the reason."""
        (self.records or Records()).stop(reason)

    @property
    def share(self) -> float:
        """The cohort's share of all examples: the sum of n_k / n over it; raises RoundError."""
        if self.total_examples is None:
            raise RoundError("some nodes have not joined, so the number of all examples is not known")
        return self.cohort_examples / self.total_examples

    @property
    def participation(self) -> float:
        """|S| / N, the share of the population that took part."""
        return len(self.cohort) / self.num_clients


class Stream(IntEnum):
    """The purpose of a random number. Each purpose has a stream of its own."""

    MODEL = 0
    PARTITION = 1
    HOLDOUT = 2
    COHORT = 3
    BATCHES = 4
    NETWORK = 5  # dropout and all other draws of a forward pass
    SERVER = 6
    DATASET = 7
    AVAILABILITY = 8
    AUGMENT = 9  # (seed, AUGMENT, round, client, step)
    NOISE = 10  # wrong labels
    PUBLIC = 11  # the choice of the examples that the server has
    RECALIBRATE = 12
    NEW_CLIENTS = 15  # the choice of the clients that are kept out of training
    STRATEGY = 14  # the draws that a strategy asks for, by `local.normal` and `local.uniform`
    GLOBALS = 13  # (seed, GLOBALS, stream, ...): the global generators, in functions of users at the server


def random(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """A generator that depends only on its key, for example (seed, Stream.BATCHES, round, client)."""
    return np.random.default_rng((seed, stream, *key))


def torch_generator(seed: int, stream: Stream, *key: int) -> torch.Generator:
    """As `random`, but a generator of torch, on the CPU."""
    return torch.Generator().manual_seed(int(random(seed, stream, *key).integers(2**63)))
