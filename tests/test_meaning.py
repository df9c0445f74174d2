"""Laws of labels and numbers: they mean the same on all machines of a federation, or a machine does not join."""

import json
import logging
import unicodedata
from dataclasses import replace
from uuid import uuid4

import numpy as np
import pytest
import yaml
from PIL import Image

from fedsim.data import DATASETS
from fedsim.errors import ConfigError
from fedsim.experiment.build import build, build_data, build_dataset, build_server_data
from fedsim.experiment.config import load, parse_overrides
from fedsim.experiment.folder import describe
from fedsim.flower import wire
from fedsim.flower.messages import Invitation, Joined
from fedsim.flower.node import Node, NodeSettings
from fedsim.flower.node_process import respond
from fedsim.flower.plan import MAX_NAMES_LENGTH, Plan, initial_of, plan_of
from fedsim.flower.shards import server_data, write_shards

NAMES = ["benign", "malignant", "normal"]
ABOUT = {"mean": [0.5], "std": [0.25]}
CONFIG = {"rounds": 1, "model": "2nn", "strategy": "fedavg", "cohort": "all", "runtime": "serial"}
RNG = np.random.default_rng(0)


def arrays(path, brightest=256, dtype=np.uint8, side=8, classes=3, **more):
    """An .npz file of images (n, side, side, 1), as the options of the data set that reads it."""
    x = RNG.integers(0, brightest, (24, side, side, 1)).astype(dtype)
    y = np.arange(24) % classes
    np.savez(path, x_train=x[:18], y_train=y[:18], x_test=x[18:], y_test=y[18:], **more)
    return {"name": "npz", "path": str(path)}


def simulation(data, **settings):
    """Of the server, with its own data."""
    config = load(CONFIG | {"data": {"clients": 1} | data | settings})
    return build(config, build_server_data(config))


def joined(node, data, **settings):
    """What a node answers to the invitation of the server with these data."""
    server = simulation(data, **settings)
    plan = plan_of(server.config, server.data).json_text()
    content = wire.record(Invitation(uuid4().hex, plan, initial_of(server.task)))
    return wire.read(Joined, respond(node, content))


@pytest.fixture
def answer(tmp_path):
    """What a node with the first data answers to a server with the second."""
    made = []

    def ask(here, there, **settings):
        made.append(Node(NodeSettings.of({"name": f"n{len(made)}", "data": here, "state": str(tmp_path)})))
        return joined(made[-1], there, **settings)

    yield ask
    for node in made:
        node.close()


@pytest.mark.parametrize(
    ("here", "there", "why"),
    [
        (
            {"classes": ["malignant", "benign", "normal"]},
            {"classes": NAMES},
            "data.classes: label 0 is 'malignant' here, and 'benign' in the federation, whose classes are benign,",
        ),
        (
            {"classes": [*NAMES, "x"]},
            {"classes": NAMES},
            "data.classes: 4 classes here, and 3 in the federation",
        ),
        (
            {"classes": NAMES},
            {"classes": [*NAMES, "x"]},
            "data.classes: 3 classes here, and 4 in the federation",
        ),
        ({"classes": NAMES}, {"classes": 5}, "data.classes: 3 here, and 5 in the federation"),
        ({"classes": 4}, {"classes": 5}, "data.classes: 4 here, and 5 in the federation"),
        (
            {"mean": [0.5], "std": [0.3]},
            ABOUT,
            "data.std: [0.3] here, and [0.25] in the federation; set the same on both",
        ),
        ({"mean": [0.4], "std": [0.25]}, ABOUT, "data.mean: [0.4] here, and [0.5] in the federation"),
        ({"mean": [0.1307], "std": [0.3081]}, {}, "data.mean: [0.1307] here, and [0] in the federation"),
        ({"mean": []}, ABOUT, "data.mean: [0] here, and [0.5] in the federation"),
    ],
)
def test_what_means_something_else_is_refused_by_its_name(tmp_path, answer, here, there, why):
    data = arrays(tmp_path / "a.npz")
    assert why in answer(data | here, data | there).error


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"classes": NAMES}, {"classes": NAMES}),
        ({}, {"classes": 5}),  # a node may lack the last classes, where it does not say how many there are
        ({}, ABOUT),  # the federation's
        (ABOUT, ABOUT),
        ({"mean": [0.0], "std": [1.0]}, {}),
    ],
)
def test_what_means_the_same_joins(tmp_path, answer, here, there):
    data = arrays(tmp_path / "a.npz")
    found = answer(data | here, data | there)
    assert found.error is None
    unnamed = "the data of the node and the server has no names of classes"
    assert [note.partition(",")[0] for note in found.notes] == ([] if here.get("classes") else [unnamed])


def test_a_node_knows_how_its_numbers_were_made(tmp_path, answer, monkeypatch):
    data = arrays(tmp_path / "a.npz")
    larger = arrays(tmp_path / "b.npz", side=12)
    said = answer(larger, data, crop=6).error
    assert said == "data: before the crop, examples have shape [1, 12, 12], and the federation's [1, 8, 8]"
    (tmp_path / "own_scans.py").write_text(
        "import torch\nfrom fedsim.data import Dataset\ndef scans(*, window: str):\n"
        "    x, y = torch.rand(9, 5), torch.arange(9) % 3\n    return Dataset(x, y, x, y, 3, preparation=window)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scans = {"name": "own_scans:scans"}
    said = answer(scans | {"window": "HU -1000 to 400"}, scans | {"window": "HU 0 to 80"}).error
    assert said == "data: files become numbers by HU -1000 to 400, and the federation's HU 0 to 80"
    assert answer(scans | {"window": ""}, scans | {"window": "HU 0 to 80"}).error is None


@pytest.mark.parametrize(
    ("brightest", "odd"), [(256, ""), (40, ""), (17, "less than 1/8 of"), (2, "less than 1/8")]
)
def test_numbers_on_another_scale_are_told(tmp_path, answer, brightest, odd):
    """Such as images of 12 bits in files of 16, or masks of 0 and 1 beside masks of 0 and 255."""
    here, there = arrays(tmp_path / "a.npz", brightest), arrays(tmp_path / "b.npz")
    notes = " ".join(answer(here | {"classes": NAMES}, there | {"classes": NAMES}).notes)
    assert odd in notes
    assert bool(odd) == bool(notes)


def test_names_are_compared_whoever_knows_them_and_however_many(tmp_path, answer, caplog):
    many = [f"{'class' * 20} {i}" for i in range(700)]
    assert sum(map(len, many)) > MAX_NAMES_LENGTH
    data = arrays(tmp_path / "a.npz")
    swapped = [many[1], many[0], *many[2:]]
    plan = simulation(data | {"classes": many})
    assert len(plan_of(plan.config, plan.data).json_text()) < 5000
    assert answer(data | {"classes": many}, data | {"classes": many}).error is None
    said = answer(data | {"classes": swapped}, data | {"classes": many}).error
    assert said.startswith("data.classes: the names of the 700 classes here are not the federation's; set data.cl")
    caplog.clear()
    caplog.set_level(logging.INFO)
    for here, there, who in (({"classes": NAMES}, {}, "server"), ({}, {"classes": NAMES}, "node")):
        (note,) = answer(data | here, data | there).notes
        assert note.startswith(f"the data of the {who} has no names of classes")
        assert note in caplog.text


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["a\nb", "b", "c"], "should be up to 200 printable characters"),
        (["a" * 201, "b", "c"], "should be up to 200 printable characters"),
        ([1, 2, 3], "plan.examples.class_names"),
        ({"a": 1}, "plan.examples.class_names"),
        (["a"] * 100_000, "characters; allowed: up to"),
    ],
)
def test_a_plan_has_no_other_names(tmp_path, names, why):
    server = simulation(arrays(tmp_path / "a.npz"))
    plan = json.loads(plan_of(server.config, server.data).json_text())
    plan["examples"]["class_names"] = names
    with pytest.raises(ConfigError) as caught:
        Plan.read(json.dumps(plan) + " " * (2**20 if len(names) > 3 else 0))
    assert why in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_shards_carry_what_labels_and_numbers_mean(tmp_path, answer):
    """Names that two file systems store differently are the same."""
    for number, name in enumerate(("gutartig", "bösartig")):
        for part, count in (("train", 9), ("test", 3)):
            folder = tmp_path / "tree" / part / unicodedata.normalize("NFD", name)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(RNG.integers(0, 128 * number + 100, (9, 9), np.uint8)).save(folder / f"{i}.png")
    images = {"name": "image_folder", "root": str(tmp_path / "tree"), "size": 8}
    about = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    config = CONFIG | {"data": images | about | {"clients": 2}}
    whole, folder, names = build_data(load(config)), tmp_path / "shards", ("bösartig", "gutartig")
    write_shards(whole, folder)
    override = f"data={server_data(whole, build_dataset(load(config)), folder)}"
    served = load(config, parse_overrides([override]))
    data = build_server_data(served)
    assert data.class_names == whole.class_names == names
    assert describe(data)["class_names"] == [*names]
    assert data.form == whole.form
    for k in range(2):
        own = yaml.safe_load((folder / f"{k}.yaml").read_text())["data"]
        own["path"] = str(folder / own["path"])
        assert (own["mean"], own["std"]) == (about["mean"], about["std"])
        server = {name: value for name, value in served.data.items() if name != "clients"}
        assert answer(own, server).error is None
        assert answer(own, server).notes == ()
        assert "data.mean: " in answer(own, server | {"mean": [0.5] * 3}).error
        other = images | about | {"classes": ["gutartig", "bösartig"]}
        assert "label 0 is 'bösartig' here, and 'gutartig' in" in answer(own, other).error


def test_arrays_may_name_their_classes(tmp_path):
    data = arrays(tmp_path / "a.npz", class_names=np.array(NAMES))

    def made(**options):
        return DATASETS.bind(data | options)()

    assert made().class_names == made(classes=3).class_names == made(classes=NAMES).class_names == tuple(NAMES)
    for classes, why in (
        (NAMES[::-1], "label 0 is 'normal' in data.classes, and 'benign' in the file"),
        (4, "class_names has 3 names, and data.classes is 4"),
    ):
        with pytest.raises(ConfigError, match=why):
            made(classes=classes)
    for names, why in (
        (np.arange(3), "class_names is int64 (3,); allowed: text (classes,)"),
        (np.array([NAMES]), "class_names is <U9 (1, 3); allowed: text (classes,)"),
        (np.array(NAMES[:2]), "numbers from 0 to 2; allowed: 0 to 1"),
        (np.array(NAMES, dtype=object), "a.npz is not an .npz file of plain arrays"),
    ):
        arrays(tmp_path / "a.npz", class_names=names)
        with pytest.raises(ConfigError) as caught:
            made()
        assert why in str(caught.value)


def test_a_dataset_has_as_many_names_as_classes():
    data = DATASETS.bind({"name": "synthetic", "examples": 9, "classes": 3})()
    for names in (("a", "b"), ["a"] * 3, (1,) * 3):
        with pytest.raises(ConfigError, match="class_names"):
            replace(data, class_names=names)
