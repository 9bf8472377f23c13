"""A small made-up run for the report's tests: blobs of embeddings, flat coloured images, soft probabilities."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from phyla.report.page import ReportInput
from phyla.types import Assignment, ImageSet, Neighbors, Scores


@dataclass(frozen=True)
class Made:
    """What ``make_run`` was asked for."""

    n_images: int = 60
    n_clusters: int = 3
    size: tuple[int, int] = (8, 8)
    n_features: int = 5
    empty: tuple[int, ...] = ()
    with_neighbors: bool = True
    with_truth: bool = True
    with_curves: bool = True
    certain: bool = False
    seed: int = 0
    more: dict[str, object] = field(default_factory=dict)


@pytest.fixture
def make_run() -> Callable[..., ReportInput]:
    """Return a function that makes a ReportInput; keywords are those of ``Made``, ``more`` goes to the input itself."""

    def make(**asked: object) -> ReportInput:
        made = Made(**asked)  # type: ignore[arg-type]
        draw = np.random.default_rng(made.seed)
        usable = [c for c in range(made.n_clusters) if c not in made.empty]
        labels = np.array([usable[i % len(usable)] for i in range(made.n_images)])
        ids = [f"folder/image {i}.png" for i in range(made.n_images)]
        probabilities = np.eye(made.n_clusters, dtype=np.float32)[labels]
        if not made.certain:
            noise = draw.dirichlet(np.ones(made.n_clusters), made.n_images).astype(np.float32)
            probabilities = 0.7 * probabilities + 0.3 * noise
        centers = draw.normal(size=(made.n_clusters, made.n_features)) * 4
        embeddings = (centers[labels] + draw.normal(size=(made.n_images, made.n_features))).astype(np.float32)
        pixels = draw.integers(0, 256, (made.n_images, *made.size, 3), dtype=np.uint8)
        values = {
            "title": "A test", "images": ImageSet(pixels, ids, "made"), "assignment": Assignment(probabilities, ids),
            "embeddings": embeddings, "neighbors": _same_cluster(labels) if made.with_neighbors else None,
            "curves": [{"stage": "pretrain", "epoch": e, "loss": 1 + 1 / e} for e in range(1, 9 * made.with_curves)],
            "scores": [Scores("k-means on pixels", "train", made.n_images, {"nmi": 0.4}),
                       Scores("SCAN", "train", made.n_images, {"nmi": 0.5})],
            "truth": (labels, [f"kind {c}" for c in range(made.n_clusters)]) if made.with_truth else None,
            "run": {"recipe": "scan-test", "seed": 7, "seconds": {"cluster": 12.25}, "options": {"cluster": {"n": 3}}}}
        return ReportInput(**values | made.more)  # type: ignore[arg-type]

    return make


def _same_cluster(labels: np.ndarray) -> Neighbors | None:
    """Two neighbors an image, the next ones of its cluster, at similarity 0.5 and 0.4; fewer in a tiny set."""
    n_neighbors = min(2, len(labels) - 1)
    if not n_neighbors:
        return None
    indices = np.empty((len(labels), n_neighbors), dtype=np.int64)
    for row, label in enumerate(labels):
        others = [i for i in np.roll(np.arange(len(labels)), -row - 1) if i != row]
        indices[row] = sorted(others, key=lambda i, label=label: bool(labels[i] != label))[:n_neighbors]
    return Neighbors(indices, np.tile(np.float32([0.5, 0.4])[:n_neighbors], (len(labels), 1)))
