"""Speed card: the 20 nearest other images of every image, against FAISS's exhaustive search and scikit-learn's.

    python bench/neighbors.py [--images 10000 50000] [--features 64 128 512] [--repeats 3] [--out bench.json]
    python bench/neighbors.py --million [1000000] [--folder runs/million] [--out million.json]

All sides search the same rows of length 1, in float32 and exactly, with as many threads as there are cores. FAISS
(IndexFlatIP) and scikit-learn (NearestNeighbors, brute) search 21, for an image finds itself. Ours ranks by sums in
float64 besides, equal rows by index. Before anything is timed the sides must agree on at least 99.9 % of the neighbors:
float32 alone puts some nearly equal ones in another order. The rows are Gaussian clusters as many as n / 500. From
20,000 images on the search through an index (IVF) is a side as well, with the recall that it told.

With ``--million`` every image of a million of 64 features finds its neighbors, exactly and through an index. The exact
search goes by 50,000 images; with ``--folder`` each part is kept there and, given the same command again, not made
twice. Told are the seconds, the peak of memory beyond the rows, that a sample agrees with sums in float64, the recall
of the index on all images beside the one it told, and, for 4,096 images in turn, the ratio to FAISS.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from card import Row, arguments, compare, finish, opponent, peak, short
from phyla.index import find_through_index
from phyla.neighbors import Finder, Rows, find_neighbors
from phyla.storage import read_array, write_array

N_NEIGHBORS = 20
SKLEARN_UP_TO = 10_000  # above it a turn takes longer than all else
INDEX_FROM = 20_000
PART = 50_000  # images of the million that are sought and kept together


def clusters(n_images: int, n_features: int) -> np.ndarray:
    """Return rows of length 1 around n / 500 directions, float32 (n_images, n_features), the same every time."""
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((max(2, n_images // 500), n_features), np.float32)
    rows = centers[draw.integers(len(centers), size=n_images)]
    for start in range(0, n_images, 1 << 16):  # in place and in blocks: a million rows stay small
        block = rows[start : start + (1 << 16)]
        block += draw.standard_normal(block.shape, np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return rows


def ours(rows: np.ndarray) -> np.ndarray:
    """Return the neighbors by phyla."""
    return find_neighbors(rows, N_NEIGHBORS, title="").indices


def by_faiss(faiss: ModuleType, rows: np.ndarray) -> np.ndarray:
    """Return the neighbors by an exhaustive index, the image itself left out."""
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return without_own(index.search(rows, N_NEIGHBORS + 1)[1])


def by_sklearn(neighbors: ModuleType, rows: np.ndarray) -> np.ndarray:
    """Return the neighbors by scikit-learn, the image itself left out."""
    search = neighbors.NearestNeighbors(n_neighbors=N_NEIGHBORS + 1, algorithm="brute", n_jobs=-1).fit(rows)
    return without_own(search.kneighbors(rows, return_distance=False))


def without_own(found: np.ndarray) -> np.ndarray:
    """Return ``found`` (n, k + 1) without the image itself, or without the last where it did not find itself."""
    own = found == np.arange(len(found))[:, None]
    own[~own.any(axis=1), -1] = True
    return found[~own].reshape(len(found), -1)


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the share of the wanted neighbors that were found, both (n, k)."""
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(wanted, found, strict=True)]))


class Indexed:
    """The search through an index, which keeps the recall it told."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.told = rows, None

    def __call__(self) -> np.ndarray:
        """Return the neighbors that the index finds."""
        self.told = find_through_index(self.rows, N_NEIGHBORS, title="")
        return self.told.neighbors.indices


def card(rows: np.ndarray, opponents: dict[str, ModuleType], repeats: int) -> Row:
    """Return the figures of one set, all sides measured in turn."""
    sides: dict[str, Callable[[], np.ndarray]] = {"phyla": lambda: ours(rows)}
    if faiss := opponents.get("faiss"):
        sides["faiss"] = lambda: by_faiss(faiss, rows)
    if (sklearn := opponents.get("sklearn.neighbors")) and len(rows) <= SKLEARN_UP_TO:
        sides["scikit-learn"] = lambda: by_sklearn(sklearn, rows)
    some = {name: side() for name, side in sides.items()}
    for name, found in some.items():
        if (same := recall(found, some["phyla"])) < 0.999:
            raise SystemExit(f"{name} found only {same:.4f} of the neighbors")
    recalled: Row = {}
    if faiss and len(rows) >= INDEX_FROM:
        sides["ivf"] = indexed = Indexed(rows)
        recalled = {"ivf recall": short(recall(indexed(), some["phyla"]), 3), "ivf told": short(indexed.told.recall, 3)}
    row: Row = {"images": len(rows), "features": rows.shape[1]}
    return row | compare(sides, repeats=repeats).row() | recalled


def million(n_images: int, folder: Path | None, faiss: ModuleType | None) -> Row:
    """Return the figures of very many images of 64 features."""
    rows = clusters(n_images, 64)
    print(f"{n_images:,} images of 64 features", flush=True)
    before = peak(reset=True)
    indices, seconds = exactly(rows, folder)
    row: Row = {"images": n_images, "exact s": short(seconds), "exact peak MB": beyond(before),
                "agrees with float64": short(recall(indices[:: n_images // 100], by_sums(rows, n_images // 100)), 4)}
    if faiss:
        before, started = peak(reset=True), time.perf_counter()
        found = find_through_index(rows, N_NEIGHBORS)
        row |= {"ivf s": short(time.perf_counter() - started), "ivf peak MB": beyond(before), "ivf": found.notice,
                "ivf recall": short(recall(found.neighbors.indices, indices))}
        row |= against_faiss(faiss, rows)
    return row


def beyond(before: int | None) -> float | None:
    """Return the peak of memory beyond what there was, in MB."""
    now = peak()
    return None if now is None or before is None else short((now - before) / 1e6, 3)


def exactly(rows: np.ndarray, folder: Path | None) -> tuple[np.ndarray, float]:
    """Return the exact neighbors of all and the seconds they took; the parts that ``folder`` holds are taken over."""
    among = Rows.of(rows)
    finder, parts, spent = Finder(among, among, N_NEIGHBORS), [], 0.0
    for start in range(0, len(rows), PART):
        file = folder / f"{len(rows)}-{start}.npy" if folder else None
        if file and file.exists():
            held = read_array(file)
            parts.append(held[:, :-1])
            spent += held[0, -1] / 1e3
            continue
        began = time.perf_counter()
        found = finder.search(np.arange(start, min(start + PART, len(rows))))[0]
        seconds = time.perf_counter() - began
        if file:  # with the milliseconds it took in a column of its own
            file.parent.mkdir(parents=True, exist_ok=True)
            write_array(file, np.concatenate([found, np.full((len(found), 1), round(seconds * 1e3))], axis=1))
        parts.append(found)
        spent += seconds
        done = start + len(found)
        print(f"  {done:>9,} images, {spent:,.0f} s, about {spent / done * (len(rows) - done):,.0f} s more", flush=True)
    return np.concatenate(parts), spent


def by_sums(rows: np.ndarray, step: int) -> np.ndarray:
    """Return the neighbors of every ``step``-th image by sums in float64."""
    bank, asking = rows.astype(np.float64), np.arange(0, len(rows), step)
    similar = bank[asking] @ bank.T
    similar[np.arange(len(asking)), asking] = -np.inf
    return np.argpartition(-similar, N_NEIGHBORS, axis=1)[:, :N_NEIGHBORS]


def against_faiss(faiss: ModuleType, rows: np.ndarray, n_asking: int = 4096) -> Row:
    """Return images a second of both for some that ask among all, in turn."""
    among, asking = Rows.of(rows), np.linspace(0, len(rows) - 1, n_asking).astype(np.int64)
    finder, index = Finder(among, among, N_NEIGHBORS), faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    sides = {"phyla": lambda: finder.search(asking)[0], "faiss": lambda: index.search(rows[asking], N_NEIGHBORS + 1)[1]}
    return compare(sides, repeats=3).row()


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    told = arguments(__doc__, repeats=3, images={"type": int, "nargs": "+", "default": [10_000, 20_000]},
                     features={"type": int, "nargs": "+", "default": [64, 128, 512]},
                     million={"type": int, "nargs": "?", "const": 1_000_000, "metavar": "N"}, folder={"type": Path})
    packages = {"faiss": "faiss-cpu", "sklearn.neighbors": "scikit-learn"}
    opponents = {name: found for name, package in packages.items() if (found := opponent(name, package))}
    if faiss := opponents.get("faiss"):
        faiss.omp_set_num_threads(os.cpu_count() or 1)
    torch.set_num_threads(os.cpu_count() or 1)
    folder, told.folder = told.folder, None  # a path is not for the file
    if told.million:
        row = million(told.million, folder, opponents.get("faiss"))
        print("\n".join(f"{name:>20}  {value}" for name, value in row.items()))
        return finish(told, [row], versions=tuple(packages.values()), n_neighbors=N_NEIGHBORS)
    sizes = [3000] if told.quick else told.images
    print(f"images a second, {N_NEIGHBORS} neighbors of each", flush=True)
    rows = [card(clusters(n, d), opponents, told.repeats) for n in sizes for d in told.features]
    return finish(told, rows, versions=tuple(packages.values()), n_neighbors=N_NEIGHBORS)


if __name__ == "__main__":
    main()
