"""Find neighbors through an index: nearly all of them, in far less time where there are a million images.

The exact search compares every image with every other. FAISS's IVF index (the extra ``scale``) parts the images into
lists around centers and looks only into the few lists nearest to an image. What it finds are candidates here: they are
summed and ranked as in the exact search, so a neighbor may be missing, but none is wrong or out of order. How many are
missing is measured against the exact search on some images, and told.

Input ``values (n, d)``; output ``Neighbors`` with the recall. Memory is that of the exact search and one copy of the
values.
"""

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch

from phyla.errors import InputError, nearest
from phyla.neighbors import Finder, Rows
from phyla.randomness import derive_seed
from phyla.types import Embeddings, Neighbors

log = logging.getLogger("phyla")

Index = Literal["exact", "ivf", "auto"]
AUTO_ABOVE = 500_000
"""Images above which ``auto`` takes an index: up to here two cores search exactly in a few minutes."""

_LIST_SHARE = 4.0  # lists for each square root of n: 4,000 of 250 images for a million
_LEAST_IN_LIST = 39  # images a list on average; FAISS warns where it learns a center from fewer
_LEARNED = 64  # images a list that the centers are learned from
_ITERATIONS = 10  # of the k-means that places the centers
_BESIDES = 8  # candidates beyond those wanted and the image itself, for float32 may misjudge the last
_HINT = "pip install 'phyla[scale]'"


@dataclass(frozen=True, eq=False)
class Indexed:
    """What an index found, and how good it is.

    Parameters
    ----------
    neighbors : of every image
    recall : share of the true neighbors that were found, 0 to 1, on images by which no option was chosen
    n_sampled : images the recall was measured on
    n_lists, n_probes : lists of the index, and how many of them were looked into for an image
    """

    neighbors: Neighbors
    recall: float
    n_sampled: int
    n_lists: int
    n_probes: int

    @property
    def notice(self) -> str:
        """One line for a log or report."""
        return (f"neighbors: IVF, {self.n_probes} of {self.n_lists:,} lists, recall {self.recall:.3f} on "
                f"{self.n_sampled:,} exact rows")


def choose_index(index: Index, n_images: int) -> Literal["exact", "ivf"]:
    """Return which search is meant: ``auto`` is ivf above 500,000 images, if FAISS is there, and says so in the log.

    Raises
    ------
    InputError
        Another word, or ivf where FAISS is not installed.
    """
    if index not in get_args(Index):
        raise InputError(f"index={index!r} is not allowed", nearest(str(index), list(get_args(Index))))
    if index == "exact" or (index == "auto" and n_images <= AUTO_ABOVE):
        return "exact"
    try:
        _faiss()
    except InputError:
        if index == "ivf":
            raise
        log.warning("neighbors of %d images are sought exactly, which takes long: FAISS is not installed (%s)",
                    n_images, _HINT)
        return "exact"
    if index == "auto":
        log.info("neighbors of %d images are sought through an index", n_images)
    return "ivf"


def find_through_index(
    values: Embeddings | np.ndarray,
    n_neighbors: int,
    *,
    recall: float = 0.95,
    n_sampled: int = 2000,
    device: torch.device | str | None = None,
    random_state: int = 0,
    title: str = "finding neighbors",
) -> Indexed:
    """Return the ``n_neighbors`` nearest other images of every image, as far as an index finds them.

    Parameters
    ----------
    values : (n_images, n_features), real and finite; compared by the cosine
    n_neighbors : 1 to n_images - 1
    recall : above 0, at most 1: as many lists are looked into, 1, 2, 4, ..., as reach it on ``n_sampled`` images
    n_sampled : images that choose the number of lists, and as many others on which the recall is measured
    device : of the exact sums; the index itself is on the CPU
    random_state : seed of the centers and of the sample; the same seed finds the same
    title : of the progress bar; empty for none

    Raises
    ------
    InputError
        FAISS is not installed, ``recall`` or ``n_sampled`` is out of range, or as ``find_neighbors`` says.
    """
    if not 0 < recall <= 1 or n_sampled < 1:
        raise InputError(f"recall must be above 0 and at most 1, n_sampled at least 1, got {recall} and {n_sampled}")
    faiss, rows = _faiss(), Rows.of(values, device=device)
    finder = Finder(rows, rows, n_neighbors)
    mixed = np.random.default_rng(derive_seed(random_state, "index")).permutation(len(rows))
    chosen, measured = (np.sort(part) for part in np.array_split(mixed[: 2 * n_sampled], 2))
    search = _Search(faiss, rows, n_neighbors, mixed, random_state)
    search.probe(finder, chosen, recall)
    found = Neighbors(*finder.search(np.arange(len(rows)), title=title, candidates_of=search.candidates))
    wanted = finder.search(measured)[1]
    indexed = Indexed(found, _recall(found.similarities[measured], wanted), len(measured), search.n_lists,
                      search.index.nprobe)
    log.info("%s", indexed.notice)
    return indexed


class _Search:
    """The index of some rows."""

    def __init__(self, faiss: ModuleType, rows: Rows, n_neighbors: int, mixed: np.ndarray, random_state: int) -> None:
        n, d = rows.values.shape
        self.rows, self.width = rows, min(n_neighbors + 1 + _BESIDES, n)
        self.n_lists = max(1, min(round(_LIST_SHARE * n**0.5), n // _LEAST_IN_LIST))
        self.index: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, self.n_lists, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.seed, self.index.cp.niter = 1 + derive_seed(random_state, "centers") % (1 << 30), _ITERATIONS
        self.index.cp.spherical, self.index.cp.max_points_per_centroid = True, _LEARNED
        self.index.train(self._unit(np.sort(mixed[: _LEARNED * self.n_lists])))
        for part in np.array_split(np.arange(n), -(-n // (1 << 16))):
            self.index.add(self._unit(part))

    def candidates(self, rows: np.ndarray) -> np.ndarray:
        """Return what the index finds near some rows, int64 (n_rows, width), -1 where it finds no more."""
        found: np.ndarray = self.index.search(self._unit(rows), self.width)[1]
        return found

    def probe(self, finder: Finder, rows: np.ndarray, recall: float) -> None:
        """Look into more and more lists until the recall of ``rows`` is reached."""
        wanted, self.index.nprobe = finder.search(rows)[1], 1
        while _recall(finder.search(rows, candidates_of=self.candidates)[1], wanted) < recall:
            if self.index.nprobe == self.n_lists:
                return
            self.index.nprobe = min(2 * self.index.nprobe, self.n_lists)

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        places = torch.from_numpy(rows).to(self.rows.values.device)
        return np.ascontiguousarray(self.rows.scaled(places).float().numpy(force=True))


def _recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the share of similarities that are as large as those of the true neighbors, both (n, k), falling.

    Images are as good as each other where they are equally near, so it does not matter which of them was found.
    """
    return float((found >= wanted[:, -1:]).mean())


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise InputError("an index needs FAISS, which is not installed", _HINT) from error
    return faiss
