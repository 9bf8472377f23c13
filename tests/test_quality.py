"""Goodness without truth: known values, the formula as loops, and what must not change it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from phyla import quality
from phyla.errors import InputError
from phyla.quality import (
    assignment_entropy,
    count_votes,
    effective_clusters,
    label_free_temperature,
    matching_temperature,
    neighbor_agreement,
    neighbor_score,
    supported_share,
    used_clusters,
)
from phyla.types import Neighbors

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz", allow_pickle=False)


def random_case(seed: int, n: int = 23, k: int = 4, n_clusters: int = 5) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    others = np.array([draw.permutation(np.delete(np.arange(n), i))[:k] for i in range(n)])
    return draw.dirichlet(np.full(n_clusters, 0.3), size=n), others


def one_hot(labels: list[int], n_clusters: int) -> np.ndarray:
    return np.eye(n_clusters)[labels]


# ── neighbor_score ────────────────────────────────────────────────────────────────────────────────────────────────


def test_score_has_the_published_value():
    score = neighbor_score(GOLDEN["selection_probabilities"], GOLDEN["selection_neighbors_without_self"])
    assert score == pytest.approx(float(GOLDEN["selection_value"]), rel=1e-9)


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_score_is_the_formula(weight):
    p, near = random_case(1)
    assert neighbor_score(p, near, entropy_weight=weight) == pytest.approx(
        naive.neighbor_score(p, near, entropy_weight=weight), rel=1e-12)


def test_score_worked_by_hand():
    # Two clusters of two, each the other's neighbor: p·p = 1 everywhere, and H = log 2.
    assert neighbor_score(one_hot([0, 0, 1, 1], 2), np.array([[1], [0], [3], [2]])) == pytest.approx(-np.log(2))
    # Uniform over 4: every p·p = 1/4, H = log 4: the two cancel.
    assert neighbor_score(np.full((6, 4), 0.25), np.arange(6)[:, None] ^ 1) == pytest.approx(0, abs=1e-12)


def test_score_counts_self_as_one_more_neighbor():
    p = np.array([[0.8, 0.2], [0.3, 0.7]])
    pairs = [0.68, 0.38, 0.58, 0.38]  # self, other, self, other
    mean = p.mean(axis=0)
    expected = -np.log(pairs).mean() + (mean * np.log(mean)).sum()
    assert neighbor_score(p, np.array([[1], [0]])) == pytest.approx(expected, rel=1e-12)


def test_contradicting_neighbors_cost_at_most_a_hundred():
    # Half of the pairs are with oneself (0), half contradict (100).
    score = neighbor_score(one_hot([0, 1], 2), np.array([[1], [0]]), entropy_weight=0.0)
    assert score == 50


def test_arrays_tensors_and_neighbors_give_the_same():
    p, near = random_case(2)
    expected = neighbor_score(p, near)
    assert neighbor_score(torch.from_numpy(p).requires_grad_(), torch.from_numpy(near)) == expected
    assert neighbor_score(p, Neighbors(near, np.zeros(near.shape, np.float32))) == expected
    assert neighbor_score(p.astype(np.float32), near.astype(np.int32)) == pytest.approx(expected, rel=1e-5)
    p.flags.writeable = near.flags.writeable = False
    assert neighbor_score(p, near) == expected


def test_blocks_do_not_change_the_score(monkeypatch):
    p, near = random_case(3, n=50)
    whole = neighbor_score(p, near)
    monkeypatch.setattr(quality, "_GATHERED", 60)
    assert neighbor_score(p, near) == pytest.approx(whole, rel=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_score_ignores_names_and_order(seed):
    p, near = random_case(seed, n=12)
    draw = np.random.default_rng(seed)
    columns, rows = draw.permutation(p.shape[1]), draw.permutation(len(p))
    place = np.argsort(rows)
    assert neighbor_score(p[:, columns], near) == pytest.approx(neighbor_score(p, near), rel=1e-9, abs=1e-9)
    assert neighbor_score(p[rows], place[near[rows]]) == pytest.approx(neighbor_score(p, near), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("p", "near", "says"), [
    (np.ones(4), np.zeros((4, 1), int), r"probabilities must be \(n_images, n_clusters\)"),
    (np.ones((0, 3)), np.zeros((0, 1), int), "at least one of each"),
    (np.ones((4, 1)), np.zeros((3, 1), int), r"neighbors of 4 images must be \(4, n_neighbors\), got \(3, 1\)"),
    (np.ones((4, 1)), np.zeros((4, 0), int), r"got \(4, 0\)"),
    (np.ones((4, 1)), np.full((4, 1), 4), "indices from 0 to 3, got 4 to 4"),
    (np.ones((4, 1)), np.full((4, 1), -1), "indices from 0 to 3, got -1 to -1"),
])
def test_what_does_not_fit_is_refused(p, near, says):
    with pytest.raises(InputError, match=says):
        neighbor_score(p, near)


# ── counts and shares ─────────────────────────────────────────────────────────────────────────────────────────────


def test_assignment_entropy_of_even_and_collapsed():
    assert assignment_entropy(np.full((5, 8), 1 / 8)) == pytest.approx(np.log(8))
    assert assignment_entropy(one_hot([0, 1, 2, 3], 4)) == pytest.approx(np.log(4))
    assert assignment_entropy(one_hot([2, 2, 2], 4)) == 0


def test_used_clusters():
    labels = np.array([0] * 90 + [1] * 9 + [4])
    assert used_clusters(labels, 6) == 3
    assert used_clusters(labels, 6, min_share=0.01) == 3
    assert used_clusters(labels, 6, min_share=0.011) == 2
    assert used_clusters(labels, 6, min_share=0.95) == 0


def test_effective_clusters():
    assert effective_clusters(np.array([0, 0, 1, 1, 5, 5])) == pytest.approx(3)
    assert effective_clusters(np.array([3, 3, 3])) == pytest.approx(1)
    assert effective_clusters(np.array([0, 0, 0, 1])) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


def test_neighbor_agreement_by_hand_and_in_blocks(monkeypatch):
    labels, near = np.array([0, 0, 1, 1]), np.array([[1, 2], [0, 3], [3, 0], [0, 1]])
    assert neighbor_agreement(labels, near) == 3 / 8
    monkeypatch.setattr(quality, "_GATHERED", 2)
    assert neighbor_agreement(labels, near) == 3 / 8


# ── votes and temperature ─────────────────────────────────────────────────────────────────────────────────────────


def test_support_worked_by_hand():
    labels = np.array([0, 0, 0, 1, 1])
    near = np.array([[1, 2], [0, 3], [3, 4], [4, 0], [0, 1]])
    # 0: both; 1: a tie; 2: outvoted; 3: a tie; 4: outvoted.
    assert supported_share(labels, near) == pytest.approx(3 / 5)
    assert supported_share(np.zeros(5, np.int64), near) == 1, "a collapse looks perfect"


@pytest.mark.parametrize("seed", [0, 1])
def test_support_is_the_formula_in_any_block_and_under_any_names(seed, monkeypatch):
    p, near = random_case(seed, n=40, k=6)
    labels = p.argmax(axis=1)
    expected = naive.supported_share(labels, near)
    assert 0 < expected < 1 and supported_share(labels, near) == pytest.approx(expected)
    monkeypatch.setattr(quality, "_GATHERED", 25)
    assert supported_share(labels, near) == pytest.approx(expected)
    assert supported_share(np.array([7, 900, -3, 55, 0])[labels], near) == pytest.approx(expected)


def test_votes_are_counted_row_by_row(monkeypatch):
    monkeypatch.setattr(quality, "_GATHERED", 6)
    labels, voters = np.array([0, 2, 2, 1]), np.array([[0, 1, 2], [3, 3, 1], [1, 2, 0]])
    blocks = list(count_votes(labels, voters))
    assert [rows for rows, _ in blocks] == [slice(0, 2), slice(2, 3)]
    assert np.concatenate([votes for _, votes in blocks]).tolist() == [[1, 0, 2], [0, 2, 1], [1, 0, 2]]


@pytest.mark.parametrize("confidence", [0.35, 0.6, 0.9, 0.999])
def test_temperature_gives_the_mean_confidence_wanted(confidence):
    logits = np.random.default_rng(0).normal(size=(50, 4)) * 3
    found = matching_temperature(logits, confidence)
    assert naive.mean_confidence(logits, found) == pytest.approx(confidence, abs=1e-9)
    assert matching_temperature(torch.from_numpy(logits) + 100, confidence) == pytest.approx(found, rel=1e-9)
    assert matching_temperature(5 * logits, confidence) == pytest.approx(5 * found, rel=1e-9)


def test_temperature_out_of_reach_is_the_nearest_tried():
    logits = np.random.default_rng(0).normal(size=(9, 4))
    assert matching_temperature(logits, 0.25) == pytest.approx(64)
    assert matching_temperature(logits, 1.0) == pytest.approx(1 / 64)
    assert matching_temperature(np.zeros((3, 4)), 0.9) == pytest.approx(1 / 64)
    with pytest.raises(InputError, match="logits must be"):
        matching_temperature(np.zeros(3), 0.9)


def test_label_free_temperature_is_of_the_support_and_is_never_certain():
    draw = np.random.default_rng(0)
    logits, near = draw.normal(size=(60, 3)), random_case(0, n=60, k=5)[1]
    found = label_free_temperature(logits, near)
    support = supported_share(logits.argmax(axis=1), near)
    assert 1 / 3 < support < 0.9 and naive.mean_confidence(logits, found) == pytest.approx(support, abs=1e-9)
    clear = np.eye(2)[[0, 0, 0, 1, 1, 1]] * 9.0
    near = np.array([[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]])
    sure = label_free_temperature(torch.from_numpy(clear), near)
    assert naive.mean_confidence(clear, sure) == pytest.approx(1 - 0.5 / 6, abs=1e-9)
