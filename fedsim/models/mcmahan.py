"""The two MNIST networks of the paper that introduced federated averaging.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
https://arxiv.org/abs/1602.05629, section 3.

Differs: PyTorch's default initialisation; the paper does not say which it used. Any image size, number of channels
and number of classes.
"""

from collections import OrderedDict
from math import prod

from torch import nn

from fedsim.models import image_shape, reference


@reference((1, 28, 28), 10, 199_210)
def two_nn(shape: tuple[int, ...], classes: int, /) -> nn.Module:
    """McMahan 2017's 2NN: two hidden layers of 200 ReLUs.

    Takes examples of any shape. 199,210 parameters at 1 x 28 x 28 and 10 classes.
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

    1,663,370 parameters at 1 x 28 x 28 and 10 classes, as in the paper, from which the padding follows.
    Raises ConfigError for anything but images of 4 pixels a side or more.
    """
    channels, height, width = image_shape(shape, "cnn", smallest=4)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 5, padding=2),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),  # after the pool, which gives the same result for a quarter of the work
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 4) * (width // 4), 512),
            relu3=nn.ReLU(),
            fc2=nn.Linear(512, classes),
        )
    )
