"""Batches of pixels: the order of an epoch, and two stores with one interface (resident on the device, streaming)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from phyla.errors import InputError
from phyla.randomness import generator
from phyla.types import ImageSet

RESIDENT_BYTES = 4 << 30
"""Sets up to this size live on the device as uint8; larger ones stream from disk or host memory."""


CPU = torch.device("cpu")


@runtime_checkable
class Pixels(Protocol):
    """Where the pixels of an image set lie while a stage works on them."""

    def __len__(self) -> int:
        """Return the number of images."""

    def take(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch height width 3"]:
        """Return the images of ``indices`` on the device."""


class Resident:
    """All pixels on the device as uint8; a batch is one gather, without a copy from the host."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        held = images.pixels if isinstance(images.pixels, Tensor) else _tensor(images.array)
        self.pixels = held.to(device)

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch height width 3"]:
        """Return the images of ``indices`` on the device."""
        return self.pixels[indices]


class Streaming:
    """Pixels in a memory map or in host memory; only a batch at a time goes to the device."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.array, self.device = images.array, device

    def __len__(self) -> int:
        return len(self.array)

    def take(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch height width 3"]:
        """Return the images of ``indices`` on the device; rows are read in the order they lie on disk."""
        rows = indices.cpu().numpy()
        order = np.argsort(rows, kind="stable")
        batch = np.empty((len(rows), *self.array.shape[1:]), np.uint8)
        batch[order] = self.array[rows[order]]
        return torch.from_numpy(batch).to(self.device, non_blocking=True)


def open_pixels(images: ImageSet, device: torch.device, *, resident_bytes: int = RESIDENT_BYTES) -> Pixels:
    """Return the store that fits the set: resident up to ``resident_bytes``, streaming above.

    On a CUDA device half of the free memory is the limit if that is less: the rest is for the network.
    """
    n_bytes = len(images) * 3 * images.size[0] * images.size[1]
    if device.type == "cuda":
        resident_bytes = min(resident_bytes, torch.cuda.mem_get_info(device)[0] // 2)
    return Resident(images, device) if n_bytes <= resident_bytes else Streaming(images, device)


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
