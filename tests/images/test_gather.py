"""Chunks become one set of images: in memory, or kept in a file for the next time."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import official
from phyla.errors import InputError, StorageError
from phyla.images import gather as module
from phyla.images.folders import Chunk
from phyla.images.gather import gather, kept_file, reopened
from phyla.progress import shown_by

PIXELS = official.pixels(7, 12)
IDS = [f"{i}.png" for i in range(7)]


def chunks() -> Iterator[Chunk]:
    yield Chunk(IDS[:3], PIXELS[:3], [("bad.png", "is empty")])
    yield Chunk([], PIXELS[:0], [("worse.png", "is damaged")])
    yield Chunk(IDS[3:], PIXELS[3:], [])


@pytest.mark.parametrize("kept", [False, True])
def test_rows_follow_one_another_without_gaps(tmp_path, kept):
    loaded = gather(chunks(), "mine", (9, 12, 12), file=tmp_path / "a.npy" if kept else None)
    np.testing.assert_array_equal(loaded.images.array, PIXELS)
    assert list(loaded.images.ids) == IDS
    assert loaded.images.name == "mine"
    assert loaded.skipped == (("bad.png", "is empty"), ("worse.png", "is damaged"))
    assert isinstance(loaded.images.pixels, np.memmap) == kept


def test_a_kept_file_is_opened_again_and_is_plain_numpy(tmp_path):
    first = gather(chunks(), "mine", (9, 12, 12), file=tmp_path / "a.npy")
    again = reopened(tmp_path / "a.npy", "mine")
    assert again is not None
    assert again.images.fingerprint == first.images.fingerprint
    assert again.skipped == first.skipped
    assert np.load(tmp_path / "a.npy").shape == (9, 12, 12, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npy"]


@pytest.mark.parametrize("damage", ["no list", "no pixels", "cut", "foreign list", "text"])
def test_half_a_kept_file_is_none(tmp_path, damage):
    path = tmp_path / "a.npy"
    gather(chunks(), "mine", (9, 12, 12), file=path)
    if damage == "no list":
        path.with_suffix(".json").unlink()
    elif damage == "no pixels":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign list":
        path.with_suffix(".json").write_text(json.dumps({"ids": [str(i) for i in range(99)], "skipped": []}))
    else:
        path.with_suffix(".json").write_text("{")
    assert reopened(path, "mine") is None


def test_an_interrupted_reading_leaves_nothing(tmp_path):
    def broken() -> Iterator[Chunk]:
        yield from chunks()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(broken(), "mine", (9, 12, 12), file=tmp_path / "a.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(tmp_path):
    def full() -> Iterator[Chunk]:
        yield from chunks()
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"no space left while writing .*a\.npy"):
        gather(full(), "mine", (9, 12, 12), file=tmp_path / "a.npy")
    assert list(tmp_path.iterdir()) == []


def test_not_one_readable_image_is_an_error(tmp_path):
    for file in (None, tmp_path / "a.npy"):
        with pytest.raises(InputError, match=r"none of the 2 images of mine can be read: 'bad\.png' is empty"):
            gather([Chunk([], PIXELS[:0], [("bad.png", "is empty")])], "mine", (2, 12, 12), file=file)
    assert list(tmp_path.iterdir()) == []


def test_where_pixels_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "MEMORY_BYTES", 1000)
    assert kept_file(None, "a", (2, 12, 12), lambda: 1) is None
    large = kept_file(None, "my photos/ü", (3, 12, 12), lambda: 1)
    assert large is not None
    assert large.parent == tmp_path / "cache" / "pixels"
    assert large.name.startswith("my-photos-")
    asked = kept_file(tmp_path, "a", (1, 12, 12), lambda: 1)
    assert asked is not None
    assert asked.parent == tmp_path
    others = {kept_file(Path("x"), "a", shape, what) for shape, what in
              (((1, 12, 12), lambda: 1), ((1, 12, 12), lambda: 2), ((2, 12, 12), lambda: 1), ((1, 13, 12), lambda: 1))}
    assert len(others) == 4


def test_the_bar_counts_files_read_and_skipped():
    class Shown:
        steps: list[int] = []  # noqa: RUF012

        def start(self, description, total, unit, done):
            assert (description, total, unit, done) == ("reading mine", 9, "images", 0)
            return self

        def advance(self, n=1, note=""):
            self.steps.append(n)

        def stop(self, bar):
            self.steps.append(0)

    with shown_by(Shown()):
        gather(chunks(), "mine", (9, 12, 12))
    assert Shown.steps == [4, 1, 4, 0]
