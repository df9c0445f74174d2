"""The few values that cross a boundary, and randomness that depends on nothing but its key.

Shape letters, everywhere: P parameters, Q buffer entries, E epochs, S steps per epoch, B batch,
C clients in a cohort, N clients in the population, K steps of one client.
"""

import hashlib
from enum import IntEnum
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from fedsim.errors import RoundError

State = dict[str, Tensor]  # named tensors: what the server keeps, a client keeps, or a message carries

# Ranges of hyper-parameters, checked wherever a config names them.
Count = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]  # of a whole, 0 excluded
Decay = Annotated[float, Ge(0), Lt(1)]  # of a running mean


def hash_into(digest: "hashlib._Hash", state: State) -> None:
    """Have a digest know of a state's names and bytes, whatever their order."""
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())


Form = tuple[tuple[str, torch.Size, torch.dtype], ...]  # of a state: names in order, with shape and type


def form_of(state: State) -> Form:
    """What two states have in common that add up."""
    return tuple((name, value.shape, value.dtype) for name, value in sorted(state.items()))


def described(form: Form) -> str:
    """In words: "c float32 (10,), delta float32 (10,)"."""
    return ", ".join(f"{n} {str(t).removeprefix('torch.')} {tuple(shape)}" for n, shape, t in form) or "nothing"


class Batch(NamedTuple):
    """A mini-batch of one client."""

    x: Tensor  # (B, ...)
    y: Tensor  # (B,)
    mixed_labels: Tensor | None = None  # (B,) the labels of the examples that mixup or cutmix mixed in
    mix_weight: Tensor | None = None  # (B,) the weight of each example's own label: mixup's lambda
    label_error_prob: Tensor | None = None  # (B,) the probability that the label is wrong, with noisy_labels
    mask: Tensor | None = None  # (B,) False for padding rows, which only make batches equally large

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
        """The batch in `pieces` parts, whose sizes differ by at most one example."""
        parts = [[None] * pieces if t is None else torch.tensor_split(t, pieces) for t in self]
        return [Batch(*piece) for piece in zip(*parts, strict=True)]


class Job(NamedTuple):
    """One client's work in one round: tiny, it may cross a network."""

    client_id: int
    round: int
    client: State | None  # what it kept; None where the client keeps it itself


class Update(NamedTuple):
    """What one client computes."""

    message: State  # uploaded; the server sees only the aggregate
    weight: Tensor | float  # n_k, or 1.0
    client: State = {}  # stays with the client until it is sampled again
    metrics: State = {}  # sums over examples; divided once, at the end


class Report(NamedTuple):
    """What the round loop learns of one client besides the aggregate."""

    client_id: int
    weight: float
    metrics: dict[str, float]
    client: State
    seconds: float
    bytes_up: int
    error: str | None = None  # in a line, why the client failed
    exception: BaseException | None = None  # the same, as it was raised


class RoundInfo(NamedTuple):
    """What the server knows of a round besides the aggregate."""

    number: int  # from 0
    cohort: list[int]  # ids of the clients whose updates count
    num_clients: int  # N
    generator: torch.Generator  # for server-side noise
    cohort_examples: int  # the sum of n_k over the cohort
    total_examples: int | None  # n, over all clients; None while some clients on nodes have not reported theirs

    @property
    def held(self) -> int:
        """The old name of `cohort_examples`, for one release."""
        return self.cohort_examples

    @property
    def examples(self) -> int | None:
        """The old name of `total_examples`, for one release."""
        return self.total_examples

    @property
    def share(self) -> float:
        """The cohort's share of all examples: the sum of n_k / n over it; raises RoundError."""
        if self.total_examples is None:
            raise RoundError("some clients have not reported how many examples they hold; begin with cohort=all")
        return self.cohort_examples / self.total_examples

    @property
    def participation(self) -> float:
        """|S| / N, the share of the population that took part."""
        return len(self.cohort) / self.num_clients


class Stream(IntEnum):
    """What a random number is for: no two uses share a stream."""

    MODEL = 0
    PARTITION = 1
    HOLDOUT = 2
    COHORT = 3
    BATCHES = 4
    NETWORK = 5  # dropout and whatever else a forward pass draws
    SERVER = 6
    DATASET = 7
    AVAILABILITY = 8
    AUGMENT = 9  # (seed, AUGMENT, round, client, step)
    NOISE = 10  # wrong labels
    PUBLIC = 11  # which examples the server has
    RECALIBRATE = 12


def random(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """A stream that depends on nothing but its key, e.g. (seed, Stream.BATCHES, round, client)."""
    return np.random.default_rng((seed, stream, *key))


def torch_generator(seed: int, stream: Stream, *key: int) -> torch.Generator:
    """The same for torch, on the CPU."""
    return torch.Generator().manual_seed(int(random(seed, stream, *key).integers(2**63)))
