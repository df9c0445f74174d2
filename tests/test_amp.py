"""Low precision: every backbone trains in it, and it keeps less for the backward pass."""

from functools import cache

import pytest
import torch
from test_models import build

from fedsim import Recipe, Task
from fedsim.data import Dataset, FederatedData
from fedsim.models import MODELS
from fedsim.training.local import ClientObjective
from fedsim.training.precision import AUTOCAST
from fedsim.training.replica import Replica
from fedsim.types import Job

SHAPE, CLASSES = (3, 32, 32), 10


def data(n=4):
    stream = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, *SHAPE, generator=stream), torch.arange(n) % CLASSES
    return FederatedData(Dataset(x, y, x, y, CLASSES), torch.zeros(n).long().numpy(), clients=1)


def trained(task, precision):
    recipe = Recipe(
        lr=1e-3, batch_size=4, precision=precision, **({"loss_scale": 1.0} if precision == "fp16" else {})
    )
    local = ClientObjective(Replica(task), data(), Job(0, 0, {}), task.initial_buffers, recipe)
    return local.train(task.initial_model), local.metrics["loss"] / 4


LIGHT = {"2nn", "cnn", "cnn_bn", "cifar_cnn", "mobilenet_v2", "shufflenet_v2", "efficientnet_b0"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in LIGHT else [pytest.mark.slow]) for name in MODELS]
)
def test_every_backbone_trains_in_low_precision(name):
    torch.manual_seed(0)
    task = Task(build(name, SHAPE, CLASSES), SHAPE, CLASSES)
    _, loss = trained(task, "fp32")
    for precision in AUTOCAST:
        low, low_loss = trained(task, precision)
        assert low.dtype == torch.float32  # master weights
        assert low.isfinite().all()
        assert not torch.equal(low, task.initial_model)  # no step skipped
        assert float(low_loss) == pytest.approx(float(loss), rel=0.1, abs=0.1)


def test_depthwise_convolutions_keep_their_precision_on_a_cpu():
    replica = Replica(Task(build("mobilenet_v2", SHAPE, CLASSES), SHAPE, CLASSES))
    replica.begin_client(replica.task.initial_buffers, 0, torch.bfloat16)
    seen = {}
    for module in replica.network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: seen.setdefault(m.groups > 1, set()).add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        replica.forward(torch.randn(2, *SHAPE), train=True)[0]
    assert seen == {False: {torch.bfloat16}, True: {torch.float32}}
    assert {p.dtype for p in replica.parameters if p.dim() == 4 and p.shape[1] == 1} == {torch.float32}


@cache
def resnet18():
    return Task(build("resnet18", SHAPE, CLASSES), SHAPE, CLASSES)


@pytest.mark.parametrize("precision", list(AUTOCAST))
def test_low_precision_keeps_about_half(precision):
    """NVIDIA's claim, of the activations that a training step of ResNet-18 keeps, weights not counted."""

    def kept(dtype):
        replica, sizes = Replica(resnet18()), {}
        replica.begin_client(replica.task.initial_buffers, 0, dtype)
        own = {p.untyped_storage().data_ptr() for p in replica.parameters}

        def note(t):
            if (at := t.untyped_storage().data_ptr()) not in own:
                sizes[at] = t.untyped_storage().nbytes()
            return t

        autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), autocast:
            logits = replica.forward(torch.randn(8, *SHAPE), train=True)[0]
        return sum(sizes.values()), logits

    (low, _), (full, _) = kept(AUTOCAST[precision]), kept(None)
    assert 0.4 < low / full < 0.6
