"""k-reciprocal re-ranking: equal to the dense loops, the same whatever the blocks, degenerate rows included."""

import numpy as np
import pytest

import naive
from phyla import progress, reciprocal
from phyla.errors import InputError
from phyla.neighbors import find_neighbors
from phyla.reciprocal import rerank
from phyla.types import Embeddings


def rows(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def same(first, second) -> bool:
    return np.array_equal(first.indices, second.indices) and np.array_equal(first.similarities, second.similarities)


@pytest.mark.parametrize(("n", "k1", "k2"), [(40, 8, 3), (40, 20, 6), (30, 5, 1), (25, 1, 4), (30, 3, 12), (12, 20, 6),
                                             (12, 40, 30), (20, 1, 1), (30, 15, 2)])
def test_it_is_the_dense_loops(n, k1, k2):
    values = rows(n, seed=n + k1)
    found = rerank(values, 9, k1=k1, k2=k2)
    indices, similarities = naive.reranked(values, 9, k1=k1, k2=k2)
    np.testing.assert_allclose(found.similarities, similarities, rtol=1e-6, atol=1e-7)
    # Nearly equal overlaps may change places only where rounding to float32 makes them equal.
    for ours, theirs, near in zip(found.indices.tolist(), indices, similarities, strict=True):
        swapped = [a for a, b in zip(ours, theirs, strict=True) if a != b]
        assert not swapped or np.diff(near).max() > -1e-7, (ours, theirs, near)
    assert found.indices.dtype == np.int64 and found.similarities.dtype == np.float32


def test_published_sizes_are_the_defaults():
    values = rows(60)
    assert same(rerank(values, 10), rerank(values, 10, k1=20, k2=6))


def test_four_points_by_hand():
    # 0 and 1 are each other's nearest, and so are 2 and 3: with k1 = 2 and k2 = 1 each neighborhood is one pair.
    angle = np.array([0.0, 0.1, 1.0, 1.2])
    values = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    found = rerank(values, 3, k1=2, k2=1)
    assert found.indices.tolist() == [[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]]
    for pair, apart in (((0, 1), 0.1), ((2, 3), 0.2)):
        far = np.exp(-2 + 2 * np.cos(apart))  # weights 1 / (1 + far) on itself, far / (1 + far) on the other
        shared = 2 * min(1, far) / (1 + far)
        for i in pair:
            assert found.similarities[i].tolist() == pytest.approx([shared / (2 - shared), 0, 0], rel=1e-6)


def test_an_image_that_all_find_near_falls_back():
    """A hub in the middle is the nearest of every image, and is not near them by whom it finds near itself."""
    center = 0.4**0.5 * np.eye(4)[np.repeat(np.arange(4), 6)]
    common = np.full((24, 1), 0.6**0.5)
    values = np.concatenate([center, common, np.eye(24)], axis=1)  # each image has a direction of its own
    values = np.concatenate([values, np.concatenate([np.full(4, 0.1 * 0.4**0.5), [0.6**0.5], np.zeros(24)])[None]])
    plain, again = find_neighbors(values, 6), rerank(values, 6, k1=6, k2=2)
    assert (plain.indices[:24, 0] == 24).all()
    assert np.mean(again.indices[:24, 0] == 24) < 0.3


def test_result_does_not_depend_on_the_blocks(monkeypatch):
    values = rows(150, 8)
    values[::5] = values[0]
    expected = rerank(values, 12)
    for size in (1, 700, 10_000):
        monkeypatch.setattr(reciprocal, "_PAIRS", size)
        monkeypatch.setattr(reciprocal, "_VALUES", size)
        assert same(rerank(values, 12), expected)


def test_duplicates_rows_of_zeros_and_length_are_no_trouble():
    values = np.concatenate([np.repeat(rows(3), 30, axis=0), np.zeros((2, 5))])
    found = rerank(values, 25)
    own = np.arange(92)[:, None]
    assert not (found.indices == own).any() and np.isfinite(found.similarities).all()
    assert all(len(set(row)) == 25 for row in found.indices.tolist())
    assert (found.indices[:90] // 30 == own[:90] // 30).all(), "the 29 equal rows come before all others"
    assert (np.diff(found.similarities, axis=1) <= 0).all() and found.similarities.max() <= 1
    assert same(rerank(np.ones((50, 3)), 6), rerank(np.ones((50, 3)), 6))
    lengths = np.random.default_rng(1).uniform(0.1, 9, (60, 1))
    scaled = rerank(rows(60) * lengths * 1e200, 8)
    np.testing.assert_allclose(scaled.similarities, rerank(rows(60), 8).similarities, atol=1e-6)


def test_whole_numbers_of_few_values_give_valid_neighbors():
    for seed in range(8):
        values = np.random.default_rng(seed).integers(-1, 2, (35, 3)).astype(np.float32)
        found = rerank(values, 34)
        assert all(sorted([i, *row]) == list(range(35)) for i, row in enumerate(found.indices.tolist()))
        assert (np.diff(found.similarities, axis=1) <= 0).all()


def test_where_too_few_overlap_the_first_order_fills_up():
    values = np.concatenate([rows(10, 3) * 0.01 + np.eye(3)[g] for g in range(3)])
    found, first = rerank(values, 29, k1=4, k2=1), find_neighbors(values, 29)
    for i in range(30):
        nothing = found.similarities[i] == 0
        assert nothing.any()
        shared = set(found.indices[i][~nothing].tolist())
        assert found.indices[i][nothing].tolist() == [j for j in first.indices[i].tolist() if j not in shared]


def test_work_and_memory_grow_with_the_shared_entries_and_not_with_all_pairs_of_images(monkeypatch):
    """Of 40 x as many images in neighborhoods of the same size, the blocks become 40 x as many, not 1,600 x."""
    blocks = []
    made = reciprocal._shares

    def counted(*asked):
        shares = made(*asked)
        blocks.append((asked[0].nnz, asked[3] - asked[2], shares.nnz))
        return shares

    monkeypatch.setattr(reciprocal, "_shares", counted)
    monkeypatch.setattr(reciprocal, "_PAIRS", 20_000)
    for n in (100, 4000):
        blocks.clear()
        groups = np.eye(n // 10).repeat(10, axis=0) if n <= 100 else rows(n // 10, 60).repeat(10, axis=0)
        rerank((groups + 0.01 * rows(n, groups.shape[1], seed=1)).astype(np.float32), 5, k1=8, k2=3)
        assert blocks[0][0] < n * 12, "a row has its neighborhood alone"
        assert max(nnz for *_, nnz in blocks) <= 20_000 and sum(size for _, size, _ in blocks) == n
        assert len(blocks) <= 1 + n * 12 * 12 // 15_000


def test_embeddings_and_progress():
    class Seen:
        def start(self, description, total, unit, done):
            self.total, self.unit, self.done = total, unit, 0
            return self

        def advance(self, n=1, note=""):
            self.done += n

        def stop(self, bar):
            pass

    values = rows(30).astype(np.float32)
    seen = Seen()
    with progress.shown_by(seen):
        found = rerank(Embeddings(values, [str(i) for i in range(30)]), 4)
    assert (seen.total, seen.done, seen.unit) == (30, 30, "image")
    assert same(found, rerank(values, 4))


@pytest.mark.parametrize(("options", "says"), [
    ({"n_neighbors": 0}, "n_neighbors must be at least 1, got 0"), ({"k1": 0}, "k1 must be at least 1, got 0"),
    ({"k2": -2}, "k2 must be at least 1, got -2"),
    ({"n_neighbors": 30}, "n_neighbors=30 needs at least 31 images, got 30"),
])
def test_counts_that_cannot_be(options, says):
    with pytest.raises(InputError, match=says):
        rerank(rows(30), **({"n_neighbors": 3} | options))


def test_values_that_cannot_be():
    values = rows(30)
    values[4, 1] = np.nan
    with pytest.raises(InputError, match="row 4"):
        rerank(values, 3)
    with pytest.raises(InputError, match="n_neighbors=1 needs at least 2 images, got 1"):
        rerank(values[:1], 1)
