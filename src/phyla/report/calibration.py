"""Show whether confidence is honest: reliability and histogram a result, and what is wrong among the surest images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from phyla.evaluate.calibration import (
    Judged,
    Reliability,
    RiskCoverage,
    brier_score,
    confidence_gap,
    confidence_histogram,
)
from phyla.report.figures import ACCENT, INK, OTHER, PALETTE, SOFT, light, new_figure, plain
from phyla.report.lines import Line, Plot, draw_lines, nice_top, plot_lines, share_ticks
from phyla.report.measures import Row, Table
from phyla.types import Assignment

_FIGURES_A_ROW = 3
_CURVE_POINTS = 240
_LOOKS = {"over": {"facecolor": "none", "edgecolor": OTHER, "hatch": "////"},
          "under": {"facecolor": "#9fc4e6", "edgecolor": PALETTE[0]}}


GapKind = Literal["over", "under"]

GAPS: Mapping[GapKind, str] = {"over": "promised, but wrong", "under": "right, but not promised"}
"""What lies between the confidence of a bin and its share that is right."""


@dataclass(frozen=True)
class Bar:
    """One bin of a reliability diagram, 0 to 1: ``kept`` is promised and right, from there to ``top`` is the gap."""

    left: float
    width: float
    kept: float
    top: float
    kind: GapKind


@dataclass(frozen=True, eq=False)
class Honesty:
    """How sure one result is and, with labels, how far it is right to be.

    Parameters
    ----------
    title : whose result
    counts : int64 (n_bins,), all images in bins of confidence of equal width
    mean_confidence : of all images
    reliability, risk : of the images of known class; None without labels, and so are the next three
    gap : mean confidence less the share that is right
    brier : the Brier score
    right : share that is right
    """

    title: str
    counts: np.ndarray
    mean_confidence: float
    reliability: Reliability | None = None
    risk: RiskCoverage | None = None
    gap: float | None = None
    brier: float | None = None
    right: float | None = None

    @classmethod
    def of(cls, title: str, assignment: Assignment, truth: np.ndarray | None) -> "Honesty":
        """Return what can be said of an assignment; ``truth`` has -1 for unknown, None is no labels at all."""
        confidence = assignment.confidence.astype(np.float64)
        counts, mean = confidence_histogram(confidence), float(confidence.mean())
        if truth is None or not (truth >= 0).any():
            return cls(title, counts, mean)
        judged = Judged.of(assignment, truth)
        pair = judged.confidence, judged.correct
        return cls(title, counts, mean, Reliability.of(*pair), RiskCoverage.of(*pair), confidence_gap(*pair),
                   brier_score(truth, assignment.probabilities), float(judged.correct.mean()))

    @property
    def shares(self) -> list[float]:
        """The share of all images in each bin."""
        return (self.counts / self.counts.sum()).tolist()

    @property
    def promise(self) -> str:
        """What the gap means, in words."""
        if self.gap is None:
            return ""
        if abs(self.gap) < 0.02:
            return "promises what it keeps"
        return f"promises too {'much' if self.gap > 0 else 'little'}, by {abs(self.gap):.2f}"

    def bars(self) -> list[Bar]:
        """Return a bar a bin with images: what is promised and kept, and the gap above it."""
        rows = [] if self.reliability is None else self.reliability.table()
        bars = []
        for index, row in enumerate(rows):
            confidence, right = row["mean confidence"], row["right"]
            if confidence is not None and right is not None:
                kept, top = sorted((confidence, right))
                bars.append(Bar(index / len(rows), 1 / len(rows), kept, top, "over" if confidence > right else "under"))
        return bars

    @property
    def kinds(self) -> tuple[GapKind, ...]:
        """The kinds of gap that its bars have."""
        found = {bar.kind for bar in self.bars()}
        return tuple(kind for kind in GAPS if kind in found)

    def table(self) -> Table:
        """Return one row a bin: with labels the reliability table, else the histogram."""
        if self.reliability is not None:
            return [dict(row) for row in self.reliability.table()]
        n_bins = len(self.counts)
        return [{"from": i / n_bins, "to": (i + 1) / n_bins, "images": int(count)}
                for i, count in enumerate(self.counts)]


def judge_results(results: Mapping[str, Assignment], truth: np.ndarray | None) -> list[Honesty]:
    """Return what can be said of each result, in their order."""
    return [Honesty.of(title, assignment, truth) for title, assignment in results.items()]


def reliability(judged: Sequence[Honesty]) -> tuple[Figure, Table]:
    """Return a reliability diagram over a histogram for each result, and the table of both; it needs labels."""
    columns = min(_FIGURES_A_ROW, len(judged))
    lines = -(-len(judged) // columns)
    figure = new_figure(max(4.4, 3.5 * columns), 4.6 * lines)
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[3, 1] * lines)
    for place in range(lines * columns):
        upper, lower = (grid[2 * (place // columns) + part, place % columns] for part in (0, 1))
        if place < len(judged):
            _reliability_in(upper, judged[place])
            _histogram_in(lower, judged[place])
        else:
            upper.axis("off")
            lower.axis("off")
    named = {label: handle for axes in grid.flat
             for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    table: Table = [{"result": one.title, **row} for one in judged for row in one.table()]
    return figure, table


def _reliability_in(axes: Axes, one: Honesty) -> None:
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--")
    bars = one.bars()
    axes.bar([bar.left for bar in bars], [bar.kept for bar in bars], width=[0.94 * bar.width for bar in bars],
             align="edge", color=ACCENT, label="right, as promised")
    for kind in one.kinds:
        own = [bar for bar in bars if bar.kind == kind]
        axes.bar([bar.left for bar in own], [bar.top - bar.kept for bar in own], bottom=[bar.kept for bar in own],
                 width=[0.94 * bar.width for bar in own], align="edge", linewidth=0.9, label=GAPS[kind], **_LOOKS[kind])
    if one.reliability is not None:
        axes.set_title(f"{plain(one.title, 36)}\ncalibration error {one.reliability.error:.3f}, gap {one.gap:+.3f}",
                       fontsize=10)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="right", xticklabels=[])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    light(axes)


def _histogram_in(axes: Axes, one: Honesty) -> None:
    edges = np.arange(len(one.counts)) / len(one.counts)
    axes.bar(edges, one.shares, width=0.94 / len(one.counts), align="edge", color=SOFT)
    axes.axvline(one.mean_confidence, color=INK, linewidth=1.2)
    axes.set(xlim=(0, 1), xlabel="confidence (line: its mean)", ylabel="images")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    light(axes)


def risk_coverage(judged: Sequence[Honesty]) -> tuple[Figure, Table]:
    """Return the share that is wrong among the surest images, a line a result, and its table; it needs labels."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    lines = _risk_lines(judged)
    draw_lines(axes, lines)
    axes.set(xlim=(0, 1), ylim=(0, nice_top(_highest(lines))), xlabel="surest images accepted",
             ylabel="wrong among them")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=8)
    light(axes)
    return figure, risk_table(judged)


def risk_table(judged: Sequence[Honesty]) -> Table:
    """Return one row a result and share accepted: the least confidence, and what is wrong."""
    return [{"result": one.title, **row} for one in judged if one.risk is not None for row in one.risk.table()]


def risk_plot(judged: Sequence[Honesty]) -> Plot | None:
    """Return the page's plot of risk and coverage; None without labels."""
    lines = _risk_lines(judged)
    if not lines:
        return None
    return plot_lines(lines, title="", x_ticks=share_ticks(1.0), y_ticks=share_ticks(nice_top(_highest(lines))),
                      x_label="surest images accepted", y_label="wrong among them", marked=False)


def _risk_lines(judged: Sequence[Honesty]) -> list[Line]:
    """Return a line a result, its area in its title; among the surest of equal confidence it is level."""
    lines = []
    for one in judged:
        if one.risk is not None:
            thin = one.risk.thinned(_CURVE_POINTS)
            lines.append(Line(f"{one.title} (area {one.risk.area:.3f})", (0.0, *thin.coverage.tolist()),
                              (float(thin.risk[0]), *thin.risk.tolist())))
    return lines


def _highest(lines: Sequence[Line]) -> float:
    """Return the highest risk past the first twentieth of the images, where few images make it jump."""
    return max((y for line in lines for x, y in zip(line.x, line.y, strict=True) if x >= 0.05), default=1.0)


def summary(judged: Sequence[Honesty]) -> Table:
    """Return one row a result: mean confidence and, with labels, right, gap, calibration error, Brier score, area."""
    rows: Table = []
    for one in judged:
        row: Row = {"result": one.title, "mean confidence": one.mean_confidence}
        if one.reliability is not None and one.risk is not None:
            row |= {"right": one.right, "gap": one.gap, "calibration error": one.reliability.error,
                    "brier score": one.brier, "risk-coverage area": one.risk.area}
        rows.append(row)
    return rows
