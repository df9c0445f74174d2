"""A folder of image files, one subfolder a class."""

import hashlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from fedsim.base.machine import gigabytes, memory
from fedsim.base.reading import open_regular
from fedsim.data.dataset import Dataset, Ints, Part, hold_back
from fedsim.data.npz import npz
from fedsim.errors import ConfigError, printable, reason
from fedsim.types import Count, Seed, Stream, random

Sample = tuple[str, int]  # file and class
BLOCK = 512  # images handed to the threads at a time
THREADS = min(32, (os.cpu_count() or 1) + 4)
PATIENCE = 2.0  # seconds before a progress bar is worth showing
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # for EPS, Pillow would start Ghostscript
LARGE = 2**24  # pixels; of images with more, one is decoded at a time
ALONE = threading.Lock()


def image_folder(
    *,
    root: Path,
    size: Count = 224,
    test_share: Part | None = None,
    classes: list[str] | None = None,
    seed: Seed = 0,
    cache: Path | None = None,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Dataset:
    """Image files in class folders, under root/train and root/test, or all under root with `test_share`.

    Images become colour, (3, size, size): the shorter side is resized to `size`, then the centre is cut out. With
    `size` 256 and `data.crop` 224, test images are those of NVIDIA's recipe; training images begin as the square.
    Without train/ and test/, a random `test_share` of each class is the test set, the same for one seed.
    `classes` are the folders' names in the order of their numbers, for a machine that lacks some: then one of
    train/ and test/ is enough. With `cache` images are decoded once into a folder there, which is memory-mapped
    from then on; it is made anew when a file, `size` or the split changes. The default `mean` and `std` are
    ImageNet's.
    """
    train, test, number = _samples(root, test_share, classes, seed)
    if not test and (test_share or not classes):
        raise ConfigError(f"data.root: {printable(root)} has no images left for testing")
    _fits_in_memory(len(train) + len(test), size, cache)
    if cache is None:
        x, x_test = (
            torch.from_numpy(_decode(part, np.empty((len(part), 3, size, size), np.uint8)))
            for part in (train, test)
        )
        y, y_test = (torch.from_numpy(_labels(part)) for part in (train, test))
        return Dataset(x, y, x_test, y_test, number, mean, std)
    folder = cache / _fingerprint(root, train, test, size)
    try:
        if not folder.exists():
            _fill(folder, train, test, size)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # the latter: a name with a zero in it
        raise ConfigError(
            f"data.cache: {printable(cache)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return npz(path=folder, channels="first", classes=number, mean=mean, std=std)


def _samples(
    root: Path, test_share: float | None, classes: list[str] | None, seed: int
) -> tuple[list[Sample], list[Sample], int]:
    if not os.path.isdir(root):
        raise ConfigError(f"data.root: {printable(root)}: no such folder")
    split = [part for part in ("train", "test") if os.path.isdir(root / part)]
    if len(split) == 1 and not classes:
        raise ConfigError(
            f"data.root: {printable(root)} has {split[0]}/ only; it should have train/ and test/, or neither; "
            "or with data.classes, the folders' names in the order of their numbers, one of them"
        )
    if bool(split) == (test_share is not None):
        folders = "has train/ and test/" if split else "has no train/ and test/"
        raise ConfigError(
            f"data.test_share: {printable(root)} {folders}, so it should be {'left out' if split else 'set'}"
        )
    try:
        if classes:
            names, index = classes, _numbered(classes, [root / part for part in split] or [root])
        else:
            names, index = find_classes(root / "train" if split else root)
        listed = _listed if classes else _all_classes
        if split:
            if not classes and (unknown := set(find_classes(root / "test")[0]) - set(names)):
                names_there = printable(", ".join(sorted(unknown)))
                raise ConfigError(
                    f"data.root: {printable(root)}/test has classes that train has not: {names_there}"
                )
            train, test = listed(root / "train", index), _listed(root / "test", index)
            if not (train or test):
                raise ConfigError(f"data.root: {printable(root)} has no images")
            return train, test, len(names)
        samples = listed(root, index)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # no folder, a name with a zero in it, too deep a tree
        raise ConfigError(f"data.root: {printable(root)}: {error}") from error
    held_back = hold_back(_labels(samples), test_share or 0, random(seed, Stream.DATASET))
    train = [sample for sample, held in zip(samples, held_back, strict=True) if not held]
    return train, [sample for sample, held in zip(samples, held_back, strict=True) if held], len(names)


def _numbered(classes: list[str], folders: list[Path]) -> dict[str, int]:
    """The number of each; raises ConfigError where one stands twice, or a folder has others."""
    if twice := [name for i, name in enumerate(classes) if name in classes[:i]]:
        raise ConfigError(f"data.classes: {printable(twice[0])} stands twice")
    for folder in folders:
        if unknown := set(find_classes(folder)[0]) - set(classes):
            names_there = printable(", ".join(sorted(unknown)))
            raise ConfigError(f"data.classes: lacks folders of {printable(folder)}: {names_there}")
    return {name: number for number, name in enumerate(classes)}


def _all_classes(root: Path, index: dict[str, int]) -> list[Sample]:
    samples = _listed(root, index)
    found = {label for _, label in samples}
    if missing := [name for name, label in index.items() if label not in found]:
        raise ConfigError(
            f"data.root: {printable(root)}: no valid file for the classes {printable(', '.join(missing))}; "
            f"allowed: files that end in {', '.join(IMG_EXTENSIONS)}"
        )
    return samples


def _listed(root: Path, index: dict[str, int]) -> list[Sample]:
    """The images in each class folder and below it, in order of their paths."""
    samples = []
    for name, label in index.items():
        folders = sorted((folder, sorted(files)) for folder, files in _folders(root / name))
        paths = (os.path.join(folder, file) for folder, files in folders for file in files)
        samples += [(path, label) for path in paths if path.lower().endswith(IMG_EXTENSIONS)]
    return samples


def _folders(top: Path) -> Iterator[tuple[str, list[str]]]:
    """What `top`, if it is there, and all below it hold; links that meet would be an endless tree."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set[tuple[int, int]]()
    for folder, _, files in os.walk(top, onerror=refuse, followlinks=True) if os.path.isdir(top) else ():
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            twice = printable(folder)
            raise ConfigError(f"data.root: links lead to {twice} a second time; remove one of them")
        seen.add((about.st_dev, about.st_ino))
        yield folder, files


def _labels(samples: list[Sample]) -> Ints:
    return np.array([label for _, label in samples], dtype=np.int64)


def _fingerprint(root: Path, train: list[Sample], test: list[Sample], size: int) -> str:
    """Changes with the list of files, their lengths and times, the split, and the size and cut of images."""
    digest = hashlib.sha256(f"{size}, whole pixels".encode())
    for part in (train, test):
        for path, _ in part:
            try:
                about = os.stat(path)
            except OSError as error:  # a link to nowhere
                raise ConfigError(f"data.root: {printable(path)}: {error.strerror}") from error
            name = os.fsencode(os.path.relpath(path, root))
            digest.update(b"%s\0%d\0%d\0" % (name, about.st_size, about.st_mtime_ns))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _fill(folder: Path, train: list[Sample], test: list[Sample], size: int) -> None:
    """Makes the cache `folder`, all of it or nothing, whoever else is making it at the same time."""
    draft = folder.with_suffix(f".{os.getpid()}")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        takes, free = 3 * size**2 * (len(train) + len(test)), shutil.disk_usage(draft).free
        if takes > free:  # to write to a mapped file on a full disk would end the process
            raise ConfigError(f"data.cache: {gigabytes(takes)} of images, {gigabytes(free)} are free there")
        for name, part in (("train", train), ("test", test)):
            if not part:  # which no file can be mapped for
                continue
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


def _fits_in_memory(count: int, size: int, cache: Path | None) -> None:
    """Pillow keeps 4 bytes a pixel of each image that it has in hand."""
    takes = size**2 * (4 * min(count, THREADS) + (3 * count if cache is None else 0))
    if takes > memory():
        way_out = "allowed: less" + (", or a folder as data.cache" if cache is None else "")
        raise ConfigError(
            f"data.size: {count} images of {size} x {size} take {gigabytes(takes)} of memory, "
            f"this machine has {gigabytes(memory())}; {way_out}"
        )


def _decode(samples: list[Sample], out: Any) -> Any:
    """Fills `out` (n, 3, size, size) with the images of `samples` (n), several at once."""

    def fill(i: int) -> None:
        out[i] = _image(samples[i][0], out.shape[-1])

    with warnings.catch_warnings(), _progress(len(samples)) as advance, ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # of Pillow, about what it makes of odd but readable files
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(samples), BLOCK):
            block = range(start, min(start + BLOCK, len(samples)))
            for _ in pool.map(fill, block):
                advance()
    return out


def _image(path: str, size: int) -> npt.NDArray[np.uint8]:
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image, _turn(image):
            square = _square(image.convert("RGB"), size)
    except Exception as error:  # decoders raise anything, and a decompression bomb is a warning
        raise ConfigError(f"data.root: {printable(path)} is no readable image ({reason(error)})") from error
    return np.asarray(square).transpose(2, 0, 1)


def _square(image: Image.Image, size: int) -> Image.Image:
    """What torchvision's Resize and CenterCrop leave, in one step: of a long image the rest is never made."""
    whole = [size * side // min(image.size) for side in image.size]
    start = [round((long - size) / 2) for long in whole]
    left, top = (a * side / long for a, side, long in zip(start, image.size, whole, strict=True))
    right, bottom = ((a + size) * side / long for a, side, long in zip(start, image.size, whole, strict=True))
    return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))


def _turn(image: Image.Image) -> AbstractContextManager[object]:
    return ALONE if image.width * image.height > LARGE else nullcontext()


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
