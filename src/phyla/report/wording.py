"""Say numbers and verdicts in words that a reader needs no course for."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

METRICS: dict[str, tuple[str, str]] = {
    "hungarian_accuracy": ("Hungarian accuracy", "Share of images whose cluster is the one matched with their true "
                           "class, when every class gets one cluster of its own."),
    "many_to_one_accuracy": ("Many-to-one accuracy", "The same, when every cluster counts as its commonest class, so "
                             "that several clusters may share a class."),
    "nmi": ("NMI", "How much the clusters tell about the true classes: 0 nothing, 1 everything (arithmetic mean)."),
    "ari": ("ARI", "How often pairs of images are together, or apart, in both: 0 by chance, 1 always."),
    "ami": ("AMI", "NMI corrected for chance: 0 by chance, 1 everything."),
    "top5_accuracy": ("Top-5 accuracy", "Share of images with the right cluster among their five (or so many) most "
                      "probable."),
    "neighbor_agreement": ("Neighbor agreement", "Share of look-alikes that are in the same cluster; all images in one "
                           "cluster would give 1."),
    "neighbor_score": ("Neighbor score", "How far look-alikes disagree, less how evenly images spread over the "
                       "clusters: lower is better. Methods choose by it."),
    "mean_confidence": ("Mean confidence", "Mean of the largest probability of each image."),
    "effective_clusters": ("Effective clusters", "How many equally large clusters would be as varied."),
    "used_clusters": ("Clusters in use", "Clusters that hold at least one image."),
    "n_clusters": ("Clusters", "Clusters asked for."),
    "neighbor_purity": ("Neighbor purity", "Share of look-alikes that are of the same true class: how much the "
                        "embeddings know before any clustering."),
    "knn_accuracy": ("kNN accuracy", "Share of images whose class the labelled look-alikes guess: what the embeddings "
                     "would give with labels."),
    "knn_accuracy_memory": ("kNN accuracy, memory", "kNN accuracy when the labelled look-alikes are the rows of the "
                            "memory bank as training left it, not embeddings made anew."),
    "linear_accuracy": ("Linear accuracy", "Share of images that a linear classifier trained with labels gets right on "
                        "these embeddings."),
    "expected_calibration_error": ("Calibration error", "Mean distance between confidence and the share that is right: "
                                   "0 is best."),
    "confidence_gap": ("Confidence gap", "Mean confidence less the share that is right: above 0 it promises too much, "
                       "below 0 too little."),
    "brier_score": ("Brier score", "Squared distance between the probabilities and the truth, 0 (sure and right) to 2 "
                    "(sure and wrong): how right and how honest in one number."),
    "area_under_risk_coverage": ("Risk-coverage area", "Mean share that is wrong among the surest images, over all "
                                 "shares accepted (AURC): it falls with fewer errors, and when confidence puts them "
                                 "last."),
    "heads_mean_hungarian_accuracy": ("Hungarian accuracy, mean of the heads", "Mean over all random heads of TSUC: "
                                      "what to expect of a head taken by lot."),
    "heads_sd_hungarian_accuracy": ("Hungarian accuracy, sd of the heads", "Standard deviation over all random heads "
                                    "of TSUC: how much a result owes to the luck of its head."),
    "heads_best_hungarian_accuracy": ("Hungarian accuracy, best head by labels", "The head of TSUC that the true "
                                      "labels would pick: an upper bound. No result is chosen by it."),
    "chosen_head_loss": ("Loss of the chosen head", "Training loss of the head that was kept: lower is better. TSUC "
                         "chooses its head by it, without labels."),
}
LOWER_IS_BETTER = frozenset({"neighbor_score", "expected_calibration_error", "brier_score", "area_under_risk_coverage",
                             "chosen_head_loss"})
WITHOUT_ORDER = frozenset({"mean_confidence", "confidence_gap", "effective_clusters", "n_clusters", "used_clusters",
                           "heads_sd_hungarian_accuracy", "heads_best_hungarian_accuracy"})


@dataclass(frozen=True)
class Verdict:
    """The result in one sentence, and what else a reader must know first."""

    lead: str
    more: tuple[str, ...]


def verdict(*, n_images: int, n_clusters: int, n_used: int, confidence: float, n_review: int,
            critical: Sequence[str] = (), n_warnings: int = 0, right: float | None = None,
            one_to_one: bool = True) -> Verdict:
    """Return the verdict of a run.

    Parameters
    ----------
    n_clusters, n_used : clusters asked for, and those that hold images
    confidence : mean over all images, 0 to 1
    n_review : images that deserve a second look
    critical : titles of the critical findings
    right : share of images of known class that are in a cluster that stands for it; None without labels
    one_to_one : whether a class has one cluster, or each cluster stands for its commonest class
    """
    clusters = f"{n_used:,} {_plural('cluster', n_used)}"
    if n_used != n_clusters:
        clusters += f" (of {n_clusters:,} asked for)"
    said = f"{sureness(confidence, n_clusters)} ({confidence:.2f})"
    if critical:
        said = f"not to be relied on yet: {critical[0].lower()}"
    more = []
    if right is not None:
        where = "in the cluster that matches their class" if one_to_one else "of the commonest class in their cluster"
        more.append(f"Held against the true labels, {percent(right)} of the images are {where}.")
    if n_review:
        more.append(f"{n_review:,} {_plural('image', n_review)} ({percent(n_review / n_images)}) "
                    f"{'deserves' if n_review == 1 else 'deserve'} a second look.")
    if n_warnings and not critical:
        more.append(f"{n_warnings} {_plural('warning', n_warnings)} below.")
    return Verdict(f"{n_images:,} {_plural('image', n_images)} in {clusters}, {said}.", tuple(more))


def sureness(confidence: float, n_clusters: int) -> str:
    """Return a mean confidence in words, allowing for what pure chance would give."""
    if n_clusters < 2:
        return "with nothing to choose"
    above = (confidence - 1 / n_clusters) / (1 - 1 / n_clusters)
    for least, words in ((0.97, "nearly always sure"), (0.8, "mostly sure"), (0.5, "often unsure")):
        if above >= least:
            return words
    return "mostly guessing"


def percent(share: float) -> str:
    """Return a share of 1 as a percentage: two digits that matter, never a rounded 0 % or 100 %."""
    value = 100 * share
    if 0 < value < 0.1:
        said = "under 0.1"
    elif 99 < value < 100:
        said = f"{math.floor(value * 10) / 10:.1f}"
    else:
        said = f"{value:.1f}" if 0 < value < 9.95 else f"{value:.0f}"
    return f"{said}\N{NO-BREAK SPACE}%"


def number(value: object) -> str:
    """Return a number as it is read: whole numbers with separators, others to about four digits, None as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if 0.01 <= abs(value) < 1000:
        return f"{value:.3f}"
    if 0.001 <= abs(value) < 0.01:
        return f"{value:.4f}".rstrip("0")
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def counted(count: int, word: str) -> str:
    """Return a count and what is counted: "1 group", "2,000 groups"."""
    return f"{count:,} {_plural(word, count)}"


def duration(seconds: float) -> str:
    """Return a length of time in the units a person would use."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def shorten(text: str, longest: int = 160) -> str:
    """Return ``text``, its middle left out if it is too long: the ends of a path tell most."""
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def last_part(name: str) -> str:
    """Return the file name of an id that is a path."""
    return name.rsplit("/", 1)[-1] or name


def metric_title(name: str) -> str:
    """Return how a score is called on the page."""
    if name in METRICS:
        return METRICS[name][0]
    if top := re.fullmatch(r"top(\d+)_accuracy", name):
        return f"Top-{top[1]} accuracy"
    if knn := re.fullmatch(r"knn_accuracy_(\d+)(_memory)?", name):
        return f"kNN accuracy ({knn[1]} neighbors{', memory' if knn[2] else ''})"
    return name.replace("_", " ").capitalize()


def metric_meaning(name: str) -> str:
    """Return what a score says, in a sentence; empty for an unknown one."""
    known = re.sub(r"^top\d+_accuracy$", "top5_accuracy", name)
    known = re.sub(r"^knn_accuracy_\d+(_memory)?$", r"knn_accuracy\1", known)
    return METRICS[known][1] if known in METRICS else ""


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
