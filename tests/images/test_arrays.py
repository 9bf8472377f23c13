"""Arrays and array files as images: layouts, channels, ranges, and what is said of anything else."""

import numpy as np
import pytest
import torch

import official
from phyla.errors import CorruptFileError, InputError
from phyla.images.arrays import from_array, read_array_file

RGB = official.pixels(5, 12)


def test_uint8_in_order_is_not_copied():
    images = from_array(RGB, name="mine")
    assert images.pixels is RGB
    assert list(images.ids) == ["00000", "00001", "00002", "00003", "00004"]
    assert images.name == "mine"
    assert list(from_array(RGB, ["a", "b", "c", "d", "e"]).ids) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("make", [
    lambda x: x.transpose(0, 3, 1, 2), lambda x: x.astype(np.int64), lambda x: x / np.float32(255),
    lambda x: x.astype(np.float64), lambda x: x.astype(np.uint16) * 257, lambda x: torch.from_numpy(x),
    lambda x: torch.from_numpy(x).permute(0, 3, 1, 2), lambda x: torch.from_numpy(x).float() / 255,
    lambda x: torch.from_numpy(x).to(torch.bfloat16), lambda x: torch.from_numpy(x).double().requires_grad_(),
    lambda x: np.concatenate([x, np.full_like(x[..., :1], 255)], 3), lambda x: x.astype(">i4"),
], ids=["NCHW", "int64", "unit", "float255", "uint16", "tensor", "tensor NCHW", "tensor unit", "bfloat16", "gradient",
        "opaque", "big endian"])
def test_every_layout_and_range_gives_the_same_images(make):
    images = from_array(make(RGB))
    np.testing.assert_array_equal(images.array, RGB)
    assert images.array.dtype == np.uint8


def test_a_tensor_in_order_stays_a_tensor():
    pixels = torch.from_numpy(RGB)
    assert from_array(pixels).pixels is pixels


@pytest.mark.parametrize("shape", [(5, 12, 12), (5, 12, 12, 1), (5, 1, 12, 12)])
def test_grey_becomes_three_channels(shape):
    grey = RGB[..., 0].reshape(shape)
    np.testing.assert_array_equal(from_array(grey).array, np.repeat(RGB[..., :1], 3, 3))


def test_opacity_is_over_white():
    pixels = np.zeros((1, 8, 8, 4), np.uint8)
    pixels[..., 3] = 51
    assert from_array(pixels).array.tolist() == np.full((1, 8, 8, 3), 204).tolist()


def test_bits_of_whole_numbers():
    assert from_array(np.full((1, 8, 8), 4095, np.uint16)).array.max() == 255
    assert from_array(np.stack([np.full((8, 8), v, np.uint16) for v in (257, 65535)])).array[0, 0, 0, 0] == 1
    assert from_array(np.ones((1, 8, 8), bool)).array.min() == 255


def test_channels_settle_what_is_ambiguous():
    pixels = np.arange(36, dtype=np.uint8).reshape(1, 3, 4, 3)
    with pytest.raises(InputError, match="channels='first'"):
        from_array(pixels)
    np.testing.assert_array_equal(from_array(pixels, channels="last").array, pixels)
    np.testing.assert_array_equal(from_array(pixels, channels="first").array, pixels.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(("array", "said"), [
    (np.zeros((0, 8, 8, 3), np.uint8), "no image"), (np.uint8(3), "no image"), (np.zeros((4, 64)), "3 or 4 axes"),
    (np.zeros((8, 8, 3), np.uint8), r"array\[None\]"), (np.zeros((2, 8, 8, 5), np.uint8), "1, 3 or 4 channels"),
    (np.full((1, 8, 8), -1), "between 0 and 65535, got -1 to -1"), (np.full((1, 8, 8), 65536), "got 65536"),
    (np.full((1, 8, 8), 256.0), "between 0 and 1 or 255"), (np.full((1, 8, 8), np.nan), "got nan"),
    (np.full((1, 8, 8), np.inf), "got inf"), (np.array([["a"]]), "<U1"), (np.zeros((1, 8, 8), complex), "complex128"),
    (np.array([RGB[0], RGB[0][:5]], dtype=object), "different sizes"),
])
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_images(array, said):
    with pytest.raises(InputError, match=said):
        from_array(array)


def test_wrong_ids():
    with pytest.raises(InputError, match="5 images need 5 ids, got 2"):
        from_array(RGB, ["a", "b"])


def test_large_arrays_are_converted_in_blocks(monkeypatch):
    monkeypatch.setattr("phyla.images.arrays._BLOCK_BYTES", 5000)
    np.testing.assert_array_equal(from_array(RGB / 255).array, RGB)


def test_array_files(tmp_path):
    np.save(tmp_path / "a.npy", RGB)
    array, ids = read_array_file(tmp_path / "a.npy")
    assert isinstance(array, np.memmap)
    assert ids is None
    np.testing.assert_array_equal(array, RGB)
    np.savez(tmp_path / "a.npz", labels=np.arange(5), images=RGB, ids=np.array(list("abcde")))
    array, ids = read_array_file(tmp_path / "a.npz")
    np.testing.assert_array_equal(array, RGB)
    assert ids == list("abcde")


def test_array_files_that_are_none(tmp_path):
    np.savez(tmp_path / "none.npz", labels=np.arange(5))
    with pytest.raises(InputError, match="holds no images, only: labels"):
        read_array_file(tmp_path / "none.npz")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "whole.npy", RGB)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:300])
    for name in ("objects.npy", "text.npy", "text.npz", "cut.npy"):
        with pytest.raises(CorruptFileError, match=name):
            read_array_file(tmp_path / name)
