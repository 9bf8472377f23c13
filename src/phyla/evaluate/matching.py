"""Match clusters with true classes: one to one (Hungarian), or each cluster with its commonest class.

Inputs are two rows of whole numbers: true classes ``(n,)``, -1 where the class is not known, and clusters ``(n,)``.
Images of unknown class are left out everywhere. There may be more clusters than classes, or fewer: images in a cluster
that has no class count as errors, never as some class. Work is O(n) for the counting, memory O(classes x clusters).
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from phyla.errors import InputError

_CELLS = 1 << 27  # of a table of counts: 1 GB; beyond it the numbers are surely no classes


class Matching(NamedTuple):
    """Which class each cluster stands for.

    ``mapping`` is int64 (n_clusters,): the class of each cluster, or -1; ``contingency`` is int64
    (n_classes, n_clusters): the images of each class in each cluster.
    """

    mapping: np.ndarray
    contingency: np.ndarray


def hungarian_accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the share of images whose cluster stands for their class, 0 to 1, under the best one-to-one matching.

    Parameters
    ----------
    true : int (n_images,), -1 where the class is not known
    predicted : int (n_images,), the cluster of each image

    Raises
    ------
    InputError
        Lengths differ, values are no whole numbers or negative, or no class is known.
    """
    return _diagonal(match_clusters(true, predicted))


def many_to_one_accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the share of images in the commonest class of their cluster, 0 to 1, several clusters to a class or not.

    It grows with the number of clusters, to 1 when every image has its own: compare it only at equal numbers. Arguments
    and errors as ``hungarian_accuracy``.
    """
    counts = count_classes(true, predicted)
    return float(counts.max(axis=0).sum() / counts.sum())


def match_clusters(
    true: np.ndarray, predicted: np.ndarray, *, n_classes: int | None = None, n_clusters: int | None = None
) -> Matching:
    """Return the one-to-one matching of clusters with classes that agrees with most images, and the counts.

    Parameters
    ----------
    true, predicted : as for ``hungarian_accuracy``
    n_classes, n_clusters : how many there are, where some may have no image; the largest value plus 1 if None

    Notes
    -----
    With unequal numbers min(n_classes, n_clusters) pairs are matched; a cluster left over has class -1. An empty
    cluster may be matched with a class left over: that changes no count.
    """
    counts = count_classes(true, predicted, n_classes=n_classes, n_clusters=n_clusters)
    classes, clusters = linear_sum_assignment(counts, maximize=True)
    mapping = np.full(counts.shape[1], -1, np.int64)
    mapping[clusters] = classes
    return Matching(mapping, counts)


def count_classes(
    true: np.ndarray, predicted: np.ndarray, *, n_classes: int | None = None, n_clusters: int | None = None
) -> np.ndarray:
    """Return the contingency table: images of each class in each cluster, int64 (n_classes, n_clusters)."""
    columns = _size(predicted, n_clusters, "clusters")  # of all images: a cluster of unknown classes only has a column
    true, predicted = known(true, predicted)
    rows = _size(true, n_classes, "classes")
    if rows * columns > _CELLS:
        raise InputError(f"a table of {rows} classes and {columns} clusters is too large to match",
                         "number the classes 0, 1, 2, ... without gaps")
    return np.bincount(true * columns + predicted, minlength=rows * columns).reshape(rows, columns)


def known(true: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the true classes and the clusters, int64, of the images whose class is known.

    Raises
    ------
    InputError
        As for ``hungarian_accuracy``.
    """
    true, predicted = whole_numbers(true, "true classes"), whole_numbers(predicted, "clusters")
    if true.shape != predicted.shape:
        raise InputError(f"{len(true)} true classes do not fit the clusters of {len(predicted)} images",
                         "give both for the same images, in one order")
    if len(true) and (true.min() < -1 or predicted.min() < 0):
        raise InputError(f"classes are 0, 1, 2, ... or -1 for unknown, and clusters 0, 1, 2, ...: got {true.min()} "
                         f"among the classes and {predicted.min()} among the clusters")
    if not (true >= 0).any():
        raise InputError(f"none of the {len(true)} images has a known class", "score it without labels")
    return true[true >= 0], predicted[true >= 0]


def whole_numbers(values: np.ndarray, what: str) -> np.ndarray:
    """Return ``values`` as int64 (n,); InputError, naming ``what``, when they are no row of whole numbers."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise InputError(f"{what} must be a row of whole numbers, got {array.dtype} {array.shape}")
    return array.astype(np.int64, copy=False)


def _size(values: np.ndarray, given: int | None, what: str) -> int:
    needed = int(np.max(values, initial=-1)) + 1
    if given is not None and given < needed:
        raise InputError(f"n_{what}={given} is too small: {needed - 1} is among the {what}")
    return needed if given is None else given


def _diagonal(matching: Matching) -> float:
    matched = np.flatnonzero(matching.mapping >= 0)
    agreed = matching.contingency[matching.mapping[matched], matched].sum()
    return float(agreed / matching.contingency.sum())
