"""A training step as one CUDA graph: the same kernels on the same memory, launched at once.

A small network's step is some fifty kernels of a few microseconds each, and launching them one by one takes longer
than they do (PyTorch, CUDA semantics, "CUDA Graphs"). Nothing of Python runs where a graph does, so only steps
that differ in nothing but their rows are captured, and the first of each graph is taken both ways: where the two
are not equal to the bit, the step stays as it is. Not yet seen to run on a GPU.
"""

import threading
import warnings
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.errors import one_line
from fedsim.training.recipe import Recipe
from fedsim.training.replica import Replica

PAYS = 16  # steps taken before one is captured, which takes about as long as six
WARM_UPS = 1  # in the thread that captures: cuBLAS has a workspace for each thread and stream

CAPTURING = threading.Lock()  # one capture at a time in a process, and meanwhile no memory handed back


class Graph(NamedTuple):
    """A captured step, and where it reads its rows."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor  # (B,)


def steps_of(replica: Replica, data: FederatedData, recipe: Recipe, lr: float, *, plain: bool) -> "Steps":
    """Those of a client that begins; where all its steps are `plain`, with what earlier clients had captured.

    A plain step has the recipe's own loss and gradient.
    """
    if not (plain and replica.graphs and capturable(recipe)) or data.mapped:
        return Steps(replica, recipe, captures=False)
    key = id(data), id(recipe), lr
    if key not in replica.steps:
        replica.steps.clear()  # those of an earlier learning rate, and their memory
        replica.steps[key] = Steps(replica, recipe, captures=True), data, recipe  # which keeps the ids theirs
    steps: Steps = replica.steps[key][0]
    steps.total.zero_()
    return steps


def capturable(recipe: Recipe) -> bool:
    """Whether all that a step reads lies still from client to client, and no number is looked at on the host."""
    return (
        recipe.optimizer in ("sgd", "lars")  # the others count steps, for the bias of their means
        and recipe.lr_every == "round"
        and recipe.precision != "fp16"
        and not recipe.augment
        and not recipe.class_weights
        and not recipe.distillation
        and not recipe.noisy_labels
        and not recipe.activation_checkpointing
    )


class Steps:
    """Training steps of one replica that differ in their rows alone: one recipe, one learning rate.

    `total` () is the sum of the losses and `optimizer` what moves the weights, for one client after the other.
    Without `captures` each step is only called.
    """

    def __init__(self, replica: Replica, recipe: Recipe, captures: bool):
        self.replica, self.captures = replica, captures
        self.optimizer, self.total = (
            recipe.make_optimizer(replica.task.layout),
            replica.flat.new_zeros(()),
        )
        self.graphs: dict[int, Graph | None] = {}  # by batch size; None where it is not to be
        self.taken: dict[int, int] = {}  # so far, by batch size

    def take(self, rows: Tensor, step: Callable[[Tensor], None]) -> None:
        """Do what `step(rows)` does, (B,) rows on the device: replay it, once it was captured, or call it."""
        size = len(rows)
        if graph := self.graphs.get(size):
            graph.rows.copy_(rows)
            graph.graph.replay()
            return
        self.taken[size] = self.taken.get(size, 0) + 1
        if self.captures and self.taken[size] > PAYS and size not in self.graphs:
            self.graphs[size] = self._captured(rows, step)
        else:
            step(rows)

    def _captured(self, rows: Tensor, step: Callable[[Tensor], None]) -> Graph | None:
        """The step as a graph, or None where it cannot be one. Either way the step is taken, once."""
        before = self._state()
        try:
            graph = self._capture(rows, step)
        except RuntimeError as error:  # for want of memory, too: a graph has memory of its own
            self._restore(before)
            _tell(f"cannot be captured: {one_line(error)}")
            step(rows)
            return None
        self._restore(before)
        step(rows)
        expected = self._state()
        self._restore(before)
        graph.graph.replay()
        if all(torch.equal(a, b) for a, b in zip(self._state(), expected, strict=True)):
            return graph
        self._restore(expected)
        _tell("gives other numbers when replayed")
        return None

    def _capture(self, rows: Tensor, step: Callable[[Tensor], None]) -> Graph:
        """On the worker's own stream: a side stream comes from a pool of 32, and may be another worker's."""
        replica, graph = self.replica, Graph(torch.cuda.CUDAGraph(), rows.clone())
        for _ in range(WARM_UPS):
            step(graph.rows)
        if replica.task.draws:
            graph.graph.register_generator_state(replica.generator)
        pool = next((other.graph.pool() for other in self.graphs.values() if other), None)  # one after the other
        stream = torch.cuda.current_stream(replica.device)
        with CAPTURING, torch.cuda.graph(graph.graph, pool, stream, capture_error_mode="thread_local"):
            step(graph.rows)
        return graph

    def _state(self) -> list[Tensor]:
        """Copies of all that a step changes; the last is the generator's."""
        return [*(t.clone() for t in self._moving()), self.replica.generator.get_state()]

    def _restore(self, state: list[Tensor]) -> None:
        *moving, draws = state
        with torch.no_grad():
            for tensor, value in zip(self._moving(), moving, strict=True):
                tensor.copy_(value)
        self.replica.generator.set_state(draws)
        self.replica.refresh()

    def _moving(self) -> list[Tensor]:
        return [self.total, *chain.from_iterable(self.optimizer.state), *self.replica.moving]


def _tell(why: str) -> None:
    warnings.warn(f"runtime.graphs: a training step {why}; going on without", RuntimeWarning, stacklevel=2)
