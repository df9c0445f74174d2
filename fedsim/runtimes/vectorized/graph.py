"""A chunk's whole work as one CUDA graph: recorded once for a form of cohort, replayed for others of that form.

Nothing in it waits for the host or branches on a tensor, so what differs from chunk to chunk is what lies in the
tensors that go in, and the seeds. Not yet seen to run on a GPU.
"""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fedsim.data import FederatedData
from fedsim.errors import one_line
from fedsim.federated.client import Train
from fedsim.runtimes.vectorized.compute import Client, Computed, compute, inputs, members
from fedsim.training.batched.cohort import Cohort
from fedsim.training.batched.objective import Network
from fedsim.training.graphs import CAPTURING
from fedsim.types import State, Update

MAX_GRAPHS = 8  # of a worker: each holds what its chunk computed


def capturable(data: FederatedData, work: Train) -> bool:
    """Whether all of a chunk happens on the device: no augmentation, no images from the host."""
    return not (work.recipe.augment or data.mapped)


class Graphs:
    """One worker's graphs. A form is recorded when it comes for the second time."""

    def __init__(self, network: Network, data: FederatedData):
        self.network, self.data = network, data
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, Captured] = {}
        self.usable = True

    def __call__(self, batch: Sequence[Client]) -> list[Update]:
        """What `updates` gives."""
        work, cohort = batch[0].work, self._cohort(batch)
        given = inputs(batch, self.network.device)
        key = repr((work.strategy, replace(work.recipe, lr=1.0))), tuple(map(tuple, given)), cohort.form()
        if key not in self.captured and key in self.seen and self._may_capture(cohort):
            try:
                self.captured[key] = Captured(self.network, work, cohort, self._pool(), *given)
            except (RuntimeError, AssertionError) as error:
                self.usable, cohort = False, self._cohort(batch)
                warnings.warn(f"runtime.graphs: off, for {one_line(error)}", RuntimeWarning, stacklevel=2)
        self.seen.add(key)
        if key in self.captured and self.captured[key].takes(cohort):
            return self.captured[key](cohort, *given).rows()
        return compute(self.network, work, cohort, *given).rows()

    def _cohort(self, batch: Sequence[Client]) -> Cohort:
        return Cohort(self.data, members(batch), self.network.like, fixed=True)

    def _may_capture(self, cohort: Cohort) -> bool:
        """Of padded batches, a network draws for as many examples as each client has, which the host counts."""
        counted = self.network.task.draws and any(step.padded for step in cohort.steps())
        return self.usable and not counted and len(self.captured) < MAX_GRAPHS

    def _pool(self) -> Any:
        """Memory that the graphs share: they run one after the other, and what they compute is copied at once."""
        return next((captured.graph.pool() for captured in self.captured.values()), None)


class Captured:
    """A graph and its own copies of what goes in. Raises RuntimeError where it does not repeat eager execution."""

    def __init__(self, network: Network, work: Train, cohort: Cohort, pool: Any, *given: State):
        self.cohort, self.given = cohort, [{n: t.clone() for n, t in state.items()} for state in given]
        expected = compute(network, work, cohort, *self.given)  # which also makes the cohort's tensors
        self.graph, self.computed = record(network, work, cohort, pool, *self.given)
        pairs = zip(tree_leaves(expected), tree_leaves(self(cohort, *given)), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise RuntimeError("a replay differs from eager execution")

    def takes(self, cohort: Cohort) -> bool:
        """Whether it was recorded with the form of all that it asks of a cohort."""
        schedules = {schedule for _, schedule in self.cohort.tensors}
        return self.cohort.form(schedules) == cohort.form(schedules)

    def __call__(self, cohort: Cohort, *given: State) -> Computed:
        """What `compute` gives for another cohort; copies."""
        for mine, theirs in zip(self.given, given, strict=True):
            for name, tensor in theirs.items():
                mine[name].copy_(tensor, non_blocking=True)
        self.cohort.take_over(cohort)
        self.graph.replay()
        copies: Computed = tree_map(torch.clone, self.computed)
        return copies


def record(
    network: Network, work: Train, cohort: Cohort, pool: Any, *given: State
) -> tuple[torch.cuda.CUDAGraph, Computed]:
    """What `compute` does as a graph, and where it leaves the results.

    On the worker's own stream: a side stream comes from a pool of 32, and may be another worker's.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(network.device)
    if network.task.draws:
        for generator in cohort.generators:
            graph.register_generator_state(generator)
    with CAPTURING, torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        computed = compute(network, work, cohort, *given)
    return graph, computed
