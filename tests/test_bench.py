"""The benchmark is fair: the plain loop trains as fedsim's clients do, to the last step."""

import io
import json
import re

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from fedsim.bench import PlainLoop, bench
from fedsim.config import build, load

CONFIG = {
    "rounds": 1,
    "data": {
        "name": "synthetic",
        "examples": 66,
        "test_examples": 8,
        "classes": 3,
        "clients": 3,
        "partition": {"name": "dirichlet", "alpha": 1.0},
    },
    "model": "2nn",
    "strategy": "fedavg",
    "cohort": {"name": "fixed", "clients": [1]},
    "local": {"lr": 0.05, "batch_size": 5},
    "runtime": "serial",
}


@pytest.mark.parametrize("model", ["2nn", "cnn_bn"])
@pytest.mark.parametrize(
    "local",
    [
        {"epochs": 3},
        {"steps": 7},
        {"batch_size": "full", "epochs": 2},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"momentum": 0.9, "nesterov": True, "epochs": 2},
        {"clip_norm": 0.1},
        {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.9]},
        {"warmup": 3, "schedule": {"name": "step", "every": 2}},
    ],
    ids=str,
)
def test_one_client_ends_where_the_plain_loop_does(model, local):
    simulation = build(load(CONFIG, {"model": model} | {f"local.{key}": value for key, value in local.items()}))
    loop = PlainLoop(simulation)
    simulation.round()
    loop.train(1)
    ours, theirs = simulation.task.state_dict(simulation.server), loop.net.state_dict()
    for name in (name for name, tensor in theirs.items() if tensor.is_floating_point()):  # no counter of batches
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(theirs[name], loop.initial[name]) for name in theirs if name.endswith("weight"))


def test_the_plain_loop_starts_each_client_anew():
    simulation = build(load(CONFIG, {"cohort": "all"}))
    loop = PlainLoop(simulation)
    loop.train(2)
    alone = {name: value.clone() for name, value in loop.net.state_dict().items()}
    loop([0, 1, 2])
    assert all(torch.equal(alone[name], value) for name, value in loop.net.state_dict().items())


def test_a_strategy_that_keeps_something_is_timed_too():
    shown = io.StringIO()
    bench(load(CONFIG, {"cohort": "all", "strategy": "scaffold"}), 1, Console(file=shown, width=80))
    assert re.search(r"a checkpoint takes \d+\.\d% of a round", shown.getvalue())


def test_every_side_is_timed_and_told(tmp_path):
    shown, out = io.StringIO(), tmp_path / "bench.json"
    bench(load(CONFIG, {"cohort": "all"}), 2, Console(file=shown, width=80), out)
    found = json.loads(out.read_text())
    assert found.keys() == {"steps", "machine", "python", "torch", "seconds"}
    simulation = build(load(CONFIG, {"cohort": "all"}))
    assert found["steps"] == simulation.round().steps
    assert len(found["seconds"]) == (8 if "CPU" in found["machine"] else 7)
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert max(map(cell_len, shown.getvalue().splitlines())) <= 80
    assert all(side in shown.getvalue() for side in found["seconds"])
