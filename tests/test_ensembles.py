"""Ensembles: agreement, alignment and means against loops, and what must not change them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import naive
from phyla.ensembles import (
    adjusted_rand,
    agreed,
    align,
    aligned,
    cluster_stability,
    co_association,
    effective_counts,
    hardened,
    one_hot,
    pair_agreement,
    transported,
    weighted_average,
)
from phyla.errors import InputError

SEEDS = st.integers(0, 10_000)


def tables(seed: int, n: int = 17, sizes: tuple[int, ...] = (4, 4, 3, 6)) -> list[Tensor]:
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(draw.dirichlet(np.full(k, 0.4), size=n)) for k in sizes]


def labels_of(members: list[Tensor]) -> list[list[int]]:
    return [member.argmax(dim=1).tolist() for member in members]


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_adjusted_rand_is_that_of_every_pair_of_images(seed: int):
    members = tables(seed)
    found, labels = adjusted_rand(members), labels_of(members)
    for i, first in enumerate(labels):
        for j, second in enumerate(labels):
            assert float(found[i, j]) == pytest.approx(naive.ari(first, second), abs=1e-12)


def test_collapsed_members_agree_with_one_another_and_with_no_other():
    collapsed, other = torch.eye(3).double()[[0] * 6], torch.eye(3).double()[[0, 1, 2] * 2]
    assert adjusted_rand([collapsed, collapsed, other]).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert effective_counts([collapsed, other]).tolist() == pytest.approx([1, 3])


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_members_are_aligned_as_the_best_of_all_numberings(seed: int):
    reference, *members = tables(seed)
    for member, found in zip(members, aligned(members, reference), strict=True):
        table = naive.member_map(member.numpy(), reference.numpy())
        np.testing.assert_allclose(found.numpy(), member.numpy() @ np.array(table), atol=1e-12)


def test_a_member_of_more_clusters_is_its_co_association_times_the_reference():
    reference, member = torch.eye(2).double()[[0, 0, 1, 1, 1]], torch.eye(3).double()[[0, 0, 1, 2, 2]]
    together = co_association([member], torch.ones(1), torch.arange(5))
    expected = together / together.sum(dim=1, keepdim=True) @ reference
    assert torch.equal(aligned([member], reference)[0], expected)


def test_an_empty_cluster_says_nothing():
    assert align(torch.tensor([[2.0, 2.0], [0.0, 0.0], [0.0, 4.0]])).tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_mean_and_co_association_are_those_of_loops(seed: int):
    members, weights = tables(seed, sizes=(4, 4, 4)), torch.tensor([0.2, 0.0, 1.7], dtype=torch.float64)
    found = weighted_average(members, weights).numpy()
    expected = naive.weighted_average([m.numpy() for m in members], weights.tolist())
    np.testing.assert_allclose(found, expected, atol=1e-12)
    several = tables(seed, sizes=(4, 2, 5))
    full = np.array(naive.co_association([m.numpy() for m in several], weights.tolist()))
    rows = torch.tensor([3, 0, 11])
    np.testing.assert_allclose(co_association(several, weights, rows).numpy(), full[rows.numpy()], atol=1e-12)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]):
    with pytest.raises(InputError, match="weights"):
        weighted_average(tables(0, sizes=(4, 4)), torch.tensor(weights))


def test_the_consensus_does_not_depend_on_how_members_number_their_clusters():
    draw = np.random.default_rng(0)
    truth = np.arange(60) % 4
    noisy = [np.where(draw.random(60) < 0.1, draw.integers(0, 4, 60), truth) for _ in range(7)]
    weights = torch.ones(7)
    plain = [one_hot(torch.from_numpy(each), 4, like=torch.zeros(())) for each in noisy]
    renumbered = [each[:, torch.from_numpy(draw.permutation(4))] for each in plain]
    first, _ = agreed(plain, weights, start=plain[0])
    second, maps = agreed(renumbered, weights, start=plain[0])
    assert torch.equal(first, second)
    assert first.argmax(dim=1).tolist() == truth.tolist()
    assert torch.allclose(weighted_average([m @ t for m, t in zip(renumbered, maps, strict=True)], weights), second)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_pair_agreement_is_that_of_every_two_members(seed: int):
    draw = np.random.default_rng(seed)
    labels, weights = draw.integers(0, 3, (5, 11)), draw.random(5)
    pairs = [(a, b, weights[a] * weights[b]) for a in range(5) for b in range(5) if a != b]
    found = pair_agreement([torch.from_numpy(each) for each in labels], torch.from_numpy(weights), 3)
    for i in range(11):
        agreeing = sum(weight for a, b, weight in pairs if labels[a, i] == labels[b, i])
        assert float(found[i]) == pytest.approx(agreeing / sum(weight for *_, weight in pairs))
    assert pair_agreement([torch.from_numpy(labels[0])], torch.ones(1).double(), 3).tolist() == [1] * 11


def test_stability_is_the_mean_jaccard_index():
    labels, same, other = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    found = cluster_stability(labels, [same, other], torch.tensor([3.0, 1.0]), 3)
    assert found.tolist() == pytest.approx([0.75 + 0.25 / 2, 0.75 + 0.25 * 2 / 3, 0])


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_transport_is_sinkhorn_and_meets_the_prior(seed: int):
    table, prior = tables(seed)[0] + 0.01, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    steps = transported(table, prior, n_rounds=3, tolerance=0)
    np.testing.assert_allclose(steps.numpy(), naive.transported(table.numpy(), prior.tolist(), n_rounds=3), atol=1e-12)
    whole = transported(table, 5 * prior, n_rounds=5000)
    assert torch.allclose(whole.mean(dim=0), prior, atol=1e-5)
    assert torch.allclose(whole.sum(dim=1), torch.ones(17).double())


def test_the_hardest_table_has_the_lowest_of_equal_clusters():
    assert hardened(torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.2, 0.7]])).tolist() == [[1, 0, 0], [0, 0, 1]]
