"""The nouns that stages hand to one another. Arrays between stages are NumPy; tensors live inside a stage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from phyla.errors import InputError
from phyla.storage import array_fingerprint, chained_digest, fingerprint

SUM_TOLERANCE = 1e-2
"""How far from 1 a row of probabilities may sum: wide enough for float16 and a thousand clusters."""


_BLOCK_BYTES = 1 << 24


@runtime_checkable
class StoredPixels(Protocol):
    """Pixels that lie elsewhere and are made when rows are asked for: an array to whoever takes rows of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """n_images, height, width, 3."""

    @property
    def dtype(self) -> np.dtype:
        """uint8."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the pixels of one image after another."""

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        """Return the pixels of ``rows``, in that order, in memory."""

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the pixels of ``rows`` into ``out``."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, and a name for each: pixels, never labels.

    Parameters
    ----------
    pixels : uint8 (n_images, height, width, 3), RGB; an array, a memory map, a tensor on any device, or files that are
        decoded when rows are asked for
    ids : one name an image, unique: a relative path with forward slashes, or a running number
    name : what the set is called in reports
    digest : ``chained_digest`` of the pixels, where whoever read them has taken it
    """

    pixels: np.ndarray | Tensor | StoredPixels
    ids: Sequence[str]
    name: str = "images"
    digest: str | None = None

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.pixels.shape), str(self.pixels.dtype).removeprefix("torch.")
        if len(shape) != 4 or shape[3] != 3 or dtype != "uint8":
            raise InputError(f"images must be uint8 (n, height, width, 3), got {dtype} {shape}",
                             "phyla.images.sources.from_array converts other layouts")
        if len(self.ids) != shape[0]:
            raise InputError(f"{shape[0]} images need {shape[0]} ids, got {len(self.ids)}")
        if len(set(self.ids)) != len(self.ids):
            raise InputError("image ids must be unique, and some are not")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])

    @property
    def array(self) -> np.ndarray | StoredPixels:
        """The pixels as what rows can be taken of: an array, a memory map or files, (n_images, height, width, 3) uint8.
        """
        return self.pixels.cpu().numpy() if isinstance(self.pixels, Tensor) else self.pixels

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the pixels and the ids, wherever they lie; a cache is valid for one fingerprint."""
        return fingerprint(self.digest or self._digest(), tuple(self.pixels.shape), list(self.ids))

    def _digest(self) -> str:
        pixels, digest = self.array, ""
        rows = max(1, _BLOCK_BYTES // max(1, 3 * self.size[0] * self.size[1]))
        for start in range(0, len(self), rows):
            digest = chained_digest(np.asarray(pixels[start : start + rows]), digest)
        return digest

    def select(self, rows: np.ndarray) -> "ImageSet":
        """Return the images of ``rows`` (integer indices), in that order."""
        return ImageSet(self.pixels[rows], [self.ids[int(i)] for i in rows], self.name)


@dataclass(frozen=True, eq=False)
class Embeddings:
    """One vector an image: ``values`` float32 (n_images, n_features), rows in the order of ``ids``.

    ``widths`` are the features of each encoder where several stand beside one another; empty for a single one.
    """

    values: np.ndarray
    ids: Sequence[str]
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) != len(self.ids):
            raise InputError(f"embeddings must be ({len(self.ids)}, n_features), got {self.values.shape}")
        if self.widths and (min(self.widths) < 1 or sum(self.widths) != self.values.shape[1]):
            raise InputError(f"widths {self.widths} must be at least 1 each and sum to {self.values.shape[1]}")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the values and the ids."""
        return fingerprint(array_fingerprint(self.values), list(self.ids))


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest other images of every image, nearest first.

    Parameters
    ----------
    indices : int64 (n_images, n_neighbors), never the row itself
    similarities : float32 (n_images, n_neighbors), cosine unless said otherwise, falling along a row
    """

    indices: np.ndarray
    similarities: np.ndarray

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.indices.shape != self.similarities.shape:
            raise InputError(f"neighbors need indices and similarities of one (n, k) shape, got {self.indices.shape} "
                             f"and {self.similarities.shape}")
        if self.indices.size:
            self._validate()

    def _validate(self) -> None:
        n = len(self.indices)
        if not np.issubdtype(self.indices.dtype, np.integer):
            raise InputError(f"neighbors must be integer indices, got {self.indices.dtype}")
        if self.indices.min() < 0 or self.indices.max() >= n:
            raise InputError(f"neighbors of {n} images must be 0 to {n - 1}, got {self.indices.min()} to "
                             f"{self.indices.max()}", "they belong to another set, or the search found too few")
        if itself := int((self.indices == np.arange(n)[:, None]).any(axis=1).sum()):
            raise InputError(f"an image is not its own neighbor, and {itself} are",
                             "leave the image itself out, often the first column")

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def n_neighbors(self) -> int:
        """Neighbors stored for each image."""
        return int(self.indices.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the indices."""
        return array_fingerprint(self.indices)


@dataclass(frozen=True, eq=False)
class Assignment:
    """A cluster for every image: ``probabilities`` float32 (n_images, n_clusters), rows summing to 1."""

    probabilities: np.ndarray
    ids: Sequence[str]

    def __post_init__(self) -> None:
        if self.probabilities.ndim != 2 or len(self.probabilities) != len(self.ids):
            raise InputError(f"probabilities must be ({len(self.ids)}, n_clusters), got {self.probabilities.shape}")
        off = ~(np.abs(self.probabilities.sum(axis=1, dtype=np.float64) - 1) < SUM_TOLERANCE)  # NaN is off, too
        if off.any() or (len(self) and self.probabilities.min() < 0):
            row = int(off.argmax())
            raise InputError(f"rows of probabilities must sum to 1 and have no negative number, {int(off.sum())} of "
                             f"{len(self)} do not; row {row} sums to {self.probabilities[row].sum():.4g}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_clusters(self) -> int:
        """Columns of the assignment, empty clusters included."""
        return int(self.probabilities.shape[1])

    @cached_property
    def labels(self) -> np.ndarray:
        """The most probable cluster of each image, int64 (n_images,)."""
        return self.probabilities.argmax(axis=1).astype(np.int64)

    @cached_property
    def confidence(self) -> np.ndarray:
        """The largest probability of each image, float32 (n_images,)."""
        return self.probabilities.max(axis=1)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Images in each cluster, int64 (n_clusters,)."""
        return np.bincount(self.labels, minlength=self.n_clusters)

    def top(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ``n`` most probable clusters of each image and their probabilities, (n_images, n) each."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :n]
        return order, np.take_along_axis(self.probabilities, order, axis=1)


@dataclass(frozen=True)
class Scores:
    """Named numbers about one assignment: ``values`` maps a full name (``hungarian_accuracy``) to a float."""

    method: str
    split: str
    n_images: int
    values: Mapping[str, float] = field(default_factory=dict)
