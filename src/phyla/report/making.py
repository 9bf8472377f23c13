"""Show how a result came about: what spoke for the number of classes, and which clusterings it was made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from phyla.counting import ClassCount
from phyla.report.lines import Line, Plot, plot_lines
from phyla.report.measures import Table

_RISEN = 1e-9  # a curve that varies by less is flat


@dataclass(frozen=True)
class MemberRow:
    """One clustering of those that a consensus was made of.

    Parameters
    ----------
    method, space : what made it, on which embeddings: "k-means", "mobilenetv2"
    seed : of its random numbers
    score : the label-free number that it was weighed by; None if there is none
    weight : its part of the consensus, 0 to 1
    agrees : share of the images that it puts where the consensus does, 0 to 1
    """

    method: str
    space: str
    seed: int
    score: float | None
    weight: float
    agrees: float


def member_table(members: Sequence[MemberRow]) -> Table:
    """Return one row a member, the one that counts most first."""
    rows = sorted(members, key=lambda member: -member.weight)
    return [{"member": f"{row.method} on {row.space}", "seed": row.seed, "score": row.score, "weight": row.weight,
             "agrees": row.agrees} for row in rows]


def count_table(count: ClassCount | None) -> Table:
    """Return one row a number of classes that was tried, a column a criterion; none without a count."""
    if count is None:
        return []
    return [{"classes": int(tried), **{name: _known(curve[i]) for name, curve in count.criteria.items()}}
            for i, tried in enumerate(count.grid)]


def count_plots(count: ClassCount | None) -> list[Plot]:
    """Return the page's drawing of each criterion over the numbers tried; its line is called by what it picks."""
    if count is None or len(count.grid) < 2:
        return []
    return [_curve(name, count) for name in count.criteria]


def _curve(name: str, count: ClassCount) -> Plot:
    known = [(float(k), float(y)) for k, y in zip(count.grid, count.criteria[name], strict=True) if math.isfinite(y)]
    x = tuple(point[0] for point in known) or (float(count.grid[0]),)
    y = tuple(point[1] for point in known) or (0.0,)
    low, high = min(y), max(y)
    marks = MaxNLocator(3).tick_values(low, high if high - low > _RISEN else low + 1)
    numbers = sorted({int(count.grid[0]), int(count.grid[-1]), count.n_classes})
    return plot_lines([Line(_picked(name, count), x, y)], title="", x_ticks=[(float(k), str(k)) for k in numbers],
                      y_ticks=[(float(mark), f"{mark:.3g}") for mark in marks], x_label="classes", y_label=name,
                      marked=False)


def _picked(name: str, count: ClassCount) -> str:
    if name not in count.votes:
        return "picks none"
    spread = sorted(set(count.spread.get(name, ())))
    on_halves = f"{spread[0]} to {spread[-1]}" if len(spread) > 1 else str(*spread)
    return f"picks {count.votes[name]}" + (f"; {on_halves} on halves of the images" if spread else "")


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
