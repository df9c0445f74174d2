"""Networks, one family a file: what `model: {name: ...}` in a config means.

A factory takes the shape of one example and the number of classes, and its options as keyword-only
parameters: `factory(shape, classes, /, *, option=...) -> nn.Module`, from (B, *shape) to (B, classes) logits.
Its layers have names, because strategies and configs refer to layers by the names of their parameters. The
options that all networks share (norm, dropout, initialisation, weights from a file, freezing) are applied to the
finished network, in options.py. They find residual branches by torchvision.ops.StochasticDepth: each residual
branch ends in one, registered after the branch's last norm and before the shortcut; it is used nowhere else.
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
Stem = Literal["auto", "imagenet", "small"]  # the first layers: for large images, or for small ones
MAX_SMALL_STEM_PIXELS = 64  # pixels a side up to which `auto` means `small`


class Reference(NamedTuple):
    """The example shape and number of classes in a network's paper, and its number of parameters for these."""

    shape: tuple[int, ...]
    classes: int
    parameters: int


def reference(shape: tuple[int, ...], classes: int, parameters: int) -> Callable[[Factory], Factory]:
    """Gives a factory its `reference`, which `fedsim list` shows and which the tests check."""

    def mark(factory: Factory) -> Factory:
        factory.reference = Reference(shape, classes, parameters)  # type: ignore[attr-defined]
        return factory

    return mark


def image_shape(shape: tuple[int, ...], name: str, smallest: int) -> tuple[int, int, int]:
    """`shape` as (channels, height, width).

    Raises ConfigError unless it is the shape of an image with at least `smallest` pixels a side.
    """
    if len(shape) != 3 or min(shape[1:]) < smallest:
        images = f"images (channels, height, width) with at least {smallest} pixel{'s' * (smallest > 1)} a side"
        raise ConfigError(f"model: {name} takes {images}, but the examples have shape {shape}")
    return shape


def round_channels(channels: float, multiple: int = 8) -> int:
    """The multiple of `multiple` nearest to `channels`, but not 0."""
    return max(multiple, round(channels / multiple) * multiple)


def is_small(shape: tuple[int, int, int], stem: Stem) -> bool:
    """Whether a network has the stem for small images: a 3x3 convolution of stride 1 and no pooling."""
    return stem == "small" or (stem == "auto" and min(shape[1:]) <= MAX_SMALL_STEM_PIXELS)
