from functools import cache

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models
from torchvision.ops import StochasticDepth

from fedsim.errors import ConfigError
from fedsim.models import MODELS
from fedsim.models.efficientnet import ALPHA, BETA, GAMMA, B, compound

NAMES = [f"efficientnet_b{number}" for number in range(9)]


def make(name: str, shape: tuple[int, ...], classes: int = 1000, **options: object) -> nn.Module:
    return MODELS.bind({"name": name, **options})(shape, classes)


@cache
def meta(name: str, stem: str = "imagenet") -> nn.Module:
    """The network for images of its published size, on the meta device."""
    shape, classes, _ = MODELS.load(name).reference
    with torch.device("meta"):
        return make(name, shape, classes, stem=stem)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_each_has_the_pixels_it_is_known_for() -> None:
    sides = [MODELS.load(name).reference.shape[1] for name in NAMES]
    assert sides == [b.resolution for b in B] == [224, 240, 260, 300, 380, 456, 528, 600, 672]


def test_the_work_doubles_with_phi() -> None:
    assert pytest.approx(2, rel=0.05) == ALPHA * BETA**2 * GAMMA**2  # equation 3


@pytest.mark.parametrize(("phi", "number"), [(0, 0), (0.5, 1), (1, 2), (2, 3)])
def test_b0_to_b3_follow_the_compound_rule(phi: float, number: int) -> None:
    made, published = compound(phi), B[number]
    assert made._replace(resolution=published.resolution) == published
    assert abs(made.resolution - published.resolution) <= 4
    with torch.device("meta"):
        count = parameters(make("efficientnet_b0", (3, 64, 64), phi=phi))
    assert count == MODELS.load(f"efficientnet_b{number}").reference.parameters


@pytest.mark.parametrize(("number", "width", "depth", "resolution"), [(7, 7.3, 6.2, 7.05), (8, 8.3, 7.0, 7.9)])
def test_the_factors_of_the_largest_have_an_exponent_each(
    number: int, width: float, depth: float, resolution: float
) -> None:
    scale = compound(width).width, compound(depth).depth, compound(resolution).resolution
    assert scale == (B[number].width, B[number].depth, pytest.approx(B[number].resolution, abs=4))


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b5"])
def test_torchvisions_weights_fit_and_give_the_same(name: str) -> None:
    theirs = torchvision_models.get_model(name, weights=None).eval()
    ours = make(name, (3, 40, 40), stem="imagenet").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 40, 40)
    assert torch.equal(ours(x), theirs(x))


def test_the_blocks_are_table_1s() -> None:
    blocks = [module for module in meta("efficientnet_b0").modules() if hasattr(module, "use_res_connect")]
    assert (len(blocks), blocks[-1].out_channels) == (16, 320)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b3"])
@pytest.mark.parametrize(
    ("stem", "side", "last"), [("small", 32, 4), ("small", 28, 4), ("imagenet", 224, 7), ("imagenet", 32, 1)]
)
def test_small_images_are_halved_two_times_less(name: str, stem: str, side: int, last: int) -> None:
    features = meta(name, stem).features(torch.empty(2, 3, side, side, device="meta"))
    assert features.shape[-2:] == (last, last)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_a_single_pixel_is_the_smallest_image(stem: str) -> None:
    network = make("efficientnet_b0", (3, 1, 1), 3, stem=stem)
    network(torch.randn(2, 3, 1, 1)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_of_no_image_is_refused_in_one_line(name: str) -> None:
    for shape in [(784,), (28, 28), (3, 0, 8)]:
        with pytest.raises(ConfigError, match=rf"^model: {name} takes images \(channels, height, width\) .*$"):
            make(name, shape)


@pytest.mark.parametrize("name", NAMES)
def test_drop_path_grows_with_depth(name: str) -> None:
    network = meta(name)
    blocks = [module for module in network.modules() if hasattr(module, "use_res_connect")]
    for depth, block in enumerate(blocks):
        if block.use_res_connect:
            assert block.stochastic_depth.p == pytest.approx(0.2 * depth / len(blocks))
        else:
            assert isinstance(block.stochastic_depth, nn.Identity)
    skipped = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    assert len(skipped) == sum(block.use_res_connect for block in blocks)


def test_dropout_grows_with_the_network() -> None:
    assert [meta(name).classifier[0].p for name in NAMES] == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5]


def test_a_negative_phi_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.phi: -1 should be a number >= 0 and <= 10$"):
        make("efficientnet_b0", (3, 32, 32), phi=-1)
