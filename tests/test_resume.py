"""Law 4, stop anywhere, same end: runs are killed, resumed, and compared with one never stopped.

Apart from measured times nothing may differ: rounds.jsonl, summary.json, the model, TensorBoard's events, and what
the server and the clients keep. Runs that are interrupted or starved are in test_interrupts.py.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import yaml
from covering import in_turn
from small_run import (
    QUIET,
    contents,
    left,
    records,
    refused,
    resumed,
    rounds_done,
    rounds_logged,
    same,
    snapshots,
    whole,
    write,
)

COMMAND = [sys.executable, "-P", "-c", "from fedsim.cli import main; main()"]  # -P: not from where one is


def test_a_process_that_forks_is_one_thread(forks):
    """Or a child might hang on what another thread held."""
    assert forks.threads == 1


# Each moment at which a kill finds other files


@pytest.mark.parametrize(("runtime", "step"), [("serial", 5), ("threads", 9)])
def test_a_run_killed_before_or_within_many_changes_to_its_files_has_the_same_end(forks, folder, runtime, step):
    killed_within_changes(forks, folder, runtime, step)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["serial", "threads"])
def test_a_run_killed_before_or_within_any_change_to_its_files_has_the_same_end(forks, folder, runtime):
    killed_within_changes(forks, folder, runtime, 1)


def killed_within_changes(forks, folder, runtime, step):
    """Resume from each `step`th moment at which a kill finds other files."""
    write(folder, rounds=3, runtime=runtime)
    expected = whole(forks, folder)
    (folder / "at").mkdir()
    done = forks.run("run", "c.yaml", "--out=run", cwd=folder, prepare=["snapshots", "run", "at"])
    assert done.status == 0, str(done)
    moments = snapshots(folder)
    assert len(moments) > 60
    same(forks, folder, moments[::step], expected)


def test_such_a_moment_is_what_a_kill_leaves(forks, folder):
    write(folder, rounds=3)
    (folder / "at").mkdir()
    forks.run("run", "c.yaml", "--out=run", cwd=folder, prepare=["snapshots", "run", "at"])
    moments = snapshots(folder)
    for number in range(3, len(moments), 11):
        name = f"killed{number}"
        done = forks.run("run", "c.yaml", f"--out={name}", cwd=folder, prepare=["die_in", name, number])
        assert done.status == -signal.SIGKILL
        assert contents(folder / name).keys() == {  # but for the time of day, which is in a name
            path.with_name(next((folder / name / "tensorboard").iterdir()).name)
            if path.parent.name == "tensorboard"
            else path
            for path in contents(moments[number])
        }


def test_a_resume_killed_before_or_within_many_changes_to_its_files_has_the_same_end(forks, folder):
    """One that has much to put right: it is longer, its last checkpoint is broken, and drafts lie about."""
    write(folder, rounds=3, evaluate={"every": 1})
    expected = whole(forks, folder, "rounds=4")
    whole(forks, folder, name="run")
    broken = folder / "run/checkpoints/000003.json"
    broken.write_bytes(broken.read_bytes()[:-1])
    for name in ("000004.json.draft", "server-000004.safetensors.draft", "clients-000099.safetensors"):
        (folder / "run/checkpoints" / name).write_bytes(b"half")
    (folder / "at").mkdir()
    done = forks.run("resume", "run", "rounds=4", cwd=folder, prepare=["snapshots", "run", "at"])
    assert done.status == 0, str(done)
    assert done.err.count("broken checkpoint") == 1
    assert left(folder / "run") == expected
    same(forks, folder, snapshots(folder)[::7], expected, "rounds=4", warned=True)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["serial", "vectorized"])
def test_a_sweep_killed_before_or_within_any_change_to_its_files_has_the_same_end(forks, folder, runtime):
    """To rounding, if its points are rows of one batch: one that is a round ahead is then no row of it."""
    write(folder, rounds=2)
    command = ["sweep", "c.yaml", "local.lr=0.05,0.1", f"runtime={runtime}", "--jobs=1"]

    def end(name):
        done = forks.run(*command, f"--out={name}", cwd=folder)
        assert (done.status, done.err) == (0, ""), str(done)
        names = sorted(path.name for path in (folder / name).iterdir() if not path.name.endswith(".draft"))
        return names, [left(path) for path in sorted((folder / name).glob("lr=*"))]

    def in_batch(end):
        """What is equal, and what to rounding."""
        names, points = end
        records = [dict(record) for point in points for record in point["rounds"]]
        losses = [record[name] for record in records for name in ("train_loss", "test_loss") if name in record]
        return names, [(p["files"], p["config"]) for p in points], [r["cohort"] for r in records], losses

    expected = end("whole")
    (folder / "at").mkdir()
    done = forks.run(*command, "--out=sweep", cwd=folder, prepare=["snapshots", "sweep", "at"])
    assert done.status == 0, str(done)
    moments = snapshots(folder)
    assert len(moments) > 100
    with ThreadPoolExecutor(3) as pool:
        for moment, found in zip(moments, pool.map(end, moments), strict=True):
            if runtime == "serial":
                assert found == expected, moment
            else:
                *same, losses = in_batch(expected)
                assert in_batch(found) == (*same, pytest.approx(losses, rel=1e-5)), moment


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_lost_power_has_the_same_end_and_the_rounds_of_its_last_checkpoint(forks, folder, step):
    """Whatever was not synchronised is gone: contents, or names too."""
    expected = whole(forks, folder)
    (folder / "at").mkdir()
    done = forks.run("run", "c.yaml", "--out=run", cwd=folder, prepare=["power_losses", "run", "at"])
    assert done.status == 0, str(done)
    kinds = {}
    for moment in snapshots(folder):
        shutil.rmtree(moment / "tensorboard", ignore_errors=True)
        kinds.setdefault(str(contents(moment)), moment)
    moments = list(kinds.values())
    assert {rounds_done(moment) for moment in moments} == {0, 1, 2, 3, 4}
    same(forks, folder, moments[::step], expected, warned=True)


# Kills at random instants


def kill_until_done(forks, folder, name, seed):
    """Run and kill, resume and kill, until one gets through; returns how often it was killed."""
    rng, kills, patience = random.Random(seed), 0, 0.12
    while True:
        before = rounds_done(folder / name)
        how = ["resume", name] if (folder / name).exists() else ["run", "c.yaml", f"--out={name}"]
        done = forks.run(*how, cwd=folder, kills=[(rng.uniform(0, patience), signal.SIGKILL)])
        if done.status == -signal.SIGSEGV and "_conv_forward" in done.err:
            continue  # PyTorch 2.15 in two threads, once in thousands of processes: a death like any other here
        assert done.err in QUIET, str(done)
        if done.status == 0:
            return kills
        assert done.status == -signal.SIGKILL, str(done)
        kills += 1
        patience = 0.12 if rounds_done(folder / name) > before else 1.3 * patience  # a busy machine gets there too


STRATEGIES = ["fedavg", "scaffold", "fedbn"]
KINDS = (STRATEGIES, ["serial", "threads"], [1, 3])  # the last: rounds between two checkpoints


def killed_and_compared(forks, folder, cases, seeds, rounds=22):
    """Of each case a run never stopped and one a seed; returns all kills."""

    def kinds():
        for strategy, runtime, every in cases:
            place = folder / f"{strategy}-{runtime}-{every}"
            place.mkdir()
            write(
                place,
                strategy=strategy,
                runtime=runtime,
                rounds=rounds,
                checkpoint={"every": every, "keep": 2},
                hooks=["tensorboard", "curves"] if every == 3 else ["tensorboard"],
            )
            expected = whole(forks, place)
            for seed in seeds:
                yield place, seed, expected

    def one(kind):
        place, seed, expected = kind
        kills = kill_until_done(forks, place, f"run{seed}", seed)
        assert left(place / f"run{seed}") == expected, (place, seed)
        shutil.rmtree(place / f"run{seed}")
        return kills

    with ThreadPoolExecutor(3) as pool:
        return sum(pool.map(one, kinds()))


def test_a_run_killed_at_random_again_and_again_has_the_same_end(forks, folder, record_property):
    kills = killed_and_compared(forks, folder, in_turn(*KINDS), range(1), rounds=14)
    record_property("kills", kills)
    assert kills >= 4  # or it was not tried


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_killed_hundreds_of_times_has_the_same_end(forks, folder, strategy, record_property, capsys):
    kills = killed_and_compared(forks, folder, list(product([strategy], *KINDS[1:])), range(100, 140))
    record_property("kills", kills)
    with capsys.disabled():
        print(f"\n{strategy}: {kills} kills survived")
    assert kills >= 350


@pytest.mark.slow
def test_processes_of_their_own_killed_as_they_go_have_the_same_end(forks, folder):
    """As a user has them, and unlike forks that share what was imported."""
    write(folder, rounds=200, runtime="threads")
    expected = whole(forks, folder)
    command = [*COMMAND, "run", "c.yaml", "--out=run"]
    for lines in (2, 9, 23):
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            for _ in range(lines):
                process.stdout.readline()
            process.kill()
            assert process.communicate()[1] == b""
        assert process.returncode == -signal.SIGKILL
        command = [*COMMAND, "resume", "run"]
    end = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (0, "")
    assert left(folder / "run") == expected


def test_killed_before_its_first_checkpoint_a_run_starts_anew(forks, folder):
    write(folder, checkpoint={"every": None})
    expected = whole(forks, folder)
    done = forks.run("run", "c.yaml", "--out=run", cwd=folder, prepare=["die_in", "run", 20])
    assert done.status == -signal.SIGKILL
    assert rounds_done(folder / "run") == 0 < rounds_logged(folder / "run") < 4
    assert resumed(forks, folder, "run") == expected


def test_early_stopping_stops_in_the_same_round(forks, folder):
    hook = {"name": "early_stopping", "metric": "test_accuracy", "patience": 4}
    write(folder, rounds=100, evaluate={"every": 1}, hooks=["tensorboard", hook])
    expected = whole(forks, folder)
    assert 5 < len(expected["rounds"]) < 100
    assert "has not improved" in dict(expected["summary"])["stopped"]
    assert kill_until_done(forks, folder, "run", 0) > 0
    assert left(folder / "run") == expected


def test_a_clock_that_jumps_changes_nothing(forks, folder):
    """Neither what is learned nor in which order TensorBoard's steps come."""
    write(folder, rounds=8)
    expected = whole(forks, folder)
    done = forks.run("run", "c.yaml", "--out=run", cwd=folder, prepare=["jumping_clock"])
    assert (done.status, done.err) == (0, ""), str(done)
    assert left(folder / "run") == expected
    done = forks.run("run", "c.yaml", "--out=again", cwd=folder, prepare=["die_at", 80])
    assert done.status == -signal.SIGKILL
    done = forks.run("resume", "again", cwd=folder, prepare=["jumping_clock"])
    assert (done.status, done.err) == (0, ""), str(done)
    assert left(folder / "again") == expected


# What resume takes and what it refuses


@pytest.fixture(scope="module")
def finished(forks, tmp_path_factory):
    """A folder with a run, and what it left."""
    place = tmp_path_factory.mktemp("finished")
    write(place, evaluate={"every": 1})
    return place, whole(forks, place, name="run")


def aside(finished, folder, name="run"):
    """A copy of that run, to play with."""
    shutil.copytree(finished[0] / "run", folder / name)
    return folder / name


def test_a_finished_run_resumed_is_the_same(forks, folder, finished):
    run = aside(finished, folder)
    assert resumed(forks, folder, "run") == finished[1]
    assert resumed(forks, folder, "run") == finished[1]
    assert sorted(contents(run)) == sorted(contents(run))


def test_more_rounds_make_it_the_run_of_that_length(forks, folder, finished):
    aside(finished, folder)
    write(folder, evaluate={"every": 1}, rounds=7)
    done = forks.run("resume", "run", "rounds=7", cwd=folder)
    assert (done.status, done.err) == (0, "fedsim: changed: rounds: 7, and was 4\n")
    assert left(folder / "run") == whole(forks, folder)


def test_fewer_rounds_than_are_done_are_refused(forks, folder, finished):
    run = aside(finished, folder)
    before = contents(run)
    refused(forks.run("resume", "run", "rounds=3", cwd=folder), "rounds: 3, and run has done 4")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("runtime.workers=2", "runtime.workers"),
        ("runtime=threads", 'runtime.name: "threads", and was "serial"'),
        ("evaluate.every=3", "evaluate.every: 3, and was 1"),
        ("checkpoint.every=2", "checkpoint.every: 2, and was 1"),
        ("client_store.memory=1MiB", "client_store.memory: 1048576, and was 4096"),
        ("failures.policy=drop", "failures.policy"),
        ("hooks=[]", "hooks"),
    ],
)
def test_what_changes_no_result_may_change_and_is_told(forks, folder, finished, setting, said):
    aside(finished, folder)
    settings = [setting, "runtime=threads"] if "workers" in setting else [setting]
    done = forks.run("resume", "run", *settings, cwd=folder)
    assert done.status == 0, str(done)
    assert f"fedsim: changed: {said}" in done.err
    assert done.err.count("\n") == done.err.count("changed: ")
    assert records(folder / "run") == finished[1]["rounds"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("strategy=fedavg", 'strategy.name: "fedavg", and was "scaffold"'),
        ("local.lr=0.1", "local.lr: 0.1, and was 0.05"),
        ("seed=4", "seed: 4, and was 3"),
        ("data.partition={name: dirichlet, alpha: 1}", 'data.partition.name: "dirichlet", and was "iid"'),
        ("cohort=all", 'cohort.name: "all", and was "uniform"'),
        ("model.widths=[4, 4]", "model.widths: [4, 4], and was [3, 4]"),
        ("local.momentum=0.5", "local.momentum"),
    ],
)
def test_what_changes_the_result_is_refused_with_what_it_is_and_was(forks, folder, finished, setting, said):
    run = aside(finished, folder)
    before = contents(run)
    refused(forks.run("resume", "run", "rounds=6", setting, cwd=folder), said)
    assert contents(run) == before
    config = yaml.safe_load((run / "config.yaml").read_text())  # by hand it counts the same
    key, value = setting.split("=")
    *path, last = key.split(".")
    part = config
    for each in path:
        part = part[each]
    part[last] = yaml.safe_load(value)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    refused(forks.run("resume", "run", cwd=folder), said)


def test_by_force_it_goes_on_all_the_same(forks, folder, finished):
    aside(finished, folder)
    done = forks.run("resume", "run", "rounds=6", "local.lr=0.1", "--force", cwd=folder)
    assert done.status == 0, str(done)
    assert "fedsim: changed: local.lr: 0.1, and was 0.05\n" in done.err
    after = left(folder / "run")
    assert after["rounds"][:4] == finished[1]["rounds"]
    assert len(after["rounds"]) == 6
    assert resumed(forks, folder, "run") == after  # and has it from then on


def test_other_labels_under_the_same_config_are_noticed(forks, folder):
    def arrays(first):
        x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
        y = np.arange(40) % 2
        y[0] = first
        np.savez(folder / "d.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])

    arrays(0)
    data = {"name": "npz", "path": str(folder / "d.npz"), "clients": 4}
    write(folder, data=data, model="2nn", strategy="fedavg")
    whole(forks, folder, name="run")
    arrays(1)
    refused(forks.run("resume", "run", "rounds=6", cwd=folder), "data or model: other examples")
    arrays(0)
    done = forks.run("resume", "run", "rounds=6", cwd=folder)
    assert done.status == 0, str(done)


@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_folder_without_a_run_is_refused(forks, folder, name):
    (folder / "empty").mkdir()
    refused(forks.run("resume", name, cwd=folder), "config.yaml")
    assert list((folder / "empty").iterdir()) == []


# One at a time


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_under_way_is_resumed_by_nobody_else(forks, folder):
    write(folder, rounds=10**6)
    first = forks.start("run", "c.yaml", "--out=run", cwd=folder)
    until(lambda: rounds_done(folder / "run") > 0)
    refused(forks.run("resume", "run", cwd=folder), "run: another process is running it")
    first.send(signal.SIGINT)
    assert first.wait().status == 130
    second = forks.start("resume", "run", cwd=folder)
    before = rounds_done(folder / "run")
    until(lambda: rounds_done(folder / "run") > before)
    refused(forks.run("resume", "run", cwd=folder), "run: another process is running it")
    second.send(signal.SIGKILL)  # which lets go of it, too
    assert second.wait().status == -signal.SIGKILL
    third = forks.start("resume", "run", cwd=folder, kills=[(0.2, signal.SIGTERM)])
    assert third.wait().status == 130


def test_of_many_that_resume_it_at_once_one_does(forks, folder):
    write(folder, rounds=12)
    expected = whole(forks, folder)
    done = forks.run("run", "c.yaml", "--out=run", cwd=folder, prepare=["die_at", 60])
    assert done.status == -signal.SIGKILL
    processes = [forks.start("resume", "run", cwd=folder) for _ in range(6)]
    ends = [process.wait() for process in processes]
    assert 0 in {end.status for end in ends}
    for end in ends:
        if end.status:
            refused(end, "run: another process is running it")
    assert left(folder / "run") == expected


# Folders that are read-only


def test_a_folder_that_is_read_only_is_refused_in_a_line_and_left_as_it_is(forks, folder, finished):
    run = aside(finished, folder)
    for path in [run, *run.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    before = contents(run)
    done = forks.run("resume", "run", "rounds=6", cwd=folder, prepare=["powerless"])
    assert done.status in (1, 2)
    assert done.err.count("\n") == 1
    assert "Permission denied" in done.err
    assert contents(run) == before
    done = forks.run("run", "c.yaml", "--out=new", cwd=folder, prepare=["powerless"])
    refused(done, "new: cannot be made: Permission denied")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
