"""Random numbers in strategies, and runs under the modes and flags of the program around them."""

import random
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data, make_simulation, make_task
from torch import nn
from torch.nn import functional as F

import fedsim
from fedsim.base.modes import FLAGS
from fedsim.errors import ConfigError, RoundError
from fedsim.federated.client import GlobalDrawsError
from fedsim.strategies.averaging.fedavg import FedAvg
from fedsim.training.draws import KeyedDraws

NOISE = {
    "randn": lambda w: torch.randn(w.shape, dtype=w.dtype),
    "rand": lambda w: torch.rand(len(w), dtype=w.dtype),
    "randn_like": torch.randn_like,
    "randperm": lambda w: w[torch.randperm(len(w))],
    "bernoulli": lambda w: torch.bernoulli(torch.full_like(w, 0.3)),
    "normal of means": lambda w: torch.normal(w, 1.0),
    "dropout": lambda w: F.dropout(w, 0.4),
    "normal_": lambda w: torch.zeros_like(w).normal_(),
    "init.normal_": lambda w: nn.init.normal_(torch.zeros_like(w)),
    "lost": lambda w: [noise := torch.zeros_like(w), noise.normal_(), torch.stack([w, noise])[1]][-1],
}
IN_PLACE = (
    "normal_",
    "init.normal_",
    "lost",
)  # which cannot be written under vmap, where clients share the tensor
GLOBAL = {
    "numpy.random": lambda w: w + np.random.normal(),  # noqa: NPY002
    "random": lambda w: w + random.random(),
    "torch": lambda w: F.gumbel_softmax(w, dim=0),
    "torch's global generator, or seeds it": lambda w: torch.manual_seed(3) and torch.zeros_like(w),
}


@dataclass(frozen=True, kw_only=True)
class Noisy(FedAvg):
    """FedAvg with noise in the message, in the loss, in the gradient and at the server."""

    noise: str = "randn"

    def client_update(self, server, client, local):
        draw = (NOISE | GLOBAL)[self.noise]
        y = local.train(
            server["model"],
            loss=lambda w, batch: local.loss(w, batch) + 0.1 * (w * draw(w)).sum(),
            correct=lambda g, w: g + 0.1 * draw(w),
        )
        update = super().client_update(server, client, local)
        return update._replace(message={"delta": y - server["model"] + 0.1 * draw(y)})

    def max_steps(self, num_steps, epoch_steps):
        return 2 * num_steps

    def server_update(self, server, mean, info):
        noise = torch.randn(1) + np.random.normal() + random.random()  # noqa: NPY002
        return {"model": super().server_update(server, mean, info)["model"] + 0.01 * noise}


def noisy(noise, runtime="serial", rounds=2):
    task = make_task(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3)), dtype=torch.float64)
    simulation = make_simulation(
        Noisy(noise=noise), task=task, data=make_data(dtype=torch.float64), runtime=runtime, batch_size=3
    )
    for _ in range(rounds):
        simulation.round()
    return simulation.server["model"]


@pytest.mark.parametrize("noise", NOISE)
def test_a_strategy_draws_the_same_numbers_everywhere(noise):
    alone = noisy(noise)
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    for workers in (2, 3):
        assert torch.equal(noisy(noise, {"name": "threads", "workers": workers}), alone)
    vectorized = {"name": "vectorized", "chunk": 3, "workers": 1}
    if noise in IN_PLACE:
        with pytest.raises(
            ConfigError, match=r"^strategy: draws in place into a tensor that all clients share .normal_"
        ):
            noisy(noise, vectorized)
    else:
        torch.testing.assert_close(noisy(noise, vectorized), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 2}])
@pytest.mark.parametrize("noise", GLOBAL)
def test_global_generators_are_refused_in_clients(noise, runtime):
    torch.rand(1)
    with pytest.raises(GlobalDrawsError, match=rf"^test_modes:Noisy draws from {noise}") as caught:
        noisy(noise, runtime)
    assert isinstance(caught.value, RoundError)
    assert "\n" not in str(caught.value)


def drawing_loss(logits, y, /):
    return F.cross_entropy(logits + torch.randn_like(logits), y, reduction="none")


def drawing_augmentation(batch, rng, size, /):
    return batch._replace(x=batch.x * np.random.rand())  # noqa: NPY002


def drawing_schedule(time, /):
    return 1 + random.random()


@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 2}, "vectorized"])
@pytest.mark.parametrize(
    "own",
    [
        {"loss": "test_modes:drawing_loss"},
        {"augment": ["test_modes:drawing_augmentation"]},
        {"schedule": "test_modes:drawing_schedule"},
    ],
)
def test_losses_schedules_and_augmentations_that_draw_from_global_generators_are_refused(own, runtime):
    with pytest.raises((GlobalDrawsError, ConfigError), match=r"draws|random"):
        fedsim.run(small(runtime=runtime, local={"lr": 0.05} | own))


@dataclass(frozen=True, kw_only=True)
class Late(FedAvg):
    """FedAvg, in which only one client draws, and only from the second round on."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        late = local.client_id == 2 and local.lr < 0.05
        noise = torch.randn(len(server["model"])) if late else 0
        return update._replace(message={"delta": update.message["delta"] + noise})


def test_a_client_that_draws_later_than_others_draws_by_its_key():
    config = small(strategy="test_modes:Late", rounds=3, local={"lr": 0.05, "schedule": "cosine"})
    alone = fedsim.run(config | {"runtime": "serial"}).summary["fingerprint"]
    torch.rand(1)
    for workers in (1, 3):
        threads = config | {"runtime": {"name": "threads", "workers": workers}}
        assert fedsim.run(threads).summary["fingerprint"] == alone


def test_a_resumed_run_draws_the_same_numbers(tmp_path):
    config = small(strategy={"name": "test_modes:Noisy", "noise": "randn"}, runtime="serial")
    whole = fedsim.run(config | {"rounds": 3})
    fedsim.run(config | {"rounds": 1}, out=tmp_path / "run")
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    with pytest.warns(UserWarning, match="rounds: 3"):
        resumed = fedsim.resume(tmp_path / "run", {"rounds": 3})
    assert resumed.summary["fingerprint"] == whole.summary["fingerprint"]


def test_draws_on_another_device_begin_anew_with_each_client():
    draws = KeyedDraws(torch.Generator())
    found = []
    for seed in (1, 2, 1):
        draws.begin(seed)
        with draws:
            found.append(torch.randn(3))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@contextmanager
def flag(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
        assert getattr(owner, name) == value
    finally:
        setattr(owner, name, before)


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
        assert torch.zeros(1).device.type == name
    finally:
        torch.set_default_device(None)


@contextmanager
def flushed():
    torch.set_flush_denormal(True)
    try:
        yield
        assert sys.float_info.min / 2 == 0
    finally:
        torch.set_flush_denormal(False)


class Doubling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        return 2 * result if func is F.relu else result


OWNERS = {name: owner for owner, name, _ in FLAGS}
MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: flag(OWNERS["dtype"], "dtype", torch.float64),
    "matmul precision": lambda: flag(OWNERS["matmul"], "matmul", "medium"),
    "deterministic": lambda: flag(OWNERS["determinism"], "determinism", 2),
    "oneDNN": lambda: flag(torch.backends.mkldnn, "enabled", False),
    "meta": lambda: default_device("meta"),
    "denormals": flushed,
    "function mode": Doubling,
    "errstate": lambda: np.errstate(all="raise"),
}


def small(**changed):
    data = {
        "name": "synthetic",
        "shape": [1, 8, 8],
        "examples": 40,
        "test_examples": 10,
        "classes": 3,
        "clients": 3,
    }
    model = {"name": "cnn_bn", "widths": [2, 4]}
    return {
        "rounds": 1,
        "data": data,
        "model": model,
        "strategy": "fedprox",
        "cohort": "all",
        "local": {"lr": 0.05},
    } | changed


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        [getattr(owner, name) for owner, name, _ in FLAGS],
        np.geterr(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
    )


@pytest.mark.parametrize(
    "runtime", ["serial", {"name": "threads", "workers": 2}, {"name": "vectorized", "workers": 1}]
)
def test_modes_of_the_caller_change_no_bits_and_are_restored(runtime):
    plain = fedsim.run(small(runtime=runtime)).summary["fingerprint"]
    for name, mode in MODES.items():
        with mode():
            before = modes()
            assert fedsim.run(small(runtime=runtime)).summary["fingerprint"] == plain, name
            assert modes() == before, name


EACH_FLAG = """
import torch
import fedsim
from fedsim.base.modes import FLAGS
from test_modes import small

OTHER = {torch.float32: torch.float64, "highest": "medium", "none": "ieee", "tf32": "ieee"}
OTHER |= {True: False, False: True}

def values():
    return [getattr(owner, name) for owner, name, _ in FLAGS]

new = values()
assert new == [value for _, _, value in FLAGS], new
config = small(runtime="serial")
plain = fedsim.run(config).summary["fingerprint"]
assert values() == new
for owner, name, value in FLAGS:
    setattr(owner, name, 2 if name == "determinism" else OTHER[value])
    before = values()
    assert before != new, name
    assert fedsim.run(config).summary["fingerprint"] == plain, name
    assert values() == before, name
    for owner, name, value in FLAGS:
        setattr(owner, name, value)
"""


def test_no_flag_of_the_caller_changes_bits_and_each_is_restored():
    done = subprocess.run(
        [sys.executable, "-c", EACH_FLAG], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_modes_are_restored_after_an_error():
    with torch.autocast("cpu"), torch.no_grad(), flag(OWNERS["dtype"], "dtype", torch.float64):
        before = modes()
        with pytest.raises(GlobalDrawsError):
            fedsim.run(small(runtime="serial", strategy={"name": "test_modes:Noisy", "noise": "random"}))
        assert modes() == before


@dataclass(frozen=True, kw_only=True)
class Inference(FedAvg):
    """FedAvg, whose own functions run under inference mode where `on`."""

    on: bool = True

    def init_server(self, model):
        with torch.inference_mode(self.on):
            return {"model": 1 * model}

    def server_update(self, server, mean, info):
        with torch.inference_mode(self.on):
            return {"model": server["model"] + mean["delta"]}


def test_tensors_made_under_inference_mode_are_copied():
    found = []
    for on in (False, True):
        with torch.inference_mode(on):
            task, data = make_task(), make_data()
        with torch.inference_mode() if on else nullcontext():
            simulation = make_simulation(Inference(on=on), task=task, data=data)
            for _ in range(2):
                simulation.round()
            simulation.evaluate()
        found.append(simulation.fingerprint())
    assert found[0] == found[1]
