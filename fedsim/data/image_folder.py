"""A folder of image files, with one subfolder for each class."""

import hashlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import numpy as np
import torch
from annotated_types import Ge
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from fedsim.base.machine import check_memory, gigabytes
from fedsim.data.dataset import Dataset, Fraction, Ints, owners_by_name
from fedsim.data.image_file import Range, read_image
from fedsim.data.image_tree import Sample, find_samples
from fedsim.data.npz import npz
from fedsim.errors import ConfigError, printable
from fedsim.types import Count, Seed

IMAGES_PER_BLOCK = 512  # images handed to the threads at a time
DECODING_THREADS = min(32, (os.cpu_count() or 1) + 4)
PREPARATION = "RGB on white, upright, the shorter side to the size of the square at the centre, bilinear"
PROGRESS_DELAY = 2.0  # seconds after which a progress bar appears
NEARLY_BLACK = 16  # of 255; images that are all darker are perhaps of 12 bits in files of 16
log = logging.getLogger(__name__)


def image_folder(
    *,
    root: Path,
    size: Count = 224,
    test_share: Fraction | None = None,
    classes: list[str] | None = None,
    owner: Annotated[int, Ge(0)] | str | None = None,
    owner_list: Path | None = None,
    grey_range: Range | None = None,
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
    then one of train/ and test/ is enough.

    `owner` gives each training image an owner, for `partition: natural`: a number is the level of the folder below
    root that names the owner, 0 in root/hospital/train/class and 1 in root/train/hospital/class; a string is a
    regular expression, whose first group finds the owner in the path below root. `owner_list` is a CSV file with
    the columns `file`, the path below root, and `owner`. With owners, `test_share` is of each class of each owner.

    Grey images of more than 8 bits are scaled to 8: values from 0 to 65535, or those between the two of
    `grey_range`, become black to white; floating-point and 32-bit images need it. With `cache`, images are decoded
    once into a folder there, which is memory-mapped from then on; it is made anew when a file, a label, `size`,
    `grey_range` or the split changes. The default `mean` and `std` are those of ImageNet.
    """
    if grey_range and grey_range[0] == grey_range[1]:
        raise ConfigError(f"data.grey_range: {list(grey_range)} should be two different numbers")
    train, test, found = find_samples(root, test_share, classes, owner, owner_list, seed)
    if not test and (test_share or not classes):
        raise ConfigError(f"data.root: {printable(root)} has no test images; add some, or raise data.test_share")
    _check_memory(len(train) + len(test), size, cache)
    owned = bool(train) and train[0].owner is not None
    owners, names = owners_by_name([printable(sample.owner) for sample in train]) if owned else (None, ())
    about: dict[str, Any] = {"owner": owners, "owner_names": names}
    about |= {"class_names": tuple(found), "preparation": PREPARATION}
    if cache is None:
        x, x_test = (
            torch.from_numpy(_decode(part, np.empty((len(part), 3, size, size), np.uint8), grey_range))
            for part in (train, test)
        )
        y, y_test = (torch.from_numpy(_labels(part)) for part in (train, test))
        return Dataset(x, y, x_test, y_test, len(found), mean, std, **about)
    folder = cache / _fingerprint(root, train, test, size, grey_range)
    try:
        if not folder.exists():
            _fill_cache(folder, train, test, size, grey_range)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the name contains a zero byte
        raise ConfigError(
            f"data.cache: {printable(cache)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    data = npz(path=folder, channels="first", classes=len(found), mean=mean, std=std)
    return replace(data, **about)


def _labels(samples: list[Sample]) -> Ints:
    return np.array([sample.label for sample in samples], dtype=np.int64)


def _fingerprint(root: Path, train: list[Sample], test: list[Sample], size: int, grey_range: Range | None) -> str:
    """The cache folder's name: a hash of the files' names, lengths, times and labels, the split, and options."""
    digest = hashlib.sha256(f"{size}, upright, on white, grey {grey_range}".encode())
    for part in (train, test):
        for path, label, _ in part:
            try:
                status = os.stat(path)
            except OSError as error:  # such as a broken link
                raise ConfigError(f"data.root: {printable(path)}: {error.strerror}") from error
            name = os.fsencode(os.path.relpath(path, root))
            digest.update(b"%s\0%d\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns, label))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _fill_cache(
    folder: Path, train: list[Sample], test: list[Sample], size: int, grey_range: Range | None
) -> None:
    """Makes the cache `folder`, all or nothing, even if other processes make it at the same time."""
    draft = folder.with_suffix(f".{uuid4().hex[:8]}")
    draft.mkdir(parents=True)
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
            x = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
            _decode(part, x, grey_range).flush()
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
    way_out = "set a smaller size" + (", or data.cache to a folder" if cache is None else "")
    check_memory(f"data.size: {count} images of {size} x {size} pixels need", needed, way_out)


def _decode(samples: list[Sample], out: Any, grey_range: Range | None) -> Any:
    """Fills `out` (n, 3, size, size) with the images of `samples` (n), decoded by several threads."""

    def fill(i: int) -> int:
        out[i] = image = read_image(samples[i].path, out.shape[-1], grey_range)
        return int(image.max())

    brightest, threads = 0, ThreadPoolExecutor(DECODING_THREADS)
    with warnings.catch_warnings(), _progress(len(samples)) as advance, threads as pool:
        warnings.simplefilter("ignore")  # Pillow warns of unusual files that it can read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(samples), IMAGES_PER_BLOCK):
            block = range(start, min(start + IMAGES_PER_BLOCK, len(samples)))
            for value in pool.map(fill, block):
                brightest = max(brightest, value)
                advance()
    if samples and brightest < NEARLY_BLACK:
        what = f"data.root: no pixel of {len(samples)} images is brighter than {brightest} of 255"
        log.warning("%s; set data.grey_range, such as [0, 4095], if they have less than 16 bits", what)
    return out


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
