"""Principal axes against a decomposition, coordinates in a graph against a dense one."""

import numpy as np
import pytest

from phyla.errors import InputError
from phyla.neighbors import find_neighbors
from phyla.principal import graph_coordinates, principal_axes, principal_rows
from phyla.types import Neighbors


def test_axes_are_those_of_the_singular_value_decomposition():
    rows = np.random.default_rng(0).standard_normal((80, 6)) * [5, 4, 3, 2, 1, 0.5] + 7
    found = principal_axes(rows, 4)
    exact = np.linalg.svd(rows - rows.mean(axis=0))[2][:4].T
    np.testing.assert_allclose(np.abs(found.T @ exact), np.eye(4), atol=1e-5)
    assert (found[np.abs(found).argmax(axis=0), np.arange(4)] > 0).all()


def test_of_many_features_the_axes_are_the_same():
    rows = (np.random.default_rng(0).standard_normal((300, 200)) * 0.97 ** np.arange(200)).astype(np.float32)
    found, exact = principal_axes(rows, 8), np.linalg.svd(rows - rows.mean(axis=0))[2][:8].T
    np.testing.assert_allclose(np.abs((found * exact).sum(axis=0)), 1, atol=1e-3)


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
    values, vectors = (each[..., ::-1][..., :3] for each in np.linalg.eigh(root[:, None] * tied * root))
    for power in (0, 4):
        found, exact = graph_coordinates(neighbors, 3, power=power), vectors * values**power
        np.testing.assert_allclose(found @ found.T / 40, exact @ exact.T, atol=1e-3)
    fewer = find_neighbors(np.random.default_rng(0).standard_normal((40, 3)), 4)
    first = graph_coordinates(fewer, 3)
    np.testing.assert_allclose(np.abs(graph_coordinates(neighbors, 3, n_neighbors=4)), np.abs(first), atol=1e-3)


def test_groups_without_ties_lie_apart():
    group = np.array([[1, 2], [2, 0], [0, 1]])
    two = Neighbors(np.concatenate([group, group + 3]), np.full((6, 2), 0.5, np.float32))
    found = graph_coordinates(two, 2)
    np.testing.assert_allclose(found @ found.T, 2 * np.kron(np.eye(2), np.ones((3, 3))), atol=1e-4)


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_components_are_whitened_in_part(whiten: float):
    rows = np.random.default_rng(0).standard_normal((200, 5)) * [8, 4, 2, 1, 0.5] + 3
    left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    exact = left * sizes ** (1 - whiten)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    found = principal_rows(rows, 5, whiten=whiten)
    np.testing.assert_allclose(found @ found.T, exact @ exact.T, atol=1e-4)
    assert principal_rows(np.ones((4, 3)), 2).tolist() == [[0.0]] * 4


def test_as_many_coordinates_as_images_are_refused():
    with pytest.raises(InputError, match="coordinates"):
        graph_coordinates(Neighbors(np.array([[1], [0]]), np.ones((2, 1), np.float32)), 2)
