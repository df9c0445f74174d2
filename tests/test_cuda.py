"""The laws on a GPU; skipped where there is none."""

import pytest
import torch
from conftest import make_simulation, trace

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


def test_a_gpu_learns_what_a_cpu_does():
    models = []
    for device in ("cpu", "cuda"):
        simulation = make_simulation("fedavg", runtime={"name": "serial", "device": device})
        simulation.round()
        models.append(simulation.server["model"].cpu())
    torch.testing.assert_close(*models, rtol=1e-3, atol=1e-4)
