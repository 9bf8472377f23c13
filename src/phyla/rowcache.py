"""Embeddings kept image by image, for every run: the same picture goes through the same encoder once.

What an encoder makes of an image is named by the encoder (weights, preprocessing, precision) and by the image's own
pixels, not by files, ids or run folders: a folder with one new image embeds one image, and neither another number of
classes nor another run folder embeds any. Files, one folder an encoder, are written whole or not at all and only
added, so several processes can share them and a kill costs seconds; one that is damaged is deleted, and its rows are
made again. The folder may be deleted at any time: nothing but time is lost.
"""

import hashlib
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from phyla.errors import StorageError
from phyla.images.catalog import cache_folder
from phyla.storage import atomic, fingerprint
from phyla.types import ImageSet

LIMIT_BYTES = 10 << 30
"""What all encoders keep together: above this, the rows of those that were longest not asked for go."""

WRITE_SECONDS, WRITE_ROWS = 15.0, 4096
"""After so long, or so many rows, what was made is written: what a kill costs at most."""

_DIGEST_BYTES = 16
_BLOCK_BYTES = 1 << 26  # pixels that are digested together

log = logging.getLogger("phyla")


def rows_folder() -> Path:
    """Return the folder in which all runs keep embeddings, a folder in it for each encoder."""
    return cache_folder() / "embeddings"


def image_digests(images: ImageSet) -> list[bytes]:
    """Return 16 bytes for each image that change with any of its pixels or with its size, whatever its id."""
    shape, pixels, found = repr(images.size).encode(), images.array, []
    rows = max(1, _BLOCK_BYTES // max(1, 3 * images.size[0] * images.size[1]))
    for start in range(0, len(images), rows):
        for picture in np.asarray(pixels[start : start + rows]):
            digest = hashlib.blake2b(shape, digest_size=_DIGEST_BYTES)
            digest.update(np.ascontiguousarray(picture).data)
            found.append(digest.digest())
    return found


class RowCache:
    """The kept rows of one encoder.

    Parameters
    ----------
    folder : of all encoders; None: ``rows_folder()``
    what : everything that decides a row but the image's pixels, JSON-able
    """

    def __init__(self, folder: Path | None, what: object) -> None:
        self.root = folder or rows_folder()
        self.folder = self.root / fingerprint("rows", what)
        self._waiting: dict[bytes, np.ndarray] = {}
        self._written = time.monotonic()

    def find(self, digests: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Return the rows, float32, of those of ``digests`` that are kept."""
        wanted, found = set(digests), dict[bytes, np.ndarray]()
        for path in sorted(self.folder.glob("*.npz")):
            for keys, values in self._read(path, wanted):
                found.update(zip(keys, values, strict=True))
        if found:
            with suppress(OSError):
                os.utime(self.folder)  # asked for now, so not the first to go
        return found

    def _read(self, path: Path, wanted: set[bytes]) -> Iterator[tuple[list[bytes], np.ndarray]]:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                keys = [row.tobytes() for row in held["digests"]]
                rows = [row for row, key in enumerate(keys) if key in wanted]
                if rows:
                    values = held["values"]  # the archive's checksum is compared while it is read
                    if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(keys):
                        raise ValueError(f"values are {values.dtype} {values.shape}")
                    yield [keys[row] for row in rows], values[rows]
        except FileNotFoundError:
            return  # another process made room
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            log.info("%s is damaged (%s): deleted, its embeddings are made again", path, str(error)[:80])
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def add(self, digests: Sequence[bytes], values: np.ndarray) -> None:
        """Keep a row for each of ``digests``, float32 (n, d): in memory, and now and then in a file."""
        self._waiting.update(zip(digests, values, strict=True))
        if len(self._waiting) >= WRITE_ROWS or time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Put what was added since the last file into a new one; where none can be written, only log it."""
        if self._waiting:
            keys = list(self._waiting)
            digests = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _DIGEST_BYTES)
            # Two processes that made the same rows name their files alike, and the later one changes nothing.
            path = self.folder / f"{fingerprint(digests)}.npz"
            try:
                with atomic(path) as temporary, temporary.open("wb") as out:
                    np.savez(out, allow_pickle=False, digests=digests, values=np.stack(list(self._waiting.values())))
                self._trim()
            except StorageError as error:
                log.warning("embeddings are not kept for the next run: %s", error.message)
            self._waiting = {}
        self._written = time.monotonic()

    def _trim(self) -> None:
        """Delete encoders' folders, those longest not asked for first and this one never, as far as all are too large.
        """
        folders = [folder for folder in self.root.iterdir() if folder.is_dir()]
        room = LIMIT_BYTES - _n_bytes(self.folder)
        for folder in sorted((f for f in folders if f != self.folder), key=_last_used, reverse=True):
            room -= _n_bytes(folder)
            if room < 0:
                log.info("deleting %s, embeddings of an encoder that was not used of late", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _n_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.npz"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
