"""Residual networks: one class, with the variants of several papers.

ResNet v1: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385.
ResNet-B, -C, -D: He et al., Bag of Tricks for Image Classification with Convolutional Neural Networks, CVPR 2019,
https://arxiv.org/abs/1812.01187, section 4. Each adds a change to the one before it, as in Table 5:
    v1   the first 1x1 of a bottleneck has the stride;
    b    its 3x3 has the stride instead, which elsewhere is called v1.5;
    c    in addition, the stem is three 3x3 of 32, 32 and 64 channels;
    d    in addition, a shortcut halves the image by a 2x2 average pool, not by the stride of its 1x1.
ResNeXt: Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017,
https://arxiv.org/abs/1611.05431. NxMd: the 3x3 has N groups, of M channels each in the first stage.
SE-ResNet, SE-ResNeXt, SENet-154: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018,
https://arxiv.org/abs/1709.01507; SENet-154 is in the appendix.

Parameters have torchvision's names, so that its weights fit. Convolutions are initialised as in He et al., Delving
Deep into Rectifiers, ICCV 2015, https://arxiv.org/abs/1502.01852, with the fan-out; the classifier has PyTorch's
default initialisation.

Differs: for small images, the stem is a 3x3 of stride 1 instead of the 7x7 of stride 2, without a pool; images may
have any size. ResNeXt and SENet have the stride in the 3x3, and so has SE-ResNet-50 unless `variant` is v1, which
its authors used. The pool of every stem is padded as in ResNet v1.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from fedsim.models import Stem, image_shape, is_small, reference

Variant = Literal["v1", "v1.5", "b", "c", "d"]


@dataclass(frozen=True)
class Architecture:
    """The settings in which the networks of this family differ; `groups` to `halved` apply to bottlenecks only."""

    block: "type[Basic] | type[Bottleneck]"
    blocks: tuple[int, int, int, int]  # in each stage
    groups: int = 1  # of the 3x3; ResNeXt calls it cardinality
    width: int = 64  # channels of a group in the first stage
    reduction: int | None = None  # r of squeeze-and-excitation; None for a network without it
    early_stride: bool = False  # the first 1x1 has the stride, not the 3x3
    halved: bool = False  # the first 1x1 has half the channels of the 3x3
    stem: tuple[int, ...] = (64,)  # channels: of one 7x7, or of several 3x3
    shortcut: Literal["1x1", "3x3", "pool"] = "1x1"  # what halves the image in a shortcut
    dropout: float = 0.0  # before the classifier


VARIANTS: dict[Variant, dict[str, Any]] = {
    "v1": {"early_stride": True},
    "v1.5": {},
    "b": {},
    "c": {"stem": (32, 32, 64)},
    "d": {"stem": (32, 32, 64), "shortcut": "pool"},
}


def conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A padded convolution, so that only its stride shrinks the image; without bias, as a batch norm follows."""
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def shortcut(channels: int, out: int, stride: int, arch: Architecture) -> nn.Module:
    """The identity if the shape stays the same, otherwise a projection."""
    if stride == 1 and channels == out:
        return nn.Identity()
    if stride > 1 and arch.shortcut == "pool":
        pool = nn.AvgPool2d(stride, ceil_mode=True)  # ceil_mode: odd sizes as in a convolution of stride 2
        return nn.Sequential(pool, conv(channels, out, 1), nn.BatchNorm2d(out))
    kernel = 3 if stride > 1 and arch.shortcut == "3x3" else 1
    return nn.Sequential(conv(channels, out, kernel, stride), nn.BatchNorm2d(out))


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut; in every variant the first convolution has the stride."""

    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int, arch: Architecture):
        super().__init__()
        self.conv1 = conv(channels, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stochastic_depth = StochasticDepth(0.0, "row")
        self.downsample = shortcut(channels, planes, stride, arch)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, planes, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(self.stochastic_depth(y) + self.downsample(x))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, optional squeeze-and-excitation, and a shortcut."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int, arch: Architecture):
        super().__init__()
        width, out = planes * arch.width // 64 * arch.groups, planes * self.expansion
        inner = width // 2 if arch.halved else width
        first, second = (stride, 1) if arch.early_stride else (1, stride)
        self.conv1 = conv(channels, inner, 1, first)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, width, 3, second, arch.groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out, 1)
        self.bn3 = nn.BatchNorm2d(out)
        self.se = SqueezeExcitation(out, out // arch.reduction) if arch.reduction else nn.Identity()
        self.stochastic_depth = StochasticDepth(0.0, "row")
        self.downsample = shortcut(channels, out, stride, arch)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, 4 planes, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.se(self.bn3(self.conv3(y)))
        return self.relu(self.stochastic_depth(y) + self.downsample(x))  # type: ignore[no-any-return]


class ResNet(nn.Sequential):
    """A stem, four stages that double the channels and halve the image, a mean over pixels, and a classifier.

    From (B, channels, H, W) to (B, classes) logits.
    """

    def __init__(self, channels: int, classes: int, arch: Architecture, *, small: bool):
        features = arch.stem[-1]
        layers: dict[str, nn.Module] = {
            "conv1": _stem(channels, arch.stem, small),
            "bn1": nn.BatchNorm2d(features),
            "relu": nn.ReLU(inplace=True),
            "maxpool": nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1),
        }
        for stage, blocks in enumerate(arch.blocks):
            planes, chain = 64 * 2**stage, nn.Sequential()
            for block in range(blocks):
                chain.append(arch.block(features, planes, 2 if stage and not block else 1, arch))
                features = planes * arch.block.expansion
            layers[f"layer{stage + 1}"] = chain
        layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        if arch.dropout:
            layers["dropout"] = nn.Dropout(arch.dropout)
        layers["fc"] = nn.Linear(features, classes)
        super().__init__(OrderedDict(layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stem(channels: int, widths: tuple[int, ...], small: bool) -> nn.Module:
    stride = 1 if small else 2
    if len(widths) == 1:
        return conv(channels, widths[0], 3 if small else 7, stride)
    first, *others = pairwise((channels, *widths))
    layers: list[nn.Module] = [conv(*first, 3, stride)]
    for before, after in others:
        layers += [nn.BatchNorm2d(before), nn.ReLU(inplace=True), conv(before, after, 3)]
    return nn.Sequential(*layers)


def _build(
    shape: tuple[int, ...], classes: int, stem: Stem, arch: Architecture, variant: Variant = "v1.5"
) -> nn.Module:
    channels, height, width = image_shape(shape, "a residual network", smallest=1)
    small = is_small((channels, height, width), stem)
    return ResNet(channels, classes, replace(arch, **VARIANTS[variant]), small=small)


RESNET18 = Architecture(Basic, (2, 2, 2, 2))
RESNET34 = Architecture(Basic, (3, 4, 6, 3))
RESNET50 = Architecture(Bottleneck, (3, 4, 6, 3))
RESNET101 = Architecture(Bottleneck, (3, 4, 23, 3))
RESNET152 = Architecture(Bottleneck, (3, 8, 36, 3))
RESNEXT50 = replace(RESNET50, groups=32, width=4)
RESNEXT101 = replace(RESNET101, groups=32, width=4)
SENET154 = replace(
    RESNET152,
    groups=64,
    width=4,
    reduction=16,
    halved=True,
    stem=(64, 64, 128),
    shortcut="3x3",
    dropout=0.2,
)


@reference((3, 224, 224), 1000, 11_689_512)
def resnet18(
    shape: tuple[int, ...], classes: int, /, *, variant: Variant = "v1.5", stem: Stem = "auto"
) -> nn.Module:
    """ResNet-18 (He 2016): 8 basic blocks, where v1, v1.5 and b are the same."""
    return _build(shape, classes, stem, RESNET18, variant)


@reference((3, 224, 224), 1000, 21_797_672)
def resnet34(
    shape: tuple[int, ...], classes: int, /, *, variant: Variant = "v1.5", stem: Stem = "auto"
) -> nn.Module:
    """ResNet-34 (He 2016): 16 basic blocks, where v1, v1.5 and b are the same."""
    return _build(shape, classes, stem, RESNET34, variant)


@reference((3, 224, 224), 1000, 25_557_032)
def resnet50(
    shape: tuple[int, ...], classes: int, /, *, variant: Variant = "v1.5", stem: Stem = "auto"
) -> nn.Module:
    """ResNet-50 (He 2016): 16 bottleneck blocks; v1, v1.5 = B, C and D."""
    return _build(shape, classes, stem, RESNET50, variant)


@reference((3, 224, 224), 1000, 44_549_160)
def resnet101(
    shape: tuple[int, ...], classes: int, /, *, variant: Variant = "v1.5", stem: Stem = "auto"
) -> nn.Module:
    """ResNet-101 (He 2016): 33 bottleneck blocks; v1, v1.5 = B, C and D."""
    return _build(shape, classes, stem, RESNET101, variant)


@reference((3, 224, 224), 1000, 60_192_808)
def resnet152(
    shape: tuple[int, ...], classes: int, /, *, variant: Variant = "v1.5", stem: Stem = "auto"
) -> nn.Module:
    """ResNet-152 (He 2016): 50 bottleneck blocks; v1, v1.5 = B, C and D."""
    return _build(shape, classes, stem, RESNET152, variant)


@reference((3, 224, 224), 1000, 25_028_904)
def resnext50_32x4d(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """ResNeXt-50 (Xie 2017): ResNet-50 with 32 groups of 4 channels."""
    return _build(shape, classes, stem, RESNEXT50)


@reference((3, 224, 224), 1000, 44_177_704)
def resnext101_32x4d(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """ResNeXt-101 (Xie 2017): ResNet-101 with 32 groups of 4 channels."""
    return _build(shape, classes, stem, RESNEXT101)


@reference((3, 224, 224), 1000, 88_791_336)
def resnext101_32x8d(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """ResNeXt-101 with 32 groups of 8 channels: twice as wide inside."""
    return _build(shape, classes, stem, replace(RESNEXT101, width=8))


@reference((3, 224, 224), 1000, 28_088_024)
def se_resnet50(
    shape: tuple[int, ...], classes: int, /, *, variant: Variant = "v1.5", stem: Stem = "auto"
) -> nn.Module:
    """SE-ResNet-50 (Hu 2018): ResNet-50 with squeeze-and-excitation."""
    return _build(shape, classes, stem, replace(RESNET50, reduction=16), variant)


@reference((3, 224, 224), 1000, 27_559_896)
def se_resnext50_32x4d(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """SE-ResNeXt-50 (Hu 2018): ResNeXt-50 32x4d with squeeze-and-excitation."""
    return _build(shape, classes, stem, replace(RESNEXT50, reduction=16))


@reference((3, 224, 224), 1000, 48_955_416)
def se_resnext101_32x4d(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """SE-ResNeXt-101 (Hu 2018): ResNeXt-101 32x4d with squeeze-and-excitation."""
    return _build(shape, classes, stem, replace(RESNEXT101, reduction=16))


@reference((3, 224, 224), 1000, 115_088_984)
def senet154(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """SENet-154 (Hu 2018): SE-ResNeXt-152 64x4d with a deep stem and dropout."""
    return _build(shape, classes, stem, SENET154)
