"""Judge the images themselves: copies, outliers, and pictures that show little."""

import math

import numpy as np

from phyla.oddities import Oddities
from phyla.report.findings import Finding
from phyla.report.wording import counted
from phyla.types import Assignment

_COARSE, _MANY_COPIES, _MANY_ODD = 0.5, 0.2, 0.05  # shares of all images


def check_duplicates(oddities: Oddities | None, assignment: Assignment, *, frozen: bool = False) -> Finding:
    """Return how many images are copies of another one, and whether clusters tear copies apart."""
    code = "near-duplicates"
    if oddities is None or oddities.similarity is None:
        return Finding(code, "Near-duplicates", "not_applicable", "This needs neighbors.")
    copies, n_images = oddities.groups >= 0, len(assignment)
    limit = f"similarity {math.floor(1000 * oddities.similarity) / 1000} or more"
    if not copies.any():
        return Finding(code, "No near-duplicates", "passed", f"No two images look the same to the encoder ({limit}).")
    exact = int((oddities.identical >= 0).sum())
    message = (f"{int(copies.sum()):,} of {n_images:,} images look the same as another one to the encoder ({limit}), "
               f"in {counted(int(oddities.groups.max()) + 1, 'group')}; {exact:,} of them are equal to the pixel.")
    if copies.sum() > _COARSE * n_images and exact <= _COARSE * n_images:
        return Finding(code, "The encoder hardly tells images apart", "warning", message,
                       "Unless your files are copies of one another, this encoder is blind to what differs in them: "
                       "try another one, or two together." if frozen else
                       "Unless your files are copies of one another, pretraining was too short or has collapsed: look "
                       "at its loss, and train longer.")
    if torn := torn_groups(oddities.groups, assignment.labels):
        message += f" {counted(torn, 'group')} {'is' if torn == 1 else 'are'} spread over several clusters."
    return Finding(code, "Near-duplicates", "warning" if copies.sum() > _MANY_COPIES * n_images else "note", message,
                   "Copies make clusters look purer than they are, and flatter the scores when they lie on both sides "
                   "of a train and test split. Remove true copies (oddities.csv names them); if the pairs differ to "
                   "your eye, the encoder is too coarse.")


def torn_groups(groups: np.ndarray, labels: np.ndarray) -> int:
    """Return how many groups of copies have images in more than one cluster; both int (n_images,), -1 for no group."""
    inside = groups >= 0
    pairs = np.unique(np.stack([groups[inside], labels[inside]], axis=1), axis=0)
    return int((np.bincount(pairs[:, 0]) > 1).sum()) if len(pairs) else 0


def check_outliers(oddities: Oddities | None) -> Finding:
    """Return how many images are unlike all others."""
    code = "outliers"
    if oddities is None or oddities.scores is None:
        return Finding(code, "Outliers", "not_applicable", "This needs neighbors.")
    n_odd, n_images = int(oddities.outlying.sum()), len(oddities.outlying)
    if not n_odd:
        return Finding(code, "No outliers", "passed", "No image is much farther from the others than the bulk of them.")
    return Finding(code, "Outliers", "warning" if n_odd > _MANY_ODD * n_images else "note",
                   f"{counted(n_odd, 'image')} of {n_images:,} {'is' if n_odd == 1 else 'are'} unlike the others, by "
                   f"the distance to the nearest ones.",
                   "Every image is put into some cluster, also one that belongs to none. Look at them below, and take "
                   "out what should not be there; many alike may be a class that is too small to be found.")


def check_pictures(oddities: Oddities | None) -> Finding:
    """Return how many pictures are blank, dark or blurred as they are stored."""
    code = "poor-pictures"
    if oddities is None or oddities.pixels is None:
        return Finding(code, "Poor pictures", "not_applicable", "The pixels of so many images were not looked at.")
    counts = {name: int(which.sum()) for name, which in oddities.hints.items() if which.any()}
    n_poor, n_images = sum(counts.values()), len(oddities.groups)
    if not n_poor:
        return Finding(code, "No poor pictures", "passed", "No picture is blank, very dark or much less sharp than the "
                       "others.")
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return Finding(code, "Poor pictures", "warning" if n_poor > _MANY_COPIES * n_images else "note",
                   f"Of {n_images:,} pictures, by their pixels as stored: {listed}.",
                   "Such pictures are grouped by what is wrong with them rather than by what they show. Look at them "
                   "below; oddities.csv names them.")
