"""Speed card: the 20 nearest other images of every image, against FAISS's exhaustive search and scikit-learn's.

    python bench/neighbors.py [--images 10000 50000] [--features 64 128 512] [--repeats 3] [--out bench.json]

All sides search the same rows of length 1, in float32 and exactly, with as many threads as there are cores. FAISS
(IndexFlatIP) and scikit-learn (NearestNeighbors, brute) search 21, for an image finds itself. Ours ranks by sums in
float64 besides, equal rows by index. Before anything is timed the sides must agree on at least 99.9 % of the neighbors:
float32 alone puts some nearly equal ones in another order. The rows are Gaussian clusters as many as n / 500.
"""

import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

from card import Row, arguments, compare, finish, opponent
from phyla.neighbors import find_neighbors

N_NEIGHBORS = 20
SKLEARN_UP_TO = 10_000  # above it a turn takes longer than all else


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
    return {"images": len(rows), "features": rows.shape[1]} | compare(sides, repeats=repeats).row()


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    told = arguments(__doc__, repeats=3, images={"type": int, "nargs": "+", "default": [10_000, 20_000]},
                     features={"type": int, "nargs": "+", "default": [64, 128, 512]})
    packages = {"faiss": "faiss-cpu", "sklearn.neighbors": "scikit-learn"}
    opponents = {name: found for name, package in packages.items() if (found := opponent(name, package))}
    if faiss := opponents.get("faiss"):
        faiss.omp_set_num_threads(os.cpu_count() or 1)
    torch.set_num_threads(os.cpu_count() or 1)
    sizes = [3000] if told.quick else told.images
    print(f"images a second, {N_NEIGHBORS} neighbors of each", flush=True)
    rows = [card(clusters(n, d), opponents, told.repeats) for n in sizes for d in told.features]
    finish(told, rows, versions=tuple(packages.values()), n_neighbors=N_NEIGHBORS)


if __name__ == "__main__":
    main()
