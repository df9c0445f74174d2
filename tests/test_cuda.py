"""The laws on a GPU; skipped where there is none."""

import numpy as np
import pytest
import torch
from conftest import make_data, make_simulation, make_strategy, trace

from fedsim.config import build, load
from fedsim.data import AUGMENTATIONS, Dataset, FederatedData
from fedsim.recalibration import Recalibrate
from fedsim.strategies import CATALOGUE
from fedsim.types import Stream, random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", list(CATALOGUE))
def test_threads_agree_with_serial(strategy, precision):
    recipe = {} if strategy in {"scaffold", "fedsgd"} and precision == "fp16" else {"precision": precision}
    runs = [
        trace(make_simulation(strategy, runtime={"name": name, "device": "cuda"}, **recipe), rounds=2)
        for name in ("serial", "threads", "threads")
    ]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("source", ["public", "clients"])
def test_statistics_are_recalibrated_alike(source):
    strategy, settings = make_strategy("fedavg", buffers="recalibrated"), Recalibrate(examples=9, source=source)
    runs = [
        trace(
            make_simulation(
                strategy,
                data=make_data(public=11),
                recalibrate=settings,
                ema=0.5,
                runtime={"name": name, "device": "cuda"},
            )
        )
        for name in ("serial", "threads")
    ]
    assert runs[0] == runs[1]


def test_a_gpu_learns_what_a_cpu_does():
    models = []
    for device in ("cpu", "cuda"):
        simulation = make_simulation("fedavg", runtime={"name": "serial", "device": device})
        simulation.round()
        models.append(simulation.server["model"].cpu())
    torch.testing.assert_close(*models, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2", "densenet121"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_backbones_repeat_in_low_precision(name, precision):
    assert trained(name, precision, "serial") == trained(name, precision, "threads")


def trained(name, precision, runtime):
    """The fingerprint after a round with all that happens on the device besides the network."""
    augment = ["color_jitter", "random_crop", "flip", "rotation", "cutout", "mixup"]
    local = {"batch_size": 8, "lr": 0.01, "precision": precision, "channels_last": True, "augment": augment}
    config = {
        "rounds": 1,
        "data": {"name": "synthetic", "shape": [3, 32, 32], "examples": 48, "test_examples": 8, "clients": 3},
        "model": {"name": name, "dropout": 0.1},
        "strategy": "fedavg",
        "cohort": "all",
        "local": local | {"activation_checkpointing": True, "distillation": {}},
        "runtime": {"name": runtime, "device": "cuda"},
    }
    simulation = build(load(config))
    return simulation.round().fingerprint


def test_augmentation_is_the_same_on_both_devices():
    specs = ["color_jitter", "random_crop", "flip", "rotation", "cutout", "random_resized_crop", "cutmix"]
    augment = [AUGMENTATIONS.bind({"name": name}) for name in specs]
    x, y = torch.randint(256, (16, 3, 12, 12), dtype=torch.uint8), torch.arange(16) % 4
    data = FederatedData(Dataset(x, y, x, y, 4, (0.5,), (0.5,)), np.zeros(16, dtype=np.int64), clients=1)
    batches = [
        data.to(device).training_batch(torch.arange(16), augment, random(0, Stream.AUGMENT, 0, 0, 0))
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(batches[0].x, batches[1].x.cpu(), rtol=1e-4, atol=1e-4)
    assert torch.equal(batches[0].other, batches[1].other.cpu())
