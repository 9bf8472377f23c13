"""Judge a clustering without labels: findings with a code, a severity, and what to do about each.

Every check is a pure function that returns one finding; "not applicable" is a proper answer. Only ``check_confidence``
looks at whether images were right, and only where that is known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from phyla.quality import effective_clusters
from phyla.report.scoretable import COMPARED, is_baseline, result_row
from phyla.report.selection import cluster_agreement
from phyla.report.wording import counted, percent
from phyla.types import Assignment, Neighbors, Scores

Severity = Literal["critical", "warning", "note", "passed", "not_applicable"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "note", "passed", "not_applicable")

DOUBTFUL_AGREEMENT = 0.5
"""A cluster is doubtful when less than this share of its members' neighbors lie in it."""
UNSTABLE = 0.6
"""A cluster is unstable when it and its counterpart in other clusterings share less of their images (Hennig 2007)."""
_BASELINE_MARGIN = 0.02
_OTHER_ENCODER = "another encoder, or two together, may see what this one does not."
_SHOWN_NAMES = 6


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what was found and what to do about it (empty when nothing is to be done)."""

    code: str
    title: str
    severity: Severity
    message: str
    advice: str = ""


def check_collapse(assignment: Assignment, *, frozen: bool = False) -> Finding:
    """Return whether most images fell into far fewer clusters than were asked for."""
    code, asked = "collapse", assignment.n_clusters
    if asked == 1:
        return Finding(code, "Collapse", "not_applicable", "Only one cluster was asked for.")
    effective = effective_clusters(assignment.labels)
    measure = f"The sizes are as varied as {effective:.1f} equally large clusters, of {asked} asked for."
    advice = ("Raise the weight that spreads images over clusters (cluster.entropy_weight), use a larger batch, or ask "
              "for fewer clusters. Check that pretraining finished: its loss should have fallen.")
    if frozen:
        advice = f"Ask for fewer clusters, or try other options; {_OTHER_ENCODER}"
    if effective < 1 + 0.1 * (asked - 1):
        return Finding(code, "The clusters collapsed", "critical", f"Nearly all images are in one place. {measure}",
                       advice)
    if effective < 0.5 * asked:
        return Finding(code, "Few clusters hold most images", "warning", measure, advice)
    return Finding(code, "No collapse", "passed", measure)


def check_empty(assignment: Assignment, names: Sequence[str], *, frozen: bool = False) -> Finding:
    """Return which clusters hold no image."""
    code, empty = "empty-clusters", np.flatnonzero(assignment.sizes == 0)
    if not len(empty):
        return Finding(code, "No empty clusters", "passed", f"All {assignment.n_clusters} clusters hold images.")
    many, listed = len(empty) > assignment.n_clusters / 2, _listed([names[int(i)] for i in empty])
    return Finding(code, "Empty clusters", "critical" if many else "warning",
                   f"{len(empty)} of {assignment.n_clusters} clusters hold no image: {listed}.",
                   "If the images have fewer kinds than you asked for, ask for fewer clusters; if not, "
                   + (_OTHER_ENCODER if frozen else "raise cluster.entropy_weight."))


def check_balance(assignment: Assignment, names: Sequence[str]) -> Finding:
    """Return whether the largest cluster is far larger than the smallest one that holds images."""
    code, used = "imbalance", np.flatnonzero(assignment.sizes)
    if len(used) < 2:
        return Finding(code, "Balance", "not_applicable", "Fewer than two clusters hold images.")
    sizes = assignment.sizes
    large, small = used[sizes[used].argmax()], used[sizes[used].argmin()]
    ratio = sizes[large] / sizes[small]
    message = (f"{names[large]}, the largest, holds {sizes[large]:,} images, {ratio:.1f} times as many as "
               f"{names[small]}, the smallest with any, which holds {sizes[small]:,}.")
    advice = ("Look at the largest cluster: if it mixes several kinds, ask for more clusters. If your images really "
              "are that uneven, this is as it should be, and the method's pull towards equal sizes may be splitting "
              "common kinds.")
    if ratio >= 10:
        return Finding(code, "Very uneven cluster sizes", "warning", message, advice)
    if ratio >= 3:
        return Finding(code, "Uneven cluster sizes", "note", message, advice)
    return Finding(code, "Even cluster sizes", "passed", message)


def check_size(assignment: Assignment) -> Finding:
    """Return whether there are enough images for so many clusters."""
    code, per = "few-images", len(assignment) / assignment.n_clusters
    message = f"{len(assignment):,} images in {assignment.n_clusters} clusters: {per:.1f} a cluster on average."
    advice = "Add images or ask for fewer clusters: what a cluster of few images shares may be chance."
    if per < 5:
        return Finding(code, "Very few images a cluster", "warning", message, advice)
    if per < 20:
        return Finding(code, "Few images a cluster", "note", message, advice)
    return Finding(code, "Enough images a cluster", "passed", message)


def check_doubt(assignment: Assignment, *, frozen: bool = False) -> Finding:
    """Return how many images have a confidence nearer to pure chance than to certainty."""
    code, confidence = "low-confidence", assignment.confidence
    if assignment.n_clusters == 1 or _outright(assignment):
        return Finding(code, "Low confidence", "not_applicable",
                       "Every image was given to its cluster outright, so there is no confidence to judge.")
    limit = 0.5 * (1 + 1 / assignment.n_clusters)
    doubtful = int((confidence < limit).sum())
    share = doubtful / len(confidence)
    message = f"{doubtful:,} of {len(confidence):,} images ({percent(share)}) have a confidence below {limit:.2f}."
    advice = "Accept the sure images and look at the rest by hand; the table under Confidence says how many that is."
    if share >= 0.5:
        return Finding(code, "Most images are guesses", "critical", message,
                       advice + (f" If the number of classes is right, {_OTHER_ENCODER}" if frozen else
                                 " Longer pretraining is the likeliest cure."))
    if share >= 0.2:
        return Finding(code, "Many images are guesses", "warning", message, advice)
    if share >= 0.05:
        return Finding(code, "Some images are guesses", "note", message, advice)
    return Finding(code, "Few images are guesses", "passed", message)


def check_agreement(assignment: Assignment, neighbors: Neighbors | None, names: Sequence[str]) -> Finding:
    """Return which clusters hold images whose look-alikes mostly lie elsewhere."""
    code = "doubtful-clusters"
    if neighbors is None or not neighbors.n_neighbors or assignment.n_clusters == 1:
        return Finding(code, "Doubtful clusters", "not_applicable", "This needs neighbors and at least two clusters.")
    agreement = cluster_agreement(assignment, neighbors)
    doubtful = np.flatnonzero(agreement < DOUBTFUL_AGREEMENT)
    if not len(doubtful):
        return Finding(code, "Clusters hold together", "passed",
                       f"In every cluster, most look-alikes of its images are in it too "
                       f"(lowest: {percent(float(np.nanmin(agreement)))}).")
    worst = doubtful[np.argsort(agreement[doubtful], kind="stable")]
    listed = _listed([f"{names[i]} ({percent(float(agreement[i]))})" for i in worst])
    most = bool(assignment.sizes[doubtful].sum() > 0.5 * len(assignment))
    return Finding(code, "Most images are in doubtful clusters" if most else "Doubtful clusters",
                   "critical" if most else "warning",
                   f"The nearest look-alikes of these clusters' images mostly lie in other clusters: {listed}.",
                   "Look at their images below: such a cluster may be a mixture, or half of another one.")


def check_stability(assignment: Assignment, stability: np.ndarray | None, agreement: np.ndarray | None,
                    names: Sequence[str]) -> Finding:
    """Return which clusters other clusterings of the same images do not find again.

    Parameters
    ----------
    stability : (n_clusters,), 0 to 1: how far each cluster is the same images in every clustering (mean Jaccard index);
        an empty one is not judged
    agreement : (n_images,), share of the clusterings that put an image where it is; None where that is not known
    """
    code = "unstable-clusters"
    stability = None if stability is None else np.where(assignment.sizes > 0, stability, np.nan)
    if stability is None or not np.isfinite(stability).any():
        return Finding(code, "Stability", "not_applicable", "This needs several clusterings of the same images.")
    torn = "" if agreement is None else (f" {counted(int((agreement <= 0.5).sum()), 'image')} of {len(agreement):,} "
                                         "are put elsewhere by half of the clusterings or more.")
    unstable = np.flatnonzero(stability < UNSTABLE)
    if not len(unstable):
        lowest = percent(float(np.nanmin(stability)))
        return Finding(code, "The clusters are stable", "passed",
                       f"Several clusterings find every cluster again (lowest overlap: {lowest}).{torn}")
    worst = unstable[np.argsort(stability[unstable], kind="stable")]
    listed = _listed([f"{names[i]} ({percent(float(stability[i]))})" for i in worst])
    most = bool(assignment.sizes[unstable].sum() > 0.5 * len(assignment))
    return Finding(code, "Most images are in unstable clusters" if most else "Unstable clusters",
                   "critical" if most else "warning",
                   f"Other clusterings draw these otherwise (overlap with theirs): {listed}.{torn}",
                   "Look at their images below, and at a smaller and a larger number of classes: a cluster that comes "
                   "and goes is often half of a class, or a mixture of two.")


def check_baseline(scores: Sequence[Scores], result: str | None = None, *, frozen: bool = False) -> Finding:
    """Return whether plain k-means scores better than the result, by labels if there are any, else without.

    ``result`` is the method shown, on the first split of ``scores``; None for the last that is no baseline.
    """
    code, title = "baseline", "Comparison with k-means"
    final, rivals = result_row(scores, result), [row for row in scores if is_baseline(row)]
    if final is None:
        return Finding(code, title, "not_applicable", "No scores were given.")
    for name, higher in COMPARED.items():
        sign = 1 if higher else -1
        against = [row for row in rivals if row.split == final.split and math.isfinite(row.values.get(name, math.nan))]
        if not against or not math.isfinite(final.values.get(name, math.nan)):
            continue
        rival = max(against, key=lambda row: sign * row.values[name])
        ahead = sign * (rival.values[name] - final.values[name])
        said = (f"{name.replace('_', ' ').capitalize()}: {rival.method} {rival.values[name]:.3f}, "
                f"{final.method} {final.values[name]:.3f}.")
        return _compared(code, rival.method, said, ahead, frozen=frozen)
    return Finding(code, title, "not_applicable", "No score is known for both the result and k-means.")


def _compared(code: str, rival: str, said: str, ahead: float, *, frozen: bool) -> Finding:
    cure = _OTHER_ENCODER if frozen else "longer pretraining or other options may help."
    if ahead > _BASELINE_MARGIN:
        return Finding(code, f"{rival} scores better", "warning", said,
                       f"The simple baseline is ahead by this number. Look at both before you use the result; {cure}")
    if ahead >= 0:
        return Finding(code, "No better than k-means", "note", said,
                       f"The simple baseline does as well by this number; {cure}")
    return Finding(code, "Better than k-means", "passed", said)


def check_skipped(skipped: Sequence[tuple[str, str]], n_images: int) -> Finding:
    """Return how many files could not be read."""
    code, n_files = "skipped-files", len(skipped)
    if not n_files:
        return Finding(code, "Every file was read", "passed", f"{n_images:,} images, none skipped.")
    return Finding(code, "Skipped files", "warning" if n_files > 0.1 * (n_files + n_images) else "note",
                   f"{n_files:,} {'file' if n_files == 1 else 'files'} could not be read, and so "
                   f"{'is' if n_files == 1 else 'are'} in no cluster.", "See “Skipped files” for the reasons.")


def check_confidence(assignment: Assignment, correct: np.ndarray | None) -> Finding:
    """Return whether the mean confidence promises more, or less, than the true labels bear out."""
    code = "overconfidence"
    if correct is None or not len(correct) or _outright(assignment):
        return Finding(code, "Honest confidence", "not_applicable", "This needs true labels, and confidences below 1.")
    promised, kept = float(assignment.confidence.mean(dtype=np.float64)), float(np.mean(correct))
    message = f"The mean confidence is {promised:.2f}; {percent(kept)} of the images with a known class are right."
    if promised - kept > 0.1:
        return Finding(code, "Confidence promises too much", "warning", message,
                       "Do not read confidence as the chance of being right; use it to rank images.")
    if kept - promised > 0.1:
        return Finding(code, "Confidence promises too little", "note", message,
                       "More images are right than the confidence says. It still ranks images; where a method has an "
                       "option for a temperature, that can end it.")
    return Finding(code, "Confidence is borne out", "passed", message)


_MAY_RISE = ("refine", "selflabel", "self-label", "self_label", "ruc")
"""Stages whose loss may rise while all goes well, because harder images join as they become confident."""


def check_training(curves: Sequence[Mapping[str, object]]) -> Finding:
    """Return whether the loss of every trained stage fell, and whether it was still falling at the end."""
    code, judged, still, flat = "training-loss", [], [], []
    for stage, losses in _losses(curves).items():
        if len(losses) < 5 or any(stage.startswith(name) for name in _MAY_RISE):
            continue
        judged.append(stage)
        tenth = max(1, len(losses) // 10)
        first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
        before = float(np.mean(losses[-2 * tenth : -tenth]))
        if last >= first - 0.01 * float(np.ptp(losses)):
            flat.append(stage)
        elif before - last > 0.1 * (first - last):
            still.append(stage)
    if not judged:
        return Finding(code, "Training", "not_applicable", "No stage recorded a loss over at least five epochs.")
    if flat:
        return Finding(code, "A loss did not fall", "warning",
                       f"The loss ended no lower than it began: {_listed(flat)}.",
                       "Try a lower learning rate, and look at the curves below for jumps.")
    if still:
        return Finding(code, "Training could go on", "note",
                       f"The loss was still falling at the end: {_listed(still)}.",
                       "More epochs may give a better result.")
    return Finding(code, "Training levelled off", "passed", f"The loss fell and settled: {_listed(judged)}.")


def _outright(assignment: Assignment) -> bool:
    return bool((assignment.confidence >= 1 - 1e-6).all())


def _losses(curves: Sequence[Mapping[str, object]]) -> dict[str, list[float]]:
    """Return the finite values of "loss", or of "total" where there is none, by stage and in order."""
    found: dict[str, list[float]] = {}
    for record in curves:
        value = record.get("loss", record.get("total"))
        if isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(str(record.get("stage", "training")), []).append(float(value))
    return found


def _listed(words: Sequence[str]) -> str:
    shown, rest = words[:_SHOWN_NAMES], len(words) - _SHOWN_NAMES
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
