"""What becomes of pixel values: batched operations that give what Pillow gives, each image by its own magnitude.

Every function takes ``images``, float32 ``(batch, 3, height, width)`` holding the whole numbers 0 to 255 in RGB, and
for each image one magnitude; it returns new images of the same kind on the same device and changes nothing in place.
Each intermediate value is rounded or truncated where Pillow does it on 8-bit images, so the results agree with
Pillow's, most of them on every pixel. No image influences another.

Choices are written as arithmetic on whole numbers, not as ``torch.where``: on a CPU that is thirty times faster.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]
Factors = Float[Tensor, " batch"]
Table = Float[Tensor, "batch 3 256"]  # what becomes of each value of each channel

_RED, _GREEN, _BLUE, _HALF, _ONE = 19595.0, 38470.0, 7471.0, 32768.0, 65536.0  # ITU-R 601 luma in 16-bit fixed point


def constant(
    values: Sequence[float], device: torch.device | str, *, dtype: torch.dtype = torch.float32
) -> Shaped[Tensor, " n"]:
    """Return ``values`` on ``device``, copied there once and kept: nobody may change them.

    A copy from the host makes a GPU wait, and inside a CUDA graph it cannot be made at all.
    """
    return _constant(tuple(values), torch.device(device), dtype)


@lru_cache(maxsize=256)
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
    # All partial sums are whole numbers below 2**24: exact in float32.
    return (red * _RED).add_(green * _GREEN).add_(blue * _BLUE).add_(_HALF).div_(_ONE).floor_()


def greyscale(images: Images) -> Images:
    """Return grey images of three equal channels."""
    return luma(images).expand_as(images).contiguous()


def brightness(images: Images, factor: Factors) -> Images:
    """Return images between black (factor 0) and themselves (1); above 1 brighter."""
    return blend(torch.zeros((), device=images.device), images, factor)


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
    """Return hue, saturation, value, each (batch, 1, height, width), 0 to 255 and truncated; a grey's hue is any."""
    red, green, blue = images.chunk(3, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    spread = value - least
    middle = (red + green).add_(blue).sub_(value).sub_(least)
    is_red = (red - value).add_(1).clamp_(min=0)
    is_green = (green - value).add_(1).clamp_(min=0).mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    # The hue lies ``distance`` (0 to 1) beside that of the largest channel (0, 2 or 4), on the side of the middle one.
    # Pillow rounds to float32 after each of these lines and calculates within them in float64; so do we.
    distance = 1 - (value - middle).div_(spread.clamp(min=1)).double()
    side = is_red.mul_(green - blue).addcmul_(is_green, blue - red).addcmul_(is_blue, red - green).sign_()
    sextant = distance.mul_(side).add_(is_green, alpha=2).add_(is_blue, alpha=4).float()
    turn = sextant.double().div_(6).add_(1).frac_().float()
    hue = turn.double().mul_(255).floor_().float()
    saturation = (spread / value.clamp(min=1)).double().mul_(255).floor_().float()
    return hue, saturation, value


def _from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Images:
    """Return RGB images from 8-bit hue, saturation and value."""
    # A channel is ``value`` less a share of the saturation; over the circle the share is a trapezium, the same for
    # each channel but a third of a turn later. In units of 1/255 every number here is whole and below 2**24.
    later = constant((0.0, 510.0, 1020.0), hue.device).view(1, 3, 1, 1)
    share = (hue * 6 - later).abs_().sub_(765).abs_().neg_().add_(510).clamp_(0, 255)
    return share.mul_(saturation).neg_().add_(65025).mul_(value).div_(65025).add_(0.5).floor_()


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
