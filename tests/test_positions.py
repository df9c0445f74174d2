"""Laws of messages that cover only some positions: each has the mean of those who sent it, and no more is sent."""

from dataclasses import dataclass
from fractions import Fraction
from math import inf

import pytest
import torch
from conftest import SIZES, _digests, close, make_simulation, make_strategy, make_task, trace, trace_on_ray
from hypothesis import assume, example, given
from hypothesis import strategies as st
from lab import CONFIG as LAB
from lab import Lab
from test_aggregate import KINDS, LARGEST, LENGTH, MEAN, bits, numbers, rounded, scattered, threads_of, weights
from test_vectorized import assert_agree, pair

from fedsim import ClientError, GroupMeans, Rows, Strategy, Update, Wrapper
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.federated.aggregate import PIECE
from fedsim.federated.positions import packed, sent_bytes
from fedsim.flower.transport import BLOCK, ROUNDED, TRANSPORTS, Coded, decode, encode
from fedsim.strategies.averaging.fedavg import FedAvg

SAMPLE = {"name": "uniform", "size": 4}


def covering(*triples, dtype=torch.float32):
    """(client, message, weight), from (values, mask, weight)."""
    sent = []
    for client, (values, mask, weight) in enumerate(triples):
        mask = torch.tensor(mask, dtype=torch.uint8)
        value = torch.where(mask > 0, torch.tensor(values, dtype=torch.float64), 0).to(dtype)
        sent.append((client, {"w": value, "where.w": mask}, weight))
    return sent


def in_part(values=numbers):
    triple = st.tuples(
        st.lists(values, min_size=LENGTH, max_size=LENGTH),
        st.lists(st.integers(0, 1), min_size=LENGTH, max_size=LENGTH),
        weights,
    )
    return st.lists(triple, min_size=1, max_size=10)


def by_position(sent):
    """At each position the sums of weight times value and of the weights, of those who cover it, as fractions."""
    for i in range(LENGTH):
        own = [(Fraction(weight), Fraction(m["w"][i].item())) for _, m, weight in sent if m["where.w"][i]]
        yield sum(w * v for w, v in own), sum(w for w, _ in own)


# The aggregator


@given(in_part(), st.sampled_from([torch.float32, torch.float64]), st.randoms(use_true_random=False))
def test_any_order_and_grouping_gives_the_same_bits(triples, dtype, rng):
    assume(any(weight for *_, weight in triples))
    sent = covering(*triples, dtype=dtype)
    assert bits(MEAN.result(scattered(sent, rng))) == bits(MEAN.result(MEAN.fold(sent)))


@example([([1.0] * 3, [1, 1, 0], 1.0), ([1.0 + 2**-23] * 3, [1, 0, 0], 1.0)], torch.float32)  # a tie
@example(  # a tie, to the even neighbour above it; a third client is elsewhere
    [([1 + 2.0**-23] * 3, [1, 1, 0], 1.0), ([1 + 2.0**-22] * 3, [1, 0, 0], 1.0), ([1.0] * 3, [0, 0, 1], 6.0)],
    torch.float32,
)
@example(  # so near to a tie that float64 is not enough
    [
        ([1.0] * 3, [1, 1, 0], 2.0**40 - 1),
        ([1 + 2.0**-23] * 3, [1, 0, 0], 2.0**40 + 1),
        ([1.0] * 3, [0, 0, 1], 6.0),
    ],
    torch.float32,
)
@example([([LARGEST] * 3, [1, 0, 1], 1e30), ([LARGEST] * 3, [0, 1, 1], 3e-30)], torch.float32)
@given(in_part(), st.sampled_from([*KINDS]))
def test_each_position_has_the_exact_mean_of_those_who_cover_it_rounded_once(triples, dtype):
    assume(any(weight for *_, weight in triples))
    largest = torch.finfo(dtype).max
    sent = covering(*(([max(-largest, min(v, largest)) for v in vs], *more) for vs, *more in triples), dtype=dtype)
    right = [(rounded(s / w, *KINDS[dtype]), float(w)) if w else (0.0, 0.0) for s, w in by_position(sent)]
    for threads in (1, 2):
        with threads_of(threads):
            found = MEAN.result(MEAN.fold(sent))
        assert found["w"].tolist() == [mean for mean, _ in right]
        assert found["where.w"].tolist() == pytest.approx([weight for _, weight in right], rel=1e-15)


@given(in_part(), st.sampled_from([torch.float32, torch.float64]))
def test_where_all_cover_all_it_is_the_weighted_mean_to_the_bit(triples, dtype):
    assume(any(weight for *_, weight in triples))
    sent = covering(*((values, [1] * LENGTH, weight) for values, _, weight in triples), dtype=dtype)
    plain = [(client, {"w": message["w"]}, weight) for client, message, weight in sent]
    assert bits({"w": MEAN.result(MEAN.fold(sent))["w"]}) == bits(MEAN.result(MEAN.fold(plain)))


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=3, max_size=3), st.integers(1, 50)), min_size=1))
def test_the_means_times_their_weights_are_what_was_sent(drawn):
    """Nothing is lost or counted twice: in whole numbers the two sums are equal."""
    sent = covering(*(([6.0, -4.0, 1.0], mask, float(weight)) for mask, weight in drawn), dtype=torch.float64)
    found = MEAN.result(MEAN.fold(sent))
    close((found["w"] * found["where.w"]).sum(), sum(weight * m["w"].sum() for _, m, weight in sent))


@given(in_part(), st.lists(st.booleans(), min_size=10, max_size=10), st.randoms(use_true_random=False))
def test_who_gives_no_mask_covers_all(triples, without, rng):
    """In the mean, in that of a group, and as a row."""
    assume(any(weight for *_, weight in triples))
    ones = [1] * LENGTH
    sent = covering(*((vs, ones if no else mask, w) for (vs, mask, w), no in zip(triples, without, strict=False)))
    fewer = [(k, {"w": m["w"]} if no else m, weight) for (k, m, weight), no in zip(sent, without, strict=False)]
    for how in (MEAN, Rows(), GroupMeans(2)):
        a, b = (
            [
                (k, m | ({"group": torch.tensor(k % 2)} if how == GroupMeans(2) else {}), weight)
                for k, m, weight in each
            ]
            for each in (sent, fewer)
        )
        right, found = how.result(how.fold(a)), how.result(scattered(b, rng, how))
        assert bits(found) == bits({name: right[name] for name in found})
        assert "where.w" in found or all(no for (*_, weight), no in zip(triples, without, strict=False) if weight)


def test_a_long_entry_is_settled_piece_by_piece():
    """Ties in several pieces, at positions of several weights."""
    n, even = 2 * PIECE + 5, torch.arange(2 * PIECE + 5) % 2
    odd, next_ = torch.full((n,), 1 + 2.0**-23), torch.full((n,), 1 + 2.0**-22)
    third = ((torch.arange(n) % 3) == 0).to(torch.uint8)
    sent = [
        (0, {"w": odd, "where.w": torch.ones(n, dtype=torch.uint8)}, 1.0),
        (1, {"w": next_ * even, "where.w": even.to(torch.uint8)}, 1.0),
        (2, {"w": next_ * third, "where.w": third}, 2.0),
    ]
    found = MEAN.result(MEAN.fold(sent))
    right = {
        (0, 0): odd[0],
        (1, 0): next_[0],
        (0, 1): next_[0],
        (1, 1): next_[0],
    }  # 0, 1 / 2, 2 / 3, 3 / 4 between
    pairs = zip(even.tolist(), third.tolist(), strict=True)
    assert found["w"].tolist() == [float(right[pair]) for pair in pairs]


def test_positions_by_groups_are_means_of_each_group():
    sent = [
        (client, message | {"group": torch.tensor(client % 2)}, weight)
        for client, message, weight in covering(
            ([1.0, 2.0, 3.0], [1, 0, 1], 1.0), ([5.0, 6.0, 7.0], [1, 1, 0], 2.0), ([3.0, 0.0, 5.0], [1, 0, 0], 3.0)
        )
    ]
    found = GroupMeans(2).result(GroupMeans(2).fold(sent))
    assert found["w"].tolist() == [[2.5, 0, 3], [5, 6, 0]]
    assert found["where.w"].tolist() == [[4, 0, 1], [2, 2, 0]]


MASK = torch.ones(2, dtype=torch.uint8)
NO_MASKS = {
    "of nothing": ({"w": torch.ones(2), "where.v": MASK}, "where.v is .* no mask of an entry"),
    "of statistics": (
        {"buffers": torch.ones(2), "where.buffers": MASK},
        "where.buffers is .* no mask of an entry",
    ),
    "of another shape": ({"w": torch.ones(3), "where.w": MASK}, "where.w is .* no mask of an entry"),
    "of floats": ({"w": torch.ones(2), "where.w": torch.ones(2)}, "where.w is .* no mask of an entry"),
    "of twos": (
        {"w": torch.ones(2), "where.w": 2 * MASK},
        "where.w has a position twice, or one outside of 0 to 1",
    ),
}


@pytest.mark.parametrize("how", [MEAN, Rows()], ids=["mean", "rows"])
@pytest.mark.parametrize(("bad", "said"), NO_MASKS.values(), ids=NO_MASKS)
def test_what_is_no_mask_is_refused_and_the_sums_stay_as_they_were(bad, said, how):
    good = {"w": torch.ones(2), "where.w": MASK}
    total = how.fold([(0, good, 1.0)])
    with pytest.raises(ArithmeticError, match=said):
        how.fold([(1, bad, 1.0)], total)
    assert bits(how.result(total)) == bits(how.result(how.fold([(0, good, 1.0)])))


# A round


@dataclass(frozen=True, kw_only=True)
class Slices(FedAvg):
    """HeteroFL (Diao 2021): client k trains and sends the first 1 / 2^(k % 3) of all entries."""

    def client_update(self, server, client, local):
        x = server["model"]
        own = torch.arange(len(x), device=x.device) < len(x) // 2 ** (local.client_id % 3)
        return Update({"delta": local.train(x, only=own) - x}, weight=local.num_examples, where={"delta": own})


@dataclass(frozen=True, kw_only=True)
class TopK(FedAvg):
    """The k largest changes of each client, as positions and values."""

    k: int = 20

    def client_update(self, server, client, local):
        delta = local.train(server["model"]) - server["model"]
        places = delta.abs().topk(self.k, sorted=False).indices
        return Update({"delta": delta[places]}, weight=local.num_examples, where={"delta": places})


@dataclass(frozen=True, kw_only=True)
class TopKByMask(TopK):
    """The same with a mask, and all values; those outside of it do not count."""

    def client_update(self, server, client, local):
        delta = local.train(server["model"]) - server["model"]
        own = torch.zeros_like(delta).scatter(0, delta.abs().topk(self.k).indices, 1) > 0
        filled = torch.where(own, delta, inf)
        return Update({"delta": filled}, weight=local.num_examples, where={"delta": own})


@dataclass(frozen=True, kw_only=True)
class Counts(Strategy):
    """Client k sends 2 k, of the positions that k + 1 divides."""

    def init_server(self, model):
        return {"model": model, "covered": model}

    def client_update(self, server, client, local):
        x = server["model"]
        own = torch.arange(len(x), device=x.device) % (local.client_id + 1) == 0
        return Update({"v": torch.full_like(x, 2.0) * local.client_id}, local.num_examples, where={"v": own})

    def server_update(self, server, mean, info):
        assert {*mean} == {"v"}
        return {"model": mean["v"], "covered": info.covered["v"].to(mean["v"].dtype)}


def test_slices_of_clients_make_the_means_of_those_who_have_them():
    """In closed form."""
    simulation = make_simulation(Counts())
    simulation.round()
    for i, found in enumerate(simulation.server["model"].tolist()):
        who = [k for k in range(len(SIZES)) if i % (k + 1) == 0]
        weight = sum(SIZES[k] for k in who)
        assert found == pytest.approx(sum(2 * k * SIZES[k] for k in who) / weight, rel=1e-6)
        assert simulation.server["covered"][i] == weight


def test_positions_that_nobody_sent_stay_as_they_are():
    simulation = make_simulation(TopK(k=1))
    before = simulation.server["model"].clone()
    simulation.round()
    moved = int((simulation.server["model"] != before).sum())
    assert 0 < moved <= len(SIZES)


def test_top_k_of_all_is_fedavg_to_the_bit():
    p = make_task().initial_model.numel()
    plain, all_ = (make_simulation(s, cohort=SAMPLE, momentum=0.5) for s in (FedAvg(), TopK(k=p)))
    for _ in range(3):
        assert all_.round().fingerprint == plain.round().fingerprint


def test_positions_and_masks_say_the_same():
    assert trace(make_simulation(TopK())) == trace(make_simulation(TopKByMask()))


@dataclass(frozen=True, kw_only=True)
class Passes(Wrapper):
    """Another strategy, as it is."""


TRIED = {"slices": Slices(), "positions": TopK(), "mask": TopKByMask(), "wrapped": Passes(inner=TopK())}


@pytest.mark.parametrize("strategy", TRIED.values(), ids=TRIED)
@pytest.mark.parametrize("workers", [1, 3])
def test_positions_give_one_digest_on_threads(strategy, workers):
    spec = {"name": "threads", "workers": workers}
    serial, threads = (make_simulation(strategy, cohort=SAMPLE, runtime=r) for r in ("serial", spec))
    assert trace(threads) == trace(serial)


@pytest.mark.parametrize("strategy", TRIED.values(), ids=TRIED)
def test_positions_agree_in_a_batch_of_clients(strategy):
    assert_agree(pair(strategy, cohort=SAMPLE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's, about its own processes
@pytest.mark.parametrize("strategy", TRIED.values(), ids=TRIED)
def test_positions_give_one_digest_on_ray(strategy):
    assert trace_on_ray(strategy, cohort=SAMPLE) == trace(make_simulation(strategy, cohort=SAMPLE))


@pytest.mark.parametrize("name", ["Slices", "TopK"])
@pytest.mark.parametrize("transport", TRANSPORTS[:2])
def test_positions_give_one_digest_on_nodes(tmp_path, monkeypatch, name, transport):
    config = load(LAB | {"strategy": {"name": f"test_positions:{name}"}, "rounds": 2})

    def played(simulation):
        records = [simulation.round() for _ in range(2)]
        return [(r.train_loss, r.steps, r.bytes_down) for r in records], _digests(simulation.server)

    lab = Lab(tmp_path, monkeypatch, double=0.3)
    for node in lab.nodes.values():
        allow = node.settings.allow.model_copy(update={"strategies": [f"test_positions:{name}"]})
        node.settings = node.settings.model_copy(update={"allow": allow})
    try:
        found = lab.simulation(config, wait=1e5, round_timeout=1e6, transport=transport)
        assert played(found) == played(build(config))
    finally:
        lab.close()


@dataclass(frozen=True, kw_only=True)
class OfRows(TopK):
    """The server has each client's values and masks."""

    aggregator = Rows()

    def server_update(self, server, rows, info):
        mask, w = info.covered["delta"], info.weights[:, None]
        assert mask.dtype == torch.bool
        assert mask.sum(1).tolist() == [self.k] * len(info.cohort)
        assert not rows["delta"][~mask].any()
        mean = (rows["delta"] * w).sum(0) / (mask * w).sum(0).clamp(min=1)
        return super().server_update(server, {"delta": mean.to(server["model"].dtype)}, info)


def test_rows_have_masks():
    rows, mean = make_simulation(OfRows()), make_simulation(TopK())
    rows.round(), mean.round()
    close(rows.server["model"], mean.server["model"], rtol=1e-5, atol=1e-7)


@dataclass(frozen=True, kw_only=True)
class Asks(FedAvg):
    """FedAvg whose survey tells who covers what."""

    def init_server(self, model):
        return {"model": model, "seen": model}

    def survey(self, server, client, local):
        x = server["model"]
        return Update({"one": x.new_ones(1)}, weight=1.0, where={"one": x.new_full((1,), local.client_id).long()})

    def surveyed(self, server, mean, info):
        return {"seen": info.covered["one"].float()}


def test_a_survey_may_cover_some_positions():
    simulation = make_simulation(Asks())
    simulation.round()
    assert simulation.server["seen"].nonzero().squeeze(1).tolist() == [*range(len(SIZES))]


P = make_task().initial_model.numel()
WRONG = {
    "twice": (torch.tensor([3, 3]), 2, f"where.v has a position twice, or one outside of 0 to {P - 1}"),
    "too large": (torch.tensor([0, P]), 2, "where.v has a position twice, or one outside"),
    "negative": (torch.tensor([-1, 0]), 2, "where.v has a position twice, or one outside"),
    "more than values": (torch.tensor([0, 1, 2]), 2, r"gave torch.int64 \(3,\) for \(2,\) as where\['v'\]"),
    "of a matrix": (
        torch.zeros(2, 2, dtype=torch.int64),
        (2, 2),
        r"gave torch.int64 \(2, 2\) .*it should be a mask",
    ),
    "a mask of another shape": (torch.ones(3) > 0, 2, r"gave torch.bool \(3,\) for \(2,\) as where"),
    "floats": (torch.ones(2), 2, r"gave torch.float32 \(2,\) for \(2,\) as where"),
    "a list": ([0, 1], 2, "gave list as 'v' in its where; it should be a dense tensor"),
}


@dataclass(frozen=True, kw_only=True)
class Sends(FedAvg):
    """Sends these."""

    sent: Update

    def client_update(self, server, client, local):
        return self.sent


@pytest.mark.parametrize(("places", "shape", "said"), WRONG.values(), ids=WRONG)
def test_wrong_positions_are_one_line(places, shape, said):
    sent = Update({"v": torch.ones(shape)}, 1.0, where={"v": places})
    with pytest.raises(ClientError, match=f"round 1, client 0: .*{said}"):
        make_simulation(Sends(sent=sent)).round()


RESERVED = {
    "a mask": (Update({"where.v": torch.ones(2)}, 1.0), "gave 'where.v' in its message; Update has the arguments"),
    "a group": (Update({"group": torch.ones(2)}, 1.0), "gave 'group' in its message; Update has the arguments"),
    "no entry": (Update({"v": torch.ones(2)}, 1.0, where={"w": torch.ones(2) > 0}), "gave 'w' in where; names"),
    "statistics": (
        Update({"buffers": torch.ones(2)}, 1.0, where={"buffers": torch.ones(2) > 0}),
        "gave 'buffers' in where; names",
    ),
}


@pytest.mark.parametrize(("sent", "said"), RESERVED.values(), ids=RESERVED)
def test_names_that_are_fedsims_are_refused(sent, said):
    with pytest.raises(ClientError, match=f"round 1, client 0: .*{said}"):
        make_simulation(Sends(sent=sent)).round()


# What is sent


def draw_message(n, covered, seed, extra):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(n, generator=generator)[: min(covered, n)]
    sent = Update({"v": torch.randn(n, generator=generator), "all": torch.randn(extra, generator=generator)}, 1.0)
    own = torch.zeros(n, dtype=torch.bool).index_fill(0, places, True)
    return packed(sent._replace(where={"v": own}), torch.zeros(n)).message


drawn_messages = st.builds(
    draw_message,
    st.integers(0, 3 * BLOCK),
    st.integers(0, 40) | st.integers(0, 3 * BLOCK),
    st.integers(0, 99),
    st.integers(0, 3),
)


@given(drawn_messages)
def test_what_is_counted_is_what_is_sent_and_arrives(message):
    for transport in TRANSPORTS[:2]:
        encoded, left = encode(message, transport)
        assert bits(decode(encoded)) == bits(message)
        assert left == {}
        if transport == "exact":
            assert sum(len(coded.data) for coded in encoded.values()) == sent_bytes(message)
    covered, n = int(message["where.v"].sum()), message["v"].numel()
    assert sent_bytes(message) == message["all"].nbytes + 4 * covered + min(-(-n // 8), 4 * covered)


@pytest.mark.parametrize("transport", ROUNDED)
def test_rounding_errors_wait_where_they_are_until_their_position_is_sent_again(transport):
    """All that was sent and what is left are all that there was to send, whichever positions were covered."""
    total = arrived = torch.zeros(2 * BLOCK)
    residual = None
    for seed in range(6):
        message = draw_message(2 * BLOCK, (0, 3, BLOCK, 2 * BLOCK)[seed % 4], seed, 1)
        encoded, residual = encode(message, transport, residual)
        assert len(encoded["v"].data) <= 2 * int(message["where.v"].sum()) + 4
        found = decode(encoded)
        assert torch.equal(found["where.v"], message["where.v"])
        assert not found["v"][message["where.v"] == 0].any()
        total, arrived = total + message["v"], arrived + found["v"]
    assert residual["v"].any()
    close(arrived + residual["v"], total, rtol=1e-5, atol=1e-6)


def test_bytes_of_a_round_are_those_of_what_is_covered():
    plain, some = make_simulation().round(), make_simulation(TopK()).round()
    saved = 4 * P - 20 * 4 - min(-(-P // 8), 20 * 4)
    assert some.bytes_up == plain.bytes_up - len(SIZES) * saved
    assert some.bytes_down == plain.bytes_down


@pytest.mark.parametrize("name", ["fedbn", "fedrep", "personal"])
def test_layers_that_stay_with_a_client_are_not_sent(name):
    strategy, task = make_strategy(name), make_task()
    private = len(strategy.entries(task.layout))
    sent = make_simulation(strategy).round().bytes_up
    statistics = 0 if strategy.buffers == "private" else task.initial_buffers.nbytes
    assert sent == len(SIZES) * (4 * (P - private) + -(-P // 8) + statistics)


def test_personal_layers_around_positions_are_not_sent_either():
    """The inner strategy's largest changes lie in them, too."""
    strategy = make_strategy("personal", layers=["fc*"], inner="fedavg")
    inner = make_simulation(type(strategy)(layers=("fc*",), inner=TopK(k=P)))
    plain = make_simulation(strategy)
    for _ in range(2):
        a, b = plain.round(), inner.round()
        assert (a.fingerprint, a.bytes_up) == (b.fingerprint, b.bytes_up)


BROKEN = {
    "other values": (Coded("float32", (2,), "exact", bytes(8)), Coded("uint8", (9,), "bits", b"\x07\x00")),
    "no values": (None, Coded("uint8", (9,), "bits", b"\x07\x00")),
    "few bits": (Coded("float32", (3,), "exact", bytes(12)), Coded("uint8", (9,), "bits", b"\xe0")),
    "bits of floats": (Coded("float32", (3,), "exact", bytes(12)), Coded("float32", (9,), "bits", b"\xe0\0")),
    "half a position": (Coded("float32", (3,), "exact", bytes(12)), Coded("uint8", (9,), "indices", bytes(11))),
    "position twice": (Coded("float32", (2,), "exact", bytes(8)), Coded("uint8", (9,), "indices", bytes(8))),
    "outside": (Coded("float32", (1,), "exact", bytes(4)), Coded("uint8", (9,), "indices", b"\x09\0\0\0")),
    "negative": (Coded("float32", (1,), "exact", bytes(4)), Coded("uint8", (9,), "indices", b"\xff" * 4)),
    "a bomb": (Coded("float32", (1,), "exact", bytes(4)), Coded("uint8", (2**50,), "indices", bytes(4))),
    "a bomb of values": (Coded("float64", (1,), "exact", bytes(8)), Coded("uint8", (900,), "indices", bytes(4))),
}


@pytest.mark.parametrize(("values", "mask"), BROKEN.values(), ids=BROKEN)
def test_masks_of_others_are_believed_in_nothing(values, mask):
    with pytest.raises(ValueError, match=r"^(where\.v|the message)"):
        decode(({} if values is None else {"v": values}) | {"where.v": mask}, 2000)


@dataclass(frozen=True, kw_only=True)
class Faulty(FedAvg):
    """Gives positions that are none."""

    places: tuple[int, ...] = (3, 3)
    as_mask: bool = False

    def client_update(self, server, client, local):
        delta = local.train(server["model"]) - server["model"]
        if self.as_mask:
            return Update({"delta": delta}, 1.0, where={"delta": torch.full_like(delta, 2, dtype=torch.uint8)})
        places = torch.tensor(self.places)
        return Update({"delta": delta[: len(places)]}, 1.0, where={"delta": places})


@pytest.mark.parametrize(
    "settings",
    [{"places": [3, 3]}, {"places": [-1, 3]}, {"places": [10**6, 3]}, {"as_mask": True}],
    ids=["twice", "negative", "outside", "a mask of 2"],
)
def test_a_node_does_not_send_positions_that_are_none(settings, tmp_path, monkeypatch):
    """Encoded, they would be a mask that covers all."""
    config = load(LAB | {"strategy": {"name": f"{__name__}:Faulty"} | settings, "rounds": 1})
    lab = Lab(tmp_path, monkeypatch)
    lab.allowing(f"{__name__}:Faulty")
    try:
        with pytest.raises(ClientError, match=r"where\.delta has a position twice, or one outside of 0 to"):
            lab.simulation(config).round()
    finally:
        lab.close()


@given(in_part(), st.lists(st.floats(2.0**-30, 2.0**30), min_size=10, max_size=10))
def test_where_all_cover_all_weights_of_many_digits_give_the_same_bits(triples, weights):
    """In float64, whose sums are rounded."""
    triples = [(values, [1] * LENGTH, weight) for (values, *_), weight in zip(triples, weights, strict=False)]
    sent = covering(*triples, dtype=torch.float64)
    plain = [(client, {"w": message["w"]}, weight) for client, message, weight in sent]
    assert bits({"w": MEAN.result(MEAN.fold(sent))["w"]}) == bits(MEAN.result(MEAN.fold(plain)))
