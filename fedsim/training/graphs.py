"""A training step as one CUDA graph, which launches all kernels of the step at once.

A step of a small network has about fifty kernels of a few microseconds each, and launching them one by one takes
longer than running them (PyTorch, CUDA semantics, "CUDA Graphs"). A graph replays the same kernels on the same
memory without Python, so only steps that differ in nothing but their rows are captured. The first step of each
graph is taken both ways; if the results are not equal to the bit, steps of that size are not captured. Not yet
tested on a GPU.
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

STEPS_BEFORE_CAPTURE = 16  # of one batch size; a capture takes about as long as six steps
WARM_UP_STEPS = 1  # before a capture, in the same thread: cuBLAS has a workspace for each thread and stream

CAPTURING = threading.Lock()  # a process captures one graph at a time, and frees no GPU memory meanwhile


class Graph(NamedTuple):
    """A captured step, and the tensor from which it reads its rows."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor  # (B,)


def steps_for(replica: Replica, data: FederatedData, recipe: Recipe, lr: float, *, plain: bool) -> "Steps":
    """The steps of the next client; if they are `plain`, they reuse the graphs captured for earlier clients.

    Plain steps use the recipe's own loss, and its gradient without correction.
    """
    if not (plain and replica.graphs and capturable(recipe)) or data.mapped:
        return Steps(replica, recipe, captures=False)
    key = id(data), id(recipe), lr
    if key not in replica.captured_steps:
        replica.captured_steps.clear()  # frees the graphs of an earlier learning rate
        # Data and recipe are kept here so that their ids stay valid.
        replica.captured_steps[key] = Steps(replica, recipe, captures=True), data, recipe
    steps: Steps = replica.captured_steps[key][0]
    steps.total.zero_()
    return steps


def capturable(recipe: Recipe) -> bool:
    """Whether a step reads the same memory for every client, and the host reads no result of it."""
    return (
        recipe.optimizer in ("sgd", "lars")  # the others count steps on the host, for bias correction
        and recipe.lr_every == "round"
        and recipe.precision != "fp16"
        and not recipe.augment
        and not recipe.class_weights
        and not recipe.distillation
        and not recipe.noisy_labels
        and not recipe.activation_checkpointing
    )


class Steps:
    """Training steps of one replica that differ only in their rows: one recipe, one learning rate.

    `total` () is the sum of the losses, in float64; it and `optimizer` serve one client after the other. Without
    `captures` no step is captured.
    """

    def __init__(self, replica: Replica, recipe: Recipe, captures: bool):
        self.replica, self.captures = replica, captures
        self.optimizer, self.total = (
            recipe.make_optimizer(replica.task.layout),
            replica.flat.new_zeros((), dtype=torch.double),
        )
        self.graphs: dict[int, Graph | None] = {}  # by batch size; None if capturing failed
        self.taken: dict[int, int] = {}  # steps taken so far, by batch size

    def take(self, rows: Tensor, step: Callable[[Tensor], None]) -> None:
        """Take one step with (B,) rows on the device: replay the graph, or call `step(rows)` if there is none."""
        size = len(rows)
        if graph := self.graphs.get(size):
            graph.rows.copy_(rows)
            graph.graph.replay()
            return
        self.taken[size] = self.taken.get(size, 0) + 1
        if self.captures and self.taken[size] > STEPS_BEFORE_CAPTURE and size not in self.graphs:
            self.graphs[size] = self._capture_and_compare(rows, step)
        else:
            step(rows)

    def _capture_and_compare(self, rows: Tensor, step: Callable[[Tensor], None]) -> Graph | None:
        """Capture the step, or return None if that fails. In both cases the step is taken exactly once."""
        before = self._state()
        try:
            graph = self._capture(rows, step)
        except RuntimeError as error:  # also if memory runs out: a graph has memory of its own
            self._restore(before)
            _warn(f"cannot be captured: {one_line(error)}")
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
        _warn("gives other numbers when replayed")
        return None

    def _capture(self, rows: Tensor, step: Callable[[Tensor], None]) -> Graph:
        """Capture on the worker's own stream: torch has 32 side streams, which workers may have to share."""
        replica, graph = self.replica, Graph(torch.cuda.CUDAGraph(), rows.clone())
        for _ in range(WARM_UP_STEPS):
            step(graph.rows)
        if replica.task.draws:
            graph.graph.register_generator_state(replica.generator)
        pool = next((other.graph.pool() for other in self.graphs.values() if other), None)  # shared by all graphs
        stream = torch.cuda.current_stream(replica.device)
        with CAPTURING, torch.cuda.graph(graph.graph, pool, stream, capture_error_mode="thread_local"):
            step(graph.rows)
        return graph

    def _state(self) -> list[Tensor]:
        """Copies of all tensors that a step changes, and last the state of the generator."""
        return [*(t.clone() for t in self._changing()), self.replica.generator.get_state()]

    def _restore(self, state: list[Tensor]) -> None:
        *moving, draws = state
        with torch.no_grad():
            for tensor, value in zip(self._changing(), moving, strict=True):
                tensor.copy_(value)
        self.replica.generator.set_state(draws)
        self.replica.refresh()

    def _changing(self) -> list[Tensor]:
        return [self.total, *chain.from_iterable(self.optimizer.state), *self.replica.changing]


def _warn(why: str) -> None:
    warnings.warn(
        f"runtime.graphs: a training step {why}; continuing without CUDA graphs", RuntimeWarning, stacklevel=2
    )
