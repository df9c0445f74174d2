"""One worker's copy of the network, laid over one flat vector."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.training.draws import KeyedDraws
from fedsim.training.pooling import pool_faster
from fedsim.training.recompute import Recompute
from fedsim.training.task import Task

CASTABLE: set[type] = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}  # whose weights autocast casts
BLOCK = 2**17  # entries that fit a core's cache

Snapshot = tuple[Tensor, dict[str, Tensor]]  # what a training pass moves in a network besides its weights


class Replica:
    """One worker's copy of the network, laid over one flat vector.

    The network's parameters are views of `w` (P,) and its statistics views of `buffers` (Q,), so that loading
    a model is one copy and an optimiser's step one pass. In low precision, `refresh` casts the convolution and
    linear weights once a step, block by block in the cache, which autocast would do whole in every pass. On a CPU
    depthwise convolutions stay in the precision of their weights: in bf16 their backward pass takes several times
    as long.
    """

    def __init__(self, task: Task, device: torch.device | str = "cpu", *, graphs: bool = False):
        self.task, self.device = task, torch.device(device)
        self.graphs = graphs and self.device.type == "cuda"  # whether steps may be captured
        self.steps: dict[object, Any] = {}  # captured training steps, by fedsim.training.graphs
        self.network = copy.deepcopy(task.network).to(self.device).train()
        self.buffers = task.initial_buffers.to(self.device, copy=True)
        self.flat = task.initial_model.to(self.device, copy=True)
        self.w = self.flat.detach().requires_grad_()  # the same numbers, as a leaf for a loss term over all of w
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
        self._halves: dict[torch.dtype | None, dict[int, Tensor]] = {}  # by place in `parameters`
        self._cast: tuple[list[Tensor], list[Tensor]] = [], []  # half-precision blocks, and what they copy
        self._dtype: torch.dtype | None = None
        statistics = task.buffer_layout.split(self.buffers)
        self._counters: dict[str, Tensor] = {}
        for name, buffer in self.network.named_buffers():
            if name in statistics:
                buffer.data = statistics[name]
            else:
                self._counters[name] = buffer
        _, self._initial_counters = self.snapshot()
        self.generator = torch.Generator(self.device)
        self._draws: AbstractContextManager[object] = KeyedDraws(self.generator) if task.draws else nullcontext()
        self._recompute = Recompute(self.network, self.generator) if task.recompute else None
        self._teacher = copy.deepcopy(task.teacher).to(self.device).eval() if task.teacher else None

    def begin_client(self, buffers: Tensor, seed: int, dtype: torch.dtype | None = None) -> None:
        """Set statistics (Q,), counters and random numbers for the next client; compute in `dtype`, or in fp32."""
        if dtype != self._dtype:
            self._bind_weights(dtype)
            if dtype and not self._runs_in(dtype):
                self._bind_weights(
                    None
                )  # it leaves autocast somewhere and needs fp32 weights; autocast casts them
                del self._halves[dtype]
            self._dtype = dtype
        self.restore((buffers, self._initial_counters))
        self.generator.manual_seed(seed)

    def _bind_weights(self, dtype: torch.dtype | None) -> None:
        """Give convolution and linear layers copies of their weights in `dtype`, or all layers views of `flat`."""
        castable = _weights_of(self.network, CASTABLE) if dtype else set()
        castable -= {parameter for module in self._kept_fp32 for parameter in module.parameters()}
        own, copies = list(self.views.values()), self._halves.setdefault(dtype, {})
        for i, parameter in enumerate(self.parameters):
            if parameter in castable and i not in copies:
                copies[i] = torch.empty_like(own[i], dtype=dtype)
            parameter.data = copies.get(i, own[i])
        halves, views = list(copies.values()), [own[i] for i in copies]
        self._cast = blocks(halves, views), blocks(views, views)
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
        """Copies of the batch-norm statistics (Q,) and of the counters."""
        return self.buffers.clone(), {name: counter.clone() for name, counter in self._counters.items()}

    def restore(self, snapshot: Snapshot) -> None:
        """Make statistics and counters what they were."""
        buffers, counters = snapshot
        with torch.no_grad():
            self.buffers.copy_(buffers)
            for name, counter in counters.items():
                self._counters[name].copy_(counter)

    @property
    def moving(self) -> list[Tensor]:
        """What a training step changes: weights (P,), batch-norm statistics (Q,) and counters; not copies."""
        return [self.flat, self.buffers, *self._counters.values()]

    def load(self, model: Tensor) -> None:
        """Make `model` (P,) the point `w` at which the network stands."""
        with torch.no_grad():
            self.flat.copy_(model)
        self.refresh()

    def refresh(self) -> None:
        """Have the half-precision weights, where there are some, follow a change of `flat`."""
        halves, originals = self._cast
        if halves:
            with torch.no_grad():
                torch._foreach_copy_(halves, originals)

    def forward(self, x: Tensor, *, train: bool) -> tuple[Tensor, ...]:
        """(B, classes) at each head, at the loaded weights; a training pass moves the batch-norm statistics."""
        self._prepare(train, recompute=train)
        with self._draws:
            return _heads(self.network(self._in_format(x)))

    def forward_at(
        self, w: Tensor, x: Tensor, *, train: bool, buffers: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(B, classes) at each head, as a function of `w` (P,); the replica's own weights and statistics stay.

        `buffers` (Q,) are the statistics to use, the replica's own unless given.
        """
        self._prepare(train, recompute=False)  # a backward pass would find other weights in the network
        present, counters = self.snapshot()
        statistics = self.task.buffer_layout.split(present if buffers is None else buffers)
        own = self.task.layout.split(w) | statistics | counters
        with self._draws:
            return _heads(functional_call(self.network, own, (self._in_format(x),)))

    def teach(self, x: Tensor) -> Tensor:
        """(B, classes) of the task's teacher, in eval mode, without gradients."""
        assert self._teacher
        with torch.no_grad():
            return self._teacher(self._in_format(x))  # type: ignore[no-any-return]

    def _prepare(self, train: bool, recompute: bool) -> None:
        if self.network.training != train:  # only then: it walks through all modules
            self.network.train(train)
        if self._recompute:
            self._recompute.on = recompute

    def _in_format(self, x: Tensor) -> Tensor:
        channels_last = self.task.channels_last and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _heads(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a network gave, the main head first."""
    return output if isinstance(output, tuple) else (output,)


def blocks(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The tensors, flat and in blocks that fit a CPU's cache, where those they are `like` lie in one piece."""
    pieces: list[Tensor] = []
    for tensor, other in zip(tensors, like, strict=True):
        cut = other.device.type == "cpu" and other.is_contiguous() and other.numel() > BLOCK
        pieces += torch.split(tensor.reshape(-1), BLOCK) if cut else [tensor]
    return pieces


def depthwise(network: nn.Module) -> list[nn.Module]:
    """The convolutions in which each channel sees only itself."""
    return [m for m in network.modules() if type(m) is nn.Conv2d and m.groups == m.in_channels > 1]


def in_own_precision(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The module's output, as if there were no autocast."""
    if not torch.is_autocast_enabled("cpu"):
        return forward(x)
    with torch.autocast("cpu", enabled=False):
        return forward(x.to(module.weight.dtype))  # type: ignore[arg-type]


def _weights_of(network: nn.Module, kinds: set[type]) -> set[nn.Parameter]:
    """The parameters of modules of exactly these kinds, and of no other module."""
    plain = {"weight", "bias"}  # and not those of which a parametrisation makes a weight
    owned = [
        (type(m) in kinds and name in plain, p)
        for m in network.modules()
        for name, p in m.named_parameters(recurse=False)
    ]
    return {p for inside, p in owned if inside} - {p for inside, p in owned if not inside}
