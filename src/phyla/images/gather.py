"""Chunks of decoded images -> one ImageSet: in memory, in a file that is read through a memory map, or not kept at all.

The file is written front to back, not through the map, so that a full disk is an error and not a crash; it is moved
into place when it is whole, and its list of ids beside it is written last: where both are, nothing is decoded again.
A reading that was killed goes on where a note beside the growing file says it was. Pixels that are not kept are decoded
once to find the files that cannot be, and that list is kept; whoever wants rows decodes them again.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from phyla.errors import CorruptFileError, InputError, StorageError
from phyla.images.catalog import cache_folder
from phyla.images.folders import Chunk, report_skipped
from phyla.progress import bar
from phyla.storage import (
    chained_digest,
    claimed,
    fingerprint,
    is_claimed,
    is_refusal,
    read_json,
    storage_error,
    write_json,
)
from phyla.types import ImageSet, StoredPixels

MEMORY_BYTES = 4 << 30
"""Pixels that need more than this go into a file even where none was asked for."""

FILE_BYTES = 100 << 30
"""Pixels that need more than this, or than half of the free disk, are not kept unless asked for."""

SHARED_BYTES = 20 << 30
"""Pixels in the cache folder, which all runs share: above this, those that were longest not used go."""

NOTE_SECONDS = 2.0
"""How often a reading notes where it is: what a kill costs at most."""

Keep = Literal["auto", "memory", "file", "off"]
Chunks = Callable[[int], Iterable[Chunk]]
"""Gives the chunks of all images from the given one on, those left out counted."""

DECODING = 1  # raise it when the same files would give other pixels, so that kept ones are not used again

_log = logging.getLogger("phyla")


@dataclass(frozen=True, eq=False)
class Loaded:
    """Images, and (id, reason) of every file that had to be left out."""

    images: ImageSet
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """What pixels are read from.

    Parameters
    ----------
    name : of the set
    ids : of all images, readable or not
    size : height and width
    chunks : gives the decoded images from any one on
    strict : a file that cannot be read is an error
    """

    name: str
    ids: Sequence[str]
    size: int
    chunks: Chunks
    strict: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, height, width."""
        return len(self.ids), self.size, self.size

    @property
    def n_bytes(self) -> int:
        """Bytes of all pixels."""
        return 3 * len(self.ids) * self.size**2


def how_kept(keep: Keep, n_bytes: int, folder: Path | None) -> Keep:
    """Return what "auto" comes to for so many bytes of pixels: memory, file or off; anything else as it is.

    A file where a folder is given, memory up to MEMORY_BYTES where none is, a file above, and off where that would take
    more than FILE_BYTES or half of the disk.
    """
    if keep != "auto":
        return keep
    if folder is None and n_bytes <= MEMORY_BYTES:
        return "memory"
    return "file" if n_bytes <= min(FILE_BYTES, _room(_place(folder))) else "off"


def shared_folder() -> Path:
    """Return the folder in which pixels are kept that all runs share."""
    return cache_folder().absolute() / "pixels"


def _trim(newest: Path) -> None:
    """Delete what was longest not used of the other files beside ``newest``, as far as they are too many bytes."""
    told = sorted(newest.parent.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    room = SHARED_BYTES - newest.stat().st_size
    for note in told:
        file = note.with_suffix(".npy")
        if file == newest or not file.exists() or is_claimed(_beside(file, "lock")):
            continue
        room -= file.stat().st_size
        if room < 0:
            _log.info("deleting %s, pixels of images that were not asked for of late", file)
            with suppress(OSError):  # on Windows, what another process reads stays
                file.unlink()
                note.unlink(missing_ok=True)


def _room(folder: Path) -> int:
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    # What was read before a stop fills the disk already: the answer must not be another one now.
    ours = sum(path.stat().st_size for path in there.glob(".*.growing")) if there == folder else 0
    return (shutil.disk_usage(there).free + ours) // 2


def _place(folder: Path | None) -> Path:
    return Path(folder).expanduser().absolute() if folder is not None else shared_folder()


def kept_file(folder: Path | None, name: str, shape: tuple[int, int, int], what: object) -> Path:
    """Return the file that keeps these pixels.

    Parameters
    ----------
    folder : asked for by the user; None: the cache folder
    shape : images, height, width
    what : says, JSON-able, what the pixels are made from
    """
    return _place(folder) / f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', name)[:40]}-{fingerprint(DECODING, shape, what)}.npy"


def reopened(file: Path, name: str) -> Loaded | None:
    """Return what an earlier call kept in ``file``, or None when it is not there whole."""
    try:
        told = read_json(file.with_suffix(".json"))
        ids, skipped = told["ids"], told["skipped"]
        pixels = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(ids, list) or not isinstance(skipped, list) or len(ids) > len(pixels):
            return None
        untouched = file.stat().st_mtime_ns <= file.with_suffix(".json").stat().st_mtime_ns
        digest = str(told["digest"]) if untouched and "digest" in told else None
        return Loaded(ImageSet(pixels[: len(ids)], ids, name, digest), tuple((str(i), str(why)) for i, why in skipped))
    except (OSError, CorruptFileError, InputError, KeyError, ValueError):
        return None


def gather(source: Source, file: Path | None = None) -> Loaded:
    """Return all images of ``source`` in order, in memory or in ``file``.

    Raises
    ------
    InputError
        Not one image could be read; says why the first could not.
    StorageError
        The file cannot be written.
    """
    read = _Read()
    if file is None:
        pixels = np.empty((*source.shape, 3), np.uint8)
        for chunk in _chunks(source, read):
            pixels[read.rows : read.rows + len(chunk.ids)] = chunk.pixels
            read.add(chunk)
        ids = _good(source, read)
        return Loaded(ImageSet(pixels[: len(ids)], ids, source.name), tuple(read.skipped))
    with claimed(_beside(file, "lock")):
        if kept := reopened(file, source.name):  # from before, or by another process while this one waited
            if kept.images.digest is not None:  # a later time would vouch for pixels that somebody has changed
                file.with_suffix(".json").touch()  # used now
            report_skipped(kept.skipped, strict=source.strict)
            return kept
        ids, read = _grown(source, file, writes=True)
        write_json(file.with_suffix(".json"), {"ids": ids, "digest": read.digest, "skipped": read.skipped})
        _beside(file, "note").unlink(missing_ok=True)
    if file.parent == shared_folder():
        _trim(file)
    if kept := reopened(file, source.name):
        return kept
    raise CorruptFileError(f"{file} cannot be read back", "delete it and give the command again")


def looked_at(source: Source, file: Path, pixels: Callable[[np.ndarray], StoredPixels]) -> Loaded:
    """Return the images of ``source`` without keeping pixels, each decoded once to know that it can be.

    Parameters
    ----------
    file : where the pixels would be kept; the list of images lies beside it, and the next call takes it
    pixels : what gives the pixels of the images of the given rows
    """
    listed = file.with_suffix(".json")
    with claimed(_beside(file, "lock")):
        read = _noted(listed)
        if read is not None and read.digest:
            report_skipped(read.skipped, strict=source.strict)
            ids = _good(source, read)
        else:
            ids, read = _grown(source, file, writes=False)
            write_json(listed, {"ids": ids, "digest": read.digest, "skipped": read.skipped})
            _beside(file, "note").unlink(missing_ok=True)
    left_out = {name for name, _ in read.skipped}
    rows = np.array([row for row, name in enumerate(source.ids) if name not in left_out], np.int64)
    return Loaded(ImageSet(pixels(rows), ids, source.name, read.digest), tuple(read.skipped))


@dataclass
class _Read:
    """How far a reading has come: images asked for, rows of pixels found, what was left out, and the digest so far."""

    asked: int = 0
    rows: int = 0
    digest: str = ""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    noted: float = field(default_factory=time.monotonic)

    def add(self, chunk: Chunk) -> None:
        self.asked += len(chunk.ids) + len(chunk.skipped)
        self.rows += len(chunk.ids)
        self.skipped += chunk.skipped


def _noted(path: Path) -> _Read | None:
    try:
        told = read_json(path)
        skipped = [(str(name), str(why)) for name, why in told["skipped"]]
        rows = int(told["rows"]) if "rows" in told else len(told["ids"])
        return _Read(rows + len(skipped), rows, str(told.get("digest", "")), skipped)
    except (OSError, CorruptFileError, KeyError, TypeError, ValueError):
        return None


def _grown(source: Source, file: Path, *, writes: bool) -> tuple[list[str], _Read]:
    """Read all of ``source``, or what an earlier reading left of it, into ``file`` if it ``writes``."""
    _remove_others(file)
    growing, note = _beside(file, "growing"), _beside(file, "note")
    read = _noted(note) or _Read()
    try:
        if writes:
            with growing.open("r+b" if growing.exists() else "w+b") as out:
                ids, read = _written(source, read, note, out)
            growing.replace(file)
            return ids, read
        for chunk in _chunks(source, read):
            read.digest = chained_digest(chunk.pixels, read.digest)
            read.add(chunk)
            _note(note, read)
        return _good(source, read), read
    except InputError:
        growing.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        raise
    except OSError as error:
        if isinstance(error, StorageError) or not is_refusal(error):
            raise
        raise storage_error(file, error) from error


def _written(source: Source, read: _Read, note: Path, out: BinaryIO) -> tuple[list[str], _Read]:
    row = 3 * source.size**2
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (*source.shape, 3)})
    start = out.tell()
    if out.seek(0, os.SEEK_END) < start + read.rows * row:  # less than the note says
        read = _Read()
    out.truncate(start + read.rows * row)
    out.seek(0, os.SEEK_END)
    for chunk in _chunks(source, read):
        out.write(np.ascontiguousarray(chunk.pixels).data)
        read.digest = chained_digest(chunk.pixels, read.digest)
        read.add(chunk)
        _note(note, read, out)
    ids = _good(source, read)
    out.truncate(start + source.n_bytes)  # rows of files left out stay empty, at the end
    out.flush()
    os.fsync(out.fileno())
    return ids, read


def _note(note: Path, read: _Read, out: BinaryIO | None = None) -> None:
    """Note how far a reading has come, if the last note is old enough; the pixels are written before."""
    now = time.monotonic()
    if now - read.noted < NOTE_SECONDS:
        return
    if out is not None:
        out.flush()
    write_json(note, {"digest": read.digest, "rows": read.rows, "skipped": read.skipped})
    read.noted = time.monotonic()


def _chunks(source: Source, read: _Read) -> Iterator[Chunk]:
    """Yield the chunks that are missing; whoever takes one adds it to ``read``."""
    if read.asked:
        _log.info("reading %s goes on at image %d of %d", source.name, read.asked, len(source.ids))
        report_skipped(read.skipped, strict=source.strict)
    missing = source.chunks(read.asked) if read.asked < len(source.ids) else ()
    with bar(f"reading {source.name}", total=len(source.ids), unit="images", done=read.asked) as shown:
        for chunk in missing:
            yield chunk
            shown.advance(len(chunk.ids) + len(chunk.skipped))


def _good(source: Source, read: _Read) -> list[str]:
    if not read.rows:
        first = f": {read.skipped[0][0]!r} {read.skipped[0][1]}" if read.skipped else ""
        raise InputError(f"none of the {len(source.ids)} images of {source.name} can be read{first}",
                         "check that they open in an image viewer")
    left_out = {name for name, _ in read.skipped}
    return [name for name in source.ids if name not in left_out]


def _beside(file: Path, kind: str) -> Path:
    return file.with_name(f".{file.name}.{kind}")


def _remove_others(file: Path) -> None:
    """Delete what readings of the same images, as they were earlier, have left when they were stopped."""
    name = re.escape(file.stem.rpartition("-")[0])
    for path in list(file.parent.glob(".*.npy.*")):
        other = re.fullmatch(rf"\.({name}-[0-9a-f]{{16}}\.npy)\.(growing|note|lock)", path.name)
        if other and other[1] != file.name and not is_claimed(_beside(file.with_name(other[1]), "lock")):
            path.unlink(missing_ok=True)
