import numpy as np
import pytest

from phyla.report import findings
from phyla.types import Assignment, Neighbors, Scores

NAMES = [f"Cluster {i}" for i in range(20)]


def sized(*sizes, confidence=0.9):
    """An assignment with clusters of these sizes and one confidence."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rest = (1 - confidence) / max(1, len(sizes) - 1)
    p = np.full((len(labels), len(sizes)), rest, np.float32)
    p[np.arange(len(labels)), labels] = confidence
    return Assignment(p, [str(i) for i in range(len(labels))])


def around(labels, offsets, similarity=0.5):
    """Neighbors at fixed offsets along the rows."""
    rows = np.arange(len(labels))[:, None] + np.array(offsets)
    return Neighbors(rows % len(labels), np.full(rows.shape, similarity, np.float32))


@pytest.mark.parametrize(("sizes", "severity"), [((30, 30), "passed"), ((100, 1, 1, 1, 1, 1, 1, 1, 1, 1), "critical"),
                                                 ((40, 40, 1, 1, 1, 1), "warning"), ((30,), "not_applicable")])
def test_collapse(sizes, severity):
    found = findings.check_collapse(sized(*sizes, confidence=1.0))
    assert (found.code, found.severity) == ("collapse", severity)


@pytest.mark.parametrize(("sizes", "severity"), [((3, 3), "passed"), ((3, 0, 3), "warning"), ((3, 0, 0), "critical")])
def test_empty_clusters(sizes, severity):
    found = findings.check_empty(sized(*sizes), NAMES)
    assert found.severity == severity
    assert ("Cluster 1" in found.message) == (severity != "passed")


@pytest.mark.parametrize(("sizes", "severity"), [((10, 11), "passed"), ((10, 30), "note"), ((5, 0, 50), "warning"),
                                                 ((5, 0), "not_applicable")])
def test_balance_looks_at_clusters_with_images(sizes, severity):
    assert findings.check_balance(sized(*sizes), NAMES).severity == severity


@pytest.mark.parametrize(("sizes", "severity"), [((20, 20), "passed"), ((8, 8), "note"), ((2, 2), "warning")])
def test_images_a_cluster(sizes, severity):
    assert findings.check_size(sized(*sizes)).severity == severity


def test_doubt_is_measured_against_chance():
    assert findings.check_doubt(sized(50, 50, confidence=0.9)).severity == "passed"
    assert findings.check_doubt(sized(50, 50, confidence=0.74)).severity == "critical"  # 0.5 is chance for two
    assert findings.check_doubt(sized(*[10] * 10, confidence=0.74)).severity == "passed"
    assert findings.check_doubt(sized(50, 50, confidence=1.0)).severity == "not_applicable"
    assert findings.check_doubt(sized(50, confidence=1.0)).severity == "not_applicable"


@pytest.mark.parametrize(("n_unsure", "severity"), [(4, "passed"), (5, "note"), (20, "warning"), (50, "critical")])
def test_doubt_grows_with_the_share(n_unsure, severity):
    p = np.tile(np.float32([0.9, 0.1]), (100, 1))
    p[:n_unsure] = [0.6, 0.4]
    found = findings.check_doubt(Assignment(p, [str(i) for i in range(100)]))
    assert found.severity == severity
    assert f"{n_unsure} of 100" in found.message


def test_doubtful_clusters_are_named_worst_first():
    labels = np.array([0, 0, 0, 0, 1, 2])
    p = np.eye(3, dtype=np.float32)[labels]
    assignment = Assignment(p, list("abcdef"))
    near = Neighbors(np.array([[1], [0], [3], [2], [5], [0]]), np.full((6, 1), 0.5, np.float32))
    found = findings.check_agreement(assignment, near, NAMES)
    assert found.severity == "warning"
    assert "Cluster 1 (0" in found.message
    assert "Cluster 0" not in found.message
    assert findings.check_agreement(assignment, None, NAMES).severity == "not_applicable"
    whole = Neighbors(np.array([[1], [0]]), np.full((2, 1), 0.5, np.float32))
    assert findings.check_agreement(Assignment(p[:2], list("ab")), whole, NAMES).severity == "passed"


def scores(kmeans, scan, name="hungarian_accuracy", split="train"):
    return [Scores("k-means on pixels", split, 9, {name: kmeans - 0.1}),
            Scores("k-means on embeddings", split, 9, {name: kmeans}), Scores("SCAN", split, 9, {name: scan})]


@pytest.mark.parametrize(("kmeans", "scan", "severity"), [(0.7, 0.8, "passed"), (0.7, 0.7, "note"), (0.81, 0.8, "note"),
                                                          (0.9, 0.8, "warning")])
def test_baseline_by_labels(kmeans, scan, severity):
    found = findings.check_baseline(scores(kmeans, scan))
    assert found.severity == severity
    assert f"{scan:.3f}" in found.message
    assert "k-means on embeddings" in found.message


def test_baseline_by_a_score_where_lower_is_better():
    assert findings.check_baseline(scores(-1.0, -2.0, "neighbor_score")).severity == "passed"
    assert findings.check_baseline(scores(-2.0, -1.0, "neighbor_score")).severity == "warning"


def test_baseline_holds_the_shown_method_on_its_split_against_kmeans():
    table = [*scores(0.7, 0.9), Scores("self-label", "train", 9, {"hungarian_accuracy": 0.5}),
             Scores("embeddings (probes)", "train", 9, {"knn_accuracy": 0.1}), *scores(0.99, 0.1, split="test")]
    assert findings.check_baseline(table, "SCAN").severity == "passed"
    assert findings.check_baseline(table, "self-label").severity == "warning"
    assert findings.check_baseline(table).severity == "warning"  # the last of the first split: self-label


@pytest.mark.parametrize("table", [[], scores(0.5, 0.5)[2:], scores(0.5, 0.5)[:2], scores(float("nan"), 0.5),
                                   scores(0.5, float("nan")), scores(0.5, 0.4, "odd_score")])
def test_baseline_without_a_common_score_does_not_apply(table):
    assert findings.check_baseline(table).severity == "not_applicable"


def test_skipped_files():
    assert findings.check_skipped([], 10).severity == "passed"
    assert findings.check_skipped([("a.jpg", "truncated")], 100).severity == "note"
    assert findings.check_skipped([("a.jpg", "truncated")] * 12, 100).severity == "warning"


def test_confidence_against_truth():
    assignment = sized(50, 50, confidence=0.9)
    assert findings.check_confidence(assignment, np.arange(100) < 90).severity == "passed"
    assert findings.check_confidence(assignment, np.arange(100) < 70).severity == "warning"
    assert findings.check_confidence(sized(50, 50, confidence=0.6), np.arange(100) < 65).severity == "passed"
    shy = findings.check_confidence(sized(50, 50, confidence=0.6), np.arange(100) < 90)
    assert (shy.severity, shy.title) == ("note", "Confidence promises too little")
    assert findings.check_confidence(assignment, None).severity == "not_applicable"
    assert findings.check_confidence(sized(5, 5, confidence=1.0), np.ones(10, bool)).severity == "not_applicable"


def curve(values, stage="pretrain", name="loss"):
    return [{"stage": stage, "epoch": i + 1, name: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(("values", "severity"), [
    ([5, 3, 2, 1.5, 1.2, 1.1, 1.05, 1.04, 1.04, 1.04], "passed"), ([1.0] * 10, "warning"),
    ([1, 2, 3, 4, 5, 6], "warning"), ([10, 9, 8, 7, 6, 5, 4], "note"), ([3, 2, 1], "not_applicable"),
    ([-9.2, -10, -10.4, -10.5, -10.5, -10.5], "passed"), ([5, 3, float("nan"), 2, 1.5, 1.4, 1.4], "passed"),
    ([], "not_applicable")])
def test_training_loss(values, severity):
    assert findings.check_training(curve(values)).severity == severity


def test_training_names_the_stage_and_spares_the_one_that_may_rise():
    fell = curve([5, 3, 2, 1.1, 1, 1, 1, 1, 1, 1])
    assert "cluster" in findings.check_training(fell + curve([1.0] * 8, "cluster", "total")).message
    assert findings.check_training(fell + curve([1, 2, 3, 4, 5, 6], "refine")).severity == "passed"


def test_most_images_in_doubtful_clusters_is_critical():
    p = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    crossed = Neighbors(np.array([[1], [0], [3], [2]]), np.full((4, 1), 0.5, np.float32))
    assert findings.check_agreement(Assignment(p, list("abcd")), crossed, NAMES).severity == "critical"


@pytest.mark.parametrize(("stability", "severity"), [([0.9, 0.6, 0.8], "passed"), ([0.9, 0.59, 0.8], "warning"),
                                                     ([0.5, 0.9, 0.8], "critical"), ([np.nan, 0.9, 0.8], "passed"),
                                                     ([np.nan] * 3, "not_applicable")])
def test_stability(stability, severity):
    found = findings.check_stability(sized(30, 10, 10), np.array(stability), None, NAMES)
    assert (found.code, found.severity) == ("unstable-clusters", severity)
    assert findings.check_stability(sized(3, 3), None, None, NAMES).severity == "not_applicable"


def test_the_stability_of_an_empty_cluster_says_nothing():
    assert findings.check_stability(sized(3, 0, 3), np.array([0.9, 0, 0.9]), None, NAMES).severity == "passed"


def test_stability_names_the_worst_first_and_counts_images_put_elsewhere():
    found = findings.check_stability(sized(3, 3, 3), np.array([0.5, 0.25, 1]), np.repeat([0.5, 0.25, 1], 3), NAMES)
    assert "Cluster 1 (25 %), Cluster 0 (50 %)" in found.message.replace("\N{NO-BREAK SPACE}", " ")
    assert "6 images of 9" in found.message


@pytest.mark.parametrize("check", [
    lambda frozen: findings.check_collapse(sized(100, *[1] * 9), frozen=frozen),
    lambda frozen: findings.check_empty(sized(3, 0, 3), NAMES, frozen=frozen),
    lambda frozen: findings.check_doubt(sized(50, 50, confidence=0.6), frozen=frozen),
    lambda frozen: findings.check_baseline(scores(0.9, 0.8), frozen=frozen),
    lambda frozen: findings.check_baseline(scores(0.8, 0.8), frozen=frozen)])
def test_advice_for_a_frozen_encoder_is_not_to_train_it(check):
    frozen, trained = check(True), check(False)
    assert "encoder" in frozen.advice
    assert "pretraining" not in frozen.advice + frozen.message
    assert "entropy_weight" not in frozen.advice
    assert frozen.message == trained.message
    assert frozen.advice != trained.advice
