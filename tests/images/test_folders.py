"""Folders and lists of files: what is found and in which order, and the stream that decodes it."""

import logging
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.images import folders
from phyla.images.decode import read_image
from phyla.images.folders import ImageFile, default_size, find_images, image_id, read_columns, stream_images

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX file names and links")


def picture(path: Path, color: int = 0, size: tuple[int, int] = (10, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, color).save(path, format="PNG")
    return path


def ids(source: Path) -> list[str]:
    return [file.id for file in find_images(source)]


# ── finding ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_levels_in_the_order_of_the_relative_paths(tmp_path):
    names = ["b/2.png", "b/10.PNG", "a.b/x.Jpg", "a/x.jpeg", "a/sub/y.webp", "z.tiff", "A.gif", "a-b/q.bmp", "0.jfif",
             "b.tif"]
    for name in names:
        picture(tmp_path / name)
    assert ids(tmp_path) == sorted(names)


def test_only_images_and_nothing_hidden(tmp_path):
    for name in ("a.png", ".hidden.png", ".git/b.png", "__MACOSX/c.png", "d.txt", "png", "e.png.bak",
                 "__MACOSX_/f.png"):
        picture(tmp_path / name)
    assert ids(tmp_path) == ["__MACOSX_/f.png", "a.png"]


@posix
def test_odd_names(tmp_path):
    names = ["with space.png", "new\nline.png", "Zürich/日本.png", "quote'\".png", "back\\slash.png", "-dash.png"]
    for i, name in enumerate(names):
        picture(tmp_path / name, 40 * i)
    found = {file.id: file.path for file in find_images(tmp_path)}
    assert sorted(found) == sorted(names)
    for i, name in enumerate(names):
        assert read_image(found[name], 8)[0, 0, 0] == 40 * i


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not text")
def test_names_that_are_not_text_get_ids_that_are(tmp_path):
    raw = [os.fsencode(tmp_path) + b"/caf\xe9.png", os.fsencode(tmp_path) + b"/caf\xe8.png"]
    for i, name in enumerate(raw):
        picture(tmp_path / "plain.png", 100 + i).rename(os.fsdecode(name))
    picture(tmp_path / "caf\\xe9.png", 7)
    files = find_images(tmp_path)
    assert len({file.id.encode("utf-8") for file in files}) == 3
    assert image_id(os.fsdecode(b"caf\xe9.png")) in {file.id for file in files}
    chunk = next(stream_images(tmp_path, size=8))
    assert sorted(chunk.pixels[:, 0, 0, 0].tolist()) == [7, 100, 101]
    assert chunk.skipped == []


@posix
def test_links_are_followed_once_and_loops_end(tmp_path):
    picture(tmp_path / "in" / "b" / "1.png")
    picture(tmp_path / "out" / "2.png")
    (tmp_path / "in" / "b" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "out").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "out2").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to("self")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out" / "2.png")
    assert ids(tmp_path / "in") == ["b/1.png", "link.png", "out/2.png"]


@posix
def test_broken_links_are_reported_and_pipes_let_alone(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "pipe.png")
    chunk = next(stream_images(tmp_path, size=8))
    assert chunk.ids == ["a.png"]
    assert [name for name, _ in chunk.skipped] == ["gone.png", "self.png"]


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_a_locked_folder_is_reported(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "locked" / "b.png")
    (tmp_path / "locked").chmod(0)
    try:
        chunk = next(stream_images(tmp_path, size=8))
    finally:
        (tmp_path / "locked").chmod(0o755)
    assert (chunk.ids, [name for name, _ in chunk.skipped]) == (["a.png"], ["locked/"])


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "locked" / "b.png")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    chunk = next(stream_images(tmp_path, size=8))
    assert (chunk.ids, [name for name, _ in chunk.skipped]) == (["a.png"], ["locked/"])


def test_nothing_there(tmp_path):
    with pytest.raises(DataNotFoundError, match="there is no folder or file"):
        find_images(tmp_path / "none")
    (tmp_path / "notes.txt.md").write_text("hello")
    with pytest.raises(InputError, match=r"no image in .*looked through all its folders for files ending in \.bmp"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="neither a folder, nor a list"):
        find_images(tmp_path / "notes.txt.md")


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_list_is_relative_to_itself(tmp_path, caplog):
    first, second = picture(tmp_path / "a b.png", 10), picture(tmp_path / "sub" / "ü.png", 20)
    elsewhere = picture(tmp_path / "elsewhere" / "c.png", 30)
    (tmp_path / "lists").mkdir()
    lines = ["../a b.png", "", "../sub/ü.png\r", f"{elsewhere}", "../a b.png", "missing.png"]
    (tmp_path / "lists" / "files.txt").write_bytes("\n".join(lines).encode("utf-8-sig"))
    files = find_images(tmp_path / "lists" / "files.txt")
    assert [file.id for file in files] == ["../a b.png", "../sub/ü.png", elsewhere.as_posix(), "missing.png"]
    assert [Path(file.path).resolve() for file in files[:2]] == [first, second]
    assert "names files again in 1 lines" in caplog.text
    chunk = next(stream_images(tmp_path / "lists" / "files.txt", size=8))
    assert chunk.pixels[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert chunk.skipped == [("missing.png", "cannot be opened: No such file or directory")]


@pytest.mark.parametrize(("name", "column", "mark"), [("a.csv", "path", ","), ("a.tsv", "Filename", "\t"),
                                                      ("a.CSV", " image ", ","), ("a.csv", "file", ",")])
def test_a_table_with_a_column_of_paths(tmp_path, name, column, mark):
    picture(tmp_path / "x,y.png", 5)
    rows = [["label", column], ["cat", '"x,y.png"'], [], ["dog"]]
    (tmp_path / name).write_text("\n".join(mark.join(row) for row in rows), encoding="utf-8-sig")
    assert ids(tmp_path / name) == ["x,y.png"]


def test_a_list_made_on_windows(tmp_path):
    picture(tmp_path / "sub" / "a.png")
    (tmp_path / "a.txt").write_text("sub\\a.png\r\n  sub/a.png  \r\n")
    assert ids(tmp_path / "a.txt") == ["sub/a.png"]


def test_lists_that_are_none(tmp_path):
    (tmp_path / "a.csv").write_text("name,label\nx.png,1\n")
    with pytest.raises(InputError, match="no column called path or file or filename or image, only name, label"):
        find_images(tmp_path / "a.csv")
    for name in ("empty.csv", "empty.txt"):
        (tmp_path / name).write_text("path\n" if name == "empty.csv" else "\n\n")
        with pytest.raises(InputError, match="no image in"):
            find_images(tmp_path / name)
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(InputError, match="only nothing"):
        find_images(tmp_path / "nothing.csv")


def test_columns_are_found_by_any_of_their_names(tmp_path):
    (tmp_path / "a.csv").write_text("Class,PATH,other\ncat,a.png,1\n\ndog\n")
    assert read_columns(tmp_path / "a.csv", ("path",), ("label", "class")) == [("a.png", "cat"), ("", "dog")]


# ── size ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("sides", "chosen"), [([64], 64), ([500, 3000], 96), ([70, 71, 72], 64), ([20], 16), ([9], 16),
                                               ([1], 16), ([40, 40, 90], 40), ([15], 16), ([95], 88)])
def test_a_size_that_suits_the_files(tmp_path, sides, chosen):
    files = [ImageFile(str(i), str(picture(tmp_path / f"{i}.png", 0, (side, side + 7))))
             for i, side in enumerate(sides)]
    assert default_size(files) == chosen


def test_the_size_is_taken_from_readable_files_only(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03d}.png").write_bytes(b"")
    picture(tmp_path / "100.png", 0, (33, 40))
    files = find_images(tmp_path)
    assert default_size(files) == 32
    assert default_size(files[:5]) == 96


# ── the stream ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Return a folder of 30 images, the value of each its number, and of every fifth file broken."""
    for i in range(30):
        if i % 5 == 2:
            (tmp_path / f"{i:02d}.jpg").write_text("no picture")
        else:
            picture(tmp_path / f"{i:02d}.png", i)
    return tmp_path


@pytest.mark.parametrize("chunk", [1, 4, 7, 30, 1000])
def test_chunks_hold_all_images_in_order(mixed, chunk):
    chunks = list(stream_images(mixed, size=8, chunk=chunk))
    good = [i for i in range(30) if i % 5 != 2]
    assert [name for c in chunks for name in c.ids] == [f"{i:02d}.png" for i in good]
    assert [int(v) for c in chunks for v in c.pixels[:, 3, 3, 1]] == good
    assert [name for c in chunks for name, _ in c.skipped] == [f"{i:02d}.jpg" for i in range(30) if i % 5 == 2]
    assert all(len(c.ids) == len(c.pixels) and len(c.ids) + len(c.skipped) <= chunk for c in chunks)
    assert all("is not an image" in reason for c in chunks for _, reason in c.skipped)


def test_strict_stops_at_the_first_and_names_it(mixed):
    with pytest.raises(CorruptFileError, match=r"'02\.jpg' is not an image"):
        list(stream_images(mixed, size=8, strict=True))


def test_skipped_files_are_in_the_log_the_first_by_name(tmp_path, caplog):
    for i in range(50):
        (tmp_path / f"bad\n{i:02d}.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "phyla"):
        list(stream_images(tmp_path, size=8, chunk=8))
    assert len(caplog.messages) == 21
    assert caplog.messages[0] == "skipped 'bad\\n00.png': it is empty"
    assert caplog.messages[-1] == "skipped 50 files in all that cannot be read"


def test_errors_come_at_the_call_not_at_the_first_chunk(tmp_path):
    for source, size, chunk in ((tmp_path, 8, 1), (tmp_path / "none", 8, 1), (tmp_path, 0, 1), (tmp_path, 8, 0)):
        with pytest.raises(InputError):
            stream_images(source, size=size, chunk=chunk)


def test_a_single_image_and_a_walk_can_be_streamed(tmp_path):
    path = picture(tmp_path / "a.png", 9)
    assert next(stream_images(path, size=8)).ids == ["a.png"]
    assert next(stream_images([ImageFile("mine", str(path))], size=8)).ids == ["mine"]


def test_no_more_than_two_chunks_are_decoded_ahead_and_threads_end(tmp_path, monkeypatch):
    for i in range(60):
        picture(tmp_path / f"{i:02d}.png", i)
    decoded = []
    real = folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda path, size: (decoded.append(path), real(path, size))[1])
    before = threading.active_count()
    stream = stream_images(tmp_path, size=8, chunk=10)
    next(stream)
    assert len(decoded) <= 20
    stream.close()
    assert len(decoded) <= 20
    assert threading.active_count() == before


def test_pixels_may_be_written_to(mixed):
    for chunk in stream_images(mixed, size=8, chunk=4):
        assert chunk.pixels.flags.writeable
        assert chunk.pixels.dtype == np.uint8
