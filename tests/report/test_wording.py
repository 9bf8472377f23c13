import pytest

from phyla.report import wording


@pytest.mark.parametrize(("share", "said"), [(0, "0"), (1, "100"), (0.5, "50"), (0.957, "96"), (0.0204, "2.0"),
                                             (0.0001, "under 0.1"), (0.9999, "99.9"), (0.995, "99.5"), (0.0997, "10")])
def test_percent_never_rounds_to_all_or_nothing(share, said):
    assert wording.percent(share) == f"{said}\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(("value", "said"), [
    (1797, "1,797"), (3.0, "3"), (0.95678, "0.957"), (-1.23456, "-1.235"), (1e-4, "0.0001"), (2.5e-7, "2.5e-07"),
    (12345.678, "12,345.7"), (None, "–"), (float("nan"), "–"), (float("inf"), "inf"), (True, "True"), ("text", "text"),
    ([1], "[1]")])
def test_numbers_are_said_as_read(value, said):
    assert wording.number(value) == said


@pytest.mark.parametrize(("seconds", "said"), [(0.25, "0.2 s"), (59.9, "59.9 s"), (61, "1 min 01 s"),
                                               (7265, "2 h 01 min")])
def test_duration(seconds, said):
    assert wording.duration(seconds) == said


def test_shorten_keeps_both_ends():
    assert wording.shorten("abc", 3) == "abc"
    assert wording.shorten("a" * 50 + "b" * 50, 21) == "a" * 10 + "…" + "b" * 10


def test_last_part_of_a_path():
    assert wording.last_part("a/b/c.jpg") == "c.jpg"
    assert wording.last_part("17") == "17"
    assert wording.last_part("folder/") == "folder/"


def test_sureness_allows_for_chance():
    assert wording.sureness(0.93, 10) == "mostly sure"
    assert wording.sureness(0.999, 10) == "nearly always sure"
    assert wording.sureness(0.6, 10) == "often unsure"
    assert wording.sureness(0.6, 2) == "mostly guessing"
    assert wording.sureness(1.0, 1) == "with nothing to choose"


def test_verdict_in_plain_words():
    found = wording.verdict(n_images=312, n_clusters=10, n_used=10, confidence=0.93, n_review=1)
    assert found.lead == "312 images in 10 clusters, mostly sure (0.93)."
    assert found.more == ("1 image (0.3\N{NO-BREAK SPACE}%) deserves a second look.",)


def test_verdict_puts_what_is_critical_first():
    found = wording.verdict(n_images=1, n_clusters=10, n_used=1, confidence=0.93, n_review=0, right=0.5,
                            n_warnings=2, critical=["The clusters collapsed"])
    assert found.lead == "1 image in 1 cluster (of 10 asked for), not to be relied on yet: the clusters collapsed."
    assert "cluster that matches their class" in found.more[0]
    assert len(found.more) == 1


def test_verdict_with_more_clusters_than_classes_and_warnings():
    found = wording.verdict(n_images=9, n_clusters=4, n_used=4, confidence=0.93, n_review=0, right=0.5,
                            one_to_one=False, n_warnings=1)
    assert "commonest class in their cluster" in found.more[0]
    assert found.more[1] == "1 warning below."


@pytest.mark.parametrize(("name", "title"), [("nmi", "NMI"), ("top3_accuracy", "Top-3 accuracy"),
                                             ("knn_accuracy_20", "kNN accuracy (20 neighbors)"),
                                             ("knn_accuracy_200_memory", "kNN accuracy (200 neighbors, memory)"),
                                             ("heads_mean_hungarian_accuracy", "Hungarian accuracy, mean of the heads"),
                                             ("heads_sd_hungarian_accuracy", "Hungarian accuracy, sd of the heads"),
                                             ("heads_best_hungarian_accuracy",
                                              "Hungarian accuracy, best head by labels"),
                                             ("chosen_head_loss", "Loss of the chosen head"),
                                             ("odd_score", "Odd score")])
def test_metric_titles_and_meanings(name, title):
    assert wording.metric_title(name) == title
    assert bool(wording.metric_meaning(name)) == (name != "odd_score")


def test_a_memory_has_its_own_meaning():
    assert "memory bank" in wording.metric_meaning("knn_accuracy_20_memory")
    assert "memory" not in wording.metric_meaning("knn_accuracy_20")
    assert wording.metric_meaning("knn_accuracy_20_memories") == ""


@pytest.mark.parametrize(("value", "shown"), [(-0.005008, "-0.005"), (0.00751, "0.0075"), (0.001, "0.001"),
                                              (0.0003217, "0.0003217")])
def test_a_small_number_has_four_decimals(value, shown):
    assert wording.number(value) == shown
