"""The field's metrics: published values, the definitions as loops, hand-worked tables, degenerate assignments."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from phyla.errors import InputError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.evaluate.metrics import (
    ami,
    ari,
    confusion_matrix,
    expected_calibration_error,
    nmi,
    per_class,
    score_assignment,
    score_without_labels,
    top_k_accuracy,
)
from phyla.types import Assignment, Neighbors

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(FOLDER / "metrics.npz", allow_pickle=False)
STL10 = json.loads((FOLDER / "stl10_confusion.json").read_text(encoding="utf-8"))["matrices"]


def assignment(probabilities: np.ndarray) -> Assignment:
    p = np.asarray(probabilities, np.float32)
    return Assignment(p, [str(i) for i in range(len(p))])


def sure(labels: np.ndarray, n_clusters: int) -> Assignment:
    return assignment(np.eye(n_clusters)[labels])


def unfold(counts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return classes and clusters with the counts of a table whose rows are clusters."""
    clusters, classes = np.divmod(np.repeat(np.arange(100), np.ravel(counts)), 10)
    return classes, clusters


# ── known values ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("metric", "name"), [(nmi, "nmi"), (ari, "ari"), (ami, "ami")])
def test_published_values(metric, name):
    found = metric(GOLDEN["metrics_true"], GOLDEN["metrics_pred"])
    assert found == pytest.approx(float(GOLDEN[f"metrics_{name}"]), rel=1e-9)


@pytest.mark.parametrize("name", ["scan", "scan_ruc"])
def test_published_confusion_matrices_give_their_scores(name):
    true, predicted = unfold(STL10[name]["counts"])
    assert len(true) == 13_000
    assert hungarian_accuracy(true, predicted) == pytest.approx(STL10[name]["hungarian_accuracy"], abs=5e-7)
    assert nmi(true, predicted) == pytest.approx(STL10[name]["nmi"], abs=5e-6)
    assert ari(true, predicted) == pytest.approx(STL10[name]["ari"], abs=5e-6)
    table = confusion_matrix(true, predicted)
    assert table.counts.T.tolist() == STL10[name]["counts"]  # the identity is the best matching
    recall = per_class(true, predicted).recall
    np.testing.assert_allclose(recall, np.diag(STL10[name]["counts"]) / 1300)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.integers(2, 30))
def test_metrics_are_their_definitions(seed, n_classes, n_clusters, n):
    draw = np.random.default_rng(seed)
    true, predicted = draw.integers(0, n_classes, n), draw.integers(0, n_clusters, n)
    assert ari(true, predicted) == pytest.approx(naive.ari(true, predicted), rel=1e-9, abs=1e-12)
    if len(set(true)) > 1 or len(set(predicted)) > 1:
        assert nmi(true, predicted) == pytest.approx(naive.nmi(true, predicted), rel=1e-9, abs=1e-9)
    if len(set(true)) > 1 and len(set(predicted)) > 1 and n > max(len(set(true)), len(set(predicted))):
        assert ami(true, predicted) == pytest.approx(naive.ami(true, predicted), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("metric", [nmi, ari, ami])
def test_perfect_renamed_constant_and_unknown(metric):
    true = np.arange(40) % 4
    assert metric(true, 3 - true) == pytest.approx(1)
    assert metric(true, np.zeros(40, int)) == pytest.approx(0, abs=1e-12)
    draw = np.random.default_rng(0)
    noisy = np.where(draw.random(40) < 0.3, draw.integers(0, 4, 40), true)
    assert metric(true, np.array([9, 2, 5, 0])[noisy]) == pytest.approx(metric(true, noisy))
    unknown = np.concatenate([true, [-1, -1]])
    assert metric(unknown, np.concatenate([noisy, [0, 1]])) == pytest.approx(metric(true, noisy))


@pytest.mark.parametrize("metric", [nmi, ari, ami])
def test_a_cluster_for_every_image_warns_of_nothing(metric):
    assert metric(np.arange(8), np.arange(8)) == pytest.approx(1)
    assert metric(np.arange(8) % 2, np.arange(8)) < 0.7


# ── top k ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_top_k_by_hand():
    p = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.5, 0.2, 0.3], [0.1, 0.2, 0.7]])
    true = np.array([0, 0, 1, 1, 2])  # the matching is the identity
    assert top_k_accuracy(true, p, n_top=1) == 0.8
    assert top_k_accuracy(true, p, n_top=2) == 0.8
    assert top_k_accuracy(true, p, n_top=3) == 1
    assert top_k_accuracy(true, p, n_top=99) == 1


def test_top_one_is_the_hungarian_accuracy_even_with_ties_and_many_clusters():
    draw = np.random.default_rng(1)
    for n_clusters in (2, 5, 9):
        p = draw.integers(0, 3, (200, n_clusters)) + 1.0
        true = draw.integers(-1, 5, 200)
        expected = hungarian_accuracy(true, p.argmax(axis=1))
        assert top_k_accuracy(true, p, n_top=1) == pytest.approx(expected)
        tops = [top_k_accuracy(true, p, n_top=k) for k in range(1, 10)]
        assert tops == sorted(tops)


def test_a_class_without_a_cluster_is_never_hit():
    true = np.array([0, 0, 1, 1, 2, 2])
    p = np.eye(2)[[0, 0, 1, 1, 1, 0]]
    assert top_k_accuracy(true, p, n_top=5) == pytest.approx(4 / 6)


def test_top_k_refuses_zero():
    with pytest.raises(InputError, match="n_top must be at least 1, got 0"):
        top_k_accuracy(np.array([0]), np.ones((1, 2)), n_top=0)


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_confusion_matrix_divides_by_the_size_of_the_class():
    """Uneven classes, 90 and 10: the share of a class in a cluster, not of a cluster in a class."""
    true = np.repeat([0, 1], [90, 10])
    predicted = np.concatenate([np.repeat([1, 0], [45, 45]), np.repeat([0, 1], [9, 1])])
    table = confusion_matrix(true, predicted)
    assert table.clusters.tolist() == [1, 0]
    assert table.counts.tolist() == [[45, 45], [1, 9]]
    np.testing.assert_allclose(table.shares, [[0.5, 0.5], [0.1, 0.9]])


def test_confusion_matrix_puts_unmatched_clusters_last():
    true, predicted = np.array([0, 0, 1, 1, 1]), np.array([3, 3, 1, 1, 0])
    table = confusion_matrix(true, predicted, n_classes=3, n_clusters=4)
    assert table.clusters.tolist()[:2] == [3, 1]
    assert table.counts[:, :2].tolist() == [[2, 0], [0, 2], [0, 0]]
    assert sorted(table.clusters) == [0, 1, 2, 3]
    assert table.shares[2].tolist() == [0, 0, 0, 0]
    fewer = confusion_matrix(np.array([0, 1, 2, 2]), np.array([0, 0, 1, 1]))
    assert fewer.counts.shape == (3, 2)
    assert sorted(fewer.clusters) == [0, 1]


def test_per_class_by_hand():
    true, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 0, 0])
    found = per_class(true, predicted, n_classes=4)
    assert found.size.tolist() == [3, 2, 1, 0]
    assert found.cluster.tolist() == [1, 0, -1, -1]
    np.testing.assert_allclose(found.recall, [2 / 3, 1, 0, np.nan])
    np.testing.assert_allclose(found.precision, [1, 0.5, np.nan, np.nan])


# ── calibration ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_calibration_by_hand():
    # (0, .5]: confidence .5 and .3, one right: |.5 - .4|·2; (.5, 1]: .9 and .7, none right: .8·2; all over 4.
    confidence, correct = np.array([0.5, 0.3, 0.9, 0.7]), np.array([True, False, False, False])
    assert expected_calibration_error(confidence, correct, n_bins=2) == pytest.approx((0.2 + 1.6) / 4)
    assert expected_calibration_error(np.ones(5), np.ones(5, bool)) == 0
    assert expected_calibration_error(np.ones(5), np.zeros(5, bool)) == 1
    assert expected_calibration_error(np.array([0.0]), np.array([False])) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 20))
def test_calibration_is_its_definition(pairs, n_bins):
    confidence, correct = (np.array(column) for column in zip(*pairs, strict=True))
    edges = np.linspace(0, 1, n_bins + 1)
    confidence = np.where(np.abs(confidence[:, None] - edges).min(axis=1) < 1e-12, 0.123456, confidence)
    expected = naive.expected_calibration_error(confidence, correct, n_bins=n_bins)
    assert expected_calibration_error(confidence, correct, n_bins=n_bins) == pytest.approx(expected, abs=1e-12)


def test_bins_are_closed_above():
    """0.2 is the top of the third of 15 bins, whatever 0.2 · 15 is in binary."""
    confidence, correct = np.array([0.2, 0.19]), np.array([True, False])
    assert expected_calibration_error(confidence, correct) == pytest.approx(abs(1 - 0.39) / 2)


@pytest.mark.parametrize(("confidence", "correct", "n_bins", "says"), [
    (np.array([0.5, 1.2]), np.array([True, True]), 15, "from 0 to 1, got 0.5 to 1.2"),
    (np.array([0.5, np.nan]), np.array([True, True]), 15, "from 0 to 1"),
    (np.array([0.5]), np.array([True, True]), 15, "one confidence and one truth an image"),
    (np.array([]), np.array([]), 15, "one confidence"),
    (np.array([0.5]), np.array([True]), 0, "n_bins=0"),
])
def test_calibration_refuses(confidence, correct, n_bins, says):
    with pytest.raises(InputError, match=says):
        expected_calibration_error(confidence, correct, n_bins=n_bins)


# ── all of them ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_of_a_perfect_assignment():
    true = np.arange(60) % 6
    scores = score_assignment(sure(5 - true, 6), true, method="SCAN", split="test")
    assert (scores.method, scores.split, scores.n_images) == ("SCAN", "test", 60)
    assert scores.values == pytest.approx({
        "hungarian_accuracy": 1, "many_to_one_accuracy": 1, "nmi": 1, "ari": 1, "ami": 1, "top5_accuracy": 1,
        "expected_calibration_error": 0, "confidence_gap": 0, "brier_score": 0, "area_under_risk_coverage": 0,
        "n_clusters": 6, "used_clusters": 6})


def test_scores_after_collapse():
    true = np.arange(60) % 6
    values = score_assignment(sure(np.full(60, 3), 6), true, method="m", split="train").values
    assert values["hungarian_accuracy"] == pytest.approx(1 / 6)
    assert values["nmi"] == pytest.approx(0, abs=1e-12)
    assert values["used_clusters"] == 1
    assert values["expected_calibration_error"] == values["confidence_gap"] == pytest.approx(5 / 6)
    assert values["brier_score"] == pytest.approx(2 * 5 / 6)
    assert values["area_under_risk_coverage"] == pytest.approx(5 / 6)


def test_scores_of_honesty_are_those_of_the_matched_clusters():
    true = np.array([0, 0, 1, 1, -1])
    p = np.array([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])  # cluster 1 is class 0
    values = score_assignment(assignment(p), true, method="m", split="s").values
    assert values["confidence_gap"] == pytest.approx((0.8 + 0.6 + 0.9 + 0.7) / 4 - 3 / 4)
    assert values["brier_score"] == pytest.approx(2 * (0.04 + 0.16 + 0.01 + 0.49) / 4)
    # surest first: .9 right, .8 right, .7 wrong, .6 right
    assert values["area_under_risk_coverage"] == pytest.approx((1 / 3 + 1 / 4) / 4)


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 12])
def test_scores_with_any_number_of_clusters(n_clusters):
    draw = np.random.default_rng(n_clusters)
    true = draw.integers(-1, 4, 50)
    scores = score_assignment(assignment(draw.dirichlet(np.ones(n_clusters), 50)), true, method="m", split="s")
    assert scores.n_images == np.count_nonzero(true >= 0)
    assert [name for name in scores.values if name.startswith("top")] == [f"top{min(5, n_clusters)}_accuracy"]
    assert all(np.isfinite(value) for value in scores.values.values())


def test_unknown_classes_do_not_touch_the_scores():
    draw = np.random.default_rng(0)
    p, true = draw.dirichlet(np.ones(7), 80), draw.integers(0, 5, 80)
    first = score_assignment(assignment(p), true, method="m", split="s").values
    more = assignment(np.concatenate([p, draw.dirichlet(np.ones(7), 20)]))
    second = score_assignment(more, np.concatenate([true, np.full(20, -1)]), method="m", split="s").values
    assert second == pytest.approx(first)


def test_scores_without_labels():
    p = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.3, 0.7, 0], [0.1, 0.9, 0]])
    near = Neighbors(np.array([[1], [0], [1], [2]]), np.ones((4, 1), np.float32))
    values = score_without_labels(assignment(p), near)
    assert values == pytest.approx({
        "n_clusters": 3, "used_clusters": 2, "effective_clusters": 2, "mean_confidence": 0.825,
        "neighbor_agreement": 0.75, "neighbor_score": naive.neighbor_score(p, near.indices)}, rel=1e-6)
    assert set(values) - set(score_without_labels(assignment(p))) == {"neighbor_agreement", "neighbor_score"}
