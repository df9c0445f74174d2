"""A strategy's own numbers: what clients give, what the server records, and the reason for which it ends a run."""

import json
import os
from contextlib import closing, suppress
from dataclasses import dataclass
from math import fsum, inf, nan
from pathlib import Path

import pytest
import torch
from conftest import _digests, close, make_data, make_simulation, trace, trace_on_ray
from forks import snapshots
from lab import CONFIG as LAB
from lab import Lab
from small_run import CONFIG, contents, left, rounds_logged
from test_vectorized import pair

import fedsim
from fedsim import ClientError, ConfigError, RoundError, RoundInfo, Update, Wrapper
from fedsim.experiment.build import build
from fedsim.experiment.check import check_run
from fedsim.experiment.config import load
from fedsim.experiment.execute import execute
from fedsim.experiment.round_log import read_rounds
from fedsim.experiment.start import resumed_run
from fedsim.federated.simulation import Failures
from fedsim.strategies.averaging.fedavg import FedAvg
from fedsim.types import Records

CANCEL = (1e16, 1.0, -1e16, 0.1, 1e-9, 0.3)  # whose sum depends on the order, if it is rounded at each step


@dataclass(frozen=True, kw_only=True)
class Own(FedAvg):
    """FedAvg with a number that is given as it is, for each client."""

    values: tuple[float, ...] = CANCEL

    metrics = ("own",)

    def client_update(self, server, client, local):
        return super().client_update(server, client, local)._replace(metrics={"own": self.values[local.client_id]})


@dataclass(frozen=True, kw_only=True)
class Told(FedAvg):
    """FedAvg that says how far its clients went, on average, and ends after round `last`."""

    last: int = 99

    metrics = ("norm", "clients")

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(metrics={"norm": update.message["delta"].norm(), "clients": 1})

    def server_update(self, server, mean, info):
        assert info.metrics["clients"] == len(info.cohort)
        info.record("norm", info.metrics["norm"] / len(info.cohort))
        info.record("spread", mean["delta"].std())
        if info.number + 1 >= self.last:
            info.stop(f"{self.last} rounds are enough")
        return super().server_update(server, mean, info)


@dataclass(frozen=True, kw_only=True)
class Everywhere(Told):
    """Each of its methods at the server records something; `server_update` runs where clients run."""

    metrics = ("norm", "clients")
    uses_public = True

    def survey(self, server, client, local):
        return Update({"loss": local.loss(server["model"])}, weight=1.0)

    def surveyed(self, server, mean, info):
        info.record("first_loss", mean["loss"])
        info.record("nothing_yet", len(info.metrics))
        return {}

    def select(self, server, mean, info):
        info.record("asked", len(info.cohort))
        return info.cohort[1:]

    def server_update(self, server, mean, info):
        info.record("public", info.public.loss(server["model"]))
        return super().server_update(server, mean, info)


TOLD = {"strategy": {"name": "test_metrics:Told", "last": 3}, "rounds": 6, "evaluate": {"every": 5}}


# Values


@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 3}])
def test_the_sum_over_clients_is_exact_in_any_order(runtime):
    simulation = make_simulation(Own(), runtime=runtime)
    assert simulation.round().metrics == {"own": fsum(CANCEL)}
    assert fsum(CANCEL) != sum(CANCEL)


def test_a_strategy_sees_the_sum_of_those_that_count():
    failures = Failures(policy="drop")
    simulation = make_simulation(Own(values=(1.0, 2.0, nan, 4.0, 8.0, 1e301)), failures=failures)
    done = simulation.round()
    assert {*done.failed} == {"2", "5"}
    assert done.metrics == {"own": 15.0}


def test_what_the_server_records_stands_in_the_place_of_a_sum():
    simulation = make_simulation(Told(), cohort={"name": "uniform", "size": 3})
    x = simulation.server["model"]
    done = simulation.round()
    assert [*done.metrics] == ["norm", "clients", "spread"]
    assert done.metrics["clients"] == 3
    step = float((simulation.server["model"] - x).norm())
    assert step <= done.metrics["norm"] < 10 * step
    assert done.stopped is None


@pytest.fixture(scope="module")
def expected():
    """All that a run shows of `Everywhere`, metrics included, round by round."""
    return trace(make_simulation(Everywhere(last=2)))


def test_each_method_at_the_server_records(expected):
    names = ["norm", "clients", "first_loss", "nothing_yet", "asked", "public", "spread"]
    assert [*map(str, expected[0]["metrics"])] == names
    numbers = expected[0]["metrics"]
    assert (numbers["clients"], numbers["nothing_yet"], numbers["asked"]) == (5, 0, 6)
    assert [record.get("stopped") for record in expected] == [None, *["2 rounds are enough"] * 2]


@pytest.mark.parametrize("workers", [1, 3])
def test_numbers_are_the_same_on_threads(expected, workers):
    assert trace(make_simulation(Everywhere(last=2), runtime={"name": "threads", "workers": workers})) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's, about its own processes
def test_numbers_are_the_same_on_ray(expected):
    assert trace_on_ray(Everywhere(last=2)) == expected


def test_numbers_agree_in_a_batch_of_clients():
    serial, vectorized = pair(Everywhere(last=2))
    for _ in range(2):
        one, other = serial.round(), vectorized.round()
        close(other.metrics, one.metrics)
        assert (other.stopped, [*other.metrics]) == (one.stopped, [*one.metrics])


def test_numbers_are_the_same_on_nodes(tmp_path, monkeypatch):
    """The last round's, too, which the strategy ends; a number of bf16 is sent as float64."""
    config = load(LAB | TOLD)

    def played(simulation):
        records = [simulation.round().record() for _ in range(3)]
        shown = ("metrics", "stopped", "train_loss", "fingerprint")
        return [{name: record.get(name) for name in shown} for record in records], _digests(simulation.server)

    with closing(Lab(tmp_path, monkeypatch, double=0.3).allowing("test_metrics:Told")) as here:
        found = played(here.simulation(config, wait=1e5, round_timeout=1e6))
    assert found == played(build(config))
    assert found[0][2]["stopped"] == "3 rounds are enough"


def test_numbers_without_a_training_are_kept():
    """Where nothing was minimised there are no losses and no steps."""

    @dataclass(frozen=True, kw_only=True)
    class Still(FedAvg):
        metrics = ("zero", "one")

        def client_update(self, server, client, local):
            delta = torch.zeros_like(server["model"])
            one = torch.ones(1, requires_grad=True).bfloat16()
            return Update({"delta": delta}, 1.0, metrics={"zero": delta.sum(), "one": one})

    done = make_simulation(Still()).round()
    assert (done.train_loss, done.steps, done.metrics) == (None, 0, {"zero": 0.0, "one": 6.0})


# What cannot be


@pytest.mark.parametrize(
    "metrics",
    [("a b",), ("loss",), ("a", "a"), "norm", ("",), (1,), ("n" * 65,), ("a\n",), None],
    ids=repr,
)
def test_names_that_cannot_be_are_refused_at_the_start(metrics):
    strategy = type("Named", (FedAvg,), {"metrics": metrics})()
    with pytest.raises(ConfigError, match=r"^strategy\.metrics: .* should be a tuple of different names"):
        make_simulation(strategy)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"client_update: gave the metrics \[\]; .*\.metrics declares \['own'\]$"),
        ({"own": 1.0, "more": 1.0}, r"gave the metrics \['own', 'more'\]; "),
        ([1.0], r"gave the metrics \[1.0\]; "),
        ({"own": torch.ones(2)}, "gave the metric own, which is not one number$"),
        ({"own": "1"}, "gave the metric own, which is not one number$"),
        ({"own": 1j}, "gave the metric own, which is not one number$"),
        ({"own": inf}, "own is not finite"),
        ({"own": torch.tensor(nan)}, "own is not finite"),
        ({"own": -1e301}, r"gave the own -1e\+301; it should be from -1e\+300 to 1e\+300$"),
    ],
    ids=str,
)
@pytest.mark.parametrize("runtime", ["serial", "vectorized"])
def test_a_client_whose_numbers_cannot_be_fails(runtime, given, message):
    @dataclass(frozen=True, kw_only=True)
    class Given(FedAvg):
        metrics = ("own",)

        def client_update(self, server, client, local):
            return super().client_update(server, client, local)._replace(metrics=given)

    serial = make_simulation(Given(), cohort={"name": "fixed", "clients": [3]})
    simulation = pair(Given(), cohort={"name": "fixed", "clients": [3]})[1] if runtime == "vectorized" else serial
    with pytest.raises(ClientError, match=rf"^round 1, client 3: .*{message}"):
        simulation.round()


def test_a_survey_has_none():
    @dataclass(frozen=True, kw_only=True)
    class Asks(Own):
        def survey(self, server, client, local):
            return Update({"loss": local.loss(server["model"])}, 1.0, metrics={"own": 1.0})

    with pytest.raises(ClientError, match=r"Asks\.survey: gave the metrics \['own'\]"):
        make_simulation(Asks()).round()


@pytest.mark.parametrize("where", ["surveyed", "select", "server_update"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda info: info.record("a b", 1.0), "recorded 'a b'; a name should be 1 to 64 letters"),
        (lambda info: info.record("steps", 1.0), "recorded 'steps'; a name should be"),
        (lambda info: info.record("a", nan), "recorded a as nan; it should be one finite number$"),
        (lambda info: info.record("a", torch.ones(2)), r"recorded a as tensor.*; it should be one finite"),
        (lambda info: info.record("a", "1"), "recorded a as '1'; it should be"),
        (lambda info: [info.record("a", 1.0) for _ in range(2)], "recorded a twice in a round"),
        (lambda info: info.stop(" "), "stopped the run for ' '; the reason should be text$"),
        (lambda info: info.stop(3), "stopped the run for 3; "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_recorded_ends_the_round(where, call, message):
    @dataclass(frozen=True, kw_only=True)
    class Records(Everywhere):
        def surveyed(self, server, mean, info):
            return self.said("surveyed", info) or {}

        def select(self, server, mean, info):
            return self.said("select", info) or info.cohort

        def server_update(self, server, mean, info):
            return self.said("server_update", info) or {}

        def said(self, method, info):
            if method == where:
                call(info)

    with pytest.raises(RoundError, match=rf"^round 1: (Records\.{where}: )?Records\.{where}: {message}"):
        make_simulation(Records()).round()


def test_a_number_recorded_in_a_round_that_failed_is_of_no_round():
    """The survey's records are those of the round that counts."""
    simulation = make_simulation(Everywhere())
    real = simulation.runtime.map
    simulation.runtime.map = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
    with suppress(KeyboardInterrupt):
        simulation.round()
    simulation.runtime.map = real
    assert simulation.round().metrics == make_simulation(Everywhere()).round().metrics


def test_a_round_info_made_by_hand_takes_records_and_needs_none():
    about = 0, [0], 1, torch.Generator(), 3, 6
    kept = Records()
    for info in (RoundInfo(*about), RoundInfo(*about, records=kept)):
        info.record("a", 1)
        info.stop("first\nreason")
        info.stop("second")
        assert info.metrics == {}
    assert kept == Records({"a": 1.0}, "first reason")
    with pytest.raises(TypeError, match="recorded 'a b'"):
        RoundInfo(*about).record("a b", 1)


# Around another strategy


@dataclass(frozen=True, kw_only=True)
class Clipped(Wrapper):
    """Any strategy, whose clients say whether they were above the threshold."""

    name: str = "clipped"

    @property
    def metrics(self):
        return (*self.inner.metrics, self.name)

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        clipped = update.message["delta"].norm() > 0.1
        return update._replace(metrics=update.metrics | {self.name: clipped})


def test_a_wrapper_adds_its_own_to_those_of_the_inner_strategy():
    plain, wrapped = make_simulation(Told()), make_simulation(Clipped(inner=Clipped(inner=Told(), name="inner")))
    one, other = plain.round(), wrapped.round()
    assert other.metrics == one.metrics | {"clipped": 6.0, "inner": 6.0}
    assert other.fingerprint == one.fingerprint


def test_a_wrapper_that_adds_none_passes_them_on():
    class Around(Wrapper):
        """Any strategy."""

    assert make_simulation(Around(inner=Told())).round().metrics == make_simulation(Told()).round().metrics


def test_two_wrappers_with_one_name_are_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"^strategy\.metrics: \('norm', 'clients', 'clipped', 'clipped'\)"):
        make_simulation(Clipped(inner=Clipped(inner=Told())))


# In a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that its strategy has ended."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    fedsim.run(CONFIG | TOLD, out=out)
    return out


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_a_strategy_ends_its_run_and_says_why(whole):
    """After a test of its last round."""
    records, summary = lines(whole), json.loads((whole / "summary.json").read_text())
    assert [record.get("stopped") for record in records] == [None, None, "3 rounds are enough"]
    assert [[*record["metrics"]] for record in records] == [["norm", "clients", "spread"]] * 3
    assert (summary["rounds"], summary["stopped"]) == (3, "3 rounds are enough")
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    found = check_run(whole)
    assert (found.verdict, found.state) == ("whole: 3 rounds, finished", "finished")


def test_a_run_without_such_numbers_has_no_such_fields(tmp_path):
    fedsim.run(CONFIG | {"strategy": "fedavg", "rounds": 1}, out=tmp_path / "run")
    assert lines(tmp_path / "run")[0].keys() & {"metrics", "stopped"} == set()


def test_tensorboard_has_the_numbers_under_their_names(whole):
    found = [(tag, step, value) for tag, step, value in left(whole)["events"] if "/" not in tag]
    assert found == [
        (name, record["round"], pytest.approx(value, rel=1e-6))
        for record in lines(whole)
        for name, value in record["metrics"].items()
    ]


def test_the_command_shows_numbers_and_reason(fedsim_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(json.dumps(CONFIG | TOLD))
    done = fedsim_("run", "c.yaml", "--out", "run")
    assert done.status == 0
    line = next(line for line in done.out.splitlines() if line.startswith("round 3/6"))
    assert f"norm {lines(Path('run'))[2]['metrics']['norm']:.4g}  clients 2  spread " in line
    assert "stopped: 3 rounds are enough\n" in done.out
    [compared] = json.loads(fedsim_("compare", "run", "--json").out)["runs"]
    assert compared["metrics"] == lines(Path("run"))[2]["metrics"]


@pytest.mark.parametrize("at", ["after_round", "before_evaluation"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_never_was(whole, tmp_path, number, at):
    """In the round that the strategy ends, too, before it has a line."""

    class Interrupt(fedsim.Hook):
        """Once."""

    def interrupt(self, run, record):
        if record["round"] == number:
            raise KeyboardInterrupt

    setattr(Interrupt, at, interrupt)
    settings = CONFIG | TOLD | {"evaluate": {"every": 1}}
    other = tmp_path / "whole"
    fedsim.run(settings, out=other)
    assert fedsim.run(settings, out=tmp_path / "run", hooks=[Interrupt()]).interrupted
    fedsim.resume(tmp_path / "run")
    assert left(tmp_path / "run") == left(other)


def test_killed_at_any_change_to_a_file_in_its_last_round_a_run_ends_in_that_round(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for owner, name in [
            (Path, "open"),
            *((os, each) for each in ("fsync", "replace", "rename", "unlink", "mkdir")),
        ]:
            patch.setattr(owner, name, getattr(owner, name))  # which `snapshots` changes for good
        snapshots(str(tmp_path / "run"), str(tmp_path / "moments"))
        fedsim.run(CONFIG | TOLD, out=tmp_path / "run")
    moments = [path for path in sorted((tmp_path / "moments").iterdir()) if rounds_logged(path) >= 2]
    assert {rounds_logged(path) for path in moments} == {2, 3}
    for moment in moments[::5]:
        fedsim.resume(moment)
        assert left(moment) == left(whole), moment


def test_only_another_strategy_makes_a_run_longer_that_its_strategy_has_ended(tmp_path):
    out = tmp_path / "run"
    fedsim.run(CONFIG | TOLD, out=out)
    before = left(out)
    assert fedsim.resume(out).summary["stopped"] == "3 rounds are enough"
    assert left(out) == before
    assert execute(*resumed_run(out, {"hooks": []})).summary["stopped"] == "3 rounds are enough"
    files = contents(out)
    with pytest.raises(ConfigError, match=r"^rounds: 9, and the strategy ended the run: 3 rounds are enough"):
        resumed_run(out, {"rounds": 9})
    assert contents(out) == files
    assert "other settings of the strategy" in check_run(out).next
    with pytest.raises(ConfigError, match=r"strategy\.last: 5, and was 3: this changes the result"):
        fedsim.resume(out, {"strategy.last": 5})
    longer = execute(*resumed_run(out, {"strategy.last": 5}, force=True)).summary
    assert (longer["rounds"], longer["stopped"]) == (5, "5 rounds are enough")


@pytest.mark.parametrize(
    "damage",
    [
        {"metrics": {"norm": "1"}},
        {"metrics": {"a b": 1.0}},
        {"metrics": {"norm": None}},
        {"metrics": {"norm": True}},
        {"metrics": [1.0]},
        {"metrics": None},
        {"stopped": 1},
    ],
    ids=str,
)
def test_lines_that_no_run_writes_are_refused(whole, damage):
    record = json.dumps(lines(whole)[0] | damage).encode() + b"\n"
    with pytest.raises(ValueError, match=f"line 1: {next(iter(damage))}"):
        list(read_rounds(record, 5))


def test_numbers_that_are_not_finite_are_none_of_a_run(whole):
    content = json.dumps(lines(whole)[0] | {"metrics": {"norm": 7.25}}).encode() + b"\n"
    assert next(read_rounds(content, 5))["metrics"] == {"norm": 7.25}
    for number in (b"1e999", b"NaN", b"-Infinity"):
        with pytest.raises(ValueError, match="line 1"):
            list(read_rounds(content.replace(b"7.25", number), 5))


def test_the_data_of_one_is_enough():
    """One client, one number."""
    simulation = make_simulation(Own(values=(0.25,)), data=make_data((7,)))
    assert simulation.round().metrics == {"own": 0.25}


def test_a_number_too_large_for_a_float_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Huge(FedAvg):
        metrics = ("m",)

        def client_update(self, server, client, local):
            return super().client_update(server, client, local)._replace(metrics={"m": 10**400})

    with pytest.raises(ClientError, match=r"Huge\.client_update: gave the metric m, which is not one number"):
        make_simulation(Huge()).round()
