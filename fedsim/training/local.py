"""The objective F_k of one client on a network of its own, and its training."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from math import prod
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.training.beta_mixture import BetaMixture
from fedsim.training.draws import KeyedDraws
from fedsim.training.example_loss import ExampleLoss, batch_rows
from fedsim.training.graphs import Steps, steps_for
from fedsim.training.losses import class_weights
from fedsim.training.objective import (
    AfterStep,
    BatchMap,
    Correction,
    Gradient,
    LocalObjective,
    Loss,
    changed_batch,
    check_rules,
    checked_gradient,
    checked_separate,
    checked_vector,
    exact,
    key_of,
    only_read,
)
from fedsim.training.optim import LossScale, clipped
from fedsim.training.part import Part, part_of
from fedsim.training.precision import AUTOCAST
from fedsim.training.recipe import Recipe
from fedsim.training.replica import Passes, Replica, Snapshot, cache_blocks
from fedsim.types import Batch, Job, State, Stream, random

BATCH_GROUP_BYTES = 2**18  # of mini-batches that are made at a time; a core's cache holds them
NOTHING = nullcontext()


class Pieces(NamedTuple):
    """The optimiser's tensors: one a parameter, one flat vector, or blocks that fit in the cache."""

    weights: list[Tensor]
    regroup: Callable[[list[Tensor]], list[Tensor]]  # gradients of `_backward` -> the same pieces as the weights


class Fixed(NamedTuple):
    """The part that a training may change, and the values before it, which remain outside."""

    part: Part
    start: Tensor  # (P,)
    before: State  # all buffers of the network, by name


class Training(NamedTuple):
    """The values that all steps of one call of `train` share."""

    loss: Loss
    gradient: Gradient | None
    correct: Correction | None
    after_step: AfterStep | None
    fixed: Fixed | None
    flat_gradient: bool  # whether the gradient is one vector (P,), not one tensor a parameter
    pieces: Pieces
    steps: Steps
    scaler: LossScale | None


@dataclass
class GivenStep:
    """A step whose gradient the strategy gives."""

    w: Tensor  # the iterate, as the strategy is given it
    before: Snapshot
    after: Snapshot | None = None  # a training pass at the iterate
    draws: Tensor | None = None  # the generator before the first gradient; the others have the same random numbers


@dataclass
class Model:
    """What one of the client's models has for itself, by `separate`."""

    path: tuple[str, ...]  # names, in the key of its random numbers
    passes: Passes
    metrics: State
    noise: KeyedDraws | None = None  # for `normal` and `uniform`
    start: tuple[Tensor, Tensor] | None = None  # (P,) and (Q,), if the start model is the teacher
    label_error_prob: Tensor | None = None  # (n_k,) the probability for each row
    step: GivenStep | None = None
    names: set[str] = field(default_factory=set)  # of the models separated from it


class ClientObjective(LocalObjective):
    """One client in one round; it has the replica for itself until the next client begins."""

    client_id: int
    round: int
    lr: float

    def __init__(
        self,
        replica: Replica,
        data: FederatedData,
        job: Job,
        buffers: Tensor,
        recipe: Recipe,
        seed: int = 0,
        time_limit: float | None = None,
        private_buffers: Mapping[str, Tensor] = {},
        path: tuple[str, ...] = (),
        cohort: Sequence[int] = (),
    ):
        self.replica, self.data, self.recipe = replica, data, recipe
        self.layout = replica.task.layout
        self.client_id, self.round, self.lr = job.client_id, job.round, recipe.lr_at(job.round)
        self._seed, self._received, self._asked = seed, (buffers, private_buffers), cohort
        self._rows = data.rows(job.client_id)
        n = len(self._rows)
        self._batch_size = recipe.batch_size_of(n)
        self.num_examples, self.num_steps = exact(n, replica.flat), exact(recipe.num_steps(n), replica.flat)
        self._began, self._time_limit = perf_counter(), time_limit
        self._example_loss = ExampleLoss(recipe, replica.task, self._class_weights())
        self._change: BatchMap | None = None
        self._constant_lr = False
        dtype = AUTOCAST.get(recipe.precision)
        self._autocast = torch.autocast(replica.device.type, dtype) if dtype else nullcontext()
        replica.begin_client(buffers, self._seed_of(Stream.NETWORK, path), dtype, private_buffers)
        self._model = Model(path, replica.in_use, {})

    @property
    def cohort(self) -> Tensor:
        return torch.tensor(self._asked, dtype=torch.int64, device=self.replica.device)

    @property
    def buffers(self) -> Tensor:
        with self._in_use():
            return self.replica.buffers.clone()

    @property
    def private_buffers(self) -> State:
        with self._in_use():
            return self.replica.others("private")

    @property
    def metrics(self) -> State:
        return self._model.metrics

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        return self._batches(self.recipe, epochs)

    def with_batches(self, change: BatchMap) -> LocalObjective:
        other = copy(self)
        other._change = partial(changed_batch, change, self._change)
        return other

    def separate(
        self,
        name: str,
        *,
        buffers: Tensor | None = None,
        epochs: int | None = None,
        lr: float | Tensor | None = None,
        record: bool = False,
    ) -> LocalObjective:
        received, private = self._received
        start = checked_separate(name, self._model.names, buffers, received, epochs, lr)
        other, path = copy(self), (*self._model.path, name)
        if epochs:
            other.recipe = replace(self.recipe, epochs=epochs, steps=None)
            other.num_steps = exact(other.recipe.num_steps(len(self._rows)), self.replica.flat)
        if lr is not None:
            other.lr, other._constant_lr = float(lr), True
        passes = self.replica.first_passes(start, private, self._seed_of(Stream.NETWORK, path))
        other._model = Model(path, passes, self.metrics if record else {})
        return other

    def _in_use(self) -> AbstractContextManager[None]:
        """The replica has the statistics and the random numbers of this model meanwhile."""
        passes = self._model.passes
        return NOTHING if self.replica.in_use is passes else self.replica.using(passes)

    def _batches(self, recipe: Recipe, epochs: int | None = None) -> Iterator[Batch]:
        rows, step = self._batch_rows(recipe, epochs), 0
        batch_bytes = self._batch_size * prod(self.data.shape) * self.replica.flat.itemsize
        group_size = 1 if self.recipe.augment else max(BATCH_GROUP_BYTES // batch_bytes, 1)
        while group := list(islice(rows, group_size)):
            for batch in self._make_batches(group, step):
                self.check_time()
                yield self._change(batch) if self._change else batch
            step += 1

    def check_time(self) -> None:
        """Raise TimeoutError if the client is over its time limit; `batches` calls this before each batch."""
        if self._time_limit and perf_counter() - self._began > self._time_limit:
            raise TimeoutError(f"was over its time limit of {self._time_limit:g} s")

    def logits(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> Tensor:
        with self._in_use():
            return self._heads(w, x, w.requires_grad if train is None else train)[0]

    def features(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> tuple[Tensor, Tensor]:
        with self.replica.head_input() as found:
            logits = self.logits(w, x, train=train)
        return found[0].to(w.dtype), logits

    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        with self._in_use():
            if batch is not None:
                return self._losses(w, batch, train=True).mean()
            with torch.no_grad():
                sums = [self._losses(w, part, train=False).sum() for part in self._all_examples()]
            return (torch.stack(sums).sum() / self.num_examples).to(w.dtype)

    def losses(self, w: Tensor, batch: Batch, *, train: bool | None = None) -> Tensor:
        with self._in_use():
            return self._losses(w, batch, w.requires_grad if train is None else train)

    def label_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._example_loss.of_labels(logits.to(self.replica.flat.dtype), batch)

    def normal(self, like: Tensor) -> Tensor:
        with self._noise:
            return torch.randn_like(like)

    def uniform(self, like: Tensor) -> Tensor:
        with self._noise:
            return torch.rand_like(like)

    def gradient(self, w: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        with self._in_use():
            if step := self._model.step:
                return self._gradient_in_step(step, w, batch)
            g, total, n, steps = self._gradient_at(w, batch)
        self._record(total, n, steps)
        return g, (total / n).to(g.dtype)

    def _gradient_in_step(self, step: GivenStep, w: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """As `gradient`, in a `gradient` of the strategy: with the step's random numbers, and without a record."""
        replica = self.replica
        now = replica.generator.get_state() if replica.task.draws else None
        if step.draws is None:
            step.draws = now
        elif now is not None:
            replica.generator.set_state(step.draws)
        if w is step.w and batch is not None:
            with torch.enable_grad():
                f = self.loss(replica.w, batch)
            g, f, step.after = self._backward(f, flat_gradient=True)[0].clone(), f.detach(), replica.snapshot()
        else:
            g, total, n, _ = self._gradient_at(w, batch)
            f = (total / n).to(g.dtype)
        replica.restore(step.before)
        if now is not None and now is not step.draws:
            replica.generator.set_state(now)
        return g, f

    def _gradient_at(self, w: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor, int, int]:
        """(P,) the gradient, the sum of the losses, and how many examples and batches; the iterate is kept."""
        replica = self.replica
        g, total, n, steps = torch.zeros_like(replica.flat), replica.flat.new_zeros((), dtype=torch.double), 0, 0
        with replica.training(self._model.passes, keep=True):
            replica.load(w)
            for part in [batch] if batch else self._batches(self.recipe.with_all_examples, epochs=1):
                with torch.enable_grad():
                    f = self.loss(replica.w, part)
                g.add_(self._backward(f, flat_gradient=True)[0], alpha=len(part.y))
                total, n, steps = total + f.detach() * len(part.y), n + len(part.y), steps + 1
        return g.div_(n), total, n, steps

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
        check_rules(self.recipe, loss, gradient)
        with self._in_use(), self.replica.training(self._model.passes), torch.enable_grad():
            return self._train(start, loss, gradient, correct, after_step, only)

    def _train(
        self,
        start: Tensor,
        loss: Loss | None,
        gradient: Gradient | None,
        correct: Correction | None,
        after_step: AfterStep | None,
        only: Tensor | None,
    ) -> Tensor:
        replica, recipe = self.replica, self.recipe
        replica.load(start)
        self._query_start_model(start)
        plain = not (loss or gradient or correct or after_step) and only is None
        captured = plain and not self._change and not self._model.path
        flat_gradient = not plain or not recipe.adds_half_gradients
        part = None if only is None else part_of(only, replica.task, replica.device)
        training = Training(
            loss or self.loss,
            gradient,
            correct,
            after_step,
            Fixed(part, start, replica.named_buffers()) if part else None,
            flat_gradient,
            self._optimizer_tensors(flat_gradient, split=bool(gradient)),
            steps_for(replica, self.data, recipe, self.lr, plain=captured),
            LossScale(recipe.loss_scale) if recipe.precision == "fp16" else None,
        )
        steps = training.steps
        steps.optimizer.begin(training.pieces.weights)
        n, taken, lr = 0, 0, self.lr
        if steps.captures:
            for rows in self._batch_rows(recipe):
                self.check_time()
                steps.take(rows, lambda rows: self._step(training, Batch(*self.data.batch(rows)), lr))
                n, taken = n + len(rows), taken + 1
        else:
            for batch in self.batches():
                if recipe.lr_every == "step" and not self._constant_lr:
                    lr = recipe.lr_at(self.round, taken, int(self.num_steps))
                self._step(training, batch, lr)
                n, taken = n + len(batch.y), taken + 1
        self._record(steps.total.clone(), n, taken)
        return replica.flat.clone()

    def _step(self, training: Training, batch: Batch, lr: float) -> None:
        """One step of the optimiser.

        This is a method so that its tensors are freed at its end: the next step reuses their memory, which is
        cached.
        """
        replica, recipe, scaler = self.replica, self.recipe, training.scaler
        before = replica.snapshot() if scaler else None
        f, gradients = self._gradients(training, batch)
        with torch.no_grad():
            training.steps.total.add_(f, alpha=len(batch.y))
            if scaler and before:
                unscaled = scaler.unscale(gradients)
                if unscaled is None:  # a gradient overflowed: skip the step
                    replica.restore(before)
                    return
                gradients = unscaled
            if training.correct:
                after = replica.snapshot()
                with only_read(replica.flat.data, "correct") as w:
                    gradients = [training.correct(gradients[0], w)]
                replica.restore(after)
            if training.fixed:
                gradients = [training.fixed.part.of(gradients[0], torch.zeros_like(gradients[0]))]
            if training.gradient:
                gradients = list(self.layout.split(gradients[0]).values())
            if recipe.clip_norm:
                gradients = clipped(gradients, recipe.clip_norm, training.steps.optimizer.ops)
            training.steps.optimizer.step(training.pieces.weights, training.pieces.regroup(gradients), lr)
            if training.after_step:
                replica.flat.copy_(checked_vector(training.after_step(replica.flat), replica.flat, "after_step"))
            if training.fixed:
                part, start, kept = training.fixed
                replica.flat.copy_(part.of(replica.flat, start))
                replica.restore_buffers(part.of_buffers(replica.named_buffers(), kept))
        replica.refresh()

    def _optimizer_tensors(self, flat_gradient: bool, split: bool) -> Pieces:
        """The tensors for a flat gradient, or for one that is `split` before it is clipped, as a plain one is."""
        views = list(self.replica.views.values())
        if split:
            return Pieces(views, lambda g: g)
        if self.recipe.by_layer:
            return Pieces(views, lambda g: list(self.layout.split(g[0]).values()) if flat_gradient else g)
        if flat_gradient:
            return Pieces([self.replica.flat], lambda g: g)
        if self.recipe.precision != "fp32":
            return Pieces(cache_blocks(views, views), lambda g: cache_blocks(g, views))
        return Pieces(views, lambda g: g)

    def _random(self, stream: Stream, *key: int) -> np.random.Generator:
        return random(self._seed, stream, self.round, self.client_id, *key)

    def _seed_of(self, stream: Stream, path: tuple[str, ...]) -> int:
        return int(self._random(stream, *map(key_of, path)).integers(2**63))

    @property
    def _noise(self) -> KeyedDraws:
        model = self._model
        if model.noise is None:
            seed = self._seed_of(Stream.STRATEGY, model.path)
            model.noise = KeyedDraws(torch.Generator(self.replica.device).manual_seed(seed))
        return model.noise

    def _batch_rows(self, recipe: Recipe, epochs: int | None = None) -> Iterator[Tensor]:
        """(B,) the rows of each mini-batch; to a GPU all are copied at once, without blocking."""
        rows = batch_rows(self.data, self.client_id, recipe, self._random(Stream.BATCHES), epochs)
        home = self.data.labels.device
        if home.type == "cuda" and not self.data.mapped:
            parts = list(rows)
            sent = torch.cat(parts).pin_memory().to(home, non_blocking=True)
            return iter(torch.split(sent, [len(part) for part in parts]))
        return rows

    def _make_batches(self, rows: list[Tensor], step: int) -> Iterator[Batch]:
        """The mini-batches of these rows, made together; the first one is for step number `step`."""
        together, sizes = torch.cat(rows) if len(rows) > 1 else rows[0], [len(part) for part in rows]
        if self.recipe.augment:
            batch = self.data.training_batch(together, self.recipe.augment, self._random(Stream.AUGMENT, step))
        else:
            batch = Batch(*self.data.batch(together))
        if (wrong := self._model.label_error_prob) is not None:
            places = torch.searchsorted(torch.from_numpy(self._rows).to(together.device), together)
            batch = batch._replace(label_error_prob=wrong[places.to(wrong.device)])
        parts = [[None] * len(sizes) if t is None else torch.split(t, sizes) for t in batch]
        return (Batch(*part) for part in zip(*parts, strict=True))

    def _all_examples(self) -> Iterator[Batch]:
        """All examples of the client in their order, batch by batch, without augmentation."""
        for rows in torch.split(torch.from_numpy(self._rows), self._batch_size):
            batch = Batch(*self.data.batch(rows))
            yield self._change(batch) if self._change else batch

    def _class_weights(self) -> Tensor | None:
        given = self.recipe.class_weights
        if given is None:
            return None
        return class_weights(given, self.data.labels[self._rows], self.data.num_classes).to(self.replica.flat)

    def _query_start_model(self, start: Tensor) -> None:
        """Keep the start model if it is the teacher; estimate with it which labels are wrong."""
        distillation, noisy = self.recipe.distillation, self.recipe.noisy_labels
        if distillation and distillation.teacher == "global":
            self._model.start = start.clone(), self.buffers
        if noisy and self.round + 1 >= noisy.start:
            with torch.no_grad():
                losses_by_batch = [
                    self._example_loss.label_loss(self._heads_in_fp32(self.replica.w, b.x, False)[0], b.y)
                    for b in self._all_examples()
                ]
            losses = torch.cat(losses_by_batch).double().cpu().numpy()
            wrong = BetaMixture.fit(losses).posterior(losses)
            self._model.label_error_prob = torch.from_numpy(wrong).to(self.replica.flat)

    def _heads(self, w: Tensor, x: Tensor, train: bool) -> tuple[Tensor, ...]:
        """(B, classes) of each head; at the replica's own `w`, a training pass updates batch-norm statistics."""
        with self._autocast:
            if w is self.replica.w and self.replica.trained is self._model.passes:
                return self.replica.forward(x, train=train)
            return self.replica.forward_at(w, x, train=train)

    def _heads_in_fp32(self, w: Tensor, x: Tensor, train: bool) -> tuple[Tensor, ...]:
        return tuple(head.to(w.dtype) for head in self._heads(w, x, train))

    def _losses(self, w: Tensor, batch: Batch, train: bool) -> Tensor:
        """(B,) the losses that the recipe defines."""
        heads = self._heads_in_fp32(w, batch.x, train)
        return self._example_loss(heads, batch, self._teacher_logits(batch.x) if train else None)

    def _teacher_logits(self, x: Tensor) -> Tensor | None:
        """(B, classes) the teacher's logits, if there is a teacher."""
        distillation, started = self.recipe.distillation, self._model.start
        if distillation is None or (distillation.teacher == "global" and started is None):
            return None
        with torch.no_grad(), self._autocast:
            if started is None:
                return self.replica.teacher_logits(x)
            start, buffers = started
            return self.replica.forward_at(start, x, train=False, buffers=buffers)[0]

    def _gradients(self, training: Training, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """() the loss, and its gradient times the loss scale, summed over `accumulate` pieces of the batch."""
        if training.gradient:
            return self._given_gradient(training.gradient, batch)
        scale = training.scaler.scale if training.scaler else None
        moving = training.fixed.part.parameters if training.fixed else None
        if self.recipe.accumulate == 1:
            f = training.loss(self.replica.w, batch)
            return f.detach(), self._backward(f * scale if scale else f, training.flat_gradient, moving)
        total, gradients = self.replica.flat.new_zeros(()), list[Tensor]()
        pieces = min(self.recipe.accumulate, max(len(batch.y) // 2, 1))  # batch norm needs two examples
        for piece in batch.split(pieces):
            f = training.loss(self.replica.w, piece) * (len(piece.y) / len(batch.y))
            total += f.detach()
            parts = self._backward(f * scale if scale else f, training.flat_gradient, moving)
            if gradients:
                torch._foreach_add_(gradients, parts)
            else:
                gradients = [part.clone() for part in parts]
        return total, gradients

    def _backward(self, f: Tensor, flat_gradient: bool, moving: frozenset[str] | None = None) -> list[Tensor]:
        """The gradient of `f`: one tensor a parameter, or one vector (P,) that the next call overwrites.

        It is 0 for parameters that are not among the `moving` ones, and no time is spent on these.
        """
        replica = self.replica
        parameters, used = replica.parameters, replica.parameters
        if moving is not None:
            used = [p for name, p in zip(replica.views, parameters, strict=True) if name in moving]
        of_w, *found = torch.autograd.grad(f, [replica.w, *used], allow_unused=True)
        parts: Iterable[Tensor | None] = found
        if moving is not None:
            rest = iter(found)
            parts = [next(rest) if name in moving else None for name in replica.views]
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
        if not flat_gradient:
            return gradients
        torch._foreach_copy_(replica.gradient_views, gradients)
        if of_w is not None:  # from loss terms of the whole vector w
            replica.gradient.add_(of_w)
        return [replica.gradient]

    def _given_gradient(self, gradient: Gradient, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """() the loss and the gradient (P,) that a strategy's `gradient` gives."""
        replica, model = self.replica, self._model
        step = model.step = GivenStep(replica.flat.data, replica.snapshot())
        try:
            with only_read(step.w, "gradient"):
                g, f = checked_gradient(gradient(step.w, batch), replica.flat)
        finally:
            model.step = None
        if step.after:
            replica.restore(step.after)
        return f, [g]

    def _record(self, total: Tensor, examples: int, steps: int) -> None:
        """Add to the sums over all mini-batch gradients; the mean is computed once, over the whole cohort."""
        metrics = self._model.metrics
        for name, value in {
            "loss": total.double(),
            "examples": torch.tensor(examples, dtype=torch.double),
            "steps": torch.tensor(steps, dtype=torch.double),
        }.items():
            metrics[name] = metrics[name] + value if name in metrics else value
