"""Weights that come from elsewhere: from a safetensors file, or torchvision's pretrained ones."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fedsim.base.machine import gigabytes, memory
from fedsim.base.reading import open_regular
from fedsim.errors import ConfigError, one_line, printable, reason

DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")  # in DenseNet's files, for norm1 and so on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
FIRST = "Conv2d_1a_3x3"  # of Inception's layers


def fill(
    network: nn.Module, source: Path | str, at: str, *, new_head: bool = False, head_option: str | None = None
) -> None:
    """Give the network the weights of `source`: a safetensors file, or what torchvision has of this name.

    With `new_head` all but the last linear layer; `head_option` is the key that says so. Raises ConfigError,
    which begins with the key `at`, unless there are the network's tensors and no others, of its shapes and finite;
    floating-point numbers may be of another precision.
    """
    where = f"{at}: {printable(source)}"
    given = _from_file(source, where) if isinstance(source, Path) else _from_torchvision(source, where)
    own, last = network.state_dict(), head(network)
    left_out = {f"{last}.weight", f"{last}.bias"} if new_head else set()
    left_out |= {name for name in {*own, *given} if name.endswith(".num_batches_tracked")}
    hint = f"; {head_option}=true leaves {last} as it is" if head_option and not new_head else ""
    own = {name: value for name, value in own.items() if name not in left_out}
    for name, value in own.items():
        _check(name, value, given, where, hint if name.rpartition(".")[0] == last else "")
    if strange := [name for name in given if name not in own and name not in left_out]:
        raise ConfigError(f"{where}: has {printable(strange[0])}, which the network has not")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(given[name])  # state_dict's tensors are the network's own


def head(network: nn.Module) -> str | None:
    """The name of the last linear layer, the classifier of every network here."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def _check(name: str, own: Tensor, given: Mapping[str, Tensor], where: str, hint: str) -> None:
    if name not in given:
        raise ConfigError(f"{where}: has no {name}, which the network has")
    value = given[name]
    if value.shape != own.shape:
        raise ConfigError(f"{where}: {name} is {tuple(value.shape)} there and {tuple(own.shape)} here{hint}")
    there, here = (str(tensor.dtype).removeprefix("torch.") for tensor in (value, own))
    if there != here and not (value.is_floating_point() and own.is_floating_point()):
        raise ConfigError(f"{where}: {name} is {there} there and {here} here")
    if not value.to(own.dtype).isfinite().all():
        raise ConfigError(f"{where}: {name} has values that are not finite in {here}")


def _from_file(path: Path, where: str) -> dict[str, Tensor]:
    try:
        with open_regular(path.expanduser()) as file:
            size = file.seek(0, 2)
            if size > memory() // 2:
                raise ConfigError(f"{where}: has {gigabytes(size)}, more than half of this machine's memory")
            file.seek(0)
            return load(file.read())
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: is no safetensors file: {one_line(error)}") from None


def _from_torchvision(name: str, where: str) -> dict[str, Tensor]:
    from torchvision import models  # here, since torchvision takes a second to import

    try:
        weights = models.get_weight(name)
    except (ValueError, AttributeError, KeyError, TypeError):  # the last: torchvision has it, and it is no weights
        raise ConfigError(f"{where} is no name of torchvision's, such as ResNet50_Weights.IMAGENET1K_V2") from None
    try:
        given = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # whatever a download or a broken file raises
        raise ConfigError(f"{where} cannot be fetched ({reason(error)}); `weights` takes a file") from error
    given = {DENSE.sub(r"\1\2.", key): value for key, value in given.items()}
    return _normalised(given) if isinstance(weights, models.Inception_V3_Weights) else given


def _normalised(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inception's, which are for pixels from -1 to 1, for images that are normalised as ImageNet's are.

    torchvision's network turns one into the other, as a x + b. Its first convolution W has no padding: there
    a goes into W, and b into the mean of the batch norm behind it.
    """
    weight, mean = (given[f"{FIRST}.{name}"] for name in ("conv.weight", "bn.running_mean"))
    a, b = (torch.tensor(v).view(-1, 1, 1) for v in ([s / 0.5 for s in STD], [(m - 0.5) / 0.5 for m in MEAN]))
    moved = {f"{FIRST}.conv.weight": weight * a, f"{FIRST}.bn.running_mean": mean - (weight * b).sum((1, 2, 3))}
    return {**given, **moved}
