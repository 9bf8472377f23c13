"""Operations of all images at once, so that no step depends on which image has which: a CUDA graph can hold them.

Sorting images by their operations, as `phyla.images.augment.apply_operations` does, is the least work, but the host
must know how many have each operation. Here every image goes through every pass. It takes few, because an operation is
one of three things, and each of them can do nothing to an image:

* an affine map; the identity leaves every pixel where it is;
* a blend with another image; with the factor 1 what was subtracted is added again, exactly in whole numbers;
* a table of what becomes of each value; 0 to 255 leaves them.

The hue is a fourth, as its way to 8-bit HSV and back loses colors: it is made for all images and taken for some. The
views are those of the sorted way, bit for bit.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from phyla.images import geometry
from phyla.images import operations as pixelwise
from phyla.images.operations import Factors, Images

Chosen = Mapping[str, Bool[Tensor, " batch"]]  # which images have each operation


def apply_operations(
    images: Images, ids: Int[Tensor, "batch n_operations"], magnitudes: Float[Tensor, "batch n_operations"], *,
    operations: Sequence[str],
) -> Images:
    """Return what becomes of ``images`` by their own operations, first column first.

    Parameters
    ----------
    ids : places in ``operations``, -1 for none; on the device of the images
    """
    for column, magnitude in zip(ids.unbind(1), magnitudes.unbind(1), strict=True):
        chosen = {name: column == place for place, name in enumerate(operations)}
        for change in (_moved, _blended, _looked_up, _turned):
            images = change(images, chosen, magnitude)
    return images


def _moved(images: Images, chosen: Chosen, magnitude: Factors) -> Images:
    names = [name for name in chosen if name == "rotate" or name in geometry.PLACES]
    if not names:
        return images
    maps = geometry.unit_maps(torch.zeros_like(magnitude), "translate_x")
    for name in names:
        own = (geometry.rotation(magnitude, *images.shape[2:]) if name == "rotate"
               else geometry.unit_maps(magnitude, name))
        maps = torch.where(chosen[name].unsqueeze(1), own, maps)
    return geometry.affine(images, maps)


def _blended(images: Images, chosen: Chosen, magnitude: Factors) -> Images:
    names = [name for name in ("brightness", "contrast", "color", "sharpness") if name in chosen]
    if not names:
        return images
    grey = pixelwise.luma(images) if {"contrast", "color"} & chosen.keys() else None
    other, factor = torch.zeros((), device=images.device), torch.ones_like(magnitude)
    for name in names:
        if grey is not None and name in ("contrast", "color"):
            degenerate = grey if name == "color" else pixelwise.mean_luma(grey)
            other = torch.where(_each(chosen[name]), degenerate, other)
        elif name == "sharpness":
            other = torch.where(_each(chosen[name]), pixelwise.smooth(images), other)
        factor = torch.where(chosen[name], magnitude, factor)
    return pixelwise.blend(other, images, factor)


def _looked_up(images: Images, chosen: Chosen, magnitude: Factors) -> Images:
    names = [name for name in ("autocontrast", "equalize", "solarize", "posterize") if name in chosen]
    if not names:
        return images
    levels = torch.arange(256.0, device=images.device).expand(len(images), 3, 256)
    table = levels
    for name in names:
        match name:
            case "autocontrast":
                own = pixelwise.autocontrast_table(images)
            case "equalize":
                own = pixelwise.equalize_table(images)
            case _:
                change = pixelwise.solarize if name == "solarize" else pixelwise.posterize
                own = change(levels.unsqueeze(2), magnitude).squeeze(2)
        table = torch.where(chosen[name].view(-1, 1, 1), own, table)
    return pixelwise.look_up(images, table)


def _turned(images: Images, chosen: Chosen, magnitude: Factors) -> Images:
    if "hue" not in chosen:
        return images
    return torch.where(_each(chosen["hue"]), pixelwise.adjust_hue(images, magnitude), images)


def _each(chosen: Bool[Tensor, " batch"]) -> Bool[Tensor, "batch 1 1 1"]:
    return chosen.view(-1, 1, 1, 1)
