"""What becomes of pixel values: batched operations that give what Pillow gives, each image by its own magnitude.

Every function takes ``images``, float32 ``(batch, 3, height, width)`` holding the whole numbers 0 to 255 in RGB, and
for each image one magnitude; it returns new images of the same kind on the same device and changes nothing in place.
Each intermediate value is rounded or truncated where Pillow does it on 8-bit images, so the results agree with
Pillow's, most of them on every pixel. No image influences another.

Choices are written as arithmetic on whole numbers, not as ``torch.where``: on a CPU that is thirty times faster.
"""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]
Factors = Float[Tensor, " batch"]
Table = Float[Tensor, "batch 3 256"]  # what becomes of each value of each channel

_RED, _GREEN, _BLUE = 19595 / 65536, 38470 / 65536, 7471 / 65536  # ITU-R 601 luma in 16-bit fixed point


def constant(
    values: Sequence[float], device: torch.device | str, *, dtype: torch.dtype = torch.float32
) -> Shaped[Tensor, " n"]:
    """Return ``values`` on ``device``, copied there once and kept: nobody may change them.

    A copy from the host makes a GPU wait, and inside a CUDA graph it cannot be made at all.
    """
    return _constant(tuple(values), torch.device(device), dtype)


@cache  # a recorded step knows the address: none may go
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what is made in that mode can be of no use outside of it
        return torch.tensor(values, dtype=dtype, device=device)


def to_float(pixels: UInt8[Tensor, "batch height width 3"]) -> Images:
    """Return stored pixels as images: channels first, float32, still 0 to 255."""
    # Moving bytes and then converting is ten times faster than converting while moving.
    return pixels.permute(0, 3, 1, 2).contiguous().float()


def normalize(images: Images, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
    """Return ``(images / 255 - mean) / std`` per channel."""
    scale = constant([1 / (255 * s) for s in std], images.device).view(1, 3, 1, 1)
    shift = constant([m / s for m, s in zip(mean, std, strict=True)], images.device).view(1, 3, 1, 1)
    return (images * scale).sub_(shift)


def luma(images: Images) -> Float[Tensor, "batch 1 height width"]:
    """Return the brightness of each pixel, 0 to 255, as Pillow's conversion to mode L."""
    red, green, blue = images.chunk(3, dim=1)
    # All partial sums are below 256 and whole in units of 1/65536: exact in float32.
    return (red * _RED).add_(green, alpha=_GREEN).add_(blue, alpha=_BLUE).add_(0.5).floor_()


def greyscale(images: Images) -> Images:
    """Return grey images of three equal channels."""
    return luma(images).expand_as(images).contiguous()


def brightness(images: Images, factor: Factors) -> Images:
    """Return images between black (factor 0) and themselves (1); above 1 brighter."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 255).floor_()


def contrast(images: Images, factor: Factors) -> Images:
    """Return images between the flat grey of their mean luma (factor 0) and themselves (1)."""
    return blend(mean_luma(luma(images)), images, factor)


def mean_luma(grey: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 1 1"]:
    """Return the mean of what `luma` gave, rounded half up."""
    n_pixels = grey.shape[2] * grey.shape[3]
    # The sum of a row is exact in float32, that of an image may not be; the mean is rounded half up in whole numbers.
    total = grey.sum(dim=3).sum(dim=(1, 2), dtype=torch.float64).long()
    return ((2 * total + n_pixels) // (2 * n_pixels)).float().view(-1, 1, 1, 1)


def color(images: Images, factor: Factors) -> Images:
    """Return images between grey (factor 0) and themselves (1); above 1 more saturated."""
    return blend(luma(images), images, factor)


def sharpness(images: Images, factor: Factors) -> Images:
    """Return images between smoothed (factor 0) and themselves (1); above 1 sharper."""
    return blend(smooth(images), images, factor)


def blend(degenerate: Tensor, images: Images, factor: Factors) -> Images:
    """Return images between ``degenerate`` ones (factor 0) and themselves (1), cut to whole numbers 0 to 255."""
    mixed = (images - degenerate).mul_(factor.view(-1, 1, 1, 1)).add_(degenerate)
    return mixed.clamp_(0, 255).floor_()


def smooth(images: Images) -> Images:
    """Return images under the kernel of nine ones but five in the middle, over 13; the outermost pixels stay."""
    smoothed = images.clone()
    if images.shape[2] < 3 or images.shape[3] < 3:
        return smoothed
    wide = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    box = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    smoothed[..., 1:-1, 1:-1] = box.add_(images[..., 1:-1, 1:-1], alpha=4).div_(13).add_(0.5).floor_()
    return smoothed


def solarize(images: Images, threshold: Factors) -> Images:
    """Return images whose values at or above ``threshold`` (0 to 256) are inverted."""
    inverted = (images - (threshold.ceil() - 1).view(-1, 1, 1, 1)).clamp_(0, 1)  # 0 or 1: all numbers are whole
    return torch.addcmul(images, inverted, 255 - 2 * images)


def posterize(images: Images, bits: Factors) -> Images:
    """Return images that keep the ``bits`` (1 to 8, whole) highest bits of each value; more than 8 keep all."""
    step = torch.exp2((8 - bits).clamp(min=0)).round().view(-1, 1, 1, 1)
    return (images / step).floor_().mul_(step)


def autocontrast(images: Images) -> Images:
    """Return images whose darkest value is 0 and brightest 255, each channel for itself."""
    return look_up(images, autocontrast_table(images))


def autocontrast_table(images: Images) -> Table:
    """Return what `autocontrast` makes of each value."""
    low, high = (extreme.double().unsqueeze(-1) for extreme in (images.amin((2, 3)), images.amax((2, 3))))
    # In float64 as Pillow: the truncation below turns a last-digit error into a whole step (255 into 254).
    scale = torch.full_like(low, 255).div_(high - low)  # torch makes 255 / tensor a reciprocal: rounded twice
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    table = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, table, levels).float()


def equalize(images: Images) -> Images:
    """Return images with an even histogram, each channel for itself."""
    return look_up(images, equalize_table(images))


def equalize_table(images: Images) -> Table:
    """Return what `equalize` makes of each value."""
    levels = torch.arange(256, device=images.device)
    counts = _histograms(images)
    last = counts.gather(2, torch.where(counts > 0, levels, -1).amax(2, keepdim=True)).squeeze(2)
    step = ((counts.sum(2) - last) // 255).unsqueeze(2)
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table, levels).float()


def _histograms(images: Images) -> Int[Tensor, "batch 3 256"]:
    values = _values(images)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, values, counts.new_ones(()).expand_as(values))


def look_up(images: Images, table: Table) -> Images:
    """Return images of the values that ``table`` gives for theirs."""
    return table.gather(2, _values(images)).view(images.shape)


def _values(images: Images) -> Int[Tensor, "batch 3 pixels"]:
    return images.flatten(2).long()


def adjust_hue(images: Images, shift: Factors) -> Images:
    """Return images whose hue is turned by ``shift``, -0.5 to 0.5 of the color circle."""
    hue, saturation, value = _to_hsv(images)
    # The shift is cut towards zero; then 256 steps are a full turn of 8-bit hue.
    hue.add_((shift.double() * 255).trunc().remainder(256).float().view(-1, 1, 1, 1))
    hue.sub_((hue - 255).clamp_(0, 1), alpha=256)
    return _from_hsv(hue, saturation, value)


def _to_hsv(images: Images) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue, saturation, value, each (batch, 1, height, width), 0 to 255 and truncated; a grey's hue is any.

    Pillow divides in float32, goes on in float64 and rounds to float32 after each line. What follows stays in float32
    and gives the same for each of the 2**24 colors, which a test goes through.
    """
    red, green, blue = images.chunk(3, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    spread = value - least
    # In sixths of a turn the hue is 1 + (green - red) / spread where blue is least, 3 + (blue - green) / spread where
    # red is, and 5 + (red - blue) / spread where green is: one division, and one rounding by the sum.
    no_blue = torch.eq(blue, least, out=torch.empty_like(least))  # 1 or 0; as bool it would be slow to calculate with
    no_red = torch.eq(red, least, out=torch.empty_like(least))
    no_red.addcmul_(no_red, no_blue, value=-1)
    if_green = red - blue
    side = torch.addcmul(if_green, no_blue, (green - red).sub_(if_green))
    side.addcmul_(no_red, (blue - green).sub_(if_green)).div_(spread.clamp(min=1))
    sextant = no_red.add_(no_blue, alpha=2).mul_(-2).add_(5).add_(side)
    # Between 5 and 6 Pillow counts back from a full turn, and so never falls short of a whole number as a sum may.
    beyond = (sextant - 5).clamp_(min=0)
    six = constant((6.0,), images.device)  # by a plain number a GPU does not divide, but multiplies
    hue = sextant.div_(six).mul_(255).add_(beyond, alpha=1e-3).floor_()
    saturation = spread.mul_(255).div_(value.clamp(min=1)).floor_()
    return hue, saturation, value


def _from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Images:
    """Return RGB images from 8-bit hue, saturation and value."""
    # A channel is ``value`` less a share of the saturation; over the circle the share is a trapezium, the same for
    # each channel but a third of a turn later. In units of 1/255 every number here is whole and below 2**24, up to the
    # division by 65025; multiplied instead, all quotients are cut to the same whole numbers.
    later = constant((0.0, 510.0, 1020.0), hue.device).view(1, 3, 1, 1)
    left = (hue.mul(6) - later).abs_().sub_(765).abs_().clamp_(255, 510)  # 510 less the share
    flat = 65025 - 510 * saturation
    return torch.addcmul(flat, left, saturation).mul_(value).mul_(1 / 65025).add_(0.5).floor_()


def fill_box(images: Images, box: Int[Tensor, "batch 4"], *, value: float) -> Images:
    """Return images with one rectangle each set to ``value`` in all channels.

    Parameters
    ----------
    box : int64, top, bottom, left, right in pixels; bottom and right are the first that stay. A box may reach over
        the border; one of no height or width fills nothing.
    """
    top, bottom, left, right = (edge.view(-1, 1) for edge in box.unbind(1))
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[2:])
    in_rows, in_columns = ((rows >= top) & (rows < bottom)).float(), ((columns >= left) & (columns < right)).float()
    inside = (in_rows.unsqueeze(2) * in_columns.unsqueeze(1)).unsqueeze(1)
    filled = images * (1 - inside)
    return filled.add_(inside, alpha=value) if value else filled
