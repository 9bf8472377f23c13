"""Pixel operations against Pillow and torchvision, image by image."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from pictures import assert_agree, from_pil, pictures, to_pil
from PIL import Image, ImageEnhance, ImageOps

from phyla.images import operations
from phyla.images.operations import to_float

SIZES = [(32, 32), (96, 96), (8, 8), (20, 33), (2, 5), (1, 1)]
FACTORS = [0.0, 0.05, 0.109, 0.37, 0.6, 0.8, 0.95, 1.0, 1.2, 1.4, 3.0]

ENHANCED = {
    "brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "color": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


def against_pillow(name, theirs, magnitudes, size):
    """Compare every picture under every magnitude in one batch, so that neighbors in the batch have different ones."""
    pixels = pictures(*size)
    images = pixels.repeat(len(magnitudes), 1, 1, 1)
    values = torch.tensor(magnitudes, dtype=torch.float32).repeat_interleave(len(pixels))
    expected = [theirs(image, float(value)) for image, value in zip(to_pil(images), values, strict=True)]
    given = to_float(images)
    kept = given.clone()
    assert_agree(getattr(operations, name)(given, values), from_pil(expected))
    assert torch.equal(given, kept)  # pure


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ENHANCED)
def test_enhancements(name, size):
    against_pillow(name, lambda image, factor: ENHANCED[name](image).enhance(factor), FACTORS, size)


@pytest.mark.parametrize("size", SIZES)
def test_solarize(size):
    thresholds = [0.0, 0.5, 1.0, 17.0, 17.01, 99.9, 128.0, 230.0, 231.0, 255.0, 255.5, 256.0]
    against_pillow("solarize", ImageOps.solarize, thresholds, size)


@pytest.mark.parametrize("size", SIZES)
def test_posterize(size):
    against_pillow("posterize", lambda image, bits: ImageOps.posterize(image, int(bits)), list(range(1, 9)), size)


@pytest.mark.parametrize("size", SIZES)
def test_adjust_hue(size):
    shifts = [-0.5, -0.1, -0.033, -0.003, 0.0, 0.003, 0.07, 0.1, 0.31, 0.5]
    against_pillow("adjust_hue", reference.adjust_hue, shifts, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_histogram_operations(name, size):
    pixels = pictures(*size)
    theirs = [getattr(ImageOps, name)(image) for image in to_pil(pixels)]
    assert_agree(getattr(operations, name)(to_float(pixels)), from_pil(theirs))


@pytest.mark.parametrize("size", SIZES)
def test_luma_and_greyscale(size):
    pixels = pictures(*size)
    theirs = from_pil([image.convert("L") for image in to_pil(pixels)])
    images = to_float(pixels)
    assert torch.equal(operations.greyscale(images), theirs)
    assert torch.equal(operations.luma(images), theirs[:, :1])


def test_hue_of_colors_all_over_the_cube():
    """Every fifth value of each channel, and those beside the grey diagonal, where 8-bit hue is most delicate."""
    values = torch.arange(0, 256, 5, dtype=torch.uint8)
    cube = torch.cartesian_prod(values, values, values)
    grey = torch.randint(2, 254, (20_000, 1), generator=torch.Generator().manual_seed(0))
    near = (grey + torch.randint(-2, 3, (20_000, 3), generator=torch.Generator().manual_seed(1))).to(torch.uint8)
    pixels = torch.cat([cube, near]).unsqueeze(0)[:, : 160_000].view(1, 400, -1, 3)
    image = Image.fromarray(pixels[0].numpy())
    for shift in (0.0, 0.1, -0.25):
        ours = operations.adjust_hue(to_float(pixels), torch.tensor([shift]))
        assert_agree(ours, from_pil([reference.adjust_hue(image, shift)]), equal=0.9999)


QUICK = pytest.param(range(0, 256, 15), id="some")
ALL = pytest.param(range(256), id="all", marks=pytest.mark.slow)


@pytest.mark.parametrize("reds", [QUICK, ALL])
def test_hue_saturation_value_and_luma_of_every_color_are_pillows(reds):
    """Bit for bit; Pillow's hue of a grey is 0, and any serves."""
    level = torch.arange(256, dtype=torch.uint8)
    for red in reds:
        plane = torch.stack([torch.full((256, 256), red, dtype=torch.uint8), level.view(-1, 1).expand(256, 256),
                             level.expand(256, 256)], dim=2)
        image, images = Image.fromarray(plane.numpy()), to_float(plane.unsqueeze(0))
        theirs = from_pil([Image.merge("RGB", image.convert("HSV").split())])
        ours = torch.cat(operations._to_hsv(images), dim=1)
        colored = images.amax(1) > images.amin(1)
        assert torch.equal(ours[:, 0][colored], theirs[:, 0][colored])
        assert torch.equal(ours[:, 1:], theirs[:, 1:])
        assert torch.equal(operations.luma(images), from_pil([image.convert("L")])[:, :1])


@pytest.mark.parametrize("values", [QUICK, ALL])
def test_red_green_and_blue_of_every_hue_saturation_and_value(values):
    """In whole numbers, rounded half up."""
    level = torch.arange(256)
    hue, saturation = level.view(1, 1, -1, 1), level.view(1, 1, 1, -1)
    later = torch.tensor([0, 510, 1020]).view(1, 3, 1, 1)
    share = (510 - ((6 * hue - later).abs() - 765).abs()).clamp(0, 255)
    for value in values:
        twice = 2 * value * (65025 - share * saturation)
        ours = operations._from_hsv(*(v.float().expand(1, 1, 256, 256)
                                      for v in (hue, saturation, torch.tensor(value).view(1, 1, 1, 1))))
        assert torch.equal(ours.long(), (twice + 65025) // (2 * 65025))


def test_contrast_mean_of_a_large_bright_image():
    """A mean over 4 million pixels needs more than float32's 24 bits."""
    pixels = torch.full((1, 2048, 2048, 3), 254, dtype=torch.uint8)
    pixels[0, :, ::2] = 255
    theirs = from_pil([ImageEnhance.Contrast(to_pil(pixels)[0]).enhance(0.5)])
    assert torch.equal(operations.contrast(to_float(pixels), torch.tensor([0.5])), theirs)


def test_autocontrast_and_equalize_leave_a_flat_channel_alone():
    images = torch.full((1, 3, 8, 8), 77.0)
    images[0, 0, 0, 0] = 99
    stretched = operations.autocontrast(images)
    assert stretched[0, 0].unique().tolist() == [0, 254]  # Pillow's own truncation of 254.999...: not 255
    assert torch.equal(stretched[0, 1:], images[0, 1:])
    assert torch.equal(operations.equalize(images), images)  # 64 pixels are too few for a step of 255


def test_posterize_above_eight_bits_keeps_everything():
    images = torch.arange(192.0).view(1, 3, 8, 8)
    assert torch.equal(operations.posterize(images, torch.tensor([9.0])), images)


def test_to_float_moves_channels_to_the_front():
    pixels = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).view(2, 4, 5, 3)
    images = to_float(pixels)
    assert images.dtype == torch.float32 and images.is_contiguous()
    np.testing.assert_array_equal(images.numpy(), pixels.numpy().transpose(0, 3, 1, 2))


def test_normalize_is_to_tensor_and_normalize():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    pixels = pictures()
    theirs = torch.stack([reference.normalize(reference.to_tensor(i), list(mean), list(std)) for i in to_pil(pixels)])
    torch.testing.assert_close(operations.normalize(to_float(pixels), mean=mean, std=std), theirs, rtol=0, atol=2e-6)


def test_fill_box_fills_its_box_and_nothing_else():
    images = torch.rand(4, 3, 6, 7)
    boxes = torch.tensor([[0, 2, 1, 3], [-3, 100, 5, 90], [2, 2, 0, 7], [4, 1, 0, 7]])
    filled = operations.fill_box(images, boxes, value=5.0)
    expected = images.clone()
    expected[0, :, 0:2, 1:3] = 5
    expected[1, :, :, 5:] = 5
    torch.testing.assert_close(filled, expected, rtol=0, atol=0)
    assert (operations.fill_box(images, boxes, value=0.0)[0, :, 0:2, 1:3] == 0).all()


@pytest.mark.parametrize("name", [*ENHANCED, "solarize", "posterize", "adjust_hue"])
def test_no_images(name):
    assert getattr(operations, name)(torch.zeros(0, 3, 8, 8), torch.zeros(0)).shape == (0, 3, 8, 8)
