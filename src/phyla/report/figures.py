"""Draw the figures of a report as files: a Matplotlib figure each, and the table of what it shows.

Only Matplotlib's objects are used, never its global state. Names are drawn as they are, dollar signs included.
"""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from phyla.report.examples import Bar, Example, Gallery
from phyla.report.measures import ConfidenceSpread, Confusion, Curve, EmbeddingMap, Table
from phyla.report.thumbnails import is_tiny, pixels_of, shrunk
from phyla.report.wording import percent
from phyla.storage import write_bytes
from phyla.types import ImageSet

PALETTE = ("#2f6fb0", "#c96a1b", "#2f8557", "#bf4044", "#7a56a5", "#8a5f45", "#c0568f", "#807b1c", "#177f87",
           "#666c75")
SHAPES = ("circle", "square", "triangle", "diamond", "reversed", "plus", "cross")
"""Cluster i has colour i modulo 10 and shape i modulo 7, so 70 clusters differ and no two neighbors by colour alone."""

_MARKERS = dict(zip(SHAPES, ("o", "s", "^", "D", "v", "P", "X"), strict=True))
INK, FAINT, SOFT, ACCENT, OTHER = "#22282b", "#d9d6cf", "#8b9296", "#1f6f54", "#a8322f"
_MOST_PROTOTYPES = 240
_MOST_PANELS = 24
_MOST_NAMED = 60
_TILE = 0.85  # inches of an example: large beside its 8-point words, so that 90 photographs in 300 kB stay readable
_TILE_PIXELS = 160
_HEADING, _BAR, _NAME, _VALUE = 0.4, 2.0, 1.6, 1.1  # in tiles: height of a heading; length of a bar of 1 and its words
_LARGEST_PNG = 300_000
_COARSEST_DPI = 24


def confusion_matrix(confusion: Confusion) -> tuple[Figure, Table]:
    """Return the share of each true class in each cluster as a heat map, and the counts."""
    n_classes, n_columns = confusion.counts.shape
    figure = new_figure(min(14.0, 2.6 + 0.42 * n_columns), min(14.0, 1.9 + 0.42 * n_classes))
    axes = figure.subplots()
    shown = axes.imshow(confusion.shares, cmap="Greens", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xlabel("found cluster, in the order of the class it stands for")
    axes.set_ylabel("true class")
    _tick_names(axes.xaxis, [confusion.names[int(c)] for c in confusion.clusters], rotation=60 if n_columns > 6 else 30)
    _tick_names(axes.yaxis, confusion.classes)
    if max(n_classes, n_columns) <= 25:
        for row, column in np.argwhere(confusion.counts > 0).tolist():
            dark = confusion.shares[row, column] > 0.55
            axes.text(column, row, f"{100 * confusion.shares[row, column]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if dark else INK)
    bar = figure.colorbar(shown, ax=axes, fraction=0.04, format=PercentFormatter(1.0))
    bar.set_label("share of the class")
    bar.outline.set_visible(False)
    return figure, confusion.table()


def prototypes(images: ImageSet, rows: Sequence[int], names: Sequence[str]) -> tuple[Figure, Table]:
    """Return one image a cluster, with its name, and the ids; ``rows`` holds -1 for an empty cluster."""
    table: Table = [{"cluster": name, "prototype": images.ids[row] if row >= 0 else None}
                    for name, row in zip(names, rows, strict=True)]
    filled = [(row, name) for row, name in zip(rows, names, strict=True) if row >= 0]
    shown = filled[:_MOST_PROTOTYPES]
    lines = max(1, math.ceil(len(shown) / max(6, math.ceil(math.sqrt(1.6 * len(shown))))))
    columns = max(1, math.ceil(len(shown) / lines))
    tile = 1.25 if len(shown) <= 60 else 0.75
    figure = new_figure(max(4.0, tile * columns), 0.5 + 1.24 * tile * lines)
    axes = figure.subplots()
    axes.set(xlim=(-0.06, columns), ylim=(1.24 * lines, -0.06), aspect="equal")
    axes.axis("off")
    for index, pixels in enumerate(pixels_of(images, [row for row, _ in shown]) if shown else []):
        left, top = index % columns, 1.24 * (index // columns)
        _place(axes, pixels, left, top, tiny=is_tiny(images))
        axes.text(left + 0.47, top + 0.96, plain(shown[index][1], 16), ha="center", va="top",
                  fontsize=8 if tile > 1 else 5)
    note = f", the first {len(shown)} of {len(filled)}" if len(filled) > len(shown) else ""
    axes.set_title(f"The most typical image of each cluster{note}", fontsize=10)
    return figure, table


def embedding_map(layout: EmbeddingMap, names: Sequence[str]) -> tuple[Figure, Table]:
    """Return the map of the embeddings, cluster by colour, shape and number, and its table."""
    figure = new_figure(9.0, 6.5)
    axes = figure.subplots()
    size = 26 if len(layout.rows) <= 500 else 9
    centers = layout.centers()
    for cluster in centers:
        inside = layout.points[layout.labels == cluster]
        axes.scatter(inside[:, 0], inside[:, 1], s=size, marker=_MARKERS[SHAPES[cluster % len(SHAPES)]],
                     color=PALETTE[cluster % len(PALETTE)], alpha=0.65, linewidths=0, label=plain(names[cluster], 28))
    for cluster, (x, y) in centers.items():
        axes.text(x, y, str(cluster), ha="center", va="center", fontsize=10 if len(centers) <= 40 else 6, weight="bold",
                  color=INK, bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.8, "linewidth": 0})
    some = f"{len(layout.rows):,} of {layout.n_images:,} images" if len(layout.rows) < layout.n_images else \
        f"{layout.n_images:,} images"
    axes.set_title(f"Embeddings of {some} in two dimensions ({layout.method})", fontsize=10)
    axes.set(xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.spines[:].set_color(FAINT)
    if len(centers) <= 20:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, markerscale=2 if size < 20 else 1)
    return figure, layout.table(names)


def confidence(spread: ConfidenceSpread) -> tuple[Figure, Table]:
    """Return the histogram of confidence beside the spread in each cluster, and the histogram's table."""
    rows = spread.by_cluster()
    figure = new_figure(10.0, min(14.0, max(3.6, 1.2 + 0.24 * len(rows))))
    left, right = figure.subplots(1, 2)
    edges = np.arange(spread.n_bins) / spread.n_bins
    left.bar(edges, spread.counts, width=0.92 / spread.n_bins, align="edge", color=ACCENT)
    left.set(xlim=(0, 1), xlabel="confidence", ylabel="images", title="All images")
    places = np.arange(len(rows))
    for low, high, width in (("5 %", "95 %", 1.2), ("25 %", "75 %", 5.0)):
        right.hlines(places, [row[low] for row in rows], [row[high] for row in rows], color=ACCENT, linewidth=width,
                     alpha=0.55)
    right.plot([row["50 %"] for row in rows], places, "o", color=INK, markersize=4)
    _tick_names(right.yaxis, [str(row["cluster"]) for row in rows])
    right.set(xlim=(0, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="confidence: median, middle half, middle 90 %",
              title="By cluster")
    for axes in (left, right):
        light(axes)
    return figure, spread.table()


def training_curves(curves: Sequence[Curve]) -> tuple[Figure, Table]:
    """Return one small panel a stage and quantity, at most 24, and every value in a table."""
    shown = list(curves[:_MOST_PANELS])
    columns = min(4, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = new_figure(max(4.0, 2.9 * columns), 2.2 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, curve in zip(grid, shown, strict=False):
        axes.plot(curve.epochs, curve.values, color=ACCENT, linewidth=1.4, markersize=3,
                  marker="o" if len(curve.values) < 12 else None)
        axes.set_title(plain(f"{curve.stage}: {curve.quantity}", 34), fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        light(axes)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    if not shown:
        grid[0].text(0.5, 0.5, "no training was recorded", ha="center", va="center", fontsize=10)
    table: Table = [{"stage": curve.stage, "quantity": curve.quantity, "epoch": epoch, "value": value}
                    for curve in curves for epoch, value in zip(curve.epochs, curve.values, strict=True)]
    return figure, table


def retrieval(images: ImageSet, gallery: Gallery) -> tuple[Figure, Table]:
    """Return a row an example, the image and its nearest others with their similarity, and the table of it.

    A neighbor of another class, or without labels in another cluster, has a broken frame and is named.
    """
    width = max(4.5 / _TILE, 1.3 + max(len(example.nearest) for example in gallery.examples))
    figure, axes, cells = _examples(gallery, width=width, height=1.45)
    for example, _, top in cells:
        _retrieved(axes, images, example, top)
    other = "of another class" if gallery.labelled else "in another cluster"
    axes.set_title(f"Examples (left) and their nearest images, by similarity\n≠ and a broken frame: {other}",
                   fontsize=10, loc="left")
    return figure, gallery.retrieval_table(images.ids)


def probabilities(images: ImageSet, gallery: Gallery) -> tuple[Figure, Table]:
    """Return each example beside bars of its clusters and, with labels, of its neighbors' classes, and the table."""
    column = _NAME + _BAR + _VALUE
    width = 1 + column * (1 + gallery.votes)
    figure, axes, cells = _examples(gallery, width=width, height=1.2,
                                    abreast=1 if gallery.votes or len(gallery.examples) < 2 else 2)
    for example, left, top in cells:
        _place(axes, _small(images, example.row), left, top, tiny=is_tiny(images))
        _bars(axes, example.clusters, left + 1, top)
        if gallery.votes:
            _bars(axes, example.classes, left + 1 + column, top, true_known=example.true_class is not None)
            if not example.classes:
                axes.text(left + 1 + column + _NAME, top + 0.1, "no neighbor of known class", va="center", fontsize=8)
    voted = ", and the classes their neighbors vote for\n✓ the true class" if gallery.votes else ""
    axes.set_title(f"The most probable clusters of example images{voted}", fontsize=10, loc="left")
    return figure, gallery.probability_table(images.ids)


def save_png(figure: Figure, path: Path, *, limit: int = _LARGEST_PNG) -> None:
    """Write a figure as PNG of at most ``limit`` bytes, by fewer colours and then fewer pixels if need be."""
    data, dpi = b"", 150.0
    while dpi >= _COARSEST_DPI:
        drawn = _rendered(figure, dpi)
        if len(_encoded(drawn, quick=True)) <= 1.5 * limit:  # no use in trying hard what is far too large
            data = _encoded(drawn)
        if not data or len(data) > limit:
            data = _encoded(drawn.quantize(256, Image.Quantize.MEDIANCUT))
        if len(data) <= limit:
            break
        dpi *= min(0.9, 0.97 * math.sqrt(limit / len(data)))
    write_bytes(path, data)


def _rendered(figure: Figure, dpi: float) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Glyph .* missing")  # a name in a script the font lacks: boxes
        warnings.filterwarnings("ignore", message=".*constrained_layout not applied")  # too many names for the space
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _encoded(image: Image.Image, *, quick: bool = False) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1 if quick else 6)
    return out.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` by ``height`` inches."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _place(axes: Axes, pixels: np.ndarray, left: float, top: float, *, tiny: bool) -> None:
    height, width = pixels.shape[:2]
    scale = 0.94 / max(height, width)
    x, y = left + (0.94 - scale * width) / 2, top + (0.94 - scale * height) / 2
    axes.imshow(pixels, extent=(x, x + scale * width, y + scale * height, y),
                interpolation="nearest" if tiny else "antialiased")


def _examples(gallery: Gallery, *, width: float, height: float,
              abreast: int = 1) -> tuple[Figure, Axes, list[tuple[Example, float, float]]]:
    """Return a figure in tiles with a heading a kind of example, and where the cell of each example begins."""
    cells, headings, top = [], {}, 0.0
    for kind in gallery.kinds:
        headings[kind], top = top, top + _HEADING
        own = [example for example in gallery.examples if example.kind == kind]
        cells += [(example, width * (i % abreast), top + height * (i // abreast)) for i, example in enumerate(own)]
        top += height * math.ceil(len(own) / abreast)
    figure = new_figure(_TILE * width * abreast, _TILE * top + 0.6)
    axes = figure.subplots()
    axes.set(xlim=(-0.06, width * abreast), ylim=(top, -0.06), aspect="equal")
    axes.axis("off")
    for kind, line in headings.items():
        axes.text(0, line + 0.05, f"{kind} images".capitalize(), va="top", fontsize=9, weight="bold", color=INK)
    return figure, axes, cells


def _retrieved(axes: Axes, images: ImageSet, example: Example, top: float) -> None:
    """Draw one line of the retrieval figure: the example with its names, then its neighbors with theirs."""
    tiny = is_tiny(images)
    _place(axes, _small(images, example.row), 0, top, tiny=tiny)
    _caption(axes, 0, top, example.cluster, example.true_class or "")
    for column, near in enumerate(example.nearest):
        left = column + 1.3
        _place(axes, _small(images, near.row), left, top, tiny=tiny)
        _caption(axes, left, top, f"{near.similarity:.3f}", f"≠ {near.other}" if near.other else "")
        if near.other:
            axes.add_patch(Rectangle((left - 0.01, top - 0.01), 0.96, 0.96, fill=False, edgecolor=OTHER,
                                     linestyle=(0, (3, 1.5)), linewidth=1.8))


def _caption(axes: Axes, left: float, top: float, first: str, second: str) -> None:
    for line, words in enumerate((first, second)):
        marked = words.startswith("≠")
        axes.text(left + 0.47, top + 0.99 + 0.18 * line, plain(words, 12), ha="center", va="top", fontsize=8,
                  color=OTHER if marked else INK, weight="bold" if marked else "normal")


def _bars(axes: Axes, bars: Sequence[Bar], left: float, top: float, *, true_known: bool = False) -> None:
    """Draw named shares of 1, the largest on top; where a true class is known it is ticked, and the others are gray."""
    start = left + _NAME
    for line, bar in enumerate(bars):
        middle = top + 0.1 + 0.19 * line
        axes.add_patch(Rectangle((start, middle - 0.07), _BAR * bar.share, 0.14, linewidth=0,
                                 facecolor=SOFT if true_known and not bar.true else ACCENT))
        name = f"✓ {bar.name}" if bar.true else bar.name
        axes.text(start - 0.06, middle, plain(name, 18), ha="right", va="center", fontsize=8, color=INK)
        axes.text(start + _BAR * bar.share + 0.06, middle, percent(bar.share), va="center", fontsize=8, color=INK)
    if bars:
        axes.plot([start, start], [top, top + 0.94], color=FAINT, linewidth=0.8)


def _small(images: ImageSet, row: int) -> np.ndarray:
    return np.asarray(shrunk(pixels_of(images, [row])[0], _TILE_PIXELS))


def _tick_names(axis: Axis, names: Sequence[str], *, rotation: float = 0) -> None:
    """Name every place of an axis, or none where the names would run into one another."""
    if len(names) > _MOST_NAMED:
        axis.set_ticks([])
        return
    axis.set_ticks(range(len(names)), [plain(name, 18) for name in names], fontsize=8)
    for label in axis.get_ticklabels() if rotation else []:
        label.set(rotation=rotation, ha="right", rotation_mode="anchor")


def light(axes: Axes) -> None:
    """Give axes the look of all: no box, a faint grid, small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def plain(text: str, longest: int) -> str:
    """Return a name that Matplotlib draws as it is, on one line and not too long."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return (line if len(line) <= longest else line[: longest - 1] + "…").replace("$", r"\$")
