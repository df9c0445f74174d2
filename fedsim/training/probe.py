"""A trial forward pass of a network, before training."""

import copy

import torch
from torch import nn

from fedsim.base.global_draws import global_states
from fedsim.errors import ConfigError
from fedsim.training.draws import KeyedDraws

CPU = torch.device("cpu")
PROBE_PASSES = 3  # another thread may move a global generator during one pass, hardly during all


def probe(network: nn.Module, shape: tuple[int, ...], classes: int) -> tuple[bool, set[str]]:
    """Whether a training pass draws random numbers, and the names of the buffers that are statistics.

    Raises ConfigError if the network does not fit the data, or draws from a generator that fedsim cannot replace.
    """
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    network = copy.deepcopy(network).train()
    draws, noise = KeyedDraws(torch.Generator()), torch.Generator().manual_seed(0)
    examples = torch.randn(2, *shape, dtype=dtype, generator=noise)
    before = {n: b.clone() for n, b in network.named_buffers()}
    try:
        for _ in range(PROBE_PASSES):
            states = global_states(CPU)
            with draws, torch.no_grad():
                outputs = network(examples)
            if global_states_unchanged := states == global_states(CPU):
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
    modules = {name.rpartition(".")[0] for name in moved}
    floating = (n for n, b in network.named_buffers() if b.is_floating_point())
    return draws.used, {n for n in floating if n.rpartition(".")[0] in modules}
