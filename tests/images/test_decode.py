"""One image file to pixels: every format, mode and orientation, and every kind of bad file."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phyla.errors import CorruptFileError, InputError
from phyla.images import decode
from phyla.images.decode import checked_size, read_image, shorter_side, square, to_eight_bits


def scene(width: int = 24, height: int = 16) -> np.ndarray:
    """Return a smooth image with four differently coloured corners, uint8 (height, width, 3)."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.rint(np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], 2)).astype(np.uint8)


SCENE = scene()
PICTURE = Image.fromarray(SCENE)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(("name", "options", "within"), [
    ("a.png", {}, 0), ("a.bmp", {}, 0), ("a.tiff", {}, 0), ("a.tif", {"compression": "tiff_lzw"}, 0),
    ("a.webp", {"lossless": True}, 0), ("a.webp", {"quality": 95}, 40), ("a.jpg", {"quality": 95}, 20),
    ("a.JPEG", {"quality": 95, "progressive": True}, 20),
])
def test_every_format_keeps_its_pixels(tmp_path, name, options, within):
    path = saved(tmp_path / name, PICTURE, **options)
    read = read_image(path)
    assert read.shape == (16, 24, 3)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    assert np.abs(read.astype(int) - SCENE).max() <= within
    assert shorter_side(path) == 16


def test_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_image(path).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64


def test_the_content_decides_not_the_name(tmp_path):
    path = saved(tmp_path / "really_a_png.jpg", PICTURE, format="PNG")
    np.testing.assert_array_equal(read_image(path), SCENE)


# ── modes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_grey_and_two_valued(tmp_path):
    grey = PICTURE.convert("L")
    read = read_image(saved(tmp_path / "l.png", grey))
    np.testing.assert_array_equal(read, np.repeat(np.array(grey)[..., None], 3, 2))
    assert set(np.unique(read_image(saved(tmp_path / "1.png", PICTURE.convert("1"))))) == {0, 255}


def test_palette(tmp_path):
    few = PICTURE.quantize(16)
    np.testing.assert_array_equal(read_image(saved(tmp_path / "p.png", few)), np.array(few.convert("RGB")))


def test_palette_with_transparency_is_on_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(1, (0, 0, 2, 4))
    for transparency in (0, bytes([0, 255])):
        read = read_image(saved(tmp_path / "p.png", image, transparency=transparency))
        assert read[0].tolist() == [[40, 50, 60]] * 2 + [[255, 255, 255]] * 2
    half = read_image(saved(tmp_path / "half.png", image, transparency=bytes([51, 255])))
    assert half[0, 3].tolist() == [206, 208, 210]  # a fifth of (10, 20, 30) and four fifths of white


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opacity_is_over_white(tmp_path, mode):
    grey = Image.new("L", (4, 1), 0)
    clear = Image.fromarray(np.uint8([[0, 51, 204, 255]]))
    image = Image.merge(mode, [grey] * (len(mode) - 1) + [clear])
    assert read_image(saved(tmp_path / "a.png", image))[0, :, 0].tolist() == [255, 204, 51, 0]


def test_one_transparent_color(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    read = read_image(saved(tmp_path / "a.png", image, transparency=(1, 2, 3)))
    assert read.tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk(tmp_path, name):
    read = read_image(saved(tmp_path / name, Image.new("CMYK", (16, 16), (0, 255, 255, 0))))
    assert np.abs(read.reshape(-1, 3).mean(0) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize(("top", "brightest"), [(65535, 255), (4095, 255), (255, 255), (32768, 128), (2048, 128)])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_by_those_in_use(tmp_path, name, top, brightest):
    values = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    read = read_image(saved(tmp_path / name, Image.fromarray(values)))
    assert read.max() == brightest
    assert read.min() == 0
    assert np.ptp(read, axis=2).max() == 0
    assert (np.diff(read[..., 0].ravel().astype(int)) >= 0).all()


def test_big_endian_sixteen_bits(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = saved(tmp_path / "a.tif", Image.fromarray(values.astype(">u2")))
    np.testing.assert_array_equal(read_image(path)[..., 0], np.rint(values / 257))


def test_whole_and_real_numbers_of_32_bits(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    whole = [(ramp * top).astype(np.int32) for top in (255, 4095, 65535, 70000)]
    for values in (ramp, ramp * 255, (ramp - 0.5) * 3000, *whole):
        read = read_image(saved(tmp_path / "a.tif", Image.fromarray(values)))[..., 0]
        np.testing.assert_allclose(read, ramp * 255, atol=1)


def test_to_eight_bits_of_odd_values():
    assert to_eight_bits(np.array([[np.nan, np.inf, 1.0]])).tolist() == [[0, 0, 255]]
    assert to_eight_bits(np.full((2, 2), 7.0e9)).tolist() == [[0, 0], [0, 0]]
    assert to_eight_bits(np.zeros((2, 2), np.int32)).tolist() == [[0, 0], [0, 0]]


# ── orientation ───────────────────────────────────────────────────────────────────────────────────────────────────


# The EXIF standard: which side of the scene the first row, and the first column, of the file shows.
SHOWN = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
         5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}


def stored(orientation: int, upright: np.ndarray) -> np.ndarray:
    """Return the pixels that a camera writes under an orientation."""
    sides = SHOWN[orientation]
    turned = upright[:: -1 if "bottom" in sides else 1, :: -1 if "right" in sides else 1]
    return np.ascontiguousarray(turned if sides[0] in ("top", "bottom") else turned.transpose(1, 0, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
def test_orientation_is_undone(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "a.webp" else {"quality": 95, "subsampling": 0} if name == "a.jpg" else {}
    path = saved(tmp_path / name, Image.fromarray(stored(orientation, SCENE)), exif=exif, **options)
    read = read_image(path)
    assert read.shape == SCENE.shape
    assert np.abs(read.astype(int) - SCENE).max() <= (12 if name == "a.jpg" else 0)


def test_a_broken_exif_block_does_not_lose_the_picture(tmp_path):
    path = saved(tmp_path / "a.jpg", PICTURE, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow speaks of it, once a process
        assert read_image(path).shape == SCENE.shape


# ── size ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_centre_square_is_kept(tmp_path):
    for width, height, box in ((24, 16, np.s_[:, 4:20]), (16, 24, np.s_[4:20]), (25, 16, np.s_[:, 4:20])):
        path = saved(tmp_path / "a.png", Image.fromarray(scene(width, height)))
        np.testing.assert_array_equal(read_image(path, 16), scene(width, height)[box])


def test_shrinking_averages(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    read = read_image(saved(tmp_path / "a.png", Image.fromarray(stripes)), 8)
    assert read.shape == (8, 8, 3)
    assert np.abs(read.astype(int) - 127).max() <= 12


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_tiny_images_are_enlarged(tmp_path, shape):
    path = saved(tmp_path / "a.png", Image.new("RGB", shape, (9, 8, 7)))
    assert (read_image(path, 16) == [9, 8, 7]).all()
    assert shorter_side(path) == min(shape)


def test_a_long_strip_costs_no_more(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("L", (60000, 1), 77))
    assert (read_image(path, 96) == 77).all()


def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(scene(1200, 800)), quality=95)
    exact = Image.fromarray(scene(1200, 800)).resize((32, 32), Image.Resampling.BILINEAR, (200, 0, 1000, 800))
    assert np.abs(read_image(path, 32).astype(int) - np.array(exact)).max() <= 4


def test_square_of_an_array():
    np.testing.assert_array_equal(square(SCENE, 16), SCENE[:, 4:20])
    assert square(SCENE[..., 0], 8).shape == (8, 8, 3)
    assert square(SCENE[:, :16], 16).shape == (16, 16, 3)


def test_sizes_that_cannot_be():
    for size in (0, -1, 5000):
        with pytest.raises(InputError, match=f"size={size}"):
            checked_size(size)
    assert checked_size(None) is None


# ── bad files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def png_header(width: int, height: int) -> bytes:
    """Return a small PNG file that claims to be large."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_header(width: int, height: int) -> bytes:
    """Return the start of a JPEG file that claims to be large."""
    frame = struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    scan = struct.pack(">HB", 12, 3) + bytes([1, 0, 2, 0, 3, 0, 0, 63, 0])
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xda" + scan + bytes(9)


@pytest.mark.parametrize(("name", "data", "said"), [
    ("zero.jpg", b"", "is empty"),
    ("text.jpg", b"just words, no picture", "is not an image: it begins with b'just words"),
    ("bomb.png", png_header(30000, 20000), "30000 x 20000 pixels, more than the 89,478,485"),
    ("big.png", png_header(10000, 10000), "10000 x 10000 pixels, more than"),  # where Pillow only warns
    ("bomb.jpg", jpeg_header(65500, 65500), "65500 x 65500 pixels, more than"),
    ("flat.png", png_header(0, 5), ""),
    ("head.gif", b"GIF89a", "is damaged"), ("head.bmp", b"BM\0\0", "is damaged"), ("head.tif", b"II*\0", "is damaged"),
    ("head.webp", b"RIFF\0\0\0\0WEBPVP8 ", "is damaged"), ("wave.webp", b"RIFF\0\0\0\0WAVEfmt ", "is damaged"),
])
def test_bad_files_are_named_with_the_reason(tmp_path, name, data, said):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=name) as raised:
        read_image(path, 32)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "a.gif"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused_not_half_read(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / name, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CorruptFileError, match=rf"a\.{path.suffix[1:]}"):
        read_image(path, 16)


def test_the_limit_is_that_of_the_decoded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 10_000)
    monkeypatch.setattr(decode, "MAX_JPEG_PIXELS", 30_000)
    large = Image.new("RGB", (160, 160), "red")
    assert read_image(saved(tmp_path / "a.jpg", large), 20).shape == (20, 20, 3)  # decoded at a quarter
    for name, size, image in (("b.jpg", None, large), ("c.png", 20, large), ("d.jpg", 20, large.resize((200, 200)))):
        with pytest.raises(CorruptFileError, match="more than the 10,000"):
            read_image(saved(tmp_path / name, image), size)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(CorruptFileError, match=r"none\.jpg.* cannot be opened: No such file"):
        read_image(tmp_path / "none.jpg", 8)
    with pytest.raises(CorruptFileError, match="cannot be opened"):
        read_image(tmp_path, 8)
    assert shorter_side(tmp_path / "none.jpg") is None


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_is_an_error_or_an_image_and_nothing_else(tmp_path, seed):
    random = np.random.default_rng(seed)
    name = ("a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "a.gif")[seed % 6]
    data = bytearray(saved(tmp_path / name, PICTURE).read_bytes())
    for at in random.integers(0, len(data), 12):
        data[at] = random.integers(0, 256)
    (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert read_image(tmp_path / name, 8).shape == (8, 8, 3)
        except CorruptFileError as error:
            assert name in str(error)
