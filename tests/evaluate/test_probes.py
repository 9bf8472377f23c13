"""Probes of embeddings: published votes, loops, leaving one out, splits, unknown classes."""

from pathlib import Path

import numpy as np
import pytest

import naive
from phyla.errors import InputError, PhylaWarning
from phyla.evaluate import probes
from phyla.evaluate.probes import knn_accuracy, linear_accuracy, neighbor_purity, weighted_knn
from phyla.neighbors import find_neighbors
from phyla.types import Embeddings, Neighbors

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz", allow_pickle=False)


def blobs(n: int = 90, spread: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return three tight groups around unit axes, and which is which."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return np.eye(5)[labels] + spread * draw.standard_normal((n, 5)), labels


# ── weighted kNN ──────────────────────────────────────────────────────────────────────────────────────────────────


def golden_vote() -> np.ndarray:
    return weighted_knn(GOLDEN["knn_bank"], GOLDEN["knn_bank_labels"], GOLDEN["knn_queries"],
                        n_neighbors=int(GOLDEN["knn_n_neighbors"]), temperature=float(GOLDEN["knn_temperature"]))


def test_published_predictions():
    assert golden_vote().tolist() == GOLDEN["knn_predictions"].tolist()


def test_the_loops_give_the_published_scores():
    for query, expected in zip(GOLDEN["knn_queries"], GOLDEN["knn_scores"], strict=True):
        scores = naive.knn_scores(GOLDEN["knn_bank"], GOLDEN["knn_bank_labels"], query,
                                  n_neighbors=int(GOLDEN["knn_n_neighbors"]),
                                  temperature=float(GOLDEN["knn_temperature"]))
        np.testing.assert_allclose([scores.get(c, 0.0) for c in range(len(expected))], expected, rtol=1e-9)


def test_votes_in_blocks(monkeypatch):
    expected = golden_vote()
    monkeypatch.setattr(probes, "_VOTES", 60)
    assert golden_vote().tolist() == expected.tolist()


def test_labels_of_any_value_and_a_tiny_temperature():
    rows, labels = blobs()
    names = np.array([-7, 255, 10**12])
    found = weighted_knn(rows, names[labels], rows[:9], n_neighbors=20, temperature=1e-4)
    assert found.tolist() == names[labels[:9]].tolist()


def test_near_votes_outweigh_many_far_ones():
    bank = np.array([[1, 0.0], [0.5, 0.9], [0.5, 0.9], [0.5, 0.9]])
    labels, query = np.array([1, 0, 0, 0]), np.array([[1.0, 0]])
    assert weighted_knn(bank, labels, query, n_neighbors=4, temperature=0.1).tolist() == [1]
    assert weighted_knn(bank, labels, query, n_neighbors=4, temperature=10.0).tolist() == [0]


def test_equal_scores_go_to_the_lowest_class():
    bank = np.array([[1.0, 0], [1.0, 0]])
    assert weighted_knn(bank, np.array([4, 2]), bank, n_neighbors=2, temperature=1.0).tolist() == [2, 2]


@pytest.mark.parametrize(("n_labels", "n_neighbors", "temperature", "says"), [
    (9, 3, 0.1, "a bank of 10 rows needs 10 labels, got 9"),
    (10, 11, 0.1, "n_neighbors=11 needs at least 11 images, got 10"),
    (10, 3, 0.0, "temperature must be above 0, got 0.0"),
    (10, 3, float("nan"), "temperature must be above 0"),
])
def test_votes_that_cannot_be(n_labels, n_neighbors, temperature, says):
    rows, labels = blobs(10)
    with pytest.raises(InputError, match=says):
        weighted_knn(rows, labels[:n_labels], rows, n_neighbors=n_neighbors, temperature=temperature)


def test_knn_accuracy_leaves_the_image_itself_out():
    """Two pairs of twins with different classes: every image's nearest other is of the other class."""
    rows, labels = np.array([[1, 0.0], [1, 0.001], [0, 1], [0.001, 1]]), np.array([0, 1, 0, 1])
    assert knn_accuracy(rows, labels, n_neighbors=1) == 0
    assert knn_accuracy(rows, labels, queries=rows, queries_true=labels, n_neighbors=1) == 1


def test_knn_accuracy_on_blobs_with_fewer_images_than_neighbors():
    rows, labels = blobs()
    assert knn_accuracy(rows, labels) == 1
    assert knn_accuracy(Embeddings(rows, [str(i) for i in range(90)]), labels, n_neighbors=5) == 1
    more, more_labels = blobs(30, seed=1)
    assert knn_accuracy(rows, labels, queries=more, queries_true=more_labels) == 1


def test_knn_accuracy_leaves_unknown_classes_out():
    rows, labels = blobs()
    labels[::4] = -1
    assert knn_accuracy(rows, labels) == 1
    with pytest.raises(InputError, match="none of the 90 images has a known class"):
        knn_accuracy(rows, np.full(90, -1))


def test_no_more_images_ask_than_allowed(monkeypatch):
    """So that the work grows as the bank and not as its square; those that ask have their neighbors among all."""
    rows, labels = blobs(300, spread=1.0)
    asked = []
    monkeypatch.setattr(probes, "_vote", lambda indices, *rest, was=probes._vote: (
        asked.append(len(indices)), was(indices, *rest))[1])
    whole = find_neighbors(rows, 5)
    some = np.linspace(0, 299, 40).astype(int)
    voted = probes._vote(whole.indices, whole.similarities, labels, 0.1) == labels
    assert knn_accuracy(rows, labels, n_neighbors=5, n_queries=40) == voted[some].mean()
    assert knn_accuracy(rows, labels, n_neighbors=5) == voted.mean()
    second = knn_accuracy(rows, labels, queries=rows[some], queries_true=labels[some], n_neighbors=5)
    assert knn_accuracy(rows, labels, queries=rows, queries_true=labels, n_neighbors=5, n_queries=40) == second
    assert asked == [300, 40, 300, 40, 40]


def test_half_a_second_split_is_refused():
    rows, labels = blobs()
    with pytest.raises(InputError, match="give both or neither"):
        knn_accuracy(rows, labels, queries=rows)
    with pytest.raises(InputError, match="give both or neither"):
        linear_accuracy(rows, labels, test_true=labels)


# ── linear probe ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_linear_accuracy_separates_blobs_and_not_noise():
    rows, labels = blobs()
    assert linear_accuracy(rows, labels) == 1
    assert linear_accuracy(rows * 1e-4 + 5, labels) == 1  # standardised: scale and offset do not matter
    shuffled = np.random.default_rng(0).permutation(labels)
    assert linear_accuracy(rows, shuffled) < 0.7


def test_linear_accuracy_uses_the_split_it_is_given():
    rows, labels = blobs()
    assert linear_accuracy(rows, labels, test_embeddings=rows[:30], test_true=(labels[:30] + 1) % 3) == 0


def test_linear_accuracy_repeats_by_seed():
    draw = np.random.default_rng(0)
    rows, labels = draw.standard_normal((200, 4)), draw.integers(0, 2, 200)
    assert linear_accuracy(rows, labels, random_state=3) == linear_accuracy(rows, labels, random_state=3)
    assert len({linear_accuracy(rows, labels, random_state=seed) for seed in range(5)}) > 1


def test_stopping_early_is_said():
    draw = np.random.default_rng(0)
    rows, labels = draw.standard_normal((60, 20)), draw.integers(0, 2, 60)
    with pytest.warns(PhylaWarning, match="stopped after 1 iterations"):
        linear_accuracy(rows, labels, n_iterations=1)


def test_one_class_cannot_be_probed():
    with pytest.raises(InputError, match="at least 2 classes and a test image, got 1 classes"):
        linear_accuracy(np.ones((9, 2)), np.zeros(9, int))


def test_held_out_part_has_a_fifth_of_every_class():
    labels = np.repeat([7, -3, 5, 0], [50, 10, 2, 1])
    held_out = probes._held_out(labels, 0)
    assert [int(held_out[labels == c].sum()) for c in (7, -3, 5, 0)] == [10, 2, 1, 0]
    assert not np.array_equal(held_out, probes._held_out(labels, 1))


# ── purity ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_purity_by_hand(monkeypatch):
    near = Neighbors(np.array([[1, 2], [0, 3], [3, 0], [0, 1]]), np.ones((4, 2), np.float32))
    labels = np.array([0, 0, 1, 1])
    assert neighbor_purity(near, labels) == 3 / 8 == naive.neighbor_purity(near.indices, labels)
    assert neighbor_purity(near, np.array([0, 0, 1, -1])) == 2 / 4
    monkeypatch.setattr(probes, "_VOTES", 2)
    assert neighbor_purity(near, labels) == 3 / 8


def test_purity_of_blobs():
    rows, labels = blobs()
    assert neighbor_purity(find_neighbors(rows, 5), labels) == 1


def test_purity_refuses():
    near = Neighbors(np.array([[1], [0]]), np.ones((2, 1), np.float32))
    with pytest.raises(InputError, match="neighbors of 2 images do not fit 3"):
        neighbor_purity(near, np.zeros(3, int))
    with pytest.raises(InputError, match="no image and neighbor both have a known class"):
        neighbor_purity(near, np.array([0, -1]))
