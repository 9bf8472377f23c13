"""How well labels carry over to held-out images: as scikit-learn says, one left out by hand, what must not matter."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from phyla import quality
from phyla.errors import InputError
from phyla.generalization import folds_of, generalization_score


def blobs(seed: int = 0, n: int = 240, d: int = 12, n_clusters: int = 4, spread: float = 1.0
          ) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % n_clusters
    return draw.normal(size=(n_clusters, d))[labels] + spread * draw.normal(size=(n, d)), labels


def noisy(labels: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.where(draw.random(len(labels)) < share, draw.permutation(labels), labels)


def by_scikit_learn(labels: np.ndarray, rows: np.ndarray, n_folds: int) -> np.ndarray:
    folds = folds_of(torch.from_numpy(labels)[None], n_folds, random_state=0)[0].numpy()
    return cross_val_predict(LogisticRegression(C=1, max_iter=1000), rows, labels, cv=PredefinedSplit(folds))


# ── what it computes ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n_clusters", "d"), [(2, 12), (4, 12), (4, 300)])  # two classes are a form of their own
def test_logistic_is_scikit_learns_to_a_few_images(n_clusters, d):
    rows, labels = blobs(n_clusters=n_clusters, d=d, spread=1.5)
    labels = noisy(labels, 0.2)
    named = by_scikit_learn(labels, rows, n_folds=5)
    found = generalization_score(labels, rows, n_folds=5)
    assert abs(found - np.mean(named == labels)) * len(labels) < 3.5
    kappa = generalization_score(labels, rows, n_folds=5, adjusted=True)
    assert kappa == pytest.approx(cohen_kappa_score(labels, named), abs=0.02)


def test_ridge_is_every_image_left_out_by_hand():
    rows, labels = blobs(n=40, d=6, spread=1.5)
    penalty = 0.1 * np.linalg.eigvalsh(np.cov(rows.T, bias=True) * len(rows)).mean()
    right = 0
    for i in range(len(rows)):
        others = np.delete(np.arange(len(rows)), i)
        # H is centered on all images; leaving one out moves the mean too, as an intercept without a penalty does
        x, y = rows[others], np.eye(4)[labels[others]]
        centered = x - x.mean(axis=0)
        weight = np.linalg.solve(centered.T @ centered + penalty * np.eye(6), centered.T @ (y - y.mean(axis=0)))
        right += int((y.mean(axis=0) + (rows[i] - x.mean(axis=0)) @ weight).argmax() == labels[i])
    assert generalization_score(labels, rows, classifier="ridge") == pytest.approx(right / len(rows))


@pytest.mark.parametrize("classifier", ["logistic", "ridge"])
def test_many_labelings_are_each_scored_as_alone(classifier):
    rows, labels = blobs()
    many = np.stack([labels, noisy(labels, 0.5), labels // 2, np.zeros_like(labels), labels + 7])
    found = generalization_score(many, rows, classifier=classifier)
    alone = [generalization_score(each, rows, classifier=classifier) for each in many]
    assert found == pytest.approx(alone, abs=1.5 / len(labels))
    assert found[1] < found[0] and found[4] == found[0] and found[3] == 1


def test_groups_of_fits_are_as_one(monkeypatch):
    rows, labels = blobs(n=120)
    many = np.stack([noisy(labels, share) for share in (0.0, 0.3, 0.6)])
    whole = {name: generalization_score(many, rows, classifier=name) for name in ("logistic", "ridge")}
    monkeypatch.setattr("phyla.generalization._CELLS", 1 << 14)
    for name, expected in whole.items():
        found = generalization_score(many, rows, classifier=name)
        assert found == pytest.approx(expected, abs=1.5 / len(labels))


def test_spaces_are_averaged():
    first, labels = blobs()
    second = np.random.default_rng(1).normal(size=(len(labels), 5))
    alone = [generalization_score(labels, each) for each in (first, second)]
    assert generalization_score(labels, [first, second]) == pytest.approx(np.mean(alone))
    assert alone[0] > 0.7 and alone[1] < 0.4


@pytest.mark.parametrize("classifier", ["logistic", "ridge"])
def test_neither_a_rotation_nor_a_shift_matters(classifier):
    rows, labels = blobs(d=300)  # more features than images: the other way through the decomposition
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 300)))[0]
    labels = noisy(labels, 0.3)
    found = generalization_score(labels, rows @ turn + 5, classifier=classifier)
    assert found == pytest.approx(generalization_score(labels, rows, classifier=classifier), abs=3 / len(labels))


def test_the_order_of_images_does_not_matter_much():
    rows, labels = blobs()
    order = np.argsort(labels, kind="stable")  # a folder sorted by class
    assert generalization_score(labels[order], rows[order]) == pytest.approx(
        generalization_score(labels, rows), abs=0.05)


def test_folds_are_even_and_split_every_label_evenly():
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (2, 203)))
    for row, folds in zip(labels, folds_of(labels, 10, random_state=0), strict=True):
        table = torch.zeros(5, 10, dtype=torch.long).index_put_((row, folds), torch.tensor(1), accumulate=True)
        sizes = table.sum(dim=0)
        assert int(sizes.max() - sizes.min()) == 1
        assert int((table.amax(dim=1) - table.amin(dim=1)).max()) <= 1


def test_max_images_takes_them_evenly():
    rows, labels = blobs()
    chosen = np.linspace(0, len(rows) - 1, 50).astype(int)
    found = generalization_score(labels, rows, max_images=50)
    assert found == generalization_score(labels[chosen], rows[chosen])


# ── what it says of poor labels ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("classifier", ["logistic", "ridge"])
def test_a_collapse_scores_one_and_nothing_when_adjusted(classifier):
    rows, labels = blobs()
    collapsed = np.full(len(labels), 3)
    assert generalization_score(collapsed, rows, classifier=classifier) == 1
    assert generalization_score(collapsed, rows, classifier=classifier, adjusted=True) == 0
    almost = np.where(np.arange(len(labels)) < 5, 1, 0)  # one label that nothing predicts
    assert abs(generalization_score(almost, rows, classifier=classifier, adjusted=True)) < 0.2
    assert abs(generalization_score(noisy(labels, 1.0), rows, classifier=classifier, adjusted=True)) < 0.15
    assert generalization_score(labels, rows, classifier=classifier, adjusted=True) > 0.8


@pytest.mark.parametrize("classifier", ["logistic", "ridge"])
def test_labels_of_fewer_images_than_folds(classifier):
    rows, labels = blobs(n=42, spread=0.1)
    labels = labels.copy()
    labels[0] = 9  # alone: never named
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        found = generalization_score(labels, rows, classifier=classifier)
    assert found == pytest.approx(41 / 42)


def test_every_image_a_label_of_its_own_scores_zero():
    rows, _ = blobs(n=20)
    for classifier in ("logistic", "ridge"):
        assert generalization_score(np.arange(20), rows, classifier=classifier) == 0


def test_ridge_does_not_mind_the_scale():
    rows, labels = blobs(spread=1.5)
    found = [generalization_score(labels, (factor * rows).astype(np.float32), classifier="ridge")
             for factor in (1.0, 1e-30, 1e36)]
    assert found == pytest.approx([found[0]] * 3, abs=1.5 / len(labels))


def test_constant_embeddings_know_nothing():
    labels = np.arange(40) % 2
    for classifier in ("logistic", "ridge"):
        assert generalization_score(labels, np.ones((40, 3)), classifier=classifier, adjusted=True) <= 0


def test_quality_offers_it():
    assert quality.generalization_score is generalization_score


@pytest.mark.parametrize(("change", "message"), [
    ({"labels": np.zeros(40)}, "whole numbers"),
    ({"labels": np.zeros((1, 1, 40), int)}, "whole numbers"),
    ({"labels": np.zeros(39, int)}, "do not fit"),
    ({"n_folds": 1}, "n_folds"),
    ({"n_folds": 41}, "n_folds"),
    ({"n_folds": 10, "max_images": 9}, "n_folds"),
    ({"regularization": 0.0}, "regularization"),
    ({"n_iterations": 0}, "n_iterations"),
])
def test_what_cannot_be_used_is_told(change, message):
    given = {"labels": np.arange(40) % 2, "embeddings": np.ones((40, 3))} | change
    with pytest.raises(InputError, match=message):
        generalization_score(**given)
