"""Memory does not grow with the cohort, and hardly with the population: measured on whole processes."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys
from fedsim.config import build, load
simulation = build(load(json.loads(sys.argv[1])))
simulation.round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_memory(**settings):
    """Bytes, of a process that runs a round."""
    config = {"rounds": 1, "strategy": "fedavg", "runtime": {"name": "threads", "workers": 2, "device": "cpu"}}
    command = [sys.executable, "-c", MEASURE, json.dumps(config | settings)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cohort(size):
    dataset = {"name": "synthetic", "examples": 10_000, "test_examples": 100, "shape": [1, 28, 28]}
    return peak_memory(
        data={**dataset, "clients": 1000, "partition": "iid"},
        model="cnn",
        cohort={"name": "uniform", "size": size},
        local={"batch_size": "full"},
    )


def population(clients):
    dataset = {"name": "synthetic", "examples": 1_000_000, "test_examples": 100, "shape": [1, 4, 4]}
    return peak_memory(
        data={**dataset, "clients": clients, "partition": "iid"},
        model="2nn",
        cohort={"name": "uniform", "size": 10},
        local={"steps": 1},
    )


def test_a_cohort_of_a_thousand_needs_no_more_than_one_of_ten():
    assert cohort(1000) < cohort(10) + 32 * 2**20  # what two such processes differ by anyway


def test_a_hundred_thousand_clients_need_little_more_than_a_hundred():
    assert population(100_000) < population(100) + 200e6


@pytest.mark.slow
def test_a_round_over_a_million_clients_costs_what_one_over_a_thousand_does():
    assert population(1_000_000) < population(1000) + 200e6
