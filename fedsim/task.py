"""What is learned: a network as a function of one flat parameter vector."""

import copy
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedsim.draws import KeyedDraws
from fedsim.errors import ConfigError
from fedsim.pooling import pool_faster
from fedsim.recompute import Recompute, blocks_of

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
CASTABLE: set[type] = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}  # whose weights autocast casts
BLOCK = 2**17  # entries
PROBES = 3  # passes: where all of them move a global generator, it is not another thread that does
AUXILIARY = 0.4  # of the loss at an auxiliary head (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567)


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a flat vector.

    With `channels_last`, a convolution's weight lies there in the order (out, height, width, in), which is
    the order that convolutions over channels-last images read.
    """

    shapes: dict[str, torch.Size]
    channels_last: bool = False
    norms: frozenset[str] = frozenset()  # the names of normalisation layers' parameters

    @property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes.values()]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of `vector` (P,), by name."""
        parts = torch.split(vector, self.sizes)
        return {name: self._shaped(p, s) for (name, s), p in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(P,) the tensors, each at its place."""
        dtype = next(iter(tensors.values())).dtype if tensors else torch.get_default_dtype()
        vector = torch.empty(sum(self.sizes), dtype=dtype)
        for name, view in self.split(vector).items():
            view.copy_(tensors[name].detach())
        return vector

    def mask(self, keep: Callable[[str], bool]) -> Tensor:
        """(P,) bool: True where the tensor's name is kept."""
        parts = [torch.full((size,), keep(name)) for name, size in zip(self.shapes, self.sizes, strict=True)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)

    def _shaped(self, part: Tensor, shape: torch.Size) -> Tensor:
        if self.channels_last and len(shape) == 4:
            out, channels, height, width = shape
            return part.view(out, height, width, channels).permute(0, 3, 1, 2)
        return part.view(shape)


class Task:
    """A network and its loss. The network is a template: its own weights are only where training starts.

    Parameters that require no gradient are constants, and so are the buffers of modules whose floating-point
    buffers no training pass changes. The others, batch-norm statistics, are the buffers (Q,), apart from the model
    (P,): no algorithm but the averaging of buffers itself may touch them. In training the network may give a
    tuple: its logits and those of auxiliary heads. A `teacher` is a network to distil from, for the same examples.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        classes: int,
        *,
        channels_last: bool = False,
        recompute: bool = False,
        teacher: nn.Module | None = None,
    ):
        self.shape, self.classes, self.channels_last = shape, classes, channels_last
        self.draws, moving = _probe(network, shape, classes)
        self.network, self.recompute, self.teacher = network, recompute, teacher
        if recompute and next(blocks_of(network), None) is None:
            raise ConfigError("local.activation_checkpointing: the network has no blocks, only single layers")
        parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        statistics = {n: b for n, b in network.named_buffers() if n in moving}
        if not parameters:
            raise ConfigError("model: has no parameter that requires a gradient")
        normal = {id(p) for m in network.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
        norms = frozenset(n for n, p in parameters.items() if id(p) in normal)
        self.layout = Layout({n: p.shape for n, p in parameters.items()}, channels_last, norms)
        self.buffer_layout = Layout({n: b.shape for n, b in statistics.items()})
        self.initial_model = self.layout.flatten(parameters)
        self.initial_buffers = self.buffer_layout.flatten(statistics).to(self.initial_model.dtype)

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """(B,) one loss per example."""
        return F.cross_entropy(logits, y, reduction="none")

    def constants(self) -> dict[str, Tensor]:
        """What of the network no run changes: frozen parameters and their like, and all of a teacher."""
        own = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        moving = {*self.layout.shapes, *self.buffer_layout.shapes}
        fixed = {name: value for name, value in own.items() if name not in moving and value.is_floating_point()}
        taught = self.teacher.state_dict() if self.teacher else {}
        return fixed | {f"teacher: {name}": value for name, value in taught.items()}

    def state_dict(self, server: dict[str, Tensor]) -> dict[str, Tensor]:
        """The global model as `network.load_state_dict` takes it."""
        network = copy.deepcopy(self.network)  # where tied parameters, which have several names there, stay tied
        own = dict(network.named_parameters()) | dict(network.named_buffers())
        named = self.layout.split(server["model"]) | self.buffer_layout.split(server["buffers"])
        with torch.no_grad():
            for name, value in named.items():
                own[name].copy_(value)
        return network.state_dict()


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
        self.steps: dict[object, Any] = {}  # by fedsim.graphs
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
        self._uncast = depthwise(self.network) if self.device.type == "cpu" else []
        for module in self._uncast:
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
        self.auxiliary: tuple[Tensor, ...] = ()  # the last training pass's logits at other heads
        self._teacher = copy.deepcopy(task.teacher).to(self.device).eval() if task.teacher else None

    def enter(self, buffers: Tensor, seed: int, dtype: torch.dtype | None = None) -> None:
        """Forget the last client: its statistics, counters and random numbers; compute in `dtype`, or fp32."""
        if dtype != self._dtype:
            self._lay(dtype)
            if dtype and not self._runs_in(dtype):
                self._lay(None)  # it leaves autocast somewhere, and there needs fp32 weights: autocast casts them
                del self._halves[dtype]
            self._dtype = dtype
        self.restore((buffers, self._initial_counters))
        self.generator.manual_seed(seed)

    def _lay(self, dtype: torch.dtype | None) -> None:
        """Put copies in `dtype` in the place of convolution and linear weights, or the views of `flat`."""
        castable = _weights_of(self.network, CASTABLE) if dtype else set()
        castable -= {parameter for module in self._uncast for parameter in module.parameters()}
        own, kept = list(self.views.values()), self._halves.setdefault(dtype, {})
        for i, parameter in enumerate(self.parameters):
            if parameter in castable and i not in kept:
                kept[i] = torch.empty_like(own[i], dtype=dtype)
            parameter.data = kept.get(i, own[i])
        halves, views = list(kept.values()), [own[i] for i in kept]
        self._cast = blocks(halves, views), blocks(views, views)
        self.refresh()

    def _runs_in(self, dtype: torch.dtype) -> bool:
        x = torch.zeros(2, *self.task.shape, device=self.device)
        try:
            with torch.no_grad(), torch.autocast(self.device.type, dtype):
                self.logits(self.w, x, train=False)
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

    def logits(self, w: Tensor, x: Tensor, *, train: bool, buffers: Tensor | None = None) -> Tensor:
        """(B, classes) at `w` (P,): at the replica's own `w` in place, elsewhere as a function of it.

        In place, a training pass moves the batch-norm statistics; elsewhere it leaves them, and they may be given.
        """
        if self.network.training != train:  # only then: it walks through all modules
            self.network.train(train)
        with self._draws:
            if w is self.w:
                if self._recompute:
                    self._recompute.on = train
                return self._main(self.network(self._laid_out(x)))
            if self._recompute:
                self._recompute.on = False  # a backward pass would find other weights in the network
            present, counters = self.snapshot()
            statistics = self.task.buffer_layout.split(present if buffers is None else buffers)
            own = self.task.layout.split(w) | statistics | counters
            return self._main(functional_call(self.network, own, (self._laid_out(x),)))

    def teach(self, x: Tensor) -> Tensor:
        """(B, classes) of the task's teacher, in eval mode, without gradients."""
        assert self._teacher
        with torch.no_grad():
            return self._teacher(self._laid_out(x))  # type: ignore[no-any-return]

    def _laid_out(self, x: Tensor) -> Tensor:
        channels_last = self.task.channels_last and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def _main(self, output: Tensor | tuple[Tensor, ...]) -> Tensor:
        logits, *auxiliary = output if isinstance(output, tuple) else (output,)
        self.auxiliary = tuple(auxiliary)
        return logits


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


def _probe(network: nn.Module, shape: tuple[int, ...], classes: int) -> tuple[bool, set[str]]:
    """Whether a training pass draws random numbers, and the names of the buffers that are statistics.

    Raises ConfigError where the network does not fit the data, or draws where fedsim has no say.
    """
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    network = copy.deepcopy(network).train()
    draws, noise = KeyedDraws(torch.Generator()), torch.Generator().manual_seed(0)
    examples = torch.randn(2, *shape, dtype=dtype, generator=noise)
    before = {n: b.clone() for n, b in network.named_buffers()}
    try:
        for _ in range(PROBES):
            states = _global_states()
            with draws, torch.no_grad():
                outputs = network(examples)
            if drew_not := states == _global_states():
                break
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"model: cannot take examples of shape {shape}: {str(error).splitlines()[0]}") from error
    for logits in outputs if isinstance(outputs, tuple) else (outputs,):
        if tuple(logits.shape) != (2, classes):
            raise ConfigError(
                f"model: gives {tuple(logits.shape)} for 2 examples; {classes} classes need (2, {classes})"
            )
    if not drew_not:
        raise ConfigError(
            "model: draws from a global generator, which threads share; nn.Dropout, F.dropout and torch.rand are "
            "keyed, but not inside attention, nor numpy's and Python's own"
        )
    moved = {n for n, b in network.named_buffers() if not torch.equal(b, before[n])}
    modules = {name.rpartition(".")[0] for name in moved}
    floating = (n for n, b in network.named_buffers() if b.is_floating_point())
    return draws.used, {n for n in floating if n.rpartition(".")[0] in modules}


def _global_states() -> tuple[bytes, object, str]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002 - what a network may use
