"""How a client trains: the settings under `local`."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from fedsim.base.catalogue import Options, Spec
from fedsim.data.augment import Augmentation
from fedsim.errors import ConfigError
from fedsim.training.layout import Layout
from fedsim.training.losses import LabelLoss
from fedsim.training.optim import FOREACH, LARS, SGD, Adam, Foreach, Optimizer
from fedsim.training.schedules import Schedule, constant
from fedsim.types import Count, Decay, NonNegative, Positive, Share

BASE_BATCH = 256  # that lr_scaling counts from (Goyal et al. 2017, https://arxiv.org/abs/1706.02677)


class Distillation(Options):
    """Knowledge distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    The loss is (1 - alpha) L + alpha T^2 KL(teacher || student), both softened by the temperature T. The teacher
    is `global`, the model that a client's training starts from, or a safetensors file, of the network itself or
    of another `model`.
    """

    teacher: Literal["global"] | Path = "global"
    model: Spec | str | None = None
    temperature: Positive = 4.0
    alpha: Share = 0.5


class NoisyLabels(Options):
    """Correction of wrong labels by a Beta mixture (Arazo et al. 2019, https://arxiv.org/abs/1904.11238).

    From round `start` on, counted from 1, a client fits two Beta distributions to the losses of its examples,
    before it trains, and replaces each label by the network's own prediction in proportion to the probability
    that it is wrong.
    """

    start: Count = 6


@dataclass(frozen=True)
class Recipe:
    """How every client trains between two messages.

    `epochs` passes over its examples, or `steps` mini-batches where that is set, of `batch_size` examples;
    an epoch's last batch holds what is left, and `full` is McMahan's B = infinity. Each gradient is summed over
    `accumulate` pieces of its batch, of two examples or more, for less memory; batch norm sees the pieces. With
    `oversample` an epoch draws as many examples with replacement, of each of the client's classes as often;
    `class_weights` weigh the loss instead, a number a class, or `balanced`, n_k / (classes n_kc).

    The learning rate is `lr`, times B / 256 with linear `lr_scaling` (Goyal et al. 2017), or its square root
    (Krizhevsky 2014), times the schedule's factor, after a linear `warmup` of so many rounds. It changes with the
    round or, by `lr_every`, with each step, a client's K steps being a round. `decay: weights` spares tensors of
    one axis, biases and norms, from weight decay (He et al. 2019). `trust` is LARS's. Each gradient is clipped to
    the norm `clip_norm`. bf16 and fp16 compute under autocast with fp32 weights; fp16 multiplies the loss by
    `loss_scale`, and skips a step whose gradient overflows, which halves the scale.
    """

    schedule: Schedule = constant
    label_loss: LabelLoss | None = None  # the task's
    augment: Sequence[Augmentation] = ()
    _: KW_ONLY
    optimizer: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    lr: Positive = 0.1
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    lr_every: Literal["round", "step"] = "round"
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | Literal["full"] = 32
    accumulate: Count = 1
    oversample: bool = False
    class_weights: Literal["balanced"] | list[Positive] | None = None
    warmup: Annotated[int, Ge(0)] = 0
    momentum: Decay = 0.0
    nesterov: bool = False
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
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
        """Raise ConfigError where two settings contradict each other, or one the number of classes."""
        if classes and isinstance(self.class_weights, list) and len(self.class_weights) != classes:
            found = len(self.class_weights)
            raise ConfigError(f"local.class_weights: has {found} numbers; there are {classes} classes")
        if self.steps and self.epochs != 1:
            both = f"{self.epochs} and local.steps {self.steps}"
            raise ConfigError(f"local.epochs: {both}: set one of the two; local.epochs=1 unsets it")
        for name in ("momentum", "nesterov") if self.optimizer not in ("sgd", "lars") else ():
            if getattr(self, name):
                raise ConfigError(f"local.{name}: belongs to sgd; {self.optimizer} has local.betas")
        if self.nesterov and (self.optimizer == "lars" or not self.momentum):
            raise ConfigError("local.nesterov: needs sgd with local.momentum above 0")
        if self.lr_scaling != "none" and self.batch_size == "full":
            raise ConfigError("local.lr_scaling: needs a local.batch_size; full is another number for each client")
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
        if self.batch_size != "full" and self.accumulate > self.batch_size:
            raise ConfigError(f"local.accumulate: {self.accumulate} exceeds local.batch_size, {self.batch_size}")
        if self.oversample and self.class_weights:
            raise ConfigError("local.oversample: cannot be combined with local.class_weights; set one of the two")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, before the schedule: `lr` as `lr_scaling` has it."""
        share = 1.0 if self.batch_size == "full" or self.lr_scaling == "none" else self.batch_size / BASE_BATCH
        return self.lr * (sqrt(share) if self.lr_scaling == "sqrt" else share)

    def lr_at(self, number: int, step: int = 0, steps: int = 1) -> float:
        """The learning rate in round `number`, from 0; by step in the `step`-th of a client's `steps`, from 0.

        By step and during warm-up, the i-th step of all m has i / m of it (Goyal et al. 2017).
        """
        if self.lr_every == "round":
            step, steps = 0, 1
        past, m = number * steps + step, self.warmup * steps
        if past < m:
            return self.peak_lr * (past + 1) / (m + 1 if self.lr_every == "round" else m)
        return self.peak_lr * self.schedule((past - m) / steps)

    def num_steps(self, examples: int) -> int:
        """K, the steps of a client that holds so many examples."""
        return self.steps or self.epochs * ceil(examples / max(self.batch_size_of(examples), 1))

    def batch_size_of(self, examples: int) -> int:
        """B, of a client that holds so many examples."""
        return examples if self.batch_size == "full" else min(self.batch_size, examples)

    @property
    def adds_half_gradients(self) -> bool:
        """Whether gradients may stay in the precision they come in: true of a bf16 one that SGD adds to fp32."""
        plain = self.optimizer == "sgd" and self.clip_norm is None and self.accumulate == 1
        return self.precision == "fp32" or (self.precision == "bf16" and plain)

    @property
    def by_layer(self) -> bool:
        """Whether the optimiser tells one tensor from another."""
        return self.optimizer == "lars" or self.decay == "weights"

    def make_optimizer(self, layout: Layout, ops: Foreach = FOREACH) -> Optimizer:
        """A fresh one for lists of such tensors: clients keep no optimiser state between rounds."""
        decayed = None if self.decay == "all" else [len(shape) > 1 for shape in layout.shapes.values()]
        if self.optimizer == "sgd":
            return SGD(self.momentum, self.nesterov, self.weight_decay, decayed, ops)
        if self.optimizer == "lars":
            return LARS(self.momentum, self.trust, self.weight_decay, decayed, ops)
        return Adam(self.betas, self.eps, self.optimizer == "adamw", self.weight_decay, decayed, ops)
