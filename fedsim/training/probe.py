"""What a network does with a batch, tried before anything is trained."""

import copy
import random

import numpy as np
import torch
from torch import nn

from fedsim.errors import ConfigError
from fedsim.training.draws import KeyedDraws

PROBES = 3  # passes: where all of them move a global generator, it is not another thread that does


def probe(network: nn.Module, shape: tuple[int, ...], classes: int) -> tuple[bool, set[str]]:
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
