"""The tree over a run's clusters: nested cuts, the run's own level, heads that give the cuts, and files."""

import numpy as np
import pytest
import torch

from phyla.centers import ward
from phyla.errors import CorruptFileError, InputError
from phyla.mergetree import MergeTree, merge_tree
from phyla.nets.heads import ClusterHeads, MixtureHeads, NestedHeads, build_heads
from phyla.types import Assignment

draws = np.random.default_rng(0)
LABELS = np.sort(draws.integers(4, size=200))
CENTERS = 4 * draws.normal(size=(4, 8))
ROWS = (CENTERS[LABELS] + draws.normal(size=(200, 8))).astype(np.float32)


def linear_heads() -> ClusterHeads:
    heads = ClusterHeads(8, 4)
    heads.weight.data = torch.from_numpy(CENTERS.astype(np.float32))[None]
    heads.bias.data = -torch.from_numpy(np.square(CENTERS).sum(axis=1).astype(np.float32))[None] / 2
    return heads


def found(heads: ClusterHeads | MixtureHeads | NestedHeads) -> np.ndarray:
    with torch.no_grad():
        return heads.probabilities(torch.from_numpy(ROWS))[:, 0].numpy()


OWN = found(linear_heads())
TREE = merge_tree(OWN, ROWS)


def test_the_runs_number_is_the_run():
    assert (TREE.n_clusters, TREE.n_leaves) == (4, 16)
    np.testing.assert_array_equal(TREE.cut(4), TREE.parents)
    np.testing.assert_array_equal(TREE.cut(4)[TREE.leaves], OWN.argmax(axis=1))
    np.testing.assert_array_equal(TREE.merged(4), np.arange(4))
    heads = linear_heads()
    assert TREE.heads(heads, 4) is heads


def test_every_cut_has_its_number_and_is_nested_in_the_coarser():
    for n in range(1, TREE.n_leaves + 1):
        groups = TREE.cut(n)
        assert groups.dtype == np.int64 and np.unique(groups).tolist() == list(range(n))
        if n > 1:
            assert len(set(zip(groups.tolist(), TREE.cut(n - 1).tolist(), strict=True))) == n
    assert (np.diff(TREE.heights) >= 0).all()


def test_groups_are_numbered_in_the_order_of_the_clusters():
    for n in range(4, 17):
        clusters = [TREE.parents[TREE.cut(n) == group] for group in range(n)]
        assert all(len(set(own.tolist())) == 1 for own in clusters)  # more classes: each inside one cluster
        firsts = [int(own[0]) for own in clusters]
        assert firsts == sorted(firsts)


def test_labels_alone_merge_by_wards_rule():
    tree = merge_tree(LABELS, ROWS)
    means = np.stack([ROWS[c == LABELS].mean(axis=0) for c in range(4)])
    theirs = ward(means, np.bincount(LABELS))
    for n in (2, 3):
        np.testing.assert_array_equal(tree.merged(n), theirs.cut(n))


def test_clusters_that_are_mixed_up_merge_first():
    rows = np.repeat(np.array([[0.0, 0], [0, 3], [3, 0]]), 40, axis=0) + 0.1 * draws.normal(size=(120, 2))
    sure = np.eye(3, dtype=np.float32)[np.repeat([0, 1, 2], 40)]
    mixed = sure.copy()
    mixed[40:] = [0.02, 0.49, 0.49]
    mixed[40:80, 1] += 0.01
    mixed[40:80, 2] -= 0.01
    mixed[80:, 2] += 0.01
    mixed[80:, 1] -= 0.01
    assert merge_tree(mixed, rows).merged(2).tolist() == [0, 1, 1]  # the two that are farthest apart


def test_leaves_go_where_the_spread_is():
    rows = np.concatenate([draws.normal(size=(100, 3)), 100 + 0.001 * draws.normal(size=(100, 3))])
    tree = merge_tree(np.repeat([0, 1], 100), rows, n_leaves=6)
    assert np.bincount(tree.parents).tolist() == [5, 1]


def test_an_image_is_in_the_nearest_leaf_of_its_cluster():
    for row, leaf in zip(ROWS, TREE.leaves, strict=True):
        own = np.flatnonzero(TREE.parents == TREE.parents[leaf])
        assert leaf == own[np.square(row - TREE.centers[own]).sum(axis=1).argmin()]


@pytest.mark.parametrize("n_clusters", [1, 2, 3])
def test_fewer_classes_are_exact_sums(n_clusters):
    heads = TREE.heads(linear_heads(), n_clusters)
    groups = TREE.merged(n_clusters)
    expected = np.stack([OWN[:, groups == g].sum(axis=1) for g in range(n_clusters)], axis=1)
    np.testing.assert_allclose(found(heads), expected, atol=1e-6)


def test_fewer_classes_of_a_mixture_are_exact_sums():
    own = MixtureHeads(8, 5, 2, groups=[0, 1, 2, 3, 3])
    torch.nn.init.normal_(own.weight, generator=torch.Generator().manual_seed(0))
    p = found(own)
    tree = merge_tree(p, ROWS)
    groups = tree.merged(2)
    expected = np.stack([p[:, groups == g].sum(axis=1) for g in range(2)], axis=1)
    np.testing.assert_allclose(found(tree.heads(own, 2)), expected, atol=1e-6)


@pytest.mark.parametrize("n_clusters", [5, 9, 16])
def test_more_classes_share_their_clusters_probability_exactly(n_clusters):
    heads = TREE.heads(linear_heads(), n_clusters)
    p, groups = found(heads), TREE.cut(n_clusters)
    parents = np.array([TREE.parents[groups == g][0] for g in range(n_clusters)])
    summed = np.stack([p[:, parents == c].sum(axis=1) for c in range(4)], axis=1)
    np.testing.assert_allclose(summed, OWN, atol=1e-6)
    assert np.mean(p.argmax(axis=1) == groups[TREE.leaves]) > 0.97


def test_nested_heads_are_the_formula():
    heads = TREE.heads(linear_heads(), 16)
    near = -np.square(ROWS[:, None].astype(np.float64) - TREE.centers).sum(axis=2) / (2 * TREE.temperature)
    expected = np.empty_like(near)
    for c in range(4):
        own = TREE.parents == c
        e = np.exp(near[:, own] - near[:, own].max(axis=1, keepdims=True))
        expected[:, own] = OWN[:, [c]] * e / e.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found(heads), expected, atol=1e-3)


def test_nested_heads_come_back_from_their_spec():
    heads = TREE.heads(linear_heads(), 9)
    other = build_heads(heads.spec())
    other.load_state_dict(heads.state_dict())
    assert isinstance(other, NestedHeads) and other.n_clusters == 9
    np.testing.assert_array_equal(found(other), found(heads))
    np.testing.assert_array_equal(found(heads.only(0)), found(heads))


@pytest.mark.parametrize(("parents", "groups"), [([0, 1, 2], None), ([0, 1, 3, 2], None), ([0, 1, 2, 3], [0, 0, 2, 2])])
def test_nested_heads_refuse_leaves_of_other_clusters(parents, groups):
    with pytest.raises(InputError):
        NestedHeads(linear_heads().spec(), parents, groups)


def test_a_tree_comes_back_from_its_file(tmp_path):
    TREE.save(tmp_path / "tree.npz")
    other = MergeTree.load(tmp_path / "tree.npz")
    for name in ("parents", "leaves", "centers", "merges", "heights"):
        np.testing.assert_array_equal(getattr(other, name), getattr(TREE, name))
    assert other.temperature == TREE.temperature
    assert [path.name for path in tmp_path.iterdir()] == ["tree.npz"]


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_damaged_file_is_told(tmp_path, content):
    path = tmp_path / "tree.npz"
    if content is None:
        np.savez(path, parents=np.array([0, 2]), leaves=np.zeros(1, int), centers=np.zeros((2, 1)),
                 merges=np.zeros((1, 2), int), heights=np.zeros(1), temperature=1.0)
    else:
        path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="holds no tree"):
        MergeTree.load(path)


@pytest.mark.parametrize("n_clusters", [0, 17])
def test_numbers_without_a_cut_are_refused(n_clusters):
    with pytest.raises(InputError, match="1 to 16 classes"):
        TREE.cut(n_clusters)


def test_an_empty_cluster_and_one_of_two_images_have_one_leaf():
    p = np.zeros((42, 3), np.float32)
    p[:40, 0], p[40:, 2] = 1, 1
    tree = merge_tree(Assignment(p, [str(i) for i in range(42)]), ROWS[:42], n_leaves=8)
    assert np.bincount(tree.parents).tolist() == [6, 1, 1]
    assert np.isfinite(tree.centers).all() and np.isfinite(tree.heights).all()
    assert all(len(np.unique(tree.cut(n))) == n for n in range(1, 9))


def test_duplicates_are_not_split_and_one_cluster_can_be():
    assert merge_tree(np.zeros(50, np.int64), np.ones((50, 3))).n_leaves == 1
    assert merge_tree(np.zeros(200, np.int64), ROWS).n_leaves == 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="do not fit"):
        merge_tree(LABELS[:-1], ROWS)
    with pytest.raises(InputError, match="less than the 4 clusters"):
        merge_tree(LABELS, ROWS, n_leaves=3)
    with pytest.raises(InputError, match="probabilities must be"):
        merge_tree(np.array(["a"] * 200), ROWS)
    with pytest.raises(InputError, match="heads of the run"):
        TREE.heads(ClusterHeads(8, 5), 3)
