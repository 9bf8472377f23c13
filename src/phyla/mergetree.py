"""A tree over the clusters of a run: fewer by merging, more by splitting, without fitting anything again.

The clusters of the run are one level of it. Above, clusters merge two by two, near ones and those that the soft
assignments mix up first. Below, each is split into leaves by k-means, more where there are more images and more spread,
and the leaves of a cluster merge by Ward's rule. One list of merges over the leaves holds it all, so that every cut is
nested in every coarser one, and the cut at the run's own number is the run's result.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from phyla.centers import WardTree, lloyd, rotated, small_clusters, ward
from phyla.errors import CorruptFileError, InputError
from phyla.nets.heads import Heads, MixtureHeads, NestedHeads
from phyla.quality import matching_temperature
from phyla.randomness import derive_seed
from phyla.spaces import Space, spaces_of
from phyla.storage import atomic
from phyla.training.device import Device
from phyla.types import Assignment

_AXES = 64
_SMALL_EACH = 8  # small clusters a leaf, over which the tree of a cluster is built
_IMAGES_EACH = 4  # images a leaf, at least, on average
_SURE = 0.98  # mean probability of the nearest leaf within its cluster: so clear that the cluster decides
_BLOCK = 1 << 22  # numbers compared at once


@dataclass(frozen=True, eq=False)
class MergeTree:
    """Leaves, and how they merge.

    Parameters
    ----------
    parents : int64 (n_leaves,), the run's cluster of each leaf, rising
    leaves : int64 (n_images,), the leaf of each image, one of those of its cluster
    centers : float32 (n_leaves, n_features), the mean embedding of each
    merges : int64 (n_leaves - 1, 2): the second's group joins the first's; those inside clusters come first
    heights : float64 (n_leaves - 1,), what each merge costs, never falling
    temperature : of the squared distances to leaves, by which a cluster's probability is shared among its leaves
    """

    parents: np.ndarray
    leaves: np.ndarray
    centers: np.ndarray
    merges: np.ndarray
    heights: np.ndarray
    temperature: float

    @property
    def n_clusters(self) -> int:
        """Clusters of the run."""
        return int(self.parents[-1]) + 1

    @property
    def n_leaves(self) -> int:
        """The largest number that can be cut to."""
        return len(self.parents)

    def cut(self, n_clusters: int) -> np.ndarray:
        """Return the group of each leaf, int64 (n_leaves,), 0 to ``n_clusters`` - 1 in the order of the clusters.

        Raises
        ------
        InputError
            There are not so many leaves, or less than one group.
        """
        if not 1 <= n_clusters <= self.n_leaves:
            raise InputError(f"the tree of this run can be cut to 1 to {self.n_leaves} classes, got {n_clusters}",
                             "for more, run again with --classes")
        groups = np.arange(self.n_leaves)
        for first, second in self.merges[: self.n_leaves - n_clusters].tolist():
            groups[groups == second] = first
        return np.unique(groups, return_inverse=True)[1].astype(np.int64)

    def merged(self, n_clusters: int) -> np.ndarray:
        """Return the group of each cluster of the run, int64, for a number that is at most theirs."""
        if n_clusters > self.n_clusters:
            raise InputError(f"{n_clusters} groups are more than the {self.n_clusters} clusters of the run")
        return self.cut(n_clusters)[np.searchsorted(self.parents, np.arange(self.n_clusters))]

    def heads(self, own: Heads, n_clusters: int) -> Heads:
        """Return heads of ``n_clusters`` clusters from the run's ``own``, on the embeddings the tree was made of.

        Fewer: probabilities of merged clusters are summed. More: each cluster's is shared among its leaves by
        softmax(-distance² / 2·temperature), and summed in groups. The run's number: ``own`` itself.
        """
        if isinstance(own, NestedHeads) or own.n_heads != 1 or own.n_clusters != self.n_clusters:
            raise InputError(f"the tree is of one head with {self.n_clusters} clusters, got {own.n_heads} with "
                             f"{own.n_clusters}", "give the heads of the run the tree was made of")
        if n_clusters == self.n_clusters:
            return own
        if n_clusters > self.n_clusters:
            centers = torch.from_numpy(self.centers).double() / self.temperature
            bias = -self.temperature * centers.square().sum(dim=1) / 2
            return NestedHeads.of(own, centers.float(), bias.float(), self.parents.tolist(),
                                  self.cut(n_clusters).tolist())
        groups = torch.from_numpy(self.merged(n_clusters))
        inner = own.groups if isinstance(own, MixtureHeads) else torch.arange(own.n_clusters)
        heads = MixtureHeads(own.weight.shape[2], own.weight.shape[1], own.weight.shape[0], groups[inner.cpu()])
        heads.weight.data, heads.bias.data = own.weight.data.clone(), own.bias.data.clone()
        return heads.to(own.weight.device)

    def save(self, path: Path | str) -> None:
        """Write the tree as a .npz file without pickling, whole or not at all."""
        with atomic(path) as temporary, temporary.open("wb") as out:
            np.savez(out, parents=self.parents, leaves=self.leaves, centers=self.centers, merges=self.merges,
                     heights=self.heights, temperature=np.float64(self.temperature))

    @classmethod
    def load(cls, path: Path | str) -> "MergeTree":
        """Return what ``save`` wrote; CorruptFileError when the file is damaged or something else."""
        try:
            with np.load(path, allow_pickle=False) as held:
                arrays = {name: held[name] for name in ("parents", "leaves", "centers", "merges", "heights")}
                tree = cls(**arrays, temperature=float(held["temperature"]))
            tree._check()
            return tree
        except (ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile) as error:
            raise CorruptFileError(f"{path} holds no tree of clusters ({error})",
                                   "delete it and give the run's command again") from error

    def _check(self) -> None:
        n = len(self.parents)
        if n < 1 or self.parents[0] != 0 or not np.isin(np.diff(self.parents), (0, 1)).all():
            raise ValueError("the clusters of its leaves are not numbered in order")
        if self.merges.shape != (n - 1, 2) or self.heights.shape != (n - 1,) or len(self.centers) != n:
            raise ValueError("its arrays do not belong together")
        if self.leaves.size and (self.leaves.min() < 0 or self.leaves.max() >= n):
            raise ValueError("it names leaves that are not there")
        if self.merges.size and (self.merges.min() < 0 or self.merges.max() >= n):
            raise ValueError("it merges leaves that are not there")


def merge_tree(assigned: Assignment | np.ndarray, embeddings: Space, *, n_leaves: int | None = None,
               random_state: int = 0, device: Device | None = None) -> MergeTree:
    """Return the tree over the clusters of a run.

    Parameters
    ----------
    assigned : probabilities (n_images, n_clusters), or labels int (n_images,)
    embeddings : (n_images, n_features), what the run's heads see
    n_leaves : at most; None: four times the clusters up to 100, and twice beyond 50
    random_state : seed of the splits

    Raises
    ------
    InputError
        The numbers of images differ, or fewer leaves than clusters are asked for.
    """
    rows = np.concatenate(spaces_of(embeddings), axis=1)
    table = _probabilities(assigned)
    n_clusters = table.shape[1]
    most = max(min(4 * n_clusters, 100), 2 * n_clusters) if n_leaves is None else n_leaves
    if len(table) != len(rows):
        raise InputError(f"{len(table)} assigned images do not fit {len(rows)} embeddings")
    if most < n_clusters:
        raise InputError(f"n_leaves={most} is less than the {n_clusters} clusters of the run")
    labels = table.argmax(axis=1)
    where = device.device if device is not None else torch.device("cpu")
    turned = rotated(torch.from_numpy(rows.astype(np.float32, copy=False)).to(where), _AXES, seed=random_state)
    parts = _split(turned, labels, n_clusters, most, random_state)
    parents, leaves, centers = _leaves(rows, table, labels, parts)
    sizes = np.bincount(leaves, minlength=len(parents))
    merges, heights = _merges(centers, sizes, parents, table)
    return MergeTree(parents, leaves, centers.astype(np.float32), merges, heights,
                     _temperature(rows, leaves, parents, centers))


def _probabilities(assigned: Assignment | np.ndarray) -> np.ndarray:
    table = assigned.probabilities if isinstance(assigned, Assignment) else np.asarray(assigned)
    if table.ndim == 1 and table.dtype.kind in "iu" and table.size and table.min() >= 0:
        return np.eye(int(table.max()) + 1, dtype=np.float32)[table]
    if table.ndim != 2 or 0 in table.shape or table.dtype.kind != "f":
        raise InputError(f"probabilities must be (n_images, n_clusters) or labels (n_images,), got {table.shape} "
                         f"{table.dtype}")
    return table


# ---- below the run's clusters: leaves ------------------------------------------------------------------------------


def _split(rows: Float[Tensor, "images axes"], labels: np.ndarray, n_clusters: int, most: int,
           seed: int) -> list[np.ndarray]:
    """Return for each cluster which of its leaves each of its images is in."""
    inside = [torch.from_numpy(np.flatnonzero(labels == c)).to(rows.device) for c in range(n_clusters)]
    spread = [float((rows[own] - rows[own].mean(dim=0)).square().sum()) if len(own) else 0.0 for own in inside]
    wanted = _allotted(np.array(spread), np.array([len(own) for own in inside]), most)
    return [_leaves_of(rows[own], int(n), derive_seed(seed, "leaves", c))
            for c, (own, n) in enumerate(zip(inside, wanted, strict=True))]


def _allotted(spread: np.ndarray, sizes: np.ndarray, most: int) -> np.ndarray:
    """Return how many leaves each cluster gets: one, and then one by one to the most spread that each still has."""
    wanted = np.ones(len(spread), np.int64)
    for _ in range(most - len(spread)):
        claim = np.where((wanted + 1) * _IMAGES_EACH <= sizes, spread / (wanted * (wanted + 1)), 0.0)
        if claim.max() <= 0:
            break
        wanted[claim.argmax()] += 1
    return wanted


def _leaves_of(rows: Float[Tensor, "images axes"], wanted: int, seed: int) -> np.ndarray:
    if wanted < 2:
        return np.zeros(len(rows), np.int64)
    n_small = max(wanted, min(_SMALL_EACH * wanted, len(rows) // 2))
    small = small_clusters(rows, n_small, seed=seed)
    sizes = np.bincount(small.labels[0].numpy(force=True), minlength=n_small)
    tree = ward(small.centers[0].numpy(force=True)[sizes > 0], sizes[sizes > 0])
    starts = torch.from_numpy(tree.means(min(wanted, len(tree.sizes)))).to(rows)
    return np.unique(lloyd(rows, starts[None]).labels[0].numpy(force=True), return_inverse=True)[1]


def _leaves(rows: np.ndarray, table: np.ndarray, labels: np.ndarray, parts: list[np.ndarray]
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the cluster of each leaf, the nearest leaf of each image in its cluster, and the leaves' means."""
    parents = np.repeat(np.arange(len(parts)), [int(part.max(initial=0)) + 1 for part in parts])
    first = np.searchsorted(parents, np.arange(len(parts)))
    leaves = np.empty(len(rows), np.int64)
    centers = np.zeros((len(parents), rows.shape[1]))
    for c, part in enumerate(parts):
        own = np.flatnonzero(labels == c)
        if not len(own):  # nobody's most probable cluster: where those lie to whom it is probable at all
            weights = table[:, c].astype(np.float64)
            centers[first[c]] = weights @ rows / max(weights.sum(), np.finfo(float).tiny)
            continue
        for leaf in range(int(part.max()) + 1):
            centers[first[c] + leaf] = rows[own[part == leaf]].mean(axis=0, dtype=np.float64)
        leaves[own] = first[c] + _nearest(rows, own, centers[parents == c])
    return parents, leaves, centers


def _nearest(rows: np.ndarray, own: np.ndarray, centers: np.ndarray) -> np.ndarray:
    step = max(1, _BLOCK // rows.shape[1])
    halves = np.square(centers).sum(axis=1) / 2
    return np.concatenate([(rows[own[start : start + step]] @ centers.T - halves).argmax(axis=1)
                           for start in range(0, len(own), step)])


def _temperature(rows: np.ndarray, leaves: np.ndarray, parents: np.ndarray, centers: np.ndarray) -> float:
    """Return the temperature at which an image's nearest leaf has 0.98 of its cluster's probability, on average."""
    widest = int(np.bincount(parents).max())
    if widest < 2:
        return 1.0
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), 5000)).astype(np.int64)
    gaps = np.full((len(chosen), widest), -np.inf)
    for at, row in enumerate(chosen.tolist()):
        own = np.flatnonzero(parents == parents[leaves[row]])
        gaps[at, : len(own)] = -np.square(rows[row] - centers[own]).sum(axis=1) / 2
    split = np.isfinite(gaps[:, 1])
    if not split.any():
        return 1.0
    gaps = gaps[split] - gaps[split].max(axis=1, keepdims=True)
    scale = float(-gaps[np.isfinite(gaps)].mean()) or 1.0
    return scale * matching_temperature(np.maximum(gaps / scale, -1e4), _SURE)


# ---- merges --------------------------------------------------------------------------------------------------------


def _merges(centers: np.ndarray, sizes: np.ndarray, parents: np.ndarray, table: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
    """Return all merges, those inside clusters first, each part by rising cost."""
    weights = np.maximum(sizes, np.finfo(float).eps).astype(np.float64)
    n_clusters = int(parents[-1]) + 1
    inside, costs = [np.empty((0, 2), np.int64)], [np.empty(0)]
    for c in range(n_clusters):
        own = np.flatnonzero(parents == c)
        tree: WardTree = ward(centers[own], weights[own])
        inside.append(own[tree.merges])
        costs.append(tree.heights)
    order = np.argsort(np.concatenate(costs), kind="stable")
    first = np.searchsorted(parents, np.arange(n_clusters))
    totals = np.bincount(parents, weights)
    means = np.stack([np.bincount(parents, weights * column) for column in centers.T], axis=1) / totals[:, None]
    across, above = _mixed_up_first(means, totals, table)
    heights = np.concatenate([np.concatenate(costs)[order], above])
    return np.concatenate([np.concatenate(inside)[order], first[across]]), np.maximum.accumulate(heights)


def _mixed_up_first(means: np.ndarray, sizes: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return merges of clusters by Ward's cost times one less the correlation of their probabilities, if positive."""
    means, weights, n = means.copy(), sizes.astype(np.float64).copy(), len(sizes)
    about = table.mean(axis=0, dtype=np.float64)
    shared = table.T.astype(np.float64) @ table / len(table) - np.outer(about, about)  # the covariance; merging adds
    costs = np.stack([_cost(means, weights, shared, at) for at in range(n)])
    merges, heights = np.empty((n - 1, 2), np.int64), np.empty(n - 1)
    for step in range(n - 1):
        one, other = sorted(divmod(int(costs.argmin()), n))
        merges[step], heights[step] = (one, other), costs[one, other]
        total = weights[one] + weights[other]
        means[one] = (weights[one] * means[one] + weights[other] * means[other]) / total
        weights[one], weights[other] = total, 0
        shared[one] += shared[other]
        shared[:, one] += shared[:, other]
        costs[other] = costs[:, other] = np.inf
        costs[one] = costs[:, one] = _cost(means, weights, shared, one)
    return merges, heights


def _cost(means: np.ndarray, weights: np.ndarray, shared: np.ndarray, at: int) -> np.ndarray:
    """Return what merging one cluster with each costs; infinite with itself and those that are gone (weight 0)."""
    tiny = np.finfo(float).tiny
    apart = np.square(means - means[at]).sum(axis=1) * weights * weights[at] / (weights + weights[at])
    together = shared[at] / np.sqrt(np.maximum(shared[at, at] * np.diag(shared), tiny))
    apart *= 1 - np.clip(together, 0, 1)
    apart[weights == 0] = np.inf
    apart[at] = np.inf
    return apart
