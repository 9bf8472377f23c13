"""Neighbors through an index: what it finds is exact and ranked, and its recall is measured, not promised."""

import sys

import numpy as np
import pytest

from phyla import index as module
from phyla.errors import InputError
from phyla.index import choose_index, find_through_index
from phyla.neighbors import find_neighbors


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'phyla[scale]'")


def clusters(n: int, d: int = 16, n_centers: int = 20, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    centers = draw.standard_normal((n_centers, d))
    return (centers[draw.integers(n_centers, size=n)] + 0.5 * draw.standard_normal((n, d))).astype(np.float32)


def test_recall_is_that_of_the_exact_search(faiss):
    values = clusters(4000)
    found, exact = find_through_index(values, 10, recall=0.9, n_sampled=500), find_neighbors(values, 10)
    same = np.mean([np.isin(a, b).mean() for a, b in zip(exact.indices, found.neighbors.indices, strict=True)])
    assert 1 < found.n_probes < found.n_lists
    assert found.recall == pytest.approx(same, abs=0.02) and same > 0.85
    assert found.n_sampled == 500
    assert found.notice == (f"neighbors: IVF, {found.n_probes} of {found.n_lists} lists, recall {found.recall:.3f} on "
                            "500 exact rows")


def test_more_recall_looks_into_more_lists(faiss):
    values = clusters(3000)
    few, many = (find_through_index(values, 5, recall=recall, n_sampled=300) for recall in (0.5, 0.99))
    assert few.n_probes < many.n_probes and few.recall < many.recall
    assert many.recall > 0.97


def test_what_is_found_is_exact_and_in_order(faiss):
    values = clusters(3000)
    values[100:130] = values[7]  # equal rows come by index
    found, exact = find_through_index(values, 8, recall=0.8, n_sampled=300).neighbors, find_neighbors(values, 8)
    assert (np.diff(found.similarities, axis=1) <= 0).all()
    for row in range(0, 3000, 50):
        told = dict(zip(exact.indices[row].tolist(), exact.similarities[row].tolist(), strict=True))
        for i, similarity in zip(found.indices[row].tolist(), found.similarities[row].tolist(), strict=True):
            assert told.get(i, similarity) == similarity, "bit by bit"
    ties = np.diff(found.similarities, axis=1) == 0
    assert ties.any() and (np.diff(found.indices, axis=1)[ties] > 0).all()


def test_all_lists_give_the_exact_neighbors(faiss):
    values = clusters(1200)
    found, exact = find_through_index(values, 6, recall=1, n_sampled=10_000), find_neighbors(values, 6)
    assert found.recall == 1
    np.testing.assert_array_equal(found.neighbors.indices, exact.indices)
    np.testing.assert_array_equal(found.neighbors.similarities, exact.similarities)


def test_the_seed_fixes_the_result(faiss):
    values = clusters(2500)
    first, again, other = (find_through_index(values, 5, recall=0.7, n_sampled=200, random_state=seed)
                           for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.neighbors.indices, again.neighbors.indices)
    assert first.recall == again.recall
    assert not np.array_equal(first.neighbors.indices, other.neighbors.indices)


def test_rows_of_length_zero_and_few_images(faiss):
    values = clusters(60)
    values[5] = 0
    found, exact = find_through_index(values, 30), find_neighbors(values, 30)
    np.testing.assert_array_equal(found.neighbors.indices[5], exact.indices[5])
    assert found.neighbors.similarities[5].tolist() == [0] * 30


@pytest.mark.parametrize("options", [{"recall": 0}, {"recall": 1.1}, {"n_sampled": 0}])
def test_options_out_of_range(options):
    with pytest.raises(InputError, match="recall must be above 0 and at most 1"):
        find_through_index(clusters(50), 5, **options)


def test_without_faiss_one_line_says_what_to_install(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"needs FAISS, which is not installed\. hint: pip install 'phyla\[scale\]'"):
        find_through_index(clusters(50), 5)
    with pytest.raises(InputError, match="FAISS"):
        choose_index("ivf", 50)
    assert choose_index("auto", 1000) == "exact"
    assert choose_index("auto", 10**6) == "exact" and "takes long" in caplog.text


def test_auto_takes_an_index_where_there_are_very_many(faiss, monkeypatch):
    monkeypatch.setattr(module, "AUTO_ABOVE", 100)
    assert [choose_index(index, n) for index in ("exact", "ivf", "auto") for n in (100, 101)] == [
        "exact", "exact", "ivf", "ivf", "exact", "ivf"]


@pytest.mark.usefixtures("unchecked")
def test_unknown_index():
    with pytest.raises(InputError, match=r"index='hnsw' is not allowed"):
        choose_index("hnsw", 10)
