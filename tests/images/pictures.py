"""Pictures for the tests of views, and how closely two versions of one must agree."""

from functools import cache

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Return the two photographs that ship with scikit-learn, 640 x 427."""
    return tuple(Image.fromarray(image) for image in load_sample_images().images)


def pictures(height: int = 32, width: int = 32) -> torch.Tensor:
    """Return uint8 (12, height, width, 3): photographs whole and cut, digits, noise, flat and two-valued images."""
    rng = np.random.default_rng(7)
    whole = [np.asarray(photo.resize((width, height))) for photo in photographs()]
    corners = ((150, 200), (300, 90))
    cut = [np.asarray(p.crop((x, y, x + width, y + height))) for p in photographs() for x, y in corners]
    digit = Image.fromarray((load_digits().images[5] * 15.9).astype(np.uint8)).resize((width, height), Image.NEAREST)
    noise = rng.integers(0, 256, (height, width, 3))
    dull = rng.integers(100, 104, (height, width, 3))
    two = np.where(rng.random((height, width, 1)) < 0.5, 17, 230).repeat(3, axis=2)
    flat = [np.full((height, width, 3), value) for value in ((0, 0, 0), (255, 255, 255), (200, 30, 90))]
    images = [*whole, *cut, np.asarray(digit.convert("RGB")), noise, dull, two, *flat][:13]
    return torch.from_numpy(np.stack(images).astype(np.uint8))


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Return uint8 (batch, height, width, 3) as Pillow images."""
    return [Image.fromarray(image.numpy()) for image in pixels]


def from_pil(images: list[Image.Image]) -> torch.Tensor:
    """Return Pillow images as float32 (batch, 3, height, width), 0 to 255."""
    return torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2).float()


def resized_crop(image: Image.Image, box: list[int], size: tuple[int, int]) -> Image.Image:
    """Return Pillow's crop of ``box`` (top, left, height, width), resized along rows and then along columns.

    So did every Pillow before 13 in one call; 13 takes the columns first where the height shrinks a lot.
    """
    top, left, height, width = box
    view = image.crop((left, top, left + width, top + height)).resize((size[1], height), Image.BILINEAR)
    return view.resize((size[1], size[0]), Image.BILINEAR)


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor, *, within: float = 1, equal: float = 0.999) -> None:
    """Fail unless all values differ by at most ``within`` and a share of ``equal`` not at all."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs()
    assert difference.max() <= within, f"differ by {difference.max()}"
    share = (difference == 0).double().mean()
    assert share >= equal, f"only {share:.5f} are equal"
