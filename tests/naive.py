"""The papers' formulas, written out as loops over Python floats: what the library's functions are tested against.

Slow on purpose and without any trick: each function is the formula and nothing else. Arrays come in as NumPy arrays or
nested lists; numbers, lists and tuples go out. Nothing here imports phyla.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations, permutations

import numpy as np

Rows = Sequence[Sequence[float]] | np.ndarray
Labels = Sequence[int] | np.ndarray


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def unit(row: Sequence[float]) -> list[float]:
    length = math.sqrt(dot(row, row))
    return [float(x) / length if length else 0.0 for x in row]


def softmax(logits: Sequence[float]) -> list[float]:
    largest = max(float(x) for x in logits)
    weights = [math.exp(float(x) - largest) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def entropy(p: Sequence[float]) -> float:
    return -math.fsum(float(x) * math.log(float(x)) for x in p if x > 0)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Return central differences of ``function`` with respect to every entry of ``at``, good to about 1e-8."""
    slopes = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        above, below = at.copy(), at.copy()
        above[place] += step
        below[place] -= step
        slopes[place] = (function(above) - function(below)) / (2 * step)
    return slopes


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────────────────


def nt_xent(first: Rows, second: Rows, *, temperature: float) -> float:
    """Return the one-sided contrastive loss: each first view among all other first and all second views."""
    losses = []
    for i in range(len(first)):
        others = [math.exp(dot(first[i], first[j]) / temperature) for j in range(len(first)) if j != i]
        seconds = [math.exp(dot(first[i], second[j]) / temperature) for j in range(len(second))]
        losses.append(-math.log(seconds[i] / (math.fsum(others) + math.fsum(seconds))))
    return mean(losses)


def scan_loss(anchor_logits: Rows, neighbor_logits: Rows, *, entropy_weight: float) -> tuple[float, float, float]:
    """Return total, consistency and entropy; the mean probability is held above 1e-8 as in the authors' code."""
    anchors, neighbors = [softmax(row) for row in anchor_logits], [softmax(row) for row in neighbor_logits]
    consistency = mean([-math.log(dot(p, q)) for p, q in zip(anchors, neighbors, strict=True)])
    average = [max(mean([p[c] for p in anchors]), 1e-8) for c in range(len(anchors[0]))]
    return consistency - entropy_weight * entropy(average), consistency, entropy(average)


def self_label_loss(
    weak_logits: Rows, strong_logits: Rows, *, threshold: float, balanced: bool
) -> tuple[float, int]:
    """Return the cross-entropy on confident images, and their number.

    Balanced is the mean over the classes present of each class's mean; plain is the mean over the images.
    """
    losses: dict[int, list[float]] = {}
    for weak, strong in zip(weak_logits, strong_logits, strict=True):
        q = softmax(weak)
        if max(q) > threshold:
            label = q.index(max(q))
            losses.setdefault(label, []).append(-math.log(softmax(strong)[label]))
    n_confident = sum(len(of_class) for of_class in losses.values())
    if not n_confident:
        return 0.0, 0
    if balanced:
        return mean([mean(of_class) for of_class in losses.values()]), n_confident
    return mean([loss for of_class in losses.values() for loss in of_class]), n_confident


def neighbor_score(probabilities: Rows, neighbors: Rows, *, entropy_weight: float = 1.0) -> float:
    """Return mean -log(p_i·p_j) over images and their neighbors, the image itself one of them, less the entropy."""
    terms = [
        -max(math.log(similarity), -100.0) if (similarity := dot(p, probabilities[int(j)])) > 0 else 100.0
        for i, p in enumerate(probabilities)
        for j in [i, *neighbors[i]]
    ]
    average = [mean([p[c] for p in probabilities]) for c in range(len(probabilities[0]))]
    return mean(terms) - entropy_weight * entropy(average)


# ── neighbors and probes ──────────────────────────────────────────────────────────────────────────────────────────


def neighbors(values: Rows, n_neighbors: int, *, normalize: bool = True) -> tuple[list[list[int]], list[list[float]]]:
    """Return indices and similarities of the nearest other rows: larger first, lower index first among equals."""
    rows = [unit(row) for row in values] if normalize else [list(row) for row in values]
    indices, similarities = [], []
    for i in range(len(rows)):
        ranked = sorted((-dot(rows[i], rows[j]), j) for j in range(len(rows)) if j != i)[:n_neighbors]
        indices.append([j for _, j in ranked])
        similarities.append([-s for s, _ in ranked])
    return indices, similarities


def knn_scores(bank: Rows, bank_labels: Labels, query: Sequence[float], *, n_neighbors: int,
               temperature: float) -> dict[int, float]:
    """Return the summed weight exp(cosine / temperature) of each class among the nearest of the bank."""
    ranked = sorted((-dot(unit(query), unit(row)), j) for j, row in enumerate(bank))[:n_neighbors]
    scores: dict[int, float] = {}
    for negative, j in ranked:
        scores[int(bank_labels[j])] = scores.get(int(bank_labels[j]), 0.0) + math.exp(-negative / temperature)
    return scores


def neighbor_purity(indices: Rows, labels: Labels) -> float:
    pairs = [(labels[i], labels[int(j)]) for i, row in enumerate(indices) for j in row]
    return mean([float(a == b) for a, b in pairs if a != -1 and b != -1])


# ── metrics ───────────────────────────────────────────────────────────────────────────────────────────────────────


def hungarian_accuracy(true: Labels, predicted: Labels) -> float:
    """Return the best share over every one-to-one matching, tried one by one."""
    pairs = Counter((int(t), int(p)) for t, p in zip(true, predicted, strict=True))
    side = max(*(t for t, _ in pairs), *(p for _, p in pairs), 0) + 1
    return max(sum(pairs[order[p], p] for p in range(side)) for order in permutations(range(side))) / len(true)


def many_to_one_accuracy(true: Labels, predicted: Labels) -> float:
    members: dict[int, list[int]] = {}
    for t, p in zip(true, predicted, strict=True):
        members.setdefault(int(p), []).append(int(t))
    return sum(max(Counter(of).values()) for of in members.values()) / len(true)


def _entropy_of(labels: Labels) -> float:
    return entropy([size / len(labels) for size in Counter(int(x) for x in labels).values()])


def mutual_information(true: Labels, predicted: Labels) -> float:
    n = len(true)
    classes, clusters = Counter(int(x) for x in true), Counter(int(x) for x in predicted)
    pairs = Counter((int(t), int(p)) for t, p in zip(true, predicted, strict=True))
    return math.fsum(both / n * math.log(n * both / (classes[t] * clusters[p])) for (t, p), both in pairs.items())


def nmi(true: Labels, predicted: Labels) -> float:
    half = (_entropy_of(true) + _entropy_of(predicted)) / 2
    return mutual_information(true, predicted) / half if half else 1.0


def ari(true: Labels, predicted: Labels) -> float:
    """Return the adjusted Rand index by looking at every pair of images."""
    pairs = [(true[i] == true[j], predicted[i] == predicted[j]) for i, j in combinations(range(len(true)), 2)]
    both, in_true, in_predicted = sum(a and b for a, b in pairs), sum(a for a, _ in pairs), sum(b for _, b in pairs)
    expected, most = in_true * in_predicted / len(pairs), (in_true + in_predicted) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def ami(true: Labels, predicted: Labels) -> float:
    """Return the adjusted mutual information; chance is every permutation of the labels, by the hypergeometric law."""
    n = len(true)
    chance = 0.0
    for a in Counter(int(x) for x in true).values():
        for b in Counter(int(x) for x in predicted).values():
            for both in range(max(1, a + b - n), min(a, b) + 1):
                odds = math.comb(a, both) * math.comb(n - a, b - both) / math.comb(n, b)
                chance += odds * both / n * math.log(n * both / (a * b))
    half = (_entropy_of(true) + _entropy_of(predicted)) / 2
    return 1.0 if half == chance else (mutual_information(true, predicted) - chance) / (half - chance)


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool], *, n_bins: int = 15) -> float:
    total = 0.0
    for m in range(n_bins):
        low, high = m / n_bins, (m + 1) / n_bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (m == 0 and c == 0)]
        if inside:
            gap = mean([float(correct[i]) for i in inside]) - mean([float(confidence[i]) for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total
