"""Choose the images that stand for each cluster, and sum up what each cluster amounts to.

Probabilities, embeddings and neighbors in; rows of images and a few numbers a cluster out. A cluster is shown by its
own images only, and by none of them twice.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from phyla.errors import InputError
from phyla.types import Assignment, Neighbors

PROTOTYPE_MEMBERS = 10
"""Most confident members whose mean embedding a prototype is nearest to (van Gansbeke et al. 2020, released code)."""

_BLOCK = 1 << 16  # rows of probabilities looked at together


@dataclass(frozen=True)
class ClusterSummary:
    """What is shown of one cluster; rows are image indices, each in one place only.

    Parameters
    ----------
    index, name : the column of the assignment, and what people call it
    size, share : images, and their part of all images (0 to 1)
    mean_confidence : mean over the members; None for an empty cluster
    neighbor_agreement : share of the members' neighbors that are in the same cluster; None without neighbors
    prototype : the most typical member; None for an empty cluster
    surest, sampled, doubtful : members by falling confidence, at random, and by rising confidence
    """

    index: int
    name: str
    size: int
    share: float
    mean_confidence: float | None
    neighbor_agreement: float | None
    prototype: int | None
    surest: tuple[int, ...]
    sampled: tuple[int, ...]
    doubtful: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """All images shown of this cluster."""
        first = () if self.prototype is None else (self.prototype,)
        return (*first, *self.surest, *self.sampled, *self.doubtful)


def name_clusters(n_clusters: int, names: Sequence[str] | None = None) -> list[str]:
    """Return ``names``, or "Cluster 0", "Cluster 1" and so on; a name used twice gets its number too.

    Raises
    ------
    InputError
        ``names`` does not hold one name a cluster.
    """
    if names is None:
        return [f"Cluster {index}" for index in range(n_clusters)]
    if len(names) != n_clusters:
        raise InputError(f"{n_clusters} clusters need {n_clusters} names, got {len(names)}")
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({index})" if name in twice else str(name) for index, name in enumerate(names)]


def ranked_members(assignment: Assignment) -> Iterator[np.ndarray]:
    """Yield the members of each cluster, int64 rows, most confident first; equal confidence in the order given."""
    order = np.lexsort((-assignment.confidence, assignment.labels))
    yield from np.split(order, np.cumsum(assignment.sizes)[:-1])


def find_prototypes(assignment: Assignment, embeddings: np.ndarray) -> np.ndarray:
    """Return the prototype of each cluster, int64 (n_clusters,), -1 for an empty one.

    Of the ten most confident members, or of all members of a smaller cluster, it is the one whose embedding is nearest
    (Euclidean) to their mean.
    """
    chosen = np.full(assignment.n_clusters, -1, dtype=np.int64)
    for cluster, members in enumerate(ranked_members(assignment)):
        if len(members):
            best = members[:PROTOTYPE_MEMBERS]
            values = np.asarray(embeddings[best], dtype=np.float64)
            chosen[cluster] = best[((values - values.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return chosen


def cluster_agreement(assignment: Assignment, neighbors: Neighbors) -> np.ndarray:
    """Return the share of each cluster's neighbors that lie in it, float64 (n_clusters,), NaN for an empty one."""
    labels = assignment.labels
    same = np.zeros(assignment.n_clusters)
    for start in range(0, len(labels), _BLOCK):
        own = labels[start : start + _BLOCK]
        same += np.bincount(own, (labels[neighbors.indices[start : start + _BLOCK]] == own[:, None]).mean(axis=1),
                            minlength=assignment.n_clusters)
    return np.divide(same, assignment.sizes, out=np.full(len(same), np.nan), where=assignment.sizes > 0)


def summarize_clusters(assignment: Assignment, embeddings: np.ndarray, neighbors: Neighbors | None = None, *,
                       names: Sequence[str], n_shown: int, seed: int = 0) -> list[ClusterSummary]:
    """Return one summary a cluster, empty ones included, in the order of the assignment.

    ``n_shown`` images at most are chosen for each of surest, sampled and doubtful. The surest and the most doubtful
    come first: a small cluster has few or none left to draw at random.
    """
    prototypes = find_prototypes(assignment, embeddings)
    agreement = None if neighbors is None or not neighbors.n_neighbors else cluster_agreement(assignment, neighbors)
    draw = np.random.default_rng(seed)
    summaries = []
    for index, members in enumerate(ranked_members(assignment)):
        surest, sampled, doubtful = _split(members[members != prototypes[index]], n_shown, draw)
        empty = len(members) == 0
        summaries.append(ClusterSummary(
            index, names[index], len(members), len(members) / max(1, len(assignment)),
            None if empty else float(assignment.confidence[members].mean(dtype=np.float64)),
            None if empty or agreement is None else float(agreement[index]),
            None if empty else int(prototypes[index]), surest, sampled, doubtful))
    return summaries


def _split(members: np.ndarray, n_shown: int,
           draw: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    n_surest = min(n_shown, (len(members) + 1) // 2)
    n_doubtful = min(n_shown, len(members) - n_surest)
    middle = members[n_surest : len(members) - n_doubtful]
    sampled = np.sort(draw.choice(len(middle), min(n_shown, len(middle)), replace=False))
    return (tuple(members[:n_surest].tolist()), tuple(middle[sampled].tolist()),
            tuple(members[len(members) - n_doubtful :][::-1].tolist()))


def margins(assignment: Assignment) -> np.ndarray:
    """Return how far the first choice of each image is ahead of the second, float32 (n_images,), 0 to 1."""
    if assignment.n_clusters == 1:
        return np.ones(len(assignment), dtype=np.float32)
    ahead = np.empty(len(assignment), dtype=np.float32)
    for start in range(0, len(assignment), _BLOCK):
        best = np.partition(assignment.probabilities[start : start + _BLOCK], (-2, -1), axis=1)
        ahead[start : start + _BLOCK] = best[:, -1] - best[:, -2]
    return ahead


def review_first(assignment: Assignment, n: int, *, below: float = 0.9) -> list[int]:
    """Return up to ``n`` rows whose first choice is least ahead of the second, and less than ``below`` ahead."""
    ahead = margins(assignment)
    order = np.argsort(ahead, kind="stable")[:n]
    return [int(row) for row in order if ahead[row] < below]


def second_choice(assignment: Assignment, row: int) -> tuple[int, float] | None:
    """Return the second most probable cluster of an image and its probability; None with a single cluster."""
    if assignment.n_clusters == 1:
        return None
    values = assignment.probabilities[row].copy()
    values[assignment.labels[row]] = -np.inf
    return int(values.argmax()), float(values.max())


@dataclass(frozen=True)
class Examples:
    """Images to be looked at closely, as rows, none of them twice.

    Parameters
    ----------
    typical : prototypes, in the order of their clusters
    hardest : images whose first choice is least ahead of the second, the least first
    """

    typical: tuple[int, ...]
    hardest: tuple[int, ...]


def choose_examples(assignment: Assignment, prototypes: Sequence[int], doubtful: Sequence[int], *, n_typical: int = 6,
                    n_hardest: int = 4) -> Examples:
    """Return a few images that show both how the clustering looks where it is easy and where it is hard.

    No label is asked and nothing is drawn by lot: the same clustering gives the same examples.

    Parameters
    ----------
    prototypes : one row a cluster, -1 for an empty one. Of more than ``n_typical``, those of clusters evenly spaced by
        size are taken, the largest and the smallest among them
    doubtful : rows as ``review_first`` orders them, ``n_typical`` + ``n_hardest`` of them if there are as many
    """
    filled = sorted((c for c, row in enumerate(prototypes) if row >= 0), key=lambda c: -int(assignment.sizes[c]))
    spaced = np.linspace(0, len(filled) - 1, min(n_typical, len(filled))).round().astype(int).tolist()
    typical = tuple(int(prototypes[c]) for c in sorted(filled[i] for i in spaced))
    return Examples(typical, tuple(int(row) for row in doubtful if row not in typical)[:n_hardest])
