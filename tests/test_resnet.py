from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from fedsim import Task
from fedsim.errors import ConfigError
from fedsim.models import MODELS
from fedsim.models.resnet import RESNET18, RESNEXT50, SENET154, Architecture, Basic, Bottleneck, ResNet
from fedsim.training.replica import Replica

NAMES = [name for name, entry in MODELS.entries.items() if entry.startswith("resnet:")]
VARIANTS = ("v1", "v1.5", "b", "c", "d")
TORCHVISION = [name for name in NAMES if not name.startswith("se")]
TORCHVISION.remove("resnext101_32x4d")  # torchvision has 32x8d and 64x4d
SHALLOW = {
    "d": replace(RESNET18, blocks=(1, 1, 1, 1), stem=(32, 32, 64), shortcut="pool"),
    "se_resnext": replace(RESNEXT50, blocks=(1, 1, 1, 1), reduction=16),
}


def make(name, shape, classes=10, *, device="cpu", **options):
    with torch.device(device):
        return MODELS.load(name)(shape, classes, **options)


def shapes_of(network):
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def macs(network, shape):
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() / 2


def strides(network):
    """The strides other than 1 of the convolutions outside shortcuts."""
    convolutions = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    return {n: m.stride[0] for n, m in convolutions.items() if m.stride[0] > 1 and "downsample" not in n}


def shortcuts(network):
    return [m.downsample for m in network.modules() if isinstance(m, Bottleneck) and list(m.downsample.children())]


@pytest.mark.parametrize("name", TORCHVISION)
def test_parameters_have_the_names_and_shapes_of_torchvision(name):
    with torch.device("meta"):
        theirs = get_model(name)
    assert shapes_of(make(name, (3, 224, 224), 1000, device="meta")) == shapes_of(theirs)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_outputs_equal_torchvisions_with_its_weights(name):
    theirs, ours = get_model(name, num_classes=7), make(name, (3, 64, 48), 7, stem="imagenet")
    x = torch.randn(2, 3, 64, 48)
    theirs(x)  # updates the statistics
    ours.load_state_dict(theirs.state_dict())
    for train in (False, True):
        assert torch.equal(ours.train(train)(x), theirs.train(train)(x))


@pytest.mark.parametrize("name", ["resnet50", "se_resnet50"])
def test_v1_halves_in_the_first_convolution_of_a_bottleneck_and_all_others_in_its_3x3(name):
    first = {f"layer{stage}.0.conv1" for stage in (2, 3, 4)}
    second = {f"layer{stage}.0.conv2" for stage in (2, 3, 4)}
    for variant in VARIANTS:
        found = set(strides(make(name, (3, 224, 224), device="meta", variant=variant)))
        assert found - {"conv1", "conv1.0"} == (first if variant == "v1" else second)


def test_c_and_d_have_the_stem_of_32_32_and_64_channels_and_others_a_7x7():
    for variant in VARIANTS:
        stem = make("resnet18", (3, 224, 224), device="meta", variant=variant).conv1
        layers = [m for m in stem.modules() if isinstance(m, nn.Conv2d)]
        found = [(m.out_channels, m.kernel_size[0], m.stride[0]) for m in layers]
        deep = variant in ("c", "d")
        assert found == ([(32, 3, 2), (32, 3, 1), (64, 3, 1)] if deep else [(64, 7, 2)])


def test_shortcuts_halve_by_stride_in_d_by_a_2x2_average_and_in_senet154_by_a_3x3():
    for name, options, kernel, stride, pools in (
        ("resnet50", {}, 1, 2, False),
        ("resnet50", {"variant": "c"}, 1, 2, False),
        ("resnet50", {"variant": "d"}, 1, 1, True),
        ("senet154", {}, 3, 2, False),
    ):
        unchanged, *halving = shortcuts(make(name, (3, 224, 224), device="meta", **options))
        assert [type(m) for m in unchanged] == [nn.Conv2d, nn.BatchNorm2d]
        assert unchanged[0].kernel_size == (1, 1)
        assert len(halving) == 3
        for shortcut in halving:
            *pool, conv, _ = shortcut
            assert (conv.kernel_size[0], conv.stride[0]) == (kernel, stride)
            assert [m.kernel_size for m in pool] == ([2] if pools else [])


def test_multiply_adds_of_the_variants_are_those_of_the_papers_table():
    shape = (3, 224, 224)
    nets = {v: make("resnet50", shape, 1000, device="meta", variant=v) for v in VARIANTS}
    found = {variant: macs(network, shape) for variant, network in nets.items()}
    table = {"v1": 3.8, "b": 4.1, "c": 4.3, "d": 4.3}  # GFLOPs, He 2019, Table 5
    assert {v: found[v] / 1e9 for v in table} == pytest.approx(table, abs=0.07)
    assert found["v1.5"] == found["b"]
    stem, deep = 3 * 49 * 64, 9 * (3 * 32 + 32 * 32 + 32 * 64)
    assert found["c"] - found["b"] == 112**2 * (deep - stem)
    assert found["d"] == found["c"]
    counts = {v: sum(p.numel() for p in network.parameters()) for v, network in nets.items()}
    assert counts["c"] - counts["b"] == deep - stem + 2 * (32 + 32)
    assert counts["v1"] == counts["b"]
    assert counts["d"] == counts["c"]


def test_in_basic_blocks_v1_and_b_are_the_same():
    networks = [make("resnet34", (3, 224, 224), device="meta", variant=v) for v in ("v1", "v1.5", "b")]
    for one, other in pairwise(networks):
        assert str(one) == str(other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_halve_three_times_after_a_small_stem_and_five_times_with_the_imagenet_stem(variant):
    for shape, stem, sizes in (
        ((3, 32, 32), "auto", [(32, 32), (16, 16), (8, 8), (4, 4)]),
        ((1, 28, 50), "small", [(28, 50), (14, 25), (7, 13), (4, 7)]),
        ((3, 65, 90), "auto", [(17, 23), (9, 12), (5, 6), (3, 3)]),
        ((3, 224, 224), "auto", [(56, 56), (28, 28), (14, 14), (7, 7)]),
        ((3, 64, 64), "imagenet", [(16, 16), (8, 8), (4, 4), (2, 2)]),
    ):
        network = make("resnet18", shape, device="meta", variant=variant, stem=stem)
        x, found = torch.empty(2, *shape, device="meta"), []
        for name, layer in network.named_children():
            x = layer(x)
            if name.startswith("layer"):
                found.append(tuple(x.shape[2:]))
        assert found == sizes


@pytest.mark.parametrize("name", NAMES)
def test_each_draws_only_where_the_paper_has_dropout(name):
    network = make(name, (3, 32, 32), device="meta")
    dropouts = [m.p for m in network.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == ([0.2] if name == "senet154" else [])
    assert [name for name, m in network.named_modules() if isinstance(m, nn.Linear)] == ["fc"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "se_resnext50_32x4d", "senet154"])  # all that differs
def test_one_pixel_is_the_smallest_image(name):
    for stem in ("small", "imagenet"):
        assert make(name, (1, 1, 1), device="meta", stem=stem)(torch.empty(2, 1, 1, 1, device="meta")).dim() == 2
    for shape in ((1, 0, 4), (28, 28), (784,)):
        with pytest.raises(ConfigError, match="a residual network takes images"):
            make(name, shape, device="meta")


@pytest.mark.parametrize(("variant", "stem"), [("v1", "small"), ("c", "imagenet"), ("d", "small")])
def test_one_pixel_trains_in_batches_of_two(variant, stem):
    network = make("resnet18", (1, 1, 1), variant=variant, stem=stem)
    network(torch.randn(2, 1, 1, 1)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "se_resnext50_32x4d", "senet154"])
def test_a_branch_ends_in_stochastic_depth_after_its_last_norm_and_before_the_shortcut(name):
    blocks = [m for m in make(name, (1, 8, 8), device="meta").modules() if hasattr(m, "downsample")]
    for block in blocks:
        names = [name for name, _ in block.named_children()]
        end = names.index("stochastic_depth")
        assert names[end + 1] == "downsample"
        assert names[end - 1] == ("bn2" if name == "resnet18" else "se")
        assert not any(n.startswith("bn") for n in names[end:])
    assert len(blocks) == {"resnet18": 8, "senet154": 50}.get(name, 16)


@pytest.mark.parametrize(("block", "reduction"), [(Basic, None), (Bottleneck, None), (Bottleneck, 16)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_without_its_branch_is_its_shortcut(block, reduction, stride):
    whole = block(64, 64 // block.expansion, stride, Architecture(block, (1, 1, 1, 1), reduction=reduction))
    x = torch.randn(3, 64, 6, 6)
    alone = whole.downsample(x).relu()
    assert not torch.equal(whole(x), alone)
    dropped = deepcopy(whole)
    dropped.stochastic_depth.p = 1.0
    assert torch.equal(dropped(x), alone)
    nn.init.zeros_(whole.get_submodule("bn2" if block is Basic else "bn3").weight)
    assert torch.equal(whole(x), alone)


def test_squeeze_and_excitation_scales_each_channel():
    block = Bottleneck(64, 16, 1, Architecture(Bottleneck, (1, 1, 1, 1), reduction=16)).eval()
    for tensor in (block.bn3.weight, block.bn3.bias, block.bn3.running_mean):
        nn.init.normal_(tensor)
    plain = deepcopy(block)
    plain.se = nn.Identity()
    x = torch.randn(3, 64, 6, 6)
    branch = {}
    plain.bn3.register_forward_hook(lambda _, __, y: branch.update(u=y))
    plain(x)
    u, (w1, b1, w2, b2) = branch["u"], (p.squeeze() for p in block.se.parameters())
    z = u.mean((2, 3))  # Hu 2018, equations 2 to 4
    s = ((z @ w1.T + b1).relu() @ w2.T + b2).sigmoid()
    assert s.shape == (3, 64)
    torch.testing.assert_close(block(x), (s[..., None, None] * u + x).relu())


def test_senet154_has_half_the_channels_in_the_first_convolution_of_a_block():
    network = make("senet154", (3, 224, 224), device="meta")
    stem = [m for m in network.conv1.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in stem] == [64, 64, 128]
    assert [m.stride[0] for m in stem] == [2, 1, 1]
    for stage, layer in enumerate((network.layer1, network.layer2, network.layer3, network.layer4)):
        for block in layer:
            assert block.conv2.out_channels == 2 * block.conv1.out_channels == 256 * 2**stage
            assert block.conv2.groups == 64
            assert block.se.fc1.out_channels == 16 * 2**stage
    assert [len(network.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)] == list(SENET154.blocks)


def test_convolutions_start_with_the_variance_of_he_over_the_fan_out():
    torch.manual_seed(0)
    network = make("resnet18", (3, 32, 32))
    for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.08)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("form", SHALLOW.values(), ids=SHALLOW)
def test_a_replica_trains_it_in_any_precision(form, dtype):
    shape = (1, 9, 12)
    task = Task(ResNet(1, 10, form, small=True), shape, 10, channels_last=True)
    assert not task.draws
    replica = Replica(task)
    replica.begin_client(task.initial_buffers, 0, dtype)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = replica.forward(torch.randn(2, *shape), train=True)[0]
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in replica.parameters)
    assert not torch.equal(replica.buffers, task.initial_buffers)


@pytest.mark.parametrize("form", SHALLOW.values(), ids=SHALLOW)
def test_it_exports_with_any_batch_size(form):
    network = ResNet(1, 10, form, small=True).eval()
    whole = torch.export.export(
        network, (torch.randn(2, 1, 9, 9),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    x = torch.randn(5, 1, 9, 9)
    torch.testing.assert_close(whole.module()(x), network(x))
