"""Embedding spaces: what several encoders make of the same images, taken apart and put beside one another.

A clusterer of embeddings takes one array (n, d), ``Embeddings`` whose ``widths`` say how many features each encoder
gave, or a list of arrays with one row an image each.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from phyla.errors import InputError
from phyla.neighbors import check_embeddings
from phyla.nets.heads import Heads, SpaceProjection
from phyla.training.device import Device
from phyla.types import Embeddings

_FEATURES = 1 << 24  # numbers of embeddings assigned at once: 64 MB in float32

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
    if not isinstance(embeddings, list | tuple) or not all(isinstance(each, np.ndarray) for each in embeddings):
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


def rows_for_heads(embeddings: Space, *, normalize: bool = False) -> tuple[np.ndarray, SpaceProjection]:
    """Return what linear heads are trained on, float32 (n_images, sum of d_m), and the projection that makes it.

    One space is taken as it is, unless ``normalize`` scales its rows to length 1; several always are scaled, so that
    they count alike.
    """
    spaces = spaces_of(embeddings)
    unit = normalize or len(spaces) > 1
    rows = np.require(scaled(spaces) if unit else spaces[0], np.float32, ["C", "W"])
    return rows, SpaceProjection([each.shape[1] for each in spaces], unit=unit).eval()


def head_probabilities(embeddings: Space, projection: SpaceProjection | None, heads: Heads) -> np.ndarray:
    """Return what a head says of ``embeddings``, through the projection of its fit, float32 (n_images, n_clusters).

    Raises
    ------
    InputError
        Other spaces than those of the fit, or no projection: the fit was on images.
    """
    if projection is None:
        raise InputError("the fit was on images, and these are embeddings", "give an ImageSet")
    spaces = spaces_of(embeddings)
    widths = tuple(each.shape[1] for each in spaces)
    if widths != projection.widths:
        given, fitted = (" and ".join(map(str, each)) for each in (widths, projection.widths))
        raise InputError(f"embeddings of {given} features do not fit heads of {fitted}",
                         "embed with the encoders of the fit")
    found = np.empty((len(spaces[0]), heads.n_clusters), np.float32)
    place, step = heads.weight.device, max(1, _FEATURES // sum(widths))
    for start in range(0, len(found), step):
        part = np.concatenate([each[start : start + step] for each in spaces], axis=1, dtype=np.float32)
        with torch.no_grad():
            rows = projection.to(place)(torch.from_numpy(part).to(place))
            found[start : start + step] = heads.probabilities(rows)[:, 0].cpu().numpy()
    return found


class SpaceMap(NamedTuple):
    """What is done to a space before a search for linear heads, and how such heads are given back for raw embeddings.

    Rows get the length sqrt(n_features) where ``unit``; then ``shift`` is taken off, features are multiplied by
    ``stretch``, and ``turn`` gives principal directions, where there is one. All but the first is linear.
    """

    shift: Float[Tensor, " features"]
    stretch: Float[Tensor, " features"]
    turn: Float[Tensor, "features components"] | None
    unit: bool

    @classmethod
    def of(cls, space: np.ndarray, *, scale: str, n_components: int | None, device: Device) -> "SpaceMap":
        """Return the map of ``space`` that ``scale`` (raw, unit, standard) and ``n_components`` ask for."""
        nothing, stretch = torch.zeros(space.shape[1]), torch.ones(space.shape[1])
        values = cls(nothing, stretch, None, scale == "unit")(space, device)[:, :-1]
        mean = values.mean(dim=0)
        centered = values - mean
        if scale == "standard":
            spread = centered.square().mean(dim=0).sqrt()
            stretch = torch.where(spread > 0, 1 / spread, 1).cpu()
            centered = centered * stretch.to(centered)
        if n_components is None or n_components >= min(centered.shape):
            return cls(mean.cpu() if scale == "standard" else nothing, stretch, None, scale == "unit")
        vectors = torch.linalg.eigh((centered.T @ centered).cpu().double())[1][:, -n_components:].flip(1)
        signs = torch.where(vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0)
        return cls(mean.cpu(), stretch, (vectors * signs).float(), scale == "unit")

    @property
    def n_features(self) -> int:
        """Features of the raw embeddings."""
        return len(self.shift)

    def __call__(self, space: np.ndarray, device: Device) -> Float[Tensor, "images features"]:
        """Return the mapped rows in float32, and a last feature of 1."""
        rows = torch.from_numpy(np.require(space, np.float32, "W")).to(device.device)
        if self.unit:
            rows = nn.functional.normalize(rows, dim=1) * math.sqrt(self.n_features)
        rows = (rows - self.shift.to(rows)) * self.stretch.to(rows)
        rows = rows if self.turn is None else rows @ self.turn.to(rows)
        return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)

    def folded(self, weight: Float[Tensor, "clusters features"], *, n_spaces: int) -> tuple[Tensor, Tensor]:
        """Return weight and bias that give raw embeddings (or blocks of length 1/sqrt(n_spaces)) the same logits."""
        plain, bias = weight[:, :-1].cpu().double(), weight[:, -1].cpu().double()
        plain = plain if self.turn is None else plain @ self.turn.double().T
        plain = plain * self.stretch.double()
        bias = bias - plain @ self.shift.double()
        return (plain * math.sqrt(self.n_features * n_spaces) if self.unit else plain).float(), bias.float()


def _unit(rows: np.ndarray, n_spaces: int) -> np.ndarray:
    tiny = np.finfo(rows.dtype).tiny
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), tiny)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True) * math.sqrt(n_spaces), tiny)


def _floats(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)
