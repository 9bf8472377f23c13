"""Downloads, against a server on this machine: whole, resumed, checked, refused."""

import functools
import hashlib
import io
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import official
from phyla.errors import CorruptFileError, DataNotFoundError, StorageError
from phyla.images import download, sources
from phyla.images.catalog import DATASETS, Archive
from phyla.progress import shown_by


@dataclass
class Server:
    """What it serves, how it misbehaves, and the ranges it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: list[str | None] = field(default_factory=list)
    break_after: int | None = None  # close the first answer after so many bytes
    ignores_ranges: bool = False
    fails: int = 0  # answer 503 so often
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *rest: object) -> None:
        self.told = server
        super().__init__(*rest)

    def do_GET(self) -> None:
        told, wanted = self.told, self.headers.get("Range")
        told.ranges.append(wanted)
        data = told.files.get(self.path.strip("/"))
        if told.fails or data is None:
            told.fails -= 1 if told.fails else 0
            self.send_error(404 if data is None else 503)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not told.ignores_ranges else 0
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        stop, told.break_after = told.break_after, None
        self.wfile.write(data[start : start + stop] if stop else data[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    monkeypatch.setattr(download, "BLOCK_BYTES", 1000)
    told = Server()
    served = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, told))
    told.url = f"http://127.0.0.1:{served.server_port}"
    thread = Thread(target=served.serve_forever, args=(0.01,))
    thread.start()
    yield told
    served.shutdown()
    thread.join()
    served.server_close()


def offer(server: Server, name: str, data: bytes) -> Archive:
    server.files[name] = data
    return Archive(f"{server.url}/{name}", hashlib.md5(data).hexdigest())


def tarred(folder: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return out.getvalue()


DATA = official.pixels(10, 32).tobytes()


class Shown:
    """A display that remembers: (total, done at first, advanced)."""

    def __init__(self) -> None:
        self.bars: list[list[int | None]] = []

    def start(self, description, total, unit, done):
        assert (description, unit) == ("downloading data.bin", "B")
        self.bars.append([total, done, 0])
        return self

    def advance(self, n=1, note=""):
        self.bars[-1][2] += n

    def stop(self, bar):
        pass


def test_a_file_arrives_whole_with_a_bar(server, tmp_path):
    shown = Shown()
    with shown_by(shown):
        download.fetch(offer(server, "data.bin", DATA), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == DATA
    assert shown.bars == [[len(DATA), 0, len(DATA)]]
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]
    download.fetch(offer(server, "data.bin", DATA), tmp_path)
    assert server.ranges == [None]


def test_a_broken_connection_is_taken_up_where_it_stopped(server, tmp_path):
    server.break_after = 7500
    shown = Shown()
    with shown_by(shown):
        download.fetch(offer(server, "data.bin", DATA), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == DATA
    assert len(server.ranges) == 2
    start = int(server.ranges[1].removeprefix("bytes=").rstrip("-"))
    assert 7000 <= start <= 7500
    assert shown.bars[1] == [len(DATA), start, len(DATA) - start]


def test_a_part_from_an_earlier_run_is_continued(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(DATA[:12000])
    download.fetch(offer(server, "data.bin", DATA), tmp_path)
    assert server.ranges == ["bytes=12000-"]
    assert (tmp_path / "data.bin").read_bytes() == DATA


def test_a_part_that_is_whole_is_only_checked(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(DATA)
    download.fetch(offer(server, "data.bin", DATA), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == DATA


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ignores_ranges = True
    (tmp_path / "data.bin.part").write_bytes(b"x" * 12000)
    download.fetch(offer(server, "data.bin", DATA), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == DATA


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.fails = 1
    (tmp_path / "data.bin.part").write_bytes(b"")
    download.fetch(offer(server, "data.bin", DATA), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == DATA


def test_other_bytes_than_the_official_ones_are_thrown_away(server, tmp_path):
    archive = replace(offer(server, "data.bin", DATA), md5="0" * 32)
    with pytest.raises(CorruptFileError, match=r"data\.bin arrived with md5 [0-9a-f]{32} instead of 0{32}"):
        download.fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_refusals_say_why(server, tmp_path):
    with pytest.raises(download.NotReachableError, match=r"none\.bin answered 404"):
        download.fetch(Archive(f"{server.url}/none.bin", ""), tmp_path)
    server.fails = 9
    with pytest.raises(download.NotReachableError, match="answered 503"):
        download.fetch(offer(server, "data.bin", DATA), tmp_path)
    server.fails = 0
    with pytest.raises(download.NotReachableError, match="sent nothing"):
        download.fetch(offer(server, "empty.bin", b""), tmp_path)
    with pytest.raises(download.NotReachableError, match="refused"):
        download.fetch(Archive("http://127.0.0.1:9/data.bin", ""), tmp_path)


def test_a_full_disk_is_said_and_the_part_stays(server, tmp_path, monkeypatch):
    archive = offer(server, "data.bin", DATA)
    target = tmp_path / "data.bin.part"
    target.write_bytes(DATA[:5000])
    real = Path.open

    def full(self, mode="r", *rest, **options):
        if self == target and "a" in mode:
            raise OSError(28, "No space left on device")
        return real(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="no space left while writing"):
        download.fetch(archive, tmp_path)
    assert target.stat().st_size == 5000


def test_a_data_set_downloads_itself(server, tmp_path, monkeypatch):
    images, _ = official.cifar10(tmp_path / "made")
    archive = offer(server, "cifar-10-python.tar.gz", tarred(tmp_path / "made"))
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], archives=(archive,)))
    home = tmp_path / "data"
    loaded = sources.open_images("cifar10", split="test", data_dir=home)
    np.testing.assert_array_equal(loaded.images.array, images[-official.N :])
    assert [path.name for path in (home / "cifar10").iterdir()] == ["cifar-10-batches-py"]
    sources.open_images("cifar10", data_dir=home)
    assert len(server.ranges) == 1


def test_zipped_files_are_kept_as_they_are(server, tmp_path, monkeypatch):
    images, _ = official.mnist(tmp_path / "made", zipped=True)
    archives = tuple(offer(server, archive.filename, (tmp_path / "made" / archive.filename).read_bytes())
                     for archive in DATASETS["mnist"].archives)
    monkeypatch.setitem(DATASETS, "mnist", replace(DATASETS["mnist"], archives=archives))
    loaded = sources.open_images("mnist", data_dir=tmp_path / "data")
    np.testing.assert_array_equal(loaded.images.array[..., 1], images[:5])
    assert len(list((tmp_path / "data" / "mnist").glob("*.gz"))) == 4


@pytest.mark.parametrize("old_python", [False, True])
def test_an_archive_cannot_write_outside_its_folder(server, tmp_path, monkeypatch, old_python):
    if old_python:
        monkeypatch.delattr(tarfile, "data_filter")
        monkeypatch.setattr(tarfile.TarFile, "extraction_filter", staticmethod(lambda member, _: member), raising=False)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO())
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with nullcontext() if old_python else pytest.raises(CorruptFileError, match="cannot be unpacked"):
        download.fetch(offer(server, "bad.tar.gz", out.getvalue()), folder)
    assert not list(tmp_path.rglob("escaped"))
    assert [path.name for path in folder.iterdir()] == ([] if old_python else ["bad.tar.gz"])


def test_unpacking_adds_to_a_folder_that_is_there(server, tmp_path):
    official.stl10(tmp_path / "made")
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "mine.txt").write_text("kept")
    download.fetch(offer(server, "stl10_binary.tar.gz", tarred(tmp_path / "made")), tmp_path)
    names = {path.name for path in (tmp_path / "stl10_binary").iterdir()}
    assert {"mine.txt", "train_X.bin", "test_y.bin", "class_names.txt"} <= names


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    archive = Archive("http://127.0.0.1:9/cifar-10-python.tar.gz", "")
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], archives=(archive,)))
    with pytest.raises(DataNotFoundError) as raised:
        sources.open_images("cifar10", data_dir=tmp_path)
    text = str(raised.value)
    assert "\n" not in text
    assert "cannot be downloaded" in text
    assert "data_batch_1" in text
    assert str(tmp_path / "cifar10") in text


def test_downloads_avoid_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "readonly").write_text("a file where a folder should be")
    monkeypatch.setenv("PHYLA_DATA", str(tmp_path / "readonly"))
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    assert download.download_folder("stl10", None) == tmp_path / "cache" / "stl10"
    with pytest.raises(StorageError, match="cannot write"):
        download.download_folder("stl10", tmp_path / "readonly")
