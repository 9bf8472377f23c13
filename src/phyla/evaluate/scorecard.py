"""The table of a run: k-means on pixels, k-means on embeddings, and each result of the run, side by side.

With true labels each row has the field's metrics; without them, what can be known all the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from phyla.cluster.kmeans import KMeans
from phyla.errors import InputError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.evaluate.metrics import ari, nmi, score_assignment, score_without_labels
from phyla.evaluate.probes import knn_accuracy, linear_accuracy, neighbor_purity
from phyla.progress import track
from phyla.quality import neighbor_score
from phyla.types import Assignment, Embeddings, ImageSet, Neighbors, Scores

log = logging.getLogger("phyla")


@dataclass(frozen=True)
class Split:
    """One split of a run: what is scored, and the true labels where there are any (int64, -1 for unknown).

    ``rivals`` are, by method and kind, the labels (n, n_images) of those among which it has chosen (heads, epochs) or
    that it has added up (networks).
    """

    name: str
    images: ImageSet
    embeddings: Embeddings
    neighbors: Neighbors
    assignments: Mapping[str, Assignment]
    true: np.ndarray | None
    rivals: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bank:
    """What an encoder's memory holds of the images it learned from.

    Parameters
    ----------
    embeddings : the memory as it is
    true : int64, -1 for unknown
    recomputed : of each split by name, what the encoder gives now in the place of the memory
    """

    embeddings: Embeddings
    true: np.ndarray
    recomputed: Mapping[str, Embeddings]


def fill_scorecard(splits: Sequence[Split], *, n_clusters: int, kmeans_restarts: int, kmeans_max_images: int,
                   knn_neighbors: int, random_state: int, calibration_bins: int = 15,
                   kmeans_on: Sequence[str] = ("pixels", "embeddings"), memory: Bank | None = None) -> list[Scores]:
    """Return one row a method and split; k-means is fitted on the first split and predicts the others.

    Parameters
    ----------
    n_clusters : of k-means
    calibration_bins : of the expected calibration error
    kmeans_on : what k-means, the baseline, is fitted on
    memory : the memory bank of the encoder, for kNN probes of its own beside that on the embeddings
    kmeans_restarts : tries of k-means, of which its own objective chooses
    kmeans_max_images : k-means is fitted on at most this many images, spread evenly; on fewer if they are large
    knn_neighbors : of the kNN probe of the embeddings, where labels exist
    """
    baselines: dict[str, list[Assignment]] = {}
    for on in track(kmeans_on, "baselines", unit="method"):
        method, space = f"k-means on {on}", _SPACES[on]
        kmeans = KMeans(n_clusters=n_clusters, n_init=kmeans_restarts, random_state=random_state,
                        normalize=space is _embeddings)
        first = splits[0]
        kmeans.fit(space(first, _spread(first, space, at_most=kmeans_max_images, at_least=n_clusters)))
        baselines[method] = [_predicted(kmeans, space, split) for split in splits]
    table = []
    for position, split in enumerate(splits):
        named = {method: found[position] for method, found in baselines.items()} | dict(split.assignments)
        for method, assignment in named.items():
            table.append(_row(method, assignment, split, n_bins=calibration_bins))
            table += _oracle(method, split)
        if split.true is not None and splits[0].true is not None:
            probes = _probes(splits[0], splits[0].true, split, split.true, knn_neighbors)
            if memory is not None:
                probes |= _memory_probes(memory, splits[0], split, knn_neighbors)
            table.append(Scores("embeddings (probes)", split.name, len(split.images), probes))
    return table


def _pixels(split: Split, rows: np.ndarray) -> np.ndarray:
    return split.images.array[rows].reshape(len(rows), -1).astype(np.float32) / 255


def _embeddings(split: Split, rows: np.ndarray) -> np.ndarray:
    return split.embeddings.values[rows]


_Space = Callable[[Split, np.ndarray], np.ndarray]
_SPACES: Mapping[str, _Space] = {"pixels": _pixels, "embeddings": _embeddings}
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


def _row(method: str, assignment: Assignment, split: Split, *, n_bins: int) -> Scores:
    values = score_without_labels(assignment, split.neighbors)
    near = split.neighbors.indices[:, :_SCORE_NEIGHBORS]
    values["neighbor_score"] = neighbor_score(assignment.probabilities, near)  # as methods choose by it
    if split.true is not None and (split.true >= 0).any():
        values |= score_assignment(assignment, split.true, method=method, split=split.name, n_bins=n_bins).values
        rivals = split.rivals.get(method, {})
        if "heads" in rivals:
            found = np.array([hungarian_accuracy(split.true, labels) for labels in rivals["heads"]])
            told = {"mean": found.mean(), "sd": found.std(), "best": found.max()}  # the last needs labels to see
            values |= {f"heads_{name}_hungarian_accuracy": float(value) for name, value in told.items()}
        for number, labels in enumerate(rivals.get("networks", ()), 1):
            values[f"network_{number}_hungarian_accuracy"] = hungarian_accuracy(split.true, labels)
    return Scores(method, split.name, len(assignment), values)


ORACLE = "{} (oracle: best epoch by labels)"


def _oracle(method: str, split: Split) -> list[Scores]:
    """Return the row of the epoch that true labels would choose, as NNM's authors do: never the result of a run."""
    epochs, true = split.rivals.get(method, {}).get("epochs"), split.true
    if epochs is None or true is None or not (true >= 0).any():
        return []
    accuracies = [hungarian_accuracy(true, labels) for labels in epochs]
    some, best = true >= 0, epochs[int(np.argmax(accuracies))]
    values = {"hungarian_accuracy": max(accuracies), "nmi": nmi(true[some], best[some]),
              "ari": ari(true[some], best[some])}
    return [Scores(ORACLE.format(method), split.name, int(some.sum()), values)]


_SCORE_NEIGHBORS = 5
_PROBED = 20_000  # images of the bank that the linear probe learns from
_PROBED_CLASSES = 200  # above these its fit would take longer than the run


def _probes(bank: Split, bank_true: np.ndarray, split: Split, true: np.ndarray, n_neighbors: int) -> dict[str, float]:
    queries, queries_true = (None, None) if bank is split else (split.embeddings, true)
    if (n_voters := int((bank_true >= 0).sum()) - (bank is split)) < n_neighbors:
        log.warning("kNN probe: only %d images can vote, not %d", n_voters, n_neighbors)
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
    return _asked(probes)


def _memory_probes(memory: Bank, first: Split, split: Split, n_neighbors: int) -> dict[str, float]:
    """Return the kNN accuracy of a split against the memory as it is, and against the first split computed anew.

    Images that are in the bank themselves leave themselves out; where only some of them are, there is no number.
    """
    queries = memory.recomputed[split.name]
    banks = {"memory": (memory.embeddings, memory.true), "recomputed": (memory.recomputed[first.name], first.true)}
    probes: dict[str, Callable[[], float]] = {}
    for name, (bank, true) in banks.items():
        if true is None or split.true is None:
            continue
        if list(bank.ids) == list(queries.ids):
            probes[name] = partial(knn_accuracy, bank, true, n_neighbors=n_neighbors)
        elif set(bank.ids).isdisjoint(queries.ids):
            probes[name] = partial(knn_accuracy, bank, true, queries=queries, queries_true=split.true,
                                   n_neighbors=n_neighbors)
    return _asked({f"knn_accuracy_{n_neighbors}_{name}": probe for name, probe in probes.items()})


def _asked(probes: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    values = {}
    for name, probe in probes.items():
        try:
            values[name] = probe()
        except InputError as error:  # a probe that these few labels do not allow is no reason to lose the others
            log.warning("no %s: %s", name, error.message)
    return values
