"""What a network costs, whatever the machine: parameters, multiply-adds, memory of a training step.

FLOPs are multiply-adds of one example in evaluation, as papers count them: those of convolutions and matrix
products, of which PyTorch's counter counts the two operations. Activations are what autograd keeps for the
backward pass: the bytes that each further example of a training batch adds, so that weights do not count, nor
their copies in half precision.
"""

import copy
from contextlib import nullcontext
from math import log10
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fedsim.errors import ConfigError, one_line


class Cost(NamedTuple):
    """Of one network."""

    parameters: int
    flops: int  # multiply-adds of one example, in evaluation
    activation_bytes: int  # kept for the backward pass, for one example


def cost(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Cost:
    """Of a network for examples of `shape`; its training is under autocast to `dtype`, if one is given.

    Nothing is computed without `dtype`, and the network may be on the meta device. Raises ConfigError where
    `shape` does not fit.
    """
    abstract = copy.deepcopy(network).to("meta")
    try:
        kept = activation_bytes(network if dtype else abstract, shape, dtype)
        return Cost(sum(p.numel() for p in network.parameters()), flops(abstract, shape), kept)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"model: cannot take examples of shape {shape}: {one_line(error)}") from error


def flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of one example in evaluation."""
    network = copy.deepcopy(network).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(zeros(network, (1, *shape)))
    return int(counter.get_total_flops()) // 2


def activation_bytes(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> int:
    """What each further example of a training batch adds to what autograd keeps; a tensor kept twice counts once.

    Training is under autocast to `dtype`, if one is given.
    """
    network = copy.deepcopy(network).train()
    with torch.random.fork_rng(devices=[]):
        return _kept(network, (3, *shape), dtype) - _kept(network, (2, *shape), dtype)


def zeros(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Of the type and on the device of the network's parameters."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    return like.new_zeros(shape)


def short(number: int) -> str:
    """About three digits and a unit: 25.6 M."""
    power = min(int(log10(number)) // 3, 4) if number else 0
    return f"{digits(number / 1000**power)} {' kMGT'[power]}".rstrip()


def digits(value: float) -> str:
    """A number with about three digits, and all of those before its point."""
    return f"{value:,.{max(0, 2 - int(log10(value))) if value >= 1 else 3}f}"


def size(shape: tuple[int, ...]) -> str:
    """Such as 3x224x224."""
    return "x".join(map(str, shape))


def _kept(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None) -> int:
    own = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
    kept = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    x = zeros(network, shape)
    autocast = torch.autocast(x.device.type, dtype) if dtype else nullcontext()
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        outputs = network(x)
    total = sum(kept.values())
    del outputs  # which held them all, so that no two had one address
    return total
