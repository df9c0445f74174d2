"""The learning task: a network as a function of one flat parameter vector, and its loss."""

import copy
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.base.modes import own_thread_modes
from fedsim.errors import ConfigError, name_of
from fedsim.training.buffers import Handling, buffer_handling, power_vectors
from fedsim.training.head import head_of
from fedsim.training.layout import Layout, Order
from fedsim.training.probe import copied, probe
from fedsim.training.recompute import blocks_of
from fedsim.types import BufferWord, State

LIBRARIES = ("fedsim.", "torch.", "torchvision.")
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Task:
    """A network and its loss. A copy of the network is the template: its weights are the initial model.

    Parameters that require no gradient are constants, and so are buffers that a training pass does not change.
    `handling` says what becomes of the others, by `buffers`, which is `model.buffers`: those that are averaged,
    such as batch-norm statistics, form the vector of buffers (Q,). It is separate from the model (P,), and
    strategies do not see it. In training mode the network may return a tuple: its logits and the logits of
    auxiliary heads. `teacher` is a network to distil from; it takes the same examples. `head` is the name of the
    layer whose input is the features, by default the last linear layer that runs. The network is tried on
    `examples` (n, ...), as `probe` says.
    """

    @own_thread_modes()
    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        classes: int,
        *,
        channels_last: bool = False,
        recompute: bool = False,
        teacher: nn.Module | None = None,
        buffers: Mapping[str, BufferWord] = MappingProxyType({}),
        head: str | None = None,
        examples: Tensor | None = None,
    ):
        self.shape, self.classes, self.channels_last = shape, classes, channels_last
        self.draws, moved, self.reassigned, examples = probe(network, shape, classes, examples)
        network = copied(network)
        self.handling = buffer_handling(network, moved, examples, buffers)
        self.network, self.recompute = network, recompute
        if recompute and next(blocks_of(network), None) is None:
            raise ConfigError("local.activation_checkpointing: the network has no blocks, only single layers")
        parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        statistics = {n: b for n, b in network.named_buffers() if self.handling.get(n) == "average"}
        normal = {id(p) for m in network.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
        norms = frozenset(n for n, p in parameters.items() if id(p) in normal)
        self.head = head_of(network, head, examples)
        of_head = frozenset(n for n in parameters if self.head and n.startswith(f"{self.head}."))
        self.layout = Layout({n: p.shape for n, p in parameters.items()}, channels_last, norms, of_head)
        self.buffer_layout = Layout({n: b.shape for n, b in statistics.items()})
        self.initial_model = self.layout.flatten(parameters)
        self.teacher = copied(teacher).to(self.initial_model.dtype) if teacher else None
        for name, buffer in statistics.items():
            if buffer.dtype != self.initial_model.dtype:
                raise ConfigError(
                    f"model: the buffer {name} is {buffer.dtype} and moves in training; it should be "
                    f"{self.initial_model.dtype}, as the trained parameters are"
                )
        self.initial_buffers = self.buffer_layout.flatten(statistics).to(self.initial_model.dtype)

    @cached_property
    def own_code(self) -> list[str]:
        """The names of the modules' classes that are neither fedsim's nor PyTorch's."""
        kinds = dict.fromkeys(type(module) for module in self.network.modules())
        return [name_of(kind) for kind in kinds if not name_of(kind).startswith(LIBRARIES)]

    def initial_of(self, *handling: Handling) -> State:
        """The initial values of the buffers that are handled in one of these ways, by name; not copies."""
        return {name: b for name, b in self.network.named_buffers() if self.handling.get(name) in handling}

    @property
    def order(self) -> Order:
        """Where the tensors of `state_dict` lie in the model (P,) and in the buffers (Q,)."""
        return Order([*self.layout.shapes], [*self.buffer_layout.shapes], self.layout.channels_last)

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """(B,) the cross-entropy of each example."""
        return F.cross_entropy(logits, y, reduction="none")

    def constants(self) -> dict[str, Tensor]:
        """The tensors that no run changes: frozen parameters, constant buffers, and all tensors of a teacher.

        Buffers of each client's own are among them: a run does not change their first values.
        """
        own = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        started = self.initial_of("server", "private")
        moving = {*self.layout.shapes, *self.handling} - started.keys()
        fixed = {n: v for n, v in own.items() if n not in moving and (v.is_floating_point() or n in started)}
        taught = self.teacher.state_dict() if self.teacher else {}
        return fixed | {f"teacher: {name}": value for name, value in taught.items()}

    def state_dict(self, server: dict[str, Tensor]) -> dict[str, Tensor]:
        """The global model, as the state_dict of the network."""
        network = copy.deepcopy(self.network)  # in a copy, tied parameters stay tied
        own = dict(network.named_parameters()) | dict(network.named_buffers())
        named = self.layout.split(server["model"]) | self.buffer_layout.split(server["buffers"])
        with torch.no_grad():
            for name, value in named.items():
                own[name].copy_(value)
            for name, value in power_vectors(network).items():
                own[name].copy_(value)
        return network.state_dict()
