"""Aggregators: the weighted mean of all messages, with the same bits in any order and grouping.

Floating-point sums depend on the order of their terms, and clients finish in any order. So the sum is exact here,
for all values and weights, and only the mean is rounded.

An entry's sum is held in bins, which are whole numbers: bin j counts units of 2^(45 j - 18). Each product of
weight and value, which is exact for float32 values and weights of 29 bits, is split into a multiple of one bin's
unit and a multiple of the next lower one's; bins 0 and -1 hold all digits of most products. Adding and subtracting
a large constant rounds to such a multiple (Demmel & Nguyen, Parallel Reproducible Summation, 2015). Digits below
both units go to the two next bins, only of the entries that have some. A weight of more bits counts as a sum of
two, and a message of larger or smaller numbers begins at another bin.

The cost is passes over memory. So numbers are not converted: where a constant was added to a product, a float64
counts in units of the bin, so its bits, read as an integer, are the bits of the constant plus the number of units.
And the processor's inexact flag tells at no cost that a subtraction did not round, so that there are no lower
digits to look for; where a trial finds that the flag does not tell it, they are always looked for.

Bins are made for a piece of a tensor when it needs them. Weights and products have a range, so there are at most
22 bins, of 8 bytes for each entry; float32 values with weights of one size make 9 at most.
"""

import platform
import struct
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ctypes import PyDLL
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import frexp, isfinite, ldexp
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import RoundError, one_line
from fedsim.federated.positions import GROUP, WHERE, check_positions, entries
from fedsim.types import Form, State, described, form_of

Partial = Any  # the partial sum of some messages; only its aggregator reads it


@runtime_checkable
class Aggregator(Protocol):
    """Makes one aggregate of all messages; it has the same bits in any order and grouping.

    `WeightedMean` adds messages up as they come, and `Rows` keeps them all.
    """

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


BIN_BITS = 45  # from the unit of a bin to the next
ROUND = 1.5 * 2.0**52  # a float64 to which a number is added becomes whole
FIRST_BIT = -18  # of the unit of bin 0
LOWEST = -11  # the lowest bin that rows begin at: digits below 2^-558 do not count; float32 products have none
# In a round: each makes two rows at most, and int64 holds the 2^44 units that each row adds to a bin.
MAX_MESSAGES = 2**17
EXACT_ROWS = 2**9  # whose sums of 2^44 units are exact in float64
WEIGHT_BITS = 29  # of a weight whose product with a float32 value is exact
WEIGHTS = 2.0**-200, 2.0**200  # the range of weights above 0
MAX_PRODUCT = 2.0**400
MESSAGES_AT_ONCE = 8  # messages that are added in one pass, since reading and writing the sums is the cost
PIECE = 2**16  # entries of a tensor that have bins of their own; on a CPU, their products stay in the cache
PIECE_ON_GPU = 2**21

Bins = dict[int, Tensor]  # by j: int64 (n,)


class Waiting(NamedTuple):
    """A message that is not in the bins yet."""

    message: State
    parts: list[float]  # of its weight; a row of products for each
    largest: dict[str, float]  # magnitudes of entries, by name


@dataclass
class Sum:
    """The exact sums of weight times value, by name, and of the weights.

    Under `where.NAME` are those of the weights that do not cover a position of the entry NAME.
    """

    bins: dict[tuple[str, int], Bins] = field(default_factory=dict)  # by name and number of the piece
    waiting: list[Waiting] = field(default_factory=list)
    rows: int = 0  # products in each sum
    clients: list[int] = field(default_factory=list)
    weight: Fraction = Fraction(0)


Sums = dict[Form, Sum]  # only messages of equal form can be added


class WeightedMean:
    """sum of w_k m_k / sum of w_k, entry by entry (McMahan 2017, Algorithm 1).

    The mean of float32 messages, and of shorter ones, is the exact one, rounded once: to the nearest, in a tie to
    the even one. Weights are 0, or from 2^-200 to 2^200; a message of weight 0 does not count. Of float64 messages
    each product is rounded to float64, their sum is exact, and it and the mean are rounded.

    Of an entry of which clients cover only some positions, each position has the mean of those who cover it.
    """

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Sums | None = None) -> Sums:
        total = {} if start is None else start
        for client, message, weight in updates:
            one = checked(client, message, weight)
            add(total.setdefault(form_of(entries(message)), Sum()), one)
        return total

    def merge(self, a: Sums, b: Sums) -> Sums:
        for form, theirs in b.items():
            if form in a:
                add(a[form], theirs)
            else:
                a[form] = theirs
        return a

    def mismatched(self, total: Sums) -> dict[int, str]:
        return other_forms(_clients(total))

    def result(self, total: Sums) -> State:
        form = most_common_form(_clients(total))
        sums = total.get(form, Sum())
        if not sums.weight:
            raise RoundError("no client's message has a weight above 0")
        return mean_of(sums, form)


def mean_of(sums: Sum, form: Form) -> State:
    """The mean of messages of this form, whose weight is above 0.

    Of an entry of which some cover only a part it is the mean of each position over those who cover it, and 0
    where nobody does; `where.NAME` is then the sum of the weights at each position, rounded to float64.
    """
    _flush(sums)
    mean: State = {}
    for name, shape, dtype in form:
        mean[name] = next(iter(sums.bins[name, 0].values())).new_empty(shape, dtype=dtype)
        results, in_part = [mean[name]], (WHERE + name, 0) in sums.bins
        if in_part:
            mean[WHERE + name] = torch.empty_like(mean[name], dtype=torch.float64)
            results.append(mean[WHERE + name])
        unsure = list[Unsure]()
        for number, (out, *covered) in enumerate(_pieces(*results)):
            bins = sums.bins[name, number]
            if in_part or dtype == torch.float64 or sums.rows > EXACT_ROWS:
                bins = _carried(bins)
            missing = sums.bins.get((WHERE + name, number))
            weights = _weights(missing, sums.weight, covered[0]) if missing else None
            unsure += _divide(bins, sums.weight, out, weights)
        if unsure:
            _settle(unsure, sums.weight)
    return mean


def _clients(total: Sums) -> dict[Form, list[int]]:
    return {form: sums.clients for form, sums in total.items()}


def most_common_form(clients: Mapping[Form, Sequence[int]]) -> Form:
    """The form that most clients sent; in a tie, that of the client with the lowest id."""
    return min(clients, key=lambda form: (-len(clients[form]), min(clients[form])), default=())


def other_forms(clients: Mapping[Form, Sequence[int]]) -> dict[int, str]:
    """The clients whose messages have another form than most, and why these do not count."""
    common = most_common_form(clients)
    return {
        client: f"sent {one_line(described(form))}, and most clients sent {one_line(described(common))}"
        for form, senders in clients.items()
        if form != common
        for client in senders
    }


def check_count(messages: int) -> None:
    """Raise RoundError if these are too many messages for one round."""
    if messages > MAX_MESSAGES:
        raise RoundError(f"more than {MAX_MESSAGES} messages in one round")


def largest(value: Tensor) -> float:
    """The largest magnitude of an entry; nan or inf if an entry is."""
    if not value.numel():
        return 0.0
    value = value.detach()
    if value.device.type == "cpu":  # two passes take half as long as aminmax
        return float(torch.maximum(-value.amin(), value.amax()))
    low, high = torch.aminmax(value)
    return float(torch.maximum(-low, high))


def magnitudes(message: State, weight: float) -> dict[str, float]:
    """The largest magnitude of each entry; raises ArithmeticError if message or weight is invalid by itself."""
    if not (isfinite(weight) and weight >= 0):
        raise ArithmeticError(f"the weight is {weight}; it must be finite and not negative")
    least, most = WEIGHTS
    if weight and not least <= weight <= most:
        raise ArithmeticError(f"the weight is {weight}; it must be 0, or from {least:.2g} to {most:.2g}")
    if GROUP in message:
        raise ArithmeticError("gives a group; the strategy's aggregator should be fedsim.GroupMeans")
    check_positions(message)
    found = dict[str, float]()
    for name, value in entries(message).items():
        if not value.is_floating_point():
            raise ArithmeticError(
                f"{name} is {value.dtype}, which cannot be averaged; send floating-point numbers"
            )
        found[name] = largest(value)
        if not isfinite(found[name]):
            raise ArithmeticError(f"{name} is not finite")
        if found[name] * weight > MAX_PRODUCT:
            raise ArithmeticError(f"{name} is too large: weight times value is above {MAX_PRODUCT:.3g}")
    return found


def checked(client: int, message: State, weight: float) -> Sum:
    """The message as a sum of one; raises ArithmeticError if it is invalid."""
    found, parts = magnitudes(message, weight), _parts(Fraction(weight))
    own = {name: value.detach() for name, value in entries(message).items()}
    # Of masks their complements are added up, so that who has none covers all.
    missing = {name: 1 - mask for name, mask in message.items() if name.startswith(WHERE)}
    one = Waiting(own | missing, parts, found | dict.fromkeys(missing, 1.0))
    return Sum({}, [one], len(parts), [client], Fraction(weight))


def _parts(number: Fraction, bits: int = WEIGHT_BITS) -> list[float]:
    """Floats of so many bits at most, whose sum is the number; [0.0] for 0.

    Of several, all but the last have 24 bits, so that few of their products have digits below bin -1.
    """
    parts, left = list[float](), number
    while left or not parts:
        part = _rounded(left, bits)
        parts.append(part if Fraction(part) == left else _rounded(left, 24))
        left -= Fraction(parts[-1])
    return parts


def _rounded(number: Fraction, bits: int) -> float:
    mantissa, exponent = frexp(float(number))
    return ldexp(round(mantissa * 2**bits), exponent - bits)


def add(total: Sum, more: Sum) -> None:
    """Add `more` to `total`; raises RoundError, without a change, if there are too many messages."""
    check_count(len(total.clients) + len(more.clients))
    for place, bins in more.bins.items():
        mine = total.bins.setdefault(place, {})
        for j, value in bins.items():
            _add_bin(mine, j, value)
    total.waiting += more.waiting
    total.rows += more.rows
    total.clients += more.clients
    total.weight += more.weight
    if len(total.waiting) >= MESSAGES_AT_ONCE:
        _flush(total)


def _add_bin(bins: Bins, j: int, value: Tensor) -> None:
    if bins:  # all bins of a piece are on one device
        value = value.to(next(iter(bins.values())).device)
    bins[j] = bins[j].add_(value) if j in bins else value


def _flush(total: Sum) -> None:
    """Add the waiting messages to the bins, exactly."""
    for name in dict.fromkeys(name for each in total.waiting for name in each.message):
        rows = defaultdict[int, list[tuple[float, Tensor]]](list)  # by the bin that they begin at
        for message, parts, most in total.waiting:
            if name in message:
                for part in parts:
                    rows[_first_bin(abs(part) * most[name])].append((part, message[name]))
        value = next(each.message[name] for each in total.waiting if name in each.message)
        device = next(iter(total.bins[name, 0].values())).device if (name, 0) in total.bins else value.device
        shape = 2, max(map(len, rows.values())), min(_piece(value), value.numel())
        memory = torch.empty(shape, dtype=torch.double, device=device)
        for j, pairs in rows.items():
            values = [value for _, value in pairs]
            weights = memory.new_tensor([[part] for part, _ in pairs])
            for number, block in enumerate(_pieces(*values)):
                product, high = memory[:, : len(pairs), : len(block[0])].unbind()
                torch._foreach_copy_(product.unbind(), block)
                product.mul_(weights)
                first = j if j <= 0 else _first_bin(largest(product))  # where large entries are, is worth a pass
                _add_products(total.bins.setdefault((name, number), {}), first, product, high)
    total.waiting.clear()


def _unit(j: int) -> float:
    return ldexp(1.0, BIN_BITS * j + FIRST_BIT)


def _first_bin(bound: float) -> int:
    """The lowest bin to which no row adds more than 2^44 units, if its products are up to `bound`."""
    return max(-((BIN_BITS - 1 + FIRST_BIT - frexp(bound)[1]) // BIN_BITS), LOWEST)


def _add_products(bins: Bins, j: int, product: Tensor, high: Tensor) -> None:
    """Add the sums of the columns of `product` (rows, n) to `bins`, exactly; the memory of both is reused."""
    size, columns = product.shape[1], None
    while True:
        upper, lower = ROUND * _unit(j), ROUND * _unit(j - 1)
        torch.add(product, upper, out=high)
        sums = [_units(high, upper)]
        high.sub_(upper + lower)
        # Now `high` becomes `lower` plus the rest of the product, rounded.
        rounded = [pair for pair in zip(product, high, strict=True) if not _subtract(*pair)]
        sums.append(_units(high, lower))
        for i, units in zip((j, j - 1), sums, strict=True):
            if columns is None:
                _add_bin(bins, i, units)
            else:
                if i not in bins:
                    bins[i] = units.new_zeros(size)
                bins[i].index_add_(0, columns, units)
        if not rounded or j == LOWEST:
            return
        left = [row.sub_(low.add_(torch.add(row, upper).sub_(upper + lower))) for row, low in rounded]
        some = _nonzero(torch.stack([row.bool() for row in left]).view(torch.uint8).amax(0))
        if not len(some):
            return
        j = max(j - 2, LOWEST)
        if len(some) < product.shape[1] / 2:
            columns = some if columns is None else columns[some]
            left = [row.index_select(0, some) for row in left]
        product = torch.stack(left)
        high = high[: len(left), : product.shape[1]]


def _units(numbers: Tensor, constant: float) -> Tensor:
    """The sums of the columns of `numbers` (rows, n), without the constant of each, in units of their last bit."""
    [bits] = struct.unpack("<q", struct.pack("<d", constant))
    whole = (bits * len(numbers) + 2**63) % 2**64 - 2**63  # as int64, which counts modulo 2^64
    return numbers.view(torch.int64).sum(0).sub_(whole)


def _nonzero(tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(tensor.bool().cpu().numpy())).to(tensor.device)  # faster than PyTorch's


def _subtract(a: Tensor, b: Tensor) -> bool:
    """Write a - b to `b`; returns whether it is certain that no difference was rounded."""
    in_this_thread = a.device.type == "cpu" and torch.get_num_threads() == 1  # whose flags these are
    if in_this_thread and (flags := _flags()):
        return not _flagged(flags, a, b)
    torch.sub(a, b, out=b)
    return False


def _flagged(flags: PyDLL, a: Tensor, b: Tensor) -> bool:
    flags.feclearexcept(INEXACT)
    torch.sub(a, b, out=b)
    return bool(flags.fetestexcept(INEXACT))


@cache
def _flags() -> PyDLL | None:
    """The C library's functions for the processor's flags; None where they do not tell what PyTorch rounded."""
    try:
        library = PyDLL("libm.so.6" if sys.platform == "linux" else None)
        one, last = torch.ones(PIECE, dtype=torch.double), torch.zeros(PIECE, dtype=torch.double)
        last[-1] = 2.0**-60  # which 1 - 2^-60 loses
        told = [_flagged(library, one, b) for b in (one.clone(), last, one.clone())]
        return library if told == [False, True, False] else None
    except (OSError, AttributeError, TypeError):
        return None


INEXACT = {"x86_64": 0x20, "aarch64": 0x10, "arm64": 0x10}.get(platform.machine(), 0)  # FE_INEXACT of C


def _carried(bins: Bins) -> Bins:
    """The same sums with 2^44 units in a bin at most."""
    digits, carry = Bins(), torch.zeros_like(next(iter(bins.values())))
    for j in range(min(bins), max(bins) + 2):
        number = carry + bins[j] if j in bins else carry
        carry = (number + 2 ** (BIN_BITS - 1)) >> BIN_BITS
        digits[j] = number - (carry << BIN_BITS)
    return digits


class Unsure(NamedTuple):
    """Entries of a mean for which only exact arithmetic can tell which of two neighbours is nearer."""

    out: Tensor  # (n,)
    places: Tensor  # (u,) of these entries in `out`
    other: Tensor  # (u,) the neighbours of what is there
    bins: Bins  # (u,) each
    weights: Bins  # the same of the weights at each position; empty where these are all weights


def _value(bins: Bins) -> tuple[Tensor, int]:
    """The sum of `bins` in float64, in units of the highest bin, and which that is."""
    top, *rest = sorted(bins, reverse=True)
    number = bins[top].double()
    for j in rest:
        number.add_(bins[j].double(), alpha=2.0 ** (BIN_BITS * (j - top)))
    return number, top


class Weights(NamedTuple):
    """The sum of the weights at each position."""

    exact: Bins  # with 2^44 units in a bin at most
    rounded: Tensor  # (n,)
    all_cover: Tensor  # (n,) whether it is the sum of all weights


def _weights(missing: Bins, weight: Fraction, out: Tensor) -> Weights:
    """All weights without the sums of `missing`; what is rounded is written to `out`."""
    zeros, whole = torch.zeros_like(next(iter(missing.values()))), _whole_bins(weight)
    exact = _carried({j: whole.get(j, 0) - missing.get(j, zeros) for j in {*missing, *whole}})
    number, top = _value(exact)
    all_cover = torch.stack([value == 0 for value in missing.values()]).all(0)
    return Weights(exact, out.copy_(number.mul_(_unit(top))), all_cover)


def _whole_bins(number: Fraction) -> dict[int, int]:
    """A sum of weights in units of bins, less than 2^45 of each."""
    j = 0
    while number % Fraction(_unit(j)):
        j -= 1
    left, bins = number // Fraction(_unit(j)), dict[int, int]()
    while left:
        left, bins[j] = divmod(left, 2**BIN_BITS)
        j += 1
    return bins


def _divide(bins: Bins, weight: Fraction, out: Tensor, weights: Weights | None = None) -> list[Unsure]:
    """Write the sum of `bins` / weight to `out`; in float64, sum and quotient are both rounded.

    With `weights`, each entry is divided by its own, and is 0 where that is 0.
    """
    number, top = _value(bins)
    # The roundings to float64 are less than 2^-48; and PyTorch rounds to 16 bits by way of float32.
    error = {torch.float64: Fraction(0), torch.float32: Fraction(1, 2**48)}.get(out.dtype, Fraction(1, 2**22))
    factor = Fraction(_unit(top)) / weight
    above: float | Tensor = float(factor * (1 + error))
    below: float | Tensor = float(factor * (1 - error))
    if weights:
        each = _unit(top) / weights.rounded.where(weights.rounded > 0, 1)
        each[weights.all_cover] = float(factor)  # the same bits as those of the mean of all
        above, below = each * float(1 + 4 * error), each * float(1 - 4 * error)  # there were more roundings
    out.copy_(number * above)
    other = number.mul_(below).to(out.dtype)
    places = _nonzero(out - other)
    if not len(places):
        return []
    kept = [{j: value[places] for j, value in each.items()} for each in (bins, weights.exact if weights else {})]
    return [Unsure(out, places, other[places], *kept)]


def _settle(unsure: list[Unsure], weight: Fraction) -> None:
    """Round these entries to the nearest number, and to the even one if both are as near."""
    counts = [len(each.places) for each in unsure]
    a = torch.cat([each.out[each.places] for each in unsure])
    b = torch.cat([each.other for each in unsure])
    middle = (a.double() + b.double()) / 2
    bins = _joined([each.bins for each in unsure], counts)
    weights = _joined([each.weights for each in unsure], counts)
    parts = _digits(weights) if weights else _parts(weight, WEIGHT_BITS - 1)
    products = torch.stack([middle * -part for part in parts])
    _add_products(bins, _first_bin(largest(products)), products, torch.empty_like(products))
    side = torch.zeros_like(next(iter(bins.values())))
    for _, digits in sorted(_carried(bins).items(), reverse=True):
        side = torch.where(side == 0, digits.sign(), side)
    nearer = torch.where(side > 0, torch.maximum(a, b), torch.minimum(a, b))
    nearer = torch.where(side == 0, middle.to(a.dtype), nearer)
    for each, value in zip(unsure, torch.split(nearer, counts), strict=True):
        each.out[each.places] = value


def _joined(pieces: list[Bins], counts: list[int]) -> Bins:
    """The bins of all pieces, which have so many entries, one after the other."""
    bins, start = Bins(), 0
    for piece, count in zip(pieces, counts, strict=True):
        for j, value in piece.items():
            bins.setdefault(j, value.new_zeros(sum(counts)))[start : start + count] = value
        start += count
    return bins


def _digits(bins: Bins) -> list[Tensor]:
    """Numbers of 23 bits at most, whose sum is that of `bins`; these have 2^44 units at most."""
    half = 2**22
    return [part.double() * _unit(j) for j, value in bins.items() for part in (value - value % half, value % half)]


def _piece(tensor: Tensor) -> int:
    return PIECE if tensor.device.type == "cpu" else PIECE_ON_GPU


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of all tensors at once."""
    return zip(*(torch.split(tensor.reshape(-1), _piece(tensor)) for tensor in tensors), strict=True)
