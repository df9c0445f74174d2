"""`fedsim check`: a folder that a run left is whole, and with anything changed in it, it is not."""

import hashlib
import json
import os
import shutil
import struct
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import CONFIG, contents, write

import fedsim
from fedsim import ConfigError, Hook
from fedsim.base.files import create, locked
from fedsim.base.own_code import Rule, own_code, unread
from fedsim.cli.commands import COMMANDS, READ_CONFIGS
from fedsim.experiment import model_file
from fedsim.experiment.check import check_run
from fedsim.experiment.round_log import read_rounds
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.training.layout import Order

ALL = CONFIG | {"ema": 0.9, "hooks": ["tensorboard", "curves"]}
MEASURED = ("seconds", "peak_memory_bytes")  # of summary.json, which nothing else says


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished run; nobody changes it."""
    folder = tmp_path_factory.mktemp("done") / "run"
    fedsim.run(ALL, out=folder)
    return folder


@pytest.fixture
def run(done, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(done, tmp_path / "run"))


def faults(folder):
    return {part.name: part.about for part in check_run(folder).faults}


def test_a_finished_run_is_whole_and_stays_as_it_is(fedsim_, run):
    before = contents(run), [(path, path.stat().st_mtime_ns) for path in sorted(run.rglob("*"))]
    shown = fedsim_("check", run)
    assert (shown.status, shown.err) == (0, "")
    *table, verdict, way = shown.out.splitlines()
    assert verdict == "whole: 4 rounds, finished"
    assert way == f"next: nothing is needed; fedsim resume {run} rounds=N makes it longer"
    assert max(map(len, table)) <= 80
    assert before == (contents(run), [(path, path.stat().st_mtime_ns) for path in sorted(run.rglob("*"))])
    found = json.loads(fedsim_("check", run, "--json").out)
    assert (found["whole"], found["state"], found["rounds"], found["resumable"]) == (True, "finished", 4, [4, 3])
    assert (found["usable"], f"next: {found['next']}") == (True, way)
    assert {part["state"] for part in found["parts"]} == {"whole"}
    numbers = {part["name"]: part["numbers"] for part in found["parts"] if part["numbers"]}
    assert numbers == {
        "partition.json": {"clients": 5, "examples": 60},
        "rounds.jsonl": {"rounds": 4},
        "checkpoints/000004.json": {"round": 4, "client_files": 3},
        "checkpoints/000003.json": {"round": 3, "client_files": 3},
        "model.safetensors": {"round": 4},
        "ema.safetensors": {"round": 4},
        "tensorboard/": {"rounds": 4},
        "summary.json": {"rounds": 4},
    }


def meaning(name, content):
    """What is told of a file: other bytes may say the same, and what is measured cannot be checked."""
    if content is None or not name.endswith((".json", ".yaml", ".jsonl")):
        return content
    try:
        values = yaml.safe_load(content) if name == "config.yaml" else json.loads(content)
    except ValueError:
        return content
    if name == "summary.json" and isinstance(values, dict):
        return {key: isinstance(value, float | int) if key in MEASURED else value for key, value in values.items()}
    return values


def seen(folder):
    """Each part with what is said of it."""
    return {(part.name, part.state, part.about) for part in check_run(folder).parts}


def part_of(name):
    """The part that a file is."""
    return "tensorboard/" if name.startswith("tensorboard") else name


@settings(max_examples=30)
@given(st.data())
def test_a_byte_that_changes_is_noticed_in_every_file_and_blamed_on_no_other(done, tmp_path_factory, data):
    """A flipped bit, a lost byte, a file that is cut, a file that is gone."""
    files = [path for path in sorted(done.rglob("*")) if path.is_file() and path.name != ".lock"]
    path = data.draw(st.sampled_from(files), "file")
    content, name = path.read_bytes(), path.name
    at, bit = data.draw(st.integers(0, len(content) - 1), "at"), data.draw(st.integers(0, 7), "bit")
    flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    other = data.draw(st.sampled_from([flipped, content[:at] + content[at + 1 :], content[:at], None]), "other")
    folder = Path(shutil.copytree(done, tmp_path_factory.mktemp("damaged") / "run"))
    changed = folder / path.relative_to(done)
    changed.unlink()
    if other is not None:
        changed.write_bytes(other)
    if (name, other) == ("config.yaml", None):
        with pytest.raises(ConfigError, match=r"it has no config\.yaml"):
            check_run(folder)
    else:
        assert damaged(folder) <= {part_of(str(path.relative_to(done)))}
        assert seen(folder) != seen(done) or meaning(name, other) == meaning(name, content)
    shutil.rmtree(folder)


def damaged(folder):
    return {part.name for part in check_run(folder).parts if part.damaged}


def same_length(content):
    """One digit is another one, in the middle; of bytes, one bit."""
    digits = [at for at in range(len(content) // 2, len(content)) if content[at : at + 1].isdigit()]
    at = digits[0]
    return content[:at] + (b"1" if content[at : at + 1] != b"1" else b"2") + content[at + 1 :]


@pytest.mark.parametrize("how", [same_length, lambda content: content[:-30], lambda content: None])
def test_each_single_damage_names_the_damaged_part_alone(done, run, how):
    """Once: what could not be compared because of it is not checked, and no fault."""
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or name in (".lock", "config.yaml"):
            continue
        content = path.read_bytes()
        path.unlink()
        if (other := how(content)) is not None:
            path.write_bytes(other)
        found = check_run(run)
        if (name, other) == ("summary.json", None):  # as where the run was killed before it
            assert found.verdict == "whole: 4 of 4 rounds, interrupted"
        else:
            assert [part.name for part in found.parts if part.damaged] == [part_of(name)]
            assert found.verdict.count(" is ") == 1
        path.write_bytes(content)
    assert seen(run) == seen(done)


def test_of_two_files_that_disagree_the_one_whose_hash_holds_is_right(run):
    """A digit of an early round, in a file of the same length."""
    log = run / "rounds.jsonl"
    log.write_text(log.read_text().replace('"steps": 6', '"steps": 7', 1))
    found = check_run(run)
    assert faults(run) == {"rounds.jsonl": "has changed since the checkpoint of round 3"}
    others = {part.name: (part.state, part.about) for part in found.parts if part.state != "whole"}
    del others["rounds.jsonl"]
    assert others == {
        "checkpoints/000004.json": ("unusable", "rounds.jsonl is broken"),
        "checkpoints/000003.json": ("unusable", "rounds.jsonl is broken"),
        "tensorboard/": ("not checked", "rounds.jsonl is broken"),
        "summary.json": ("not checked", "rounds.jsonl is broken"),
    }
    assert found.next == (
        "copy rounds.jsonl again from where the run was; "
        "without that, it cannot be resumed: no checkpoint can be used"
    )
    lines = log.read_text().replace('"steps": 7', '"steps": 6', 1).splitlines()
    log.write_text("\n".join([*lines[:3], lines[3].replace('"steps": 6', '"steps": 7', 1), ""]))
    assert faults(run) == {
        "rounds.jsonl": "has changed since the checkpoint of round 4; its first 3 lines are right"
    }
    assert check_run(run).resumable == [3]


@pytest.mark.parametrize(
    "name",
    ["partition.json", "model.safetensors", "ema.safetensors", "curves.png", "tensorboard/", "summary.json"],
)
def test_what_a_resume_is_said_to_write_anew_it_writes(run, name):
    path = next((run / name).iterdir()) if name.endswith("/") else run / name
    path.write_bytes(path.read_bytes()[:-3])
    found, way = check_run(run), f"fedsim resume {run} writes {name} anew"
    if name in ("curves.png", "tensorboard/"):  # they repeat rounds.jsonl
        assert found.verdict == f"usable: 4 rounds, finished; {name} is broken, and not needed"
        assert found.next == f"nothing is needed; {way}"
    else:
        assert found.next == f"copy {name} again from where the run was; without that, {way}"
    fedsim.resume(run)
    assert check_run(run).verdict == "whole: 4 rounds, finished"


def test_a_picture_and_events_that_could_not_be_written_leave_the_run_usable(run):
    """As on a full disk, or killed after the summary: the command's own status was 0."""
    (run / "curves.png").unlink()
    (events,) = (run / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes() + bytes(10_000))
    found = check_run(run)
    assert found.verdict == (
        "usable: 4 rounds, finished; curves.png is missing; tensorboard/ is broken, and not needed"
    )
    assert found.next == f"nothing is needed; fedsim resume {run} writes curves.png, tensorboard/ anew"
    about = {part.name: part.about for part in found.spares}["tensorboard/"]
    assert about.endswith("more than the events of 4 rounds take")  # TensorBoard's check sum is slow
    fedsim.resume(run)
    assert check_run(run).verdict == "whole: 4 rounds, finished"


def test_a_run_that_a_hook_ended_has_no_rounds_left(tmp_path):
    hooks = [{"name": "early_stopping", "patience": 1, "min_delta": 0.9}]
    run = fedsim.run(ALL | {"hooks": hooks, "evaluate": {"every": 1}}, out=tmp_path / "run").folder
    found = check_run(run)
    assert (found.rounds, found.planned, found.verdict) == (2, 4, "whole: 2 rounds, finished")
    assert found.next == f"nothing is needed; fedsim resume {run} rounds=N makes it longer"
    (run / "summary.json").unlink()
    assert check_run(run).next == f"fedsim resume {run} writes its summary"


def test_an_older_checkpoint_that_is_damaged_leaves_the_run_usable(fedsim_, run):
    for name in ("server-000003.safetensors", "000003.json"):
        (run / "checkpoints" / name).write_bytes(b"")
        shown = fedsim_("check", run)
        assert shown.status == 0
        assert shown.out.splitlines()[-2].startswith(f"usable: 4 rounds, finished; checkpoints/{name} is broken")
    found = json.loads(fedsim_("check", run, "--json").out)
    assert (found["whole"], found["usable"], found["resumable"]) == (False, True, [4])
    with pytest.warns(UserWarning, match="rounds: 6, and was 4"):
        fedsim.resume(run, {"rounds": 6})
    assert check_run(run).verdict == "whole: 6 rounds, finished"


def test_rounds_too_many_to_read_are_still_hashed(run, monkeypatch):
    monkeypatch.setattr("fedsim.experiment.check.MAX_BYTES", 1500)
    found = check_run(run)
    log = next(part for part in found.parts if part.name == "rounds.jsonl")
    assert (log.state, found.rounds, found.resumable) == ("not checked", 4, [4, 3])
    assert log.about == "is larger than 1500 bytes; its lines were not read, and checkpoints agree with it"
    (run / "rounds.jsonl").write_bytes(same_length((run / "rounds.jsonl").read_bytes()))
    assert faults(run)["rounds.jsonl"].startswith("has changed since the checkpoint of round 3")


# How it ended


class Stop(Hook):
    """Ctrl-C in the middle of the second round's end."""

    def after_round(self, run, record):
        if record["round"] == 2:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(tmp_path):
    return fedsim.run(ALL, out=tmp_path / "run", hooks=[Stop()]).folder


def test_a_run_that_was_interrupted_is_whole(fedsim_, interrupted):
    shown = fedsim_("check", interrupted)
    assert shown.status == 0
    assert shown.out.splitlines()[-2:] == [
        "whole: 2 of 4 rounds, interrupted",
        f"next: fedsim resume {interrupted} continues after round 2",
    ]
    fedsim.resume(interrupted)
    assert check_run(interrupted).verdict == "whole: 4 rounds, finished"


def test_a_run_that_was_killed_is_whole_where_it_can_be_resumed(interrupted):
    """As in its third round, with half a line written; what an earlier process left is of no harm."""
    with (interrupted / "rounds.jsonl").open("a") as log:
        log.write('{"round": 3, "coh')
    (interrupted / "checkpoints" / "server-000003.safetensors").write_bytes(b"of no checkpoint")
    for model in (True, False):
        if not model:
            (interrupted / "model.safetensors").unlink()
        found = check_run(interrupted)
        assert found.verdict == "whole: 2 of 4 rounds, killed"
        assert found.next == f"fedsim resume {interrupted} continues after round 2"
        assert [part.name for part in found.parts if part.state == "left over"] == [
            "checkpoints/server-000003.safetensors"
        ]


def test_a_run_that_goes_on_is_said_to_and_not_disturbed(interrupted):
    lock = locked(interrupted)
    assert check_run(interrupted).verdict == "whole: 2 of 4 rounds, running"
    lock.release()
    assert check_run(interrupted).state == "interrupted"
    locked(interrupted).release()  # nobody holds it


def test_without_its_summary_a_run_was_killed_before_it_and_a_resume_writes_it(run):
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    found = check_run(run)
    assert (found.verdict, found.faults) == ("whole: 4 of 4 rounds, interrupted", [])
    assert (found.parts[-1].name, found.parts[-1].state) == ("summary.json", "not written")
    assert found.next == f"fedsim resume {run} writes its summary"
    fedsim.resume(run)
    assert check_run(run).verdict == "whole: 4 rounds, finished"
    assert json.loads((run / "summary.json").read_text())["fingerprint"] == before["fingerprint"]


def test_before_its_first_checkpoint_a_run_starts_over(tmp_path):
    run = fedsim.run(ALL | {"rounds": 1}, out=tmp_path / "run").folder
    for path in run.iterdir():
        if path.name not in ("config.yaml", "partition.json", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "rounds.jsonl").touch()
    found = check_run(run)
    assert found.verdict == "whole: 0 of 1 rounds, killed"
    assert found.next == f"fedsim resume {run} starts with round 1"
    assert fedsim.resume(run).summary["rounds"] == 1


class Fails(Hook):
    """Ends a run at its start, or in its first round."""

    priority = 10

    def __init__(self, event):
        super().__init__()
        setattr(self, event, self.end)

    def end(self, *about):
        raise OSError("no")


@pytest.mark.filterwarnings("ignore:changed. rounds")
@pytest.mark.parametrize("event", ["before_run", "before_round", "before_evaluation", "after_round"])
def test_an_extension_that_fails_leaves_a_finished_run_finished_until_a_round_is_done(run, event):
    with pytest.raises(fedsim.RoundError):
        fedsim.resume(run, {"rounds": 5}, hooks=[Fails(event)])
    found = check_run(run)
    done = event == "after_round"
    if done:  # five of five, and its results are not written
        assert found.verdict == "whole: 5 of 5 rounds, interrupted"
    else:
        assert found.verdict == "whole: 4 rounds, finished"
        trained = 5 if event == "before_evaluation" else 4
        assert found.next == f"nothing is needed; fedsim resume {run} continues after round {trained}"
    assert fedsim.resume(run).summary["rounds"] == 5
    assert check_run(run).verdict == "whole: 5 rounds, finished"


@pytest.mark.parametrize("settings", [{"no.such": 1}, {"local.lr": 0.5}, {"local.schedule": "no.such:thing"}])
def test_an_extension_that_is_refused_changes_nothing(run, settings):
    before = contents(run)
    with pytest.raises(ConfigError):
        fedsim.resume(run, {"rounds": 5} | settings)
    assert contents(run) == before


def test_of_a_broken_checkpoint_the_one_before_is_named(fedsim_, run):
    server = run / "checkpoints" / "server-000004.safetensors"
    size = server.stat().st_size
    server.write_bytes(b"")
    assert faults(run) == {
        "checkpoints/server-000004.safetensors": f"has 0 bytes; it should have {size}",
    }
    shown = fedsim_("check", run)
    assert (shown.status, shown.err) == (1, "")
    assert shown.out.splitlines()[-2] == "broken: checkpoints/server-000004.safetensors is broken"
    assert shown.out.endswith(f"; without that, fedsim resume {run} continues after round 3\n")


# Folders of strangers


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "rounds.jsonl", "summary.json", "model.safetensors", "checkpoints/000004.json", "tensorboard"],
)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_neither_followed_nor_waited_for(run, name, kind):
    path = run / name
    path.rename(kept := run.parent / "kept")
    if kind == "link":
        path.symlink_to(kept)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    found = damaged(run) if (kind, name) == ("folder", "tensorboard") else faults(run)  # one that is its own
    assert {part for part in found if part.rstrip("/") == name}


def test_a_round_that_cannot_be_is_named_by_its_line(run):
    lines = (run / "rounds.jsonl").read_text().splitlines()
    wrong = [("round", 7), ("cohort", [1, 1]), ("cohort", [9]), ("clock", -1.0), ("fingerprint", "x")]
    for key, value in [*wrong, ("test_accuracy", "x")]:
        third = json.dumps(json.loads(lines[2]) | {key: value})
        (run / "rounds.jsonl").write_text("\n".join([*lines[:2], third, lines[3], ""]))
        assert faults(run)["rounds.jsonl"].startswith("line 3: ")


def craft(run, change, name="000004.json"):
    """Have a checkpoint say something else, and be believed."""
    path = run / "checkpoints" / name
    change(values := json.loads(path.read_text())["checkpoint"])
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "checkpoint": values}))


def test_a_checkpoint_of_other_settings_is_none_to_resume(run):
    craft(run, lambda values: values["config"]["local"].update(lr=0.5))
    assert "local.lr" in faults(run)["config.yaml"]
    assert check_run(run).resumable == []  # a resume takes the newest, and refuses it


@pytest.mark.parametrize("line", ["2020-01-01: 3", "3: 3", "seed: 2020-01-01", "seed: .nan"])
def test_a_config_of_what_json_does_not_have_is_broken(run, line):
    path = run / "config.yaml"
    path.write_text(
        "\n".join(each for each in path.read_text().splitlines() if each[:4] != "seed") + f"\n{line}\n"
    )
    assert "config.yaml" in faults(run)


def test_of_very_many_checkpoints_the_newest_are_read(run, monkeypatch):
    monkeypatch.setattr("fedsim.experiment.check_checkpoints.MAX_CHECKPOINTS", 1)
    found = check_run(run)
    assert (found.faults, found.resumable) == ([], [4])
    older = next(part for part in found.parts if part.state == "not checked")
    assert older.name == "checkpoints/000003.json"


def test_a_checkpoint_too_large_to_read_can_be_resumed_where_its_hashes_agree(run, monkeypatch):
    monkeypatch.setattr("fedsim.experiment.check_files.memory", lambda: 2)
    found = check_run(run)
    assert (found.faults, found.resumable) == ([], [4, 3])
    assert all(
        "model was not compared" in part.about for part in found.parts if part.name.startswith("checkpoints/")
    )


def test_after_its_end_a_run_on_nodes_goes_on_from_its_end_alone(tmp_path):
    """As nodes delete what they keep for earlier checkpoints."""
    run = fedsim.run(ALL | {"strategy": "scaffold"}, out=tmp_path / "run").folder
    for name in ("000004.json", "000003.json"):
        about = {"name": "flower", "run": "0" * 32, "nodes": [*"abcde"], "sizes": [1] * 5}
        craft(run, lambda values, about=about: values.update(runtime=about), name)
    assert check_run(run).resumable == [4]


@pytest.mark.parametrize(
    ("nodes", "said"), [("abcde", ""), ("aacde", "each node once"), ("abc", "each node once"), (None, "its nodes")]
)
def test_a_run_on_nodes_names_each_of_them(run, nodes, said):
    names = nodes and [*nodes]
    about = {"name": "flower", "run": "0" * 32, "nodes": names, "sizes": [1] * len(nodes or "")}
    craft(run, lambda values: values.update(runtime=about))
    (part,) = (part for part in check_run(run).parts if part.name == "checkpoints/000004.json")
    assert (part.state, said in part.about) == ("broken" if said else "whole", True)
    assert said or part.about.endswith("; what 5 nodes keep of it lies there, not checked")


def test_a_file_that_many_checkpoints_name_is_hashed_once(run):
    craft(run, lambda values: values.update(clients=values["clients"] * 10_000))
    seen = []
    check_run(run, lambda done, total: seen.append((done, total)))
    assert len(seen) <= len([*run.glob("checkpoints/*.safetensors")])
    assert seen[-1][0] == seen[-1][1]


# Code of strangers

MARK = "with open({!r}, 'a') as marker: marker.write({!r})\n"
MINE = "from fedsim.strategies.averaging.fedavg import FedAvg\nclass Mine(FedAvg): pass\n"
NAMES = {  # a place in a config for each catalogue, and what else an entry there needs
    "data": {"name": "NAME", "clients": 4},
    "data.partition": "NAME",
    "model": "NAME",
    "strategy": {"name": "personal", "layers": ["fc*"], "inner": {"name": "NAME"}},
    "cohort": "NAME",
    "local.schedule": "NAME",
    "local.loss": {"name": "NAME", "any": 3},
    "local.augment": [{"name": "flip"}, "NAME"],
    "local.distillation": {"teacher": "t.safetensors", "model": "NAME"},
    "runtime": "NAME",
    "hooks": ["NAME"],
}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Is there once the code of mine/code.py has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "mine.code"):  # of an earlier test
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mine").mkdir()
    marker = str(tmp_path / "marker")
    (tmp_path / "mine" / "__init__.py").write_text(MARK.format(marker, "p"))
    (tmp_path / "mine" / "code.py").write_text(MARK.format(marker, "x") + MINE)
    write(tmp_path, rounds=1)
    return tmp_path / "marker"


@pytest.mark.parametrize("key", NAMES)
def test_no_code_of_a_config_is_imported_wherever_it_is_named(fedsim_, marker, key):
    commands = [["serve"], ["partition"], ["bench"], ["app", "--out=app"], ["sweep", "seed=0,1"], ["run"]]
    for name in ("mine.code:Mine", "fedsim.strategies.averaging.fedavg:FedAvg", "os:getcwd"):
        value = json.dumps(NAMES[key]).replace("NAME", name)
        for command, *more in commands:
            refused = fedsim_(command, "c.yaml", "--no-code", *more, f"{key}={value}")
            assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1), refused
            assert f"{name} is code that does not come with fedsim, and such code is refused" in refused.err
        assert fedsim_("sweep", "c.yaml", "--no-code", f"{key}=[{value}],{value}").status == 2
        commands = commands[-1:]
    assert not marker.exists()


def test_code_of_a_config_is_announced_before_it_is_imported(fedsim_, marker, tmp_path):
    run = fedsim_("run", "c.yaml", "strategy=mine.code:Mine", "model={name: 2nn}", "--out=run")
    told = (
        f"fedsim: strategy.name: imports mine.code, which is not fedsim's: "
        f"{tmp_path}/mine/__init__.py, {tmp_path}/mine/code.py\n"
    )
    assert (run.status, run.err) == (0, told)
    assert marker.read_text() == "px"
    found = check_run(tmp_path / "run")
    assert found.parts[0].about == "names mine.code:Mine, which was not imported"
    assert not found.faults
    del sys.modules["mine.code"], sys.modules["mine"]
    for command in (["resume", "run"], ["export", "run"], ["profile", "--runs", "run"]):
        refused = fedsim_(*command, "--no-code")
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert "mine.code" not in sys.modules
    assert fedsim_("resume", "run").err == told
    assert marker.read_text() == "pxpx"
    assert fedsim.run(yaml.safe_load(Path("c.yaml").read_text()), {"strategy": "mine.code:Mine"}).rounds


@pytest.mark.parametrize(
    "setting", [{"data": {"name": "mine.code:source"}}, {"allow": {"strategies": ["mine.code:Mine"]}}]
)
def test_no_code_of_a_node_s_file_is_imported(fedsim_, marker, tmp_path, setting):
    pytest.importorskip("flwr")
    data = {"name": "synthetic", "examples": 8, "test_examples": 2, "classes": 2}
    write_settings = {"name": "a", "data": data, "state": "states", "insecure": True} | setting
    (tmp_path / "node.yaml").write_text(json.dumps(write_settings))
    refused = fedsim_("node", "node.yaml", "--no-code")
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1), refused
    assert "is code that does not come with fedsim, and such code is refused" in refused.err
    assert not marker.exists()


def test_the_commands_without_the_option_import_nothing_that_a_run_names(fedsim_, marker, tmp_path):
    """And `list` only what is named in its own arguments."""
    values = {"strategy": "mine.code:Mine", "model": "mine.code:net"}
    write(tmp_path, rounds=1, **values)
    done = fedsim_("run", "c.yaml", "strategy=fedavg", "model=2nn", "--out=run")
    assert done.status == 0
    config = tmp_path / "run" / "config.yaml"
    about = {"name": "flower", "superlink": "127.0.0.1:1", "insecure": True}
    config.write_text(json.dumps(yaml.safe_load(config.read_text()) | values | {"runtime": about}))
    without = {"nodes": ["run"], "compare": ["run"], "check": ["run"], "list": ["settings", "c.yaml"]}
    assert {*without, "certificates"} == {name for name, each in COMMANDS.items() if each not in READ_CONFIGS}
    for command, arguments in without.items():
        assert fedsim_(command, *arguments).err.count("\n") <= 1
    assert not marker.exists()
    assert fedsim_("list", "strategies", "mine.code:Mine").status == 0
    assert marker.read_text() == "px"


def test_a_program_s_own_code_is_its_own(marker, capsys):
    fedsim.run(CONFIG | {"strategy": "mine.code:Mine", "rounds": 1})
    assert capsys.readouterr().err == ""


def test_a_check_leaves_the_code_of_other_threads_alone(marker):
    """A program may train while it looks at a folder."""
    with unread(), pytest.raises(ConfigError, match="such code is refused"):
        STRATEGIES.load("mine.code:Mine")
    with unread(), ThreadPoolExecutor(1) as other:
        assert other.submit(STRATEGIES.load, "mine.code:Mine").result().__name__ == "Mine"
    with own_code(Rule.REFUSED), ThreadPoolExecutor(1) as other, pytest.raises(ConfigError):
        other.submit(STRATEGIES.load, "mine.code:Mine").result()


# The files of models


def test_the_digest_of_a_model_s_file_is_the_same_everywhere():
    """Of its order as JSON, of the form of its tensors, and of their bytes."""
    tensors = {"w": torch.arange(4.0).view(2, 2), "n": torch.tensor(3)}
    said = '{"buffers": ["n"], "channels_last": false, "model": ["w"]} n int64 (), w float32 (2, 2)'
    content = model_file.content(tensors, Order(["w"], ["n"], False))
    right = "24a89383eb3fc62f8a1794508bc68af2f2fce4f845ecbe8e123d96090ce8c413"
    assert right.encode() in content
    values = b"n" + struct.pack("<q", 3) + b"w" + struct.pack("<4f", 0, 1, 2, 3)
    assert hashlib.sha256(said.encode() + values).hexdigest() == right


def test_the_draft_of_a_folder_that_a_kill_left_is_deleted_by_the_next_run_beside_it(tmp_path):
    old, young, other = (tmp_path / name for name in (".a.0123abcd.draft", ".b.0123abcd.draft", ".c.draft"))
    for path in (old, young, other):
        path.mkdir()
        (path / "config.yaml").write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    create(tmp_path / "new", {"config.yaml": b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, other.name, "new"]


# Sweeps


def test_a_sweep_is_whole_with_all_its_runs(fedsim_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, rounds=1)
    done = fedsim_("sweep", "c.yaml", "seed=0,1", "--out=s", "--jobs=1", "--json")
    assert done.status == 0
    assert [point["point"] for point in json.loads(done.out)["points"]] == ["seed=0", "seed=1"]
    shown = fedsim_("check", "s")
    assert (shown.status, shown.out.splitlines()[-2:]) == (0, ["whole: 5 parts, finished", "next: nothing"])
    again = fedsim_("resume", "s", "--json")
    assert json.loads(again.out) == json.loads(done.out)
    (tmp_path / "s" / "seed=1" / "rounds.jsonl").write_text("")
    shown = fedsim_("check", "s")
    assert (shown.status, shown.out.splitlines()[-2:]) == (
        1,
        ["broken: seed=1 is broken", "next: fedsim check s/seed=1 says more"],
    )


def test_damage_to_a_sweep_that_a_run_does_without_or_that_a_resume_mends(fedsim_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, rounds=2, checkpoint={"every": 1, "keep": 2})
    assert fedsim_("sweep", "c.yaml", "seed=0,1", "--out=s", "--jobs=1").status == 0
    (tmp_path / "s" / "results.csv").unlink()
    assert fedsim_("check", "s").out.splitlines()[-1].endswith("; or fedsim resume s")
    assert fedsim_("resume", "s").status == 0
    (old,) = (tmp_path / "s" / "seed=0" / "checkpoints").glob("server-000001.*")
    old.write_bytes(b"")
    said = fedsim_("check", "s", "--json")
    assert said.status == 0
    assert [json.loads(said.out)[name] for name in ("usable", "whole")] == [True, False]


@pytest.mark.parametrize("failed", [1, [], {"0": 1}, {"5": "why"}, {"-1": "why"}, {"\u0661": "why"}])
def test_a_line_that_names_failed_evaluations_which_cannot_be(run, failed):
    line = (run / "rounds.jsonl").read_bytes().splitlines()[0]
    record = json.loads(line) | {"evaluation_failed": failed}
    with pytest.raises(ValueError, match=r"^line 1: evaluation_failed"):
        next(read_rounds(json.dumps(record).encode() + b"\n", 5))
    assert next(read_rounds(line + b"\n", 5)) == json.loads(line)


def test_rounds_are_read_line_by_line():
    """A stranger's file may be nothing but ends of lines."""
    content = b"\n" * 2**22
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^line 1: "):
        next(read_rounds(content, None))
    assert tracemalloc.get_traced_memory()[1] < len(content) / 4
    tracemalloc.stop()


def test_a_model_whose_header_has_no_metadata():
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    assert model_file.vectors(len(header).to_bytes(8, "little") + header + bytes(4)) is None
