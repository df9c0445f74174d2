"""A folder of image files, with one subfolder for each class."""

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
from fedsim.data.dataset import Dataset, Fraction, Ints, holdout_mask
from fedsim.data.npz import npz
from fedsim.errors import ConfigError, printable, reason
from fedsim.types import Count, Seed, Stream, random

Sample = tuple[str, int]  # file and label
IMAGES_PER_BLOCK = 512  # images handed to the threads at a time
DECODING_THREADS = min(32, (os.cpu_count() or 1) + 4)
PROGRESS_DELAY = 2.0  # seconds after which a progress bar appears
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # no EPS, for which Pillow would start Ghostscript
LARGE_IMAGE_PIXELS = 2**24  # images with more pixels are decoded one at a time, to bound the memory
LARGE_IMAGE_LOCK = threading.Lock()


def image_folder(
    *,
    root: Path,
    size: Count = 224,
    test_share: Fraction | None = None,
    classes: list[str] | None = None,
    seed: Seed = 0,
    cache: Path | None = None,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Dataset:
    """Image files in class folders, under root/train and root/test, or all under root with `test_share`.

    Images become RGB, (3, size, size): the shorter side is resized to `size`, then the centre is cut out. With
    `size` 256 and `data.crop` 224, test images are those of NVIDIA's recipe; augmentations see the 256 pixels.
    Without train/ and test/, a random `test_share` of each class is the test set, which depends on `seed` alone.
    `classes` are the names of the class folders in the order of the labels, for a machine that lacks some of them;
    then one of train/ and test/ is enough. With `cache`, images are decoded once into a folder there, which is
    memory-mapped from then on; it is decoded again when a file, `size` or the split changes. The default `mean`
    and `std` are those of ImageNet.
    """
    train, test, num_classes = _find_samples(root, test_share, classes, seed)
    if not test and (test_share or not classes):
        raise ConfigError(f"data.root: {printable(root)} has no test images; add some, or raise data.test_share")
    _check_memory(len(train) + len(test), size, cache)
    if cache is None:
        x, x_test = (
            torch.from_numpy(_decode(part, np.empty((len(part), 3, size, size), np.uint8)))
            for part in (train, test)
        )
        y, y_test = (torch.from_numpy(_labels(part)) for part in (train, test))
        return Dataset(x, y, x_test, y_test, num_classes, mean, std)
    folder = cache / _fingerprint(root, train, test, size)
    try:
        if not folder.exists():
            _fill_cache(folder, train, test, size)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the name contains a zero byte
        raise ConfigError(
            f"data.cache: {printable(cache)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return npz(path=folder, channels="first", classes=num_classes, mean=mean, std=std)


def _find_samples(
    root: Path, test_share: float | None, classes: list[str] | None, seed: int
) -> tuple[list[Sample], list[Sample], int]:
    """The training samples, the test samples, and the number of classes."""
    parts = _find_parts(root, test_share, classes)
    try:
        index = _class_index(root, parts, classes)
        if not parts:
            samples = _list_images(root, index, complete=not classes)
            in_test = holdout_mask(_labels(samples), test_share or 0, random(seed, Stream.DATASET))
            train = [sample for sample, held_out in zip(samples, in_test, strict=True) if not held_out]
            test = [sample for sample, held_out in zip(samples, in_test, strict=True) if held_out]
            return train, test, len(index)
        train = _list_images(root / "train", index, complete=not classes)
        test = _list_images(root / "test", index, complete=False)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # no folder, a zero byte in a name, too deep a tree
        raise ConfigError(f"data.root: {printable(root)}: {error}") from error
    if not (train or test):
        raise ConfigError(f"data.root: {printable(root)} has no images")
    return train, test, len(index)


def _find_parts(root: Path, test_share: float | None, classes: list[str] | None) -> list[str]:
    """Which of the folders train/ and test/ exist; raises ConfigError where the options do not fit them."""
    if not os.path.isdir(root):
        raise ConfigError(f"data.root: {printable(root)}: no such folder")
    parts = [part for part in ("train", "test") if os.path.isdir(root / part)]
    if len(parts) == 1 and not classes:
        lacking = "test" if parts == ["train"] else "train"
        raise ConfigError(
            f"data.root: {printable(root)} has {parts[0]}/ but not {lacking}/; it should have both or neither, or "
            "data.classes should name the class folders in the order of the labels"
        )
    if bool(parts) == (test_share is not None):
        found = f"has {' and '.join(f'{part}/' for part in parts)}" if parts else "has no train/ and test/"
        raise ConfigError(
            f"data.test_share: {printable(root)} {found}, so it should be {'left out' if parts else 'set'}"
        )
    return parts


def _class_index(root: Path, parts: list[str], classes: list[str] | None) -> dict[str, int]:
    """The label of each class folder; raises ConfigError where folders and `classes` do not fit."""
    if not classes:
        index: dict[str, int] = find_classes(root / "train" if parts else root)[1]
        if parts and (unknown := set(find_classes(root / "test")[0]) - set(index)):
            names = printable(", ".join(sorted(unknown)))
            raise ConfigError(f"data.root: {printable(root)}/test has class folders that train/ lacks: {names}")
        return index
    if repeated := [name for i, name in enumerate(classes) if name in classes[:i]]:
        raise ConfigError(f"data.classes: {printable(repeated[0])} appears twice")
    for folder in [root / part for part in parts] or [root]:
        if unknown := set(find_classes(folder)[0]) - set(classes):
            names = printable(", ".join(sorted(unknown)))
            raise ConfigError(f"data.classes: should also name these folders of {printable(folder)}: {names}")
    return {name: label for label, name in enumerate(classes)}


def _list_images(root: Path, index: dict[str, int], *, complete: bool) -> list[Sample]:
    """The images in and below each class folder, sorted by path; if `complete`, each class must have some."""
    samples = []
    for name, label in index.items():
        folders = sorted((folder, sorted(files)) for folder, files in _walk(root / name))
        paths = (os.path.join(folder, file) for folder, files in folders for file in files)
        samples += [(path, label) for path in paths if path.lower().endswith(IMG_EXTENSIONS)]
    found = {label for _, label in samples}
    missing = [name for name, label in index.items() if label not in found]
    if complete and missing:
        raise ConfigError(
            f"data.root: {printable(root)} has no images of the classes {printable(', '.join(missing))}; "
            f"allowed: files that end in {', '.join(IMG_EXTENSIONS)}"
        )
    return samples


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """`top`, where it exists, and all folders below it, with their files.

    Follows symbolic links; raises ConfigError where they lead to a folder twice, as the tree may then be endless.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = set[tuple[int, int]]()
    for folder, _, files in os.walk(top, onerror=refuse, followlinks=True) if os.path.isdir(top) else ():
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            raise ConfigError(f"data.root: symbolic links lead to {printable(folder)} twice; remove one of them")
        seen.add((status.st_dev, status.st_ino))
        yield folder, files


def _labels(samples: list[Sample]) -> Ints:
    return np.array([label for _, label in samples], dtype=np.int64)


def _fingerprint(root: Path, train: list[Sample], test: list[Sample], size: int) -> str:
    """The name of the cache folder: a hash of the files' names, lengths and times, the split, and `size`."""
    digest = hashlib.sha256(f"{size}, whole pixels".encode())
    for part in (train, test):
        for path, _ in part:
            try:
                status = os.stat(path)
            except OSError as error:  # such as a broken link
                raise ConfigError(f"data.root: {printable(path)}: {error.strerror}") from error
            name = os.fsencode(os.path.relpath(path, root))
            digest.update(b"%s\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _fill_cache(folder: Path, train: list[Sample], test: list[Sample], size: int) -> None:
    """Makes the cache `folder`, all or nothing, even if other processes make it at the same time."""
    draft = folder.with_suffix(f".{os.getpid()}")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        needed, free = 3 * size**2 * (len(train) + len(test)), shutil.disk_usage(draft).free
        if needed > free:  # writing to a mapped file on a full disk would kill the process
            raise ConfigError(
                f"data.cache: the images need {gigabytes(needed)}, but {gigabytes(free)} are free on that disk"
            )
        for name, part in (("train", train), ("test", test)):
            if not part:  # an empty file cannot be mapped
                continue
            shape = (len(part), 3, size, size)
            file = draft / f"x_{name}.npy"
            _decode(part, np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)).flush()
            np.save(draft / f"y_{name}.npy", _labels(part))
        if not folder.exists():
            draft.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_memory(count: int, size: int, cache: Path | None) -> None:
    """Raise ConfigError where the images do not fit; Pillow takes 4 bytes a pixel while it decodes one."""
    needed = size**2 * (4 * min(count, DECODING_THREADS) + (3 * count if cache is None else 0))
    if needed > memory():
        way_out = "set a smaller size" + (", or data.cache to a folder" if cache is None else "")
        raise ConfigError(
            f"data.size: {count} images of {size} x {size} pixels need {gigabytes(needed)} of memory, but this "
            f"machine has {gigabytes(memory())}; {way_out}"
        )


def _decode(samples: list[Sample], out: Any) -> Any:
    """Fills `out` (n, 3, size, size) with the images of `samples` (n), decoded by several threads."""

    def fill(i: int) -> None:
        out[i] = _image(samples[i][0], out.shape[-1])

    threads = ThreadPoolExecutor(DECODING_THREADS)
    with warnings.catch_warnings(), _progress(len(samples)) as advance, threads as pool:
        warnings.simplefilter("ignore")  # Pillow warns of unusual files that it can read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(samples), IMAGES_PER_BLOCK):
            block = range(start, min(start + IMAGES_PER_BLOCK, len(samples)))
            for _ in pool.map(fill, block):
                advance()
    return out


def _image(path: str, size: int) -> npt.NDArray[np.uint8]:
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image, _large_alone(image):
            square = _square(image.convert("RGB"), size)
    except Exception as error:  # decoders raise anything; a decompression bomb raises a Warning
        raise ConfigError(f"data.root: {printable(path)} is not a readable image ({reason(error)})") from error
    return np.asarray(square).transpose(2, 0, 1)


def _square(image: Image.Image, size: int) -> Image.Image:
    """torchvision's Resize and CenterCrop in one step, without resizing the part that is cut off."""
    whole = [size * side // min(image.size) for side in image.size]
    start = [round((long - size) / 2) for long in whole]
    left, top = (a * side / long for a, side, long in zip(start, image.size, whole, strict=True))
    right, bottom = ((a + size) * side / long for a, side, long in zip(start, image.size, whole, strict=True))
    return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))


def _large_alone(image: Image.Image) -> AbstractContextManager[object]:
    """A lock under which only one large image is decoded at a time; for other images nothing."""
    return LARGE_IMAGE_LOCK if image.width * image.height > LARGE_IMAGE_PIXELS else nullcontext()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal after PROGRESS_DELAY; yields the function that counts an image."""
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True)
    task = progress.add_task("decoding images", total=total)
    due = time.monotonic() + PROGRESS_DELAY

    def advance() -> None:
        progress.advance(task)
        if console.is_terminal and not progress.live.is_started and time.monotonic() > due:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
