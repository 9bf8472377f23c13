"""Arrays and array files that people already have -> ImageSet, whatever their layout, channels and range."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from phyla.errors import CorruptFileError, InputError
from phyla.types import ImageSet

_BLOCK_BYTES = 1 << 26
_ARRAY_KEYS = ("images", "pixels", "x", "X", "data", "arr_0")


def from_array(array: np.ndarray | Tensor, ids: Sequence[str] | None = None, *, name: str = "images",
               channels: Literal["first", "last"] | None = None) -> ImageSet:
    """Return images held in an array as an ImageSet; uint8 (n, height, width, 3) is taken as it is, without a copy.

    Parameters
    ----------
    array : (n, h, w, c), (n, c, h, w) or grey (n, h, w), with c of 1, 3 or 4 channels (the fourth is opacity, over
        white); uint8, bool, whole numbers up to 65535 (scaled by the 8, 12 or 16 bits that hold the largest of all), or
        real numbers of 0 to 1, or of 0 to 255 where any is above 1
    ids : one name an image; None numbers them
    channels : where the channels are, for shapes that can be read both ways

    Raises
    ------
    InputError
        The shape, type or range is none of these; says which it is.
    """
    plain = _as_numpy(array)
    shape = tuple(plain.shape)
    if not shape or shape[0] == 0:
        raise InputError(f"an array of shape {shape} holds no image", "give (n, height, width, 3)")
    pixels = _channels_last(plain, channels)
    width = max(5, len(str(len(pixels) - 1)))
    names = [f"{row:0{width}d}" for row in range(len(pixels))] if ids is None else list(ids)
    if isinstance(pixels, Tensor):
        return ImageSet(pixels, names, name)
    if pixels.dtype != np.uint8 or pixels.shape[3] != 3:
        pixels = _converted(pixels)
    return ImageSet(pixels, names, name)


def read_array_file(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Return the images in a .npy file (as a memory map) or .npz file, and the ``ids`` of the latter if it has any.

    Raises
    ------
    CorruptFileError
        It is damaged, or holds Python objects.
    InputError
        An .npz file holds no array of images.
    """
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            keys = [key for key in _ARRAY_KEYS if key in content.files] or content.files[:1]
            images = content[keys[0]] if keys else np.empty(0)
            ids = [str(value) for value in content["ids"]] if "ids" in content.files else None
            stored = ", ".join(content.files) or "nothing"
    except (ValueError, EOFError, AttributeError, zlib.error, BadZipFile, NotImplementedError) as error:
        raise CorruptFileError(f"{path} is not a readable array file ({error})",
                               "save it again with numpy.save, without Python objects") from error
    if images.ndim < 3:
        raise InputError(f"{path} holds no images, only: {stored}", f"store them under the name {_ARRAY_KEYS[0]!r}")
    return images, ids


def _as_numpy(array: np.ndarray | Tensor) -> np.ndarray | Tensor:
    if isinstance(array, Tensor):
        if array.dtype == torch.uint8 and array.ndim == 4 and array.shape[3] == 3 and array.shape[1] not in (1, 3, 4):
            return array  # stays on its device
        return (array.detach().float() if array.is_floating_point() else array.detach()).cpu().numpy()
    array = np.asanyarray(array)
    if array.dtype.kind not in "biuf":
        raise InputError(f"images cannot be made of {array.dtype} values",
                         "give numbers; images of different sizes go into a folder, which is resized on reading")
    return array


def _channels_last(array: np.ndarray | Tensor, channels: str | None) -> np.ndarray | Tensor:
    shape = tuple(array.shape)
    if array.ndim == 3:
        if shape[2] in (3, 4) or shape[2] == 1 < shape[1]:
            raise InputError(f"an array of shape {shape} looks like one image, not many", "add an axis: array[None]")
        return array[..., None]
    if array.ndim != 4:
        raise InputError(f"images need 3 or 4 axes, got shape {shape}", "reshape to (n, height, width, channels)")
    last, first = shape[3] in (1, 3, 4), shape[1] in (1, 3, 4)
    if channels is None and last and first:
        raise InputError(f"an array of shape {shape} can be read with its channels first or last",
                         "say which with channels='first' or channels='last'")
    if not (last if channels == "last" else first if channels == "first" else last or first):
        raise InputError(f"images need 1, 3 or 4 channels, got shape {shape}", "reshape to (n, height, width, 3)")
    if channels == "first" or (channels is None and first):
        return array.permute(0, 2, 3, 1) if isinstance(array, Tensor) else array.transpose(0, 2, 3, 1)
    return array


def _blocks(array: np.ndarray) -> Iterator[slice]:
    rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    return (slice(at, at + rows) for at in range(0, len(array), rows))


def _converted(array: np.ndarray) -> np.ndarray:
    scale = 255.0 / _top(array)
    out = np.empty((*array.shape[:3], 3), np.uint8)
    for block in _blocks(array):
        part = array[block]
        if array.dtype != np.uint8:
            part = np.rint(part.astype(np.float64) * scale).astype(np.uint8)
        if part.shape[3] == 4:
            alpha = part[..., 3:].astype(np.float64) / 255
            part = np.rint(part[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        out[block] = part  # one channel spreads over three
    return out


def _top(array: np.ndarray) -> int:
    """Return the value that stands for full brightness."""
    if array.dtype == np.uint8:
        return 255
    low = min(float(array[block].min()) for block in _blocks(array))
    high = max(float(array[block].max()) for block in _blocks(array))
    real = array.dtype.kind == "f"
    tops = (1, 255) if real or array.dtype.kind == "b" else (255, 4095, 65535)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        raise InputError(f"{array.dtype} images should lie between 0 and {'1 or 255' if real else 65535}, "
                         f"got {low:g} to {high:g}", "undo the normalization: pixels are wanted as they were read")
    return top
