"""Where results stand: mean and spread over seeds, beside what the paper says, and whether ours is inside its band."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phyla.experiment import Experiment
from phyla.pipeline import RESULTS
from phyla.published import METRICS, Figure, Published, published_for
from phyla.results import RunResult, Scored

SHOWN = ("acc", "nmi", "ari")
_HEADS = {"oracle": "heads_best_hungarian_accuracy", "mean of heads": "heads_mean_hungarian_accuracy"}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over ``n`` seeds; of one seed there is no deviation."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of some values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, digits: int = 3) -> str:
        """Return ``0.967 ± 0.011``, or the number alone."""
        return f"{self.mean:.{digits}f}" + (f" ± {self.sd:.{digits}f}" if self.sd is not None else "")


@dataclass(frozen=True)
class Standing:
    """One published figure beside ours, in percent.

    Parameters
    ----------
    row, metric, theirs : the published one
    ours : None where these runs have no such score
    verdict : inside, above or below the band; or why the two are not compared
    """

    row: Published
    metric: str
    theirs: Figure
    ours: Spread | None
    verdict: str


def spreads(results: Sequence[RunResult]) -> list[tuple[Scored, dict[str, Spread]]]:
    """Return each row that all results of one name have, with the spread of each of its scores."""
    held = [{(row.method, row.split): row for row in result.scores} for result in results]
    rows = []
    for key, row in held[0].items() if held else ():
        same = [rows_of[key] for rows_of in held if key in rows_of]
        if len(same) == len(held):
            values = {name: [other.values.get(name) for other in same] for name in row.values}
            rows.append((row, {name: Spread.of([value for value in found if value is not None])
                               for name, found in values.items() if None not in found}))
    return rows


def standings(experiment: Experiment, results: Sequence[RunResult]) -> list[Standing]:
    """Return every published figure of the recipe and its ablation beside ours, with the verdict."""
    found = []
    for row in published_for(experiment.recipe, experiment.ablation):
        for metric, theirs in row.figures.items():
            ours, differs = _ours(experiment, results, row, metric)
            found.append(Standing(row, metric, theirs, ours, differs or _verdict(experiment, theirs, ours)))
    return found


def _ours(experiment: Experiment, results: Sequence[RunResult], row: Published,
          metric: str) -> tuple[Spread | None, str]:
    """Return our score for a published figure, and in what the two differ."""
    score = METRICS[metric][0]
    pipeline = experiment.pipeline(0)
    title = row.result
    for stage in RESULTS:
        if row.result == stage and getattr(pipeline, stage) is not None:
            title = pipeline.title(stage)
    values, chosen = [], ""
    for result in results:
        alike = {scored.method: scored for scored in result.scores if scored.protocol == row.protocol}
        value, chosen = _value(alike, title, score, row.selection)
        if value is not None:
            values.append(100 * value)
    if not values or len(values) < len(results):
        return None, "no such score in these runs"
    differs = f"ours is chosen {chosen}, theirs {row.selection}" if chosen and chosen != row.selection else ""
    return Spread.of(values), differs


def _value(rows: Mapping[str, Scored], title: str, score: str, selection: str) -> tuple[float | None, str]:
    """Return the score of the row that was chosen as the published one, else of the run's own; and what chose it."""
    of_heads = _HEADS.get(selection, "")
    if score == "hungarian_accuracy" and title in rows and of_heads in rows[title].values:
        return rows[title].values[of_heads], selection
    if selection == "oracle":
        for method, row in rows.items():
            if method.startswith(f"{title} (oracle"):
                return row.values.get(score), selection
    row_of = rows.get(title)
    return (row_of.values.get(score), row_of.selection) if row_of else (None, "")


def _verdict(experiment: Experiment, theirs: Figure, ours: Spread | None) -> str:
    if ours is None:
        return "no such score in these runs"
    if experiment.is_short:
        return "shorter schedule, not compared"
    if not experiment.is_as_named:
        return "other options, not compared"
    band = theirs.sd if theirs.sd is not None else ours.sd
    if band is None:
        return "no spread on either side, not compared"
    difference = ours.mean - theirs.value
    if abs(difference) <= band:
        return "inside"
    return f"{'above' if difference > 0 else 'below'} by {abs(difference) - band:.1f}"


def standing_lines(experiment: Experiment, results: Sequence[RunResult]) -> list[str]:
    """Return what a person is shown: our rows with mean and spread, then the published figures beside ours."""
    ours = [["method", "protocol", "chosen", *(METRICS[key][1] for key in SHOWN)]]
    for row, found in spreads(results):
        if METRICS[SHOWN[0]][0] in found:
            cells = [found[METRICS[key][0]].text() if METRICS[key][0] in found else "" for key in SHOWN]
            ours.append([row.method, row.protocol, row.selection, *cells])
    seeds = ", ".join(str(result.seed) for result in results)
    lines = [f"{experiment.name}, seeds {seeds}", *_aligned(ours)]
    theirs = [["published, in percent", "protocol", "chosen", "theirs", "ours", "band"]]
    for standing in standings(experiment, results):
        paper, figure = standing.row, standing.theirs
        theirs.append([f"{paper.method}, {METRICS[standing.metric][1]} ({paper.paper}, {paper.table})", paper.protocol,
                       paper.selection, f"{figure.text()}{' (best run)' if paper.of == 'best' else ''}",
                       standing.ours.text(1) if standing.ours else "-", standing.verdict])
    if len(theirs) > 1:
        lines += ["", *_aligned(theirs)]
    rows = published_for(experiment.recipe, experiment.ablation)
    return lines + [f"note      {note}" for note in dict.fromkeys(row.note for row in rows if row.note)]


def standing_facts(experiment: Experiment, results: Sequence[RunResult]) -> dict[str, object]:
    """Return the same as plain values, for ``--json``."""
    rows = [{"method": row.method, "split": row.split, "protocol": row.protocol, "selection": row.selection,
             "n_images": row.n_images,
             "scores": {name: {"mean": spread.mean, "sd": spread.sd} for name, spread in found.items()}}
            for row, found in spreads(results)]
    told = [{"paper": standing.row.paper, "table": standing.row.table, "method": standing.row.method,
             "metric": METRICS[standing.metric][0], "published": standing.theirs.value, "sd": standing.theirs.sd,
             "seeds": standing.row.seeds, "of": standing.row.of, "protocol": standing.row.protocol,
             "selection": standing.row.selection, "note": standing.row.note,
             "ours": standing.ours.mean if standing.ours else None,
             "ours_sd": standing.ours.sd if standing.ours else None, "verdict": standing.verdict}
            for standing in standings(experiment, results)]
    return {"name": experiment.name, "seeds": [result.seed for result in results], "rows": rows, "published": told}


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
