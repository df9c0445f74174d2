"""The laws on a GPU; skipped where there is none."""

import numpy as np
import pytest
import small_run
import torch
from conftest import conv_net, make_data, make_simulation, make_strategy, make_task, trace
from safetensors.torch import load_file

from fedsim import Recipe
from fedsim.data import AUGMENTATIONS, Dataset, FederatedData
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.federated.recalibration import Recalibrate
from fedsim.strategies import CATALOGUE
from fedsim.training.graphs import STEPS_BEFORE_CAPTURE
from fedsim.training.local import ClientObjective
from fedsim.training.replica import Replica
from fedsim.types import Job, Stream, random

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


GRAPHS = {
    "momentum": {"momentum": 0.9, "weight_decay": 1e-3},
    "bf16": {"precision": "bf16"},
    "lars": {"optimizer": "lars", "clip_norm": 1.0},
    "accumulate": {"accumulate": 2},
}


@pytest.mark.parametrize("recipe", GRAPHS.values(), ids=GRAPHS)
def test_graphs_change_nothing(recipe):
    """Long enough to capture a step; with dropout, batch norm and last batches of another size."""

    def run(name, graphs):
        runtime = {"name": name, "device": "cuda", "graphs": graphs}
        return trace(make_simulation(runtime=runtime, epochs=2 * STEPS_BEFORE_CAPTURE, **recipe), rounds=2)

    assert run("serial", False) == run("serial", True) == run("threads", True)


def test_a_step_is_captured():
    simulation = make_simulation(runtime={"name": "serial", "device": "cuda"}, epochs=2 * STEPS_BEFORE_CAPTURE)
    simulation.round()
    ((steps, *_),) = simulation.runtime.worker.replica.captured_steps.values()
    assert any(steps.graphs.values())


def test_many_captures_side_by_side_change_nothing():
    """More than there are streams: each worker captures on its own while the others train."""

    def run(name, **options):
        # One capture for each round, worker and size.
        settings = {"epochs": 2 * STEPS_BEFORE_CAPTURE, "schedule": lambda time: 0.5**time}
        runtime = {"name": name, "device": "cuda"} | options
        return trace(make_simulation(runtime=runtime, **settings), rounds=6)

    assert run("serial", graphs=False) == run("threads", workers=4)


@pytest.mark.parametrize("recipe", [{}, {"momentum": 0.9, "clip_norm": 1.0}, {"optimizer": "adam"}], ids=str)
def test_nobody_waits_while_a_client_trains(recipe):
    task = make_task()
    local = ClientObjective(
        Replica(task, "cuda"),
        make_data().to("cuda"),
        Job(3, 0, {}),
        task.initial_buffers.cuda(),
        Recipe(batch_size=4, epochs=2, **recipe),
    )
    start = task.initial_model.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        local.train(start)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_workers_follow_from_the_memory_of_the_first_client():
    simulation = make_simulation(runtime={"name": "threads", "device": "cuda"})
    assert simulation.runtime.workers == 1
    simulation.round()
    assert simulation.runtime.workers == simulation.runtime.max_workers  # so small a network fits that often


def test_auto_trains_points_of_a_sweep_as_rows_of_a_batch(tmp_path, monkeypatch, fedsim_):
    monkeypatch.chdir(tmp_path)
    small_run.write(tmp_path, data=small_run.DATA | {"partition_seed": 0}, runtime="auto", strategy="fedavg")
    done = fedsim_("sweep", "c.yaml", "local.lr=0.05,0.1", "seed=0,1", "--out=s")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("4 points as rows of one vectorized batch")
    for name in ("lr=0.05,seed=0", "lr=0.1,seed=1"):
        lr, seed = name.split(",")
        settings = [f"local.{lr}", seed, "runtime={name: serial, device: cpu}", f"--out={seed}"]
        assert fedsim_("run", "c.yaml", *settings).status == 0
        models = [load_file(tmp_path / folder / "model.safetensors") for folder in (f"s/{name}", seed)]
        for key, value in models[0].items():
            torch.testing.assert_close(value, models[1][key], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_what_is_chosen_here_agrees_with_serial(strategy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    auto, serial = (
        make_simulation(strategy, runtime={"device": "cuda"} | runtime)
        for runtime in ({"name": "auto", "exact": True}, {"name": "serial"})
    )
    assert trace(auto) == trace(serial)
    assert auto.runtime.choice["device"] == "cuda"
    assert auto.runtime.home.type == auto.server["model"].device.type == "cuda"


VECTORIZED = {"name": "vectorized", "device": "cuda", "chunk": 4}


@pytest.mark.parametrize("conv", ["im2col", "grouped"])
@pytest.mark.parametrize("strategy", list(CATALOGUE))
def test_vectorized_agrees_with_serial(strategy, conv):
    """With dropout, batch norm and padded batches, in float64."""
    serial, vectorized = (
        make_simulation(strategy, task=make_task(dtype=torch.float64), runtime=runtime)
        for runtime in ({"name": "serial", "device": "cuda"}, VECTORIZED | {"conv": conv})
    )
    for _ in range(2):
        serial.round()
        vectorized.round()
        torch.testing.assert_close(vectorized.server, serial.server, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("sizes", "dropout"),
    [((8, 8, 8, 8), 0.0), ((8, 8, 8, 8), 0.5), ((3, 13, 6, 9), 0.0)],
    ids=["even", "even with dropout", "uneven"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_chunk_is_replayed_as_a_graph(sizes, dropout, precision):
    def run(**options):
        task, data = make_task(lambda: conv_net(dropout=dropout)), make_data(sizes)
        simulation = make_simulation(
            "fedprox", task=task, data=data, runtime=VECTORIZED | options, precision=precision, momentum=0.9
        )
        return simulation, trace(simulation, rounds=4)

    (simulation, found), (_, expected), (_, again) = run(), run(graphs=False), run()
    assert any(graphs.graphs for graphs in simulation.runtime.all_graphs)
    assert found == again
    for one, other in zip(found, expected, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02 if precision == "bf16" else 1e-4)
