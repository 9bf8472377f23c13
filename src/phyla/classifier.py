"""The artefact a user ships: an encoder, a head, and how a picture becomes their input; one folder with two files.

``model.safetensors`` holds the weights, ``model.json`` everything else, so loading runs no code from the file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phyla.embed import forward_all
from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.images.arrays import from_array
from phyla.images.augment import Views
from phyla.images.decode import read_image, square
from phyla.images.folders import stream_images
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import EncoderSpec
from phyla.storage import atomic, read_json, write_json
from phyla.training.device import Device
from phyla.types import Assignment, ImageSet

FORMAT = 1
Pictures = ImageSet | np.ndarray | Tensor | Sequence[str | Path | Image.Image | np.ndarray]


@dataclass(eq=False)
class Classifier:
    """Labels new images with the clusters of a run.

    Parameters
    ----------
    net : encoder with one head
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
        if not self.names:
            self.names = [f"cluster {c}" for c in range(self.n_clusters)]
        if len(self.names) != self.n_clusters:
            raise InputError(f"{self.n_clusters} clusters need {self.n_clusters} names, got {len(self.names)}")
        self.net.eval()

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return self.net.heads.n_clusters

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors and model.json into ``folder``."""
        folder = Path(folder)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.net.state_dict().items()}
        with atomic(folder / "model.safetensors") as temporary:
            save_file(weights, temporary)
        spec = self.net.encoder.spec
        write_json(folder / "model.json", {"format": FORMAT, "encoder": asdict(spec), "n_clusters": self.n_clusters,
                                           "views": asdict(self.views), "size": self.size, "names": list(self.names),
                                           "facts": self.facts})

    @classmethod
    def load(cls, folder: Path | str) -> "Classifier":
        """Return the classifier saved in ``folder``, a run folder for example."""
        folder = Path(folder)
        if not (folder / "model.json").exists():
            raise DataNotFoundError(f"{folder} holds no classifier (model.json is missing)",
                                    "give the folder of a finished run")
        held = read_json(folder / "model.json")
        if held.get("format") != FORMAT:
            raise CorruptFileError(f"{folder / 'model.json'} has format {held.get('format')!r}, this version reads {FORMAT}",
                                   "make it again with this version of phyla")
        try:
            encoder = EncoderSpec(**held["encoder"]).build()
            heads = ClusterHeads(encoder.spec.n_features, held["n_clusters"])
            net = ClusterNet(encoder, heads)
            net.load_state_dict(load_file(folder / "model.safetensors"))
            return cls(net, Views(**held["views"]), held["size"], held["names"], held["facts"])
        except (SafetensorError, RuntimeError, KeyError, TypeError, OSError) as error:
            raise CorruptFileError(f"the classifier in {folder} cannot be read ({str(error).splitlines()[0][:120]})",
                                   "give the run's command again to rebuild it") from error

    def predict_proba(self, pictures: Pictures, *, device: Device | None = None, batch_size: int = 256) -> np.ndarray:
        """Return cluster probabilities, float32 (n_images, n_clusters), rows summing to 1.

        ``pictures`` may be an ImageSet, uint8 pixels (n, height, width, 3), or a list of paths, PIL images or arrays.
        """
        images = self._images(pictures)
        found = forward_all(images, self.net, self.net.probabilities, self.views.plain(), device=device,
                            batch_size=batch_size)
        return found[:, 0].float().cpu().numpy()

    def predict(self, pictures: Pictures, *, device: Device | None = None) -> np.ndarray:
        """Return the most probable cluster of each picture, int64 (n_images,)."""
        return self.predict_proba(pictures, device=device).argmax(axis=1)

    def predict_stream(self, source: Path | str, *, device: Device | None = None, chunk: int = 256,
                       strict: bool = False) -> Iterator[tuple[Assignment | None, list[tuple[str, str]]]]:
        """Yield the assignment of the files of a folder or list, ``chunk`` at a time, in constant memory.

        With each comes the list of files that could not be read and why; a chunk without a readable file gives None.
        """
        for ids, pixels, skipped in stream_images(source, size=self.size, chunk=chunk, strict=strict):
            if not ids:
                yield None, skipped
                continue
            yield Assignment(self.predict_proba(ImageSet(pixels, ids), device=device, batch_size=chunk), ids), skipped

    def _images(self, pictures: Pictures) -> ImageSet:
        if isinstance(pictures, ImageSet):
            return self._resized(pictures)
        if isinstance(pictures, np.ndarray | Tensor):
            return self._resized(from_array(pictures))
        if not len(pictures):
            raise InputError("there is no picture to label")
        pixels = [read_image(Path(p), self.size) if isinstance(p, str | Path) else
                  square(np.asarray(p.convert("RGB")) if isinstance(p, Image.Image) else p, self.size) for p in pictures]
        return from_array(np.stack(pixels))

    def _resized(self, images: ImageSet) -> ImageSet:
        if images.size == (self.size, self.size):
            return images
        pixels = np.stack([square(picture, self.size) for picture in images.array])
        return ImageSet(pixels, images.ids, images.name)
