"""Members are many clusterings of the same embeddings; the best one is chosen without labels and can be shipped."""

import numpy as np
import pytest
import torch

from phyla.cluster.temi import TEMI
from phyla.errors import InputError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.members import Members
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterNet
from phyla.progress import Bar, shown_by
from phyla.spaces import scaled
from phyla.types import Embeddings

N_EACH, N_CLASSES = 30, 3
TRUE = np.repeat(np.arange(N_CLASSES), N_EACH)


def blobs(n_features: int, seed: int, spread: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(N_CLASSES, n_features))
    return (centers[TRUE] + spread * rng.normal(size=(len(TRUE), n_features))).astype(np.float32)


TWO = [blobs(6, 1), blobs(8, 2)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """TEMI in a few steps."""
    monkeypatch.setattr(TEMI, "quick", classmethod(lambda cls, k, *, random_state=0: cls(
        n_clusters=k, n_steps=30, batch_size=32, hidden=(8, 4), lr=1e-2, random_state=random_state)))


def test_every_method_sees_each_space_and_both():
    found = Members(n_clusters=3, methods=("kmeans", "temi"), n_each=2, spaces="each+together").fit(TWO)
    assert found.members_.shape == (12, 90, 3)
    assert found.members_.dtype == np.float16
    kinds = [(row["method"], row["space"], row["number"]) for row in found.rows_]
    assert kinds[:4] == [("kmeans", "space 1", 0), ("kmeans", "space 1", 0), ("kmeans", "space 2", 0),
                         ("kmeans", "space 2", 0)]
    assert kinds[-2:] == [("temi", "together", 0), ("temi", "together", 1)]
    assert np.allclose(found.members_.astype(np.float32).sum(axis=2), 1, atol=2e-2)


def test_the_best_sees_all_spaces_and_is_shipped_exactly():
    found = Members(n_clusters=3, methods=("kmeans", "temi"), n_each=2).fit(TWO)
    best = found.rows_[found.best_]
    assert best["space"] == "together"
    rivals = [row["score"] for row in found.rows_ if row["space"] == "together" and row["method"] == "kmeans"]
    assert best["score"] >= max(rivals)
    assert hungarian_accuracy(TRUE, found.labels_) > 0.9
    projection, heads = found.as_parts()
    net = ClusterNet(torch.nn.Identity(), heads, projection)
    np.testing.assert_allclose(net.of_embeddings(np.concatenate(TWO, axis=1)), found.probabilities_, atol=1e-5)
    np.testing.assert_allclose(found.predict_proba([each[:7] for each in TWO]), found.probabilities_[:7], atol=1e-5)
    assert np.array_equal(found.predict([each[:7] for each in TWO]), found.labels_[:7])


def test_one_space_is_seen_once_and_widths_make_two():
    one = Members(n_clusters=3, methods=("kmeans",), n_each=2).fit(TWO[0])
    assert {row["space"] for row in one.rows_} == {"together"}
    both = Embeddings(np.concatenate(TWO, axis=1), [str(i) for i in range(90)], (6, 8))
    assert len(Members(n_clusters=3, methods=("kmeans",), n_each=1).fit(both).rows_) == 1
    each = Members(n_clusters=3, methods=("kmeans",), n_each=1, spaces="each+together").fit(both)
    assert len(each.rows_) == 3


def test_a_seed_decides_everything_and_members_differ():
    first, again, other = (Members(n_clusters=3, methods=("kmeans", "temi"), n_each=2, random_state=seed).fit(TWO[0])
                           for seed in (1, 1, 2))
    assert np.array_equal(first.members_, again.members_)
    assert not np.array_equal(first.members_, other.members_)
    assert not np.array_equal(first.members_[2], first.members_[3])


def test_neighbors_that_are_given_are_used(monkeypatch):
    near = find_neighbors(scaled(TWO), 5)
    seen = []
    fit = TEMI.fit
    monkeypatch.setattr(TEMI, "fit", lambda self, *args, neighbors, **more: seen.append(neighbors) or fit(
        self, *args, neighbors=neighbors, **more))
    Members(n_clusters=3, methods=("temi",), n_each=1, n_neighbors=7, spaces="each+together").fit(TWO, neighbors=near)
    assert [each.n_neighbors for each in seen] == [7, 7, 5]


def test_one_bar_counts_the_fits():
    class Shown:
        def __init__(self):
            self.started = []

        def start(self, description: str, total: int | None, unit: str, done: int) -> Bar:
            self.started.append((description, total, unit))
            return self

        def advance(self, n: int = 1, note: str = "") -> None:
            pass

        def stop(self, bar: Bar) -> None:
            pass

    shown = Shown()
    with shown_by(shown):
        Members(n_clusters=3, methods=("kmeans", "temi"), n_each=2).fit(TWO[0])
    assert [each for each in shown.started if each[2] != "image"] == [("clustering", 3, "fit")]


@pytest.mark.parametrize(("options", "told"), [({"n_clusters": 0}, "n_clusters"), ({"n_each": 0}, "n_each"),
                                               ({"methods": ()}, "members"), ({"n_clusters": 91}, "images")])
def test_impossible_options_are_refused(options, told):
    with pytest.raises(InputError, match=told):
        Members(**options).fit(TWO[0])


def test_a_handful_of_images_is_scored_too():
    found = Members(n_clusters=2, methods=("kmeans",), n_each=2).fit(TWO[0][::18])
    assert found.labels_.shape == (5,) and len(found.rows_) == 2
