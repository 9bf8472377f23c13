"""The criteria of a number of clusters: as loops over pairs, known values, and chance."""

from itertools import combinations

import numpy as np
import pytest
import torch

from phyla.criteria import generalization, modularity, prediction_strength, silhouette

draws = np.random.default_rng(0)
ROWS, LABELS = draws.normal(size=(30, 3)), draws.integers(4, size=30)


def naive_silhouette(rows: np.ndarray, labels: np.ndarray) -> float:
    scores = []
    for i, own in enumerate(labels):
        means = {}
        for c in set(labels.tolist()):
            others = [j for j in range(len(rows)) if labels[j] == c and j != i]
            means[c] = np.mean([np.square(rows[i] - rows[j]).sum() for j in others]) if others else None
        if means[own] is None or len(means) < 2:
            scores.append(0.0)
            continue
        inside, outside = means[own], min(value for c, value in means.items() if c != own)
        scores.append((outside - inside) / max(outside, inside))
    return float(np.mean(scores))


def naive_modularity(labels: np.ndarray, indices: np.ndarray) -> float:
    n, k = indices.shape
    total = 0.0
    for i in range(n):
        for j in range(n):
            linked = int((indices[i] == j).sum())
            total += (labels[i] == labels[j]) * (linked - k * int((indices == j).sum()) / (n * k))
    return total / (n * k)


def naive_strength(first: np.ndarray, second: np.ndarray) -> float:
    def one_way(a: np.ndarray, b: np.ndarray) -> float:
        chance = sum(np.mean(b == c) ** 2 for c in set(b.tolist()))
        kept = []
        for c in set(a.tolist()):
            pairs = list(combinations(np.flatnonzero(a == c), 2))
            if pairs:
                kept.append(np.mean([b[i] == b[j] for i, j in pairs]))
        return float((np.mean(kept) - chance) / (1 - chance))

    return (one_way(first, second) + one_way(second, first)) / 2


def test_silhouette_is_the_mean_over_pairs():
    ours = silhouette(torch.from_numpy(ROWS), torch.from_numpy(LABELS), 6)  # two clusters are empty
    assert ours == pytest.approx(naive_silhouette(ROWS, LABELS), abs=1e-12)


def test_silhouette_of_an_image_alone_is_0_and_of_one_cluster_too():
    rows = torch.tensor([[0.0], [0.0], [9.0]], dtype=torch.float64)
    assert silhouette(rows, torch.tensor([0, 0, 1]), 2) == pytest.approx(2 / 3)
    assert silhouette(rows, torch.zeros(3, dtype=torch.int64), 1) == 0.0


def test_modularity_is_the_sum_over_pairs():
    indices = np.stack([draws.permutation([j for j in range(30) if j != i])[:4] for i in range(30)])
    assert modularity(LABELS, indices) == pytest.approx(naive_modularity(LABELS, indices), abs=1e-12)
    assert modularity(LABELS, indices, np.arange(30)) == modularity(LABELS, indices)


def test_modularity_of_apart_groups_and_of_one():
    groups = np.repeat([0, 1], 3)
    indices = np.array([[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]])
    assert modularity(groups, indices) == pytest.approx(0.5)
    assert modularity(np.zeros(6, np.int64), indices) == pytest.approx(0.0)
    assert modularity(groups, indices, np.array([0, 1, 3, 4])) == pytest.approx(0.5)


def test_strength_is_the_share_of_pairs_that_come_again():
    other = draws.integers(4, size=30)
    assert prediction_strength(LABELS, other, 4) == pytest.approx(naive_strength(LABELS, other), abs=1e-12)
    assert prediction_strength(LABELS, other, 9) == pytest.approx(naive_strength(LABELS, other), abs=1e-12)


def test_strength_of_the_same_is_1_however_numbered_and_of_chance_0():
    assert prediction_strength(LABELS, (LABELS + 1) % 4, 4) == pytest.approx(1.0)
    first, second = draws.integers(3, size=(2, 20000))
    assert abs(prediction_strength(first, second, 3)) < 0.01
    assert prediction_strength(np.zeros(5, np.int64), np.zeros(5, np.int64), 2) == 0.0  # one cluster says nothing


def test_generalization_is_1_for_what_is_linear_and_0_for_chance():
    rows, new = (torch.from_numpy(draws.normal(size=(600, 4))) for _ in range(2))
    linear, chance = ([(each[:, 0] > 0).long() for each in (rows, new)],
                      [torch.from_numpy(draws.integers(3, size=600)) for _ in range(2)])
    together = generalization((rows, [linear[0], chance[0]]), (new, [linear[1], chance[1]]))
    assert together[0] > 0.9 and abs(together[1]) < 0.1
    assert together == [generalization((rows, [own]), (new, [other]))[0] for own, other in (linear, chance)]


def test_generalization_is_ridge_regression():
    seen, new = slice(0, 20), slice(20, 30)
    x = np.hstack([ROWS, np.ones((30, 1))])
    strength = 1e-3 * np.square(x[seen]).sum(axis=0).mean()
    weights = np.linalg.solve(x[seen].T @ x[seen] + strength * np.eye(4), x[seen].T @ np.eye(4)[LABELS[seen]])
    told = (x[new] @ weights).argmax(axis=1)
    chance = np.bincount(told, minlength=4) @ np.bincount(LABELS[new], minlength=4) / 100
    expected = (np.mean(told == LABELS[new]) - chance) / (1 - chance)
    parts = [(torch.from_numpy(ROWS[part]), [torch.from_numpy(LABELS[part])]) for part in (seen, new)]
    assert generalization(*parts) == [pytest.approx(expected)]
