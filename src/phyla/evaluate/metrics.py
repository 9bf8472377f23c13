"""Score an assignment: the field's metrics with true classes, and what can be known without them.

Classes and clusters are whole numbers ``(n,)``; images of unknown class (-1) are left out. How clusters are matched
with classes, and what happens when their numbers differ, is said in ``matching``.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn import metrics

from phyla.errors import InputError
from phyla.evaluate.calibration import (
    Judged,
    area_under_risk_coverage,
    brier_score,
    clusters_of_classes,
    confidence_gap,
    expected_calibration_error,
)
from phyla.evaluate.matching import Matching, hungarian_accuracy, known, many_to_one_accuracy, match_clusters
from phyla.quality import effective_clusters, neighbor_agreement, neighbor_score, used_clusters
from phyla.types import Assignment, Neighbors, Scores

_BLOCK = 1 << 22  # probabilities compared at once


def nmi(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mutual information divided by the arithmetic mean of the two entropies, 0 to 1."""
    return _compared(metrics.normalized_mutual_info_score, true, predicted)


def ari(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the Rand index adjusted for chance: 1 for equal partitions, 0 for chance; below 0 is worse than chance."""
    return _compared(metrics.adjusted_rand_score, true, predicted)


def ami(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mutual information adjusted for chance, by the arithmetic mean: 1 for equal, 0 for chance."""
    return _compared(metrics.adjusted_mutual_info_score, true, predicted)


def top_k_accuracy(true: np.ndarray, probabilities: np.ndarray, *, n_top: int = 5) -> float:
    """Return the share of images whose class is matched with one of their ``n_top`` most probable clusters.

    Parameters
    ----------
    true : int (n_images,), -1 where the class is not known
    probabilities : (n_images, n_clusters); the matching is that of the most probable clusters
    n_top : at least 1; when there are fewer clusters, all of them count

    Notes
    -----
    A class without a cluster is never hit, and a cluster without a class hits none. Of equally probable clusters the
    lowest come first.
    """
    if n_top < 1:
        raise InputError(f"n_top must be at least 1, got {n_top}")
    matching = match_clusters(true, probabilities.argmax(axis=1), n_clusters=probabilities.shape[1])
    return _top_hits(np.asarray(true), probabilities, matching, n_top)


@dataclass(frozen=True, eq=False)
class PerClass:
    """One value a class, ``(n_classes,)`` each.

    Parameters
    ----------
    size : int64, images of the class
    cluster : int64, the cluster matched with it, -1 for none
    recall : share of the class in that cluster; NaN for a class without images, 0 for one without a cluster
    precision : share of that cluster that is of the class; NaN where there is no cluster or it is empty
    """

    size: np.ndarray
    cluster: np.ndarray
    recall: np.ndarray
    precision: np.ndarray


def per_class(true: np.ndarray, predicted: np.ndarray, *, n_classes: int | None = None) -> PerClass:
    """Return size, matched cluster, recall and precision of every class; ``n_classes`` as for ``match_clusters``."""
    mapping, counts = match_clusters(true, predicted, n_classes=n_classes)
    cluster = clusters_of_classes(mapping, len(counts))
    size, found = counts.sum(axis=1), np.where(cluster >= 0, counts.sum(axis=0)[cluster], 0)
    hits = np.where(cluster >= 0, counts[np.arange(len(counts)), cluster], 0)
    return PerClass(size, cluster, _share(hits, size), _share(hits, found))


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """True classes against clusters.

    Parameters
    ----------
    counts : int64 (n_classes, n_clusters): rows in the order of the classes, columns in that of ``clusters``
    clusters : int64 (n_clusters,): first the cluster matched with each class, class by class, then those without one
    """

    counts: np.ndarray
    clusters: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """The counts divided by the size of their class, so that a row sums to 1; 0 for a class without images."""
        return np.nan_to_num(_share(self.counts, self.counts.sum(axis=1, keepdims=True)))


def confusion_matrix(
    true: np.ndarray, predicted: np.ndarray, *, n_classes: int | None = None, n_clusters: int | None = None
) -> ConfusionMatrix:
    """Return the counts of each class in each cluster, matched clusters first; arguments as for ``match_clusters``."""
    mapping, counts = match_clusters(true, predicted, n_classes=n_classes, n_clusters=n_clusters)
    clusters = np.argsort(np.where(mapping >= 0, mapping, len(counts)), kind="stable")
    return ConfusionMatrix(counts[:, clusters], clusters)


def score_assignment(assignment: Assignment, true: np.ndarray, *, method: str, split: str,
                     n_bins: int = 15) -> Scores:
    """Return the field's metrics of an assignment.

    Parameters
    ----------
    true : int (n_images,), -1 where the class is not known
    method, split : what is scored, for the table
    n_bins : of the expected calibration error

    Returns
    -------
    Scores
        hungarian_accuracy, many_to_one_accuracy, nmi, ari, ami, and ``top5_accuracy``, named after the number of
        clusters if there are fewer than 5; expected_calibration_error, confidence_gap, brier_score and
        area_under_risk_coverage, in which a matched cluster is correct; n_clusters and used_clusters. ``n_images`` is
        the number of images whose class is known.
    """
    true, labels = np.asarray(true), assignment.labels
    matching = match_clusters(true, labels, n_clusters=assignment.n_clusters)
    n_top = min(5, assignment.n_clusters)
    judged = Judged.of(assignment, true)
    values = {
        "hungarian_accuracy": hungarian_accuracy(true, labels),
        "many_to_one_accuracy": many_to_one_accuracy(true, labels),
        "nmi": nmi(true, labels),
        "ari": ari(true, labels),
        "ami": ami(true, labels),
        f"top{n_top}_accuracy": _top_hits(true, assignment.probabilities, matching, n_top),
        "expected_calibration_error": expected_calibration_error(judged.confidence, judged.correct,
                                                                 n_bins=n_bins),
        "confidence_gap": confidence_gap(judged.confidence, judged.correct),
        "brier_score": brier_score(true, assignment.probabilities),
        "area_under_risk_coverage": area_under_risk_coverage(judged.confidence, judged.correct),
        "n_clusters": float(assignment.n_clusters),
        "used_clusters": float(used_clusters(labels, assignment.n_clusters)),
    }
    return Scores(method, split, len(judged.correct), values)


def score_without_labels(assignment: Assignment, neighbors: Neighbors | None = None) -> dict[str, float]:
    """Return what can be known of an assignment without true classes.

    Returns
    -------
    dict
        n_clusters, used_clusters, effective_clusters, mean_confidence and, with the neighbors of the same images,
        neighbor_agreement and neighbor_score.
    """
    labels = assignment.labels
    values = {
        "n_clusters": float(assignment.n_clusters),
        "used_clusters": float(used_clusters(labels, assignment.n_clusters)),
        "effective_clusters": effective_clusters(labels),
        "mean_confidence": float(assignment.confidence.mean(dtype=np.float64)),
    }
    if neighbors is not None:
        values["neighbor_agreement"] = neighbor_agreement(labels, neighbors)
        values["neighbor_score"] = neighbor_score(assignment.probabilities, neighbors)
    return values


def _compared(metric: Callable[[np.ndarray, np.ndarray], float], true: np.ndarray, predicted: np.ndarray) -> float:
    """Return a metric of two partitions on the images of known class."""
    with warnings.catch_warnings():  # scikit-learn takes many small clusters for a continuous target
        warnings.filterwarnings("ignore", message="The number of unique classes is greater", category=UserWarning)
        return float(metric(*known(true, predicted)))


def _top_hits(true: np.ndarray, probabilities: np.ndarray, matching: Matching, n_top: int) -> float:
    cluster = clusters_of_classes(matching.mapping, len(matching.contingency))
    rows = np.flatnonzero(true >= 0)
    n_known = len(rows)
    rows = rows[cluster[true[rows]] >= 0]
    step = max(1, _BLOCK // probabilities.shape[1])
    hits = 0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        wanted, p = cluster[true[part]][:, None], probabilities[part]
        own = np.take_along_axis(p, wanted, axis=1)
        before = (p > own) | ((p == own) & (np.arange(p.shape[1]) < wanted))
        hits += int(np.count_nonzero(before.sum(axis=1) < n_top))
    return hits / n_known


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return ``part / whole``, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)
