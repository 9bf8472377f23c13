"""Chunks become one set of images: in memory, kept in a file for the next time, or only looked at."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import official
from phyla.errors import CorruptFileError, InputError, StorageError
from phyla.images import gather as module
from phyla.images.folders import Chunk
from phyla.images.gather import Source, gather, how_kept, kept_file, looked_at, reopened
from phyla.images.sources import open_images
from phyla.progress import shown_by

PIXELS = official.pixels(7, 12)
IDS = [f"{i}.png" for i in range(7)]
ASKED = [*IDS[:3], "bad.png", "worse.png", *IDS[3:]]
SKIPPED = (("bad.png", "is empty"), ("worse.png", "is damaged"))
CHUNKS = (Chunk(IDS[:3], PIXELS[:3], [SKIPPED[0]]), Chunk([], PIXELS[:0], [SKIPPED[1]]), Chunk(IDS[3:], PIXELS[3:], []))


def chunks(start: int = 0) -> Iterator[Chunk]:
    for chunk, first in zip(CHUNKS, (0, 4, 5), strict=True):
        if first >= start:
            yield chunk


def source(make=chunks, *, strict: bool = False) -> Source:
    return Source("mine", ASKED, 12, make, strict)


class Rows:
    """Stands for files: says which rows of all images it was made for."""

    dtype = np.dtype(np.uint8)

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.shape = rows, (len(rows), 12, 12, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(PIXELS)

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        return PIXELS[rows]

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        out[:] = PIXELS[rows]


@pytest.mark.parametrize("kept", [False, True])
def test_rows_follow_one_another_without_gaps(tmp_path, kept):
    loaded = gather(source(), tmp_path / "a.npy" if kept else None)
    np.testing.assert_array_equal(loaded.images.array, PIXELS)
    assert list(loaded.images.ids) == IDS
    assert loaded.images.name == "mine"
    assert loaded.skipped == SKIPPED
    assert isinstance(loaded.images.pixels, np.memmap) == kept


def test_a_kept_file_is_opened_again_and_is_plain_numpy(tmp_path):
    first = gather(source(), tmp_path / "a.npy")
    again = reopened(tmp_path / "a.npy", "mine")
    assert again is not None
    assert again.images.fingerprint == first.images.fingerprint
    assert again.skipped == first.skipped
    assert np.load(tmp_path / "a.npy").shape == (9, 12, 12, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npy"]


def test_a_set_has_one_fingerprint_however_it_is_kept(tmp_path):
    in_memory, in_file = gather(source()).images, gather(source(), tmp_path / "a.npy").images
    not_kept = looked_at(source(), tmp_path / "b.npy", Rows).images
    assert in_memory.digest is None and in_file.digest and in_file.digest == not_kept.digest
    assert in_memory.fingerprint == in_file.fingerprint == not_kept.fingerprint
    content = bytearray((tmp_path / "a.npy").read_bytes())
    content[200] ^= 1
    (tmp_path / "a.npy").write_bytes(content)
    os.utime(tmp_path / "a.json", ns=(0, 0))
    assert reopened(tmp_path / "a.npy", "mine").images.fingerprint != in_file.fingerprint, "the file was touched since"


def test_images_that_are_not_kept_are_looked_at_once(tmp_path):
    first = looked_at(source(), tmp_path / "a.npy", Rows)
    again = looked_at(source(lambda start: pytest.fail("decoded again")), tmp_path / "a.npy", Rows)
    for loaded in (first, again):
        assert list(loaded.images.ids) == IDS and loaded.skipped == SKIPPED
        assert loaded.images.pixels.rows.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    gather(source(), tmp_path / "a.npy")
    looked_at(source(lambda start: pytest.fail("decoded again")), tmp_path / "a.npy", Rows)


def test_strict_stops_at_what_an_earlier_reading_left_out(tmp_path):
    for read in (lambda: gather(source(strict=True), tmp_path / "a.npy"),
                 lambda: looked_at(source(strict=True), tmp_path / "a.npy", Rows)):
        gather(source(), tmp_path / "a.npy")
        with pytest.raises(CorruptFileError, match=r"'bad\.png' is empty"):
            read()


@pytest.mark.parametrize("damage", ["no list", "no pixels", "cut", "foreign list", "text"])
def test_half_a_kept_file_is_none(tmp_path, damage):
    path = tmp_path / "a.npy"
    gather(source(), path)
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


# ── a stop in the middle ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_stopped_reading_goes_on_where_it_was(tmp_path, monkeypatch, writes, stop):
    monkeypatch.setattr(module, "NOTE_SECONDS", 0)
    asked = []

    def read(make):
        return gather(source(make), tmp_path / "a.npy") if writes else looked_at(source(make), tmp_path / "a.npy", Rows)

    def broken(start: int) -> Iterator[Chunk]:
        yield from chunks(start)
        raise stop

    def rest(start: int) -> Iterator[Chunk]:
        asked.append(start)
        yield from chunks(start)

    def twice(start: int) -> Iterator[Chunk]:
        yield next(chunks(start))
        raise stop

    for make in (twice, broken):
        with pytest.raises(StorageError if isinstance(stop, OSError) else KeyboardInterrupt):
            read(make)
        assert not (tmp_path / "a.npy").exists() and not (tmp_path / "a.json").exists()
    loaded = read(rest)
    assert asked == [] and loaded.skipped == SKIPPED and list(loaded.images.ids) == IDS
    undisturbed = tmp_path / "other"
    gather(source(), undisturbed / "a.npy")
    assert loaded.images.fingerprint == reopened(undisturbed / "a.npy", "mine").images.fingerprint
    if writes:
        assert (tmp_path / "a.npy").read_bytes() == (undisturbed / "a.npy").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} - {"a.npy"} == {"a.json", "other"}


def test_a_growing_file_shorter_than_its_note_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NOTE_SECONDS", 0)

    def broken(start: int) -> Iterator[Chunk]:
        yield CHUNKS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(source(broken), tmp_path / "a.npy")
    (tmp_path / ".a.npy.growing").write_bytes(b"")
    np.testing.assert_array_equal(gather(source(), tmp_path / "a.npy").images.array, PIXELS)


def test_what_was_read_of_other_images_is_removed(tmp_path):
    digits = "0123456789abcdef"
    for name in (f".mine-{digits}.npy.growing", f".mine-{digits}.npy.note", f".yours-{digits}.npy.note"):
        (tmp_path / name).write_text("{}")
    gather(source(), kept_file(tmp_path, "mine", (9, 12, 12), 1))
    assert [path.name for path in tmp_path.glob(".*")] == [f".yours-{digits}.npy.note"]


CHILD = """
import os, signal, sys
from pathlib import Path
from phyla.images import folders, gather, sources
gather.NOTE_SECONDS = 0
real, seen = gather.chained_digest, 0
def dying(*told):
    global seen
    seen += 1
    if seen == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*told)
gather.chained_digest = dying
sources.stream_images = lambda files, **options: folders.stream_images(files, chunk=5, **options)
sources.open_images(sys.argv[1], size=8, cache=Path(sys.argv[2]), keep=sys.argv[3])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("keep", ["file", "off"])
def test_a_killed_reading_goes_on_to_the_same_pixels(tmp_path, monkeypatch, keep):
    from PIL import Image

    photos, decoded = tmp_path / "photos", []
    photos.mkdir()
    for i, pixels in enumerate(official.pixels(30, 10)):
        Image.fromarray(pixels).save(photos / f"{i:02d}.png")
    ended = subprocess.run([sys.executable, "-c", CHILD, str(photos), str(tmp_path / "killed"), keep],
                           capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    real = module.chained_digest
    monkeypatch.setattr(module, "chained_digest", lambda rows, before: decoded.append(len(rows)) or real(rows, before))
    again = open_images(photos, size=8, cache=tmp_path / "killed", keep=keep)
    assert sum(decoded) == 15
    whole = open_images(photos, size=8, cache=tmp_path / "whole", keep=keep)
    assert again.images.fingerprint == whole.images.fingerprint
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix == ".npy"}
             for name in ("killed", "whole")]
    assert files[0] == files[1] and len(files[0]) == (keep == "file")


def test_not_one_readable_image_is_an_error(tmp_path):
    bad = Source("mine", ["bad.png", "b.png"], 12, lambda start: [Chunk([], PIXELS[:0], [("bad.png", "is empty")])])
    for read in (lambda: gather(bad), lambda: gather(bad, tmp_path / "a.npy"),
                 lambda: looked_at(bad, tmp_path / "a.npy", Rows)):
        with pytest.raises(InputError, match=r"none of the 2 images of mine can be read: 'bad\.png' is empty"):
            read()
    assert list(tmp_path.iterdir()) == []


# ── where ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_pixels_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    large = kept_file(None, "my photos/ü", (3, 12, 12), 1)
    assert large.parent == tmp_path / "cache" / "pixels"
    assert large.name.startswith("my-photos-")
    assert kept_file(tmp_path, "a", (1, 12, 12), 1).parent == tmp_path
    others = {kept_file(Path("x"), "a", shape, what) for shape, what in
              (((1, 12, 12), 1), ((1, 12, 12), 2), ((2, 12, 12), 1), ((1, 13, 12), 1))}
    assert len(others) == 4


def test_pixels_are_kept_where_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY_BYTES", 1000)
    monkeypatch.setattr(module, "FILE_BYTES", 3000)
    assert [how_kept("auto", n, None) for n in (1000, 1001, 3000, 3001)] == ["memory", "file", "file", "off"]
    assert [how_kept("auto", n, tmp_path / "new" / "folder") for n in (1, 3000, 3001)] == ["file", "file", "off"]
    assert [how_kept(keep, 9999, tmp_path) for keep in ("memory", "file", "off")] == ["memory", "file", "off"]
    room = module.shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: room)
    assert [how_kept("auto", n, tmp_path) for n in (1000, 1001)] == ["file", "off"]
    (tmp_path / ".a-0123456789abcdef.npy.growing").write_bytes(bytes(500))
    assert [how_kept("auto", n, tmp_path) for n in (1250, 1251)] == ["file", "off"], "a stop changes no answer"


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
        gather(source())
    assert Shown.steps == [4, 1, 4, 0]


def test_the_shared_folder_keeps_what_was_used_last(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path))
    folder = module.shared_folder()
    folder.mkdir(parents=True)
    for n, name in enumerate(("old", "older", "new")):
        gather(source(), folder / f"{name}.npy")
        when = 1_000_000 + (n - 1) ** 2  # "older" is the oldest
        for path in folder.glob(f"{name}.*"):
            os.utime(path, (when, when))
    one = (folder / "old.npy").stat().st_size
    gather(source(), folder / "old.npy")  # used again
    monkeypatch.setattr(module, "SHARED_BYTES", 3 * one)
    gather(source(), folder / "newest.npy")
    assert {path.stem for path in folder.glob("*.npy")} == {"old", "new", "newest"}
    assert {path.stem for path in folder.glob("*.json")} == {"old", "new", "newest"}


def test_other_folders_are_never_trimmed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARED_BYTES", 0)
    gather(source(), tmp_path / "a.npy")
    gather(source(), tmp_path / "b.npy")
    assert {path.stem for path in tmp_path.glob("*.npy")} == {"a", "b"}


def test_use_does_not_vouch_for_changed_pixels(tmp_path):
    gather(source(), tmp_path / "a.npy")
    later = (tmp_path / "a.json").stat().st_mtime + 5
    os.utime(tmp_path / "a.npy", (later, later))
    assert gather(source(), tmp_path / "a.npy").images.digest is None
    assert gather(source(), tmp_path / "a.npy").images.digest is None
