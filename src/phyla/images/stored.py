"""Pixels that are not kept: image files, decoded when rows are asked for; and a list of files that stays small."""

import hashlib
import os
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import overload

import numpy as np

from phyla.errors import CorruptFileError
from phyla.images.decode import read_image
from phyla.images.folders import ImageFile, n_threads

_TASK = 8  # images a thread decodes in one go


class FileList(Sequence[ImageFile]):
    """Image files, packed into about forty bytes each where a list of them takes four hundred.

    Parameters
    ----------
    files : any iterable of them, taken once
    """

    def __init__(self, files: Iterable[ImageFile]) -> None:
        self._text, self._ends, self._start = bytearray(), array("q", [0]), b""
        for row, file in enumerate(files):
            name, path = file.id.encode(), os.fsencode(file.path)
            if row == 0 and path.endswith(name):
                self._start = path[: len(path) - len(name)]  # the folder, the same for all of a walk
            self._text += name
            self._ends.append(len(self._text))
            if path != self._start + name:
                self._text += path
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) // 2

    @overload
    def __getitem__(self, row: int) -> ImageFile: ...

    @overload
    def __getitem__(self, row: slice) -> list[ImageFile]: ...

    def __getitem__(self, row: int | slice) -> ImageFile | list[ImageFile]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        start, middle, end = self._ends[2 * row : 2 * row + 3]
        name = bytes(self._text[start:middle])
        path = bytes(self._text[middle:end]) or self._start + name
        return ImageFile(name.decode(), os.fsdecode(path))

    def __iter__(self) -> Iterator[ImageFile]:
        return (self[row] for row in range(len(self)))


def files_fingerprint(files: Iterable[ImageFile]) -> str:
    """Return 16 hex digits that change with the id, size or time of any of the files; none is opened."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(f"{file.id}\0{stamp(file.path)}\0".encode())
    return digest.hexdigest()


def stamp(path: Path | str) -> tuple[int, int]:
    """Return the size of a file and when it was changed; zeros where that cannot be told."""
    try:
        status = Path(path).stat()
        return status.st_size, status.st_mtime_ns
    except (OSError, ValueError):  # a broken link is a file to be reported, not a reason to stop here
        return 0, 0


class FilePixels:
    """The pixels of image files, uint8 (n, size, size, 3), decoded by threads whenever rows are asked for.

    Takes the place of an array for whoever takes rows of it. Nothing is kept.

    Parameters
    ----------
    files : image files
    rows : which of them, int64 (n,): those that can be read
    size : height and width
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, files: Sequence[ImageFile], rows: np.ndarray, size: int) -> None:
        self._files, self._rows, self._size = files, rows, size
        self._pool: ThreadPoolExecutor | None = None
        self._starting = threading.Lock()

    @property
    def shape(self) -> tuple[int, ...]:
        """n_images, height, width, 3."""
        return len(self._rows), self._size, self._size, 3

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        chosen = np.arange(len(self))[rows]
        out = np.empty((chosen.size, *self.shape[1:]), np.uint8)
        self.read(chosen.reshape(-1), out)
        return out.reshape(*chosen.shape, *self.shape[1:])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the pixels of ``rows`` into ``out``, uint8 (n_rows, size, size, 3).

        Raises
        ------
        CorruptFileError
            A file can no longer be read; names it.
        """
        tasks = [self._threads().submit(self._decode, rows[at : at + _TASK], out[at : at + _TASK])
                 for at in range(0, len(rows), _TASK)]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    def _decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        for place, row in enumerate(rows):
            file = self._files[int(self._rows[row])]
            try:
                out[place] = read_image(file.path, self._size)
            except CorruptFileError as error:
                raise CorruptFileError(f"{error.message}, and could be read before",
                                       "mend or remove it and give the command again: all files are looked at anew"
                                       ) from error

    def _threads(self) -> ThreadPoolExecutor:
        with self._starting:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(n_threads(), thread_name_prefix="phyla-decode")
                weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
            return self._pool
