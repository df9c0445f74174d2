"""Laws of a node that lies, repeats itself, is late or dies: it costs its own client, and nobody else anything."""

import json
import re
import time
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import hostile
import pytest
import yaml
from flowers import BIN, Federation, tail, until
from flwr.app import RecordDict
from lab import CONFIG, Lab, dropping, played, shown, without

import fedsim
from fedsim.experiment.build import build, build_data
from fedsim.experiment.config import load
from fedsim.flower import dispatch, wire
from fedsim.flower.internals import LinkError, NodeLink, Superlink
from fedsim.flower.messages import Joined
from fedsim.flower.shards import client_name, write_shards

LIES = hostile.LIES
ALL = LIES | hostile.METRICS | hostile.TRICKS
QUICK = {"local": CONFIG["local"] | {"batch_size": 12}, "model": {"name": "cnn_bn", "widths": [2, 3]}}


def wrong(told, records):
    """Which lies of those told, by round, were not refused, or for another reason than theirs."""
    found = {name: records[number]["failed"].get("0", "not refused") for number, name in told.items()}
    return {
        name: why[:300]
        for name, why in found.items()
        if not (re.search(ALL[name].reason, why) and why.isprintable() and len(why) < 450)
    }


def same_without(config, records):
    """Whether a simulation gives the same where these clients fail, whatever the reasons."""
    expected = played(without(build(config), [record["failed"] for record in records]), len(records))
    found = [{name: record[name] for name in expected[0]} for record in records]  # not the tests of a file's
    return [each | {"failed": {*each["failed"]}} for each in expected] == [
        each | {"failed": {*each["failed"]}} for each in found
    ]


@pytest.mark.parametrize(
    ("strategy", "lies"), [("scaffold", LIES), ("test_metrics:Own", hostile.METRICS)], ids=["any", "metrics"]
)
def test_a_lie_costs_its_own_client_only(strategy, lies, tmp_path, monkeypatch):
    """Whatever a node answers: the reason is said, and the model is as if the node had not been asked."""
    liar, records = hostile.Liar(lies), []
    with closing(Lab(tmp_path, monkeypatch).allowing(strategy)) as here:
        simulation = here.simulation(config := dropping(strategy, **QUICK))

        def spoil(name, content):
            return lies[liar.lie(simulation.number)].told(content) if name == "client-00" else content

        here.spoil = spoil
        while liar.left:
            records.append(shown(simulation.round()))
    assert wrong(liar.told, records) == {}
    assert [{*record["failed"]} for record in records] == [{"0"}] * len(records)
    assert same_without(config, records)


def test_an_answer_that_breaks_what_reads_it_costs_its_own_client_only(tmp_path, monkeypatch):
    with closing(Lab(tmp_path, monkeypatch)) as here:
        simulation, read = here.simulation(dropping("fedavg", **QUICK)), dispatch.decode

        def decode(message, most):
            if not message:
                raise MemoryError
            return read(message, most)

        monkeypatch.setattr(dispatch, "decode", decode)
        here.spoil = lambda name, content: LIES["no tensor"].told(content) if name == "client-00" else content
        assert re.match(r"client-00: its answer cannot be used: MemoryError", simulation.round().failed["0"])


# On real processes


def about(folder, k):
    """The settings of a node with the k-th shard."""
    path = str(folder / "shards" / f"{k}.npz")
    return {"data": {"name": "npz", "path": path, "channels": "first", "classes": 3}}


def memory(process):
    """Resident bytes."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


@pytest.mark.slow
def test_a_real_node_that_lies_costs_its_own_client_only(tmp_path):
    """Also with what only a process can do: more than one answer, answers to others, in part, late; it dies."""
    rounds = len(hostile.ON_A_WIRE) + 20  # in some of which it is not there yet, or already honest
    config = dropping("scaffold", rounds=rounds, **QUICK)
    write_shards(build_data(config), tmp_path / "shards")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG | QUICK | {"strategy": "scaffold", "rounds": rounds}))
    names = [client_name(k, 3) for k in range(3)]
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation", tls=False) as federation:
        for k, name in enumerate(names):
            program = [BIN / "python", Path(hostile.__file__)] if k == 0 else [BIN / "fedsim", "node"]
            federation.node(name, about(tmp_path, k), program=program)
        to = ["--superlink", federation.address, "--insecure"]
        to += ["--nodes", ",".join(names), "--out", tmp_path / "run"]
        settings = ["failures.policy=drop", f"runtime.round_timeout={hostile.TIMEOUT}"]
        driver = federation.start("serve", BIN / "fedsim", "serve", tmp_path / "c.yaml", *settings, *to)
        lines = tmp_path / "run" / "rounds.jsonl"
        until(lambda: lines.exists() and lines.read_text().count("\n") > 4, "rounds", process=driver)
        taken = [memory(driver)]
        while driver.poll() is None:
            with suppress(OSError, TypeError):  # it has just ended
                taken.append(memory(driver))
            time.sleep(0.1)
        assert driver.returncode == 0, tail(driver)
        told = re.findall(r"round (\d+) lie: (.+)", (federation.folder / f"{names[0]}.log").read_text())
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    records, told = [shown(record) for record in found], {int(number) - 1: name for number, name in told}
    slowest = sorted((found[number]["seconds"], name) for number, name in told.items())[-12:]
    print("MiB at first, at most, at the end:", *(each // 2**20 for each in (taken[0], max(taken), taken[-1])))
    print("slowest:", *slowest)
    assert [*told.values()] == [*hostile.ON_A_WIRE]
    assert wrong(told, records) == {}
    assert all({*record["failed"]} <= {"0"} for record in records)
    assert records[-1]["failed"] == {}
    assert same_without(config, records)
    assert taken[-1] - taken[0] < 2**27


@pytest.mark.slow
def test_nodes_that_come_and_go_cost_nobody_anything(tmp_path):
    """With names of their own or none, in the middle of a run that tolerates no failure."""
    config, names, number = CONFIG | QUICK | {"rounds": 12}, [client_name(k, 3) for k in range(3)], count()
    write_shards(build_data(load(config)), tmp_path / "shards")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "federation").mkdir()
    says = [
        lambda: RecordDict(),
        lambda: hostile.NOISE * 2**12,
        lambda: wire.record(Joined(f"x{next(number)}", {"torch": "9" * 10**5}, None, 10**30)),
        lambda: wire.record(Joined(hostile.NOISE, {}, None)),
        lambda: wire.record(Joined("n" * 2**19, {}, None)),
    ]
    with Federation(tmp_path / "federation", tls=False) as federation:
        for k, name in enumerate(names):
            federation.node(name, about(tmp_path, k))
        to = [
            "--superlink",
            federation.address,
            "--insecure",
            "--nodes",
            ",".join(names),
            "--out",
            tmp_path / "run",
        ]
        driver = federation.start("serve", BIN / "fedsim", "serve", tmp_path / "c.yaml", *to)
        while driver.poll() is None:
            with closing(NodeLink.open(Superlink(federation.address, None), None)) as link, suppress(LinkError):
                ends = time.monotonic() + next(number) % 3  # some leave before they are asked
                while time.monotonic() < ends:
                    if message := link.receive(most_bytes=2**20):
                        link.answer(message, says[next(number) % len(says)]())
                        break
                    time.sleep(0.05)
        assert driver.returncode == 0, tail(driver)
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert [shown(json.loads(line)) for line in lines] == [*map(shown, fedsim.run(config).rounds)]
    print(next(number), "visits and answers")


@pytest.mark.slow
def test_one_key_is_one_node(tmp_path):
    """A second process with a node's key is refused until the first has left, and is then this node."""
    config, names = CONFIG | QUICK | {"rounds": 3}, [client_name(k, 3) for k in range(3)]
    write_shards(build_data(load(config)), tmp_path / "shards")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation", auth=True) as federation:
        nodes = [federation.node(name, about(tmp_path, k)) for k, name in enumerate(names)]
        for node in nodes:
            until(lambda node=node: "connected" in tail(node), "node", process=node)
        second = federation.node(names[0], about(tmp_path, 0) | {"state": str(tmp_path / "elsewhere")})
        until(lambda: "still counts as connected" in tail(second), "refusal", process=second)
        for run in ("first", "second"):
            to = ["--superlink", federation.address, "--ca", federation.ca, "--keys", federation.keys / "nodes"]
            to += ["--nodes", ",".join(names), "--out", tmp_path / run]
            driver = federation.start(run, BIN / "fedsim", "serve", tmp_path / "c.yaml", *to)
            assert driver.wait(200) == 0, tail(driver)
            lines = (tmp_path / run / "rounds.jsonl").read_text().splitlines()
            assert [shown(json.loads(line)) for line in lines] == [*map(shown, fedsim.run(config).rounds)]
            federation.stop(nodes[0], kill=False)
