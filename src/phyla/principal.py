"""Few numbers for many: principal components of embeddings, and coordinates of images in the graph of their neighbors.

Both make clustering cheap, and often better: what little varies is left out.
"""

import math

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from scipy.sparse.linalg import eigsh
from torch import Tensor

from phyla.errors import InputError
from phyla.randomness import generator
from phyla.types import Neighbors

_ROWS = 1 << 14  # rows of which products are summed at once
_SPARE, _ITERATIONS = 32, 8  # vectors beyond those wanted, and products: then the wanted ones no longer move
_TIE = 1e-3  # of every image to itself, so that one without neighbors has a place


def principal_axes(rows: np.ndarray, n_axes: int) -> np.ndarray:
    """Return the directions in which ``rows`` (n, d) vary most, largest first: (d, at most n_axes) of unit length.

    Fewer where the rows vary in fewer. Signs are fixed: the entry of largest size is positive.
    """
    mean, total = rows.mean(axis=0, dtype=np.float64), np.zeros((rows.shape[1],) * 2)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS] - mean.astype(rows.dtype)
        total += part.T @ part
    variances, axes = _largest(torch.from_numpy(total), n_axes)
    kept = variances.flip(0)[:n_axes] > 1e-10 * max(float(variances[-1]), np.finfo(np.float64).tiny)
    kept[0] = True
    found = axes.flip(1)[:, :n_axes][:, kept].numpy()
    return (found * np.sign(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])])).astype(np.float32)


def principal_rows(rows: np.ndarray, n_components: int, *, whiten: float = 0.5) -> np.ndarray:
    """Return the first principal components of ``rows`` (n, d), scaled to length 1: (n, at most n_components), float32.

    ``whiten`` 0 leaves the components' variances as they are, 1 makes them equal; in between each is divided by its
    standard deviation to that power.
    """
    found = (rows - rows.mean(axis=0)) @ principal_axes(rows, n_components)
    found /= np.maximum(found.std(axis=0), np.finfo(np.float32).tiny) ** whiten
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)


def graph_coordinates(neighbors: Neighbors, n_coordinates: int, *, n_neighbors: int | None = None,
                      power: float = 4.0) -> np.ndarray:
    """Return where images lie in the graph of their neighbors, (n_images, n_coordinates), float32, slowest first.

    k-means of the first columns, rows scaled to length 1, is spectral clustering (Ng, Jordan and Weiss 2002); here the
    eigenvectors are multiplied by a power of their eigenvalues, as in diffusion maps, so that more of them than there
    are clusters do no harm. Two images are tied where one is a
    neighbor of the other, by a strength that falls with their distance as UMAP's does: exp(-(d - d_1) / mean(d - d_1)),
    d_1 that of the nearest; of the two strengths a and b the tie is a + b - a·b.

    Parameters
    ----------
    neighbors : of cosine similarities
    n_coordinates : eigenvectors of the normalized graph of largest eigenvalue, below n_images
    n_neighbors : the first so many; None: all that there are
    power : of the eigenvalues, which are at most 1; 0 leaves the eigenvectors as they are

    Raises
    ------
    InputError
        As many coordinates as images, or more.
    """
    n_images = len(neighbors)
    if not 1 <= n_coordinates < n_images:
        raise InputError(f"{n_coordinates} coordinates in a graph of {n_images} images cannot be found",
                         "ask for fewer than there are images")
    graph = _ties(neighbors, n_neighbors or neighbors.n_neighbors)
    graph = graph + _TIE * scipy.sparse.eye(n_images, format="csr")
    root = scipy.sparse.diags(1 / np.sqrt(np.asarray(graph.sum(axis=1)).ravel()))
    start = 1 + 0.1 * np.cos(np.arange(n_images))  # not the first eigenvector itself, and the same on every machine
    values, vectors = eigsh(root @ graph @ root, k=n_coordinates, which="LA", tol=1e-4, v0=start)
    slowest = np.argsort(-values)
    return (math.sqrt(n_images) * vectors * np.clip(values, 0, 1) ** power)[:, slowest].astype(np.float32)


def _ties(neighbors: Neighbors, n_neighbors: int) -> scipy.sparse.csr_matrix:
    n_images = len(neighbors)
    distances = np.sqrt(np.maximum(2 - 2 * neighbors.similarities[:, :n_neighbors].astype(np.float64), 0))
    beyond = distances - distances[:, :1]
    strengths = np.exp(-beyond / np.maximum(beyond.mean(axis=1, keepdims=True), 1e-6))
    starts = np.arange(n_images + 1) * distances.shape[1]
    tied = scipy.sparse.csr_matrix((strengths.ravel(), neighbors.indices[:, :n_neighbors].ravel(), starts),
                                   shape=(n_images, n_images))
    return tied + tied.T - tied.multiply(tied.T)


def _largest(matrix: Float[Tensor, "d d"], n_wanted: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "d k"]]:
    """Return the largest eigenvalues of a symmetric matrix, rising, and their vectors; of a large one by iteration."""
    n_tried = n_wanted + max(_SPARE, n_wanted // 2)
    if 2 * n_tried > len(matrix):
        return torch.linalg.eigh(matrix)
    held = matrix / matrix.diagonal().sum().clamp(min=torch.finfo(matrix.dtype).tiny)
    basis = torch.randn(len(held), n_tried, generator=generator(0, "principal axes"), dtype=held.dtype)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(held @ basis).Q
    values, turned = torch.linalg.eigh(basis.T @ held @ basis)
    return values, basis @ turned
