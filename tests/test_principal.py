"""Principal axes against a decomposition, coordinates in a graph against a dense one."""

import numpy as np
import pytest

from phyla.errors import InputError
from phyla.neighbors import find_neighbors
from phyla.principal import graph_coordinates, principal_axes
from phyla.types import Neighbors


def test_axes_are_those_of_the_singular_value_decomposition():
    rows = np.random.default_rng(0).standard_normal((80, 6)) * [5, 4, 3, 2, 1, 0.5] + 7
    found = principal_axes(rows, 4)
    exact = np.linalg.svd(rows - rows.mean(axis=0))[2][:4].T
    np.testing.assert_allclose(np.abs(found.T @ exact), np.eye(4), atol=1e-5)
    assert (found[np.abs(found).argmax(axis=0), np.arange(4)] > 0).all()


def test_directions_in_which_nothing_varies_are_left_out():
    rows = np.random.default_rng(0).standard_normal((50, 2)) @ np.ones((2, 5)) + 1
    assert principal_axes(rows, 4).shape == (5, 1)
    assert principal_axes(np.ones((5, 3), np.float32), 2).shape == (3, 1)


def test_coordinates_are_the_eigenvectors_of_the_dense_graph():
    neighbors = find_neighbors(np.random.default_rng(0).standard_normal((40, 3)), 6)
    distances = np.sqrt(2 - 2 * neighbors.similarities.astype(np.float64))
    strength = np.zeros((40, 40))
    for i, row in enumerate(neighbors.indices):
        beyond = distances[i] - distances[i, 0]
        strength[i, row] = np.exp(-beyond / beyond.mean())
    tied = strength + strength.T - strength * strength.T + 1e-3 * np.eye(40)
    root = tied.sum(axis=1) ** -0.5
    exact = np.linalg.eigh(root[:, None] * tied * root)[1][:, ::-1][:, :3]
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    found = graph_coordinates(neighbors, 3)
    np.testing.assert_allclose(found @ found.T, exact @ exact.T, atol=1e-3)


def test_groups_without_ties_lie_apart():
    group = np.array([[1, 2], [2, 0], [0, 1]])
    two = Neighbors(np.concatenate([group, group + 3]), np.full((6, 2), 0.5, np.float32))
    found = graph_coordinates(two, 2)
    np.testing.assert_allclose(found @ found.T, np.kron(np.eye(2), np.ones((3, 3))), atol=1e-4)


def test_as_many_coordinates_as_images_are_refused():
    with pytest.raises(InputError, match="coordinates"):
        graph_coordinates(Neighbors(np.array([[1], [0]]), np.ones((2, 1), np.float32)), 2)
