"""Aggregators: the weighted mean of all messages, with the same bits in any order and grouping.

Floating-point sums depend on the order of their terms, and clients finish in any order. But float64 adds exactly
if every term is a multiple of one unit and no sum reaches 2^53 units. So each product of weight and value, which
is exact for float32 values and weights below 2^29, is split into a multiple of 2^-18 and a multiple of 2^-55, and
both parts are summed separately. Adding and subtracting a large constant rounds to such a multiple (Demmel &
Nguyen, Parallel Reproducible Summation, 2015). The error of a product is at most half of 2^-55.

The cost is passes over memory, so the constants are subtracted once, from the sums: each product p adds high =
FINE + (p rounded to 2^-18) to the coarse sum, and the bits of high - p to the fine sum. That difference is FINE
minus the rest of p. There a float64 counts in units of 2^-55, so its bits, read as an integer, are the bits of
FINE minus the number of units.
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

Partial = Any  # the partial sum of some messages; only its aggregator reads it


class Aggregator(Protocol):
    """Adds up messages; the result has the same bits in any order and grouping."""

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Partial | None = None) -> Partial:
        """Add updates (client, message, weight) to `start`, or to an empty sum; the caller must not reuse `start`.

        Raises ArithmeticError if a message is invalid by itself, and RoundError if messages cannot be added
        although each is valid; `start` is then unchanged.
        """

    def merge(self, a: Partial, b: Partial) -> Partial:
        """The sum of `a` and `b`; the caller must not reuse either. Raises RoundError."""

    def mismatched(self, total: Partial) -> dict[int, str]:
        """Clients whose messages differ in form from those of most clients, and why; the result excludes them."""

    def result(self, total: Partial) -> State:
        """The aggregate; raises RoundError if no message has a positive weight."""


COARSE, FINE = 1.5 * 2.0 ** (52 - 18), 1.5 * 2.0 ** (52 - 55)  # adding one rounds to 2^-18, the other to 2^-55
MAX_MAGNITUDE = 2.0**33  # bound of a sum of magnitudes: 2^51 coarse units
MAX_MESSAGES = 2**17  # in a round; each leaves a rest of up to half a coarse unit: 2^53 fine units in total
FINE_BITS = struct.unpack("<q", struct.pack("<d", FINE))[0]  # the bits of FINE as an integer
MESSAGES_AT_ONCE = 8  # messages that are added in one pass, since reading and writing the sums is the cost
BLOCK_ON_CPU = 2**16  # entries at a time, so that intermediate results stay in the cache
BLOCK_ON_GPU = 2**21  # intermediate results take 16 bytes of memory for each entry and message


@dataclass
class Sum:
    """The exact sums of weight times value, by name, and of the weights."""

    coarse: State = field(default_factory=dict)  # float64: multiples of 2^-18, plus FINE for each message
    fine: State = field(default_factory=dict)  # int64, modulo 2^64: FINE_BITS a message, minus units of 2^-55
    waiting: list[tuple[State, float]] = field(default_factory=list)  # not in these sums yet, but in all below
    clients: list[int] = field(default_factory=list)
    magnitude: dict[str, Fraction] = field(default_factory=dict)  # sum of the largest entries' magnitudes
    weight: Fraction = Fraction(0)


Sums = dict[Form, Sum]  # only messages of equal form can be added


class WeightedMean:
    """sum of w_k m_k / sum of w_k, entry by entry (McMahan 2017, Algorithm 1)."""

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Sums | None = None) -> Sums:
        total = {} if start is None else start
        for client, message, weight in updates:
            checked = _checked(client, message, weight)
            _add_waiting(total.setdefault(form_of(message), Sum()), checked)
        return total

    def merge(self, a: Sums, b: Sums) -> Sums:
        for form, theirs in b.items():
            if form not in a:
                a[form] = theirs
                continue
            mine = a[form]
            _add_waiting(mine, theirs)
            for total, more in ((mine.coarse, theirs.coarse), (mine.fine, theirs.fine)):
                for name, value in more.items():
                    total[name] = total[name].add_(value.to(total[name].device)) if name in total else value
        return a

    def mismatched(self, total: Sums) -> dict[int, str]:
        common = _most_common_form(total)
        return {
            client: f"sent {described(form)}, and most clients sent {described(common)}"
            for form, sums in total.items()
            if form != common
            for client in sums.clients
        }

    def result(self, total: Sums) -> State:
        form = _most_common_form(total)
        sums = total.get(form, Sum())
        if not sums.weight:
            raise RoundError("no client's message has a weight above 0")
        _flush(sums)
        mean: State = {}
        constant, bits = FINE * len(sums.clients), _as_int64(FINE_BITS * len(sums.clients))
        for name, shape, dtype in form:
            mean[name] = torch.empty(shape, dtype=dtype, device=sums.coarse[name].device)
            for coarse, fine, out in _blocks(sums.coarse[name], sums.fine[name], mean[name]):
                rest = (bits - fine).double().mul_(2.0**-55)
                out.copy_((coarse - constant).add_(rest).div_(float(sums.weight)))
        return mean


def _most_common_form(total: Sums) -> Form:
    """The form of most messages; in a tie, the form of the client with the lowest id."""
    return min(total, key=lambda form: (-len(total[form].clients), min(total[form].clients)), default=())


def largest(value: Tensor) -> float:
    """The largest magnitude of an entry; nan or inf if an entry is."""
    if not value.numel():
        return 0.0
    value = value.detach()
    if value.device.type == "cpu":  # two passes take half as long as aminmax
        return float(torch.maximum(-value.amin(), value.amax()))
    low, high = torch.aminmax(value)
    return float(torch.maximum(-low, high))


def _checked(client: int, message: State, weight: float) -> Sum:
    if not (isfinite(weight) and weight >= 0):
        raise ArithmeticError(f"the weight is {weight}; it must be finite and not negative")
    magnitude = dict[str, Fraction]()
    for name, value in message.items():
        if not value.is_floating_point():
            raise ArithmeticError(
                f"{name} is {value.dtype}, which cannot be averaged; send floating-point numbers"
            )
        entry = largest(value)
        if not isfinite(entry):
            raise ArithmeticError(f"{name} is not finite")
        magnitude[name] = Fraction(entry) * Fraction(weight)
        if magnitude[name] > MAX_MAGNITUDE:
            raise ArithmeticError(f"{name} is too large: weight times value is above {MAX_MAGNITUDE:.3g}")
    message = {name: value.detach() for name, value in message.items()}
    return Sum({}, {}, [(message, weight)], [client], magnitude, Fraction(weight))


def _add_waiting(total: Sum, more: Sum) -> None:
    """Add the waiting messages of `more` to those of `total`; raises, without a change, if sums would overflow."""
    if len(total.clients) + len(more.clients) > MAX_MESSAGES:
        raise RoundError(f"more than {MAX_MESSAGES} messages in one round")
    magnitude = {n: total.magnitude.get(n, 0) + value for n, value in more.magnitude.items()}
    for name, value in magnitude.items():
        if value > MAX_MAGNITUDE:
            raise RoundError(
                f"{name} is too large: weights times values sum to over {MAX_MAGNITUDE:.3g}; scale messages down"
            )
    total.magnitude |= magnitude
    total.waiting += more.waiting
    total.clients += more.clients
    total.weight += more.weight
    if len(total.waiting) >= MESSAGES_AT_ONCE:
        _flush(total)


def _flush(total: Sum) -> None:
    """Add the waiting messages to the sums, exactly."""
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


def _as_int64(number: int) -> int:
    """The number modulo 2^64, in the range of int64."""
    return (number + 2**63) % 2**64 - 2**63


def _block(tensor: Tensor) -> int:
    return BLOCK_ON_CPU if tensor.device.type == "cpu" else BLOCK_ON_GPU


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor.reshape(-1), _block(tensor)) for tensor in tensors), strict=True)
