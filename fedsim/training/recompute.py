"""Activation checkpointing: a block's activations are not stored but computed again in the backward pass.

Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016. https://arxiv.org/abs/1604.06174
It uses torch.utils.checkpoint, which handles neither of two things: batch-norm statistics, which must be updated
only once, and random numbers of `KeyedDraws`.
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
            return nullcontext(), self._recomputation(block, self.generator.get_state())

        def run(*args: Any) -> Any:
            if not (self.on and torch.is_grad_enabled()):
                return forward(*args)
            args = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)  # DenseNet extends its list
            return checkpoint(
                forward,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=contexts,
                determinism_check="none",
            )

        return run

    @contextmanager
    def _recomputation(self, block: nn.Module, draws: torch.Tensor) -> Iterator[None]:
        """Training mode with the random numbers of the first pass; afterwards the statistics are restored."""
        now, statistics = self.generator.get_state(), [buffer.clone() for buffer in block.buffers()]
        training = block.training  # False if the network has been used as a teacher since
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
