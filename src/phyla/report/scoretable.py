"""Arrange scores for reading: a table with labels, one without, one about the embeddings; the best marked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phyla.report.wording import LOWER_IS_BETTER, METRICS, WITHOUT_ORDER
from phyla.types import Scores

COMPARED: Mapping[str, bool] = {"hungarian_accuracy": True, "nmi": True, "neighbor_agreement": True,
                                "neighbor_score": False}
"""Scores by which the result is held against k-means, the most telling first, and whether higher is better."""

_WITH_LABELS = ("hungarian_accuracy", "nmi", "ari", "many_to_one_accuracy", "ami", "top5_accuracy",
                "expected_calibration_error", "confidence_gap", "brier_score", "area_under_risk_coverage",
                "heads_mean_hungarian_accuracy", "heads_sd_hungarian_accuracy", "heads_best_hungarian_accuracy")
_PROBES = ("neighbor_purity", "knn_accuracy", "linear_accuracy")  # a name may go on: knn_accuracy_20


@dataclass(frozen=True)
class ScoreTable:
    """One table: rows with a value in some of ``columns``.

    ``results`` holds the positions of the rows of the result; ``best`` the best value by split and column, where there
    is an order and a difference.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Scores, ...]
    results: frozenset[int]
    best: Mapping[tuple[str, str], float]

    def is_best(self, row: Scores, column: str) -> bool:
        """Return whether a row has the best value of its split in a column."""
        return self.best.get((row.split, column)) == row.values.get(column, math.nan)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits in it, in order."""
        return tuple(dict.fromkeys(row.split for row in self.rows))

    @property
    def counts(self) -> tuple[int, ...]:
        """The different numbers of images in it."""
        return tuple(dict.fromkeys(row.n_images for row in self.rows))


def score_tables(scores: Sequence[Scores], result: str | None = None) -> list[ScoreTable]:
    """Return the tables that have rows: by true labels, without labels, of the embeddings."""
    present = list(dict.fromkeys(name for row in scores for name in row.values))
    labelled = [name for name in _WITH_LABELS if name in present]
    labelled += [name for name in present if name.startswith("top") and name not in labelled]
    probes = [name for kind in _PROBES for name in present if name.startswith(kind)]
    rest = [name for name in present if name not in labelled and name not in probes]
    rest.sort(key=lambda name: list(METRICS).index(name) if name in METRICS else len(METRICS))
    groups = {"By the true labels": labelled, "Without labels": rest, "What the embeddings allow": probes}
    return [_table(title, columns, scores, result) for title, columns in groups.items() if columns]


def _table(title: str, columns: Sequence[str], scores: Sequence[Scores], result: str | None) -> ScoreTable:
    rows = tuple(row for row in scores if any(name in row.values for name in columns))
    shown = [result_row(scores, result, split=split) for split in dict.fromkeys(row.split for row in rows)]
    best: dict[tuple[str, str], float] = {}
    for split in {row.split for row in rows}:
        for name in columns:
            values = [row.values[name] for row in rows if row.split == split and name in row.values]
            finite = [value for value in values if math.isfinite(value)]
            if name not in WITHOUT_ORDER and len(set(finite)) > 1:
                best[split, name] = min(finite) if name in LOWER_IS_BETTER else max(finite)
    return ScoreTable(title, tuple(columns), rows, frozenset(i for i, row in enumerate(rows) if row in shown), best)


def is_baseline(row: Scores) -> bool:
    """Return whether a row of the result table is k-means."""
    return row.method.lower().replace("-", "").startswith("kmeans")


def result_row(scores: Sequence[Scores], result: str | None = None, *, split: str | None = None) -> Scores | None:
    """Return the row of the result on a split, the first split if None.

    It is the row of the method ``result``, or else the last one that scores clusters and is no baseline.
    """
    split = scores[0].split if scores and split is None else split
    rows = [row for row in scores if row.split == split and not is_baseline(row) and set(row.values) & set(COMPARED)]
    chosen = [row for row in rows if row.method == result] or rows
    return chosen[-1] if chosen else None
