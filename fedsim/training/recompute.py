"""Activation checkpointing: a block's activations are computed again in the backward pass instead of kept.

Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016. https://arxiv.org/abs/1604.06174
By torch.utils.checkpoint, which knows of neither batch-norm statistics, that must move once, nor keyed draws.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedsim.training.draws import KeyedDraws

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules below the network and its containers that hold two layers or more."""
    for child in network.children():
        if isinstance(child, CONTAINERS):
            yield from blocks_of(child)
        elif sum(bool(list(module.parameters(recurse=False))) for module in child.modules()) > 1:
            yield child


class Recompute:
    """Has a network's blocks recomputed in the backward passes of what runs while it is `on`."""

    def __init__(self, network: nn.Module, generator: torch.Generator):
        self.generator, self.on = generator, False
        for block in blocks_of(network):
            block.forward = self._wrapped(block, block.forward)

    def _wrapped(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._as_before(block, self.generator.get_state())

        def run(*args: Any) -> Any:
            if not (self.on and torch.is_grad_enabled()):
                return forward(*args)
            args = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)  # DenseNet's grows meanwhile
            return checkpoint(
                forward,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=again,
                determinism_check="none",
            )

        return run

    @contextmanager
    def _as_before(self, block: nn.Module, draws: torch.Tensor) -> Iterator[None]:
        """In training mode, with the random numbers of the first time; statistics stay as that left them."""
        now, statistics = self.generator.get_state(), [buffer.clone() for buffer in block.buffers()]
        training = block.training  # not if a teacher was asked since
        self.generator.set_state(draws)
        block.train()
        try:
            with KeyedDraws(self.generator):
                yield
        finally:
            self.generator.set_state(now)
            block.train(training)
            with torch.no_grad():
                for buffer, value in zip(block.buffers(), statistics, strict=True):
                    buffer.copy_(value)
