"""Shrink images into the page: a data URI each, or one sheet of many, within a budget of bytes.

Images of a few pixels are kept as they are, without loss, and shown with hard edges; larger ones become WebP.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from phyla.types import ImageSet

TINY = 16
"""Images no larger than this are shown pixel by pixel."""
_LADDER = ((96, 80), (96, 60), (72, 60), (56, 50), (40, 40), (24, 30))  # longest side in pixels, WebP quality
_PROBE = 48  # images tried to foresee the size of all


@dataclass(frozen=True)
class Thumbnails:
    """Images as data URIs by row, and whether they want to be shown pixel by pixel."""

    uris: Mapping[int, str]
    pixelated: bool


@dataclass(frozen=True)
class Sheet:
    """Many small images in one: tile ``i`` stands at column ``i % columns`` and line ``i // columns``."""

    uri: str
    columns: int
    lines: int
    width: int
    height: int


def make_thumbnails(images: ImageSet, rows: Sequence[int], *, budget: int = 9_000_000) -> Thumbnails:
    """Return a thumbnail of each of ``rows``, all together within ``budget`` bytes before base64.

    The largest step of size and quality that fits is taken; the smallest one is taken even if it does not.
    """
    wanted = sorted(set(rows))
    tiny = is_tiny(images)
    step = _LADDER[0] if tiny else _fitting_step(images, wanted, budget)
    uris: dict[int, str] = {}
    for start in range(0, len(wanted), 256):
        block = wanted[start : start + 256]
        for row, pixels in zip(block, pixels_of(images, block), strict=True):
            uris[row] = _uri(shrunk(pixels, step[0]), step[1], lossless=tiny)
    return Thumbnails(uris, tiny)


def make_sheet(images: ImageSet, rows: Sequence[int], *, side: int = 40, budget: int = 3_000_000) -> Sheet:
    """Return one image with a tile for each of ``rows`` in their order, within ``budget`` bytes if that can be."""
    tiles = [shrunk(pixels, side) for start in range(0, len(rows), 256)
             for pixels in pixels_of(images, rows[start : start + 256])]
    width, height = tiles[0].size
    columns = min(60, len(tiles))
    lines = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width, lines * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    tiny, data = is_tiny(images), b""
    for quality in (75, 50, 25, 5):
        data = _encoded(sheet, quality, lossless=tiny)
        if tiny or len(data) <= budget:
            break
    return Sheet(_data_uri(data, tiny), columns, lines, width, height)


def is_tiny(images: ImageSet) -> bool:
    """Return whether the images are so small that their pixels should be seen."""
    return max(images.size) <= TINY


def pixels_of(images: ImageSet, rows: Sequence[int]) -> np.ndarray:
    """Return the pixels of ``rows``, uint8 (n_rows, height, width, 3); reads no other image."""
    return np.asarray(images.select(np.asarray(rows, dtype=np.int64)).array)


def _fitting_step(images: ImageSet, rows: Sequence[int], budget: int) -> tuple[int, int]:
    probe = [rows[i] for i in np.linspace(0, len(rows) - 1, min(_PROBE, len(rows))).astype(int)]
    pixels = pixels_of(images, probe)
    for side, quality in _LADDER:
        sizes = [len(_encoded(shrunk(image, side), quality, lossless=False)) for image in pixels]
        if 1.15 * sum(sizes) / max(1, len(sizes)) * len(rows) <= budget:
            return side, quality
    return _LADDER[-1]


def shrunk(pixels: np.ndarray, side: int) -> Image.Image:
    """Return an image whose longest side is ``side`` at most; a smaller one stays as it is."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _encoded(image: Image.Image, quality: int, *, lossless: bool) -> bytes:
    out = io.BytesIO()
    if lossless:
        image.save(out, "PNG", optimize=True)
    else:
        image.save(out, "WEBP", quality=quality, method=2)
    return out.getvalue()


def _data_uri(data: bytes, lossless: bool) -> str:
    return f"data:image/{'png' if lossless else 'webp'};base64,{base64.b64encode(data).decode()}"


def _uri(image: Image.Image, quality: int, *, lossless: bool) -> str:
    return _data_uri(_encoded(image, quality, lossless=lossless), lossless)
