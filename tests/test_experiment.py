"""A run: what it returns is what its folder holds, and what its folder holds is enough to have it again."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

import fedsim
from fedsim.data.partition import content_hash
from fedsim.errors import ClientError, ConfigError, RoundError
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.experiment.figures import spread
from fedsim.experiment.folder import RunFolder
from fedsim.experiment.hook import Hook
from fedsim.experiment.hooks.tensorboard import SCALARS
from fedsim.models import options as models
from fedsim.report.runs import read_run

COMMAND = [sys.executable, "-P", "-c", "from fedsim.cli import main; main()"]  # -P: not from where one is
CONFIG = {
    "seed": 3,
    "rounds": 5,
    "data": {
        "name": "synthetic",
        "examples": 60,
        "test_examples": 30,
        "classes": 3,
        "clients": 5,
        "holdout": 0.3,
        "noise": 0.7,
    },
    "model": {"name": "cnn_bn", "widths": [3, 4]},
    "strategy": "fedavg",
    "cohort": {"name": "uniform", "fraction": 0.4},
    "local": {"lr": 0.05, "batch_size": 4},
    "evaluate": {"every": 2, "clients": True},
    "runtime": "serial",
}
BREAKS = {"local.schedule": {"name": "step", "every": 2, "factor": 1e36}, "local.batch_size": 1}  # in round 3
FILES = {
    *("config.yaml", "rounds.jsonl", "partition.json", "model.safetensors", "curves.png", "tensorboard"),
    *("checkpoints", ".lock"),
}
ROUND = {
    *("round", "cohort", "train_loss", "fingerprint", "seconds", "steps", "bytes_up", "bytes_down", "failed"),
    *("absent", "clock"),
}
SUMMARY = {
    *("rounds", "test_accuracy", "test_loss", "best_test_accuracy", "fingerprint", "seconds"),
    *("client_steps_per_second", "bytes_up", "bytes_down", "peak_memory_bytes", "stopped"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return fedsim.run(CONFIG, out=tmp_path_factory.mktemp("runs") / "done")


def lines(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def strict(text):
    """JSON that any parser takes: no NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def fingerprint(network):
    """SHA-256 of the parameters' bytes, then of the statistics', in the network's own order."""
    parts = [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]
    return hashlib.sha256(torch.cat([part.detach().flatten() for part in parts]).numpy().data).hexdigest()


def saved_network(folder):
    config = load(folder / "config.yaml")
    data = build(config).data
    network = models.make(config.model, data.shape, data.num_classes)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network, data


# The folder


def test_the_result_is_what_the_folder_holds(done):
    assert {path.name for path in done.folder.iterdir()} == FILES | {"summary.json"}
    assert strict((done.folder / "summary.json").read_text()) == done.summary
    assert lines(done.folder) == done.rounds
    assert not done.interrupted


def test_rounds_count_from_one_and_have_what_they_should(done):
    assert [record["round"] for record in done.rounds] == [1, 2, 3, 4, 5]
    for record in done.rounds:
        assert record.keys() >= ROUND
        assert len(record["cohort"]) == 2
        assert record["failed"] == {}
        assert record["bytes_up"] > 0 < record["bytes_down"]


def test_tests_come_every_so_often_and_at_the_end(done):
    keys = {"test_loss", "test_accuracy", "client_accuracy_mean"}
    tested = [record["round"] for record in done.rounds if keys <= record.keys()]
    untested = [record["round"] for record in done.rounds if not keys & record.keys()]
    assert (tested, untested) == ([2, 4, 5], [1, 3])


def test_the_summary_sums_up(done):
    accuracies = [record["test_accuracy"] for record in done.rounds if "test_accuracy" in record]
    last = done.rounds[-1]
    assert done.summary.keys() == SUMMARY
    assert done.summary["rounds"] == 5
    assert done.summary["best_test_accuracy"] == max(accuracies)
    for key in ("test_accuracy", "test_loss", "fingerprint"):
        assert done.summary[key] == last[key]
    for key in ("bytes_up", "bytes_down"):
        assert done.summary[key] == sum(record[key] for record in done.rounds)
    training = sum(record["seconds"] for record in done.rounds)
    assert done.summary["seconds"] >= training
    steps = sum(record["steps"] for record in done.rounds)
    assert done.summary["client_steps_per_second"] == pytest.approx(steps / training)
    assert done.summary["peak_memory_bytes"] > 10e6


def test_the_saved_model_is_the_one_that_was_tested(done):
    network, data = saved_network(done.folder)
    assert fingerprint(network) == done.summary["fingerprint"]
    x, y = data.test_batch(torch.arange(data.num_test))
    with torch.no_grad():
        logits = network.eval()(x)
    assert (logits.argmax(1) == y).double().mean().item() == done.summary["test_accuracy"]
    assert F.cross_entropy(logits, y).item() == pytest.approx(done.summary["test_loss"], rel=1e-5)


def test_tensorboard_shows_the_same_numbers(done):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(done.folder / "tensorboard")).Reload()
    measured = {key: tag for key, tag in SCALARS.items() if any(key in record for record in done.rounds)}
    assert set(events.Tags()["scalars"]) == set(measured.values())
    for key, tag in measured.items():
        shown = {event.step: event.value for event in events.Scalars(tag)}
        assert shown == pytest.approx({r["round"]: r[key] for r in done.rounds if key in r}, rel=1e-6)


def test_the_partition_is_told_and_hashed(done):
    told = strict((done.folder / "partition.json").read_text())
    data = build(load(CONFIG)).data
    counts = np.array(told["labels_by_client"])
    assert told["hash"] == content_hash(data.owners)
    assert counts.shape == (5, 3)
    assert counts.sum() == told["examples"] == 60
    assert counts.sum(1).tolist() == np.bincount(data.owners).tolist()
    assert told["training_examples"]["smallest"] == data.sizes.min()


def test_the_resolved_config_gives_the_same_run(done, tmp_path):
    again = fedsim.run(done.folder / "config.yaml", out=tmp_path / "again")
    assert [r["fingerprint"] for r in again.rounds] == [r["fingerprint"] for r in done.rounds]
    assert (tmp_path / "again/config.yaml").read_text() == (done.folder / "config.yaml").read_text()


def test_without_a_folder_nothing_is_written(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fedsim.run(CONFIG)
    assert result.folder is None
    assert result.summary["fingerprint"] == done.summary["fingerprint"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_used_twice(done):
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")}
    with pytest.raises(ConfigError, match="exists, and a run is never overwritten"):
        fedsim.run(CONFIG, out=done.folder)
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")} == before


def test_a_wrong_config_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError):
        fedsim.run(CONFIG, {"cohort.fraction": 3}, out=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


# Clients, each counting once


def test_the_spread_over_clients_worked_out_by_hand():
    found = spread([0.5] * 10 + [1.0] * 8 + [0.1, 0.3])
    assert found["client_accuracy_mean"] == pytest.approx((5 + 8 + 0.4) / 20)
    assert found["client_accuracy_worst_decile"] == pytest.approx(0.2)
    assert spread([0.0, 1.0])["client_accuracy_std"] == 0.5
    assert spread([0.25])["client_accuracy_worst_decile"] == 0.25


def test_clients_are_tested_on_what_they_held_back(done):
    simulation = build(load(CONFIG))
    for _ in range(5):
        simulation.round()
    own = [each.accuracy for each in simulation.evaluate_clients().values()]
    assert len(own) == 5
    assert done.rounds[-1].items() >= spread(own).items()


# Runs that end early


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "failed"
    with pytest.raises(ClientError) as caught:
        fedsim.run(CONFIG, BREAKS, out=folder)
    return folder, str(caught.value)


def test_a_run_that_fails_says_in_which_round_and_client(failed):
    assert failed[1].startswith("round 3, client ")
    assert "not finite" in failed[1]
    assert "\n" not in failed[1]


def test_a_run_that_fails_leaves_the_rounds_before(failed):
    folder, _ = failed
    assert {path.name for path in folder.iterdir()} == FILES
    rounds = lines(folder)
    assert [record["round"] for record in rounds] == [1, 2]
    assert fingerprint(saved_network(folder)[0]) == rounds[-1]["fingerprint"]
    assert read_run(folder).summary is None


def test_an_interrupt_ends_promptly_and_leaves_what_was_done(tmp_path):
    """A real process, for a signal is not an exception until Python makes it one."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG | {"rounds": 10**6, "runtime": "threads"}))
    run = [*COMMAND, "run", "c.yaml", "--out", "run"]
    with subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        seen = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)  # of the hours that all rounds would take
    assert seen[2].startswith("round       3/1000000  train_loss ")
    assert process.returncode == 130
    run = read_run(tmp_path / "run")
    assert run.summary is None
    assert len(run.rounds) >= 3
    said = f"fedsim: interrupted after round {len(run.rounds)} of 1000000; fedsim resume run goes on\n"
    assert complaint == said
    assert fingerprint(saved_network(tmp_path / "run")[0]) == run.rounds[-1]["fingerprint"]


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/c[1]-9").mkdir(parents=True)
    (tmp_path / "runs/c[1]-x").mkdir()
    config = load(CONFIG)
    data = build(config).data
    made, gate = [], threading.Barrier(8)

    def start():
        gate.wait()
        folder = RunFolder.number("c[1]", config, data)
        made.append(folder.path)
        folder.close()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(path.name.removeprefix("c[1]-")) for path in made) == list(range(10, 18))


class Fails(Hook):
    """Does something once, at one event."""

    def __init__(self, event, do):
        super().__init__()
        setattr(self, event, do)


def fail(error):
    def do(*_, **__):
        raise error

    return do


def shown(result):
    """All that does not depend on how long it took."""
    timed = {"seconds", "client_steps_per_second", "peak_memory_bytes"}
    return [{k: v for k, v in record.items() if k not in timed} for record in [*result.rounds, result.summary]]


@pytest.mark.parametrize("error", [OSError("no disk"), KeyboardInterrupt()], ids=repr)
def test_a_round_whose_test_failed_is_tested_after_a_resume(done, tmp_path, error, monkeypatch):
    out = tmp_path / "run"
    with suppress(OSError), monkeypatch.context() as patch:
        patch.setattr("fedsim.federated.simulation.Simulation.evaluate", fail(error))
        fedsim.run(CONFIG, out=out)
    assert [record["round"] for record in lines(out)] == [1]
    assert shown(fedsim.resume(out)) == shown(done)


def test_a_checkpoint_that_fails_is_told_though_the_run_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fedsim.experiment.checkpoint.Checkpoints.save", fail(OSError(28, "No space left", "here"))
    )
    with pytest.raises(OSError, match="No space left"):
        fedsim.run(
            CONFIG,
            {"checkpoint.every": None},
            out=tmp_path / "run",
            hooks=[Fails("after_round", fail(KeyboardInterrupt()))],
        )


def test_a_finished_run_that_has_lost_its_checkpoints_is_left_alone(done, tmp_path):
    shutil.copytree(done.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(
        ConfigError, match=r"and is finished; put them back, or train again: fedsim run .*/run/config\.yaml"
    ):
        fedsim.resume(tmp_path / "run")
    assert lines(tmp_path / "run") == done.rounds


def test_a_hook_that_has_ended_a_run_need_not_do_it_again(tmp_path, monkeypatch):
    """As after a kill between the last round and summary.json; but a longer run goes on."""
    out, stop = (
        tmp_path / "run",
        Fails("after_round", lambda run, record: record["round"] == 2 and run.stop("enough")),
    )
    stopped = fedsim.run(CONFIG, out=out, hooks=[stop])
    (out / "summary.json").unlink()
    again = fedsim.resume(out)
    assert again.summary["stopped"] == stopped.summary["stopped"] == "enough"
    assert shown(again) == shown(stopped)
    with pytest.warns(UserWarning, match="changed: rounds: 6, and was 5"):
        assert len(fedsim.resume(out, {"rounds": 6}).rounds) == 6


def test_what_was_forced_once_need_not_be_forced_again(tmp_path):
    out = tmp_path / "run"
    fedsim.run(CONFIG, {"rounds": 2}, out=out)
    changed = {"local.lr": 0.01, "rounds": 4}
    with pytest.raises(ConfigError, match=r"local\.lr: 0\.01, and was 0\.05: this changes the result; --force"):
        fedsim.resume(out, changed)
    hook = Fails("before_round", fail(RoundError("stop")))
    with pytest.raises(RoundError, match="stop"), warnings.catch_warnings(record=True, action="always") as notes:
        fedsim.resume(out, changed, force=True, hooks=[hook])
    assert [str(note.message).split(":")[1] for note in notes] == [" local.lr", " rounds"]
    assert len(fedsim.resume(out).rounds) == 4


# Parts of your own

MINE = '''
from dataclasses import dataclass

import torch
from torch import nn

from fedsim import RoundInfo, State, Strategy, Update
from fedsim.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Halfway(Strategy):
    """Goes a share of the way."""

    share: float = 0.5

    def client_update(self, server, client, local):
        return Update({"delta": local.train(server["model"]) - server["model"]}, weight=local.num_examples)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return {"model": server["model"] + self.share * mean["delta"]}


class Net(nn.Module):
    def __init__(self, shape, classes, /, *, width: int = 4):
        super().__init__()
        self.first, self.last = nn.Linear(shape[0], width), nn.Linear(width, classes)

    def forward(self, x):
        return self.last(self.first(x).relu())


def stripes(*, rows: int = 40) -> Dataset:
    x = torch.linspace(-1, 1, 2 * rows).view(-1, 2)
    y = (x[:, 0] > 0).long()
    return Dataset(x, y, x, y, classes=2)
'''
OWN = {
    "rounds": 3,
    "data": {"name": "mine_all:stripes", "rows": 50, "clients": 4},
    "model": {"name": "mine_all:Net", "width": 3},
    "strategy": "mine_all:Halfway",
    "cohort": "all",
}


def test_strategy_model_and_data_of_your_own_in_both_doors(tmp_path, monkeypatch):
    """The same file by the command, in a process of its own, and from Python: the same model."""
    (tmp_path / "mine_all.py").write_text(MINE)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    command = [*COMMAND, "run", "own.yaml", "strategy.share=0.25"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    by_command = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = f"fedsim: data.name: imports mine_all, which is not fedsim's: {tmp_path / 'mine_all.py'}\n"
    assert (by_command.returncode, by_command.stderr) == (0, told)
    assert "\x1b" not in by_command.stdout
    assert "runs/own-1" in by_command.stdout

    monkeypatch.syspath_prepend(tmp_path)
    by_python = fedsim.run(OWN, {"strategy.share": 0.25}, out=tmp_path / "mine")
    found = read_run(tmp_path / "runs/own-1")
    assert found.summary["fingerprint"] == by_python.summary["fingerprint"]
    assert [r["fingerprint"] for r in found.rounds] == [r["fingerprint"] for r in by_python.rounds]
    assert (tmp_path / "mine/config.yaml").read_text() == (tmp_path / "runs/own-1/config.yaml").read_text()


def test_tied_weights_survive_a_run(tmp_path, monkeypatch):
    (tmp_path / "tied.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes, /):\n"
        "    first, again, last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, classes)\n"
        "    again.weight = first.weight\n"
        "    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), again, nn.ReLU(), last)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {"rounds": 1, "data": {"name": "digits", "clients": 5}, "strategy": "fedavg", "cohort": "all"}
    result = fedsim.run(config | {"model": "tied:net"}, out=tmp_path / "run")
    saved = load_file(result.folder / "model.safetensors")
    assert torch.equal(saved["1.weight"], saved["3.weight"])
