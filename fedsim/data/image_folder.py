"""A folder of image files, one subfolder a class."""

import hashlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from fedsim.data.dataset import Dataset, Ints, Part, hold_back
from fedsim.data.npz import npz
from fedsim.errors import ConfigError
from fedsim.types import Count, Seed, Stream, random

Sample = tuple[str, int]  # file and class
BLOCK = 512  # images handed to the threads at a time
PATIENCE = 2.0  # seconds before a progress bar is worth showing


def image_folder(
    *,
    root: Path,
    size: Count = 224,
    test_share: Part | None = None,
    seed: Seed = 0,
    cache: Path | None = None,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Dataset:
    """Image files in class folders, under root/train and root/test, or all under root with `test_share`.

    Images become colour, (3, size, size): the shorter side is resized to `size`, then the centre is cut out.
    Without train/ and test/, a random `test_share` of each class is the test set, the same for one seed. With
    `cache` images are decoded once into a folder there, which is memory-mapped from then on; it is made anew
    when a file, `size` or the split changes. The default `mean` and `std` are ImageNet's.
    """
    train, test, classes = _samples(root, test_share, seed)
    if not test:
        raise ConfigError(f"data.root: {root} has no images left for testing")
    if cache is None:
        x, x_test = (
            torch.from_numpy(_decode(part, np.empty((len(part), 3, size, size), np.uint8)))
            for part in (train, test)
        )
        y, y_test = (torch.from_numpy(_labels(part)) for part in (train, test))
        return Dataset(x, y, x_test, y_test, classes, mean, std)
    folder = cache / _fingerprint(root, train, test, size)
    if not folder.exists():
        try:
            _fill(folder, train, test, size)
        except OSError as error:
            raise ConfigError(f"data.cache: {cache}: {error.strerror}") from error
    return npz(path=folder, channels="first", classes=classes, mean=mean, std=std)


def _samples(root: Path, test_share: float | None, seed: int) -> tuple[list[Sample], list[Sample], int]:
    split = [part for part in ("train", "test") if (root / part).is_dir()]
    if len(split) == 1:
        raise ConfigError(f"data.root: {root} has {split[0]}/ only; it should have train/ and test/, or neither")
    if bool(split) == (test_share is not None):
        folders = "has train/ and test/" if split else "has no train/ and test/"
        raise ConfigError(f"data.test_share: {root} {folders}, so it should be {'left out' if split else 'set'}")
    try:
        names, index = find_classes(root / "train" if split else root)
        if split:
            if unknown := set(find_classes(root / "test")[0]) - set(names):
                raise ConfigError(
                    f"data.root: {root}/test has classes that train has not: {', '.join(sorted(unknown))}"
                )
            train = make_dataset(root / "train", index, IMG_EXTENSIONS)
            return train, make_dataset(root / "test", index, IMG_EXTENSIONS, allow_empty=True), len(names)
        samples = make_dataset(root, index, IMG_EXTENSIONS)
    except OSError as error:  # no folder, no class folders, or a class folder without images
        raise ConfigError(f"data.root: {root}: {error}") from error
    test = hold_back(_labels(samples), test_share or 0, random(seed, Stream.DATASET))
    train = [sample for sample, held in zip(samples, test, strict=True) if not held]
    return train, [sample for sample, held in zip(samples, test, strict=True) if held], len(names)


def _labels(samples: list[Sample]) -> Ints:
    return np.array([label for _, label in samples], dtype=np.int64)


def _fingerprint(root: Path, train: list[Sample], test: list[Sample], size: int) -> str:
    """Changes with the list of files, their lengths and times, the split, and the size of images."""
    digest = hashlib.sha256(str(size).encode())
    for part in (train, test):
        for path, _ in part:
            about = os.stat(path)
            digest.update(f"{os.path.relpath(path, root)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _fill(folder: Path, train: list[Sample], test: list[Sample], size: int) -> None:
    """Makes the cache `folder`, all of it or nothing, whoever else is making it at the same time."""
    draft = folder.with_suffix(f".{os.getpid()}")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        for name, part in (("train", train), ("test", test)):
            shape = (len(part), 3, size, size)
            file = draft / f"x_{name}.npy"
            _decode(part, np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)).flush()
            np.save(draft / f"y_{name}.npy", _labels(part))
        if not folder.exists():
            draft.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _decode(samples: list[Sample], out: Any) -> Any:
    """Fills `out` (n, 3, size, size) with the images of `samples` (n), several at once."""

    def fill(i: int) -> None:
        out[i] = _image(samples[i][0], out.shape[-1])

    with warnings.catch_warnings(), _progress(len(samples)) as advance, ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(samples), BLOCK):
            block = range(start, min(start + BLOCK, len(samples)))
            for _ in pool.map(fill, block):
                advance()
    return out


def _image(path: str, size: int) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise anything, and a decompression bomb is a warning
        raise ConfigError(f"data.root: {path} is no readable image ({type(error).__name__}: {error})") from error
    return np.asarray(square).transpose(2, 0, 1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, if there is one and it takes long."""
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True)
    task = progress.add_task("decoding images", total=total)
    due = time.monotonic() + PATIENCE

    def advance() -> None:
        progress.advance(task)
        if console.is_terminal and not progress.live.is_started and time.monotonic() > due:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
