"""Rows of pixels, read by threads in the background, into pinned memory where they go to a CUDA device."""

import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from phyla.types import StoredPixels

_READERS = 8  # threads that wait for a disk; the copy itself is nothing
_TASK = 32  # rows a thread reads from a map in one go


class Reader:
    """Reads rows of ``pixels`` in the background, one batch after another.

    Parameters
    ----------
    pixels : an array, a memory map, or pixels that are made when asked for
    pinned : into page-locked memory; PyTorch keeps it for the next batch once the device has its copy
    """

    def __init__(self, pixels: np.ndarray | StoredPixels, *, pinned: bool) -> None:
        self._pixels, self._pinned = pixels, pinned
        self._order = ThreadPoolExecutor(1, thread_name_prefix="phyla-batch")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="phyla-read")
        for pool in (self._order, self._readers):
            weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)

    def __len__(self) -> int:
        return len(self._pixels)

    def start(self, rows: np.ndarray) -> Future[Tensor]:
        """Begin to read ``rows``, int64 (n,); the batch, uint8 (n, h, w, 3), has them in that order."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"images {rows.min()} to {rows.max()} of a set of {len(self)}")
        # Pinned memory is got here and not in a thread: a CUDA graph that is being captured allows no other thread to.
        out = torch.empty((len(rows), *self._pixels.shape[1:]), dtype=torch.uint8, pin_memory=self._pinned)
        return self._order.submit(_read, self._pixels, rows, out, self._readers)

    def close(self) -> None:
        """End the threads."""
        for pool in (self._order, self._readers):
            pool.shutdown(wait=True, cancel_futures=True)


def _read(pixels: np.ndarray | StoredPixels, rows: np.ndarray, batch: Tensor, readers: ThreadPoolExecutor) -> Tensor:
    out = batch.numpy()
    if not isinstance(pixels, np.ndarray):
        pixels.read(rows, out)
    elif not isinstance(pixels, np.memmap):
        np.take(pixels, rows, axis=0, out=out, mode="clip")
    else:
        order = np.argsort(rows, kind="stable")  # as they lie on disk
        tasks = [readers.submit(_copy, pixels, rows, order[at : at + _TASK], out)
                 for at in range(0, len(order), _TASK)]
        for task in tasks:
            task.result()
    return batch


def _copy(pixels: np.ndarray, rows: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    for place in places.tolist():
        out[place] = pixels[rows[place]]
