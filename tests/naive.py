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


def turtle_loss(tasks: np.ndarray, logits: np.ndarray, *, entropy_weight: float, prior: Sequence[float] | None = None
                ) -> tuple[float, float, float]:
    """Return the outer loss of (M, K, B) task logits and classifiers' logits, its cross-entropy, and its entropy."""
    n_spaces, n_clusters, n_images = tasks.shape
    labels = [[softmax(tasks[m, :, i]) for i in range(n_images)] for m in range(n_spaces)]
    cross_entropy = entropies = spread = 0.0
    for m in range(n_spaces):
        for i in range(n_images):
            found = softmax(logits[m, :, i])
            for c in range(n_clusters):
                target = mean([labels[other][i][c] for other in range(n_spaces)])
                cross_entropy -= target * math.log(found[c]) / n_images
        shares = [mean([labels[m][i][c] for i in range(n_images)]) for c in range(n_clusters)]
        entropies += entropy(shares)
        spread -= math.fsum(s * math.log(s / (1.0 if prior is None else prior[c])) for c, s in enumerate(shares))
    return cross_entropy - entropy_weight * spread, cross_entropy, entropies


def temi_loss(student: np.ndarray, teacher: np.ndarray, marginal: Rows | None, *, beta: float,
              weighted: bool) -> list[float]:
    """Return the loss of each head; logits are (2, heads, batch, clusters), anchors and then neighbors."""
    n_heads, n_rows, n_clusters = student.shape[1:]
    q, t = ([[[softmax(row) for row in head] for head in side] for side in given] for given in (student, teacher))
    weights = [mean([dot(t[0][h][i], t[1][h][i]) for h in range(n_heads)]) if weighted else 1 for i in range(n_rows)]
    losses = []
    for h in range(n_heads):
        total = 0.0
        for i in range(n_rows):
            for own, other in ((0, 1), (1, 0)):
                shared = [(q[own][h][i][c] * t[other][h][i][c]) ** beta / (1 if marginal is None else marginal[h][c])
                          for c in range(n_clusters)]
                total += weights[i] * math.log(math.fsum(shared))
        losses.append(-total / (2 * n_rows))
    return losses


def class_contrast(anchors: Rows, positives: Rows) -> float:
    """Return the cross-entropy of each column, scaled to length 1, picking its own among those of ``positives``."""
    first, second = ([unit(column) for column in zip(*rows, strict=True)] for rows in (anchors, positives))
    return mean([-math.log(softmax([dot(a, b) for b in second])[c]) for c, a in enumerate(first)])


def nnm_loss(anchor: Rows, augmented: Rows, neighbor: Rows, batch_match: Labels, global_targets: Rows | None, *,
             entropy_weight: float, global_weight: float = 1.0) -> tuple[float, float, float, float, float]:
    """Return total, consistency, class contrast, global match and entropy; row by row over the stacked pairs."""
    first, second, partner = ([softmax(row) for row in rows] for rows in (anchor, augmented, neighbor))
    anchors, positives = first + second, partner + [first[int(j)] for j in batch_match]

    def disagreement(these: Rows, those: Rows) -> float:
        return mean([-math.log(dot(p, q)) for p, q in zip(these, those, strict=True)])

    consistency, contrast, matched = disagreement(anchors, positives), class_contrast(anchors, positives), 0.0
    if global_targets is not None:
        targets = list(global_targets) * 4
        matched = disagreement(anchors + positives, targets) + class_contrast(anchors + positives, targets)
    average = [max(mean([p[c] for p in anchors]), 1e-8) for c in range(len(anchors[0]))]
    total = consistency + contrast + global_weight * matched - entropy_weight * entropy(average)
    return total, consistency, contrast, matched, entropy(average)


def nearest_other(features: Rows) -> list[int]:
    """Return the nearest other row by Euclidean distance, the lowest index among equals."""
    return [min((math.dist(row, other), j) for j, other in enumerate(features) if j != i)[1]
            for i, row in enumerate(features)]


def nnm_score(probabilities: Rows, neighbors: Rows) -> float:
    """Return SCAN's score plus the class contrast of the probabilities with themselves."""
    return neighbor_score(probabilities, neighbors) + class_contrast(probabilities, probabilities)


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


def reranked(values: Rows, n_neighbors: int, *, k1: int, k2: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return indices and 1 - Jaccard distance by k-reciprocal re-ranking, every pair of images looked at.

    Equally near ones by index; images that overlap nowhere come in the order of the cosine.
    """
    n = len(values)
    cosine = [[dot(unit(a), unit(b)) for b in values] for a in values]
    order = neighbors(values, n - 1)[0]
    ranked = [[i, *order[i]] for i in range(n)]

    def mutual(k: int) -> list[set[int]]:
        return [{j for j in ranked[i][:k] if i in ranked[j][:k]} for i in range(n)]

    near, half = mutual(k1), mutual(round(k1 / 2))
    weights = []
    for i in range(n):
        members = set(near[i])
        for j in near[i]:
            if len(half[j] & near[i]) > 2 / 3 * len(half[j]):
                members |= half[j]
        chosen = sorted(members)
        soft = dict(zip(chosen, softmax([-(2 - 2 * cosine[i][j]) for j in chosen]), strict=True))
        weights.append([soft.get(j, 0.0) for j in range(n)])
    if k2 > 1:
        weights = [[mean([weights[j][c] for j in ranked[i][:k2]]) for c in range(n)] for i in range(n)]
    indices, similarities = [], []
    for i in range(n):
        shared = [math.fsum(map(min, weights[i], weights[j])) for j in range(n)]
        overlaps = {j: m / (2 - m) for j, m in enumerate(shared) if j != i and m > 0}
        best = [j for _, j in sorted((-similarity, j) for j, similarity in overlaps.items())]
        indices.append([*best, *(j for j in order[i] if j not in overlaps)][:n_neighbors])
        similarities.append([overlaps.get(j, 0.0) for j in indices[-1]])
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


# ── losses over a memory ──────────────────────────────────────────────────────────────────────────────────────────


def and_loss(logits: Rows, index: Labels, neighbor: Labels) -> float:
    """Return the mean over rows of -log of the softmax's mass on the own image and, for an anchor, its neighbor."""
    losses = []
    for row, z in enumerate(logits):
        own = int(index[row % len(index)])
        p, partner = softmax(z), int(neighbor[own])
        losses.append(-math.log(p[own] + (p[partner] if partner >= 0 else 0.0)))
    return mean(losses)


def unification_entropy(logits: Rows, index: Labels, *, mask_self: bool = True) -> float:
    """Return the mean over rows of the softmax's entropy, -10 in the place of the own logit."""
    entropies = []
    for row, z in enumerate(logits):
        values = [float(x) for x in z]
        if mask_self:
            values[int(index[row % len(index)])] = -10.0
        entropies.append(entropy(softmax(values)))
    return mean(entropies)


def relationships(rows: Rows, memory: Rows) -> list[list[float]]:
    """Return each row's products with every row of the memory, scaled to length 1."""
    return [unit([dot(row, m) for m in memory]) for row in rows]


def augmentation_loss(rows: Rows, fixed: Rows, *, temperature: float) -> float:
    """Return the loss over pairs of a row and another of ``fixed``: -log p of its other view, -log(1 - p) of the rest.

    ``fixed`` has the values of ``rows`` and is where the gradient stops.
    """
    n, losses = len(rows), []
    for r in range(n):
        others = [k for k in range(n) if k != r]
        p = dict(zip(others, softmax([dot(rows[r], fixed[k]) / temperature for k in others]), strict=True))
        view = (r + n // 2) % n
        losses.append(-math.log(p[view]) - math.fsum(math.log(1 - p[k]) for k in others if k != view))
    return mean(losses)


def memory_entropies(memory: Rows, *, temperature: float) -> list[float]:
    return [entropy(softmax([dot(row, other) / temperature for other in memory])) for row in memory]


def discover(memory: Rows, n_anchors: int, *, temperature: float) -> list[int]:
    """Return the nearest other row of each of the ``n_anchors`` rows of lowest entropy, -1 for all others."""
    spread = memory_entropies(memory, temperature=temperature)
    anchors = sorted(range(len(memory)), key=lambda i: (spread[i], i))[:n_anchors]
    nearest = neighbors(memory, 1)[0]
    return [nearest[i][0] if i in anchors else -1 for i in range(len(memory))]


# ── two views through random heads ────────────────────────────────────────────────────────────────────────────────


def head_probabilities(rows: Rows, weight: Rows, *, temperature: float, norm: str) -> list[list[float]]:
    """Return softmax(v W / t) of each row v; ``weight`` (D, K) first has rows or columns scaled to length 1."""
    by_feature = [unit(row) for row in weight]
    by_cluster = [unit(column) for column in zip(*weight, strict=True)]
    prototypes = list(zip(*by_feature, strict=True)) if norm == "feature_rows" else by_cluster
    return [softmax([dot(row, prototype) / temperature for prototype in prototypes]) for row in rows]


def assignment_loss(first: Rows, second: Rows) -> float:
    """Return minus the mutual information of the pair of clusters that the two views of a random image fall into."""
    clusters, floor = range(len(first[0])), 2.2e-16
    pairs = list(zip(first, second, strict=True))
    raw = [[math.fsum(float(p[c]) * float(q[d]) for p, q in pairs) for d in clusters] for c in clusters]
    total = math.fsum(x for row in raw for x in row)
    joint = [[(raw[c][d] + raw[d][c]) / 2 / total for d in clusters] for c in clusters]
    share = [max(math.fsum(row), floor) for row in joint]
    return -math.fsum(max(joint[c][d], floor) * math.log(max(joint[c][d], floor) / (share[c] * share[d]))
                      for c in clusters for d in clusters)


# ── learning anew from the clean part (RUC) ───────────────────────────────────────────────────────────────────────


def sharpen(p: Sequence[float], *, temperature: float) -> list[float]:
    raised = [float(x) ** (1 / temperature) for x in p]
    return [x / math.fsum(raised) for x in raised]


def co_refine(labels: Labels, peer: Rows, weight: Sequence[float] | np.ndarray, *, temperature: float
              ) -> list[list[float]]:
    """Return each label's one-hot row and the peer's, averaged by the weight of the peer and sharpened."""
    rows = []
    for label, r, w in zip(labels, peer, weight, strict=True):
        mixed = [(1 - float(w)) * float(c == int(label)) + float(w) * float(x) for c, x in enumerate(r)]
        rows.append(sharpen(mixed, temperature=temperature))
    return rows


def guess(probabilities: Sequence[Rows] | np.ndarray, *, temperature: float) -> list[list[float]]:
    """Return the sharpened mean over the first axis."""
    n_rows, n_clusters = len(probabilities[0]), len(probabilities[0][0])
    return [sharpen([mean([float(view[i][c]) for view in probabilities]) for c in range(n_clusters)],
                    temperature=temperature) for i in range(n_rows)]


def cross_entropy(logits: Rows, targets: Rows) -> float:
    rows = zip(logits, targets, strict=True)
    return mean([-math.fsum(float(t) * math.log(x) for t, x in zip(target, softmax(z), strict=True))
                 for z, target in rows]) if len(logits) else 0.0


def mixed_losses(clean_logits: Rows, clean_targets: Rows, noisy_logits: Rows, noisy_targets: Rows, *,
                 noisy_weight: float) -> tuple[float, float]:
    """Return the cross-entropy of the clean, and the weighted mean over images and clusters of squared differences."""
    squares = [(x - float(t)) ** 2 for z, target in zip(noisy_logits, noisy_targets, strict=True)
               for x, t in zip(softmax(z), target, strict=True)]
    return cross_entropy(clean_logits, clean_targets), noisy_weight * mean(squares) if squares else 0.0


def smoothed_cross_entropy(logits: Rows, labels: Labels, *, smoothing: float) -> float:
    n_clusters = len(logits[0])
    targets = [[1 - smoothing if c == int(label) else smoothing / (n_clusters - 1) for c in range(n_clusters)]
               for label in labels]
    return cross_entropy(logits, targets)


def neighbor_vote(values: Rows, labels: Labels, n_neighbors: int) -> list[bool]:
    """Return whether each label wins the vote of the nearest rows, the own among them; the lowest of equals wins."""
    rows, clean = [unit(row) for row in values], []
    for i, row in enumerate(rows):
        voters = [j for _, j in sorted((-dot(row, other), j) for j, other in enumerate(rows))[:n_neighbors]]
        votes = Counter(int(labels[j]) for j in voters)
        clean.append(min(label for label in votes if votes[label] == max(votes.values())) == int(labels[i]))
    return clean


def supported_share(labels: Labels, indices: Rows) -> float:
    """Return the share of images that no other label outvotes among their neighbors."""
    supported = []
    for i, near in enumerate(indices):
        votes = Counter(int(labels[int(j)]) for j in near)
        supported.append(float(votes[int(labels[i])] == max(votes.values())))
    return mean(supported)


def mean_confidence(logits: Rows, temperature: float) -> float:
    return mean([max(softmax([float(x) / temperature for x in z])) for z in logits])


def member_map(member: Rows, reference: Rows) -> list[list[float]]:
    """Return the best one-to-one table, or how reference clusters share each cluster's images where K differs."""
    own, k = len(member[0]), len(reference[0])
    shared = [[sum(member[i][a] * reference[i][b] for i in range(len(member))) for b in range(k)] for a in range(own)]
    if own == k:
        best = max(permutations(range(k)), key=lambda order: sum(shared[a][order[a]] for a in range(k)))
        return [[1.0 if best[a] == b else 0.0 for b in range(k)] for a in range(k)]
    return [[value / sum(row) if sum(row) else 1 / k for value in row] for row in shared]


def weighted_average(members: Sequence[Rows], weights: Sequence[float]) -> list[list[float]]:
    total = sum(weights)
    return [[sum(w * m[i][c] for m, w in zip(members, weights, strict=True)) / total for c in range(len(members[0][0]))]
            for i in range(len(members[0]))]


def co_association(members: Sequence[Rows], weights: Sequence[float]) -> list[list[float]]:
    n, total = len(members[0]), sum(weights)
    return [[sum(w * dot(m[i], m[j]) for m, w in zip(members, weights, strict=True)) / total for j in range(n)]
            for i in range(n)]


def transported(probabilities: Rows, prior: Sequence[float], *, n_rounds: int) -> list[list[float]]:
    p = [list(row) for row in probabilities]
    for _ in range(n_rounds):
        means = [mean([row[c] for row in p]) for c in range(len(prior))]
        p = [[value * prior[c] / means[c] for c, value in enumerate(row)] for row in p]
        p = [[value / sum(row) for value in row] for row in p]
    return p


def near_images(indices: Rows, similarities: Rows, *, least: int) -> list[list[bool]]:
    """Return which neighbors count: those that name the image, too, and stand before the largest fall of similarity."""
    found = []
    for i, (row, values) in enumerate(zip(indices, similarities, strict=True)):
        falls = [values[j] - values[j + 1] for j in range(len(values) - 1)]
        last = max(range(least - 1, len(falls)), key=lambda j: falls[j]) if len(values) > least else len(values) - 1
        found.append([place <= last and i in list(indices[int(j)]) for place, j in enumerate(row)])
    return found
