"""Work out the numbers behind each figure: one small frozen class a figure, each with the table of what it shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from phyla.evaluate.matching import match_clusters
from phyla.types import Assignment

Row = dict[str, str | int | float | None]
Table = list[Row]

MAP_LIMIT = 3000
"""Images on the map at most: t-SNE of so many takes under 10 s on two cores."""
_TSNE_LEAST = 30
_TSNE_STEPS = 500  # the islands stand by then; a thousand steps look the same and take twice as long
_PCA_DIMENSIONS = 50
_BY_THE_WAY = ("stage", "epoch", "step", "seconds", "time")
_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True, eq=False)
class Confusion:
    """True classes against found clusters, for the images whose class is known.

    Parameters
    ----------
    counts : int64 (n_classes, n_clusters), in the order of ``classes`` and ``clusters``
    classes : class names
    clusters : int64 (n_clusters,), cluster indices as columns: those of the first class, of the second, ..., of none
    stands_for : int64 (n_clusters,) by cluster index, the class each stands for, -1 for none: one cluster a class,
        matched so that most images agree, or its commonest class where there are more clusters than classes
    names : one name a cluster, by cluster index
    known : int64 rows of the images whose class is known
    correct : bool (n_known,), whether each of them lies in a cluster that stands for its class
    """

    counts: np.ndarray
    classes: Sequence[str]
    clusters: np.ndarray
    stands_for: np.ndarray
    names: Sequence[str]
    known: np.ndarray
    correct: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, classes: Sequence[str], assignment: Assignment, *,
           names: Sequence[str]) -> "Confusion | None":
        """Return the confusion of the images with ``truth`` of 0 or more; None if there are none."""
        known = np.flatnonzero(truth >= 0)
        if not len(known):
            return None
        n_classes, labels = max(len(classes), int(truth.max()) + 1), assignment.labels
        mapping, counts = match_clusters(truth, labels, n_classes=n_classes, n_clusters=assignment.n_clusters)
        within = counts.sum(axis=0)
        if assignment.n_clusters > n_classes:
            mapping = counts.argmax(axis=0)
        stands_for = np.where(within > 0, mapping, -1)
        clusters = np.lexsort((-within, np.where(stands_for >= 0, stands_for, n_classes)))
        called = [*map(str, classes), *(f"class {index}" for index in range(len(classes), n_classes))]
        return cls(counts[:, clusters], called, clusters, stands_for, names, known,
                   stands_for[labels[known]] == truth[known])

    @property
    def one_to_one(self) -> bool:
        """Whether every class has at most one cluster that stands for it, by design."""
        return len(self.clusters) <= len(self.classes)

    @property
    def shares(self) -> np.ndarray:
        """Each row of ``counts`` as shares of its class; zeros for a class without images."""
        return self.counts / np.maximum(1, self.counts.sum(axis=1, keepdims=True))

    def class_of(self, cluster: int) -> str | None:
        """Return the name of the class that a cluster stands for."""
        stands_for = int(self.stands_for[cluster])
        return self.classes[stands_for] if stands_for >= 0 else None

    def mixture(self, cluster: int) -> list[tuple[str, float]]:
        """Return the three commonest classes of a cluster and their shares of its images of known class."""
        inside = self.counts[:, int(np.flatnonzero(self.clusters == cluster)[0])]
        best = np.argsort(-inside, kind="stable")[:3]
        return [(self.classes[int(i)], float(inside[i] / inside.sum())) for i in best if inside[i]]

    def table(self) -> Table:
        """Return the counts: one row a class, one column a cluster."""
        columns = [self.names[int(cluster)] for cluster in self.clusters]
        return [{"class": name} | dict(zip(columns, row.tolist(), strict=True))
                for name, row in zip(self.classes, self.counts, strict=True)]

    def by_class(self) -> Table:
        """Return one row a class: images, cluster, recall, precision, and what it is most often taken for."""
        column_class = self.stands_for[self.clusters]
        return [self._about(index, column_class) for index in range(len(self.classes))]

    def _about(self, index: int, column_class: np.ndarray) -> Row:
        row, own = self.counts[index], column_class == index
        images, hits, inside = int(row.sum()), int(row[own].sum()), int(self.counts[:, own].sum())
        # images elsewhere, by the class their cluster stands for; clusters that stand for none count together, last
        elsewhere = np.bincount(np.where(column_class < 0, len(self.classes), column_class)[~own], row[~own],
                                minlength=len(self.classes) + 1)
        wrong = int(elsewhere.argmax())
        return {"class": self.classes[index], "images": images,
                "cluster": self._said(self.clusters[own]),
                "recall": hits / images if images else None, "precision": hits / inside if inside else None,
                "most often taken for": None if not elsewhere[wrong] else [*self.classes, "no class"][wrong],
                "times": int(elsewhere[wrong])}

    def _said(self, clusters: np.ndarray) -> str | None:
        if len(clusters) < 2:
            return self.names[int(clusters[0])] if len(clusters) else None
        return f"{len(clusters)} clusters"


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Images laid out in two dimensions: near each other when their embeddings are alike.

    Parameters
    ----------
    rows : int64 (n_points,), the images shown, rising
    points : float64 (n_points, 2), each axis from 0 to 1
    labels : int64 (n_points,), their clusters
    method : "t-SNE" or "PCA"
    n_images : of the whole set
    """

    rows: np.ndarray
    points: np.ndarray
    labels: np.ndarray
    method: str
    n_images: int

    @classmethod
    def of(cls, embeddings: np.ndarray, assignment: Assignment, *, limit: int = MAP_LIMIT,
           seed: int = 0) -> "EmbeddingMap":
        """Return the map of all images, or of ``limit`` drawn at random; t-SNE from 30 images on, else PCA."""
        rows, points, method = lay_out(embeddings, limit=limit, seed=seed)
        return cls(rows, points, assignment.labels[rows], method, len(embeddings))

    def centers(self) -> dict[int, tuple[float, float]]:
        """Return the median point of each cluster that is on the map."""
        return {int(c): (float(x), float(y)) for c in np.unique(self.labels)
                for x, y in [np.median(self.points[self.labels == c], axis=0)]}

    def table(self, names: Sequence[str]) -> Table:
        """Return one row a cluster on the map: points shown and their median place."""
        return [{"cluster": names[c], "points": int((self.labels == c).sum()), "median x": x, "median y": y}
                for c, (x, y) in self.centers().items()]


def lay_out(embeddings: np.ndarray, *, limit: int = MAP_LIMIT, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Return rising rows, their places on the map (n_points, 2), each axis from 0 to 1, and how they were found."""
    n_images = len(embeddings)
    rows = np.sort(np.random.default_rng(seed).choice(n_images, min(limit, n_images), replace=False))
    values = np.asarray(embeddings[rows], dtype=np.float64)
    reduced = _principal(values, min(_PCA_DIMENSIONS, *values.shape), seed)
    spread = reduced[:, 0].std() if reduced.size else 0.0
    if len(rows) < _TSNE_LEAST or spread == 0:
        return rows, _unit(reduced), "PCA"
    start = np.zeros((len(rows), 2))
    start[:, : reduced.shape[1]] = reduced[:, :2] / spread * 1e-4
    perplexity = min(30.0, (len(rows) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init=start, max_iter=_TSNE_STEPS, random_state=seed)
    with threadpool_limits(1, user_api="openmp"):  # more threads gain little, and lose much on a busy machine
        return rows, _unit(tsne.fit_transform(reduced)), "t-SNE"


def _principal(values: np.ndarray, n_components: int, seed: int) -> np.ndarray:
    centered = values - values.mean(axis=0)
    if not np.any(centered):
        return np.zeros((len(values), max(1, n_components)))
    return PCA(n_components, random_state=seed).fit_transform(values)


def _unit(points: np.ndarray) -> np.ndarray:
    """Return two columns scaled to 0..1 each; a column without spread stands at the middle."""
    placed = np.full((len(points), 2), 0.5)
    for axis in range(min(2, points.shape[1])):
        low, high = points[:, axis].min(), points[:, axis].max()
        if high > low:
            placed[:, axis] = (points[:, axis] - low) / (high - low)
    return placed


@dataclass(frozen=True, eq=False)
class ConfidenceSpread:
    """How sure the clustering is: a histogram, a spread a cluster, and what a threshold would keep.

    Parameters
    ----------
    assignment : the clustering
    names : one name a cluster
    known, correct : rows of known class and whether each is right; None without labels
    """

    assignment: Assignment
    names: Sequence[str]
    known: np.ndarray | None = None
    correct: np.ndarray | None = None
    n_bins: int = 20

    @cached_property
    def counts(self) -> np.ndarray:
        """Images in each of ``n_bins`` equal bins from 0 to 1, int64."""
        return np.bincount(self._bins(self.assignment.confidence), minlength=self.n_bins)

    def _bins(self, confidence: np.ndarray) -> np.ndarray:
        return np.clip((confidence * self.n_bins).astype(np.int64), 0, self.n_bins - 1)

    def table(self) -> Table:
        """Return the histogram: one row a bin, with the share that is right where labels exist."""
        rows: Table = []
        bins = None if self.known is None else self._bins(self.assignment.confidence[self.known])
        for index, count in enumerate(self.counts.tolist()):
            row: Row = {
                "from": index / self.n_bins, "to": (index + 1) / self.n_bins, "images": count,
                "share": count / max(1, len(self.assignment))}
            if bins is not None and self.correct is not None:
                inside = self.correct[bins == index]
                row["right"] = float(inside.mean()) if len(inside) else None
            rows.append(row)
        return rows

    def by_cluster(self) -> Table:
        """Return one row a cluster with images: 5, 25, 50, 75 and 95 % of its images are at or below these."""
        confidence, labels = self.assignment.confidence, self.assignment.labels
        order = np.argsort(labels, kind="stable")
        rows: Table = []
        for index, members in enumerate(np.split(order, np.cumsum(self.assignment.sizes)[:-1])):
            if len(members):
                marks = np.quantile(confidence[members], (0.05, 0.25, 0.5, 0.75, 0.95))
                rows.append({"index": index, "cluster": self.names[index], "images": len(members),
                             "mean": float(confidence[members].mean(dtype=np.float64)),
                             **{f"{p} %": float(mark) for p, mark in zip((5, 25, 50, 75, 95), marks, strict=True)}})
        return rows

    def thresholds(self) -> Table:
        """Return what is kept when only images at or above a confidence are accepted, and how much of it is right."""
        confidence, rows = self.assignment.confidence, []
        for limit in (0.0, *_THRESHOLDS):
            kept = int((confidence >= limit).sum())
            row: Row = {"accept from": limit, "kept": kept,
                                                        "share kept": kept / max(1, len(confidence)),
                                                        "to review": len(confidence) - kept}
            if self.known is not None and self.correct is not None:
                inside = self.correct[confidence[self.known] >= limit]
                row["right among kept"] = float(inside.mean()) if len(inside) else None
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Curve:
    """One quantity of one stage over its epochs."""

    stage: str
    quantity: str
    epochs: tuple[float, ...]
    values: tuple[float, ...]

    def thinned(self, limit: int) -> "Curve":
        """Return at most ``limit`` points, evenly spaced, first and last included."""
        if len(self.values) <= limit:
            return self
        kept = np.unique(np.linspace(0, len(self.values) - 1, limit).round().astype(int))
        return Curve(self.stage, self.quantity, tuple(self.epochs[i] for i in kept),
                     tuple(self.values[i] for i in kept))


def read_curves(records: Sequence[Mapping[str, object]]) -> list[Curve]:
    """Return the curves in records of training: stages in order of appearance, the loss first.

    A record is one epoch of one stage; values that are no finite number are left out.
    """
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    stages: list[str] = []
    for position, record in enumerate(records, start=1):
        stage = str(record.get("stage", "training"))
        if stage not in stages:
            stages.append(stage)
        where = record.get("epoch", record.get("step", position))
        for name, value in record.items():
            if name not in _BY_THE_WAY and _finite(value) and _finite(where):
                epochs, values = found.setdefault((stage, name), ([], []))
                epochs.append(float(where))  # type: ignore[arg-type]
                values.append(float(value))  # type: ignore[arg-type]
    keys = sorted(found, key=lambda key: (stages.index(key[0]), key[1] != "loss", key[1] == "lr"))
    return [Curve(stage, name, tuple(found[stage, name][0]), tuple(found[stage, name][1])) for stage, name in keys]


def curve_table(curves: Sequence[Curve], stage: str) -> Table:
    """Return one row an epoch of ``stage``, one column a quantity."""
    own = [curve for curve in curves if curve.stage == stage]
    rows: dict[float, Row] = {}
    for curve in own:
        for epoch, value in zip(curve.epochs, curve.values, strict=True):
            rows.setdefault(epoch, {"epoch": epoch} | {other.quantity: None for other in own})[curve.quantity] = value
    return [rows[epoch] for epoch in sorted(rows)]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
