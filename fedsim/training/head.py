"""The head of a network: the layer whose input is the features."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.training.draws import KeyedDraws


def head_of(network: nn.Module, name: str | None, examples: Tensor) -> str | None:
    """The name of the head: the given one, or the last linear layer that runs on `examples` (n, ...), if any does.

    Raises ConfigError for a name that is no layer.
    """
    layers = dict(network.named_modules())
    if name is not None:
        if not name or name not in layers:
            known = ", ".join(list(layers)[-3:])
            raise ConfigError(f"model.head: {name!r} is no layer of the network; its last ones are {known}")
        return name
    ran = list[str]()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, own=own: ran.append(own))
        for own, layer in layers.items()
        if isinstance(layer, nn.Linear)
    ]
    mode = network.training
    try:
        with KeyedDraws(torch.Generator().manual_seed(0)), torch.no_grad():
            network.eval()(examples)
    finally:
        network.train(mode)
        for hook in hooks:
            hook.remove()
    return ran[-1] if ran else None


@contextmanager
def head_input(network: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """A list that gets the input of the head in each pass meanwhile.

    Raises ConfigError where there is no head, or no pass went through it.
    """
    if name is None:
        raise ConfigError(
            "model.head: no linear layer of the network runs; name the layer that takes the features"
        )
    found = list[Tensor]()
    hook = network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        hook.remove()
    if not found:
        raise ConfigError(f"model.head: {name} did not run; name a layer that takes the features of each example")
