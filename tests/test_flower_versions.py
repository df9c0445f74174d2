"""Federations of two versions of flwr: nodes of either join, what drives the rounds has the SuperLink's."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml

pytest.importorskip("flwr")

from flowers import BIN, Federation, tail, until
from lab import CONFIG

import fedsim
from fedsim.experiment.build import build_data
from fedsim.experiment.config import load
from fedsim.flower import KNOWN
from fedsim.flower.shards import client_name, write_shards

pytestmark = pytest.mark.slow  # each starts a SuperLink, three nodes and one or two drivers

SHORT = CONFIG | {"rounds": 2, "strategy": "scaffold"}
HERE = version("flwr")
OTHER = next(each for each in KNOWN if not HERE.startswith(f"{each}."))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with the other flwr, from the package index; its requirements are those of the one that is here."""
    folder = tmp_path_factory.mktemp("flwr")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        f"flwr=={OTHER}.*",
    ]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"flwr {OTHER} cannot be installed: {done.stderr.strip()}")
    return str(folder)


@pytest.fixture
def federation(tmp_path):
    write_shards(build_data(load(SHORT)), tmp_path / "shards")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SHORT))
    return Federation(tmp_path / "lab", auth=True)


def of(federation, flwr):
    """Have what is started from now on take flwr from this folder, or from the environment."""
    if flwr is None:
        federation.env.pop("PYTHONPATH", None)
    else:
        federation.env["PYTHONPATH"] = flwr


def start_nodes(federation, versions):
    for k, flwr in enumerate(versions):
        path = str(federation.folder.parent / "shards" / f"{k}.npz")
        of(federation, flwr)
        data = {"name": "npz", "path": path, "channels": "first", "classes": 3}
        node = federation.node(client_name(k, 3), {"data": data})
        until(lambda node=node: "connected" in tail(node), "node", process=node)


def served(federation, name, *settings):
    """`fedsim serve` to its end: its exit status, the last line that it printed, and the run's fingerprint."""
    folder = federation.folder.parent
    nodes = ",".join(client_name(k, 3) for k in range(3))
    to = ["--superlink", federation.address, "--ca", federation.ca, "--nodes", nodes, "--out", folder / name]
    process = federation.start(name, BIN / "fedsim", "serve", folder / "c.yaml", *settings, *to)
    status = process.wait(600)
    summary = folder / name / "summary.json"
    found = yaml.safe_load(summary.read_text())["fingerprint"] if status == 0 else None
    return status, tail(process).splitlines()[-1], found


def test_nodes_of_either_version_join_and_change_nothing(federation, other):
    with federation:
        start_nodes(federation, [other, None, other])
        of(federation, None)
        status, said, fingerprint = served(federation, "run")
        assert status == 0, said
        assert fingerprint == fedsim.run(SHORT).summary["fingerprint"]


def test_the_superlinks_version_is_that_of_whoever_drives_the_rounds(federation, other):
    of(federation, other)
    with federation:
        start_nodes(federation, [None, other, None])
        of(federation, None)
        status, said, _ = served(federation, "refused", "runtime.wait=5")
        assert status == 1
        assert f"flwr {HERE} is installed here, and the SuperLink" in said
        assert f"{OTHER}." in said
        of(federation, other)
        status, said, fingerprint = served(federation, "run")
        assert status == 0, said
        assert fingerprint == fedsim.run(SHORT).summary["fingerprint"]
