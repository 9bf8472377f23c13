"""Embedding spaces: what several encoders make of the same images, taken apart and put beside one another.

A clusterer of embeddings takes one array (n, d), ``Embeddings`` whose ``widths`` say how many features each encoder
gave, or a list of arrays with one row an image each.
"""

import math
from collections.abc import Sequence

import numpy as np

from phyla.errors import InputError
from phyla.neighbors import check_embeddings
from phyla.types import Embeddings

Space = Embeddings | np.ndarray | Sequence[np.ndarray]
"""Embeddings in one space or in several."""


def spaces_of(embeddings: Space) -> list[np.ndarray]:
    """Return one array (n_images, d_m) a space, float32, or float64 where it came so; finite.

    Raises
    ------
    InputError
        No space, an array that is no table of finite real numbers, or arrays of different lengths.
    """
    if isinstance(embeddings, Embeddings) and embeddings.widths:
        rows = _floats(check_embeddings(embeddings))
        return np.split(rows, np.cumsum(embeddings.widths)[:-1], axis=1)
    if isinstance(embeddings, Embeddings | np.ndarray) or not all(isinstance(each, np.ndarray) for each in embeddings):
        return [_floats(check_embeddings(embeddings))]  # type: ignore[arg-type]
    if not len(embeddings):
        raise InputError("there is no embedding space", "give one array (n_images, n_features) a space")
    found = [_floats(check_embeddings(each)) for each in embeddings]
    if len({len(each) for each in found}) > 1:
        raise InputError(f"spaces must hold the same images, got {[len(each) for each in found]}",
                         "embed the same images with every encoder")
    return found


def scaled(embeddings: Space, *, center: bool = False) -> np.ndarray:
    """Return the spaces beside one another, (n_images, sum of d_m), every space's rows of length 1/sqrt(n_spaces).

    The inner product of two such rows is the mean over the spaces of their cosines. Rows of length 0 stay. ``center``
    takes the mean of the images from each feature first.
    """
    spaces = spaces_of(embeddings)
    return np.concatenate([_unit(each - each.mean(axis=0) if center else each, len(spaces)) for each in spaces], axis=1)


def _unit(rows: np.ndarray, n_spaces: int) -> np.ndarray:
    tiny = np.finfo(rows.dtype).tiny
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), tiny)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True) * math.sqrt(n_spaces), tiny)


def _floats(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)
