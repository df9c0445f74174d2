"""The training of a chunk as one CUDA graph: captured once for each form of cohort, then replayed.

The computation neither waits for the host nor branches on a tensor, so chunks of one form differ only in their
input tensors and seeds. Not yet tested on a GPU.
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
from fedsim.runtimes.vectorized.compute import Client, Computed, client_jobs, compute, inputs
from fedsim.training.batched.cohort import Cohort
from fedsim.training.batched.objective import Network
from fedsim.training.graphs import CAPTURING
from fedsim.types import State, Update

MAX_GRAPHS = 8  # of a worker; each keeps the results of its chunk in memory


def capturable(data: FederatedData, work: Train) -> bool:
    """Whether a chunk is computed on the device alone: without augmentation and without images on the host."""
    return not (work.recipe.augment or data.mapped)


class Graphs:
    """The graphs of one worker. A form of cohort is captured when it occurs for the second time."""

    def __init__(self, network: Network, data: FederatedData):
        self.network, self.data = network, data
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, CapturedGraph] = {}
        self.usable = True

    def __call__(self, batch: Sequence[Client]) -> list[Update]:
        """The same as `updates`."""
        work, cohort = batch[0].work, self._cohort(batch)
        tensors = inputs(batch, self.network.device)
        key = repr((work.strategy, replace(work.recipe, lr=1.0))), tuple(map(tuple, tensors)), cohort.form()
        if key not in self.graphs and key in self.seen and self._may_capture(cohort):
            try:
                self.graphs[key] = CapturedGraph(self.network, work, cohort, self._pool(), *tensors)
            except (RuntimeError, AssertionError) as error:
                self.usable, cohort = False, self._cohort(batch)
                warnings.warn(
                    f"runtime.graphs: off after an error: {one_line(error)}", RuntimeWarning, stacklevel=2
                )
        self.seen.add(key)
        if key in self.graphs and self.graphs[key].fits(cohort):
            return self.graphs[key](cohort, *tensors).rows()
        return compute(self.network, work, cohort, *tensors).rows()

    def _cohort(self, batch: Sequence[Client]) -> Cohort:
        return Cohort(self.data, client_jobs(batch), self.network.like, static_shapes=True)

    def _may_capture(self, cohort: Cohort) -> bool:
        """Not with random draws for padded batches: the host decides how many numbers each client draws.

        Nor with spectral norms: the host waits for the eigenvalues of their weights.
        """
        counted = self.network.draws and any(step.padded for step in cohort.steps())
        waits = bool(self.network.power_vectors.names)
        return self.usable and not (counted or waits) and len(self.graphs) < MAX_GRAPHS

    def _pool(self) -> Any:
        """The memory pool that all graphs share: they run one at a time, and their results are copied at once."""
        return next((captured.graph.pool() for captured in self.graphs.values()), None)


class CapturedGraph:
    """A graph with copies of its inputs. Raises RuntimeError if a replay differs from eager execution."""

    def __init__(self, network: Network, work: Train, cohort: Cohort, pool: Any, *tensors: State):
        self.cohort, self.tensors = cohort, [{n: t.clone() for n, t in state.items()} for state in tensors]
        expected = compute(network, work, cohort, *self.tensors)  # which also makes the cohort's tensors
        self.graph, self.computed = record(network, work, cohort, pool, *self.tensors)
        pairs = zip(tree_leaves(expected), tree_leaves(self(cohort, *tensors)), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise RuntimeError("a replay differs from eager execution")

    def fits(self, cohort: Cohort) -> bool:
        """Whether all schedules that the graph uses have the same form in this cohort."""
        schedules = {schedule for _, schedule in self.cohort.tensors}
        return self.cohort.form(schedules) == cohort.form(schedules)

    def __call__(self, cohort: Cohort, *tensors: State) -> Computed:
        """The results of `compute` for another cohort, as copies."""
        for mine, theirs in zip(self.tensors, tensors, strict=True):
            for name, tensor in theirs.items():
                mine[name].copy_(tensor, non_blocking=True)
        self.cohort.copy_from(cohort)
        self.graph.replay()
        copies: Computed = tree_map(torch.clone, self.computed)
        return copies


def record(
    network: Network, work: Train, cohort: Cohort, pool: Any, *tensors: State
) -> tuple[torch.cuda.CUDAGraph, Computed]:
    """Capture `compute` as a graph; returns it and the tensors into which it writes the results.

    It uses the worker's own stream: torch has 32 side streams, which workers may have to share.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(network.device)
    if network.draws:
        for source in network.streams:
            cohort.generators(*source)
        for generator in cohort.all_generators:
            graph.register_generator_state(generator)
    with CAPTURING, torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        computed = compute(network, work, cohort, *tensors)
    return graph, computed
