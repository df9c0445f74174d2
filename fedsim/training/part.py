"""The part of a network that a training may change: `only` of `LocalObjective.train`."""

from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.errors import WrongReturnError
from fedsim.training.layout import Layout
from fedsim.training.task import Task
from fedsim.types import State


class Part(NamedTuple):
    """What may change: entries of the model, and the buffers of layers with such entries."""

    entries: Tensor  # (P,) bool
    buffers: State  # () bool, by name
    parameters: frozenset[str]  # of which any entry may change

    def of(self, changed: Tensor, kept: Tensor) -> Tensor:
        """(P,) the values of `changed` in this part, and those of `kept` outside of it."""
        return torch.where(self.entries, changed, kept)

    def of_buffers(self, changed: State, kept: State) -> State:
        """The same for buffers of the network, by name."""
        return {name: torch.where(self.buffers[name], value, kept[name]) for name, value in changed.items()}


def part_of(only: Tensor, task: Task, device: torch.device) -> Part:
    """The part with the entries `only` (P,); also under `vmap`, where each client may have its own.

    A layer without parameters, such as a batch norm without scale and shift, belongs to the layer around it.
    Raises WrongReturnError.
    """
    size = sum(task.layout.sizes)
    if not isinstance(only, Tensor) or only.dtype != torch.bool or only.shape != (size,):
        made = f"{only.dtype} {tuple(only.shape)}" if isinstance(only, Tensor) else type(only).__name__
        raise WrongReturnError(f"local.train: only is {made}; it should be a mask, torch.bool ({size},)")
    changes = {name: part.any() for name, part in Layout(task.layout.shapes).split(only).items()}

    def of_layer(buffer: str) -> Tensor:
        path, own = buffer, list[Tensor]()
        while path and not own:
            path = path.rpartition(".")[0]
            own = [changed for name, changed in changes.items() if name.startswith(f"{path}." if path else "")]
        return torch.stack(own).any().to(device) if own else torch.tensor(False, device=device)

    buffers = {name: of_layer(name) for name, _ in task.network.named_buffers()}
    return Part(only.to(device), buffers, frozenset(name for name, changed in changes.items() if maybe(changed)))


def maybe(condition: Tensor) -> bool:
    """Whether a condition () is true, or differs between clients under `vmap`, where the host cannot read it."""
    try:
        return bool(condition)
    except RuntimeError:
        return True
