"""Crops, resizing and affine maps against Pillow and torchvision, image by image."""

import pytest
import torch
import torchvision.transforms.functional as reference
from pictures import assert_agree, from_pil, pictures, resized_crop, to_pil
from PIL import Image

from phyla.images import geometry
from phyla.images.operations import to_float

SIZES = [(32, 32), (96, 96), (8, 8), (20, 33), (1, 1)]


def sheared(a, b, c, d, e, f):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


AFFINE = {
    "rotate": (lambda v: lambda image: image.rotate(v),
               [-41, -30, -29.97, -13.2, -1, -0.01, 0, 0.3, 7, 22.5, 30, 41, 45, 90, 180, 270, 361]),
    "shear_x": (lambda v: sheared(1, v, 0, 0, 1, 0), [-0.27, -0.1, -0.04, -1e-4, 0, 0.013, 0.1, 0.27, 2]),
    "shear_y": (lambda v: sheared(1, 0, 0, v, 1, 0), [-0.27, -0.1, -0.04, -1e-4, 0, 0.013, 0.1, 0.27, 2]),
    "translate_x": (lambda v: sheared(1, 0, v, 0, 1, 0), [-25, -8, -3.2, -0.5, -0.49, 0, 0.49, 0.5, 1.51, 3, 8, 99]),
    "translate_y": (lambda v: sheared(1, 0, 0, 0, 1, v), [-25, -8, -3.2, -0.5, -0.49, 0, 0.49, 0.5, 1.51, 3, 8, 99]),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_maps_take_the_pixels_that_pillow_takes(name, size):
    make, magnitudes = AFFINE[name]
    pixels = pictures(*size)[:10]
    images = pixels.repeat(len(magnitudes), 1, 1, 1)
    values = torch.tensor(magnitudes, dtype=torch.float32).repeat_interleave(len(pixels))
    theirs = from_pil([make(float(v))(image) for image, v in zip(to_pil(images), values, strict=True)])
    given = to_float(images)
    kept = given.clone()
    assert_agree(getattr(geometry, name)(given, values), theirs, within=255, equal=1)
    assert torch.equal(given, kept)


def test_rotate_by_random_angles():
    pixels = pictures(32, 32)[:8].repeat(40, 1, 1, 1)
    angles = torch.rand(len(pixels), generator=torch.Generator().manual_seed(0)) * 90 - 45
    theirs = from_pil([image.rotate(float(a)) for image, a in zip(to_pil(pixels), angles, strict=True)])
    assert_agree(geometry.rotate(to_float(pixels), angles), theirs, within=255, equal=0.9995)


def boxes(height, width, n, seed=0):
    """Return ``n`` boxes inside an image, from single pixels to the whole."""
    rand = torch.rand(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sides = (1 + rand[:, :2] * torch.tensor([height, width])).long()
    corner = (rand[:, 2:] * (torch.tensor([height + 1, width + 1]) - sides)).long()
    found = torch.cat([corner, sides], dim=1)
    found[0] = torch.tensor([0, 0, height, width])
    return found


@pytest.mark.parametrize(("stored", "size"), [
    ((32, 32), (32, 32)), ((96, 96), (96, 96)), ((96, 96), (32, 32)), ((8, 8), (8, 8)), ((20, 33), (24, 24)),
    ((8, 8), (32, 32)), ((100, 37), (8, 8)), ((50, 60), (17, 31)), ((1, 1), (5, 5)),
])
def test_resized_crop_is_pillows(stored, size):
    pixels = pictures(*stored).repeat(4, 1, 1, 1)
    found = boxes(*stored, len(pixels))
    flip = torch.arange(len(pixels)) % 3 == 0
    by_rows, library = [], []
    for image, (top, left, height, width), mirror in zip(to_pil(pixels), found.tolist(), flip, strict=True):
        view = resized_crop(image, [top, left, height, width], size)
        by_rows.append(reference.hflip(view) if mirror else view)
        view = reference.resized_crop(image, top, left, height, width, list(size))
        library.append(reference.hflip(view) if mirror else view)
    ours = geometry.resized_crop(pixels, found, size=size, flip=flip)
    assert_agree(ours, from_pil(by_rows), equal=0.9999)
    enlarges = stored[0] <= size[0]
    assert_agree(ours, from_pil(library), equal=0.9999 if enlarges else 0.85)


def test_resized_crop_without_change_is_the_image():
    pixels = pictures(32, 32)
    whole = torch.tensor([0, 0, 32, 32]).repeat(len(pixels), 1)
    assert torch.equal(geometry.resized_crop(pixels, whole, size=(32, 32)), to_float(pixels))
    mirrored = geometry.resized_crop(pixels, whole, size=(32, 32), flip=torch.ones(len(pixels), dtype=torch.bool))
    assert torch.equal(mirrored, to_float(pixels).flip(3))


@pytest.mark.parametrize(("stored", "short"), [((8, 8), 32), ((20, 33), 32), ((61, 40), 96), ((90, 70), 32)])
def test_resize_by_the_shorter_side(stored, short):
    pixels = pictures(*stored)
    theirs = from_pil([reference.resize(image, short) for image in to_pil(pixels)])
    enlarges = min(stored) <= short
    ours = geometry.resize(pixels, size=geometry.resized_size(*stored, short))
    assert_agree(ours, theirs, equal=0.9999 if enlarges else 0.85)


def test_fitted_size_only_enlarges():
    assert geometry.fitted_size(40, 60, 32) == (40, 60)
    assert geometry.fitted_size(32, 32, 32) == (32, 32)
    assert geometry.fitted_size(20, 33, 32) == (32, 52)
    assert geometry.fitted_size(33, 20, 32) == (52, 32)


@pytest.mark.parametrize("stored", [(32, 32), (33, 35), (34, 37), (40, 32), (256, 256)])
def test_center_crop_is_torchvisions(stored):
    pixels = pictures(*stored)[:3]
    theirs = from_pil([reference.center_crop(image, 32) for image in to_pil(pixels)])
    box = torch.tensor(geometry.center_box(*stored, 32)).repeat(len(pixels), 1)
    assert torch.equal(geometry.crop(to_float(pixels), box, size=32), theirs)


def test_crop_takes_and_mirrors_each_box():
    pixels = pictures(40, 50)
    n = len(pixels)
    tops, lefts = torch.arange(n) % 9, torch.arange(n) * 3 % 19
    found = torch.stack([tops, lefts, torch.full((n,), 32), torch.full((n,), 32)], dim=1)
    flip = torch.arange(n) % 2 == 0
    theirs = []
    for image, (top, left, _, _), mirror in zip(to_pil(pixels), found.tolist(), flip, strict=True):
        view = reference.crop(image, top, left, 32, 32)
        theirs.append(reference.hflip(view) if mirror else view)
    assert torch.equal(geometry.crop(to_float(pixels), found, size=32, flip=flip), from_pil(theirs))


@pytest.mark.parametrize("name", AFFINE)
def test_no_images(name):
    assert getattr(geometry, name)(torch.zeros(0, 3, 8, 9), torch.zeros(0)).shape == (0, 3, 8, 9)


def test_resized_crop_of_no_images():
    empty = torch.zeros(0, 9, 8, 3, dtype=torch.uint8)
    assert geometry.resized_crop(empty, torch.zeros(0, 4, dtype=torch.int64), size=(5, 6)).shape == (0, 3, 5, 6)
