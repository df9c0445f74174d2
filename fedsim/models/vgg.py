"""VGG: deep stacks of 3x3 convolutions.

Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015,
https://arxiv.org/abs/1409.1556, Table 1: columns A, B, D and E.

Parameters have the names of torchvision's vggN, and with `batch_norm` those of its vggN_bn, so that its weights
fit. Convolutions are initialised as in He et al., ICCV 2015, https://arxiv.org/abs/1502.01852, with the fan-out;
linear layers from N(0, 0.01); biases are 0.

Differs: the initialisation of the convolutions, and batch normalisation, which is newer than the paper. For small
images, pooling rounds sizes up, so that any size is allowed, and the classifier takes the mean over the image
instead of a 7x7 map.
"""

from collections import OrderedDict

from torch import nn

from fedsim.models import Stem, image_shape, is_small, reference


def _build(
    shape: tuple[int, ...], classes: int, blocks: tuple[int, ...], batch_norm: bool, stem: Stem
) -> nn.Module:
    small = is_small(image_shape(shape, "vgg", smallest=1), stem)
    channels, _, _ = image_shape(shape, "vgg", smallest=1 if small else 32)
    features = nn.Sequential()
    for convolutions, width in zip(blocks, (64, 128, 256, 512, 512), strict=True):
        for _ in range(convolutions):
            features.append(nn.Conv2d(channels, width, 3, padding=1))
            if batch_norm:
                features.append(nn.BatchNorm2d(width))
            features.append(nn.ReLU(inplace=True))
            channels = width
        features.append(nn.MaxPool2d(2, ceil_mode=small))
    side = 1 if small else 7
    classifier = nn.Sequential(
        nn.Linear(512 * side * side, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, classes),
    )
    for module in (*features, *classifier):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )


@reference((3, 224, 224), 1000, 132_863_336)
def vgg11(shape: tuple[int, ...], classes: int, /, *, batch_norm: bool = False, stem: Stem = "auto") -> nn.Module:
    """VGG-11 (Simonyan 2015): 8 convolutions, 3 linear layers."""
    return _build(shape, classes, (1, 1, 2, 2, 2), batch_norm, stem)


@reference((3, 224, 224), 1000, 133_047_848)
def vgg13(shape: tuple[int, ...], classes: int, /, *, batch_norm: bool = False, stem: Stem = "auto") -> nn.Module:
    """VGG-13 (Simonyan 2015): 10 convolutions, 3 linear layers."""
    return _build(shape, classes, (2, 2, 2, 2, 2), batch_norm, stem)


@reference((3, 224, 224), 1000, 138_357_544)
def vgg16(shape: tuple[int, ...], classes: int, /, *, batch_norm: bool = False, stem: Stem = "auto") -> nn.Module:
    """VGG-16 (Simonyan 2015): 13 convolutions, 3 linear layers."""
    return _build(shape, classes, (2, 2, 3, 3, 3), batch_norm, stem)


@reference((3, 224, 224), 1000, 143_667_240)
def vgg19(shape: tuple[int, ...], classes: int, /, *, batch_norm: bool = False, stem: Stem = "auto") -> nn.Module:
    """VGG-19 (Simonyan 2015): 16 convolutions, 3 linear layers."""
    return _build(shape, classes, (2, 2, 4, 4, 4), batch_norm, stem)
