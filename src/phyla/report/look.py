"""Choose the odd images that a person should look at, and say what is odd about each one as columns of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from phyla.oddities import Oddities

N_OUTLIERS = 16
N_GROUPS = 8
N_COPIES = 6
"""Images shown of a group of copies at most."""
N_HINTED = 8
HINTS: Mapping[str, str] = {
    "blank": "Pictures of one grey or colour all over.",
    "dark": "Pictures with hardly a pixel above a quarter of white.",
    "blurred": "Pictures half as sharp as the others, or less, at the size at which they are stored."}
"""What each hint of the pixels says."""


@dataclass(frozen=True)
class CopyGroup:
    """Images that look the same: the first of them as rows, and how many there are.

    ``exact``: all are equal to the pixel; ``torn``: they lie in several clusters.
    """

    rows: tuple[int, ...]
    size: int
    exact: bool
    torn: bool


@dataclass(frozen=True)
class Look:
    """What is shown of odd images.

    Parameters
    ----------
    outliers : rows by falling score
    copies : groups of images equal to the pixel, then of such that look the same, the likest pair first
    hinted : rows by the name of a hint: "blank", "dark", "blurred"
    """

    outliers: tuple[int, ...]
    copies: tuple[CopyGroup, ...]
    hinted: Mapping[str, tuple[int, ...]]

    @property
    def rows(self) -> list[int]:
        """All images shown."""
        return [*self.outliers, *(row for group in self.copies for row in group.rows),
                *(row for rows in self.hinted.values() for row in rows)]


def choose_look(oddities: Oddities, labels: np.ndarray) -> Look:
    """Return the odd images to be shown, some of each kind; ``labels`` int (n_images,) are their clusters."""
    shown = tuple(row for row in oddities.oddest(N_OUTLIERS) if oddities.outlying[row])
    hinted = {name: tuple(np.flatnonzero(which)[:N_HINTED].tolist()) for name, which in oddities.hints.items()
              if which.any()}
    return Look(shown, tuple(_copies(oddities, labels)), hinted)


def _copies(oddities: Oddities, labels: np.ndarray) -> list[CopyGroup]:
    """Return groups of equal pixels, then groups of near-duplicates, in which equal images stand for one another."""
    found = [_copy_group(np.flatnonzero(oddities.identical == group), labels, exact=True)
             for group in range(min(N_GROUPS, int(oddities.identical.max(initial=-1)) + 1))]
    near: list[CopyGroup] = []
    for group in dict.fromkeys(oddities.groups[oddities.pairs[:, 0]].tolist()):
        members = np.flatnonzero(oddities.groups == group)
        equal = oddities.identical[members]
        first = np.unique(np.where(equal < 0, -1 - members, equal), return_index=True)[1]
        if len(first) > 1 and len(near) < N_GROUPS:
            near.append(_copy_group(members, labels, members[np.sort(first)], exact=False))
    return found + near


def _copy_group(members: np.ndarray, labels: np.ndarray, shown: np.ndarray | None = None, *, exact: bool) -> CopyGroup:
    rows = members if shown is None else shown
    return CopyGroup(tuple(rows[:N_COPIES].tolist()), len(members), exact, len(np.unique(labels[members])) > 1)


def oddity_columns(ids: Sequence[str], oddities: Oddities, *,
                   agreement: np.ndarray | None = None) -> dict[str, Sequence[object]]:
    """Return the columns of oddities.csv, one value an image; None or NaN where something is not known.

    "outlier_score" is 1 for an ordinary image, "outlier" whether it is outside of what the bulk allows;
    "duplicate_group" and "identical_group" number images that look the same, or are equal to the pixel; "hint" is
    blank, dark or blurred; "brightness", "contrast" (0 to 255) and "sharpness" are of the pixels as stored;
    "agreement" is the share of several clusterings that puts the image where it is.
    """
    pixels, nothing = oddities.pixels, [None] * len(ids)
    hint = np.full(len(ids), "", dtype=object)
    for name, which in oddities.hints.items():
        hint[which] = name
    columns: dict[str, Sequence[object]] = {
        "id": ids, "outlier_score": nothing if oddities.scores is None else oddities.scores.tolist(),
        "outlier": oddities.outlying.tolist(), "duplicate_group": _groups(oddities.groups),
        "identical_group": _groups(oddities.identical), "hint": hint.tolist()}
    columns |= {kind: nothing if pixels is None else getattr(pixels, kind).tolist()
                for kind in ("brightness", "contrast", "sharpness")}
    return columns | {"agreement": nothing if agreement is None else np.asarray(agreement, np.float64).tolist()}


def _groups(numbers: np.ndarray) -> list[int | None]:
    return [None if number < 0 else number for number in numbers.tolist()]
