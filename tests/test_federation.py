"""What the server knows of its clients, and cohorts and strategies that use it."""

import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import SIZES, make_data, make_simulation, make_strategy, make_task, trace
from lab import CONFIG as LAB
from lab import Lab, played
from safetensors.torch import load_file, save
from small_run import CONFIG, state
from test_survey import Selects

import fedsim
from fedsim import CHANGE, ConfigError, Entry, Federation, RoundError, Update, Wrapper
from fedsim.base.files import write
from fedsim.experiment.build import build
from fedsim.experiment.checkpoint import _signed, read_checkpoint
from fedsim.experiment.config import load
from fedsim.experiment.execute import execute
from fedsim.experiment.start import resumed_run
from fedsim.federated.availability import Availability
from fedsim.federated.cohort import COHORTS
from fedsim.federated.federation import SAVED, Past
from fedsim.federated.simulation import Failures
from fedsim.strategies.averaging.fedavg import FedAvg

N = len(SIZES)
RUNTIMES = ["serial", *({"name": "threads", "workers": workers} for workers in (1, 3))]
UNKNOWN = Past.none(N)


def drawn(name, rounds=4000, past=UNKNOWN, sizes=SIZES, **options):
    """The cohorts of so many rounds."""
    choose, federation = COHORTS.bind({"name": name} | options), Federation.of(np.array(sizes), past)
    return [choose(len(sizes), np.random.default_rng(i), federation=federation) for i in range(rounds)]


def by_staleness(num_clients, stream, federation):
    """The two clients that trained longest ago; a cohort of a user's own."""
    return sorted(np.argsort(federation.last_round, kind="stable")[:2].tolist())


# What is known


def test_the_past_is_what_the_last_training_of_each_client_reported():
    simulation, seen = make_simulation(cohort={"name": "uniform", "size": 3}), {}
    for number in range(4):
        reports = []
        simulation.round(reports.append)
        seen |= {r.client_id: (number, r.metrics["loss"] / r.metrics["examples"]) for r in reports}
    federation = simulation.federation
    for client in range(N):
        last_round, loss = seen.get(client, (-1, np.nan))
        assert federation.last_round[client] == last_round
        assert federation.last_loss[client] == pytest.approx(loss, nan_ok=True, abs=0)
    assert np.isnan(federation.seconds).all()


def test_who_fails_or_is_absent_has_not_trained():
    simulation = make_simulation(lr=0.05)
    simulation.availability = Availability(drop=[1.0, *[0.0] * (N - 1)], step_seconds=0.5, deadline=1.5)
    done = simulation.round()
    assert set(done.absent) == {"0", "3"}  # client 3 takes four steps
    federation = simulation.federation
    assert [*federation.last_round] == [-1, 0, 0, -1, 0, 0]
    assert federation.seconds[[1, 2, 4, 5]].tolist() == [1.0, 1.0, 0.5, 1.0]
    assert np.isnan(federation.seconds[[0, 3]]).all()


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_cohorts_that_see_the_past_are_the_same_in_every_runtime(runtime):
    cohort = {"name": "largest_loss", "candidates": 4, "size": 2}
    settings = {"cohort": cohort, "momentum": 0.5}
    expected = trace(make_simulation("scaffold", **settings | {"momentum": 0.0}))
    found = trace(make_simulation("scaffold", runtime=runtime, **settings | {"momentum": 0.0}))
    assert found == expected


def test_the_past_survives_a_stop(tmp_path):
    cohort = {"name": "largest_loss", "candidates": 4, "size": 2}
    config = CONFIG | {"cohort": cohort, "evaluate": {"every": 5}, "hooks": [], "availability": {"jitter": 0.5}}
    fedsim.run(config, out=tmp_path / "whole")
    fedsim.run(config | {"rounds": 2}, out=tmp_path / "stopped")
    execute(*resumed_run(tmp_path / "stopped", {"rounds": 4}))
    whole, stopped = state(tmp_path / "whole"), state(tmp_path / "stopped")
    assert stopped == whole
    assert any(name.endswith("past.seconds") for name in whole)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run after two of its rounds."""
    folder = tmp_path_factory.mktemp("run") / "run"
    fedsim.run(CONFIG | {"rounds": 2, "evaluate": {"every": 5}, "hooks": [], "strategy": "fedavg"}, out=folder)
    return folder


def rewritten(run, change):
    """The newest checkpoint, whose server's state is another."""
    path = max((run / "checkpoints").glob("*.json"))
    checkpoint = read_checkpoint(path)
    file = run / "checkpoints" / checkpoint.server.name
    server = load_file(file)
    file.unlink()
    made = write(file, save(change(server)))
    path.write_bytes(_signed(checkpoint.model_copy(update={"server": made})))


def test_of_a_checkpoint_without_a_past_nothing_is_known(stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    rewritten(run, lambda server: {name: value for name, value in server.items() if name not in SAVED})
    assert len(execute(*resumed_run(run, {"rounds": 3})).rounds) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"past.clients": s["past.clients"] - 100},
        lambda s: {"past.clients": s["past.clients"] + 100},
        lambda s: {"past.last_loss": s["past.last_loss"][:-1]},
    ],
)
def test_a_crafted_past_is_refused_in_a_line(stopped, tmp_path, change):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    rewritten(run, lambda server: server | change(server))
    with pytest.raises(ConfigError, match="what it knows of the clients' last rounds cannot be read"):
        resumed_run(run, {"rounds": 3})


def test_a_users_cohort_sees_the_past_and_cannot_change_it():
    simulation = make_simulation()
    simulation.cohort = by_staleness
    assert [simulation.round().cohort for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]

    def writes(num_clients, stream, federation):
        federation.last_round[:] = 3
        return [0]

    simulation.cohort = writes
    with pytest.raises(RoundError, match=r"test_federation:.*writes: ValueError: .* read-only"):
        simulation.round()


# Strategies that know the clients


@dataclass(frozen=True, kw_only=True)
class Shares(FedAvg):
    """A server that keeps p_k of all clients, and counts those that had trained before the last round."""

    def init_server(self, model, federation):
        return {"model": model, "p": model.new_tensor(federation.shares), "seen": model.new_zeros(())}

    def server_update(self, server, mean, info):
        seen = server["seen"].new_tensor((info.federation.last_round >= 0).sum())
        return super().server_update(server, mean, info) | {"seen": seen}


class Passes(Wrapper):
    """Whose `init_server` is of the time before federations."""

    def init_server(self, model):
        return super().init_server(model)


def test_the_servers_half_knows_the_clients():
    simulation = make_simulation(Wrapper(inner=Shares()), cohort={"name": "fixed", "clients": [1, 4]})
    assert simulation.server["p"].tolist() == pytest.approx([n / sum(SIZES) for n in SIZES])
    for seen in (0, 2):
        simulation.round()
        assert simulation.server["seen"] == seen


def test_a_wrapper_that_does_not_pass_the_federation_on_is_named():
    assert make_simulation(Passes(inner=FedAvg())).round()
    with pytest.raises(ConfigError, match=r"Shares\.init_server needs federation"):
        make_simulation(Passes(inner=Shares()))


def test_before_nodes_have_joined_shares_are_refused_in_a_line(tmp_path, monkeypatch):
    lab = Lab(tmp_path, monkeypatch)
    try:
        for settings in ({"cohort": {"name": "by_examples", "size": 2}}, {"strategy": f"{__name__}:Shares"}):
            with pytest.raises(ConfigError, match=r"^federation\.shares: a node tells how many examples it has"):
                lab.simulation(load(LAB | settings))
        simulation = lab.simulation(load(LAB | {"strategy": "afl", "rounds": 1}))
        simulation.round()
        assert [*simulation.federation.sizes] == [len(node.dataset.y_train) for node in lab.nodes.values()]
    finally:
        lab.close()


# Who else is asked


@dataclass(frozen=True, kw_only=True)
class Hears(FedAvg):
    """FedAvg of two clients of the cohort; each tells in the survey, and in its training, who was asked."""

    def init_server(self, model):
        return {"model": model, "survey": model.new_zeros(()), "training": model.new_zeros(())}

    def survey(self, server, client, local):
        return Update({"asked": (10**local.cohort).sum().to(server["model"].dtype)}, weight=1.0)

    def surveyed(self, server, mean, info):
        return {"survey": mean["asked"]}

    def select(self, server, mean, info):
        return info.cohort[:2]

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(message=update.message | {"asked": (10**local.cohort).sum() + 0.0 * local.lr})

    def server_update(self, server, mean, info):
        return super().server_update(server, mean, info) | {"training": mean["asked"]}


@pytest.mark.parametrize("runtime", [*RUNTIMES, "vectorized"])
def test_clients_hear_who_is_asked_to_answer_and_who_to_train(runtime):
    cohort = {"name": "fixed", "clients": [1, 2, 4, 5]}
    simulation = make_simulation(Hears(), cohort=cohort, runtime=runtime)
    simulation.round()
    assert (int(simulation.server["survey"]), int(simulation.server["training"])) == (110110, 110)


# Cohorts


def test_one_client_by_examples_is_drawn_with_its_share():
    counts = np.bincount(np.concatenate(drawn("by_examples", 20_000, size=1)), minlength=N) / 20_000
    assert counts == pytest.approx(np.array(SIZES) / sum(SIZES), abs=0.012)  # 3.5 standard deviations


def test_two_by_examples_are_drawn_one_after_the_other():
    """The second with p_k / (1 - p_i)."""
    p = np.array(SIZES) / sum(SIZES)
    both = p + sum(p[i] * p / (1 - p[i]) * (np.arange(N) != i) for i in range(N))
    counts = np.bincount(np.concatenate(drawn("by_examples", 20_000, size=2)), minlength=N) / 20_000
    assert counts == pytest.approx(both, abs=0.013)


def test_the_largest_losses_of_the_candidates_are_chosen_the_unknown_ones_first():
    losses = np.array([1.0, 5.0, 3.0, np.nan, 2.0, 4.0])
    past = Past(np.where(np.isnan(losses), -1, 0), losses, losses)
    assert drawn("largest_loss", 1, past, candidates=N, size=3) == [[1, 3, 5]]
    rank = np.argsort(np.argsort(-np.nan_to_num(losses, nan=np.inf)))
    some = drawn("largest_loss", 200, past, candidates=4, size=2)
    candidates = drawn("by_examples", 200, past, size=4)
    assert some == [sorted(sorted(each, key=lambda k: rank[k])[:2]) for each in candidates]
    everyone = drawn("largest_loss", 200, UNKNOWN, candidates=N, size=2)
    assert len({tuple(each) for each in everyone}) > 5  # of equal ones not always the same


def test_poisson_draws_each_client_alone():
    choose = COHORTS.bind({"name": "poisson", "rate": 0.3})
    found = [set(choose(N, np.random.default_rng(i))) for i in range(5000)]
    assert sum(map(len, found)) / 5000 / N == pytest.approx(0.3, abs=0.01)
    assert sum({0, 1} <= each for each in found) / 5000 == pytest.approx(0.09, abs=0.015)
    assert sum(not each for each in found) / 5000 == pytest.approx(0.7**N, abs=0.02)


@pytest.mark.parametrize(
    ("cohort", "said"),
    [
        ({"name": "by_examples", "size": 7}, "cohort.size: 7 is more than the 6 clients that train"),
        (
            {"name": "largest_loss", "candidates": 7, "size": 2},
            "cohort.candidates: 7 is more than the 6 clients that train",
        ),
        ({"name": "largest_loss", "candidates": 2, "size": 3}, "cohort.size: 3 is more than cohort.candidates: 2"),
    ],
)
def test_cohorts_that_cannot_be_drawn_are_refused(cohort, said):
    with pytest.raises(ConfigError, match=said):
        make_simulation(cohort=cohort)


# Rounds without clients

NONE_NEEDED = Failures(min_clients=0)


def rarely(num_clients, stream):
    """Nobody in the first and third round of seed 0, and two clients in the others; a cohort of a user's own."""
    return [] if stream.random() < 0.65 else [1, 2]


def alone(strategy, **settings):
    """A simulation whose rounds have no clients, as all drop out."""
    simulation = make_simulation(strategy, failures=NONE_NEEDED, **settings)
    simulation.availability = Availability(drop=1.0)
    return simulation


@pytest.mark.parametrize("runtime", [*RUNTIMES, "vectorized"])
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fednova", "fedsgd", "fedbn", "personal"])
def test_a_round_without_clients_moves_nothing(name, runtime):
    simulation = make_simulation(
        make_strategy(name), runtime=runtime, failures=NONE_NEEDED, cohort={"name": "poisson", "rate": 1e-9}
    )
    before = simulation.fingerprint()
    done = simulation.round()
    assert (done.cohort, done.train_loss, done.steps, done.bytes_up, done.bytes_down) == ([], None, 0, 0, 0)
    assert done.fingerprint == before == simulation.fingerprint()
    assert simulation.number == 1


def test_without_clients_a_server_goes_on_with_its_momentum():
    simulation = make_simulation(make_strategy("fedavgm", beta=0.5), failures=NONE_NEEDED)
    x = simulation.server["model"].clone()
    simulation.round()
    first = simulation.server["model"] - x
    simulation.availability = Availability(drop=1.0)
    simulation.round()
    assert torch.allclose(simulation.server["model"] - x, 1.5 * first, rtol=1e-4, atol=1e-7)


def test_the_servers_half_is_told_that_nobody_answered():
    @dataclass(frozen=True, kw_only=True)
    class Told(FedAvg):
        def server_update(self, server, mean, info):
            assert info.cohort == []
            assert info.weights.shape == (0,)
            assert (info.cohort_examples, info.participation) == (0, 0)
            assert not mean["delta"].any()
            return super().server_update(server, mean, info)

    alone(Told()).round()


def test_where_all_fail_the_mean_is_zero_too():
    failures = Failures(policy="drop", min_clients=0, time_limit=1e-9)
    simulation = make_simulation("fedavg", failures=failures)
    before = simulation.fingerprint()
    done = simulation.round()
    assert len(done.failed) == N
    assert done.fingerprint == before


def test_empty_rounds_are_logged_and_survive_a_stop(tmp_path):
    config = CONFIG | {"cohort": {"name": "poisson", "rate": 0.15}, "failures": {"min_clients": 0}, "rounds": 6}
    whole = fedsim.run(config, out=tmp_path / "whole").rounds
    assert {bool(record["cohort"]) for record in whole} == {True, False}
    fedsim.run(config | {"rounds": 2}, out=tmp_path / "stopped")
    execute(*resumed_run(tmp_path / "stopped", {"rounds": 6}))
    assert state(tmp_path / "stopped") == state(tmp_path / "whole")


def test_rounds_without_clients_are_the_same_on_nodes(tmp_path, monkeypatch):
    cohort = {"name": "poisson", "rate": 0.3}
    config = load(LAB | {"strategy": "scaffold", "cohort": cohort, "failures": {"min_clients": 0}})
    lab = Lab(tmp_path, monkeypatch)
    try:
        found = played(lab.simulation(config), 6)
    finally:
        lab.close()
    assert found == played(build(config), 6)
    assert {bool(record["cohort"]) for record in found} == {True, False}


@dataclass(frozen=True, kw_only=True)
class Undeclared(FedAvg):
    """Whose messages are not declared."""

    def client_update(self, server, client, local):
        return super().client_update(server, client, local)


@pytest.mark.parametrize(
    ("strategy", "settings", "said"),
    [
        ("fedavg", {}, r"^failures\.min_clients: 1, and a cohort may have no clients; set it to 0"),
        ("qfedavg", {"failures": NONE_NEEDED}, r"^strategy: QFedAvg needs 1, and a cohort may have no clients"),
        ("fedlin", {"failures": NONE_NEEDED}, r"^strategy: FedLin needs 1, and a cohort may have no clients"),
        ("median", {"failures": NONE_NEEDED}, r"^strategy: Median needs 1, and a cohort may have no clients"),
        (Undeclared(), {"failures": NONE_NEEDED}, r"^strategy: Undeclared does not declare what its clients send"),
        (Selects(), {"failures": NONE_NEEDED}, r"^failures\.min_clients: Selects needs a survey"),
    ],
)
def test_who_cannot_have_a_round_without_clients_is_refused_at_the_start(strategy, settings, said):
    with pytest.raises(ConfigError, match=said):
        make_simulation(strategy, cohort={"name": "poisson", "rate": 0.5}, **settings)


def test_a_users_cohort_may_be_empty_where_that_is_allowed():
    simulation = make_simulation(failures=NONE_NEEDED)
    simulation.cohort = rarely
    cohorts = [simulation.round().cohort for _ in range(8)]
    assert {len(cohort) for cohort in cohorts} == {0, 2}
    simulation = make_simulation()
    simulation.cohort = lambda num_clients, stream: []
    with pytest.raises(RoundError, match=r"gave \[\]; it must return a list of one or more ids from 0 to 5"):
        simulation.round()


# Power-of-choice


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_power_of_choice_of_all_candidates_is_fedavg_with_equal_weights(runtime):
    cohort = {"name": "by_examples", "size": 3}
    chosen = make_simulation(make_strategy("power_of_choice", size=3), cohort=cohort, runtime=runtime)
    plain = make_simulation(make_strategy("fedavg", weights="uniform"), cohort=cohort, runtime=runtime)
    for _ in range(3):
        ours, theirs = chosen.round(), plain.round()
        assert (ours.fingerprint, ours.train_loss, ours.cohort) == (
            theirs.fingerprint,
            theirs.train_loss,
            theirs.cohort,
        )


def test_power_of_choice_trains_those_with_the_largest_loss():
    task, data = make_task(dtype=torch.float64), make_data(dtype=torch.float64)
    simulation = make_simulation(make_strategy("power_of_choice", size=2), task=task, data=data)
    for _ in range(3):
        losses = {}
        for k in range(N):
            x, y = data.batch(torch.from_numpy(data.rows(k)))
            w = task.layout.split(simulation.server["model"])
            w |= task.buffer_layout.split(simulation.server["buffers"])
            with torch.no_grad():
                output = torch.func.functional_call(task.network.eval(), w, x)
            losses[k] = torch.nn.functional.cross_entropy(output, y).item()
        best = sorted(losses, key=losses.get)[-2:]
        done = simulation.round()
        assert {*map(str, range(N))} - done.absent.keys() == {*map(str, best)}


def test_of_fewer_candidates_all_train():
    simulation = make_simulation(make_strategy("power_of_choice", size=3), cohort={"name": "uniform", "size": 2})
    assert simulation.round().absent == {}


def test_zeros_are_not_taken_for_right_in_a_server_half_of_ones_own():
    """One that divides by what clients sent, say."""

    @dataclass(frozen=True, kw_only=True)
    class Divides(FedAvg):
        def server_update(self, server, mean, info):
            return {"model": server["model"] + mean["delta"] / mean["delta"].norm()}

    assert Divides.min_clients == 1
    with pytest.raises(ConfigError, match="Divides needs 1"):
        make_simulation(Divides(), cohort={"name": "poisson", "rate": 0.1}, failures=Failures(min_clients=0))


def test_clients_that_tell_no_loss_are_not_chosen_by_it():
    @dataclass(frozen=True, kw_only=True)
    class Silent(Wrapper):
        def outgoing(self, server, client, update, local):
            return update._replace(metrics={})

    cohort = {"name": "largest_loss", "candidates": 4, "size": 2}
    simulation = make_simulation(Silent(inner=FedAvg()), cohort=cohort)
    simulation.round()
    with pytest.raises(RoundError, match=r"largest_loss goes by the losses of trainings; client \d has trained"):
        simulation.round()


def test_who_drops_out_was_asked():
    """As pairs of clients with common masks must know."""

    @dataclass(frozen=True, kw_only=True)
    class Asked(FedAvg):
        sends = {"delta": CHANGE, "asked": Entry(shape=(len(SIZES),))}

        def init_server(self, model):
            return {"model": model, "asked": model.new_zeros(len(SIZES))}

        def client_update(self, server, client, local):
            update = super().client_update(server, client, local)
            asked = torch.zeros_like(server["model"][: len(SIZES)]).index_fill(0, local.cohort, 1)
            return update._replace(message=update.message | {"asked": asked})

        def server_update(self, server, mean, info):
            return {"asked": mean["asked"]}

    for runtime in ("serial", "vectorized"):
        simulation = make_simulation(Asked(), runtime=runtime)
        simulation.availability = Availability(drop=0.5)
        done = simulation.round()
        assert done.absent
        assert simulation.server["asked"].nonzero().flatten().tolist() == done.cohort


def test_a_declared_form_is_that_of_the_download():
    @dataclass(frozen=True, kw_only=True)
    class Half(FedAvg):
        broadcast = ("model", "own")
        like: str = "own"

        @property
        def sends(self):
            return {"delta": CHANGE, "sent": Entry(like=self.like)}

        def init_server(self, model):
            return {"model": model, "own": torch.stack([model, model])}

        def download(self, server, client_id):
            return {"model": server["model"], "own": server["own"][client_id % 2]}

        def client_update(self, server, client, local):
            update = super().client_update(server, client, local)
            return update._replace(message=update.message | {"sent": server["own"]})

        def server_update(self, server, mean, info):
            assert mean["sent"].shape == server["model"].shape
            return {"model": server["model"] + mean["delta"]}

    make_simulation(Half()).round()
    with pytest.raises(ConfigError, match=r"Half\.sends: 'sent' is like 'c', which clients do not download"):
        make_simulation(Half(like="c"))
