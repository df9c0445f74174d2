"""Laws of a node that lies, repeats itself, is late or dies: it costs its own client, and nobody else anything."""

import json
import re
import time
from contextlib import closing, suppress
from pathlib import Path

import hostile
import pytest
import yaml
from flowers import BIN, Federation, tail, until
from lab import CONFIG, Lab, dropping, played, shown, without

from fedsim.experiment.build import build, build_data
from fedsim.flower.shards import client_name, write_shards

LIES, TRICKS = hostile.LIES, hostile.TRICKS
QUICK = {"local": CONFIG["local"] | {"batch_size": 12}, "model": {"name": "cnn_bn", "widths": [2, 3]}}


def wrong(kinds, records):
    """Which kinds of answers were not refused, or for another reason than theirs."""
    found = [record["failed"].get("0", "not refused") for record in records]
    return {
        name: why[:300]
        for name, why in zip(kinds, found, strict=True)
        if not (re.search((LIES | TRICKS)[name].reason, why) and why.isprintable() and len(why) < 450)
    }


def test_a_lie_costs_its_own_client_only(tmp_path, monkeypatch):
    """Whatever a node answers: the reason is said, and the model is as if the node had not been asked."""
    config = dropping("scaffold", rounds=len(LIES), **QUICK)
    with closing(Lab(tmp_path, monkeypatch)) as here:
        simulation, kinds = here.simulation(config), [*LIES.values()]
        here.spoil = lambda name, content: (
            kinds[simulation.number].told(content) if name == "client-00" else content
        )
        records = played(simulation, len(LIES))
    assert wrong(LIES, records) == {}
    assert [{*record["failed"]} for record in records] == [{"0"}] * len(LIES)
    assert played(without(build(config), [record["failed"] for record in records]), len(LIES)) == records


# On real processes


def memory(process):
    """Resident bytes."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


@pytest.mark.slow
def test_a_real_node_that_lies_costs_its_own_client_only(tmp_path):
    """Also with what only a process can do: more than one answer, answers to others, in part, late; it dies."""
    rounds = len(hostile.ON_A_WIRE) + 8  # in some of which it is not there yet, or already honest
    config = dropping("scaffold", rounds=rounds, **QUICK)
    write_shards(build_data(config), tmp_path / "shards")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG | QUICK | {"strategy": "scaffold", "rounds": rounds}))
    names = [client_name(k, 3) for k in range(3)]
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation", tls=False) as federation:
        for k, name in enumerate(names):
            data = {
                "name": "npz",
                "path": str(tmp_path / "shards" / f"{k}.npz"),
                "channels": "first",
                "classes": 3,
            }
            program = [BIN / "python", Path(hostile.__file__)] if k == 0 else [BIN / "fedsim", "node"]
            federation.node(name, {"data": data}, program=program)
        to = [
            "--superlink",
            federation.address,
            "--insecure",
            "--nodes",
            ",".join(names),
            "--out",
            tmp_path / "run",
        ]
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
    records, kinds = [shown(record) for record in found], {int(number): kind for number, kind in told}
    slowest = sorted((found[number - 1]["seconds"], kind) for number, kind in kinds.items())[-12:]
    print(
        *(f"{each / 2**20:.0f}" for each in (taken[0], max(taken), taken[-1])), "MiB at first, at most, at the end"
    )
    print("slowest:", *slowest)
    assert [*kinds.values()] == [*hostile.ON_A_WIRE]
    assert wrong(kinds.values(), [records[number - 1] for number in kinds]) == {}
    assert all({*record["failed"]} <= {"0"} for record in records)
    assert records[-1]["failed"] == {}
    assert played(without(build(config), [record["failed"] for record in records]), rounds) == records
    assert taken[-1] - taken[0] < 2**27
