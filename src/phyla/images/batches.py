"""Batches of pixels: the order of an epoch, and two stores with one interface (resident on the device, streaming)."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from phyla.errors import InputError
from phyla.images.reader import Reader
from phyla.randomness import generator
from phyla.types import ImageSet

RESIDENT_BYTES = 4 << 30
"""Sets up to this size live on the device as uint8; larger ones stream from disk or host memory."""

AHEAD = 2
"""Batches that are read before they are asked for, at most."""

CPU = torch.device("cpu")


@runtime_checkable
class Pixels(Protocol):
    """Where the pixels of an image set lie while a stage works on them."""

    def __len__(self) -> int:
        """Return the number of images."""

    def take(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch height width 3"]:
        """Return the images of ``indices`` on the device."""

    def expect(self, indices: Int[Tensor, " batch"]) -> None:
        """Hear that ``take(indices)`` comes soon: what must be read for it is read meanwhile."""


class Resident:
    """All pixels on the device as uint8; a batch is one gather, without a copy from the host."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        held = images.pixels if isinstance(images.pixels, Tensor) else _tensor(np.asarray(images.array))
        self.pixels = held.to(device)

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch height width 3"]:
        """Return the images of ``indices`` on the device."""
        return self.pixels[indices]

    def expect(self, indices: Int[Tensor, " batch"]) -> None:
        """Do nothing: everything is here."""


class Streaming:
    """Pixels in files, a memory map or host memory; batches that are expected are read while the device computes.

    At most two batches are read ahead. For a CUDA device they lie in pinned memory and are copied from it while the
    host goes on.
    """

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.device, self._reader = device, Reader(images.array, pinned=device.type == "cuda")
        self._ahead: deque[tuple[Tensor, int, Future[Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._reader)

    def expect(self, indices: Int[Tensor, " batch"]) -> None:
        """Begin to read the images of ``indices``, which may be on the device or, without a wait, on the host."""
        while len(self._ahead) >= AHEAD:  # never asked for after all
            self._drop()
        self._ahead.append((indices, _version(indices), self._reader.start(indices.cpu().numpy())))

    def take(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch height width 3"]:
        """Return the images of ``indices`` on the device.

        Raises
        ------
        CorruptFileError
            A file can no longer be read; names it.
        """
        at = next((place for place, held in enumerate(self._ahead) if _is(indices, *held[:2])), None)
        if at is None:
            batch = self._reader.start(indices.cpu().numpy()).result()
        else:
            for _ in range(at):
                self._drop()
            batch = self._ahead.popleft()[2].result()
        return batch.to(self.device, non_blocking=True)

    def close(self) -> None:
        """End the threads that read ahead; happens by itself when nobody holds this any more."""
        while self._ahead:
            self._drop()
        self._reader.close()

    def _drop(self) -> None:
        self._ahead.popleft()[2].cancel()


def _version(indices: Tensor) -> int:
    return 0 if indices.is_inference() else indices._version


def _is(indices: Tensor, expected: Tensor, version: int) -> bool:
    """Return whether two tensors of indices are the same, without asking the device where their memory tells."""
    if indices.shape != expected.shape or _version(expected) != version:
        return False
    if indices.data_ptr() == expected.data_ptr() and indices.device == expected.device:
        return indices.stride() == expected.stride()
    return indices.device == expected.device and torch.equal(indices, expected)


def open_pixels(images: ImageSet, device: torch.device, *, resident_bytes: int = RESIDENT_BYTES) -> Pixels:
    """Return the store that fits the set: resident up to ``resident_bytes``, streaming above.

    On a CUDA device half of the free memory is the limit if that is less: the rest is for the network. Pixels that are
    not kept stream whatever their size.
    """
    n_bytes = len(images) * 3 * images.size[0] * images.size[1]
    if device.type == "cuda":
        resident_bytes = min(resident_bytes, torch.cuda.mem_get_info(device)[0] // 2)
    is_kept = isinstance(images.pixels, np.ndarray | Tensor)
    return Resident(images, device) if is_kept and n_bytes <= resident_bytes else Streaming(images, device)


@dataclass(frozen=True)
class Order:
    """Which images make up each step: a new permutation every epoch, known from the seed alone.

    Parameters
    ----------
    n_images : images in the set
    batch_size : images a step; lowered to ``n_images`` when there are fewer
    seed : of the permutations
    drop_last : leave the short last batch of an epoch out, as every published configuration does
    device : where the indices are wanted
    """

    n_images: int
    batch_size: int
    seed: int
    drop_last: bool = True
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if self.n_images < 1 or self.batch_size < 1:
            raise InputError(f"an epoch needs images and a batch size of at least 1, got {self.n_images} images "
                             f"and batch_size={self.batch_size}")

    @property
    def rows(self) -> int:
        """Images in a full step."""
        return min(self.batch_size, self.n_images)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that make up one epoch."""
        full, rest = divmod(self.n_images, self.rows)
        return full + (1 if rest and not self.drop_last else 0)

    def epoch(self, epoch: int) -> Int[Tensor, " images"]:
        """Return the permutation of ``epoch``."""
        order = torch.randperm(self.n_images, generator=generator(self.seed, "order", epoch))
        return order.to(self.device, non_blocking=True)

    def indices(self, epoch: int, position: int, permutation: Tensor | None = None) -> Int[Tensor, " batch"]:
        """Return the image indices of step ``position`` of ``epoch``."""
        order = self.epoch(epoch) if permutation is None else permutation
        return order[position * self.rows : (position + 1) * self.rows]


def in_order(n_images: int, batch_size: int, device: torch.device) -> Iterator[Int[Tensor, " batch"]]:
    """Yield 0, 1, 2, ... in batches: every image once, the short last batch included."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, n_images, batch_size):
        yield torch.arange(start, min(start + batch_size, n_images), device=device)


def _tensor(array: np.ndarray) -> Tensor:
    # torch warns about (and must not write to) read-only arrays such as memory maps: give it a copy of those.
    return torch.from_numpy(np.ascontiguousarray(array) if array.flags.writeable else np.array(array))
