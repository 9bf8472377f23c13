"""The largest few of a matrix in tiles: always those of the whole matrix, however the tiles fall."""

import numpy as np
import pytest
import torch

from phyla.candidates import GROUP, Largest, largest

ORDERS = ("any", "rising", "falling", "late", "equal")


def matrix(order: str, n_rows: int, n_columns: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))
    if order in ("rising", "falling"):
        values = values.sort(dim=1, descending=order == "falling").values
    if order == "late":  # all that is large lies together near the end, for half of the rows
        values[::2, -3 * GROUP : -GROUP] += 9
    return torch.ones_like(values) if order == "equal" else values


def kept(values: torch.Tensor, width: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = Largest(len(values), width, values)
    for start in range(0, values.shape[1], tile):
        part = values[:, start : start + tile]
        filled = -(-part.shape[1] // GROUP) * GROUP
        best.add(torch.nn.functional.pad(part, (0, filled - part.shape[1]), value=-torch.inf), start)
    return best.result()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("width", "tile"), [(1, 64), (5, 16), (7, 160), (40, 32), (40, 4096), (3, 1600)])
def test_it_keeps_the_largest_of_all(order, width, tile):
    values = matrix(order, 30, 1300)
    found, columns = kept(values, width, tile)
    assert found.shape == columns.shape == (30, width)
    np.testing.assert_array_equal(-np.sort(-found.numpy()), values.topk(width, dim=1).values.numpy())
    np.testing.assert_array_equal(values.gather(1, columns).numpy(), found.numpy())
    assert all(len(set(row)) == width for row in columns.tolist())


def test_one_row_may_be_full_of_large_values():
    """A row that exceeds its floor everywhere, among rows that never do, is ranked and nothing is lost."""
    values = matrix("falling", 50, 2000)
    values[17] = torch.arange(2000.0)
    found, columns = kept(values, 9, 400)
    assert sorted(columns[17].tolist()) == list(range(1991, 2000))
    np.testing.assert_array_equal(-np.sort(-found.numpy()), values.topk(9, dim=1).values.numpy())


def test_past_the_first_tile_only_what_exceeds_the_floor_is_ranked(monkeypatch):
    ranked = []
    monkeypatch.setattr(Largest, "_add_ranked", lambda self, tile, start, was=Largest._add_ranked: (
        ranked.append(start), was(self, tile, start))[1])
    kept(matrix("any", 20, 16 * 400), 10, 400)
    assert ranked == [0]
    ranked.clear()
    kept(matrix("rising", 20, 16 * 400), 10, 400)
    assert len(ranked) == 16, "where every tile is larger than the last, every tile is ranked"


def test_what_a_query_may_not_find_is_left_out():
    values = matrix("any", 12, 200)
    values[torch.arange(12), torch.arange(12)] = -torch.inf
    found, columns = kept(values, 199, 48)
    assert torch.isfinite(found).all() and not (columns == torch.arange(12)[:, None]).any()


@pytest.mark.parametrize(("n_columns", "width"), [(160, 9), (1600, 9), (1600, 100)])
def test_largest_of_one_tile(n_columns, width):
    values = matrix("any", 9, n_columns)
    found, columns = largest(values, width)
    np.testing.assert_array_equal(-np.sort(-found.numpy()), values.topk(width, dim=1).values.numpy())
    np.testing.assert_array_equal(values.gather(1, columns).numpy(), found.numpy())
