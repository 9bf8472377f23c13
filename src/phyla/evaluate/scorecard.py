"""The table of a run: k-means on pixels, k-means on embeddings, and each result of the run, side by side.

With true labels each row has the field's metrics; without them, what can be known all the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from phyla.cluster.kmeans import KMeans
from phyla.errors import InputError
from phyla.evaluate.metrics import score_assignment, score_without_labels
from phyla.evaluate.probes import knn_accuracy, linear_accuracy, neighbor_purity
from phyla.progress import track
from phyla.quality import neighbor_score
from phyla.types import Assignment, Embeddings, ImageSet, Neighbors, Scores

log = logging.getLogger("phyla")


@dataclass(frozen=True)
class Split:
    """One split of a run: what is scored, and the true labels where there are any (int64, -1 for unknown)."""

    name: str
    images: ImageSet
    embeddings: Embeddings
    neighbors: Neighbors
    assignments: Mapping[str, Assignment]
    true: np.ndarray | None


def fill_scorecard(splits: Sequence[Split], *, n_clusters: int, kmeans_restarts: int, kmeans_max_images: int,
                   knn_neighbors: int, random_state: int) -> list[Scores]:
    """Return one row a method and split; k-means is fitted on the first split and predicts the others.

    Parameters
    ----------
    n_clusters : of k-means
    kmeans_restarts : tries of k-means, of which its own objective chooses
    kmeans_max_images : k-means is fitted on at most this many images, spread evenly; on fewer if they are large
    knn_neighbors : of the kNN probe of the embeddings, where labels exist
    """
    baselines: dict[str, list[Assignment]] = {}
    for method, space in track(_SPACES.items(), "baselines", unit="method"):
        kmeans = KMeans(n_clusters=n_clusters, n_init=kmeans_restarts, random_state=random_state,
                        normalize=space is _embeddings)
        first = splits[0]
        kmeans.fit(space(first, _spread(first, space, at_most=kmeans_max_images, at_least=n_clusters)))
        baselines[method] = [_predicted(kmeans, space, split) for split in splits]
    table = []
    for position, split in enumerate(splits):
        named = {method: found[position] for method, found in baselines.items()} | dict(split.assignments)
        table += [_row(method, assignment, split) for method, assignment in named.items()]
        if split.true is not None and splits[0].true is not None:
            table.append(_probes(splits[0], splits[0].true, split, split.true, knn_neighbors))
    return table


def _pixels(split: Split, rows: np.ndarray) -> np.ndarray:
    return split.images.array[rows].reshape(len(rows), -1).astype(np.float32) / 255


def _embeddings(split: Split, rows: np.ndarray) -> np.ndarray:
    return split.embeddings.values[rows]


_Space = Callable[[Split, np.ndarray], np.ndarray]
_SPACES: Mapping[str, _Space] = {"k-means on pixels": _pixels, "k-means on embeddings": _embeddings}
_VALUES = 1 << 28  # numbers of one space held at once, a GiB: all pixels of many photographs fit in no memory


def _rows_at_once(split: Split, space: _Space) -> int:
    return max(1, _VALUES // space(split, np.arange(1)).shape[1])


def _spread(split: Split, space: _Space, *, at_most: int, at_least: int) -> np.ndarray:
    n_images = len(split.images)
    n_rows = min(n_images, max(at_least, min(at_most, _rows_at_once(split, space))))
    return np.unique(np.linspace(0, n_images - 1, n_rows).astype(int))


def _predicted(kmeans: KMeans, space: _Space, split: Split) -> Assignment:
    step = _rows_at_once(split, space)
    blocks = [np.arange(start, min(start + step, len(split.images))) for start in range(0, len(split.images), step)]
    return Assignment(np.concatenate([kmeans.predict_proba(space(split, rows)) for rows in blocks]), split.images.ids)


def _row(method: str, assignment: Assignment, split: Split) -> Scores:
    values = score_without_labels(assignment, split.neighbors)
    near = split.neighbors.indices[:, :_SCORE_NEIGHBORS]
    values["neighbor_score"] = neighbor_score(assignment.probabilities, near)  # as methods choose by it
    if split.true is not None and (split.true >= 0).any():
        values |= score_assignment(assignment, split.true, method=method, split=split.name).values
    return Scores(method, split.name, len(assignment), values)


_SCORE_NEIGHBORS = 5
_PROBED = 20_000  # images of the bank that the linear probe learns from
_PROBED_CLASSES = 200  # above these its fit would take longer than the run


def _probes(bank: Split, bank_true: np.ndarray, split: Split, true: np.ndarray, n_neighbors: int) -> Scores:
    queries, queries_true = (None, None) if bank is split else (split.embeddings, true)
    some = np.unique(np.linspace(0, len(bank_true) - 1, min(len(bank_true), _PROBED)).astype(int))
    probes: dict[str, Callable[[], float]] = {
        f"knn_accuracy_{n_neighbors}": partial(knn_accuracy, bank.embeddings, bank_true, queries=queries,
                                               queries_true=queries_true, n_neighbors=n_neighbors),
        "linear_accuracy": partial(linear_accuracy, bank.embeddings.values[some], bank_true[some],
                                   test_embeddings=queries, test_true=queries_true),
        "neighbor_purity": partial(neighbor_purity, split.neighbors, true),
    }
    if bank_true.max() >= _PROBED_CLASSES:
        del probes["linear_accuracy"]
    values = {}
    for name, probe in probes.items():
        try:
            values[name] = probe()
        except InputError as error:  # a probe that these few labels do not allow is no reason to lose the others
            log.warning("no %s: %s", name, error.message)
    return Scores("embeddings (probes)", split.name, len(split.images), values)
