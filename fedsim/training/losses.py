"""Losses of single examples, losses for mixed labels and for labels that may be wrong, and class balancing.

`loss(logits, y, /, *, options) -> (B,)`: one loss per example, from logits (B, K) and labels (B,).
Shapes: B batch, K classes, n examples of a client.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from fedsim.base.catalogue import Catalogue
from fedsim.data.dataset import Ints
from fedsim.errors import NO_STATE, ConfigError, WrongReturnError, border, name_of
from fedsim.types import Batch, Positive


class LabelLoss(Protocol):
    """One loss per example, (B,), from logits (B, K) and labels (B,)."""

    def __call__(self, logits: Tensor, y: Tensor, /) -> Tensor: ...


def cross_entropy(
    logits: Tensor,
    y: Tensor,
    /,
    *,
    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0,
    spread: Literal["all", "others"] = "all",
) -> Tensor:
    """-sum_k q_k log softmax(logits)_k, with label smoothing eps = `smoothing` (Szegedy 2016, arXiv 1512.00567).

    `all` spreads eps over the K classes, as Szegedy and torch do: q_y = 1 - eps + eps / K, elsewhere eps / K.
    `others` spreads eps over the other classes only: q_y = 1 - eps, elsewhere eps / (K - 1) (He 2019, Bag of
    Tricks, arXiv 1812.01187).
    """
    if spread == "all" or not smoothing:
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
    classes = logits.shape[-1]
    eps = smoothing * classes / max(classes - 1, 1)  # may exceed 1; eps / K of it goes to the label itself
    log_p = F.log_softmax(logits, -1)
    return (1 - eps) * F.nll_loss(log_p, y, reduction="none") - eps * log_p.mean(-1)


def hinge(
    logits: Tensor, y: Tensor, /, *, margin: Positive = 1.0, rivals: Literal["all", "strongest"] = "all"
) -> Tensor:
    """max(0, margin + s_k - s_y) for the scores s_k of the other classes, k != y.

    `all` is the sum of these terms divided by K, as in torch's multi_margin_loss (Weston & Watkins 1999, without
    the 1 / K); `strongest` is the largest term (Crammer & Singer 2001).
    """
    classes = logits.shape[-1]
    other = torch.arange(classes, device=logits.device) != y.unsqueeze(-1)
    slack = (margin + logits - logits.gather(-1, y.unsqueeze(-1))).clamp(min=0) * other
    return slack.sum(-1) / classes if rivals == "all" else slack.amax(-1)


def check_loss(loss: LabelLoss, classes: int) -> None:
    """Raise ConfigError unless `loss` gives a loss of each of three examples, with a gradient."""
    logits, y = torch.zeros(3, classes, requires_grad=True), torch.arange(3) % classes
    with border(f"local.loss: {name_of(loss)}", ConfigError), torch.enable_grad():
        losses, again = loss(logits, y), loss(logits, y)
        if not (isinstance(losses, Tensor) and losses.shape == y.shape and losses.requires_grad):
            made = f"a tensor {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise WrongReturnError(f"gave {made}; it should give (3,) for 3 examples, with a gradient")
        if not torch.equal(losses, again):
            raise WrongReturnError(f"gave two results for the same examples; {NO_STATE}")


LOSSES = Catalogue(
    "local.loss", "fedsim.training", {name: f"losses:{name}" for name in ("cross_entropy", "hinge")}
)


def mixed(loss: LabelLoss, logits: Tensor, batch: Batch) -> Tensor:
    """(B,) lambda loss(y) + (1 - lambda) loss(y'), for mixed examples (Zhang 2018, arXiv 1710.09412).

    lambda is `batch.mix_weight` and y' `batch.mixed_labels`; without these it is the loss of y.
    """
    if batch.mixed_labels is None or batch.mix_weight is None:
        return loss(logits, batch.y)
    return batch.mix_weight * loss(logits, batch.y) + (1 - batch.mix_weight) * loss(logits, batch.mixed_labels)


def bootstrapped(loss: LabelLoss, logits: Tensor, batch: Batch) -> Tensor:
    """(B,) (1 - w) loss(y) + w loss(z): hard dynamic bootstrapping (Arazo 2019, arXiv 1904.11238, l_B*).

    w is `batch.label_error_prob` and z the network's own prediction, the argmax; without w it is the loss of y.
    """
    if batch.label_error_prob is None:
        return loss(logits, batch.y)
    z = logits.detach().argmax(-1)
    return (1 - batch.label_error_prob) * loss(logits, batch.y) + batch.label_error_prob * loss(logits, z)


def distilled(losses: Tensor, logits: Tensor, teacher_logits: Tensor, temperature: float, alpha: float) -> Tensor:
    """(B,) (1 - alpha) losses + alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) (arXiv 1503.02531).

    The factor T^2, T = `temperature`, keeps the size of the gradient independent of T (Hinton 2015). Shapes:
    `losses` (B,), both logits (B, K). The teacher gets no gradient.
    """
    student = F.log_softmax(logits / temperature, -1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, -1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)  # F.kl_div has no rule for vmap
    return (1 - alpha) * losses + alpha * temperature**2 * divergence


def class_weights(given: Literal["balanced"] | Sequence[float], labels: Tensor, classes: int) -> Tensor:
    """(K,) the `given` weights, or balanced weights for a client with these `labels` (n,)."""
    return balanced_weights(labels, classes) if given == "balanced" else torch.tensor(given)


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """(K,) n / (K' n_c), K' the number of classes in `labels` (n,); an absent class has weight 1.

    The mean weight over the examples is 1, and all present classes have equal sums of weights (King & Zeng 2001;
    scikit-learn's "balanced").
    """
    counts = torch.bincount(labels, minlength=classes)
    return torch.where(counts > 0, len(labels) / (counts.count_nonzero() * counts.clamp(min=1)), 1.0)


def oversampled(labels: Ints, rng: np.random.Generator) -> Ints:
    """(n,) positions in `labels` (n,), drawn with replacement: a class at random, then one of its examples.

    So all present classes are equally likely, whatever their sizes.
    """
    _, kind, counts = np.unique(labels, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts  # of each class, in the order of classes
    drawn = rng.integers(len(counts), size=len(labels))
    positions: Ints = np.argsort(kind, kind="stable")[first[drawn] + rng.integers(counts[drawn])]
    return positions
