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


def modularity(labels: np.ndarray, indices: np.ndarray) -> float:
    """Return the modularity of clusters in the graph of neighbors, below 1: links inside, less those of chance.

    Parameters
    ----------
    labels : int64 (n,), 0 and up
    indices : int64 (n, n_neighbors), the neighbors of each image

    Notes
    -----
    Newman and Girvan (2004), each image's choice of a neighbor one link: sum over c of e_c - a_c·b_c with e_c the share
    of links inside c, and a_c, b_c the shares of those that leave from and that arrive in it.
    """
    n_links, n_clusters = indices.size, int(labels.max()) + 1
    chosen = labels[indices]
    inside = np.count_nonzero(chosen == labels[:, None]) / n_links
    leaving = np.bincount(labels, minlength=n_clusters) / len(labels)
    arriving = np.bincount(chosen.ravel(), minlength=n_clusters) / n_links
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


def generalization(rows: Float[Tensor, "images axes"], labellings: list[Int[Tensor, " images"]], *,
                   draws: torch.Generator, n_folds: int = 5) -> list[float]:
    """Return for each labelling how well a ridge classifier tells it of rows it has not seen: 0 by chance, 1 always.

    All labellings share their folds and one factorisation a fold. It is Cohen's kappa of the labels that were left out.
    """
    fold = (torch.randperm(len(rows), generator=draws) % n_folds).to(rows.device)
    x = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1).double()
    widths = [int(labels.max()) + 1 for labels in labellings]
    targets = torch.cat([torch.nn.functional.one_hot(labels, width).double() for labels, width
                         in zip(labellings, widths, strict=True)], dim=1)
    squares = torch.stack([x[fold == at].T @ x[fold == at] for at in range(n_folds)])
    products = torch.stack([x[fold == at].T @ targets[fold == at] for at in range(n_folds)])
    ridge = _RIDGE * squares.sum(dim=0).diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    told = torch.empty_like(targets)
    for at in range(n_folds):
        weights = torch.linalg.solve(squares.sum(dim=0) - squares[at] + ridge, products.sum(dim=0) - products[at])
        told[fold == at] = x[fold == at] @ weights
    return [_kappa(part.argmax(dim=1), labels, width) for part, labels, width
            in zip(torch.split(told, widths, dim=1), labellings, widths, strict=True)]


def _kappa(told: Int[Tensor, " images"], labels: Int[Tensor, " images"], width: int) -> float:
    shares = [torch.bincount(each, minlength=width).double() / len(labels) for each in (told, labels)]
    chance = float(shares[0] @ shares[1])
    return (float((told == labels).double().mean()) - chance) / (1 - chance) if chance < 1 else 0.0


def _means(rows: Float[Tensor, "images axes"], labels: Int[Tensor, " images"], n_clusters: int
           ) -> tuple[Float[Tensor, " clusters"], Float[Tensor, "clusters axes"]]:
    sizes = torch.bincount(labels, minlength=n_clusters).to(rows)
    sums = rows.new_zeros(n_clusters, rows.shape[1]).index_add_(0, labels, rows)
    return sizes, sums / sizes.clamp(min=1)[:, None]
