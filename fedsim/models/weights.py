"""Loads weights from a safetensors file, or torchvision's pretrained weights."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fedsim.base.files import expanded
from fedsim.base.machine import gigabytes, memory
from fedsim.base.reading import open_regular
from fedsim.errors import ConfigError, one_line, printable, reason

OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")  # norm.1 for norm1, and so on
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_FIRST_LAYER = "Conv2d_1a_3x3"


def load_weights(
    network: nn.Module, source: Path | str, at: str, *, new_head: bool = False, head_option: str | None = None
) -> None:
    """Load the weights of `source` into a network: a safetensors file, or the name of weights in torchvision.

    With `new_head` the last linear layer keeps its own weights; `head_option` is the config key of that option.
    Raises ConfigError, which begins with the key `at`, unless `source` has exactly the tensors of the network, in
    the same shapes and finite. Floating-point tensors may have another precision.
    """
    where = f"{at}: {printable(source)}"
    given = (
        _from_file(expanded(source, at), where) if isinstance(source, Path) else _from_torchvision(source, where)
    )
    own, last = network.state_dict(), last_linear(network)
    left_out = {f"{last}.weight", f"{last}.bias"} if new_head else set()
    left_out |= {name for name in {*own, *given} if name.endswith(".num_batches_tracked")}
    hint = f"; {head_option}=true keeps the network's own {last}" if head_option and not new_head else ""
    own = {name: value for name, value in own.items() if name not in left_out}
    for name, value in own.items():
        _check_tensor(name, value, given, where, hint if name.rpartition(".")[0] == last else "")
    if unexpected := [name for name in given if name not in own and name not in left_out]:
        raise ConfigError(f"{where}: has a tensor {printable(unexpected[0])}, which the network does not have")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(given[name])  # state_dict's tensors are the network's own


def last_linear(network: nn.Module) -> str | None:
    """The name of the last linear layer, which is the classifier in every network here."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def _check_tensor(name: str, own: Tensor, given: Mapping[str, Tensor], where: str, hint: str) -> None:
    if name not in given:
        raise ConfigError(f"{where}: has no tensor {name}, which the network needs")
    value = given[name]
    if value.shape != own.shape:
        raise ConfigError(
            f"{where}: {name} has shape {tuple(value.shape)}, but in the network it has {tuple(own.shape)}{hint}"
        )
    given_type, own_type = (str(tensor.dtype).removeprefix("torch.") for tensor in (value, own))
    if given_type != own_type and not (value.is_floating_point() and own.is_floating_point()):
        raise ConfigError(f"{where}: {name} is {given_type}, but in the network it is {own_type}")
    if not value.to(own.dtype).isfinite().all():
        raise ConfigError(f"{where}: {name} has values that are not finite as {own_type}")


def _from_file(path: Path, where: str) -> dict[str, Tensor]:
    try:
        with open_regular(path, links=True) as file:
            size = file.seek(0, 2)
            if size > memory() // 2:
                raise ConfigError(f"{where}: has {gigabytes(size)}; allowed: half of this machine's memory")
            file.seek(0)
            return load(file.read())
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: is not a safetensors file: {one_line(error)}") from None


def _from_torchvision(name: str, where: str) -> dict[str, Tensor]:
    from torchvision import models  # here, since torchvision takes a second to import

    try:
        weights = models.get_weight(name)
    except (ValueError, AttributeError, KeyError, TypeError):  # TypeError: a name of something else
        raise ConfigError(
            f"{where} is not the name of weights in torchvision, such as ResNet50_Weights.IMAGENET1K_V2"
        ) from None
    try:
        given = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # a failed download or a broken file raises anything
        raise ConfigError(f"{where} cannot be loaded ({reason(error)}); the key weights takes a file") from error
    given = {OLD_DENSENET_NAME.sub(r"\1\2.", key): value for key, value in given.items()}
    return _for_normalised_images(given) if isinstance(weights, models.Inception_V3_Weights) else given


def _for_normalised_images(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inception's weights, which expect pixels from -1 to 1, changed for images with ImageNet's normalisation.

    Pixels from -1 to 1 are a x + b, where x are the pixels normalised with ImageNet's constants. The first
    convolution W has no padding, so a can be multiplied into W, and W b subtracted from the running mean of the
    batch norm that follows.
    """
    conv, norm = f"{INCEPTION_FIRST_LAYER}.conv.weight", f"{INCEPTION_FIRST_LAYER}.bn.running_mean"
    weight = given[conv]
    a = torch.tensor([s / 0.5 for s in IMAGENET_STD]).view(-1, 1, 1)
    b = torch.tensor([(m - 0.5) / 0.5 for m in IMAGENET_MEAN]).view(-1, 1, 1)
    return {**given, conv: weight * a, norm: given[norm] - (weight * b).sum((1, 2, 3))}
