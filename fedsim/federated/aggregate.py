"""Aggregators: how messages become one, in any order and grouping, with the same bits.

Floating-point sums depend on their order, and clients finish in any. They do not where every term is a multiple
of one unit and no sum reaches 2^53 units: then float64 adds exactly. So each product of weight and value, itself
exact for float32 values and weights below 2^29, is split into a multiple of 2^-18 and a multiple of 2^-55, and
the two are summed apart. Adding a large constant and taking it away again is what rounds to a multiple (Demmel &
Nguyen, Parallel Reproducible Summation, 2015). Half of 2^-55 is what a product may lose.

What it costs is passes over memory, so constants are taken away once, from the sums: each product p adds
high = FINE + (p to 2^-18) to one, and the bits of high - p to the other. That difference is FINE less the rest of
p, so it lies where a float64 counts in units of 2^-55, and its bits are an integer: those of FINE less the units.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.errors import RoundError
from fedsim.types import Form, State, described, form_of

Partial = Any  # what an aggregator makes of some of the messages; opaque to everyone else


class Aggregator(Protocol):
    """Partial results that add up to the same bits in any order and grouping."""

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Partial | None = None) -> Partial:
        """`start`, or nothing, and the updates (client, message, weight) on top; `start` is not used again.

        Raises ArithmeticError for a message that is wrong by itself, and RoundError where messages do not add
        up, which is no single client's doing; `start` is then as it was.
        """

    def merge(self, a: Partial, b: Partial) -> Partial:
        """Of all that went into either; neither is used again. Raises RoundError."""

    def mismatched(self, total: Partial) -> dict[int, str]:
        """Clients whose messages differ in form from those of most clients, and how; they do not count."""

    def result(self, total: Partial) -> State:
        """The aggregate; raises RoundError where no message has a weight."""


COARSE, FINE = 1.5 * 2.0 ** (52 - 18), 1.5 * 2.0 ** (52 - 55)  # adding them rounds to 2^-18, to 2^-55
LARGEST = 2.0**33  # of a sum of magnitudes: 2^51 coarse units
MAX_MESSAGES = 2**17  # in a round: each leaves up to half a coarse unit, so that all make up to 2^53 fine ones
BITS = struct.unpack("<q", struct.pack("<d", FINE))[0]  # of FINE
TOGETHER = 8  # messages added at a time: reading and writing the sums is what it costs
BLOCK = 2**16  # entries at a time on a CPU, so that what is between two passes stays in the cache
BLOCK_ON_GPU = 2**21  # there it is memory that what is between two passes takes: 16 bytes an entry and message


@dataclass
class Sum:
    """Exact sums of weight times value, by name, and of the weights."""

    coarse: State = field(default_factory=dict)  # float64, multiples of 2^-18, and FINE a message
    fine: State = field(default_factory=dict)  # int64 that may wrap around: BITS a message, less units of 2^-55
    waiting: list[tuple[State, float]] = field(default_factory=list)  # counted below, and not in the sums yet
    clients: list[int] = field(default_factory=list)
    magnitude: dict[str, Fraction] = field(default_factory=dict)  # of the largest entry, summed
    weight: Fraction = Fraction(0)


Sums = dict[Form, Sum]  # messages of different forms do not add up, and are summed apart


class WeightedMean:
    """sum of w_k m_k / sum of w_k, entry by entry (McMahan 2017, Algorithm 1)."""

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Sums | None = None) -> Sums:
        total = {} if start is None else start
        for client, message, weight in updates:
            one = _one(client, message, weight)
            _count(total.setdefault(form_of(message), Sum()), one)
        return total

    def merge(self, a: Sums, b: Sums) -> Sums:
        for form, theirs in b.items():
            if form not in a:
                a[form] = theirs
                continue
            mine = a[form]
            _count(mine, theirs)
            for total, more in ((mine.coarse, theirs.coarse), (mine.fine, theirs.fine)):
                for name, value in more.items():
                    total[name] = total[name].add_(value.to(total[name].device)) if name in total else value
        return a

    def mismatched(self, total: Sums) -> dict[int, str]:
        usual = _usual(total)
        return {
            client: f"sent {described(form)}, and most clients sent {described(usual)}"
            for form, sums in total.items()
            if form != usual
            for client in sums.clients
        }

    def result(self, total: Sums) -> State:
        form = _usual(total)
        sums = total.get(form, Sum())
        if not sums.weight:
            raise RoundError("no client's message has a weight above 0")
        _settle(sums)
        mean: State = {}
        constant, bits = FINE * len(sums.clients), _wrapped(BITS * len(sums.clients))
        for name, shape, dtype in form:
            mean[name] = torch.empty(shape, dtype=dtype, device=sums.coarse[name].device)
            for coarse, fine, out in _blocks(sums.coarse[name], sums.fine[name], mean[name]):
                rest = (bits - fine).double().mul_(2.0**-55)
                out.copy_((coarse - constant).add_(rest).div_(float(sums.weight)))
        return mean


def _usual(total: Sums) -> Form:
    """The form of most messages; of two as frequent, that of the client with the lowest id."""
    return min(total, key=lambda form: (-len(total[form].clients), min(total[form].clients)), default=())


def largest(value: Tensor) -> float:
    """The largest magnitude in a tensor; nan or inf where one of its entries is."""
    if not value.numel():
        return 0.0
    value = value.detach()
    if value.device.type == "cpu":  # in two passes, which take half as long as the one of aminmax
        return float(torch.maximum(-value.amin(), value.amax()))
    low, high = torch.aminmax(value)
    return float(torch.maximum(-low, high))


def _one(client: int, message: State, weight: float) -> Sum:
    if not (isfinite(weight) and weight >= 0):
        raise ArithmeticError(f"the weight is {weight}, which is no finite number from 0 on")
    magnitude = dict[str, Fraction]()
    for name, value in message.items():
        if not value.is_floating_point():
            raise ArithmeticError(f"{name} is {value.dtype}, and has no mean; send floating-point numbers")
        entry = largest(value)
        if not isfinite(entry):
            raise ArithmeticError(f"{name} is not finite")
        magnitude[name] = Fraction(entry) * Fraction(weight)
        if magnitude[name] > LARGEST:
            raise ArithmeticError(f"{name} is too large: weight times value is above {LARGEST:.3g}")
    message = {name: value.detach() for name, value in message.items()}
    return Sum({}, {}, [(message, weight)], [client], magnitude, Fraction(weight))


def _count(total: Sum, more: Sum) -> None:
    """Let `total` have what waits in `more`; raise, and change nothing, where the sum would be wrong."""
    if len(total.clients) + len(more.clients) > MAX_MESSAGES:
        raise RoundError(f"more than {MAX_MESSAGES} messages in one round")
    magnitude = {n: total.magnitude.get(n, 0) + value for n, value in more.magnitude.items()}
    for name, value in magnitude.items():
        if value > LARGEST:
            raise RoundError(
                f"{name} is too large: weights times values add up to more than {LARGEST:.3g}; send it scaled down"
            )
    total.magnitude |= magnitude
    total.waiting += more.waiting
    total.clients += more.clients
    total.weight += more.weight
    if len(total.waiting) >= TOGETHER:
        _settle(total)


def _settle(total: Sum) -> None:
    """Add what waits to the sums, exactly."""
    for name in total.waiting[0][0] if total.waiting else ():
        values = [message[name] for message, _ in total.waiting]
        if name not in total.coarse:
            total.coarse[name] = torch.zeros(values[0].shape, dtype=torch.double, device=values[0].device)
            total.fine[name] = torch.zeros_like(total.coarse[name], dtype=torch.int64)
        weights = total.coarse[name].new_tensor([[weight] for _, weight in total.waiting])
        shape = len(values), min(_block(total.coarse[name]), values[0].numel())
        products, highs = (total.coarse[name].new_empty(shape) for _ in range(2))
        for coarse, fine, *blocks in _blocks(total.coarse[name], total.fine[name], *values):
            product, high = products[:, : len(coarse)], highs[:, : len(coarse)]
            torch._foreach_copy_(product.unbind(), blocks)
            torch.add(product.mul_(weights), COARSE, out=high).sub_(COARSE - FINE)
            coarse.add_(high.sum(0))
            fine.add_(torch.sub(high, product, out=product).view(torch.int64).sum(0))
    total.waiting.clear()


def _wrapped(number: int) -> int:
    """As int64 has it, which counts modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


def _block(tensor: Tensor) -> int:
    return BLOCK if tensor.device.type == "cpu" else BLOCK_ON_GPU


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor.reshape(-1), _block(tensor)) for tensor in tensors), strict=True)
