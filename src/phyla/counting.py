"""How many classes unlabelled images fall into: several criteria over a grid of numbers, a vote, and an interval.

Halves of the images are clustered for every number on a grid, from a tree over small clusters, and judged on the other
half. Five criteria that rest on different things (``criteria.py``) each pick a number, from the mean of the halves and
from every half; the answer is the median of all picks, and the interval holds most of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from phyla.centers import Centers, WardTree, lloyd, nearest, rotated, small_clusters, ward
from phyla.criteria import generalization, modularity, prediction_strength, silhouette
from phyla.errors import InputError
from phyla.neighbors import find_neighbors
from phyla.randomness import derive_seed, generator
from phyla.spaces import Space, scaled
from phyla.training.device import Device
from phyla.types import Neighbors

MOST_CLASSES = 100
"""The highest number tried unless told otherwise."""

_AXES = 64  # principal axes that are kept: the criteria differ little from 32 to 128
_SMALL = 300  # clusters that a tree is built over, at most
_ROWS_EACH = 4  # images in one of them, at least, on average
_DENSE, _STEP = 16, 1.12  # every number up to 16 is tried, then a geometric grid
_NEIGHBORS = 20
_MOST_IMAGES = 10_000
_POINT = 1e-6  # a spread of rows of length 1 that is none
_STABLE = 0.85  # Tibshirani and Walther 2005: clusters of which at least 80 to 90 % of the pairs come again
_LOSS = 0.06  # of kappa, which a classifier may lose from its best
_SURE = (0.1, 0.9)  # what part of all votes the interval leaves out below and above
_STRUCTURE = 1.25  # how many times that of one cloud a silhouette must be
_EACH = 8  # images a class, on average, below which nothing can be told


@dataclass(frozen=True, eq=False)
class ClassCount:
    """How many classes there seem to be.

    Parameters
    ----------
    n_classes : the median vote
    low, high : an interval that holds most of the votes, and ``n_classes``
    grid : int64 (n_tried,), the numbers tried
    criteria : for each criterion its value at every number of the grid, float64 (n_tried,)
    votes : the number each criterion picks from its curve
    spread : the numbers that each criterion picked on halves of the images
    notices : what to know about the answer, in plain sentences
    """

    n_classes: int
    low: int
    high: int
    grid: np.ndarray
    criteria: Mapping[str, np.ndarray]
    votes: Mapping[str, int]
    spread: Mapping[str, Sequence[int]]
    notices: tuple[str, ...] = ()

    def as_facts(self) -> dict[str, object]:
        """Return all of it as plain values, for a file."""
        return {"n_classes": self.n_classes, "low": self.low, "high": self.high, "grid": self.grid.tolist(),
                "criteria": {name: [float(value) for value in curve] for name, curve in self.criteria.items()},
                "votes": dict(self.votes), "spread": {name: list(picks) for name, picks in self.spread.items()},
                "notices": list(self.notices)}

    @classmethod
    def from_facts(cls, told: Mapping[str, Any]) -> "ClassCount":
        """Return what ``as_facts`` told."""
        curves = {name: np.array(curve, np.float64) for name, curve in told["criteria"].items()}
        return cls(**dict(told) | {"grid": np.array(told["grid"], np.int64), "criteria": curves,
                                   "notices": tuple(told["notices"])})


# ---- picks: a curve over the grid to a number ---------------------------------------------------------------------


def highest(grid: np.ndarray, curve: np.ndarray) -> int:
    """Return the number with the highest value, the lowest of equals."""
    return int(grid[curve.argmax()])


def last_above(grid: np.ndarray, curve: np.ndarray) -> int:
    """Return the largest number whose value is at least 0.85, or the one with the highest where none is."""
    stable = np.flatnonzero(curve >= _STABLE)
    return int(grid[stable[-1]]) if len(stable) else highest(grid, curve)


def before_loss(grid: np.ndarray, curve: np.ndarray) -> int:
    """Return the last number before the curve first falls, after its top, by more than 0.06 below it."""
    top = int(curve.argmax())
    lost = np.flatnonzero(curve[top:] < curve[top] - _LOSS)
    return int(grid[top + lost[0] - 1]) if len(lost) else int(grid[-1])


PICKS: dict[str, Callable[[np.ndarray, np.ndarray], int]] = {
    "silhouette": highest, "modularity": highest, "generalization": before_loss, "dendrogram": highest,
    "stability": last_above}
"""The criteria by name, and how each picks a number from its curve."""


# ---- the count ----------------------------------------------------------------------------------------------------


def count_classes(embeddings: Space, *, low: int = 2, high: int | None = None, neighbors: Neighbors | None = None,
                  n_repeats: int = 3, max_images: int = _MOST_IMAGES, random_state: int = 0,
                  device: Device | None = None) -> ClassCount:
    """Return how many classes the images of ``embeddings`` seem to fall into, with an interval.

    Parameters
    ----------
    embeddings : of one encoder or several, (n_images, n_features) each
    low, high : the least and the most that may be answered; None: 100, or as many as have 8 images each
    neighbors : of the same images, if they are known and all are looked at; None: found here
    n_repeats : how often the images are halved, for stability and for the interval
    max_images : of more, so many are drawn
    random_state : seed of the draws

    Raises
    ------
    InputError
        A number out of its range, ``low`` above ``high``, or embeddings that are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> draws = np.random.default_rng(0)
    >>> rows = np.repeat(np.eye(4), 50, axis=0) + 0.1 * draws.normal(size=(200, 4))
    >>> count_classes(rows).n_classes
    4
    """
    most = MOST_CLASSES if high is None else high
    if low < 1 or most < low or n_repeats < 1 or max_images < 1:
        raise InputError(f"low={low}, high={high}, n_repeats={n_repeats} and max_images={max_images} do not fit",
                         "all at least 1, and low at most high, such as low=2, high=50")
    values = scaled(embeddings, center=True)
    can = min(most, len(values) // _EACH)
    if can < max(low, 2):
        return _untold(low, len(values), f"{len(values)} images are too few to count classes from {max(low, 2)} on: "
                                         f"{_EACH} a class are needed")
    notices = [] if high is None or can == high else [f"at most {can} classes were tried: {high} need {_EACH * high} "
                                                      "images"]
    taken = np.arange(len(values))
    if len(values) > max_images:
        draws = generator(random_state, "images to count classes in")
        taken = torch.randperm(len(values), generator=draws)[:max_images].sort().values.numpy()
        notices.append(f"counted on {max_images:,} of {len(values):,} images")
    where = device.device if device is not None else torch.device("cpu")
    rows = rotated(torch.from_numpy(values[taken].astype(np.float32, copy=False)).to(where), _AXES, seed=random_state)
    length = float(rows.square().sum(dim=1).mean().sqrt())
    if length < _POINT:
        return _untold(low, len(values), "all embeddings are the same: there is one class, or none")
    known = neighbors.indices if neighbors is not None and len(taken) == len(values) == len(neighbors) else None
    if known is None:
        known = find_neighbors(rows.numpy(force=True), min(_NEIGHBORS, len(rows) - 1), device=where, title="").indices
    looks = _Looks(rows / length, known[:, :_NEIGHBORS], n_repeats, random_state)
    if looks.n_distinct < can:
        notices.append(f"at most {looks.n_distinct} classes were tried: so few embeddings are distinct")
        can = max(low, 2, looks.n_distinct)
    grid = _grid(max(low, 2), can)
    first = looks.picks(grid)
    return _answer(looks, _refined(grid, list(first.values())), low, can, notices)


def _untold(low: int, n_images: int, notice: str) -> ClassCount:
    n_classes = min(low, n_images)
    return ClassCount(n_classes, n_classes, n_classes, np.empty(0, np.int64), {}, {}, {}, (notice,))


def _answer(looks: "_Looks", grid: np.ndarray, low: int, high: int, notices: list[str]) -> ClassCount:
    curves, votes, spread = looks.curves(grid), looks.picks(grid), looks.spread(grid)
    pooled = np.array([pick for name, vote in votes.items() for pick in (vote, *spread[name])])
    weights = np.array([weight for picks in spread.values() for weight in (1, *[1 / len(picks)] * len(picks))])
    at_most, middle, at_least = (_quantile(pooled, weights, share) for share in (_SURE[0], 0.5, _SURE[1]))
    n_classes = round(middle)
    lowest, highest_ = min(n_classes, math.floor(at_most + 1e-6)), max(n_classes, math.ceil(at_least - 1e-6))
    if looks.structure(np.unique([n_classes, *votes.values()])) < _STRUCTURE:
        notices.append("the embeddings look like one cloud: no number of groups fits them better than chance")
        n_classes = lowest = low
    elif highest_ >= high:
        notices.append(f"the highest number tried, {high}, may be too low: try a higher one")
    return ClassCount(n_classes, lowest, highest_, grid, curves, votes, spread, tuple(notices))


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """Return a weighted quantile, between values in proportion of their logarithms."""
    order = np.argsort(values, kind="stable")
    reached = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    return float(np.exp(np.interp(share, reached, np.log(values[order]))))


def _grid(low: int, high: int) -> np.ndarray:
    """Return every number up to 16 and steps of an eighth beyond, both ends included."""
    numbers, last = list(range(low, min(high, _DENSE) + 1)), float(max(low, _DENSE))
    while (last := last * _STEP) < high:
        numbers.append(round(last))
    return np.unique([*numbers, high])


def _refined(grid: np.ndarray, picks: Sequence[int]) -> np.ndarray:
    """Return the grid with every number between the neighbors of a pick."""
    fine = set(grid.tolist())
    for pick in picks:
        at = int(np.searchsorted(grid, pick))
        fine |= set(range(int(grid[max(0, at - 1)]), int(grid[min(len(grid) - 1, at + 1)]) + 1))
    return np.array(sorted(fine))


# ---- curves -------------------------------------------------------------------------------------------------------


class _Part:
    """Some rows with the tree over them: a clustering for every number of clusters, made when it is asked for."""

    def __init__(self, rows: Float[Tensor, "images axes"], places: Int[Tensor, " some"], seed: int) -> None:
        rows = rows[places]
        n_small = min(_SMALL, len(rows) // 2)
        small = small_clusters(rows, n_small, seed=seed)
        sizes = np.bincount(small.labels[0].numpy(force=True), minlength=n_small)
        centers = small.centers[0].numpy(force=True)
        self.rows, self.places, self.tree = rows, places.numpy(force=True), ward(centers[sizes > 0], sizes[sizes > 0])
        self._made = dict[int, Centers]()

    def clustered(self, n_clusters: int) -> Centers:
        """Return so many clusters."""
        if n_clusters not in self._made:
            starts = torch.from_numpy(self.tree.means(n_clusters)).to(self.rows)
            self._made[n_clusters] = lloyd(self.rows, starts[None])
        return self._made[n_clusters]


def _silhouettes(seen: _Part, new: _Part, grid: np.ndarray) -> np.ndarray:
    return np.array([silhouette(new.rows, nearest(new.rows, seen.clustered(n).centers)[0][0], n)
                     for n in grid.tolist()])


class _Looks:
    """The images and their halves, and what every criterion makes of them."""

    def __init__(self, rows: Float[Tensor, "images axes"], indices: np.ndarray, n_repeats: int, seed: int) -> None:
        self.rows, self.indices, self.seed = rows, indices, seed
        self.tree = _Part(rows, torch.arange(len(rows), device=rows.device), seed).tree
        self.halves = [_halved(rows, seed, repeat) for repeat in range(n_repeats)]
        self._kept: tuple[list[int], list[dict[str, np.ndarray]], list[np.ndarray]] = ([], [], [])

    @property
    def n_distinct(self) -> int:
        """As many clusters as every tree has."""
        return min(len(tree.sizes) for tree in (self.tree, *(part.tree for pair in self.halves for part in pair)))

    def curves(self, grid: np.ndarray) -> dict[str, np.ndarray]:
        """Return every criterion over the grid: the mean over the halves; the dendrogram of all images."""
        parts, strengths = self._evaluated(grid)
        mean = {name: np.mean([curves[name] for curves in parts], axis=0) for name in parts[0]}
        return mean | {"dendrogram": gaps(self.tree, grid), "stability": np.mean(strengths, axis=0)}

    def picks(self, grid: np.ndarray) -> dict[str, int]:
        """Return what each criterion picks."""
        return {name: PICKS[name](grid, curve) for name, curve in self.curves(grid).items()}

    def spread(self, grid: np.ndarray) -> dict[str, list[int]]:
        """Return what each criterion picks on every half, and stability in every repeat."""
        parts, strengths = self._evaluated(grid)
        found = {name: [PICKS[name](grid, curves[name]) for curves in parts] for name in parts[0]}
        return found | {"stability": [last_above(grid, curve) for curve in strengths]}

    def _evaluated(self, grid: np.ndarray) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
        if self._kept[0] != grid.tolist():
            parts = [self._judged(seen, new, grid) for pair in self.halves for seen, new in (pair, pair[::-1])]
            self._kept = (grid.tolist(), parts, [self._strengths(*pair, grid) for pair in self.halves])
        return self._kept[1:]

    def _judged(self, seen: _Part, new: _Part, grid: np.ndarray) -> dict[str, np.ndarray]:
        """Return the criteria of the clusters of ``seen``, at images of ``new`` by their nearest center."""
        numbers = grid.tolist()
        found = [self._labels(seen, n) for n in numbers]
        fitted = [(part.rows, [labels[part.places] for labels in found]) for part in (seen, new)]
        return {"silhouette": _silhouettes(seen, new, grid),
                "modularity": np.array([modularity(labels.numpy(force=True), self.indices, new.places)
                                        for labels in found]),
                "generalization": np.array(generalization(*fitted)), "dendrogram": gaps(new.tree, grid)}

    def _strengths(self, first: _Part, second: _Part, grid: np.ndarray) -> np.ndarray:
        one, other = ([self._labels(part, n).numpy(force=True) for n in grid.tolist()] for part in (first, second))
        return np.array([prediction_strength(a, b, n) for a, b, n in zip(one, other, grid.tolist(), strict=True)])

    def _labels(self, part: _Part, n_clusters: int) -> Int[Tensor, " images"]:
        """Return the nearest of a half's centers for every image."""
        return nearest(self.rows, part.clustered(n_clusters).centers)[0][0]

    def structure(self, grid: np.ndarray) -> float:
        """Return the most by which a clustering's silhouette is a multiple of that of a cloud without groups.

        The cloud has as much spread on every axis, and rows as long.
        """
        draws = generator(self.seed, "one cloud")
        cloud = torch.randn(self.rows.shape, generator=draws).to(self.rows) * self.rows.std(dim=0)
        tiny = torch.finfo(cloud.dtype).tiny
        cloud *= (self.rows.norm(dim=1) / cloud.norm(dim=1).clamp(min=tiny))[:, None]
        of_chance = _silhouettes(*_halved(cloud - cloud.mean(dim=0), self.seed, 0), grid)
        return float((_silhouettes(*self.halves[0], grid) / np.maximum(of_chance, _POINT)).max())


def _halved(rows: Float[Tensor, "images axes"], seed: int, repeat: int) -> tuple[_Part, _Part]:
    order = torch.randperm(len(rows), generator=generator(seed, "halves", repeat)).to(rows.device)
    own = derive_seed(seed, "half", repeat)
    first, second = order.chunk(2)
    return _Part(rows, first, own), _Part(rows, second, own)


def gaps(tree: WardTree, grid: np.ndarray) -> np.ndarray:
    """Return how much dearer than usual the merge is that ends each number of clusters, in natural logarithms.

    Heights of rows without groups fall about as 1 / n_clusters, which is taken off; 0 where there is no such merge.
    """
    heights = np.maximum(tree.heights[::-1], np.finfo(float).tiny)  # of the merges to 1, 2, ... clusters
    found = np.zeros(len(grid))
    inside = grid <= len(heights) - 1
    at = grid[inside]
    found[inside] = np.log(heights[at - 2] / heights[at - 1]) - np.log(at / (at - 1))
    return found
