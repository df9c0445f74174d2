"""MobileNets: networks of depthwise separable convolutions, for mobile phones and other small devices.

V1: Howard et al., MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, 2017,
https://arxiv.org/abs/1704.04861.
V2: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018,
https://arxiv.org/abs/1801.04381.
V3: Howard et al., Searching for MobileNetV3, ICCV 2019, https://arxiv.org/abs/1905.02244.

V2 and V3 are torchvision's, so that its weights fit. V1 is written here, after its Table 1. Its last convolution
has stride 1, because the stride 2 of the table contradicts the image sizes of the same table.

Differs: for small images, the first convolution and the first stage of stride 2 have stride 1, so that 32 pixels
end as 4 x 4. V1 has PyTorch's default initialisation; the paper does not say which it used.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.models import mobilenetv2, mobilenetv3
from torchvision.ops import Conv2dNormActivation, StochasticDepth

from fedsim.models import Stem, image_shape, is_small, reference, round_channels
from fedsim.types import Positive

Row = tuple[int, ...]
V1: list[Row] = [  # Table 1: output channels, stride
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
]
V2: list[Row] = [  # Table 2: t, c, n, s
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


@reference((3, 224, 224), 1000, 4_231_976)
def mobilenet_v1(
    shape: tuple[int, ...], classes: int, /, *, width: Positive = 1.0, stem: Stem = "auto"
) -> nn.Module:
    """MobileNet V1 (Howard 2017): 13 depthwise separable convolutions.

    `width`, the paper's alpha, multiplies all channels; the results are rounded to a multiple of 8.
    Raises ConfigError for anything but images.
    """
    small = is_small(image_shape(shape, "mobilenet_v1", smallest=1), stem)
    inputs = round_channels(32 * width)
    features: list[nn.Module] = [Conv2dNormActivation(shape[0], inputs, stride=1 if small else 2)]
    for outputs, stride in _rows(V1, small):
        features.append(Separable(inputs, round_channels(outputs * width), stride))
        inputs = round_channels(outputs * width)
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(inputs, classes),
        )
    )


@reference((3, 224, 224), 1000, 3_504_872)
def mobilenet_v2(
    shape: tuple[int, ...], classes: int, /, *, width: Positive = 1.0, stem: Stem = "auto"
) -> nn.Module:
    """MobileNet V2 (Sandler 2018): 17 inverted residuals.

    `width` multiplies all channels (if below 1, not the last); the results are rounded to a multiple of 8.
    Raises ConfigError for anything but images.
    """
    small = is_small(image_shape(shape, "mobilenet_v2", smallest=1), stem)
    rows = [list(row) for row in _rows(V2, small)]
    network = mobilenetv2.MobileNetV2(classes, width, rows, block=_inverted_residual_v2)
    replace_first_convolution(network, shape[0], small)
    return network  # type: ignore[no-any-return]


@reference((3, 224, 224), 1000, 2_542_856)
def mobilenet_v3_small(
    shape: tuple[int, ...], classes: int, /, *, width: Positive = 1.0, stem: Stem = "auto"
) -> nn.Module:
    """MobileNet V3 small (Howard 2019): 11 blocks, 9 with squeeze-and-excitation.

    `width` multiplies all channels; the results are rounded to a multiple of 8.
    Raises ConfigError for anything but images.
    """
    return _v3("mobilenet_v3_small", shape, classes, width, stem)


@reference((3, 224, 224), 1000, 5_483_032)
def mobilenet_v3_large(
    shape: tuple[int, ...], classes: int, /, *, width: Positive = 1.0, stem: Stem = "auto"
) -> nn.Module:
    """MobileNet V3 large (Howard 2019): 15 blocks, 8 with squeeze-and-excitation.

    `width` multiplies all channels; the results are rounded to a multiple of 8.
    Raises ConfigError for anything but images.
    """
    return _v3("mobilenet_v3_large", shape, classes, width, stem)


class Separable(nn.Module):
    """A depthwise separable convolution: a 3x3 on each channel, then a 1x1 across channels (section 3.1)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.depthwise = Conv2dNormActivation(inputs, inputs, stride=stride, groups=inputs)
        self.pointwise = Conv2dNormActivation(inputs, outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))  # type: ignore[no-any-return]


def replace_first_convolution(network: Any, channels: int, small: bool) -> None:
    """Give torchvision's `network` a first convolution for `channels`, of stride 1 if images are `small`."""
    outputs = network.features[0][0].out_channels
    first = nn.Conv2d(channels, outputs, 3, stride=1 if small else 2, padding=1, bias=False)
    nn.init.kaiming_normal_(first.weight, mode="fan_out")  # as in torchvision
    network.features[0][0] = first


def remove_first_stride(stages: list[Any]) -> None:
    """Give the first of torchvision's `stages` that has stride 2 the stride 1."""
    next(stage for stage in stages if stage.stride == 2).stride = 1


def _rows(table: list[Row], small: bool) -> list[Row]:
    """The rows of a table, whose last column is the stride; `small` sets the stride of the second row to 1."""
    return [table[0], (*table[1][:-1], 1), *table[2:]] if small else table


def _inverted_residual_v2(*args: Any, **kwargs: Any) -> nn.Module:
    block = mobilenetv2.InvertedResidual(*args, **kwargs)
    if block.use_res_connect:
        block.conv.append(StochasticDepth(0.0, "row"))
    return block  # type: ignore[no-any-return]


def _inverted_residual_v3(*args: Any, **kwargs: Any) -> nn.Module:
    block = mobilenetv3.InvertedResidual(*args, **kwargs)
    if block.use_res_connect:
        block.block.append(StochasticDepth(0.0, "row"))
    return block  # type: ignore[no-any-return]


def _v3(name: str, shape: tuple[int, ...], classes: int, width: float, stem: Stem) -> nn.Module:
    small = is_small(image_shape(shape, name, smallest=1), stem)
    blocks, last = mobilenetv3._mobilenet_v3_conf(name, width_mult=width)
    if small:
        remove_first_stride(blocks)
    network = mobilenetv3.MobileNetV3(blocks, last, classes, block=_inverted_residual_v3)
    replace_first_convolution(network, shape[0], small)
    return network  # type: ignore[no-any-return]
