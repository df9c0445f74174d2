"""Training batches that differ each time they are drawn, made on the device where the data lies.

An augmentation takes images (B, C, H, W) from 0 to 1, before normalisation, and changes nothing in place. Its
random numbers come from the host, a set an example, so that every device has the same. Images of float32 stay in
their own units, with 0 for black.

    random_crop, flip     He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2
    rotation              torchvision's RandomRotation
    color_jitter          Howard 2013, https://arxiv.org/abs/1312.5402, as torchvision's ColorJitter
    cutout                DeVries & Taylor 2017, https://arxiv.org/abs/1708.04552
    random_resized_crop   Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6, as torchvision's
    mixup                 Zhang et al. 2018, https://arxiv.org/abs/1710.09412
    cutmix                Yun et al. 2019, https://arxiv.org/abs/1905.04899

Differs: cutout leaves black; its authors cut after normalisation, which leaves the mean colour.
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
from fedsim.errors import ConfigError
from fedsim.types import Batch, Count, NonNegative, Positive, Share

Size = tuple[int, int]  # height and width in pixels
Range = tuple[float, float]
Chance = Annotated[float, Ge(0), Le(1)]
MIXERS = {"mixup", "cutmix"}
ANY_SHAPE = {"mixup"}
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue in grey; ITU-R BT.601
TRIES = 10  # at a crop that lies in the image; torchvision's number


class Augmentation(Protocol):
    """A new batch from a batch; `size` is what the network takes, and all that is random comes from `rng`."""

    def __call__(self, batch: Batch, rng: np.random.Generator, size: Size, /) -> Batch: ...


def check(specs: Sequence[Spec], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ConfigError where resolved `specs` do not go together, or not with examples of this form."""
    for i, spec in enumerate(specs):
        name, at = spec["name"], f"local.augment[{i}]: {spec['name']}"
        if name in MIXERS and i + 1 < len(specs):
            raise ConfigError(f"{at} mixes examples and labels: it should be the last, and the only one that does")
        if len(shape) != 3 and name not in ANY_SHAPE:
            raise ConfigError(f"{at} takes images, (channels, height, width); these examples are {shape}")
        if name == "color_jitter":
            _check_colours(spec, shape[0], dtype, at)


def _check_colours(spec: Spec, channels: int, dtype: torch.dtype, at: str) -> None:
    if dtype != torch.uint8:
        raise ConfigError(f"{at} takes uint8 images, for black and white have no number in those of float32")
    if channels not in {1, 3}:
        raise ConfigError(f"{at} takes images of 1 channel or 3; these have {channels}")
    if channels == 1 and (spec["saturation"] or spec["hue"]):
        raise ConfigError(f"{at}: grey images have neither saturation nor hue; set both to 0")


def random_crop(
    batch: Batch, rng: np.random.Generator, size: Size, /, *, padding: Annotated[int, Ge(0)] = 4
) -> Batch:
    """A window of the network's size, anywhere in the image and `padding` black pixels around it."""
    height, width = size
    padded = F.pad(batch.x, (padding,) * 4) if padding else batch.x
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, tops, lefts, height, width), a view
    places = rng.integers(0, windows.shape[2:4], (len(padded), 2))
    top, left = _sent(places, padded).unbind(1)
    return batch._replace(x=windows[torch.arange(len(top), device=top.device), :, top, left])


def flip(batch: Batch, rng: np.random.Generator, size: Size, /, *, p: Chance = 0.5) -> Batch:
    """Left and right change places, in each image with probability `p`."""
    turned = _sent(rng.random(len(batch.x)) < p, batch.x)
    return batch._replace(x=torch.where(turned.view(-1, 1, 1, 1), batch.x.flip(-1), batch.x))


def rotation(
    batch: Batch,
    rng: np.random.Generator,
    size: Size,
    /,
    *,
    degrees: NonNegative = 10.0,
    interpolation: Literal["nearest", "bilinear"] = "nearest",
) -> Batch:
    """A turn about the centre, up to `degrees` either way; what comes from outside is black."""
    x = batch.x
    height, width = x.shape[2:]
    angle = np.deg2rad(rng.uniform(-degrees, degrees, len(x)))
    cos, sin = _beside(x, np.cos(angle), np.sin(angle))
    right = _pixels(width, x) - width / 2
    down = (_pixels(height, x) - height / 2).unsqueeze(-1)
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
    """Light and colours changed in an order of each image's own, and kept from 0 to 1 after each change.

    A factor from [max(0, 1 - v), 1 + v] blends the image with another: brightness with black, contrast with its
    mean grey, saturation with its own grey. `hue` is in turns of the colour circle, either way.
    """
    x, n = batch.x, len(batch.x)
    widths = np.array([brightness, contrast, saturation])
    factors = np.ones((n, 4))
    factors[:, :HUE] = rng.uniform(np.maximum(0, 1 - widths), 1 + widths, (n, 3))
    turns = rng.uniform(-hue, hue, n)
    changes = np.flatnonzero([*widths, hue])
    orders = rng.permuted(np.tile(changes, (n, 1)), axis=1)
    for change in orders.T:  # (B,), which is next for each image
        own, mean, factor = _beside(x, change == SATURATION, change == CONTRAST, factors[np.arange(n), change])
        grey = _grey(x)
        x = torch.lerp(own * grey + mean * grey.mean((2, 3), keepdim=True), x, factor).clamp_(0, 1)
        (rows,) = np.nonzero(change == HUE)
        if len(rows):
            at = _sent(rows, x)
            x[at] = _turned(x[at], *_beside(x, turns[rows]))
    return batch._replace(x=x)


def _grey(x: Tensor) -> Tensor:
    """(B, 1, H, W)"""
    if x.shape[1] == 1:
        return x
    red, green, blue = torch.split(x, 1, dim=1)
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """`x` (B, 3, H, W) with its hue in HSV moved by `turns` (B, 1, 1, 1)."""
    least, value = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    chroma = value - least
    red, green, blue = torch.split(x / chroma.clamp(min=torch.finfo(x.dtype).tiny), 1, dim=1)
    peak = value == x
    hue = torch.where(
        peak[:, :1], green - blue, torch.where(peak[:, 1:2], 2 + blue - red, 4 + red - green)
    )  # in sixths of the circle
    start = torch.arange(5, 0, -2, dtype=x.dtype, device=x.device).view(3, 1, 1)
    place = (start + hue + 6 * turns).remainder_(6)
    return value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)


def cutout(batch: Batch, rng: np.random.Generator, size: Size, /, *, holes: Count = 5, length: Count = 4) -> Batch:
    """Black squares of `length` pixels a side, centred anywhere in the image and cut off at its edge."""
    x = batch.x
    starts = rng.integers(0, x.shape[2:], (len(x), holes, 2)) - length // 2
    top, left = _sent(starts, x).unsqueeze(-1).unbind(2)
    rows, columns = (
        ((at >= start) & (at < start + length)).to(x.dtype)  # (B, holes, side)
        for start, at in ((top, _pixels(x.shape[2], x)), (left, _pixels(x.shape[3], x)))
    )
    hidden = (rows.mT @ columns).unsqueeze(1)  # how many holes lie on a pixel
    return batch._replace(x=x * (hidden == 0))


def _rising(ends: Range) -> Range:
    if ends[0] > ends[1]:
        raise ValueError(f"{list(ends)} should be the lower end, then the upper")
    return ends


def random_resized_crop(
    batch: Batch,
    rng: np.random.Generator,
    size: Size,
    /,
    *,
    scale: Annotated[tuple[Share, Share], AfterValidator(_rising)] = (0.08, 1.0),
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(_rising)] = (3 / 4, 4 / 3),
    antialias: bool = True,
) -> Batch:
    """A part of the image, resized to the network's size; bilinear, over wider triangles to `antialias`.

    Its share of the image's area is uniform over `scale`, the logarithm of width / height over that of `ratio`.
    """
    x = batch.x
    top, left, height, width = _boxes(rng, len(x), (x.shape[2], x.shape[3]), scale, ratio)
    down = _resampling(x, top, height, x.shape[2], size[0], antialias)
    across = _resampling(x, left, width, x.shape[3], size[1], antialias)
    return batch._replace(x=down @ x @ across.mT)


def _boxes(
    rng: np.random.Generator, n: int, size: Size, scale: Range, ratio: Range
) -> tuple[Ints, Ints, Ints, Ints]:
    """Top, left, height and width (n,): the first draw that fits, or the centre, as far as `ratio` lets it."""
    height, width = size
    area = height * width * rng.uniform(*scale, (TRIES, n))
    aspect = np.exp(rng.uniform(log(ratio[0]), log(ratio[1]), (TRIES, n)))
    h, w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
    first = fits.argmax(0), np.arange(n)
    found, nearest = fits[first], np.clip(width / height, *ratio)
    h = np.where(found, h[first], min(height, round(width / nearest))).astype(np.int64)
    w = np.where(found, w[first], min(width, round(height * nearest))).astype(np.int64)
    top, left = (np.where(found, rng.integers(0, room + 1), room // 2) for room in (height - h, width - w))
    return top, left, h, w


def _resampling(x: Tensor, start: Ints, length: Ints, side: int, out: int, antialias: bool) -> Tensor:
    """(B, 1, out, side) the weights with which the pixels start..start + length of a side become `out`.

    Each becomes a triangle about the place it comes from, no narrower than a pixel.
    """
    begin, extent, step = _beside(x, start, length, length / out)
    pixel = _pixels(side, x) - begin
    place = _pixels(out, x).unsqueeze(-1) * step
    spread = step.clamp(min=1) if antialias else 1.0
    weights: Tensor = (1 - (pixel - place).abs() / spread).clamp_(min=0) * ((pixel > 0) & (pixel < extent))
    return weights / weights.sum(-1, keepdim=True)


def mixup(
    batch: Batch, rng: np.random.Generator, size: Size, /, *, alpha: Positive = 0.2, p: Chance = 1.0
) -> Batch:
    """lambda x + (1 - lambda) x', one lambda ~ Beta(alpha, alpha) a batch, x' the batch in another order.

    With probability 1 - `p` a batch is left as it is, with a share of 1. Examples may have any shape.
    """
    share, partner = rng.beta(alpha, alpha), rng.permutation(len(batch.x))
    if rng.random() >= p:
        return _mixed(batch, batch.x, batch.y, 1.0)
    rows = _sent(partner, batch.x)
    return _mixed(batch, torch.lerp(batch.x[rows], batch.x, share), batch.y[rows], share)


def cutmix(
    batch: Batch, rng: np.random.Generator, size: Size, /, *, alpha: Positive = 1.0, p: Chance = 1.0
) -> Batch:
    """A box of another image of the batch, one box a batch; the share is the area that it leaves.

    It has the part 1 - lambda of the area, lambda ~ Beta(alpha, alpha), before the image's edge cuts it off. With
    probability 1 - `p` a batch is left as it is, with a share of 1.
    """
    x, sides = batch.x, np.array(batch.x.shape[2:])
    share, partner, centre = rng.beta(alpha, alpha), rng.permutation(len(x)), rng.integers(0, sides)
    if rng.random() >= p:
        return _mixed(batch, x, batch.y, 1.0)
    half = (sides * np.sqrt(1 - share)).astype(np.int64) // 2
    (top, left), (bottom, right) = np.maximum(centre - half, 0), np.minimum(centre + half, sides)
    rows = _sent(partner, x)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[rows, :, top:bottom, left:right]
    return _mixed(batch, mixed, batch.y[rows], 1 - float((bottom - top) * (right - left) / sides.prod()))


def _mixed(batch: Batch, x: Tensor, labels: Tensor, weight: float) -> Batch:
    if batch.mixed_labels is not None:
        raise ConfigError("local.augment: two entries mix the labels of a batch; keep one of them")
    return batch._replace(x=x, mixed_labels=labels, mix_weight=x.new_full((len(x),), weight))


def _sent(values: npt.NDArray[np.generic], x: Tensor) -> Tensor:
    """`values` on the device of `x`, without waiting for what that is still computing."""
    return torch.from_numpy(values).to(x.device, non_blocking=True)


def _beside(x: Tensor, *numbers: npt.NDArray[np.generic]) -> Tensor:
    """(m, B, 1, 1, 1) m vectors (B,) with a number an image, to be unpacked."""
    return _sent(np.stack(numbers).astype(np.float64), x).to(x.dtype).view(len(numbers), -1, 1, 1, 1)


def _pixels(side: int, x: Tensor) -> Tensor:
    """(side,) the middle of each pixel, in pixels."""
    return torch.arange(0.5, side, dtype=x.dtype, device=x.device)
