"""Laws of AlexNet, VGG and DenseNet: they are the published networks, in a small form too."""

import pytest
import torch
from covering import in_turn, sampled
from torch import nn
from torchvision.models import get_model
from torchvision.ops import StochasticDepth

from fedsim import Task
from fedsim.errors import ConfigError
from fedsim.models import MODELS
from fedsim.training.replica import Replica

FAMILIES = ("alexnet", "vgg", "densenet")
NAMES = [name for name, entry in MODELS.entries.items() if entry.partition(":")[0] in FAMILIES]
VGGS = [name for name in NAMES if name.startswith("vgg")]
SMALLEST = {"alexnet": (15, 63), "vgg": (1, 32), "densenet": (8, 29)}  # of the small and of the ImageNet stem
RATES = {"alexnet": [0.5, 0.5], "vgg": [0.5, 0.5], "densenet": []}
HEADS = {"alexnet": "classifier.6", "vgg": "classifier.6", "densenet": "classifier"}


def family(name):
    return name.rstrip("0123456789")


def make(name, shape, classes=10, *, device="cpu", **options):
    with torch.device(device):
        return MODELS.load(name)(shape, classes, **options)


def form_of(network):
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_each_has_the_published_number_of_parameters(name):
    shape, classes, count = MODELS.load(name).reference
    network = make(name, shape, classes, device="meta")
    assert sum(p.numel() for p in network.parameters()) == count
    assert network(torch.empty(2, *shape, device="meta")).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [(name, name, {}) for name in NAMES] + [(name, f"{name}_bn", {"batch_norm": True}) for name in VGGS],
)
def test_parameters_have_the_names_and_shapes_of_torchvision(name, theirs, options):
    with torch.device("meta"):
        network = get_model(theirs)
    assert form_of(make(name, (3, 224, 224), 1000, device="meta", **options)) == form_of(network)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("alexnet", "alexnet", {}),
        pytest.param("vgg11", "vgg11", {}, marks=pytest.mark.slow),
        ("vgg11", "vgg11_bn", {"batch_norm": True}),
        ("densenet121", "densenet121", {}),
    ],
)
def test_outputs_equal_torchvisions_with_its_weights(name, theirs, options):
    shape = (3, 64, 80)
    ours, theirs = make(name, shape, 7, stem="imagenet", **options), get_model(theirs, num_classes=7)
    x = torch.randn(2, *shape)
    theirs(x)  # moves the statistics
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_small_form_has_the_same_names_where_shapes_allow(name):
    small, large = (form_of(make(name, (3, 64, 64), device="meta", stem=stem)) for stem in ("small", "imagenet"))
    assert small.keys() == large.keys()
    differ = {key for key, shape in small.items() if shape != large[key]}
    resized = {
        "alexnet": {"features.0.weight", "classifier.1.weight"},
        "vgg": {"classifier.0.weight"},
        "densenet": {"features.conv0.weight"},
    }
    assert differ == resized[family(name)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_each_takes_small_images(name, shape):
    network, x = make(name, shape), torch.randn(2, *shape)
    with torch.no_grad():
        assert network(x).shape == (2, 10)
        assert network.eval()(x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_the_papers_and_the_classifier_the_last_linear_layer(name):
    network = make(name, (3, 224, 224), device="meta")
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == RATES[family(name)]
    assert [key for key, m in network.named_modules() if isinstance(m, nn.Linear)][-1] == HEADS[family(name)]
    assert not any(isinstance(m, StochasticDepth) for m in network.modules())


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg19", "densenet121"])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_the_smallest_image_trains_and_a_smaller_one_is_refused(name, stem):
    side = SMALLEST[family(name)][stem == "imagenet"]
    options = {"batch_norm": True} if name in VGGS else {}
    for shape in ((1, side, side), (3, side, side + 5), (3, side + 5, side)):
        network = make(name, shape, device="meta", stem=stem, **options)
        assert network(torch.empty(2, *shape, device="meta")).shape == (2, 10)
    for shape in ((1, side - 1, side), (1, side, side - 1), (side, side), (784,)):
        with pytest.raises(ConfigError, match=f"{family(name)} takes images"):
            make(name, shape, device="meta", stem=stem)


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "densenet121"])
def test_up_to_64_pixels_the_stem_is_small(name):
    for shape, stem in (((3, 64, 64), "small"), ((3, 64, 90), "small"), ((3, 65, 65), "imagenet")):
        found = make(name, shape, device="meta")
        assert str(found) == str(make(name, shape, device="meta", stem=stem))


def test_vgg_starts_as_he_has_it_and_its_linear_layers_narrowly():
    torch.manual_seed(0)
    network = make("vgg11", (1, 32, 32))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx((2 / (9 * module.out_channels)) ** 0.5, rel=0.08)
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.05)
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert not module.bias.any()


def test_densenet_starts_as_he_has_it_its_first_convolution_too():
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 65, 65)):
        conv = make("densenet121", shape).features.conv0
        assert conv.weight.std().item() == pytest.approx((2 / conv.weight[0].numel()) ** 0.5, rel=0.06)


TRAINED = ["alexnet", "vgg11", "densenet121"], [None, torch.bfloat16]


@pytest.mark.parametrize(("name", "dtype"), sampled(in_turn(*TRAINED), *TRAINED))
def test_a_replica_trains_it_and_its_dropout_is_keyed(name, dtype):
    shape = (1, 16, 18)
    task = Task(make(name, shape), shape, 10, channels_last=True)
    assert task.draws == bool(RATES[family(name)])
    replica, x = Replica(task), torch.randn(2, *shape)
    twice = []
    for _ in range(2):
        replica.begin_client(task.initial_buffers, 0, dtype)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            twice.append(replica.forward(x, train=True)[0])
    assert torch.equal(*twice)
    twice[0].float().logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in replica.parameters)


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "densenet121"])
def test_it_exports_with_any_batch_size(name):
    network = make(name, (1, 16, 16)).eval()
    whole = torch.export.export(
        network, (torch.randn(2, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    x = torch.randn(5, 1, 16, 16)
    torch.testing.assert_close(whole.module()(x), network(x))
