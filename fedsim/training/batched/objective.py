"""F_k inside a `torch.func.vmap` over clients; `fedsim.training.local` is the same for a single client.

`Cohort` prepares the values that differ from client to client and are known before training, such as rows, sizes
and learning rates; each client gets its own row of them.

Shapes: C clients, K steps of the longest of them, B examples of the largest batch among them, P, Q.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from fedsim.training.batched.cohort import ALL_EXAMPLES, IN_ORDER, Cohort, Step
from fedsim.training.batched.layers import BatchedDraws, BatchedLayers, ConvMethod, RaggedError
from fedsim.training.batched.optim import VmapOps
from fedsim.training.batched.per_client import per_client_row, per_client_value
from fedsim.training.buffers import COUNTER, PowerVectors
from fedsim.training.example_loss import ExampleLoss
from fedsim.training.objective import Correction, LocalObjective, Loss
from fedsim.training.optim import Optimizer, Rate, clipped
from fedsim.training.precision import AUTOCAST
from fedsim.training.probe import heads
from fedsim.training.replica import depthwise, in_own_precision
from fedsim.training.task import Task
from fedsim.types import Batch, State


class Network:
    """One thread's copy of the network, as a function of weights, statistics and counters."""

    def __init__(self, task: Task, device: torch.device, conv: ConvMethod):
        self.task, self.device, self.conv = task, device, conv
        self.draws = task.draws  # whether a client draws random numbers, in the network or in the strategy
        self.network = copy.deepcopy(task.network).to(device).train()
        if device.type == "cpu":
            for module in depthwise(self.network):
                module.forward = partial(in_own_precision, module, module.forward)
        self.teacher = copy.deepcopy(task.teacher).to(device).eval() if task.teacher else None
        # Of batch norm: kept on the host, which reads them without waiting for the device.
        self.counters = {
            name: buffer.cpu() if name.endswith(COUNTER) else buffer.clone()
            for name, buffer in self.network.named_buffers()
            if name not in task.handling and not buffer.is_floating_point()
        }
        self.others = {n: b.to(device) for n, b in task.initial_of("server", "private", "weights").items()}
        self.power_vectors = PowerVectors(self.network)
        self.like = task.initial_model.to(device)  # (P,); only its type and device are used

    def __call__(self, weights: State, statistics: State, x: Tensor, train: bool) -> tuple[Tensor, ...]:
        """(B, classes) of each head; with `train`, `statistics`, which includes counters, is updated in place."""
        if self.network.training != train:
            self.network.train(train)
        own = weights | statistics
        output = functional_call(self.network, own, (x.to(self.like.dtype),))
        for name in self.task.reassigned:
            statistics[name] = own[name].detach().to(statistics[name].dtype)
        return heads(output)


Weights = Tensor | State  # a model, (P,) or by name
W = TypeVar("W", Tensor, State)


class BatchedObjective(LocalObjective):
    """One client in one round, inside a `vmap` over clients; `client_index` () is its place in the cohort."""

    def __init__(
        self,
        network: Network,
        cohort: Cohort,
        client_index: Tensor,
        buffers: Tensor,
        private_buffers: State,
    ):
        self._cohort, self._client_index, self._network = cohort, client_index, network
        self.recipe, self.layout = cohort.recipe, network.task.layout
        self.client_id, self.num_examples = self._own_value("clients"), self._own_value("num_examples")
        self.num_steps = self._own_value("num_steps")
        self.lr = self._rate(cohort.lr(), "lr")
        weights = self._own_value("class_weights") if self.recipe.class_weights else None
        self._example_loss = ExampleLoss(self.recipe, network.task, weights)
        self._start: tuple[Tensor, Tensor] | None = None  # (P,) and (Q,), if the start model is the teacher
        layout = self._network.task.buffer_layout
        others = {name: self._of_each_client(b) for name, b in (network.others | private_buffers).items()}
        self._statistics: State = layout.split(self._of_each_client(buffers)) | others | self._network.counters
        self._at: Weights | None = None  # the iterate; a training pass there updates statistics
        self._layers = BatchedLayers(client_index, cohort.generators, self._network.conv)
        self.draws = BatchedDraws(client_index, cohort.generators, (sum(self.layout.sizes),))
        self._metrics: State = {}

    @property
    def metrics(self) -> State:
        return self._metrics

    @property
    def buffers(self) -> Tensor:
        parts = [self._statistics[name].reshape(-1) for name in self._network.task.buffer_layout.shapes]
        return torch.cat(parts) if parts else self._network.like.new_zeros(0)

    @property
    def private_buffers(self) -> State:
        return {name: self._statistics[name].clone() for name in self._network.task.initial_of("private")}

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        for step, batch in self._batches(epochs):
            if step.padded:
                raise RaggedError
            yield batch

    def logits(self, w: Tensor, x: Tensor, *, train: bool = True) -> Tensor:
        return self._heads(w, x, train)[0]

    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        if batch is not None:
            return self._mean(w, batch)
        total = self._network.like.new_zeros(())
        with torch.no_grad():
            for step in self._cohort.steps(IN_ORDER):
                part = self._client_batch(step, augmented=False)
                losses = self._losses(w, part, train=False)
                total = total + (losses if part.mask is None else torch.where(part.mask, losses, 0)).sum()
        return (total / self.num_examples).to(total.dtype)

    def gradient(self, w: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        self._statistics = self._statistics | self._power_vectors(w)
        if batch is not None:
            g, f, self._statistics = self._differentiated(self.loss, w, batch)
            self._record(f.double() * len(batch.y), len(batch.y), 1)
            return g, f
        g_k, total, steps = torch.zeros_like(w), w.new_zeros((), dtype=torch.double), w.new_zeros(())
        for step, part in self._batches(ALL_EXAMPLES):
            g, f, moved = self._differentiated(self.loss, w, part)
            n = self._count(step)
            g_k, total = g_k + g * n, total + f.double() * n
            self._statistics = self._statistics_after(step, moved)
            steps = steps + (n > 0)
        self._record(total, self.num_examples, steps)
        return (g_k / self.num_examples).to(w.dtype), (total / self.num_examples).to(w.dtype)

    def train(self, start: Tensor, *, loss: Loss | None = None, correct: Correction | None = None) -> Tensor:
        recipe, total = self.recipe, start.new_zeros((), dtype=torch.double)
        examples = torch.zeros_like(total)
        if recipe.distillation and recipe.distillation.teacher == "global":
            self._start = start, self.buffers
        self._statistics = self._statistics | self._power_vectors(start)
        optimizer, names = recipe.make_optimizer(self.layout, VmapOps()), list(self.layout.shapes)
        flat_gradient = loss is not None or correct is not None  # these need the flat vector (P,)
        w, pieces, shared = start, list(self.layout.split(start).values()), True
        for step, batch in self._batches():
            if flat_gradient:
                g, f, moved = self._differentiated(loss or self.loss, w, batch)
                g = correct(g, w) if correct else g
                gradients = list(self.layout.split(g).values()) if recipe.by_layer else [g]
            else:
                by_name = dict(zip(names, pieces, strict=True))
                parts, f, moved = self._differentiated(self._mean, by_name, batch)
                gradients = list(parts.values())
            if shared:  # from here on each client has its own weights, updated in place
                w, shared = gradients[0].new_empty(start.shape).copy_(start), False
                pieces = [w] if flat_gradient and not recipe.by_layer else list(self.layout.split(w).values())
                optimizer.begin(pieces)
            if recipe.clip_norm:
                gradients = clipped(gradients, recipe.clip_norm, optimizer.ops)
            self._step(optimizer, pieces, gradients, step)
            n = self._count(step)
            total, examples = total + f.double() * n, examples + n
            self._statistics = self._statistics_after(step, moved)
        self._record(total, examples, self.num_steps)
        return w

    def _step(self, optimizer: Optimizer, weights: list[Tensor], gradients: list[Tensor], step: Step) -> None:
        """One step of the optimiser; a client that has no step left does not change."""
        lr = self._lr(step) if self.recipe.lr_every == "step" else self.lr
        if not step.may_be_idle:
            optimizer.step(weights, gradients, lr)
        elif not optimizer.copies:
            optimizer.step(weights, gradients, self._active(step).to(weights[0].dtype) * lr)
        else:
            changing = [*weights, *chain.from_iterable(optimizer.state)]
            before, active = [tensor.clone() for tensor in changing], self._active(step)
            optimizer.step(weights, gradients, lr)
            for after, old in zip(changing, before, strict=True):
                after.copy_(torch.where(active, after, old))

    def _losses(self, w: Weights, batch: Batch, train: bool) -> Tensor:
        """(B,) the losses that the recipe defines."""
        heads = tuple(head.to(self._network.like.dtype) for head in self._heads(w, batch.x, train))
        return self._example_loss(heads, batch, self._teacher_logits(batch.x) if train else None)

    def _mean(self, w: Weights, batch: Batch) -> Tensor:
        losses = self._losses(w, batch, train=True)
        if batch.mask is None:
            return losses.mean()
        return torch.where(batch.mask, losses, 0).sum() / batch.mask.sum().clamp(min=1)

    def _batches(self, schedule: int | None = None) -> Iterator[tuple[Step, Batch]]:
        try:
            for step in self._cohort.steps(schedule):
                batch = self._client_batch(step, augmented=True)
                self._layers.counts = self.draws.counts = step.counts if step.padded else None
                self._layers.mask = batch.mask
                yield step, batch
        finally:
            self._layers.counts = self._layers.mask = self.draws.counts = None

    def _client_batch(self, step: Step, augmented: bool) -> Batch:
        stacked = self._cohort.batch(step, augmented)._asdict()
        return Batch(**{n: per_client_row(self._client_index, t) for n, t in stacked.items() if t is not None})

    def _differentiated(self, loss: Callable[[W, Batch], Tensor], w: W, batch: Batch) -> tuple[W, Tensor, State]:
        """The gradient, () the loss, and the statistics and counters after a training pass at `w`."""
        before = self._statistics

        def value(w: W) -> tuple[Tensor, State]:
            self._at, self._statistics = w, {name: value.clone() for name, value in before.items()}
            return loss(w, batch), self._statistics

        try:
            g, (f, moved) = grad_and_value(value, has_aux=True)(w)
        finally:
            self._at, self._statistics = None, before
        return g, f, moved

    def _statistics_after(self, step: Step, moved: State) -> State:
        """Statistics and counters after a step; counters are equal for all clients that take it."""
        if not step.may_be_idle:
            return moved
        active, names = self._active(step), self._network.task.handling
        return moved | {name: torch.where(active, moved[name], self._statistics[name]) for name in names}

    def _heads(self, w: Weights, x: Tensor, train: bool) -> tuple[Tensor, ...]:
        statistics = self._statistics
        if train and w is not self._at:
            statistics = {name: value.clone() for name, value in statistics.items()}
        if w is not self._at:
            statistics = statistics | self._power_vectors(w)
        with self._compute_mode():
            return self._network(self.layout.split(w) if isinstance(w, Tensor) else w, statistics, x, train)

    def _teacher_logits(self, x: Tensor) -> Tensor | None:
        """(B, classes) the teacher's logits, if there is a teacher."""
        distillation, network = self.recipe.distillation, self._network
        if distillation is None or (distillation.teacher == "global" and self._start is None):
            return None
        with torch.no_grad(), self._compute_mode():
            if self._start is None:
                return cast(Tensor, cast(nn.Module, network.teacher)(x.to(network.like.dtype)))
            start, buffers = self._start
            statistics = self._statistics | network.task.buffer_layout.split(buffers) | self._power_vectors(start)
            return network(self.layout.split(start), statistics, x, train=False)[0]

    def _power_vectors(self, w: Weights) -> State:
        """The vectors of spectral norms at the weights `w`, for a training pass to update."""
        if not self._network.power_vectors.names:
            return {}
        found = self._network.power_vectors.at(self.layout.split(w) if isinstance(w, Tensor) else w)
        return {name: self._of_each_client(vector) for name, vector in found.items()}

    def _of_each_client(self, value: Tensor) -> Tensor:
        """The value as a tensor of which each client has its own, that it may write to."""
        return torch.where(self._client_index >= 0, value, value)

    @contextmanager
    def _compute_mode(self) -> Iterator[None]:
        dtype = AUTOCAST.get(self.recipe.precision)
        device = self._network.device.type
        with self._layers, torch.autocast(device, dtype, cache_enabled=False) if dtype else nullcontext():
            yield

    def _own_value(self, name: str, schedule: int | None = None, step: int | None = None) -> Tensor:
        return per_client_value(self._client_index, lambda: self._cohort.tensor(name, schedule, step))

    def _lr(self, step: Step) -> Rate:
        return self._rate(self._cohort.lr(step.number), "step_lr", step)

    def _count(self, step: Step) -> Rate:
        return self._rate(step.counts, "counts", step)

    def _active(self, step: Step) -> Tensor:
        """() whether the client has this step."""
        return self._own_value("counts", step.schedule, step.number) > 0

    def _rate(self, numbers: Sequence[float], name: str, step: Step | None = None) -> Rate:
        """A number if it is equal for all clients, or else a tensor with a value for each client."""
        if len(set(numbers)) == 1 and not self._cohort.static_shapes:
            return numbers[0]
        return self._own_value(name, step.schedule, step.number) if step else self._own_value(name)

    def _record(self, total: Tensor, examples: Tensor | float, steps: Tensor | float) -> None:
        """Add to the sums over all mini-batch gradients, as `ClientObjective` does."""
        for name, value in {"loss": total, "examples": examples, "steps": steps}.items():
            self._metrics[name] = self._metrics.get(name, torch.zeros_like(total, dtype=torch.double)) + value
