"""Cluster embeddings by k-means: the baseline every other method is measured against.

Lloyd (1982), with k-means++ starts (Arthur and Vassilvitskii 2007); scikit-learn's implementation. Input embeddings
``(n, d)``; output labels ``(n,)`` and probabilities ``(n, K)``. As deep clustering uses it, the rows are first scaled
to length 1, so that squared distance is 2 - 2·cosine.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans as LloydKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from phyla.errors import CollapseWarning, InputError
from phyla.neighbors import check_embeddings
from phyla.nets.heads import ClusterHeads
from phyla.training.options import faults
from phyla.types import Embeddings

_DISTANCES = 1 << 23  # distances held at once in float64: 64 MB


@dataclass(kw_only=True, repr=False, eq=False)
class KMeans(ClusterMixin, BaseEstimator):
    """Find ``n_clusters`` centers so that rows lie near their own.

    Parameters
    ----------
    n_clusters : at least 1, at most the number of images
    normalize : scale every row to length 1 first (rows of length 0 stay)
    n_init : starts; the one with the smallest sum of squared distances is kept
    n_iterations : at most this many passes in each start
    temperature : of the probabilities, in squared distance; 0 makes them one-hot
    random_state : seed of the starts; None draws one

    Attributes
    ----------
    labels_ : int64 (n_images,)
    probabilities_ : float32 (n_images, n_clusters)
    cluster_centers_ : (n_clusters, n_features), means of the (scaled) rows; not of length 1
    inertia_ : sum of squared distances to the nearest center

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
    temperature: float = 0.1
    random_state: int | None = 0

    def fit(self, embeddings: Embeddings | np.ndarray, y: None = None) -> "KMeans":
        """Find the centers of ``embeddings``, (n_images, n_features), and assign every row.

        Raises
        ------
        InputError
            An option out of its range, more clusters than images, or embeddings that are not finite.
        """
        rows = self._rows(embeddings)
        for fault in self._faults(len(rows)):
            raise fault
        lloyd = LloydKMeans(n_clusters=self.n_clusters, n_init=self.n_init, max_iter=self.n_iterations,
                            random_state=self.random_state)
        with warnings.catch_warnings():  # of too few distinct points; said below in our own words
            warnings.filterwarnings("ignore", category=ConvergenceWarning)
            lloyd.fit(rows)
        self.cluster_centers_: np.ndarray = lloyd.cluster_centers_
        self.inertia_ = float(lloyd.inertia_)
        self.n_features_in_ = int(rows.shape[1])
        self.labels_, self.probabilities_ = self._assign(rows)
        n_found = len(np.unique(self.labels_))
        if n_found < self.n_clusters:
            warnings.warn(f"k-means filled only {n_found} of n_clusters={self.n_clusters} clusters: there are fewer "
                          "distinct embeddings. hint: lower n_clusters, or look for duplicates",
                          CollapseWarning, stacklevel=2)
        return self

    def predict(self, embeddings: Embeddings | np.ndarray) -> np.ndarray:
        """Return the nearest center of each row, int64 (n_images,); the lowest of equally near ones."""
        return self._assign(self._new_rows(embeddings))[0]

    def predict_proba(self, embeddings: Embeddings | np.ndarray) -> np.ndarray:
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

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_clusters": 1, "n_init": 1, "n_iterations": 1, "temperature": 0})

    def _faults(self, n_images: int) -> Iterator[InputError]:
        yield from self.option_faults()
        if self.n_clusters > n_images:
            yield InputError(f"n_clusters={self.n_clusters} needs at least {self.n_clusters} images, got {n_images}",
                             "lower n_clusters or add images")

    def _new_rows(self, embeddings: Embeddings | np.ndarray) -> np.ndarray:
        check_is_fitted(self)
        rows = self._rows(embeddings)
        if rows.shape[1] != self.n_features_in_:
            raise InputError(f"embeddings of {rows.shape[1]} features do not fit centers of {self.n_features_in_}",
                             "embed both with the same encoder")
        return rows

    def _rows(self, embeddings: Embeddings | np.ndarray) -> np.ndarray:
        rows = check_embeddings(embeddings)
        rows = rows if rows.dtype == np.float64 else rows.astype(np.float32, copy=False)
        if not self.normalize:
            return rows
        rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(rows.dtype).tiny)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(rows.dtype).tiny)
        return rows

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
