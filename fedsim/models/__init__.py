"""Networks, one family a file: what `model: {name: ...}` in a config means.

A factory takes the shape of one example and the number of classes, and its options as keyword-only
parameters: `factory(shape, classes, /, *, option=...) -> nn.Module`, from (B, *shape) to (B, classes) logits.
Its layers have names: strategies and configs address them by the names of their parameters.
"""

from fedsim.catalogue import Catalogue
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
    },
)


def image(shape: tuple[int, ...], name: str, smallest: int) -> tuple[int, int, int]:
    """`shape` as (channels, height, width).

    Raises ConfigError unless it is that of an image of at least `smallest` pixels a side.
    """
    if len(shape) != 3 or min(shape[1:]) < smallest:
        fits = f"(channels, height, width) with at least {smallest} pixels a side"
        raise ConfigError(f"model: {name} takes images, {fits}; these examples are {shape}")
    return shape
