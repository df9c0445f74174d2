"""F_k: the objective of one client, and the training that lowers it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from math import prod
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.training.beta_mixture import BetaMixture
from fedsim.training.graphs import steps_of
from fedsim.training.layout import Layout
from fedsim.training.losses import class_weights
from fedsim.training.objective import Objective, batch_rows
from fedsim.training.optim import LossScale, clipped
from fedsim.training.precision import AUTOCAST
from fedsim.training.recipe import Recipe
from fedsim.training.replica import Replica, blocks
from fedsim.types import Batch, Job, State, Stream, random

AHEAD = 2**18  # bytes of mini-batches made at a time, which a core's cache holds


Loss = Callable[[Tensor, Batch], Tensor]  # (weights, batch) -> (): a mean over the batch
Correction = Callable[[Tensor, Tensor], Tensor]  # (gradient, weights) -> gradient, all (P,)


class LocalObjective(Objective[Tensor]):
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
        self._seed, self._round = seed, job.round
        self._rows = data.rows(job.client_id)
        n = len(self._rows)
        self._batch_size = n if recipe.batch_size == "full" else min(recipe.batch_size, n)
        self.num_examples = replica.flat.new_tensor(n, device="cpu")
        self.num_steps = replica.flat.new_tensor(recipe.num_steps(n), device="cpu")
        self._began, self._time_limit = perf_counter(), time_limit
        self._batch_bytes = self._batch_size * prod(data.shape) * replica.flat.itemsize
        self._label_loss = recipe.label_loss or replica.task.losses
        self._class_weights = self._weights_of_classes()  # (classes,)
        self._label_error_prob: Tensor | None = None  # (n_k,) that each label is wrong, by row
        self._start: tuple[Tensor, Tensor] | None = None  # (P,) and (Q,), where they teach
        self.metrics: State = {}
        dtype = AUTOCAST.get(recipe.precision)
        self._autocast = torch.autocast(replica.device.type, dtype) if dtype else nullcontext()
        replica.enter(buffers, int(random(seed, Stream.NETWORK, job.round, job.client_id).integers(2**63)), dtype)

    @property
    def buffers(self) -> Tensor:
        """(Q,) batch-norm statistics, as the last training pass left them; a copy."""
        return self.replica.buffers.clone()

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        """The round's mini-batches in their order, augmented, or those of its first `epochs` epochs."""
        rows, step = self._batch_rows(epochs), 0
        together = 1 if self.recipe.augment else max(AHEAD // self._batch_bytes, 1)
        while some := list(islice(rows, together)):
            for batch in self._gathered(some, step):
                self.check_time()
                yield batch
            step += 1

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
            parts = torch.split(torch.from_numpy(self._rows), self._batch_size)
            sums = [self._losses(w, Batch(*self.data.batch(rows)), train=False).sum() for rows in parts]
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
        self._consult(start)
        plain = loss is None and correct is None
        steps = steps_of(replica, self.data, recipe, self.lr, plain=plain)
        flat = not plain or not recipe.adds_half_gradients
        loss = loss or self.loss
        views = list(replica.views.values())
        cut = recipe.precision != "fp32" and not flat and not recipe.by_layer
        weights = views if recipe.by_layer else [replica.flat] if flat else blocks(views, views) if cut else views
        scaling = LossScale(recipe.loss_scale) if recipe.precision == "fp16" else None

        # A function: what it makes is freed, and the next step finds the same memory, still in the cache.
        def take(batch: Batch, lr: float) -> None:
            before = replica.snapshot() if scaling else None
            f, gradients = self._gradients(loss, batch, scaling.scale if scaling else None, flat)
            with torch.no_grad():
                steps.total.add_(f, alpha=len(batch.y))
                if scaling and before:
                    unscaled = scaling.unscale(gradients)
                    if unscaled is None:
                        replica.restore(before)
                        return
                    gradients = unscaled
                if correct:
                    after = replica.snapshot()
                    gradients = [correct(gradients[0], replica.flat)]
                    replica.restore(after)
                if recipe.clip_norm:
                    gradients = clipped(gradients, recipe.clip_norm)
                if flat and recipe.by_layer:
                    gradients = list(self.layout.split(gradients[0]).values())
                steps.optimizer.step(weights, blocks(gradients, views) if cut else gradients, lr)
            replica.refresh()

        n, taken, lr = 0, 0, self.lr
        if steps.captures:
            for rows in self._batch_rows():
                self.check_time()
                steps.take(rows, lambda rows: take(Batch(*self.data.batch(rows)), lr))
                n, taken = n + len(rows), taken + 1
        else:
            for batch in self.batches():
                if recipe.lr_every == "step":
                    lr = recipe.lr_at(self._round, taken, int(self.num_steps))
                take(batch, lr)
                n, taken = n + len(batch.y), taken + 1
        self._record(steps.total.clone(), n, taken)
        return replica.flat.clone()

    def _random(self, stream: Stream, *key: int) -> np.random.Generator:
        return random(self._seed, stream, self._round, self.client_id, *key)

    def _batch_rows(self, epochs: int | None = None) -> Iterator[Tensor]:
        """(B,) of each mini-batch; on a GPU all are sent there at once, and nobody waits."""
        rows = batch_rows(self.data, self.client_id, self.recipe, self._random(Stream.BATCHES), epochs)
        home = self.data.labels.device
        if home.type == "cuda" and not self.data.mapped:
            parts = list(rows)
            sent = torch.cat(parts).pin_memory().to(home, non_blocking=True)
            return iter(torch.split(sent, [len(part) for part in parts]))
        return rows

    def _gathered(self, rows: list[Tensor], step: int) -> Iterator[Batch]:
        """The mini-batches of those rows, made together; the first of them is for the `step`-th step."""
        together, sizes = torch.cat(rows) if len(rows) > 1 else rows[0], [len(part) for part in rows]
        if self.recipe.augment:
            batch = self.data.training_batch(together, self.recipe.augment, self._random(Stream.AUGMENT, step))
        else:
            batch = Batch(*self.data.batch(together))
        if self._label_error_prob is not None:
            places = torch.searchsorted(torch.from_numpy(self._rows).to(together.device), together)
            batch = batch._replace(
                label_error_prob=self._label_error_prob[places.to(self._label_error_prob.device)]
            )
        parts = [[None] * len(sizes) if t is None else torch.split(t, sizes) for t in batch]
        return (Batch(*part) for part in zip(*parts, strict=True))

    def _weights_of_classes(self) -> Tensor | None:
        given = self.recipe.class_weights
        if given is None:
            return None
        labels = self.data.labels[self._rows]
        balanced = class_weights(labels, self.data.num_classes) if given == "balanced" else torch.tensor(given)
        return balanced.to(self.replica.flat)

    def _consult(self, start: Tensor) -> None:
        """Ask the model that training starts from what it knows: as a teacher, and which labels are wrong."""
        distillation, noisy = self.recipe.distillation, self.recipe.noisy_labels
        if distillation and distillation.teacher == "global":
            self._start = start.clone(), self.buffers
        if noisy and self._round + 1 >= noisy.start:
            parts = torch.split(torch.from_numpy(self._rows), self._batch_size)
            with torch.no_grad():
                batches = (Batch(*self.data.batch(rows)) for rows in parts)
                found = [self._label_loss(self._logits(self.replica.w, b, train=False), b.y) for b in batches]
            losses = torch.cat(found).double().cpu().numpy()
            doubt = BetaMixture.fit(losses).posterior(losses)
            self._label_error_prob = torch.from_numpy(doubt).to(self.replica.flat)

    def _logits(self, w: Tensor, batch: Batch, train: bool) -> Tensor:
        return self.logits(w, batch.x, train=train).to(w.dtype)

    def _outputs(self, w: Tensor, batch: Batch, train: bool) -> tuple[Tensor, ...]:
        logits = self._logits(w, batch, train)
        return logits, *(other.to(w.dtype) for other in self.replica.auxiliary)

    def _teach(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self._autocast:
            if self._start is None:
                return self.replica.teach(x)
            start, buffers = self._start
            return self.replica.logits(start, x, train=False, buffers=buffers)

    def _gradients(self, loss: Loss, batch: Batch, scale: float | None, flat: bool) -> tuple[Tensor, list[Tensor]]:
        """() the loss, and its gradient, times `scale`; by `accumulate` pieces of the batch."""
        if self.recipe.accumulate == 1:
            f = loss(self.replica.w, batch)
            return f.detach(), self._backward(f * scale if scale else f, flat)
        total, gradients = self.replica.flat.new_zeros(()), list[Tensor]()
        pieces = min(self.recipe.accumulate, max(len(batch.y) // 2, 1))  # of one, batch norm has no statistics
        for piece in batch.split(pieces):
            f = loss(self.replica.w, piece) * (len(piece.y) / len(batch.y))
            total += f.detach()
            parts = self._backward(f * scale if scale else f, flat)
            if gradients:
                torch._foreach_add_(gradients, parts)
            else:
                gradients = [part.clone() for part in parts]
        return total, gradients

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
            "examples": total.new_tensor(examples, device="cpu"),
            "steps": total.new_tensor(steps, device="cpu"),
        }.items():
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value
