"""Laws of failure: it names its client, drops it without a trace, or leaves everything as it was."""

import gc
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from time import sleep

import pytest
import torch
from conftest import PARTIAL, SIZES, make_data, make_simulation, make_strategy, trace
from covering import in_turn, sampled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim import ClientError, ConfigError, RoundError, Strategy, Update, Wrapper
from fedsim.errors import located
from fedsim.experiment.config import Evaluate
from fedsim.experiment.figures import evaluate
from fedsim.federated.fold import Fold
from fedsim.federated.runtime import Runtime
from fedsim.federated.simulation import Failures
from fedsim.federated.strategy import surveys
from fedsim.strategies import CATALOGUE

RUNTIMES = ["serial", *({"name": "threads", "workers": workers} for workers in (1, 2, 3))]
DROP = Failures(policy="drop")

runtimes, both = (
    pytest.mark.parametrize("runtime", some, ids=lambda s: s if s == "serial" else f"threads-{s['workers']}")
    for some in (RUNTIMES, RUNTIMES[::3])
)


@dataclass(frozen=True, kw_only=True)
class Faulty(Wrapper):
    """Some clients train, and fail then."""

    bad: set[int] = field(default_factory=set)

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        if local.client_id in self.bad:
            raise OSError("no space left")
        return update


def faulty(*bad, name="scaffold"):
    return Faulty(inner=make_strategy(name), bad=set(bad))


def state(simulation):
    """All that changes from round to round; tensors by identity, since states are never written."""
    return simulation.number, dict(simulation.server), dict(simulation.clients)


@runtimes
def test_a_failure_names_round_and_client_and_has_its_cause(runtime):
    strategy = faulty()
    simulation = make_simulation(strategy, runtime=runtime)
    simulation.round()
    strategy.bad.add(3)
    with pytest.raises(ClientError, match="round 2, client 3: OSError: no space left") as caught:
        simulation.round()
    assert isinstance(caught.value.__cause__, OSError)


@runtimes
@pytest.mark.parametrize("failures", [Failures(), Failures(policy="drop", min_clients=5)], ids=["raise", "floor"])
def test_a_round_that_failed_can_be_run_again(runtime, failures):
    """It leaves the simulation as it was, and the runtime in order."""
    strategy = faulty()
    simulation = make_simulation(strategy, runtime=runtime, failures=failures)
    expected = trace(make_simulation("scaffold"))
    assert trace(simulation, rounds=1) == expected[:1]
    before = state(simulation)
    strategy.bad.update({1, 4})
    with pytest.raises((ClientError, RoundError)):
        simulation.round()
    assert state(simulation) == before
    strategy.bad.clear()
    assert trace(simulation, rounds=2) == expected[1:]


@dataclass(frozen=True, kw_only=True)
class Slow(Wrapper):
    """Client 0 fails at once, the others take their time."""

    begun: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)

    def client_update(self, server, client, local):
        if local.client_id == 0:
            raise OSError
        self.begun.add(local.client_id)
        sleep(0.1)
        self.ended.add(local.client_id)
        return super().client_update(server, client, local)


@runtimes
def test_nothing_runs_on_after_a_failure(runtime):
    strategy = Slow(inner=make_strategy("fedavg"))
    with pytest.raises(ClientError):
        make_simulation(strategy, runtime=runtime).round()
    assert strategy.begun == strategy.ended


def left_no_trace(dropped, usual, *who):
    """Two traces are the same but for the record of who failed; returns why."""
    causes = []
    for a, b in zip(dropped, usual, strict=True):
        causes += a["failed"].values()
        assert a.pop("failed").keys() == set(map(str, who))
        assert a.pop("cohort") == list(range(len(SIZES)))
        assert a.pop("bytes_down") == b["bytes_down"] * len(SIZES) / (len(SIZES) - len(who))
        assert a.pop("bytes_up") >= b["bytes_up"]
        assert a == {key: b[key] for key in a}
    return causes


OTHERS = {"name": "fixed", "clients": [0, 2, 3, 5]}  # than 1 and 4


@cache
def without(name):
    """What a strategy does in two rounds of a cohort without clients 1 and 4."""
    return trace(make_simulation(name, cohort=OTHERS), rounds=2)


@pytest.mark.parametrize(
    ("runtime", "name"), sampled([(r, n) for n, r in in_turn(PARTIAL, RUNTIMES)], RUNTIMES, PARTIAL)
)
def test_who_is_dropped_leaves_no_trace(runtime, name):
    """The model is that of a cohort without them, and they keep what they had."""
    if surveys(make_strategy(name)):
        pytest.skip("they fail in the training, and their answers to the survey count")
    dropped = trace(make_simulation(faulty(1, 4, name=name), runtime=runtime, failures=DROP), rounds=2)
    causes = left_no_trace(dropped, without(name), 1, 4)
    assert all("no space left (test_failures.py:" in cause for cause in causes)


@runtimes
def test_too_few_answers_fail_the_round(runtime):
    simulation = make_simulation(faulty(0, 1, 2), runtime=runtime, failures=Failures(policy="drop", min_clients=4))
    with pytest.raises(
        RoundError, match=r"round 1: 3 of 6 clients are left.*min_clients is 4; client 0: OSError: no space"
    ):
        simulation.round()
    enough = make_simulation(faulty(0, 1, 2), runtime=runtime, failures=Failures(policy="drop", min_clients=3))
    assert set(enough.round().failed) == {"0", "1", "2"}


@runtimes
def test_nobody_is_too_few(runtime):
    with pytest.raises(RoundError, match="0 of 6 clients are left"):
        make_simulation(faulty(*range(len(SIZES))), runtime=runtime, failures=DROP).round()


def test_a_round_ends_as_soon_as_too_few_clients_are_left():
    """Nobody trains where too few are asked, and nobody after the one that was needed has failed."""
    trained = []

    def ended(strategy, **failures):
        trained.clear()
        simulation = make_simulation(strategy, failures=Failures(policy="drop", **failures))
        before = state(simulation)
        with pytest.raises(RoundError) as caught:
            simulation.round(lambda report: trained.append(report.client_id))
        assert state(simulation) == before
        return str(caught.value)

    said = "round 1: 4 of 6 clients are left, and failures.min_clients is 5; "
    above = [f"client {k}: has {SIZES[k]} examples, and failures.max_examples is 7" for k in (1, 3)]
    assert ended(faulty(), min_clients=5, max_examples=7) == said + "; ".join(above)
    assert trained == []
    assert ended(faulty(0, 2), min_clients=5).startswith(
        said + "client 0: OSError: no space left (test_failures.py"
    )
    assert trained == [0, 1, 2]


def test_the_error_of_a_round_has_the_reason_of_each_client_that_failed():
    """Also of those whose message does not fit, since no record has them. Of very many it counts the rest."""
    odd = Odd(inner=faulty(0, 2, 3), change=ODD["shorter"], bad={5})
    with pytest.raises(RoundError) as caught:
        make_simulation(odd, failures=Failures(policy="drop", min_clients=3)).round()
    start, *causes = str(caught.value).split("; client ")
    assert start == "round 1: 2 of 6 clients are left, and failures.min_clients is 3"
    assert [cause[:11] for cause in causes] == ["0: OSError:", "2: OSError:", "3: OSError:", "5: sent buf"]
    many = make_simulation(faulty(*range(30)), data=make_data([2] * 30), failures=DROP)
    with pytest.raises(RoundError) as caught:
        many.round()
    assert str(caught.value).count("OSError") == 20
    assert str(caught.value).endswith("; and 10 more")


@dataclass(frozen=True, kw_only=True)
class Unseen(Wrapper):
    """Some clients cannot say what their own model is."""

    bad: set[int] = field(default_factory=set)

    def client_model(self, server, client, layout):
        if int(client["number"]) in self.bad:
            raise OSError("no space left")
        return super().client_model(server, client, layout)

    def init_client(self, model, layout):
        return super().init_client(model, layout) | {"number": torch.tensor(-1)}

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(client=update.client | {"number": torch.tensor(local.client_id)})


@both
def test_a_client_that_cannot_be_evaluated_is_left_out_with_its_reason(runtime):
    strategy = Unseen(inner=make_strategy("fedavg"), bad={1, 4})
    simulation = make_simulation(strategy, runtime=runtime, failures=DROP)
    simulation.round()
    found = evaluate(simulation, Evaluate(clients=True))
    assert [*found["evaluation_failed"]] == ["1", "4"]
    assert all(why.startswith("OSError: no space left (test_") for why in found["evaluation_failed"].values())
    strategy.bad.clear()
    others = simulation.evaluate_clients([0, 2, 3, 5])
    assert found["client_accuracy_mean"] == pytest.approx(sum(each.accuracy for each in others.values()) / 4)
    assert evaluate(simulation, Evaluate(clients=True))["evaluation_failed"] == {}


@runtimes
def test_a_loss_that_is_not_finite_is_named(runtime):
    with pytest.raises(ClientError, match=r"client \d: loss is not finite; lower local\.lr"):
        make_simulation(runtime=runtime, lr=1e30, steps=5).round()


@dataclass(frozen=True, kw_only=True)
class Sends(Wrapper):
    """Client 2 sends what it should not."""

    weight: float = 1.0
    value: float = 0.0
    kind: torch.dtype = torch.float32
    name: object = "delta"

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        if local.client_id != 2:
            return update
        message = {self.name: torch.full(server["model"].shape, self.value, dtype=torch.double).to(self.kind)}
        return update._replace(message=message, weight=self.weight)


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"value": float("nan")}, "delta is not finite"),
        ({"value": 1e300, "kind": torch.float64}, "delta is too large"),
        ({"weight": -1.0}, "gave the weight -1; it should be from 0 to 5"),
        ({"weight": float("inf")}, "gave the weight inf; it should be from 0 to 5$"),
        ({"kind": torch.int64}, r"delta is torch\.int64, which cannot be averaged"),
        ({"kind": torch.complex64}, r"delta is torch\.complex64, which cannot be averaged"),
        ({"kind": torch.float8_e4m3fn}, "Float8_e4m3fn"),
        ({"name": 1}, "gave 1 as a name in its message; names are strings"),
        ({"name": None}, "gave None as a name in its message; names are strings"),
    ],
    ids=str,
)
@both
def test_what_cannot_be_averaged_is_dropped_or_named(runtime, sent, named):
    strategy = Sends(inner=make_strategy("fedavg"), **sent)
    with pytest.raises(ClientError, match=f"round 1, client 2: .*{named}"):
        make_simulation(strategy, runtime=runtime).round()
    assert set(make_simulation(strategy, runtime=runtime, failures=DROP).round().failed) == {"2"}


@runtimes
def test_reports_tell_of_every_client_once(runtime):
    reports = []
    make_simulation(faulty(4), runtime=runtime, failures=DROP).round(reports.append)
    assert sorted(report.client_id for report in reports) == list(range(len(SIZES)))
    assert {report.client_id for report in reports if report.error} == {4}


@dataclass(frozen=True, kw_only=True)
class InPlace(Wrapper):
    """Writes to what all clients read."""

    def client_update(self, server, client, local):
        server["model"].mul_(1)
        return super().client_update(server, client, local)


@dataclass(frozen=True, kw_only=True)
class Misspelt(Wrapper):
    """Gives what the server does not have."""

    def server_update(self, server, mean, info):
        return {"modle": server["model"]}


@dataclass(frozen=True, kw_only=True)
class Forgetful(Wrapper):
    """Keeps something else than it began with."""

    def client_update(self, server, client, local):
        return super().client_update(server, client, local)._replace(client={"kept": server["model"]})


@runtimes
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (InPlace, r"wrote server\['model'\] in place"),
        (Misspelt, "'modle', which init_server did not make; it made model"),
        (Forgetful, r"round 1, client \d: its state is kept float32 \(183,\), and was nothing"),
    ],
)
def test_a_strategy_that_breaks_the_rules_is_told(runtime, wrong, said):
    with pytest.raises((ClientError, RoundError), match=said):
        make_simulation(wrong(inner=make_strategy("fedavg")), runtime=runtime).round()


def test_a_server_that_diverges_is_not_blamed_on_clients():
    with pytest.raises(RoundError, match=r"round 1: FedAvg\.server_update: gave a model that is not finite"):
        make_simulation(make_strategy("fedavg", server_lr=1e39)).round()


def test_threads_end_with_their_simulation():
    before = threading.active_count()
    for _ in range(3):
        make_simulation(runtime={"name": "threads", "workers": 2}).round()
        gc.collect()
    sleep(0.1)
    assert threading.active_count() <= before + 2


@dataclass(frozen=True, kw_only=True)
class InPlaceAtHome(Wrapper):
    """Writes to what the client keeps; scaffold's server has an entry of the same name."""

    def client_update(self, server, client, local):
        client["c"].mul_(1)
        return super().client_update(server, client, local)


@runtimes
def test_a_client_state_too_is_only_read(runtime):
    with pytest.raises(ClientError, match=r"client\['c'\] was written in place"):
        make_simulation(InPlaceAtHome(inner=make_strategy("scaffold")), runtime=runtime).round()


@dataclass(frozen=True, kw_only=True)
class SpoilsTheServer(Wrapper):
    """Writes to the server's state, in either half."""

    half: str

    def client_update(self, server, client, local):
        if self.half == "client":
            server["c"].add_(1)
        return super().client_update(server, client, local)

    def server_update(self, server, mean, info):
        if self.half == "server":
            server["c"].add_(1)
            raise ValueError
        return super().server_update(server, mean, info)


@pytest.mark.parametrize("half", ["client", "server"])
@pytest.mark.parametrize("failures", [Failures(), DROP], ids=["raise", "drop"])
@runtimes
def test_who_writes_in_place_spoils_nothing(runtime, failures, half):
    strategy = SpoilsTheServer(inner=make_strategy("scaffold"), half=half)
    simulation = make_simulation(strategy, runtime=runtime, failures=failures)
    with pytest.raises((RoundError, ValueError)):
        simulation.round()
    assert not simulation.server["c"].any()
    assert simulation.number == len(simulation.clients) == 0


@dataclass(frozen=True, kw_only=True)
class Retyped(Wrapper):
    """Gives an entry of the server another type, which a resume could not tell from another algorithm."""

    def server_update(self, server, mean, info):
        return {"model": super().server_update(server, mean, info)["model"].double()}


def test_a_server_keeps_the_form_it_began_with():
    with pytest.raises(RoundError, match=r"gave model float64 \(\d+,\), and init_server made model float32"):
        make_simulation(Retyped(inner=make_strategy("fedavg"))).round()


# Messages of another form than most


@dataclass(frozen=True, kw_only=True)
class Odd(Wrapper):
    """Some clients train, and send or keep something else then."""

    change: Callable[[Update], Update]
    bad: set[int] = field(default_factory=set)

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return self.change(update) if local.client_id in self.bad else update


def sends(change):
    return lambda update: update._replace(message=change(update.message))


NUMBERS = count()
ODD = {
    "shorter": sends(lambda m: m | {"delta": m["delta"][:-1]}),
    "a matrix": sends(lambda m: m | {"delta": m["delta"][None]}),
    "one number": sends(lambda m: m | {"delta": m["delta"].sum()}),
    "empty": sends(lambda m: m | {"delta": m["delta"][:0]}),
    "doubles": sends(lambda m: m | {"delta": m["delta"].double()}),
    "halves": sends(lambda m: m | {"delta": m["delta"].half()}),
    "renamed": sends(lambda m: {name.upper(): value for name, value in m.items()}),
    "one less": sends(lambda m: {"delta": m["delta"]}),
    "one more": sends(lambda m: m | {"more": torch.ones(3)}),
    "nothing": sends(lambda m: {}),
    "all different": sends(lambda m: {"delta": torch.ones(next(NUMBERS))}),
}
odd_forms = pytest.mark.parametrize("change", ODD.values(), ids=ODD)


@odd_forms
@both
def test_who_sends_another_form_than_most_leaves_no_trace(runtime, change):
    """Neither its message counts nor its metrics, and it keeps what it had."""
    odd = Odd(inner=make_strategy("scaffold"), change=change, bad={1, 4})
    dropped = trace(make_simulation(odd, runtime=runtime, failures=DROP), rounds=2)
    causes = left_no_trace(dropped, without("scaffold"), 1, 4)
    usual = "buffers float32 (6,), delta float32 (183,), delta_c float32 (183,)"
    assert all(
        cause.startswith("sent ") and cause.endswith(f", and most clients sent {usual}") for cause in causes
    )


@odd_forms
@both
def test_who_sends_another_form_is_named_where_nobody_is_dropped(runtime, change):
    """Of several the lowest, whoever was first; and the round can be run again."""
    odd = Odd(inner=make_strategy("scaffold"), change=change, bad={4, 2})
    simulation = make_simulation(odd, runtime=runtime)
    before = state(simulation)
    with pytest.raises(ClientError, match=r"^round 1, client 2: sent .*, and most clients sent buffers float32"):
        simulation.round()
    assert state(simulation) == before
    odd.bad.clear()
    assert trace(simulation, rounds=1) == trace(make_simulation("scaffold"), rounds=1)


@pytest.mark.parametrize(("bad", "odd"), [({3, 4, 5}, {3, 4, 5}), ({0, 1, 2}, {3, 4, 5}), ({0, 4, 5}, {1, 2, 3})])
@runtimes
def test_of_two_forms_as_frequent_that_of_the_lowest_client_counts(runtime, bad, odd):
    strategy = Odd(inner=make_strategy("fedavg"), change=ODD["one more"], bad=bad)
    done = make_simulation(strategy, runtime=runtime, failures=DROP).round()
    others = {"name": "fixed", "clients": sorted(set(range(6)) - odd)}
    assert done.failed.keys() == {str(client) for client in odd}
    assert done.fingerprint == make_simulation("fedavg", cohort=others).round().fingerprint


class Scattered(Runtime):
    """A runtime in which clients finish in any order, on any number of workers, and merge in any grouping."""

    def __init__(self, simulation, seed):
        self.inner, self.home, self.random = simulation.runtime, simulation.runtime.home, random.Random(seed)

    def run(self, work, server, jobs, aggregator):
        jobs, folds = list(jobs), []
        self.random.shuffle(jobs)
        for job in jobs:
            if not folds or self.random.random() < 0.5:
                folds.append(Fold(aggregator))
            fold = self.random.choice(folds)
            yield aggregator.fold([]), [fold.add(job, self.inner.worker.run(work, server, job), 0.0)]
        for fold in self.random.sample(folds, len(folds)):
            yield fold.partial, []

    def map(self, work, server, items):
        return self.inner.map(work, server, items)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.integers(0, 5), st.sampled_from(["shorter", "doubles", "one more"]), max_size=5),
    st.integers(0, 2**32),
)
def test_arrival_order_and_grouping_do_not_show_in_who_is_odd(forms, seed):
    """With several forms in one round, ties too."""

    @dataclass(frozen=True, kw_only=True)
    class Several(Wrapper):
        def client_update(self, server, client, local):
            update = super().client_update(server, client, local)
            return ODD[forms[local.client_id]](update) if local.client_id in forms else update

        def server_update(self, server, mean, info):
            fits = (mean["delta"].shape, mean["delta"].dtype) == (server["model"].shape, server["model"].dtype)
            return super().server_update(server, mean, info) if fits else {}

    def done(scattered):
        simulation = make_simulation(Several(inner=make_strategy("scaffold")), failures=DROP)
        if scattered:
            simulation.runtime = Scattered(simulation, seed)
        return trace(simulation, rounds=1)

    assert done(True) == done(False)


@runtimes
def test_odd_clients_are_none_that_answered(runtime):
    """So they count towards no floor; and which ones they were is said."""
    odd = Odd(inner=make_strategy("fedavg"), change=ODD["shorter"], bad={1, 4})
    for floor in (4, 5):
        simulation = make_simulation(odd, runtime=runtime, failures=Failures(policy="drop", min_clients=floor))
        if floor == 4:
            assert set(simulation.round().failed) == {"1", "4"}
            continue
        with pytest.raises(RoundError, match=r"4 of 6 clients are left.*; client 1: sent .*; client 4: sent "):
            simulation.round()


# What a client keeps


def keeps(change):
    return lambda update: update._replace(client=change(update.client))


KEPT = {
    "nan": (keeps(lambda c: {"c": c["c"] * float("nan")}), "its state has c, which is not finite"),
    "inf": (keeps(lambda c: {"c": torch.full_like(c["c"], float("inf"))}), "its state has c, which is not finite"),
    "one nan": (keeps(lambda c: {"c": c["c"].index_fill(0, torch.tensor(7), float("nan"))}), "is not finite"),
    "shorter": (keeps(lambda c: {"c": c["c"][1:]}), "its state is c float32 (182,), and was c float32 (183,)"),
    "doubles": (
        keeps(lambda c: {"c": c["c"].double()}),
        "its state is c float64 (183,), and was c float32 (183,)",
    ),
    "renamed": (keeps(lambda c: {"C": c["c"]}), "its state is C float32 (183,), and was c float32 (183,)"),
    "one more": (
        keeps(lambda c: c | {"d": c["c"][:1]}),
        "its state is c float32 (183,), d float32 (1,), and was c",
    ),
    "nothing": (keeps(lambda c: {}), "its state is nothing, and was c float32 (183,)"),
    "no tensor": (keeps(lambda c: {"c": 1.0}), "Odd.client_update: gave float as 'c' in its client state"),
    "no state": (keeps(lambda c: None), "Odd.client_update: gave NoneType as its client state"),
}


@pytest.mark.parametrize(("change", "said"), KEPT.values(), ids=KEPT)
@both
def test_who_keeps_what_it_cannot_go_on_from_is_dropped_or_named(runtime, change, said):
    odd = Odd(inner=make_strategy("scaffold"), change=change, bad={1, 4})
    dropped = trace(make_simulation(odd, runtime=runtime, failures=DROP), rounds=2)
    causes = left_no_trace(dropped, without("scaffold"), 1, 4)
    assert all(said in cause for cause in causes)
    with pytest.raises(ClientError, match=r"^round 1, client [14]: ") as caught:
        make_simulation(odd, runtime=runtime).round()
    assert said in str(caught.value)


@pytest.mark.parametrize("change", [ODD["doubles"], KEPT["nan"][0]], ids=["odd", "nan"])
@both
def test_who_fails_later_keeps_what_it_had(runtime, change):
    odd = Odd(inner=make_strategy("scaffold"), change=change)
    simulation = make_simulation(odd, runtime=runtime, failures=DROP)
    simulation.round()
    before = dict(simulation.clients)
    odd.bad.add(3)
    simulation.round()
    assert {client for client, kept in simulation.clients.items() if kept is before[client]} == {3}
    odd.bad.clear()
    assert simulation.round().failed == {}


# Time


class Clock:
    """Each thread's own time, which passes only while its client sleeps: no test waits, or fails for a wait."""

    def __init__(self):
        self.local = threading.local()

    def __call__(self):
        return getattr(self.local, "now", 0.0)

    def sleep(self, seconds):
        self.local.now = self() + seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("fedsim.training.local.perf_counter", clock)
    return clock


@dataclass(frozen=True, kw_only=True)
class Dawdles(Strategy):
    """FedAvg in which some clients take their time, somewhere, and all of them 1 s."""

    sleep: Callable[[float], None]
    where: str = ""
    bad: set[int] = field(default_factory=set)
    steps: list[int] = field(default_factory=list)  # the client of each that was taken

    def client_update(self, server, client, local):
        slow = self.where if local.client_id in self.bad else ""
        self.sleep(1.0)

        def loss(w, batch):
            self.steps.append(local.client_id)
            if slow == "in its loss":
                self.sleep(6.0)
            return local.loss(w, batch)

        if slow == "between batches":
            for _ in local.batches():
                self.sleep(6.0)
        y = local.train(server["model"], loss=loss)
        if slow == "at its end":
            self.sleep(60.0)
        return Update({"delta": y - server["model"]}, weight=local.num_examples)

    def server_update(self, server, mean, info):
        return {"model": server["model"] + mean["delta"]}


LIMIT = Failures(policy="drop", time_limit=10)
TAKEN = {"in its loss": 2, "between batches": 0, "at its end": 8}  # steps of 8 until the limit is noticed


@pytest.mark.parametrize("where", TAKEN)
@runtimes
def test_who_is_over_its_time_limit_leaves_no_trace(runtime, where, clock):
    """It is stopped at its next batch; and one that finishes late is late."""
    slow = Dawdles(sleep=clock.sleep, where=where, bad={1, 4})
    dropped = trace(make_simulation(slow, runtime=runtime, failures=LIMIT, steps=8), rounds=2)
    usual = trace(make_simulation(Dawdles(sleep=clock.sleep), cohort=OTHERS, steps=8), rounds=2)
    assert set(left_no_trace(dropped, usual, 1, 4)) == {"was over its time limit of 10 s"}
    assert [slow.steps.count(client) for client in range(6)] == [
        2 * TAKEN[where] if k in (1, 4) else 16 for k in range(6)
    ]


@runtimes
def test_who_is_over_its_time_limit_is_named_where_nobody_is_dropped(runtime, clock):
    slow = Dawdles(sleep=clock.sleep, where="at its end", bad={4})
    with pytest.raises(ClientError, match=r"^round 1, client 4: was over its time limit of 10 s$"):
        make_simulation(slow, runtime=runtime, failures=Failures(time_limit=10)).round()


@runtimes
def test_a_time_limit_that_nobody_reaches_changes_nothing(runtime, clock):
    """Nor does time add up over clients, or over rounds."""
    patient = make_simulation(Dawdles(sleep=clock.sleep), runtime=runtime, failures=Failures(time_limit=1.5))
    assert trace(patient, rounds=2) == trace(make_simulation(Dawdles(sleep=clock.sleep)), rounds=2)


@pytest.mark.parametrize(
    ("name", "runtime"), sampled(in_turn(CATALOGUE, RUNTIMES[::3]), CATALOGUE, RUNTIMES[::3]), ids=str
)
def test_every_strategy_minds_the_time(name, runtime, monkeypatch):
    """Each asks before its batches, by `batches`, or `train`, or `gradient`."""
    asked = count()
    monkeypatch.setattr("fedsim.training.local.perf_counter", lambda: float(next(asked)))
    with pytest.raises(ClientError, match=r"was over its time limit of 0\.5 s"):
        make_simulation(name, runtime=runtime, failures=Failures(time_limit=0.5)).round()
    assert next(asked) <= 2 * 6 * 2  # two readings for each client that began, at most


def test_the_time_is_the_one_on_the_wall():
    slow = Dawdles(sleep=lambda seconds: sleep(seconds / 200), where="at its end", bad={2})
    threads, failures = {"name": "threads", "workers": 3}, Failures(policy="drop", time_limit=0.25)
    assert (
        make_simulation(slow, runtime=threads, failures=failures).round().failed["2"].endswith("limit of 0.25 s")
    )


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_a_time_limit_is_above_0(seconds):
    from fedsim.experiment.config import load

    config = {"rounds": 1, "data": {"name": "digits", "clients": 2}, "model": "2nn", "strategy": "fedavg"}
    with pytest.raises(ConfigError, match=r"^failures\.time_limit: .* should be a number > 0, or null$"):
        load(config | {"cohort": "all"}, {"failures.time_limit": seconds})


# What a failure leaves behind


@dataclass(frozen=True, kw_only=True)
class Raises(Wrapper):
    """Client 1 raises, and holds a large tensor when it does."""

    error: type[Exception] = KeyError

    def client_update(self, server, client, local):
        if local.client_id == 1:
            held = LARGE_ONE()
            LARGE.add(held)
            raise self.error("x")
        return super().client_update(server, client, local)


class LARGE_ONE:  # noqa: N801 - stands for what a client had in memory
    pass


LARGE = weakref.WeakSet()


@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 1}], ids=str)
def test_a_dropped_client_leaves_nothing_in_memory_while_others_train(runtime):
    """Its exception is let go of with the variables of the functions that it passed through."""
    alive, strategy = [], Raises(inner=make_strategy("fedavg"))
    simulation = make_simulation(strategy, runtime=runtime, failures=DROP)
    gc.collect()
    gc.disable()
    try:
        done = simulation.round(after_client=lambda report: alive.append((report.error is None, len(LARGE))))
        left = len(LARGE)
    finally:
        gc.enable()
    assert done.failed.keys() == {"1"}
    assert left == 0
    if runtime == "serial":
        assert [count for answered, count in alive if answered] == [0] * (len(SIZES) - 1)


@pytest.mark.parametrize("runtime", ["serial", "threads"])
@pytest.mark.parametrize("error", [RoundError, ConfigError])
def test_an_error_of_fedsim_in_client_code_is_the_clients_failure(runtime, error):
    strategy = Raises(inner=make_strategy("fedavg"), error=error)
    done = make_simulation(strategy, runtime=runtime, failures=DROP).round()
    assert done.failed.keys() == {"1"}
    with pytest.raises(ClientError, match=r"^round 1, client 1: "):
        make_simulation(strategy, runtime=runtime).round()


def test_an_error_without_a_traceback_is_told_by_its_text():
    assert located(KeyError("x")) == "KeyError: 'x'"


def test_statistics_that_are_not_finite_fail_the_recalibration(monkeypatch):
    from fedsim.federated.recalibration import Recalibrate, Recalibration

    call = Recalibration.__call__

    def spoiled(self, *given):
        update = call(self, *given)
        return update._replace(message={"buffers": update.message["buffers"] * float("nan")})

    monkeypatch.setattr(Recalibration, "__call__", spoiled)
    strategy = make_strategy("fedavg", buffers="recalibrated")
    simulation = make_simulation(strategy, recalibrate=Recalibrate(source="clients", examples=8, batch_size=4))
    with pytest.raises(RoundError, match=r"^round 1: recalibrate: buffers is not finite"):
        simulation.round()


@dataclass(frozen=True, kw_only=True)
class Rebinds(Wrapper):
    """Each client changes the dictionary that it is given, and not a tensor."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        server["model"] = server["model"] * 0.5
        server["mine"] = server["model"]
        return update


@runtimes
def test_a_client_that_changes_its_dictionary_changes_nothing_for_others(runtime):
    changing = Rebinds(inner=make_strategy("fedavg"))
    assert trace(make_simulation(changing, runtime=runtime)) == trace(make_simulation("fedavg"))


@dataclass(frozen=True, kw_only=True)
class Leaves(Wrapper):
    """server_update calls sys.exit, or returns nothing."""

    exits: bool = True

    def server_update(self, server, mean, info):
        if self.exits:
            raise SystemExit(0)


@pytest.mark.parametrize(("exits", "why"), [(True, "server_update: SystemExit: 0"), (False, "gave NoneType")])
def test_a_server_update_that_leaves_or_gives_nothing_fails_the_round(exits, why):
    with pytest.raises(RoundError, match=why):
        make_simulation(Leaves(inner=make_strategy("fedavg"), exits=exits)).round()
