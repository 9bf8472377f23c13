"""Matching clusters with classes: by hand, against every permutation, and with unequal numbers of both."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from phyla.errors import InputError
from phyla.evaluate.matching import count_classes, hungarian_accuracy, many_to_one_accuracy, match_clusters

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz", allow_pickle=False)


def labels(*values: int) -> np.ndarray:
    return np.array(values)


def test_published_value():
    found = hungarian_accuracy(GOLDEN["metrics_true"], GOLDEN["metrics_pred"])
    assert found == pytest.approx(float(GOLDEN["metrics_hungarian_accuracy"]), rel=1e-9)


def test_renamed_clusters_are_perfect():
    true = np.arange(60) % 6
    assert hungarian_accuracy(true, labels(3, 5, 0, 1, 4, 2)[true]) == 1
    assert many_to_one_accuracy(true, labels(3, 5, 0, 1, 4, 2)[true]) == 1


def test_matching_is_not_greedy():
    # Greedy takes the 5 first and is left with 0 + 4; the best pairs are 4 + 4.
    true = labels(*[0] * 9, *[1] * 4)
    predicted = labels(*[0] * 5, *[1] * 4, *[0] * 4)
    matching = match_clusters(true, predicted)
    assert matching.contingency.tolist() == [[5, 4], [4, 0]]
    assert matching.mapping.tolist() == [1, 0]
    assert hungarian_accuracy(true, predicted) == 8 / 13
    assert many_to_one_accuracy(true, predicted) == 9 / 13


def test_twenty_pure_clusters_on_ten_classes():
    """One to one, ten clusters of half a class each stay without one: exactly half is right."""
    true = np.repeat(np.arange(10), 20)
    predicted = true * 2 + np.arange(200) % 2
    assert hungarian_accuracy(true, predicted) == 0.5
    assert many_to_one_accuracy(true, predicted) == 1
    mapping = match_clusters(true, predicted).mapping
    assert np.count_nonzero(mapping == -1) == 10
    assert sorted(mapping[mapping >= 0]) == list(range(10))


def test_unmatched_clusters_are_never_class_zero():
    # Cluster 2 holds images of class 0 only, but class 0 has its cluster: they are errors.
    true, predicted = labels(0, 0, 0, 1, 1, 0, 0), labels(0, 0, 0, 1, 1, 2, 2)
    assert match_clusters(true, predicted).mapping.tolist() == [0, 1, -1]
    assert hungarian_accuracy(true, predicted) == 5 / 7


def test_fewer_clusters_than_classes():
    true = np.repeat(np.arange(4), 5)
    assert hungarian_accuracy(true, true // 2) == 0.5
    assert hungarian_accuracy(true, np.zeros(20, int)) == 0.25  # one cluster, or collapse
    assert many_to_one_accuracy(true, np.zeros(20, int)) == 0.25


def test_empty_clusters_and_classes_change_nothing():
    true, predicted = labels(1, 1, 3, 3), labels(7, 7, 2, 2)
    assert hungarian_accuracy(true, predicted) == 1
    matching = match_clusters(true, predicted, n_classes=5, n_clusters=9)
    assert matching.contingency.shape == (5, 9)
    assert matching.mapping[[7, 2]].tolist() == [1, 3]


def test_unknown_classes_are_left_out():
    true, predicted = labels(0, -1, 1, 1, -1), labels(1, 1, 0, 0, 3)
    assert hungarian_accuracy(true, predicted) == 1
    assert many_to_one_accuracy(true, predicted) == 1
    matching = match_clusters(true, predicted)
    assert matching.contingency.sum() == 3
    assert matching.mapping[:2].tolist() == [1, 0]
    assert len(matching.mapping) == 4  # one entry a cluster, that of unknown images too, so that it can be indexed


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40))
def test_no_permutation_is_better(seed, n_classes, n_clusters, n):
    draw = np.random.default_rng(seed)
    true, predicted = draw.integers(0, n_classes, n), draw.integers(0, n_clusters, n)
    one_to_one, many_to_one = hungarian_accuracy(true, predicted), many_to_one_accuracy(true, predicted)
    assert one_to_one == pytest.approx(naive.hungarian_accuracy(true, predicted), rel=1e-12)
    assert many_to_one == pytest.approx(naive.many_to_one_accuracy(true, predicted), rel=1e-12)
    assert one_to_one <= many_to_one
    renamed = draw.permutation(9)[predicted]
    assert (hungarian_accuracy(true, renamed), many_to_one_accuracy(true, renamed)) == (one_to_one, many_to_one)


def test_counting_a_million_images_of_a_thousand_classes_is_quick():
    draw = np.random.default_rng(0)
    true = draw.integers(0, 1000, 1_000_000)
    assert count_classes(true, true).trace() == 1_000_000


@pytest.mark.parametrize(("true", "predicted", "says"), [
    (labels(0, 1), labels(0), "2 true classes do not fit the clusters of 1 images"),
    (labels(0, -2), labels(0, 1), "got -2 among the classes"),
    (labels(0, 1), labels(0, -1), "-1 among the clusters"),
    (labels(-1, -1), labels(0, 1), "none of the 2 images has a known class"),
    (np.array([0.0, 1.0]), labels(0, 1), "true classes must be a row of whole numbers, got float64"),
    (labels(0, 1), np.eye(2, dtype=int), "clusters must be a row of whole numbers"),
    (labels(0, 10**9), labels(0, 1), "too large to match"),
    (np.array([], int), np.array([], int), "none of the 0 images"),
])
def test_what_cannot_be_matched(true, predicted, says):
    with pytest.raises(InputError, match=says):
        hungarian_accuracy(true, predicted)


def test_numbers_given_too_small():
    with pytest.raises(InputError, match="n_classes=2 is too small: 2 is among the classes"):
        match_clusters(labels(0, 2), labels(0, 1), n_classes=2)
    with pytest.raises(InputError, match="n_clusters=1 is too small"):
        match_clusters(labels(0, 2), labels(0, 1), n_clusters=1)
