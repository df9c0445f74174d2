"""Laws of checkpoints: whole or not there, the last whole one is found, and what is none is refused in a line."""

import copy
import errno
import hashlib
import json
import os
import random
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from small_run import CONFIG, contents, left, rounds_done

import fedsim
from fedsim.base import files
from fedsim.base.files import File
from fedsim.errors import ClientError, ConfigError, RoundError
from fedsim.experiment.checkpoint import HARMLESS_SETTINGS, Checkpoints, changes
from fedsim.experiment.config import load as load_config
from fedsim.experiment.start import resumed_run
from fedsim.federated.federation import Past
from fedsim.federated.store import ClientStore

NEVER = settings(deadline=None, suppress_health_check=list(HealthCheck))
THREE = {"checkpoint": {"every": 1, "keep": 3}, "evaluate": {"every": 1, "clients": True}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run of four rounds, with checkpoints of the last three."""
    return fedsim.run(CONFIG | THREE, out=tmp_path_factory.mktemp("checkpoint") / "run").folder


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """What one of six rounds leaves."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    return left(fedsim.run(CONFIG | THREE, {"rounds": 6}, out=folder).folder)


@pytest.fixture
def run(done, tmp_path):
    """A copy, to break."""
    return shutil.copytree(done, tmp_path / "run")


def newest(run):
    return max((run / "checkpoints").glob("*.json"))


def values(path):
    return json.loads(path.read_text())["checkpoint"]


def signed(path, values):
    """Have a checkpoint say this, and be believed."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "checkpoint": values}))


def file(path):
    content = path.read_bytes()
    return {"name": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def found(run):
    """The round of the checkpoint that would be resumed, its server's state as bytes, and the complaints."""
    saved, broken = Checkpoints(run / "checkpoints").latest(run)
    checkpoint, server = saved
    return checkpoint.round, bits(server), broken


def bits(state):
    return {
        name: (value.dtype, value.shape, torch.cat([value.reshape(-1)]).view(torch.uint8).numpy().tobytes())
        for name, value in state.items()
    }


def resume(run, *, rounds=6, complaints=()):
    """Go on to so many rounds; what is said besides of how many there should be is as many lines as told."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fedsim.resume(run, {"rounds": rounds})
    said = [str(each.message) for each in said if "rounds: " not in str(each.message)]
    assert len(said) == len(complaints)
    for line, words in zip(said, complaints, strict=True):
        assert words in line
        assert "\n" not in line
    return left(run)


def test_an_option_that_came_with_a_later_version_changes_nothing(run):
    """Its default gives the results of before."""
    for path in [*(run / "checkpoints").glob("*.json")]:
        said = values(path)
        del said["config"]["strategy"]["control"], said["config"]["model"]["head"]
        signed(path, said)
    assert len(resume(run)["rounds"]) == 6


def refused(run, *words):
    """In one line, with nothing changed."""
    before = contents(run)
    with pytest.raises(ConfigError) as caught:
        resumed_run(run, {})[0].folder.close()
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 1000
    for each in words:
        assert each in said
    assert contents(run) == before
    return said


# Torn and rotten


def test_a_checkpoint_cut_at_any_byte_is_not_taken_and_the_one_before_is(run):
    path = newest(run)
    whole = path.read_bytes()
    path.unlink()
    before = found(run)
    assert (before[0], before[2]) == (3, [])
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        number, server, broken = found(run)
        assert (number, server) == before[:2], length
        assert len(broken) == 1
        assert str(path) in broken[0]
        assert "\n" not in broken[0]


def cuts(path):
    """Lengths of a safetensors file at which something begins or ends."""
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    ends = {at for about in json.loads(content[8 : 8 + header]).values() for at in about["data_offsets"]}
    all_cuts = {0, 1, 7, 8, 9, 7 + header, len(content) - 1, *(8 + header + end for end in ends)}
    return sorted(all_cuts - {len(content)})


def test_a_servers_state_or_a_segment_that_is_cut_is_not_taken(run):
    *before, last = (values(path) for path in sorted((run / "checkpoints").glob("*.json")))
    shared = {each["name"] for checkpoint in before for each in checkpoint["clients"]}
    own = [each["name"] for each in last["clients"] if each["name"] not in shared]
    assert own
    for name in [last["server"]["name"], *own]:
        path = run / "checkpoints" / name
        whole = path.read_bytes()
        for length in cuts(path):
            path.write_bytes(whole[:length])
            number, _, broken = found(run)
            assert (number, len(broken)) == (3, 1), (name, length)
            assert name in broken[0]
        path.unlink()
        assert found(run)[0] == 3
        path.write_bytes(whole)
    assert found(run)[0] == 4


@pytest.mark.parametrize("name", ["{:06}.json", "server-{:06}.safetensors"])
@pytest.mark.parametrize("length", [None, 0, 100, -1])
def test_from_the_one_before_it_is_the_same_run(run, longer, name, length):
    path = run / "checkpoints" / name.format(4)
    content = path.read_bytes()
    path.unlink()
    if length is not None:
        path.write_bytes(content[:length])
    gone = length is None and name.endswith("json")  # then there is nothing to complain of
    assert resume(run, complaints=[] if gone else ["broken checkpoint"]) == longer


@given(data=st.data())
@settings(NEVER, max_examples=100)
def test_a_flipped_bit_is_noticed_or_harmless(done, data, tmp_path_factory):
    """Of any file of the newest checkpoint, and of rounds.jsonl."""
    run = shutil.copytree(done, tmp_path_factory.mktemp("flip") / "run")
    states = {number: bits(load_file(run / f"checkpoints/server-{number:06}.safetensors")) for number in (2, 3, 4)}
    named = values(newest(run))
    names = ["000004.json", named["server"]["name"], *(each["name"] for each in named["clients"])]
    path = data.draw(st.sampled_from([run / "rounds.jsonl", *(run / "checkpoints" / name for name in names)]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    shared = path.name == "rounds.jsonl" or path.name.startswith("clients")  # with the checkpoints before
    with suppress(ConfigError) if shared else nullcontext():
        number, server, broken = found(run)
        assert server == states[number]
        assert (number == 4) == (broken == [])
        assert number == 4 or path.name in broken[0]
        assert number < 4 or path.name == "000004.json"  # a blank that is another blank
    shutil.rmtree(run)


def test_with_all_broken_nothing_is_guessed_and_the_way_out_is_one(run, longer):
    for path in (run / "checkpoints").glob("*.json"):
        path.write_bytes(path.read_bytes()[:-1])
    broken = "000004.json: broken checkpoint", "no other is whole"
    refused(run, *broken, f"or train again: fedsim run {run}/config.yaml")  # without checkpoints it is not resumed
    (run / "summary.json").unlink()
    refused(run, *broken, f"or delete {run}/checkpoints to start over")
    shutil.rmtree(run / "checkpoints")
    assert resume(run, complaints=["no checkpoint: starts with round 1"]) == longer


@pytest.mark.parametrize("left_over", ["rounds.jsonl", "config.yaml"])
def test_a_file_that_is_gone_is_named(run, left_over):
    (run / left_over).unlink()
    with pytest.raises(ConfigError, match=left_over.replace(".", r"\.")) as caught:
        resumed_run(run, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", [1, 2])
def test_of_a_shorter_log_the_checkpoint_that_fits_is_taken(run, longer, lost):
    lines = (run / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (run / "rounds.jsonl").write_bytes(b"".join(lines[:-lost]))
    assert resume(run, complaints=["rounds.jsonl has"] * lost) == longer


def test_of_a_log_that_was_edited_the_checkpoint_before_is_taken_or_none(run, longer):
    lines = (run / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    at = run / "rounds.jsonl"
    at.write_bytes(lines[0].replace(b'"round": 1', b'"round": 7') + b"".join(lines[1:]))
    refused(run, "rounds.jsonl has changed since it was written", "no other is whole")
    at.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b"0", b"1"))
    assert resume(run, complaints=["rounds.jsonl has changed since it was written"]) == longer


def test_what_follows_in_the_log_is_of_rounds_that_do_not_count(run, longer):
    with (run / "rounds.jsonl").open("ab") as log:
        log.write(b'{"round": 5}\n{"rou')
    assert resume(run) == longer


def test_litter_of_processes_that_were_killed_is_swept(run, longer):
    for name in ("000009.json.draft", "server-000009.safetensors", "server-000009.safetensors.draft"):
        (run / "checkpoints" / name).write_bytes(b"half")
    shutil.copy(next((run / "checkpoints").glob("clients-*")), run / "checkpoints/clients-000099.safetensors")
    assert resume(run) == longer


# Made to harm


OPENED = []  # by any Python code, while it is watched
WATCHED = False


def _watch(event, args):
    if WATCHED and event == "open" and isinstance(args[0], str | bytes):
        OPENED.append(os.fsdecode(args[0]))


sys.addaudithook(_watch)


@pytest.fixture
def confined(run, tmp_path):
    """Nothing is read beside the run's own folder, nor made there."""
    global WATCHED
    beside = set(tmp_path.iterdir())
    OPENED.clear()
    WATCHED = True
    yield
    WATCHED = False
    assert set(tmp_path.iterdir()) == beside
    ours = (
        str(run),
        sys.prefix,
        sys.base_prefix,
        str(Path(fedsim.__file__).parent.parent),
        "/proc",
        "/sys",
        "/dev",
    )
    assert [name for name in OPENED if Path(name).is_absolute() and not name.startswith(ours)] == []


def crafted(change):
    """Each checkpoint changed so, with a right checksum."""

    def craft(run):
        for path in (run / "checkpoints").glob("*.json"):
            changed = values(path)
            change(changed)
            signed(path, changed)

    return craft


def put(*path, to):
    *parents, last = path

    def change(values):
        for key in parents:
            values = values[key]
        values[last] = to

    return crafted(change)


LAST = {
    "round": 4,
    "cohort": [0],
    "train_loss": 1.0,
    "fingerprint": "",
    "seconds": 1.0,
    "steps": 1,
    "bytes_up": 1,
    "bytes_down": 1,
    "failed": {},
    "absent": {},
    "clock": 0.0,
}
DEEP = "[" * 100_000 + "]" * 100_000
NAMES = (
    *("../../etc/passwd", "/etc/passwd", "../run/checkpoints/server-000004.safetensors", "..", "", "/"),
    *(
        "server-000004.safetensors/../../../etc/passwd",
        "server-000004.safetensors\n",
        "server-000004.safetensors\0",
    ),
    *("server-٤.safetensors", "x" * 5000, "000004.json"),
)
WRONG = {
    **{f"server {name[:40]!r}": put("server", "name", to=name) for name in NAMES},
    **{f"log {name[:40]!r}": put("log", "name", to=name) for name in NAMES},
    **{f"segment {name[:40]!r}": put("clients", 0, "name", to=name) for name in NAMES},
    "another's format": put("format", to=2),
    "no format": put("format", to=None),
    "a round below 0": put("round", to=-1),
    "a round that is huge": put("round", to=10**30),
    "a round that is not the file's": crafted(lambda v: v.update(round=v["round"] - 1)),
    "a round of text": put("round", to="4"),
    "a round that is true": put("round", to=True),
    "a clock beyond numbers": put("clock", to=float("inf")),
    "a clock that is none": put("clock", to=float("nan")),
    "seconds of text": put("seconds", to="1"),
    "seconds beyond numbers": put("seconds", to=float("inf")),
    "a last round of nothing": put("last", to={"a": 1}),
    "a last round that is a list": put("last", to=[1, 2]),
    "a clock below 0": put("clock", to=-1.0),
    "seconds below 0": put("seconds", to=-1.0),
    "a clock that is huge": put("clock", to=1e305),
    "a config without rounds": crafted(lambda v: v["config"].pop("rounds")),
    "a config with rounds of text": put("config", "rounds", to="many"),
    "a config whose runtime is a number": put("config", "runtime", to=3),
    "a config of more": put("config", "more", to=1),
    "a config that is empty": put("config", to={}),
    "a config that is deep": put("config", "model", to={"a": json.loads('{"a":' * 60 + "1" + "}" * 60)}),
    "a last round of another number": crafted(lambda v: v.update(last=LAST | {"round": 1})),
    "a last round of clients that are none": crafted(lambda v: v.update(last=LAST | {"cohort": [10**6]})),
    "a last round of endless seconds": crafted(lambda v: v.update(last=LAST | {"seconds": 1e305})),
    "a last round of endless steps": crafted(lambda v: v.update(last=LAST | {"steps": 10**70})),
    "a config that is a list": put("config", to=[1]),
    "an unknown key": put("more", to=1),
    "an unknown key of a file": put("server", "more", to=1),
    "bytes below 0": put("server", "bytes", to=-1),
    "bytes of the log below 0": put("log", "bytes", to=-1),
    "more bytes than there are": put("server", "bytes", to=10**18),
    "more bytes than there can be": put("clients", 0, "bytes", to=10**30),
    "bytes with a fraction": put("server", "bytes", to=1.5),
    "another checksum": put("server", "sha256", to="0" * 64),
    "a checksum of a number": put("server", "sha256", to=0),
    "clients that are a mapping": put("clients", to={}),
    "a client that is a text": put("clients", to=["clients-000000.safetensors"]),
    "versions of numbers": put("versions", to={"torch": 2}),
    "no log": crafted(lambda v: v.pop("log")),
    "a log of nothing": crafted(lambda v: v["log"].update(bytes=0, sha256=hashlib.sha256(b"").hexdigest())),
    "deep config": put("config", to=json.loads("[" * 400 + "]" * 400)),
}


@pytest.mark.parametrize("craft", WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("confined")
def test_a_crafted_checkpoint_is_refused_in_a_line(run, craft):
    craft(run)
    refused(run)


TEXTS = {
    "deep": DEEP,
    "deep inside": '{"sha256": "", "checkpoint": ' + DEEP + "}",
    "a list": "[]",
    "many values": "[" + "[]," * 2**21 + "[]]",
    "a number": "1e999",
    "nothing": "null",
    "a long number": "9" * 10_000,
    "no text": b"\xff\xfe",
    "two of a key": '{"sha256": 1, "sha256": 2, "checkpoint": {}}',
    "no checkpoint": '{"sha256": ""}',
    "code": "__import__('os').system('touch harmed')",
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.usefixtures("confined")
def test_what_is_no_json_of_ours_is_refused_in_a_line(run, text):
    for path in (run / "checkpoints").glob("*.json"):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(run, "broken checkpoint")


def spoiled(path, kind, monkeypatch):
    """A disk that fails, or something else in the place of a file."""
    if kind == "failing disk":
        opened = os.open

        def failing(name, *how, **more):
            if Path(name) == path:
                raise OSError(errno.EIO, os.strerror(errno.EIO), name)
            return opened(name, *how, **more)

        monkeypatch.setattr(os, "open", failing)
        return "Input/output error"
    path.unlink(missing_ok=True)
    if kind == "folder":
        (path / "with").mkdir(parents=True)
        return "Is a directory"
    if kind == "pipe":
        os.mkfifo(path)
        return "Not a regular file"
    path.symlink_to("/dev/zero" if kind == "device" else path)
    return "Is a symbolic link"


@pytest.mark.parametrize("name", ["json", "server", "clients"])
@pytest.mark.parametrize("kind", ["failing disk", "folder", "pipe", "link to itself", "device"])
def test_from_a_checkpoint_that_cannot_be_read_the_one_before_is_taken(run, longer, name, kind, monkeypatch):
    before, last = (values(path) for path in sorted((run / "checkpoints").glob("*.json"))[-2:])
    own = next(each["name"] for each in last["clients"] if each not in before["clients"])
    file = {"json": "000004.json", "server": last["server"]["name"], "clients": own}[name]
    why = spoiled(run / "checkpoints" / file, kind, monkeypatch)
    said = "000004.json: broken checkpoint: " + ("" if name == "json" else f"{file}: ") + why
    assert resume(run, complaints=[said]) == longer


@pytest.mark.parametrize("kind", ["failing disk", "folder", "pipe", "device"])
def test_without_its_rounds_no_checkpoint_is_taken_nor_lost(run, kind, monkeypatch):
    why = spoiled(run / "rounds.jsonl", kind, monkeypatch)
    monkeypatch.setattr("test_checkpoint.contents", lambda run: sorted(run.rglob("*")))  # for it cannot be read
    refused(run, f"rounds.jsonl: {why}; no checkpoint can be used without it")


@pytest.mark.parametrize("name", ["rounds.jsonl", "config.yaml", ".lock", "checkpoints", "tensorboard"])
def test_what_a_link_in_a_run_leads_to_stays_as_it_is(run, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    if name == ".lock":
        elsewhere.write_text("precious")
    before = elsewhere.read_bytes() if elsewhere.is_file() else contents(elsewhere)
    with pytest.raises(ConfigError, match=rf"run/{re.escape(name)}: .*link") as caught:
        fedsim.resume(run)
    assert "\n" not in str(caught.value)
    assert (elsewhere.read_bytes() if elsewhere.is_file() else contents(elsewhere)) == before


def test_what_lies_in_the_place_of_a_files_draft_is_replaced(run, longer, tmp_path):
    """A link leads to another file, which stays as it is."""
    other = tmp_path / "other"
    other.write_text("precious")
    names = ["rounds.jsonl", "config.yaml", "summary.json", "model.safetensors", "checkpoints/000005.json"]
    for name in names:
        (run / f"{name}.draft").symlink_to(other)
    (run / "checkpoints/000006.json.draft").mkdir()
    assert resume(run) == longer
    assert other.read_text() == "precious"


def test_a_copy_by_hard_links_stays_as_it_is(run, longer, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy", copy_function=os.link)
    before = contents(copy)
    assert resume(run) == longer
    assert contents(copy) == before
    assert resume(copy) == longer


def test_files_are_counted_before_they_are_read(run, monkeypatch):
    """A checkpoint names no file twice, nor one that is shorter than it says; what many name is read once."""
    monkeypatch.setattr("fedsim.experiment.checkpoint.verify", lambda *_: pytest.fail("it is read"))
    each = values(newest(run))["clients"][0]
    put("clients", to=[each, each])(run)
    refused(run, "names a file of clients' states twice")
    monkeypatch.undo()
    put("clients", to=[each | {"bytes": 2**50}])(run)
    refused(run, f"it should have {2**50}")
    put("clients", to=[each | {"sha256": "0" * 64}])(run)
    hashed = []
    counted = SimpleNamespace(sha256=lambda *content: hashed.append(1) or hashlib.sha256(*content))
    monkeypatch.setattr(files, "hashlib", counted)
    refused(run, f"{each['name']} has changed since it was written")
    assert len(hashed) == 1
    rewritten("clients", lambda s: save({f"{i}.c": torch.zeros(1) for i in range(300)}))(run)
    refused(run, "has the states of 300 clients, too many for one file")


def test_rounds_of_other_numbers_are_refused(run):
    """Though the checkpoint says that they are."""
    lines = (run / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    two = lines[0].replace(b"\n", b"\r") + lines[1]
    for text in (lines[0] * 4, two + b"".join(lines[1:])):
        (run / "rounds.jsonl").write_bytes(text)
        crafted(lambda v: v.update(log=file(run / "rounds.jsonl")))(run)
        refused(run, "rounds.jsonl: broken")


def test_rounds_of_clients_that_there_are_not_are_refused(run):
    """By the rules of `fedsim check`, though the checkpoint says that they are right."""
    lines = (run / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    third = json.loads(lines[2])
    for wrong in ({"cohort": [1, 1]}, {"cohort": [99]}, {"fingerprint": "x"}, {"failed": {"98": "why"}}):
        lines[2] = json.dumps(third | wrong).encode() + b"\n"
        (run / "rounds.jsonl").write_bytes(b"".join(lines))
        crafted(lambda v: v.update(log=file(run / "rounds.jsonl")))(run)
        refused(run, "rounds.jsonl: broken: line 3: ")


# While the run goes on


@dataclass(kw_only=True)
class Meddle(fedsim.Hook):
    """Somebody else, after the second round."""

    what: Callable

    def after_round(self, run, record):
        if record["round"] == 2:
            self.what(run.folder.path)


def meddled(folder, what, priority=50):
    """The error of a run with which somebody else meddles."""
    with pytest.raises((RoundError, OSError)) as caught:
        fedsim.run(CONFIG | THREE, out=folder, hooks=[Meddle(what=what, priority=priority)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(run):
    log = run / "rounds.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])


def append(run):
    with (run / "rounds.jsonl").open("ab") as log:
        log.write(b"mine\n")


def replace(run):
    shutil.copy(run / "rounds.jsonl", run / "other")
    (run / "other").rename(run / "rounds.jsonl")


@pytest.mark.parametrize(
    ("what", "said", "goes_on"),
    [
        (cut, "not the", "rounds.jsonl has"),
        (append, "not the", ""),
        (replace, "was deleted or replaced", ""),
        (lambda run: (run / "rounds.jsonl").unlink(), "was deleted or replaced", None),
    ],
    ids=["cut", "added", "replaced", "deleted"],
)
def test_rounds_that_somebody_changes_end_the_run_at_once(tmp_path, longer, what, said, goes_on):
    """With a line, and with the checkpoints as they were: a resume goes on from one whose rounds are there."""
    run = tmp_path / "run"
    assert f"{run}/rounds.jsonl: " in (line := meddled(run, what, priority=150))  # after the checkpoint
    assert said in line
    assert rounds_done(run) == 2
    if goes_on is None:
        refused(run, "rounds.jsonl: No such file or directory; no checkpoint can be used without it")
    else:
        assert resume(run, complaints=[goes_on] if goes_on else []) == longer


def test_clients_states_that_somebody_deletes_end_the_run_at_the_next_checkpoint(tmp_path):
    assert "clients' states are gone" in meddled(tmp_path / "run", lambda run: shutil.rmtree(run / "checkpoints"))
    assert "rounds.jsonl" in meddled(tmp_path / "gone", shutil.rmtree)


def test_a_file_larger_than_memory_is_not_read(run):
    """One with a hole: it takes no room."""
    os.truncate(run / "checkpoints/server-000004.safetensors", 2**40)
    put("server", "bytes", to=2**40)(run)
    with pytest.raises(ConfigError, match="server-000004"):
        resumed_run(run, {})
    os.truncate(newest(run), 2**40)
    with pytest.raises(ConfigError, match="is larger than"):
        resumed_run(run, {})


def rewritten(name, change):
    """Every server's state or every segment changed, and believed."""

    def craft(run):
        for path in (run / "checkpoints").glob(f"{name}-*"):
            path.write_bytes(change(load_file(path)))
        for path in (run / "checkpoints").glob("*.json"):
            content = values(path)
            for each in [content["server"], *content["clients"]]:
                each |= file(run / "checkpoints" / each["name"])
            signed(path, content)

    return craft


def safetensors(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


def entries(*names, dtype="F32", shape=(1,)):
    """Four bytes under these names."""
    about = {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}
    return safetensors(json.dumps(dict.fromkeys(names or ["0.c"], about)).encode(), b"1234")


def with_another(state):
    """Beside "model" there is "more", and beside "3.c" there is "3.more"."""
    return state | {f"{name.rpartition('.')[0]}.more".lstrip("."): value.clone() for name, value in state.items()}


STATES = {
    "another entry": lambda s: save(with_another(s)),
    "another name": lambda s: save({f"{name}c": value for name, value in s.items()}),
    "another shape": lambda s: save({name: value[None] for name, value in s.items()}),
    "another length": lambda s: save({name: value[:-1].clone() for name, value in s.items()}),
    "another type": lambda s: save({name: value.double() for name, value in s.items()}),
    "whole numbers": lambda s: save({name: value.long() for name, value in s.items()}),
    "no header": lambda s: b"",
    "a header that is too long": lambda s: struct.pack("<Q", 2**60) + b"{}",
    "a header that is no json": lambda s: safetensors(b"{" * 50),
    "a deep header": lambda s: safetensors(('{"a":' * 5000).encode()),
    "a type that is none": lambda s: entries(dtype="X"),
    "a type that torch has not": lambda s: entries(dtype="F8_E8M0", shape=[4]),
    "a huge shape": lambda s: entries(shape=[2**62, 2**62]),
    "overlapping entries": lambda s: entries("model", "c", "buffers"),
    "a pickle": lambda s: TEXTS["a pickle"],
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
@pytest.mark.parametrize("name", ["server", "clients"])
@pytest.mark.usefixtures("confined")
def test_states_of_another_kind_are_refused_in_a_line(run, name, change):
    rewritten(name, change)(run)
    refused(run)


@pytest.mark.parametrize("key", ["c", "-1.c", "x.c", "1.5.c", f"{10**30}.c", "5.c", ".c", "0." + "x" * 100])
@pytest.mark.usefixtures("confined")
def test_clients_that_there_cannot_be_are_refused_in_a_line(run, key):
    """By their ids, of which there are five."""
    rewritten("clients", lambda s: save({key: next(iter(s.values()))}))(run)
    refused(run)


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda c: c[:-1], lambda c: c[None]])
def test_a_client_whose_state_is_of_another_kind_than_others_fails_by_its_name(run, change):
    """Where it is not looked at before."""

    def craft(state):
        return save({name: change(value).clone() if name == "3.c" else value for name, value in state.items()})

    rewritten("clients", craft)(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how many rounds there should be
        with pytest.raises((ConfigError, ClientError, RoundError), match=r"client 3|a client keeps"):
            fedsim.resume(run, {"rounds": 40})


def test_lines_of_the_log_that_are_no_rounds_are_refused(run):
    """Though the checkpoint says that they are."""
    for text in (
        b"[1]\n",
        b"null\n" * 4,
        b"{}\n" * 4,
        b'{"round": 1}\n' * 4,
        b"x\n",
        b"[" * 10_000 + b"\n",
        b"\xff\n",
    ):
        (run / "rounds.jsonl").write_bytes(text)
        for path in (run / "checkpoints").glob("*.json"):
            content = values(path)
            content["log"] = file(run / "rounds.jsonl")
            signed(path, content)
        refused(run)


# What is saved is what is loaded

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]
ENTRIES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw):
    """Any bits, in any layout."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
    size = int(torch.tensor(shape).prod()) if shape else 1
    seed = draw(st.integers(0, 2**32 - 1))
    raw = torch.tensor(list(random.Random(seed).randbytes(size * dtype.itemsize)), dtype=torch.uint8)
    value = (raw > 127) if dtype == torch.bool else raw.view(dtype)
    value = value.reshape(shape)
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "a part", "watched"]))
    if layout == "transposed" and value.dim() > 1:
        value = value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and value.dim():
        value = torch.stack([value, value], -1)[..., 1]
    if layout == "expanded":
        value = value[None].expand(2, *value.shape)
    if layout == "a part":
        value = torch.cat([value.reshape(-1), value.reshape(-1)])[: value.numel()].view(value.shape)
    if layout == "watched" and value.is_floating_point():
        value = value.clone().requires_grad_()
    return value


@st.composite
def states(draw):
    state = draw(st.dictionaries(ENTRIES, tensors(), min_size=1, max_size=4))
    if draw(st.booleans()):  # two names for one tensor
        state[min(state)] = state[max(state)]
    return state


def simulation(server, clients, folder, *, number=0, initial_client=None, memory=2**30):
    """As much of one as a checkpoint is about."""
    if folder:
        folder /= "checkpoints"
        folder.mkdir()
    store = ClientStore(folder, memory=memory)
    for client, state in clients.items():
        store.stage(client, state)
    store.commit()
    return SimpleNamespace(
        server=server,
        past=Past.none(3),
        clients=store,
        number=number,
        clock=1.5,
        last=None,
        initial_client=initial_client if initial_client is not None else next(iter(clients.values()), {}),
        runtime=SimpleNamespace(home=torch.device("cpu"), choice=None, checkpointed_rounds=lambda rounds: None),
        data=SimpleNamespace(num_clients=10**9),
    )


ABOUT = {"config": {}, "data": "", "last": None, "stopped": None, "seconds": 0.0}


def log(folder):
    (folder / "rounds.jsonl").write_bytes((b"-" * 100 + b"\n") * 7)
    return File(**file(folder / "rounds.jsonl"))


@given(data=st.data(), server=states(), kept=states(), ids=st.sets(st.integers(0, 10**9 - 1), max_size=6))
@settings(NEVER, max_examples=60)
def test_what_is_saved_is_what_is_loaded_bit_for_bit(data, server, kept, ids, tmp_path_factory):
    """Of any names, types, shapes and layouts."""
    folder = tmp_path_factory.mktemp("saved")
    form = dict(sorted(kept.items()))
    clients = {
        client: {name: value.detach().clone() if i % 2 else value for name, value in form.items()}
        for i, client in enumerate(ids)
    }
    before = simulation(server, clients, folder, number=7, memory=data.draw(st.sampled_from([1, 64, 2**30])))
    Checkpoints(folder / "checkpoints").save(before, log(folder), 2, **ABOUT)
    saved, broken = Checkpoints(folder / "checkpoints").latest(folder)
    assert broken == []
    after = simulation(server, {}, None, initial_client=form)
    Checkpoints(folder / "checkpoints").restore(after, *saved)
    assert (after.number, after.clock) == (7, 1.5)
    assert bits(after.server) == bits({name: value.detach() for name, value in server.items()})
    assert {k: bits(state) for k, state in after.clients.items()} == {
        k: bits({name: value.detach() for name, value in state.items()}) for k, state in clients.items()
    }
    shutil.rmtree(folder)


# What changed


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
KEYS = st.sampled_from(["seed", "rounds", "data", "local", "runtime", "hooks", "root", "lr", "name", "path"])
BRANCHES = st.dictionaries(KEYS, LEAVES | st.dictionaries(KEYS, LEAVES, max_size=2), max_size=3)
TREES = st.dictionaries(KEYS, LEAVES | BRANCHES, max_size=5)


@given(a=TREES, b=TREES)
@settings(NEVER, max_examples=100)
def test_changes_are_none_to_itself_and_the_same_the_other_way_round(a, b):
    assert changes(a, copy.deepcopy(a)) == ([], [])
    there, back = changes(a, b), changes(b, a)
    for one, other in zip(there, back, strict=True):
        assert sorted(line.partition(":")[0] for line in one) == sorted(line.partition(":")[0] for line in other)
    keys = [line.partition(":")[0] for line in (*there[0], *there[1])]
    assert len(set(keys)) == len(keys)
    for line in there[1]:
        assert line.startswith(HARMLESS_SETTINGS)
    for line in (*there[0], *there[1]):
        assert "\n" not in line


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


RESOLVED = load_config(CONFIG).model_dump(mode="json")


@pytest.mark.parametrize("path", list(leaves(RESOLVED)), ids=".".join)
def test_a_setting_that_changed_is_told_with_what_it_is_and_was(path):
    changed = copy.deepcopy(RESOLVED)
    part = changed
    for key in path[:-1]:
        part = part[key]
    was, part[path[-1]] = part[path[-1]], "another"
    result, free = changes(RESOLVED, changed)
    (line,) = result + free
    assert line == f'{".".join(path)}: "another", and was {json.dumps(was)}'
    harmless = {"rounds", "evaluate", "runtime", "failures", "checkpoint", "client_store", "hooks"}
    assert bool(free) == (path[0] in harmless and path != ("evaluate", "new_clients"))


# Folders without locks, or with a name that is none


def test_a_disk_without_locks_is_refused_in_a_line(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fedsim.base.files.FileLock.acquire", lambda self, **_: no_locks())
    with pytest.raises(ConfigError, match=r"run/\.lock: cannot be locked: No locks available; use a folder on a"):
        fedsim.run(CONFIG, out=tmp_path / "run")


def test_a_folder_whose_name_is_not_utf_8_is_refused_in_a_line(tmp_path):
    for folder in (tmp_path / "r\udcff", tmp_path / "r\udcff/run"):
        with pytest.raises(ConfigError, match=r"r\\udcff.*: its name is not UTF-8; name another folder"):
            fedsim.run(CONFIG, out=folder)
    assert not [*tmp_path.iterdir()]


# What it costs


def written(monkeypatch):
    """The bytes that go to disk, as they go."""
    sizes = []

    def counted(path, content, **how):
        sizes.append(len(content))
        return files.write(path, content, **how)

    monkeypatch.setattr("fedsim.experiment.checkpoint.write", counted)
    monkeypatch.setattr("fedsim.federated.store.write", counted)
    return sizes


def test_a_checkpoint_writes_the_clients_that_changed_and_no_others(tmp_path, monkeypatch):
    """Of a thousand clients ten, a hundredth of the bytes; over a hundred rounds hardly more than once each."""
    entries, clients = 1000, 1000
    sizes = written(monkeypatch)
    kept = {client: {"c": torch.full((entries,), float(client))} for client in range(clients)}
    run = simulation({"model": torch.zeros(entries)}, kept, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(run, log(tmp_path), 2, **ABOUT)
    changed, rng = 10 * 4 * entries, random.Random(0)
    costs = []
    for number in range(1, 101):
        sizes.clear()
        for client in rng.sample(range(clients), 10):
            run.clients.stage(client, {"c": torch.full((entries,), float(number))})
        run.clients.commit()
        run.clients.tidy()
        run.number = number
        checkpoints.save(run, log(tmp_path), 2, **ABOUT)
        costs.append(sum(sizes))
    assert costs[0] < changed + 4 * entries + 6000  # the clients, the server, and what says so
    assert sum(costs) < 100 * (2.5 * changed + 4 * entries + 20_000)
    lies = sum(path.stat().st_size for path in (tmp_path / "checkpoints").iterdir())
    assert lies < 3 * clients * 4 * entries


def test_nothing_new_costs_nothing_but_the_server(tmp_path, monkeypatch):
    sizes = written(monkeypatch)
    kept = {client: {"c": torch.zeros(1000)} for client in range(50)}
    run = simulation({"model": torch.zeros(10)}, kept, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(run, log(tmp_path), 2, **ABOUT)
    sizes.clear()
    run.number = 1
    checkpoints.save(run, log(tmp_path), 2, **ABOUT)
    assert sum(sizes) < 10_000
