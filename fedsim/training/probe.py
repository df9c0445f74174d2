"""A trial forward pass of a network, before training."""

import copy
import random

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.training.draws import KeyedDraws

PROBE_PASSES = 3  # another thread may move a global generator during one pass, hardly during all


def probe(network: nn.Module, shape: tuple[int, ...], classes: int) -> tuple[bool, set[str], Tensor]:
    """Whether a training pass draws random numbers, the buffers that it changes, and the examples (n, *shape).

    Raises ConfigError if the network does not fit the data, or draws from a generator that fedsim cannot replace.
    """
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    network = copy.deepcopy(network).train()
    draws, noise = KeyedDraws(torch.Generator()), torch.Generator().manual_seed(0)
    examples = torch.randn(4, *shape, dtype=dtype, generator=noise)
    before = {n: b.clone() for n, b in network.named_buffers()}
    try:
        for _ in range(PROBE_PASSES):
            states = _global_states()
            with draws, torch.no_grad():
                outputs = network(examples[:2])
            if global_states_unchanged := states == _global_states():
                break
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"model: cannot take examples of shape {shape}: {str(error).splitlines()[0]}") from error
    for logits in outputs if isinstance(outputs, tuple) else (outputs,):
        if tuple(logits.shape) != (2, classes):
            raise ConfigError(
                f"model: gives {tuple(logits.shape)} for 2 examples; {classes} classes need (2, {classes})"
            )
    if not global_states_unchanged:
        raise ConfigError(
            "model: draws from a global generator, which threads share; use nn.Dropout, F.dropout or "
            "torch.rand, which fedsim seeds by client; it cannot seed dropout inside attention, numpy or random"
        )
    moved = {n for n, b in network.named_buffers() if not torch.equal(b, before[n])}
    return draws.used, moved, examples


def _global_states() -> tuple[bytes, object, str]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002 - networks may use it
