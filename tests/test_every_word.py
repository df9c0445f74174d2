"""Each word of a strategy, used by a tiny one: the same in every runtime, on nodes, in a batch, and after a kill.

What is compared are digests of all entries of the server's state and of all clients' states: heads, control
variates and further models are in no fingerprint.
"""

import gc
import json
from functools import cache
from pathlib import Path

import pytest
from conftest import _digests, close, make_simulation, trace
from covering import in_turn, sampled
from flowers import Federation, tail, until
from lab import CONFIG as LAB
from lab import Lab, shown
from small_run import left, write
from test_vectorized import assert_agree, pair
from words import WORDS

import fedsim
from fedsim import Strategy
from fedsim.experiment.build import build, build_data
from fedsim.experiment.config import load
from fedsim.flower.shards import client_name, write_shards
from fedsim.strategies import CATALOGUE

RUNTIMES = [
    {"name": "threads", "workers": 1},
    {"name": "threads", "workers": 3},
    {"name": "ray", "actors": 2, "cpus": 0.2},
]


NAMES = [*WORDS]
NODES = [client_name(k, 3) for k in range(3)]
SETTINGS = {"momentum": 0.5, "weight_decay": 0.01, "clip_norm": 0.5}
DATA = {**LAB["data"], "public": 0.2}


def of(name):
    return CATALOGUE.make(WORDS[name], Strategy)


@cache
def in_serial(name):
    """What a strategy does in the serial runtime, round by round."""
    return trace(make_simulation(of(name), **SETTINGS))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's, about its own processes
@pytest.mark.parametrize(("name", "runtime"), sampled(in_turn(NAMES, RUNTIMES[:2]), NAMES, RUNTIMES))
def test_a_word_means_the_same_in_every_runtime(name, runtime):
    if runtime["name"] == "ray":
        pytest.importorskip("ray")
    simulation = make_simulation(of(name), runtime=runtime, **SETTINGS)
    try:
        assert trace(simulation) == in_serial(name)
    finally:
        simulation.runtime.close()
        gc.collect()


@pytest.mark.parametrize("name", NAMES)
def test_a_word_means_the_same_in_a_batch_of_clients(name):
    serial, vectorized = pair(of(name), **SETTINGS)
    assert_agree((serial, vectorized), rounds=2)
    for client, evaluation in serial.evaluate_clients().items():
        close(vectorized.evaluate_clients([client])[client].loss, evaluation.loss)


@pytest.mark.parametrize("name", NAMES)
def test_a_word_means_the_same_on_nodes(name, tmp_path, monkeypatch):
    """Of all that the server and the nodes keep; some orders come twice."""
    config = load(LAB | {"data": DATA, "strategy": WORDS[name], "rounds": 2})
    lab = Lab(tmp_path, monkeypatch, data=DATA, double=0.3)
    for node in lab.nodes.values():
        allow = node.settings.allow.model_copy(update={"strategies": [WORDS[name]["name"], "fedavg"]})
        node.settings = node.settings.model_copy(update={"allow": allow})
    there, here = lab.simulation(config, wait=1e5, round_timeout=1e6), build(config)
    try:
        for _ in range(2):
            assert _shown(there.round()) == _shown(here.round())
        assert _digests(there.server) == _digests(here.server)
        assert there.evaluate_clients() == here.evaluate_clients()
        kept = {node.role.client: node.role.last[1].state for node in lab.nodes.values() if node.role.last}
        states = {
            k: {n.removeprefix("client."): v for n, v in state.items() if n.startswith("client.")}
            for k, state in kept.items()
        }
        assert {k: _digests(state) for k, state in states.items()} == {
            k: _digests(state) for k, state in here.clients.items() if state
        }
    finally:
        lab.close()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A SuperLink and three nodes that allow these strategies, as processes."""
    folder = tmp_path_factory.mktemp("nodes")
    write_shards(build_data(load(LAB | {"data": DATA})), folder / "shards")
    allow = {"strategies": [*{spec["name"] for spec in WORDS.values()}, "fedavg"]}
    with Federation(folder / "federation") as made:
        made.env["PYTHONPATH"] = str(Path(__file__).parent)
        for k, name in enumerate(NODES):
            data = {"name": "npz", "path": str(folder / "shards" / f"{k}.npz"), "channels": "first", "classes": 3}
            node = made.node(name, {"data": data, "allow": allow})
            until(lambda node=node: "connected" in tail(node), "node", process=node)
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_word_means_the_same_on_processes(name, nodes, tmp_path):
    config = LAB | {"data": DATA, "strategy": WORDS[name], "rounds": 2, "evaluate": {"clients": True}}
    about = {"superlink": nodes.address, "ca": str(nodes.ca), "nodes": NODES, "wait": 60.0}
    fedsim.run(config, out=tmp_path / "here")
    fedsim.run(config | {"runtime": {"name": "flower", **about}}, out=tmp_path / "there")
    here, there = (
        [json.loads(line) for line in (tmp_path / place / "rounds.jsonl").read_text().splitlines()]
        for place in ("here", "there")
    )
    assert [shown(record) for record in there] == [shown(record) for record in here]
    (model,) = {(tmp_path / place / "model.safetensors").read_bytes() for place in ("here", "there")}
    assert model


def _shown(done):
    return done._replace(seconds=0.0, bytes_up=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_a_word_has_the_same_end_after_a_kill(name, forks, tmp_path):
    """Within the files of the second round."""
    data = {"name": "synthetic", "examples": 60, "test_examples": 30, "classes": 3, "clients": 5, "public": 0.1}
    write(tmp_path, rounds=3, strategy=WORDS[name], data=data, cohort={"name": "all"})
    tests = Path(__file__).parent

    def run(*argv, kill=None):
        return forks.run(*argv, cwd=tmp_path, prepare=["own_words", str(tests), *(kill or ())])

    done = run("run", "c.yaml", "--out=whole")
    assert done.status == 0, str(done)
    killed = run("run", "c.yaml", "--out=run", kill=["run", 45])
    assert killed.status == -9, str(killed)
    again = run("resume", "run")
    assert again.status == 0, str(again)
    assert left(tmp_path / "run") == left(tmp_path / "whole")
