"""Memory does not grow with the cohort, and hardly with the population: measured on whole processes."""

import json
import shutil
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys
from fedsim.experiment.config import load
from fedsim.experiment.build import build
config = load(json.loads(sys.argv[1]))
simulation = build(config)
for _ in range(config.rounds):
    simulation.round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""

KEEP = """
import json, os, resource, sys
from pathlib import Path
from time import perf_counter
import numpy as np
import torch
from fedsim.base.files import verify
from fedsim.federated.store import ClientStore

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def state(client, version):
    content = np.random.default_rng((client, version)).integers(-2**31, 2**31, size // 4, dtype=np.int32)
    return {"c": torch.from_numpy(content)}

def timed(action):
    begin = perf_counter()
    result = action()
    return perf_counter() - begin, result

def leave_page_cache():
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

folder, clients, size, memory, cohort = Path(sys.argv[1]), *map(int, sys.argv[2:])
figures = {"before": peak()}
rng, store, version = np.random.default_rng(0), ClientStore(folder, memory=memory), {}
ordered = [list(range(first, min(first + cohort, clients))) for first in range(0, clients, cohort)]
again = [[int(k) for k in rng.choice(clients, cohort, replace=False)] for _ in range(len(ordered) // 10)]
seconds = written = 0
for number, chosen in enumerate(ordered + again):
    for client in chosen:
        store.get(client)
        version[client] = number
        new = state(client, number)
        seconds += timed(lambda: store.stage(client, new))[0]
    written += len(chosen) * size
    seconds += timed(store.commit)[0] + timed(store.tidy)[0]
    if number % 10 == 9:
        took, files = timed(store.flush)
        store.pinned = {file.name for file in files}
        seconds += took + timed(store.tidy)[0]
took, files = timed(store.flush)
figures |= {"seconds": seconds + took, "bytes": sum(path.stat().st_size for path in folder.iterdir())}
figures |= {"megabytes_a_second": written / figures["seconds"] / 1e6}
store = ClientStore(folder, memory=memory)
figures["restore_seconds"], _ = timed(lambda: store.restore(files))
assert len(store) == clients
chosen = [int(client) for client in rng.choice(clients, 100)]
leave_page_cache()
figures["milliseconds_a_read"] = 10 * sum(timed(lambda: store.get(client))[0] for client in chosen)
for client in chosen:
    assert store[client]["c"].equal(state(client, version[client])["c"])
figures["peak"] = peak()
leave_page_cache()
figures["verify_seconds"], _ = timed(lambda: [verify(folder, file, {}) for file in files])
figures["peak_with_verification"] = peak()
print(json.dumps(figures))
"""


def peak_memory(**settings):
    """Bytes, of a process that runs its rounds."""
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


def kept(cohort):
    """With 1 MB that each of 300 clients keeps, and room for 32."""
    dataset = {"name": "synthetic", "examples": 600, "test_examples": 10, "shape": [1, 32, 32]}
    return peak_memory(
        rounds=5,
        data={**dataset, "clients": 300, "partition": "iid"},
        model="2nn",
        strategy="scaffold",
        cohort={"name": "uniform", "size": cohort},
        local={"steps": 1},
        client_store={"memory": "32MiB"},
    )


def keep(folder, clients, *, size=6_000_000, memory=2**28, cohort=100):
    """Figures of a process that keeps so many random states, trains a tenth of them again, and reads some."""
    folder.mkdir()
    try:
        command = [sys.executable, "-c", KEEP, *map(str, (folder, clients, size, memory, cohort))]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(folder)


def test_a_cohort_of_two_hundred_needs_no_more_than_one_of_twenty():
    """In which each of two workers has as many messages wait as it ever has, however busy the machine."""
    assert (
        cohort(200) < cohort(20) + 64 * 2**20
    )  # of 6.7 MB a client; two such processes differ by up to 50 MiB anyway


def test_a_hundred_thousand_clients_need_little_more_than_a_hundred():
    assert population(100_000) < population(100) + 200e6


def test_what_clients_keep_needs_no_more_memory_than_is_allowed():
    """Nor does what a large cohort would keep, before the round counts."""
    assert kept(100) < kept(5) + 32 * 2**20 + 150e6


@pytest.mark.slow
def test_sixty_gigabytes_of_states_need_no_more_memory_than_is_allowed(tmp_path, capsys):
    """Less where the disk is smaller."""
    free = shutil.disk_usage(tmp_path).free
    figures = keep(tmp_path / "clients", 10_000 if free > 80e9 else int(0.6 * free / 7e6))
    with capsys.disabled():
        print(figures)
    assert figures["peak_with_verification"] < figures["before"] + 2**28 + 500e6


@pytest.mark.slow
def test_a_round_over_a_million_clients_costs_what_one_over_a_thousand_does():
    assert population(1_000_000) < population(1000) + 200e6
