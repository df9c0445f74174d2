"""F_k: the objective of one client, and the training that lowers it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from itertools import count, islice
from math import ceil
from time import perf_counter
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.errors import ConfigError
from fedsim.optim import SGD, Adam, LossScale, Optimizer, clipped
from fedsim.schedules import Schedule, constant
from fedsim.task import Layout, Replica, blocks
from fedsim.types import Batch, Count, Decay, Job, NonNegative, Positive, State, Stream, random

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How every client trains between two messages.

    `epochs` passes over its examples, or `steps` mini-batches where that is set, of `batch_size` examples;
    an epoch's last batch holds what is left, and `full` is McMahan's B = infinity. A round's learning rate is
    `lr` times the schedule's factor, after a linear `warmup` of so many rounds. Each gradient is clipped to
    the norm `clip_norm`. bf16 and fp16 compute under autocast with fp32 weights; fp16 multiplies the loss by
    `loss_scale`, and skips a step whose gradient overflows, which halves the scale.
    """

    schedule: Schedule = constant
    _: KW_ONLY
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.1
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count | Literal["full"] = 32
    warmup: Annotated[int, Ge(0)] = 0
    momentum: Decay = 0.0
    nesterov: bool = False
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_scale: Positive = 65536.0
    channels_last: bool = False

    def check(self) -> None:
        """Raise ConfigError where two settings contradict each other."""
        if self.steps and self.epochs != 1:
            raise ConfigError(f"local.epochs: {self.epochs} and local.steps {self.steps}: set one of the two")
        for name in ("momentum", "nesterov") if self.optimizer != "sgd" else ():
            if getattr(self, name):
                raise ConfigError(f"local.{name}: belongs to sgd; {self.optimizer} has local.betas")
        if self.nesterov and not self.momentum:
            raise ConfigError("local.nesterov: needs local.momentum above 0")

    def lr_at(self, number: int) -> float:
        """The learning rate in round `number`, from 0."""
        if number < self.warmup:
            return self.lr * (number + 1) / (self.warmup + 1)
        return self.lr * self.schedule(number - self.warmup)

    def num_steps(self, examples: int) -> int:
        """K, the steps of a client that holds so many examples."""
        batch_size = examples if self.batch_size == "full" else self.batch_size
        return self.steps or self.epochs * ceil(examples / batch_size)

    @property
    def adds_half_gradients(self) -> bool:
        """Whether gradients may stay in the precision they come in: true of a bf16 one that SGD adds to fp32."""
        plain = self.optimizer == "sgd" and self.clip_norm is None
        return self.precision == "fp32" or (self.precision == "bf16" and plain)

    def make_optimizer(self) -> Optimizer:
        """A fresh one: clients keep no optimiser state between rounds."""
        if self.optimizer == "sgd":
            return SGD(self.momentum, self.nesterov, self.weight_decay)
        return Adam(self.betas, self.eps, self.weight_decay, decoupled=self.optimizer == "adamw")


Loss = Callable[[Tensor, Batch], Tensor]  # (weights, batch) -> (): a mean over the batch
Correction = Callable[[Tensor, Tensor], Tensor]  # (gradient, weights) -> gradient, all (P,)


class LocalObjective:
    """One client in one round, as the strategies see it.

    `num_examples` is n_k, `num_steps` the K_k steps that `train` takes, and `lr` this round's learning rate.
    Which examples make a batch depends on (seed, round, client) alone.
    """

    def __init__(
        self,
        replica: Replica,
        data: FederatedData,
        job: Job,
        buffers: Tensor,
        recipe: Recipe,
        seed: int = 0,
        time_limit: float | None = None,
    ):
        self.replica, self.data, self.recipe = replica, data, recipe
        self.layout: Layout = replica.task.layout
        self.client_id, self.lr = job.client_id, recipe.lr_at(job.round)
        self._key = (seed, Stream.BATCHES, job.round, job.client_id)
        self._rows = data.rows(job.client_id)
        n = len(self._rows)
        self._batch_size = n if recipe.batch_size == "full" else min(recipe.batch_size, n)
        self.num_examples = replica.flat.new_tensor(n, device="cpu")
        self.num_steps = replica.flat.new_tensor(recipe.num_steps(n), device="cpu")
        self._began, self._time_limit = perf_counter(), time_limit
        self.metrics: State = {}
        dtype = AUTOCAST.get(recipe.precision)
        self._autocast = torch.autocast(replica.device.type, dtype) if dtype else nullcontext()
        replica.enter(buffers, int(random(seed, Stream.NETWORK, job.round, job.client_id).integers(2**63)), dtype)

    @property
    def buffers(self) -> Tensor:
        """(Q,) batch-norm statistics, as the last training pass left them; a copy."""
        return self.replica.buffers.clone()

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        """The round's mini-batches in their order, or those of its first `epochs` epochs."""
        stream, steps = random(*self._key), None if epochs else self.recipe.steps
        passes = count() if steps else range(epochs or self.recipe.epochs)
        epoch_rows = (torch.from_numpy(stream.permutation(self._rows)) for _ in passes)
        batch_rows = (rows for epoch in epoch_rows for rows in torch.split(epoch, self._batch_size))
        for rows in islice(batch_rows, steps):
            self.check_time()
            yield Batch(*self.data.batch(rows))

    def check_time(self) -> None:
        """Raise TimeoutError where the client is over its time limit; `batches` asks before each batch."""
        if self._time_limit and perf_counter() - self._began > self._time_limit:
            raise TimeoutError(f"was over its time limit of {self._time_limit:g} s")

    def logits(self, w: Tensor, x: Tensor, *, train: bool = True) -> Tensor:
        """(B, classes) at the weights `w` (P,), in the recipe's precision."""
        with self._autocast:
            return self.replica.logits(w, x, train=train)

    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        """() mean loss of a mini-batch in training mode; without one F_k(w), over all examples in eval mode."""
        if batch is not None:
            return self._losses(w, batch, train=True).mean()
        with torch.no_grad():
            sums = [self._losses(w, b, train=False).sum() for b in self.batches(epochs=1)]
        return torch.stack(sums).sum() / self.num_examples

    def gradient(self, w: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """(P,) gradient and () loss at `w` (P,), of a mini-batch or of F_k, in training mode.

        F_k goes batch by batch: without batch norm and dropout, `batch_size` there only bounds the memory.
        """
        replica = self.replica
        iterate, in_use = replica.flat.clone(), replica.gradient.clone()  # by `train`, if `correct` asks
        replica.load(w)
        g, total, n, steps = torch.zeros_like(iterate), iterate.new_zeros(()), 0, 0
        for part in [batch] if batch else self.batches(epochs=1):
            with torch.enable_grad():
                f = self.loss(replica.w, part)
            g.add_(self._backward(f, flat=True)[0], alpha=len(part.y))
            total, n, steps = total + f.detach() * len(part.y), n + len(part.y), steps + 1
        replica.load(iterate)
        replica.gradient.copy_(in_use)
        self._record(total, n, steps)
        return g.div_(n), total / n

    def train(self, start: Tensor, *, loss: Loss | None = None, correct: Correction | None = None) -> Tensor:
        """Train from `start` (P,) by the recipe; returns the last iterate (P,).

        `loss(w, batch)` replaces the objective; all it does to the iterate `w` is differentiated. `correct(g, w)`
        changes each gradient before the step.
        """
        replica, recipe = self.replica, self.recipe
        replica.load(start)
        flat = loss is not None or correct is not None or not recipe.adds_half_gradients
        loss = loss or self.loss
        views = list(replica.views.values())
        cut = recipe.precision != "fp32" and not flat
        weights = [replica.flat] if flat else blocks(views, views) if cut else views
        optimizer = recipe.make_optimizer()
        scaling = LossScale(recipe.loss_scale) if recipe.precision == "fp16" else None
        total, n, steps = replica.flat.new_zeros(()), 0, 0
        for batch in self.batches():
            before = replica.snapshot() if scaling else None
            f = loss(replica.w, batch)
            total, n, steps = total + f.detach() * len(batch.y), n + len(batch.y), steps + 1
            gradients = self._backward(f * scaling.scale if scaling else f, flat)
            with torch.no_grad():
                if scaling and before:
                    unscaled = scaling.unscale(gradients)
                    if unscaled is None:
                        replica.restore(before)
                        continue
                    gradients = unscaled
                if correct:
                    after = replica.snapshot()
                    gradients = [correct(gradients[0], replica.flat)]
                    replica.restore(after)
                if recipe.clip_norm:
                    gradients = clipped(gradients, recipe.clip_norm)
                optimizer.step(weights, blocks(gradients, views) if cut else gradients, self.lr)
            replica.refresh()
        self._record(total, n, steps)
        return replica.flat.clone()

    def _losses(self, w: Tensor, batch: Batch, train: bool) -> Tensor:
        return self.replica.task.losses(self.logits(w, batch.x, train=train).to(w.dtype), batch.y)

    def _backward(self, f: Tensor, flat: bool) -> list[Tensor]:
        """The gradient of `f`: a tensor a parameter, or all in one (P,) that the next call overwrites."""
        replica = self.replica
        whole, *parts = torch.autograd.grad(f, [replica.w, *replica.parameters], allow_unused=True)
        gradients = [
            torch.zeros_like(p) if g is None else g for p, g in zip(replica.parameters, parts, strict=True)
        ]
        if not flat:
            return gradients
        torch._foreach_copy_(replica.gradient_views, gradients)
        if whole is not None:  # a loss term of all of w at once
            replica.gradient.add_(whole)
        return [replica.gradient]

    def _record(self, total: Tensor, examples: int, steps: int) -> None:
        """Sums over all mini-batch gradients that were taken; the mean is taken once, over the whole cohort."""
        for name, value in {
            "loss": total,
            "examples": total.new_tensor(examples),
            "steps": total.new_tensor(steps),
        }.items():
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value
