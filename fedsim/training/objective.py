"""F_k, the objective of one client: the interface through which a strategy uses a client, in every runtime.

Two classes implement it: `fedsim.training.local.ClientObjective` for one client, and
`fedsim.training.batched.objective.BatchedObjective` for each of a batch of clients under `torch.func.vmap`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedsim.base.modes import without_function_modes
from fedsim.training.layout import Layout
from fedsim.training.recipe import Recipe
from fedsim.types import Batch, State

Result = TypeVar("Result")
Loss = Callable[[Tensor, Batch], Tensor]  # (weights (P,), batch) -> (): a mean over the batch
Correction = Callable[[Tensor, Tensor], Tensor]  # (gradient (P,), weights (P,)) -> gradient (P,)


def exact(counts: int | list[int], like: Tensor) -> Tensor:
    """The counts on the host, in the type of `like`, or in float64 where that type cannot hold them exactly."""
    numbers = torch.tensor(counts)
    holds = int(numbers.max()) <= 2 / torch.finfo(like.dtype).eps
    return numbers.to(like.dtype if holds else torch.double)


class LocalObjective(ABC):
    """One client in one round.

    The examples of each mini-batch depend only on (seed, round, client). When several clients train as one batch,
    the numbers below are tensors (), a different value for each client: compute with them, never branch on one.
    """

    layout: Layout  # the position of each parameter in a model (P,)
    recipe: Recipe  # the options of `local`
    client_id: int | Tensor
    num_examples: Tensor  # () n_k
    num_steps: Tensor  # () K_k, the steps that `train` takes
    lr: float | Tensor  # the learning rate of this round

    @abstractmethod
    def train(self, start: Tensor, *, loss: Loss | None = None, correct: Correction | None = None) -> Tensor:
        """Train from `start` (P,) as the recipe says; returns the last iterate (P,).

        `loss(w, batch)` replaces the objective; its gradient with respect to all of `w` is taken. `correct(g, w)`
        replaces each gradient `g` before the step.
        """

    @abstractmethod
    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        """() mean loss of a mini-batch in training mode; without `batch`, F_k(w) of all examples in eval mode."""

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
    def logits(self, w: Tensor, x: Tensor, *, train: bool = True) -> Tensor:
        """(B, classes) logits at the weights `w` (P,) for examples `x` (B, ...), in the recipe's precision."""

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
        self.client_id, self.lr = inner.client_id, inner.lr
        self.num_examples, self.num_steps = inner.num_examples, inner.num_steps

    def train(self, start: Tensor, *, loss: Loss | None = None, correct: Correction | None = None) -> Tensor:
        return self.inner.train(start, loss=loss, correct=correct)

    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        return self.inner.loss(w, batch)

    def gradient(self, w: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        return self.inner.gradient(w, batch)

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        return self.inner.batches(epochs)

    def logits(self, w: Tensor, x: Tensor, *, train: bool = True) -> Tensor:
        return self.inner.logits(w, x, train=train)

    @property
    def buffers(self) -> Tensor:
        return self.inner.buffers

    @property
    def private_buffers(self) -> State:
        return self.inner.private_buffers

    @property
    def metrics(self) -> State:
        return self.inner.metrics


class KeyedObjective(ObjectiveWrapper):
    """A client as its strategy sees it, whose own code draws from `draws`, a mode that is active around it.

    The mode costs time for each operation, so fedsim's own code, the training loop above all, runs without it.
    The strategy's functions that are called in there run with it.
    """

    def __init__(self, inner: LocalObjective, draws: TorchFunctionMode):
        super().__init__(inner)
        self._draws = draws

    def train(self, start: Tensor, *, loss: Loss | None = None, correct: Correction | None = None) -> Tensor:
        with without_function_modes():
            return super().train(
                start, loss=loss and self._drawing(loss), correct=correct and self._drawing(correct)
            )

    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        with without_function_modes():
            return super().loss(w, batch)

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

    def logits(self, w: Tensor, x: Tensor, *, train: bool = True) -> Tensor:
        with without_function_modes():
            return super().logits(w, x, train=train)

    @property
    def buffers(self) -> Tensor:
        with without_function_modes():
            return super().buffers

    def _drawing(self, function: Callable[..., Result]) -> Callable[..., Result]:
        def drawing(*args: Any) -> Result:
            with self._draws:
                return function(*args)

        return drawing
