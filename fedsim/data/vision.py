"""Benchmarks that torchvision fetches; whole arrays, no image at a time."""

import importlib.util
import math
import os
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

EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}
PIXELS = 28 * 28
MOST_ROWS = 1_000_000  # of an idx file; EMNIST has 814,255 examples
MOST_BYTES = 2**30  # of any file; the largest, of EMNIST, is half as long
TRAIN_TEST = ({"train": True}, {"train": False})


def mnist(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """MNIST: 60,000 + 10,000 grey digits of 28 x 28, 10 classes (LeCun et al. 1998)."""
    about = {"classes": 10, "mean": (0.1307,), "std": (0.3081,)}
    return _read(_idx("MNIST"), root, "MNIST/raw/*-ubyte", download, _grey, about)


def fashion_mnist(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey clothes of 28 x 28, 10 classes (arXiv 1708.07747)."""
    about = {"classes": 10, "mean": (0.2860,), "std": (0.3530,)}
    return _read(_idx("FashionMNIST"), root, "FashionMNIST/raw/*-ubyte", download, _grey, about)


def emnist(
    *,
    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced",
    root: Path = Path("data"),
    download: bool = False,
) -> Dataset:
    """EMNIST: grey letters and digits of 28 x 28, 10 to 62 classes (arXiv 1702.05373).

    Images are turned upright (the files hold them transposed), letters are numbered from 0 (in the files
    from 1). One mean and deviation, near enough, serves all splits.
    """
    first = 1 if split == "letters" else 0

    def upright(part: Any) -> tuple[Tensor, Tensor]:
        return part.data.transpose(1, 2).unsqueeze(1).contiguous(), part.targets - first

    from torchvision import datasets

    about = {"classes": EMNIST_CLASSES[split], "mean": (0.1751,), "std": (0.3332,)}
    parts = [{"split": split, **part} for part in TRAIN_TEST]
    return _read(
        _raw(datasets.EMNIST), root, f"EMNIST/raw/emnist-{split}-*-ubyte", download, upright, about, parts
    )


def cifar10(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32, 10 classes (Krizhevsky 2009)."""
    about = {"classes": 10, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    from torchvision import datasets

    return _read(datasets.CIFAR10, root, "cifar-10-batches-py/*", download, _colour, about)


def cifar100(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour images of 32 x 32, 100 classes (Krizhevsky 2009)."""
    about = {"classes": 100, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
    from torchvision import datasets

    return _read(datasets.CIFAR100, root, "cifar-100-python/*", download, _colour, about)


def svhn(*, root: Path = Path("data"), download: bool = False) -> Dataset:
    """SVHN: 73,257 + 26,032 colour house numbers of 32 x 32, 10 classes (Netzer et al. 2011)."""
    if importlib.util.find_spec("scipy") is None:
        raise missing_extra("data.name: svhn", "scipy", "svhn")

    from torchvision import datasets

    def tensors(part: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels)

    about = {"classes": 10, "mean": (0.4377, 0.4438, 0.4728), "std": (0.1980, 0.2010, 0.1970)}
    return _read(
        datasets.SVHN, root, "t*_32x32.mat", download, tensors, about, [{"split": "train"}, {"split": "test"}]
    )


def _read(
    source: Callable[..., Any],
    root: Path,
    files: str,  # in root, which torchvision reads
    download: bool,
    tensors: Callable[[Any], tuple[Tensor, Tensor]],
    about: dict[str, Any],
    parts: Sequence[dict[str, Any]] = TRAIN_TEST,
) -> Dataset:
    place = Path(os.path.expanduser(root))  # as torchvision does
    try:
        for file in sorted(file for file in place.glob(files) if not file.is_dir()):
            _check(file)
        (x, y), (x_test, y_test) = (tensors(source(str(place), download=download, **part)) for part in parts)
        return Dataset(x, y, x_test, y_test, **about)
    except Exception as error:  # a broken file raises anything, from AssertionError to UnpicklingError
        why = reason(error).removesuffix(" You can use download=True to download it")
        way_out = "delete what is broken there" if download else "set data.download=true"
        raise ConfigError(
            f"data.root: files of {printable(root / os.path.dirname(files))} are missing or broken ({why}); "
            f"{way_out}, or put them there yourself"
        ) from error


def _check(file: Path) -> None:
    """Raises ValueError or OSError for what torchvision would read without a question.

    CIFAR and SVHN are read only where their checksums are right. Files of MNIST's kind are read whole, whatever
    they hold.
    """
    with open_regular(file) as stream:
        start, length = stream.read(16), os.fstat(stream.fileno()).st_size
    if length > MOST_BYTES:
        raise ValueError(f"{file.name} has {gigabytes(length)}")
    if not file.name.endswith("-ubyte"):
        return
    sizes = _sizes(start)
    if start[:3] != b"\0\0\x08" or len(sizes) not in (1, 3) or length != 4 + 4 * len(sizes) + math.prod(sizes):
        raise ValueError(f"{file.name} does not hold what its first bytes say")
    if sizes[0] > MOST_ROWS or math.prod(sizes[1:]) > PIXELS:
        raise ValueError(f"{file.name} is said to hold {' x '.join(map(str, sizes))} bytes")


def _idx(name: str) -> Callable[..., Any]:
    """What torchvision calls so, without torchvision where its files are there: it takes a second to import."""

    def source(root: str, *, train: bool, download: bool) -> Any:
        stem = f"{root}/{name}/raw/{'train' if train else 't10k'}"
        images, labels = Path(f"{stem}-images-idx3-ubyte"), Path(f"{stem}-labels-idx1-ubyte")
        if images.is_file() and labels.is_file():
            return SimpleNamespace(data=_bytes(images), targets=_bytes(labels).long())
        from torchvision import datasets

        return _raw(getattr(datasets, name))(root, train=train, download=download)

    return source


def _bytes(file: Path) -> Tensor:
    """The uint8 of an idx file that passed `_check`, in its own shape."""
    content = bytearray(file.read_bytes())
    sizes = _sizes(content[:16])
    return torch.frombuffer(content, dtype=torch.uint8)[4 + 4 * len(sizes) :].view(sizes)


def _sizes(start: bytes | bytearray) -> list[int]:
    """By the first bytes of an idx file."""
    dimensions = start[3] if len(start) > 3 else 0
    return [int.from_bytes(start[i : i + 4]) for i in range(4, 4 + 4 * dimensions, 4)]


def _raw(source: type) -> type:
    """`source` without its reading of processed/, which an old torchvision pickled."""
    return type(source.__name__, (source,), {"_check_legacy_exist": lambda self: False})


def _grey(part: Any) -> tuple[Tensor, Tensor]:
    return part.data.unsqueeze(1), part.targets


def _colour(part: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
