"""The runtime that is chosen: it changes no result, asks nothing twice, and is the same after a stop."""

import hashlib
import json
import logging
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SIZES, conv_net, make_data, make_simulation, make_strategy, make_task, trace

import fedsim
from fedsim import Wrapper
from fedsim.base.catalogue import Catalogue
from fedsim.errors import ClientError, ConfigError
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.experiment.hook import Hook
from fedsim.federated.availability import Availability
from fedsim.federated.simulation import Failures
from fedsim.runtimes import RUNTIMES, auto
from fedsim.runtimes.auto import Auto, calibration, candidates, choices
from fedsim.runtimes.auto.calibration import Calibration
from fedsim.runtimes.auto.choices import Choice
from fedsim.runtimes.serial import Serial
from fedsim.runtimes.threads import Threads

AUTO = {"name": "auto", "exact": True}
SERIAL = RUNTIMES.resolve({"name": "serial", "device": "cpu"})
CONFIG = {
    "rounds": 4,
    "data": {"name": "synthetic", "examples": 60, "test_examples": 30, "classes": 3, "clients": 5},
    "model": {"name": "cnn_bn", "widths": [3, 4]},
    "strategy": "scaffold",
    "cohort": {"name": "uniform", "size": 4},
    "local": {"lr": 0.05, "batch_size": 4},
    "evaluate": {"every": 2},
    "runtime": {"name": "auto", "device": "cpu"},
    "hooks": [],
}


class Rounded(Serial):
    """Equal to serial to rounding only, as it says."""

    exact = False

    def __init__(self, task, data, /, *, chunk: int = 1, workers: int = 1, device: str = "auto"):
        super().__init__(task, data, device=device)

    def run(self, work, server, jobs, aggregator):
        near = {name: value * (1 + 1e-4) for name, value in server.items()}
        yield from super().run(work, near, jobs, aggregator)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing was chosen before, and the machine is idle; returns where choices are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "busy", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "cache/fedsim/runtime.json"


@pytest.fixture
def rounded(monkeypatch):
    """Has a runtime that is equal to rounding only in vectorized's place."""
    entries = {name: entry for name, entry in RUNTIMES.entries.items() if name != "vectorized"}
    monkeypatch.setattr(RUNTIMES, "entries", entries | {"vectorized": "vectorized:Rounded"})
    load_ = Catalogue.load
    monkeypatch.setattr(
        Catalogue, "load", lambda self, name, at="": Rounded if name == "vectorized" else load_(self, name, at)
    )


@pytest.fixture
def rates(monkeypatch):
    """Client steps a second by runtime, for what is in there is not measured, however busy the machine."""
    given = {"serial": 1.0, "threads": 0.5, "rounded": 0.5}
    monkeypatch.setattr(calibration, "TOTAL_SECONDS", 1e3)
    monkeypatch.setattr(Calibration, "reference", lambda self, runtime: given["serial"])
    monkeypatch.setattr(Calibration, "rate", lambda self, runtime, chunk=1: given[type(runtime).__name__.lower()])
    return given


@pytest.fixture
def untimed(monkeypatch):
    """Nothing may be timed."""

    def refuse(*args):
        raise AssertionError("timed")

    monkeypatch.setattr(Calibration, "__init__", refuse)


def make(runtime=AUTO, strategy="fedavg", **settings):
    return make_simulation(strategy, runtime=runtime, **settings)


# What is learned


@pytest.mark.parametrize(
    ("strategy", "recipe"),
    [
        ("fedavg", {"steps": 7}),
        ("scaffold", {"batch_size": "full"}),
        ("fedbn", {"epochs": 2}),
        ("fedsgd", {}),
    ],
    ids=str,
)
def test_it_gives_what_serial_gives(strategy, recipe):
    assert trace(make(AUTO, strategy, **recipe), rounds=2) == trace(make("serial", strategy, **recipe), rounds=2)


@pytest.mark.parametrize("looked_at", [2, 3, 6, 7])
@pytest.mark.parametrize("name", ["serial", "threads"])
def test_each_client_is_told_of_once_and_trained_once(monkeypatch, rates, looked_at, name):
    monkeypatch.setattr(candidates, "MAX_TIMED_CLIENTS", looked_at)
    rates[name] = 100.0
    before, after = [], []
    simulation = make(AUTO, "scaffold")
    simulation.round(lambda report: after.append(report.client_id), before.append)
    assert simulation.runtime.choice["name"] == name
    assert sorted(before) == sorted(after) == list(range(len(SIZES)))


def test_timing_leaves_no_trace():
    """Neither in what clients keep, nor in the server's state, nor in the numbers that others draw."""
    simulation, reference = make(AUTO, "scaffold"), make("serial", "scaffold")
    torch.manual_seed(1)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(1)
    assert trace(simulation, rounds=1) == trace(reference, rounds=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


@dataclass(frozen=True, kw_only=True)
class Fails(Wrapper):
    clients: tuple[int, ...] = (0, 4)

    def client_update(self, server, client, local):
        if local.client_id in self.clients:
            raise ArithmeticError("cannot")
        return super().client_update(server, client, local)


@pytest.mark.parametrize("clients", [(0,), (1, 4), (0, 1, 2, 3)])
def test_clients_that_fail_do_so_where_it_counts(clients):
    strategy, drop = Fails(inner=make_strategy("fedavg"), clients=clients), Failures(policy="drop")
    expected = trace(make("serial", strategy, failures=drop), rounds=2)
    assert trace(make(AUTO, strategy, failures=drop), rounds=2) == expected
    with pytest.raises(ClientError, match=r"round 1, client \d: cannot"):
        make(AUTO, strategy).round()


def test_warnings_in_clients_come_where_they_count():
    @dataclass(frozen=True, kw_only=True)
    class Warns(Wrapper):
        def client_update(self, server, client, local):
            import warnings

            warnings.warn("odd", stacklevel=1)
            return super().client_update(server, client, local)

    with pytest.warns(UserWarning, match="odd") as caught:
        make({"name": "auto", "exact": True}, Warns(inner=make_strategy("fedavg"))).round()
    assert len(caught) == len(SIZES)


@pytest.mark.parametrize(
    "settings",
    [
        {"cohort": {"name": "fixed", "clients": [2]}},
        {"cohort": {"name": "fixed", "clients": [2, 4]}},
        {"data": make_data([1, 1, 1, 1]), "task": make_task(lambda: conv_net(dropout=0))},
    ],
    ids=["one client", "two clients", "one example each"],
)
def test_it_stands_small_cohorts(settings):
    recipe = {"batch_size": 1, "strategy": "fedavg"} | settings
    with_, without = (make(runtime, **recipe) for runtime in (AUTO, "serial"))
    assert trace(with_, rounds=2) == trace(without, rounds=2)
    assert (with_.runtime.choice is None) == (len(with_.sample()) == 1)


def test_it_stands_rounds_in_which_nobody_is_there():
    def away(runtime):
        simulation = make(runtime, failures=Failures(policy="drop"))
        simulation.availability = Availability(drop=0.8)
        return simulation

    assert trace(away(AUTO), rounds=6) == trace(away("serial"), rounds=6)


def test_before_anything_is_trained_it_only_tests(untimed):
    simulation = make()
    assert simulation.evaluate() == make("serial").evaluate()
    assert simulation.evaluate_clients() == make("serial").evaluate_clients()
    assert simulation.runtime.choice is None


# What is chosen


@pytest.mark.parametrize(
    ("speeds", "exact", "chosen"),
    [
        ({"serial": 10, "threads": 9, "rounded": 14.9}, False, "serial"),
        ({"serial": 10, "threads": 20, "rounded": 29}, False, "threads"),
        ({"serial": 10, "threads": 20, "rounded": 30}, False, "vectorized"),
        ({"serial": 10, "threads": 20, "rounded": 1000}, True, "threads"),
    ],
)
def test_the_fastest_is_taken_and_of_equal_to_rounding_only_what_is_worth_it(
    rounded, rates, caplog, speeds, exact, chosen
):
    caplog.set_level(logging.INFO)
    rates.update(speeds)
    simulation = make({"name": "auto", "exact": exact})
    simulation.round()
    runtime = simulation.runtime
    assert (runtime.choice["name"], runtime.exact) == (chosen, chosen != "vectorized")
    line, *more = caplog.messages
    speed = speeds["rounded" if chosen == "vectorized" else chosen]
    assert line.startswith(f"runtime: {chosen}")
    assert f": {speed:,.0f} client steps/s (" in line
    assert more == ([auto.ROUNDED_NOTICE] if chosen == "vectorized" else [])
    assert max(map(len, caplog.messages)) <= 80


@pytest.mark.parametrize("error", [ConfigError("x"), MemoryError(), RuntimeError("x")], ids=repr)
@pytest.mark.parametrize("where", ["__init__", "check", "run"])
def test_what_cannot_do_it_drops_out(rounded, monkeypatch, where, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(Rounded, where, fail)
    simulation = make({"name": "auto"})
    assert trace(simulation, rounds=1) == trace(make("serial"), rounds=1)
    assert simulation.runtime.choice["name"] in ("serial", "threads")


def test_a_reference_that_fails_chooses_nothing(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError

    monkeypatch.setattr(Serial, "run", fail)
    simulation = make()
    simulation.round()
    assert simulation.runtime.choice is None


def test_where_one_step_takes_long_two_clients_are_timed_in_all(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(auto, "TOTAL_SECONDS", 1e-6)
    monkeypatch.setattr(calibration, "SECONDS_PER_RUNTIME", (0.0, 1e-6))
    timed, run = [], Serial.run

    def count(self, work, server, jobs, *args, **options):
        timed.extend(jobs := list(jobs))
        return run(self, work, server, jobs, *args, **options)

    monkeypatch.setattr(Serial, "run", count)
    simulation = make()
    simulation.round()
    assert len(timed) == 2
    assert simulation.runtime.choice["name"] == "threads"
    assert "not timed" in caplog.messages[0]


def test_no_more_is_tried_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(calibration, "TOTAL_SECONDS", 0.0)
    monkeypatch.setattr(Threads, "run", None)
    simulation = make()
    simulation.round()
    assert simulation.runtime.choice["name"] == "serial"


def test_ray_is_tried_only_where_there_is_one(monkeypatch):
    named = {spec["name"] for spec in candidates.candidate_specs("cpu", 100, exact=False)}
    assert "ray" not in named
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert {"name": "ray", "address": "10.0.0.1:6379"} in candidates.candidate_specs("cpu", 100, exact=False)


def test_workers_are_as_many_as_there_are_cores_or_fewer(monkeypatch):
    monkeypatch.setattr(candidates, "cores", lambda: 64)
    specs = candidates.candidate_specs("cpu", 20, exact=True)
    assert [spec.get("workers", 1) for spec in specs] == [1, 64, 16]
    monkeypatch.setattr(candidates, "cores", lambda: 1)
    assert [spec["name"] for spec in candidates.candidate_specs("cpu", 20, exact=True)] == ["serial"]


# What is remembered


def test_what_was_chosen_is_not_timed_again(rates, caplog, monkeypatch, request):
    caplog.set_level(logging.INFO)
    first = make()
    first.round()
    request.getfixturevalue("untimed")
    again = make(lr=0.3)  # which makes nothing faster
    again.round()
    assert again.runtime.choice == first.runtime.choice
    fresh, cached = caplog.messages
    assert cached == fresh.replace("serial:", "serial (cached):")
    for other in ({"batch_size": 5}, {"strategy": "fedprox"}, {"data": make_data([30, 40])}, {"momentum": 0.9}):
        with pytest.raises(AssertionError, match="timed"):
            make(AUTO, **other).round()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",
        b"[]",
        b'{"format": 2}',
        b'{"choices": 1}',
        b"[" * 100_000,
        b" " * 2**21,
        b'{"choices": {"KEY": {"runtime": {"name": "serial", "device": "cuda:99"}, "why": ""}}}',
        b'{"choices": {"KEY": {"runtime": {"name": "fork:bomb"}, "why": ""}}}',
        b'{"choices": {"KEY": {"runtime": {"name": ["serial"]}, "why": ""}}}',
        b'{"choices": {"KEY": {"runtime": {"name": "auto"}, "why": ""}}}',
        b'{"choices": {"KEY": {"runtime": {"name": "serial", "workers": 2}, "why": ""}}}',
        b'{"choices": {"KEY": {"runtime": {}, "why": ""}}}',
    ],
    ids=lambda content: content[:70].decode(errors="replace"),
)
def test_a_file_that_is_broken_or_names_what_cannot_be_is_made_anew(cache, rates, monkeypatch, content):
    monkeypatch.setattr(choices, "key", lambda *args: "KEY")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    simulation = make()
    simulation.round()
    assert choices.recall("KEY").runtime == simulation.runtime.choice == SERIAL


@pytest.mark.parametrize("kind", ["file in the way", "folder in the way", "no place"])
def test_a_file_that_cannot_be_written_is_no_error(cache, rates, monkeypatch, kind):
    cache.parent.parent.mkdir()
    if kind == "file in the way":
        cache.parent.write_text("")
    elif kind == "folder in the way":
        cache.mkdir(parents=True)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    simulation = make()
    simulation.round()
    assert simulation.runtime.choice == SERIAL


def test_many_at_once_remember_all(cache):
    def remember(i):
        choices.remember(f"key {i}", Choice(runtime=SERIAL, why=""))

    threads = [threading.Thread(target=remember, args=[i]) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(json.loads(cache.read_text())["choices"]) == {f"key {i}" for i in range(12)}


def test_only_so_many_are_remembered_and_the_newest(monkeypatch):
    monkeypatch.setattr(choices, "MAX_CHOICES", 2)
    for key in "abac":
        choices.remember(key, Choice(runtime=SERIAL, why=""))
    assert [choices.recall(key) is not None for key in "abc"] == [True, False, True]


def test_what_was_timed_on_a_busy_machine_is_remembered_by_this_process_alone(cache, rates, monkeypatch, request):
    monkeypatch.setattr(choices, "busy", lambda: True)
    only_here = {"momentum": 0.77}  # which no other test of this process has
    first = make(**only_here)
    first.round()
    assert not cache.exists()
    request.getfixturevalue("untimed")
    again = make(**only_here)
    again.round()
    assert again.runtime.choice == first.runtime.choice


def test_a_key_has_no_addresses_in_it(monkeypatch):
    """Which are others in each process."""
    simulation = build(load(CONFIG | {"local": {"augment": ["flip"], "loss": "hinge", "schedule": "cosine"}}))
    texts, dumps = [], json.dumps
    monkeypatch.setattr(json, "dumps", lambda *given, **how: texts.append(dumps(*given, **how)) or texts[-1])
    choices.key(simulation.work, simulation.task, simulation.data, 4, [SERIAL], torch.device("cpu"))
    assert "flip" in texts[0]
    assert "0x" not in texts[0]


# Stops and resumes


class Copies(Hook):
    """What a kill after a round would leave."""

    priority = 200

    def __init__(self, to, after):
        super().__init__()
        self.to, self.after = to, after

    def after_round(self, run, record):
        if record["round"] == self.after:
            shutil.copytree(run.folder.path, self.to)


def stopped(tmp_path, after=2, **settings):
    """The summary of a run that was never stopped, and the folder of the same one, killed."""
    killed = tmp_path / "killed"
    done = fedsim.run(CONFIG | settings, out=tmp_path / "whole", hooks=[Copies(killed, after)])
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    return done, killed


def test_a_resume_repeats_the_choice_and_has_the_same_end(rounded, rates, tmp_path, request):
    rates["rounded"] = 100.0
    done, killed = stopped(tmp_path)
    request.getfixturevalue("untimed")
    again = fedsim.resume(killed)
    assert again.summary["fingerprint"] == done.summary["fingerprint"]
    exact = fedsim.run(CONFIG | {"runtime": "serial"}, out=tmp_path / "serial")
    assert exact.summary["fingerprint"] != done.summary["fingerprint"]


def test_vectorized_too_has_the_same_end(rates, tmp_path, request):
    rates["vectorized"] = 100.0
    done, killed = stopped(tmp_path)
    (checkpoint, _), _ = fedsim.experiment.checkpoint.Checkpoints(killed / "checkpoints").latest(killed)
    assert checkpoint.runtime["name"] == "vectorized"
    assert isinstance(checkpoint.runtime["chunk"], int)
    request.getfixturevalue("untimed")
    assert fedsim.resume(killed).summary["fingerprint"] == done.summary["fingerprint"]


def test_another_runtime_on_a_resume_wins_and_is_told_where_it_rounds_otherwise(rounded, rates, tmp_path):
    rates["rounded"] = 100.0
    _, killed = stopped(tmp_path)
    shutil.copytree(killed, tmp_path / "other")
    agree = "results agree as floating point does"
    with pytest.warns() as caught:
        fedsim.resume(killed, {"runtime": SERIAL})
    assert f"changed: runtime: serial, and was vectorized, chunks of 2; {agree}" in said(caught)
    with pytest.warns() as caught:
        fedsim.resume(tmp_path / "other", {"runtime.exact": True})
    (line,) = (line for line in said(caught) if agree in line)
    assert line.startswith("changed: runtime.exact: vectorized equals serial only up to rounding; it was")


def test_what_was_named_and_rounds_otherwise_is_told_of_where_one_is_chosen_now(rounded, rates, tmp_path):
    _, killed = stopped(tmp_path, runtime={"name": "vectorized", "chunk": 2, "device": "cpu"})
    with pytest.warns() as caught:
        fedsim.resume(killed, {"runtime": {"name": "auto", "device": "cpu"}})
    agree = "results agree as floating point does"
    assert f"changed: runtime: auto, and was vectorized, chunks of 2; {agree}" in said(caught)


def said(caught):
    return [str(warning.message) for warning in caught]


def test_another_exact_runtime_on_a_resume_is_the_same(rates, tmp_path):
    done, killed = stopped(tmp_path, runtime={"name": "auto", "exact": True, "device": "cpu"})
    with pytest.warns(UserWarning, match="changed: runtime") as caught:
        again = fedsim.resume(killed, {"runtime": {"name": "threads", "workers": 3, "device": "cpu"}})
    assert "floating point" not in str(said(caught))
    assert again.summary["fingerprint"] == done.summary["fingerprint"]


def resigned(killed, change):
    for path in (killed / "checkpoints").glob("*.json"):
        values = json.loads(path.read_text())["checkpoint"]
        change(values)
        digest = hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        path.write_text(json.dumps({"sha256": digest, "checkpoint": values}))


def test_a_checkpoint_from_before_there_was_a_choice_is_read(rates, tmp_path):
    done, killed = stopped(tmp_path)
    resigned(killed, lambda values: values.pop("runtime"))
    assert fedsim.resume(killed).summary["fingerprint"] == done.summary["fingerprint"]


GONE = [
    {"name": "serial", "device": "cuda:99"},
    {"name": "fork:bomb"},
    {"name": "ray"},
    {"name": "auto"},
    {"x": 1},
]


@pytest.mark.parametrize("gone", GONE, ids=str)
def test_a_choice_that_cannot_be_here_is_made_anew_and_told(rates, tmp_path, gone):
    done, killed = stopped(tmp_path)
    resigned(killed, lambda values: values.update(runtime=gone))
    with pytest.warns(UserWarning, match="is chosen anew; results agree as floating point does"):
        again = fedsim.resume(killed)
    assert again.summary["fingerprint"] == done.summary["fingerprint"]


# What is said


def test_the_command_says_what_was_chosen_before_round_1(fedsim_, tmp_path, monkeypatch):
    import yaml

    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG | {"runtime": {"name": "auto", "exact": True}}))
    lines = fedsim_("run", "c.yaml", "--out=run").out.splitlines()
    assert lines[0].startswith("runtime: ")
    assert lines[1].startswith("round 1/4")
    assert sum("runtime" in line for line in lines) == 1
    assert logging.getLogger("fedsim").handlers == []
    again = fedsim_("run", "c.yaml", "--out=again").out.splitlines()
    assert "(cached): " in again[0]


def test_it_is_the_default():
    config = {key: value for key, value in CONFIG.items() if key != "runtime"}
    assert load(config).runtime == {"name": "auto", "exact": False, "device": "auto"}
    assert Auto.__doc__
