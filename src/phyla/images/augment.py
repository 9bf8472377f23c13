"""Views of images: what is drawn for each image, and recipes that draw and apply it on the device of the pixels.

A view is made in two steps. ``Views.draw`` takes from a generator everything random, one row an image; ``Views.render``
applies it and draws nothing. The generator may live on the CPU while the pixels are on a GPU: the views are then those
a CPU would make, and no step waits for the GPU.

The strong views are those of SCAN (van Gansbeke et al. 2020, authors' code), the contrastive ones SimCLR's as SCAN
used them (no blur), and ``ruc_*`` those of RUC (Park et al. 2021, authors' code).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from phyla.errors import InputError, nearest
from phyla.images import draws, geometry, passes
from phyla.images import operations as pixelwise
from phyla.images.draws import JITTER
from phyla.images.operations import Factors, Images, constant, fill_box, normalize, to_float
from phyla.images.threads import in_threads

Kind = Literal["plain", "weak", "simclr", "strong", "ruc_weak", "ruc_strong"]

Operation = Callable[[Images, Factors], Images]

OPERATIONS: Mapping[str, Operation] = {
    "identity": lambda images, _: images,
    "autocontrast": lambda images, _: pixelwise.autocontrast(images),
    "equalize": lambda images, _: pixelwise.equalize(images),
    "rotate": geometry.rotate,
    "solarize": pixelwise.solarize,
    "color": pixelwise.color,
    "contrast": pixelwise.contrast,
    "brightness": pixelwise.brightness,
    "sharpness": pixelwise.sharpness,
    "shear_x": geometry.shear_x,
    "shear_y": geometry.shear_y,
    "translate_x": geometry.translate_x,
    "translate_y": geometry.translate_y,
    "posterize": pixelwise.posterize,
    "hue": pixelwise.adjust_hue,
}
"""Each operation by name: images and one magnitude an image to images."""

STRONG = tuple(name for name in OPERATIONS if name != "hue")
"""The fourteen operations of the strong views of SCAN and of RUC."""

# Values worked on together. Temporaries above half a megabyte cost a CPU its cache and a page fault a page, which makes
# an operation two to five times slower; a GPU is only limited by its memory.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 17, 1 << 26
# Values that one thread makes views of at a time: many enough that some images drew the same operation.
_CPU_SHARE = 1 << 20


Maker = Callable[[Tensor], None]


class Draws(NamedTuple):
    """Everything random about a batch of views, one row a view.

    Parameters
    ----------
    box : int64 (batch, 4), top, left, height, width of the crop in pixels
    flip : bool (batch,), mirrored left to right after the crop
    ids : int64 (batch, n_operations), places in the kind's tuple of operations, in order; -1 for none
    magnitudes : float32 (batch, n_operations), in the unit of the operation
    grey : bool (batch,), made grey after the operations
    hole : int64 (batch, 4), top, bottom, left, right of the filled box; empty where bottom <= top or right <= left
    """

    box: Int[Tensor, "batch 4"]
    flip: Bool[Tensor, " batch"]
    ids: Int[Tensor, "batch n_operations"]
    magnitudes: Float[Tensor, "batch n_operations"]
    grey: Bool[Tensor, " batch"]
    hole: Int[Tensor, "batch 4"]

    def to(self, device: torch.device, *, ids: torch.device) -> "Draws":
        """Return the draws on ``device``, but ``ids`` on their own: the CPU where the host sorts by them."""
        to_gpu = device.type != "cpu"
        return Draws(*(t.to(ids) if t is self.ids else t.to(device, non_blocking=to_gpu) for t in self))

    def part(self, rows: slice | Tensor) -> "Draws":
        """Return the draws of ``rows``."""
        return Draws(*(t[rows] for t in self))


class Changes(NamedTuple):
    """Operations that follow each other: ``ids`` are places in ``names``, -1 for none, and magnitudes are theirs."""

    names: tuple[str, ...]
    ids: Int[Tensor, "batch n_operations"]
    magnitudes: Float[Tensor, "batch n_operations"]


def apply_operations(
    images: Images, ids: Int[Tensor, "batch n_operations"], magnitudes: Float[Tensor, "batch n_operations"], *,
    operations: Sequence[str],
) -> Images:
    """Return ``images``, changed in place by their own operations, first column first.

    Images of one operation are treated together.

    Parameters
    ----------
    ids : places in ``operations``, -1 for none; best on the CPU, which sorts by them
    magnitudes : on the device of the images
    """
    at_once = _rows_at_once(images.shape[2] * images.shape[3], images.device)
    for column, magnitude in zip(ids.cpu().unbind(1), magnitudes.unbind(1), strict=True):
        order = column.argsort(stable=True)
        counts = torch.bincount(column + 1, minlength=len(operations) + 1).tolist()
        groups = order.split_with_sizes(counts)[1:]
        for change, group in zip((OPERATIONS[name] for name in operations), groups, strict=True):
            for start in range(0, len(group), at_once):
                _change(images, group[start : start + at_once], magnitude, change)
    return images


def _change(images: Images, rows: Int[Tensor, " some"], magnitude: Factors, change: Operation) -> None:
    """Change the images of ``rows``, which rise, in place."""
    first, n = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
    if n and int(rows[-1]) == first + n - 1:  # neighbors need not be brought together
        images[first : first + n] = change(images[first : first + n], magnitude[first : first + n])
    elif n:
        rows = rows.to(images.device, non_blocking=True)
        images.index_copy_(0, rows, change(images.index_select(0, rows), magnitude.index_select(0, rows)))


def _rows_at_once(area: int, device: torch.device) -> int:
    """Return how many images of ``area`` pixels to work on together."""
    return max(1, (_CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK) // (3 * area))


@dataclass(frozen=True)
class Views:
    """A recipe of views: plain values, so that it can be stored, compared and changed by name.

    Parameters
    ----------
    kind : ``plain`` and ``weak`` are the central square, nothing random; ``simclr`` a resized crop, flip, color jitter
        and grey; ``strong`` a flip, a crop without resizing, ``n_operations`` operations and a hole of the mean color;
        ``ruc_weak`` a resized crop and flip; ``ruc_strong`` besides ``n_operations`` different operations, each with
        probability one half, and a grey square
    size : side of a view in pixels; where a crop does not resize, smaller images are enlarged to it by the short side
    mean, std : of each channel on the scale 0 to 1; a view is ``(pixels / 255 - mean) / std``
    crop_scale, crop_ratio : share of the area, and width over height, of a resized crop
    flip : probability of a mirror image; 0 where left and right mean something, as in digits
    jitter : probability of color jitter, all parts together
    brightness, contrast, saturation, hue : strengths of color jitter
    grey : probability of a grey view
    n_operations : operations a view; None for the published 4 (``strong``) and 2 (``ruc_strong``)
    operations : names drawn from, the fourteen of ``STRONG`` by default
    rotate : largest angle of the strong views, degrees
    shear : largest slope of the strong views
    translate : largest shift of the strong views, as a share of the side
    cutout : longest side of the hole of the strong views, side of the grey square, pixels; 0 for none
    level : of RUC's magnitudes, 1 to 10; 1 as published
    """

    kind: Kind
    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.2
    n_operations: int | None = None
    operations: tuple[str, ...] = STRONG
    rotate: float = 30.0
    shear: float = 0.1
    translate: float = 0.1
    cutout: int = 16
    level: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"no views of kind {self.kind!r}", nearest(str(self.kind), list(get_args(Kind))))
        for name in self.operations:
            if name not in STRONG:
                raise InputError(f"no operation {name!r} for views", nearest(str(name), list(STRONG)))
        for fault in self._faults():
            raise InputError(f"views cannot be made with {fault}")

    def _faults(self) -> Iterator[str]:
        if self.size < 1:
            yield f"size={self.size}: at least 1 pixel"
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            yield f"mean={self.mean}, std={self.std}: three numbers each, std above 0"
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            yield f"crop_scale={self.crop_scale}: least and largest share of the area, above 0 and at most 1"
        if len(self.crop_ratio) != 2 or not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            yield f"crop_ratio={self.crop_ratio}: least and largest width over height, above 0"
        for name in ("flip", "jitter", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name}={getattr(self, name)}: a probability, 0 to 1"
        for name in ("brightness", "contrast", "saturation", "rotate", "shear", "translate", "cutout"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)}: at least 0"
        if not 0 <= self.hue <= 0.5:
            yield f"hue={self.hue}: 0 to 0.5 of the color circle"
        if not 1 <= self.level <= 10:
            yield f"level={self.level}: 1 to 10"
        if len(set(self.operations)) < len(self.operations):
            yield f"operations={self.operations}: each name once"
        allowed = {"strong": math.inf if self.operations else 0, "ruc_strong": len(self.operations)}
        if not 0 <= self._n_operations <= allowed.get(self.kind, math.inf):
            yield f"n_operations={self._n_operations} drawn from {len(self.operations)} operations"

    @property
    def _n_operations(self) -> int:
        return {"ruc_strong": 2}.get(self.kind, 4) if self.n_operations is None else self.n_operations

    @property
    def resizes(self) -> bool:
        """Whether a view shows a part of the image enlarged or reduced, rather than cut out as it is."""
        return self.kind in ("simclr", "ruc_weak", "ruc_strong")

    def plain(self) -> "Views":
        """Return the recipe of the central square, nothing random, of the same size and normalization."""
        return Views(kind="plain", size=self.size, mean=self.mean, std=self.std)

    def __call__(
        self, pixels: UInt8[Tensor, "batch height width 3"], generator: torch.Generator, *,
        total: int | None = None, start: int = 0, static: bool | None = None,
    ) -> Float[Tensor, "batch 3 size size"]:
        """Return one normalized view of each image, on the device of the pixels.

        Parameters
        ----------
        generator : on the device of the pixels, or on the CPU
        total, start : the pixels are the images from ``start`` on of a batch of ``total``, all that are given when
            None. What is random is drawn for the whole batch, so parts give the views that the whole gives.
        static : whether nothing may depend on what was drawn but values, so that a CUDA graph can hold the work; None
            for where the generator is not on the CPU. The views are the same.
        """
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != torch.uint8 or 0 in pixels.shape[1:3]:
            given = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise InputError(f"views are made of uint8 (batch, height, width, 3), at least 1 x 1, got {given}")
        total = len(pixels) if total is None else total
        if not 0 <= start <= total - len(pixels):
            raise InputError(f"a batch of total={total} images has none {start} to {start + len(pixels) - 1}",
                             "start + len(pixels) is at most total")
        static = generator.device.type != "cpu" if static is None else static

        def drawn(total: int) -> Draws:
            every = self.draw(total, generator, height=pixels.shape[1], width=pixels.shape[2])
            return every.part(slice(start, start + len(pixels)))

        sorts_here = pixels.device.type == "cpu" and not static
        return self.render(pixels, in_threads(drawn, [total])[0] if sorts_here else drawn(total), static=static)

    def draw(self, batch: int, generator: torch.Generator, *, height: int, width: int) -> Draws:
        """Return everything random about ``batch`` views of images of ``height`` and ``width``.

        Where a crop does not resize, its box lies in the image enlarged as `geometry.fitted_size` says.
        """
        box = self._draw_box(batch, generator, height=height, width=width)
        none = torch.zeros_like(box)
        never = none[:, 0].bool()
        drawn = Draws(box, never, ids=none[:, :0], magnitudes=none[:, :0].float(), grey=never, hole=none)
        if self.kind in ("plain", "weak"):
            return drawn
        drawn = drawn._replace(flip=draws.chance(batch, self.flip, generator))
        if self.kind == "simclr":
            ids, magnitudes = draws.jitter(batch, generator, probability=self.jitter, brightness=self.brightness,
                                           contrast=self.contrast, saturation=self.saturation, hue=self.hue)
            return drawn._replace(ids=ids, magnitudes=magnitudes, grey=draws.chance(batch, self.grey, generator))
        return drawn if self.kind == "ruc_weak" else self._draw_operations(drawn, generator)

    def _draw_box(self, batch: int, generator: torch.Generator, *, height: int, width: int) -> Int[Tensor, "batch 4"]:
        if self.resizes:
            return draws.resized_crop(batch, generator, height=height, width=width, scale=self.crop_scale,
                                      ratio=self.crop_ratio)
        height, width = geometry.fitted_size(height, width, self.size)
        if self.kind == "strong":
            return draws.crop(batch, generator, height=height, width=width, size=self.size)
        center = geometry.center_box(height, width, self.size)
        return constant(center, generator.device, dtype=torch.int64).repeat(batch, 1)

    def _draw_operations(self, drawn: Draws, generator: torch.Generator) -> Draws:
        batch, size, n = len(drawn.flip), self.size, self._n_operations
        if self.kind == "strong":
            ids, magnitudes = draws.operations(batch, generator, n_operations=n, ranges=self.ranges())
        else:
            ids, magnitudes = draws.ruc_operations(batch, generator, names=self.operations, n_operations=n,
                                                   level=self.level, size=size)
        drawn = drawn._replace(ids=ids, magnitudes=magnitudes)
        if not self.cutout:
            return drawn
        hole = draws.cutout if self.kind == "strong" else draws.grey_square
        return drawn._replace(hole=hole(batch, generator, size=size, side=self.cutout))

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Return the magnitudes that the strong views draw from, uniformly, of each of ``operations``."""
        shift, weaker = self.translate * self.size, (0.05, 0.95)
        ranges = {
            "rotate": (-self.rotate, self.rotate), "shear_x": (-self.shear, self.shear),
            "shear_y": (-self.shear, self.shear), "translate_x": (-shift, shift), "translate_y": (-shift, shift),
            "solarize": (0.0, 256.0), "posterize": (4.0, 8.0), "color": weaker, "contrast": weaker,
            "brightness": weaker, "sharpness": weaker,
        }
        return {name: ranges.get(name, (0.0, 0.0)) for name in self.operations}

    def render(
        self, pixels: UInt8[Tensor, "batch height width 3"], drawn: Draws, *, static: bool = False
    ) -> Float[Tensor, "batch 3 size size"]:
        """Return the normalized views that ``drawn`` describes; ``static`` as when called."""
        device, batch = pixels.device, len(pixels)
        images = torch.empty(batch, 3, self.size, self.size, device=device)
        drawn = drawn.to(device, ids=device if static else torch.device("cpu"))
        if static or device.type != "cpu":
            make, at_once = self._maker(pixels, drawn, images, passes.apply_operations if static else apply_operations)
            for start in range(0, batch, at_once):
                make(torch.arange(start, min(start + at_once, batch), device=device))
            return images

        def prepared(n_threads: int) -> tuple[Maker, list[Tensor]]:
            # Images of the same operations lie together, and each share has as many of them as any other.
            n_shares = max(n_threads, 3 * max(pixels[0, ..., 0].numel(), self.size**2) * batch // _CPU_SHARE, 1)
            order = _order(self._steps(drawn), batch)
            shares = [order[first::n_shares].contiguous() for first in range(min(batch, n_shares))]
            return self._maker(pixels, drawn, images, apply_operations)[0], shares

        if batch:
            in_threads(*in_threads(prepared, [torch.get_num_threads()])[0])
        return images

    def _maker(
        self, pixels: UInt8[Tensor, "batch height width 3"], drawn: Draws,
        images: Float[Tensor, "batch 3 size size"], apply: Callable[..., Images],
    ) -> tuple[Maker, int]:
        """Return what makes the views of some rows and puts them into ``images``, and how many fit a block."""
        crop, steps = self._crop(drawn, pixels.shape[1], pixels.shape[2]), self._steps(drawn)
        at_once = _rows_at_once(max(pixels.shape[1] * pixels.shape[2], self.size**2), pixels.device)

        def make(rows: Int[Tensor, " some"]) -> None:
            made = torch.empty(len(rows), *images.shape[1:], device=images.device)
            blocks = [slice(start, start + at_once) for start in range(0, len(rows), at_once)]
            for block in blocks:
                made[block] = crop(pixels.index_select(0, rows[block]), rows[block])
            for names, ids, magnitudes in steps:
                made = apply(made, ids[rows], magnitudes[rows], operations=names)
            for block in blocks:
                images.index_copy_(0, rows[block], self._finished(made[block], drawn.hole[rows[block]]))

        return make, at_once

    def _steps(self, drawn: Draws) -> list[Changes]:
        """Return the operations of views in the order in which they act."""
        if self.kind != "simclr":
            return [Changes(self.operations, drawn.ids, drawn.magnitudes)] if drawn.ids.shape[1] else []
        # The hue is most of the work, so it is turned once, of all images together, with the rest before or after. Of
        # an image without it, the last column is after.
        ids, magnitudes = drawn.ids, drawn.magnitudes
        is_hue = ids == len(JITTER) - 1
        seen = is_hue.int().cumsum(1) > 0
        seen[:, -1] = True
        hue = torch.where(is_hue.any(1, keepdim=True), 0, -1)
        turn = (magnitudes * is_hue).sum(1, keepdim=True)
        grey = torch.where(drawn.grey.to(ids.device), 0, -1).unsqueeze(1)
        return [
            Changes(JITTER[:-1], torch.where(seen, -1, ids)[:, :-1], magnitudes[:, :-1]),
            Changes(JITTER[-1:], hue, turn),
            Changes(JITTER[:-1], torch.where(seen & ~is_hue, ids, -1)[:, 1:], magnitudes[:, 1:]),
            Changes(("color",), grey, torch.zeros_like(turn)),  # of factor 0: grey
        ]

    def _crop(self, drawn: Draws, height: int, width: int) -> Callable[[Tensor, slice | Tensor], Tensor]:
        """Return what makes float images of stored pixels and of their rows in ``drawn``."""
        if self.resizes:
            across, down = geometry.crop_lines(drawn.box, (height, width), (self.size, self.size), flip=drawn.flip)
            return lambda pixels, rows: geometry.resample(pixels, (across.part(rows), down.part(rows)))
        fitted = geometry.fitted_size(height, width, self.size)

        def cut(pixels: UInt8[Tensor, "batch height width 3"], rows: slice | Tensor) -> geometry.Resized:
            images = to_float(pixels) if fitted == (height, width) else geometry.resize(pixels, size=fitted)
            return geometry.crop(images, drawn.box[rows], size=self.size, flip=drawn.flip[rows])

        return cut

    def _finished(self, images: Images, hole: Int[Tensor, "batch 4"]) -> Float[Tensor, "batch 3 size size"]:
        if self.kind == "ruc_strong":
            images = fill_box(images, hole, value=127.0)
        images = normalize(images, mean=self.mean, std=self.std)
        return fill_box(images, hole, value=0.0) if self.kind == "strong" else images


def _order(steps: Sequence[Changes], batch: int) -> Int[Tensor, " batch"]:
    """Return the rows of a batch so that those of the same operations are neighbors."""
    key = torch.zeros(batch, dtype=torch.int64)
    for names, ids, _ in steps:
        for column in ids.unbind(1):
            key = key * (len(names) + 1) + column + 1
    return key.argsort(stable=True)


def views_from(held: Mapping[str, Any]) -> Views:
    """Return the recipe whose fields a JSON object holds, as ``dataclasses.asdict`` wrote it.

    Raises
    ------
    InputError
        A name is unknown, or a value not allowed.
    """
    known = [field.name for field in fields(Views)]
    for name in held:
        if name not in known:
            raise InputError(f"views have no option {name!r}", nearest(name, known))
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in held.items()}
    return Views(**values)
