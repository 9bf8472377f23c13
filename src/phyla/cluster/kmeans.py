"""Cluster embeddings by k-means: the baseline every other method is measured against.

Lloyd (1982), with k-means++ starts (Arthur and Vassilvitskii 2007); scikit-learn's implementation. Input embeddings
``(n, d)``, in one space or several; output labels ``(n,)`` and probabilities ``(n, K)``. As deep clustering uses it,
the rows are first scaled to length 1, so that squared distance is 2 - 2·cosine. Spherical k-means (Dhillon and Modha
2001) besides keeps the centers at length 1.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans as LloydKMeans
from sklearn.cluster import kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from phyla.errors import CollapseWarning, InputError
from phyla.nets.heads import ClusterHeads, SpaceProjection
from phyla.spaces import Space, scaled, spaces_of
from phyla.training.options import faults

_DISTANCES = 1 << 23  # distances held at once in float64: 64 MB


def spherical_centers(rows: np.ndarray, centers: np.ndarray, *, n_iterations: int) -> tuple[np.ndarray, float]:
    """Return the centers of length 1 that spherical k-means comes to, (K, d), and the sum of squared distances.

    Parameters
    ----------
    rows : (n, d), of length 1 (or 0)
    centers : (K, d) to start from
    n_iterations : at most this many passes; it ends before where no row changes its center

    Notes
    -----
    Each row goes to the center of the largest cosine, each center to the sum of its rows, scaled to length 1 (Dhillon
    and Modha 2001). A center that has lost all its rows, or whose rows sum to 0, goes to the row farthest from its own.
    """
    labels, nearest, sums = _nearest_centers(rows, centers)
    for _ in range(n_iterations):
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        lost = np.flatnonzero(lengths[:, 0] <= np.finfo(rows.dtype).eps)
        centers = sums / np.maximum(lengths, np.finfo(rows.dtype).tiny)
        centers[lost] = rows[np.argsort(nearest, kind="stable")[: len(lost)]]
        before = labels
        labels, nearest, sums = _nearest_centers(rows, centers)
        if np.array_equal(labels, before):
            break
    squared = np.square(rows).sum(axis=1) + np.square(centers).sum(axis=1)[labels] - 2 * nearest
    return centers, float(np.maximum(squared, 0).sum(dtype=np.float64))


def _nearest_centers(rows: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the center of the largest product with each row, that product, and the sum of each center's rows."""
    labels, nearest = np.empty(len(rows), np.int64), np.empty(len(rows), rows.dtype)
    sums = np.zeros_like(centers)
    step = max(1, _DISTANCES // len(centers))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        products = rows[part] @ centers.T
        labels[part], nearest[part] = products.argmax(axis=1), products.max(axis=1)
        sums += (labels[part] == np.arange(len(centers))[:, None]).astype(rows.dtype) @ rows[part]
    return labels, nearest, sums


def _told(widths: tuple[int, ...]) -> str:
    return " and ".join(str(width) for width in widths)


@dataclass(kw_only=True, repr=False, eq=False)
class KMeans(ClusterMixin, BaseEstimator):
    """Find ``n_clusters`` centers so that rows lie near their own.

    Parameters
    ----------
    n_clusters : at least 1, at most the number of images
    normalize : scale every row to length 1 first, those of M spaces to 1/sqrt(M) in each (rows of length 0 stay)
    spherical : keep the centers at length 1, too: rows then lie near the center of the largest cosine, and tight and
        loose clusters count alike; needs ``normalize``
    n_init : starts; the one with the smallest sum of squared distances is kept
    n_iterations : at most this many passes in each start
    temperature : of the probabilities, in squared distance; 0 makes them one-hot
    random_state : seed of the starts; None draws one

    Attributes
    ----------
    labels_ : int64 (n_images,)
    probabilities_ : float32 (n_images, n_clusters)
    cluster_centers_ : (n_clusters, n_features), means of the (scaled) rows; of length 1 if ``spherical``, and else not
    inertia_ : sum of squared distances to the nearest center
    n_features_in_ : of all spaces together

    Notes
    -----
    Probabilities are softmax(-distance² / (2·temperature)): the posterior of equal, round Gaussians of variance
    ``temperature`` at the centers. They say which clusters are near, and are not calibrated.

    Examples
    --------
    >>> import numpy as np
    >>> labels = KMeans(n_clusters=2).fit_predict(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]))
    >>> bool(labels[0] == labels[2] != labels[1])
    True
    """

    n_clusters: int = 10
    normalize: bool = True
    n_init: int = 10
    n_iterations: int = 300
    spherical: bool = False
    temperature: float = 0.1
    random_state: int | None = 0

    def fit(self, embeddings: Space, y: None = None) -> "KMeans":
        """Find the centers of ``embeddings``, (n_images, n_features) in one space or several, and assign every row.

        Raises
        ------
        InputError
            An option out of its range, more clusters than images, or embeddings that are not finite.
        """
        spaces = spaces_of(embeddings)
        for fault in self._faults(len(spaces[0])):
            raise fault
        rows = self._rows(spaces)
        with warnings.catch_warnings():  # of too few distinct points; said below in our own words
            warnings.filterwarnings("ignore", category=ConvergenceWarning)
            self.cluster_centers_, self.inertia_ = self._spherical(rows) if self.spherical else self._lloyd(rows)
        self._widths = tuple(each.shape[1] for each in spaces)
        self.n_features_in_ = int(rows.shape[1])
        self.labels_, self.probabilities_ = self._assign(rows)
        n_found = len(np.unique(self.labels_))
        if n_found < self.n_clusters:
            warnings.warn(f"k-means filled only {n_found} of n_clusters={self.n_clusters} clusters: there are fewer "
                          "distinct embeddings. hint: lower n_clusters, or look for duplicates",
                          CollapseWarning, stacklevel=2)
        return self

    def predict(self, embeddings: Space) -> np.ndarray:
        """Return the nearest center of each row, int64 (n_images,); the lowest of equally near ones."""
        return self._assign(self._new_rows(embeddings))[0]

    def predict_proba(self, embeddings: Space) -> np.ndarray:
        """Return the probability of each cluster for each row, float32 (n_images, n_clusters)."""
        return self._assign(self._new_rows(embeddings))[1]

    def as_linear(self) -> ClusterHeads:
        """Return the linear head that gives (scaled) rows the same probabilities, float32.

        Raises
        ------
        InputError
            ``temperature`` is 0, which no linear head can be.

        Notes
        -----
        softmax(-|x - c|² / 2t) over the centers c is softmax((c.x - |c|²/2) / t): |x|² is the same for all.
        """
        check_is_fitted(self)
        if self.temperature == 0:
            raise InputError("temperature=0 gives no classifier", "set a temperature above 0, such as 0.1")
        centers = torch.from_numpy(self.cluster_centers_.astype(np.float64) / self.temperature)
        heads = ClusterHeads(self.n_features_in_, self.n_clusters)
        heads.weight.data = centers.float()[None]
        heads.bias.data = (-self.temperature * centers.square().sum(dim=1) / 2).float()[None]
        return heads

    def as_parts(self) -> tuple[SpaceProjection, ClusterHeads]:
        """Return what maps the spaces beside one another, (n_images, n_features), to the same probabilities.

        Raises
        ------
        InputError
            ``temperature`` is 0.
        """
        heads = self.as_linear()
        return SpaceProjection(self._widths, unit=self.normalize).eval(), heads.eval()

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_clusters": 1, "n_init": 1, "n_iterations": 1, "temperature": 0})
        if self.spherical and not self.normalize:
            yield InputError("spherical k-means needs rows of length 1", "set normalize=True, or spherical=False")

    def _faults(self, n_images: int) -> Iterator[InputError]:
        yield from self.option_faults()
        if self.n_clusters > n_images:
            yield InputError(f"n_clusters={self.n_clusters} needs at least {self.n_clusters} images, got {n_images}",
                             "lower n_clusters or add images")

    def _new_rows(self, embeddings: Space) -> np.ndarray:
        check_is_fitted(self)
        spaces = spaces_of(embeddings)
        widths = tuple(each.shape[1] for each in spaces)
        if widths != self._widths:
            raise InputError(f"embeddings of {_told(widths)} features do not fit centers of {_told(self._widths)}",
                             "embed both with the same encoder")
        return self._rows(spaces)

    def _rows(self, spaces: list[np.ndarray]) -> np.ndarray:
        if self.normalize:
            return scaled(spaces)
        return spaces[0] if len(spaces) == 1 else np.concatenate(spaces, axis=1)

    def _lloyd(self, rows: np.ndarray) -> tuple[np.ndarray, float]:
        lloyd = LloydKMeans(n_clusters=self.n_clusters, n_init=self.n_init, max_iter=self.n_iterations,
                            random_state=self.random_state).fit(rows)
        return lloyd.cluster_centers_, float(lloyd.inertia_)

    def _spherical(self, rows: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the centers of length 1 with the smallest sum of squared distances, of all starts, and the sum."""
        draw = np.random.RandomState(self.random_state)
        found = [spherical_centers(rows, kmeans_plusplus(rows, self.n_clusters, random_state=draw)[0],
                                   n_iterations=self.n_iterations) for _ in range(self.n_init)]
        return min(found, key=lambda each: each[1])

    def _assign(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest center of each row and the probabilities of all."""
        labels = np.empty(len(rows), np.int64)
        probabilities = np.zeros((len(rows), self.n_clusters), np.float32)
        centers = self.cluster_centers_.astype(np.float64)
        step = max(1, _DISTANCES // self.n_clusters)
        for start in range(0, len(rows), step):
            # -distance² / 2, less the row's own length, which softmax and argmax do not see
            nearness = rows[start : start + step] @ centers.T - np.square(centers).sum(axis=1) / 2
            labels[start : start + step] = nearness.argmax(axis=1)
            if self.temperature > 0:
                nearness -= nearness.max(axis=1, keepdims=True)
                p = np.exp(nearness / self.temperature)
                probabilities[start : start + step] = p / p.sum(axis=1, keepdims=True)
        if self.temperature == 0:
            probabilities[np.arange(len(rows)), labels] = 1
        return labels, probabilities
