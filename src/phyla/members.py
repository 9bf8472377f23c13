"""Many cheap clusterings of the same embeddings: methods, seeds and embedding spaces, for a consensus to be made of.

In: embeddings (n, d) in one space or several, and neighbors. Out: ``members_`` (n_members, n, K), what each is in
``rows_``, and the member with the highest label-free generalization score as the result of this stage by itself.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_is_fitted

from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.temi import TEMI
from phyla.cluster.turtle import TURTLE
from phyla.errors import InputError, nearest
from phyla.neighbors import find_neighbors
from phyla.nets.heads import Heads, SpaceProjection
from phyla.progress import shown_by, track
from phyla.quality import generalization_score
from phyla.randomness import derive_seed
from phyla.spaces import Space, scaled, spaces_of
from phyla.training.device import Device
from phyla.training.options import faults
from phyla.types import Neighbors

log = logging.getLogger("phyla")

Method = Literal["kmeans", "spherical", "temi", "turtle", "scan", "nnm"]
Spaces = Literal["together", "each+together"]
Estimator = KMeans | TEMI | TURTLE | SCAN | NNM


@dataclass(eq=False, repr=False)
class Members(ClusterMixin, BaseEstimator):
    """Cluster the same embeddings many times.

    Parameters
    ----------
    n_clusters : of every member
    methods : kmeans, spherical (k-means whose centers have length 1), temi, turtle, scan, nnm
    n_each : members of each method in each space: seeds, or heads that are trained side by side; of TURTLE, whose
        tries are cheap and differ much, 8 for every 3
    spaces : together: all encoders' embeddings side by side; each+together: each encoder's by themselves as well
    n_neighbors : for the methods that take neighbors and are given none
    max_scored : images on which members are scored, at most
    random_state : from which every member's seed is derived

    Attributes
    ----------
    members_ : float16 (n_members, n_images, n_clusters), probabilities
    rows_ : of each member its method, space, number among those of one fit, label-free generalization score, whether
        it is the one that the method itself keeps of the fit, and the seconds of the fit
    best_ : the member with the highest score among those that see all spaces; its result is ``labels_`` (n_images,) and
        ``probabilities_`` float32 (n_images, n_clusters)
    """

    n_clusters: int = 10
    methods: tuple[Method, ...] = ("turtle", "temi")
    n_each: int = 3
    spaces: Spaces = "together"
    n_neighbors: int = 50
    max_scored: int = 10_000
    random_state: int = 0

    def fit(self, embeddings: Space, y: None = None, *, neighbors: Neighbors | None = None,
            device: Device | None = None) -> "Members":
        """Fit every member on ``embeddings``, (n_images, n_features) in one space or several.

        Parameters
        ----------
        neighbors : of each image over all spaces; found when missing
        device : where to compute; None: the CPU

        Raises
        ------
        InputError
            An option out of its range, more clusters than images, or embeddings that are not finite.
        """
        spaces = spaces_of(embeddings)
        for fault in self._faults(len(spaces[0])):
            raise fault
        self.n_features_in_ = sum(each.shape[1] for each in spaces)
        views = {name: [spaces[i] for i in chosen] for name, chosen in self._views(len(spaces)).items()}
        near = {"together": neighbors} if neighbors is not None else {}
        plan = [(method, name, fit) for method in self.methods for name in views for fit in range(self._n_fits(method))]
        fits = []
        for method, name, fit in track(plan, "clustering", unit="fit"):
            if method in _NEIGHBORLY and name not in near:
                near[name] = find_neighbors(scaled(views[name]), min(self.n_neighbors, len(spaces[0]) - 1))
            seed = derive_seed(self.random_state, "member", method, name, fit) % 2**32
            made = _MAKERS[method](self.n_clusters, seed, self.n_each)
            with _alone():
                fits.append(_fitted(made, method, name, views[name], near.get(name), device))
        self.members_ = np.concatenate([fit.probabilities for fit in fits])
        self._score(fits, embeddings)
        return self

    def _score(self, fits: Sequence["_Fit"], embeddings: Space) -> None:
        """Rank the members, and choose the best of those whose parts are there and see all spaces."""
        labels = self.members_.argmax(axis=2)
        scores = np.atleast_1d(generalization_score(labels, embeddings, classifier="ridge", adjusted=True,
                                                    n_folds=min(10, labels.shape[1]), max_images=self.max_scored))
        self.rows_: list[dict[str, Any]] = []
        whole: dict[int, Estimator] = {}
        start = 0
        for fit in fits:
            for place in range(len(fit.probabilities)):
                self.rows_.append({"method": fit.method, "space": fit.space, "number": place,
                                   "score": round(float(scores[start + place]), 6), "kept": place == fit.kept,
                                   "seconds": round(fit.seconds, 2)})
            if fit.space == "together":
                whole[start + fit.kept] = fit.estimator
            start += len(fit.probabilities)
        self.best_ = max(whole, key=lambda member: self.rows_[member]["score"])
        self._chosen = whole[self.best_]
        self.labels_, self.probabilities_ = self._chosen.labels_, self._chosen.probabilities_
        best = self.rows_[self.best_]
        self.notices_ = [f"the best of {len(self.rows_)} members by its generalization score, {best['score']:.3f}, "
                         f"is of {best['method']}"]

    def predict(self, embeddings: Space) -> np.ndarray:
        """Return the best member's cluster of each row, int64 (n_images,)."""
        return self.predict_proba(embeddings).argmax(axis=1)

    def predict_proba(self, embeddings: Space) -> np.ndarray:
        """Return the best member's probabilities of each row, float32 (n_images, n_clusters)."""
        check_is_fitted(self)
        return self._chosen.predict_proba(embeddings)

    def as_parts(self) -> tuple[SpaceProjection | None, Heads]:
        """Return the projection and the head that give raw embeddings the best member's probabilities."""
        check_is_fitted(self)
        return self._chosen.as_parts()

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_clusters": 1, "n_each": 1, "n_neighbors": 1, "max_scored": 2})
        if not self.methods:
            yield InputError("a consensus needs members", f"methods: some of {', '.join(_MAKERS)}")
        for method in self.methods:
            if method not in _MAKERS:
                yield InputError(f"method {method!r} is not known", nearest(method, list(_MAKERS)))

    def _faults(self, n_images: int) -> Iterator[InputError]:
        yield from self.option_faults()
        if n_images < max(2, self.n_clusters):
            yield InputError(f"n_clusters={self.n_clusters} needs at least {max(2, self.n_clusters)} images, "
                             f"got {n_images}", "lower n_clusters or add images")

    def _views(self, n_spaces: int) -> dict[str, list[int]]:
        """Return the spaces that members see, by name."""
        each = {f"space {i + 1}": [i] for i in range(n_spaces)}
        together = {"together": list(range(n_spaces))}
        return together if n_spaces == 1 or self.spaces == "together" else each | together

    def _n_fits(self, method: Method) -> int:
        return 1 if method in ("temi", "turtle") else self.n_each  # these train theirs side by side


@dataclass(frozen=True, eq=False)
class _Fit:
    """One fit and the members it gave, float16 (n, n_images, n_clusters); its own result is the one ``kept``."""

    estimator: Estimator
    method: Method
    space: str
    probabilities: np.ndarray
    seconds: float
    kept: int = 0


LINEAR: Mapping[str, Any] = {"update": "heads", "normalize": True, "lr": 0.03}
"""SCAN and NNM on frozen embeddings: the learning rate at which their own losses end lowest on rows of length 1."""

_MAKERS: Mapping[Method, Callable[[int, int, int], Estimator]] = {
    "kmeans": lambda k, seed, n: KMeans(n_clusters=k, n_init=1, random_state=seed),
    "spherical": lambda k, seed, n: KMeans(n_clusters=k, n_init=1, spherical=True, random_state=seed),
    "temi": lambda k, seed, n: replace(TEMI.quick(k, random_state=seed), n_heads=n, keep_heads=True),
    "turtle": lambda k, seed, n: replace(TURTLE.quick(k, random_state=seed), n_tries=8 * n // 3),
    "scan": lambda k, seed, n: SCAN(n_clusters=k, random_state=seed, **LINEAR),
    "nnm": lambda k, seed, n: NNM(n_clusters=k, n_epochs=20, random_state=seed, **LINEAR),
}
"""Makes a method's estimator for so many clusters, a seed, and so many members."""

_NEIGHBORLY = ("temi", "scan", "nnm")


def _fitted(estimator: Estimator, method: Method, space: str, spaces: Sequence[np.ndarray],
            neighbors: Neighbors | None, device: Device | None) -> _Fit:
    given, start = list(spaces), time.monotonic()
    if isinstance(estimator, KMeans):
        estimator.fit(given)
    elif isinstance(estimator, TURTLE):
        estimator.fit(given, device=device)
    else:
        estimator.fit(given, neighbors=neighbors, device=device)
    seconds = time.monotonic() - start
    if isinstance(estimator, TEMI):
        return _Fit(estimator, method, space, estimator.head_probabilities_, seconds, estimator.head_)
    if isinstance(estimator, TURTLE):
        found = np.eye(estimator.n_clusters, dtype=np.float16)[estimator.all_labels_]
        found[estimator.try_] = estimator.probabilities_
        return _Fit(estimator, method, space, found, seconds, estimator.try_)
    return _Fit(estimator, method, space, estimator.probabilities_[None].astype(np.float16), seconds)


@contextmanager
def _alone() -> Iterator[None]:
    """Let one bar count the fits: theirs, and what they have to say, are not shown."""
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with shown_by(None):
            yield
    finally:
        log.setLevel(level)
