"""Find the images that need a person's eye, without labels: copies of one another, outliers, blurred, dark, blank ones.

Copies and outliers come from the neighbors that were found already, in O(n k); the rest from one pass over the pixels
as they are stored. All of it is a hint: a picture may be odd and right.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from phyla.types import ImageSet, Neighbors

DUPLICATE_SIMILARITY = 0.999
"""Two images at least so similar are near-duplicates, whatever the encoder."""
OUTLIER_NEIGHBORS = 20
"""Neighbors that an outlier score looks at, at most."""

_FENCE = 1.5  # interquartile ranges beyond the outer quartile (Tukey 1977)
_COPY = 0.15  # of the median distance to the 20th neighbor: copies scaled, cropped or compressed anew (LOG 2026-11-28)
_PILE = 0.6  # of the median distance: neighbors nearer to one another than this are copies and make nobody an outlier,
_LEAST = 1.3  # as an ordinary image beside them scores no more than this
_BLOCK_BYTES = 1 << 24
_BLANK_SPREAD, _DARK_TOP = 4.0, 64.0  # grey values of 255
_BLURRED = 0.5  # of the median sharpness of the set


# ── copies ────────────────────────────────────────────────────────────────────────────────────────────────────────


def duplicate_similarity(neighbors: Neighbors) -> float:
    """Return the similarity from which two images are near-duplicates: the encoder sees the same picture.

    0.999, or less with an encoder that puts images far apart: where the distance, 1 less the similarity, is 0.15 of the
    median distance to the last neighbor, the 20th at most.
    """
    return min(DUPLICATE_SIMILARITY, 1 - _COPY * float(np.median(_farthest(neighbors))))


def near_duplicate_pairs(neighbors: Neighbors, similarity: float) -> np.ndarray:
    """Return pairs of images at or above ``similarity``, int64 (n_pairs, 2), first index smaller, most alike first."""
    rows, ranks = np.nonzero(neighbors.similarities >= similarity)
    others = neighbors.indices[rows, ranks]
    low, high = np.minimum(rows, others), np.maximum(rows, others)
    _, first = np.unique(low * len(neighbors) + high, return_index=True)
    order = first[np.argsort(-neighbors.similarities[rows, ranks][first], kind="stable")]
    return np.stack([low[order], high[order]], axis=1).astype(np.int64)


def duplicate_groups(pairs: np.ndarray, n_images: int) -> np.ndarray:
    """Return the group of copies that each image belongs to, int64 (n_images,), -1 for an image without a copy.

    Groups are the connected components of ``pairs``, int (n_pairs, 2), numbered from 0 in the order of their first
    images.
    """
    ones = np.ones(len(pairs), dtype=np.int8)
    graph = sparse.coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(n_images, n_images))
    _, component = connected_components(graph, directed=False)
    return _grouped(component)


def identical_groups(images: ImageSet, measures: "PixelMeasures") -> np.ndarray:
    """Return the group of equal pixels that each image belongs to, as ``duplicate_groups``.

    Only images whose ``measures`` are those of another one are read once more and compared.
    """
    table = np.stack([measures.brightness, measures.highlight, measures.contrast, measures.sharpness], axis=1)
    _, kind, counts = np.unique(np.nan_to_num(table), axis=0, return_inverse=True, return_counts=True)
    alike = np.flatnonzero(counts[kind.ravel()] > 1)
    digests = [_digest(image) for start in range(0, len(alike), _rows_a_block(images))
               for image in np.asarray(images.array[alike[start : start + _rows_a_block(images)]])]
    groups = np.full(len(images), -1, dtype=np.int64)
    if len(alike):
        groups[alike] = _grouped(np.unique(digests, return_inverse=True)[1])
    return groups


def _digest(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest()) >> 1  # fits int64


def _grouped(kind: np.ndarray) -> np.ndarray:
    """Return ``kind`` numbered anew in the order of first appearance, -1 where it stands for one image alone."""
    _, first, inverse, counts = np.unique(kind, return_index=True, return_inverse=True, return_counts=True)
    several = counts > 1
    number = np.full(len(first), -1, dtype=np.int64)
    number[np.flatnonzero(several)[np.argsort(first[several])]] = np.arange(several.sum())
    return number[inverse]


# ── outliers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def outlier_scores(neighbors: Neighbors) -> np.ndarray:
    """Return how far each image lies from others, float64 (n_images,): 1 is ordinary, more is odder.

    Notes
    -----
    The distance d of an image is 1 less the similarity to its last neighbor, the 20th at most. The score is the
    geometric mean of d over the median d of all images and d over the median d of its neighbors: far from everything,
    and farther than those it is nearest to. The first alone finds whole loose classes odd, the second alone (as the
    local outlier factor) misses a few odd images that lie together.
    """
    far = _farthest(neighbors)
    ordinary = float(np.median(far))
    if not ordinary:
        return np.ones(len(neighbors))  # most images are copies: no distance tells anything
    around = np.maximum(np.median(far[neighbors.indices[:, :OUTLIER_NEIGHBORS]], axis=1), _PILE * ordinary)
    return np.sqrt(far / ordinary * (far / around))


def _farthest(neighbors: Neighbors) -> np.ndarray:
    """Return the distance of each image to its last neighbor, the 20th at most, float64 (n_images,)."""
    last = min(OUTLIER_NEIGHBORS, neighbors.n_neighbors) - 1
    return np.maximum(1 - neighbors.similarities[:, last].astype(np.float64), 0)


def outliers(scores: np.ndarray) -> np.ndarray:
    """Return which scores are outside of what the bulk of them allows, bool (n_images,).

    Of their logarithms, those more than 1.5 interquartile ranges above the upper quartile (Tukey 1977), about 0.3 % of
    images that are all alike odd; and above 1.3 in any case.
    """
    return (_logs(scores) > _upper_fence(scores)) & (scores > _LEAST)


def _upper_fence(scores: np.ndarray) -> float:
    low, high = np.percentile(_logs(scores), (25, 75))
    return float(high + _FENCE * (high - low))


def _logs(scores: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(scores, 1e-6))


# ── pixels ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class PixelMeasures:
    """What the pixels of each image amount to, as they are stored; float32 (n_images,) each.

    Parameters
    ----------
    brightness : mean grey value, 0 to 255
    highlight : grey value that 1 % of the pixels exceed
    contrast : standard deviation of the grey values
    sharpness : standard deviation of the Laplacian over the contrast; a blurred picture has little, noise 4.5; NaN for
        a blank picture and for one less than three pixels wide or high
    """

    brightness: np.ndarray
    highlight: np.ndarray
    contrast: np.ndarray
    sharpness: np.ndarray

    def hints(self) -> Mapping[str, np.ndarray]:
        """Return which images are blank, dark or blurred, bool (n_images,) each; no image is two of them.

        Blank: all of one grey (contrast below 4). Dark: hardly a pixel above a quarter of white. Blurred: half as sharp
        as the median of the set, and outside of what its bulk allows.
        """
        blank = self.contrast < _BLANK_SPREAD
        dark = ~blank & (self.highlight < _DARK_TOP)
        judged = ~blank & ~dark & np.isfinite(self.sharpness)
        blurred = np.zeros(len(blank), dtype=bool)
        if judged.any():
            dull = np.median(self.sharpness[judged]) / np.maximum(self.sharpness[judged], 1e-6)
            blurred[judged] = outliers(dull) & (dull > 1 / _BLURRED)
        return {"blank": blank, "dark": dark, "blurred": blurred}


def measure_pixels(images: ImageSet) -> PixelMeasures:
    """Return the measures of every image, from one pass over the pixels; files that are not kept are decoded."""
    rows = _rows_a_block(images)
    parts = [_measured(np.asarray(images.array[start : start + rows])) for start in range(0, len(images), rows)]
    return PixelMeasures(*(np.concatenate(column).astype(np.float32) for column in zip(*parts, strict=True)))


def _rows_a_block(images: ImageSet) -> int:
    return max(1, _BLOCK_BYTES // max(1, 3 * images.size[0] * images.size[1]))


def _measured(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    red, green, blue = (pixels[..., channel].astype(np.uint16) for channel in range(3))
    grey = ((77 * red + 151 * green + 28 * blue) >> 8).astype(np.uint8)  # ITU-R BT.601 in 256ths
    counts, area = np.stack([np.bincount(image.ravel(), minlength=256) for image in grey]), grey[0].size
    values = np.arange(256.0)
    mean = counts @ values / area
    contrast = np.sqrt(np.maximum(counts @ values**2 / area - mean**2, 0))
    highlight = (counts.cumsum(axis=1) >= 0.99 * area).argmax(axis=1)
    return mean, highlight, contrast, _sharpness(grey, contrast)


def _sharpness(grey: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    found = np.full(len(grey), np.nan)
    if min(grey.shape[1:]) < 3:
        return found
    g = grey.astype(np.int16)
    edges = 4 * g[:, 1:-1, 1:-1] - g[:, :-2, 1:-1] - g[:, 2:, 1:-1] - g[:, 1:-1, :-2] - g[:, 1:-1, 2:]
    flat = edges.reshape(len(g), -1).astype(np.float32)
    power = np.einsum("ij,ij->i", flat, flat) / flat.shape[1] - flat.mean(axis=1) ** 2
    return np.divide(np.sqrt(np.maximum(power, 0)), contrast, out=found, where=contrast > 0)


# ── all together ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Oddities:
    """What is odd about each image of a set.

    Parameters
    ----------
    similarity : from which two images are near-duplicates; None without neighbors
    pairs : int64 (n_pairs, 2), near-duplicates, the most alike first
    groups : int64 (n_images,), the group of near-duplicates or of equal pixels; -1 for an image without a copy
    identical : int64 (n_images,), the group of equal pixels; -1 likewise
    scores : float64 (n_images,), 1 is ordinary; None without neighbors
    outlying : bool (n_images,); none without neighbors
    pixels : measures of the pixels; None if they were not looked at
    """

    similarity: float | None
    pairs: np.ndarray
    groups: np.ndarray
    identical: np.ndarray
    scores: np.ndarray | None
    outlying: np.ndarray
    pixels: PixelMeasures | None

    @cached_property
    def hints(self) -> Mapping[str, np.ndarray]:
        """Which images are blank, dark or blurred, bool (n_images,) each; empty if the pixels were not looked at."""
        return {} if self.pixels is None else self.pixels.hints()

    def oddest(self, n: int) -> list[int]:
        """Return up to ``n`` rows by falling score, outliers or not; none without neighbors."""
        return [] if self.scores is None else np.argsort(-self.scores, kind="stable")[:n].tolist()


def find_oddities(images: ImageSet, neighbors: Neighbors | None, *, look: bool = True) -> Oddities:
    """Return what is odd about each image; ``look`` at the pixels too, or leave their measures out."""
    n_images = len(images)
    pixels = measure_pixels(images) if look else None
    identical = np.full(n_images, -1) if pixels is None else identical_groups(images, pixels)
    if neighbors is None or not neighbors.n_neighbors:
        return Oddities(None, np.empty((0, 2), np.int64), identical, identical, None, np.zeros(n_images, bool), pixels)
    similarity = duplicate_similarity(neighbors)
    pairs = near_duplicate_pairs(neighbors, similarity)
    groups = duplicate_groups(np.concatenate([pairs, _chains(identical)]), n_images)
    scores = outlier_scores(neighbors)
    return Oddities(similarity, pairs, groups, identical, scores, outliers(scores), pixels)


def _chains(groups: np.ndarray) -> np.ndarray:
    """Return pairs that join the members of each group, int64 (n_pairs, 2): each with the next one."""
    rows = np.flatnonzero(groups >= 0)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    follows = groups[rows[1:]] == groups[rows[:-1]]
    return np.stack([rows[:-1][follows], rows[1:][follows]], axis=1).astype(np.int64)
