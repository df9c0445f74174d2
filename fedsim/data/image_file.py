"""One image file as the pixels of an example: the formats that are opened, and what becomes of Pillow's modes."""

import threading
from contextlib import AbstractContextManager, nullcontext, suppress

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from fedsim.base.reading import open_regular
from fedsim.data.dataset import Floats
from fedsim.errors import ConfigError, printable, reason

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # no EPS, for which Pillow would start Ghostscript
EXTENSIONS = (  # of these formats; MPO is a JPEG with more pictures behind the first
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng"),
    ".bmp",
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".tif", ".tiff"),
    ".webp",
    ".gif",
)
LARGE_IMAGE_PIXELS = 2**24  # images with more pixels are decoded one at a time, to bound the memory
LARGE_IMAGE_LOCK = threading.Lock()
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # grey images of more than 8 bits
NOT_MULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # a mode whose colours are multiplied by alpha, and the plain one
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation

Range = tuple[float, float]  # the values that become black and white


def read_image(path: str, size: int, grey_range: Range | None = None) -> npt.NDArray[np.uint8]:
    """The image in a file, as RGB (3, size, size); raises ConfigError naming the file.

    It is turned upright as its EXIF orientation says, laid on white where it is transparent, resized and cropped.
    Of an animation it is the first picture. Grey values of more than 8 bits are scaled so that the ends of
    `grey_range`, or of the range that the file gives, become 0 and 255; values outside become the nearer end.
    """
    try:
        with (
            open_regular(path, links=True) as file,
            Image.open(file, formats=FORMATS) as image,
            _large_alone(image),
        ):
            square = _square(_rgb(_upright(image), grey_range), size)
    except ConfigError as error:
        raise ConfigError(f"data.root: {printable(path)} {error}") from None
    except Exception as error:  # decoders raise anything; a decompression bomb raises a Warning
        raise ConfigError(f"data.root: {printable(path)} is not a readable image ({reason(error)})") from error
    return np.asarray(square).transpose(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """The image as it should be looked at; a TIFF turns itself when it is loaded."""
    if 0 in image.size:
        raise ConfigError("has no pixels")
    if image.format == "TIFF" and getattr(image, "is_animated", False):
        raise ConfigError("has several pages; save each as a file, for only one could be an example")
    image.load()
    turn = None
    with suppress(Exception):  # EXIF data that cannot be read turns nothing
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, grey_range: Range | None) -> Image.Image:
    """The image on white, as RGB."""
    if image.mode in DEEP_MODES:
        image = _eight_bits(image, grey_range)
    if image.mode in NOT_MULTIPLIED:
        image = image.convert(NOT_MULTIPLIED[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, grey_range: Range | None) -> Image.Image:
    """A grey image of more bits as one of 8, each value rounded to the nearest."""
    black, white = grey_range or _own_range(image)
    if _tiff_tag(image, ExifTags.Base.PhotometricInterpretation, 1) == 0:  # white is 0; Pillow minds it for 8 bits
        black, white = white, black
    values: Floats = np.array(image, dtype=np.float64 if image.mode == "I" else np.float32)
    if not np.isfinite(values).all():
        raise ConfigError("has pixels that are not finite numbers")
    transparent = values == image.info.get("transparency", np.nan)
    values -= black
    values *= 255 / (white - black)
    values[transparent] = 255
    return Image.fromarray(np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8))


def _own_range(image: Image.Image) -> Range:
    """The range that the file's format gives; raises ConfigError where it gives none."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):  # of 16 bits too
        return 0, 2 ** _tiff_tag(image, ExifTags.Base.BitsPerSample, 16) - 1
    kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
    raise ConfigError(
        f"has {kind} pixels, and the file does not say what is black and what is white; "
        "set data.grey_range, such as [0, 1]"
    )


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    """The first number of a TIFF's `tag`; `default` where there is none."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


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
