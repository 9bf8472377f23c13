"""What speaks for a number of clusters, without labels: criteria of different kinds, each a number a clustering.

Rows ``(n, d)`` and labels ``(n,)`` in; higher is better. None knows of a grid or of a pick: ``counting.py`` does.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_RIDGE = 1e-3  # of the mean of the features' squares


def silhouette(rows: Float[Tensor, "images axes"], labels: Int[Tensor, " images"], n_clusters: int) -> float:
    """Return the mean silhouette of squared distances, -1 to 1: how much nearer the own cluster is than the next.

    Notes
    -----
    Rousseeuw (1987) with squared distances, whose mean over a cluster needs only its mean and spread: no pair is
    formed. An image alone in its cluster counts 0.
    """
    sizes, means = _means(rows, labels, n_clusters)
    squares = rows.square().sum(dim=1)
    spread = rows.new_zeros(n_clusters).index_add_(0, labels, squares) / sizes.clamp(min=1)
    apart = squares[:, None] - 2 * rows @ means.T + spread
    apart[:, sizes == 0] = torch.inf
    others = sizes[labels]
    own = apart.gather(1, labels[:, None])[:, 0] * others / (others - 1).clamp(min=1)
    nearest = apart.scatter(1, labels[:, None], torch.inf).min(dim=1).values
    score = (nearest - own) / torch.maximum(nearest, own).clamp(min=torch.finfo(rows.dtype).tiny)
    return float(torch.where((others > 1) & nearest.isfinite(), score, 0.0).double().mean())


def modularity(labels: np.ndarray, indices: np.ndarray, rows: np.ndarray | None = None) -> float:
    """Return the modularity of clusters in the graph of neighbors, below 1: links inside, less those of chance.

    Parameters
    ----------
    labels : int64 (n,), 0 and up
    indices : int64 (n, n_neighbors), the neighbors of each image
    rows : the images whose links count; None: all

    Notes
    -----
    Newman and Girvan (2004), each image's choice of a neighbor one link: sum over c of e_c - a_c·b_c with e_c the share
    of links inside c, and a_c, b_c the shares of those that leave from and that arrive in it.
    """
    n_clusters = int(labels.max()) + 1
    indices, own = (indices, labels) if rows is None else (indices[rows], labels[rows])
    chosen = labels[indices]
    inside = np.count_nonzero(chosen == own[:, None]) / indices.size
    leaving = np.bincount(own, minlength=n_clusters) / len(own)
    arriving = np.bincount(chosen.ravel(), minlength=n_clusters) / indices.size
    return float(inside - leaving @ arriving)


def prediction_strength(first: np.ndarray, second: np.ndarray, n_clusters: int) -> float:
    """Return how far pairs that share a cluster in one labelling share one in the other: 0 by chance, 1 always.

    Notes
    -----
    Tibshirani and Walther (2005), but the mean over clusters instead of the worst, both ways, and corrected for chance:
    two images drawn from all share a cluster with a probability of the sum of squared shares.
    """
    table = np.bincount(first * n_clusters + second, minlength=n_clusters**2).reshape(n_clusters, n_clusters)
    return float((_kept_pairs(table) + _kept_pairs(table.T)) / 2)


def _kept_pairs(table: np.ndarray) -> float:
    sizes = table.sum(axis=1)
    many = sizes > 1
    kept = (table[many] * (table[many] - 1)).sum(axis=1) / (sizes[many] * (sizes[many] - 1))
    chance = np.square(table.sum(axis=0) / table.sum()).sum()
    return float((kept.mean() - chance) / (1 - chance)) if many.any() and chance < 1 else 0.0


def generalization(seen: tuple[Float[Tensor, "seen axes"], list[Int[Tensor, " seen"]]],
                   new: tuple[Float[Tensor, "new axes"], list[Int[Tensor, " new"]]]) -> list[float]:
    """Return for each labelling how well a ridge classifier of ``seen`` rows names ``new`` ones: 0 by chance, 1 always.

    Both are rows and several labellings of them, which share one factorisation. It is Cohen's kappa.
    """
    x, y = (torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1).double() for rows, _ in (seen, new))
    widths = [1 + max(int(own.max()), int(other.max())) for own, other in zip(seen[1], new[1], strict=True)]
    targets = torch.cat([torch.nn.functional.one_hot(labels, width).double() for labels, width
                         in zip(seen[1], widths, strict=True)], dim=1)
    squares = x.T @ x
    ridge = _RIDGE * squares.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    told = y @ torch.linalg.solve(squares + ridge, x.T @ targets)
    parts = torch.split(told, widths, dim=1)
    return [_kappa(part.argmax(dim=1), labels, width) for part, labels, width
            in zip(parts, new[1], widths, strict=True)]


def _kappa(told: Int[Tensor, " images"], labels: Int[Tensor, " images"], width: int) -> float:
    shares = [torch.bincount(each, minlength=width).double() / len(labels) for each in (told, labels)]
    chance = float(shares[0] @ shares[1])
    return (float((told == labels).double().mean()) - chance) / (1 - chance) if chance < 1 else 0.0


def _means(rows: Float[Tensor, "images axes"], labels: Int[Tensor, " images"], n_clusters: int
           ) -> tuple[Float[Tensor, " clusters"], Float[Tensor, "clusters axes"]]:
    sizes = torch.bincount(labels, minlength=n_clusters).to(rows)
    sums = rows.new_zeros(n_clusters, rows.shape[1]).index_add_(0, labels, rows)
    return sizes, sums / sizes.clamp(min=1)[:, None]
