"""AlexNet, the network that won ImageNet 2012, in its later form for one GPU.

Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NeurIPS 2012. The layers are
those of Krizhevsky, One Weird Trick for Parallelizing Convolutional Neural Networks, 2014,
https://arxiv.org/abs/1404.5997. Parameters have the same names as in torchvision, so that its weights fit.

Differs: no local response normalisation; PyTorch's default initialisation, not N(0, 0.01). For small images, a 3x3
convolution of stride 1 replaces the 11x11 of stride 4, and the classifier takes the mean over the image instead of
a 6x6 map.
"""

from collections import OrderedDict

from torch import nn

from fedsim.models import Stem, image_shape, is_small, reference


@reference((3, 224, 224), 1000, 61_100_840)
def alexnet(shape: tuple[int, ...], classes: int, /, *, stem: Stem = "auto") -> nn.Module:
    """AlexNet (Krizhevsky 2012, 2014): five convolutions, three linear layers.

    61,100,840 parameters at 3 x 224 x 224 and 1,000 classes.
    Raises ConfigError for anything but images of 15 pixels a side or more, or 63 with the ImageNet stem.
    """
    small = is_small(image_shape(shape, "alexnet", smallest=1), stem)
    channels, _, _ = image_shape(shape, "alexnet", smallest=15 if small else 63)
    first = nn.Conv2d(channels, 64, 3, padding=1) if small else nn.Conv2d(channels, 64, 11, stride=4, padding=2)
    side = 1 if small else 6
    features = nn.Sequential(
        first,
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
    )
    classifier = nn.Sequential(
        nn.Dropout(),
        nn.Linear(256 * side * side, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, classes),
    )
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
