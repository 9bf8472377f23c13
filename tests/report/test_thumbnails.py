import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from phyla.report.thumbnails import make_sheet, make_thumbnails
from phyla.types import ImageSet


def images(n, *size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    return ImageSet(pixels, [str(i) for i in range(n)])


def opened(uri):
    kind, data = uri.split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 3)])
def test_tiny_images_are_kept_pixel_by_pixel(size):
    source = images(4, *size)
    found = make_thumbnails(source, [2, 0])
    assert found.pixelated
    assert set(found.uris) == {0, 2}
    np.testing.assert_array_equal(np.asarray(opened(found.uris[2]).convert("RGB")), source.array[2])


def test_larger_images_shrink_and_keep_their_shape():
    found = make_thumbnails(images(2, 120, 240), [0])
    assert not found.pixelated
    assert opened(found.uris[0]).size == (96, 48)
    assert opened(make_thumbnails(images(1, 40, 40), [0]).uris[0]).size == (40, 40)


def test_thumbnails_fit_the_budget():
    source, rows = images(60, 96, 96), range(60)
    full = sum(len(uri) for uri in make_thumbnails(source, rows).uris.values())
    small = make_thumbnails(source, rows, budget=60_000)
    assert sum(len(uri) * 3 / 4 for uri in small.uris.values()) <= 60_000 < full


def test_no_image_gives_no_thumbnail():
    assert make_thumbnails(images(2, 40, 40), []).uris == {}


def test_pixels_may_be_a_tensor():
    source = images(3, 8, 8)
    tensor = ImageSet(torch.from_numpy(source.array), source.ids)
    assert make_thumbnails(tensor, [1]).uris == make_thumbnails(source, [1]).uris


def test_sheet_places_tiles_in_reading_order():
    source = images(70, 4, 4)
    sheet = make_sheet(source, list(range(69, -1, -1)))
    assert (sheet.columns, sheet.lines, sheet.width, sheet.height) == (60, 2, 4, 4)
    pixels = np.asarray(opened(sheet.uri))
    np.testing.assert_array_equal(pixels[4:8, 0:4], source.array[69 - 60])


def test_sheet_fits_the_budget():
    sheet = make_sheet(images(100, 64, 64), list(range(100)), budget=60_000)
    assert len(sheet.uri) * 3 / 4 < 60_000
    assert opened(sheet.uri).size == (60 * 40, 2 * 40)
