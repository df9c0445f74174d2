"""A round costs what its cohort costs, whatever the population; and what it does not need is not imported."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import make_data, make_simulation, make_task
from torch import nn

import fedsim
from fedsim.experiment.folder import MAX_LISTED_CLIENTS, _json, describe
from fedsim.federated.availability import Availability, _uniform
from fedsim.types import Stream, random

MILLION = 10**6
ROUGH = Availability(drop=0.2, stragglers=0.2, jitter=0.5, over_selection=1.5, deadline=60.0)


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(1, 3))


def federation(clients, **settings):
    """Of so many clients with one example each, ten a round."""
    return make_simulation(
        task=make_task(linear, shape=(1, 1, 1)),
        data=make_data([1] * clients, shape=(1, 1, 1)),
        cohort={"name": "uniform", "size": 10},
        **settings,
    )


def allocated(simulation):
    """Bytes that Python and numpy have at most in a round, beyond what was there before; after one more."""
    simulation.round()
    tracemalloc.start()
    try:
        simulation.round()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def million():
    return federation(MILLION, strategy="scaffold")


@pytest.mark.parametrize("availability", [None, ROUGH], ids=["all answer", "some do not"])
def test_a_round_over_a_million_clients_makes_nothing_of_their_number(million, availability):
    """A flag a client would take a megabyte."""
    million.availability = availability
    assert allocated(million) < MILLION / 4


def test_clients_are_kept_that_took_part(million):
    million.availability = None
    million.round()
    assert len(million.clients) <= 20 * million.number


def test_what_a_run_says_of_its_partition_does_not_grow_with_the_population(million):
    few = make_data([1] * (MAX_LISTED_CLIENTS + 1))
    told = describe(million.data)
    assert len(_json(told)) < 1.1 * len(_json(describe(few)))
    assert told["clients"] == sum(told["labels"]) == MILLION
    assert told["training_examples"] == {"smallest": 1, "quartiles": [1, 1, 1], "mean": 1, "largest": 1}


def test_labels_of_all_are_those_of_each_added_up():
    told = describe(make_data(public=4))
    assert told["labels"] == np.sum(told["labels_by_client"], 0).tolist()
    assert sum(told["labels"]) == told["examples"] - told["public"]


@pytest.mark.parametrize("clients", [[0], [5, 6, 7], [0, 999], list(range(1000))])
def test_a_clients_chance_is_the_one_it_has_when_all_are_drawn(clients):
    every = random(3, Stream.AVAILABILITY, 1, 2).random(1000)
    assert _uniform(clients, 3, 1, 2).tolist() == every[clients].tolist()


def test_others_are_selected_as_if_from_a_list_of_them():
    cohort = sorted(np.random.default_rng(0).choice(500, 50, replace=False).tolist())
    for number in range(20):
        others = np.setdiff1d(np.arange(500), cohort)
        extra = random(0, Stream.AVAILABILITY, number, 1).choice(others, 25, replace=False)
        assert Availability(over_selection=1.5).select(cohort, 500, 0, number) == sorted(
            [*cohort, *extra.tolist()]
        )


# What is imported

FIRST_ROUND = """
import sys
import fedsim, fedsim.cli.commands
def absent(*names):
    assert not (there := [name for name in names if name in sys.modules]), there
absent("torch", "numpy", "pydantic")
from fedsim.experiment.config import load
from fedsim.experiment.start import new_run
import fedsim.experiment.progress
runs, _ = new_run(load({
    "rounds": 1, "data": {"name": "mnist", "root": sys.argv[1], "clients": 2}, "model": "cnn",
    "strategy": "fedavg", "cohort": "all", "local": {}, "runtime": {"name": "threads", "device": "cpu"},
}))
runs.simulation.round()
runs.simulation.evaluate()
absent("torchvision", "matplotlib", "tensorboard", "scipy", "sklearn", "pandas", "ray", "flwr", "PIL", "sympy")
absent("torch._dynamo", "torch._inductor", "torch.distributed.fsdp")
"""


def idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4) for n in values.shape)
    path.write_bytes(header + values.tobytes())


def test_the_first_round_imports_no_more_than_it_needs(tmp_path):
    """In a process of its own; `fedsim --help` needs not even torch."""
    folder, rng = tmp_path / "MNIST/raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for stem, n in (("train", 20), ("t10k", 5)):
        idx(folder / f"{stem}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        idx(folder / f"{stem}-labels-idx1-ubyte", rng.integers(0, 10, n, dtype=np.uint8))
    subprocess.run([sys.executable, "-c", FIRST_ROUND, str(tmp_path)], check=True)


def test_every_public_name_is_there_when_asked_for():
    for name in dir(fedsim):
        getattr(fedsim, name)
    assert {"run", "resume", "Strategy", "ConfigError", "State"} <= set(dir(fedsim))
    with pytest.raises(AttributeError, match="'fedsim' has no attribute 'no_such'"):
        fedsim.no_such  # noqa: B018
