import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from phyla.report import figures
from phyla.report.examples import Gallery
from phyla.report.measures import ConfidenceSpread, Confusion, EmbeddingMap, read_curves
from phyla.report.selection import Examples, choose_examples, find_prototypes, review_first
from phyla.types import Assignment, ImageSet, Neighbors

NAMES = [f"Cluster {i}" for i in range(300)]


def random_run(n_images, n_clusters, size=8):
    draw = np.random.default_rng(0)
    ids = [str(i) for i in range(n_images)]
    p = draw.dirichlet(np.full(n_clusters, 0.1), n_images).astype(np.float32)
    pixels = draw.integers(0, 256, (n_images, size, size, 3), dtype=np.uint8)
    return ImageSet(pixels, ids), Assignment(p, ids), draw.normal(size=(n_images, 4)).astype(np.float32)


def saved(figure, folder: Path):
    assert isinstance(figure, Figure)
    figures.save_png(figure, folder / "figure.png")
    data = (folder / "figure.png").read_bytes()
    assert len(data) < 300_000
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.size


@pytest.mark.parametrize(("n_images", "n_clusters"), [(1, 1), (3, 3), (60, 3), (80, 80)])
def test_every_figure_of_any_run(tmp_path, n_images, n_clusters):
    images, assignment, embeddings = random_run(n_images, n_clusters)
    names = NAMES[:n_clusters]
    truth = np.arange(n_images) % min(4, n_images)
    drawn = {
        "map": figures.embedding_map(EmbeddingMap.of(embeddings[:, :2], assignment, limit=29), names),
        "prototypes": figures.prototypes(images, [i if assignment.sizes[i] else -1 for i in range(n_clusters)], names),
        "confidence": figures.confidence(ConfidenceSpread(assignment, names)),
        "confusion": figures.confusion_matrix(Confusion.of(truth, list("abcd"), assignment, names=names))}
    for figure, table in drawn.values():
        assert min(saved(figure, tmp_path)) > 50
        assert table
        assert all(row.keys() == table[0].keys() for row in table)


def test_tables_hold_what_is_drawn():
    images, assignment, _ = random_run(12, 3)
    _, table = figures.prototypes(images, [4, -1, 0], NAMES[:3])
    assert table == [{"cluster": "Cluster 0", "prototype": "4"}, {"cluster": "Cluster 1", "prototype": None},
                     {"cluster": "Cluster 2", "prototype": "0"}]
    _, table = figures.confidence(ConfidenceSpread(assignment, NAMES[:3]))
    assert sum(row["images"] for row in table) == 12
    _, table = figures.training_curves(read_curves([{"stage": "a", "epoch": 2, "loss": 0.5}]))
    assert table == [{"stage": "a", "quantity": "loss", "epoch": 2.0, "value": 0.5}]


@pytest.mark.parametrize("records", [[], [{"stage": "a", "epoch": 1, "loss": 1.0}],
                                     [{"stage": "a", "epoch": 1, **{f"q{i}": float(i) for i in range(40)}}]])
def test_curves_of_nothing_one_point_and_very_many(tmp_path, records):
    saved(figures.training_curves(read_curves(records))[0], tmp_path)


@pytest.mark.parametrize("size", [1, 3, 130])
def test_prototypes_of_any_size(tmp_path, size):
    images, _, _ = random_run(5, 2, size)
    saved(figures.prototypes(images, [0, 3], NAMES[:2])[0], tmp_path)


def test_no_cluster_has_images_to_show(tmp_path):
    images, _, _ = random_run(2, 2)
    saved(figures.prototypes(images, [-1, -1], NAMES[:2])[0], tmp_path)


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["$x^", "\\frac{", "漢字 \n 猫", "a" * 200, "$a$ and $b$"]
    images, assignment, embeddings = random_run(20, 5)
    for figure, _ in (figures.embedding_map(EmbeddingMap.of(embeddings, assignment), names),
                      figures.prototypes(images, range(5), names),
                      figures.confusion_matrix(Confusion.of(np.arange(20) % 5, names, assignment, names=names))):
        saved(figure, tmp_path)
    texts = [text.get_text() for text in figures.prototypes(images, range(5), names)[0].axes[0].texts]
    assert r"\$x^" in texts


def test_the_limit_holds_for_what_does_not_compress(tmp_path):
    images, _, _ = random_run(20, 2, 96)
    figure, _ = figures.prototypes(images, range(20), NAMES[:20])
    figures.save_png(figure, tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 30_000
    figures.save_png(figure, tmp_path / "small.png", limit=30_000)
    assert (tmp_path / "small.png").stat().st_size <= 30_000


def test_only_the_heat_of_the_share_is_dark(tmp_path):
    assignment = Assignment(np.eye(2, dtype=np.float32)[[0, 0, 1, 1]], list("abcd"))
    figure, _ = figures.confusion_matrix(Confusion.of(np.array([0, 0, 1, 1]), ["x", "y"], assignment, names=NAMES[:2]))
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), np.eye(2))
    assert [text.get_text() for text in figure.axes[0].texts] == ["100", "100"]


def gallery_of(assignment, embeddings, names, n_neighbors, truth=None, classes=()):
    n_images = len(assignment)
    neighbors = Neighbors((np.arange(n_images)[:, None] + np.arange(1, n_neighbors + 1)) % n_images,
                          np.tile(np.linspace(1, -1, n_neighbors, dtype=np.float32), (n_images, 1)))
    chosen = choose_examples(assignment, find_prototypes(assignment, embeddings).tolist(), review_first(assignment, 10))
    return Gallery.of(chosen, assignment, neighbors, names=names, truth=truth, classes=classes)


@pytest.mark.parametrize(("n_images", "n_clusters", "n_neighbors", "size", "labelled"), [
    (1, 1, 0, 8, False), (2, 2, 1, 1, True), (40, 2, 20, 8, False), (12, 3, 2, 224, True), (1200, 1000, 4, 8, True),
    (30, 30, 1, 32, False)])
def test_examples_of_any_run(tmp_path, n_images, n_clusters, n_neighbors, size, labelled):
    images, assignment, embeddings = random_run(n_images, n_clusters, size)
    names = [f"a cluster with a long name {i}" for i in range(n_clusters)]
    truth, classes = (np.arange(n_images) % 4 - 1, ["$x^", "漢字 \n 猫", "\\frac{" * 30]) if labelled else (None, ())
    gallery = gallery_of(assignment, embeddings, names, n_neighbors, truth, classes)
    figure, table = figures.probabilities(images, gallery)
    assert min(saved(figure, tmp_path)) > 50
    assert table == gallery.probability_table(images.ids)
    if n_neighbors:
        figure, table = figures.retrieval(images, gallery)
        assert min(saved(figure, tmp_path)) > 50
        assert len(table) == len(gallery.examples) * min(8, n_neighbors)


def test_examples_of_certain_clusters_of_which_some_are_empty(tmp_path):
    images, _, embeddings = random_run(6, 1)
    assignment = Assignment(np.eye(4, dtype=np.float32)[[1, 1, 3, 3, 3, 1]], images.ids)
    gallery = gallery_of(assignment, embeddings, NAMES[:4], 2)
    figure, table = figures.probabilities(images, gallery)
    saved(figure, tmp_path)
    assert [(row["name"], row["share"]) for row in table] == [("Cluster 1", 1.0), ("Cluster 3", 1.0)]


def test_another_class_is_marked_by_a_frame_and_named():
    images, _, embeddings = random_run(4, 1)
    assignment = Assignment(np.ones((4, 1), np.float32), images.ids)
    gallery = gallery_of(assignment, embeddings, NAMES[:1], 3, np.array([0, 1, 0, 1]), ["cat", "dog"])
    axes = figures.retrieval(images, gallery)[0].axes[0]
    words = [text.get_text() for text in axes.texts]
    own = gallery.examples[0].true_class
    other = "dog" if own == "cat" else "cat"
    assert words.count(f"≠ {other}") == len(axes.patches) == 2
    assert words.count(own) == 1
    assert [word for word in words if word[-1:].isdigit()] == ["Cluster 0", "1.000", "0.000", "-1.000"]


def test_bars_are_as_long_as_their_shares_and_the_true_class_is_ticked():
    images, _, _ = random_run(3, 1)
    assignment = Assignment(np.tile(np.float32([0.75, 0.25]), (3, 1)), images.ids)
    neighbors = Neighbors(np.array([[1], [2], [0]]), np.full((3, 1), 0.5, np.float32))
    gallery = Gallery.of(Examples((1,), ()), assignment, neighbors, names=NAMES[:2], truth=np.array([1, 0, 0]),
                         classes=["cat", "dog"])
    figure, _ = figures.probabilities(images, gallery)
    first, second, cat = (bar.get_width() for bar in figure.axes[0].patches)
    assert (first / cat, second / cat) == pytest.approx((0.75, 0.25))
    words = [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in figure.axes[0].texts]
    assert words == ["Typical images", "Cluster 0", "75 %", "Cluster 1", "25 %", "✓ cat", "100 %"]
