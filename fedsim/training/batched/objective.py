"""F_k inside a `torch.func.vmap` over clients; `fedsim.training.local` is the same for a single client.

`Cohort` prepares the values that differ from client to client and are known before training, such as rows, sizes
and learning rates; each client gets its own row of them.

Shapes: C clients, K steps of the longest of them, B examples of the largest batch among them, P, Q.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from fedsim.training.batched.cohort import ALL_EXAMPLES, IN_ORDER, Cohort, Step
from fedsim.training.batched.layers import BatchedDraws, BatchedLayers, ConvMethod, Padding, RaggedError
from fedsim.training.batched.optim import VmapOps
from fedsim.training.batched.per_client import per_client_row, per_client_value
from fedsim.training.buffers import COUNTER, PowerVectors
from fedsim.training.draws import KeyedDraws
from fedsim.training.example_loss import ExampleLoss
from fedsim.training.head import head_input
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
)
from fedsim.training.optim import Optimizer, Rate, clipped
from fedsim.training.part import part_of
from fedsim.training.precision import AUTOCAST
from fedsim.training.probe import heads
from fedsim.training.replica import depthwise, in_own_precision
from fedsim.training.task import Task
from fedsim.types import Batch, State, Stream


class Network:
    """One thread's copy of the network, as a function of weights, statistics and counters."""

    def __init__(self, task: Task, device: torch.device, conv: ConvMethod):
        self.task, self.device, self.conv = task, device, conv
        self.draws = task.draws  # whether a client draws random numbers, in the network or in the strategy
        self.streams = set[tuple[Stream, tuple[str, ...]]]()  # from which clients have drawn, or may draw
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

    def head_input(self) -> AbstractContextManager[list[Tensor]]:
        """A list that gets the input of the network's head in each pass meanwhile. Raises ConfigError."""
        return head_input(self.network, self.task.head)


Weights = Tensor | State  # a model, (P,) or by name
W = TypeVar("W", Tensor, State)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


@dataclass
class Model:
    """What one of the client's models has for itself, by `separate`."""

    path: tuple[str, ...]  # names, in the key of its random numbers
    statistics: State  # and counters, by name
    layers: BatchedLayers
    draws: list[KeyedDraws]  # of the strategy's code
    metrics: State
    noise: BatchedDraws | None = None  # for `normal` and `uniform`
    at: Weights | None = None  # the iterate; a training pass there updates statistics
    step: "GivenStep | None" = None
    start: tuple[Tensor, Tensor] | None = None  # (P,) and (Q,), if the start model is the teacher
    names: set[str] = field(default_factory=set)  # of the models separated from it


@dataclass
class GivenStep:
    """A step whose gradient the strategy gives: its iterate (P,), and the clients' generators at its beginning."""

    at: Tensor
    after: State  # the statistics after a pass at the iterate
    draws: list[Tensor] | None = None  # before the first gradient; the others have the same random numbers


class BatchedObjective(LocalObjective):
    """One client in one round, inside a `vmap` over clients; `client_index` () is its place in the cohort."""

    def __init__(
        self,
        network: Network,
        cohort: Cohort,
        client_index: Tensor,
        buffers: Tensor,
        private_buffers: State,
        path: tuple[str, ...] = (),
    ):
        self._cohort, self._client_index, self._network = cohort, client_index, network
        self.recipe, self.layout = cohort.recipe, network.task.layout
        self.client_id, self.num_examples = self._own_value("clients"), self._own_value("num_examples")
        self.round, self.num_steps = self._own_value("rounds"), self._own_value("num_steps")
        self.lr = self._rate(cohort.lr(), "lr")
        weights = self._own_value("class_weights") if self.recipe.class_weights else None
        self._example_loss = ExampleLoss(self.recipe, network.task, weights)
        self._received, self._padding = (buffers, private_buffers), Padding()
        self._change: BatchMap | None = None
        # Of `separate`:
        self._epochs: int | None = None
        self._constant_lr = False
        self._model = self._first_model(path, buffers, {})
        self.draws = self._draws_from(self._model.draws)  # those of the model in use

    def _first_model(self, path: tuple[str, ...], buffers: Tensor, metrics: State) -> Model:
        network, private = self._network, self._received[1]
        layout = network.task.buffer_layout
        others = {name: self._of_each_client(b) for name, b in (network.others | private).items()}
        statistics = layout.split(self._of_each_client(buffers)) | others | network.counters
        generators = self._generators(Stream.NETWORK, path)
        layers = BatchedLayers(self._client_index, generators, self._padding, network.conv)
        return Model(path, statistics, layers, list(map(KeyedDraws, generators)), metrics)

    def _generators(self, stream: Stream, path: tuple[str, ...]) -> list[torch.Generator]:
        self._network.streams.add((stream, path))
        return self._cohort.generators(stream, path)

    def _draws_from(self, draws: list[KeyedDraws]) -> BatchedDraws:
        return BatchedDraws(self._client_index, draws, self._padding, (sum(self.layout.sizes),))

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The strategy's code draws the random numbers of this model meanwhile."""
        others, self.draws.draws = self.draws.draws, self._model.draws
        try:
            yield
        finally:
            self.draws.draws = others

    @property
    def metrics(self) -> State:
        return self._model.metrics

    @property
    def cohort(self) -> Tensor:
        return self._own_value("asked")

    @property
    def buffers(self) -> Tensor:
        found = self._model.statistics
        parts = [found[name].reshape(-1) for name in self._network.task.buffer_layout.shapes]
        return torch.cat(parts) if parts else self._network.like.new_zeros(0)

    @property
    def private_buffers(self) -> State:
        return {name: self._model.statistics[name].clone() for name in self._network.task.initial_of("private")}

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        for step, batch in self._batches(epochs or self._epochs):
            if step.padded:
                raise RaggedError
            yield batch

    def with_batches(self, change: BatchMap) -> LocalObjective:
        other = copy.copy(self)
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
        start = checked_separate(name, self._model.names, buffers, self._received[0], epochs, lr)
        other = copy.copy(self)
        if epochs:
            other.recipe, other._epochs = replace(self.recipe, epochs=epochs, steps=None), epochs
            other.num_steps = self._own_value("num_steps", epochs)
        if lr is not None:
            other.lr, other._constant_lr = lr, True
        other._model = self._first_model((*self._model.path, name), start, self.metrics if record else {})
        return other

    def logits(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> Tensor:
        return self._heads(w, x, w.requires_grad if train is None else train)[0]

    def features(self, w: Tensor, x: Tensor, *, train: bool | None = None) -> tuple[Tensor, Tensor]:
        self._refuse_padding()
        with self._network.head_input() as found:
            logits = self.logits(w, x, train=train)
        return found[0].to(w.dtype), logits

    def loss(self, w: Tensor, batch: Batch | None = None) -> Tensor:
        if batch is not None:
            return self._mean(w, batch)
        total = self._network.like.new_zeros(())
        with torch.no_grad(), self._in_use():
            for step in self._cohort.steps(IN_ORDER):
                part = self._client_batch(step, augmented=False)
                losses = self._losses(w, part, train=False)
                total = total + (losses if part.mask is None else torch.where(part.mask, losses, 0)).sum()
        return (total / self.num_examples).to(total.dtype)

    def losses(self, w: Tensor, batch: Batch, *, train: bool | None = None) -> Tensor:
        self._refuse_padding()
        return self._losses(w, batch, w.requires_grad if train is None else train)

    def label_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        self._refuse_padding()
        return self._example_loss.of_labels(logits.to(self._network.like.dtype), batch)

    def normal(self, like: Tensor) -> Tensor:
        with self._noise:
            return torch.randn_like(like)

    def uniform(self, like: Tensor) -> Tensor:
        with self._noise:
            return torch.rand_like(like)

    @property
    def _noise(self) -> BatchedDraws:
        self._network.draws, model = True, self._model  # a captured graph must know
        if model.noise is None:
            generators = self._generators(Stream.STRATEGY, model.path)
            model.noise = self._draws_from(list(map(KeyedDraws, generators)))
        return model.noise

    def _refuse_padding(self) -> None:
        """Raise RaggedError where a value for each example would be one for padding, too."""
        if self._padding.counts:
            raise RaggedError

    def gradient(self, w: Tensor, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        with self._in_use():
            if step := self._model.step:
                return self._gradient_in_step(step, w, batch)
            g, f, total, examples, steps = self._gradient_at(w, batch)
        self._record(total, examples, steps)
        return g, f

    def _gradient_in_step(self, step: GivenStep, w: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """As `ClientObjective` does."""
        model, generators = self._model, self._model.layers.generators if self._network.task.draws else []
        now, before = [generator.get_state() for generator in generators], model.statistics
        if step.draws is None:
            step.draws = now
        else:
            _set_states(generators, step.draws)
        g, f, *_ = self._gradient_at(w, batch)
        if w is step.at and batch is not None:
            step.after = model.statistics
        model.statistics = before
        if now is not step.draws:
            _set_states(generators, now)
        return g, f

    def _gradient_at(
        self, w: Tensor, batch: Batch | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | float, Tensor | float]:
        """(P,) the gradient, () the loss, the sum of the losses, and how many examples and batches."""
        model = self._model
        model.statistics = model.statistics | self._power_vectors(w)
        if batch is not None:
            g, f, model.statistics = self._differentiated(self.loss, w, batch)
            return g, f, f.double() * len(batch.y), len(batch.y), 1
        g_k, total, steps = torch.zeros_like(w), w.new_zeros((), dtype=torch.double), w.new_zeros(())
        for step, part in self._batches(ALL_EXAMPLES):
            g, f, moved = self._differentiated(self.loss, w, part)
            n = self._count(step)
            g_k, total = g_k + g * n, total + f.double() * n
            model.statistics = self._statistics_after(step, moved)
            steps = steps + (n > 0)
        n_k = self.num_examples
        return (g_k / n_k).to(w.dtype), (total / n_k).to(w.dtype), total, n_k, steps

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
        with self._in_use():
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
        recipe, model, total = self.recipe, self._model, start.new_zeros((), dtype=torch.double)
        examples = torch.zeros_like(total)
        if recipe.distillation and recipe.distillation.teacher == "global":
            model.start = start, self.buffers
        model.statistics = model.statistics | self._power_vectors(start)
        part = None if only is None else part_of(only, self._network.task, self._network.device)
        before = model.statistics
        optimizer, names = recipe.make_optimizer(self.layout, VmapOps()), list(self.layout.shapes)
        flat_gradient = bool(loss or gradient or correct or after_step)  # these need the flat vector (P,)
        split = recipe.by_layer or gradient is not None
        w, pieces, shared = start, list(self.layout.split(start).values()), True
        for step, batch in self._batches(self._epochs):
            if flat_gradient:
                if gradient:
                    g, f, moved = self._given(gradient, w, batch)
                else:
                    g, f, moved = self._differentiated(loss or self.loss, w, batch)
                g = correct(g, w) if correct else g
                g = part.of(g, torch.zeros_like(g)) if part else g
                gradients = list(self.layout.split(g).values()) if split else [g]
            else:
                by_name = dict(zip(names, pieces, strict=True))
                fixed = {n: v for n, v in by_name.items() if part and n not in part.parameters}
                parts, f, moved = self._differentiated(self._mean, by_name, batch, fixed)
                gradients = [parts[n] if n in parts else torch.zeros_like(v) for n, v in by_name.items()]
                if part:
                    entries = self.layout.split(part.entries).values()
                    gradients = [torch.where(e, g, 0) for e, g in zip(entries, gradients, strict=True)]
            if shared:  # from here on each client has its own weights, updated in place
                w, shared = self._of_each_client(start), False
                pieces = [w] if flat_gradient and not split else list(self.layout.split(w).values())
                optimizer.begin(pieces)
            if recipe.clip_norm:
                gradients = clipped(gradients, recipe.clip_norm, optimizer.ops)
            self._step(optimizer, pieces, gradients, step)
            n = self._count(step)
            total, examples = total + f.double() * n, examples + n
            if after_step:
                self._replaced(w, checked_vector(after_step(w), w, "after_step"), step)
            if part:
                w.copy_(part.of(w, start))
                moved = moved | part.of_buffers(
                    {name: moved[name] for name in self._network.task.handling}, before
                )
            model.statistics = self._statistics_after(step, moved)
        self._record(total, examples, self.num_steps)
        return w

    def _step(self, optimizer: Optimizer, weights: list[Tensor], gradients: list[Tensor], step: Step) -> None:
        """One step of the optimiser; a client that has no step left does not change."""
        lr = self._lr(step) if self.recipe.lr_every == "step" and not self._constant_lr else self.lr
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

    def _replaced(self, w: Tensor, by: Tensor, step: Step) -> None:
        """Replace the weights (P,) of the clients that have this step."""
        w.copy_(torch.where(self._active(step), by, w) if step.may_be_idle else by)

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
        padding = self._padding
        outer = padding.counts, padding.mask
        try:
            for step in self._cohort.steps(schedule):
                batch = self._client_batch(step, augmented=True)
                padding.counts, padding.mask = step.counts if step.padded else None, batch.mask
                yield step, batch
        finally:
            padding.counts, padding.mask = outer

    def _client_batch(self, step: Step, augmented: bool) -> Batch:
        stacked = self._cohort.batch(step, augmented)._asdict()
        own = Batch(**{n: per_client_row(self._client_index, t) for n, t in stacked.items() if t is not None})
        return self._change(own) if self._change else own

    def _differentiated(
        self,
        loss: Callable[[W, Batch], Tensor],
        w: W,
        batch: Batch,
        fixed: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> tuple[W, Tensor, State]:
        """The gradient, () the loss, and the statistics and counters after a training pass at `w`.

        There is none for the tensors that are `fixed`, if `w` is by name.
        """
        before = self._model.statistics

        def value(w: W) -> tuple[Tensor, State]:
            at = {**fixed, **w} if isinstance(w, dict) else w
            self._model.at, self._model.statistics = at, {name: value.clone() for name, value in before.items()}
            return loss(at, batch), self._model.statistics

        moving = {n: v for n, v in w.items() if n not in fixed} if isinstance(w, dict) else w
        try:
            g, (f, moved) = grad_and_value(value, has_aux=True)(moving)
        finally:
            self._model.at, self._model.statistics = None, before
        return g, f, moved

    def _given(self, gradient: Gradient, w: Tensor, batch: Batch) -> tuple[Tensor, Tensor, State]:
        """What a strategy's `gradient` gives, and the statistics and counters after it."""
        step = self._model.step = GivenStep(w, self._model.statistics)
        try:
            g, f = checked_gradient(gradient(w, batch), w)
        finally:
            self._model.step = None
        return g, f, step.after

    def _statistics_after(self, step: Step, moved: State) -> State:
        """Statistics and counters after a step; counters are equal for all clients that take it."""
        if not step.may_be_idle:
            return moved
        active, names = self._active(step), self._network.task.handling
        return moved | {name: torch.where(active, moved[name], self._model.statistics[name]) for name in names}

    def _heads(self, w: Weights, x: Tensor, train: bool) -> tuple[Tensor, ...]:
        statistics = self._model.statistics
        if train and w is not self._model.at:
            statistics = {name: value.clone() for name, value in statistics.items()}
        if w is not self._model.at:
            statistics = statistics | self._power_vectors(w)
        with self._compute_mode():
            return self._network(self.layout.split(w) if isinstance(w, Tensor) else w, statistics, x, train)

    def _teacher_logits(self, x: Tensor) -> Tensor | None:
        """(B, classes) the teacher's logits, if there is a teacher."""
        distillation, network = self.recipe.distillation, self._network
        if distillation is None or (distillation.teacher == "global" and self._model.start is None):
            return None
        with torch.no_grad(), self._compute_mode():
            if self._model.start is None:
                return cast(Tensor, cast(nn.Module, network.teacher)(x.to(network.like.dtype)))
            start, buffers = self._model.start
            statistics = (
                self._model.statistics | network.task.buffer_layout.split(buffers) | self._power_vectors(start)
            )
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
        with self._model.layers, torch.autocast(device, dtype, cache_enabled=False) if dtype else nullcontext():
            yield

    def _own_value(self, name: str, schedule: int | None = None, step: int | None = None) -> Tensor:
        return per_client_value(self._client_index, lambda: self._cohort.tensor(name, schedule, step))

    def _lr(self, step: Step) -> Rate:
        return self._rate(self._cohort.lr(step.number, step.schedule), "step_lr", step)

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
        metrics, zero = self._model.metrics, torch.zeros_like(total, dtype=torch.double)
        for name, value in {"loss": total, "examples": examples, "steps": steps}.items():
            metrics[name] = metrics.get(name, zero) + value


def _set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
