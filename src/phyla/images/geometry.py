"""Where pixels come from: batched crops, resizing and affine maps that give what Pillow gives.

Resizing is Pillow's: a triangle as wide as an output pixel is in the input (so shrinking does not alias), first along
rows, then along columns, with 22-bit whole-number weights and 8-bit values between. In whole numbers the result is
Pillow's to the last bit, and the same on every device. (Pillow 13 goes along columns first where the height shrinks by
more than twice what the width does: there a value in ten differs by 1.) Affine maps take the nearest pixel by Pillow's
16-bit fixed point and leave black what lies outside. ``images`` are as in `phyla.images.operations`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from phyla.images.operations import Factors, Images, constant

Resized = Float[Tensor, "batch 3 out_height out_width"]  # images of another size than those they are made from
Maps = Float[Tensor, "batch 6"]  # float64, affine

_WEIGHT_BITS = 22
_FIXED_ONE = 65536


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the height and width that hold a ``size`` square: an image's own, or its short side enlarged to it."""
    short = min(height, width)
    return (height, width) if short >= size else resized_size(height, width, size)


def resized_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Return height and width when the shorter side becomes ``short`` and the other follows, cut to whole pixels."""
    if height <= width:
        return short, short * width // height
    return short * height // width, short


def resize(pixels: UInt8[Tensor, "batch height width 3"], *, size: tuple[int, int]) -> Resized:
    """Return whole images resampled to ``size`` (height, width)."""
    whole = constant((0, 0, *pixels.shape[1:3]), pixels.device, dtype=torch.int64)
    return resized_crop(pixels, whole.expand(len(pixels), 4), size=size)


def resized_crop(
    pixels: UInt8[Tensor, "batch height width 3"],
    box: Int[Tensor, "batch 4"],
    *,
    size: tuple[int, int],
    flip: Bool[Tensor, " batch"] | None = None,
) -> Resized:
    """Return a crop of each image resampled to one size, and mirrored where asked.

    Parameters
    ----------
    box : int64, top, left, height, width in pixels, inside the image
    size : height and width of the output in pixels
    flip : which outputs are mirrored left to right; none when absent
    """
    return resample(pixels, crop_lines(box, (pixels.shape[1], pixels.shape[2]), size, flip=flip))


class Lines(NamedTuple):
    """Which lines of an image make each line of another, their places, and their weights in units of 2**-22."""

    places: Int[Tensor, "taps batch size"]
    weights: Int[Tensor, "taps batch size"]

    def part(self, rows: slice | Tensor) -> "Lines":
        """Return those of some of the batch."""
        return Lines(self.places[:, rows], self.weights[:, rows])


def crop_lines(
    box: Int[Tensor, "batch 4"], stored: tuple[int, int], size: tuple[int, int], *,
    flip: Bool[Tensor, " batch"] | None = None,
) -> tuple[Lines, Lines]:
    """Return the columns, and the rows, that make those of a resized crop; heights and widths as `resized_crop` has."""
    across = _lines(box[:, 1], box[:, 3], stored[1], size[1], flip=flip)
    return across, _lines(box[:, 0], box[:, 2], stored[0], size[0])


def resample(pixels: UInt8[Tensor, "batch height width 3"], lines: tuple[Lines, Lines]) -> Resized:
    """Return images of the weighted sums of columns, and then of rows, that `crop_lines` chose."""
    batch, in_height, in_width, _ = pixels.shape
    width, height = (part.places.shape[2] for part in lines)
    # Whole lines are picked and added, so each pass wants the axis it works on in front of the rest.
    columns = pixels.permute(0, 2, 3, 1).contiguous().int().view(batch, in_width, 3 * in_height)
    columns = _weighted(columns, lines[0]).to(torch.uint8).view(batch, width, 3, in_height)
    rows = columns.permute(0, 3, 2, 1).contiguous().int().view(batch, in_height, 3 * width)
    rows = _weighted(rows, lines[1]).view(batch, height, 3, width)
    images = torch.empty(batch, 3, height, width, device=pixels.device)
    return images.copy_(rows.permute(0, 2, 1, 3))


def _lines(
    start: Int[Tensor, " batch"], extent: Int[Tensor, " batch"], length: int, size: int,
    *, flip: Bool[Tensor, " batch"] | None = None,
) -> Lines:
    """Return the lines of an image of ``length`` that make ``size`` of those from ``start`` on."""
    position = torch.arange(size, dtype=torch.float64, device=start.device) + 0.5
    positions = position if flip is None else position + flip.double().unsqueeze(1) * (size - 2 * position)
    extents = extent.double().unsqueeze(1)
    support = (extents / size).clamp(min=1)  # half the width of the triangle
    center = positions * (extents / size)
    n_taps = math.ceil(2 * max(1.0, length / size))
    steps = torch.arange(n_taps, dtype=torch.float64, device=start.device).view(-1, 1, 1)
    lines = (center - support + 0.5).floor() + steps
    inside = torch.minimum(lines.clamp(min=0), extents - 1)
    weights = (1 - (lines + 0.5 - center).abs_().div_(support)).clamp_(min=0)
    weights = weights.mul_(torch.eq(lines, inside, out=torch.empty_like(lines)))  # nothing from outside
    weights = weights.div_(weights.sum(0))
    return Lines(inside.long() + start.unsqueeze(1), (weights * 2**_WEIGHT_BITS + 0.5).int())


def _weighted(given: Int[Tensor, "batch length values"], lines: Lines) -> Int[Tensor, "lines_out values"]:
    """Return sums of weighted lines of each image, rounded to 8-bit values."""
    batch, length, values = given.shape
    flat = given.view(batch * length, values)
    places = (lines.places + torch.arange(batch, device=given.device).view(-1, 1) * length).flatten(1)
    weights = lines.weights.flatten(1).unsqueeze(2)
    total = flat.index_select(0, places[0]).mul_(weights[0])
    for place, weight in zip(places[1:], weights[1:], strict=True):
        total.addcmul_(flat.index_select(0, place), weight)
    total.add_(1 << (_WEIGHT_BITS - 1))
    return total.bitwise_right_shift_(_WEIGHT_BITS)


def center_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Return top, left, height, width of the central square; an odd margin falls as torchvision rounds it."""
    return round((height - size) / 2), round((width - size) / 2), size, size


def crop(
    images: Images, box: Int[Tensor, "batch 4"], *, size: int, flip: Bool[Tensor, " batch"] | None = None
) -> Resized:
    """Return a ``size`` square of each image, mirrored where asked.

    Parameters
    ----------
    box : int64, top, left, height, width in pixels, inside the image; height and width are ``size``
    """
    width = images.shape[3]
    steps = torch.arange(size, device=images.device)
    columns = steps if flip is None else torch.where(flip.unsqueeze(1), size - 1 - steps, steps)
    rows, columns = box[:, :1] + steps, box[:, 1:2] + columns
    return _pick(images, rows.unsqueeze(2) * width + columns.unsqueeze(1))


def rotate(images: Images, degrees: Factors) -> Images:
    """Return images turned counterclockwise about their center."""
    return affine(images, rotation(degrees, *images.shape[2:]))


def rotation(degrees: Factors, height: int, width: int) -> Maps:
    """Return the maps that turn images of a size counterclockwise about their center."""
    radians = torch.deg2rad(degrees.double().remainder(360)).neg()
    cosine, sine = torch.cos(radians).round(decimals=15), torch.sin(radians).round(decimals=15)
    middle_x, middle_y = width / 2, height / 2
    x = cosine * -middle_x + sine * -middle_y + middle_x
    y = sine * middle_x + cosine * -middle_y + middle_y
    return torch.stack([cosine, sine, x, -sine, cosine, y], dim=1)


def shear_x(images: Images, slope: Factors) -> Images:
    """Return images whose row y is moved left by ``slope`` times y pixels."""
    return affine(images, unit_maps(slope, "shear_x"))


def shear_y(images: Images, slope: Factors) -> Images:
    """Return images whose column x is moved up by ``slope`` times x pixels."""
    return affine(images, unit_maps(slope, "shear_y"))


def translate_x(images: Images, shift: Factors) -> Images:
    """Return images moved left by ``shift`` pixels, to the nearest pixel."""
    return affine(images, unit_maps(shift, "translate_x"))


def translate_y(images: Images, shift: Factors) -> Images:
    """Return images moved up by ``shift`` pixels, to the nearest pixel."""
    return affine(images, unit_maps(shift, "translate_y"))


PLACES = {"shear_x": 1, "translate_x": 2, "shear_y": 3, "translate_y": 5}
"""The coefficient of a map that each operation is."""


def unit_maps(value: Factors, name: str) -> Maps:
    """Return maps that leave everything where it is, but for the coefficient that the operation ``name`` is."""
    maps = constant((1.0, 0, 0, 0, 1, 0), value.device, dtype=torch.float64).repeat(len(value), 1)
    maps[:, PLACES[name]] = value.double()
    return maps


def affine(images: Images, maps: Maps) -> Images:
    """Return images whose pixel (x, y) is the input's at (a x + b y + c, d x + e y + f), for maps (a, b, c, d, e, f).

    Where b and d are 0, a and e must be 1: there Pillow does not use fixed point, and a shift is all we need.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = maps.unbind(1)
    straight = (b == 0) & (d == 0)
    c, f = c + a / 2 + b / 2, f + d / 2 + e / 2
    x = _fixed_point(torch.where(straight, c.floor(), c), a, b, height, width)
    y = _fixed_point(torch.where(straight, f.floor(), f), d, e, height, width)
    near_x, near_y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    inside = ((near_x == x) & (near_y == y)).float()
    return _pick(images, (near_y * width + near_x).long()).mul_(inside.unsqueeze(1))


def _fixed_point(
    start: Tensor, by_x: Tensor, by_y: Tensor, height: int, width: int
) -> Int[Tensor, "batch height width"]:
    """Return whole coordinates ``start + by_x x + by_y y``, each coefficient rounded to 1/65536."""
    start, by_x, by_y = ((v * _FIXED_ONE + 0.5).floor().int().view(-1, 1, 1) for v in (start, by_x, by_y))
    columns = torch.arange(width, dtype=torch.int32, device=start.device)
    rows = torch.arange(height, dtype=torch.int32, device=start.device).view(-1, 1)
    return ((start + by_y * rows) + by_x * columns) >> 16


def _pick(
    images: Images, index: Int[Tensor, "batch out_height out_width"]
) -> Resized:
    """Return for each output pixel the input pixel that ``index`` (row times width plus column) names."""
    batch, _, height, width = images.shape
    flat = images.reshape(batch, 3, height * width)
    picked = flat.gather(2, index.flatten(1).unsqueeze(1).expand(batch, 3, index.shape[1] * index.shape[2]))
    return picked.view(batch, 3, *index.shape[1:])
