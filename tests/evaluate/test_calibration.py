"""Honest confidence: four images by hand, the definitions as loops, perfect and useless confidence, odd inputs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phyla.errors import InputError
from phyla.evaluate import metrics
from phyla.evaluate.calibration import (
    Judged,
    Reliability,
    RiskCoverage,
    area_under_risk_coverage,
    brier_score,
    clusters_of_classes,
    confidence_gap,
    confidence_histogram,
    expected_calibration_error,
)
from phyla.types import Assignment

CONFIDENCE = np.array([0.5, 0.3, 0.9, 0.7])
CORRECT = np.array([True, False, True, False])
PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.55, 0.8, 1.0]), st.booleans()), min_size=1,
                 max_size=30)


def columns(pairs: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([c for c, _ in pairs]), np.array([r for _, r in pairs])


def assignment(probabilities: np.ndarray) -> Assignment:
    p = np.asarray(probabilities, np.float32)
    return Assignment(p, [str(i) for i in range(len(p))])


# ── reliability ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_reliability_by_hand():
    # (0, .5]: .5 right and .3 wrong; (.5, 1]: .9 right and .7 wrong.
    found = Reliability.of(CONFIDENCE, CORRECT, n_bins=2)
    assert found.counts.tolist() == [2, 2]
    np.testing.assert_allclose(found.mean_confidence, [0.4, 0.8])
    np.testing.assert_allclose(found.share_correct, [0.5, 0.5])
    np.testing.assert_allclose(found.gaps, [-0.1, 0.3])
    assert found.edges.tolist() == [0, 0.5, 1]
    assert found.error == pytest.approx((2 * 0.1 + 2 * 0.3) / 4)
    assert found.error == expected_calibration_error(CONFIDENCE, CORRECT, n_bins=2)
    assert confidence_gap(CONFIDENCE, CORRECT) == pytest.approx(0.6 - 0.5)


def test_table_of_reliability_says_none_of_an_empty_bin():
    rows = Reliability.of(np.array([0.9, 0.8]), np.array([True, False]), n_bins=4).table()
    assert rows[0] == {"from": 0, "to": 0.25, "images": 0, "mean confidence": None, "right": None, "gap": None}
    assert rows[3] == pytest.approx({"from": 0.75, "to": 1, "images": 2, "mean confidence": 0.85, "right": 0.5,
                                     "gap": 0.35})
    assert sum(row["images"] for row in rows) == 2


@settings(max_examples=50, deadline=None)
@given(PAIRS, st.integers(1, 20))
def test_every_image_is_in_one_bin_of_all_tables(pairs, n_bins):
    confidence, correct = columns(pairs)
    table = Reliability.of(confidence, correct, n_bins=n_bins)
    assert table.counts.sum() == len(pairs)
    assert table.counts.tolist() == confidence_histogram(confidence, n_bins=n_bins).tolist()
    filled = table.counts > 0
    assert (table.mean_confidence[filled] <= table.edges[1:][filled] + 1e-12).all()
    assert (table.mean_confidence[filled] >= table.edges[:-1][filled] - 1e-12).all()
    weights = table.counts[filled] / len(pairs)
    assert (weights * table.gaps[filled]).sum() == pytest.approx(confidence_gap(confidence, correct), abs=1e-12)
    assert table.error >= abs(confidence_gap(confidence, correct)) - 1e-12


def test_one_bin_is_the_size_of_the_gap():
    draw = np.random.default_rng(0)
    confidence, correct = draw.random(200), draw.random(200) < 0.3
    error, gap = expected_calibration_error(confidence, correct, n_bins=1), confidence_gap(confidence, correct)
    assert gap > 0
    assert error == pytest.approx(gap)


def test_perfect_and_useless_confidence():
    honest = np.repeat([0.2, 0.6, 0.9], 10)
    right = np.concatenate([np.arange(10) < 10 * share for share in (0.2, 0.6, 0.9)])
    assert expected_calibration_error(honest, right) == pytest.approx(0)
    assert confidence_gap(honest, right) == pytest.approx(0)
    sure = np.ones(30)
    assert expected_calibration_error(sure, np.zeros(30, bool)) == confidence_gap(sure, np.zeros(30, bool)) == 1
    assert confidence_gap(np.zeros(30), np.ones(30, bool)) == -1
    shy = np.full(30, 0.6)
    assert confidence_gap(shy, np.ones(30, bool)) == pytest.approx(-0.4)  # under-confident: below 0
    assert expected_calibration_error(shy, np.ones(30, bool)) == pytest.approx(0.4)


def test_metrics_has_the_same_function():
    assert metrics.expected_calibration_error is expected_calibration_error


# ── who is right ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_judged_by_hand_leaves_unknown_classes_out():
    p = np.array([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    found = Judged.of(assignment(p), np.array([0, 0, 1, 1, -1]))  # cluster 1 is class 0, cluster 0 class 1
    assert found.correct.tolist() == [True, True, True, False]
    np.testing.assert_allclose(found.confidence, [0.8, 0.6, 0.9, 0.7], rtol=1e-6)
    assert found.confidence.dtype == np.float64


def test_no_known_class_is_refused():
    with pytest.raises(InputError, match="known class"):
        Judged.of(assignment(np.ones((2, 1))), np.array([-1, -1]))


def test_cluster_of_each_class():
    assert clusters_of_classes(np.array([2, -1, 0]), 4).tolist() == [2, -1, 0, -1]


# ── Brier ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def naive_brier(true, p, cluster_of_class):
    rows = []
    for i, c in enumerate(true):
        if c < 0:
            continue
        wanted = cluster_of_class[c]
        row = math.fsum((float(p[i][k]) - (k == wanted)) ** 2 for k in range(len(p[i])))
        rows.append(row + (1 if wanted < 0 else 0))
    return math.fsum(rows) / len(rows)


def test_brier_by_hand():
    p = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.7, 0.3]])
    # two squares each: .2² twice, .4² twice, .1² twice, .7² twice
    assert brier_score(np.array([0, 0, 1, 1]), p) == pytest.approx(2 * (0.04 + 0.16 + 0.01 + 0.49) / 4)
    assert brier_score(np.array([1, 1, 0, 0]), p) == pytest.approx(2 * (0.04 + 0.16 + 0.01 + 0.49) / 4)


def test_brier_of_the_sure_and_of_the_clueless():
    true = np.arange(12) % 3
    assert brier_score(true, np.eye(3)[2 - true]) == 0
    assert brier_score(true, np.full((12, 3), 1 / 3)) == pytest.approx(1 - 1 / 3)
    wrong = np.where(np.arange(12) == 0, 1, true)  # one image sure of a wrong cluster costs 2
    assert brier_score(true, np.eye(3)[wrong]) == pytest.approx(2 / 12)


@pytest.mark.parametrize(("n_clusters", "block"), [(2, 1 << 22), (4, 1 << 22), (9, 30)])
def test_brier_is_its_definition_with_too_few_and_too_many_clusters(n_clusters, block, monkeypatch):
    monkeypatch.setattr("phyla.evaluate.calibration._BLOCK", block)
    draw = np.random.default_rng(n_clusters)
    p, true = draw.dirichlet(np.ones(n_clusters), 50).astype(np.float32), draw.integers(-1, 4, 50)
    mapping, _ = metrics.match_clusters(true, p.argmax(axis=1), n_clusters=n_clusters)
    cluster = {c: next((k for k in range(n_clusters) if mapping[k] == c), -1) for c in range(4)}
    assert min(cluster.values()) == (-1 if n_clusters == 2 else 0)
    assert brier_score(true, p) == pytest.approx(naive_brier(true, p, cluster), rel=1e-12)


# ── risk and coverage ─────────────────────────────────────────────────────────────────────────────────────────────


def naive_area(order):
    return math.fsum(sum(not right for right in order[: k + 1]) / (k + 1) for k in range(len(order))) / len(order)


def test_risk_coverage_by_hand():
    found = RiskCoverage.of(CONFIDENCE, CORRECT)  # .9 right, .7 wrong, .5 right, .3 wrong
    np.testing.assert_allclose(found.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.threshold, [0.9, 0.7, 0.5, 0.3])
    np.testing.assert_allclose(found.risk, [0, 1 / 2, 1 / 3, 1 / 2])
    assert found.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found.table([0.5, 0.6, 1]) == [
        pytest.approx({"accepted": 0.5, "least confidence": 0.7, "wrong": 0.5}),
        pytest.approx({"accepted": 0.75, "least confidence": 0.5, "wrong": 1 / 3}),
        pytest.approx({"accepted": 1, "least confidence": 0.3, "wrong": 0.5})]


def test_area_of_the_best_the_worst_and_no_order():
    right = np.array([True, True, True, False])
    best, worst = np.array([0.9, 0.8, 0.7, 0.1]), np.array([0.1, 0.2, 0.3, 0.9])
    assert area_under_risk_coverage(best, right) == pytest.approx(1 / 4 / 4)
    assert area_under_risk_coverage(worst, right) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert area_under_risk_coverage(np.full(4, 0.5), right) == pytest.approx(0.25)  # no order: the share wrong
    assert area_under_risk_coverage(best, np.ones(4, bool)) == 0
    assert area_under_risk_coverage(best, np.zeros(4, bool)) == 1


def test_area_moves_with_the_order_alone():
    draw = np.random.default_rng(0)
    confidence, correct = draw.random(100), draw.random(100) < 0.7
    area = area_under_risk_coverage(confidence, correct)
    assert area_under_risk_coverage(confidence**3, correct) == pytest.approx(area)
    assert area_under_risk_coverage(confidence[::-1], correct[::-1]) == pytest.approx(area)
    assert area_under_risk_coverage(1 - confidence, correct) != pytest.approx(area)


def test_area_is_the_loop_where_no_confidence_is_shared():
    draw = np.random.default_rng(1)
    confidence, correct = draw.permutation(60) / 60, draw.random(60) < 0.6
    order = [bool(correct[i]) for i in sorted(range(60), key=lambda i: -confidence[i])]
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(naive_area(order), rel=1e-12)


def test_area_with_equal_confidence_is_the_mean_over_all_orders():
    confidence, correct = np.array([0.9, 0.9, 0.9, 0.4, 0.4]), np.array([True, False, True, False, True])
    orders = [[*first, *second] for first in itertools.permutations([True, False, True])
              for second in itertools.permutations([False, True])]
    mean = math.fsum(map(naive_area, orders)) / len(orders)
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(mean, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(PAIRS)
def test_the_last_point_accepts_all(pairs):
    confidence, correct = columns(pairs)
    curve = RiskCoverage.of(confidence, correct)
    assert curve.coverage[-1] == 1
    assert curve.risk[-1] == pytest.approx(1 - correct.mean())
    assert len(curve.threshold) == len(set(confidence.tolist()))
    assert (np.diff(curve.threshold) < 0).all()
    assert 0 <= curve.area <= 1


def test_a_long_curve_is_thinned_for_drawing():
    draw = np.random.default_rng(0)
    curve = RiskCoverage.of(draw.random(5000), draw.random(5000) < 0.5)
    thin = curve.thinned(100)
    assert 90 <= len(thin.coverage) <= 100
    assert thin.coverage[[0, -1]].tolist() == curve.coverage[[0, -1]].tolist()
    assert np.diff(thin.coverage).max() < 0.02
    assert set(zip(thin.coverage, thin.risk, strict=True)) <= set(zip(curve.coverage, curve.risk, strict=True))
    assert curve.thinned(5000) is curve
    assert len(curve.table()) == 20


# ── odd inputs ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("function", [expected_calibration_error, confidence_gap, area_under_risk_coverage])
@pytest.mark.parametrize(("confidence", "correct", "says"), [
    (np.array([0.5, 1.2]), np.array([True, True]), "from 0 to 1, got 0.5 to 1.2"),
    (np.array([0.5, np.nan]), np.array([True, True]), "from 0 to 1"),
    (np.array([0.5]), np.array([True, True]), "one confidence and one truth an image"),
    (np.array([]), np.array([]), "one confidence"),
])
def test_refused(function, confidence, correct, says):
    with pytest.raises(InputError, match=says):
        function(confidence, correct)


def test_no_bin_is_refused():
    with pytest.raises(InputError, match="n_bins=0"):
        confidence_histogram(np.array([0.5]), n_bins=0)


def test_float32_a_little_above_one_is_allowed():
    confidence = np.array([1.0000001], np.float32)
    assert expected_calibration_error(confidence, np.array([True])) == pytest.approx(0, abs=1e-6)
