"""Many k-means of the same rows side by side, and Ward's tree over small clusters: every number of clusters, cheaply.

Rows ``(n, d)`` are rotated onto their first principal axes once. A tree over some hundreds of small clusters then
gives starts for every number of clusters, from which Lloyd's iterations need few passes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from phyla.randomness import generator

_SPARE_AXES, _POWERS = 16, 4  # Halko et al. 2011: axes beyond those wanted, and products with the covariance
_SMALL_PASSES = 5  # for small clusters, which need not be settled
_SETTLED, _LOOK = 1e-3, 4  # how far a center may still move, in the rows' spread; passes between two looks at it


@dataclass(frozen=True, eq=False)
class Centers:
    """What Lloyd's iterations found from some starts.

    Parameters
    ----------
    centers : (tries, n_clusters, d)
    labels : int64 (tries, n)
    inertia : (tries,), sum of squared distances to the nearest center
    """

    centers: Float[Tensor, "tries clusters features"]
    labels: Int[Tensor, "tries images"]
    inertia: Float[Tensor, " tries"]

    @property
    def best(self) -> int:
        """The try with the lowest inertia."""
        return int(self.inertia.argmin())


@dataclass(frozen=True, eq=False)
class WardTree:
    """Clusters that merge two by two, the cheapest pair first.

    Parameters
    ----------
    merges : int64 (m - 1, 2), places in 0..m-1; the second is taken into the first, which keeps its place
    heights : float64 (m - 1,), by how much each merge raises the sum of squares; it never falls
    centers, sizes : (m, d) and (m,) of the clusters at the start
    """

    merges: np.ndarray
    heights: np.ndarray
    centers: np.ndarray
    sizes: np.ndarray

    def cut(self, n_clusters: int) -> np.ndarray:
        """Return which of ``n_clusters`` groups each starting cluster is in, int64 (m,), numbered by first place."""
        groups = np.arange(len(self.sizes))
        for first, second in self.merges[: len(self.sizes) - n_clusters].tolist():
            groups[groups == second] = first
        return np.unique(groups, return_inverse=True)[1]

    def means(self, n_clusters: int) -> np.ndarray:
        """Return the means of the groups of ``cut``, (n_clusters, d)."""
        groups = self.cut(n_clusters)
        sums = np.zeros((n_clusters, self.centers.shape[1]))
        np.add.at(sums, groups, self.centers * self.sizes[:, None])
        return sums / np.bincount(groups, self.sizes, minlength=n_clusters)[:, None]


def rotated(rows: Float[Tensor, "images features"], n_axes: int, *, seed: int = 0) -> Float[Tensor, "images axes"]:
    """Return the rows, centred, on their first ``n_axes`` principal axes, float32; fewer where there are fewer.

    Notes
    -----
    Randomized subspace iteration (Halko, Martinsson and Tropp 2011), exact where ``n_axes`` is near the rank.
    """
    x = rows.float() - rows.float().mean(dim=0)
    width = min(n_axes + _SPARE_AXES, *x.shape)
    start = torch.randn(x.shape[1], width, generator=generator(seed, "principal axes")).to(x)
    axes = torch.linalg.qr(start)[0]
    for _ in range(_POWERS if width < min(x.shape) else 1):
        axes = torch.linalg.qr(x.T @ (x @ axes))[0]
    seen = x @ axes
    _, turn = torch.linalg.eigh((seen.T @ seen).double())
    return seen @ turn.flip(1)[:, : min(n_axes, width)].to(seen)


def small_clusters(rows: Float[Tensor, "images axes"], n_small: int, *, seed: int) -> Centers:
    """Return ``n_small`` clusters by k-means++ and a few passes: what a tree is built over. One try."""
    draws = generator(seed, "small clusters", n_small)
    return lloyd(rows, _spread_rows(rows, n_small, draws)[None], n_iterations=_SMALL_PASSES)


def lloyd(rows: Float[Tensor, "images axes"], starts: Float[Tensor, "tries clusters axes"], *,
          n_iterations: int = 20) -> Centers:
    """Return what at most ``n_iterations`` passes of Lloyd's make of every start; a cluster without rows stays put."""
    n_tries, n_clusters, width = starts.shape
    centers = starts.to(rows)
    offsets = torch.arange(n_tries, device=rows.device)[:, None] * n_clusters
    reach = _SETTLED * rows.square().sum(dim=1).mean().sqrt()
    for done in range(1, n_iterations + 1):
        cells = nearest(rows, centers)[0] + offsets
        sums = rows.new_zeros(n_tries * n_clusters, width)
        for own in cells:
            sums.index_add_(0, own, rows)
        counts = torch.bincount(cells.flatten(), minlength=n_tries * n_clusters)[:, None]
        before, centers = centers, torch.where(counts > 0, sums / counts.clamp(min=1), centers.flatten(0, 1))
        centers = centers.view_as(before)
        if done % _LOOK == 0 and bool(((centers - before).norm(dim=2) <= reach).all()):
            break
    labels, nearness = nearest(rows, centers)
    distances = (rows.square().sum(dim=1) - 2 * nearness).clamp(min=0)
    return Centers(centers, labels, distances.double().sum(dim=1))


def nearest(rows: Float[Tensor, "images axes"], centers: Float[Tensor, "tries clusters axes"]
            ) -> tuple[Int[Tensor, "tries images"], Float[Tensor, "tries images"]]:
    """Return the nearest center of each row, try by try, and its nearness: row·center - |center|² / 2."""
    found = [(rows @ own.T - own.square().sum(dim=1) / 2).max(dim=1) for own in centers]
    return torch.stack([one.indices for one in found]), torch.stack([one.values for one in found])


def ward(centers: np.ndarray, sizes: np.ndarray) -> WardTree:
    """Return Ward's tree over clusters of the given means, (m, d), and numbers of rows, (m,), all above 0.

    Notes
    -----
    Merging clusters of n and m rows raises the sum of squares by n·m / (n + m) times the squared distance of their
    means (Ward 1963).
    """
    means, weights = centers.astype(np.float64).copy(), sizes.astype(np.float64).copy()
    costs = np.stack([_cost(means, weights, at) for at in range(len(means))])
    merges, heights = np.empty((len(means) - 1, 2), np.int64), np.empty(len(means) - 1)
    for step in range(len(merges)):
        first, second = sorted(divmod(int(costs.argmin()), len(means)))
        merges[step], heights[step] = (first, second), costs[first, second]
        total = weights[first] + weights[second]
        means[first] = (weights[first] * means[first] + weights[second] * means[second]) / total
        weights[first], weights[second] = total, 0
        costs[second] = costs[:, second] = np.inf
        costs[first] = costs[:, first] = _cost(means, weights, first)
    return WardTree(merges, np.maximum.accumulate(heights), centers, sizes)


def _cost(means: np.ndarray, weights: np.ndarray, at: int) -> np.ndarray:
    """Return what merging one cluster with each costs; infinite with itself and those that are gone (weight 0)."""
    apart = np.square(means - means[at]).sum(axis=1) * weights * weights[at] / (weights + weights[at])
    apart[weights == 0] = np.inf
    apart[at] = np.inf
    return apart


def _spread_rows(rows: Float[Tensor, "images axes"], wanted: int, draws: torch.Generator) -> Float[Tensor, "rows axes"]:
    """Return ``wanted`` rows, each drawn by its squared distance to those before (k-means++)."""
    own = rows.square().sum(dim=1)
    uniform = torch.rand(wanted, generator=draws).to(rows)
    taken = [(uniform[0] * len(rows)).long().clamp(max=len(rows) - 1)]
    apart = torch.full_like(own, torch.inf)
    for draw in uniform[1:]:
        last = rows[taken[-1]]
        apart = torch.minimum(apart, (own - 2 * (rows @ last) + last @ last).clamp(min=0))
        reached = apart.double().cumsum(dim=0)
        taken.append(torch.searchsorted(reached, draw.double() * reached[-1]).clamp(max=len(rows) - 1))
    return rows[torch.stack(taken)]
