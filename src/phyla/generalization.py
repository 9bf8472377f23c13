"""Judge labels by how well a linear classifier that learns them on some images names those of the others.

Gadetsky, Jiang and Brbic 2024 (TURTLE) choose among labelings by it: L2 logistic regression, C = 1, 10 folds, the mean
over the embedding spaces. Input labels ``(n,)`` or many labelings at once ``(L, n)``, and embeddings of the same images
in one space or several; no true label takes part. Reached as ``phyla.quality.generalization_score``.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from phyla.errors import InputError, nearest
from phyla.progress import bar
from phyla.randomness import generator
from phyla.spaces import Space, spaces_of
from phyla.training.device import Device

Classifier = Literal["logistic", "ridge"]

_CELLS = 1 << 26  # numbers held at once by one group of fits: 256 MB
_MEMORY = 10  # pairs of L-BFGS
_TOLERANCE = 1e-4  # of the largest slope of the mean loss, scikit-learn's
_ARMIJO, _HALVINGS = 1e-4, 20
_RELATIVE_ZERO = 1e-6  # of the largest eigenvalue: below it a direction is rounding


def generalization_score(labels: np.ndarray, embeddings: Space, *, n_folds: int = 10,
                         classifier: Classifier = "logistic", adjusted: bool = False,
                         regularization: float | None = None, n_iterations: int = 1000, max_images: int | None = None,
                         random_state: int = 0, device: Device | None = None) -> float | np.ndarray:
    """Return the share of held-out images whose label a linear classifier names, the mean over spaces: high is good.

    Parameters
    ----------
    labels : int (n_images,), or (n_labelings, n_images): all labelings are fitted together
    embeddings : of the same images, taken as they are; one array, ``Embeddings`` with widths, or a list of arrays
    n_folds : parts of which each is held out once; every label is spread over all of them as evenly as it can be
    classifier : logistic: the published score; ridge: least squares on the labels as one-hot rows, every image held out
        by itself (``n_folds`` does not matter), from one decomposition a space
    adjusted : less what chance would give: (score - chance) / (1 - chance), see Notes
    regularization : weight of the squared weights' sum / 2 (logistic: against the sum of the losses; None is 1, so
        C = 1) or of the squared weights (ridge: in units of the mean variance along the features' principal directions
        times the number of images; None is 0.1)
    n_iterations : of L-BFGS at most
    max_images : take so many at most, spread evenly
    random_state : seed of the folds; they are the same for equal labels, whatever stands beside them
    device : where to compute; the CPU where None

    Returns
    -------
    float, or float64 (n_labelings,)

    Raises
    ------
    InputError
        Labels that are no whole numbers or not one an image, an option out of its range, or broken embeddings.

    Notes
    -----
    A score says how linearly separable labels are, not that they are classes. **One label for all scores 1**, and of
    two labelings the coarser usually scores higher: compare at equal numbers of clusters, or ``adjusted``. Chance is
    sum_c s_c q_c, of the shares s of the labels and q of the predictions, so that ``adjusted`` is Cohen's kappa: 0 for
    labels that nothing predicts, for one label, and for what always naming the largest one reaches; below 0 for less.

    A label of one image is never named right; one of fewer images than folds is held out in as many folds as it has
    images, and learned from all the others. Labels that no image of a fold's other parts bears are not in its choice.
    """
    many = np.atleast_2d(_whole(labels))
    spaces = spaces_of(embeddings)
    for fault in _faults(many, spaces, n_folds, classifier, regularization, n_iterations, max_images):
        raise fault
    chosen = _spread(many.shape[1], max_images)
    where = torch.device("cpu") if device is None else device.device
    numbered = torch.stack([torch.from_numpy(np.unique(each, return_inverse=True)[1]) for each in many[:, chosen]])
    penalty = {"logistic": 1.0, "ridge": 0.1}[classifier] if regularization is None else regularization
    found = []
    for space in spaces:
        rows = torch.from_numpy(np.ascontiguousarray(space[chosen])).to(where)
        named = (_ridge(rows, numbered, penalty=penalty) if classifier == "ridge"
                 else _logistic(rows, numbered, folds_of(numbered, n_folds, random_state=random_state),
                                penalty=penalty, n_iterations=n_iterations))
        found.append(_score(numbered, named, adjusted=adjusted))
    scores = np.mean(found, axis=0)
    return float(scores[0]) if np.ndim(labels) == 1 else scores


def folds_of(labels: Int[Tensor, "labelings images"], n_folds: int, *, random_state: int) -> Int[Tensor,
                                                                                                  "labelings images"]:
    """Return the fold of every image, 0 to ``n_folds`` - 1: folds and, within each label, shares of them differ by 1.

    Images are shuffled, the same way for all labelings, ordered by their label and dealt out.
    """
    n_images = labels.shape[1]
    shuffled = torch.randperm(n_images, generator=generator(random_state, "folds of images"))
    order = shuffled[labels[:, shuffled].argsort(dim=1, stable=True)]
    return torch.empty_like(labels).scatter_(1, order, (torch.arange(n_images) % n_folds).expand_as(order))


def _score(labels: Int[Tensor, "labelings images"], named: Int[Tensor, "labelings images"], *, adjusted: bool
           ) -> np.ndarray:
    """Return the share named right, or Cohen's kappa of labels and names."""
    right = (labels == named).double().mean(dim=1).numpy()
    if not adjusted:
        return right
    n_labels = int(labels.max()) + 1
    shares = [torch.stack([torch.bincount(row, minlength=n_labels) for row in table]).double() / labels.shape[1]
              for table in (labels, named)]
    chance = (shares[0] * shares[1]).sum(dim=1).numpy()
    return np.where(chance < 1, (right - chance) / np.where(chance < 1, 1 - chance, 1), 0.0)


# ── least squares ─────────────────────────────────────────────────────────────────────────────────────────────────


def _ridge(rows: Float[Tensor, "images features"], labels: Int[Tensor, "labelings images"], *, penalty: float
           ) -> Int[Tensor, "labelings images"]:
    """Return the label that ridge regression on all other images names for each image.

    With H = 11'/n + X (X'X + λ)^-1 X' of centered X, the fit without image i gives it (Hy - h y)_i / (1 - h_i), where
    h is the diagonal of H: exact, for every labeling from the same H.
    """
    rows = rows / rows.abs().max().clamp(min=torch.finfo(rows.dtype).tiny)  # its own scale: squares stay finite
    left, variances = _directions(rows - rows.mean(dim=0))
    kept = variances / (variances + penalty * variances.mean())
    own = (left.square() @ kept + 1 / len(rows)).clamp(max=1 - 1e-6)[:, None]
    n_labels = labels.amax(dim=1) + 1
    named = []
    for chosen in _groups(n_labels.tolist(), 4 * len(rows)):
        width = int(n_labels[chosen].max())
        target = torch.nn.functional.one_hot(labels[chosen].T, width).to(rows).flatten(1)  # (n, L K)
        fitted = target.mean(dim=0) + left @ (kept[:, None] * (left.T @ target))
        without = ((fitted - own * target) / (1 - own)).view(len(rows), -1, width)
        exists = torch.arange(width) < n_labels[chosen][:, None]
        named.append(without.masked_fill(~exists.to(rows.device), -math.inf).argmax(dim=2).T.cpu())
    return torch.cat(named)


def _directions(centered: Float[Tensor, "images features"]
                ) -> tuple[Float[Tensor, "images rank"], Float[Tensor, " rank"]]:
    """Return the principal directions' unit coordinates of the images, and their sums of squares."""
    wide = centered.shape[1] > len(centered)
    table = (centered @ centered.T if wide else centered.T @ centered)
    squares, vectors = torch.linalg.eigh(table if table.device.type == "mps" else table.double())
    kept = squares > max(_RELATIVE_ZERO * float(squares[-1]), torch.finfo(squares.dtype).tiny)
    squares, vectors = squares[kept].to(centered), vectors[:, kept].to(centered)
    return (vectors, squares) if wide else (centered @ (vectors / squares.sqrt()), squares)


# ── logistic regression ───────────────────────────────────────────────────────────────────────────────────────────


def _logistic(rows: Float[Tensor, "images features"], labels: Int[Tensor, "labelings images"],
              folds: Int[Tensor, "labelings images"], *, penalty: float, n_iterations: int
              ) -> Int[Tensor, "labelings images"]:
    """Return the label that logistic regression on the other folds names for each image.

    A fit is of one labeling and one fold; many are one matrix product. All start from nothing: a start from the
    weights of all images would know the labels that are held out, and stop before it forgets them.
    """
    rows = rows - rows.mean(dim=0)
    if rows.shape[1] > len(rows):  # the rank's coordinates: the same fits, as the penalty does not see a rotation
        left, squares = _directions(rows)
        rows = left * squares.sqrt()
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    named = labels.clone()
    pairs = [(labeling, fold) for labeling in range(len(labels)) for fold in sorted(set(folds[labeling].tolist()))]
    sizes = [int(labels[labeling].max()) + 1 for labeling, _ in pairs]
    numbers = 4 * len(rows) + 2 * (_MEMORY + 3) * rows.shape[1]
    with bar("generalization", total=len(pairs), unit="fit") as shown:
        for group in _groups(sizes, numbers):
            some = [pairs[place] for place in group.tolist()]
            target = torch.stack([labels[labeling] for labeling, _ in some])
            held_out = torch.stack([folds[labeling] == fold for labeling, fold in some])
            fits = _Fits(rows, target.to(rows.device), ~held_out.to(rows.device), penalty)
            found = fits.solve(n_iterations).argmax(dim=1).cpu()
            for (labeling, _), row, hidden in zip(some, found, held_out, strict=True):
                named[labeling, hidden] = row[hidden]
            shown.advance(len(some))
    return named


class _Point(NamedTuple):
    # Where a search stands: weights (P, K, D), logits (P, K, n), losses (P,) and slopes (P, K, D).
    weights: Tensor
    logits: Tensor
    losses: Tensor
    slopes: Tensor


class _Fits:
    """P softmax regressions on the same rows, of which each learns from some images, by L-BFGS side by side.

    Each minimises the mean of its images' cross-entropy + penalty / (2 n) |W|², the bias (the last column of the rows,
    which is 1) left out. Two classes count as scikit-learn counts them, by one vector of weights: so twice the penalty.
    """

    def __init__(self, rows: Float[Tensor, "images features"], labels: Int[Tensor, "fits images"],
                 learned: Bool[Tensor, "fits images"], penalty: float) -> None:
        self.rows, self.columns, self.labels, self.learned = rows, rows.T.contiguous(), labels[:, None], learned
        self.n_labels = int(labels.max()) + 1
        counts = rows.new_zeros(len(labels), self.n_labels).scatter_add_(1, labels, learned.to(rows))
        self.absent = (counts == 0)[:, :, None]
        self.sizes = counts.sum(dim=1)
        self.penalty = rows.new_full((rows.shape[1],), penalty)
        self.penalty[-1] = 0
        self.penalty = self.penalty * (1 + ((counts > 0).sum(dim=1) == 2)).to(rows)[:, None, None]

    def solve(self, n_iterations: int) -> Float[Tensor, "fits labels images"]:
        """Return the logits of all images at the minimum."""
        weights = self.rows.new_zeros(len(self.sizes), self.n_labels, self.rows.shape[1])
        logits = self._logits(weights)
        losses, residuals = self._losses(weights, logits)
        at = _Point(weights, logits, losses, self._slopes(weights, residuals))
        memory: list[tuple[Tensor, Tensor, Tensor]] = []  # steps, changes of the slopes, 1 / (step · change)
        for _ in range(n_iterations):
            if bool((at.slopes.abs().amax(dim=(1, 2)) < _TOLERANCE).all()):
                break
            direction = _quasi_newton(at.slopes, memory)
            after = self._search(at, direction)
            step, change = after.weights - at.weights, after.slopes - at.slopes
            curvature = _dot(step, change)
            inverse = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-30), 0)
            memory = [*memory[-_MEMORY + 1 :], (step, change, inverse)]
            at = after
        return at.logits

    def _search(self, at: _Point, direction: Tensor) -> _Point:
        """Return a point along ``direction`` where every fit's loss has fallen enough, by halving the steps."""
        along, slope = self._logits(direction, masked=False), _dot(direction, at.slopes)
        length = torch.ones_like(slope)
        slack = 8 * torch.finfo(slope.dtype).eps * at.losses.abs()
        shortest = 0.5 ** _HALVINGS
        while True:
            weights = at.weights + length[:, None, None] * direction
            logits = at.logits + length[:, None, None] * along
            losses, residuals = self._losses(weights, logits)
            enough = losses <= at.losses + _ARMIJO * length * slope + slack
            if bool((enough | (length <= shortest)).all()):
                return _Point(weights, logits, losses, self._slopes(weights, residuals))
            length = torch.where(enough, length, length / 2)

    def _logits(self, weights: Tensor, *, masked: bool = True) -> Tensor:
        logits = (weights.flatten(0, 1) @ self.columns).view(*weights.shape[:2], -1)
        return logits.masked_fill_(self.absent, -math.inf) if masked else logits

    def _losses(self, weights: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each fit, and probabilities less targets of the images it learns from, 0 elsewhere."""
        logs = logits.log_softmax(dim=1)
        own = torch.where(self.learned, logs.gather(1, self.labels)[:, 0], 0).sum(dim=1)
        residuals = logs.exp_().scatter_add_(1, self.labels, logs.new_full((), -1).expand(self.labels.shape))
        quadratic = (self.penalty * weights.square()).flatten(1).sum(dim=1) / 2
        return (quadratic - own) / self.sizes, residuals.mul_(self.learned[:, None])

    def _slopes(self, weights: Tensor, residuals: Tensor) -> Tensor:
        pulled = (residuals.flatten(0, 1) @ self.rows).view(weights.shape)
        return (pulled + self.penalty * weights) / self.sizes[:, None, None]


def _quasi_newton(slopes: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return the L-BFGS direction of every fit (Nocedal 1980); downhill of length 1 at most where nothing is known."""
    if not memory:
        return -slopes / slopes.flatten(1).norm(dim=1).clamp(min=1)[:, None, None]
    turned, weights = slopes.clone(), []
    for step, change, inverse in reversed(memory):
        weights.append(inverse * _dot(step, turned))
        turned -= weights[-1][:, None, None] * change
    _, change, inverse = memory[-1]
    scale = 1 / (inverse * _dot(change, change)).clamp(min=1e-30)
    turned *= torch.where(inverse > 0, scale, 1)[:, None, None]
    for (step, change, inverse), weight in zip(memory, reversed(weights), strict=True):
        turned += (weight - inverse * _dot(change, turned))[:, None, None] * step
    return -turned


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).flatten(1).sum(dim=1)


# ── checks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _groups(widths: list[int], numbers: int) -> Iterator[Tensor]:
    """Yield consecutive places whose fits, each ``numbers`` times as many numbers as its width, are held at once."""
    group: list[int] = []
    for place in range(len(widths)):
        widest = max(widths[each] for each in [*group, place])
        if group and widest * numbers * (len(group) + 1) > _CELLS:
            yield torch.tensor(group)
            group = []
        group.append(place)
    yield torch.tensor(group)


def _spread(n: int, at_most: int | None) -> np.ndarray:
    return np.arange(n) if at_most is None or n <= at_most else np.linspace(0, n - 1, at_most).astype(np.int64)


def _whole(labels: np.ndarray) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim not in (1, 2) or 0 in found.shape or found.dtype.kind not in "iub":
        raise InputError("labels must be whole numbers (n_images,) or (n_labelings, n_images), got "
                         f"{found.dtype} of shape {found.shape}")
    return found


def _faults(labels: np.ndarray, spaces: list[np.ndarray], n_folds: int, classifier: str,
            regularization: float | None, n_iterations: int, max_images: int | None) -> Iterator[InputError]:
    n_images = labels.shape[1]
    if any(len(space) != n_images for space in spaces):
        yield InputError(f"labels of {n_images} images do not fit embeddings of {len(spaces[0])}",
                         "score with the embeddings of the same images")
    if classifier not in ("logistic", "ridge"):
        yield InputError(f"classifier={classifier!r} is not allowed", nearest(str(classifier), ["logistic", "ridge"]))
    taken = n_images if max_images is None else min(n_images, max_images)
    if not 2 <= n_folds <= taken:
        yield InputError(f"n_folds must be 2 to {taken}, the number of images, got {n_folds}",
                         "lower n_folds or give more images")
    if regularization is not None and not 0 < regularization < math.inf:
        yield InputError(f"regularization must be above 0 and finite, got {regularization}")
    if n_iterations < 1:
        yield InputError(f"n_iterations must be at least 1, got {n_iterations}")
