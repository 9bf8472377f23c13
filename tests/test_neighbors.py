"""The nearest others: exact, the same whatever the block, duplicates and degenerate rows included."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import naive
from phyla import neighbors as module
from phyla import progress
from phyla.errors import InputError
from phyla.neighbors import check_embeddings, find_in_bank, find_neighbors
from phyla.types import Embeddings


def rows(n: int, d: int = 6, seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def same(first, second) -> bool:
    return np.array_equal(first.indices, second.indices) and np.array_equal(first.similarities, second.similarities)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_neighbors_are_the_sorted_loops(block):
    values = rows(60)
    found = find_neighbors(values, 9, block=block)
    indices, similarities = naive.neighbors(values, 9)
    assert found.indices.tolist() == indices
    np.testing.assert_allclose(found.similarities, similarities, rtol=1e-12, atol=1e-14)
    assert found.indices.dtype == np.int64
    assert found.similarities.dtype == np.float64


def test_inner_product_without_normalizing():
    values = rows(40) * np.random.default_rng(1).uniform(0.1, 9, (40, 1))
    indices, similarities = naive.neighbors(values, 5, normalize=False)
    found = find_neighbors(values, 5, normalize=False)
    assert found.indices.tolist() == indices
    np.testing.assert_allclose(found.similarities, similarities, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, ">f4"])
def test_other_numbers_are_searched_in_float32(dtype):
    values = (rows(50) * 100).astype(dtype)
    found = find_neighbors(values, 4)
    assert found.similarities.dtype == np.float32
    np.testing.assert_allclose(found.similarities, naive.neighbors(values.astype(float), 4)[1], atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("shift", "block"), [(0.0, 1024), (30.0, 7), (1000.0, 64)])
def test_euclidean_neighbors_are_the_sorted_distances(normalize, shift, block):
    values = rows(300) * np.random.default_rng(1).uniform(0.1, 3, (300, 1)) + shift
    values[5], values[200] = 0.0, values[3]
    found = find_neighbors(values, 8, normalize=normalize, metric="euclidean", block=block)
    seen = np.array([naive.unit(row) for row in values]) if normalize else values
    apart = np.square(seen[:, None] - seen[None]).sum(axis=2)
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_allclose(found.similarities, -np.sort(apart, axis=1)[:, :8] / 2, rtol=1e-6, atol=1e-13)
    np.testing.assert_allclose(np.take_along_axis(apart, found.indices, axis=1), -2 * found.similarities, rtol=1e-6,
                               atol=1e-13)
    assert found.indices[3, 0] == 200 and found.indices[200, 0] == 3


def test_euclidean_order_of_unit_rows_is_that_of_the_cosine():
    values = rows(90, 12)
    cosine, distance = find_neighbors(values, 7), find_neighbors(values, 7, metric="euclidean")
    assert np.array_equal(cosine.indices, distance.indices)
    np.testing.assert_allclose(distance.similarities, cosine.similarities - 1, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_euclidean_distances_are_exact_where_products_are_not(dtype):
    """Far from the origin a product in float32 has lost what tells the rows apart; the second look has not."""
    steps = np.array([0, 1, 3, 6, 10, 15], dtype)[:, None] / 64
    values = np.concatenate([np.full((6, 3), 4096, dtype), steps], axis=1)
    found = find_neighbors(np.repeat(values, 20, axis=0), 20, normalize=False, metric="euclidean")
    assert (found.indices[:, :19] // 20 == np.arange(120)[:, None] // 20).all(), "exact duplicates first"
    assert (found.similarities[:, :19] == 0).all()
    assert (found.indices[::20, 19] // 20).tolist() == [1, 0, 1, 2, 3, 4]
    assert found.similarities[::20, 19].tolist() == [-0.5 * (d / 64) ** 2 for d in (1, 1, 2, 3, 4, 5)]
    assert found.indices[0].tolist() == [*range(1, 20), 20] and found.indices[21, :2].tolist() == [20, 22]
    near = find_neighbors(values, 5, normalize=False, metric="euclidean", block=1)
    assert near.indices[0].tolist() == [1, 2, 3, 4, 5] and near.indices[2].tolist() == [1, 0, 3, 4, 5]


@pytest.mark.usefixtures("unchecked")
def test_unknown_metric():
    with pytest.raises(InputError, match="did you mean euclidean"):
        find_neighbors(rows(10), 2, metric="euclid")


def test_four_points_by_hand():
    values = np.array([[2.0, 0], [0, 3], [1, 1], [-1, 0]])
    found = find_neighbors(values, 3)
    assert found.indices.tolist() == [[2, 1, 3], [2, 0, 3], [0, 1, 3], [1, 2, 0]]
    half = 0.5**0.5
    expected = [[half, 0, -1], [half, 0, 0], [half, half, -half], [0, -half, -1]]
    np.testing.assert_allclose(found.similarities, expected, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_result_does_not_depend_on_the_block(dtype):
    values = rows(120, 17, dtype=dtype)
    values[::3] = values[0]  # 40 exact duplicates, more than candidates are kept
    values[7::50] = 0
    expected = find_neighbors(values, 12)
    for block in (1, 13, 119):
        assert same(find_neighbors(values, 12, block=block), expected)


def test_coarse_products_change_nothing(monkeypatch):
    """As on a device where matrix products are allowed in a short format: only the time may differ."""
    values = rows(300, 17, dtype=np.float32)
    expected = find_neighbors(values, 12)

    def coarse(a, b, *, out):
        out.copy_((a * 8).round() @ (b * 8).round() / 64)

    monkeypatch.setattr(torch, "mm", coarse)
    assert same(find_neighbors(values, 12, block=50), expected)


def test_many_columns_take_the_grouped_way():
    values = rows(2000, 8, dtype=np.float32)
    found = find_neighbors(values, 5)
    similar = values.astype(float) / np.linalg.norm(values.astype(float), axis=1, keepdims=True)
    similar = similar @ similar.T
    np.fill_diagonal(similar, -np.inf)
    np.testing.assert_allclose(found.similarities, -np.sort(-similar, axis=1)[:, :5], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(similar, found.indices, axis=1), found.similarities, atol=1e-6)


def test_duplicates_keep_their_order_and_never_find_themselves():
    values = np.repeat(rows(3, dtype=np.float32), 40, axis=0)[np.random.default_rng(2).permutation(120)]
    found = find_neighbors(values, 39, block=16)
    for i in range(len(values)):
        twins = [j for j in range(len(values)) if j != i and np.array_equal(values[i], values[j])]
        assert found.indices[i].tolist() == twins
    np.testing.assert_allclose(found.similarities, 1, atol=1e-6)


def test_all_rows_equal():
    found = find_neighbors(np.ones((50, 3), np.float32), 3)
    assert found.indices[:5].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]


def test_rows_of_length_zero():
    values = np.array([[0.0, 0], [1, 0], [-1, 0.1], [0, 0]])
    found = find_neighbors(values, 3)
    assert found.indices[0].tolist() == [1, 2, 3]
    assert found.similarities[0].tolist() == [0, 0, 0]
    assert found.indices[1].tolist() == [0, 3, 2]
    assert np.isfinite(found.similarities).all()


@pytest.mark.parametrize(("scale", "dtype"), [(1e-30, np.float32), (1e37, np.float32), (1e200, np.float64)])
def test_length_does_not_matter(scale, dtype):
    values = rows(80, dtype=dtype)
    lengths = (np.random.default_rng(3).uniform(1, 9, (80, 1)) * scale).astype(dtype)
    expected = naive.neighbors(values, 6)[1]
    np.testing.assert_allclose(find_neighbors(values * lengths, 6).similarities, expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_coarse_grids_of_ties(n, d, seed, data):
    """Whole numbers of few values: ties and duplicates everywhere, equal to rounding but not always bit by bit."""
    values = np.random.default_rng(seed).integers(-1, 2, (n, d)).astype(np.float32)
    k = data.draw(st.integers(1, n - 1))
    block = data.draw(st.integers(1, n + 1))
    found = find_neighbors(values, k, block=block)
    np.testing.assert_allclose(found.similarities, naive.neighbors(values, k)[1], atol=1e-6)
    own = np.arange(n)[:, None]
    assert not (found.indices == own).any()
    assert all(len(set(row)) == k for row in found.indices.tolist())
    falling = np.diff(found.similarities, axis=1)
    assert (falling <= 0).all()
    assert (np.diff(found.indices, axis=1)[falling == 0] > 0).all()
    assert same(found, find_neighbors(values, k))


def test_every_other_image_may_be_wanted():
    found = find_neighbors(rows(20), 19, block=4)
    assert all(sorted([i, *row]) == list(range(20)) for i, row in enumerate(found.indices.tolist()))


def test_embeddings_and_read_only_maps(tmp_path):
    values = rows(30, dtype=np.float32)
    np.save(tmp_path / "values.npy", values)
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    expected = find_neighbors(values, 4)
    assert same(find_neighbors(mapped, 4), expected)
    assert same(find_neighbors(Embeddings(values, [str(i) for i in range(30)]), 4), expected)
    assert same(find_neighbors(np.asfortranarray(values), 4), expected)


def test_bank_of_others():
    bank, queries = rows(50), rows(9, seed=1)
    indices, similarities = find_in_bank(bank, queries, n_neighbors=50, block=2)
    similar = np.array([[naive.dot(naive.unit(q), naive.unit(b)) for b in bank] for q in queries])
    assert indices.tolist() == np.argsort(-similar, axis=1).tolist()
    np.testing.assert_allclose(similarities, -np.sort(-similar, axis=1), rtol=1e-12, atol=1e-14)


def test_progress_counts_images():
    class Seen:
        def start(self, description, total, unit, done):
            self.total, self.unit, self.done = total, unit, 0
            return self

        def advance(self, n=1, note=""):
            self.done += n

        def stop(self, bar):
            pass

    seen = Seen()
    with progress.shown_by(seen):
        find_neighbors(rows(30), 2, block=8)
    assert (seen.total, seen.done, seen.unit) == (30, 30, "image")


@pytest.mark.parametrize(("n_neighbors", "says"), [
    (10, "n_neighbors=10 needs at least 11 images, got 10. hint: lower n_neighbors or add images"),
    (0, "must be at least 1, got 0"),
    (-3, "must be at least 1, got -3"),
])
def test_counts_that_cannot_be(n_neighbors, says):
    with pytest.raises(InputError, match=says):
        find_neighbors(rows(10), n_neighbors)


def test_bank_errors():
    with pytest.raises(InputError, match="n_neighbors=11 needs at least 11 images, got 10"):
        find_in_bank(rows(10), rows(3), n_neighbors=11)
    with pytest.raises(InputError, match="queries of 5 features cannot be sought in a bank of 6 features"):
        find_in_bank(rows(10), rows(3, 5), n_neighbors=1)


def test_non_finite_rows_are_named():
    values = rows(10)
    values[3, 1], values[7, 0] = np.nan, np.inf
    with pytest.raises(InputError, match=r"2 of 10 rows are not, the first of them row 3\. hint"):
        find_neighbors(values, 2)
    with pytest.raises(InputError, match=r"row 3 \(image 'cat 3.jpg'\)"):
        check_embeddings(Embeddings(values, [f"cat {i}.jpg" for i in range(10)]))


@pytest.mark.parametrize("values", [np.ones(4), np.ones((0, 3)), np.ones((3, 0)), np.array([["a"]]),
                                    np.ones((2, 2), complex)])
def test_what_is_no_embedding(values):
    with pytest.raises(InputError, match="embeddings must be"):
        check_embeddings(values)


def test_inner_products_that_overflow_are_refused():
    with pytest.raises(InputError, match="too long for an inner product"):
        find_neighbors(np.full((4, 3), 1e30, np.float32), 1, normalize=False)
    with pytest.raises(InputError, match="too long"):
        find_neighbors(np.full((4, 3), 7e18, np.float32), 1, normalize=False, metric="euclidean")


def test_memory_stays_within_a_few_blocks():
    """With a small block the largest buffer has block² · 4 numbers, far below n² here."""
    values, n = rows(4000, 4, dtype=np.float32), 4000
    finder = module.Finder(*[module.Rows.of(values, device=None, normalize=True)] * 2, 5, 32)
    assert len(finder.buffer) == 32 * 32 * 4
    assert len(finder.buffer) < n * n / 2000


@pytest.mark.parametrize("n_threads", [2, 5])
def test_threads_change_nothing(monkeypatch, n_threads):
    values = rows(300, 9, dtype=np.float32)
    values[::3] = values[0]
    threads = torch.get_num_threads()
    monkeypatch.setattr(module, "_LEAST_ROWS", 300)
    expected = find_neighbors(values, 12)
    monkeypatch.setattr(module, "_LEAST_ROWS", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    used = set()
    monkeypatch.setattr(module.Finder, "find", lambda self, asked, was=module.Finder.find: (
        used.add(threading.current_thread().name), was(self, asked))[1])
    assert same(find_neighbors(values, 12, block=17), expected)
    assert all(name.startswith("phyla-neighbors") for name in used)
    monkeypatch.undo()
    assert torch.get_num_threads() == threads, "the caller's threads are as they were"


def test_threads_take_over_inference_mode(monkeypatch):
    values = np.random.default_rng(3).normal(size=(600, 4)).astype(np.float32)
    expected = find_neighbors(values, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.inference_mode():
        found = find_neighbors(values, 3)
    assert np.array_equal(found.indices, expected.indices)


def test_an_error_in_a_thread_ends_the_search(monkeypatch):
    monkeypatch.setattr(module, "_LEAST_ROWS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(module.Finder, "find", lambda self, asked: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_neighbors(rows(30), 2, block=1)


def test_no_tensor_grows_faster_than_the_images(monkeypatch):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            made = operation(*args, **(kwargs or {}))
            self.numbers = max([self.numbers, *(t.untyped_storage().nbytes() for t in tree_leaves(made)
                                                if isinstance(t, torch.Tensor))])
            return made

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    sizes = []
    for n in (400, 1600):
        with Largest() as seen:
            find_neighbors(rows(n, 4, dtype=np.float32), 5, block=64)
        sizes.append(seen.numbers)
    assert sizes[1] <= 4 * sizes[0]
    assert sizes[1] < 1600 * 1600 / 10
