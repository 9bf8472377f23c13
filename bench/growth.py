"""Growth card: how the time and the memory of every stage grow with the number of images, drawn on logarithmic axes.

    python bench/growth.py [--images 1000 4000 ...] [--stages evaluate ...] [--out growth.json] [--plot growth.png]

Each stage has a process of its own for each size, works once on a small set to load its libraries, and then once on the
set that is measured. The peak is what it needs beyond its inputs, its results included. ``order`` is the slope between
two sizes: 1 where what is measured grows as the images do, 2 where it grows as their square. Rows: 64 features in
clusters, 20 neighbors, 10 clusters, images of 8 x 8 pixels. A step of training is left out: it sees a batch, however
many images there are; that of Super-AND, which sees its memory of all images, is not.
"""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch

from card import Child, Row, arguments, finish, opponent, short
from memory import step
from neighbors import clusters
from phyla.classifier import Classifier
from phyla.cluster.kmeans import KMeans
from phyla.embed import embed
from phyla.evaluate.metrics import score_assignment, score_without_labels
from phyla.evaluate.probes import knn_accuracy
from phyla.images.augment import Views
from phyla.index import find_through_index
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import Encoder, EncoderSpec
from phyla.quality import neighbor_score
from phyla.reciprocal import rerank
from phyla.report.findings import all_findings
from phyla.report.measures import ConfidenceSpread, Confusion
from phyla.report.selection import name_clusters, review_first, summarize_clusters
from phyla.types import Assignment, Embeddings, ImageSet, Neighbors

N_CLUSTERS, N_NEIGHBORS, FEATURES = 10, 20, 64
LEAST_MB, LEAST_SECONDS = 4.0, 0.01  # below these a figure is noise, and says nothing of growth
SLOW = {"neighbors, exact": 100_000, "re-ranking": 20_000}  # images above which a stage is left out by itself


class Made:
    """The inputs of all stages for one number of images, each made when it is asked for."""

    def __init__(self, n: int) -> None:
        self.n, self.draw = n, np.random.default_rng(0)
        self.ids = [str(i) for i in range(n)]

    def embeddings(self) -> Embeddings:
        return Embeddings(clusters(self.n, FEATURES), self.ids)

    def neighbors(self) -> Neighbors:
        """Return other images at random: what is done with them does not depend on which they are."""
        away = self.draw.integers(1, self.n, (self.n, N_NEIGHBORS))
        near = np.sort(self.draw.random((self.n, N_NEIGHBORS), np.float32))[:, ::-1]
        return Neighbors((np.arange(self.n)[:, None] + away) % self.n, np.ascontiguousarray(near))

    def assignment(self) -> Assignment:
        table = self.draw.random((self.n, N_CLUSTERS), np.float32) ** 4
        return Assignment(table / table.sum(axis=1, keepdims=True), self.ids)

    def truth(self) -> np.ndarray:
        return self.draw.integers(0, N_CLUSTERS, self.n)

    def images(self) -> ImageSet:
        return ImageSet(self.draw.integers(0, 256, (self.n, 8, 8, 3), np.uint8), self.ids)


def encoder() -> Encoder:
    """Return a small encoder: what is asked is how its work grows, not how long it takes."""
    return EncoderSpec(width=2).build(torch.Generator().manual_seed(0))


def embedding(made: Made) -> Callable[[], object]:
    images, net = made.images(), encoder()
    return lambda: embed(images, net, Views("plain", 8))


def exact(made: Made) -> Callable[[], object]:
    rows = made.embeddings()
    return lambda: find_neighbors(rows, N_NEIGHBORS, title="")


def indexed(made: Made) -> Callable[[], object]:
    rows = made.embeddings()
    return lambda: find_through_index(rows, N_NEIGHBORS, title="")


def reranked(made: Made) -> Callable[[], object]:
    rows = made.embeddings()
    return lambda: rerank(rows, N_NEIGHBORS)


def selection(made: Made) -> Callable[[], object]:
    assignment, neighbors = made.assignment(), made.neighbors()
    return lambda: neighbor_score(assignment.probabilities, neighbors)


def kmeans(made: Made) -> Callable[[], object]:
    rows = made.embeddings()
    return lambda: KMeans(n_clusters=N_CLUSTERS, n_init=1, n_iterations=20).fit(rows)


def evaluate(made: Made) -> Callable[[], object]:
    assignment, neighbors, true = made.assignment(), made.neighbors(), made.truth()
    return lambda: (score_assignment(assignment, true, method="", split=""),
                    score_without_labels(assignment, neighbors))


def probe(made: Made) -> Callable[[], object]:
    rows, true = made.embeddings(), made.truth()
    return lambda: knn_accuracy(rows, true, n_neighbors=N_NEIGHBORS, n_queries=2000)


def predict(made: Made) -> Callable[[], object]:
    images, net = made.images(), encoder()
    classifier = Classifier(ClusterNet(net, ClusterHeads(net.spec.n_features, N_CLUSTERS)), Views("plain", 8), 8)
    return lambda: classifier.predict_proba(images)


def report(made: Made) -> Callable[[], object]:
    assignment, neighbors, true, rows = made.assignment(), made.neighbors(), made.truth(), made.embeddings().values
    names = name_clusters(N_CLUSTERS)

    def work() -> None:
        confusion = Confusion.of(true, names, assignment, names=names)
        spread = ConfidenceSpread(assignment, names, confusion.known, confusion.correct)
        spread.table(), spread.by_cluster(), spread.thresholds()
        summarize_clusters(assignment, rows, neighbors, names=names, n_shown=10)
        all_findings(assignment, names=names, neighbors=neighbors, correct=confusion.correct)
        review_first(assignment, 50)

    return work


STAGES = {"embed": embedding, "neighbors, exact": exact, "neighbors, IVF": indexed, "re-ranking": reranked,
          "SCAN's score": selection, "k-means": kmeans, "evaluate": evaluate, "kNN probe of 2,000": probe,
          "predict": predict, "report's measures": report, "Super-AND's step": None}


def staged(name: str, n: int) -> Callable[[], object]:
    """Return the work of one stage on ``n`` images, after it was done once on few."""
    torch.set_grad_enabled(name == "Super-AND's step")
    if name == "Super-AND's step":
        return step("streamed", n, "and+ue")
    STAGES[name](Made(400))()
    work = STAGES[name](Made(n))

    def done() -> None:
        work()  # what it returns stays in its process

    return done


def card(name: str, sizes: list[int]) -> list[Row]:
    """Return one row a size."""
    rows: list[Row] = []
    for n in sizes:
        if n > SLOW.get(name, n):
            print(f"{name}: {n:,} images left out, too slow", flush=True)
            continue
        child = Child(staged, name, n)
        child()
        child.close()
        row: Row = {"stage": name, "images": n, "seconds": short(child.seconds, 3),
                    "peak MB": None if child.bytes is None else short(child.bytes / 1e6, 3)}
        before = rows[-1] if rows else None
        row |= {"order of time": order(before, row, "seconds", LEAST_SECONDS),
                "order of memory": order(before, row, "peak MB", LEAST_MB)}
        rows.append(row)
        print(f"{name}: {n:,} images, {row['seconds']} s, {row['peak MB']} MB", flush=True)
    return rows


def order(before: Row | None, now: Row, what: str, least: float) -> float | None:
    """Return the slope on logarithmic axes; None where the smaller figure is lost in noise."""
    if before is None or before[what] is None or before[what] < least:
        return None
    return short(math.log(now[what] / before[what]) / math.log(now["images"] / before["images"]), 2)


def draw(rows: list[Row], file: Path) -> None:
    """Draw time and peak of each stage against the images, with the slopes of n and n²."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    for axis, what, title, least in ((axes[0], "seconds", "seconds", LEAST_SECONDS),
                                     (axes[1], "peak MB", "peak beyond the inputs, MB", LEAST_MB)):
        highest = max(row[what] or 0 for row in rows)
        for i, name in enumerate(dict.fromkeys(row["stage"] for row in rows)):
            own = [row for row in rows if row["stage"] == name and row[what]]
            axis.plot([row["images"] for row in own], [row[what] for row in own], "os^vD"[i % 5] + "-", markersize=4,
                      linewidth=1.2, color=f"C{i % 10}" if i < 10 else "black", label=name)
        images = np.array([min(row["images"] for row in rows), max(row["images"] for row in rows)], float)
        for power, style in ((1, ":"), (2, "--")):
            axis.plot(images, highest * (images / images[1]) ** power, style, color="0.6", linewidth=1)
            axis.annotate("n" if power == 1 else "n²", (images[1] / 4, highest / 4**power), color="0.4", fontsize=12)
        axis.set(xscale="log", yscale="log", xlabel="images", title=title, ylim=(least / 10, highest * 2))
        axis.grid(alpha=0.3)
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, print a table, and write JSON and the drawing where asked."""
    told = arguments(__doc__, repeats=1, images={"type": int, "nargs": "+", "default": [1000, 4000, 16_000, 64_000]},
                     stages={"nargs": "+", "choices": list(STAGES), "default": list(STAGES)}, plot={"type": Path})
    plot, told.plot = told.plot, None  # a path is not for the file
    sizes = sorted(told.images)[: 2 if told.quick else None]
    names = [name for name in told.stages if name != "neighbors, IVF" or opponent("faiss", "faiss-cpu")]
    rows = [row for name in names for row in card(name, sizes)]
    if plot:
        draw(rows, plot)
    finish(told, rows, versions=("scikit-learn", "faiss-cpu"))


if __name__ == "__main__":
    main()
