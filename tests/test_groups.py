"""Laws of the mean by groups, and of what each client downloads: exact, and in every runtime the same."""

from dataclasses import dataclass

import pytest
import torch
from conftest import SIZES, _digests, close, make_simulation, trace, trace_on_ray
from hypothesis import assume, given
from hypothesis import strategies as st
from lab import CONFIG as LAB
from lab import Lab
from test_aggregate import MEAN, bits, scattered, updates
from test_vectorized import assert_agree, pair

from fedsim import CHANGE, ClientError, ConfigError, GroupMeans, RoundError, Rows, Strategy, Update, Wrapper
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.federated.simulation import Failures
from fedsim.strategies.averaging.fedavg import FedAvg

PAIRS = GroupMeans(2)
SAMPLE = {"name": "uniform", "size": 4}


def in_groups(drawn, groups):
    """The same updates, with a group each."""
    return [
        (client, message | {"group": torch.tensor(g)}, weight)
        for (client, message, weight), g in zip(drawn, groups, strict=False)
    ]


grouped = st.tuples(updates() | updates(torch.float64), st.lists(st.integers(0, 2), min_size=10, max_size=10))


# The aggregator


@given(grouped, st.randoms(use_true_random=False))
def test_each_group_has_the_bits_of_its_own_weighted_mean_in_any_order(drawn, rng):
    plain, groups = drawn
    assume(any(weight for _, _, weight in plain))
    how, sent = GroupMeans(3), in_groups(plain, groups)
    found = how.result(scattered(sent, rng, how))
    for g in range(3):
        own = [update for update, group in zip(plain, groups, strict=False) if group == g]
        weight = sum(weight for *_, weight in own)
        assert found["group"][g] == pytest.approx(weight, rel=1e-15)
        right = MEAN.result(MEAN.fold(own)) if weight else {"w": torch.zeros_like(found["w"][g])}
        assert bits({"w": found["w"][g]}) == bits(right)


@given(grouped)
def test_statistics_have_one_mean_over_all_groups(drawn):
    plain, groups = drawn
    assume(any(weight for _, _, weight in plain))
    sent = [(k, m | {"buffers": m["w"]}, weight) for k, m, weight in in_groups(plain, groups)]
    found = GroupMeans(3).result(GroupMeans(3).fold(sent))
    assert bits({"w": found["buffers"]}) == bits(MEAN.result(MEAN.fold(plain)))


@pytest.mark.parametrize(
    "group",
    [torch.tensor(2), torch.tensor(-1), torch.tensor(0.0), torch.zeros(1, dtype=torch.int64), None],
    ids=str,
)
def test_a_group_that_there_is_not_is_refused_and_the_sums_stay_as_they_were(group):
    total = PAIRS.fold([(0, {"w": torch.ones(2), "group": torch.tensor(1)}, 3.0)])
    bad = {"w": torch.ones(2)} | ({} if group is None else {"group": group})
    with pytest.raises(ArithmeticError, match=r"gives .*group.*; it should be a whole number from 0 to 1"):
        PAIRS.fold([(1, bad, 1.0)], total)
    spoiled = {"w": torch.ones(2), "buffers": torch.tensor([float("nan")]), "group": torch.tensor(1)}
    with pytest.raises(ArithmeticError, match="buffers is not finite"):
        PAIRS.fold([(1, spoiled, 1.0)], total)
    assert PAIRS.result(total)["w"].tolist() == [[0, 0], [1, 1]]
    assert PAIRS.result(total)["group"].tolist() == [0, 3]


def test_the_form_of_most_clients_counts_whatever_their_groups():
    """Also in a group in which nobody else is."""
    ones = {"w": torch.ones(2)}
    sent = [(k, ones | {"group": torch.tensor(0)}, 1.0) for k in range(2)]
    odd = (2, {"w": torch.ones(3), "group": torch.tensor(1)}, 1.0)
    total = PAIRS.fold([*sent, odd])
    assert PAIRS.mismatched(total).keys() == {2}
    assert PAIRS.result(total)["group"].tolist() == [2, 0]


@pytest.mark.parametrize("how", [MEAN, Rows()], ids=["mean", "rows"])
def test_only_means_by_groups_take_a_group(how):
    with pytest.raises(ArithmeticError, match=r"gives a group; .* fedsim\.GroupMeans"):
        how.fold([(0, {"w": torch.ones(2), "group": torch.tensor(0)}, 1.0)])


def test_nobody_has_no_mean():
    with pytest.raises(RoundError, match="no client's message has a weight above 0"):
        PAIRS.result(PAIRS.fold([]))


# A round


@dataclass(frozen=True, kw_only=True)
class Clusters(Strategy):
    """IFCA (Ghosh 2020): each client trains the one of k models that has the smallest loss on its data."""

    k: int = 2

    broadcast = ("model", "models")

    @property
    def aggregator(self):
        return GroupMeans(self.k)

    def init_server(self, model):
        models = torch.stack([(1 - 2 * g) * model for g in range(self.k)])
        return {"model": model, "models": models, "sizes": model.new_zeros(self.k)}

    def client_update(self, server, client, local):
        models = server["models"]
        group = torch.stack([local.loss(w) for w in models]).argmin()
        x = models.index_select(0, group[None])[0]
        return Update({"delta": local.train(x) - x}, weight=local.num_examples, group=group)

    def server_update(self, server, mean, info):
        models = server["models"] + mean["delta"]
        return {"model": models[0], "models": models, "sizes": info.group_weights.to(models.dtype)}


@dataclass(frozen=True, kw_only=True)
class Own(Clusters):
    """The same, whose clients download one model each: that of their id."""

    broadcast = ("model",)

    def download(self, server, client_id):
        return {"model": server["models"][client_id % self.k]}

    def client_update(self, server, client, local):
        x = server["model"]
        return Update({"delta": local.train(x) - x}, weight=local.num_examples, group=local.client_id % self.k)


def test_one_cluster_is_fedavg_to_the_bit():
    plain, one = (
        make_simulation(cohort=SAMPLE, momentum=0.5),
        make_simulation(Clusters(k=1), cohort=SAMPLE, momentum=0.5),
    )
    for _ in range(3):
        a, b = plain.round(), one.round()
        assert (a.fingerprint, a.train_loss, a.steps) == (b.fingerprint, b.train_loss, b.steps)


def test_each_cluster_is_a_federation_of_its_own():
    """Its model is FedAvg's over its clients alone, and the sizes are those of both."""
    both = make_simulation(Own())
    both.round()
    for g in range(2):
        alone = make_simulation(FedAvg())
        alone.cohort = lambda n, random, g=g: range(g, n, 2)
        alone.server = alone.server | {"model": (1 - 2 * g) * alone.server["model"]}
        alone.round()
        close(both.server["models"][g], alone.server["model"], rtol=0, atol=0)
    assert both.server["sizes"].tolist() == [sum(SIZES[0::2]), sum(SIZES[1::2])]


def test_a_cluster_that_nobody_chose_stays_as_it_is():
    simulation = make_simulation(Own())
    simulation.cohort = lambda n, random: [1, 3]
    before = simulation.server["models"][0].clone()
    simulation.round()
    assert torch.equal(simulation.server["models"][0], before)
    assert simulation.server["sizes"].tolist() == [0, SIZES[1] + SIZES[3]]


@dataclass(frozen=True, kw_only=True)
class Passes(Wrapper):
    """Another strategy, as it is."""


TRIED = {"clusters": Clusters(), "downloads": Own(), "wrapped": Passes(inner=Own())}


@pytest.mark.parametrize("strategy", TRIED.values(), ids=TRIED)
@pytest.mark.parametrize("workers", [1, 3])
def test_groups_give_one_digest_on_threads(strategy, workers):
    spec = {"name": "threads", "workers": workers}
    serial, threads = (make_simulation(strategy, cohort=SAMPLE, runtime=r) for r in ("serial", spec))
    assert trace(threads) == trace(serial)


@pytest.mark.parametrize("strategy", TRIED.values(), ids=TRIED)
def test_groups_agree_in_a_batch_of_clients(strategy):
    assert_agree(pair(strategy, cohort=SAMPLE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's, about its own processes
@pytest.mark.parametrize("strategy", TRIED.values(), ids=TRIED)
def test_groups_give_one_digest_on_ray(strategy):
    assert trace_on_ray(strategy, cohort=SAMPLE) == trace(make_simulation(strategy, cohort=SAMPLE))


@pytest.mark.parametrize("name", ["Clusters", "Own"])
def test_groups_give_one_digest_on_nodes(tmp_path, monkeypatch, name):
    config = load(LAB | {"strategy": {"name": f"test_groups:{name}"}, "rounds": 2})

    def played(simulation):
        records = [simulation.round() for _ in range(2)]
        own = simulation.evaluate_clients(batch_size=5)
        return [(r.train_loss, r.steps, r.bytes_down) for r in records], _digests(simulation.server), own

    lab = Lab(tmp_path, monkeypatch, double=0.3)
    for node in lab.nodes.values():
        allow = node.settings.allow.model_copy(update={"strategies": [f"test_groups:{name}"]})
        node.settings = node.settings.model_copy(update={"allow": allow})
    try:
        assert played(lab.simulation(config, wait=1e5, round_timeout=1e6)) == played(build(config))
    finally:
        lab.close()


@dataclass(frozen=True, kw_only=True)
class Asks(FedAvg):
    """FedAvg after a survey by groups."""

    survey_aggregator = PAIRS

    def init_server(self, model):
        return {"model": model, "seen": model.new_zeros(2, 2)}

    def survey(self, server, client, local):
        return Update({"id": local.num_examples}, weight=1.0, group=local.client_id % 2)

    def surveyed(self, server, mean, info):
        return {"seen": torch.stack([mean["id"], info.group_weights.float()])}


def test_a_survey_has_groups_of_its_own():
    simulation = make_simulation(Asks())
    simulation.round()
    means = [sum(SIZES[0::2]) / 3, sum(SIZES[1::2]) / 3]
    close(simulation.server["seen"], torch.tensor([means, [3, 3]]), rtol=1e-6, atol=0)


WRONG = {
    "a float": (torch.tensor(1.0), "gave torch.float32 .* as its group; it should be a whole number"),
    "a vector": (torch.zeros(1, dtype=torch.int64), r"gave torch.int64 \(1,\) as its group"),
    "a word": ("left", "gave 'left' as its group"),
    "truth": (True, "gave True as its group"),
    "too large": (2, "gives the group 2; it should be a whole number from 0 to 1"),
    "negative": (-1, "gives the group -1; it should be a whole number from 0 to 1"),
    "none": (None, "gives no group"),
}


@pytest.mark.parametrize(("group", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_group_is_one_line(group, said):
    @dataclass(frozen=True, kw_only=True)
    class Lost(Own):
        def client_update(self, server, client, local):
            return super().client_update(server, client, local)._replace(group=group)

    with pytest.raises(ClientError, match=f"round 1, client 0: .*{said}"):
        make_simulation(Lost()).round()


@pytest.mark.parametrize("groups", [0, 1.5, True])
def test_a_wrong_number_of_groups_is_refused_at_the_start(groups):
    @dataclass(frozen=True, kw_only=True)
    class Few(FedAvg):
        aggregator = GroupMeans(groups)

    with pytest.raises(ConfigError, match=r"strategy\.aggregator: .* should have from 1 to 65536 groups"):
        make_simulation(Few())


# What a client downloads


def test_bytes_down_are_those_of_what_each_client_downloads():
    plain, own, all_ = (make_simulation(s).round() for s in (FedAvg(), Own(), Clusters()))
    assert own.bytes_down == plain.bytes_down
    p = make_simulation().server["model"].nbytes
    assert all_.bytes_down == plain.bytes_down + len(SIZES) * 2 * p


@dataclass(frozen=True, kw_only=True)
class Says(FedAvg):
    """FedAvg whose clients find what they have downloaded, in each of their methods."""

    def init_server(self, model):
        return {"model": model, "ids": torch.arange(6.0)}

    def download(self, server, client_id):
        assert type(client_id) is int
        return {"model": server["model"], "id": server["ids"][client_id]}

    def survey(self, server, client, local):
        assert float(server["id"]) == local.client_id
        return Update({"n": local.num_examples}, weight=1.0)

    def client_update(self, server, client, local):
        assert server.keys() == {"model", "id", "buffers"}
        assert float(server["id"]) == local.client_id
        return super().client_update(server, client, local)

    def personalise(self, server, client, local):
        assert float(server["id"]) == local.client_id
        return server["model"]


@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 2}])
def test_survey_training_and_evaluation_have_what_the_client_downloads(runtime):
    said, plain = (make_simulation(s, runtime=runtime) for s in (Says(), FedAvg()))
    assert said.round().fingerprint == plain.round().fingerprint
    assert said.evaluate_clients(batch_size=5) == plain.evaluate_clients(batch_size=5)


BAD_DOWNLOADS = {
    "no model": (lambda server, k: {"ids": server["ids"]}, "gave ids float32 .*; it should give model float32"),
    "another model": (lambda server, k: {"model": server["model"][1:]}, "gave .*; it should give model float32"),
    "nothing": (lambda server, k: None, "gave NoneType as its state"),
    "statistics": (
        lambda server, k: server | {"buffers": server["ids"]},
        "gave 'buffers', which is a reserved name",
    ),
    "an error": (lambda server, k: server[k], "KeyError: 0"),
}


@pytest.mark.parametrize(("download", "said"), BAD_DOWNLOADS.values(), ids=BAD_DOWNLOADS)
def test_a_wrong_download_is_refused_at_the_start(download, said):
    @dataclass(frozen=True, kw_only=True)
    class Bad(Says):
        def download(self, server, client_id):
            return download(server, client_id)

    with pytest.raises(ConfigError, match=f"^strategy: Bad.download for client 0: {said}"):
        make_simulation(Bad())


@pytest.mark.parametrize("runtime", ["serial", {"name": "vectorized", "chunk": 3}], ids=["serial", "vectorized"])
def test_downloads_of_two_forms_end_the_round_whoever_may_fail(runtime):
    @dataclass(frozen=True, kw_only=True)
    class Larger(FedAvg):
        def download(self, server, client_id):
            return server | {"more": torch.zeros(1 + (client_id == 3))}

    simulation = make_simulation(Larger(), runtime=runtime, failures=Failures(policy="drop"))
    with pytest.raises(
        RoundError, match=r"Larger.download for client 3: gave .*more float32 \(2,\); it should give"
    ):
        simulation.round()


def test_groups_without_any_client_have_zeros():
    @dataclass(frozen=True, kw_only=True)
    class Grouped(FedAvg):
        sends = {"delta": CHANGE}
        aggregator = GroupMeans(3)
        min_clients = 0

        def client_update(self, server, client, local):
            return super().client_update(server, client, local)._replace(group=local.client_id % 2)

        def server_update(self, server, mean, info):
            assert mean["delta"].shape == (3, len(server["model"]))
            assert info.group_weights.tolist() == [0.0] * 3 or info.cohort
            return {"model": server["model"] + mean["delta"].sum(0)}

    cohort, failures = {"name": "poisson", "rate": 0.1}, Failures(min_clients=0)
    simulation = make_simulation(Grouped(), cohort=cohort, failures=failures)
    seen = set()
    for _ in range(12):
        before = simulation.fingerprint()
        done = simulation.round()
        assert (done.fingerprint == before) == (not done.cohort)
        seen.add(bool(done.cohort))
    assert seen == {True, False}
