"""Aggregators: how messages become one, in any order and grouping, with the same bits.

Floating-point sums depend on their order, and clients finish in any. The weighted mean is therefore summed as
integers: weight times value, exact in float64 for float32 values and weights below 2^29, is split into units of
2^-20 and what is left of it into units of 2^-62, each an int64. Integer sums are exact, so they may be taken in
any order; at 2^-62 the fixed point is finer than a float32's last bit for all values above 2^-38.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.errors import ClientError
from fedsim.types import State

Partial = Any  # what an aggregator makes of some of the messages; opaque to everyone else


class Aggregator(Protocol):
    """Partial results that add up to the same bits in any order and grouping."""

    def fold(self, updates: Iterable[tuple[int, State, float]]) -> Partial:
        """Of (client, message, weight); of none of them, what changes nothing. Raises ClientError."""

    def merge(self, a: Partial, b: Partial) -> Partial:
        """Of all that went into either; neither is used again."""

    def result(self, total: Partial) -> State:
        """The aggregate; raises ValueError where nothing was folded."""


HIGH, LOW = 2.0**20, 2.0**42  # units in 1, and low units in a high one
LARGEST = 2.0**42  # of a sum of magnitudes: 2^62 high units
MOST = 2**20  # messages: each has fewer than 2^42 low units


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

    def fold(self, updates: Iterable[tuple[int, State, float]]) -> Sum:
        total = Sum()
        for client, message, weight in updates:
            total = self.merge(total, _one(client, message, weight))
        return total

    def merge(self, a: Sum, b: Sum) -> Sum:
        if not a.messages or not b.messages:
            return a if a.messages else b
        if (forms := _forms(a)) != _forms(b):
            raise ValueError(f"messages differ: {forms} and {_forms(b)}")
        for name, high in a.high.items():
            high.add_(b.high[name].to(high.device))
            a.low[name].add_(b.low[name].to(high.device))
            a.magnitude[name] += b.magnitude[name]
            if a.magnitude[name] > LARGEST:
                raise OverflowError(f"{name}: weights times values add up to more than {LARGEST:.3g}")
        a.weight, a.messages = a.weight + b.weight, a.messages + b.messages
        if a.messages > MOST:
            raise OverflowError(f"more than {MOST} messages in one round")
        return a

    def result(self, total: Sum) -> State:
        if not total.weight:
            raise ValueError("no message has a weight above 0")
        scale = 1 / (HIGH * float(total.weight))
        return {
            name: high.double().add_(total.low[name].double(), alpha=1 / LOW).mul_(scale).to(total.dtype[name])
            for name, high in total.high.items()
        }


def _one(client: int, message: State, weight: float) -> Sum:
    if not (isfinite(weight) and weight >= 0):
        raise ClientError(f"client {client}: its weight is {weight}, which is no finite number from 0 on")
    one = Sum(weight=Fraction(weight), messages=1)
    for name, value in message.items():
        magnitude = largest(value) * weight
        if not magnitude <= LARGEST:
            raise ClientError(f"client {client}: {name} has a value that is not finite, or too large to be summed")
        product = (
            value.detach().double().mul_(weight * HIGH) if value.dtype != torch.double else value * weight * HIGH
        )
        one.high[name] = product.long()
        one.low[name] = product.sub_(one.high[name]).mul_(LOW).long()
        one.magnitude[name], one.dtype[name] = magnitude, value.dtype
    return one


def largest(value: Tensor) -> float:
    """The largest magnitude in a tensor; nan or inf where one of its entries is."""
    return float(value.abs().amax()) if value.numel() else 0.0


def _forms(total: Sum) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (total.dtype[name], tuple(high.shape)) for name, high in total.high.items()}
