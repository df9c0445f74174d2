"""A small federation that every law is tried on, made of the parts a config would name."""

import gc
import hashlib
import os
import signal
import sys
import tempfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import Forks
from hypothesis import HealthCheck, settings
from small_run import IN_MEMORY, write
from torch import nn

import fedsim.cli
from fedsim import LocalObjective, Recipe, Simulation, Strategy, Task
from fedsim.base.catalogue import options_of
from fedsim.data import Dataset, FederatedData
from fedsim.federated.cohort import COHORTS
from fedsim.runtimes import RUNTIMES
from fedsim.strategies import CATALOGUE
from fedsim.training.local import ClientObjective
from fedsim.training.replica import Replica
from fedsim.types import Job

# Examples are bounded by their number: how long one takes says how busy the machine is.
settings.register_profile("fedsim", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedsim")

SIZES = (3, 8, 5, 13, 2, 6)  # examples a client
SHAPE, CLASSES = (1, 4, 4), 3


@pytest.fixture(autouse=True)
def _one_thread():
    """A test's own loops compute as fedsim's clients do; on networks this small more threads only wait."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Also where a shell started the tests in the background, which has Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """For what tests start, too: no choice of a runtime is the user's or becomes it. Fonts stay where they lie."""
    before = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(before / "matplotlib")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_modules_of_other_tests(tmp_path_factory):
    """A module that a test wrote is forgotten after it, so that the next may write one of the same name."""
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name, module in [*sys.modules.items()]:
        if (getattr(module, "__file__", None) or "").startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Starts `fedsim` commands as processes, at once."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture
def folder():
    """With the config of a small run. In memory where that can be: a kill does not ask whether a disk has it."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        write(Path(name))
        yield Path(name)


@pytest.fixture
def fedsim_(monkeypatch, capsys):
    """Calls the command in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedsim", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            fedsim.cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(status=caught.value.code, out=out, err=err)

    return call


def make_data(sizes=SIZES, *, shape=SHAPE, classes=CLASSES, noise=0.5, public=0, dtype=torch.float32):
    """A picture a class, plus noise; classes take turns, clients hold rows at random, the server the last ones."""
    rng, n, tests = np.random.default_rng(0), sum(sizes) + public, 17
    y = torch.arange(n + tests) % classes
    x = torch.from_numpy(rng.normal(size=(classes, *shape))[y] + noise * rng.normal(size=(len(y), *shape))).float()
    owners = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    dataset, servers = Dataset(x[:n], y[:n], x[n:], y[n:], classes), np.arange(n) >= n - public
    return FederatedData(dataset, owners, clients=len(sizes), public=servers, dtype=dtype)


def conv_net(dropout=0.5, bn_momentum=0.1):
    """Convolution, batch norm, dropout, and names such as the shared models have."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 3, 3, padding=1),
            bn1=nn.BatchNorm2d(3, momentum=bn_momentum),
            relu1=nn.ReLU(),
            dropout=nn.Dropout(dropout),
            flatten=nn.Flatten(),
            fc=nn.Linear(3 * 16, CLASSES),
        )
    )


def make_task(network=conv_net, *, dtype=torch.float32, shape=SHAPE, classes=CLASSES, seed=0, **options):
    """A task whose network always starts with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Task(network().to(dtype), shape, classes, **options)


FEW = {"krum": {"attackers": 0}}  # settings of strategies whose defaults are for larger cohorts than these
NEEDED = {"inner": "fedavg", "layers": ["fc*"], "size": 2}  # what options without a default get
WHOLE = {"afl"}  # strategies that need all clients in each round
PARTIAL = [name for name in CATALOGUE if name not in WHOLE]


def cohort_for(name, some):
    """The cohort `some`, or all clients for a strategy that needs them."""
    return "all" if name in WHOLE else some


def make_strategy(name, **settings) -> Strategy:
    """By its name, as a config does."""
    fields = options_of(CATALOGUE.load(name)).model_fields
    needed = {key: value for key, value in NEEDED.items() if key in fields and fields[key].is_required()}
    return CATALOGUE.bind({"name": name} | FEW.get(name, {}) | needed | settings)()


def make_simulation(
    strategy="fedavg",
    *,
    task=None,
    data=None,
    runtime="serial",
    cohort="all",
    seed=0,
    failures=None,
    recalibrate=None,
    ema=None,
    **recipe,
):
    """All parts have a default; what is left over is the recipe's. A runtime may be one that is there already."""
    recipe = Recipe(**{"lr": 0.05, "batch_size": 4} | recipe)
    dtype = task.initial_model.dtype if task else torch.float32
    strategy = make_strategy(strategy) if isinstance(strategy, str) else strategy
    task = task or make_task(channels_last=recipe.channels_last)
    data = data or make_data(dtype=dtype, public=4 if strategy.uses_public else 0)
    runtime = {"name": runtime} if isinstance(runtime, str) else runtime
    return Simulation(
        strategy,
        task,
        data,
        RUNTIMES.bind(on_cpu(runtime))(task, data) if isinstance(runtime, dict) else runtime,
        COHORTS.bind(cohort),
        recipe,
        recalibrate=recalibrate,
        ema=ema,
        seed=seed,
        **({"failures": failures} if failures else {}),
    )


def on_cpu(spec):
    """A runtime's spec, with the device where it has that option."""
    return ({"device": "cpu"} if "device" in options_of(RUNTIMES.load(spec["name"])).model_fields else {}) | spec


def make_local(task, data=None, *, client=0, number=0, seed=0, replica=None, **recipe) -> LocalObjective:
    """One client in one round, outside any simulation."""
    data = data or make_data(dtype=task.initial_model.dtype)
    recipe = Recipe(**{"lr": 0.05, "batch_size": 4} | recipe)
    replica = replica or Replica(task)
    return ClientObjective(replica, data, Job(client, number, {}), task.initial_buffers, recipe, seed)


def trace_on_ray(strategy, **settings):
    """The same in Ray's runtime, of which no process is left."""
    ray = pytest.importorskip("ray")
    try:
        return trace(make_simulation(strategy, runtime={"name": "ray", "actors": 2, "cpus": 0.2}, **settings))
    finally:
        ray.shutdown()
        gc.collect()


def trace(simulation, rounds=3):
    """All that a run shows, to the bit: one record a round."""
    return [_record(simulation, simulation.round()) for _ in range(rounds)]


def _record(simulation, done):
    shown = done.record() | {
        "server": _digests(simulation.server),
        "clients": {k: _digests(state) for k, state in simulation.clients.items()},
        "past": [values.tobytes() for values in simulation.past[:2]],  # without virtual seconds
        "test": simulation.evaluate(batch_size=7),
        "own": simulation.evaluate_clients(batch_size=5),
    }
    del shown["seconds"]
    return shown


def _digests(state):
    return {name: hashlib.sha256(tensor.cpu().numpy().data).hexdigest()[:16] for name, tensor in state.items()}


close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
