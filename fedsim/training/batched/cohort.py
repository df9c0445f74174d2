"""The inputs of C clients that are known before they compute: batches, learning rates, random streams.

All of them are made on the host, from (seed, round, client), and copied to the device as named, stacked tensors,
so that a captured CUDA graph can be replayed with the inputs of another cohort.

Shapes: C clients, K steps of the longest of them, B examples of the largest batch among them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.training.example_loss import batch_rows
from fedsim.training.losses import class_weights
from fedsim.training.objective import exact, key_of
from fedsim.training.recipe import Recipe
from fedsim.types import Batch, Job, Stream, random

# Schedules besides a number of epochs, and None for the round:
IN_ORDER = 0  # all examples in order
ALL_EXAMPLES = -1  # the first epoch, with the examples that `drop_last` leaves out


class ClientJob(NamedTuple):
    """One client of the cohort. Recipes differ at most in the learning rate."""

    recipe: Recipe
    seed: int
    job: Job
    asked: Sequence[int] = ()  # ids of the clients of its round


class Step(NamedTuple):
    """One mini-batch of each client, padded to the size of the largest with repeated rows of the client."""

    schedule: int | None
    number: int
    size: int  # B
    counts: list[int]  # (C,) how many rows are not padding; 0 for a client that has no step left
    padded: bool  # whether some rows may be padding
    may_be_idle: bool  # whether some clients may have no step left


class Cohort:
    """C clients. With `static_shapes`, shapes and the host's branches depend on little more than C, K and B.

    Tensors get the type and the device of `like`.
    """

    def __init__(
        self,
        data: FederatedData,
        client_jobs: Sequence[ClientJob],
        like: Tensor,
        *,
        static_shapes: bool = False,
    ):
        self.data, self.client_jobs, self.like, self.static_shapes = data, client_jobs, like, static_shapes
        self.device, self.recipe = like.device, client_jobs[0].recipe
        self.rows = [data.rows(m.job.client_id) for m in client_jobs]
        self.sizes = [len(rows) for rows in self.rows]
        self._generators: dict[tuple[Stream, tuple[str, ...]], list[torch.Generator]] = {}
        self.tensors: dict[tuple[str, int | None], Tensor] = {}  # on the device, by name and schedule
        self._schedules: dict[int | None, list[list[Tensor]]] = {}  # by client and step, (b,) rows
        self._steps: dict[int | None, list[Step]] = {}
        self._num_steps: dict[int | None, list[int]] = {}

    def generators(self, stream: Stream, path: tuple[str, ...] = ()) -> list[torch.Generator]:
        """The generator of each client for a stream, of the model with this path of names."""
        key = stream, path
        if key not in self._generators:
            names = [key_of(name) for name in path]
            self._generators[key] = [
                torch.Generator(self.device).manual_seed(int(self._random(m, stream, *names).integers(2**63)))
                for m in self.client_jobs
            ]
        return self._generators[key]

    @property
    def all_generators(self) -> list[torch.Generator]:
        """All that were used so far."""
        return [generator for own in self._generators.values() for generator in own]

    def tensor(self, name: str, schedule: int | None = None, step: int | None = None) -> Tensor:
        """(C, ...) on the device, made at the first call; with `step`, the part for this step."""
        key = name, schedule
        if key not in self.tensors:
            self.tensors[key] = self.host_tensor(*key).to(self.device, non_blocking=True)
        return self.tensors[key] if step is None else self.tensors[key][step]

    def host_tensor(self, name: str, schedule: int | None = None) -> Tensor:
        """The same on the host: (C, ...), or (K, C, ...) for values that differ from step to step."""
        if name == "rows":
            return self._rows(schedule)
        if name == "mask":
            counts = torch.tensor([step.counts for step in self.steps(schedule)])
            return torch.arange(int(counts.max())) < counts.unsqueeze(-1)  # (K, C, B)
        if name == "class_weights":
            return self._class_weights()
        if name == "num_examples":
            return exact(self.sizes, self.like)
        if name == "num_steps":
            return exact(self.num_steps(schedule), self.like)
        numbers: dict[str, Callable[[], object]] = {
            "clients": lambda: [m.job.client_id for m in self.client_jobs],
            "asked": lambda: [m.asked for m in self.client_jobs],
            "rounds": lambda: [m.job.round for m in self.client_jobs],
            "counts": lambda: [step.counts for step in self.steps(schedule)],
            "lr": self.lr,
            "step_lr": lambda: [self.lr(step.number, schedule) for step in self.steps(schedule)],
        }
        ids = name in ("clients", "asked")
        return torch.tensor(numbers[name](), dtype=torch.int64 if ids else self.like.dtype)

    def steps(self, schedule: int | None = None) -> list[Step]:
        """The steps of a schedule; their rows are the same as in all other runtimes."""
        if schedule not in self._steps:
            self._steps[schedule] = self._make_steps(schedule)
        return self._steps[schedule]

    def _make_steps(self, schedule: int | None) -> list[Step]:
        own = self._schedule(schedule)
        counts = [[len(rows[k]) if k < len(rows) else 0 for rows in own] for k in range(max(map(len, own)))]
        uneven = any(min(c) < max(c) for c in counts)
        if self.static_shapes and uneven:
            largest, idle = max(map(max, counts)), [0] * len(own)
            counts += [idle] * (rounded_up(len(counts)) - len(counts))
            return [Step(schedule, k, largest, c, True, True) for k, c in enumerate(counts)]
        return [Step(schedule, k, max(c), c, min(c) < max(c), min(c) == 0) for k, c in enumerate(counts)]

    def form(self, schedules: Iterable[int | None] = (None,)) -> tuple[object, ...]:
        """Two cohorts of equal form differ only in the values of their tensors."""
        steps = (s for schedule in schedules for s in self.steps(schedule))
        clients, asked = len(self.client_jobs), len(self.client_jobs[0].asked)
        return clients, asked, *((s.schedule, s.number, s.size, s.padded, s.may_be_idle) for s in steps)

    def copy_from(self, other: "Cohort") -> None:
        """Overwrite all tensors made so far with those of another cohort, and seed the generators as its own."""
        for key, tensor in self.tensors.items():
            tensor.copy_(other.host_tensor(*key), non_blocking=True)
        for source, own in self._generators.items():
            for mine, theirs in zip(own, other.generators(*source), strict=True):
                mine.manual_seed(theirs.initial_seed())

    def batch(self, step: Step, augmented: bool) -> Batch:
        """The batch of a step, (C, B, ...) on the device."""
        augment = self.recipe.augment if augmented else ()
        at = step.schedule, step.number
        mask = self.tensor("mask", *at)[:, : step.size] if step.padded else None
        rows = self.tensor("rows", *at)[:, : step.size]
        if not augment:
            x, y = self.data.batch(rows.flatten())
            return Batch(x.view(*rows.shape, *x.shape[1:]), y.view(rows.shape), mask=mask)
        own = [
            self.data.training_batch(part[: n or 1], augment, self._random(m, Stream.AUGMENT, step.number))
            for m, part, n in zip(self.client_jobs, rows, step.counts, strict=True)
        ]
        fields = {
            name: torch.stack([repeated_to(getattr(one, name), step.size) for one in own])
            for name, value in own[0]._asdict().items()
            if value is not None
        }
        return Batch(**fields, mask=mask)

    def num_steps(self, schedule: int | None = None) -> list[int]:
        """(C,) how many steps the clients take in a schedule: of the round, or of so many epochs."""
        if schedule not in self._num_steps:
            recipe = replace(self.recipe, epochs=schedule, steps=None) if schedule else self.recipe
            self._num_steps[schedule] = [recipe.num_steps(n) for n in self.sizes]
        return self._num_steps[schedule]

    def lr(self, step: int | None = None, schedule: int | None = None) -> list[float]:
        """(C,) the learning rates of the round, or of each client's step number `step` in a schedule."""
        if step is None:
            return [m.recipe.lr_at(m.job.round) for m in self.client_jobs]
        at = zip(self.client_jobs, self.num_steps(schedule), strict=True)
        return [m.recipe.lr_at(m.job.round, min(step, k - 1), k) for m, k in at]

    def _rows(self, schedule: int | None) -> Tensor:
        """(K, C, B) rows. A short batch repeats its rows; a client without steps left repeats its last batch."""
        steps, own = self.steps(schedule), self._schedule(schedule)
        columns, numbers = torch.arange(max(step.size for step in steps)), torch.arange(len(steps))
        places = []
        for parts in own:
            lengths = torch.tensor([len(part) for part in parts])
            at = numbers.clamp(max=len(parts) - 1)
            begins, lengths = (lengths.cumsum(0) - lengths)[at], lengths[at]
            places.append(torch.cat(parts)[begins.unsqueeze(1) + columns % lengths.unsqueeze(1)])
        return torch.stack(places, 1)

    def _schedule(self, schedule: int | None) -> list[list[Tensor]]:
        if schedule not in self._schedules:
            self._schedules[schedule] = [self._client_batches(i, schedule) for i in range(len(self.client_jobs))]
        return self._schedules[schedule]

    def _client_batches(self, place: int, schedule: int | None) -> list[Tensor]:
        client, rows = self.client_jobs[place], self.rows[place]
        if schedule == IN_ORDER:
            return list(torch.split(torch.from_numpy(rows), self.recipe.batch_size_of(len(rows))))
        recipe, stream = self.recipe, self._random(client, Stream.BATCHES)
        if schedule == ALL_EXAMPLES:
            recipe, schedule = recipe.with_all_examples, 1
        return list(batch_rows(self.data, client.job.client_id, recipe, stream, schedule))

    def _random(self, client: ClientJob, stream: Stream, *key: int) -> np.random.Generator:
        return random(client.seed, stream, client.job.round, client.job.client_id, *key)

    def _class_weights(self) -> Tensor:
        given, data = self.recipe.class_weights, self.data
        assert given is not None
        weights = [class_weights(given, data.labels[rows].cpu(), data.num_classes) for rows in self.rows]
        return torch.stack(weights).to(self.like.dtype)


def repeated_to(own: Tensor, size: int) -> Tensor:
    """(size, ...) the rows of `own` (b, ...), repeated as often as needed."""
    return own[:size] if len(own) >= size else own[torch.arange(size, device=own.device) % len(own)]


def rounded_up(steps: int) -> int:
    """`steps`, rounded up to at most three significant binary digits, so that few different numbers occur."""
    unit = 1 << max(steps.bit_length() - 3, 0)
    return -(-steps // unit) * unit
