"""A chunk's whole work as one CUDA graph: recorded once for a form of cohort, replayed for others of that form.

Nothing in it waits for the host or branches on a tensor, so what differs from chunk to chunk is what lies in the
tensors that go in. Not yet seen to run on a GPU.
"""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fedsim.batched import Computed, Network, compute, inputs
from fedsim.batched_cohort import Cohort, Member
from fedsim.data import FederatedData
from fedsim.errors import one_line
from fedsim.task import Task
from fedsim.types import State, Update
from fedsim.work import Train

MOST = 8  # graphs that a worker keeps: each holds the memory of its chunk


def capturable(task: Task, data: FederatedData, work: Train) -> bool:
    """Whether all of a chunk happens on the device: no random numbers in the network, no images from the host."""
    return not (task.draws or work.recipe.augment or data.mapped)


class Graphs:
    """One worker's graphs. A form is recorded when it comes for the second time."""

    def __init__(self, network: Network, data: FederatedData):
        self.network, self.data = network, data
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, Captured] = {}
        self.usable = True

    def __call__(self, members: Sequence[Member]) -> list[Update]:
        """What `updates` gives."""
        work = members[0].work
        cohort = Cohort(self.data, members, self.network.like, fixed=True)
        given = inputs(members, self.network.device)
        key = repr((work.strategy, replace(work.recipe, lr=1.0))), tuple(map(tuple, given)), cohort.form()
        if key not in self.captured and self.usable and key in self.seen and len(self.captured) < MOST:
            try:
                self.captured[key] = Captured(self.network, cohort, *given)
            except (RuntimeError, AssertionError) as error:
                self.usable = False
                warnings.warn(f"runtime.graphs: off, for {one_line(error)}", stacklevel=2)
        self.seen.add(key)
        if key in self.captured and self.captured[key].takes(cohort):
            return self.captured[key](cohort, *given).rows()
        return compute(self.network, cohort, *given).rows()


class Captured:
    """A graph and its own copies of what goes in. Raises RuntimeError where it does not repeat eager execution."""

    def __init__(self, network: Network, cohort: Cohort, *given: State):
        self.cohort, self.given = cohort, [{n: t.clone() for n, t in state.items()} for state in given]
        expected = compute(network, cohort, *self.given)  # which also makes the cohort's tensors
        torch.cuda.synchronize(network.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.computed = compute(network, cohort, *self.given)
        self.graph.replay()
        pairs = zip(tree_leaves(expected), tree_leaves(self.computed), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise RuntimeError("a replay differs from eager execution")

    def takes(self, cohort: Cohort) -> bool:
        """Whether it was recorded with the form of all that it asks of a cohort."""
        schedules = {schedule for _, schedule, _ in self.cohort.tensors}
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
