"""Find the nearest other images of every image, exactly, in blocks.

The search has two steps. A fast matrix product gives every pair a rough similarity, and the best few of each row, with
some to spare, become its candidates. The candidates are then summed again, pair by pair, in float64 and in one fixed
order, and ranked: larger similarity first, lower index first among equals. A row whose candidates might have missed a
neighbor, because too many images are about equally near, is searched again with more of them. So the result does not
depend on the block size, exact duplicates come in the order of their index, and nothing of size n x n is ever held.

Input ``values (n, d)``; output ``Neighbors``: ``indices`` and ``similarities`` (n, k), the image itself left out.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from phyla.candidates import GROUP, Largest
from phyla.errors import InputError, nearest
from phyla.progress import bar
from phyla.types import Embeddings, Neighbors

_BLOCK = 1024  # rows searched at once
_TILE = {"cpu": 4, "cuda": 16}  # columns of a tile for each row of a block: 16 MB, near the cache; 64 MB
_SPARE = 8  # candidates beyond those wanted: enough that a second search is rare
_LEAST_ROWS = 256  # for which a thread is worth starting
_CHUNK = 1 << 16  # rows checked or measured at once
_SUMMED = 1 << 16  # float64 numbers in one block of exact sums: 512 kB, which stays in the cache

Metric = Literal["product", "euclidean"]
Candidates = Callable[[np.ndarray], np.ndarray]
_Found = tuple[np.ndarray, np.ndarray]


def find_neighbors(
    values: Embeddings | np.ndarray,
    n_neighbors: int,
    *,
    device: torch.device | str | None = None,
    block: int = _BLOCK,
    normalize: bool = True,
    metric: Metric = "product",
    title: str = "finding neighbors",
) -> Neighbors:
    """Return the ``n_neighbors`` nearest other images of every image.

    Parameters
    ----------
    values : (n_images, n_features), real and finite; float64 is searched in float64, all else in float32
    n_neighbors : 1 to n_images - 1
    device : where to compute, and where the values are moved to; None is the CPU
    block : rows searched at once; the memory beyond input and output is about 100 * block² bytes at
        most, for each thread of torch's
    normalize : scale rows to length 1 first
    metric : product: the inner product, which is the cosine of normalized rows; euclidean: the distance d, told as the
        similarity -d² / 2, which is the cosine less 1 for normalized rows
    title : of the progress bar; empty for none

    Returns
    -------
    Neighbors
        Nearest first, equally near ones by index. A row of length zero has the product 0 with every other.

    Raises
    ------
    InputError
        ``n_neighbors`` is below 1 or not below the number of images, a value is not finite, or an unknown metric.
    """
    if metric not in get_args(Metric):
        raise InputError(f"metric={metric!r} is not allowed", nearest(str(metric), list(get_args(Metric))))
    bank = Rows.of(values, device=device, normalize=normalize, euclidean=metric == "euclidean")
    return Neighbors(*_search(bank, bank, n_neighbors, block=block, title=title))


def find_for_some(
    values: Embeddings | np.ndarray, rows: np.ndarray, *, n_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbors among all images of those images alone that ``rows``, int (n_rows,), names.

    As ``find_neighbors``, of which it returns some rows: indices, int64 (n_rows, n_neighbors), and similarities.
    """
    among = Rows.of(values)
    return Finder(among, among, n_neighbors).search(np.asarray(rows, np.int64))


def find_in_bank(
    bank: Embeddings | np.ndarray,
    queries: Embeddings | np.ndarray,
    *,
    n_neighbors: int,
    device: torch.device | str | None = None,
    block: int = _BLOCK,
    normalize: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``n_neighbors`` nearest rows of ``bank`` for every row of ``queries``, and their similarities.

    As ``find_neighbors``, but the images to find are not the images that ask: the indices, int64 (n_queries,
    n_neighbors), are rows of ``bank``, none is left out, and ``n_neighbors`` may be the size of the bank.

    Raises
    ------
    InputError
        ``n_neighbors`` is below 1 or above the size of the bank, the widths differ, or a value is not finite.
    """
    where, what = (Rows.of(rows, device=device, normalize=normalize) for rows in (bank, queries))
    if where.values.shape[1] != what.values.shape[1]:
        raise InputError(f"queries of {what.values.shape[1]} features cannot be sought in a bank of "
                         f"{where.values.shape[1]} features", "embed both with the same encoder")
    return _search(where, what, n_neighbors, block=block)


def check_embeddings(values: Embeddings | np.ndarray) -> np.ndarray:
    """Return the array of ``values``, known to be (n_images, n_features), real and finite.

    Raises
    ------
    InputError
        Another shape, no rows, a dtype that is no real number, or NaN or infinity: names the first such row.
    """
    if hasattr(values, "toarray"):
        raise InputError("embeddings must be dense, and these are sparse", "take values.toarray()")
    array = values.values if isinstance(values, Embeddings) else np.asarray(values)
    # The hints have the words that scikit-learn's checks of an estimator look for.
    if array.ndim != 2 or 0 in array.shape:
        hint = "Reshape your data: one image is values.reshape(1, -1)" if array.ndim == 1 else None
        if array.ndim == 2 and not array.shape[1]:
            hint = f"these have 0 feature(s) (shape={array.shape}) while a minimum of 1 is required."
        raise InputError(f"embeddings must be (n_images, n_features) with at least one of each, got {array.shape}",
                         hint)
    if array.dtype.kind not in "fiu":
        hint = "Complex data not supported: take the real part" if array.dtype.kind == "c" else None
        raise InputError(f"embeddings must be real numbers, got {array.dtype}", hint)
    broken = np.concatenate([~np.isfinite(array[start : start + _CHUNK]).all(axis=1)
                             for start in range(0, len(array), _CHUNK)])
    if broken.any():
        first = int(broken.argmax())
        name = f" (image {values.ids[first]!r})" if isinstance(values, Embeddings) else ""
        raise InputError(f"embeddings must be finite, and {int(broken.sum())} of {len(array)} rows are not, the "
                         f"first of them row {first}{name}",
                         "leave these images out, or look for NaN in the encoder's weights")
    return array


@dataclass(frozen=True, eq=False)
class Rows:
    """Vectors on a device, and for each the factor that makes it a unit vector (0 for a zero vector)."""

    values: Float[Tensor, "images features"]
    factor: Float[Tensor, " images"]
    reach: float  # the largest length after scaling
    halves: Float[Tensor, " images"] | None = None  # for distances: half of each squared length after scaling

    @classmethod
    def of(cls, values: Embeddings | np.ndarray, *, device: torch.device | str | None = None, normalize: bool = True,
           euclidean: bool = False) -> "Rows":
        """Return ``values`` with what ``find_neighbors`` makes of these options."""
        array = check_embeddings(values)
        wide = array.dtype.kind == "f" and array.dtype.itemsize >= 8
        array = np.ascontiguousarray(array, dtype=np.float64 if wide else np.float32)
        place = torch.device(device or "cpu")
        if place.type == "mps":  # has no float64, without which the ranking is not exact
            place = torch.device("cpu")
        with warnings.catch_warnings():  # a memory map opened for reading is fine: nothing here writes to it
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(array).to(place)
        length = torch.cat([_length(part) for part in torch.split(tensor, _CHUNK)])
        # Below the smallest normal float32 a length has no direction worth keeping, and its inverse would overflow.
        some = length > torch.finfo(torch.float32).tiny
        if normalize:
            factor = torch.where(some, 1 / length.where(some, torch.ones_like(length)), 0.0)
            return cls(tensor, factor, 1.0, some.to(tensor.dtype) / 2 if euclidean else None)
        reach = float(length.max())
        if reach**2 * (4 if euclidean else 1) > torch.finfo(tensor.dtype).max:
            raise InputError(f"a row of length {reach:.3g} is too long for an inner product", "use normalize=True")
        if euclidean:
            return cls(tensor, torch.ones_like(length), reach, (length.square() / 2).to(tensor.dtype))
        return cls(tensor, some.double(), reach)

    def __len__(self) -> int:
        return len(self.values)

    def scaled(self, rows: slice | Int[Tensor, " rows"]) -> Float[Tensor, "rows features"]:
        """Return some of the vectors, scaled, in the dtype they came in."""
        return self.values[rows] * self.factor[rows, None].to(self.values.dtype)


def _length(rows: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
    """Return the Euclidean lengths in float64, whatever the size of the numbers."""
    largest = rows.abs().amax(dim=1).double()
    shrunk = rows.double() / largest.where(largest > 0, torch.ones_like(largest))[:, None]
    return largest * shrunk.square().sum(dim=1).sqrt()


def _search(bank: Rows, queries: Rows, n_neighbors: int, *, block: int,
            title: str = "finding neighbors") -> tuple[np.ndarray, np.ndarray]:
    """Return indices and similarities of the nearest of the bank."""
    return Finder(bank, queries, n_neighbors, block).search(np.arange(len(queries)), title=title)


class Finder:
    """The search of one bank, block by block, with the buffer of rough similarities that all blocks share.

    Queries that are the bank do not find themselves.
    """

    def __init__(self, bank: Rows, queries: Rows, n_neighbors: int, block: int = _BLOCK) -> None:
        own = int(bank is queries)
        if n_neighbors < 1 or block < 1:
            raise InputError(f"n_neighbors and block must be at least 1, got {n_neighbors} and {block}")
        if n_neighbors > len(bank) - own:
            raise InputError(f"n_neighbors={n_neighbors} needs at least {n_neighbors + own} images, got {len(bank)}",
                             "lower n_neighbors or add images")
        self.block = block
        self.bank, self.queries, self.n_neighbors = bank, queries, n_neighbors
        self.own = bank is queries
        self.width = min(n_neighbors + _SPARE, len(bank) - self.own)
        self.tile = min(_round_up(len(bank)), _round_up(_TILE[bank.values.device.type] * block))
        size = min(block, len(queries)) * self.tile
        self.buffer = torch.empty(size, dtype=bank.values.dtype, device=bank.values.device)
        self.most = max(size // 8, self.width)  # pairs ranked at once

    def search(self, rows: np.ndarray, *, title: str = "",
               candidates_of: Candidates | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the neighbors of the queries ``rows`` and the similarities, (n_rows, n_neighbors).

        ``candidates_of`` gives the candidates of some rows, int64 (n, width); None searches among all.
        """
        indices = np.empty((len(rows), self.n_neighbors), np.int64)
        wide = self.queries.values.dtype == torch.float64
        similarities = np.empty(indices.shape, np.float64 if wide else np.float32)
        n_threads = torch.get_num_threads() if self.buffer.device.type == "cpu" else 1
        n_workers = max(1, min(n_threads, len(rows) // _LEAST_ROWS))
        step = max(1, min(self.block, -(-len(rows) // n_workers)))
        parts = [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]
        inference = torch.is_inference_mode_enabled()  # each thread has its own
        idle: SimpleQueue[Finder] = SimpleQueue()
        for finder in (self, *(self.twin() for _ in range(n_workers - 1))):
            idle.put(finder)

        def work(part: slice) -> tuple[np.ndarray, np.ndarray]:
            finder = idle.get()
            try:
                with torch.inference_mode(inference):
                    return finder.search_block(rows[part], candidates_of)
            finally:
                idle.put(finder)

        with bar(title, total=len(rows), unit="image") as shown:
            for part, found in zip(parts, _side_by_side(work, parts, n_workers), strict=True):
                indices[part], similarities[part] = found
                shown.advance(part.stop - part.start)
        return indices, similarities

    def search_block(self, rows: np.ndarray, candidates_of: Candidates | None) -> tuple[np.ndarray, np.ndarray]:
        """Return as ``search`` for at most ``block`` queries."""
        asking = torch.from_numpy(rows).to(self.queries.values.device)
        if candidates_of is None:
            found, near = self.find(asking)
        else:
            found, near = self.among(asking, torch.from_numpy(candidates_of(rows)).to(asking.device))
        return found.numpy(force=True), near.numpy(force=True)

    def twin(self) -> "Finder":
        """Return a finder of the same with a buffer of its own, for another thread."""
        twin = copy.copy(self)
        twin.buffer = torch.empty_like(self.buffer)
        return twin

    def find(self, rows: Int[Tensor, " rows"]) -> tuple[Int[Tensor, "rows near"], Float[Tensor, "rows near"]]:
        """Return the neighbors of some queries and the similarities, ranked and exact."""
        found = torch.arange(self.n_neighbors, device=rows.device).repeat(len(rows), 1)
        if self.own:
            found += found >= rows[:, None]
        near = torch.zeros(found.shape, dtype=self.queries.values.dtype, device=rows.device)
        # By the product all others are equally near to a zero vector: the first few, set above, are its neighbors.
        has_nearest = self.queries.factor[rows] if self.queries.halves is None else torch.ones_like(rows)
        asking = torch.nonzero(has_nearest)[:, 0]
        for part in torch.split(asking, max(1, self.most // self.width)) if len(asking) else ():
            found[part], near[part], floor = self.among_candidates(rows[part])
            again = torch.nonzero(floor < torch.inf)[:, 0]
            if len(again):
                found[part[again]], near[part[again]] = self.among_all(rows[part[again]], floor[again])
        return found, near

    def among(
        self, rows: Int[Tensor, " rows"], candidates: Int[Tensor, "rows width"]
    ) -> tuple[Int[Tensor, "rows near"], Float[Tensor, "rows near"]]:
        """Return the nearest of the ``candidates`` alone, ranked and exact; -1 and a query itself are no candidates.

        A query with fewer candidates than neighbors is searched for among all.
        """
        allowed = (candidates >= 0) & (candidates != rows[:, None] if self.own else True)
        candidates = candidates.where(allowed, len(self.bank)).sort(dim=1).values
        row, place = torch.nonzero(candidates < len(self.bank), as_tuple=True)
        exact = torch.full(candidates.shape, -torch.inf, dtype=torch.float64, device=rows.device)
        exact[row, place] = self.exact(rows, row, candidates[row, place])
        found, near = self.ranked(candidates, exact)
        few = torch.nonzero((allowed.sum(dim=1) < self.n_neighbors) | (self.queries.factor[rows] == 0))[:, 0]
        if len(few):
            found[few], near[few] = self.find(rows[few])
        return found, near

    def among_candidates(
        self, rows: Int[Tensor, " rows"]
    ) -> tuple[Int[Tensor, "rows near"], Float[Tensor, "rows near"], Float[Tensor, " rows"]]:
        """Return the best candidates, their similarities, and the rough similarity below which no better one can be.

        The last is infinite where no better one can be at all.
        """
        rough, candidates = self.candidates(rows)
        candidates, order = candidates.sort(dim=1)
        rough = rough.gather(1, order)
        # The bound of a float32 sum; twice the error seen stands in for it where TF32 or bfloat16 products are allowed.
        terms = self.bank.values.shape[1] + (4 if self.bank.halves is None else 8)
        bound = terms * torch.finfo(rough.dtype).eps * self.queries.reach * self.bank.reach
        exact, error = self.summed(rows, candidates, rough, bound)
        found, near = self.ranked(candidates, exact)
        sure = (near[:, -1] > rough.amin(dim=1) + error) | (self.width == len(self.bank) - self.own)
        return found, near, torch.where(sure, torch.inf, near[:, -1] - 2 * error)

    def summed(
        self, rows: Int[Tensor, " rows"], candidates: Int[Tensor, "rows width"], rough: Float[Tensor, "rows width"],
        bound: float,
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, ""]]:
        """Return the exact similarities of candidates, -inf for those surely too far, and how wrong ``rough`` may be.

        ``bound`` is how wrong it may be unless more is seen; then all candidates are summed.
        """
        least = rough.kthvalue(self.width - self.n_neighbors + 1, dim=1, keepdim=True).values - 2 * bound
        exact, error = self.summed_where(rough >= least, rows, candidates, rough)
        if error > bound:
            exact, error = self.summed_where(torch.ones_like(rough, dtype=torch.bool), rows, candidates, rough)
        return exact, error.clamp(min=bound)

    def summed_where(
        self, wanted: Bool[Tensor, "rows width"], rows: Int[Tensor, " rows"], candidates: Int[Tensor, "rows width"],
        rough: Float[Tensor, "rows width"],
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, ""]]:
        """Return the exact similarities of the wanted candidates, -inf elsewhere, and twice the largest error seen."""
        row, place = torch.nonzero(wanted, as_tuple=True)
        exact = torch.full(rough.shape, -torch.inf, dtype=torch.float64, device=rough.device)
        exact[row, place] = found = self.exact(rows, row, candidates[row, place])
        return exact, 2 * (found - rough[row, place]).abs().amax()

    def among_all(
        self, rows: Int[Tensor, " rows"], floor: Float[Tensor, " rows"]
    ) -> tuple[Int[Tensor, "rows near"], Float[Tensor, "rows near"]]:
        """Return the neighbors of queries, and the similarities, among all that are roughly above ``floor``."""
        query, counts, pairs = self.queries.scaled(rows), torch.zeros_like(rows), []
        for start in range(0, len(self.bank), self.tile):
            above = self.rough(query, rows, start) >= floor[:, None]
            counts += above.sum(dim=1)
            if len(rows) > 1 and len(rows) * int(counts.max()) > self.most:
                halves = zip(rows.tensor_split(2), floor.tensor_split(2), strict=True)
                found, near = zip(*(self.among_all(*half) for half in halves), strict=True)
                return torch.cat(found), torch.cat(near)
            row, column = torch.nonzero(above, as_tuple=True)
            pairs.append(torch.stack([row, column + start]))
        row, column = torch.cat(pairs, dim=1)
        order = torch.argsort(row, stable=True)  # which leaves the columns of a row in order
        row, column = row[order], column[order]
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        exact = torch.full((len(rows), int(counts.max())), -torch.inf, dtype=torch.float64, device=rows.device)
        candidates = torch.zeros(exact.shape, dtype=torch.int64, device=rows.device)
        exact[row, place], candidates[row, place] = self.exact(rows, row, column), column
        return self.ranked(candidates, exact)

    def candidates(
        self, rows: Int[Tensor, " rows"]
    ) -> tuple[Float[Tensor, "rows width"], Int[Tensor, "rows width"]]:
        """Return the rough similarities and indices of the roughly nearest of the bank, in no order."""
        query = self.queries.scaled(rows)
        best = Largest(len(rows), self.width, query)
        for start in range(0, len(self.bank), self.tile):
            best.add(self.rough(query, rows, start), start)
        return best.result()

    def rough(
        self, query: Float[Tensor, "rows features"], rows: Int[Tensor, " rows"], start: int
    ) -> Float[Tensor, "rows columns"]:
        """Return the similarities with one tile of the bank, -inf for a query itself and to fill the last group."""
        tile = self.bank.scaled(slice(start, start + self.tile))
        width = _round_up(len(tile))
        rough = self.buffer[: len(query) * width].view(len(query), width)
        torch.mm(query, tile.T, out=rough[:, : len(tile)])
        if self.bank.halves is not None and self.queries.halves is not None:  # -|a - b|²/2 = a·b - |b|²/2 - |a|²/2
            rough[:, : len(tile)] -= self.bank.halves[start : start + self.tile]
            rough -= self.queries.halves[rows, None]
        rough[:, len(tile) :] = -torch.inf
        if self.own:
            inside = torch.nonzero((rows >= start) & (rows < start + len(tile)))[:, 0]
            rough[inside, rows[inside] - start] = -torch.inf
        return rough

    def exact(
        self, rows: Int[Tensor, " rows"], row: Int[Tensor, " pairs"], column: Int[Tensor, " pairs"]
    ) -> Float[Tensor, " pairs"]:
        """Return the similarity of pairs ``(rows[row], column)``, each summed alone: equal vectors get equal sums."""
        query = self.queries.values[rows].double() * self.queries.factor[rows, None]
        exact = torch.empty(len(row), dtype=torch.float64, device=row.device)
        step = max(1, _SUMMED // query.shape[1])
        for start in range(0, len(row), step):
            pairs = slice(start, start + step)
            other = self.bank.values.index_select(0, column[pairs]).double()
            own = query.index_select(0, row[pairs])  # several times as quick as query[row[pairs]]
            if self.bank.halves is None:
                exact[pairs] = other.mul_(own).sum(dim=1).mul_(self.bank.factor[column[pairs]])
            else:
                apart = other.mul_(self.bank.factor[column[pairs], None]).sub_(own)
                exact[pairs] = apart.square_().sum(dim=1).div_(-2)
        bounded = self.bank.halves is None and self.bank.reach == 1 and self.queries.reach == 1
        return exact.clamp_(-1, 1) if bounded else exact

    def ranked(
        self, candidates: Int[Tensor, "rows width"], exact: Float[Tensor, "rows width"]
    ) -> tuple[Int[Tensor, "rows near"], Float[Tensor, "rows near"]]:
        """Return the nearest candidates and their similarities; they come by index, which a stable sort keeps."""
        near, order = exact.to(self.queries.values.dtype).sort(dim=1, descending=True, stable=True)
        return candidates.gather(1, order[:, : self.n_neighbors]), near[:, : self.n_neighbors]


def _side_by_side(work: Callable[[slice], _Found], parts: Sequence[slice], n_workers: int) -> Iterator[_Found]:
    """Yield the work on each part, in order, done by threads that compute on one core each.

    Cores that share each operation wait for one another at its end, hundreds of times a second: on a machine that does
    other work too that takes ten times as long.
    """
    if n_workers < 2:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="phyla-neighbors", initializer=_on_one_core)
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)


def _on_one_core() -> None:
    torch.get_num_threads()  # torch sets the number when a thread first asks, which would overrule the next line
    threadpool_limits(1, user_api="openmp")  # of this thread alone, until it ends


def _round_up(columns: int) -> int:
    return -(-columns // GROUP) * GROUP
