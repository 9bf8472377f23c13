"""Judge an assignment without truth: the only scores by which a method may choose a head or a checkpoint.

Inputs are probabilities ``(n, K)``, labels ``(n,)`` and the neighbors ``(n, k)`` of the same images; outputs are plain
numbers. Everything is summed in float64 and in blocks of rows.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from phyla.errors import InputError
from phyla.generalization import generalization_score as generalization_score
from phyla.types import Neighbors

_LOG_FLOOR = -100.0  # of log(p_i·p_j): the published code's, so that one contradiction does not make a score infinite
_GATHERED = 1 << 22  # float64 numbers gathered at once: 32 MB
_HOTTEST, _HALVINGS = 64.0, 48  # bounds of a temperature, and how often the range of its logarithm is halved


def neighbor_score(
    probabilities: np.ndarray | Tensor,
    neighbors: Neighbors | np.ndarray | Tensor,
    *,
    entropy_weight: float = 1.0,
) -> float:
    """Return how far neighbors disagree, less how evenly clusters are used: lower is better.

    Parameters
    ----------
    probabilities : (n_images, n_clusters), rows summing to 1; a tensor is scored on its device
    neighbors : (n_images, n_neighbors) indices without the image itself, which counts as one neighbor more
    entropy_weight : of H; 1 whatever the weight in training

    Raises
    ------
    InputError
        The shapes do not fit, or an index is outside the images.

    Notes
    -----
    The mean over images i and their neighbors j, i itself among them, of -log(p_i·p_j), minus ``entropy_weight``
    times H(mean p), in nats: the validation loss by which SCAN (Van Gansbeke et al. 2020) chooses its head and epoch.
    """
    p = _probabilities(probabilities)
    indices = _indices(neighbors, len(p)).to(p.device)
    rows = max(1, _GATHERED // (p.shape[1] * (indices.shape[1] + 1)))
    total = p.new_zeros(())
    for start in range(0, len(p), rows):
        own = p[start : start + rows]
        others = p[indices[start : start + rows]]
        similarities = torch.cat([(own[:, None] * others).sum(dim=2), own.square().sum(dim=1, keepdim=True)], dim=1)
        total -= similarities.log().clamp(min=_LOG_FLOOR).sum()  # on the device: no waiting for it block by block
    disagreement = float(total) / (len(p) * (indices.shape[1] + 1))
    return disagreement - entropy_weight * _entropy(p.mean(dim=0))


def assignment_entropy(probabilities: np.ndarray | Tensor) -> float:
    """Return the entropy of the mean assignment, in nats: log K when all clusters are used evenly, 0 after collapse."""
    return _entropy(_probabilities(probabilities).mean(dim=0))


def used_clusters(labels: np.ndarray, n_clusters: int, *, min_share: float = 0.0) -> int:
    """Return how many clusters hold an image, and at least ``min_share`` (0 to 1) of all images."""
    sizes = np.bincount(labels, minlength=n_clusters)
    return int(np.count_nonzero((sizes > 0) & (sizes >= min_share * len(labels))))


def effective_clusters(labels: np.ndarray) -> float:
    """Return the exponential of the entropy of the cluster sizes: the number of even clusters that would equal it."""
    sizes = np.bincount(labels)
    return float(np.exp(_entropy(torch.from_numpy(sizes / sizes.sum()))))


def neighbor_agreement(labels: np.ndarray, neighbors: Neighbors | np.ndarray | Tensor) -> float:
    """Return the share of pairs of an image and one of its neighbors that lie in the same cluster, 0 to 1."""
    indices = _indices(neighbors, len(labels)).numpy(force=True)
    rows = max(1, _GATHERED // indices.shape[1])
    same = sum(int(np.count_nonzero(labels[indices[start : start + rows]] == labels[start : start + rows, None]))
               for start in range(0, len(labels), rows))
    return same / indices.size


def supported_share(labels: np.ndarray, neighbors: Neighbors | np.ndarray | Tensor) -> float:
    """Return the share of images whose cluster no other cluster outvotes among their neighbors, 0 to 1.

    Each neighbor has one vote, the image itself none; a tie with the own cluster speaks for it. It estimates how often
    a label is right, if images that are right but outvoted are about as many as wrong ones that are supported. It
    cannot see a cluster that is no class, and is 1 after a collapse.
    """
    indices = _indices(neighbors, len(labels)).numpy(force=True)
    labels = np.unique(labels, return_inverse=True)[1]  # counted from 0, however they were numbered
    supported = 0
    for rows, votes in count_votes(labels, indices):
        own = np.take_along_axis(votes, labels[rows, None], axis=1)[:, 0]
        supported += int(np.count_nonzero(own == votes.max(axis=1)))
    return supported / len(labels)


def count_votes(labels: np.ndarray, indices: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield, block by block, some rows of ``indices`` and how often each label stands among the images they name.

    Parameters
    ----------
    labels : int (n_images,), 0 and up
    indices : int (n_rows, n_voters), places in ``labels``

    Yields
    ------
    rows : which of ``indices``
    votes : int64 (rows, labels.max() + 1)
    """
    n_labels = int(labels.max()) + 1
    at_once = max(1, _GATHERED // max(indices.shape[1], n_labels))
    for start in range(0, len(indices), at_once):
        named = labels[indices[start : start + at_once]]
        cells = named + np.arange(len(named))[:, None] * n_labels
        counted = np.bincount(cells.ravel(), minlength=len(named) * n_labels)
        yield slice(start, start + len(named)), counted.reshape(len(named), n_labels)


def label_free_temperature(logits: np.ndarray | Tensor, neighbors: Neighbors | np.ndarray | Tensor) -> float:
    """Return the temperature at which the mean confidence is the share of images that their neighbors support.

    It ends over- and under-confidence as far as ``supported_share`` of the most probable clusters is the share that is
    right; it changes no label.

    Parameters
    ----------
    logits : (n_images, n_clusters), finite
    neighbors : (n_images, n_neighbors) of the same images, found in embeddings that did not learn from these labels
    """
    table = _table(logits, "logits")
    share = supported_share(table.argmax(dim=1).numpy(force=True), neighbors)
    return matching_temperature(table, min(share, 1 - 0.5 / len(table)))  # no finite one would make all certain


def matching_temperature(logits: np.ndarray | Tensor, confidence: float) -> float:
    """Return the temperature T at which the mean largest probability of softmax(logits / T) is ``confidence``.

    The mean falls steadily from 1 to 1 / n_clusters as T rises, so there is one such T. It is sought between 1/64 and
    64; where it lies outside, the nearer of these is returned.

    Parameters
    ----------
    logits : (n_images, n_clusters), finite
    confidence : the mean wanted, 0 to 1
    """
    gaps = _table(logits, "logits")
    gaps = gaps - gaps.amax(dim=1, keepdim=True)
    low, high = -math.log(_HOTTEST), math.log(_HOTTEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mean = float((gaps / math.exp(middle)).exp().sum(dim=1).reciprocal().mean())
        low, high = (middle, high) if mean > confidence else (low, middle)
    return math.exp((low + high) / 2)


def _entropy(p: Float[Tensor, " clusters"]) -> float:
    return float(torch.special.entr(p).sum())


def _probabilities(values: np.ndarray | Tensor) -> Float[Tensor, "images clusters"]:
    return _table(values, "probabilities")


def _table(values: np.ndarray | Tensor, what: str) -> Float[Tensor, "images clusters"]:
    """Return the numbers as float64, on their device if that has float64."""
    p = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.require(values, np.float64, "W"))
    if p.ndim != 2 or 0 in p.shape:
        raise InputError(f"{what} must be (n_images, n_clusters), at least one of each, got {tuple(p.shape)}")
    return (p.cpu() if p.device.type == "mps" else p).double()


def _indices(neighbors: Neighbors | np.ndarray | Tensor, n_images: int) -> Int[Tensor, "images neighbors"]:
    found = neighbors.indices if isinstance(neighbors, Neighbors) else neighbors
    indices = found.long() if isinstance(found, Tensor) else torch.from_numpy(np.require(found, np.int64, "W"))
    if indices.ndim != 2 or len(indices) != n_images or indices.shape[1] == 0:
        raise InputError(f"neighbors of {n_images} images must be ({n_images}, n_neighbors), got "
                         f"{tuple(indices.shape)}", "score with the neighbors of the same images")
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < 0 or highest >= n_images:
        raise InputError(f"neighbors must be indices from 0 to {n_images - 1}, got {lowest} to {highest}",
                         "score with the neighbors of the same images")
    return indices
