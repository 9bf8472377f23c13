"""Draw several results as lines in one plot: for a file with Matplotlib, for the page as coordinates in percent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from phyla.report.figures import PALETTE

DASHES = ((), (7, 4), (2, 3), (10, 3, 2, 3))
"""Results differ by colour and by dash."""

Ticks = Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """One result: ``x`` and ``y`` of its points, x rising."""

    title: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class DrawnLine:
    """One line of the page's plot, 100 wide and 100 high: its points, and the places of its marks if it has any."""

    title: str
    color: int
    dash: str
    points: str
    marks: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plot:
    """A plot of the page: lines, ticks as (percent from the left or from the top, words), and what it says.

    ``shown`` is for readers who do not see the drawing.
    """

    title: str
    lines: tuple[DrawnLine, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_label: str
    y_label: str
    shown: str


def plot_lines(lines: Sequence[Line], *, title: str, x_ticks: Ticks, y_ticks: Ticks, x_label: str, y_label: str,
               marked: bool) -> Plot:
    """Return the page's plot of ``lines``; both axes run from the first tick to the last.

    Parameters
    ----------
    x_ticks, y_ticks : at least two of (value, words), rising
    marked : whether each point has a mark
    """
    x_range, y_range = ((ticks[0][0], ticks[-1][0]) for ticks in (x_ticks, y_ticks))
    drawn = []
    for index, line in enumerate(lines):
        places = tuple((_percent(x, *x_range), 100 - _percent(y, *y_range))
                       for x, y in zip(line.x, line.y, strict=True))
        drawn.append(DrawnLine(line.title, index % len(PALETTE), " ".join(map(str, DASHES[index % len(DASHES)])),
                               " ".join(f"{x:.1f},{y:.1f}" for x, y in places),
                               tuple((round(x, 1), round(y, 1)) for x, y in places) if marked else ()))
    ends = "; ".join(f"{line.title} from {line.y[0]:.3f} to {line.y[-1]:.3f}" for line in lines)
    return Plot(title, tuple(drawn), tuple((round(_percent(at, *x_range), 1), words) for at, words in x_ticks),
                tuple((round(100 - _percent(at, *y_range), 1), words) for at, words in y_ticks), x_label, y_label,
                f"{y_label}, by {x_label}: {ends}. The table below has the numbers.")


def draw_lines(axes: Axes, lines: Sequence[Line], *, marker: str | None = None) -> None:
    """Draw ``lines`` in the colours and dashes of the page."""
    for index, line in enumerate(lines):
        axes.plot(line.x, line.y, color=PALETTE[index % len(PALETTE)], linewidth=1.6, marker=marker, markersize=4,
                  dashes=DASHES[index % len(DASHES)] or (None, None), label=line.title.replace("$", r"\$"))


def nice_top(highest: float) -> float:
    """Return the end of an axis of shares from 0: the least of 0.05, 0.1, 0.2, 0.3, 0.5 and 1 not below ``highest``."""
    return next((top for top in (0.05, 0.1, 0.2, 0.3, 0.5) if highest <= top), 1.0)


def share_ticks(top: float) -> list[tuple[float, str]]:
    """Return ticks from 0 to ``top``, an end of ``nice_top``, in percent."""
    return [(float(at), f"{100 * at:.3g} %") for at in np.linspace(0, top, 7 if top == 0.3 else 6)]


def _percent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low)
