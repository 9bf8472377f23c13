from phyla.report.scoretable import result_row, score_tables
from phyla.types import Scores

TABLE = [Scores("k-means on pixels", "train", 10, {"ari": 0.3, "nmi": 0.4, "neighbor_score": 2.0, "n_clusters": 3.0}),
         Scores("SCAN", "train", 10,
                {"ari": 0.2, "nmi": 0.5, "neighbor_score": -1.0, "n_clusters": 3.0, "new_score": 1.0}),
         Scores("embeddings (probes)", "train", 10, {"knn_accuracy_20": 0.9}),
         Scores("k-means on pixels", "test", 4, {"ari": 0.9, "nmi": 0.9}),
         Scores("SCAN", "test", 4, {"ari": 0.1, "nmi": 0.1})]


def test_tables_are_split_by_what_they_need():
    labelled, free, probes = score_tables(TABLE)
    assert labelled.columns == ("nmi", "ari")
    assert free.columns == ("neighbor_score", "n_clusters", "new_score")
    assert probes.columns == ("knn_accuracy_20",)
    assert [row.method for row in probes.rows] == ["embeddings (probes)"]
    assert len(labelled.rows) == 4
    assert labelled.splits == ("train", "test")
    assert labelled.counts == (10, 4)
    assert score_tables([]) == []


def test_best_is_marked_within_a_split_and_by_direction():
    labelled, free, _ = score_tables(TABLE)
    marks = [(labelled.is_best(row, "nmi"), labelled.is_best(row, "ari")) for row in labelled.rows]
    assert marks == [(False, True), (True, False), (True, True), (False, False)]
    assert [free.is_best(row, "neighbor_score") for row in free.rows] == [False, True]
    assert not any(free.is_best(row, "n_clusters") for row in free.rows)


def test_equal_values_have_no_best():
    (table,) = score_tables([Scores("a", "train", 9, {"nmi": 0.5}), Scores("b", "train", 9, {"nmi": 0.5})])
    assert not any(table.is_best(row, "nmi") for row in table.rows)


def test_result_is_the_named_method_or_the_last_that_scores_clusters():
    assert result_row(TABLE).method == "SCAN"
    assert result_row(TABLE, split="test").n_images == 4
    more = [*TABLE[:2], Scores("self-label", "train", 10, {"nmi": 0.1})]
    assert result_row(more).method == "self-label"
    assert result_row(more, "SCAN").method == "SCAN"
    assert result_row([TABLE[0]]) is None
    assert result_row([]) is None
    assert score_tables(more, "SCAN")[0].results == {1}


def test_scores_of_heads_and_memory_stand_where_they_belong():
    heads = {"heads_sd_hungarian_accuracy": 0.1, "heads_best_hungarian_accuracy": 0.9, "chosen_head_loss": -1.4,
             "heads_mean_hungarian_accuracy": 0.7, "hungarian_accuracy": 0.8}
    halves = {name: value / 2 for name, value in heads.items()}
    rows = [Scores("one", "train", 9, heads), Scores("two", "train", 9, halves),
            Scores("probes", "train", 9, {"knn_accuracy_200_memory": 0.8, "knn_accuracy_200": 0.7})]
    labelled, free, probes = score_tables(rows)
    assert labelled.columns == ("hungarian_accuracy", "heads_mean_hungarian_accuracy", "heads_sd_hungarian_accuracy",
                                "heads_best_hungarian_accuracy")
    assert free.columns == ("chosen_head_loss",)
    assert probes.columns == ("knn_accuracy_200_memory", "knn_accuracy_200")
    assert free.is_best(rows[0], "chosen_head_loss")  # the lower one
    without_order = ("heads_sd_hungarian_accuracy", "heads_best_hungarian_accuracy")
    assert not any(labelled.is_best(row, name) for row in rows for name in without_order)
    assert labelled.is_best(rows[0], "heads_mean_hungarian_accuracy")


def test_scores_of_honesty_stand_with_those_by_labels_and_low_is_good_but_for_the_gap():
    names = ("expected_calibration_error", "confidence_gap", "brier_score", "area_under_risk_coverage")
    rows = [Scores("one", "train", 9, dict.fromkeys(names, 0.2)), Scores("two", "train", 9, dict.fromkeys(names, 0.1))]
    table, = score_tables(rows)
    assert (table.title, table.columns) == ("By the true labels", names)
    assert [name for name in names if table.is_best(rows[1], name)] == [names[0], *names[2:]]
    assert not any(table.is_best(rows[0], name) for name in names)
