"""Turn the numbers behind the figures into coordinates and style for the page's own drawings.

The page draws in SVG and CSS, so that it stays sharp, follows a dark screen and fits a phone; the PNG files are for
slides and papers.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

from phyla.report.figures import PALETTE, SHAPES
from phyla.report.measures import Curve, EmbeddingMap
from phyla.report.wording import number, shorten
from phyla.types import Assignment

DARK_PALETTE = ("#74aee8", "#eb9f5f", "#6fc594", "#f08587", "#b99ae3", "#c9a083", "#ea9cc6", "#c8c161", "#62c8d2",
                "#aab0b8")
"""The colours of ``PALETTE`` for a dark screen."""
MAP_WIDTH, MAP_HEIGHT = 1000, 640
_EDGE = 24
_CURVE_POINTS = 240

OUTLINES = {
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
    "square": "M-4.5-4.5h9v9h-9z",
    "triangle": "M0-5.6 5.4 4.2H-5.4z",
    "diamond": "M0-6 5.4 0 0 6-5.4 0z",
    "reversed": "M0 5.6 5.4-4.2H-5.4z",
    "plus": "M-1.9-5.4h3.8v3.5h3.5v3.8h-3.5v3.5h-3.8v-3.5h-3.5v-3.8h3.5z",
    "cross": "M-5-3.2-3.2-5 0-1.8 3.2-5 5-3.2 1.8 0 5 3.2 3.2 5 0 1.8-3.2 5-5 3.2-1.8 0z",
}
"""Outlines of the shapes about (0, 0), each about 10 units wide."""


@dataclass(frozen=True)
class MapPoint:
    """One image on the page's map: place in the drawing, position in the sheet of small images, and its words."""

    x: float
    y: float
    position: int
    words: str


@dataclass(frozen=True)
class MapGroup:
    """One cluster on the page's map: its look, its points, and where its number stands."""

    cluster: int
    name: str
    color: int
    shape: str
    points: tuple[MapPoint, ...]
    x: float
    y: float


@dataclass(frozen=True)
class Panel:
    """One training curve in a drawing 100 wide and 100 high, with its ticks as (percent from the top, words)."""

    curve: Curve
    line: str
    ticks: tuple[tuple[float, str], ...]
    end: tuple[float, float]
    last: str


def map_groups(layout: EmbeddingMap, assignment: Assignment, *, ids: Sequence[str],
               names: Sequence[str]) -> list[MapGroup]:
    """Return the clusters of a map, each with its points, largest first so that small ones lie on top."""
    places = np.column_stack([_EDGE + layout.points[:, 0] * (MAP_WIDTH - 2 * _EDGE),
                              MAP_HEIGHT - _EDGE - layout.points[:, 1] * (MAP_HEIGHT - 2 * _EDGE)]).round(1)
    groups = []
    for cluster in np.unique(layout.labels).tolist():
        inside = np.flatnonzero(layout.labels == cluster)
        points = tuple(
            MapPoint(float(places[i, 0]), float(places[i, 1]), int(i),
                     f"{shorten(ids[row], 80)} · {names[cluster]} · confidence {assignment.confidence[row]:.2f}")
            for i in inside for row in [int(layout.rows[i])])
        x, y = np.median(places[inside], axis=0).tolist()
        groups.append(MapGroup(cluster, names[cluster], cluster % len(PALETTE), SHAPES[cluster % len(SHAPES)], points,
                               round(x, 1), round(y, 1)))
    return sorted(groups, key=lambda group: -len(group.points))


def curve_panel(curve: Curve) -> Panel:
    """Return the drawing of one curve, thinned to what a screen can show."""
    thin = curve.thinned(_CURVE_POINTS)
    values, epochs = np.array(thin.values), np.array(thin.epochs)
    flat = values.min() == values.max()
    ticks = MaxNLocator(3).tick_values(values.min(), values.max())
    low, high = min(values.min(), ticks[0]), max(values.max(), ticks[-1])
    heights = 100 * (1 - (values - low) / (high - low))
    span = epochs[-1] - epochs[0]
    across = 100 * (epochs - epochs[0]) / span if span else np.full(len(epochs), 50.0)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, heights, strict=True))
    marks = tuple((round(float(100 * (1 - (tick - low) / (high - low))), 1), f"{tick:.{3 if flat else 6}g}")
                  for tick in (values[:1] if flat else ticks))
    end = round(float(across[-1]), 1), round(float(heights[-1]), 1)
    return Panel(thin, line, marks, end, number(curve.values[-1]))


def heat_uri(shares: np.ndarray, *, color: tuple[int, int, int] = (47, 133, 87)) -> str:
    """Return a matrix of shares, 0 to 1, as a PNG in one colour that is the more solid the larger the share."""
    pixels = np.empty((*shares.shape, 4), dtype=np.uint8)
    pixels[..., :3] = color
    pixels[..., 3] = np.clip(255 * shares, 0, 255).round()
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
