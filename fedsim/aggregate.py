"""Aggregators: how messages become one, in any order and grouping, with the same bits.

Floating-point sums depend on their order, and clients finish in any. The weighted mean is therefore summed as
integers: weight times value, exact in float64 for float32 values and weights below 2^29, is split into units of
2^-20 and what is left of it into units of 2^-62, each an int64. Integer sums are exact, so they may be taken in
any order; at 2^-62 the fixed point is finer than a float32's last bit for all values above 2^-38.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.types import State

Partial = Any  # what an aggregator makes of some of the messages; opaque to everyone else


class Aggregator(Protocol):
    """Partial results that add up to the same bits in any order and grouping."""

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Partial | None = None) -> Partial:
        """`start`, or nothing, and the updates (client, message, weight) on top; `start` is not used again.

        Raises ArithmeticError for a message that cannot be aggregated, and leaves it out.
        """

    def merge(self, a: Partial, b: Partial) -> Partial:
        """Of all that went into either; neither is used again."""

    def result(self, total: Partial) -> State:
        """The aggregate; raises ArithmeticError where no message has a weight."""


HIGH, LOW = 2.0**20, 2.0**42  # units in 1, and low units in a high one
LARGEST = 2.0**42  # of a sum of magnitudes: 2^62 high units
MOST = 2**20  # messages: each has fewer than 2^42 low units
BLOCK = 2**16  # entries at a time on a CPU, so that what is between two passes stays in the cache


@dataclass
class Sum:
    """Exact sums of weight times value, by name, and of the weights."""

    high: State = field(default_factory=dict)  # int64
    low: State = field(default_factory=dict)  # int64
    magnitude: dict[str, float] = field(default_factory=dict)  # of the largest entry, summed: bounds every entry
    dtype: dict[str, torch.dtype] = field(default_factory=dict)
    weight: Fraction = Fraction(0)
    messages: int = 0


class WeightedMean:
    """sum of w_k m_k / sum of w_k, entry by entry (McMahan 2017, Algorithm 1)."""

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Sum | None = None) -> Sum:
        total = start or Sum()
        for _, message, weight in updates:
            one = _described(message, weight)
            _check(total, one)
            for name, value in message.items():
                if name not in total.high:
                    total.high[name] = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
                    total.low[name] = total.high[name].clone()
                for v, high, low in _blocks(value.detach(), total.high[name], total.low[name]):
                    product = v.to(torch.double, copy=True).mul_(weight * HIGH)
                    units = product.long()
                    high.add_(units)
                    low.add_(product.sub_(units).mul_(LOW).long())
            _count(total, one)
        return total

    def merge(self, a: Sum, b: Sum) -> Sum:
        if not a.messages or not b.messages:
            return a if a.messages else b
        _check(a, b)
        for name, high in a.high.items():
            high.add_(b.high[name].to(high.device))
            a.low[name].add_(b.low[name].to(high.device))
        _count(a, b)
        return a

    def result(self, total: Sum) -> State:
        if not total.weight:
            raise ArithmeticError("no message has a weight above 0")
        scale, mean = 1 / (HIGH * float(total.weight)), {}
        for name, sums in total.high.items():
            mean[name] = torch.empty_like(sums, dtype=total.dtype[name])
            for high, low, out in _blocks(sums, total.low[name], mean[name]):
                out.copy_(high.double().add_(low.double().div_(LOW)).mul_(scale))
        return mean


def largest(value: Tensor) -> float:
    """The largest magnitude in a tensor; nan or inf where one of its entries is."""
    if not value.numel():
        return 0.0
    low, high = torch.aminmax(value.detach())
    return float(torch.maximum(-low, high))


def _described(message: State, weight: float) -> Sum:
    """What a message will count as; its tensors stand for the sums' shapes."""
    if not (isfinite(weight) and weight >= 0):
        raise ArithmeticError(f"the weight is {weight}, which is no finite number from 0 on")
    magnitude = {name: largest(value) * weight for name, value in message.items()}
    for name, value in magnitude.items():
        if not isfinite(value):
            raise ArithmeticError(f"{name} is not finite")
    return Sum(message, message, magnitude, {n: v.dtype for n, v in message.items()}, Fraction(weight), 1)


def _check(total: Sum, more: Sum) -> None:
    """Raise where the sum of both would be wrong."""
    if total.messages and _shapes(total) != _shapes(more):
        raise ArithmeticError(f"the message is {_shapes(more)}, and others are {_shapes(total)}")
    if total.messages + more.messages > MOST:
        raise OverflowError(f"more than {MOST} messages in one round")
    for name, magnitude in more.magnitude.items():
        if total.magnitude.get(name, 0.0) + magnitude > LARGEST:
            raise OverflowError(f"{name} is too large: weights times values add up to more than {LARGEST:.3g}")


def _count(total: Sum, more: Sum) -> None:
    total.magnitude = {n: total.magnitude.get(n, 0.0) + value for n, value in more.magnitude.items()}
    total.dtype = more.dtype
    total.weight, total.messages = total.weight + more.weight, total.messages + more.messages


def _shapes(total: Sum) -> str:
    return ", ".join(f"{name} {total.dtype[name]} {tuple(t.shape)}" for name, t in sorted(total.high.items()))


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = BLOCK if tensors[0].device.type == "cpu" else max(tensors[0].numel(), 1)
    return zip(*(torch.split(tensor.reshape(-1), size) for tensor in tensors), strict=True)
