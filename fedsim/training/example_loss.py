"""The loss of each example by the recipe, and the rows of each mini-batch."""

from collections.abc import Iterator
from itertools import accumulate, count, islice, pairwise

import numpy as np
import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.errors import ConfigError
from fedsim.training.losses import bootstrapped, distilled, mixed, oversampled
from fedsim.training.recipe import Recipe
from fedsim.training.task import Task
from fedsim.types import Batch

AUXILIARY_WEIGHT = 0.4  # of the loss of an auxiliary head (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567)


class ExampleLoss:
    """The recipe's loss of each example (B,), from the logits (B, classes) of a network's heads.

    `class_weights` (classes,) weigh the examples by their labels.
    """

    def __init__(self, recipe: Recipe, task: Task, class_weights: Tensor | None):
        self.label_loss, self.class_weights = recipe.label_loss or task.losses, class_weights
        self.distillation = recipe.distillation

    def __call__(self, heads: tuple[Tensor, ...], batch: Batch, teacher: Tensor | None = None) -> Tensor:
        """(B,) the losses of all heads, the main head first; `teacher` (B, classes) are logits to distil from."""
        logits, *auxiliary = heads
        losses = self.of_labels(logits, batch)
        for head in auxiliary:
            losses = losses + AUXILIARY_WEIGHT * self.of_labels(head, batch)
        if self.distillation is None or teacher is None:
            return losses
        teacher = teacher.to(logits.dtype)
        return distilled(losses, logits, teacher, self.distillation.temperature, self.distillation.alpha)

    def of_labels(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B,) the losses for mixed labels or labels that may be wrong; each label's term has its class weight."""
        if batch.label_error_prob is not None and batch.mixed_labels is not None:
            raise ConfigError("local.noisy_labels: cannot tell which label is wrong after mixup or cutmix")
        weights = self.class_weights
        if weights is None:
            return (mixed if batch.label_error_prob is None else bootstrapped)(self.label_loss, logits, batch)
        if batch.label_error_prob is not None:
            return weights[batch.y] * bootstrapped(self.label_loss, logits, batch)
        return mixed(lambda z, y: weights[y] * self.label_loss(z, y), logits, batch)


def batch_rows(
    data: FederatedData, client: int, recipe: Recipe, stream: np.random.Generator, epochs: int | None = None
) -> Iterator[Tensor]:
    """(B,) the rows of each mini-batch of a client, for the whole round or for its first `epochs` epochs."""
    own, steps = data.rows(client), None if epochs else recipe.steps
    passes = count() if steps else range(epochs or recipe.epochs)
    bounds = list(pairwise(accumulate(recipe.batch_sizes(len(own)), initial=0)))  # the same in each epoch
    labels = data.labels[own].cpu().numpy() if recipe.oversample else None
    epoch_rows = (stream.permutation(own) if labels is None else own[oversampled(labels, stream)] for _ in passes)
    parts = (epoch[first:end] for epoch in epoch_rows for first, end in bounds)
    return islice(map(torch.from_numpy, parts), steps)
