"""Laws of federations: on real nodes a run is what it is in a simulation, whatever becomes of wire and nodes."""

import json
import os
import re
import shutil
import time
import traceback
from itertools import count
from pathlib import Path

import forks
import pytest
import torch
import yaml
from flowers import Federation, free_port, tail, until
from flwr.app import RecordDict
from lab import CONFIG, Lab, dropping, played, shown, without

import fedsim
from fedsim.errors import ClientError, ConfigError, RoundError
from fedsim.experiment.build import build, build_data
from fedsim.experiment.checkpoint import versions
from fedsim.experiment.config import load
from fedsim.experiment.execute import execute
from fedsim.experiment.hook import Hook
from fedsim.experiment.start import new_run, resumed_run
from fedsim.flower import wire
from fedsim.flower.internals import LinkError, Reply
from fedsim.flower.messages import Invitation, Joined
from fedsim.flower.roster import Roster
from fedsim.flower.shards import client_name, write_shards
from fedsim.flower.transport import encode

# In one process: a wire that does its worst


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Makes labs, one after another."""
    made, number = [], count()

    def make(seed=0, **faults):
        for old in made:
            old.close()
        made.append(Lab(tmp_path / f"lab-{next(number)}", monkeypatch, seed, **faults))
        return made[-1]

    yield make
    for old in made:
        old.close()


BAD = {"link": 0.02, "end": 0.002, "leave": 0.002, "double": 0.3, "forget": 0.07}
WORSE = BAD | {"slow": 0.05, "lost": 0.05, "spoil": 0.2}


@pytest.mark.parametrize("strategy", ["mime", "fltrust"])
def test_what_comes_before_and_after_the_training_is_a_simulations(lab, strategy):
    """A survey, on nodes of which messages get lost; and a training of the server's own, beside it."""
    data = CONFIG["data"] | {"public": 0.2}
    config = load(CONFIG | {"strategy": strategy, "data": data})
    expected = build(config)
    here = lab(data=data, **BAD).simulation(config, wait=1e5, round_timeout=1e6)
    assert played(here) == played(expected)
    assert all(torch.equal(value, here.server[name]) for name, value in expected.server.items())


schedules = pytest.mark.parametrize(
    ("strategy", "seeds"),
    [
        ("scaffold", range(2)),
        *(pytest.param(name, range(20), marks=pytest.mark.slow) for name in ("fedavg", "scaffold", "fedbn")),
    ],
)


@schedules
def test_nodes_that_come_back_change_nothing(lab, strategy, seeds):
    """Whatever is sent twice, in any order or again, to nodes under other ids, over another Flower run."""
    config = load(CONFIG | {"strategy": strategy})
    expected = played(build(config))
    for seed in seeds:
        assert played(lab(seed, **BAD).simulation(config, wait=1e5, round_timeout=1e6)) == expected


def survived(simulation, rounds=CONFIG["rounds"]):
    """The records of a run whose rounds are tried again where nobody answered."""
    records = []
    for _ in range(5 * rounds):
        try:
            records.append(shown(simulation.round()))
        except RoundError:
            continue
        if len(records) == rounds:
            return records
    raise AssertionError(f"{len(records)} rounds")


@schedules
def test_clients_that_fail_are_as_in_a_simulation_where_they_do(lab, strategy, seeds):
    """Also those that answer too late, keep what does not count, or send what cannot be."""
    config = dropping(strategy)
    for seed in seeds:
        records = survived(lab(seed, **WORSE).simulation(config, wait=60.0))
        missing = [record["failed"] for record in records]
        assert played(without(build(config), missing)) == records
        assert all(reason.isprintable() and len(reason) < 300 for each in missing for reason in each.values())


class Snapshot(Hook):
    """Ends a run at one of its moments, as it stands on disk then, and no more is written to it."""

    def __init__(self, moment, copy):
        self.moment, self.copy, self.moments = moment, copy, count()

    def after_client(self, run, report):
        self._moment(run)

    def before_evaluation(self, run, record):
        self._moment(run)

    def after_round(self, run, record):
        self._moment(run)

    def _moment(self, run):
        if next(self.moments) == self.moment:
            shutil.copytree(run.folder.path, self.copy)
            raise RoundError("killed")


def lines(folder):
    return [shown(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "options", "moments"),
    [
        ({"strategy": "scaffold"}, {}, (4, 12)),
        ({}, {"transport": "int8", "exact": False}, (13,)),
        *(
            pytest.param(*each, range(20), marks=pytest.mark.slow)
            for each in (
                ({"strategy": "scaffold"}, {}),
                ({"strategy": "fedbn", "checkpoint": {"every": 2, "keep": 1}}, {"transport": "lossless"}),
                ({}, {"transport": "int8", "exact": False}),
            )
        ),
    ],
)
def test_a_driver_that_was_killed_goes_on_as_if_it_had_not_been(lab, tmp_path, settings, options, moments):
    """At whatever moment, and the nodes are ahead of it then."""
    config = load(CONFIG | settings)

    def make(here):
        return lambda config: here.simulation(config, wait=1e5, round_timeout=1e6, **options)

    execute(*new_run(config, tmp_path / "whole", make=make(lab())))
    for moment in moments:
        here, stopped, copy = lab(moment, double=0.3), tmp_path / f"s{moment}", tmp_path / f"c{moment}"
        run, hooks = new_run(config, stopped, make=make(here))
        with pytest.raises(RoundError, match="killed"):
            execute(run, [*hooks, Snapshot(moment, copy)])
        result = execute(*resumed_run(copy, {}, make=make(here)))
        assert lines(copy) == lines(tmp_path / "whole")
        assert result.summary["fingerprint"] == lines(copy)[-1]["fingerprint"]


def left(here):
    """The files that each node keeps of runs."""
    return {
        name: sorted(path.name for path in node.state_files.folder.glob("*/*"))
        for name, node in here.nodes.items()
    }


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_finished_run_says_so_and_can_be_made_longer(lab, tmp_path, strategy):
    """One that was interrupted or has failed does not."""
    config, folder = load(CONFIG | {"strategy": strategy}), tmp_path / "run"

    def make(here):
        return lambda config: here.simulation(config, wait=1e5, round_timeout=1e6)

    execute(*new_run(config, tmp_path / "whole", make=make(lab())))
    here = lab()
    run, hooks = new_run(load(CONFIG | {"strategy": strategy, "rounds": 2}), folder, make=make(here))
    with pytest.raises(RoundError, match="killed"):
        execute(run, [*hooks, Snapshot(2, tmp_path / "copy")])
    assert all("finished" not in names for names in left(here).values())
    execute(*resumed_run(folder, {}, make=make(here)))
    state = [] if strategy == "fedavg" else ["state-000000002.safetensors"]
    assert left(here) == {name: ["finished", "plan.json", *state] for name in here.nodes}
    execute(*resumed_run(folder, {"rounds": CONFIG["rounds"]}, make=make(here)))
    assert lines(folder) == lines(tmp_path / "whole")


def test_nodes_that_are_away_at_the_end_are_not_waited_for(lab):
    config, here = load(CONFIG | {"rounds": 1}), lab()
    simulation = here.simulation(config, wait=1e5, round_timeout=1e6)
    simulation.round()
    here.leaves(next(iter(here.ids)), 1e5)
    began = here.clock.now
    simulation.runtime.run_finished(simulation.clients)
    assert here.clock.now - began < 22
    assert sum("finished" in names for names in left(here).values()) == 2


class KilledError(BaseException):
    """The driver's process ends, as its folder stands."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that it leaves open
def test_a_driver_killed_before_or_within_any_change_to_its_files_has_the_same_end(lab, tmp_path, monkeypatch):
    """While its nodes keep what they keep."""
    config, place = load(CONFIG | {"strategy": "scaffold", "rounds": 2}), tmp_path / "run"
    killed = tmp_path / "killed"
    for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, getattr(os, name))  # which puts it back
    monkeypatch.setattr(Path, "open", Path.open)
    changes, at = None, 0

    def make(here):
        return lambda config: here.simulation(config, wait=1e5, round_timeout=1e6)

    def change(*_):
        frames = {frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)}
        nodes = any(name.endswith("/state_files.py") for name in frames)
        if changes is not None and not nodes and next(changes) == at:
            shutil.copytree(place, killed) if place.exists() else killed.mkdir()
            raise KilledError

    execute(*new_run(config, tmp_path / "whole", make=make(lab())))
    forks._before_changes(change)
    while True:
        here, changes = lab(), count()
        try:
            execute(*new_run(config, place, make=make(here)))
            break
        except (KilledError, RoundError):  # the latter out of a hook
            changes, at = None, at + 1
        shutil.rmtree(place, ignore_errors=True)
        killed.rename(place)
        if any(place.iterdir()):
            execute(*resumed_run(place, {}, make=make(here)))
            assert lines(place) == lines(tmp_path / "whole")
        shutil.rmtree(place)
    print(f"{at} kills")
    assert at > 60


def test_a_run_does_not_go_on_with_other_nodes(lab, tmp_path):
    config, here, copy = load(CONFIG | {"strategy": "scaffold"}), lab(), tmp_path / "copy"

    def make(**options):
        return lambda config: here.simulation(config, wait=1e5, round_timeout=1e6, **options)

    run, hooks = new_run(config, tmp_path / "run", make=make())
    with pytest.raises(RoundError, match="killed"):
        execute(run, [*hooks, Snapshot(7, copy)])
    before = (copy / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"runtime\.nodes: is x, y, z, but the run has client-00"):
        resumed_run(copy, {}, make=make(nodes=["x", "y", "z"]))
    assert (copy / "config.yaml").read_bytes() == before


def test_a_broadcast_is_not_larger_in_memory_than_on_the_wire():
    small, _ = encode({"model": torch.zeros(2**20)}, "lossless")
    sent = wire.record(Invitation("0" * 32, "{}", {}), initial=wire.arrays(small))
    with pytest.raises(ValueError, match="larger than"):
        wire.read(Invitation, sent)


def test_a_round_in_which_all_nodes_leave_waits_for_one(lab):
    """Where failures are dropped, too: there is nobody to go on with."""
    config = dropping("scaffold")
    here = lab()
    simulation = here.simulation(config, wait=100.0)
    simulation.round()
    tick, left = here.tick, []

    def leave():
        tick()
        if len(here.letters) == 3 and not left:  # the orders of the second round
            left.extend(here.ids)
            for node, seconds in zip(left, (20.0, 50.0, 50.0), strict=True):
                here.leaves(node, seconds)

    here.tick = leave
    began, record = here.clock.now, simulation.round()
    assert left
    assert len(record.failed) == 2
    assert 20 < here.clock.now - began < 30


def test_no_node_trains_where_too_few_are_there(lab):
    """So many nodes are away that the round cannot count: the others are sent no order."""
    here = lab()
    config = load(CONFIG | {"failures": {"policy": "drop", "min_clients": 2}})
    simulation = here.simulation(config, wait=100.0)
    simulation.round()
    for node in [*here.ids][1:]:
        here.leaves(node, 1e5)
    here.letters.clear()
    with pytest.raises(
        RoundError, match=r"round 2: 1 of 3 clients are left, and failures\.min_clients is 2; client "
    ):
        simulation.round()
    assert not [letter for letter in here.letters.values() if wire.kind(letter.content) == "Order"]


class Room:
    """A link to nodes that only say who they are: names, or None for what no node of fedsim says."""

    def __init__(self, **names):
        self.names, self.number = {int(node[1:]): name for node, name in names.items()}, count()
        self.notes = ()  # of those that were invited, and not only asked for their names
        self.asked, self.abandoned = dict[int, str](), set[str]()

    def nodes(self):
        return set(self.names)

    def send(self, contents, kind, **how):
        self.asked |= {node: wire.kind(content) for node, content in contents.items()}
        return {f"{node} {next(self.number)}": node for node in contents}

    def receive(self, waiting, *, most_bytes):
        nodes = {to: int(to.split()[0]) for to in waiting}
        return [Reply(to, node, self._says(node), None, 0) for to, node in nodes.items() if node in self.names]

    def abandon(self, messages):
        self.abandoned |= {*messages}

    def _says(self, node):
        name = self.names[node]
        if name is None:
            return RecordDict()
        notes = self.notes if self.asked[node] == "Invitation" else ()
        return wire.record(Joined(name, versions(), examples=5, tested=5, notes=notes))


def joined(roster, room):
    """Who has, once everybody has been asked."""
    for _ in range(3):
        roster.look(room, Invitation("", "", {}))
    return roster.joined


def test_a_name_is_one_node_and_a_node_one_name(caplog):
    roster, room = Roster(), Room(n1="a", n2="b", n3=None)
    assert joined(roster, room) == {"a": 1, "b": 2}
    roster.fix_names(2)
    room.names = {2: "b", 4: "a", 5: "c"}  # a is back under another number
    assert joined(roster, room) == {"a": 4, "b": 2}
    assert "c: is not one of this run's nodes" in roster.shown(2)
    assert "second time" not in caplog.text
    room.names[6] = "a"
    assert joined(roster, room) == {"a": 6, "b": 2}
    assert "a has joined a second time" in caplog.text
    del room.names[2]
    assert joined(roster, room) == {"a": 6}
    del room.names[6]
    room.names[2] = "a"  # who was b is a now
    assert joined(roster, room) == {"a": 2}


@pytest.mark.parametrize("named", [[], ["a"]])
def test_what_a_node_has_to_say_is_logged_once_and_not_without_end(caplog, named):
    """A node that a run names is asked for its name first, and says nothing yet."""
    roster, room = Roster(), Room(n1="a")
    roster.names = named
    room.notes = ("no\nnames\x1b", "x" * 9999, *map(str, range(1000)))
    joined(roster, room)
    room.names = {2: "a"}
    assert joined(roster, room) == {"a": 2}
    lines = [record.getMessage() for record in caplog.records if "a: " in record.getMessage()]
    assert lines[0] == "nodes: a: no names\\x1b"
    assert len(lines) < 20
    assert all(len(line) < 300 and line.isprintable() for line in lines)


def test_what_strangers_say_of_themselves_is_bounded():
    """Names that are none, long ones, many, and nodes that leave before they have answered."""
    roster, room = Roster(), Room(n1="a", n2=" a", n3="a\n", n4="b\x1b[2J", n5="b" * 2**17, n6="")
    assert joined(roster, room) == {"a": 1}
    assert roster.shown(1).isprintable()
    assert roster.shown(1).count("its name ") == 5
    room.names |= {node: f"x{node}" for node in range(10, 1000)}
    roster.fix_names(1)
    assert joined(roster, room) == {"a": 1}
    assert len(roster.shown(1)) < 10_000
    sent = set[str]()
    room.send = lambda contents, kind, **how: {sent.add(f"{n} late") or f"{n} late": n for n in contents}
    room.receive = lambda waiting, *, most_bytes: []
    room.names = {1: "a", **dict.fromkeys(range(2000, 3000), "b")}
    roster.look(room, Invitation("", "", {}))
    room.names = {1: "a"}
    roster.look(room, Invitation("", "", {}))
    assert len(sent) == 1000
    assert room.abandoned == sent


def test_a_node_that_has_not_answered_is_not_said_to_be_absent(lab):
    room, roster = Room(n1="a", n2="b"), Roster()
    roster.names = ["a", "c"]
    room.receive = lambda waiting, *, most_bytes: []
    roster.look(room, Invitation("", "", {}))
    assert roster.absence(0) == roster.absence(1) == "has not joined; 2 connected, but without an answer so far"
    del room.receive
    joined(roster, room)
    assert roster.absence(1) == "is not connected; connected, but not part of this run: b"
    room.names = {}
    roster.look(room, Invitation("", "", {}))
    assert roster.absence(0) == roster.absence(1) == "is not connected"
    simulation = lab().simulation(load(CONFIG), wait=0.01, nodes=NAMES)
    with pytest.raises(ClientError, match="has not joined; 3 connected, but without an answer so far"):
        simulation.round()


def test_a_name_belongs_to_its_key():
    keys = [LinkError("no connection", again=True), {1: b"thief", 2: b"b"}]

    def key_of():
        if isinstance(keys[0], LinkError):
            raise keys.pop(0)
        return keys[0]

    roster, room = Roster({"a": b"a", "b": b"b"}, key_of), Room(n1="a", n2="b")
    with pytest.raises(LinkError):
        roster.look(room, Invitation("", "", {}))
    assert joined(roster, room) == {"b": 2}
    assert "a node uses the name a without having the key" in roster.shown(2)
    room.names[3], keys[0] = "a", keys[0] | {3: b"a"}
    assert joined(roster, room) == {"a": 3, "b": 2}


# On real processes: a SuperLink and three nodes, with TLS and keys; this process drives


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(build_data(load(CONFIG)), folder)
    return folder


@pytest.fixture(scope="module")
def federation(tmp_path_factory, shards):
    with Federation(tmp_path_factory.mktemp("federation"), auth=True) as made:
        nodes = [made.node(NAMES[k], {"data": data_of(shards, k)}) for k in range(3)]
        for node in nodes:
            until(lambda node=node: "connected" in tail(node), "node", process=node)
        yield made


NAMES = [client_name(k, 3) for k in range(3)]


def data_of(shards, k):
    return {"name": "npz", "path": str(shards / f"{k}.npz"), "channels": "first", "classes": 3}


def on(federation, **options):
    """The runtime with these nodes."""
    about = {"superlink": federation.address, "ca": str(federation.ca), "nodes": NAMES, "wait": 60.0}
    return {"runtime": {"name": "flower", **about, **options}}


SHORT = CONFIG | {"rounds": 2, "cohort": {"name": "uniform", "size": 2}, "evaluate": {"clients": True}}


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("fedavg", "fedadam", "mime")]


@pytest.mark.parametrize("strategy", ["scaffold", "fedbn", *OTHERS])
def test_nodes_give_the_records_of_a_simulation(federation, strategy):
    """Round by round: cohort, losses, steps, fingerprint, tests, and each client's own accuracy."""
    config = SHORT | {"strategy": strategy}
    expected = fedsim.run(config).rounds
    found = fedsim.run(config | on(federation)).rounds
    assert [*map(shown, found)] == [*map(shown, expected)]
    assert all(record["bytes_up"] > 1000 for record in found)


def test_the_command_serves_and_shows_nodes(federation, fedsim_, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SHORT))
    to = ["--superlink", federation.address, "--ca", federation.ca]
    keys = federation.keys / "nodes"
    served = fedsim_("serve", tmp_path / "c.yaml", *to, "--nodes", 3, "--keys", keys, "--out", tmp_path / "run")
    assert (served.status, served.err) == (0, "")
    expected = fedsim.run(SHORT).rounds
    assert lines(tmp_path / "run") == [*map(shown, expected)]
    sizes = build_data(load(SHORT)).sizes.tolist()
    found = fedsim_("nodes", tmp_path / "run", *to, "--json")
    assert (found.status, found.err) == (0, "")
    known = [(node["name"], node["state"], node["examples"]) for node in json.loads(found.out)["nodes"]]
    assert known == [(name, "here", size) for name, size in zip(NAMES, sizes, strict=True)]
    as_the_run_has_it = fedsim_("nodes", tmp_path / "run", "--json")
    assert json.loads(as_the_run_has_it.out)["superlink"] == federation.address
    assert (as_the_run_has_it.status, as_the_run_has_it.err) == (0, "")
    won = fedsim_("nodes", tmp_path / "run", "--ca", tmp_path / "no.crt")
    assert (won.status, won.err) == (2, f"fedsim: --ca: {tmp_path / 'no.crt'}: No such file or directory\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--superlink", "nowhere"], "runtime.superlink: 'nowhere' should be HOST:PORT"),
        (["--superlink", "nowhere:0", "--insecure"], "runtime.superlink: 'nowhere:0' should be HOST:PORT"),
        ([], "runtime.ca: .* neither is set"),
        (["--ca", "no.crt"], "runtime.ca: no.crt: No such file or directory"),
        (["--ca", "c.yaml"], "runtime.ca: c.yaml: is not a certificate in PEM"),
        (["--ca", "/dev/zero"], "runtime.ca: /dev/zero: Not a regular file"),
        (["--ca", "no.crt", "--insecure"], "runtime.ca: .* both are set"),
        (["--insecure", "--nodes", "a,b,a"], "--nodes: 'a,b,a' should be a number, or different names"),
        (["--insecure", "--nodes", "a,,b"], "--nodes: 'a,,b' should be a number, or different names"),
        (["--insecure", "--nodes", "0"], "data.clients: "),
        (
            ["--insecure", "--nodes", "a,b", "data.clients=3"],
            "runtime.nodes: has 2 different names, but data.clients is 3",
        ),
        (["--insecure", "--keys", "."], "runtime.keys: .: has no file NAME.pub"),
        (["--ca", "~nobody-here/x"], "runtime.ca: ~nobody-here/x: there is no such home folder"),
        (["--insecure", "--keys", "~nobody-here/x"], "runtime.keys: ~nobody-here/x: there is no such home"),
        (["--insecure", "model.weights=~nobody-here/x"], "model.weights: ~nobody-here/x: there is no such"),
        (
            ["--insecure", "runtime.transport=int8"],
            "runtime.transport: int8 rounds updates; .*runtime.exact=false",
        ),
        (
            ["--insecure", "runtime.transport=zip"],
            "runtime.transport: .zip. should be exact, lossless, bf16 or int8",
        ),
        (["--insecure", "runtime.wait=0"], "runtime.wait: 0"),
        (["--insecure", "runtime.more=1"], "runtime.more: 'more' is unknown"),
        (["--insecure", "availability={}"], "availability: "),
    ],
)
def test_a_wrong_option_is_one_line(fedsim_, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    done = fedsim_("serve", "c.yaml", *arguments)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert re.match(f"fedsim: {said}", done.err), done.err
    assert not (tmp_path / "runs").exists()


def test_a_superlink_that_is_not_there_is_waited_for_and_then_an_error(fedsim_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the run's folder is made
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    there, began = f"127.0.0.1:{free_port()}", time.monotonic()
    done = fedsim_("serve", tmp_path / "c.yaml", "--superlink", there, "--insecure", "runtime.wait=2")
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert done.err.startswith(f"fedsim: superlink {there}: no connection to the SuperLink: ")
    assert 2 < time.monotonic() - began < 8
    shown = fedsim_("nodes", "--superlink", there, "--insecure")
    assert (shown.status, shown.err.count("\n")) == (2, 1)


def test_a_node_that_is_not_there_is_named_and_no_other(federation, fedsim_, tmp_path):
    """Those that are there may take longer than `wait` to answer where the machine is busy; it is then said so."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SHORT))
    to = ["--superlink", federation.address, "--ca", federation.ca, "--nodes", "client-00,client-01,elsewhere"]
    for wait in (2, 8, 32):
        out = ["--out", tmp_path / f"run-{wait}"]
        done = fedsim_("serve", tmp_path / "c.yaml", *to, *out, f"runtime.wait={wait}")
        assert (done.status, done.err.count("\n")) == (1, 1)
        assert not re.search(r"client-\d\d: is not connected", done.err)
        if "without an answer so far" not in done.err:
            break
    assert "elsewhere: is not connected; connected, but not part of this run: client-02" in done.err
