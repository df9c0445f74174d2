"""The two MNIST networks of the paper that named federated averaging.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
https://arxiv.org/abs/1602.05629, section 3.

Differs: weights start as PyTorch has them; the paper does not say how. Any image size, channel count and
number of classes.
"""

from collections import OrderedDict
from math import prod

from torch import nn

from fedsim.models import image, reference


@reference((1, 28, 28), 10, 199_210)
def two_nn(shape: tuple[int, ...], classes: int, /) -> nn.Module:
    """McMahan 2017's 2NN: two hidden layers of 200 ReLUs.

    Any shape; 199,210 parameters at 1 x 28 x 28 and 10 classes.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(prod(shape), 200),
            relu1=nn.ReLU(),
            fc2=nn.Linear(200, 200),
            relu2=nn.ReLU(),
            fc3=nn.Linear(200, classes),
        )
    )


@reference((1, 28, 28), 10, 1_663_370)
def cnn(shape: tuple[int, ...], classes: int, /) -> nn.Module:
    """McMahan 2017's CNN: two 5x5 convolutions, one hidden layer of 512.

    1,663,370 parameters at 1 x 28 x 28 and 10 classes, which the paper gives: hence the same padding.
    Raises ConfigError for anything but images of 4 pixels a side or more.
    """
    channels, height, width = image(shape, "cnn", smallest=4)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 5, padding=2),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),  # after the pool: the same numbers, a quarter of the work
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 4) * (width // 4), 512),
            relu3=nn.ReLU(),
            fc2=nn.Linear(512, classes),
        )
    )
