"""The laws on a GPU; skipped where there is none."""

import pytest
import torch
from conftest import make_data, make_simulation, make_strategy, trace

from fedsim.recalibration import Recalibrate
from fedsim.strategies import CATALOGUE

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
