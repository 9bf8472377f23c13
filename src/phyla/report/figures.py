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
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from phyla.report.measures import ConfidenceSpread, Confusion, Curve, EmbeddingMap, Table
from phyla.report.thumbnails import is_tiny, pixels_of
from phyla.storage import write_bytes
from phyla.types import ImageSet

PALETTE = ("#2f6fb0", "#c96a1b", "#2f8557", "#bf4044", "#7a56a5", "#8a5f45", "#c0568f", "#807b1c", "#177f87",
           "#666c75")
SHAPES = ("circle", "square", "triangle", "diamond", "reversed", "plus", "cross")
"""Cluster i has colour i modulo 10 and shape i modulo 7, so 70 clusters differ and no two neighbors by colour alone."""

_MARKERS = dict(zip(SHAPES, ("o", "s", "^", "D", "v", "P", "X"), strict=True))
_INK, _FAINT, _ACCENT = "#22282b", "#d9d6cf", "#1f6f54"
_MOST_PROTOTYPES = 240
_MOST_PANELS = 24
_MOST_NAMED = 60
_LARGEST_PNG = 300_000
_COARSEST_DPI = 30


def confusion_matrix(confusion: Confusion) -> tuple[Figure, Table]:
    """Return the share of each true class in each cluster as a heat map, and the counts."""
    n_classes, n_columns = confusion.counts.shape
    figure = _figure(min(14.0, 2.6 + 0.42 * n_columns), min(14.0, 1.9 + 0.42 * n_classes))
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
                      color="white" if dark else _INK)
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
    figure = _figure(max(4.0, tile * columns), 0.5 + 1.24 * tile * lines)
    axes = figure.subplots()
    axes.set(xlim=(-0.06, columns), ylim=(1.24 * lines, -0.06), aspect="equal")
    axes.axis("off")
    for index, pixels in enumerate(pixels_of(images, [row for row, _ in shown]) if shown else []):
        left, top = index % columns, 1.24 * (index // columns)
        _place(axes, pixels, left, top, tiny=is_tiny(images))
        axes.text(left + 0.47, top + 0.96, _plain(shown[index][1], 16), ha="center", va="top",
                  fontsize=8 if tile > 1 else 5)
    note = f", the first {len(shown)} of {len(filled)}" if len(filled) > len(shown) else ""
    axes.set_title(f"The most typical image of each cluster{note}", fontsize=10)
    return figure, table


def embedding_map(layout: EmbeddingMap, names: Sequence[str]) -> tuple[Figure, Table]:
    """Return the map of the embeddings, cluster by colour, shape and number, and its table."""
    figure = _figure(9.0, 6.5)
    axes = figure.subplots()
    size = 26 if len(layout.rows) <= 500 else 9
    centers = layout.centers()
    for cluster in centers:
        inside = layout.points[layout.labels == cluster]
        axes.scatter(inside[:, 0], inside[:, 1], s=size, marker=_MARKERS[SHAPES[cluster % len(SHAPES)]],
                     color=PALETTE[cluster % len(PALETTE)], alpha=0.65, linewidths=0, label=_plain(names[cluster], 28))
    for cluster, (x, y) in centers.items():
        axes.text(x, y, str(cluster), ha="center", va="center", fontsize=10 if len(centers) <= 40 else 6, weight="bold",
                  color=_INK, bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.8, "linewidth": 0})
    some = f"{len(layout.rows):,} of {layout.n_images:,} images" if len(layout.rows) < layout.n_images else \
        f"{layout.n_images:,} images"
    axes.set_title(f"Embeddings of {some} in two dimensions ({layout.method})", fontsize=10)
    axes.set(xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.spines[:].set_color(_FAINT)
    if len(centers) <= 20:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, markerscale=2 if size < 20 else 1)
    return figure, layout.table(names)


def confidence(spread: ConfidenceSpread) -> tuple[Figure, Table]:
    """Return the histogram of confidence beside the spread in each cluster, and the histogram's table."""
    rows = spread.by_cluster()
    figure = _figure(10.0, min(14.0, max(3.6, 1.2 + 0.24 * len(rows))))
    left, right = figure.subplots(1, 2)
    edges = np.arange(spread.n_bins) / spread.n_bins
    left.bar(edges, spread.counts, width=0.92 / spread.n_bins, align="edge", color=_ACCENT)
    left.set(xlim=(0, 1), xlabel="confidence", ylabel="images", title="All images")
    places = np.arange(len(rows))
    for low, high, width in (("5 %", "95 %", 1.2), ("25 %", "75 %", 5.0)):
        right.hlines(places, [row[low] for row in rows], [row[high] for row in rows], color=_ACCENT, linewidth=width,
                     alpha=0.55)
    right.plot([row["50 %"] for row in rows], places, "o", color=_INK, markersize=4)
    _tick_names(right.yaxis, [str(row["cluster"]) for row in rows])
    right.set(xlim=(0, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="confidence: median, middle half, middle 90 %",
              title="By cluster")
    for axes in (left, right):
        _light(axes)
    return figure, spread.table()


def training_curves(curves: Sequence[Curve]) -> tuple[Figure, Table]:
    """Return one small panel a stage and quantity, at most 24, and every value in a table."""
    shown = list(curves[:_MOST_PANELS])
    columns = min(4, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = _figure(max(4.0, 2.9 * columns), 2.2 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, curve in zip(grid, shown, strict=False):
        axes.plot(curve.epochs, curve.values, color=_ACCENT, linewidth=1.4, markersize=3,
                  marker="o" if len(curve.values) < 12 else None)
        axes.set_title(_plain(f"{curve.stage}: {curve.quantity}", 34), fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        _light(axes)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    if not shown:
        grid[0].text(0.5, 0.5, "no training was recorded", ha="center", va="center", fontsize=10)
    table: Table = [{"stage": curve.stage, "quantity": curve.quantity, "epoch": epoch, "value": value}
                    for curve in curves for epoch, value in zip(curve.epochs, curve.values, strict=True)]
    return figure, table


def save_png(figure: Figure, path: Path, *, limit: int = _LARGEST_PNG) -> None:
    """Write a figure as PNG of at most ``limit`` bytes, by fewer colours and then fewer pixels if need be."""
    data, dpi = b"", 150.0
    while dpi >= _COARSEST_DPI:
        data = _rendered(figure, dpi)
        if len(data) > limit:
            data = _fewer_colours(data)
        if len(data) <= limit:
            break
        dpi *= min(0.9, 0.97 * math.sqrt(limit / len(data)))
    write_bytes(path, data)


def _rendered(figure: Figure, dpi: float) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Glyph .* missing")  # a name in a script the font lacks: boxes
        warnings.filterwarnings("ignore", message=".*constrained_layout not applied")  # too many names for the space
        figure.savefig(out, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _fewer_colours(data: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").quantize(192, Image.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _place(axes: Axes, pixels: np.ndarray, left: float, top: float, *, tiny: bool) -> None:
    height, width = pixels.shape[:2]
    scale = 0.94 / max(height, width)
    x, y = left + (0.94 - scale * width) / 2, top + (0.94 - scale * height) / 2
    axes.imshow(pixels, extent=(x, x + scale * width, y + scale * height, y),
                interpolation="nearest" if tiny else "antialiased")


def _tick_names(axis: Axis, names: Sequence[str], *, rotation: float = 0) -> None:
    """Name every place of an axis, or none where the names would run into one another."""
    if len(names) > _MOST_NAMED:
        axis.set_ticks([])
        return
    axis.set_ticks(range(len(names)), [_plain(name, 18) for name in names], fontsize=8)
    for label in axis.get_ticklabels() if rotation else []:
        label.set(rotation=rotation, ha="right", rotation_mode="anchor")


def _light(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _plain(text: str, longest: int) -> str:
    """Return a name that Matplotlib draws as it is, on one line and not too long."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return (line if len(line) <= longest else line[: longest - 1] + "…").replace("$", r"\$")
