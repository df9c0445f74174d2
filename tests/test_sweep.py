"""A sweep is its points' runs: as separate runs are, whatever trains them together, and however often stopped."""

import csv
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from safetensors.torch import load_file
from small_run import contents, left, write

from fedsim import Hook
from fedsim.errors import ConfigError
from fedsim.experiment.build import build_data
from fedsim.experiment.config import load, parse_overrides
from fedsim.sweep.folder import Sweep
from fedsim.sweep.grid import MAX_NAME_LENGTH, Grid, parse_grid, shown_value

COMMAND = [sys.executable, "-P", "-c", "from fedsim.cli import main; main()"]
ROWS = "vectorized"
DATA = {"name": "synthetic", "examples": 60, "test_examples": 30, "classes": 3, "clients": 5, "noise": 0.7}
PLAIN = {
    "data": DATA,
    "strategy": "fedavg",
    "evaluate": {"every": 1},
    "hooks": ["stop_on_non_finite", "tensorboard"],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a config in it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **PLAIN)
    return tmp_path


def points(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.is_dir())


def accuracies(folder):
    return {
        name: json.loads(Path(folder, name, "summary.json").read_text())["test_accuracy"]
        for name in points(folder)
    }


def assert_close(a, b):
    """Two runs' models and figures, up to rounding in float32."""
    one, other = (load_file(Path(run) / "model.safetensors") for run in (a, b))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)
    assert len(Path(a, "rounds.jsonl").read_text().splitlines()) == len(
        Path(b, "rounds.jsonl").read_text().splitlines()
    )


# The grid

scalars = st.one_of(
    st.integers(-100, 100),
    st.floats(-10, 10).map(lambda x: float(f"{x:.3g}")),
    st.booleans(),
    st.from_regex(r"[a-z]{3,6}", fullmatch=True).filter(
        lambda text: text not in ("null", "true", "false", "yes", "off")
    ),
)
values = st.lists(st.one_of(scalars, st.lists(scalars, max_size=3)), min_size=1, max_size=4)
keys = st.sampled_from(["seed", "local.lr", "strategy.lr", "local.epochs", "model.widths"])


@given(st.dictionaries(keys, values, min_size=1, max_size=4))
def test_a_grid_is_read_as_it_is_written(axes):
    axes = {key: list({yaml.safe_dump(v): v for v in each}.values()) for key, each in axes.items()}
    pairs = [
        f"{key}={','.join(yaml.safe_dump(v, default_flow_style=True).split(chr(10))[0] for v in each)}"
        for key, each in axes.items()
    ]
    swept = {key: each for key, each in axes.items() if len(each) > 1}
    if not swept:
        with pytest.raises(ConfigError, match="no key has several values"):
            parse_grid(pairs)
        return
    grid = parse_grid(pairs)
    assert grid.axes == swept
    assert grid.fixed == {key: each[0] for key, each in axes.items() if len(each) == 1}
    assert [list(point.values()) for point in grid.points] == [list(each) for each in product(*swept.values())]
    assert len(set(grid.names)) == len(grid.names) == len(grid.points)
    assert not any("/" in name or name.startswith(".") for name in grid.names)


def test_a_long_value_is_written_and_cut_once_and_not_for_each_point(monkeypatch):
    """Each of 10,000 names made of all of it would take minutes."""
    written = []
    monkeypatch.setattr("fedsim.sweep.grid.shown_value", lambda value: written.append(value) or shown_value(value))
    names = Grid({"seed": list(range(5000)), "text": ["a" * 200_000, "b"]}, {}).names
    assert (len(names), len(written)) == (len({*names}), 5002) == (10_000, 5002)
    assert max(map(len, names)) <= MAX_NAME_LENGTH


def test_ranges_lists_and_quotes():
    grid = parse_grid(["seed=0..2,7", "model.widths=[4,8],[8,16]", 'hooks=["a,b"],[]', "rounds=3"])
    assert grid.axes == {"seed": [0, 1, 2, 7], "model.widths": [[4, 8], [8, 16]], "hooks": [["a,b"], []]}
    assert grid.fixed == parse_overrides(["rounds=3"])
    assert grid.names[0] == "seed=0,widths=[4,-8],hooks=[a,b]"
    assert [parse_grid(["local.lr=0.1,1e-3", "strategy.lr=1,2"]).names[3]] == ["local.lr=0.001,strategy.lr=2"]
    assert shown_value(0.1) == "0.1"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["seed"], "'seed' should be KEY=VALUE or KEY=V1,V2,..., such as local.lr=0.05,0.1"),
        (["seed=1"], "sweep: no key has several values, such as local.lr=0.05,0.1; fedsim run does one run"),
        (["seed=0,1,1"], "seed: 1 is given twice"),
        (["seed=0,1", "seed=2,3"], "seed: is given twice; give all its values at once, as seed=V1,V2"),
        (["seed=0,,1"], "seed: a value is missing between commas"),
        (["seed=3..1"], "seed: 3..1 should go up, and hold at most 10,000 numbers"),
        (["seed=0..200", "local.lr=1..100"], "sweep: 20,100 points; at most 10,000 are allowed"),
        (["model.widths=[1,[2],3"], "model.widths: '[1,[2],3': is not YAML: expected ',' or ']'"),
        (["seed=0,1", "local.lr=0.1,-1"], "seed=0,lr=-1: local.lr: -1 should be a number > 0"),
        (["seed=0,1", "local.momentum=0,0.9", "local.optimizer=adam"],
         "seed=0,momentum=0.9: local.momentum: belongs to sgd; adam has local.betas"),
        (["data.clients=5,100"], "clients=100: "),
        (["strategy=fedavg,fedprox", "strategy.mu=0,1"],
         "strategy.mu: strategy is swept too; sweep one of them, or give strategy mappings as values"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_anything_is_written(place, fedsim_, pairs, message):
    before = contents(place)
    done = fedsim_("sweep", "c.yaml", *pairs)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"fedsim: {message}")
    assert len(done.err.splitlines()) == 1
    assert contents(place) == before


# Points in turn


def test_points_are_what_single_runs_leave(place, fedsim_):
    done = fedsim_("sweep", "c.yaml", "local.lr=0.05,0.1", "strategy=fedavg,scaffold", "--jobs=1", "--target=0.5")
    assert (done.status, done.err) == (0, "")
    folder = Path("runs/c-sweep-1")
    assert points(folder) == [f"lr={lr},strategy={s}" for lr in (0.05, 0.1) for s in ("fedavg", "scaffold")]
    assert fedsim_("run", "c.yaml", "local.lr=0.1", "strategy=scaffold", "--out=alone").status == 0
    assert left(folder / "lr=0.1,strategy=scaffold") == left(Path("alone"))
    assert max(map(cell_len, done.out.splitlines())) <= 80
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    found = json.loads((folder / "sweep.json").read_text())
    assert [row["point"] for row in rows] == [row["point"] for row in found["points"]]
    assert {row["point"]: float(row["test_accuracy"]) for row in rows} == accuracies(folder)
    best = max(accuracies(folder).values())
    assert accuracies(folder)[found["best"]] == best
    assert "* the best last accuracy" in done.out


def test_seeds_have_a_mean_and_a_deviation(place, fedsim_):
    done = fedsim_("sweep", "c.yaml", "local.lr=0.05,0.1", "seed=0..2", "rounds=2", "--jobs=1", "--out=s")
    assert (done.status, done.err) == (0, "")
    for row in json.loads(Path("s/sweep.json").read_text())["over_seeds"]:
        of_seeds = [accuracies("s")[f"lr={row['local.lr']},seed={seed}"] for seed in range(3)]
        assert row["test_accuracy"]["mean"] == pytest.approx(np.mean(of_seeds))
        assert row["test_accuracy"]["std"] == pytest.approx(np.std(of_seeds, ddof=1))
    assert max(map(cell_len, done.out.splitlines())) <= 80


def test_a_point_that_fails_is_a_row_and_the_others_go_on(place, fedsim_):
    done = fedsim_("sweep", "c.yaml", "local.lr=1e30,0.05", "--jobs=1", "--out=s")
    assert (done.status, done.err) == (0, "")
    good, bad = sorted(json.loads(Path("s/sweep.json").read_text())["points"], key=lambda row: row["local.lr"])
    assert bad["failure"].startswith("round 1, client ")
    assert (good["failure"], good["rounds_to_target"]) == (None, None)
    assert "failed: round 1, client" in done.out
    assert fedsim_("sweep", "c.yaml", "local.lr=1e30,1e29", "--jobs=1", "--out=none").status == 1


def test_the_partition_can_stay_while_the_seed_changes(place):
    owners = [build_data(load("c.yaml", {"seed": seed, "data.partition_seed": 4})).owners for seed in (0, 1)]
    assert np.array_equal(*owners)
    assert np.array_equal(owners[0], build_data(load("c.yaml", {"seed": 4})).owners)
    assert not np.array_equal(owners[0], build_data(load("c.yaml", {"seed": 0})).owners)


# Stopped and gone on with


@dataclass(kw_only=True)
class InterruptOnce(Hook):
    """Ctrl-C in round `at`, until there is a file that says it was."""

    at: int

    def before_round(self, run):
        if run.simulation.number + 1 == self.at and not Path("interrupted").exists():
            Path("interrupted").touch()
            signal.raise_signal(signal.SIGINT)


TOLD = "fedsim: hooks[{}].name: imports test_sweep, which is not fedsim's: " + __file__ + "\n"


@pytest.mark.parametrize("runtime", ["serial", ROWS])
def test_an_interrupted_sweep_goes_on(place, fedsim_, runtime):
    command = ["c.yaml", "local.lr=0.05,0.1", f"runtime={runtime}", "--jobs=1"]
    hooks = ["tensorboard", {"name": "test_sweep:InterruptOnce", "at": 3}]
    write(place, **PLAIN | {"hooks": hooks})
    done = fedsim_("sweep", *command, "--out=s")
    assert done.status == 130
    line = "fedsim: interrupted with 0 of 2 points done; fedsim resume s goes on\n"
    assert done.err == TOLD.format(1) + line
    again = fedsim_("sweep", *command, "--out=s")
    assert (again.status, again.err) == (0, TOLD.format(1))
    assert fedsim_("sweep", *command, "--out=whole").status == 0
    for name in points("whole"):
        assert left(Path("s", name))["rounds"] == left(Path("whole", name))["rounds"]
    once_more = fedsim_("sweep", *command, "--out=s")
    assert once_more.status == 0
    assert "2 of 2 points are finished already" in once_more.out


def test_a_killed_sweep_goes_on(place, fedsim_):
    command = ["sweep", "c.yaml", "local.lr=0.05,0.1,0.2", f"runtime={ROWS}", "rounds=6", "--jobs=1"]
    with subprocess.Popen(
        [*COMMAND, *command, "--out=s"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while not (log := Path("s/lr=0.1/rounds.jsonl")).exists() or log.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    done = fedsim_(*command, "--out=s")
    assert (done.status, done.err) == (0, "")
    assert fedsim_(*command, "--out=whole").status == 0
    for name in points("whole"):
        assert left(Path("s", name))["rounds"] == left(Path("whole", name))["rounds"]


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_rows_go_on_from_one_round(place, fedsim_, lost):
    """As after a kill between two points' checkpoints: the bits depend on who trains beside whom."""
    command = ["sweep", "c.yaml", "local.lr=0.05,0.1,0.2", f"runtime={ROWS}", "rounds=6", "--jobs=1"]
    assert fedsim_(*command, "checkpoint={keep: 9, every: 1}", "--out=s").status == 0
    before = {name: left(Path("s", name))["rounds"] for name in points("s")}
    for done, name in zip((4, 4, 4 - lost), points("s"), strict=True):
        Path("s", name, "summary.json").unlink()
        for path in Path("s", name, "checkpoints").glob("*.json"):
            if int(path.stem) > done:
                path.unlink()
    assert fedsim_("resume", "s").status == 0
    after = {name: left(Path("s", name))["rounds"] for name in points("s")}
    assert after == before


def test_a_folder_of_something_else_is_refused(place, fedsim_):
    assert fedsim_("sweep", "c.yaml", "seed=0,1", "rounds=1", "--jobs=1", "--out=s").status == 0
    Path("other").mkdir()
    before = contents(place)
    for arguments, message in [
        (["sweep", "c.yaml", "seed=0,2", "rounds=1", "--out=s"],
         "s: holds another sweep, grid.seed: [0, 2], and was [0, 1]; name another folder"),
        (["sweep", "c.yaml", "seed=0,1", "rounds=2", "--out=s"],
         "s: holds another sweep, settings.rounds: 2, and was 1; name another folder"),
        (["sweep", "c.yaml", "seed=0,1", "--out=other"], "other: exists, and holds no sweep; name another folder"),
        (["resume", "s", "rounds=2"],
         "s: is a sweep, whose settings are in its sweep.yaml; resume it without others"),
    ]:  # fmt: skip
        done = fedsim_(*arguments)
        assert (done.status, done.out, done.err) == (2, "", f"fedsim: {message}\n")
    assert contents(place) == before


def test_whoever_comes_second_finds_a_whole_sweep(place):
    """And nothing of what the others began is left."""
    sweep = Sweep(place / "s", {"rounds": 1}, parse_grid(["seed=0,1"]))
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(sweep.save) for _ in range(32)]:
            future.result()
    assert [*contents(place / "s")] == [Path("sweep.yaml")]
    assert sorted(path.name for path in place.iterdir()) == ["c.yaml", "s"]


@pytest.mark.parametrize(
    "broken",
    [
        *({"target": "much"}, {"target": 1e400}, {"grid": {"seed": []}}, {"grid": {3: [1, 2]}}, {"settings": 3}),
        {"settings": {3: 1}},
    ],
    ids=str,
)
def test_a_broken_sweep_is_one_line(place, fedsim_, broken):
    Sweep(place / "s", {"rounds": 1}, parse_grid(["seed=0,1"])).save()
    path = place / "s/sweep.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | broken))
    done = fedsim_("resume", "s")
    assert (done.status, done.err) == (2, "fedsim: s/sweep.yaml: broken: should hold config, settings and grid\n")


def test_a_point_that_is_a_link_to_another_run_is_refused(place, fedsim_):
    assert fedsim_("sweep", "c.yaml", "seed=0,1", "rounds=1", "--jobs=1", "--out=s").status == 0
    Path("s/seed=1").rename("other")
    Path("s/seed=1").symlink_to(place / "other")
    before = contents(place)
    done = fedsim_("resume", "s")
    assert done.status == 2
    assert done.err == "fedsim: s/seed=1: is a symbolic link, and should be a folder of its own\n"
    assert contents(place) == before


def test_a_point_of_another_config_or_of_code_is_refused_before_any_runs(place, fedsim_):
    """Ray tasks take the config of a point that has begun out of its own folder."""
    assert fedsim_("sweep", "c.yaml", "seed=0,1", "rounds=1", "--jobs=1", "--out=s").status == 0
    Path("s/sweep.json").unlink()
    Path("s/seed=1/summary.json").unlink()
    path = Path("s/seed=1/config.yaml")
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"local": config["local"] | {"lr": 0.7}}))
    done = fedsim_("resume", "s")
    assert done.status == 2
    assert "s/seed=1/config.yaml: is not this sweep's: local.lr: 0.7" in done.err
    path.write_text(yaml.safe_dump(config | {"hooks": ["no_such_module:Hook"]}))
    done = fedsim_("resume", "--no-code", "s")
    assert done.status == 2
    assert "no_such_module:Hook is code that does not come with fedsim" in done.err


# The runtime that is chosen


def test_a_sweep_says_what_its_points_chose(place, fedsim_, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    done = fedsim_("sweep", "c.yaml", "local.lr=0.05,0.1", "rounds=1", "runtime=auto", "--jobs=1")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[1].startswith("runtime: ")
    assert logging.getLogger("fedsim").handlers == []


def test_rows_that_were_chosen_go_on_as_what_they_were(place, fedsim_, monkeypatch):
    monkeypatch.setattr("fedsim.sweep._on_gpu", lambda device: True)
    write(place, **PLAIN | {"hooks": [{"name": "test_sweep:InterruptOnce", "at": 3}]})
    assert fedsim_("sweep", "c.yaml", "seed=0,1", "data.partition_seed=0", "runtime=auto", "--out=s").status == 130
    done = fedsim_("resume", "s")
    assert (done.status, done.err) == (0, TOLD.format(0))
    assert done.out.startswith("2 points as rows of one vectorized batch")
    assert "changed" not in done.out


# Rows of one batch


@pytest.mark.parametrize("strategy", [pytest.param("fedavg", marks=pytest.mark.slow), "scaffold"])
def test_rows_of_a_batch_are_what_runs_apart_are(place, fedsim_, strategy):
    settings = [f"strategy={strategy}", "data.partition_seed=1", "data.holdout=0.2", "evaluate.clients=true"]
    grid = ["local.lr=0.05,0.1", "seed=0,1"]
    done = fedsim_("sweep", "c.yaml", *grid, *settings, f"runtime={ROWS}", "--out=rows")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("4 points as rows of one vectorized batch")
    assert fedsim_("sweep", "c.yaml", *grid, *settings, "--jobs=1", "--out=apart").status == 0
    assert len(points("rows")) == 4
    for name in points("rows"):
        assert_close(Path("rows", name), Path("apart", name))


def test_rows_end_each_in_its_own_time(place, fedsim_):
    """One fails in its first round, one has fewer rounds, and the third is as it is alone."""
    grid = ["local.lr=0.05,1e30", "rounds=1,4", f"runtime={ROWS}"]
    done = fedsim_("sweep", "c.yaml", *grid, "local.schedule=constant", "--out=s")
    assert (done.status, done.err) == (0, "")
    failures = {row["point"]: row["failure"] for row in json.loads(Path("s/sweep.json").read_text())["points"]}
    assert [name for name, failure in failures.items() if failure] == ["lr=1e+30,rounds=1", "lr=1e+30,rounds=4"]
    assert fedsim_("run", "c.yaml", "rounds=4", "--out=alone").status == 0
    assert_close("s/lr=0.05,rounds=4", "alone")


def test_a_point_of_a_batch_can_be_made_longer(place, fedsim_):
    grid = ["local.lr=0.05,0.1", f"runtime={ROWS}"]
    assert fedsim_("sweep", "c.yaml", *grid, "--out=s").status == 0
    assert fedsim_("resume", "s/lr=0.1", "rounds=6").status == 0
    assert fedsim_("compare", "s/lr=0.05", "s/lr=0.1").status == 0
    assert "2 of 2 points are finished already" in fedsim_("resume", "s").out


# Ray tasks


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of processes that Ray lets go of as it shuts down
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_tasks_are_what_single_runs_leave(place, fedsim_):
    pytest.importorskip("ray")
    before = os.sched_getaffinity(0)
    done = fedsim_("sweep", "c.yaml", "local.lr=0.05,1e30", "rounds=2", "--jobs=2", "--out=s")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("2 points as Ray tasks, 2 at a time: runtime serial trains each by itself\n")
    assert "failed: round 1, client" in done.out
    assert os.sched_getaffinity(0) == before
    assert fedsim_("run", "c.yaml", "rounds=2", "--out=alone").status == 0
    assert left(Path("s/lr=0.05")) == left(Path("alone"))
    gc.collect()
