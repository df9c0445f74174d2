"""Networks, one family a file: what `model: {name: ...}` in a config means.

A factory takes the shape of one example and the number of classes, and its options as keyword-only
parameters: `factory(shape, classes, /, *, option=...) -> nn.Module`, from (B, *shape) to (B, classes) logits.
Its layers have names: strategies and configs address them by the names of their parameters. What holds for all
networks (norm, dropout, initialisation, weights from a file, freezing) is done to the finished network, in
options.py; for it, a residual branch ends in torchvision.ops.StochasticDepth, registered after the branch's last
norm and before the shortcut, and there is none elsewhere.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

from fedsim.base.catalogue import Catalogue
from fedsim.errors import ConfigError

MODELS = Catalogue(
    "model",
    "fedsim.models",
    {
        "2nn": "mcmahan:two_nn",
        "cnn": "mcmahan:cnn",
        "cifar_cnn": "cifar:cifar_cnn",
        "pfl_cnn": "cifar:pfl_cnn",
        "cnn_bn": "batch_norm:cnn_bn",
        **{f"resnet{depth}": f"resnet:resnet{depth}" for depth in (18, 34, 50, 101, 152)},
        **{name: f"resnet:{name}" for name in ("resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d")},
        **{name: f"resnet:{name}" for name in ("se_resnet50", "se_resnext50_32x4d", "se_resnext101_32x4d")},
        "senet154": "resnet:senet154",
        **{name: f"mobilenet:{name}" for name in ("mobilenet_v1", "mobilenet_v2")},
        **{name: f"mobilenet:{name}" for name in ("mobilenet_v3_small", "mobilenet_v3_large")},
        **{name: f"shufflenet:{name}" for name in ("shufflenet_v1", "shufflenet_v2")},
        **{f"efficientnet_b{phi}": f"efficientnet:efficientnet_b{phi}" for phi in range(9)},
        "inception_v3": "inception:inception_v3",
        "alexnet": "alexnet:alexnet",
        **{f"vgg{depth}": f"vgg:vgg{depth}" for depth in (11, 13, 16, 19)},
        **{f"densenet{depth}": f"densenet:densenet{depth}" for depth in (121, 161, 169, 201)},
    },
)

Factory = TypeVar("Factory", bound=Callable[..., Any])
Stem = Literal["auto", "imagenet", "small"]  # how soon a network halves its images
SMALL = 64  # pixels a side up to which `auto` is the small stem


class Reference(NamedTuple):
    """What a network is measured on in its paper, and how many parameters it has there."""

    shape: tuple[int, ...]
    classes: int
    parameters: int


def reference(shape: tuple[int, ...], classes: int, parameters: int) -> Callable[[Factory], Factory]:
    """Marks a factory with its `reference`: `fedsim list` shows it, tests hold the network to it."""

    def mark(factory: Factory) -> Factory:
        factory.reference = Reference(shape, classes, parameters)  # type: ignore[attr-defined]
        return factory

    return mark


def image(shape: tuple[int, ...], name: str, smallest: int) -> tuple[int, int, int]:
    """`shape` as (channels, height, width).

    Raises ConfigError unless it is that of an image of at least `smallest` pixels a side.
    """
    if len(shape) != 3 or min(shape[1:]) < smallest:
        fits = f"(channels, height, width) with at least {smallest} pixel{'s' * (smallest > 1)} a side"
        raise ConfigError(f"model: {name} takes images, {fits}; these examples are {shape}")
    return shape


def is_small(shape: tuple[int, int, int], stem: Stem) -> bool:
    """Whether a network starts as those for small images do: a 3x3 of stride 1 and no pool."""
    return stem == "small" or (stem == "auto" and min(shape[1:]) <= SMALL)
