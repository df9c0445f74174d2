"""What is known of C clients before they compute: their mini-batches, learning rates and random streams.

All of it is made on the host, from (seed, round, client), and reaches the device as stacked tensors with a name
each, so that a captured CUDA graph can be given another cohort's.

Shapes: C clients, K steps of the longest of them, B examples of the largest batch among them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.training.example_loss import batch_rows
from fedsim.training.losses import class_weights
from fedsim.training.recipe import Recipe
from fedsim.types import Batch, Job, Stream, random

IN_ORDER = 0  # the schedule of all examples as they lie; others are so many epochs, or None for the round


class Member(NamedTuple):
    """One client of the batch. Recipes differ at most in the learning rate."""

    recipe: Recipe
    seed: int
    job: Job


class Step(NamedTuple):
    """One mini-batch of each client, filled up with rows of its own to as many as the largest has."""

    schedule: int | None
    number: int
    size: int  # B
    counts: list[int]  # (C,) how many rows count; none of a client that sits the step out
    padded: bool  # whether some rows may only fill up
    waits: bool  # whether some clients may sit it out


class Cohort:
    """C clients. With `fixed`, what the host branches on depends on little but C, K and B."""

    def __init__(
        self,
        data: FederatedData,
        members: Sequence[Member],
        like: Tensor,
        *,
        fixed: bool = False,
    ):
        self.data, self.members, self.like, self.fixed = data, members, like, fixed
        self.device, self.recipe = like.device, members[0].recipe
        self.rows = [data.rows(m.job.client_id) for m in members]
        self.sizes = [len(rows) for rows in self.rows]
        self.num_steps = [self.recipe.num_steps(n) for n in self.sizes]
        self.generators = [
            torch.Generator(self.device).manual_seed(int(self._random(m, Stream.NETWORK).integers(2**63)))
            for m in members
        ]
        self.tensors: dict[tuple[str, int | None], Tensor] = {}  # on the device, by name and schedule
        self._schedules: dict[int | None, list[list[Tensor]]] = {}  # by client and step, (b,) rows
        self._steps: dict[int | None, list[Step]] = {}

    def tensor(self, name: str, schedule: int | None = None, step: int | None = None) -> Tensor:
        """(C, ...) on the device, made when first asked for; of what there is for each step, that of `step`."""
        key = name, schedule
        if key not in self.tensors:
            self.tensors[key] = self.host(*key).to(self.device, non_blocking=True)
        return self.tensors[key] if step is None else self.tensors[key][step]

    def host(self, name: str, schedule: int | None = None) -> Tensor:
        """On the host: (C, ...), or all steps of the schedule at once, (K, C, ...)."""
        if name == "rows":
            return self._rows(schedule)
        if name == "mask":
            counts = torch.tensor([step.counts for step in self.steps(schedule)])
            return torch.arange(int(counts.max())) < counts.unsqueeze(-1)  # (K, C, B)
        if name == "weights of classes":
            return self._weights_of_classes()
        numbers: dict[str, Callable[[], object]] = {
            "clients": lambda: [m.job.client_id for m in self.members],
            "num_examples": lambda: self.sizes,
            "num_steps": lambda: self.num_steps,
            "counts": lambda: [step.counts for step in self.steps(schedule)],
            "lr": self.lr,
            "lr of step": lambda: [self.lr(step.number) for step in self.steps(schedule)],
        }
        return torch.tensor(numbers[name](), dtype=torch.int64 if name == "clients" else self.like.dtype)

    def steps(self, schedule: int | None = None) -> list[Step]:
        """The round's mini-batches, those of its first epochs, or `IN_ORDER`; the same rows as everywhere."""
        if schedule not in self._steps:
            self._steps[schedule] = self._planned(schedule)
        return self._steps[schedule]

    def _planned(self, schedule: int | None) -> list[Step]:
        own = self._schedule(schedule)
        counts = [[len(rows[k]) if k < len(rows) else 0 for rows in own] for k in range(max(map(len, own)))]
        uneven = any(min(c) < max(c) for c in counts)
        if self.fixed and uneven:
            largest, idle = max(map(max, counts)), [0] * len(own)
            counts += [idle] * (rounded(len(counts)) - len(counts))
            return [Step(schedule, k, largest, c, True, True) for k, c in enumerate(counts)]
        return [Step(schedule, k, max(c), c, min(c) < max(c), min(c) == 0) for k, c in enumerate(counts)]

    def form(self, schedules: Iterable[int | None] = (None,)) -> tuple[object, ...]:
        """What two cohorts have in common whose computations are the same but for tensors."""
        steps = (s for schedule in schedules for s in self.steps(schedule))
        return len(self.members), *((s.schedule, s.number, s.size, s.padded, s.waits) for s in steps)

    def take_over(self, other: "Cohort") -> None:
        """Give the tensors that have been asked for so far, in place, another's numbers; begin its draws."""
        for key, tensor in self.tensors.items():
            tensor.copy_(other.host(*key), non_blocking=True)
        for mine, theirs in zip(self.generators, other.generators, strict=True):
            mine.manual_seed(theirs.initial_seed())

    def batch(self, step: Step, augmented: bool) -> Batch:
        """(C, B, ...) on the device."""
        augment = self.recipe.augment if augmented else ()
        at = step.schedule, step.number
        mask = self.tensor("mask", *at)[:, : step.size] if step.padded else None
        rows = self.tensor("rows", *at)[:, : step.size]
        if not augment:
            x, y = self.data.batch(rows.flatten())
            return Batch(x.view(*rows.shape, *x.shape[1:]), y.view(rows.shape), mask=mask)
        own = [
            self.data.training_batch(part[: n or 1], augment, self._random(m, Stream.AUGMENT, step.number))
            for m, part, n in zip(self.members, rows, step.counts, strict=True)
        ]
        fields = {
            name: torch.stack([filled(getattr(one, name), step.size) for one in own])
            for name, value in own[0]._asdict().items()
            if value is not None
        }
        return Batch(**fields, mask=mask)

    def lr(self, step: int | None = None) -> list[float]:
        """(C,) of the round, or of each client's own `step`-th step."""
        if step is None:
            return [m.recipe.lr_at(m.job.round) for m in self.members]
        at = zip(self.members, self.num_steps, strict=True)
        return [m.recipe.lr_at(m.job.round, min(step, k - 1), k) for m, k in at]

    def _rows(self, schedule: int | None) -> Tensor:
        """(K, C, B) rows; those of a client that are too few over and over, its last ones where it sits out."""
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
            self._schedules[schedule] = [self._own(i, schedule) for i in range(len(self.members))]
        return self._schedules[schedule]

    def _own(self, place: int, schedule: int | None) -> list[Tensor]:
        member, rows = self.members[place], self.rows[place]
        if schedule == IN_ORDER:
            return list(torch.split(torch.from_numpy(rows), self.recipe.batch_size_of(len(rows))))
        stream = self._random(member, Stream.BATCHES)
        return list(batch_rows(self.data, member.job.client_id, self.recipe, stream, schedule))

    def _random(self, member: Member, stream: Stream, *key: int) -> np.random.Generator:
        return random(member.seed, stream, member.job.round, member.job.client_id, *key)

    def _weights_of_classes(self) -> Tensor:
        given, data = self.recipe.class_weights, self.data
        assert given is not None
        weights = [class_weights(given, data.labels[rows].cpu(), data.num_classes) for rows in self.rows]
        return torch.stack(weights).to(self.like.dtype)


def filled(own: Tensor, size: int) -> Tensor:
    """(size, ...) `own` (b, ...), over and over."""
    return own[:size] if len(own) >= size else own[torch.arange(size, device=own.device) % len(own)]


def rounded(steps: int) -> int:
    """Up to a number of at most three binary digits, so that few numbers occur."""
    unit = 1 << max(steps.bit_length() - 3, 0)
    return -(-steps // unit) * unit
