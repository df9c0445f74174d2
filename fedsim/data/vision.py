"""The benchmark data sets that torchvision can download, read as whole arrays."""

import importlib.util
import math
import os
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from fedsim.base.machine import gigabytes
from fedsim.base.reading import open_regular
from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError, missing_extra, printable, reason

FASHION = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag"
FASHION_CLASSES = (*FASHION.split(), "Ankle boot")
ALL_CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
MERGED_CHARACTERS = string.digits + string.ascii_uppercase + "abdefghnqrt"  # whose two forms look alike count once
EMNIST_CLASSES = {
    "byclass": ALL_CHARACTERS,
    "bymerge": MERGED_CHARACTERS,
    "balanced": MERGED_CHARACTERS,
    "letters": string.ascii_lowercase,
    "digits": string.digits,
    "mnist": string.digits,
}
MAX_IDX_PIXELS = 28 * 28  # of an image in an idx file
MAX_IDX_ROWS = 1_000_000  # of an idx file; EMNIST has 814,255 examples
MAX_FILE_BYTES = 2**30  # the largest file, one of EMNIST's, is half as long
TRAIN_TEST = ({"train": True}, {"train": False})


def mnist(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """MNIST: 60,000 + 10,000 grey digits of 28 x 28, 10 classes (LeCun et al. 1998)."""
    constants = {"class_names": string.digits, "mean": (0.1307,), "std": (0.3081,)}
    return _read(_idx("MNIST"), root, "MNIST/raw/*-ubyte", download, _grey, constants)


def fashion_mnist(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey clothes of 28 x 28, 10 classes (arXiv 1708.07747)."""
    constants = {"class_names": FASHION_CLASSES, "mean": (0.2860,), "std": (0.3530,)}
    return _read(_idx("FashionMNIST"), root, "FashionMNIST/raw/*-ubyte", download, _grey, constants)


def emnist(
    *,
    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced",
    root: Path = Path("data"),
    download: bool = False,
) -> Dataset:
    """EMNIST: grey letters and digits of 28 x 28, 10 to 62 classes (arXiv 1702.05373).

    The files hold the images transposed; here they are upright. Letters are numbered from 0; the files number them
    from 1. One mean and one standard deviation, which fit nearly as well, are used for all splits.
    """
    first = 1 if split == "letters" else 0

    def upright(part: Any) -> tuple[Tensor, Tensor]:
        return part.data.transpose(1, 2).unsqueeze(1).contiguous(), part.targets - first

    from torchvision import datasets

    constants = {"class_names": EMNIST_CLASSES[split], "mean": (0.1751,), "std": (0.3332,)}
    parts = [{"split": split, **part} for part in TRAIN_TEST]
    return _read(
        _raw(datasets.EMNIST), root, f"EMNIST/raw/emnist-{split}-*-ubyte", download, upright, constants, parts
    )


def cifar10(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32, 10 classes (Krizhevsky 2009)."""
    constants = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    from torchvision import datasets

    return _read(datasets.CIFAR10, root, "cifar-10-batches-py/*", download, _colour, constants)


def cifar100(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour images of 32 x 32, 100 classes (Krizhevsky 2009)."""
    constants = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
    from torchvision import datasets

    return _read(datasets.CIFAR100, root, "cifar-100-python/*", download, _colour, constants)


def svhn(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """SVHN: 73,257 + 26,032 colour house numbers of 32 x 32, 10 classes (Netzer et al. 2011)."""
    if importlib.util.find_spec("scipy") is None:
        raise missing_extra("data.name: svhn", "scipy", "svhn")

    from torchvision import datasets

    def tensors(part: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels)

    constants = {"class_names": string.digits, "mean": (0.4377, 0.4438, 0.4728), "std": (0.1980, 0.2010, 0.1970)}
    return _read(
        datasets.SVHN, root, "t*_32x32.mat", download, tensors, constants, [{"split": "train"}, {"split": "test"}]
    )


def _read(
    source: Callable[..., Any],
    root: Path,
    files: str,  # the pattern of the files in root that torchvision reads
    download: bool,
    tensors: Callable[[Any], tuple[Tensor, Tensor]],
    constants: dict[str, Any],  # other fields of Dataset; without class_names, torchvision reads them from a file
    parts: Sequence[dict[str, Any]] = TRAIN_TEST,
) -> Dataset:
    folder = Path(os.path.expanduser(root))  # as torchvision does
    try:
        for file in sorted(file for file in folder.glob(files) if not file.is_dir()):
            _check_file(file)
        found = []
        for part in parts:
            made = source(str(folder), download=download, **part)
            found.append(tensors(made))
        (x, y), (x_test, y_test) = found
        names = tuple(constants.get("class_names") or made.classes)
        return Dataset(x, y, x_test, y_test, **constants | {"classes": len(names), "class_names": names})
    except Exception as error:  # a broken file raises anything, from AssertionError to UnpicklingError
        why = reason(error).removesuffix(" You can use download=True to download it")
        place = printable(root / os.path.dirname(files))
        if download and isinstance(error, OSError | RuntimeError) and not any(folder.glob(files)):
            raise ConfigError(
                f"data.download: cannot be downloaded ({why}); put the files into {place} yourself, "
                "as torchvision does where there is a network"
            ) from error
        way_out = "delete the broken files" if download else "set data.download=true"
        raise ConfigError(
            f"data.root: files of {place} are missing or broken ({why}); "
            f"{way_out}, or put the right files there yourself"
        ) from error


def _check_file(file: Path) -> None:
    """Raise ValueError or OSError for a file that torchvision would read unchecked.

    torchvision verifies the checksums of CIFAR and SVHN, but it reads idx files, such as MNIST's, whatever their
    length and header.
    """
    with open_regular(file, links=True) as stream:
        start, length = stream.read(16), os.fstat(stream.fileno()).st_size
    if length > MAX_FILE_BYTES:
        raise ValueError(f"{file.name} has {gigabytes(length)}; allowed: up to {gigabytes(MAX_FILE_BYTES)}")
    if not file.name.endswith("-ubyte"):
        return
    sizes = _sizes(start)
    if start[:3] != b"\0\0\x08" or len(sizes) not in (1, 3) or length != 4 + 4 * len(sizes) + math.prod(sizes):
        raise ValueError(f"{file.name} is not an idx file of bytes, or its length does not fit its header")
    if sizes[0] > MAX_IDX_ROWS or math.prod(sizes[1:]) > MAX_IDX_PIXELS:
        raise ValueError(f"{file.name} claims to hold {' x '.join(map(str, sizes))} bytes, which is too much")


def _idx(name: str) -> Callable[..., Any]:
    """torchvision's data set `name`; its import, which takes a second, is avoided where the files exist."""

    def source(root: str, *, train: bool, download: bool) -> Any:
        stem = f"{root}/{name}/raw/{'train' if train else 't10k'}"
        images, labels = Path(f"{stem}-images-idx3-ubyte"), Path(f"{stem}-labels-idx1-ubyte")
        if images.is_file() and labels.is_file():
            return SimpleNamespace(data=_read_idx(images), targets=_read_idx(labels).long())
        from torchvision import datasets

        return _raw(getattr(datasets, name))(root, train=train, download=download)

    return source


def _read_idx(file: Path) -> Tensor:
    """The content of an idx file that passed `_check_file`, uint8 in its own shape."""
    content = bytearray(file.read_bytes())
    sizes = _sizes(content[:16])
    return torch.frombuffer(content, dtype=torch.uint8)[4 + 4 * len(sizes) :].view(sizes)


def _sizes(start: bytes | bytearray) -> list[int]:
    """The shape that the header of an idx file gives; `start` are the first bytes."""
    dimensions = start[3] if len(start) > 3 else 0
    return [int.from_bytes(start[i : i + 4]) for i in range(4, 4 + 4 * dimensions, 4)]


def _raw(source: type) -> type:
    """`source` without the code that unpickles the folder processed/ of old versions of torchvision."""
    return type(source.__name__, (source,), {"_check_legacy_exist": lambda self: False})


def _grey(part: Any) -> tuple[Tensor, Tensor]:
    return part.data.unsqueeze(1), part.targets


def _colour(part: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
