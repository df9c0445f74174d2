"""Laws of federations whose processes die, hang, come back or are cut off: SuperLink, nodes and driver for real.

All are slow, since a SuperLink counts a silent node as gone after 20 s: in all, about ten minutes.
"""

import json
import os
import re
import signal
import time
from functools import cache
from itertools import count

import pytest
import yaml
from flowers import BIN, Federation, tail, until
from hosts import Gate, Hosts, needs_namespaces
from lab import CONFIG, shown

import fedsim
from fedsim.experiment.build import build_data
from fedsim.experiment.config import load
from fedsim.flower.shards import client_name, write_shards

pytestmark = pytest.mark.slow

SUSPECT = '''
"""SCAFFOLD whose clients wait, or fail, where a file says so."""

from dataclasses import dataclass
from pathlib import Path
from time import sleep

from fedsim.strategies.drift.scaffold import Scaffold


@dataclass(frozen=True, kw_only=True)
class Suspect(Scaffold):
    folder: str

    def client_update(self, server, client, local):
        here, k = Path(self.folder), local.client_id
        (here / f"trains-{k}").touch()
        while (here / f"hold-{k}").exists():
            sleep(0.02)
        if (here / f"fail-{k}").exists():
            raise OSError("no space left")
        return super().client_update(server, client, local)
'''
NAME = "suspect:Suspect"
GONE = 20  # seconds until a silent node counts as gone
numbers = count()


@cache
def truth(rounds):
    """What a simulation gives, round by round."""
    return [*map(shown, fedsim.run(CONFIG | {"rounds": rounds, "strategy": "scaffold"}).rounds)]


class World:
    """Three clients in a federation, and what drives them; `folder` has what makes clients wait."""

    def __init__(self, federation, folder, shards, rounds=3, names=None):
        self.federation, self.folder, self.shards, self.rounds = federation, folder, shards, rounds
        self.id = f"w{next(numbers)}"
        self.names = names or [f"{self.id}-{client_name(k, 3)}" for k in range(3)]
        self.out, self.nodes = folder / "run", {}
        federation.env["PYTHONPATH"] = str(shards.parent)
        config = CONFIG | {"rounds": rounds, "strategy": {"name": NAME, "folder": str(folder)}}
        (folder / "c.yaml").write_text(yaml.safe_dump(config))

    def node(self, k, **settings):
        data = {"name": "npz", "path": str(self.shards / f"{k}.npz"), "channels": "first", "classes": 3}
        known = {"data": data, "allow": {"strategies": [NAME]}}
        self.nodes[k] = process = self.federation.node(self.names[k], known | settings)
        return process

    def all_nodes(self):
        for k in range(3):
            self.node(k)
        return self

    def serve(self, *settings, tolerant=False):
        to = ["--superlink", self.federation.address]
        to += ["--ca", self.federation.ca] if self.federation.ca else ["--insecure"]
        to += ["--nodes", ",".join(self.names), "--out", self.out]
        policy = ["runtime.wait=60", *(["failures.policy=drop"] if tolerant else [])]
        command = [BIN / "fedsim", "serve", self.folder / "c.yaml", *policy, *settings, *to]
        return self.federation.start(f"{self.id}-serve", *command)

    def resume(self):
        return self.federation.start(f"{self.id}-resume", BIN / "fedsim", "resume", self.out)

    def mark(self, what, k):
        (self.folder / f"{what}-{k}").touch()

    def clear(self, what, k):
        (self.folder / f"{what}-{k}").unlink(missing_ok=True)

    def trains(self, k, process=None):
        """Wait until a client trains that is held."""
        self.clear("trains", k)
        until((self.folder / f"trains-{k}").exists, f"client {k} trains", process=process)

    def lines(self):
        path = self.out / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def round(self, number, process):
        """Wait for the line of a round, and give it."""
        return until(lambda: self.lines()[number - 1 : number], f"round {number}", process=process)[0]

    def ended(self, process, status=0, seconds=600):
        assert process.wait(seconds) == status, tail(process)
        return tail(process)

    def same_end(self):
        """All of it was as in a simulation, in which nothing fails."""
        assert [*map(shown, self.lines())] == truth(self.rounds)

    def close(self):
        for k in range(3):
            self.clear("hold", k)
        for process in self.nodes.values():
            os.kill(process.pid, signal.SIGCONT) if process.poll() is None else None
            self.federation.stop(process, kill=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "suspect.py").write_text(SUSPECT)
    write_shards(build_data(load(CONFIG)), folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with Federation(tmp_path_factory.mktemp("federation"), auth=True) as made:
        yield made


@pytest.fixture
def world(shared, shards, tmp_path):
    """With TLS and keys."""
    made = World(shared, tmp_path, shards)
    yield made
    made.close()


@pytest.fixture
def keyless(tmp_path, shards):
    """Without keys or TLS."""
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation", tls=False) as federation:
        made = World(federation, tmp_path, shards)
        yield made
        made.close()


# A node


def test_a_node_that_raises_fails_its_client(world):
    world.all_nodes().mark("fail", 1)
    world.mark("hold", 0)
    driver = world.serve(tolerant=True)
    world.trains(0, driver)
    world.clear("hold", 0)
    failed = world.round(1, driver)["failed"]
    assert failed.keys() == {"1"}
    assert re.search(r"w\d+-client-01: OSError: no space left \(suspect.py:\d+\)", failed["1"])
    world.clear("fail", 1)
    world.ended(driver)
    assert world.lines()[-1]["failed"] == {}


def test_a_node_that_raises_ends_a_run_that_does_not_tolerate_it(world):
    world.all_nodes().mark("fail", 2)
    said = world.ended(world.serve(), status=1)
    assert re.search(r"fedsim: round 1, client 2: \S*client-02: OSError: no space left", said)
    world.clear("fail", 2)
    world.ended(world.resume())
    world.same_end()


def test_a_node_that_is_killed_is_left_out_until_it_comes_back(world):
    world.all_nodes()
    for k in (0, 1):
        world.mark("hold", k)
    driver = world.serve("rounds=40", tolerant=True)
    world.trains(1, driver)
    world.federation.stop(world.nodes[1])
    died = time.monotonic()
    world.clear("hold", 0)
    first = world.round(1, driver)
    noticed = time.monotonic() - died
    print(f"noticed after {noticed:.1f} s")
    assert noticed < GONE + 5
    assert list(first["failed"]) == ["1"]
    assert "client-01: " in first["failed"]["1"]
    second = world.round(2, driver)
    assert "is not connected" in second["failed"]["1"]
    world.mark("hold", 0)
    world.clear("hold", 1)
    world.trains(0, driver)  # the round stands still meanwhile
    before = tail(world.nodes[1])
    node = world.node(1)
    until(lambda: "joined a run" in tail(node).removeprefix(before), "the node again", process=node)
    world.clear("hold", 0)
    world.ended(driver)
    assert world.lines()[-1]["failed"] == {}
    assert len(world.lines()) == 40


def test_a_node_that_is_killed_is_waited_for(world):
    """And restarted at once with the same key, which is refused until its heartbeat has expired."""
    world.all_nodes().mark("hold", 1)
    driver = world.serve()
    world.trains(1, driver)
    world.federation.stop(world.nodes[1])
    died = time.monotonic()
    world.clear("hold", 1)
    node = world.node(1)
    world.round(1, driver)
    print(f"went on after {time.monotonic() - died:.1f} s")
    assert time.monotonic() - died < GONE + 15
    assert "still counts as connected" in tail(node)
    world.ended(driver)
    world.same_end()


def test_a_node_that_hangs_is_late_and_comes_back(world):
    world.all_nodes().mark("hold", 2)
    driver = world.serve("rounds=6", "runtime.round_timeout=6", tolerant=True)
    world.trains(2, driver)
    os.kill(world.nodes[2].pid, signal.SIGSTOP)
    failed = world.round(1, driver)["failed"]
    assert re.fullmatch(r"\S*client-02: has not answered within 6 s", failed["2"])
    world.mark("hold", 0)
    world.clear("hold", 2)
    os.kill(world.nodes[2].pid, signal.SIGCONT)
    until(lambda: "round 1: train: 12 examples" in tail(world.nodes[2]), "the late answer")
    world.clear("hold", 0)
    world.ended(driver)
    assert world.lines()[-1]["failed"] == {}


def test_a_node_stopped_longer_than_its_heartbeat_lasts_goes_on(world):
    world.all_nodes().mark("hold", 2)
    driver = world.serve()
    world.trains(2, driver)
    os.kill(world.nodes[2].pid, signal.SIGSTOP)
    time.sleep(GONE + 3)
    world.clear("hold", 2)
    os.kill(world.nodes[2].pid, signal.SIGCONT)
    world.ended(driver)
    world.same_end()


def test_a_node_without_a_key_comes_back_as_another(keyless):
    keyless.all_nodes().mark("hold", 1)
    driver = keyless.serve()
    keyless.trains(1, driver)
    keyless.federation.stop(keyless.nodes[1])
    keyless.clear("hold", 1)
    keyless.node(1)
    keyless.ended(driver)
    keyless.same_end()


def test_of_two_nodes_with_one_name_the_last_counts(keyless):
    """It has no states of the first, and says so rather than begin anew."""
    keyless.all_nodes().mark("hold", 1)
    driver, first = keyless.serve(), keyless.nodes[0]
    keyless.trains(1, driver)
    before = tail(first)
    second = keyless.node(0, state=str(keyless.folder / "elsewhere"))
    until(lambda: "joined a run" in tail(second).removeprefix(before), "the second")
    keyless.clear("hold", 1)
    said = keyless.ended(driver, status=1)
    assert "client-00 has joined a second time; its first connection is no longer used" in said
    assert "client-00: state 1 of client 0 is not here" in said
    keyless.federation.stop(first, kill=False)


def test_a_node_restarted_between_rounds_goes_on_from_its_disk(world):
    world.all_nodes().mark("hold", 0)
    driver = world.serve()
    for number in (1, 2):
        world.trains(0, driver)
        until(lambda n=number: f"round {n}: train" in tail(world.nodes[1]), "the answer")
        world.federation.stop(world.nodes[1], kill=False)
        world.node(1)
        world.clear("hold", 0)
        world.round(number, driver)
        world.mark("hold", 0)
    world.clear("hold", 0)
    world.ended(driver)
    world.same_end()


def test_a_node_whose_disk_was_lost_says_so(world):
    world.all_nodes()
    world.mark("hold", 0)
    driver = world.serve()
    world.trains(0, driver)
    until(lambda: "round 1: train" in tail(world.nodes[1]), "the answer")
    time.sleep(1)  # it is on its way
    world.federation.stop(world.nodes[1], kill=False)
    (home,) = (world.federation.folder / f"{world.names[1]}.state").glob("*/*/")
    for path in home.iterdir():
        path.unlink()
    world.node(1)
    world.clear("hold", 0)
    said = world.ended(driver, status=1)
    assert (
        "client-01: state 1 of client 1 is not here; was it deleted, by --forget, keep: nothing or by hand?"
        in said
    )


# Who may take part


def test_who_is_not_registered_or_not_trusted_may_not_join(world):
    from fedsim.flower.certificates import make

    federation = world.federation
    make(federation.folder / "other", ["127.0.0.1"], ["stranger"])
    stranger = federation.folder / "other" / "nodes" / "stranger"
    world.names[0] = "stranger"
    said = world.ended(federation.node("stranger", {"data": "synthetic"}, key=stranger), status=2)
    assert "key is not registered" in said
    ca = {"ca": str(federation.folder / "other" / "ca.crt")}
    said = world.ended(federation.node("misled", {"data": "synthetic"} | ca, key=stranger), status=2)
    assert "CERTIFICATE_VERIFY_FAILED" in said
    command = ["serve", world.folder / "c.yaml", "--superlink", federation.address, "--ca", ca["ca"]]
    said = world.ended(federation.start(f"{world.id}-misled", BIN / "fedsim", *command), status=1)
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_a_registered_node_cannot_take_the_name_of_another(world):
    keys = world.federation.keys / "nodes"
    thief = world.federation.key(f"{world.id}-thief")
    world.node(0)
    world.node(1)
    world.federation.key(world.names[2])
    data = {"data": {"name": "npz", "path": str(world.shards / "0.npz"), "channels": "first", "classes": 3}}
    process = world.federation.node(world.names[2], data | {"allow": {"strategies": [NAME]}}, key=thief)
    said = world.ended(world.serve("--keys", keys, "runtime.wait=6"), status=1)
    assert re.search(r"a node uses the name \S*client-02 without having the key", said)
    world.federation.stop(process, kill=False)
    world.out = world.folder / "again"
    world.node(2, state=str(world.folder / "state"))
    world.ended(world.serve("--keys", keys))
    world.same_end()


# The SuperLink, and who drives


@pytest.mark.parametrize("database", [True, False], ids=["database", "fresh"])
def test_a_superlink_that_is_killed_is_waited_for(keyless, tmp_path, shards, database):
    keyless.all_nodes().mark("hold", 1)
    driver = keyless.serve()
    keyless.trains(1, driver)
    keyless.federation.stop(keyless.federation.superlink)
    if not database:
        (keyless.federation.folder / "superlink.db").unlink()
    keyless.clear("hold", 1)
    time.sleep(3)
    keyless.federation.restart_superlink()
    back = time.monotonic()
    keyless.round(1, driver)
    print(f"went on after {time.monotonic() - back:.1f} s")
    keyless.ended(driver)
    keyless.same_end()


def test_a_superlink_with_keys_that_is_killed_is_waited_for(tmp_path, shards):
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation", auth=True) as federation:
        world = World(federation, tmp_path, shards)
        world.all_nodes().mark("hold", 1)
        driver = world.serve()
        world.trains(1, driver)
        federation.stop(federation.superlink)
        time.sleep(GONE + 15)  # longer than heartbeats last, and a driver waits for its run
        world.clear("hold", 1)
        federation.restart_superlink()
        world.ended(driver)
        world.same_end()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_driver_that_is_killed_is_resumed(world, number):
    """In the middle of a round, with some answers there: the same end, and the same rounds.jsonl."""
    world.all_nodes()
    world.mark("hold", 2)
    driver = world.serve()
    for before in range(1, number):
        world.trains(2, driver)
        world.clear("hold", 2)
        world.round(before, driver)
        world.mark("hold", 2)
    until(lambda: f"round {number}: train" in tail(world.nodes[0]), "an answer", process=driver)
    world.federation.stop(driver)
    assert len(world.lines()) == number - 1
    world.clear("hold", 2)
    world.ended(world.resume())
    world.same_end()


# The network


@pytest.fixture
def hosts(tmp_path, shards):
    needs_namespaces()
    (tmp_path / "federation").mkdir()
    names = [client_name(k, 3) for k in range(3)]
    with Hosts(tmp_path / "federation", names, auth=True) as federation:
        yield World(federation, tmp_path, shards, names=names)


@pytest.mark.parametrize("seconds", [3, GONE + 10])
def test_a_link_that_is_cut_and_heals_changes_nothing(hosts, seconds):
    """While its client trains; for longer than its heartbeat lasts, too."""
    hosts.all_nodes().mark("hold", 1)
    driver = hosts.serve()
    hosts.trains(1, driver)
    hosts.federation.link(hosts.names[1], up=False)
    time.sleep(1)
    hosts.clear("hold", 1)
    time.sleep(seconds)
    hosts.federation.link(hosts.names[1], up=True)
    healed = time.monotonic()
    hosts.round(1, driver)
    print(f"went on after {time.monotonic() - healed:.1f} s")
    hosts.ended(driver)
    hosts.same_end()


def test_a_node_that_is_cut_off_is_left_out(hosts):
    hosts.all_nodes().mark("hold", 1)
    driver = hosts.serve(tolerant=True)
    hosts.trains(1, driver)
    hosts.federation.link(hosts.names[1], up=False)
    cut = time.monotonic()
    failed = hosts.round(1, driver)["failed"]
    print(f"noticed after {time.monotonic() - cut:.1f} s")
    assert list(failed) == ["1"]
    hosts.ended(driver)


def test_latency_and_loss_change_nothing(hosts):
    hosts.federation.worsen("delay", "40ms", "10ms", "loss", "2%")
    hosts.all_nodes()
    hosts.ended(hosts.serve())
    hosts.same_end()


def test_delays_and_broken_connections_change_nothing(world):
    """Between the nodes and the SuperLink, and between it and who drives."""
    gate = Gate(world.federation.port, delay=0.02, cut=0.01)
    address, world.federation.address = world.federation.address, f"127.0.0.1:{gate.port}"
    try:
        world.all_nodes()
        world.ended(world.serve())
    finally:
        world.federation.address = address
    assert gate.cuts
    print(f"{gate.cuts} cuts in {gate.passed}")
    world.same_end()
