"""DenseNets: each layer takes the outputs of all earlier layers of its block.

Huang et al., Densely Connected Convolutional Networks, CVPR 2017, https://arxiv.org/abs/1608.06993, Table 1.
The network is torchvision's, so that its weights fit. Convolutions are initialised as in He et al., ICCV 2015,
https://arxiv.org/abs/1502.01852, with the fan-in.

Differs: for small images, a 3x3 of stride 1 replaces the 7x7 of stride 2 and the pool. The paper's own
networks for CIFAR have three dense blocks; these keep all four.
"""

from torch import nn
from torchvision.models import DenseNet

from fedsim.models import Stem, image_shape, is_small, reference


def _build(
    shape: tuple[int, ...], classes: int, stem: Stem, blocks: tuple[int, int, int, int], growth: int = 32
) -> nn.Module:
    small = is_small(image_shape(shape, "densenet", smallest=1), stem)
    channels, _, _ = image_shape(shape, "densenet", smallest=8 if small else 29)
    width = 2 * growth
    network = DenseNet(growth, blocks, width, num_classes=classes)
    kernel, stride = (3, 1) if small else (7, 2)
    first = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(first.weight)
    network.features.conv0 = first
    if small:
        network.features.pool0 = nn.Identity()
    return network  # type: ignore[no-any-return]


@reference((3, 224, 224), 1000, 7_978_856)
def densenet121(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """DenseNet-121 (Huang 2017): 6, 12, 24 and 16 dense layers."""
    return _build(shape, classes, stem, (6, 12, 24, 16))


@reference((3, 224, 224), 1000, 28_681_000)
def densenet161(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """DenseNet-161 (Huang 2017): 6, 12, 36 and 24 layers, of 48 channels each."""
    return _build(shape, classes, stem, (6, 12, 36, 24), growth=48)


@reference((3, 224, 224), 1000, 14_149_480)
def densenet169(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """DenseNet-169 (Huang 2017): 6, 12, 32 and 32 dense layers."""
    return _build(shape, classes, stem, (6, 12, 32, 32))


@reference((3, 224, 224), 1000, 20_013_928)
def densenet201(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """DenseNet-201 (Huang 2017): 6, 12, 48 and 32 dense layers."""
    return _build(shape, classes, stem, (6, 12, 48, 32))
