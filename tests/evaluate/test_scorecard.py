"""The table of a run: which rows and numbers it has, with labels, without, with some, and on held-out images."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from phyla.cluster.kmeans import KMeans
from phyla.evaluate import scorecard
from phyla.evaluate.matching import hungarian_accuracy
from phyla.evaluate.metrics import score_assignment
from phyla.evaluate.probes import knn_accuracy
from phyla.evaluate.scorecard import Bank, Split, fill_scorecard
from phyla.neighbors import find_neighbors
from phyla.quality import neighbor_score
from phyla.types import Assignment, Embeddings, ImageSet

OPTIONS = {"n_clusters": 3, "kmeans_restarts": 2, "kmeans_max_images": 1000, "knn_neighbors": 5, "random_state": 0}
KNOWN = {"n_clusters", "used_clusters", "effective_clusters", "mean_confidence", "neighbor_agreement", "neighbor_score"}
METRICS = {"hungarian_accuracy", "many_to_one_accuracy", "nmi", "ari", "ami", "top3_accuracy",
           "expected_calibration_error", "confidence_gap", "brier_score", "area_under_risk_coverage"}


def made(name: str, n: int, seed: int, *, labelled: bool = True) -> Split:
    """Return images that are red, green or blue, embeddings that say so, and an assignment that is a little wrong."""
    rng = np.random.default_rng(seed)
    true = np.arange(n) % 3
    pixels = rng.integers(0, 90, (n, 4, 4, 3))
    pixels[np.arange(n), ..., true] += 150
    ids = [f"{name}/{row}" for row in range(n)]
    values = (np.eye(3)[true] + rng.normal(scale=0.1, size=(n, 3))).astype(np.float32)
    embeddings = Embeddings(values, ids)
    wrong = (true + (np.arange(n) % 10 == 0)) % 3
    found = Assignment(np.where(np.eye(3)[wrong] > 0, 0.9, 0.05).astype(np.float32), ids)
    return Split(name, ImageSet(pixels.astype(np.uint8), ids), embeddings, find_neighbors(embeddings, 7),
                 {"SCAN": found}, true if labelled else None)


@pytest.fixture
def train():
    return made("train", 60, 0)


def test_with_labels_every_method_has_all_numbers(train):
    rows = fill_scorecard([train], **OPTIONS)
    assert [row.method for row in rows] == ["k-means on pixels", "k-means on embeddings", "SCAN", "embeddings (probes)"]
    assert all((row.split, row.n_images) == ("train", 60) for row in rows)
    assert all(set(row.values) == KNOWN | METRICS for row in rows[:3])
    assert set(rows[3].values) == {"knn_accuracy_5", "linear_accuracy", "neighbor_purity"}
    assert rows[0].values["hungarian_accuracy"] == rows[1].values["hungarian_accuracy"] == 1
    assert rows[2].values["hungarian_accuracy"] == pytest.approx(0.9)
    assert rows[3].values["neighbor_purity"] == 1


def test_numbers_are_those_of_the_metrics(train):
    row = fill_scorecard([train], **OPTIONS)[2]
    scores = score_assignment(train.assignments["SCAN"], train.true, method="SCAN", split="train")
    assert {name: row.values[name] for name in scores.values} == scores.values
    # The label-free score is the one that methods choose by: five neighbors, whatever the run has.
    assert row.values["neighbor_score"] == neighbor_score(train.assignments["SCAN"].probabilities,
                                                          train.neighbors.indices[:, :5])


def test_without_labels_there_is_what_can_be_known(train):
    rows = fill_scorecard([replace(train, true=None)], **OPTIONS)
    assert [row.method for row in rows] == ["k-means on pixels", "k-means on embeddings", "SCAN"]
    assert all(set(row.values) == KNOWN for row in rows)


def test_labels_change_no_assignment(train):
    with_labels = fill_scorecard([train], **OPTIONS)
    shuffled = fill_scorecard([replace(train, true=np.roll(train.true, 1))], **OPTIONS)
    without = fill_scorecard([replace(train, true=None)], **OPTIONS)
    for rows in (shuffled, without):
        for one, other in zip(with_labels, rows, strict=False):
            assert {name: one.values.get(name) for name in KNOWN} == {name: other.values.get(name) for name in KNOWN}


def test_held_out_images_are_scored_by_what_was_learned_on_the_first(train):
    rows = fill_scorecard([train, made("test", 30, 1)], **OPTIONS)
    assert [(row.method, row.split, row.n_images) for row in rows[4:]] == [
        ("k-means on pixels", "test", 30), ("k-means on embeddings", "test", 30), ("SCAN", "test", 30),
        ("embeddings (probes)", "test", 30)]
    assert rows[4].values["hungarian_accuracy"] == rows[7].values["knn_accuracy_5"] == 1
    other = made("test", 30, 1)
    far = replace(other, embeddings=Embeddings(-other.embeddings.values, other.embeddings.ids))
    moved = fill_scorecard([train, far], **OPTIONS)
    assert moved[:4] == rows[:4] and moved[7].values["knn_accuracy_5"] < 1


def test_held_out_labels_alone_give_metrics_and_no_probe(train):
    rows = fill_scorecard([replace(train, true=None), made("test", 30, 1)], **OPTIONS)
    assert [(row.method, row.split) for row in rows if "nmi" in row.values] == [
        ("k-means on pixels", "test"), ("k-means on embeddings", "test"), ("SCAN", "test")]
    assert not [row for row in rows if "probes" in row.method]


def test_images_of_unknown_class_are_left_out_of_the_metrics(train):
    true = np.where(np.arange(60) < 30, train.true, -1)
    rows = fill_scorecard([replace(train, true=true)], **OPTIONS)
    scores = score_assignment(train.assignments["SCAN"], true, method="SCAN", split="train")
    assert rows[2].values["nmi"] == scores.values["nmi"] and rows[2].n_images == 60


def test_labels_that_are_all_unknown_are_none(train, caplog):
    with caplog.at_level(logging.WARNING, "phyla"):
        rows = fill_scorecard([replace(train, true=np.full(60, -1))], **OPTIONS)
    assert all("nmi" not in row.values for row in rows) and rows[-1].values == {}
    assert "no linear_accuracy: " in caplog.text


def test_a_probe_that_few_labels_do_not_allow_leaves_the_others(train, caplog):
    with caplog.at_level(logging.WARNING, "phyla"):
        rows = fill_scorecard([replace(train, true=np.zeros(60, int))], **OPTIONS)
    assert set(rows[-1].values) == {f"knn_accuracy_{5}", "neighbor_purity"}
    assert "no linear_accuracy: a linear probe needs at least 2 classes" in caplog.text


@pytest.mark.parametrize(("at_most", "fitted"), [(1000, 60), (20, 20), (1, 3)])
def test_kmeans_is_fitted_on_so_many_images_at_most(train, monkeypatch, at_most, fitted):
    seen, real = [], KMeans.fit

    def fit(self, rows, y=None):
        seen.append(rows)
        return real(self, rows)

    monkeypatch.setattr(KMeans, "fit", fit)
    rows = fill_scorecard([train], **OPTIONS | {"kmeans_max_images": at_most})
    assert [len(taken) for taken in seen] == [fitted, fitted]
    np.testing.assert_array_equal(seen[0][[0, -1]] * 255, train.images.array[[0, -1]].reshape(2, -1))
    assert seen[0].dtype == np.float32 and rows[0].n_images == 60


def test_large_images_are_taken_in_parts(train, monkeypatch):
    whole = fill_scorecard([train], **OPTIONS | {"kmeans_max_images": 12})
    monkeypatch.setattr(scorecard, "_VALUES", 12 * 4 * 4 * 3)
    sizes, real = [], scorecard._pixels

    def pixels(split, rows):
        sizes.append(len(rows))
        return real(split, rows)

    monkeypatch.setattr(scorecard, "_SPACES", scorecard._SPACES | {"pixels": pixels})
    assert fill_scorecard([train], **OPTIONS) [0] == whole[0]
    assert max(sizes) == 12 and sum(size for size in sizes if size > 1) == 12 + 60


# ── rival heads and a memory bank ─────────────────────────────────────────────────────────────────────────────────


def test_rival_heads_give_mean_spread_and_best(train):
    true = train.true
    heads = np.stack([true, (true + (np.arange(60) % 2 == 0)) % 3, np.zeros(60, np.int64)])
    row = fill_scorecard([replace(train, rivals={"SCAN": {"heads": heads}})], **OPTIONS)[2]
    found = [hungarian_accuracy(true, labels) for labels in heads]
    assert row.values["heads_mean_hungarian_accuracy"] == pytest.approx(np.mean(found))
    assert row.values["heads_sd_hungarian_accuracy"] == pytest.approx(np.std(found))
    assert row.values["heads_best_hungarian_accuracy"] == 1
    assert row.values["hungarian_accuracy"] == pytest.approx(0.9)  # the result stays the result


def test_a_memory_is_probed_as_it_is_and_recomputed(train):
    test = made("test", 30, 1)
    rng = np.random.default_rng(3)
    useless = Embeddings(rng.normal(size=(60, 3)).astype(np.float32), train.images.ids)
    bank = Bank(useless, train.true, {"train": train.embeddings, "test": test.embeddings})
    rows = {(row.method, row.split): row.values for row in fill_scorecard([train, test], memory=bank, **OPTIONS)}
    for split in ("train", "test"):
        probes = rows["embeddings (probes)", split]
        assert probes["knn_accuracy_5_recomputed"] == probes["knn_accuracy_5"] > 0.9
        assert probes["knn_accuracy_5_memory"] < 0.7
    alone = knn_accuracy(useless, train.true, n_neighbors=5)
    assert rows["embeddings (probes)", "train"]["knn_accuracy_5_memory"] == alone


def test_a_memory_of_more_images_leaves_a_part_of_itself_out(train):
    more = made("train", 80, 0)
    unlabelled = np.where(np.arange(80) < 60, more.true, -1)
    test = made("test", 30, 1)
    bank = Bank(more.embeddings, unlabelled, {"train": train.embeddings, "test": test.embeddings})
    rows = {row.split: row.values for row in fill_scorecard([train, test], memory=bank, **OPTIONS)
            if row.method == "embeddings (probes)"}
    assert "knn_accuracy_5_memory" not in rows["train"] and rows["test"]["knn_accuracy_5_memory"] > 0.9


def test_the_baselines_may_be_pixels_alone(train):
    rows = fill_scorecard([train], kmeans_on=("pixels",), **OPTIONS)
    assert [row.method for row in rows] == ["k-means on pixels", "SCAN", "embeddings (probes)"]


def test_the_oracle_is_a_row_of_its_own_beside_the_result(train):
    true = train.true
    epochs = np.stack([np.zeros(60, np.int64), (true + 1) % 3, (true + (np.arange(60) % 2 == 0)) % 3])
    rows = fill_scorecard([replace(train, rivals={"SCAN": {"epochs": epochs}})], **OPTIONS)
    oracle = next(row for row in rows if "oracle" in row.method)
    assert oracle.method == "SCAN (oracle: best epoch by labels)"
    assert oracle.values == {"hungarian_accuracy": 1.0, "nmi": pytest.approx(1), "ari": pytest.approx(1)}
    unlabelled = replace(train, true=None, rivals={"SCAN": {"epochs": epochs}})
    assert not any("oracle" in row.method for row in fill_scorecard([unlabelled], **OPTIONS))


def test_networks_that_are_added_up_have_a_number_each(train):
    networks = np.stack([train.true, np.zeros(60, np.int64)])
    row = fill_scorecard([replace(train, rivals={"SCAN": {"networks": networks}})], **OPTIONS)[2]
    assert row.values["network_1_hungarian_accuracy"] == 1
    assert row.values["network_2_hungarian_accuracy"] == pytest.approx(1 / 3)
    assert "heads_mean_hungarian_accuracy" not in row.values


def test_the_bins_of_the_calibration_error_are_an_option(train):
    one, many = (fill_scorecard([train], calibration_bins=bins, **OPTIONS)[2].values for bins in (1, 15))
    assert one["expected_calibration_error"] == pytest.approx(abs(one["confidence_gap"]))
    assert many["expected_calibration_error"] >= one["expected_calibration_error"]


def test_fewer_voters_than_asked_for_are_told(train, caplog):
    with caplog.at_level(logging.WARNING, logger="phyla"):
        fill_scorecard([train], **OPTIONS | {"knn_neighbors": 200})
    assert "only 59 images can vote, not 200" in caplog.text
