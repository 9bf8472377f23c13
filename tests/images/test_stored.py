"""Files that stand for an array of pixels, and lists of files that stay small."""

import gc
import os
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import official
from phyla.errors import CorruptFileError
from phyla.images.decode import read_image
from phyla.images.folders import ImageFile, find_images
from phyla.images.stored import FileList, FilePixels
from phyla.types import ImageSet, StoredPixels


@pytest.fixture
def files(tmp_path):
    """Return thirty pictures in two folders, the third and the last of which cannot be read."""
    for i, pixels in enumerate(official.pixels(30, 10)):
        path = tmp_path / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "a" / "04.png").write_text("text")
    (tmp_path / "b" / "29.png").write_text("text")
    return FileList(find_images(tmp_path))


@pytest.fixture
def pixels(files):
    """Return the 28 good ones at 8 pixels."""
    return FilePixels(files, np.array([row for row in range(30) if row not in (2, 29)]), 8)


def expected(files: FileList) -> np.ndarray:
    return np.stack([read_image(file.path, 8) for row, file in enumerate(files) if row not in (2, 29)])


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given", [
    [("a/1.jpg", "/photos/a/1.jpg"), ("b.jpg", "/photos/b.jpg")],
    [("ü/€.jpg", "/ph/ü/€.jpg"), ("a", "elsewhere/b"), ("", "x"), ("null\0byte", "/ph/null\0byte")],
    [("relative.jpg", "relative.jpg"), ("other.jpg", "/deep/other.jpg")],
    [],
])
def test_a_list_gives_back_what_it_was_made_of(given):
    files = [ImageFile(*names) for names in given]
    packed = FileList(iter(files))
    assert list(packed) == files and len(packed) == len(files)
    assert [packed[row] for row in range(-len(files), len(files))] == files * 2
    assert packed[1:] == files[1:] and packed[::-1] == files[::-1]
    with pytest.raises(IndexError):
        packed[len(files)]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_names_that_are_no_text_come_back(tmp_path):
    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff\xfe.jpg")
    packed = FileList([ImageFile("odd~1234", odd)])
    assert packed[0].path == odd


def test_a_list_is_small():
    n = 20_000
    tracemalloc.start()
    packed = FileList(ImageFile(f"some class/image_{i:08d}.jpg", f"/data/photos/some class/image_{i:08d}.jpg")
                      for i in range(n))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(packed) == n and size < 75 * n


# ── pixels ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_taken_as_of_an_array(files, pixels):
    plain = expected(files)
    assert isinstance(pixels, StoredPixels) and pixels.shape == plain.shape and pixels.dtype == plain.dtype
    assert len(pixels) == len(plain)
    for rows in (0, -1, slice(3, 20), slice(None, None, -5), np.array([5, 0, 5]), np.arange(28) > 20,
                 np.zeros(0, np.int64)):
        found = pixels[rows]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, plain[rows])
    np.testing.assert_array_equal(np.asarray(pixels), plain)
    np.testing.assert_array_equal(np.stack(list(pixels)), plain)
    with pytest.raises(IndexError):
        pixels[28]


def test_a_set_of_images_takes_them(files, pixels):
    ids = [str(row) for row in range(28)]
    lazy, plain = ImageSet(pixels, ids), ImageSet(expected(files), ids)
    assert lazy.fingerprint == plain.fingerprint and lazy.size == (8, 8)
    np.testing.assert_array_equal(lazy.select(np.array([3, 1])).array, plain.array[[3, 1]])


def test_a_file_that_is_damaged_later_is_named(files, pixels):
    Path(files[7].path).write_bytes(b"")
    pixels[np.array([0, 1, 2])]
    with pytest.raises(CorruptFileError, match=r"14\.png' is empty, and could be read before.*command again"):
        pixels[np.arange(20)]
    Path(files[7].path).unlink()
    with pytest.raises(CorruptFileError, match=r"14\.png' cannot be opened: No such file"):
        pixels[6]


def test_threads_end_with_the_pixels(files):
    def decoders() -> int:
        return sum(thread.name.startswith("phyla-decode") for thread in threading.enumerate())

    pixels = FilePixels(files, np.arange(2), 8)
    before = decoders()
    pixels[:]
    assert decoders() > before
    del pixels
    gc.collect()
    for _ in range(200):
        if decoders() <= before:
            break
        time.sleep(0.01)
    assert decoders() <= before
