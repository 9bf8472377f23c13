"""Rank neighbors anew by how alike their own neighborhoods are: k-reciprocal re-ranking with sparse rows.

Zhong et al. 2017, "Re-ranking Person Re-identification with k-reciprocal Encoding"; NNM's code ships it and never calls
it. Every image gets a sparse row of weights over the images whose neighbor it is and which are its neighbors, and two
images are as near as their rows overlap. An image that many find near, but that finds others nearer, falls back.

Input ``values (n, d)``; output ``Neighbors``. Rows have at most a few hundred numbers an image, and overlaps are summed
for a block of images at a time, only with images that share an entry: past the first search time and memory grow as n.
"""

import itertools

import numpy as np
import torch
from scipy import sparse

from phyla.errors import InputError
from phyla.neighbors import check_embeddings, find_neighbors
from phyla.progress import bar
from phyla.types import Embeddings, Neighbors

_PAIRS = 1 << 21  # shared entries of two rows at once: 16 MB for each number kept of one
_VALUES = 1 << 22  # numbers gathered at once for inner products


def rerank(
    values: Embeddings | np.ndarray,
    n_neighbors: int,
    *,
    k1: int = 20,
    k2: int = 6,
    device: torch.device | str | None = None,
) -> Neighbors:
    """Return the ``n_neighbors`` nearest other images of every image by the overlap of their neighborhoods.

    Parameters
    ----------
    values : (n_images, n_features), real and finite; compared by the cosine
    n_neighbors : 1 to n_images - 1
    k1 : images in a neighborhood, the image itself one of them; more than there are means all
    k2 : neighborhoods averaged, the image's own one of them; 1 for its own alone
    device : where the first search computes; all that follows is on the CPU

    Returns
    -------
    Neighbors
        Nearest first; ``similarities`` are float32, 1 less the Jaccard distance, 0 to 1. Equally near ones come by
        index. Images whose neighborhoods share nothing with the image's are filled up in the order of the first search.

    Raises
    ------
    InputError
        ``n_neighbors`` is below 1 or not below the number of images, k1 or k2 is below 1, or a value is not finite.

    Notes
    -----
    With N_k(i) the k nearest of i, itself first: R(i, k) = {j in N_k(i) : i in N_k(j)}; E(i) = R(i, k1) and every
    R(j, k1/2), j in R(i, k1), of which more than two thirds lie in R(i, k1); V_i = softmax over E(i) of
    -(2 - 2 cos(i, j)); V_i becomes the mean of V over N_k2(i); m_ij = sum_c min(V_ic, V_jc);
    Jaccard distance = 1 - m / (2 - m).
    """
    array = check_embeddings(values)
    for name, value in (("n_neighbors", n_neighbors), ("k1", k1), ("k2", k2)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    n = len(array)
    first = find_neighbors(array, max(n_neighbors, min(max(k1, k2), n) - 1), device=device)
    ranked = np.concatenate([np.arange(n)[:, None], first.indices], axis=1)
    half = max(1, round(k1 / 2))  # 2.5 becomes 2, as the released code rounds
    rows = _weights(array, _expanded(_mutual(ranked[:, :k1]), _mutual(ranked[:, :half])))
    if k2 > 1:
        rows = sparse.csr_matrix(_table(ranked[:, :k2]).astype(np.float64) @ rows) / min(k2, n)
    return _overlaps(rows, first.indices[:, :n_neighbors])


def _table(columns: np.ndarray) -> sparse.csr_matrix:
    """Return (n, n) with a 1 at each of the ``columns`` (n, k) of a row."""
    n, k = columns.shape
    return sparse.csr_matrix((np.ones(n * k, np.int32), columns.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))


def _mutual(columns: np.ndarray) -> sparse.csr_matrix:
    """Return (n, n) with a 1 where two images are among the ``columns`` (n, k) of each other."""
    table = _table(columns)
    return sparse.csr_matrix(table.multiply(table.T))


def _expanded(near: sparse.csr_matrix, half: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return ``near`` with the half-sized neighborhoods of its members of which more than two thirds lie in it."""
    shared = sparse.csr_matrix(near.multiply(near @ half.T))
    size = np.diff(half.indptr)
    shared.data = (3 * shared.data > 2 * size[shared.indices]).astype(np.int32)
    shared.eliminate_zeros()
    grown = sparse.csr_matrix(near + shared @ half)
    grown.sort_indices()
    return grown


def _weights(array: np.ndarray, members: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the softmax of -(2 - 2 cosine) over the members of each row."""
    starts = members.indptr[:-1]
    sizes = np.diff(members.indptr)
    row = np.repeat(np.arange(len(array)), sizes)
    length = np.concatenate([_length(array[part]) for part in _parts(len(array), array.shape[1])])
    cosine = np.empty(len(row))
    for part in _parts(len(row), array.shape[1]):
        i, j = row[part], members.indices[part]
        cosine[part] = np.einsum("ij,ij->i", array[i] / length[i, None], array[j] / length[j, None])
    weight = np.exp(2 * cosine - 2)
    total = np.add.reduceat(weight, starts)  # no row is empty: every image is its own neighbor
    return sparse.csr_matrix((weight / total[row], members.indices, members.indptr), shape=members.shape)


def _length(rows: np.ndarray) -> np.ndarray:
    """Return Euclidean lengths in float64, whatever the size of the numbers; 1 for a zero vector."""
    largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
    length = largest[:, 0] * np.sqrt(np.square(rows / np.where(largest > 0, largest, 1)).sum(axis=1))
    return np.where(length > 0, length, 1.0)


def _parts(total: int, width: int) -> list[slice]:
    step = max(1, _VALUES // width)
    return [slice(start, start + step) for start in range(0, total, step)]


def _overlaps(rows: sparse.csr_matrix, first: np.ndarray) -> Neighbors:
    """Return the neighbors by overlap of ``rows``; ``first`` (n, k) fills up where too few overlap at all."""
    columns = sparse.csc_matrix(rows)
    columns.sort_indices()
    n, k = first.shape
    found, similar = np.empty((n, k), np.int64), np.empty((n, k), np.float32)
    work = np.add.reduceat(np.diff(columns.indptr)[rows.indices], rows.indptr[:-1])  # pairs that each row makes
    ends = np.cumsum(work)
    with bar("ranking neighbors", total=n, unit="image") as shown:
        start = 0
        while start < n:
            begun = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, begun + _PAIRS, side="right")))
            found[start:stop], similar[start:stop] = _nearest(_shares(rows, columns, start, stop), first[start:stop])
            shown.advance(stop - start)
            start = stop
    return Neighbors(found, similar)


def _shares(rows: sparse.csr_matrix, columns: sparse.csc_matrix, start: int, stop: int) -> sparse.csr_matrix:
    """Return the summed minima of rows ``start`` to ``stop`` with every other row, (stop - start, n), where above 0."""
    inside = slice(rows.indptr[start], rows.indptr[stop])
    column, weight = rows.indices[inside], rows.data[inside]
    row = np.repeat(np.arange(stop - start), np.diff(rows.indptr[start : stop + 1]))
    sizes = np.diff(columns.indptr)[column]
    # One pair for every entry of every column in which a row has an entry.
    shift = columns.indptr[column] - np.concatenate([[0], np.cumsum(sizes)[:-1]])
    place = np.arange(sizes.sum()) + np.repeat(shift, sizes)
    smaller = np.minimum(np.repeat(weight, sizes), columns.data[place])
    other = columns.indices[place]
    row = np.repeat(row, sizes)
    apart = other != row + start
    shares = sparse.coo_matrix((smaller[apart], (row[apart], other[apart])), shape=(stop - start, rows.shape[0]))
    summed = sparse.csr_matrix(shares)  # which sums what falls on one place
    summed.sort_indices()
    return summed


def _nearest(shares: sparse.csr_matrix, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest of some rows, and their similarities."""
    near = (shares.data / (2 - shares.data)).astype(np.float32)  # rounded, so that sums in another order stay equal
    found, similar = first.copy(), np.zeros(first.shape, np.float32)
    for i, (begin, end) in enumerate(itertools.pairwise(shares.indptr)):
        order = begin + np.argsort(-near[begin:end], kind="stable")[: first.shape[1]]
        order = order[near[order] > 0]
        best = shares.indices[order]
        if len(best) < first.shape[1]:
            found[i, len(best) :] = first[i][~np.isin(first[i], best)][: first.shape[1] - len(best)]
        found[i, : len(best)], similar[i, : len(best)] = best, near[order]
    return found, np.minimum(similar, 1)
