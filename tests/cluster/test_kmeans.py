"""k-means: finds what is there, keeps scikit-learn's contract, says what it cannot do."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from torch import nn

from phyla.cluster import kmeans as module
from phyla.cluster.kmeans import KMeans, spherical_centers
from phyla.errors import CollapseWarning, InputError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.evaluate.metrics import nmi
from phyla.nets.heads import ClusterNet
from phyla.types import Assignment, Embeddings


def blobs(n: int = 120, n_groups: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return groups of directions of very different lengths, and which is which."""
    draw = np.random.default_rng(seed)
    groups = np.arange(n) % n_groups
    rows = np.eye(n_groups)[groups] + 0.05 * draw.standard_normal((n, n_groups))
    return rows * draw.uniform(0.1, 50, (n, 1)), groups


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


def test_recovers_directions_whatever_their_length():
    rows, groups = blobs()
    assert same_partition(KMeans(n_clusters=4).fit(rows).labels_, groups)
    assert not same_partition(KMeans(n_clusters=4, normalize=False).fit(rows).labels_, groups)


def test_four_points_by_hand():
    rows = np.array([[0.0, 0], [0, 2], [10, 0], [10, 2]])
    found = KMeans(n_clusters=2, normalize=False).fit(rows)
    assert sorted(found.cluster_centers_.tolist()) == [[0, 1], [10, 1]]
    assert found.inertia_ == 4
    assert same_partition(found.labels_, np.array([0, 0, 1, 1]))


def test_attributes_have_their_shapes():
    rows, _ = blobs()
    found = KMeans(n_clusters=3).fit(rows.astype(np.float32))
    assert found.labels_.shape == (120,)
    assert found.labels_.dtype == np.int64
    assert found.probabilities_.shape == (120, 3)
    assert found.probabilities_.dtype == np.float32
    assert found.cluster_centers_.shape == (3, 4)
    assert found.n_features_in_ == 4
    assignment = Assignment(found.probabilities_, [str(i) for i in range(120)])
    assert assignment.labels.tolist() == found.labels_.tolist()


@pytest.mark.parametrize("normalize", [True, False])
def test_probabilities_are_round_gaussians(normalize):
    rows, _ = blobs(30)
    rows = rows / 20
    found = KMeans(n_clusters=4, normalize=normalize, temperature=0.3).fit(rows)
    scaled = rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows
    squared = ((scaled[:, None] - found.cluster_centers_) ** 2).sum(axis=2)
    weights = np.exp(-squared / 0.6)
    np.testing.assert_allclose(found.probabilities_, weights / weights.sum(axis=1, keepdims=True), atol=1e-6)
    assert found.labels_.tolist() == squared.argmin(axis=1).tolist()
    assert found.inertia_ == pytest.approx(squared.min(axis=1).sum(), rel=1e-6)


def test_temperature_zero_is_one_hot_and_a_tiny_one_finite():
    rows, _ = blobs()
    hard = KMeans(n_clusters=4, temperature=0.0).fit(rows)
    assert np.array_equal(hard.probabilities_, np.eye(4, dtype=np.float32)[hard.labels_])
    nearly = KMeans(n_clusters=4, temperature=1e-12).fit(rows)
    np.testing.assert_array_equal(nearly.probabilities_, hard.probabilities_)


def test_predict_agrees_with_fit_in_blocks(monkeypatch):
    rows, _ = blobs()
    found = KMeans(n_clusters=4).fit(rows)
    monkeypatch.setattr(module, "_DISTANCES", 28)
    assert found.predict(rows).tolist() == found.labels_.tolist()
    np.testing.assert_allclose(found.predict_proba(rows), found.probabilities_, atol=1e-7)
    assert len(found.predict(rows[:1])) == 1
    assert KMeans(n_clusters=4).fit_predict(rows).tolist() == found.labels_.tolist()


def test_embeddings_read_only_and_whole_numbers():
    rows, _ = blobs()
    expected = KMeans(n_clusters=4).fit(rows).labels_.tolist()
    assert KMeans(n_clusters=4).fit(Embeddings(rows, [str(i) for i in range(120)])).labels_.tolist() == expected
    rows.flags.writeable = False
    assert KMeans(n_clusters=4).fit(rows).labels_.tolist() == expected
    assert KMeans(n_clusters=2).fit(np.array([[1, 0], [0, 1], [3, 0]])).labels_.shape == (3,)


def test_input_is_left_as_it_was():
    rows, _ = blobs()
    before = rows.copy()
    for normalize in (True, False):
        KMeans(n_clusters=4, normalize=normalize).fit(rows)
        assert np.array_equal(rows, before)


def test_same_seed_same_result():
    rows = np.random.default_rng(0).standard_normal((300, 8))
    first, second = (KMeans(n_clusters=6, random_state=4, n_init=1).fit(rows) for _ in range(2))
    assert np.array_equal(first.labels_, second.labels_)
    assert np.array_equal(first.cluster_centers_, second.cluster_centers_)


def test_estimator_contract():
    estimator = KMeans(n_clusters=7, normalize=False, temperature=0.5)
    assert clone(estimator).get_params() == estimator.get_params()
    assert estimator.get_params()["n_clusters"] == 7
    assert clone(estimator).set_params(n_init=2).n_init == 2
    assert "n_clusters=7" in repr(estimator)
    with pytest.raises(NotFittedError):
        estimator.predict(np.ones((2, 2)))


def test_degenerate_rows():
    assert KMeans(n_clusters=1).fit(np.ones((5, 2))).labels_.tolist() == [0] * 5
    rows = np.array([[0.0, 0], [1, 0], [1e-200, 0], [0, 1]])
    found = KMeans(n_clusters=2, n_init=1).fit(rows)
    assert found.labels_[1] == found.labels_[2]
    assert np.isfinite(found.probabilities_).all()
    each = KMeans(n_clusters=4, normalize=False).fit(np.arange(8.0).reshape(4, 2))
    assert sorted(each.labels_) == [0, 1, 2, 3]


def test_fewer_distinct_rows_than_clusters_is_said_once():
    rows = np.repeat(np.eye(2), 10, axis=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = KMeans(n_clusters=5).fit(rows)
    assert [warning.category for warning in caught] == [CollapseWarning]
    assert "filled only 2 of n_clusters=5 clusters" in str(caught[0].message)
    assert len(set(found.labels_.tolist())) == 2
    assert found.probabilities_.shape == (20, 5)


@pytest.mark.parametrize(("options", "says"), [
    ({"n_clusters": 20}, "n_clusters=20 needs at least 20 images, got 12. hint: lower n_clusters or add images"),
    ({"n_clusters": 0}, "n_clusters must be at least 1, got 0"),
    ({"n_init": 0}, "n_init must be at least 1"),
    ({"n_iterations": 0}, "n_iterations must be at least 1"),
    ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    ({"spherical": True, "normalize": False}, "spherical k-means needs rows of length 1. hint: set normalize=True, or "
                                              "spherical=False"),
    ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
])
def test_options_that_cannot_be(options, says):
    with pytest.raises(InputError, match=says):
        KMeans(**{"n_clusters": 3} | options).fit(np.random.default_rng(0).standard_normal((12, 3)))
    told = [str(fault) for fault in KMeans(**{"n_clusters": 3} | options).option_faults()]
    assert told == ([] if "images" in says else [says] if "got" in says or "hint" in says else [f"{says}, got 0"])


def test_embeddings_that_cannot_be():
    rows = np.ones((4, 2))
    rows[2, 0] = np.nan
    with pytest.raises(InputError, match="row 2"):
        KMeans(n_clusters=2).fit(rows)
    fitted = KMeans(n_clusters=2).fit(np.eye(2))
    with pytest.raises(InputError, match="embeddings of 3 features do not fit centers of 2"):
        fitted.predict(np.ones((1, 3)))


def test_the_baseline_on_digits():
    """scikit-learn's digits, pixels as they are: the number every method on them has to beat."""
    pixels, true = load_digits(return_X_y=True)
    found = KMeans(n_clusters=10, normalize=False).fit(pixels)
    assert hungarian_accuracy(true, found.labels_) == pytest.approx(0.793, abs=0.005)
    assert nmi(true, found.labels_) == pytest.approx(0.742, abs=0.005)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_linear_head_gives_the_same_probabilities(normalize):
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    fitted = KMeans(n_clusters=4, normalize=normalize, temperature=0.3).fit(rows)
    seen = rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows
    found = fitted.as_linear().probabilities(torch.from_numpy(seen))[:, 0].detach().numpy()
    np.testing.assert_allclose(found, fitted.probabilities_, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"spherical": True}], ids=str)
@pytest.mark.parametrize("widths", [(6,), (2, 4)])
def test_parts_give_raw_embeddings_the_same_probabilities(options, widths):
    rows = (3 + np.random.default_rng(0).normal(size=(50, 6))).astype(np.float32)
    fitted = KMeans(n_clusters=4, temperature=0.3, **options).fit(Embeddings(rows, [str(i) for i in range(50)], widths))
    projection, heads = fitted.as_parts()
    with torch.no_grad():
        found = ClusterNet(nn.Identity(), heads, projection).probabilities(torch.from_numpy(rows))[:, 0].numpy()
    np.testing.assert_allclose(found, fitted.probabilities_, atol=1e-5)
    assert fitted.n_features_in_ == 6


def test_two_spaces_count_alike_whatever_their_scale():
    rows, groups = blobs()
    noise = 1000 * np.random.default_rng(1).normal(size=(120, 3))
    fitted = KMeans(n_clusters=4).fit([rows, noise])
    again = KMeans(n_clusters=4).fit([7 * rows, noise / 1000])
    assert same_partition(fitted.labels_, again.labels_)
    assert not same_partition(KMeans(n_clusters=4, normalize=False).fit([rows, noise]).labels_, groups)
    with pytest.raises(InputError, match="embeddings of 3 and 4 features do not fit centers of 4 and 3"):
        fitted.predict([noise, rows])


# ── spherical ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spherical_centers_have_length_1_and_are_what_their_rows_point_to(dtype):
    rows = np.random.default_rng(0).normal(size=(200, 5)).astype(dtype)
    fitted = KMeans(n_clusters=6, spherical=True, n_init=2).fit(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ fitted.cluster_centers_.T
    assert fitted.cluster_centers_.dtype == dtype
    assert fitted.labels_.tolist() == cosines.argmax(axis=1).tolist()
    assert fitted.inertia_ == pytest.approx((2 - 2 * cosines.max(axis=1)).sum(), rel=1e-5)
    for c, center in enumerate(fitted.cluster_centers_):
        towards = unit[fitted.labels_ == c].sum(axis=0)
        np.testing.assert_allclose(center, towards / np.linalg.norm(towards), atol=1e-5)


def test_spherical_keeps_the_best_start_and_does_not_depend_on_blocks(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(200, 5))
    sums = [KMeans(n_clusters=6, spherical=True, n_init=n).fit(rows).inertia_ for n in (1, 3, 20)]
    assert sums[0] >= sums[1] >= sums[2] and sums[0] > sums[2]
    whole = KMeans(n_clusters=6, spherical=True, n_init=1).fit(rows)
    monkeypatch.setattr(module, "_DISTANCES", 100)
    parts = KMeans(n_clusters=6, spherical=True, n_init=1).fit(rows)
    assert np.array_equal(parts.labels_, whole.labels_)
    np.testing.assert_allclose(parts.cluster_centers_, whole.cluster_centers_)


def test_a_spherical_center_that_lost_its_rows_goes_to_the_farthest():
    rows = np.array([[1.0, 0], [1, 0], [0.6, 0.8]])
    start = np.array([[1.0, 0], [-1, 0]])  # nobody is nearest to the second
    centers, total = spherical_centers(rows, start, n_iterations=10)
    np.testing.assert_allclose(centers, [[1, 0], [0.6, 0.8]], atol=1e-12)
    assert total == pytest.approx(0, abs=1e-12)


def test_spherical_recovers_directions_and_says_when_clusters_are_empty():
    rows, groups = blobs()
    assert same_partition(KMeans(n_clusters=4, spherical=True).fit(rows).labels_, groups)
    assert KMeans(n_clusters=1, spherical=True).fit(np.ones((5, 2))).labels_.tolist() == [0] * 5
    with pytest.warns(CollapseWarning, match="filled only 2 of n_clusters=5"):
        found = KMeans(n_clusters=5, spherical=True).fit(np.repeat(np.eye(2), 10, axis=0))
    assert np.isfinite(found.probabilities_).all()
    assert np.isfinite(KMeans(n_clusters=2, spherical=True).fit(np.array([[0.0, 0], [1, 0], [0, 1]])).inertia_)
