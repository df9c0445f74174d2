"""Data augmentation: random changes of a training batch, computed on the device that holds the batch.

An augmentation takes images (B, C, H, W) with values from 0 to 1, before normalisation, and returns new ones; it
changes nothing in place. The random numbers are drawn on the CPU, separately for each example, so that every
device gets the same ones. Images stored as float32 keep their own units, in which 0 is black.

    random_crop, flip     He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2
    rotation              torchvision's RandomRotation
    color_jitter          Howard 2013, https://arxiv.org/abs/1312.5402, as torchvision's ColorJitter
    cutout                DeVries & Taylor 2017, https://arxiv.org/abs/1708.04552
    random_resized_crop   Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6, as torchvision's
    mixup                 Zhang et al. 2018, https://arxiv.org/abs/1710.09412
    cutmix                Yun et al. 2019, https://arxiv.org/abs/1905.04899

Differs: cutout makes pixels black; its authors cut after normalisation, which gives pixels the mean colour.
"""

from collections.abc import Sequence
from math import log
from typing import Annotated, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Le
from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional as F

from fedsim.base.catalogue import Spec
from fedsim.data.dataset import Ints
from fedsim.errors import ConfigError, WrongReturnError, name_of
from fedsim.types import Batch, Count, NonNegative, Positive, Share

Size = tuple[int, int]  # height and width in pixels
Range = tuple[float, float]
Chance = Annotated[float, Ge(0), Le(1)]
MIXERS = {"mixup", "cutmix"}  # those that mix examples with each other
ANY_SHAPE = {"mixup"}  # those that take more than images
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue in grey; ITU-R BT.601
CROP_TRIES = 10  # attempts to draw a crop that lies inside the image, as in torchvision


class Augmentation(Protocol):
    """Returns a changed batch; `size` is the image size that the network takes, `rng` gives all random numbers."""

    def __call__(self, batch: Batch, rng: np.random.Generator, size: Size, /) -> Batch: ...


def checked_batch(change: Augmentation, batch: object, size: int, dtype: torch.dtype) -> Batch:
    """The batch that `change` gave; raises WrongReturnError unless it has `size` such examples with labels."""
    whose = f"{name_of(change)}: gave"
    if not isinstance(batch, Batch):
        raise WrongReturnError(f"{whose} {type(batch).__name__}; it should give batch._replace(x=...)")
    kinds = {"x": dtype, "y": torch.int64, "mixed_labels": torch.int64, "mix_weight": dtype}
    for name, kind in kinds.items():
        value = getattr(batch, name)
        if value is None and name not in ("x", "y"):
            continue
        shape = (size, *value.shape[1:]) if name == "x" and isinstance(value, Tensor) else (size,)
        if not (isinstance(value, Tensor) and value.dtype == kind and value.shape == shape):
            made = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise WrongReturnError(f"{whose} batch.{name} as {made}; it should be {kind} of {size} examples")
    return batch


def check_augmentations(specs: Sequence[Spec], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ConfigError where the resolved `specs` do not fit each other, or examples of this shape and type."""
    for i, spec in enumerate(specs):
        name, at = spec["name"], f"local.augment[{i}]: {spec['name']}"
        if name in MIXERS and i + 1 < len(specs):
            raise ConfigError(f"{at} mixes examples and labels, so it should be last; only one entry may mix")
        if len(shape) != 3 and name not in ANY_SHAPE:
            raise ConfigError(f"{at} takes images (channels, height, width), but the examples have shape {shape}")
        if name == "color_jitter":
            _check_color_jitter(spec, shape[0], dtype, at)


def _check_color_jitter(spec: Spec, channels: int, dtype: torch.dtype, at: str) -> None:
    if dtype != torch.uint8:
        raise ConfigError(f"{at} takes uint8 images; float32 images do not say which values are black and white")
    if channels not in {1, 3}:
        raise ConfigError(f"{at} takes images of 1 or 3 channels; the images have {channels}")
    if channels == 1 and (spec["saturation"] or spec["hue"]):
        raise ConfigError(f"{at}: grey images have neither saturation nor hue; set both to 0")


def random_crop(
    batch: Batch, rng: np.random.Generator, size: Size, /, *, padding: Annotated[int, Ge(0)] = 4
) -> Batch:
    """A window of the network's size at a random place of the image, after padding with `padding` black pixels."""
    height, width = size
    padded = F.pad(batch.x, (padding,) * 4) if padding else batch.x
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, tops, lefts, height, width), a view
    places = rng.integers(0, windows.shape[2:4], (len(padded), 2))
    top, left = _to_device(places, padded).unbind(1)
    return batch._replace(x=windows[torch.arange(len(top), device=top.device), :, top, left])


def flip(batch: Batch, rng: np.random.Generator, size: Size, /, *, p: Chance = 0.5) -> Batch:
    """Flips each image from left to right with probability `p`."""
    flipped = _to_device(rng.random(len(batch.x)) < p, batch.x)
    return batch._replace(x=torch.where(flipped.view(-1, 1, 1, 1), batch.x.flip(-1), batch.x))


def rotation(
    batch: Batch,
    rng: np.random.Generator,
    size: Size,
    /,
    *,
    degrees: NonNegative = 10.0,
    interpolation: Literal["nearest", "bilinear"] = "nearest",
) -> Batch:
    """Rotates each image about its centre by up to `degrees` in either direction; uncovered pixels are black."""
    x = batch.x
    height, width = x.shape[2:]
    angle = np.deg2rad(rng.uniform(-degrees, degrees, len(x)))
    cos, sin = _per_image(x, np.cos(angle), np.sin(angle))
    right = _pixel_centres(width, x) - width / 2
    down = (_pixel_centres(height, x) - height / 2).unsqueeze(-1)
    source = (right * cos - down * sin) * (2 / width), (right * sin + down * cos) * (2 / height)
    grid = torch.stack(source, dim=-1).squeeze(1)  # (B, H, W, 2), from -1 to 1 over the image
    return batch._replace(x=F.grid_sample(x, grid, interpolation, align_corners=False))


def color_jitter(
    batch: Batch,
    rng: np.random.Generator,
    size: Size,
    /,
    *,
    brightness: NonNegative = 0.8,
    contrast: NonNegative = 0.8,
    saturation: NonNegative = 0.8,
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.0,
) -> Batch:
    """Changes brightness, contrast, saturation and hue, in a random order for each image.

    With an option of value v, the image is blended by a random factor in [max(0, 1 - v), 1 + v]: for brightness
    with black, for contrast with its mean grey, for saturation with its own grey image. `hue` is the largest shift
    in either direction, in turns of the colour circle. After each change, values are clamped to 0..1.
    """
    x, n = batch.x, len(batch.x)
    widths = np.array([brightness, contrast, saturation])
    factors = np.ones((n, 4))
    factors[:, :HUE] = rng.uniform(np.maximum(0, 1 - widths), 1 + widths, (n, 3))
    turns = rng.uniform(-hue, hue, n)
    changes = np.flatnonzero([*widths, hue])
    orders = rng.permuted(np.tile(changes, (n, 1)), axis=1)
    for change in orders.T:  # (B,) the next change of each image
        own, mean, factor = _per_image(x, change == SATURATION, change == CONTRAST, factors[np.arange(n), change])
        grey = _grey(x)
        x = torch.lerp(own * grey + mean * grey.mean((2, 3), keepdim=True), x, factor).clamp_(0, 1)
        (rows,) = np.nonzero(change == HUE)
        if len(rows):
            at = _to_device(rows, x)
            x[at] = _shift_hue(x[at], *_per_image(x, turns[rows]))
    return batch._replace(x=x)


def _grey(x: Tensor) -> Tensor:
    """The grey images, (B, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    red, green, blue = torch.split(x, 1, dim=1)
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """`x` (B, 3, H, W) with its hue in HSV shifted by `turns` (B, 1, 1, 1)."""
    lowest, value = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    chroma = value - lowest
    red, green, blue = torch.split(x / chroma.clamp(min=torch.finfo(x.dtype).tiny), 1, dim=1)
    peak = value == x
    hue = torch.where(
        peak[:, :1], green - blue, torch.where(peak[:, 1:2], 2 + blue - red, 4 + red - green)
    )  # in sixths of the circle
    start = torch.arange(5, 0, -2, dtype=x.dtype, device=x.device).view(3, 1, 1)
    place = (start + hue + 6 * turns).remainder_(6)
    return value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)


def cutout(batch: Batch, rng: np.random.Generator, size: Size, /, *, holes: Count = 5, length: Count = 4) -> Batch:
    """Puts `holes` black squares, `length` pixels a side, at random places; the image's edge cuts them off."""
    x = batch.x
    starts = rng.integers(0, x.shape[2:], (len(x), holes, 2)) - length // 2
    top, left = _to_device(starts, x).unsqueeze(-1).unbind(2)
    rows, columns = (
        ((at >= start) & (at < start + length)).to(x.dtype)  # (B, holes, side)
        for start, at in ((top, _pixel_centres(x.shape[2], x)), (left, _pixel_centres(x.shape[3], x)))
    )
    hidden = (rows.mT @ columns).unsqueeze(1)  # the number of holes that cover each pixel
    return batch._replace(x=x * (hidden == 0))


def _ascending(ends: Range) -> Range:
    if ends[0] > ends[1]:
        raise ValueError(f"{list(ends)} should be a range: first the lower end, then the upper end")
    return ends


def random_resized_crop(
    batch: Batch,
    rng: np.random.Generator,
    size: Size,
    /,
    *,
    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.08, 1.0),
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(_ascending)] = (3 / 4, 4 / 3),
    antialias: bool = True,
) -> Batch:
    """A random part of each image, resized to the network's size by bilinear interpolation.

    The part's share of the image's area is uniform in `scale`, and the logarithm of its width / height is uniform
    between the logarithms of `ratio`. With `antialias` the interpolation averages over all pixels when it shrinks.
    """
    x = batch.x
    top, left, height, width = _crop_boxes(rng, len(x), (x.shape[2], x.shape[3]), scale, ratio)
    down = _resampling_weights(x, top, height, x.shape[2], size[0], antialias)
    across = _resampling_weights(x, left, width, x.shape[3], size[1], antialias)
    return batch._replace(x=down @ x @ across.mT)


def _crop_boxes(
    rng: np.random.Generator, n: int, size: Size, scale: Range, ratio: Range
) -> tuple[Ints, Ints, Ints, Ints]:
    """Top, left, height and width (n,) of the first draw that lies inside the image.

    Where none does, the box is the largest one at the centre that `ratio` allows.
    """
    height, width = size
    area = height * width * rng.uniform(*scale, (CROP_TRIES, n))
    aspect = np.exp(rng.uniform(log(ratio[0]), log(ratio[1]), (CROP_TRIES, n)))
    h, w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    inside = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
    first = inside.argmax(0), np.arange(n)
    found, nearest = inside[first], np.clip(width / height, *ratio)
    h = np.where(found, h[first], min(height, round(width / nearest))).astype(np.int64)
    w = np.where(found, w[first], min(width, round(height * nearest))).astype(np.int64)
    top, left = (np.where(found, rng.integers(0, room + 1), room // 2) for room in (height - h, width - w))
    return top, left, h, w


def _resampling_weights(x: Tensor, start: Ints, length: Ints, side: int, out: int, antialias: bool) -> Tensor:
    """(B, 1, out, side): the weights that turn the pixels start..start + length of a side into `out` pixels.

    The weights of an output pixel form a triangle about its place in the input. The half-width of the triangle is
    one input pixel; with `antialias` it is at least the distance between two output pixels.
    """
    begin, extent, step = _per_image(x, start, length, length / out)
    pixel = _pixel_centres(side, x) - begin
    place = _pixel_centres(out, x).unsqueeze(-1) * step
    spread = step.clamp(min=1) if antialias else 1.0
    weights: Tensor = (1 - (pixel - place).abs() / spread).clamp_(min=0) * ((pixel > 0) & (pixel < extent))
    return weights / weights.sum(-1, keepdim=True)


def mixup(
    batch: Batch, rng: np.random.Generator, size: Size, /, *, alpha: Positive = 0.2, p: Chance = 1.0
) -> Batch:
    """lambda x + (1 - lambda) x', where x' is the batch in another order, and lambda ~ Beta(alpha, alpha).

    One lambda holds for the whole batch. With probability 1 - `p` a batch is not mixed, and lambda is 1. Examples
    may have any shape.
    """
    weight, partner = rng.beta(alpha, alpha), rng.permutation(len(batch.x))
    if rng.random() >= p:
        return _mixed_batch(batch, batch.x, batch.y, 1.0)
    rows = _to_device(partner, batch.x)
    return _mixed_batch(batch, torch.lerp(batch.x[rows], batch.x, weight), batch.y[rows], weight)


def cutmix(
    batch: Batch, rng: np.random.Generator, size: Size, /, *, alpha: Positive = 1.0, p: Chance = 1.0
) -> Batch:
    """Replaces a box of each image by the same box of another image; one box holds for the whole batch.

    The box has the share 1 - lambda of the area, where lambda ~ Beta(alpha, alpha), before the image's edge cuts
    it off. The weight of the own label is the share of the area outside the box. With probability 1 - `p` a batch
    is not mixed, and that weight is 1.
    """
    x, sides = batch.x, np.array(batch.x.shape[2:])
    weight, partner, centre = rng.beta(alpha, alpha), rng.permutation(len(x)), rng.integers(0, sides)
    if rng.random() >= p:
        return _mixed_batch(batch, x, batch.y, 1.0)
    half = (sides * np.sqrt(1 - weight)).astype(np.int64) // 2
    (top, left), (bottom, right) = np.maximum(centre - half, 0), np.minimum(centre + half, sides)
    rows = _to_device(partner, x)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[rows, :, top:bottom, left:right]
    return _mixed_batch(batch, mixed, batch.y[rows], 1 - float((bottom - top) * (right - left) / sides.prod()))


def _mixed_batch(batch: Batch, x: Tensor, labels: Tensor, weight: float) -> Batch:
    if batch.mixed_labels is not None:
        raise ConfigError("local.augment: two entries mix the labels of a batch; only one may")
    return batch._replace(x=x, mixed_labels=labels, mix_weight=x.new_full((len(x),), weight))


def _to_device(values: npt.NDArray[np.generic], x: Tensor) -> Tensor:
    """`values` on the device of `x`; the copy does not wait for the device's earlier work."""
    return torch.from_numpy(values).to(x.device, non_blocking=True)


def _per_image(x: Tensor, *numbers: npt.NDArray[np.generic]) -> Tensor:
    """(m, B, 1, 1, 1): m vectors (B,) with one number for each image of `x`, shaped to broadcast over pixels."""
    return _to_device(np.stack(numbers).astype(np.float64), x).to(x.dtype).view(len(numbers), -1, 1, 1, 1)


def _pixel_centres(side: int, x: Tensor) -> Tensor:
    """(side,): the coordinate of the centre of each pixel, in pixels."""
    return torch.arange(0.5, side, dtype=x.dtype, device=x.device)
