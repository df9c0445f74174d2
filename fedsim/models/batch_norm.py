"""A small network with batch normalisation, to study whether its statistics should be shared or local.

After Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021,
https://arxiv.org/abs/2102.07623, whose digits network has batch normalisation after each convolution.

Differs: two 3x3 convolutions instead of three 5x5, and no hidden layers, so that it is small enough for tests.
"""

from collections import OrderedDict

from torch import nn

from fedsim.models import image_shape, reference
from fedsim.types import Count


@reference((1, 28, 28), 10, 20_586)
def cnn_bn(shape: tuple[int, ...], classes: int, /, *, widths: tuple[Count, Count] = (16, 32)) -> nn.Module:
    """Small CNN with batch normalisation, for FedBN: two 3x3 convolutions.

    `widths` are the channels of the convolutions. 20,586 parameters at 1 x 28 x 28 and 10 classes.
    Raises ConfigError for anything but images of 4 pixels a side or more.
    """
    channels, height, width = image_shape(shape, "cnn_bn", smallest=4)
    first, second = widths
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 3, padding=1),
            bn1=nn.BatchNorm2d(first),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 3, padding=1),
            bn2=nn.BatchNorm2d(second),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(second * (height // 4) * (width // 4), classes),
        )
    )
