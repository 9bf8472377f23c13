"""Ask whether confidence is honest: whether images are right as often as the assignment is sure of them.

An image is right when its cluster is the one matched with its class, one to one over the whole split (`matching`).
Confidence is the largest probability of an image; nothing is rescaled. Images of unknown class (-1) are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from phyla.errors import InputError
from phyla.evaluate.matching import known, match_clusters
from phyla.types import Assignment

N_BINS = 15
"""Bins of equal width from 0 to 1, as most of the literature has them."""

Rows = list[dict[str, float | int | None]]

_ROUNDING = 1e-5  # by which a float32 probability may pass 1
_BLOCK = 1 << 22  # probabilities held as float64 at once
_COVERAGES = np.arange(5, 101, 5) / 100  # of the table of a risk-coverage curve


@dataclass(frozen=True, eq=False)
class Judged:
    """The images of known class: how sure the assignment is of each, and whether it is right.

    Parameters
    ----------
    confidence : float64 (n_known,), 0 to 1
    correct : bool (n_known,)
    """

    confidence: np.ndarray
    correct: np.ndarray

    @classmethod
    def of(cls, assignment: Assignment, true: np.ndarray) -> "Judged":
        """Return what ``true``, int (n_images,) with -1 for unknown, says of an assignment."""
        true = np.asarray(true)
        mapping, _ = match_clusters(true, assignment.labels, n_clusters=assignment.n_clusters)
        classes, clusters = known(true, assignment.labels)
        return cls(assignment.confidence[true >= 0].astype(np.float64), mapping[clusters] == classes)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against the share that is right, bin by bin; bins are closed above, and 0 itself is in the first.

    Parameters
    ----------
    counts : int64 (n_bins,), images in each bin
    mean_confidence, share_correct : float64 (n_bins,), NaN for a bin without images
    """

    counts: np.ndarray
    mean_confidence: np.ndarray
    share_correct: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, correct: np.ndarray, *, n_bins: int = N_BINS) -> "Reliability":
        """Return the table of ``confidence`` and ``correct``; arguments as for expected_calibration_error."""
        confidence, correct = _checked(confidence, correct)
        bins = _bins(confidence, n_bins)
        counts = np.bincount(bins, minlength=n_bins)
        means = [np.divide(np.bincount(bins, weights=values, minlength=n_bins), counts, where=counts > 0,
                           out=np.full(n_bins, np.nan)) for values in (confidence, correct)]
        return cls(counts, *means)

    @property
    def edges(self) -> np.ndarray:
        """Where bins begin and end, float64 (n_bins + 1,)."""
        return np.linspace(0, 1, len(self.counts) + 1)

    @property
    def gaps(self) -> np.ndarray:
        """Mean confidence less the share that is right, float64 (n_bins,): above 0 where too much is promised."""
        return self.mean_confidence - self.share_correct

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over images of the distance in their bin, 0 to 1."""
        filled = self.counts > 0
        return float((self.counts[filled] * np.abs(self.gaps[filled])).sum() / self.counts.sum())

    def table(self) -> Rows:
        """Return one row a bin: from, to, images, mean confidence, right, gap; None where a bin is empty."""
        edges = self.edges.tolist()
        return [{"from": edges[i], "to": edges[i + 1], "images": int(count),
                 "mean confidence": float(self.mean_confidence[i]) if count else None,
                 "right": float(self.share_correct[i]) if count else None,
                 "gap": float(self.gaps[i]) if count else None} for i, count in enumerate(self.counts)]


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, n_bins: int = N_BINS) -> float:
    """Return the mean distance between confidence and the share that is correct, 0 to 1.

    Parameters
    ----------
    confidence : (n_images,), 0 to 1
    correct : bool (n_images,)
    n_bins : of equal width, closed above: (0, 1/n_bins], ...; 0 itself is in the first

    Raises
    ------
    InputError
        Shapes differ, there is no image, a confidence is outside 0 to 1, or ``n_bins`` is below 1.

    Notes
    -----
    sum over bins of (images in the bin / images) · |share correct - mean confidence| (Guo et al. 2017, Eq. 3).
    """
    return Reliability.of(confidence, correct, n_bins=n_bins).error


def confidence_gap(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the mean confidence less the share that is correct, -1 to 1.

    Above 0 too much is promised, below 0 too little. It is the calibration error of a single bin, with its sign;
    arguments as there.
    """
    confidence, correct = _checked(confidence, correct)
    return float(confidence.mean() - correct.mean())


def confidence_histogram(confidence: np.ndarray, *, n_bins: int = N_BINS) -> np.ndarray:
    """Return the images in each bin of confidence, int64 (n_bins,), the bins of ``Reliability``; needs no labels."""
    confidence, _ = _checked(confidence, np.zeros(len(confidence), bool))
    return np.bincount(_bins(confidence, n_bins), minlength=n_bins)


def brier_score(true: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean squared distance between the probabilities and the truth, 0 (sure and right) to 2.

    Parameters
    ----------
    true : int (n_images,), -1 where the class is not known
    probabilities : (n_images, n_clusters); the matching is that of the most probable clusters

    Notes
    -----
    The mean over images of sum_c (p_c - [c is the cluster matched with the class])^2 (Brier 1950). A class without a
    cluster was given probability 0, which costs 1 beside the sum of squares. Equal probabilities of K clusters score
    1 - 1 / K.
    """
    true = np.asarray(true)
    mapping, counts = match_clusters(true, probabilities.argmax(axis=1), n_clusters=probabilities.shape[1])
    cluster = clusters_of_classes(mapping, len(counts))
    rows = np.flatnonzero(true >= 0)
    step, total = max(1, _BLOCK // probabilities.shape[1]), 0.0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        p, wanted = probabilities[part].astype(np.float64), cluster[true[part]]
        own = np.where(wanted >= 0, p[np.arange(len(part)), wanted], 0)
        total += float((np.square(p).sum(axis=1) - 2 * own + 1).sum())
    return total / len(rows)


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """What is wrong among the surest images, for every share of images accepted (El-Yaniv and Wiener 2010).

    One point for every confidence that occurs, the highest first; images of equal confidence are accepted together.

    Parameters
    ----------
    coverage : float64 (n_points,), share of images accepted, rising to 1
    risk : float64 (n_points,), share of the accepted that is wrong
    threshold : float64 (n_points,), the least confidence accepted
    n_images : that were judged
    """

    coverage: np.ndarray
    risk: np.ndarray
    threshold: np.ndarray
    n_images: int

    @classmethod
    def of(cls, confidence: np.ndarray, correct: np.ndarray) -> "RiskCoverage":
        """Return the curve; arguments as for expected_calibration_error."""
        confidence, correct = _checked(confidence, correct)
        order = np.argsort(-confidence, kind="stable")
        threshold = confidence[order]
        last = np.flatnonzero(np.append(threshold[1:] != threshold[:-1], True))
        accepted, wrong = last + 1, np.cumsum(1 - correct[order])[last]
        return cls(accepted / len(order), wrong / accepted, threshold[last], len(order))

    @cached_property
    def area(self) -> float:
        """The area under the curve (AURC), 0 to 1: the mean of the risk over accepting the 1, 2, ..., n surest images.

        Among images of equal confidence the order is by lot, and this is the mean over all its outcomes. Without any
        order it would be the share that is wrong.
        """
        accepted = np.arange(1, self.n_images + 1)
        ends = np.rint(self.coverage * self.n_images)
        wrong = np.interp(accepted, np.append(0, ends), np.append(0, self.risk * ends))
        return float((wrong / accepted).mean())

    def thinned(self, limit: int) -> "RiskCoverage":
        """Return at most about ``limit`` of the points for a drawing, first and last included, evenly in coverage."""
        if len(self.coverage) <= limit:
            return self
        kept = np.searchsorted(self.coverage, np.linspace(self.coverage[0], 1, limit))
        rows = np.unique(np.minimum(kept, len(self.coverage) - 1))
        return RiskCoverage(self.coverage[rows], self.risk[rows], self.threshold[rows], self.n_images)

    def table(self, coverages: Sequence[float] | np.ndarray = _COVERAGES) -> Rows:
        """Return the first point at or above each of ``coverages``: accepted, least confidence, wrong."""
        reached = np.searchsorted(self.coverage, np.minimum(np.asarray(coverages), 1) - 1e-12)
        return [{"accepted": float(self.coverage[i]), "least confidence": float(self.threshold[i]),
                 "wrong": float(self.risk[i])} for i in np.unique(reached)]


def area_under_risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the area under the risk-coverage curve (AURC), 0 to 1: how well confidence puts wrong images last.

    It falls with fewer errors and with a better order; no change of confidence that keeps the order moves it.
    """
    return RiskCoverage.of(confidence, correct).area


def clusters_of_classes(mapping: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the cluster matched with each class, int64 (n_classes,), -1 for none; ``mapping`` as in ``Matching``."""
    cluster = np.full(n_classes, -1, np.int64)
    cluster[mapping[mapping >= 0]] = np.flatnonzero(mapping >= 0)
    return cluster


def _checked(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 (n_images,)."""
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise InputError(f"calibration needs one confidence and one truth an image, and an image, got "
                         f"{confidence.shape} and {correct.shape}")
    if not (confidence.min() >= -_ROUNDING and confidence.max() <= 1 + _ROUNDING):
        raise InputError(f"confidence must be from 0 to 1, got {confidence.min():.3g} to {confidence.max():.3g}",
                         "give probabilities, not logits")
    return confidence, correct


def _bins(confidence: np.ndarray, n_bins: int) -> np.ndarray:
    if n_bins < 1:
        raise InputError(f"calibration needs at least 1 bin, got n_bins={n_bins}")
    return np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:-1], confidence, side="left")
