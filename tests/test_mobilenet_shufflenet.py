"""MobileNets and ShuffleNets."""

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models
from torchvision.ops import StochasticDepth

from fedsim.errors import ConfigError
from fedsim.models import MODELS
from fedsim.models.shufflenet import Unit

NAMES = [
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "shufflenet_v1",
    "shufflenet_v2",
]
PAPER = (3, 224, 224)


def make(name: str, shape: tuple[int, ...] = PAPER, classes: int = 1000, **options: object) -> nn.Module:
    return MODELS.bind({"name": name, **options})(shape, classes)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def convolved(network: nn.Module, shape: tuple[int, ...]) -> int:
    """The multiplications in the convolutions for one example."""
    counts = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, _, out: counts.append(out.numel() * layer.weight[0].numel()))
    network(torch.zeros(1, *shape))
    return sum(counts)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of each family, with or without a residual connection."""
    return [m for m in network.modules() if hasattr(m, "use_res_connect") or isinstance(m, Unit)]


@pytest.mark.parametrize(
    ("name", "options", "twin"),
    [
        ("mobilenet_v2", {}, "mobilenet_v2"),
        ("mobilenet_v2", {"width": 0.5}, "mobilenet_v2"),
        ("mobilenet_v3_small", {}, "mobilenet_v3_small"),
        ("mobilenet_v3_large", {"width": 0.75}, "mobilenet_v3_large"),
        ("shufflenet_v2", {"width": 0.5}, "shufflenet_v2_x0_5"),
        ("shufflenet_v2", {"width": 1.0}, "shufflenet_v2_x1_0"),
        ("shufflenet_v2", {"width": 1.5}, "shufflenet_v2_x1_5"),
        ("shufflenet_v2", {"width": 2.0}, "shufflenet_v2_x2_0"),
    ],
)
def test_torchvisions_weights_fit_and_give_the_same(name: str, options: dict[str, float], twin: str) -> None:
    scale = {"width_mult": options["width"]} if options and name != "shufflenet_v2" else {}
    theirs = torchvision_models.get_model(twin, weights=None, **scale).eval()
    ours = make(name, (3, 48, 48), stem="imagenet", **options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "stem"), [((1, 28, 28), "auto"), ((3, 32, 32), "auto"), ((2, 1, 1), "auto"), ((3, 1, 1), "imagenet")]
)
def test_small_images_train_and_evaluate(name: str, shape: tuple[int, ...], stem: str) -> None:
    network, x = make(name, shape, 3, stem=stem, width=0.5), torch.randn(2, *shape)
    network(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    logits = network.eval()(x)
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stem", "last"), [("auto", {32: 4, 28: 4}), ("imagenet", {32: 1, 96: 3})], ids=["auto", "imagenet"]
)
def test_small_images_are_halved_two_times_less(name: str, stem: str, last: dict[int, int]) -> None:
    sides: list[int] = []
    with torch.device("meta"):
        network = make(name, (3, 32, 32), stem=stem)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                layer.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
        for side, expected in last.items():
            network(torch.empty(2, 3, side, side))
            assert sides[-1] == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_of_no_image_is_refused_in_one_line(name: str) -> None:
    for shape in [(784,), (28, 28), (3, 0, 8)]:
        with pytest.raises(ConfigError, match=rf"^model: {name} takes images \(channels, height, width\) .*$"):
            make(name, shape)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_stochastic_depth_is_in_the_residual_branches_only(name: str, stem: str) -> None:
    with torch.device("meta"):
        network = make(name, stem=stem)
    for block in blocks(network):
        residual = block.stride == 1 if isinstance(block, Unit) else block.use_res_connect
        depths = [m for m in block.modules() if isinstance(m, StochasticDepth)]
        assert [(d.p, d.mode) for d in depths] == [(0.0, "row")] * residual
        if residual:
            later = list(block.modules())[list(block.modules()).index(depths[0]) :]
            assert not any(isinstance(m, nn.BatchNorm2d) for m in later)
    inside = sum(isinstance(m, StochasticDepth) for block in blocks(network) for m in block.modules())
    assert inside == sum(isinstance(m, StochasticDepth) for m in network.modules())


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "shufflenet_v1"])
def test_a_skipped_branch_leaves_its_input(name: str) -> None:
    for block in blocks(make(name, (3, 32, 32), 3, width=0.5)):
        for depth in block.modules():
            if isinstance(depth, StochasticDepth):
                depth.p = 1.0
                norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
                x = torch.rand(2, norms[-1].num_features, 4, 4)
                assert torch.equal(block.train()(x), x)


def test_a_width_multiplies_the_channels() -> None:
    with torch.device("meta"):
        millions = [parameters(make("mobilenet_v1", width=alpha)) / 1e6 for alpha in (1.0, 0.75, 0.5, 0.25)]
        assert [round(count, 1) for count in millions] == [4.2, 2.6, 1.3, 0.5]  # Howard 2017, Table 6
        for groups in (1, 2, 3, 4, 8):
            whole, half = (make("shufflenet_v1", groups=groups, width=width) for width in (1.0, 0.5))
            assert half.fc.in_features == pytest.approx(whole.fc.in_features / 2, rel=0.07)


@pytest.mark.parametrize(("groups", "millions"), [(1, 143), (2, 140), (3, 137), (4, 133), (8, 137)])
def test_shufflenets_groups_cost_what_table_1_says(groups: int, millions: int) -> None:
    with torch.device("meta"):
        assert round(convolved(make("shufflenet_v1", groups=groups), PAPER) / 1e6) == millions


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_a_shuffle_sends_each_group_to_all(groups: int) -> None:
    shuffle = Unit(48, 48 * 4, 2, groups, groups).branch.shuffle
    channels, each = torch.arange(48.0), 48 // groups
    by_hand = [group * each + place for place in range(each) for group in range(groups)]
    assert shuffle(channels.view(1, 48, 1, 1)).flatten().tolist() == by_hand


def test_a_unit_of_stride_2_keeps_its_average_and_adds_channels() -> None:
    unit, x = Unit(24, 240, 2, 3, 1).eval(), torch.rand(2, 24, 8, 8)
    y = unit(x)
    assert y.shape == (2, 240, 4, 4)
    assert torch.equal(y[:, :24], nn.functional.avg_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "shufflenet_v1", "groups": 5}, r"^model\.groups: 5 should be 1, 2, 3, 4 or 8$"),
        ({"name": "shufflenet_v2", "width": 0.7}, r"^model\.width: 0\.7 should be 0\.5, 1\.0, 1\.5 or 2\.0$"),
        ({"name": "mobilenet_v1", "width": 0}, r"^model\.width: 0 should be a number > 0$"),
        ({"name": "mobilenet_v2", "stem": "tiny"}, r'^model\.stem: "tiny" should be auto, imagenet or small$'),
    ],
)
def test_wrong_options_are_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MODELS.bind(spec)(PAPER, 10)
