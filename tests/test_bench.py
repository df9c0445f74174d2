"""The benchmark is fair: the plain loop trains as fedsim's clients do, to the last step."""

import io
import json
import re

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from fedsim.bench import AUGMENTED, PlainLoop, _sides, bench
from fedsim.bench_input import FEDSIM, TORCHVISION, Cutout, input_line, pipeline
from fedsim.config import build, load
from fedsim.data import AUGMENTATIONS
from fedsim.local import LocalObjective
from fedsim.task import Replica
from fedsim.types import Job

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


IMAGES = {"data.shape": [3, 8, 8], "data.examples": 12, "model": "2nn", "cohort": "all", "local.epochs": 2}
STILL = {  # options that leave nothing to chance
    "random_crop": {"padding": 0},
    "flip": {"p": 1},
    "rotation": {"degrees": 0},
    "color_jitter": {"brightness": 0, "contrast": 0, "saturation": 0},
    "cutout": {"holes": 1, "length": 16},
    "random_resized_crop": {"scale": [1, 1], "ratio": [1, 1]},
    "mixup": {"p": 0},
    "cutmix": {"p": 0},
}


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_both_pipelines_make_the_same_batches_of_the_same_rows(name):
    config = load(CONFIG, IMAGES | {"local.augment": [{"name": name, **STILL[name]}]})
    simulation = build(config)
    images, batches, collate = pipeline(config, simulation)
    replica, buffers = Replica(simulation.task), simulation.task.initial_buffers
    theirs = iter(batches)
    for client in simulation.sample():
        job = Job(client, 0, None)
        for ours in LocalObjective(replica, simulation.data, job, buffers, simulation.recipe).batches():
            x, y = collate([images[i] for i in next(theirs)])
            torch.testing.assert_close(x, ours.x, rtol=0, atol=1e-5)
            assert torch.equal(y, ours.y)
    assert next(theirs, None) is None


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_mixed_batch_of_torchvision_has_mixed_labels(name):
    config = load(CONFIG, IMAGES | {"local.augment": [name]})
    images, batches, collate = pipeline(config, build(config))
    _, y = collate([images[i] for i in batches[0]])
    assert y.shape == (len(batches[0]), 3)
    torch.testing.assert_close(y.sum(1), torch.ones(len(y)))


def test_torchvisions_side_cuts_squares_out_of_a_copy():
    torch.manual_seed(0)
    image = torch.ones(2, 9, 7)
    for _ in range(50):
        cut = Cutout(holes=1, length=3)(image)
        hidden = (cut[0] == 0).nonzero()
        height, width = (hidden.amax(0) - hidden.amin(0) + 1).tolist()
        assert {height, width} <= {2, 3}  # 2 at the edge
        assert len(hidden) == height * width
        assert torch.equal(cut[0], cut[1])
    assert image.min() == 1


def test_every_side_is_timed_and_told(tmp_path):
    shown, out = io.StringIO(), tmp_path / "bench.json"
    augment = ["color_jitter", "random_crop", "flip", "rotation", "cutout"]
    settings = {"local.augment": augment, "local.oversample": True, "strategy": "scaffold"}
    config = load(CONFIG, IMAGES | settings)
    bench(config, 2, Console(file=shown, width=80), out)
    found, told = json.loads(out.read_text()), shown.getvalue()
    assert found.keys() == {"steps", "machine", "python", "torch", "seconds"}
    simulation = build(config)
    assert found["steps"] == simulation.round().steps
    assert list(found["seconds"]) == list(_sides(config, simulation))
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert max(map(cell_len, told.splitlines())) <= 80
    assert all(side in told for side in found["seconds"])
    assert (
        "left out on all sides: local.oversample\nleft out on all sides but the augmented ones: local.augment"
        in told
    )
    line = r"^augmented batch: \d+\.\d\d ms, \d+\.\d% of a client step; by torchvision \d+\.\d\d ms$"
    assert re.search(line, told, re.M)
    assert re.search(r"a checkpoint takes \d+\.\d% of a round", told)


def test_input_pipelines_are_sides_where_images_are_augmented():
    def sides(settings):
        config = load(CONFIG, {"runtime.device": "cpu"} | settings)
        return _sides(config, build(config)).keys()

    assert len(sides({})) == 8
    assert sides({"local.augment": ["flip"]}) == sides({}) | {AUGMENTED, FEDSIM, TORCHVISION}
    assert sides({"local.augment": ["fedsim.data.augment:flip"]}) == sides({}) | {AUGMENTED, FEDSIM}
    vectors = {"data": {"name": "synthetic_iid", "clients": 30}}
    assert sides(vectors | {"local.augment": ["mixup"]}) == sides(vectors)


def test_shares_and_milliseconds_are_medians_of_turns():
    seconds = {FEDSIM: [1.0, 2.0, 9.0], TORCHVISION: [4.0, 6.0, 5.0], "serial": [10.0, 10.0, 18.0]}
    line = "augmented batch: 20.00 ms, 20.0% of a client step; by torchvision 50.00 ms"
    assert input_line(seconds, "serial", 100) == line


def test_the_line_says_that_torchvision_has_no_such_thing():
    assert input_line({FEDSIM: [1.0], "serial": [5.0]}, "serial", 1000).endswith("; torchvision lacks an entry")
