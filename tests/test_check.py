"""`fedsim check`: a folder that a run left is whole, and with anything changed in it, it is not."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_run import CONFIG, IN_MEMORY, contents, write

import fedsim
from fedsim.base.files import locked
from fedsim.experiment.check import check_run

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
    assert shown.out.endswith("\nwhole: 4 rounds, finished; can be resumed after round 4\n")
    assert max(map(len, shown.out.splitlines())) <= 80
    assert before == (contents(run), [(path, path.stat().st_mtime_ns) for path in sorted(run.rglob("*"))])
    found = json.loads(fedsim_("check", run, "--json").out)
    assert (found["whole"], found["state"], found["rounds"], found["resumable"]) == (True, "finished", 4, [4, 3])
    assert {part["state"] for part in found["parts"]} == {"whole"}


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


@given(st.data())
def test_a_byte_that_changes_is_noticed_in_every_file(done, tmp_path_factory, data):
    """A flipped bit, a lost byte, a file that is cut, a file that is gone."""
    files = [path for path in sorted(done.rglob("*")) if path.is_file() and path.name != ".lock"]
    path = data.draw(st.sampled_from(files), "file")
    content, name = path.read_bytes(), path.name
    at = data.draw(st.integers(0, len(content) - 1), "at")
    bit = data.draw(st.integers(0, 7), "bit")
    flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    other = data.draw(st.sampled_from([flipped, content[:at] + content[at + 1 :], content[:at], None]), "other")
    folder = tmp_path_factory.mktemp("damaged", numbered=True) / "run" if not IN_MEMORY else Path(IN_MEMORY)
    folder = folder / f"fedsim-check-{os.getpid()}" if IN_MEMORY else folder
    try:
        changed = Path(shutil.copytree(done, folder)) / path.relative_to(done)
        changed.unlink()
        if other is not None:
            changed.write_bytes(other)
        if name == "config.yaml" and other is None:
            with pytest.raises(fedsim.ConfigError, match="it has no config.yaml"):
                check_run(folder)
        else:
            assert faults(folder) or meaning(name, other) == meaning(name, content)
    finally:
        shutil.rmtree(folder)
