"""Keep the largest few of every row of a matrix that is never whole: it comes tile by tile, and so is forgotten.

Once a row has as many as are wanted, the smallest of them is its floor, and of a later tile only what exceeds the floor
is looked at. Of a million columns in no order that is a few hundred a row, so that past the first tiles the work is to
find each group's largest value and compare it with the floor.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GROUP = 16
"""Columns of which only the largest is looked at first; a tile has a whole number of groups."""

_ROOM = 6  # times the wanted number that a row can hold before it is thinned


class Largest:
    """The ``width`` largest values of each row of the tiles so far, with their columns."""

    def __init__(self, n_rows: int, width: int, like: Tensor) -> None:
        self.width, room = width, _ROOM * width
        self.values = like.new_full((n_rows, room), -torch.inf)
        self.columns = torch.zeros((n_rows, room), dtype=torch.int64, device=like.device)
        self.count = torch.zeros(n_rows, dtype=torch.int64, device=like.device)  # that each row holds
        self.most = 0  # of them
        self.floor = like.new_full((n_rows, 1), -torch.inf)
        self.full = False

    def add(self, tile: Float[Tensor, "rows columns"], start: int) -> None:
        """Take in a tile, whose first column is ``start`` and whose width is a multiple of ``GROUP``."""
        if not (self.full and self._add_above_floor(tile, start)):
            self._add_ranked(tile, start)

    def result(self) -> tuple[Float[Tensor, "rows width"], Int[Tensor, "rows width"]]:
        """Return the values and their columns, in no order."""
        if self.most > self.width:
            self._thin()
        return self.values[:, : self.width], self.columns[:, : self.width]

    def _add_above_floor(self, tile: Float[Tensor, "rows columns"], start: int) -> bool:
        """Take in what exceeds the floor; return False, with nothing done, where that is too much for a row."""
        n_groups = tile.shape[1] // GROUP
        grouped = tile.view(len(tile), GROUP, n_groups)
        row, group = _places(grouped.amax(dim=1) > self.floor)
        if len(row) > len(tile) * min(self.width, n_groups):
            return False
        members = grouped[row, :, group]
        hit, member = _places(members > self.floor[row])
        row, column = row[hit], start + member * n_groups + group[hit]
        ends = torch.searchsorted(row, torch.arange(len(tile) + 1, device=row.device))
        new = ends.diff()
        most_new = int(new.max())
        if most_new > (_ROOM - 1) * self.width:
            return False
        if self.most + most_new > _ROOM * self.width:
            self._thin()
        place = torch.arange(len(row), device=row.device) + (self.count - ends[:-1])[row]
        self.values[row, place], self.columns[row, place] = members[hit, member], column
        self.count += new
        self.most = int(self.count.max())
        return True

    def _add_ranked(self, tile: Float[Tensor, "rows columns"], start: int) -> None:
        """Take in the largest of a tile, whatever the floor."""
        if self.most > self.width:
            self._thin()
        top, columns = largest(tile, min(self.width, tile.shape[1]))
        place = self.count[:, None] + torch.arange(top.shape[1], device=top.device)
        self.values.scatter_(1, place, top)
        self.columns.scatter_(1, place, columns + start)
        self.count += top.shape[1]
        self.most = int(self.count.max())
        if self.most >= self.width:
            self._thin()

    def _thin(self) -> None:
        """Forget all but the largest, and raise the floor to the least of them."""
        values, kept = self.values[:, : self.most].topk(self.width, dim=1, sorted=False)
        columns = self.columns.gather(1, kept)
        self.values.fill_(-torch.inf)
        self.values[:, : self.width], self.columns[:, : self.width] = values, columns
        self.count.fill_(self.width)
        self.most, self.full = self.width, True
        self.floor = values.amin(dim=1, keepdim=True)


def _places(table: Bool[Tensor, "rows columns"]) -> tuple[Int[Tensor, " places"], Int[Tensor, " places"]]:
    """Return rows and columns of what is true: as ``nonzero`` does, in less time on a CPU."""
    flat = torch.nonzero(table.view(-1))[:, 0]
    row = flat // table.shape[1]
    return row, flat - row * table.shape[1]


def largest(
    tile: Float[Tensor, "rows columns"], width: int
) -> tuple[Float[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Return the ``width`` largest of each row and their columns, in no order.

    The largest ``width`` values lie in the ``width`` groups of columns with the largest maxima, so only those groups
    are ranked value by value: several times quicker than ranking the whole row.
    """
    n_groups = tile.shape[1] // GROUP
    if n_groups < 2 * width:
        top, columns = tile.topk(width, dim=1, sorted=False)
        return top, columns
    grouped = tile.view(len(tile), GROUP, n_groups)
    groups = grouped.amax(dim=1).topk(width, dim=1, sorted=False).indices
    members = grouped.gather(2, groups[:, None].expand(-1, GROUP, -1)).flatten(1)
    top, at = members.topk(width, dim=1, sorted=False)
    return top, at // width * n_groups + groups.gather(1, at % width)
