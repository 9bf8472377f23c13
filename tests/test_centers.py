"""k-means of many tries and Ward's tree: against SciPy and scikit-learn, and what must hold of any rows."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import KMeans as LloydKMeans
from sklearn.decomposition import PCA

from phyla.centers import lloyd, nearest, rotated, small_clusters, ward

draws = np.random.default_rng(0)
ROWS = (draws.normal(size=(6, 5))[draws.integers(6, size=120)] + 0.3 * draws.normal(size=(120, 5))).astype(np.float32)


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


@pytest.mark.parametrize("n_axes", [2, 5, 9])
def test_rotated_rows_are_the_principal_components(n_axes):
    ours = rotated(torch.from_numpy(ROWS), n_axes).numpy()
    theirs = PCA(min(n_axes, 5)).fit_transform(ROWS)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)


def test_rotation_of_many_axes_finds_the_first():
    wide = np.random.default_rng(1).normal(size=(300, 200)) * np.r_[9, 7, 5, np.full(197, 0.5)]
    ours = rotated(torch.from_numpy(wide), 3).numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(PCA(3, svd_solver="full").fit_transform(wide)), atol=1e-2)


def test_lloyd_is_scikit_learns_from_the_same_starts_in_every_try():
    starts = torch.from_numpy(np.stack([ROWS[:4], ROWS[10:14]]))
    found = lloyd(torch.from_numpy(ROWS), starts, n_iterations=100)
    for at in range(2):
        theirs = LloydKMeans(4, init=starts[at].numpy(), n_init=1, tol=0).fit(ROWS)
        assert same_partition(found.labels[at].numpy(), theirs.labels_)
        assert float(found.inertia[at]) == pytest.approx(theirs.inertia_, rel=1e-4)
    assert found.best == int(found.inertia.argmin())


def test_a_center_without_rows_stays_where_it_was():
    far = torch.tensor([[[0.0, 0], [50, 50]]])
    found = lloyd(torch.zeros(5, 2), far)
    assert found.labels.tolist() == [[0] * 5] and found.centers[0, 1].tolist() == [50, 50]


def test_nearest_is_the_smallest_distance():
    centers = torch.from_numpy(ROWS[:3])
    labels, _ = nearest(torch.from_numpy(ROWS), centers[None])
    assert labels[0].tolist() == np.square(ROWS[:, None] - ROWS[None, :3]).sum(axis=2).argmin(axis=1).tolist()


def test_the_tree_is_scipys_where_every_cluster_is_one_row():
    points = ROWS[:40].astype(np.float64)
    tree = ward(points, np.ones(40))
    theirs = linkage(points, "ward")
    np.testing.assert_allclose(tree.heights, theirs[:, 2] ** 2 / 2, rtol=1e-9)
    for n_clusters in (1, 2, 3, 7, 20, 40):
        assert same_partition(tree.cut(n_clusters), fcluster(theirs, n_clusters, "maxclust"))
        groups = tree.cut(n_clusters)
        means = np.stack([points[groups == g].mean(axis=0) for g in range(n_clusters)])
        np.testing.assert_allclose(tree.means(n_clusters), means)


def test_sizes_count_as_so_many_rows():
    points, sizes = ROWS[:8].astype(np.float64), np.array([1, 2, 3, 1, 1, 4, 1, 2])
    tree, whole = ward(points, sizes), ward(np.repeat(points, sizes, axis=0), np.ones(sizes.sum()))
    np.testing.assert_allclose(tree.heights, whole.heights[-7:], rtol=1e-9)


def test_cuts_are_nested():
    tree = ward(ROWS[:30].astype(np.float64), np.ones(30))
    for n in range(1, 30):
        coarse, fine = tree.cut(n), tree.cut(n + 1)
        assert len(set(zip(fine.tolist(), coarse.tolist(), strict=True))) == n + 1


def test_small_clusters_of_a_seed_are_the_same_and_far_apart_rows_are_found():
    corners = torch.from_numpy(np.repeat(100 * np.eye(7), 9, axis=0).astype(np.float32))
    first, second = (small_clusters(corners, 7, seed=3) for _ in range(2))
    assert torch.equal(first.labels, second.labels) and float(first.inertia[0]) == 0.0
    assert len(first.labels[0].unique()) == 7


def test_more_small_clusters_than_distinct_rows_leave_some_empty():
    found = small_clusters(torch.ones(6, 3), 4, seed=0)
    assert len(found.labels[0].unique()) == 1 and bool(found.centers.isfinite().all())
