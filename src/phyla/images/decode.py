"""One image file -> uint8 (size, size, 3): any of six formats, any mode, upright, on white, the centre square.

An image's shorter side becomes ``size`` (Pillow's bilinear, which averages when it shrinks) and the centre square is
kept. The square is cut and resized in one step, so a strip of 100,000 x 1 pixels costs no more than any other image.
"""

from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from phyla.errors import CorruptFileError, InputError

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"))
"""What an image file is called, in any case. What it is, its first bytes say."""

MAX_PIXELS = 89_478_485
"""More pixels than this, a quarter of a GiB as RGB, are never decoded. Pillow warns above the same number."""

MAX_JPEG_PIXELS = 3 * MAX_PIXELS
"""A JPEG may have more, such as a camera's 200 megapixels: it is decoded at 1/2, 1/4 or 1/8 of its sides."""

# 16-bit files hold what 8-, 12- and 16-bit sensors saw: an image is scaled by the least of these that is not exceeded.
_TOPS = (255, 4095, 65535)

_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}
_ORIENTATION = 0x0112

_SIGNATURES: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\x00", TiffImagePlugin.TiffImageFile), (b"MM\x00*", TiffImagePlugin.TiffImageFile),
    (b"II+\x00", TiffImagePlugin.TiffImageFile), (b"MM\x00+", TiffImagePlugin.TiffImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile), (b"GIF89a", GifImagePlugin.GifImageFile),
)


def read_image(path: Path | str, size: int | None = None) -> np.ndarray:
    """Return the centre square of an image file, uint8 (size, size, 3); whole and unscaled when ``size`` is None.

    Raises
    ------
    CorruptFileError
        The file cannot be read, is not an image, is cut off, or has more than MAX_PIXELS pixels; the reason is named.
    """
    try:
        with open(path, "rb") as file, _opened(file) as image:  # noqa: PTH123  # a Path costs a tenth of a small image
            return _pixels(image, size)
    except Exception as error:  # decoders raise SyntaxError, struct.error, OverflowError and more on damaged files
        raise CorruptFileError(f"{str(path)!r} {_reason(error)}") from error


def shorter_side(path: Path | str) -> int | None:
    """Return the shorter side of an image file in pixels from its header alone, or None when it has no readable one."""
    try:
        with Path(path).open("rb") as file, _opened(file) as image:
            return min(image.size)
    except Exception:  # as above; whoever decodes the file will say why
        return None


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return the centre square of one image, uint8 (h, w, 3) or (h, w) to (size, size, 3)."""
    if pixels.shape[:2] != (size, size):
        pixels = np.asarray(_square(Image.fromarray(np.ascontiguousarray(pixels)), size))
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Return whole or real numbers of any range as uint8 of the same shape.

    Whole numbers are scaled by the 8, 12 or 16 bits that hold the largest, real numbers by 1 when none is larger and
    else by 255; what fits neither (negative values, heights, temperatures) is stretched from its least to its greatest.
    """
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0) if values.dtype.kind == "f" else values
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    tops = (1, 255) if values.dtype.kind == "f" else _TOPS
    top = next((top for top in tops if high <= top), None) if low >= 0 else None
    if top is None:
        return np.rint((values - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8)
    return np.rint(values * (255.0 / top)).astype(np.uint8)


class _NotAnImageError(Exception):
    """The reason why a file is not decoded, ready to follow its name."""


def _opened(file: BufferedReader) -> ImageFile:
    # By the plug-in's class rather than Image.open, whose size check is a process-wide setting and a warning.
    start = file.read(16)
    file.seek(0)
    if not start:
        raise _NotAnImageError("is empty")
    for signature, plugin in _SIGNATURES:
        if start.startswith(signature):
            return plugin(file)
    raise _NotAnImageError(f"is not an image: it begins with {start!r}")


def _pixels(image: ImageFile, size: int | None) -> np.ndarray:
    width, height = image.size
    is_jpeg = image.format == "JPEG"
    if is_jpeg and size is not None and min(width, height) >= 4 * size:  # else it would do nothing, slowly
        image.draft(None, (2 * size, 2 * size))  # twice what is wanted keeps the resize in charge of the quality
    if image.width * image.height > MAX_PIXELS or width * height > (MAX_JPEG_PIXELS if is_jpeg else MAX_PIXELS):
        raise _NotAnImageError(f"has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    if width == 0 or height == 0:
        raise _NotAnImageError(f"has {width} x {height} pixels")
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    rgb = to_rgb(image.transpose(turn) if turn is not None else image)
    return np.array(rgb if size is None else _square(rgb, size))  # a copy: what Pillow lends cannot be written to


def _orientation(image: ImageFile) -> int:
    # After load(): Pillow turns TIFF itself and then forgets the tag.
    if image.format not in ("JPEG", "PNG", "WEBP", "TIFF"):
        return 1
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return 1  # asking Pillow takes as long as a small image's header
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGB: transparent ones on white, more than 8 bits scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(to_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2  # whole pixels: half of one would blur
    return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side), reducing_gap=2.0)


def _reason(error: Exception) -> str:
    if isinstance(error, _NotAnImageError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be opened: {error.strerror}"
    return f"is damaged: {error or type(error).__name__}"


def checked_size(size: int | None) -> int | None:
    """Return ``size`` when it is None or a whole number of pixels from 1 to 4096; InputError otherwise."""
    if size is not None and not 1 <= size <= 4096:
        raise InputError(f"size={size} is not a usable image size", "give the side of a square in pixels, such as 96")
    return size
