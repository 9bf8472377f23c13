"""Consensus: finds what members agree on, leaves out what is no member, and ships what it says."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError

import naive
from phyla.errors import InputError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterNet, build_projection
from phyla.refine.consensus import (
    Consensus,
    mean_likeness,
    most_sure,
    near_images,
    own_members,
    smoothed,
    unusable,
)
from phyla.training.device import choose_device
from phyla.types import Embeddings

FEW = {"n_restarts": 1, "n_neighbors": 8, "n_steps": 60}


def groups(n: int = 160, k: int = 4, seed: int = 0, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of k directions with noise, and which is which; one group is half as large."""
    draw = np.random.default_rng(seed)
    truth = np.minimum(np.arange(n) * (2 * k - 1) // (2 * n), k - 1)
    rows = 3 * np.eye(width)[truth] + 0.5 * draw.standard_normal((n, width)) + 2
    return rows.astype(np.float32), truth


def noisy(truth: np.ndarray, k: int, share: float, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    other = np.where(draw.random(len(truth)) < share, draw.integers(0, k, len(truth)), truth)
    return draw.permutation(k)[other]


def test_members_that_err_apart_are_right_together():
    rows, truth = groups()
    members = [noisy(truth, 4, 0.4, seed) for seed in range(9)]
    found = Consensus(n_clusters=4, adaptive=False).fit(rows, members=members)
    assert max(hungarian_accuracy(truth, member) for member in members) < 0.8
    assert hungarian_accuracy(truth, found.labels_) > 0.98
    assert (found.aligned_ == found.labels_).mean() > 0.65
    assert found.notices_ == []


def test_members_may_have_other_numbers_of_clusters():
    rows, truth = groups()
    finer = [truth * 2 + np.arange(160) % 2, truth * 3 + np.arange(160) % 3]
    merged = [np.minimum(truth, 2)]
    found = Consensus(n_clusters=4).fit(rows, members=[noisy(truth, 4, 0.3, 0), *finer, *merged])
    assert hungarian_accuracy(truth, found.labels_) > 0.97


def test_soft_and_hard_members_are_the_same():
    rows, truth = groups()
    members = [noisy(truth, 4, 0.3, seed) for seed in range(4)]
    hard = Consensus(n_clusters=4).fit(rows, members=members)
    soft = Consensus(n_clusters=4).fit(rows, members=[np.eye(4)[member] for member in members])
    assert np.array_equal(hard.probabilities_, soft.probabilities_)


def test_a_collapsed_and_a_random_member_have_no_weight_and_are_told():
    rows, truth = groups()
    members = [noisy(truth, 4, 0.2, seed) for seed in range(5)]
    members += [np.zeros(160, np.int64), np.random.default_rng(9).integers(0, 4, 160)]
    found = Consensus(n_clusters=4).fit(rows, members=members)
    assert (found.weights_[5:] == 0).all()
    assert found.weights_.sum() == pytest.approx(1)
    assert [line.split(":")[0] for line in found.notices_] == ["member 5 left out", "member 6 left out"]
    assert "collapsed" in found.notices_[0]


def test_scores_given_are_factors_of_the_weights():
    rows, truth = groups()
    members = [noisy(truth, 4, 0.2, seed) for seed in range(3)]
    found = Consensus(n_clusters=4, stability_power=0).fit(rows, members=members, member_scores=[1, 3, 0])
    assert found.weights_.tolist() == [0.25, 0.75, 0]
    for wrong in ([1, 1], [1, 1, -1], [1, 1, float("nan")]):
        with pytest.raises(InputError, match="scores"):
            Consensus(n_clusters=4).fit(rows, members=members, member_scores=wrong)


def test_members_that_say_nothing_weigh_alike_and_it_is_told():
    rows, truth = groups()
    found = Consensus(n_clusters=4).fit(rows, members=[noisy(truth, 4, 0.2, 0), noisy(truth, 4, 0.2, 1)],
                                        member_scores=[0, 0])
    assert found.weights_.tolist() == [0.5, 0.5]
    assert "weigh alike" in found.notices_[0]


@pytest.mark.parametrize("hidden", [0, 8])
def test_double_precision_is_taken(hidden: int):
    rows, _ = groups()
    found = Consensus(n_clusters=4, hidden=hidden, **FEW).fit(rows.astype(np.float64))
    assert np.array_equal(found.predict(rows.astype(np.float64)), found.labels_)


def test_makes_its_own_members_in_every_space():
    rows, truth = groups()
    spaces = [rows[:, :4], 50 * rows[:, 2:]]
    found = Consensus(n_clusters=4, **FEW).fit(spaces)
    assert len(found.weights_) == 3 * 13
    assert hungarian_accuracy(truth, found.labels_) > 0.95
    beside = Embeddings(np.hstack(spaces), [str(i) for i in range(160)], widths=(4, 4))
    assert np.array_equal(Consensus(n_clusters=4, **FEW).fit(beside).probabilities_, found.probabilities_)


def test_attributes_have_their_shapes():
    rows, _ = groups()
    found = Consensus(n_clusters=4, **FEW).fit(rows)
    n_members = len(found.weights_)
    shapes = {"labels_": (160,), "probabilities_": (160, 4), "aligned_": (n_members, 160), "agreement_": (160,),
              "stability_": (4,), "member_scores_": (n_members,), "weights_": (n_members,)}
    for name, shape in shapes.items():
        assert getattr(found, name).shape == shape, name
    assert found.probabilities_.dtype == np.float32
    assert found.labels_.dtype == np.int64
    assert np.array_equal(found.labels_, found.probabilities_.argmax(axis=1))
    assert (found.agreement_ <= 1 + 1e-6).all()


@pytest.mark.parametrize("hidden", [0, 16])
def test_the_parts_are_the_classifier(hidden: int):
    rows, _ = groups()
    spaces = [rows[:, :4] * 100, rows[:, 2:]]
    found = Consensus(n_clusters=4, hidden=hidden, **FEW).fit(spaces)
    projection, head = found.as_parts()
    again = build_projection(projection.spec())
    again.load_state_dict(projection.state_dict())
    with torch.no_grad():
        shipped = ClusterNet(torch.nn.Identity(), head, again).probabilities(torch.from_numpy(np.hstack(spaces)))[:, 0]
    np.testing.assert_allclose(shipped.numpy(), found.probabilities_, atol=1e-5)
    np.testing.assert_allclose(found.predict_proba(spaces), found.probabilities_, atol=1e-6)
    assert np.array_equal(found.predict(np.hstack(spaces)), found.labels_)


def test_an_even_prior_is_imposed_only_when_asked_for():
    along = np.linspace(0, 1, 200)
    rows = np.stack([np.cos(along), np.sin(along), 0.1 * np.sin(40 * along)], axis=1)
    second = 1 / (1 + np.exp(8 * (0.75 - along)))  # a quarter of the images
    members = [np.stack([1 - second, second], axis=1)] * 3
    as_found = Consensus(n_clusters=2, confident_share=1.0).fit(rows, members=members)
    even = Consensus(n_clusters=2, prior="uniform").fit(rows, members=members)
    assert np.bincount(as_found.labels_) == pytest.approx([150, 50], abs=15)
    assert np.bincount(even.labels_) == pytest.approx([100, 100], abs=12)


@pytest.mark.parametrize("calibration", ["agreement", "pairs", "neighbors"])
def test_mean_confidence_is_what_was_estimated(calibration: str):
    rows, truth = groups()
    members = [noisy(truth, 4, 0.3, seed) for seed in range(5)]
    found = Consensus(n_clusters=4, calibration=calibration).fit(rows, members=members)
    plain = Consensus(n_clusters=4, calibration="none").fit(rows, members=members)
    assert np.array_equal(found.labels_, plain.labels_)
    assert plain.temperature_ == 1
    if calibration != "neighbors":
        assert found.probabilities_.max(axis=1).mean() == pytest.approx(found.expected_accuracy_, abs=1e-4)


def test_the_same_seed_gives_the_same_and_none_draws_one():
    rows, truth = groups()
    first, second = (Consensus(n_clusters=4, **FEW).fit(rows).probabilities_ for _ in range(2))
    assert np.array_equal(first, second)
    drawn = Consensus(n_clusters=4, random_state=None, **FEW).fit(rows)
    assert hungarian_accuracy(truth, drawn.labels_) > 0.9


@pytest.mark.slow
def test_digits_are_found_better_than_by_one_start_of_kmeans():
    rows, truth = load_digits(return_X_y=True)
    found = Consensus(n_clusters=10).fit(rows)
    members = [hungarian_accuracy(truth, member) for member in found.aligned_]
    assert hungarian_accuracy(truth, found.labels_) > np.mean(members)


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_near_images_are_mutual_and_end_at_the_fall():
    neighbors = find_neighbors(np.random.default_rng(0).standard_normal((60, 4)), 9)
    expected = naive.near_images(neighbors.indices, neighbors.similarities, least=3)
    assert near_images(neighbors).counts.tolist() == np.array(expected, float).tolist()


def test_smoothing_is_the_mean_over_near_images():
    neighbors = find_neighbors(np.random.default_rng(0).standard_normal((30, 4)), 5)
    near, votes = near_images(neighbors), torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(3), 30))
    found = smoothed(votes, near, share=0.25)
    for i in range(30):
        named = [votes[j].tolist() for j, counts in zip(near.indices[i], near.counts[i], strict=True) if counts]
        expected = [0.75 * float(votes[i, c]) + 0.25 * naive.mean([row[c] for row in named]) if named
                    else float(votes[i, c]) for c in range(3)]
        assert found[i].tolist() == pytest.approx(expected)


def test_the_surest_of_each_cluster_are_kept():
    targets = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    assert most_sure(targets, 0.5).tolist() == pytest.approx([0.9, 0, 0.7, 0.8, 0])
    assert most_sure(targets, 1.0).tolist() == pytest.approx([0.9, 0.6, 0.7, 0.8, 0.5])


def test_likeness_leaves_out_the_member_itself():
    assert mean_likeness(torch.tensor([[1.0, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]])).tolist() == pytest.approx(
        [0.3, 0.4, 0.5])
    assert mean_likeness(torch.ones(1, 1)).tolist() == [1]


def test_who_cannot_be_used_and_why():
    found = dict(unusable(np.array([4.0, 1.5, 4.0, 4.0]), np.array([0.8, 0.8, 0.3, 0.7]), 4))
    assert set(found) == {1, 2}
    assert "collapsed to 1.5 clusters of 4" in found[1]
    assert "0.30" in found[2]


def test_own_members_are_as_many_as_tables_and_starts():
    rows, _ = groups(60)
    made = own_members([rows], n_clusters=3, n_restarts=2, n_components=4, seed=0, device=choose_device("cpu"))
    assert len(made) == 2 * (4 + 9)
    assert all(member.shape == (60,) for member in made)


# ── the contract ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("options", "message"), [
    ({"n_clusters": 1}, "n_clusters must be at least 2"), ({"n_clusters": 160}, "needs more than 160 images"),
    ({"smoothing": 1.5}, "smoothing must be"), ({"confident_share": 0}, "confident_share must be"),
    ({"prior": "even"}, "prior='even'"), ({"calibration": "labels"}, "calibration"), ({"lr": 0}, "lr must be"),
])
def test_options_out_of_their_range_are_refused(options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        Consensus().set_params(**options).fit(groups()[0])


@pytest.mark.parametrize(("member", "message"), [
    (np.zeros(5, np.int64), "member 1 must be labels"), (np.zeros((160, 0)), "member 1 must be labels"),
    (np.full(160, -1), "whole numbers"), (np.zeros(160), "whole numbers"), (np.ones((160, 4)), "sum to 1"),
    (np.full((160, 4), np.nan), "sum to 1"),
])
def test_members_that_are_none_are_refused(member: np.ndarray, message: str):
    rows, truth = groups()
    with pytest.raises(InputError, match=message):
        Consensus(n_clusters=4).fit(rows, members=[truth, member])


def test_members_none_of_which_has_the_wanted_clusters_are_refused():
    rows, truth = groups()
    with pytest.raises(InputError, match="no member with 3 clusters"):
        Consensus(n_clusters=3).fit(rows, members=[truth, truth])
    with pytest.raises(InputError, match="no members"):
        Consensus(n_clusters=3).fit(rows, members=[])


def test_embeddings_of_another_width_are_refused():
    rows, _ = groups()
    with pytest.raises(NotFittedError):
        Consensus().predict(rows)
    found = Consensus(n_clusters=4, **FEW).fit(rows)
    with pytest.raises(InputError, match="do not fit"):
        found.predict(rows[:, :3])
    assert clone(found).get_params() == found.get_params()
