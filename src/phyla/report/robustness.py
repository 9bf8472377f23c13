"""Show what an attack leaves of each result: one plot an attack, one line a result."""

from collections.abc import Sequence
from fractions import Fraction

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from phyla.evaluate.robustness import Attack, RobustnessCurve
from phyla.report.figures import light, new_figure
from phyla.report.lines import Line, Plot, draw_lines, plot_lines, share_ticks
from phyla.report.measures import Row, Table

_LEVELS = 255  # of a pixel's values


def by_attack(curves: Sequence[RobustnessCurve]) -> dict[Attack, list[RobustnessCurve]]:
    """Return the curves of each attack, in their order."""
    found: dict[Attack, list[RobustnessCurve]] = {}
    for curve in curves:
        found.setdefault(curve.attack, []).append(curve)
    return found


def attack_title(attack: Attack) -> str:
    """Return what an attack is called: "PGD, 10 steps of epsilon / 4"."""
    name = attack.method.upper()
    if attack.steps == 1 and attack.share == 1:
        return f"{name}, one step of epsilon"
    share = Fraction(attack.share).limit_denominator(100)
    size = "epsilon" if share == 1 else f"epsilon × {share.numerator}" if share.denominator == 1 else (
        f"epsilon / {share.denominator}" if share.numerator == 1 else f"epsilon × {share}")
    return f"{name}, {attack.steps} {'step' if attack.steps == 1 else 'steps'} of {size}"


def epsilon_words(attack: Attack, epsilon: float) -> str:
    """Return an epsilon as it is usually written: 8/255 of a pixel where it is a whole number of levels."""
    return f"{round(epsilon * _LEVELS)}/{_LEVELS}" if epsilon and _is_levels(attack, epsilon) else f"{epsilon:.3g}"


def epsilon_axis(attack: Attack, curves: Sequence[RobustnessCurve]) -> tuple[list[tuple[float, str]], str]:
    """Return the ticks of an axis of epsilon, (value, words), and what it measures."""
    epsilons = sorted({epsilon for curve in curves for epsilon in curve.epsilons})
    clipped = "" if attack.clip else ", not clipped"
    if all(_is_levels(attack, epsilon) for epsilon in epsilons):
        return [(epsilon, f"{round(epsilon * _LEVELS)}") for epsilon in epsilons], f"epsilon, of 255 levels{clipped}"
    unit = "black to white is 1" if attack.space == "pixel" else "units of the network's input"
    return [(epsilon, f"{epsilon:.3g}") for epsilon in epsilons], f"epsilon, {unit}{clipped}"


def _is_levels(attack: Attack, epsilon: float) -> bool:
    levels = epsilon * _LEVELS
    return attack.space == "pixel" and abs(levels - round(levels)) < 1e-6


def robustness(curves: Sequence[RobustnessCurve]) -> tuple[Figure, Table]:
    """Return one panel an attack, and every value in a table."""
    groups = by_attack(curves)
    figure = new_figure(max(5.4, 4.6 * len(groups)), 4.2)
    panels = figure.subplots(1, max(1, len(groups)), squeeze=False)[0]
    for axes, (attack, own) in zip(panels, groups.items(), strict=False):
        draw_lines(axes, _lines(own), marker="o")
        ticks, label = epsilon_axis(attack, own)
        axes.set_xticks([epsilon for epsilon, _ in ticks], [words for _, words in ticks])
        axes.set(ylim=(0, 1.02), xlabel=label, ylabel=_measured(own))
        axes.set_title(attack_title(attack), fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(frameon=False, fontsize=8)
        light(axes)
    return figure, robustness_table(curves)


def robustness_plots(curves: Sequence[RobustnessCurve]) -> list[Plot]:
    """Return the page's plots, one an attack."""
    plots = []
    for attack, own in by_attack(curves).items():
        ticks, label = epsilon_axis(attack, own)
        if len(ticks) > 1:
            plots.append(plot_lines(_lines(own), title=attack_title(attack), x_ticks=ticks, y_ticks=share_ticks(1.0),
                                    x_label=label, y_label=_measured(own), marked=True))
    return plots


def robustness_table(curves: Sequence[RobustnessCurve]) -> Table:
    """Return one row a curve and epsilon: attack, result, epsilon, right and drop where there are labels, unchanged."""
    rows: Table = []
    for curve in curves:
        for row in curve.table():
            first: Row = {"attack": attack_title(curve.attack), "result": curve.title,
                          "epsilon": epsilon_words(curve.attack, float(row["epsilon"] or 0))}
            rows.append(first | {name: value for name, value in row.items() if name != "epsilon"})
    return rows


def _lines(curves: Sequence[RobustnessCurve]) -> list[Line]:
    labelled = _labelled(curves)
    return [Line(curve.title, curve.epsilons, curve.correct if labelled and curve.correct else curve.unchanged)
            for curve in curves]


def _labelled(curves: Sequence[RobustnessCurve]) -> bool:
    return all(curve.correct is not None for curve in curves)


def _measured(curves: Sequence[RobustnessCurve]) -> str:
    return "images right" if _labelled(curves) else "images in the same cluster"
