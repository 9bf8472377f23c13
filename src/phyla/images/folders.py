"""Folders and lists of image files: find them in a fixed order, and decode them as a stream of chunks.

The walk and the stream hold one folder's names and two chunks of pixels at a time, so a million files need no more
memory than a thousand. A file that cannot be read is named, with the reason, in the chunk it would have been in.
"""

import csv
import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.images.decode import SUFFIXES, checked_size, read_image, shorter_side

_log = logging.getLogger("phyla")
_ENDINGS = tuple(SUFFIXES)
LIST_SUFFIXES = (".txt", ".csv", ".tsv")
PATH_COLUMNS = ("path", "file", "filename", "image")
RUN_MARKER = "phyla-run.json"
"""The file by which a run folder is known."""

CHUNK = 256
_TASK = 8  # images a thread decodes in one go: enough to outweigh handing them over
_NAMED_SKIPS = 20  # files named in the log one by one; the rest are counted
_SAMPLED = 64
_LARGEST_DEFAULT, _SMALLEST_DEFAULT = 96, 16


class ImageFile(NamedTuple):
    """One file: ``id`` is its path below the folder, with forward slashes and valid as UTF-8; ``path`` opens it."""

    id: str
    path: str


class Chunk(NamedTuple):
    """Some images in order: ids, pixels uint8 (n, size, size, 3), and (id, reason) of the files left out."""

    ids: list[str]
    pixels: np.ndarray
    skipped: list[tuple[str, str]]


# ── finding ───────────────────────────────────────────────────────────────────────────────────────────────────────


def find_images(source: Path | str) -> list[ImageFile]:
    """Return the image files of a folder (all levels), of a list file, or the one file that ``source`` is.

    Order is that of the relative paths. Hidden files and folders and run folders are left out, each folder is visited
    once however many links lead to it, and a folder or link that cannot be read is kept, so that decoding reports it.

    Raises
    ------
    DataNotFoundError
        There is nothing at ``source``.
    InputError
        There is, and it holds no image.
    """
    return list(walk(source))


def walk(source: Path | str) -> Iterator[ImageFile]:
    """Yield what ``find_images`` returns, without a list of it; errors are raised at the call."""
    files = _files(Path(source).expanduser())
    first = next(files, None)
    if first is None:
        raise InputError(f"no image in {source}", _wanted(Path(source)))
    return _chain(first, files)


def _wanted(source: Path) -> str:
    if source.is_file():
        return "list the image files one a line, or in a CSV column called path"
    return f"looked through all its folders for files ending in {' '.join(sorted(SUFFIXES))}"


def _files(source: Path) -> Iterator[ImageFile]:
    if source.is_dir():
        return _walk(str(source))
    if not is_there(source):
        raise DataNotFoundError(f"there is no folder or file {source}", "check the path; quote it if it holds spaces")
    suffix = source.suffix.lower()
    if suffix in LIST_SUFFIXES:
        return _listed(source)
    if suffix in SUFFIXES:
        return iter([ImageFile(image_id(source.name), str(source))])
    raise InputError(f"{source} is neither a folder, nor a list ({', '.join(LIST_SUFFIXES)}), nor an image",
                     "unpack archives first, and give the folder")


def _walk(root: str) -> Iterator[ImageFile]:
    visited = set()
    levels = [iter([("", root, True)])]
    while levels:
        relative, path, is_folder = next(levels[-1], (None, "", False))
        if relative is None:
            levels.pop()
        elif not is_folder:
            yield ImageFile(image_id(relative or "."), path)
        elif (folder := _identity(path)) not in visited:
            visited.add(folder)
            levels.append(_entries(path, relative))


def _identity(folder: str) -> tuple[int, int] | str:
    try:
        status = Path(folder).stat()
    except OSError:
        return folder
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _entries(folder: str, relative: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (relative path, path, whether a folder) of a folder's images and folders, sorted by relative path.

    Nothing of a run folder: `phyla run .` puts its figures below the images, and is not to take them for images.
    """
    try:
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError:
        yield relative, folder, False
        return
    if any(entry.name == RUN_MARKER for entry in entries):
        return
    # A folder sorts as its name and a slash, so that the whole walk is sorted by relative path.
    named = {entry.name + "/" if _is_folder(entry) else entry.name: entry for entry in entries}
    for name in sorted(named):
        if name.endswith("/") or (name.lower().endswith(_ENDINGS) and _may_be_file(named[name])):
            yield relative + name, named[name].path, name.endswith("/")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    # A broken link is kept, to be reported; a pipe or device of such a name would block whoever opens it.
    try:
        return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())
    except OSError:
        return True


def image_id(name: str) -> str:
    """Return the id of a relative path: itself, or a spelling that is valid UTF-8 where the path is not.

    Odd bytes become ``\\xNN``, and a digest keeps the id apart from that of a file that is really called so.
    """
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        raw = os.fsencode(name)
        return f"{raw.decode('utf-8', 'backslashreplace')}~{hashlib.sha256(raw).hexdigest()[:8]}"


def _listed(source: Path) -> Iterator[ImageFile]:
    if source.suffix.lower() == ".txt":
        text = source.read_text(encoding="utf-8-sig", errors="surrogateescape")
        rows = [line.rstrip("\r") for line in text.split("\n")]
    else:
        rows = [row[0] for row in read_columns(source, PATH_COLUMNS)]
    seen, n_again = set(), 0
    for row in rows:
        if row.strip():
            path = _as_meant(source.parent, row)
            name = image_id(path.as_posix())
            if name in seen:
                n_again += 1
            else:
                seen.add(name)
                yield ImageFile(name, str(source.parent / path))
    if n_again:
        _log.warning("%s names files again in %d lines: each file is used once", source, n_again)


def _as_meant(folder: Path, row: str) -> Path:
    # As written; else without spaces around it; else with the slashes of a list made on Windows.
    readings = dict.fromkeys((row, row.strip(), row.strip().replace("\\", "/")))
    if len(readings) == 1:
        return Path(row)
    return Path(next((text for text in readings if is_there(folder / text)), row))


def is_there(path: Path) -> bool:
    """Return whether a file or folder is at ``path``; a path that cannot even be asked for is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, a null byte
        return False


def read_columns(path: Path, *columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the rows of a .csv or .tsv file with a header: for each of ``columns`` the first name of it that exists.

    Raises
    ------
    InputError
        There is no such column, or the file is not a table.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            table = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = [name.strip().lower() for name in next(table, [])]
            found = [next((header.index(name) for name in names if name in header), None) for names in columns]
            rows = [row for row in table if row]
    except csv.Error as error:
        raise InputError(f"{path} is not a table of text: {error}", "save it as comma-separated UTF-8") from error
    for names, place in zip(columns, found, strict=True):
        if place is None:
            raise InputError(f"{path} has no column called {' or '.join(names)}, only {', '.join(header) or 'nothing'}",
                             "name the columns in its first line")
    return [tuple(row[i] if i is not None and i < len(row) else "" for i in found) for row in rows]


def default_size(files: Sequence[ImageFile], *, largest: int = _LARGEST_DEFAULT) -> int:
    """Return a size that suits the files: the median shorter side of a sample, in eights, from 16 to ``largest``."""
    chosen = np.linspace(0, len(files) - 1, min(_SAMPLED, len(files))).round().astype(int)
    sides = [side for i in chosen.tolist() if (side := shorter_side(files[i].path))]
    if not sides:  # damaged ones may cluster where the sample fell
        sides = list(islice((side for file in files if (side := shorter_side(file.path))), 1))
    middle = int(np.median(sides)) if sides else largest
    return max(_SMALLEST_DEFAULT, middle // 8 * 8) if middle < largest else largest


# ── decoding ──────────────────────────────────────────────────────────────────────────────────────────────────────


def stream_images(source: Path | str | Iterable[ImageFile], *, size: int, chunk: int = CHUNK,
                  strict: bool = False) -> Iterator[Chunk]:
    """Yield the images of a folder, list file, image file or walk in order, ``chunk`` files at a time.

    Threads decode the next chunk while this one is used; memory does not grow with the number of files. A chunk may
    hold fewer images than files, and the last one fewer files; the first files left out are also named in the log.

    Raises
    ------
    CorruptFileError
        A file cannot be read, and ``strict`` is set.
    DataNotFoundError, InputError
        There is nothing at ``source``, or no image; raised at the call, before the first chunk.
    """
    checked_size(size)
    if chunk < 1:
        raise InputError(f"chunk={chunk} is not a number of images", "give 1 or more")
    if isinstance(source, (str, Path)):
        return _stream(walk(source), size, chunk, strict)
    files = iter(source)
    first = next(files, None)
    if first is None:
        raise InputError("there is no image to decode")
    return _stream(_chain(first, files), size, chunk, strict)


def _chain(first: ImageFile, rest: Iterator[ImageFile]) -> Iterator[ImageFile]:
    yield first
    yield from rest


def _stream(files: Iterator[ImageFile], size: int, chunk: int, strict: bool) -> Iterator[Chunk]:
    pool = ThreadPoolExecutor(n_threads(), thread_name_prefix="phyla-decode")
    waiting: deque[Callable[[], Chunk]] = deque()
    n_skipped = 0
    try:
        while True:
            if group := list(islice(files, chunk)):
                waiting.append(_started(pool, group, size))
            if not waiting:
                break
            if len(waiting) > 1 or not group:
                done = waiting.popleft()()
                n_skipped = _report(done.skipped, n_skipped, strict)
                yield done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _report_count(n_skipped)


def _started(pool: ThreadPoolExecutor, group: list[ImageFile], size: int) -> Callable[[], Chunk]:
    pixels = np.empty((len(group), size, size, 3), np.uint8)
    tasks: list[Future[list[str]]] = [pool.submit(_decode_into, pixels[at : at + _TASK], group[at : at + _TASK], size)
                                      for at in range(0, len(group), _TASK)]

    def finished() -> Chunk:
        reasons = [reason for task in tasks for reason in task.result()]
        good = [row for row, reason in enumerate(reasons) if not reason]
        skipped = [(file.id, reason) for file, reason in zip(group, reasons, strict=True) if reason]
        return Chunk([group[row].id for row in good], pixels[good] if skipped else pixels, skipped)

    return finished


def _decode_into(out: np.ndarray, files: list[ImageFile], size: int) -> list[str]:
    """Fill ``out`` with the files' pixels and return what was wrong with each, an empty text where nothing was."""
    reasons = []
    for row, file in enumerate(files):
        try:
            out[row] = read_image(file.path, size)
            reasons.append("")
        except CorruptFileError as error:
            reasons.append(error.message.removeprefix(repr(file.path)).strip())
    return reasons


def report_skipped(skipped: Sequence[tuple[str, str]], *, strict: bool = False) -> None:
    """Name files that were left out in the log: the first ones one by one, and how many there are.

    With ``strict`` the first one is a CorruptFileError.
    """
    _report_count(_report(skipped, 0, strict))


def _report(skipped: Sequence[tuple[str, str]], before: int, strict: bool) -> int:
    for name, reason in skipped:
        if strict:
            damaged = CorruptFileError(f"{name!r} {reason}",
                                       "mend or remove it, or leave out --strict to skip such files")
            damaged.exit_code = 2  # the user asked to be stopped, and it is theirs to mend
            raise damaged
        before += 1
        if before <= _NAMED_SKIPS:
            _log.warning("skipped %r: it %s", name, reason)
    return before


def _report_count(n_skipped: int) -> None:
    if n_skipped > _NAMED_SKIPS:
        _log.warning("skipped %d files in all that cannot be read", n_skipped)


def n_threads() -> int:
    """Return how many threads decode at once: the CPUs this process may use, at most 32."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, available)
