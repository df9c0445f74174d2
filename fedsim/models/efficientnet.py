"""EfficientNets: a small network, and a rule that scales its width, depth and resolution together.

Tan & Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019,
https://arxiv.org/abs/1905.11946. B8: Xie et al., Adversarial Examples Improve Image Recognition, CVPR 2020,
https://arxiv.org/abs/1911.09665.

The blocks are torchvision's, so that its weights fit. B0 to B3 are `compound(phi)` with phi 0, 0.5, 1 and 2, up to
four pixels of resolution. From B4 on no single phi gives the published networks, whose depth grows more slowly:
B7's width 2.0 is 1.1^7.3, its depth 3.1 is 1.2^6.2, and its 600 pixels are 224 x 1.15^7.0; B8's exponents are 8.3,
7.0 and 7.9.

Differs: for small images, the first convolution and the first stage of stride 2 have stride 1, so that 32 pixels
end as 4 x 4. Images are not resized to the resolution for which a network was published.
"""

from functools import partial
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Le
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig

from fedsim.models import Stem, image_shape, is_small, reference
from fedsim.models.mobilenet import remove_first_stride, replace_first_convolution

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15  # for depth, width, resolution: ALPHA * BETA^2 * GAMMA^2 is about 2
STAGES = [  # Table 1 of B0: expansion, kernel, stride, input and output channels, layers
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
]


class Scale(NamedTuple):
    """How a network is scaled from B0."""

    width: float  # the factor of channels, which are rounded to a multiple of 8, and at most 10 % down
    depth: float  # the factor of layers in a stage, which are rounded up
    resolution: int  # pixels a side for which it was published
    dropout: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images for which it was published."""
        return 3, self.resolution, self.resolution


def compound(phi: float) -> Scale:
    """B0 scaled to about 2^phi times its work, by equation 3; factors have one decimal, as the published ones.

    Dropout also grows, from 0.2 up to 0.5 (section 5.2): by 0.06 for each phi, which gives the published rates of
    B0 to B3.
    """
    dropout = min(0.5, 0.2 + 0.06 * phi)
    return Scale(round(BETA**phi, 1), round(ALPHA**phi, 1), round(224 * GAMMA**phi), round(dropout, 1))


B = (  # B0 to B8, as published
    Scale(1.0, 1.0, 224, 0.2),
    Scale(1.0, 1.1, 240, 0.2),
    Scale(1.1, 1.2, 260, 0.3),
    Scale(1.2, 1.4, 300, 0.3),
    Scale(1.4, 1.8, 380, 0.4),
    Scale(1.6, 2.2, 456, 0.4),
    Scale(1.8, 2.6, 528, 0.5),
    Scale(2.0, 3.1, 600, 0.5),
    Scale(2.2, 3.6, 672, 0.5),
)


def scaled(name: str, shape: tuple[int, ...], classes: int, scale: Scale, stem: Stem) -> nn.Module:
    """B0 with the width and depth of `scale`. Raises ConfigError for anything but images."""
    small = is_small(image_shape(shape, name, smallest=1), stem)
    factors = {"width_mult": scale.width, "depth_mult": scale.depth}
    stages = [MBConvConfig(*stage, **factors, block=_mbconv) for stage in STAGES]
    if small:
        remove_first_stride(stages)
    # From B5 on, torchvision's weights are those of the authors, who used this eps; it trained the others itself.
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01) if scale.width >= B[5].width else nn.BatchNorm2d
    network = EfficientNet(stages, scale.dropout, num_classes=classes, norm_layer=norm)
    replace_first_convolution(network, shape[0], small)
    return network  # type: ignore[no-any-return]


def _mbconv(*args: Any) -> nn.Module:
    block = MBConv(*args)
    if not block.use_res_connect:
        block.stochastic_depth = nn.Identity()
    return block  # type: ignore[no-any-return]


@reference(B[0].shape, 1000, 5_288_548)
def efficientnet_b0(
    shape: tuple[int, ...], classes: int, /, *, phi: Annotated[float, Ge(0), Le(10)] = 0.0, stem: Stem = "auto"
) -> nn.Module:
    """EfficientNet-B0 (Tan 2019): 16 inverted bottlenecks; `phi` scales them.

    `phi` is the compound coefficient: about 2^phi times the work on images of 224 x 1.15^phi pixels a side, with
    1.1^phi times the channels and 1.2^phi times the layers. Raises ConfigError for anything but images.
    """
    return scaled("efficientnet_b0", shape, classes, compound(phi), stem)


@reference(B[1].shape, 1000, 7_794_184)
def efficientnet_b1(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """EfficientNet-B1 (Tan 2019): width 1.0, depth 1.1, 240 pixels."""
    return scaled("efficientnet_b1", shape, classes, B[1], stem)


@reference(B[2].shape, 1000, 9_109_994)
def efficientnet_b2(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """EfficientNet-B2 (Tan 2019): width 1.1, depth 1.2, 260 pixels."""
    return scaled("efficientnet_b2", shape, classes, B[2], stem)


@reference(B[3].shape, 1000, 12_233_232)
def efficientnet_b3(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """EfficientNet-B3 (Tan 2019): width 1.2, depth 1.4, 300 pixels."""
    return scaled("efficientnet_b3", shape, classes, B[3], stem)


@reference(B[4].shape, 1000, 19_341_616)
def efficientnet_b4(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """EfficientNet-B4 (Tan 2019): width 1.4, depth 1.8, 380 pixels."""
    return scaled("efficientnet_b4", shape, classes, B[4], stem)


@reference(B[5].shape, 1000, 30_389_784)
def efficientnet_b5(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """EfficientNet-B5 (Tan 2019): width 1.6, depth 2.2, 456 pixels."""
    return scaled("efficientnet_b5", shape, classes, B[5], stem)


@reference(B[6].shape, 1000, 43_040_704)
def efficientnet_b6(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """EfficientNet-B6 (Tan 2019): width 1.8, depth 2.6, 528 pixels."""
    return scaled("efficientnet_b6", shape, classes, B[6], stem)


@reference(B[7].shape, 1000, 66_347_960)
def efficientnet_b7(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """EfficientNet-B7 (Tan 2019): width 2.0, depth 3.1, 600 pixels."""
    return scaled("efficientnet_b7", shape, classes, B[7], stem)


@reference(B[8].shape, 1000, 87_413_142)
def efficientnet_b8(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """EfficientNet-B8 (Xie 2020): width 2.2, depth 3.6, 672 pixels."""
    return scaled("efficientnet_b8", shape, classes, B[8], stem)
