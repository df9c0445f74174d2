"""Activation checkpointing: a block's activations are not stored but computed again in the backward pass.

Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016. https://arxiv.org/abs/1604.06174
It uses torch.utils.checkpoint, which handles neither of two things: buffers, which must be updated only once and
have their first values when a block is recomputed, and random numbers of `KeyedDraws`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedsim.training.draws import KeyedDraws

Buffers = tuple[dict[str, Tensor | None], dict[str, Tensor]]  # a module's own, and copies

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that contain two layers or more; the network itself and containers do not count."""
    for child in network.children():
        if isinstance(child, CONTAINERS):
            yield from blocks_of(child)
        elif sum(bool(list(module.parameters(recurse=False))) for module in child.modules()) > 1:
            yield child


class Recompute:
    """Recomputes a network's blocks in the backward pass, for forward passes that run while `on` is True."""

    def __init__(self, network: nn.Module, generator: torch.Generator):
        self.generator, self.on = generator, False
        for block in blocks_of(network):
            block.forward = self._wrapped(block, block.forward)

    def _wrapped(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            buffers = [
                (
                    module._buffers,
                    {name: value.clone() for name, value in module._buffers.items() if value is not None},
                )
                for module in block.modules()
            ]
            modes = [(module, module.training) for module in block.modules()]
            return nullcontext(), self._recomputation(block, self.generator.get_state(), buffers, modes)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not (self.on and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            args = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)  # DenseNet extends its list
            return checkpoint(
                partial(forward, **kwargs),
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
                determinism_check="none",
            )

        return run

    @contextmanager
    def _recomputation(
        self, block: nn.Module, draws: Tensor, buffers: list[Buffers], modes: list[tuple[nn.Module, bool]]
    ) -> Iterator[None]:
        """The modes, random numbers and copies of the `buffers` of the first pass."""
        now = self.generator.get_state()
        own = [(current, dict(current)) for current, _ in buffers]
        used = [(module, module.training) for module in block.modules()]  # False if used as a teacher since
        self.generator.set_state(draws)
        for module, training in modes:
            module.training = training
        try:
            for current, first in buffers:
                current.update(first)
            with KeyedDraws(self.generator):
                yield
        finally:
            self.generator.set_state(now)
            for module, training in used:
                module.training = training
            for current, values in own:
                current.update(values)
