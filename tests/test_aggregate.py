"""Laws of the weighted mean: any order and grouping gives the same bits, and those are the right ones."""

from collections import Counter
from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fedsim import RoundError
from fedsim.federated.aggregate import MAX_MAGNITUDE, MESSAGES_AT_ONCE, WeightedMean

MEAN = WeightedMean()
LENGTH = 3


def message(*values, dtype=torch.float32):
    return {"w": torch.tensor(values, dtype=dtype)}


def updates_of(*pairs, dtype=torch.float32):
    """(client, message, weight), from (values, weight)."""
    return [(k, message(*values, dtype=dtype), weight) for k, (values, weight) in enumerate(pairs)]


def numbers(width):
    bound = float(np.float32(1e5))
    return st.floats(-bound, bound, width=width) | st.floats(-1, 1, width=width).map(lambda v: v * 2**-30)


def updates(width):
    """Messages as clients send them: weights are numbers of examples, or any other."""
    dtype = torch.float32 if width == 32 else torch.float64
    weights = st.integers(0, 10_000).map(float) | st.floats(0, 100)
    pair = st.tuples(st.lists(numbers(width), min_size=LENGTH, max_size=LENGTH), weights)
    return st.lists(pair, min_size=1, max_size=8).map(lambda pairs: updates_of(*pairs, dtype=dtype))


def exact(updates):
    """The mean as fractions, and the same of magnitudes."""
    weights = [Fraction(weight) for _, _, weight in updates]
    columns = list(zip(*([Fraction(v) for v in m["w"].tolist()] for _, m, _ in updates), strict=True))
    means = [sum(w * v for w, v in zip(weights, column, strict=True)) / sum(weights) for column in columns]
    sizes = [sum(w * abs(v) for w, v in zip(weights, column, strict=True)) / sum(weights) for column in columns]
    return means, sizes


def scattered(updates, rng):
    """The partial of all updates, folded in any order onto any partial, and merged in any grouping."""
    parts = [MEAN.fold([])]
    for update in rng.sample(updates, len(updates)):
        start = parts.pop(rng.randrange(len(parts))) if rng.random() < 0.5 and parts else None
        parts.append(MEAN.fold([update], start))
    while len(parts) > 1:
        rng.shuffle(parts)
        parts.append(MEAN.merge(parts.pop(), parts.pop()))
    return parts[0]


def bits(state):
    return {name: (value.dtype, value.shape, value.numpy().tobytes()) for name, value in state.items()}


@given(updates(32) | updates(64), st.randoms(use_true_random=False))
def test_any_order_and_grouping_gives_the_same_bits(updates, rng):
    assume(any(weight for _, _, weight in updates))
    assert bits(MEAN.result(scattered(updates, rng))) == bits(MEAN.result(MEAN.fold(updates)))


@example(updates_of(([1e-12] * 3, 1.0), ([3e-12] * 3, 2.0), ([-2e-12] * 3, 5.0)))
@example(updates_of(([1e-6] * 3, 1.0), ([1e3] * 3, 7.0), ([-1e3] * 3, 7.0)))
@example(updates_of(([1e6, 1e-9, 1.0], 600.0), ([1e6, -1e-9, 1.0], 600.0)))
@given(updates(32) | updates(64))
def test_the_mean_is_exact_to_the_last_rounding(updates):
    """To one rounding of the result's type, and half units of 2^-55; float64 products are themselves rounded."""
    total = sum(weight for _, _, weight in updates)
    assume(total >= 1)
    found = MEAN.result(MEAN.fold(updates))["w"]
    double = found.dtype == torch.float64
    for value, mean, size in zip(found.tolist(), *exact(updates), strict=True):
        rounding = (
            size * Fraction(2) ** -50 if double else abs(mean) * Fraction(2) ** -24 + size * Fraction(2) ** -52
        )
        units = Fraction(len(updates), 2**56) / Fraction(total)
        assert abs(Fraction(value) - mean) <= rounding + units + Fraction(2) ** -149


def test_small_values_keep_their_digits():
    """1e-10 is far below 1, and has seven digits all the same."""
    found = MEAN.result(MEAN.fold(updates_of(([1e-10], 1.0), ([1e-10], 3.0))))["w"]
    torch.testing.assert_close(found, torch.tensor([1e-10]), rtol=1e-6, atol=0)


def test_every_name_has_a_mean_of_its_own():
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([[2.0, 4.0]])}
    b = {"y": torch.tensor([[6.0, 0.0]]), "x": torch.tensor([5.0])}
    mean = MEAN.result(MEAN.fold([(0, a, 3.0), (1, b, 1.0)]))
    assert {name: value.tolist() for name, value in mean.items()} == {"x": [2.0], "y": [[3.0, 3.0]]}


def test_messages_are_only_read():
    for dtype in (torch.float32, torch.float64):
        update = updates_of(([1.5, -2.5], 3.0), dtype=dtype)
        MEAN.result(MEAN.merge(MEAN.fold(update), MEAN.fold(update)))
        assert update[0][1]["w"].tolist() == [1.5, -2.5]


def test_who_has_no_weight_does_not_count():
    assert MEAN.result(MEAN.fold(updates_of(([2.0], 1.0), ([9.0], 0.0))))["w"].tolist() == [2.0]


REFUSED = {
    "nan": (message(0.0, nan), 1.0, "w is not finite"),
    "inf": (message(0.0, inf), 1.0, "w is not finite"),
    "inf of no weight": (message(0.0, -inf), 0.0, "w is not finite"),
    "huge": (message(0.0, 1e38), 1.0, "w is too large"),
    "huge by its weight": (message(0.0, MAX_MAGNITUDE), 1.5, "w is too large"),
    "negative weight": (message(1.0, 2.0), -1.0, "weight is -1.0"),
    "weight nan": (message(1.0, 2.0), nan, "weight is nan"),
    "weight inf": (message(1.0, 2.0), inf, "weight is inf"),
    "whole numbers": (message(1, 2, dtype=torch.int64), 1.0, r"w is torch\.int64, which cannot be averaged"),
    "complex numbers": (
        message(1j, 2, dtype=torch.complex64),
        1.0,
        r"w is torch\.complex64, which cannot be averaged",
    ),
    "one of two": (message(1.0, 2.0) | {"v": torch.tensor([nan])}, 1.0, "v is not finite"),
}


@pytest.mark.parametrize(("bad", "weight", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_summed_is_refused_and_leaves_the_sum(bad, weight, named):
    good = updates_of(([1.0, 2.0], 1.0), ([4.0, 8.0], 2.0))
    total = MEAN.fold(good)
    with pytest.raises(ArithmeticError, match=named):
        MEAN.fold([(2, bad, weight)], total)
    assert MEAN.mismatched(total) == {}
    assert MEAN.result(total)["w"].tolist() == [3.0, 6.0]


def test_a_sum_that_overflows_is_an_error():
    half = updates_of(([MAX_MAGNITUDE / 2], 1.0))
    total = MEAN.merge(MEAN.fold(half), MEAN.fold(half))
    with pytest.raises(RoundError, match="w is too large"):
        MEAN.merge(total, MEAN.fold(updates_of(([1.0], 1.0))))


@pytest.mark.parametrize("updates", [[], updates_of(([1.0], 0.0), ([2.0], 0.0))], ids=["nobody", "no weight"])
def test_nothing_has_no_mean(updates):
    with pytest.raises(RoundError, match="weight above 0"):
        MEAN.result(MEAN.fold(updates))


def test_few_messages_wait_however_sums_are_merged():
    """What waits is held in memory: after a merge too, the next message of a form does not let it grow."""
    total = MEAN.fold([])
    for _ in range(10):
        total = MEAN.merge(total, MEAN.fold(updates_of(*[([1.0], 1.0)] * (MESSAGES_AT_ONCE - 1))))
        total = MEAN.merge(MEAN.fold(updates_of(*[([1.0, 2.0], 1.0)] * (MESSAGES_AT_ONCE - 2))), total)
        total = MEAN.fold(updates_of(([1.0], 1.0)), total)
        assert len(total) == 2
        assert all(len(sums.waiting) < MESSAGES_AT_ONCE for sums in total.values())
    assert MEAN.result(total)["w"].tolist() == [1.0]


# Messages of several forms: most clients decide which one counts

FORMS = {
    "usual": {"w": torch.tensor([1.0, 2.0])},
    "length": {"w": torch.tensor([1.0])},
    "shape": {"w": torch.tensor([[1.0], [2.0]])},
    "type": {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)},
    "name": {"v": torch.tensor([1.0, 2.0])},
    "one more": {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor([3.0])},
    "nothing": {},
}
several = st.lists(st.sampled_from(list(FORMS)), min_size=1, max_size=12).flatmap(
    lambda forms: st.tuples(st.just(forms), st.permutations(range(len(forms))), st.integers(0, 2**32))
)


@given(several, st.randoms(use_true_random=False))
def test_the_form_of_most_counts_and_of_two_as_frequent_the_lowest_clients(drawn, rng):
    """In any order and grouping; the mean is that of a round in which only those took part."""
    forms, clients, seed = drawn
    numbers = np.random.default_rng(seed)
    updates = [
        (client, {n: v * numbers.normal() for n, v in FORMS[form].items()}, float(numbers.integers(1, 9)))
        for form, client in zip(forms, clients, strict=True)
    ]
    count = Counter(forms)
    most = [form for form in count if count[form] == max(count.values())]
    first = min(client for form, client in zip(forms, clients, strict=True) if form in most)
    usual = forms[clients.index(first)]
    fits = [update for form, update in zip(forms, updates, strict=True) if form == usual]

    total = scattered(updates, rng)
    assert MEAN.mismatched(total).keys() == {client for client, *_ in updates} - {client for client, *_ in fits}
    assert bits(MEAN.result(total)) == bits(MEAN.result(MEAN.fold(fits)))


@pytest.mark.parametrize("form", list(FORMS)[1:])
def test_a_form_that_is_odd_is_told_in_words(form):
    words = {
        "length": "w float32 (1,)",
        "shape": "w float32 (2, 1)",
        "type": "w float64 (2,)",
        "name": "v float32 (2,)",
        "one more": "v float32 (1,), w float32 (2,)",
        "nothing": "nothing",
    }
    total = MEAN.fold([(3, FORMS[form], 1.0), (5, FORMS["usual"], 1.0), (7, FORMS["usual"], 1.0)])
    assert MEAN.mismatched(total) == {3: f"sent {words[form]}, and most clients sent w float32 (2,)"}


def test_the_order_of_names_is_no_form():
    one, other = {"a": torch.ones(1), "b": torch.ones(2)}, {"b": torch.ones(2), "a": torch.ones(1)}
    assert MEAN.mismatched(MEAN.merge(MEAN.fold([(0, one, 1.0)]), MEAN.fold([(1, other, 1.0)]))) == {}


def test_weight_makes_no_majority():
    """Who counts most is not most clients; and clients without a weight are clients."""
    total = MEAN.fold([(0, message(1.0), 1e6), (1, message(1.0, 2.0), 0.0), (2, message(3.0, 4.0), 1.0)])
    assert MEAN.mismatched(total).keys() == {0}
    assert MEAN.result(total)["w"].tolist() == [3.0, 4.0]
