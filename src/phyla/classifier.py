"""The artefact a user ships: an encoder, a head, and how a picture becomes their input; one folder with two files.

``model.safetensors`` holds the weights, ``model.json`` everything else, so loading runs no code from the file.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phyla.embed import forward_all
from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.images.arrays import from_array
from phyla.images.augment import Views, views_from
from phyla.images.decode import read_image, square, to_rgb
from phyla.images.folders import ImageFile, stream_images
from phyla.nets.frozen import AnyEncoder, FrozenEncoder, build_encoder, encoder_form
from phyla.nets.heads import ClusterHeads, ClusterNet, build_heads, build_projection
from phyla.storage import read_json, write_json, write_tensors
from phyla.training.device import Device
from phyla.types import Assignment, ImageSet

FORMAT = 2
"""Written where the encoder, the projection or the heads are of a kind that format 1 does not know."""

_PLAIN = 1
Picture = str | Path | Image.Image | np.ndarray | Tensor
Pictures = ImageSet | np.ndarray | Tensor | Sequence[Picture]


class Output(NamedTuple):
    """What a network makes of some files.

    Parameters
    ----------
    ids : of those that could be read
    probabilities : float32 (n, n_clusters)
    embeddings : float32 (n, d), what the head sees; None where they were not asked for
    skipped : (id, reason) of the others
    """

    ids: list[str]
    probabilities: np.ndarray
    embeddings: np.ndarray | None
    skipped: list[tuple[str, str]]


@dataclass(eq=False)
class Classifier:
    """Labels new images with the clusters of a run.

    Parameters
    ----------
    net : encoder, perhaps a projection, and one head
    views : how stored pixels become the network's input; its plain form is used
    size : shorter side, in pixels, to which a picture is resized before the centre crop
    names : one name a cluster
    facts : where it comes from (recipe, seed, version), for people to read
    """

    net: ClusterNet
    views: Views
    size: int
    names: Sequence[str] = ()
    facts: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.net.heads.n_heads != 1:
            raise InputError(f"a classifier has one head, got {self.net.heads.n_heads}", "pass net.only(head)")
        if not len(self.names):
            self.names = [f"cluster {c}" for c in range(self.n_clusters)]
        if len(self.names) != self.n_clusters:
            raise InputError(f"{self.n_clusters} clusters need {self.n_clusters} names, got {len(self.names)}")
        self.net.eval()
        if isinstance(self.net.encoder, FrozenEncoder):
            self.net.encoder.prepare(self.views.size, self.views.size)

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return self.net.heads.n_clusters

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors and model.json into ``folder``; InputError when the encoder is not one of phyla's."""
        folder, encoder = Path(folder), self.net.encoder
        if not isinstance(encoder, AnyEncoder):
            raise InputError(f"only phyla's own encoders can be saved, got {type(encoder).__name__}",
                             "save this network with torch.save")
        write_tensors(folder / "model.safetensors", self.net.state_dict())
        form = self.net.projection.spec() if self.net.projection is not None else None
        told = {"format": _PLAIN, "encoder": encoder_form(encoder), "projection": form,
                "n_clusters": self.n_clusters, "views": asdict(self.views), "size": self.size,
                "names": list(self.names), "facts": self.facts}
        if not isinstance(self.net.heads, ClusterHeads):
            told["heads"] = self.net.heads.spec()
        if "heads" in told or "kind" in encoder_form(encoder) or "kind" in (form or {}):
            told["format"] = FORMAT
        write_json(folder / "model.json", told)

    @classmethod
    def load(cls, folder: Path | str) -> "Classifier":
        """Return the classifier saved in ``folder``, a run folder for example.

        Raises
        ------
        DataNotFoundError
            There is none.
        CorruptFileError
            One of its two files is missing, damaged or of another version.
        """
        folder = Path(folder)
        if not (folder / "model.json").exists():
            raise DataNotFoundError(f"{folder} holds no classifier (model.json is missing)",
                                    "give the folder of a finished run")
        held = read_json(folder / "model.json")
        if held.get("format") not in (_PLAIN, FORMAT):
            raise CorruptFileError(f"{folder / 'model.json'} has format {held.get('format')!r}, this version reads "
                                   f"{_PLAIN} to {FORMAT}", "make it again with this version of phyla")
        try:
            encoder = build_encoder(held["encoder"])
            projection = build_projection(held["projection"]) if held.get("projection") else None
            n_features = projection.n_out if projection is not None else encoder.spec.n_features
            form = held.get("heads") or {"n_features": n_features, "n_clusters": held["n_clusters"]}
            net = ClusterNet(encoder, build_heads(form), projection)
            net.load_state_dict(load_file(folder / "model.safetensors"))
            return cls(net, views_from(held["views"]), held["size"], held["names"], held["facts"])
        except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            told = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise CorruptFileError(f"the classifier in {folder} cannot be read ({told})",
                                   "give the run's command again to rebuild it") from error

    def predict_proba(self, pictures: Pictures, *, device: Device | None = None, batch_size: int = 256) -> np.ndarray:
        """Return cluster probabilities, float32 (n_images, n_clusters), rows summing to 1.

        ``pictures`` may be an ImageSet, pixels (n, height, width, 3), or a list of paths, PIL images and arrays; any
        size, grey or with opacity (over white). ``device`` None is where the network is, else it moves there.

        Raises
        ------
        InputError
            There is no picture, or something that is none.
        CorruptFileError
            A file cannot be read.
        """
        images = self._images(pictures)
        found = forward_all(images, self.net, self.net.probabilities, self.views.plain(), device=device,
                            batch_size=batch_size)
        return found[:, 0].float().cpu().numpy()

    def predict(self, pictures: Pictures, *, min_confidence: float = 0.0, device: Device | None = None) -> np.ndarray:
        """Return the most probable cluster of each picture, int64 (n_images,); -1 below ``min_confidence``."""
        if not 0 <= min_confidence <= 1:
            raise InputError(f"min_confidence must be from 0 to 1, got {min_confidence}")
        found = self.predict_proba(pictures, device=device)
        return np.where(found.max(axis=1) >= min_confidence, found.argmax(axis=1), -1)

    def predict_stream(self, source: Path | str, *, device: Device | None = None, chunk: int = 256,
                       strict: bool = False) -> Iterator[tuple[Assignment | None, list[tuple[str, str]]]]:
        """Yield the assignment of the files of a folder or list, ``chunk`` at a time, in constant memory.

        With each comes the list of files that could not be read and why; a chunk without a readable file gives None.
        """
        for made in self.output_stream(source, device=device, chunk=chunk, strict=strict):
            yield Assignment(made.probabilities, made.ids) if made.ids else None, made.skipped

    def output_stream(self, source: Path | str | Iterable[ImageFile], *, device: Device | None = None,
                      chunk: int = 256, strict: bool = False, embeddings: bool = False) -> Iterator[Output]:
        """Yield what the network makes of the files of a folder, list or walk, ``chunk`` at a time, in constant memory.

        ``embeddings`` gives what the head sees besides, in the same pass. Files are decoded while the network computes.
        """
        def both(views: Tensor) -> Tensor:
            seen = self.net.embed(views)
            return torch.cat([self.net.heads.probabilities(seen)[:, 0].float(), seen.float()], dim=1)

        views, n = self.views.plain(), self.n_clusters
        for ids, pixels, skipped in stream_images(source, size=self.size, chunk=chunk, strict=strict):
            if not ids:
                yield Output([], np.empty((0, n), np.float32), None, skipped)
            elif embeddings:
                found = forward_all(ImageSet(pixels, ids), self.net, both, views, device=device, batch_size=chunk)
                values = found.cpu().numpy()
                yield Output(ids, values[:, :n], values[:, n:], skipped)
            else:
                p = self.predict_proba(ImageSet(pixels, ids), device=device, batch_size=chunk)
                yield Output(ids, p, None, skipped)

    def _images(self, pictures: Pictures) -> ImageSet:
        if isinstance(pictures, ImageSet):
            return self._resized(pictures)
        if isinstance(pictures, np.ndarray | Tensor):
            return self._resized(from_array(pictures))
        if isinstance(pictures, str | Path | Image.Image):
            raise InputError(f"pictures come as a list, got one {type(pictures).__name__}",
                             "[picture] for one, predict_stream(folder) for a folder")
        if not len(pictures):
            raise InputError("there is no picture to label")
        return from_array(np.stack([self._pixels(picture) for picture in pictures]), channels="last")

    def _pixels(self, picture: Picture) -> np.ndarray:
        if isinstance(picture, str | Path):
            return read_image(picture, self.size)
        if isinstance(picture, Image.Image):
            upright = ImageOps.exif_transpose(picture)  # as reading its file would give it
            return square(np.asarray(to_rgb(upright)), self.size)
        last = picture.ndim == 3 and picture.shape[2] in (1, 3, 4)  # (1, 40, 3) is a strip of pixels
        return square(from_array(picture[None], channels="last" if last else None).array[0], self.size)

    def _resized(self, images: ImageSet) -> ImageSet:
        if images.size == (self.size, self.size):
            return images
        pixels = np.stack([square(picture, self.size) for picture in images.array])
        return ImageSet(pixels, images.ids, images.name)
