"""ShuffleNets: grouped or split convolutions, and channel shuffles that mix the groups.

V1: Zhang et al., ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR 2018,
https://arxiv.org/abs/1707.01083.
V2: Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018,
https://arxiv.org/abs/1807.11164.

V1 is written here, after Table 1 and Figure 2. V2, which splits its channels instead of grouping them, is
torchvision's, so that its weights fit. Both have PyTorch's default initialisation.

Differs: for small images, the first convolution has stride 1 and there is no pool, so that 32 pixels end as 4 x 4.
"""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2
from torchvision.ops import StochasticDepth

from fedsim.errors import ConfigError
from fedsim.models import Stem, image_shape, is_small, reference, round_channels
from fedsim.types import Positive

REPEATS = (4, 8, 4)  # units of stages 2 to 4
V1_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # in stage 2, by groups; each later stage doubles them
V2_CHANNELS = {  # by width: in the first convolution, stages 2 to 4, and the last convolution
    0.5: (24, 48, 96, 192, 1024),
    1.0: (24, 116, 232, 464, 1024),
    1.5: (24, 176, 352, 704, 1024),
    2.0: (24, 244, 488, 976, 2048),
}


@reference((3, 224, 224), 1000, 1_865_728)
def shufflenet_v1(
    shape: tuple[int, ...],
    classes: int,
    /,
    *,
    groups: Literal[1, 2, 3, 4, 8] = 3,
    width: Positive = 1.0,
    stem: Stem = "auto",
) -> nn.Module:
    """ShuffleNet V1 (Zhang 2018): 16 units of grouped 1x1 convolutions.

    With more `groups` there are more channels, at about the same cost. `width`, the paper's s, multiplies all
    channels; the results are rounded to a multiple of the groups. Raises ConfigError for anything but images.
    """
    small = is_small(image_shape(shape, "shufflenet_v1", smallest=1), stem)
    inputs = round_channels(24 * width, groups)
    layers = OrderedDict(_first_layers(shape[0], inputs, small))
    for stage, repeats in enumerate(REPEATS, 2):
        outputs = round_channels(V1_CHANNELS[groups] * width, 4 * groups) * 2 ** (stage - 2)
        first = Unit(inputs, outputs, 2, groups, first_groups=1 if stage == 2 else groups)
        others = (Unit(outputs, outputs, 1, groups, first_groups=groups) for _ in range(repeats - 1))
        layers[f"stage{stage}"] = nn.Sequential(first, *others)
        inputs = outputs
    layers.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(inputs, classes))
    return nn.Sequential(layers)


@reference((3, 224, 224), 1000, 2_278_604)
def shufflenet_v2(
    shape: tuple[int, ...], classes: int, /, *, width: float = 1.0, stem: Stem = "auto"
) -> nn.Module:
    """ShuffleNet V2 (Ma 2018): 16 units that split and shuffle their channels.

    `width` is 0.5, 1.0, 1.5 or 2.0, with the channels of Table 5.
    Raises ConfigError for another width, and for anything but images.
    """
    small = is_small(image_shape(shape, "shufflenet_v2", smallest=1), stem)
    if width not in V2_CHANNELS:
        raise ConfigError(f"model.width: {width} should be 0.5, 1.0, 1.5 or 2.0")
    network = ShuffleNetV2(list(REPEATS), list(V2_CHANNELS[width]), classes)
    start = _first_layers(shape[0], V2_CHANNELS[width][0], small)
    network.conv1, network.maxpool = start["conv1"], start["maxpool"]
    return network  # type: ignore[no-any-return]


class Unit(nn.Module):
    """A ShuffleNet V1 unit: Figure 2 (b), or with stride 2, Figure 2 (c)."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        inner, added = outputs // 4, outputs if stride == 1 else outputs - inputs
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(inputs, inner, 1, groups=first_groups, bias=False),
                bn1=nn.BatchNorm2d(inner),
                relu=nn.ReLU(inplace=True),
                shuffle=nn.ChannelShuffle(groups),
                conv2=nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
                bn2=nn.BatchNorm2d(inner),
                conv3=nn.Conv2d(inner, added, 1, groups=groups, bias=False),
                bn3=nn.BatchNorm2d(added),
            )
        )
        if stride == 1:
            self.branch.append(StochasticDepth(0.0, "row"))
        self.shortcut = nn.AvgPool2d(3, stride, padding=1) if stride == 2 else nn.Identity()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut, branch = self.shortcut(x), self.branch(x)
        return torch.relu(shortcut + branch if self.stride == 1 else torch.cat([shortcut, branch], dim=1))


def _first_layers(channels: int, outputs: int, small: bool) -> dict[str, nn.Module]:
    """The layers before the first unit, which V1 and V2 share."""
    first = nn.Conv2d(channels, outputs, 3, stride=1 if small else 2, padding=1, bias=False)
    return {
        "conv1": nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        "maxpool": nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1),
    }
