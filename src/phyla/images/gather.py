"""Chunks of decoded images -> one ImageSet, in memory or in a file that is read through a memory map.

The file is written front to back, not through the map, so that a full disk is an error and not a crash; it is moved
into place when it is whole, and its list of ids beside it is written last: where both are, nothing is decoded again.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from phyla.errors import CorruptFileError, InputError
from phyla.images.catalog import cache_folder
from phyla.images.folders import Chunk
from phyla.progress import bar
from phyla.storage import atomic, fingerprint, read_json, write_json
from phyla.types import ImageSet

MEMORY_BYTES = 4 << 30
"""Pixels that need more than this go into a file even where none was asked for."""

_DECODING = 1  # raise it when the same files would give other pixels, so that kept ones are not used again


@dataclass(frozen=True, eq=False)
class Loaded:
    """Images, and (id, reason) of every file that had to be left out."""

    images: ImageSet
    skipped: tuple[tuple[str, str], ...] = ()


def kept_file(folder: Path | None, name: str, shape: tuple[int, int, int],
              what: Callable[[], object]) -> Path | None:
    """Return the file that keeps these pixels, or None when they go into memory.

    Parameters
    ----------
    folder : asked for by the user; None uses the cache folder, and only above MEMORY_BYTES
    shape : images, height, width
    what : says, JSON-able, what the pixels are made from; called only when they are kept
    """
    if folder is None and int(np.prod(shape, dtype=np.int64)) * 3 <= MEMORY_BYTES:
        return None
    place = Path(folder).expanduser() if folder is not None else cache_folder() / "pixels"
    return place / f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', name)[:40]}-{fingerprint(_DECODING, shape, what())}.npy"


def reopened(file: Path, name: str) -> Loaded | None:
    """Return what an earlier call kept in ``file``, or None when it is not there whole."""
    try:
        told = read_json(file.with_suffix(".json"))
        ids, skipped = told["ids"], told["skipped"]
        pixels = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(ids, list) or not isinstance(skipped, list) or len(ids) > len(pixels):
            return None
        return Loaded(ImageSet(pixels[: len(ids)], ids, name), tuple((str(i), str(why)) for i, why in skipped))
    except (OSError, CorruptFileError, InputError, KeyError, ValueError):
        return None


def gather(chunks: Iterable[Chunk], name: str, shape: tuple[int, int, int], *, file: Path | None = None) -> Loaded:
    """Return all images of ``chunks`` in order, in memory or in ``file``.

    Raises
    ------
    InputError
        Not one image could be read; says why the first could not.
    StorageError
        The file cannot be written.
    """
    if file is None:
        pixels = np.empty((*shape, 3), np.uint8)
        ids, skipped = _filled(chunks, name, shape[0], pixels)
        return Loaded(ImageSet(pixels[: len(ids)], ids, name), tuple(skipped))
    with atomic(file) as temporary, temporary.open("wb") as out:
        header = {"descr": "|u1", "fortran_order": False, "shape": (*shape, 3)}
        np.lib.format.write_array_header_1_0(out, header)
        start = out.tell()
        ids, skipped = _filled(chunks, name, shape[0], out)
        out.truncate(start + int(np.prod(shape, dtype=np.int64)) * 3)  # rows of files left out stay empty, at the end
    write_json(file.with_suffix(".json"), {"ids": ids, "skipped": skipped})
    kept = reopened(file, name)
    if kept is None:
        raise CorruptFileError(f"{file} cannot be read back", "delete it and give the command again")
    return kept


def _filled(chunks: Iterable[Chunk], name: str, n: int,
            out: np.ndarray | BinaryIO) -> tuple[list[str], list[tuple[str, str]]]:
    ids: list[str] = []
    skipped: list[tuple[str, str]] = []
    with bar(f"reading {name}", total=n, unit="images") as shown:
        for chunk in chunks:
            if isinstance(out, np.ndarray):
                out[len(ids) : len(ids) + len(chunk.ids)] = chunk.pixels
            else:
                out.write(np.ascontiguousarray(chunk.pixels).data)
            ids += chunk.ids
            skipped += chunk.skipped
            shown.advance(len(chunk.ids) + len(chunk.skipped))
    if not ids:
        first = f": {skipped[0][0]!r} {skipped[0][1]}" if skipped else ""
        raise InputError(f"none of the {n} images of {name} can be read{first}",
                         "check that they open in an image viewer")
    return ids, skipped
