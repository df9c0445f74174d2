"""How clients train: the settings under `local`."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from math import inf, sqrt
from numbers import Real
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from fedsim.base.catalogue import Options, Spec
from fedsim.data.augment import Augmentation
from fedsim.data.federated import batch_count, batch_sizes
from fedsim.errors import NO_STATE, ConfigError, WrongReturnError, border, name_of, one_line
from fedsim.training.layout import Layout
from fedsim.training.losses import LabelLoss, check_loss
from fedsim.training.optim import FOREACH, LARS, SGD, Adam, Foreach, Optimizer
from fedsim.training.schedules import Schedule, constant
from fedsim.types import Count, Decay, Divisor, NonNegative, Positive, Share

LARGEST_LR = 2.0**127
BASE_BATCH_SIZE = 256  # the batch size at which lr_scaling leaves `lr` as it is (Goyal et al. 2017, https://arxiv.org/abs/1706.02677)


class Distillation(Options):
    """Knowledge distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    The loss is (1 - alpha) L + alpha T^2 KL(teacher || student), with the logits of both divided by the
    temperature T. `teacher` is `global`, the model from which the client's training starts, or a safetensors file
    with the weights of this network, or of another `model`.
    """

    teacher: Literal["global"] | Path = "global"
    model: Spec | str | None = None
    temperature: Positive = 4.0
    alpha: Share = 0.5


class NoisyLabels(Options):
    """Correction of wrong labels by a Beta mixture (Arazo et al. 2019, https://arxiv.org/abs/1904.11238).

    From round `start` on, counted from 1, each client first fits two Beta distributions to the losses of its
    examples. In training, the loss of each label and the loss of the network's own prediction are then weighted by
    the probability that the label is right or wrong.
    """

    start: Count = 6


@dataclass(frozen=True)
class Recipe:
    """How each client trains in a round.

    A client makes `epochs` passes over its examples, or `steps` steps if that is set, in mini-batches of
    `batch_size` examples; `full` puts all examples into one batch (McMahan's B = infinity). The last batch of an
    epoch may be smaller: `drop_last` leaves it out, unless it is the only one; with `min_batch`, one of fewer
    examples joins the batch before it. `accumulate` splits each batch into so many pieces, of two examples or
    more, and sums their gradients, to save memory; batch norm then normalises each piece. `oversample` draws the
    examples of an epoch with replacement, with equal probability for each of the client's classes.
    `class_weights` weight the loss instead: one number for each class, or `balanced`, which is n_k / (classes
    n_kc).

    The learning rate is `lr`; linear `lr_scaling` multiplies it by B / 256 (Goyal et al. 2017), sqrt by the square
    root of that (Krizhevsky 2014). It rises linearly during the first `warmup` rounds, and then follows the
    schedule. `lr_every` says whether it changes after each round or each step; a client's K steps are one round.
    `decay: weights` applies no weight decay to tensors of one axis, biases and norms (He et al. 2019). `trust` is
    the trust coefficient of LARS. `clip_norm` is the largest norm of a gradient. bf16 and fp16 compute under
    autocast with fp32 weights. fp16 multiplies the loss by `loss_scale`; a step whose gradient overflows is
    skipped, and the scale is halved.
    """

    schedule: Schedule = constant
    label_loss: LabelLoss | None = None  # None is the task's
    augment: Sequence[Augmentation] = ()
    _: KW_ONLY
    optimizer: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    lr: Positive = 0.1
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    lr_every: Literal["round", "step"] = "round"
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | Literal["full"] = 32
    drop_last: bool = False
    min_batch: Count = 1
    accumulate: Count = 1
    oversample: bool = False
    class_weights: Literal["balanced"] | list[Positive] | None = None
    warmup: Annotated[int, Ge(0)] = 0
    momentum: Decay = 0.0
    nesterov: bool = False
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Divisor = 1e-8
    trust: Positive = 0.001
    weight_decay: NonNegative = 0.0
    decay: Literal["all", "weights"] = "all"
    clip_norm: Positive | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_scale: Positive = 65536.0
    channels_last: bool = False
    activation_checkpointing: bool = False
    distillation: Distillation | None = None
    noisy_labels: NoisyLabels | None = None

    def check(self, classes: int | None = None) -> None:
        """Raise ConfigError if two settings contradict each other, or one does not fit the number of classes.

        Schedule and loss are tried once, as they may be the user's own.
        """
        if classes and isinstance(self.class_weights, list) and len(self.class_weights) != classes:
            found = len(self.class_weights)
            raise ConfigError(f"local.class_weights: has {found} numbers; there are {classes} classes")
        if self.steps and self.epochs != 1:
            both = f"{self.epochs} and local.steps {self.steps}"
            raise ConfigError(f"local.epochs: {both}: set only one of the two; local.epochs=1 is the default")
        for name in ("momentum", "nesterov") if self.optimizer not in ("sgd", "lars") else ():
            if getattr(self, name):
                raise ConfigError(f"local.{name}: belongs to sgd; {self.optimizer} has local.betas")
        if self.nesterov and (self.optimizer == "lars" or not self.momentum):
            raise ConfigError("local.nesterov: needs sgd with local.momentum above 0")
        if self.lr_scaling != "none" and self.batch_size == "full":
            raise ConfigError(
                "local.lr_scaling: needs a number as local.batch_size; full differs from client to client"
            )
        if self.decay == "weights" and not self.weight_decay:
            raise ConfigError("local.decay: needs local.weight_decay above 0")
        for name, user, used in (
            ("trust", "lars", self.optimizer == "lars"),
            ("loss_scale", "fp16", self.precision == "fp16"),
            ("betas", "adam and adamw", self.optimizer in ("adam", "adamw")),
            ("eps", "adam and adamw", self.optimizer in ("adam", "adamw")),
        ):
            if not used and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f"local.{name}: belongs to {user}")
        for name in ("accumulate", "min_batch") if self.batch_size != "full" else ():
            if (value := getattr(self, name)) > self.batch_size:
                raise ConfigError(f"local.{name}: {value} exceeds local.batch_size, {self.batch_size}")
        if self.peak_lr > LARGEST_LR:
            raise ConfigError(f"local.lr: {self.peak_lr:g} is more than a 32-bit number holds, {LARGEST_LR:.3g}")
        if self.drop_last and self.min_batch > 1:
            raise ConfigError("local.min_batch: local.drop_last leaves no small batch; set one of the two")
        if self.oversample and self.class_weights:
            raise ConfigError("local.oversample: cannot be combined with local.class_weights; set one of the two")
        self.check_schedule(0)
        if self.label_loss:
            check_loss(self.label_loss, classes or 2)

    def check_schedule(self, number: int) -> float:
        """`lr_at` round `number`, from 0; raises ConfigError where the schedule gives none."""
        with border(f"local.schedule: {name_of(self.schedule)}", ConfigError):
            rate = self.lr_at(number)
            if rate != self.lr_at(number):
                raise WrongReturnError(f"gave two factors for round {number + 1}; {NO_STATE}")
            return rate

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up and before the schedule: `lr`, scaled by `lr_scaling`."""
        factor = (
            1.0 if self.batch_size == "full" or self.lr_scaling == "none" else self.batch_size / BASE_BATCH_SIZE
        )
        return self.lr * (sqrt(factor) if self.lr_scaling == "sqrt" else factor)

    def lr_at(self, number: int, step: int = 0, steps: int = 1) -> float:
        """The learning rate in round `number`, from 0; with `lr_every: step`, at `step` of `steps`, from 0.

        In a warm-up by steps, the i-th of all m steps has i / m of `peak_lr` (Goyal et al. 2017).
        """
        if self.lr_every == "round":
            step, steps = 0, 1
        past, m = number * steps + step, self.warmup * steps
        if past < m:
            return self.peak_lr * (past + 1) / (m + 1 if self.lr_every == "round" else m)
        try:
            factor = self.schedule((past - m) / steps)
        except OverflowError:
            factor = inf
        if not (isinstance(factor, Real) and 0 <= (rate := self.peak_lr * float(factor)) < inf):
            made = f"{one_line(repr(factor))} in round {number + 1}"
            raise WrongReturnError(f"the schedule gave {made}; it should give a number >= 0 and a finite rate")
        return rate

    def num_steps(self, examples: int) -> int:
        """K, the number of steps of a client with so many examples."""
        return self.steps or self.epochs * self.epoch_of(examples)[0]

    def epoch_of(self, examples: int) -> tuple[int, int]:
        """How many mini-batches an epoch of a client with so many examples has, and the size of the largest."""
        size = max(self.batch_size_of(examples), 1)
        dropped = examples % size if self.drop_last else 0
        return batch_count(examples - dropped, size, self.min_batch)

    def batch_size_of(self, examples: int) -> int:
        """B, the batch size of a client with so many examples."""
        return examples if self.batch_size == "full" else min(self.batch_size, examples)

    def batch_sizes(self, examples: int) -> list[int]:
        """The sizes of the mini-batches of one epoch, for a client with so many examples."""
        size = max(self.batch_size_of(examples), 1)
        dropped = examples % size if self.drop_last else 0
        return batch_sizes(examples - dropped, size, self.min_batch)

    @property
    def with_all_examples(self) -> "Recipe":
        """The recipe for passes over all examples: what `drop_last` leaves out joins the batch before."""
        if not self.drop_last or self.batch_size == "full":
            return self
        return replace(self, drop_last=False, min_batch=self.batch_size)

    @property
    def adds_half_gradients(self) -> bool:
        """Whether the optimiser can use gradients in the precision of the backward pass; SGD adds bf16 to fp32."""
        plain = self.optimizer == "sgd" and self.clip_norm is None and self.accumulate == 1
        return self.precision == "fp32" or (self.precision == "bf16" and plain)

    @property
    def by_layer(self) -> bool:
        """Whether the optimiser treats the network's tensors differently, so that it needs them one by one."""
        return self.optimizer == "lars" or self.decay == "weights"

    def make_optimizer(self, layout: Layout, ops: Foreach = FOREACH) -> Optimizer:
        """A new optimiser for tensors of this layout; clients keep no optimiser state between rounds."""
        decayed = None if self.decay == "all" else [len(shape) > 1 for shape in layout.shapes.values()]
        if self.optimizer == "sgd":
            return SGD(self.momentum, self.nesterov, self.weight_decay, decayed, ops)
        if self.optimizer == "lars":
            return LARS(self.momentum, self.trust, self.weight_decay, decayed, ops)
        return Adam(self.betas, self.eps, self.optimizer == "adamw", self.weight_decay, decayed, ops)
