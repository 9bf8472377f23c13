"""Ask what embeddings know of the true classes: by their neighbors, by kNN, by a linear classifier.

Probes judge an encoder, not an assignment: they learn from true classes. Embeddings are ``(n, d)``; classes are whole
numbers ``(n,)`` of any value, and where a probe says so -1 stands for an unknown class, whose images are left out.
"""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from phyla.errors import InputError, PhylaWarning
from phyla.evaluate.matching import whole_numbers
from phyla.neighbors import check_embeddings, find_for_some, find_in_bank
from phyla.types import Embeddings, Neighbors

N_QUERIES = 50_000
"""Images that ask in a kNN probe at most: every test set of the field is as large or smaller."""

_VOTES = 1 << 22  # class scores, or neighbors, held at once
_TEST_SHARE = 0.2  # of each class, where a probe splits the images itself


def weighted_knn(
    bank: Embeddings | np.ndarray,
    bank_labels: np.ndarray,
    queries: Embeddings | np.ndarray,
    *,
    n_neighbors: int,
    temperature: float,
) -> np.ndarray:
    """Return the class of each query by a weighted vote of its nearest bank rows, int64 (n_queries,).

    Parameters
    ----------
    bank : (n_bank, n_features), rows of any length: they are compared by cosine
    bank_labels : int (n_bank,), any values
    queries : (n_queries, n_features)
    n_neighbors : at most the size of the bank; 100 in SCAN, 200 in instance discrimination
    temperature : > 0, no unit; 0.1 in SCAN, 0.07 in instance discrimination

    Raises
    ------
    InputError
        ``n_neighbors`` is below 1 or above the size of the bank, ``temperature`` is not above 0, or shapes differ.

    Notes
    -----
    score_c = sum over the neighbors j of class c of exp(cos(query, j) / temperature) (Wu et al. 2018, section 3.4); of
    equal scores the lowest class wins.
    """
    labels = whole_numbers(bank_labels, "bank_labels")
    if len(labels) != len(bank):
        raise InputError(f"a bank of {len(bank)} rows needs {len(bank)} labels, got {len(labels)}")
    return _vote(*find_in_bank(bank, queries, n_neighbors=n_neighbors), labels, temperature)


def knn_accuracy(
    bank: Embeddings | np.ndarray,
    bank_true: np.ndarray,
    *,
    queries: Embeddings | np.ndarray | None = None,
    queries_true: np.ndarray | None = None,
    n_neighbors: int = 100,
    temperature: float = 0.1,
    n_queries: int = N_QUERIES,
) -> float:
    """Return the share of queries whose class a weighted vote of their neighbors in the bank names, 0 to 1.

    Parameters
    ----------
    bank, bank_true : embeddings and classes of one split, -1 where unknown
    queries, queries_true : of another split; None lets every image of the bank ask all the others (leave one out)
    n_neighbors : all there are if there are fewer
    temperature : as for ``weighted_knn``
    n_queries : that ask at most, spread evenly: the work then grows as the bank does, not as its square
    """
    rows, labels = _known(bank, bank_true)
    if queries is None or queries_true is None:
        _both_or_none(queries, queries_true)
        if len(rows) < 2:
            raise InputError(f"leaving one out needs at least 2 images of known class, got {len(rows)}")
        some = _spread(len(rows), n_queries)
        found = find_for_some(rows, some, n_neighbors=min(n_neighbors, len(rows) - 1))
        return float(np.mean(_vote(*found, labels, temperature) == labels[some]))
    asking, true = _known(queries, queries_true)
    some = _spread(len(asking), n_queries)
    predicted = weighted_knn(rows, labels, asking[some], n_neighbors=min(n_neighbors, len(rows)),
                             temperature=temperature)
    return float(np.mean(predicted == true[some]))


def linear_accuracy(
    embeddings: Embeddings | np.ndarray,
    true: np.ndarray,
    *,
    test_embeddings: Embeddings | np.ndarray | None = None,
    test_true: np.ndarray | None = None,
    regularization: float = 1.0,
    n_iterations: int = 500,
    random_state: int = 0,
) -> float:
    """Return the share of test images whose class logistic regression on the embeddings names, 0 to 1.

    Parameters
    ----------
    embeddings, true : of one split, -1 where the class is unknown; features are standardised by this split
    test_embeddings, test_true : of another split; None holds out a fifth of every class of the first one, at random
    regularization : weight of the squared weights' sum / 2, against the sum of the images' losses
    n_iterations : of L-BFGS, at most; stopping there is a warning
    random_state : seed of the held-out part

    Raises
    ------
    InputError
        Fewer than 2 classes to learn, or a held-out part without images.
    """
    rows, labels = _known(embeddings, true)
    if test_embeddings is None or test_true is None:
        _both_or_none(test_embeddings, test_true)
        held_out = _held_out(labels, random_state)
        test_rows, test_labels = rows[held_out], labels[held_out]
        rows, labels = rows[~held_out], labels[~held_out]
    else:
        test_rows, test_labels = _known(test_embeddings, test_true)
    if len(np.unique(labels)) < 2 or not len(test_labels):
        raise InputError(f"a linear probe needs at least 2 classes and a test image, got {len(np.unique(labels))} "
                         f"classes and {len(test_labels)} test images", "give more images of known class")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1 / regularization, max_iter=n_iterations))
    with warnings.catch_warnings():  # of not converging; said below in our own words
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        probe.fit(rows, labels)
    if probe[-1].n_iter_.max() >= n_iterations:
        warnings.warn(f"the linear probe was stopped after {n_iterations} iterations: its accuracy may be a little low",
                      PhylaWarning, stacklevel=2)
    return float(np.mean(probe.predict(test_rows) == test_labels))


def neighbor_purity(neighbors: Neighbors, true: np.ndarray) -> float:
    """Return the share of pairs of an image and one of its neighbors that are of the same class, 0 to 1.

    Parameters
    ----------
    neighbors : of the same images as ``true``
    true : int (n_images,), -1 where the class is not known: pairs with such an image are left out

    Raises
    ------
    InputError
        The lengths differ, or no pair has two known classes.
    """
    labels = whole_numbers(true, "true classes")
    if len(labels) != len(neighbors):
        raise InputError(f"neighbors of {len(neighbors)} images do not fit {len(labels)} true classes")
    step = max(1, _VOTES // max(1, neighbors.n_neighbors))
    same = pairs = 0
    for start in range(0, len(labels), step):
        own, others = labels[start : start + step, None], labels[neighbors.indices[start : start + step]]
        both = (own != -1) & (others != -1)
        pairs += int(np.count_nonzero(both))
        same += int(np.count_nonzero(both & (own == others)))
    if not pairs:
        raise InputError("no image and neighbor both have a known class", "score it without labels")
    return same / pairs


def _vote(indices: np.ndarray, similarities: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Return the class with the largest sum of exp(similarity / temperature) among each row's neighbors."""
    if not temperature > 0:
        raise InputError(f"temperature must be above 0, got {temperature}")
    classes, numbered = np.unique(labels, return_inverse=True)
    winner = np.empty(len(indices), np.int64)
    step = max(1, _VOTES // max(len(classes), indices.shape[1]))
    for start in range(0, len(winner), step):
        near = similarities[start : start + step].astype(np.float64)
        weights = np.exp((near - near[:, :1]) / temperature)  # the first is the nearest, so no weight is above 1
        place = np.arange(len(near))[:, None] * len(classes) + numbered[indices[start : start + step]]
        scores = np.bincount(place.ravel(), weights=weights.ravel(), minlength=len(near) * len(classes))
        winner[start : start + step] = scores.reshape(len(near), -1).argmax(axis=1)
    return classes[winner]


def _known(embeddings: Embeddings | np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings and classes of the images whose class is known."""
    rows, labels = check_embeddings(embeddings), whole_numbers(true, "true classes")
    if len(rows) != len(labels):
        raise InputError(f"embeddings of {len(rows)} images do not fit {len(labels)} true classes")
    if not (labels != -1).any():
        raise InputError(f"none of the {len(labels)} images has a known class", "score it without labels")
    return (rows, labels) if (labels != -1).all() else (rows[labels != -1], labels[labels != -1])


def _both_or_none(embeddings: object, true: object) -> None:
    if (embeddings is None) != (true is None):
        raise InputError("a second split needs embeddings and true classes, got one of them", "give both or neither")


def _spread(n: int, at_most: int) -> np.ndarray:
    return np.arange(n) if n <= at_most else np.linspace(0, n - 1, at_most).astype(np.int64)


def _held_out(labels: np.ndarray, random_state: int) -> np.ndarray:
    """Return which images to test on: a fifth of each class, at least one of every class that has two, never all."""
    shuffled = np.random.default_rng(random_state).permutation(len(labels))
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, sizes = np.unique(labels[shuffled], return_index=True, return_counts=True)
    wanted = np.clip(np.rint(_TEST_SHARE * sizes), 1, sizes - 1)
    place = np.arange(len(labels)) - np.repeat(first, sizes)
    held_out = np.zeros(len(labels), bool)
    held_out[shuffled] = place < np.repeat(wanted, sizes)
    return held_out
