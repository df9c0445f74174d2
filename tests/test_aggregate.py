"""Laws of the weighted mean: any order and grouping gives the same bits, and those are the right ones."""

from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest
import torch
from conftest import make_simulation, make_task
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from fedsim import RoundError
from fedsim.data import Dataset, FederatedData
from fedsim.federated import aggregate
from fedsim.federated.aggregate import EXACT_ROWS, MESSAGES_AT_ONCE, PIECE, WeightedMean

MEAN = WeightedMean()
LENGTH = 3


def message(*values, dtype=torch.float32):
    return {"w": torch.tensor(values, dtype=dtype)}


def updates_of(*pairs, dtype=torch.float32):
    """(client, message, weight), from (values, weight)."""
    return [(k, message(*values, dtype=dtype), weight) for k, (values, weight) in enumerate(pairs)]


LARGEST, TINIEST = float(np.finfo(np.float32).max), 2.0**-149
ordinary = st.floats(-1e5, 1e5, width=32) | st.floats(-1, 1, width=32).map(lambda v: v * 2**-30)
edges = st.sampled_from([0.0, -0.0, LARGEST, -LARGEST, TINIEST, -TINIEST, 1.0, -1.0, 2.0**26, 2.0**27, 2.0**-40])
numbers = ordinary | edges | st.floats(width=32, allow_nan=False, allow_infinity=False)
weights = (
    st.integers(0, 10_000).map(float)
    | st.floats(0, 100).filter(lambda w: w == 0 or w > 1e-60)
    | st.floats(1e-30, 1e30)
    | st.sampled_from([1e-12, 1e-16, 2.0**-40, 2.0**24 + 1, 2.0**53 - 1])
)


def updates(dtype=torch.float32, values=numbers):
    """Messages as clients send them, of any size; weights are numbers of examples, or any other."""
    pair = st.tuples(st.lists(values, min_size=LENGTH, max_size=LENGTH), weights)
    lists = st.lists(pair, min_size=1, max_size=10) | st.tuples(pair, weights).map(
        lambda drawn: [(values, drawn[1]) for values in (drawn[0][0], [1.0] * LENGTH, [0.0, TINIEST, LARGEST])]
    )  # also of one weight
    return lists.map(lambda pairs: updates_of(*pairs, dtype=dtype))


def exact(updates):
    """The sums of weight times value, of their magnitudes, and of the weights, as fractions."""
    weights = [Fraction(weight) for _, _, weight in updates]
    columns = list(zip(*([Fraction(v) for v in m["w"].tolist()] for _, m, _ in updates), strict=True))
    sums = [sum(w * v for w, v in zip(weights, column, strict=True)) for column in columns]
    sizes = [sum(w * abs(v) for w, v in zip(weights, column, strict=True)) for column in columns]
    return sums, sizes, sum(weights)


def rounded(value, digits, smallest):
    """The fraction as the nearest number of so many binary digits; a tie goes to the even one."""
    exponent = value and abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= bool(value) and abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent + 1 - digits, smallest)
    return float(round(value / unit) * unit)


def scattered(updates, rng, how=MEAN):
    """The partial of all updates, folded in any order onto any partial, and merged in any grouping."""
    parts = [how.fold([])]
    for update in rng.sample(updates, len(updates)):
        start = parts.pop(rng.randrange(len(parts))) if rng.random() < 0.5 and parts else None
        parts.append(how.fold([update], start))
    while len(parts) > 1:
        rng.shuffle(parts)
        parts.append(how.merge(parts.pop(), parts.pop()))
    return parts[0]


def bits(state):
    return {name: (value.dtype, value.shape, value.numpy().tobytes()) for name, value in state.items()}


@given(updates() | updates(torch.float64), st.randoms(use_true_random=False))
def test_any_order_and_grouping_gives_the_same_bits(updates, rng):
    assume(any(weight for _, _, weight in updates))
    assert bits(MEAN.result(scattered(updates, rng))) == bits(MEAN.result(MEAN.fold(updates)))


KINDS = {torch.float32: (24, -149), torch.bfloat16: (8, -133), torch.float16: (11, -24)}  # digits, smallest unit


@example(updates_of(([1e-12] * 3, 1.0), ([3e-12] * 3, 2.0), ([-2e-12] * 3, 5.0)), torch.float32)
@example(updates_of(([1e-6] * 3, 1.0), ([1e3] * 3, 7.0), ([-1e3] * 3, 7.0)), torch.float32)
@example(updates_of(([1.0 + 2**-23] * 3, 0.1), ([1.0] * 3, 0.1)), torch.float32)  # a tie
@example(updates_of(([LARGEST] * 3, 1e30), ([LARGEST] * 3, 3e-30)), torch.float32)
@given(updates(), st.sampled_from([*KINDS]))
def test_the_mean_is_exact_and_rounded_once(updates, dtype):
    assume(any(weight for _, _, weight in updates))
    largest = torch.finfo(dtype).max
    sent = [(k, {"w": m["w"].clamp(-largest, largest).to(dtype)}, weight) for k, m, weight in updates]
    sums, _, weight = exact(sent)
    for threads in (1, 2):  # one thread asks the processor whether a difference was rounded
        with threads_of(threads):
            found = MEAN.result(MEAN.fold(sent))["w"]
        assert (found.dtype, found.tolist()) == (dtype, [rounded(s / weight, *KINDS[dtype]) for s in sums])


@contextmanager
def threads_of(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_what_was_rounded_is_found_with_and_without_the_processors_flag(monkeypatch):
    """One entry of a message has digits below those of all others."""
    ones = torch.ones(3 * PIECE)
    odd = ones.clone()
    odd[-1] = 2.0**-50 * (1 + 2.0**-23)
    sent = [(k, {"w": value}, 1.0) for k, value in enumerate((odd, ones, -ones))]
    with threads_of(1):
        means = [MEAN.result(MEAN.fold(sent))["w"]]
        monkeypatch.setattr(aggregate, "_flags", lambda: None)
        means.append(MEAN.result(MEAN.fold(sent))["w"])
    right = [rounded(Fraction(odd[place].item()) / 3, 24, -149) for place in (0, -1)]
    assert [[mean[place].item() for place in (0, -1)] for mean in means] == [right] * 2
    assert torch.equal(*means)


def test_a_flag_that_does_not_tell_is_not_used(monkeypatch):
    monkeypatch.setattr(aggregate, "INEXACT", 0)
    assert aggregate._flags.__wrapped__() is None


@given(updates(torch.float64))
def test_products_of_float64_are_rounded_and_their_sum_is_exact(updates):
    sums, sizes, weight = exact(updates)
    assume(weight)
    found = MEAN.result(MEAN.fold(updates))["w"]
    for value, total, size in zip(found.tolist(), sums, sizes, strict=True):
        error = (size * Fraction(2) ** -52 + abs(total) * Fraction(2) ** -51) / weight
        assert abs(Fraction(value) - total / weight) <= error + Fraction(2) ** -1074


def test_large_terms_that_cancel_leave_the_small_ones():
    values = [1e-12, 3e20, 7e-9, -3e20, 5e3]
    assert MEAN.result(MEAN.fold(updates_of(*(([v], 0.2) for v in values))))["w"].tolist() == [1000.0]
    four = updates_of(*(([v], 1.0) for v in values[:4]))
    assert MEAN.result(MEAN.fold(four))["w"].item() == rounded(exact(four)[0][0] / 4, 24, -149)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**60, 2.0**-190])
def test_a_common_scale_of_the_weights_changes_no_bit(scale):
    numbers = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0)) * 1e-3
    sent = [(k, {"w": row}, 1.0 + k) for k, row in enumerate(numbers)]
    scaled = [(k, message, weight * scale) for k, message, weight in sent]
    assert bits(MEAN.result(MEAN.fold(scaled))) == bits(MEAN.result(MEAN.fold(sent)))


def test_many_terms_that_cancel_leave_the_last_digit():
    """A sum of so many is too long for a float64."""
    count = 2 * EXACT_ROWS + 1
    sent = updates_of(*[([2.0**-19 * (1 - 2.0**-22)], 1 + 2.0**-22)] * count, ([-count * 2.0**-19], 1.0))
    [total], _, weight = exact(sent)
    assert MEAN.result(MEAN.fold(sent))["w"].item() == rounded(total / weight, 24, -149)


def test_merging_adds_every_bin():
    values = torch.tensor([2.0**exponent for exponent in range(-149, 128)])
    parts = [MEAN.fold([(k, {"w": values}, 1.0) for k in range(MESSAGES_AT_ONCE)]) for _ in range(2)]
    assert torch.equal(MEAN.result(MEAN.merge(*parts))["w"], values)


def test_only_the_piece_of_a_large_entry_takes_more_memory():
    value = torch.ones(3 * PIECE)
    value[PIECE] = 1e30
    sums = MEAN.fold([(k, {"w": value}, 1.0) for k in range(MESSAGES_AT_ONCE)])
    assert torch.equal(MEAN.result(sums)["w"], value)
    [total] = sums.values()
    assert {place: len(bins) for place, bins in total.bins.items()} == {("w", 0): 2, ("w", 1): 4, ("w", 2): 2}


def test_a_message_of_all_exponents_makes_few_bins():
    """What strangers send is bounded: here by float32, and in all by the range of weights and products."""
    value = torch.tensor([2.0**exponent for exponent in range(-149, 128)])
    for sent, most in (([0.37] * 8, 9), ([2.0**-200, 2.0**200] * 4, 22)):
        [total] = MEAN.fold([(k, {"w": value}, weight) for k, weight in enumerate(sent)]).values()
        assert len(total.bins["w", 0]) <= most


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
    "huge": (message(0.0, 1e300, dtype=torch.float64), 1.0, "w is too large: weight times value is above"),
    "a huge weight": (message(1.0, 2.0), 1e61, "weight is 1e\\+61; it must be 0, or from 6.2e-61 to 1.6e\\+60"),
    "a tiny weight": (message(1.0, 2.0), 1e-61, "weight is 1e-61; it must be 0, or from 6.2e-61 to 1.6e\\+60"),
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


def test_sums_beyond_float32_have_a_mean():
    """However many are added, alone or when they are merged."""
    for value, weight in ((LARGEST, 600.0), (2.0**33 / 3, 1.0), (2.0**26, 1.0), (3e9, 120.0)):
        full = MEAN.merge(*(MEAN.fold(updates_of(*[([value, 1.0], weight)] * 20)) for _ in range(2)))
        for _ in range(5):
            full = MEAN.merge(full, MEAN.fold(updates_of(*[([value, 1.0], weight)] * 13)))
        assert MEAN.result(full)["w"].tolist() == message(value, 1.0)["w"].tolist()


def test_more_messages_than_the_sums_can_count_are_an_error(monkeypatch):
    monkeypatch.setattr(aggregate, "MAX_MESSAGES", 3)
    total = MEAN.fold(updates_of(([1.0], 1.0), ([4.0], 1.0)))
    with pytest.raises(RoundError, match="more than 3 messages"):
        MEAN.merge(total, MEAN.fold(updates_of(([1.0], 1.0), ([4.0], 1.0))))
    assert MEAN.result(total)["w"].tolist() == [2.5]


def test_statistics_of_raw_columns_are_averaged():
    """Age and income in a year, and a column of variance 1e36."""
    draw = np.random.default_rng(0)
    x = draw.normal([40.0, 6e4, 0.0], [12.0, 5e4, 1e18], (36, 3)).astype("float32")
    y, owners = torch.arange(36) % 2, np.repeat(range(3), (4, 12, 20))
    dataset = Dataset(torch.from_numpy(x), y, torch.from_numpy(x), y, 2)
    task = make_task(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), shape=(3,), classes=2)
    simulation = make_simulation(
        task=task, data=FederatedData(dataset, owners, clients=3), batch_size="full", lr=0.1
    )
    simulation.round()
    variances = [0.9 + 0.1 * x[owners == k].astype(np.float64).var(0, ddof=1) for k in range(3)]
    found = task.buffer_layout.split(simulation.server["buffers"])["0.running_var"]
    np.testing.assert_allclose(found.numpy(), np.average(variances, 0, weights=(4, 12, 20)), rtol=1e-6)


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
