"""What one client and a batch of clients share: the loss that they minimise, and their mini-batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count, islice
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.errors import ConfigError
from fedsim.training.losses import LabelLoss, bootstrapped, distilled, mixed, oversampled
from fedsim.training.recipe import Recipe
from fedsim.training.task import AUXILIARY
from fedsim.types import Batch

Weights = TypeVar("Weights")


class Objective(ABC, Generic[Weights]):
    """The losses of a mini-batch at some weights; how the network gives its logits is left open."""

    recipe: Recipe
    _label_loss: LabelLoss
    _class_weights: Tensor | None  # (classes,)
    _start: tuple[Tensor, Tensor] | None  # (P,) and (Q,), where they teach

    @abstractmethod
    def _outputs(self, w: Weights, batch: Batch, train: bool) -> tuple[Tensor, ...]:
        """(B, classes) in the precision of the weights: of the main head, in training of auxiliary ones too."""

    @abstractmethod
    def _teach(self, x: Tensor) -> Tensor:
        """(B, classes) of the teacher."""

    def _losses(self, w: Weights, batch: Batch, train: bool) -> Tensor:
        """(B,) what the recipe has a client minimise."""
        (logits, *auxiliary), distillation = self._outputs(w, batch, train), self.recipe.distillation
        losses = self._label_losses(logits, batch)
        for other in auxiliary:
            losses = losses + AUXILIARY * self._label_losses(other, batch)
        if distillation and train and (distillation.teacher != "global" or self._start is not None):
            taught = self._teach(batch.x).to(logits.dtype)
            return distilled(losses, logits, taught, distillation.temperature, distillation.alpha)
        return losses

    def _label_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B,) of mixed labels, or of doubtful ones; each times the weight of the class that it is given as."""
        if batch.label_error_prob is not None and batch.mixed_labels is not None:
            raise ConfigError("local.noisy_labels: cannot tell which label is wrong after mixup or cutmix")
        weights = self._class_weights
        if weights is None:
            return (mixed if batch.label_error_prob is None else bootstrapped)(self._label_loss, logits, batch)
        if batch.label_error_prob is not None:
            return weights[batch.y] * bootstrapped(self._label_loss, logits, batch)
        return mixed(lambda z, y: weights[y] * self._label_loss(z, y), logits, batch)


def batch_rows(
    data: FederatedData, client: int, recipe: Recipe, stream: np.random.Generator, epochs: int | None = None
) -> Iterator[Tensor]:
    """(B,) the rows of each of a client's mini-batches in a round, or in its first `epochs` epochs."""
    own, steps = data.rows(client), None if epochs else recipe.steps
    passes = count() if steps else range(epochs or recipe.epochs)
    batch_size = len(own) if recipe.batch_size == "full" else min(recipe.batch_size, len(own))
    labels = data.labels[own].cpu().numpy() if recipe.oversample else None
    epoch_rows = (stream.permutation(own) if labels is None else own[oversampled(labels, stream)] for _ in passes)
    starts = ((epoch, first) for epoch in epoch_rows for first in range(0, len(epoch), batch_size))
    return islice((torch.from_numpy(epoch[first : first + batch_size]) for epoch, first in starts), steps)
