"""Laws of failure: it names its client, drops it without a trace, or leaves everything as it was."""

import gc
import threading
from dataclasses import dataclass, field
from time import sleep

import pytest
import torch
from conftest import SIZES, make_simulation, make_strategy, trace

from fedsim import ClientError, RoundError, Strategy, Update, Wrapper
from fedsim.simulation import Failures
from fedsim.strategies import CATALOGUE

RUNTIMES = ["serial", *({"name": "threads", "workers": workers} for workers in (1, 2, 3))]
DROP = Failures(policy="drop")

runtimes = pytest.mark.parametrize(
    "runtime", RUNTIMES, ids=lambda s: s if s == "serial" else f"threads-{s['workers']}"
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


@pytest.mark.parametrize("name", list(CATALOGUE))
@runtimes
def test_who_is_dropped_leaves_no_trace(runtime, name):
    """The model is that of a cohort without them, and they keep what they had."""
    others = {"name": "fixed", "clients": [0, 2, 3, 5]}
    dropped = trace(make_simulation(faulty(1, 4, name=name), runtime=runtime, failures=DROP), rounds=2)
    without = trace(make_simulation(name, cohort=others), rounds=2)
    for a, b in zip(dropped, without, strict=True):
        assert all("no space left (test_failures.py:" in cause for cause in a["failed"].values())
        assert a.pop("failed").keys() == {"1", "4"}
        assert a.pop("cohort") == list(range(len(SIZES)))
        assert a.pop("bytes_down") == b["bytes_down"] * len(SIZES) / 4
        assert a == {key: b[key] for key in a}


@runtimes
def test_too_few_answers_fail_the_round(runtime):
    simulation = make_simulation(faulty(0, 1, 2), runtime=runtime, failures=Failures(policy="drop", min_clients=4))
    with pytest.raises(
        RoundError, match=r"round 1: 3 clients answered.*min_clients is 4; client 0: OSError: no space"
    ):
        simulation.round()
    enough = make_simulation(faulty(0, 1, 2), runtime=runtime, failures=Failures(policy="drop", min_clients=3))
    assert set(enough.round().failed) == {"0", "1", "2"}


@runtimes
def test_nobody_is_too_few(runtime):
    with pytest.raises(RoundError, match="0 clients answered"):
        make_simulation(faulty(*range(len(SIZES))), runtime=runtime, failures=DROP).round()


@runtimes
def test_a_loss_that_is_not_finite_is_named(runtime):
    with pytest.raises(ClientError, match=r"client \d: loss is not finite; lower local\.lr"):
        make_simulation(runtime=runtime, lr=1e30, steps=5).round()


@dataclass(frozen=True, kw_only=True)
class Sends(Wrapper):
    """Client 2 sends what it should not."""

    weight: float = 1.0
    value: float = 0.0

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        if local.client_id != 2:
            return update
        return update._replace(message={"delta": torch.full_like(server["model"], self.value)}, weight=self.weight)


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"value": float("nan")}, "delta is not finite"),
        ({"value": 1e30}, "delta is too large"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"weight": float("inf")}, "weight is inf"),
    ],
    ids=str,
)
@runtimes
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
class Huge(Strategy):
    """Each message can be summed, two of them cannot."""

    def client_update(self, server, client, local):
        return Update({"delta": torch.full_like(server["model"], 2.0**32.9)}, weight=1.0)

    def server_update(self, server, mean, info):
        return {}


@runtimes
def test_what_does_not_add_up_is_no_clients_failure(runtime):
    simulation = make_simulation(Huge(), runtime=runtime, failures=DROP)
    with pytest.raises(RoundError, match=r"^delta is too large: weights times values add up"):
        simulation.round()


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
        (InPlace, "'model' was written in place"),
        (Misspelt, "'modle', which init_server did not make; it made model"),
        (Forgetful, "keeps kept for the client, and init_client made nothing"),
    ],
)
def test_a_strategy_that_breaks_the_rules_is_told(runtime, wrong, said):
    with pytest.raises((ClientError, RoundError), match=said):
        make_simulation(wrong(inner=make_strategy("fedavg")), runtime=runtime).round()


def test_a_server_that_diverges_is_not_blamed_on_clients():
    with pytest.raises(RoundError, match="server_update gave a model that is not finite"):
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
    with pytest.raises(ClientError, match="'c' was written in place"):
        make_simulation(InPlaceAtHome(inner=make_strategy("scaffold")), runtime=runtime).round()
