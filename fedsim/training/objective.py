"""F_k, the objective of one client: the interface through which a strategy uses a client, in every runtime.

Two classes implement it: `fedsim.training.local.ClientObjective` for one client, and
`fedsim.training.batched.objective.BatchedObjective` for each of a batch of clients under `torch.func.vmap`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from math import inf
from typing import Any, Self, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedsim.base.modes import without_function_modes
from fedsim.errors import ConfigError, WrongReturnError
from fedsim.training.layout import Layout
from fedsim.training.recipe import Recipe
from fedsim.types import Batch, State

Result = TypeVar("Result")
Loss = Callable[[Tensor, Batch], Tensor]  # (weights (P,), batch) -> (): a mean over the batch
Correction = Callable[[Tensor, Tensor], Tensor]  # (gradient (P,), weights (P,)) -> gradient (P,)
Gradient = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]  # (weights (P,), batch) -> gradient (P,), loss ()
AfterStep = Callable[[Tensor], Tensor]  # weights (P,) -> weights (P,)
BatchMap = Callable[[Batch], Batch]


class StepRules(TypedDict, total=False):
    """What a strategy may change in each step of `LocalObjective.train`."""

    loss: Loss | None
    correct: Correction | None
    gradient: Gradient | None
    after_step: AfterStep | None
    only: Tensor | None


def exact(counts: int | list[int], like: Tensor) -> Tensor:
    """The counts on the host, in the type of `like`, or in float64 where that type cannot hold them exactly."""
    numbers = torch.tensor(counts)
    holds = int(numbers.max()) <= 2 / torch.finfo(like.dtype).eps
    return numbers.to(like.dtype if holds else torch.double)


def key_of(name: str) -> int:
    """A number for the key of random numbers, by a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def check_rules(recipe: Recipe, loss: Loss | None, gradient: Gradient | None) -> None:
    """Raise WrongReturnError or ConfigError if `train` cannot use these."""
    if loss and gradient:
        raise WrongReturnError("local.train: takes a loss or a gradient, not both")
    if gradient and recipe.precision == "fp16":
        raise ConfigError("local.precision: fp16 scales losses, and this strategy computes gradients; use bf16")


def checked_vector(made: object, like: Tensor, rule: str) -> Tensor:
    """What a function of a strategy gave; raises WrongReturnError unless it has the form of `like`."""
    if not isinstance(made, Tensor) or (made.shape, made.dtype) != (like.shape, like.dtype):
        gave = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise WrongReturnError(f"local.train: {rule} gave {gave}; it should give {like.dtype} {tuple(like.shape)}")
    return made.detach()


def checked_gradient(made: object, like: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient (P,) and the loss () that a `gradient` of a strategy gave; raises WrongReturnError."""
    if not isinstance(made, tuple) or len(made) != 2:
        raise WrongReturnError(
            f"local.train: gradient gave {type(made).__name__}; it should give (gradient, loss)"
        )
    g, f = made
    return checked_vector(g, like, "gradient"), checked_vector(f, like.new_empty(()), "the loss of gradient")


@contextmanager
def only_read(w: Tensor, rule: str) -> Iterator[Tensor]:
    """Raise WrongReturnError if the code inside, which is the `rule` of a step, writes to the model in place.

    `w` is a tensor of its own with the model's memory: it counts none of fedsim's writes.
    """
    before = w._version
    yield w
    if w._version != before:
        raise WrongReturnError(f"local.train: {rule} wrote to w in place; return what changes, or use after_step")


def checked_separate(
    name: object, taken: set[str], buffers: Tensor | None, received: Tensor, epochs: object, lr: object
) -> Tensor:
    """The statistics (Q,) that a separate model starts from; raises WrongReturnError for arguments that are wrong.

    `taken` are the names of earlier ones, to which this one is added.
    """
    if not isinstance(name, str) or name in taken:
        wrong = "was given before" if name in taken else "is no name"
        raise WrongReturnError(f"local.separate: {name!r} {wrong}; each model needs a name of its own")
    if epochs is not None and not (isinstance(epochs, int) and epochs > 0):
        raise WrongReturnError(f"local.separate: epochs is {epochs!r}; it should be a whole number >= 1")
    if not (lr is None or isinstance(lr, Tensor) or (isinstance(lr, int | float) and 0 <= lr < inf)):
        raise WrongReturnError(f"local.separate: lr is {lr!r}; it should be a number >= 0")
    taken.add(name)
    if buffers is None:
        return received
    if not isinstance(buffers, Tensor) or (buffers.shape, buffers.dtype) != (received.shape, received.dtype):
        made = f"{buffers.dtype} {tuple(buffers.shape)}" if isinstance(buffers, Tensor) else type(buffers).__name__
        right = f"{received.dtype} {tuple(received.shape)}"
        raise WrongReturnError(f"local.separate: buffers is {made}; it should be statistics, {right}")
    return buffers


def changed_batch(change: BatchMap, inner: BatchMap | None, batch: Batch) -> Batch:
    """The batch after `inner` and then `change`; raises WrongReturnError unless it has as many examples."""
    changed = change(inner(batch) if inner else batch)
    if not isinstance(changed, Batch) or len(changed.y) != len(batch.y):
        gave = f"{len(changed.y)} examples" if isinstance(changed, Batch) else type(changed).__name__
        raise WrongReturnError(
            f"local.with_batches: gave {gave}; it should give a Batch of {len(batch.y)} examples"
        )
    return changed


class LocalObjective(ABC):
    """One client in one round.

    The examples of each mini-batch depend only on (seed, round, client). When several clients train as one batch,
    the numbers below are tensors (), a different value for each client: compute with them, never branch on one.
    """

    layout: Layout  # the position of each parameter in a model (P,)
    recipe: Recipe  # the options of `local`
    client_id: int | Tensor
    round: int | Tensor  # the number of this round, from 0
    num_examples: Tensor  # () n_k
    num_steps: Tensor  # () K_k, the steps that `train` takes
    lr: float | Tensor  # the learning rate of this round

    @abstractmethod
    def train(
        self,
        start: Tensor,
        *,
        loss: Loss | None = None,
        gradient: Gradient | None = None,
        correct: Correction | None = None,
        after_step: AfterStep | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Train from `start` (P,) as the recipe says; returns the last iterate (P,).

        In the order in which a step uses them: `loss(w, batch)` replaces the objective; its gradient with respect
        to all of `w` is taken. Or `gradient(w, batch)` gives gradient and loss itself, of the whole batch also
        where `accumulate` splits it; all calls of `local.gradient` in it draw the same random numbers, and only
        one at `w` changes batch-norm statistics. `correct(g, w)` replaces the gradient `g`. Momentum, weight
        decay, clipping and schedule remain the recipe's. `after_step(w)` replaces the weights after the step.
        Outside of `only`, a mask (P,), nothing changes: neither weights, nor statistics of layers whose parameters
        all lie outside.
        """

    @abstractmethod
    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        """() mean loss of a mini-batch in training mode; without `batch`, F_k(w) of all examples in eval mode."""

    @abstractmethod
    def losses(self, w: Tensor, batch: Batch, *, train: bool | None = None) -> Tensor:
        """(B,) the recipe's loss of each example; `train` as in `logits`."""

    @abstractmethod
    def label_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B,) the recipe's loss of each example for given `logits` (B, classes), without distillation."""

    @abstractmethod
    def gradient(self, w: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """(P,) gradient and () loss at `w` (P,), of a mini-batch or, without `batch`, of F_k; in training mode.

        F_k is computed batch by batch, of all examples, also with `drop_last`. Without batch norm and dropout,
        `batch_size` affects only the memory.
        """

    @abstractmethod
    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        """The augmented mini-batches of the round in their order, or of its first `epochs` epochs."""

    @abstractmethod
    def with_batches(self, change: BatchMap) -> "LocalObjective":
        """This client with `change(batch)` in the place of each batch, in training and in F_k."""

    @abstractmethod
    def logits(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> Tensor:
        """(B, classes) logits at the weights `w` (P,) for examples `x` (B, ...), in the recipe's precision.

        In training mode or in eval mode; None is training mode where `w` requires a gradient, as in a loss, and
        eval mode elsewhere, as for a teacher or a score.
        """

    @abstractmethod
    def features(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> tuple[Tensor, Tensor]:
        """(B, D) the input of the head, `model.head`, and (B, classes) logits; `train` as in `logits`."""

    @abstractmethod
    def separate(
        self,
        name: str,
        *,
        buffers: Tensor | None = None,
        epochs: int | None = None,
        lr: float | Tensor | None = None,
        record: bool = False,
    ) -> "LocalObjective":
        """The same client for another model, which shares nothing with this one but the examples.

        It has batch-norm statistics of its own, which start from `buffers` (Q,), by default those that this
        client received; random numbers of its own, by `name`; and `metrics` of its own, which only the strategy
        sees.
        With `record` its losses and steps count as this one's. `epochs` replaces the recipe's epochs or steps, and
        `lr` the learning rate of all steps.
        """

    @abstractmethod
    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape of `like`, from the client's stream of this round."""

    @abstractmethod
    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers from [0, 1) in the shape of `like`, from the client's stream of this round."""

    @property
    @abstractmethod
    def cohort(self) -> Tensor:
        """(C,) int64, the ids of the clients that are asked to train in this round, ascending.

        In a survey, of those that are asked to answer; (0,) where a client works outside of a round.
        """

    @property
    @abstractmethod
    def buffers(self) -> Tensor:
        """(Q,) a copy of the batch-norm statistics after the last training pass."""

    @property
    @abstractmethod
    def private_buffers(self) -> State:
        """Copies of the buffers that `model.buffers` makes private, after the last training pass, by name."""

    @property
    @abstractmethod
    def metrics(self) -> State:
        """() sums over all mini-batch gradients taken so far, in float64: loss, examples, steps."""


class ObjectiveWrapper(LocalObjective):
    """Passes all calls on to another objective; a subclass overrides some of them for an inner strategy.

    The methods of `inner` do not call the overridden ones: `inner.train` uses `inner.loss` unless it gets a
    `loss`.
    """

    def __init__(self, inner: LocalObjective):
        self.inner = inner
        self.layout, self.recipe = inner.layout, inner.recipe
        self.client_id, self.round, self.lr = inner.client_id, inner.round, inner.lr
        self.num_examples, self.num_steps = inner.num_examples, inner.num_steps

    def train(self, start: Tensor, **rules: Unpack[StepRules]) -> Tensor:
        return self.inner.train(start, **rules)

    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        return self.inner.loss(w, batch)

    def losses(self, w: Tensor, batch: Batch, *, train: bool | None = None) -> Tensor:
        return self.inner.losses(w, batch, train=train)

    def label_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.inner.label_losses(logits, batch)

    def gradient(self, w: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        return self.inner.gradient(w, batch)

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        return self.inner.batches(epochs)

    def with_batches(self, change: BatchMap) -> LocalObjective:
        return self._around(self.inner.with_batches(change))

    def logits(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> Tensor:
        return self.inner.logits(w, x, train=train)

    def features(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> tuple[Tensor, Tensor]:
        return self.inner.features(w, x, train=train)

    def separate(
        self,
        name: str,
        *,
        buffers: Tensor | None = None,
        epochs: int | None = None,
        lr: float | Tensor | None = None,
        record: bool = False,
    ) -> LocalObjective:
        return self._around(self.inner.separate(name, buffers=buffers, epochs=epochs, lr=lr, record=record))

    def normal(self, like: Tensor) -> Tensor:
        return self.inner.normal(like)

    def uniform(self, like: Tensor) -> Tensor:
        return self.inner.uniform(like)

    @property
    def cohort(self) -> Tensor:
        return self.inner.cohort

    @property
    def buffers(self) -> Tensor:
        return self.inner.buffers

    @property
    def private_buffers(self) -> State:
        return self.inner.private_buffers

    @property
    def metrics(self) -> State:
        return self.inner.metrics

    def _around(self, inner: LocalObjective) -> Self:
        """This wrapper around another view of the same client."""
        other = copy(self)
        ObjectiveWrapper.__init__(other, inner)
        return other


class KeyedObjective(ObjectiveWrapper):
    """A client as its strategy sees it, whose own code draws from `draws`, a mode that is active around it.

    The mode costs time for each operation, so fedsim's own code, the training loop above all, runs without it.
    The strategy's functions that are called in there run with it.
    """

    def __init__(self, inner: LocalObjective, draws: TorchFunctionMode):
        super().__init__(inner)
        self._draws = draws

    def train(self, start: Tensor, **rules: Unpack[StepRules]) -> Tensor:
        drawing: Any = {name: self._drawing(rule) if callable(rule) else rule for name, rule in rules.items()}
        with without_function_modes():
            return super().train(start, **drawing)

    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        with without_function_modes():
            return super().loss(w, batch)

    def losses(self, w: Tensor, batch: Batch, *, train: bool | None = None) -> Tensor:
        with without_function_modes():
            return super().losses(w, batch, train=train)

    def label_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        with without_function_modes():
            return super().label_losses(logits, batch)

    def gradient(self, w: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        with without_function_modes():
            return super().gradient(w, batch)

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        batches = iter(super().batches(epochs))
        while True:
            with without_function_modes():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def with_batches(self, change: BatchMap) -> LocalObjective:
        return super().with_batches(self._drawing(change))

    def logits(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> Tensor:
        with without_function_modes():
            return super().logits(w, x, train=train)

    def features(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> tuple[Tensor, Tensor]:
        with without_function_modes():
            return super().features(w, x, train=train)

    @property
    def buffers(self) -> Tensor:
        with without_function_modes():
            return super().buffers

    def _drawing(self, function: Callable[..., Result]) -> Callable[..., Result]:
        def drawing(*args: Any) -> Result:
            with self._draws:
                return function(*args)

        return drawing
