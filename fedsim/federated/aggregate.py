"""Aggregators: the weighted mean of all messages, with the same bits in any order and grouping.

Floating-point sums depend on the order of their terms, and clients finish in any order. So the sum is exact here,
for all values and weights, and only the mean is rounded.

float64 adds exactly if every term is a multiple of one unit and no sum reaches 2^53 units. So each product of
weight and value, which is exact for float32 values and weights of 29 bits, is split into a multiple of 2^-18 and a
multiple of 2^-63, and both parts are summed separately. Adding and subtracting a large constant rounds to such a
multiple (Demmel & Nguyen, Parallel Reproducible Summation, 2015). A weight of more bits counts as a sum of two.

The cost is passes over memory, so the constants are subtracted once, from the sums: each product p adds high =
FINE + (p rounded to 2^-18) to the coarse sum, and the bits of high - p to the fine sum. That difference is FINE
minus the rest of p. There a float64 counts in units of 2^-63, so its bits, read as an integer, are the bits of
FINE minus the number of units.

What these two sums cannot hold goes to bins: products above 2^30, digits below 2^-63, and a coarse sum that is
full. Bin j sums multiples of 2^(40 j) in int64, for a piece of a tensor, and is made when the piece needs it. As
weights and products have a range, messages make 25 bins at most, of 8 bytes for each entry; float32 values with
weights of one size make 9 at most.
"""

import platform
import struct
import sys
from collections.abc import Iterable, Iterator
from ctypes import PyDLL
from dataclasses import dataclass, field
from fractions import Fraction
from math import frexp, isfinite
from typing import Any, NamedTuple, Protocol

import numpy as np
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


COARSE, FINE = 1.5 * 2.0 ** (52 - 18), 1.5 * 2.0 ** (52 - 63)  # adding one rounds to 2^-18, the other to 2^-63
FULL = 2.0**33  # bound of a sum of magnitudes in the coarse sum: 2^51 units
LARGE = 2.0**30  # products above it go to bins
MAX_MESSAGES = 2**17  # in a round; each leaves two rests of up to half a coarse unit: 2^62 fine units in total
FINE_BITS = struct.unpack("<q", struct.pack("<d", FINE))[0]  # the bits of FINE as an integer
WEIGHT_BITS = 29  # of a weight whose product with a float32 value is exact
WEIGHTS = 2.0**-200, 2.0**200  # the range of weights above 0
MAX_PRODUCT = 2.0**400
MIN_PRODUCT = 2.0**-560  # digits below it do not count; products of float32 values have none
BIN_BITS = 40  # which leaves 2^23 terms until int64 overflows
PIECE = 2**16  # entries of a tensor that have bins of their own
MESSAGES_AT_ONCE = 8  # messages that are added in one pass, since reading and writing the sums is the cost
BLOCK_ON_CPU = PIECE  # entries at a time, so that intermediate results stay in the cache
BLOCK_ON_GPU = 2**21  # intermediate results take 16 bytes of memory for each entry and message

Bins = dict[int, Tensor]  # by j: int64 (n,), in units of 2^(BIN_BITS j)


@dataclass
class Sum:
    """The exact sums of weight times value, by name, and of the weights."""

    coarse: State = field(default_factory=dict)  # float64: multiples of 2^-18, plus FINE for each row
    fine: State = field(default_factory=dict)  # int64, modulo 2^64: FINE_BITS a row, minus units of 2^-63
    bins: dict[tuple[str, int], Bins] = field(default_factory=dict)  # by name and number of the piece
    waiting: list[tuple[State, float]] = field(default_factory=list)  # rows that are not in the sums above yet
    large: set[str] = field(default_factory=set)  # names in these rows that may have products above LARGE
    rows: int = 0  # products in each sum: one for each part of a message's weight
    magnitude: dict[str, Fraction] = field(default_factory=dict)  # bounds of the coarse sums
    clients: list[int] = field(default_factory=list)
    weight: Fraction = Fraction(0)


Sums = dict[Form, Sum]  # only messages of equal form can be added


class WeightedMean:
    """sum of w_k m_k / sum of w_k, entry by entry (McMahan 2017, Algorithm 1).

    The mean of float32 messages, and of shorter ones, is the exact one, rounded once: to the nearest, in a tie to
    the even one. Weights are 0, or from 2^-200 to 2^200; a message of weight 0 does not count. Of float64 messages
    each product is rounded to float64, their sum is exact, and it and the mean are rounded.
    """

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Sums | None = None) -> Sums:
        total = {} if start is None else start
        for client, message, weight in updates:
            checked = _checked(client, message, weight)
            _add(total.setdefault(form_of(message), Sum()), checked)
        return total

    def merge(self, a: Sums, b: Sums) -> Sums:
        for form, theirs in b.items():
            if form in a:
                _add(a[form], theirs)
            else:
                a[form] = theirs
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
        for name, shape, dtype in form:
            mean[name] = torch.empty(shape, dtype=dtype, device=sums.coarse[name].device)
            unsure, flat = list[Unsure](), mean[name].view(-1)
            for number, (coarse, fine, out) in enumerate(_blocks(PIECE, sums.coarse[name], sums.fine[name], flat)):
                terms = _terms(sums.rows, coarse, fine)
                if bins := sums.bins.get((name, number)):
                    terms = _digits(_spread(torch.stack(terms), {j: value.clone() for j, value in bins.items()}))
                unsure.append(_divide(terms, sums.weight, out))
            _settle(unsure, sums.weight)
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
    """The message as a sum of one; raises ArithmeticError if it is invalid."""
    if not (isfinite(weight) and weight >= 0):
        raise ArithmeticError(f"the weight is {weight}; it must be finite and not negative")
    least, most = WEIGHTS
    if weight and not least <= weight <= most:
        raise ArithmeticError(f"the weight is {weight}; it must be 0, or from {least:.2g} to {most:.2g}")
    parts, magnitude, large = _parts(Fraction(weight)), dict[str, Fraction](), set[str]()
    for name, value in message.items():
        if not value.is_floating_point():
            raise ArithmeticError(
                f"{name} is {value.dtype}, which cannot be averaged; send floating-point numbers"
            )
        entry = largest(value)
        if not isfinite(entry):
            raise ArithmeticError(f"{name} is not finite")
        bound = Fraction(entry) * sum(abs(Fraction(part)) for part in parts)
        if bound > MAX_PRODUCT:
            raise ArithmeticError(f"{name} is too large: weight times value is above {MAX_PRODUCT:.3g}")
        if bound > LARGE:
            large.add(name)
        magnitude[name] = min(bound, Fraction(len(parts) * LARGE))
    message = {name: value.detach() for name, value in message.items()}
    waiting = [(message, part) for part in parts]
    return Sum({}, {}, {}, waiting, large, len(parts), magnitude, [client], Fraction(weight))


def _parts(number: Fraction, bits: int = WEIGHT_BITS) -> list[float]:
    """Floats of so many bits at most, whose sum is the number; [0.0] for 0."""
    parts, left = list[float](), number
    while left or not parts:
        mantissa, exponent = frexp(float(left))
        parts.append(round(mantissa * 2**bits) * 2.0 ** (exponent - bits))
        left -= Fraction(parts[-1])
    return parts


def _add(total: Sum, more: Sum) -> None:
    """Add `more` to `total`; raises RoundError, without a change, if there are too many messages."""
    if len(total.clients) + len(more.clients) > MAX_MESSAGES:
        raise RoundError(f"more than {MAX_MESSAGES} messages in one round")
    _add_tensors(total.coarse, more.coarse)
    _add_tensors(total.fine, more.fine)
    for place, bins in more.bins.items():
        _add_tensors(total.bins.setdefault(place, {}), bins)
    total.waiting += more.waiting
    total.large |= more.large
    total.rows += more.rows
    total.magnitude = {name: total.magnitude.get(name, 0) + value for name, value in more.magnitude.items()}
    total.clients += more.clients
    total.weight += more.weight
    full = [name for name, value in total.magnitude.items() if value > FULL]
    if full or len(total.waiting) >= MESSAGES_AT_ONCE:
        _flush(total)
    for name in full:
        _empty(total, name)


def _add_tensors(total: dict[Any, Tensor], more: dict[Any, Tensor]) -> None:
    for key, value in more.items():
        total[key] = total[key].add_(value.to(total[key].device)) if key in total else value


def _flush(total: Sum) -> None:
    """Add the waiting messages to the sums, exactly."""
    for name in total.waiting[0][0] if total.waiting else ():
        values = [message[name] for message, _ in total.waiting]
        if name not in total.coarse:
            total.coarse[name] = torch.zeros(values[0].shape, dtype=torch.double, device=values[0].device)
            total.fine[name] = torch.zeros_like(total.coarse[name], dtype=torch.int64)
        weights = total.coarse[name].new_tensor([[weight] for _, weight in total.waiting])
        size = BLOCK_ON_CPU if total.coarse[name].device.type == "cpu" else BLOCK_ON_GPU
        shape = len(values), min(size, values[0].numel())
        products, highs = (total.coarse[name].new_empty(shape) for _ in range(2))
        blocks = _blocks(size, total.coarse[name], total.fine[name], *values)
        for number, (coarse, fine, *block) in enumerate(blocks):
            product, high = products[:, : len(coarse)], highs[:, : len(coarse)]
            torch._foreach_copy_(product.unbind(), block)
            product.mul_(weights)
            if name in total.large:
                product.masked_fill_(product.abs() > LARGE, 0)
            torch.add(product, COARSE, out=high).sub_(COARSE - FINE)
            coarse.add_(high.sum(0))
            rounded = _subtract(high, product)
            fine.add_(product.view(torch.int64).sum(0))
            if rounded or name in total.large:
                high.sub_(product)  # what is now in the sums
                torch._foreach_copy_(product.unbind(), block)
                _keep(total, name, number * size, product.mul_(weights).sub_(high))
    total.waiting.clear()
    total.large.clear()


def _subtract(high: Tensor, product: Tensor) -> bool:
    """Write high - product to `product`; returns whether a difference was rounded."""
    if LIBM and product.device.type == "cpu" and torch.get_num_threads() == 1:  # the flag is this thread's
        LIBM.feclearexcept(INEXACT)
        torch.sub(high, product, out=product)
        return bool(LIBM.fetestexcept(INEXACT))
    difference = high - product
    rounded = not torch.equal(high - difference, product)
    product.copy_(difference)
    return rounded


def _libm() -> PyDLL | None:
    """The C library's functions for the flags of floating-point arithmetic, which cost no pass over memory."""
    try:
        library = PyDLL("libm.so.6" if sys.platform == "linux" else None)
        return library if INEXACT and library.feclearexcept and library.fetestexcept else None
    except (OSError, AttributeError, TypeError):
        return None


INEXACT = {"x86_64": 0x20, "aarch64": 0x10, "arm64": 0x10}.get(platform.machine(), 0)  # FE_INEXACT of C
LIBM = _libm()


def _empty(total: Sum, name: str) -> None:
    """Move a coarse sum to bins."""
    constant = FINE * total.rows
    for number, (coarse,) in enumerate(_blocks(PIECE, total.coarse[name])):
        _keep(total, name, number * PIECE, (coarse - constant)[None])
        coarse.fill_(constant)
    total.magnitude[name] = Fraction(0)


def _keep(total: Sum, name: str, first: int, terms: Tensor) -> None:
    """Add `terms` (rows, n), which belong to the entries from `first` on, to bins; their memory is reused."""
    for number, piece in enumerate(torch.split(terms, PIECE, 1), start=first // PIECE):
        bins = total.bins.get((name, number), {})
        if _spread(piece, bins):
            total.bins[name, number] = bins


def _spread(terms: Tensor, bins: Bins) -> Bins:
    """Add the sums of the columns of `terms` (rows, n) to `bins`, exactly, and return these; zeros are left."""
    while (top := largest(terms)) >= MIN_PRODUCT:
        j = (frexp(top)[1] - 1) // BIN_BITS
        unit = 2.0 ** (BIN_BITS * j)
        high = terms.div(unit).round_()
        _add_tensors(bins, {j: high.sum(0).long()})
        terms.sub_(high.mul_(unit))
    return bins


def _digits(bins: Bins) -> list[Tensor]:
    """The sum of `bins` as terms (n,), largest first: multiples of 2^(BIN_BITS j), up to half of the next."""
    digits, carry = list[Tensor](), torch.zeros_like(next(iter(bins.values())))
    for j in range(min(bins), max(bins) + 2):
        number = carry + bins[j] if j in bins else carry
        carry = (number + 2 ** (BIN_BITS - 1)) >> BIN_BITS
        digits.append((number - (carry << BIN_BITS)).double().mul_(2.0 ** (BIN_BITS * j)))
    return digits[::-1]


def _terms(rows: int, coarse: Tensor, fine: Tensor) -> list[Tensor]:
    """The sums without their constants, as terms (n,), largest first; each is exact."""
    rest = _as_int64(FINE_BITS * rows) - fine
    parts = [rest] if rows <= 2**9 else [rest & -(2**32), rest & (2**32 - 1)]  # up to 2^53, exact as float64
    return [coarse - FINE * rows, *(part.double().mul_(2.0**-63) for part in parts)]


class Unsure(NamedTuple):
    """Entries of a mean for which only exact arithmetic can tell which of two neighbours is nearer."""

    out: Tensor  # (n,)
    places: Tensor  # (u,) of these entries in `out`
    apart: Tensor  # (u,) from the number there to the other one
    terms: list[Tensor]  # (u,) each, of the sum


def _divide(terms: list[Tensor], weight: Fraction, out: Tensor) -> Unsure:
    """Write the sum of `terms` (n,) / weight to `out`; in float64, sum and quotient are both rounded."""
    mean = terms[0].clone()
    for term in terms[1:]:
        mean += term
    mean.div_(float(weight))
    # Four roundings to float64 are less than 2^-50; and PyTorch rounds to 16 bits by way of float32.
    error = {torch.float64: 0.0, torch.float32: 2.0**-49}.get(out.dtype, 2.0**-22)
    out.copy_(mean.mul_(1 + error))
    apart = mean.mul_(1 - 2 * error).to(out.dtype, copy=True).sub_(out)
    places = torch.from_numpy(np.flatnonzero(apart.bool().cpu().numpy())).to(out.device)
    return Unsure(out, places, apart[places], [term[places] for term in terms])


def _settle(unsure: list[Unsure], weight: Fraction) -> None:
    """Round these entries to the nearest number, and to the even one if both are as near."""
    most = max((len(each.terms) for each in unsure if len(each.places)), default=0)
    if not most:
        return
    a = torch.cat([each.out[each.places] for each in unsure])
    b = a + torch.cat([each.apart for each in unsure])  # exact: they are neighbours
    middle = (a.double() + b.double()) / 2
    rows = [
        torch.cat([each.terms[i] if i < len(each.terms) else torch.zeros_like(each.terms[0]) for each in unsure])
        for i in range(most)
    ]
    side = _sign(torch.stack([*rows, *(middle * -part for part in _parts(weight, WEIGHT_BITS - 1))]))
    nearer = torch.where(side > 0, torch.maximum(a, b), torch.minimum(a, b))
    nearer = torch.where(side == 0, middle.to(a.dtype), nearer)
    for each, value in zip(unsure, torch.split(nearer, [len(each.places) for each in unsure]), strict=True):
        each.out[each.places] = value


def _sign(terms: Tensor) -> Tensor:
    """The signs (n,) of the sums of the columns of `terms` (rows, n), whose memory is reused."""
    digits = _digits(_spread(terms, {0: terms.new_zeros(terms.shape[1], dtype=torch.int64)}))
    sign = torch.zeros_like(digits[0])
    for digit in digits:
        sign = torch.where(sign == 0, digit.sign(), sign)
    return sign


def _as_int64(number: int) -> int:
    """The number modulo 2^64, in the range of int64."""
    return (number + 2**63) % 2**64 - 2**63


def _blocks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of `size` entries at most, of all tensors at once."""
    return zip(*(torch.split(tensor.reshape(-1), size) for tensor in tensors), strict=True)
