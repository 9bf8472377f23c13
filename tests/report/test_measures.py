import numpy as np
import pytest

from phyla.report.measures import ConfidenceSpread, Confusion, Curve, EmbeddingMap, curve_table, read_curves
from phyla.types import Assignment


def hard(labels, n_clusters):
    return Assignment(np.eye(n_clusters, dtype=np.float32)[labels], [str(i) for i in range(len(labels))])


NAMES = [f"Cluster {i}" for i in range(9)]


def test_confusion_by_hand():
    truth = np.array([0, 0, 0, 1, 1, 1, -1])
    found = Confusion.of(truth, ["cat", "dog"], hard([1, 1, 0, 0, 0, 0, 0], 2), names=NAMES)
    assert found.clusters.tolist() == [1, 0]
    assert found.counts.tolist() == [[2, 1], [0, 3]]
    assert found.known.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.correct.tolist() == [True, True, False, True, True, True]
    assert found.one_to_one
    assert (found.class_of(0), found.class_of(1)) == ("dog", "cat")
    assert found.mixture(0) == [("dog", 0.75), ("cat", 0.25)]
    assert found.table() == [{"class": "cat", "Cluster 1": 2, "Cluster 0": 1},
                             {"class": "dog", "Cluster 1": 0, "Cluster 0": 3}]
    assert found.by_class()[0] == {"class": "cat", "images": 3, "cluster": "Cluster 1", "recall": pytest.approx(2 / 3),
                                   "precision": 1.0, "most often taken for": "dog", "times": 1}
    assert found.by_class()[1]["precision"] == 0.75
    assert found.by_class()[1]["most often taken for"] is None


def test_more_clusters_than_classes_stand_for_their_commonest():
    truth = np.array([0, 0, 0, 0, 1, 1])
    found = Confusion.of(truth, ["cat", "dog"], hard([0, 0, 1, 1, 2, 1], 4), names=NAMES)
    assert not found.one_to_one
    assert found.stands_for.tolist() == [0, 0, 1, -1]
    assert found.clusters.tolist() == [1, 0, 2, 3]  # those of the cat, larger first, of the dog, the empty one
    assert found.correct.mean() == pytest.approx(5 / 6)
    assert found.by_class()[0]["cluster"] == "2 clusters"
    assert found.by_class()[0]["recall"] == 1.0
    assert found.by_class()[0]["precision"] == 0.8


def test_fewer_clusters_than_classes_leave_a_class_without():
    found = Confusion.of(np.array([0, 0, 1, 1, 1]), ["cat", "dog"], hard([0, 0, 0, 0, 0], 1), names=NAMES)
    about = {row["class"]: row for row in found.by_class()}
    assert about["cat"]["cluster"] is None
    assert about["cat"]["recall"] == 0
    assert about["cat"]["precision"] is None
    assert about["cat"]["most often taken for"] == "dog"
    assert about["dog"]["recall"] == 1


def test_confusion_of_unknown_and_unnamed_classes():
    assert Confusion.of(np.array([-1, -1]), ["cat"], hard([0, 0], 1), names=NAMES) is None
    found = Confusion.of(np.array([0, 2]), ["cat"], hard([0, 1], 2), names=NAMES)
    assert found.classes == ["cat", "class 1", "class 2"]
    assert found.by_class()[1]["recall"] is None
    assert found.shares[1].tolist() == [0, 0]


@pytest.mark.parametrize(("n_images", "method"), [(1, "PCA"), (2, "PCA"), (29, "PCA"), (40, "t-SNE")])
def test_map_stays_in_the_unit_square(n_images, method):
    embeddings = np.random.default_rng(0).normal(size=(n_images, 6)).astype(np.float32)
    found = EmbeddingMap.of(embeddings, hard(np.arange(n_images) % 2, 2))
    assert found.method == method
    assert found.points.shape == (n_images, 2)
    assert np.isfinite(found.points).all()
    assert 0 <= found.points.min() <= found.points.max() <= 1
    assert found.rows.tolist() == list(range(n_images))


@pytest.mark.parametrize("embeddings", [np.zeros((50, 4)), np.full((50, 4), 1e-3), np.arange(50.0)[:, None],
                                        np.repeat(np.eye(2), 25, axis=0)])
def test_map_of_embeddings_without_much_in_them(embeddings):
    found = EmbeddingMap.of(embeddings.astype(np.float32), hard(np.zeros(50, int), 1))
    assert np.isfinite(found.points).all()


def test_map_separates_blobs_and_repeats_itself():
    draw = np.random.default_rng(1)
    labels = np.arange(90) % 3
    embeddings = (np.eye(3)[labels] * 20 + draw.normal(size=(90, 3))).astype(np.float32)
    found, again = (EmbeddingMap.of(embeddings, hard(labels, 3)) for _ in range(2))
    np.testing.assert_array_equal(found.points, again.points)
    centers = np.array([found.centers()[c] for c in range(3)])
    nearest = ((found.points[:, None] - centers) ** 2).sum(2).argmin(1)
    assert (nearest == labels).mean() > 0.95


def test_map_draws_a_sample_of_many():
    embeddings = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    found = EmbeddingMap.of(embeddings, hard(np.arange(200) % 2, 2), limit=20)
    assert len(found.rows) == len(set(found.rows.tolist())) == 20
    assert found.n_images == 200
    assert found.labels.tolist() == (found.rows % 2).tolist()
    assert sum(row["points"] for row in found.table(NAMES)) == 20


def soft(*confidence):
    p = np.float32(confidence)
    return Assignment(np.stack([p, 1 - p], axis=1), [str(i) for i in range(len(p))])


def test_histogram_and_thresholds_by_hand():
    spread = ConfidenceSpread(soft(1.0, 0.95, 0.72, 0.55), NAMES, np.array([0, 2, 3]), np.array([True, False, False]))
    assert spread.counts.sum() == 4
    rows = {round(row["from"], 2): row for row in spread.table() if row["images"]}
    assert {bin_from: row["images"] for bin_from, row in rows.items()} == {0.55: 1, 0.7: 1, 0.95: 2}
    assert rows[0.95]["right"] == 1.0
    assert rows[0.7]["right"] == 0.0
    kept = {row["accept from"]: row for row in spread.thresholds()}
    assert (kept[0.0]["kept"], kept[0.7]["kept"], kept[0.99]["kept"]) == (4, 3, 1)
    assert kept[0.7]["to review"] == 1
    assert kept[0.7]["right among kept"] == 0.5
    assert "right" not in ConfidenceSpread(soft(1.0), NAMES).table()[0]


def test_spread_by_cluster_leaves_out_empty_ones():
    p = np.float32([[0.6, 0.4, 0], [0.8, 0.2, 0]])
    (row,) = ConfidenceSpread(Assignment(p, ["a", "b"]), NAMES).by_cluster()
    assert (row["cluster"], row["images"]) == ("Cluster 0", 2)
    assert row["50 %"] == pytest.approx(0.7)
    assert row["mean"] == pytest.approx(0.7)


def test_curves_are_read_by_stage_with_the_loss_first():
    records = [{"stage": "pretrain", "epoch": 1, "lr": 0.1, "purity": 0.5, "loss": 3, "seconds": 9},
               {"stage": "pretrain", "epoch": 2, "lr": 0.1, "purity": float("nan"), "loss": 2, "note": "text"},
               {"stage": "cluster", "epoch": 1, "loss": 1, "done": True}]
    curves = read_curves(records)
    assert [(c.stage, c.quantity) for c in curves] == [("pretrain", "loss"), ("pretrain", "purity"), ("pretrain", "lr"),
                                                       ("cluster", "loss")]
    assert curves[0] == Curve("pretrain", "loss", (1.0, 2.0), (3.0, 2.0))
    assert curves[1].values == (0.5,)
    assert curve_table(curves, "pretrain") == [{"epoch": 1.0, "loss": 3.0, "purity": 0.5, "lr": 0.1},
                                               {"epoch": 2.0, "loss": 2.0, "purity": None, "lr": 0.1}]
    assert read_curves([]) == []


def test_a_thinned_curve_keeps_its_ends():
    curve = Curve("s", "q", tuple(map(float, range(1000))), tuple(map(float, range(1000))))
    thin = curve.thinned(50)
    assert len(thin.values) == 50
    assert (thin.epochs[0], thin.epochs[-1]) == (0, 999)
    assert curve.thinned(1000) is curve
