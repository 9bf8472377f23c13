"""Write the report: one HTML file that needs nothing else, and its figures as PNG files beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

import phyla
from phyla.counting import ClassCount
from phyla.errors import InputError
from phyla.evaluate.robustness import RobustnessCurve
from phyla.neighbors import check_embeddings
from phyla.oddities import Oddities, find_oddities
from phyla.progress import bar
from phyla.quality import effective_clusters
from phyla.report import calibration, charts, figures, robustness, selection, wording
from phyla.report.examples import Gallery
from phyla.report.findings import Finding
from phyla.report.health import Health, all_findings, health_record, judge
from phyla.report.look import HINTS, Look, choose_look, oddity_columns
from phyla.report.making import MemberRow, count_plots, count_table, member_table
from phyla.report.measures import ConfidenceSpread, Confusion, EmbeddingMap, curve_table, read_curves
from phyla.report.scoretable import result_row, score_tables
from phyla.report.thumbnails import make_sheet, make_thumbnails
from phyla.storage import write_json, write_text
from phyla.tables import write_columns
from phyla.types import Assignment, ImageSet, Neighbors, Scores

N_REVIEW = 24
LOOK_AT_MOST = 200_000
"""Images whose pixels are measured at most; a tenth of that where pixels are not kept but decoded when asked for."""
MOST_CARDS = 400
"""Clusters shown with images at most, the largest ones; all are in the table."""
OPEN_CARDS = 24
MOST_CELLS = 25
"""Classes or clusters up to which the confusion matrix is a table; above it is a picture beside a table a class."""
MOST_LINES = 1000
_MOST_EPOCHS = 120


@dataclass(frozen=True)
class ReportInput:
    """What a report is made of; ``images``, ``assignment`` and ``embeddings`` hold the same images in one order.

    Parameters
    ----------
    title : heading of the page
    images : the images that were clustered
    assignment : the final one
    embeddings : float32 (n_images, n_features), finite
    neighbors : of the embeddings; None if there are none
    curves : records of training, one an epoch: {"stage": "pretrain", "epoch": 3, "loss": 1.2, ...}
    scores : rows of the result table, the split of ``images`` first
    truth : true classes, int64 (n_images,), -1 for unknown, and the class names; None without labels
    run : what was run: "recipe", "command", "seed", "seconds" (stage to seconds), "versions" (name to version),
        "options" (nested), in that order on the page; anything else follows
    cluster_names : one a cluster; None for "Cluster 0", "Cluster 1", ...
    skipped : files that could not be read: name and reason
    notices : what the run decided, in sentences
    result : the method in ``scores`` that ``assignment`` is of; None for the last one that is no baseline
    results : every result of the run by its title, of the same images, ``assignment`` last; empty for that one alone
    robustness : what attacks leave of each; empty if none was made
    stability : float (n_clusters,), 0 to 1: how far each cluster is the same images in several clusterings
    agreement : float (n_images,), 0 to 1: the share of several clusterings that puts an image where it is
    frozen : whether the encoder was taken as it is: advice then does not speak of training it
    min_confidence : images below it are unsure: the tables put them into no cluster
    class_count : how many classes there seem to be, where the number was looked for
    members : the clusterings that the result was made of, in order; empty for one that is no consensus
    """

    title: str
    images: ImageSet
    assignment: Assignment
    embeddings: np.ndarray
    neighbors: Neighbors | None
    curves: Sequence[Mapping[str, object]]
    scores: Sequence[Scores]
    truth: tuple[np.ndarray, Sequence[str]] | None
    run: Mapping[str, object]
    cluster_names: Sequence[str] | None = None
    skipped: Sequence[tuple[str, str]] = ()
    notices: Sequence[str] = ()
    result: str | None = None
    results: Mapping[str, Assignment] = field(default_factory=dict)
    robustness: Sequence[RobustnessCurve] = ()
    stability: np.ndarray | None = None
    agreement: np.ndarray | None = None
    frozen: bool = False
    min_confidence: float = 0.0
    class_count: ClassCount | None = None
    members: Sequence[MemberRow] = ()


@dataclass(frozen=True, eq=False)
class _Parts:
    """Everything worked out from a ReportInput before it is drawn."""

    names: Sequence[str]
    clusters: Sequence[selection.ClusterSummary]
    confusion: Confusion | None
    spread: ConfidenceSpread
    layout: EmbeddingMap
    findings: Sequence[Finding]
    health: Health
    review: Sequence[int]
    oddities: Oddities
    look: Look
    gallery: Gallery
    honesty: Sequence[calibration.Honesty]


def build_report(data: ReportInput, folder: Path) -> Path:
    """Return the path of ``report.html``, written to ``folder`` with its figures.

    The figures are map.png, prototypes.png, confidence.png, curves.png, probabilities.png and, with neighbors,
    retrieval.png; with labels, confusion_matrix.png, reliability.png and risk_coverage.png; with attacks,
    robustness.png. Beside them health.json has the verdict and the findings, oddities.csv what is odd about each image.

    Raises
    ------
    InputError
        The parts of ``data`` are not of the same images, there are none, or a number is not finite.
    StorageError
        The folder cannot be written.
    """
    _check(data)
    with bar("report", total=4, unit="part") as shown:
        parts = _work_out(data)
        shown.advance(note="figures")
        written = [*_draw(data, parts, folder), *_tell(data, parts, folder)]
        shown.advance(note="images")
        context = _images(data, parts)
        shown.advance(note="page")
        page = folder / "report.html"
        write_text(page, _template().render(context | _numbers(data, parts) | {"files": written}))
        shown.advance()
    return page


def _check(data: ReportInput) -> None:
    n_images, n_clusters = len(data.images), data.assignment.n_clusters
    if not n_images or not n_clusters:
        raise InputError(f"a report needs images and clusters, got {n_images} images and {n_clusters} clusters")
    lengths = {"assignment": len(data.assignment), "embeddings": len(data.embeddings)}
    lengths |= {} if data.neighbors is None else {"neighbors": len(data.neighbors)}
    lengths |= {} if data.truth is None else {"truth": len(data.truth[0])}
    lengths |= {} if data.agreement is None else {"agreement": len(data.agreement)}
    for name, length in lengths.items():
        if length != n_images:
            raise InputError(f"a report of {n_images} images needs {name} of as many, got {length}")
    for name, assignment in {"assignment": data.assignment, **data.results}.items():
        if list(data.images.ids) != list(assignment.ids):
            raise InputError(f"images and {name} name different images, or in another order")
    if data.stability is not None and len(data.stability) != n_clusters:
        raise InputError(f"a report of {n_clusters} clusters needs stability of as many, got {len(data.stability)}")
    check_embeddings(data.embeddings)


def _work_out(data: ReportInput) -> _Parts:
    assignment, neighbors = data.assignment, data.neighbors
    names = selection.name_clusters(assignment.n_clusters, data.cluster_names)
    truth, classes = data.truth or (np.full(len(assignment), -1), ())
    confusion = Confusion.of(truth, classes, assignment, names=names)
    known, correct = (None, None) if confusion is None else (confusion.known, confusion.correct)
    kept = isinstance(data.images.array, np.ndarray)
    oddities = find_oddities(data.images, neighbors, look=len(assignment) <= LOOK_AT_MOST // (1 if kept else 10))
    clusters = selection.summarize_clusters(assignment, data.embeddings, neighbors, names=names,
                                            n_shown=_images_a_row(assignment.n_clusters))
    review = selection.review_first(assignment, N_REVIEW)
    found = all_findings(assignment, names=names, neighbors=neighbors, oddities=oddities, curves=data.curves,
                         scores=data.scores, result=data.result, skipped=data.skipped, correct=correct,
                         stability=data.stability, agreement=data.agreement, frozen=data.frozen)
    chosen = selection.choose_examples(assignment, _prototypes(clusters), review)
    return _Parts(
        names, clusters, confusion, ConfidenceSpread(assignment, names, known, correct),
        EmbeddingMap.of(data.embeddings, assignment),
        found, judge(found), review, oddities, choose_look(oddities, assignment.labels),
        Gallery.of(chosen, assignment, neighbors, names=names, truth=None if confusion is None else truth,
                   classes=() if confusion is None else confusion.classes),
        calibration.judge_results(_results(data), None if confusion is None else truth))


def _results(data: ReportInput) -> Mapping[str, Assignment]:
    if data.results:
        return data.results
    row = result_row(data.scores, data.result)
    return {row.method if row else "This result": data.assignment}


def _prototypes(clusters: Sequence[selection.ClusterSummary]) -> list[int]:
    return [-1 if cluster.prototype is None else cluster.prototype for cluster in clusters]


def _images_a_row(n_clusters: int) -> int:
    return 12 if n_clusters <= 20 else 8 if n_clusters <= 60 else 5


def _draw(data: ReportInput, parts: _Parts, folder: Path) -> list[str]:
    """Write the figures one after the other, and return their file names."""
    drawings = {
        "map.png": partial(figures.embedding_map, parts.layout, parts.names),
        "prototypes.png": partial(figures.prototypes, data.images, _prototypes(parts.clusters), parts.names),
        "confidence.png": partial(figures.confidence, parts.spread),
        "curves.png": partial(figures.training_curves, read_curves(data.curves))}
    if parts.gallery.n_voters:
        drawings["retrieval.png"] = partial(figures.retrieval, data.images, parts.gallery)
    drawings["probabilities.png"] = partial(figures.probabilities, data.images, parts.gallery)
    if parts.confusion is not None:
        drawings["confusion_matrix.png"] = partial(figures.confusion_matrix, parts.confusion)
        drawings["reliability.png"] = partial(calibration.reliability, parts.honesty)
        drawings["risk_coverage.png"] = partial(calibration.risk_coverage, parts.honesty)
    if data.robustness:
        drawings["robustness.png"] = partial(robustness.robustness, data.robustness)
    for name, draw in drawings.items():
        figures.save_png(draw()[0], folder / name)
    return list(drawings)


def _tell(data: ReportInput, parts: _Parts, folder: Path) -> list[str]:
    """Write the files that programs read, and return their names."""
    write_json(folder / "health.json", health_record(parts.health, parts.findings))
    write_columns(folder / "oddities.csv", oddity_columns(data.images.ids, parts.oddities, agreement=data.agreement))
    return ["health.json", "oddities.csv"]


def _shown_clusters(parts: _Parts) -> list[selection.ClusterSummary]:
    """Return the clusters that get a card, in their order: all with images, or the largest ones."""
    largest = sorted((c for c in parts.clusters if c.size), key=lambda cluster: -cluster.size)[:MOST_CARDS]
    return sorted(largest, key=lambda cluster: cluster.index)


def _images(data: ReportInput, parts: _Parts) -> dict[str, object]:
    """Return the pictures of the page."""
    cards = _shown_clusters(parts)
    rows = [row for cluster in cards for row in cluster.rows]
    rows += [*parts.review, *parts.look.rows, *parts.gallery.rows]
    thumbnails = make_thumbnails(data.images, rows)
    return {"cards": cards, "thumbnails": thumbnails, "sheet": make_sheet(data.images, parts.layout.rows.tolist()),
            "heat": None if parts.confusion is None else charts.heat_uri(parts.confusion.shares)}


def _numbers(data: ReportInput, parts: _Parts) -> dict[str, object]:
    """Return the words and numbers of the page."""
    assignment, curves = data.assignment, read_curves(data.curves)
    stages = list(dict.fromkeys(curve.stage for curve in curves))
    return {
        "data": data, "names": parts.names, "clusters": parts.clusters, "confusion": parts.confusion,
        "spread": parts.spread, "findings": parts.findings, "review": parts.review, "look": parts.look,
        "oddities": parts.oddities, "health": parts.health, "hint_words": HINTS,
        "n_unsure": int((assignment.confidence < data.min_confidence).sum()),
        "n_groups": int(parts.oddities.groups.max()) + 1,
        "gallery": parts.gallery, "honesty": parts.honesty, "honesty_rows": calibration.summary(parts.honesty),
        "risk": calibration.risk_plot(parts.honesty), "risk_rows": calibration.risk_table(parts.honesty),
        "gaps": calibration.GAPS, "attacks": robustness.robustness_plots(data.robustness),
        "attack_rows": robustness.robustness_table(data.robustness),
        "count_plots": count_plots(data.class_count), "count_rows": count_table(data.class_count),
        "member_rows": member_table(data.members),
        "layout": parts.layout, "version": phyla.__version__, "verdict": _verdict(data, parts),
        "tables": score_tables(data.scores, data.result), "effective": effective_clusters(assignment.labels),
        "agreement": _mean_agreement(parts.clusters), "sure_share": float((assignment.confidence >= 0.9).mean()),
        "groups": charts.map_groups(parts.layout, assignment, ids=data.images.ids, names=parts.names),
        "panels": [charts.curve_panel(curve) for curve in curves],
        "curve_tables": {stage: _thinned(curve_table(curves, stage)) for stage in stages},
        "options": _flat(data.run.get("options", {})), "versions": _flat(data.run.get("versions", {})),
        "seconds": _flat(data.run.get("seconds", {})),
        "other": _flat({name: value for name, value in data.run.items()
                        if name not in ("options", "versions", "seconds", "command")}),
        "second_choice": lambda row: selection.second_choice(assignment, row)}


def _verdict(data: ReportInput, parts: _Parts) -> wording.Verdict:
    assignment = data.assignment
    return wording.verdict(
        n_images=len(assignment), n_clusters=assignment.n_clusters, n_used=int((assignment.sizes > 0).sum()),
        confidence=float(assignment.confidence.mean(dtype=np.float64)),
        n_review=int((selection.margins(assignment) < 0.5).sum()),
        critical=[finding.title for finding in parts.findings if finding.severity == "critical"],
        n_warnings=sum(finding.severity == "warning" for finding in parts.findings),
        right=None if parts.confusion is None else float(parts.confusion.correct.mean()),
        one_to_one=parts.confusion is None or parts.confusion.one_to_one)


def _mean_agreement(clusters: Sequence[selection.ClusterSummary]) -> float | None:
    known = [(c.size, c.neighbor_agreement) for c in clusters if c.neighbor_agreement is not None]
    return sum(size * share for size, share in known) / sum(size for size, _ in known) if known else None


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Return a nested mapping as one level with dotted names."""
    if not isinstance(value, Mapping):
        return {prefix or "value": value}
    flat: dict[str, object] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _thinned(rows: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    if len(rows) <= _MOST_EPOCHS:
        return list(rows)
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, _MOST_EPOCHS).round().astype(int))]


@cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader("phyla.report", "."), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"percent": wording.percent, "number": wording.number, "duration": wording.duration,
                            "shorten": wording.shorten, "last_part": wording.last_part, "metric": wording.metric_title,
                            "meaning": wording.metric_meaning}
    environment.tests["described"] = lambda name: bool(wording.metric_meaning(name))
    environment.globals |= {
        "lower_is_better": wording.LOWER_IS_BETTER, "palette": figures.PALETTE,
        "dark_palette": charts.DARK_PALETTE, "outlines": charts.OUTLINES, "map_width": charts.MAP_WIDTH,
        "map_height": charts.MAP_HEIGHT, "open_cards": OPEN_CARDS, "most_cells": MOST_CELLS, "most_lines": MOST_LINES}
    return environment.get_template("page.html.j2")
