"""Take frozen, published encoders as they are: nothing is trained, images (N, H, W, 3) become features (N, D).

No paper of its own: that clusters are found on the features of foundation models is TEMI's (Adaloglou et al. 2023),
TURTLE's (Gadetsky et al. 2024) and others' setting. The encoders, and what each was trained on, are in
``phyla.nets.frozen``; several stand side by side, each its own space. Stored images are shown whole, in values 0 to 1:
each encoder resizes and normalizes for itself.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from phyla.embed import embed
from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.nets.frozen import entry, size_fault
from phyla.nets.weights import default_encoder, load_frozen, named, parts
from phyla.storage import fingerprint
from phyla.training.device import Device
from phyla.types import Embeddings, ImageSet

log = logging.getLogger("phyla")

STORED = 224
"""Side in pixels at which photographs are stored where no encoder asks for more."""


@dataclass(eq=False, repr=False)
class Frozen(TransformerMixin, BaseEstimator):
    """Take the features of frozen encoders instead of training one.

    Parameters
    ----------
    encoder : names (``phyla list`` shows them), ``NAME=FILE``, files of weights, or run folders, with commas between;
        "" takes DINOv2's small one where it can be had, else EfficientNet-Lite0
    size : side in pixels that every encoder is shown; 0: each one's own
    views : the stored images as they are: plain, mean 0 and std 1, of the stored size
    """

    encoder: str = ""
    size: int = 0
    views: Views = Views(kind="plain", size=STORED, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def fit(self, images: ImageSet | None = None, y: None = None, *, device: Device | None = None,
            folder: Path | None = None) -> "Frozen":
        """Load the encoders and set ``encoder_``, ``projection_``, ``memory_``, ``history_`` and ``facts_``.

        ``images`` and ``folder`` are taken because methods that train need them.

        Raises
        ------
        DataNotFoundError
            Weights are not here and cannot be fetched: says what to put where.
        InputError
            A name that is none, or a file that fits no encoder or several.
        """
        for fault in self.option_faults():
            raise fault
        names = self.encoder or default_encoder()
        self.encoder_, told = load_frozen(names, size=self.size)
        for line in told:
            log.info("encoder %s", line)
        if device is not None:
            device.place(self.encoder_)
        self.projection_ = None
        self.memory_: Embeddings | None = None
        self.history_: list[dict[str, str | int | float]] = []
        spec = self.encoder_.spec
        self.facts_: dict[str, object] = {"encoder": spec.name, "n_features": spec.n_features,
                                          "widths": list(spec.widths), "notices": [f"encoder: {line}" for line in told]}
        return self

    def transform(self, images: ImageSet) -> np.ndarray:
        """Return the embeddings of ``images``, float32 (n_images, n_features)."""
        check_is_fitted(self)
        return embed(images, self.encoder_, self.views.plain()).values

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        if self.size < 0:
            yield InputError(f"size must be at least 0, got {self.size}", "0 takes each encoder's own")
        if (tuple(self.views.mean), tuple(self.views.std)) != ((0.0,) * 3, (1.0,) * 3):
            yield InputError("views of frozen encoders have mean 0 and std 1: each encoder normalizes for itself",
                             "leave out pretrain.views.mean and pretrain.views.std")
        try:
            names = [named(part)[0] for part in parts(self.encoder)] if self.encoder else []
        except InputError as fault:
            yield fault
            return
        found = [size_fault(name, self.size) for name in names if name and self.size > 0]
        yield from (wrong for wrong in found if wrong is not None)

    def stamp(self) -> str:
        """Return a text that changes when other weights are put at one of the paths: a part of what decides a result.
        """
        told = []
        for part in parts(self.encoder) if self.encoder else []:
            path = Path(named(part)[1]).expanduser()
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            told += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        return fingerprint(told) if told else ""


def stored_size(encoder: str, *, size: int = 0) -> int:
    """Return the side in pixels at which photographs are best stored for ``encoder``: the largest that it is shown."""
    names = [named(part)[0] for part in parts(encoder)] if encoder else []
    return size or max([entry(name).size for name in names if name], default=STORED)
