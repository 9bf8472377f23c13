import inspect

import numpy as np
import pytest

from phyla.report.examples import N_NEAREST, Bar, Gallery, Nearest
from phyla.report.selection import Examples, choose_examples
from phyla.types import Assignment, Neighbors

NAMES = ["Cluster 0", "Cluster 1", "Cluster 2"]
CLASSES = ["cat", "dog", "emu"]
IDS = list("abcd")


def four_images():
    """Four images, three clusters of which the last is empty, three neighbors each; similarities in tenths."""
    p = np.array([[0.75, 0.25, 0], [0.5, 0.375, 0.125], [0.25, 0.75, 0], [0, 1, 0]], dtype=np.float32)
    indices = np.array([[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]])
    return Assignment(p, IDS), Neighbors(indices, np.tile(np.float32([0.9, 0.8, 0.7]), (4, 1)))


def test_with_labels_by_hand():
    assignment, neighbors = four_images()
    truth = np.array([0, 0, 1, 0])
    gallery = Gallery.of(Examples((0,), (2,)), assignment, neighbors, names=NAMES, truth=truth, classes=CLASSES)
    first, second = gallery.examples
    assert (gallery.labelled, gallery.votes, gallery.n_voters) == (True, True, 3)
    assert (first.row, first.kind, first.cluster, first.true_class) == (0, "typical", "Cluster 0", "cat")
    assert (second.row, second.kind, second.cluster, second.true_class) == (2, "least certain", "Cluster 1", "dog")
    assert [(near.row, near.other) for near in first.nearest] == [(1, None), (2, "dog"), (3, None)]
    assert [(near.row, near.other) for near in second.nearest] == [(3, "cat"), (1, "cat"), (0, "cat")]
    assert first.clusters == (Bar("Cluster 0", 0.75), Bar("Cluster 1", 0.25))  # of probability 0 there is no bar
    # cats at 0.9 and 0.7, a dog at 0.8; a tenth less of similarity is 1/e of the weight
    e = np.e
    votes = np.array([e**9 + e**7, e**8]) / (e**9 + e**8 + e**7)
    assert [(bar.name, bar.true) for bar in first.classes] == [("cat", True), ("dog", False)]
    np.testing.assert_allclose([bar.share for bar in first.classes], votes, rtol=1e-6)
    assert second.classes == (Bar("cat", 1.0),)  # its own class, the dog, has no vote, and no bar is true


def test_without_labels_neighbors_are_told_apart_by_cluster():
    assignment, neighbors = four_images()
    gallery = Gallery.of(Examples((0,), ()), assignment, neighbors, names=NAMES)
    (only,) = gallery.examples
    assert (gallery.labelled, gallery.votes) == (False, False)
    assert (only.true_class, only.classes) == (None, ())
    assert [near.other for near in only.nearest] == [None, "Cluster 1", "Cluster 1"]


def test_unknown_classes_have_no_vote_and_no_mark():
    assignment, neighbors = four_images()
    known = Gallery.of(Examples((0,), (1,)), assignment, neighbors, names=NAMES, truth=np.array([1, -1, -1, 2]),
                       classes=CLASSES)
    first, second = known.examples
    assert [near.other for near in first.nearest] == [None, None, "emu"]
    assert first.classes == (Bar("emu", 1.0),)
    assert second.true_class is None
    assert [near.other for near in second.nearest] == [None, None, None]
    assert not any(bar.true for bar in second.classes)
    none = Gallery.of(Examples((0,), ()), assignment, neighbors, names=NAMES, truth=np.array([1, -1, -1, -1]),
                      classes=CLASSES)
    assert none.examples[0].classes == ()
    assert not none.votes


@pytest.mark.parametrize("neighbors", [None, Neighbors(np.zeros((4, 0), np.int64), np.zeros((4, 0), np.float32))])
def test_without_neighbors_there_are_bars_of_clusters_only(neighbors):
    assignment, _ = four_images()
    gallery = Gallery.of(Examples((0, 2), ()), assignment, neighbors, names=NAMES, truth=np.zeros(4, np.int64),
                         classes=CLASSES)
    assert gallery.n_voters == 0
    assert gallery.rows == [0, 2]
    assert gallery.retrieval_table(IDS) == []
    assert {row["bar of"] for row in gallery.probability_table(IDS)} == {"cluster"}


def test_tables_by_hand():
    assignment, neighbors = four_images()
    gallery = Gallery.of(Examples((3,), ()), assignment, neighbors, names=NAMES, truth=np.array([0, 1, 0, 0]),
                         classes=CLASSES)
    assert gallery.rows == [3, 2, 1, 0]
    table = gallery.retrieval_table(IDS)
    assert table[1] == {"image": "d", "chosen as": "typical", "rank": 2, "neighbor": "b",
                        "similarity": pytest.approx(0.8), "other": "dog"}
    assert [row["rank"] for row in table] == [1, 2, 3]
    bars = [(row["bar of"], row["name"]) for row in gallery.probability_table(IDS)]
    assert bars == [("cluster", "Cluster 1"), ("class", "cat"), ("class", "dog")]
    assert gallery.probability_table(IDS)[0] == {"image": "d", "chosen as": "typical", "bar of": "cluster",
                                                 "name": "Cluster 1", "share": 1.0}


def test_all_neighbors_vote_and_the_nearest_are_shown():
    n = 30
    indices = np.array([[j for j in range(n) if j != i] for i in range(n)])
    neighbors = Neighbors(indices, np.tile(np.linspace(1, -1, n - 1, dtype=np.float32), (n, 1)))
    assignment = Assignment(np.full((n, 20), 1 / 20, np.float32), [str(i) for i in range(n)])
    truth = np.arange(n) % 3
    gallery = Gallery.of(Examples((0,), ()), assignment, neighbors, names=[str(c) for c in range(20)], truth=truth,
                         classes=CLASSES)
    (only,) = gallery.examples
    assert only.nearest[0] == Nearest(1, 1.0, "dog")
    assert len(only.nearest) == N_NEAREST
    assert [bar.name for bar in only.clusters] == ["0", "1", "2", "3", "4"]  # equal ones in their order, five of them
    naive = np.zeros(3)
    for other, similarity in zip(neighbors.indices[0], neighbors.similarities[0], strict=True):
        naive[truth[other]] += np.exp(float(similarity) / 0.1)
    shares = {bar.name: bar.share for bar in only.classes}
    np.testing.assert_allclose([shares[name] for name in CLASSES], naive / naive.sum(), rtol=1e-9)


def test_the_choice_sees_no_labels():
    assert not {"truth", "classes", "labels"} & set(inspect.signature(choose_examples).parameters)
