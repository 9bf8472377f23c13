"""Say how healthy a run is: every finding, and one verdict from them, green, amber or red, with its reasons.

No label is needed; with labels, one finding more is made (whether confidence is borne out).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from phyla.oddities import Oddities
from phyla.report import findings, oddimages
from phyla.report.findings import SEVERITIES, Finding
from phyla.types import Assignment, Neighbors, Scores

Level = Literal["green", "amber", "red"]

WORDS: Mapping[Level, str] = {"green": "Sound", "amber": "Use with care", "red": "Not to be relied on"}
"""What the level is called: the colour never stands alone."""

_NEEDED = "doubtful-clusters"
"""Without this check nothing but the sizes of clusters and their own opinion speaks for them."""


@dataclass(frozen=True)
class Health:
    """The verdict on a run.

    Parameters
    ----------
    level : red after a critical finding, amber after a warning or where too little could be checked, else green
    sentence : what that means for whoever uses the result
    reasons : the findings that make it so, the most serious first; none when green
    """

    level: Level
    sentence: str
    reasons: tuple[Finding, ...]

    @property
    def word(self) -> str:
        """The level in words."""
        return WORDS[self.level]


def all_findings(assignment: Assignment, *, names: Sequence[str], neighbors: Neighbors | None = None,
                 oddities: Oddities | None = None, curves: Sequence[Mapping[str, object]] = (),
                 scores: Sequence[Scores] = (), result: str | None = None, skipped: Sequence[tuple[str, str]] = (),
                 correct: np.ndarray | None = None, stability: np.ndarray | None = None,
                 agreement: np.ndarray | None = None, frozen: bool = False) -> list[Finding]:
    """Return the findings of every check, the most serious first.

    Parameters
    ----------
    names : one a cluster
    scores, result : the result table, and the method in it that ``assignment`` is of; None for the last
    correct : bool (n_known,), whether each image of known class lies in a cluster that stands for it; None without
    stability, agreement : how far several clusterings agree, 0 to 1: (n_clusters,), NaN for an empty one, and
        (n_images,); None where there was one alone
    frozen : whether the encoder was taken as it is, so that no advice speaks of training it
    """
    found = [findings.check_collapse(assignment, frozen=frozen), findings.check_empty(assignment, names, frozen=frozen),
             findings.check_balance(assignment, names), findings.check_size(assignment),
             findings.check_doubt(assignment, frozen=frozen), findings.check_agreement(assignment, neighbors, names),
             findings.check_stability(assignment, stability, agreement, names),
             findings.check_baseline(scores, result, frozen=frozen), findings.check_training(curves),
             oddimages.check_duplicates(oddities, assignment, frozen=frozen), oddimages.check_outliers(oddities),
             oddimages.check_pictures(oddities), findings.check_skipped(skipped, len(assignment)),
             findings.check_confidence(assignment, correct)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def judge(found: Sequence[Finding]) -> Health:
    """Return the verdict from all findings of a run; notes do not lower it."""
    critical = tuple(finding for finding in found if finding.severity == "critical")
    warnings = tuple(finding for finding in found if finding.severity == "warning")
    unjudged = tuple(finding for finding in found
                     if finding.code == _NEEDED and finding.severity == "not_applicable")
    if critical:
        return Health("red", "Mend what is named here before you use these clusters.", critical + warnings)
    if warnings:
        return Health("amber", "Look at what is named here before you use these clusters.", warnings)
    if unjudged:
        return Health("amber", "No fault was found, but too little could be checked to call it sound.", unjudged)
    return Health("green", "No check found a fault. That the clusters are what you mean by classes, only a look at the "
                  "pictures can tell.", ())


def health_record(health: Health, found: Sequence[Finding]) -> dict[str, object]:
    """Return the verdict and all findings as plain values, for health.json."""
    return {"verdict": health.level, "words": health.word, "sentence": health.sentence,
            "reasons": [finding.code for finding in health.reasons],
            "findings": [vars(finding) for finding in found]}
