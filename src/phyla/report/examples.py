"""Work out what is shown of example images: their nearest images, their clusters, and the classes of their neighbors.

These are the two qualitative figures of Super-AND (Han et al. 2020): rows of retrieved images, and bars of class
probabilities. Both stand without labels: the rows then tell of other clusters in place of other classes, and the bars
are those of the clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from phyla.report.measures import Table
from phyla.report.selection import Examples
from phyla.types import Assignment, Neighbors

N_NEAREST = 8
"""Neighbors shown of an example at most; all that are stored have a vote."""
N_BARS = 5
VOTE_TEMPERATURE = 0.1
"""That of the weighted kNN vote in Super-AND and SCAN; ``evaluate.probes`` has the same."""


@dataclass(frozen=True)
class Bar:
    """One bar: a cluster or class by name, its part of 1, and whether it is the true class."""

    name: str
    share: float
    true: bool = False


@dataclass(frozen=True)
class Nearest:
    """One neighbor of an example: its row, its similarity, and its class or cluster if that is another one."""

    row: int
    similarity: float
    other: str | None


@dataclass(frozen=True)
class Example:
    """What is shown of one image.

    Parameters
    ----------
    row : the image
    kind : why it was chosen
    cluster, true_class : names; no class where it is not known
    nearest : its neighbors, nearest first, at most ``N_NEAREST``
    clusters : its most probable clusters, at most ``N_BARS``, none of probability 0
    classes : the classes with most of its neighbors' weighted vote, likewise; empty where no neighbor's class is known
    """

    row: int
    kind: Literal["typical", "least certain"]
    cluster: str
    true_class: str | None
    nearest: tuple[Nearest, ...]
    clusters: tuple[Bar, ...]
    classes: tuple[Bar, ...]


@dataclass(frozen=True, eq=False)
class Gallery:
    """The examples of a report.

    Parameters
    ----------
    examples : typical images first, then the least certain
    labelled : whether neighbors are told apart by true class, and not by cluster
    n_voters : neighbors stored for each image
    """

    examples: tuple[Example, ...]
    labelled: bool
    n_voters: int

    @classmethod
    def of(cls, chosen: Examples, assignment: Assignment, neighbors: Neighbors | None, *, names: Sequence[str],
           truth: np.ndarray | None = None, classes: Sequence[str] = ()) -> "Gallery":
        """Return what is shown of the chosen images.

        Parameters
        ----------
        names : one a cluster
        truth : int64 (n_images,), -1 for unknown, with the names in ``classes``; None for a run without labels

        Notes
        -----
        The vote of class c is the sum over the neighbors j of that class of exp(similarity_j / temperature), divided
        by the sum over all neighbors of known class (Wu et al. 2018, section 3.4).
        """
        view = _View(assignment, neighbors, names, truth, classes)
        examples = [view.example(row, "typical") for row in chosen.typical]
        examples += [view.example(row, "least certain") for row in chosen.hardest]
        return cls(tuple(examples), truth is not None, neighbors.n_neighbors if neighbors else 0)

    @property
    def rows(self) -> list[int]:
        """All images shown: each example, followed by its neighbors."""
        return [row for example in self.examples for row in (example.row, *(near.row for near in example.nearest))]

    @property
    def kinds(self) -> list[str]:
        """Why examples were chosen, in order."""
        return list(dict.fromkeys(example.kind for example in self.examples))

    @property
    def votes(self) -> bool:
        """Whether there are bars of classes."""
        return any(example.classes for example in self.examples)

    def retrieval_table(self, ids: Sequence[str]) -> Table:
        """Return one row a neighbor shown; "other" names its class, or without labels its cluster, if that differs."""
        return [{"image": ids[example.row], "chosen as": example.kind, "rank": rank, "neighbor": ids[near.row],
                 "similarity": near.similarity, "other": near.other}
                for example in self.examples for rank, near in enumerate(example.nearest, start=1)]

    def probability_table(self, ids: Sequence[str]) -> Table:
        """Return one row a bar: of a cluster, or of a class by the neighbors' vote."""
        return [{"image": ids[example.row], "chosen as": example.kind, "bar of": kind, "name": bar.name,
                 "share": bar.share}
                for example in self.examples
                for kind, bars in (("cluster", example.clusters), ("class", example.classes)) for bar in bars]


@dataclass(frozen=True, eq=False)
class _View:
    """What is known of all images, from which an example is described."""

    assignment: Assignment
    neighbors: Neighbors | None
    names: Sequence[str]
    truth: np.ndarray | None
    classes: Sequence[str]

    def example(self, row: int, kind: Literal["typical", "least certain"]) -> Example:
        true = -1 if self.truth is None else int(self.truth[row])
        return Example(row, kind, self.names[int(self.assignment.labels[row])],
                       self.classes[true] if true >= 0 else None, self._nearest(row),
                       _largest(self.assignment.probabilities[row], self.names), self._classes(row))

    def _nearest(self, row: int) -> tuple[Nearest, ...]:
        if self.neighbors is None:
            return ()
        rows, similarities = self.neighbors.indices[row], self.neighbors.similarities[row]
        return tuple(Nearest(int(other), float(similarity), self._other(row, int(other)))
                     for other, similarity in zip(rows[:N_NEAREST], similarities[:N_NEAREST], strict=True))

    def _other(self, row: int, neighbor: int) -> str | None:
        """Return the class of a neighbor, or its cluster in a run without labels, if it is not the image's own."""
        kinds, names = (self.assignment.labels, self.names) if self.truth is None else (self.truth, self.classes)
        own, other = int(kinds[row]), int(kinds[neighbor])
        return names[other] if own >= 0 and other >= 0 and own != other else None

    def _classes(self, row: int) -> tuple[Bar, ...]:
        if self.neighbors is None or self.truth is None:
            return ()
        kinds = self.truth[self.neighbors.indices[row]]
        if not (kinds >= 0).any():
            return ()
        similarities = self.neighbors.similarities[row][kinds >= 0].astype(np.float64)
        weights = np.exp((similarities - similarities.max()) / VOTE_TEMPERATURE)
        votes = np.bincount(kinds[kinds >= 0], weights, minlength=len(self.classes))
        return _largest(votes / votes.sum(), self.classes, true=int(self.truth[row]))


def _largest(shares: np.ndarray, names: Sequence[str], *, true: int = -1) -> tuple[Bar, ...]:
    order = np.argsort(-shares, kind="stable")[:N_BARS].tolist()
    return tuple(Bar(names[i], float(shares[i]), i == true) for i in order if shares[i] > 0)
