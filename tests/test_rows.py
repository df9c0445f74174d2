"""Laws of `Rows` and of the rules that see all messages: nothing of a message gets round them."""

from dataclasses import dataclass, replace
from itertools import permutations
from math import inf, nan

import numpy as np
import pytest
import torch
from conftest import FEW, SIZES, close, conv_net, make_data, make_simulation, make_strategy, make_task, trace
from hypothesis import given
from hypothesis import strategies as st
from small_run import left, write
from test_aggregate import FORMS, MEAN, REFUSED, bits, scattered, several

from fedsim import ConfigError, RoundError, RoundInfo, Rows, Simulation, Strategy, Wrapper
from fedsim.errors import ClientError
from fedsim.federated import aggregate
from fedsim.federated.aggregate import WeightedMean
from fedsim.federated.fold import Fold
from fedsim.federated.rows import mean_of_rows
from fedsim.federated.runtime import Call
from fedsim.federated.simulation import Failures
from fedsim.runtimes.serial import Serial
from fedsim.strategies.averaging.fedavg import FedAvg
from fedsim.strategies.robust.krum import Krum, squared_distances
from fedsim.strategies.robust.median import COLUMNS, Median, coordinate_median

ROWS = Rows()
DROP = Failures(policy="drop")
SAMPLE = {"name": "uniform", "size": 4}


def message(*values):
    return {"w": torch.tensor(values)}


# The aggregator


@given(st.permutations(range(7)), st.randoms(use_true_random=False))
def test_rows_are_in_the_order_of_clients_whichever_order_they_came_in(clients, rng):
    updates = [(k, {"w": torch.full((2, 3), float(k)), "v": torch.tensor(-1.0 * k)}, 1.0 * k) for k in clients]
    rows = ROWS.result(scattered(updates, rng, ROWS))
    assert {name: tuple(value.shape) for name, value in rows.items()} == {"w": (7, 2, 3), "v": (7,)}
    assert rows["w"][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6] == (-rows["v"]).tolist()


@pytest.mark.parametrize(("bad", "weight", "named"), REFUSED.values(), ids=REFUSED)
def test_what_the_mean_refuses_rows_refuse_and_stay_as_they_were(bad, weight, named):
    total = ROWS.fold([(0, message(1.0, 2.0), 1.0), (1, message(4.0, 8.0), 2.0)])
    with pytest.raises(ArithmeticError, match=named):
        ROWS.fold([(2, bad, weight)], total)
    assert ROWS.result(total)["w"].tolist() == [[1.0, 2.0], [4.0, 8.0]]


@given(several, st.randoms(use_true_random=False))
def test_the_form_of_most_counts_as_it_does_for_the_mean(drawn, rng):
    forms, clients, _ = drawn
    updates = [(client, FORMS[form], 1.0) for form, client in zip(forms, clients, strict=True)]
    total = scattered(updates, rng, ROWS)
    odd = ROWS.mismatched(total)
    assert odd == MEAN.mismatched(MEAN.fold(updates))
    fits = [update for update in updates if update[0] not in odd]
    assert bits(ROWS.result(total)) == bits(ROWS.result(ROWS.fold(fits)))


def test_more_messages_than_a_round_may_have_are_an_error(monkeypatch):
    monkeypatch.setattr(aggregate, "MAX_MESSAGES", 3)
    two = [(k, message(1.0), 1.0) for k in range(2)]
    with pytest.raises(RoundError, match="more than 3 messages"):
        ROWS.merge(ROWS.fold(two), ROWS.fold(two))


def test_who_has_no_weight_is_a_row():
    assert ROWS.result(ROWS.fold([(3, message(9.0), 0.0), (1, message(2.0), 1.0)]))["w"].tolist() == [[2.0], [9.0]]


def test_nothing_has_no_rows():
    with pytest.raises(RoundError, match="no client has sent a message"):
        ROWS.result(ROWS.fold([]))


def test_a_row_of_a_batch_does_not_keep_the_batch():
    batch = torch.zeros(100, 4)
    [[(_, kept)]] = ROWS.fold([(0, {"w": batch[1]}, 1.0)]).values()
    assert kept["w"].untyped_storage().nbytes() == 16


def test_messages_are_only_read():
    sent = message(1.5, -2.5)
    ROWS.result(ROWS.fold([(0, sent, 3.0)]))["w"].zero_()
    assert sent["w"].tolist() == [1.5, -2.5]


# A round


@dataclass(frozen=True, kw_only=True)
class FedAvgOfRows(FedAvg):
    """FedAvg whose server computes the mean itself."""

    aggregator = ROWS

    def server_update(self, server, rows, info):
        mean = {name: mean_of_rows(value, info.weights) for name, value in rows.items()}
        assert mean.keys() == {"delta", "buffers"}
        return super().server_update(server, mean, info)


RUNTIMES = ["serial", {"name": "threads", "workers": 1}, {"name": "threads", "workers": 3}]


@pytest.mark.parametrize("runtime", RUNTIMES, ids=["serial", "one thread", "threads"])
def test_the_weighted_mean_of_rows_is_the_mean(runtime):
    """Statistics, too, of which the strategy says nothing; some clients fail."""
    found, expected = (
        trace(make_simulation(Spoiled(inner=inner, bad=(1,)), cohort=SAMPLE, runtime=r, failures=DROP))
        for inner, r in ((FedAvgOfRows(), runtime), (FedAvg(), "serial"))
    )
    assert found == expected
    assert any(record["failed"] for record in found)


@dataclass(frozen=True, kw_only=True)
class Spoiled(Wrapper):
    """The clients in `bad` send `value` in every entry of their strategy."""

    bad: tuple[int, ...]
    value: float = nan

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        spoiled = {name: torch.full_like(value, self.value) for name, value in update.message.items()}
        return update._replace(message=spoiled) if local.client_id in self.bad else update


def test_info_has_the_weights_and_the_rows_in_the_order_of_the_cohort():
    seen = {}

    class Watched(FedAvgOfRows):
        def server_update(self, server, rows, info):
            seen.update(rows=rows, info=info)
            return super().server_update(server, rows, info)

    class Sends(Wrapper):
        def client_update(self, server, client, local):
            update = super().client_update(server, client, local)
            delta = torch.full_like(update.message["delta"], float(local.client_id))
            return update._replace(message={"delta": delta})

    backwards = lambda num_clients, stream: [5, 0, 3]  # noqa: E731 - a user's cohort
    simulation = make_simulation(Sends(inner=Watched()))
    simulation.cohort = backwards
    simulation.round()
    assert seen["rows"]["delta"][:, 0].tolist() == seen["info"].cohort == [0, 3, 5]
    assert seen["info"].weights.tolist() == [SIZES[k] for k in (0, 3, 5)]
    assert seen["info"].weights.dtype == torch.float64


def test_strategies_of_a_mean_get_the_weights_as_well():
    seen = []

    class Watched(FedAvg):
        def server_update(self, server, mean, info):
            seen.append(info.weights.tolist())
            return super().server_update(server, mean, info)

    make_simulation(Watched()).round()
    assert seen == [list(SIZES)]
    before = RoundInfo(0, [1], 2, torch.Generator(), 3, None)  # as code from before the weights makes it
    assert before.weights.tolist() == []


def with_aggregator(strategy, aggregator):
    made = make_simulation(strategy)
    parts = [getattr(made, name) for name in ("strategy", "task", "data", "runtime", "cohort", "recipe")]
    return Simulation(*parts, aggregator=aggregator)


@pytest.mark.parametrize(("strategy", "kind"), [("fedavg", WeightedMean), ("median", Rows)])
def test_a_simulation_s_own_aggregator_wins(strategy, kind):
    class Doubled(kind):
        def fold(self, updates, start=None):
            doubled = ((k, m | {"delta": 2 * m["delta"]}, weight) for k, m, weight in updates)
            return super().fold(doubled, start)

    plain, doubled = make_simulation(strategy), with_aggregator(strategy, Doubled())
    start = plain.server["model"]
    plain.round()
    doubled.round()
    close(doubled.server["model"] - start, 2 * (plain.server["model"] - start), rtol=1e-5, atol=1e-6)


def test_a_rule_that_needs_all_messages_is_given_no_mean():
    said = r"^aggregator: Median needs Rows, and was given WeightedMean; leave it out$"
    with pytest.raises(ConfigError, match=said):
        with_aggregator("median", WeightedMean())


@pytest.mark.parametrize("name", ["median", "krum"])
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(name, fedsim_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, strategy=name, cohort="all")
    for command in ("run c.yaml --out=whole", "run c.yaml rounds=2 --out=run", "resume run rounds=4"):
        assert fedsim_(*command.split()).status == 0
    assert left(tmp_path / "run") == left(tmp_path / "whole")


@pytest.mark.parametrize("name", ["median", "krum"])
def test_rows_of_a_sweep_s_batch_are_the_runs_apart(name):
    """Several runs train as one batch of networks, and each gets its own clients' messages."""
    task, data = make_task(dtype=torch.float64), make_data(dtype=torch.float64)
    runtime = {"name": "vectorized", "chunk": 4, "workers": 1}
    apart = [make_simulation(name, task=task, data=data, seed=seed) for seed in (0, 1)]
    together = [make_simulation(name, task=task, data=data, seed=seed, runtime=runtime) for seed in (0, 1)]
    calls = [call_of(simulation) for simulation in together]
    for simulation, results in zip(together, together[0].runtime.run_many(calls), strict=True):
        simulation.runtime.run = lambda *call, results=results: iter(results)
        simulation.round()
    close([simulation.server for simulation in together], [run.round() and run.server for run in apart])


def call_of(simulation):
    jobs = [simulation._job(k) for k in simulation.sample()]
    return Call(simulation.work, simulation._download(simulation.server), jobs, simulation.aggregator)


# What is refused


class NoInstance(FedAvg):
    aggregator = Rows


class NoCount(FedAvg):
    min_clients = -1


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (NoInstance(), r"^strategy\.aggregator: <class .*Rows'> is no aggregator; fedsim\.Rows\(\) is one$"),
        (Wrapper(inner=NoCount()), r"^strategy\.min_clients: -1 should be a whole number >= 0, or all$"),
        (Krum(attackers=2), r"^strategy: Krum needs 7, and a cohort has 6 clients; make the cohort larger, or"),
        (Krum(attackers=1, choose=6), r"^strategy: Krum needs 7, and a cohort has 6 clients"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(strategy, said):
    with pytest.raises(ConfigError, match=said):
        make_simulation(strategy)


@pytest.mark.parametrize(("attackers", "choose", "least"), [(0, 1, 3), (1, 1, 5), (2, 1, 7), (1, 9, 10)])
def test_krum_needs_more_than_2_f_plus_2_clients_and_honest_ones_to_choose(attackers, choose, least):
    assert Krum(attackers=attackers, choose=choose).min_clients == least


def test_a_round_with_too_few_answers_for_the_rule_is_an_error_and_changes_nothing():
    simulation = make_simulation(Spoiled(inner=Krum(attackers=1), bad=(1, 4)), failures=DROP)
    before = simulation.fingerprint()
    with pytest.raises(
        RoundError, match=r"^round 1: 4 of 6 clients are left, and Spoiled needs 5; client 1: delta"
    ):
        simulation.round()
    assert (simulation.fingerprint(), simulation.number) == (before, 0)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda rows: rows, r"gave buffers float32 \(6, 6\); it should give buffers float32 \(6,\)"),
        (lambda rows: rows[0].double(), r"gave buffers float64 \(6,\); it should give"),
        (lambda rows: rows[0] / 0, "gave statistics that are not finite"),
        (lambda rows: None, "gave NoneType as 'buffers' in its state"),
    ],
)
def test_wrong_statistics_are_refused_by_name(made, said):
    class Wrong(FedAvgOfRows):
        def server_buffers(self, rows, info):
            return made(rows)

    with pytest.raises(RoundError, match=rf"^round 1: Wrong\.server_buffers: {said}"):
        make_simulation(Wrong()).round()


def test_rows_without_a_client_are_the_runtime_s_fault():
    """One that adds a message to the rows and reports a failure would give one client's row to another."""

    class Forgets(Serial):
        def run(self, work, server, jobs, aggregator):
            fold = Fold(aggregator)
            for job in jobs:
                report = fold.add(job, self.worker.run(work, server, job), 0.0)
                yield aggregator.fold([]), [report._replace(error="late") if job.client_id == 2 else report]
            yield fold.partial, []

    simulation = make_simulation("median", failures=DROP)
    simulation.runtime = Forgets(simulation.task, simulation.data, device="cpu")
    with pytest.raises(
        RoundError, match=r"^round 1: runtime: Forgets\.run gave messages of 6 clients, and reports on 5$"
    ):
        simulation.round()


def test_what_is_no_mean_is_no_model():
    simulation = make_simulation("fedavg")
    simulation.aggregator = ROWS
    with pytest.raises(
        RoundError, match=r"FedAvg\.server_update: gave model float32 \(6, \d+\), and init_server made"
    ):
        simulation.round()


def test_a_client_that_sends_something_not_finite_fails():
    with pytest.raises(ClientError, match="client 2: delta is not finite"):
        make_simulation(Spoiled(inner=make_strategy("median"), bad=(2,), value=inf)).round()


# The rules

X = torch.sin(torch.arange(11.0, dtype=torch.float64)[:, None] * torch.arange(1.0, 4.0, dtype=torch.float64))
X[9], X[10] = torch.tensor([10.0, -10.0, 10.0]), torch.tensor([-8.0, 8.0, 9.0])
RULES = {"median": Median(), "krum": Krum(attackers=2), "multi-krum": Krum(attackers=2, choose=9)}


def applied(strategy, updates):
    """(P,) what the server adds to the model."""
    rows = {"delta": updates}
    made = strategy.server_update({"model": torch.zeros_like(updates[0])}, rows, None)
    return made["model"]


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("median", (0.141120, -0.279415, 0.141120)),
        ("krum", (0.0, 0.0, 0.0)),
        ("multi-krum", (0.171455, 0.053839, -0.048041)),
    ],
)
def test_rules_give_the_values_of_byzfl(rule, value):
    """byzfl 0.0.11, https://github.com/LPD-EPFL/byzfl, on these eleven vectors with f = 2."""
    torch.testing.assert_close(
        applied(RULES[rule], X), torch.tensor(value, dtype=torch.float64), rtol=0, atol=5e-7
    )


numbers = st.floats(-100, 100, width=32)
honest = st.integers(5, 9).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=n, max_size=n)
)


@pytest.mark.parametrize("strategy", [Median(), Krum(attackers=1), Krum(attackers=1, choose=4)], ids=str)
@given(honest, st.integers(0, 9), st.sampled_from([1e30, -1e30, 3e38, 1e4]))
def test_one_hostile_client_does_not_move_a_rule_beyond_the_honest_ones(strategy, updates, place, value):
    updates.insert(min(place, len(updates)), [value, -value, value])
    rows = torch.tensor(updates)
    found, good = applied(strategy, rows), rows[rows.abs().amax(1) <= 100]
    assert ((good.amin(0) <= found) & (found <= good.amax(0))).all()


@pytest.mark.parametrize("strategy", [Median(), Krum(attackers=1), Krum(attackers=1, choose=4)], ids=str)
@given(st.lists(numbers, min_size=1, max_size=5), st.integers(5, 8))
def test_equal_messages_give_that_message(strategy, update, clients):
    assert torch.equal(applied(strategy, torch.tensor([update] * clients)), torch.tensor(update) + 0.0)


@given(honest)
def test_the_median_is_numpy_s(updates):
    rows = torch.tensor(updates)
    expected = np.median(rows.double().numpy(), axis=0).astype(np.float32)
    assert coordinate_median(rows).tolist() == expected.tolist()


@given(honest, st.integers(0, 1))
def test_krum_is_as_the_paper_says(updates, f):
    """The score of i: the sum over its n - f - 2 closest others of |V_i - V_j|^2; the first of equal ones."""
    v, n = np.array(updates, dtype=np.float64), len(updates)
    distances = [sorted(((v[i] - v[j]) ** 2).sum() for j in range(n) if j != i) for i in range(n)]
    scores = np.array([sum(each[: n - f - 2]) for each in distances])
    [chosen] = Krum(attackers=f).chosen(torch.tensor(updates)).tolist()
    assert scores[chosen] == pytest.approx(scores.min(), rel=1e-12, abs=0)


def test_rules_of_wide_updates_are_those_of_their_pieces():
    """Columns are cut into blocks, so that memory is bounded."""
    wide = torch.randn(6, 2 * COLUMNS + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(coordinate_median(wide), torch.from_numpy(np.median(wide.numpy(), axis=0)))
    close(squared_distances(wide), torch.stack([(wide - row).square().sum(1) for row in wide]))


def test_distances_of_updates_nearly_alike_are_not_lost():
    """Four updates that differ by 1e-5 a coordinate; |a|^2 + |b|^2 - 2 ab in float32 gives -0.002 to 0.002."""
    common = 0.05 * torch.randn(10**5, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([common, common, common + 1e-5, common - 2e-5])
    found = squared_distances(rows)
    assert found[0, 1] == 0
    torch.testing.assert_close(found[0, 2:], torch.tensor([1e-5, 4e-5], dtype=torch.float64), rtol=0.02, atol=0)


def test_the_order_of_clients_does_not_matter():
    updates = X[[0, 3, 5, 9, 7]]
    for strategy in (Median(), Krum(attackers=1), Krum(attackers=1, choose=3)):
        expected = applied(strategy, updates)
        for order in list(permutations(range(5)))[::7]:
            close(applied(strategy, updates[list(order)]), expected)


def test_multi_krum_of_all_is_the_mean():
    close(applied(Krum(attackers=0, choose=11), X), X.mean(0))


def test_a_server_s_rate_scales_the_step():
    for strategy in RULES.values():
        close(applied(replace(strategy, server_lr=0.5), X), 0.5 * applied(strategy, X))


# Nothing gets round a rule


def with_lies(strategy, *lies, **settings):
    """A simulation in which client 2's messages have 1e30 in these entries, whatever it has computed."""
    simulation = make_simulation(strategy, **settings)

    class Lying(type(simulation.aggregator)):
        def fold(self, updates, start=None):
            return super().fold([(k, lied(m) if k == 2 else m, w) for k, m, w in updates], start)

    def lied(message):
        return {name: torch.full_like(v, 1e30) if name in lies else v for name, v in message.items()}

    simulation.aggregator = Lying()
    return simulation


def learns(simulation):
    before = simulation.evaluate().loss
    try:
        for _ in range(10):
            simulation.round()
    except ClientError:  # from the model that the lie has made, nobody's loss is finite
        return False
    return simulation.evaluate().loss < 0.7 * before


@pytest.mark.parametrize("lies", [("delta",), ("buffers",), ("delta", "buffers")], ids=str)
@pytest.mark.parametrize("strategy", ["fedavg", Median(), Krum(attackers=1), Krum(attackers=1, choose=3)], ids=str)
def test_rules_learn_beside_a_client_that_lies_and_the_mean_does_not(strategy, lies):
    """Also where it lies about its statistics only, and its update is as good as any."""
    settings = {"task": make_task(lambda: conv_net(dropout=0)), "data": make_data([20] * 6, noise=0.3), "lr": 0.1}
    assert learns(with_lies(strategy, *lies, **settings)) == isinstance(strategy, Strategy)


@pytest.mark.parametrize("name", ["median", "krum"])
def test_a_lie_about_statistics_leaves_them_among_those_of_the_honest(name):
    lying, seen = with_lies(name, "buffers", lr=1e-9), {}
    plain = lying.aggregator
    lying.aggregator.result = lambda total: seen.setdefault("rows", type(plain).result(plain, total))
    lying.round()
    honest = seen["rows"]["buffers"][[0, 1, 3, 4, 5]]
    assert ((honest.amin(0) <= lying.server["buffers"]) & (lying.server["buffers"] <= honest.amax(0))).all()


@pytest.mark.parametrize("inner", ["median", "krum"])
def test_personal_layers_stay_with_clients_under_a_rule(inner):
    simulation = make_simulation(make_strategy("personal", inner={"name": inner} | FEW.get(inner, {})))
    simulation.round()
    moved = simulation.server["model"] != simulation.task.initial_model
    own = simulation.task.layout.mask(lambda name: name.startswith("fc"))
    assert moved[~own].any()
    assert not moved[own].any()
