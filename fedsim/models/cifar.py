"""Three CIFAR-10 networks that papers and benchmarks of federated learning use.

cifar_cnn: the network of TensorFlow's CIFAR-10 tutorial (2016), which McMahan et al. used in Table 3 of
Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
https://arxiv.org/abs/1602.05629, on crops of 24 pixels: "about 10^6 parameters".
Differs: no local response normalisation (it has no parameters, and the paper does not mention it); PyTorch's
default initialisation.

pfl_cnn: the CIFAR-10 network of Granqvist et al., pfl-research: Simulation Framework for Accelerating
Research in Private Federated Learning, NeurIPS 2024, https://arxiv.org/abs/2404.06430.
Differs: the two dropout rates are options.

lenet: the network of PyTorch's CIFAR-10 tutorial, https://pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html,
after LeCun et al. 1998; NIID-Bench (https://arxiv.org/abs/2102.02079) and BlazeFL's benchmark use it.
"""

from collections import OrderedDict
from typing import Annotated

from annotated_types import Ge
from torch import nn
from torchvision.transforms import CenterCrop

from fedsim.models import image_shape, reference
from fedsim.types import Decay


@reference((3, 32, 32), 10, 1_068_298)
def cifar_cnn(shape: tuple[int, ...], classes: int, /, *, crop: Annotated[int, Ge(4)] = 24) -> nn.Module:
    """TensorFlow's CIFAR-10 tutorial network, on the central 24 pixels (McMahan 2017).

    1,068,298 parameters with 10 classes. Larger images are cropped to `crop` pixels a side at the centre, as the
    paper does for evaluation. Raises ConfigError for anything but images of 4 pixels a side or more.
    """
    channels, height, width = image_shape(shape, "cifar_cnn", smallest=4)
    height, width = min(height, crop), min(width, crop)
    return nn.Sequential(
        OrderedDict(
            crop=CenterCrop((height, width)),
            conv1=nn.Conv2d(channels, 64, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),  # overlapping windows, as in the tutorial
            conv2=nn.Conv2d(64, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(3, stride=2, ceil_mode=True),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 4) * (width // 4), 384),
            relu3=nn.ReLU(),
            fc2=nn.Linear(384, 192),
            relu4=nn.ReLU(),
            fc3=nn.Linear(192, classes),
        )
    )


@reference((3, 32, 32), 10, 1_626_442)
def pfl_cnn(
    shape: tuple[int, ...], classes: int, /, *, dropout1: Decay = 0.25, dropout2: Decay = 0.5
) -> nn.Module:
    """pfl-research's CIFAR-10 network: two 3x3 convolutions, one pool, dropout.

    `dropout1` follows the convolutions, `dropout2` the hidden layer: the probability that a value is zeroed.
    1,626,442 parameters at 3 x 32 x 32 and 10 classes.
    Raises ConfigError for anything but images of 6 pixels a side or more.
    """
    channels, height, width = image_shape(shape, "pfl_cnn", smallest=6)
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 3),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            dropout1=nn.Dropout(dropout1),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
            relu3=nn.ReLU(),
            dropout2=nn.Dropout(dropout2),
            fc2=nn.Linear(128, classes),
        )
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)  # as in pfl-research
    return network


@reference((3, 32, 32), 10, 62_006)
def lenet(shape: tuple[int, ...], classes: int, /) -> nn.Module:
    """The network of PyTorch's CIFAR-10 tutorial: 6 and 16 filters of 5x5, hidden layers of 120 and 84.

    62,006 parameters at 3 x 32 x 32 and 10 classes. Raises ConfigError for anything but images of 16 pixels a side
    or more.
    """
    channels, height, width = image_shape(shape, "lenet", smallest=16)
    height, width = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 6, 5),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),  # after the pool, which gives the same result for a quarter of the work
            conv2=nn.Conv2d(6, 16, 5),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * height * width, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, classes),
        )
    )
