"""What users of release 0.1 import and read still works."""

import importlib
import re
import subprocess
import sys

import pytest
import torch

import fedsim
from fedsim import moved
from fedsim.types import Batch, RoundInfo

NAMES = {  # of each old module, what users have imported from it
    "aggregate": ["WeightedMean", "largest"],
    "availability": ["Availability"],
    "catalogue": ["Catalogue", "matching", "options_of"],
    "checkpoint": ["Checkpoints"],
    "cohort": ["COHORTS"],
    "config": ["build", "build_data", "build_recipe", "build_task", "load", "parse_overrides", "Config"],
    "files": ["write"],
    "hooks": ["HOOKS", "Hook"],
    "local": ["LocalObjective", "Correction", "Loss", "check_precision"],
    "losses": ["LOSSES", "cross_entropy"],
    "objective": ["batch_rows"],
    "optim": ["SGD", "Adam", "LARS"],
    "plot": ["curves"],
    "progress": ["Bar"],
    "recipe": ["Recipe"],
    "schedules": ["SCHEDULES"],
    "simulation": ["Failures", "Simulation"],
    "store": ["ClientStore"],
    "strategies.fedadam": ["FedAdam", "FedYogi", "FedAdagrad"],
    "strategies.fedavg": ["FedAvg"],
    "strategies.fedbn": ["FedBN"],
    "strategies.fedprox": ["FedProx"],
    "strategies.fedsgd": ["FedSGD"],
    "strategies.scaffold": ["Scaffold"],
    "strategy": ["Buffers", "Strategy", "Wrapper"],
    "task": ["Layout", "Replica", "Task"],
    "work": ["Train"],
}


def test_every_old_module_has_its_names():
    assert NAMES.keys() == moved.MOVED.keys()
    for module, names in NAMES.items():
        old = importlib.import_module(f"fedsim.{module}")
        for name in names:
            assert getattr(old, name) is not None


def test_a_name_that_is_nowhere_is_an_attribute_error():
    with pytest.raises(AttributeError, match=re.escape("module 'fedsim.task' has no attribute 'nowhere'")):
        importlib.import_module("fedsim.task").nowhere  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fedsim.nowhere")


def test_an_old_name_is_the_new_one():
    from fedsim.strategy import Strategy
    from fedsim.task import Layout

    assert Strategy is fedsim.Strategy
    assert Layout is fedsim.Layout


def test_old_fields_are_the_new_ones():
    one, two, three = (torch.tensor([k]) for k in range(3))
    batch = Batch(one, one, mixed_labels=one, mix_weight=two, label_error_prob=three)
    assert (batch.other, batch.share, batch.doubt) == (one, two, three)
    info = RoundInfo(0, [0], 1, torch.Generator(), cohort_examples=3, total_examples=6)
    assert (info.held, info.examples, info.share) == (3, 6, 0.5)


def test_old_modules_may_be_imported_before_torch_and_whole():
    script = "import fedsim.config, fedsim.simulation, torch\nfrom fedsim.task import *\nassert Task and Layout"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
