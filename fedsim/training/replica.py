"""One worker's copy of the network, whose parameters are views of one flat vector."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.base.modes import own_thread_modes
from fedsim.training.buffers import Handling, PowerVectors
from fedsim.training.draws import DrawsState, KeyedDraws
from fedsim.training.head import head_input
from fedsim.training.pooling import pool_faster
from fedsim.training.probe import heads
from fedsim.training.recompute import Recompute
from fedsim.training.task import Task
from fedsim.types import State

CASTABLE: set[type] = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}  # layers whose weights autocast casts
CACHE_BLOCK = 2**17  # entries, which fit in a core's cache

Snapshot = tuple[Tensor, dict[str, Tensor]]  # batch-norm statistics (Q,), and the other buffers by name


@dataclass
class Passes:
    """What the training passes of a model change besides its weights, as of when the replica had them last."""

    buffers: Snapshot
    draws: DrawsState


class Replica:
    """One worker's copy of the network, whose parameters are views of one flat vector.

    The parameters are views of `w` (P,) and the batch-norm statistics views of `buffers` (Q,), so that loading a
    model is one copy and a step of an optimiser one pass over memory. In low precision, `refresh` casts the
    weights of convolution and linear layers once a step, in blocks that fit in the cache; autocast would cast them
    in every pass. On a CPU, depthwise convolutions stay in fp32, because their backward pass in bf16 takes several
    times as long.
    """

    @own_thread_modes()
    def __init__(self, task: Task, device: torch.device | str = "cpu", *, graphs: bool = False):
        self.task, self.device = task, torch.device(device)
        self.graphs = graphs and self.device.type == "cuda"  # whether steps may be captured
        self.captured_steps: dict[object, Any] = {}  # filled by fedsim.training.graphs
        self.network = copy.deepcopy(task.network).to(self.device).train()
        self.buffers = task.initial_buffers.to(self.device, copy=True)
        self.flat = task.initial_model.to(self.device, copy=True)
        self.w = self.flat.detach().requires_grad_()  # the same memory, a leaf for loss terms of the vector
        named = dict(self.network.named_parameters())
        self.gradient = torch.empty_like(self.flat)
        self.views = task.layout.split(self.flat)
        self.gradient_views = list(task.layout.split(self.gradient).values())
        for name, view in self.views.items():
            named[name].data = view
        self.parameters = [named[name] for name in self.views]
        if self.device.type == "cpu" and not task.channels_last:
            pool_faster(self.network)
        self._kept_fp32 = depthwise(self.network) if self.device.type == "cpu" else []
        for module in self._kept_fp32:
            module.forward = partial(in_own_precision, module, module.forward)
        self._low_precision_copies: dict[torch.dtype | None, dict[int, Tensor]] = {}  # by index in `parameters`
        self._cast_pairs: tuple[list[Tensor], list[Tensor]] = [], []  # low-precision copies, and their originals
        self._dtype: torch.dtype | None = None
        statistics = task.buffer_layout.split(self.buffers)
        self._counters: dict[str, Tensor] = {}
        for name, buffer in self.network.named_buffers():
            if name in statistics:
                buffer.data = statistics[name]
            else:
                self._counters[name] = buffer
        self._reassigned = [
            (owner._buffers, key, buffer)
            for path, owner in self.network.named_modules()
            for key, buffer in owner._buffers.items()
            if buffer is not None and f"{path}.{key}".lstrip(".") in task.reassigned
        ]
        _, self._initial_counters = self.snapshot()
        self._power_vectors = PowerVectors(self.network)
        self.generator = torch.Generator(self.device)
        self.draws = KeyedDraws(self.generator)
        self._draws: AbstractContextManager[object] = self.draws if task.draws else nullcontext()
        self.in_use = self.first_passes(self.buffers, {}, 0)  # of the client's own model, or meanwhile of another
        self.trained: Passes | None = None  # of the model that is being trained
        self._recompute = Recompute(self.network, self.generator) if task.recompute else None
        self._teacher = copy.deepcopy(task.teacher).to(self.device).eval() if task.teacher else None

    def begin_client(
        self, buffers: Tensor, seed: int, dtype: torch.dtype | None = None, private: Mapping[str, Tensor] = {}
    ) -> None:
        """Set statistics (Q,), other buffers and generator for the next client, which computes in `dtype` or fp32.

        The other buffers get their initial values, or those of `private`.
        """
        if dtype != self._dtype:
            self._bind_weights(dtype)
            if dtype and not self._runs_in(dtype):
                # Some layer runs outside autocast and needs fp32 weights; so autocast casts the others.
                self._bind_weights(None)
                del self._low_precision_copies[dtype]
            self._dtype = dtype
        self.restore((buffers, self._initial_counters | dict(private)))
        self.draws.begin(seed)

    def _bind_weights(self, dtype: torch.dtype | None) -> None:
        """Bind the layers' weights to copies in `dtype` (convolution and linear layers), or to views of `flat`."""
        castable = _weights_of(self.network, CASTABLE) if dtype else set()
        castable -= {parameter for module in self._kept_fp32 for parameter in module.parameters()}
        own, copies = list(self.views.values()), self._low_precision_copies.setdefault(dtype, {})
        for i, parameter in enumerate(self.parameters):
            if parameter in castable and i not in copies:
                copies[i] = torch.empty_like(own[i], dtype=dtype)
            parameter.data = copies.get(i, own[i])
        low, views = list(copies.values()), [own[i] for i in copies]
        self._cast_pairs = cache_blocks(low, views), cache_blocks(views, views)
        self.refresh()

    def _runs_in(self, dtype: torch.dtype) -> bool:
        x = torch.zeros(2, *self.task.shape, device=self.device)
        try:
            with torch.no_grad(), torch.autocast(self.device.type, dtype):
                self.forward(x, train=False)
        except RuntimeError:
            return False
        return True

    def snapshot(self) -> Snapshot:
        """Copies of the batch-norm statistics (Q,) and of the other buffers."""
        return self.buffers.clone(), {name: counter.clone() for name, counter in self._counters.items()}

    def others(self, handling: Handling) -> State:
        """Copies of the buffers that are handled in this way, which are not among the statistics, by name."""
        return {name: b.clone() for name, b in self._counters.items() if self.task.handling.get(name) == handling}

    def named_buffers(self) -> State:
        """Copies of all buffers of the network, by name."""
        return {name: buffer.clone() for name, buffer in self.network.named_buffers()}

    def restore_buffers(self, named: State) -> None:
        """Set all buffers of the network, by name."""
        with torch.no_grad():
            for name, buffer in self.network.named_buffers():
                buffer.copy_(named[name])

    def restore(self, snapshot: Snapshot) -> None:
        """Set statistics and other buffers back to a snapshot."""
        buffers, counters = snapshot
        with torch.no_grad():
            self.buffers.copy_(buffers)
            for name, counter in counters.items():
                self._counters[name].copy_(counter)

    def first_passes(self, buffers: Tensor, private: Mapping[str, Tensor], seed: int) -> Passes:
        """Those of a model before its first pass, with statistics (Q,)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return Passes((buffers, self._initial_counters | dict(private)), (generator.get_state(), {}))

    @contextmanager
    def using(self, passes: Passes) -> Iterator[None]:
        """Have those of this model meanwhile."""
        others = self.in_use
        if passes is not others:
            self._exchange(passes)
        try:
            yield
        finally:
            if passes is not others:
                self._exchange(others)

    def _exchange(self, passes: Passes) -> None:
        self.in_use.buffers, self.in_use.draws = self.snapshot(), self.draws.state
        self.in_use = passes
        self._resume(passes)

    def _resume(self, passes: Passes) -> None:
        self.restore(passes.buffers)
        self.draws.state = passes.draws

    @contextmanager
    def training(self, passes: Passes, *, keep: bool = False) -> Iterator[None]:
        """What is loaded meanwhile is the iterate of this model.

        The weights before come back after it, with `keep`, or if they are the iterate of another training.
        """
        outer, self.trained = self.trained, passes
        kept = (self.flat.clone(), self.gradient.clone()) if keep or outer else None
        try:
            yield
        finally:
            self.trained = outer
            if kept:
                self.load(kept[0])
                self.gradient.copy_(kept[1])

    @property
    def changing(self) -> list[Tensor]:
        """The tensors that a training step changes, not copies: weights (P,), statistics (Q,), other buffers."""
        return [self.flat, self.buffers, *self._counters.values()]

    def load(self, model: Tensor) -> None:
        """Set the network's weights to `model` (P,), and the vectors of its spectral norms to those of `model`."""
        with torch.no_grad():
            self.flat.copy_(model)
        self.refresh()
        self._power_vectors.refresh()

    def refresh(self) -> None:
        """Update the low-precision copies, if there are any, after a change of `flat`."""
        copies, originals = self._cast_pairs
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(copies, originals)

    def forward(self, x: Tensor, *, train: bool) -> tuple[Tensor, ...]:
        """(B, classes) of each head, at the loaded weights; with `train`, batch-norm statistics are updated."""
        self._set_mode(train, recompute=train)
        with self._draws:
            return heads(self._output(self._input(x)))

    def forward_at(
        self, w: Tensor, x: Tensor, *, train: bool, buffers: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(B, classes) of each head, at the weights `w` (P,); the replica itself does not change.

        `buffers` (Q,) are the batch-norm statistics to use, by default the replica's.
        """
        self._set_mode(train, recompute=False)  # recomputation in the backward pass would use other weights
        present, counters = self.snapshot()
        statistics = self.task.buffer_layout.split(present if buffers is None else buffers)
        weights = self.task.layout.split(w)
        own = weights | statistics | counters | self._power_vectors.at(weights)
        with self._draws:
            return heads(functional_call(self.network, own, (self._input(x),)))

    def head_input(self) -> AbstractContextManager[list[Tensor]]:
        """A list that gets the input of the network's head in each pass meanwhile. Raises ConfigError."""
        return head_input(self.network, self.task.head)

    def teacher_logits(self, x: Tensor) -> Tensor:
        """(B, classes) of the task's teacher network, in eval mode, without gradients."""
        assert self._teacher
        with torch.no_grad():
            return self._teacher(self._input(x))  # type: ignore[no-any-return]

    def _set_mode(self, train: bool, recompute: bool) -> None:
        if self.network.training != train:  # train() goes through all modules
            self.network.train(train)
        if self._recompute:
            self._recompute.on = recompute

    def _output(self, x: Tensor) -> Any:
        """The network's output. A buffer that a pass reassigns is a copy meanwhile, which autograd may keep."""
        for buffers, name, kept in self._reassigned:
            buffers[name] = kept.clone()
        output = self.network(x)
        with torch.no_grad():
            for buffers, name, kept in self._reassigned:
                kept.copy_(buffers[name])
        return output

    def _input(self, x: Tensor) -> Tensor:
        """The examples in the type and the memory format of the network."""
        x = x.to(self.flat.dtype)
        channels_last = self.task.channels_last and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def cache_blocks(tensors: list[Tensor], originals: list[Tensor]) -> list[Tensor]:
    """The tensors in flat blocks that fit in a CPU's cache; only those with contiguous `originals` are cut."""
    pieces: list[Tensor] = []
    for tensor, original in zip(tensors, originals, strict=True):
        cut = original.device.type == "cpu" and original.is_contiguous() and original.numel() > CACHE_BLOCK
        pieces += torch.split(tensor.reshape(-1), CACHE_BLOCK) if cut else [tensor]
    return pieces


def depthwise(network: nn.Module) -> list[nn.Module]:
    """The depthwise convolutions: one group for each input channel."""
    return [m for m in network.modules() if type(m) is nn.Conv2d and m.groups == m.in_channels > 1]


def in_own_precision(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The module's output in the precision of its weights, without autocast."""
    if not torch.is_autocast_enabled("cpu"):
        return forward(x)
    with torch.autocast("cpu", enabled=False):
        return forward(x.to(module.weight.dtype))  # type: ignore[arg-type]


def _weights_of(network: nn.Module, kinds: set[type]) -> set[nn.Parameter]:
    """The parameters that belong to modules of exactly these types and to no other module."""
    plain = {"weight", "bias"}  # not the tensors from which a parametrisation computes a weight
    owned = [
        (type(m) in kinds and name in plain, p)
        for m in network.modules()
        for name, p in m.named_parameters(recurse=False)
    ]
    return {p for inside, p in owned if inside} - {p for inside, p in owned if not inside}
