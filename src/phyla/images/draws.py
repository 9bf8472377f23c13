"""What is random about a view: batched draws from a generator, one row an image, on the device of the generator.

Boxes are int64 in pixels. Each function takes all its numbers from ``generator`` in a fixed order, so equal generators
give equal draws.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from phyla.images.operations import constant

JITTER = ("brightness", "contrast", "color", "hue")
"""The four parts of color jitter."""

_RUC_LEVELS = {  # name: (largest, bias); level l of 10 means l * largest / 10 + bias (RUC authors' randaugment.py)
    "brightness": (0.99, 0.01), "color": (0.99, 0.01), "contrast": (0.99, 0.01), "sharpness": (0.99, 0.01),
    "posterize": (1, 8), "solarize": (256, 0), "rotate": (45, -45), "shear_x": (0.3, -0.3), "shear_y": (0.3, -0.3),
    "translate_x": (0.3, -0.3), "translate_y": (0.3, -0.3),
}
_RUC_WHOLE = ("posterize", "solarize", "rotate")
_RUC_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def _uniform(shape: tuple[int, ...], low: float | Tensor, high: float | Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _whole(n: Tensor, generator: torch.Generator) -> Tensor:
    """Return integers uniform over 0 to ``n`` - 1, each with its own ``n``."""
    fraction = torch.rand(n.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.minimum((fraction * n).long(), n - 1)


def chance(batch: int, probability: float, generator: torch.Generator) -> Bool[Tensor, " batch"]:
    """Return True with ``probability``, independently."""
    return torch.rand(batch, generator=generator, device=generator.device) < probability


def resized_crop(
    batch: int, generator: torch.Generator, *, height: int, width: int,
    scale: tuple[float, float], ratio: tuple[float, float],
) -> Int[Tensor, "batch 4"]:
    """Return boxes (top, left, height, width) of a random share of the area and a log-uniform ratio of the sides.

    Parameters
    ----------
    scale : least and largest share of the image's area
    ratio : least and largest width over height

    Notes
    -----
    As torchvision: the first of ten tries that fits into the image, else the largest central box of an allowed ratio.
    """
    tries = (batch, 10)
    area = height * width * _uniform(tries, *scale, generator)
    aspect = _uniform(tries, math.log(ratio[0]), math.log(ratio[1]), generator).exp()
    widths, heights = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)  # the first of equal values
    found = fits.any(dim=1)
    last_height, last_width = _central_box(height, width, ratio)
    box_height = torch.where(found, heights.gather(1, first).squeeze(1), last_height)
    box_width = torch.where(found, widths.gather(1, first).squeeze(1), last_width)
    top = torch.where(found, _whole(height - box_height + 1, generator), (height - last_height) // 2)
    left = torch.where(found, _whole(width - box_width + 1, generator), (width - last_width) // 2)
    return torch.stack([top, left, box_height, box_width], dim=1)


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    if width / height < ratio[0]:
        return max(1, round(width / ratio[0])), width
    if width / height > ratio[1]:
        return height, max(1, round(height * ratio[1]))
    return height, width


def crop(
    batch: int, generator: torch.Generator, *, height: int, width: int, size: int
) -> Int[Tensor, "batch 4"]:
    """Return boxes (top, left, size, size) uniform over the places inside the image."""
    places = constant((height - size + 1, width - size + 1), generator.device, dtype=torch.int64)
    corner = _whole(places.expand(batch, 2), generator)
    return torch.cat([corner, torch.full_like(corner, size)], dim=1)


def jitter(
    batch: int, generator: torch.Generator, *,
    probability: float, brightness: float, contrast: float, saturation: float, hue: float,
) -> tuple[Int[Tensor, "batch 4"], Float[Tensor, "batch 4"]]:
    """Return ids into ``JITTER`` and magnitudes: all four in random order with ``probability``, else -1.

    Factors are uniform in 1 - strength to 1 + strength (never below 0), the hue's shift in -hue to hue; a part of
    strength 0 is left out.
    """
    strengths = (brightness, contrast, saturation)
    low = constant([*(max(0.0, 1 - s) for s in strengths), -hue], generator.device)
    high = constant([*(1 + s for s in strengths), hue], generator.device)
    factors = _uniform((batch, 4), low, high, generator)
    order = torch.rand(batch, 4, generator=generator, device=generator.device).argsort(dim=1)
    acts = chance(batch, probability, generator).unsqueeze(1) & (high > low)[order]
    return torch.where(acts, order, -1), factors.gather(1, order)


def operations(
    batch: int, generator: torch.Generator, *, n_operations: int, ranges: Mapping[str, tuple[float, float]],
) -> tuple[Int[Tensor, "batch n_operations"], Float[Tensor, "batch n_operations"]]:
    """Return places in ``ranges``, uniform with replacement, and magnitudes uniform in the range of that operation.

    Posterize's magnitude is cut to whole bits: 4, 5, 6 or 7 from the range 4 to 8. (SCAN's authors flip the sign of
    some magnitudes by a coin; their ranges are symmetric, so that changes nothing and is left out.)
    """
    names, device = list(ranges), generator.device
    low, high = (constant([limits[end] for limits in ranges.values()], device) for end in (0, 1))
    ids = torch.randint(max(len(names), 1), (batch, n_operations), generator=generator, device=device)
    magnitudes = _uniform((batch, n_operations), low[ids], high[ids], generator)
    if "posterize" in ranges:
        bits = magnitudes.floor().clamp(max=math.ceil(ranges["posterize"][1]) - 1)
        magnitudes = torch.where(ids == names.index("posterize"), bits, magnitudes)
    return ids, magnitudes


def ruc_operations(
    batch: int, generator: torch.Generator, *, names: Sequence[str], n_operations: int, level: int, size: int,
) -> tuple[Int[Tensor, "batch n_operations"], Float[Tensor, "batch n_operations"]]:
    """Return places in ``names``, all different but each -1 with probability one half, and magnitudes of ``level``.

    A magnitude is fixed but for its sign: rotation, shear and translation go either way by a fair coin. A translation
    is a whole number of pixels of a view of side ``size``.
    """
    device = generator.device
    values = constant([ruc_magnitude(name, level=level, size=size) for name in names], device)
    signed = constant([name in _RUC_SIGNED for name in names], device, dtype=torch.bool)
    ids = torch.rand(batch, len(names), generator=generator, device=device).argsort(dim=1)[:, :n_operations]
    heads = torch.rand(batch, n_operations, 2, generator=generator, device=device) < 0.5
    magnitudes = torch.where(heads[..., 0] & signed[ids], -values[ids], values[ids])
    return torch.where(heads[..., 1], ids, -1), magnitudes


def ruc_magnitude(name: str, *, level: int, size: int) -> float:
    """Return the magnitude of RUC's operation ``name`` before its sign, 0 for one without."""
    largest, bias = _RUC_LEVELS.get(name, (0.0, 0.0))
    value = level * largest / 10
    value = (int(value) if name in _RUC_WHOLE else value) + bias
    if name.startswith("translate"):
        return float(int(value * size))
    return 256.0 - value if name == "solarize" else float(value)


def cutout(batch: int, generator: torch.Generator, *, size: int, side: int) -> Int[Tensor, "batch 4"]:
    """Return holes (top, bottom, left, right) about a uniform center, clipped to a square image of ``size`` pixels.

    The length is uniform over 1 to ``side`` and then cut to an even number, so that a length of 1 leaves no hole.
    """
    whole = constant((size, size, side), generator.device, dtype=torch.int64)
    y, x, length = _whole(whole.expand(batch, 3), generator).unbind(1)
    half = (length + 1) // 2
    return torch.stack([y - half, y + half, x - half, x + half], dim=1).clamp(0, size)


def grey_square(batch: int, generator: torch.Generator, *, size: int, side: int) -> Int[Tensor, "batch 4"]:
    """Return RUC's squares (top, bottom, left, right) in an image of ``size`` pixels.

    They start half a ``side`` before a uniform point but not outside, and are ``side`` + 1 long because both edges are
    drawn; at the far border they are clipped.
    """
    start = (_uniform((batch, 2), 0.0, float(size), generator) - side / 2).clamp(min=0).long()
    end = (start + side + 1).clamp(max=size)
    return torch.stack([start[:, 0], end[:, 0], start[:, 1], end[:, 1]], dim=1)
