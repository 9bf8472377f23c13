"""The authors' published checkpoints as our encoder, projection and cluster heads.

Read are the files of SCAN (van Gansbeke et al. 2020: pretext, clustering and self-labelling, and what its scripts save
in order to go on), of NNM, whose names are the same, of RUC (Park et al. 2021; its two networks as one), of
MoCo v2 (Chen et al. 2020), from which SCAN starts on ImageNet, of Super-AND and AND (Han et al. 2020, Huang et al.
2019: encoder, projection and memory) and of TSUC (Han et al. 2020, stage 2). What a file is shows in its contents, not
in its name. It is understood whole or refused, and no code in it is run.

The weights belong to their authors, SCAN's and MoCo's for non-commercial use (CC BY-NC 4.0): phyla passes none on.

``PublishedEncoder`` and ``PublishedClusters`` take the place of methods in a run: they load and fit nothing.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from torch import Tensor

from phyla.embed import embed, forward_all
from phyla.errors import DataNotFoundError, InputError, nearest
from phyla.images.augment import Views
from phyla.images.catalog import data_folders
from phyla.layouts import AGAIN, MOCO_FILE, WANTED, Contents, Part, compare, contents, fault, filled
from phyla.nets.heads import ClusterHeads, ClusterNet, NormalizedHeads, Projection, summed
from phyla.nets.resnet import SOBEL, Depth, Encoder, EncoderSpec, ResNet, Stem, TwoStream
from phyla.quality import neighbor_score
from phyla.storage import Allowed, read_checkpoint
from phyla.training.device import Device
from phyla.types import Embeddings, ImageSet, Neighbors

log = logging.getLogger("phyla")

_LOOKED_AT = 256  # images that a memory bank is compared with
_NEARER = 0.05  # in the cosine, by which its rows must be nearer to their own images than to others
_VIEWS = Views(kind="plain", size=224)
_SCALAR = cast(Callable[..., object], np.int64(0).__reduce__()[0])
_ALLOWED: tuple[Allowed, ...] = (
    # SCAN's files hold the best head and the best loss as NumPy numbers, under the names of NumPy 1 or of NumPy 2.
    (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.float64)))

Fills = Literal["cluster", "refine", "robust"]
Kind = Literal["pretext", "scan", "selflabel", "ruc", "moco", "superand", "tsuc"]

N_TSUC_HEADS, TSUC_TEMPERATURE = 5, 0.1
"""Fixed in TSUC's code, and not in its files."""


class StemError(InputError):
    """A published file whose first layers are not those that were asked for."""


@dataclass(frozen=True, eq=False)
class Published:
    """What a published checkpoint holds.

    Parameters
    ----------
    kind : pretext (SimCLR), scan (clustering), selflabel (self-labelling), ruc, moco, superand (AND too) or tsuc
    encoder : in evaluation mode, on the CPU; of RUC an ``Ensemble`` of its two networks
    projection : None where the file has none, or SCAN's or MoCo's is a linear one
    heads : all cluster heads, None where the file has none; on the projection in tsuc, on the encoder in the others.
        RUC's one head gives the sum of the logits of its two networks
    head : the best of ``heads`` if the file says so or there is only one
    facts : n_features, n_projection, n_heads, n_clusters, and ``notes`` on what was left out or put together; in ruc
        also ``n_networks``; in superand and tsuc ``reported``, what the file tells about itself. Accuracies there were
        measured with true labels: nothing is chosen by them
    memory : of superand, float32 (n_images, n_projection), rows as training left them, in the order of its images
    """

    kind: Kind
    encoder: Encoder
    projection: Projection | None
    heads: ClusterHeads | None
    head: int | None
    facts: dict[str, object] = field(default_factory=dict)
    memory: np.ndarray | None = None

    def net(self, head: int | None = None) -> ClusterNet:
        """Return the encoder with one head, and in tsuc the projection between them.

        Parameters
        ----------
        head : 0 to n_heads - 1; None takes the one that the file names as best

        Raises
        ------
        InputError
            The file has no heads, there is no such head, or none was given and the file does not say which is best.
        """
        every = self.with_all()
        chosen = self.head if head is None else head
        if chosen is None:
            numbers = ", ".join(str(h) for h in range(every.heads.n_heads))
            raise InputError(f"the checkpoint has {every.heads.n_heads} heads and does not name the best",
                             f"choose one of {numbers}: net(head=0), or --head 0 on the command line")
        return ClusterNet(every.encoder, every.heads.only(chosen), every.projection).eval()

    def with_all(self) -> ClusterNet:
        """Return the encoder with all heads; InputError where the file has none."""
        if self.heads is None:
            raise InputError("the checkpoint has no cluster heads", "give one of SCAN's or TSUC's model files")
        return ClusterNet(self.encoder, self.heads, self.projection if self.kind == "tsuc" else None).eval()


def load_published(path: Path | str, *, stem: Stem | None = None) -> Published:
    """Return the networks in a published checkpoint; its depth, width, clusters and heads are seen from the file.

    Parameters
    ----------
    path : a .pth.tar or .t7 file, in torch's present format or in that before 1.6
    stem : cifar or stl for SCAN's ResNets with a 3x3 stem, because their files do not differ; None otherwise

    Raises
    ------
    DataNotFoundError
        There is no such file.
    CorruptFileError
        The file is damaged.
    InputError
        It holds something else, less or more than one of these networks, or another stem than ``stem``.
    """
    if stem is not None and stem not in get_args(Stem):
        raise InputError(f"stem={stem!r} is not known", nearest(str(stem), list(get_args(Stem))))
    path = Path(path).expanduser()
    if not path.exists():
        raise DataNotFoundError(f"there is no checkpoint {path}", WANTED)
    held = contents(path, read_checkpoint(path, hint=AGAIN, allowed=_ALLOWED))
    encoder = _encoder(path, held, stem)
    projection = _projection(path, held, encoder.spec.n_features)
    heads = _heads(path, held, encoder.spec.n_features, projection)
    if held.second is not None and heads is not None:
        encoder, heads = _with_second(path, held, held.second, encoder, heads)
    memory = _memory(path, held.memory, projection)
    facts: dict[str, object] = {
        "n_features": encoder.spec.n_features, "n_projection": projection.n_out if projection else 0,
        "n_heads": heads.n_heads if heads else 0, "n_clusters": heads.n_clusters if heads else 0,
        "notes": held.notes}
    if held.family in ("superand", "tsuc"):
        facts |= {"n_memory": 0 if memory is None else len(memory), "reported": held.reported}
    if held.family == "ruc":
        facts["n_networks"] = encoder.spec.members
    for note in held.notes:
        log.info("%s: %s", path.name, note)
    return Published(_kind(held, heads), encoder, projection, heads, _head(path, held.head, heads), facts, memory)


@dataclass(eq=False, repr=False)
class PublishedEncoder(TransformerMixin, BaseEstimator):
    """Take the encoder of a published checkpoint instead of training one.

    Parameters
    ----------
    path : the file; "" looks for MoCo's official file in ``$PHYLA_DATA`` and the cache folder
    stem : cifar, stl or imagenet; cifar for Super-AND, AND and TSUC, whatever the size of the images
    views : their plain form is what the encoder is shown
    about : a sentence for the notices of a run
    """

    path: str = ""
    stem: Stem = "imagenet"
    views: Views = _VIEWS
    about: str = ""

    def fit(self, images: ImageSet | None = None, y: None = None, *, device: Device | None = None,
            folder: Path | None = None) -> "PublishedEncoder":
        """Load the file and set ``encoder_``, ``projection_``, ``history_`` and ``facts_``; nothing is trained.

        ``images`` and ``folder`` are taken because methods that train need them.
        """
        found = load_published(self.checkpoint(), stem=self.stem)
        self.encoder_, self.projection_ = found.encoder, found.projection
        self.memory_: Embeddings | None = None
        if images is not None and found.memory is not None and len(found.memory) == len(images):
            self.memory_ = self._fitting(Embeddings(found.memory, images.ids), images)
        if device is not None:
            device.place(self.encoder_)
        self.history_: list[dict[str, str | int | float]] = []
        self.facts_ = {"kind": found.kind} | found.facts
        return self

    def _fitting(self, memory: Embeddings, images: ImageSet) -> Embeddings | None:
        """Return ``memory`` if its rows are of these images, in this order, rather than of as many others."""
        some = np.unique(np.linspace(0, len(images) - 1, min(len(images), _LOOKED_AT)).astype(int))
        net = torch.nn.Sequential(self.encoder_, *([self.projection_] if self.projection_ is not None else []))
        shown = embed(images.select(some), net, self.views.plain()).values
        rows = memory.values[some] / np.linalg.norm(memory.values[some], axis=1, keepdims=True)
        own, other = (float((shown * bank).sum(axis=1).mean()) for bank in (rows, np.roll(rows, 1, axis=0)))
        if own > other + _NEARER:
            return memory
        log.warning("the checkpoint's memory bank is left out: its rows are no nearer to these images (cosine %.3f) "
                    "than to others (%.3f)", own, other)
        return None

    def checkpoint(self) -> Path:
        """Return the file that is loaded; DataNotFoundError when it is not there."""
        return _there(self.path) if self.path else _official()

    def transform(self, images: ImageSet) -> np.ndarray:
        """Return the embeddings of ``images``, float32 (n_images, n_features)."""
        return embed(images, self.encoder_, self.views.plain()).values


@dataclass(eq=False, repr=False)
class PublishedClusters(ClusterMixin, BaseEstimator):
    """Take the network and the clusters of a published checkpoint instead of fitting any.

    Parameters
    ----------
    n_clusters : the file's; with another number it is refused
    path, stem, views, about : as in ``PublishedEncoder``
    fills : the stage whose result the file is, refine for self-labelling and robust for RUC
    result : what a table calls it, "SCAN + self-label"
    head : which of several; None takes the one that the file names as best, and if it names none the one with the
        lowest label-free score
    n_selection_neighbors : neighbors of that score
    random_state : every cluster method has one; nothing is drawn here
    """

    n_clusters: int = 10
    path: str = ""
    stem: Stem = "cifar"
    views: Views = Views(kind="plain", size=32)
    fills: Fills = "cluster"
    result: str = ""
    head: int | None = None
    about: str = ""
    n_selection_neighbors: int = 5
    random_state: int = 0

    def fit(self, images: ImageSet, y: None = None, *, neighbors: Neighbors | None = None,
            device: Device | None = None, folder: Path | None = None) -> "PublishedClusters":
        """Load the file and set ``net_`` (one head), ``head_``, ``labels_`` and ``probabilities_`` of ``images``.

        Also ``head_labels_``, int64 (n_heads, n_images), None where there is one head, and ``notices_``. ``neighbors``
        are needed where the head is not known; ``folder`` is taken because methods that train need it.
        """
        found = load_published(self.checkpoint(), stem=self.stem)
        if found.heads is None or found.heads.n_clusters != self.n_clusters:
            raise InputError(f"{self.path} has {found.facts['n_clusters']} clusters and not {self.n_clusters}",
                             "import it again with a recipe of as many classes")
        self._all = found.with_all()
        head = found.head if self.head is None else self.head
        if head is not None:
            found.heads.only(head)  # refuses a head that is not there before the images are shown
        self.notices_ = [self.about] if self.about else []
        self.head_, p, labels = self._shown(images, head, neighbors, device)
        self.probabilities_, self.labels_ = p, p.argmax(axis=1)
        self.head_labels_ = labels if found.heads.n_heads > 1 else None
        self.net_ = self._all.only(self.head_)
        return self

    def predict_heads(self, images: ImageSet, *, device: Device | None = None) -> np.ndarray:
        """Return the labels of any images by every head, int64 (n_heads, n_images)."""
        return self._shown(images, self.head_, None, device)[2]

    def checkpoint(self) -> Path:
        """Return the file that is loaded; DataNotFoundError when it is not there."""
        return _there(self.path)

    def _shown(self, images: ImageSet, head: int | None, neighbors: Neighbors | None, device: Device | None
               ) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the head, its probabilities of ``images``, and the labels by all heads."""
        n_heads = self._all.heads.n_heads

        def told(views: Tensor) -> Tensor:  # of many heads with many clusters the labels alone fit into memory
            p = self._all.probabilities(views).float()
            kept = p.flatten(1) if head is None else p[:, head]
            return torch.cat([kept, p.argmax(dim=2).float()], dim=1)

        rows = forward_all(images, self._all, told, self.views.plain(), device=device, title="clusters").cpu().numpy()
        labels = np.ascontiguousarray(rows[:, -n_heads:].T).astype(np.int64)
        if head is not None:
            return head, np.ascontiguousarray(rows[:, :-n_heads]), labels
        by_head = rows[:, :-n_heads].reshape(len(rows), n_heads, -1)
        head = self._best(by_head, neighbors)
        return head, np.ascontiguousarray(by_head[:, head]), labels

    def _best(self, by_head: np.ndarray, neighbors: Neighbors | None) -> int:
        if neighbors is None:
            raise InputError(f"{self.path} does not name the best of its {by_head.shape[1]} heads",
                             "choose one: head=0, or --head 0 on the command line")
        near = neighbors.indices[:, : self.n_selection_neighbors]
        scores = [neighbor_score(by_head[:, head], near) for head in range(by_head.shape[1])]
        best = int(np.argmin(scores))
        told = ", ".join(f"{score:.4f}" for score in scores)
        self.notices_.append(f"head {best + 1} of {len(scores)} has the lowest neighbor score ({told})")
        return best


Taken = PublishedEncoder | PublishedClusters
"""The methods of a run that read a published file."""


def told_by(method: object) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a method by which its stage is known, and what its file adds: a name, size and time.

    Where a published file lies does not count, so that a run folder can be moved with the file in it; nor does what is
    said about it.
    """
    options = {"method": type(method).__name__} | asdict(method)  # type: ignore[call-overload]
    if not isinstance(method, Taken):
        return options, []
    path = method.checkpoint()
    del options["about"]
    return options | {"path": path.name if method.path else ""}, [checkpoint_stamp(path)]


def checkpoint_stamp(path: Path) -> str:
    """Return a text that changes when another file is put at ``path``: its size and time."""
    told = path.stat()
    return f"{told.st_size}-{told.st_mtime_ns}"


def _there(path: str) -> Path:
    if not path or not Path(path).expanduser().exists():
        raise DataNotFoundError(f"there is no checkpoint {path}", WANTED)
    return Path(path).expanduser()


def _official() -> Path:
    places = [place for root in data_folders() for place in (root / "moco" / MOCO_FILE, root / MOCO_FILE)]
    for place in places:
        if place.exists():
            return place
    raise DataNotFoundError(f"there is no {MOCO_FILE} in {' or '.join(str(root) for root in data_folders())}",
                            "fetch it from the MoCo project (github.com/facebookresearch/moco: v2, 800 epochs) and "
                            f"put it at {places[0]}, or name it: --set pretrain.path=FILE")



def _kind(held: Contents, heads: ClusterHeads | None) -> Kind:
    if held.family != "scan":
        return held.family
    if heads is None:
        return "pretext"
    return "scan" if held.names_head or heads.n_heads > 1 else "selflabel"


def _encoder(path: Path, held: Contents, stem: Stem | None) -> Encoder:
    part, has_two = held.encoder, held.streams == "rgb_sobel"
    lead = "rgb." if has_two else ""
    first = part.get(lead + "conv1.weight")
    if first is None or first.ndim != 4:
        raise fault(path, "ResNet", missing=[part.named(lead + "conv1.weight")])
    depth: Depth = "resnet18"
    if part.get(lead + "layer1.0.conv3.weight") is not None:
        depth = "resnet50" if part.get(lead + "layer3.6.conv1.weight") is None else "resnet101"
    spec = EncoderSpec(depth, _stem(path, held, first.shape[2], stem), first.shape[0], held.streams)
    with torch.device("meta"):
        encoder: Encoder = TwoStream(spec) if has_two else ResNet(spec)
    what = f"{depth} of {'two streams of ' if has_two else ''}width {spec.width}"
    encoder = filled(path, what, encoder, part).eval()
    if isinstance(encoder, TwoStream):
        encoder.filters = torch.tensor(SOBEL).unsqueeze(1)  # not in our state, so still on the meta device
    return encoder


def _stem(path: Path, held: Contents, side: int, stem: Stem | None) -> Stem:
    has_no_pool = held.family in ("superand", "tsuc")
    fitting: tuple[Stem, ...] = ("cifar",) if has_no_pool else ("imagenet",) if side == 7 else ("cifar", "stl")
    if stem is None and len(fitting) > 1:
        raise InputError(f"{path} fits 32-pixel and 96-pixel images alike: the files do not differ",
                         "say which it is: stem=cifar or stem=stl")
    stem = stem or fitting[0]
    if stem not in fitting:
        form = f"first convolution is {side}x{side}" + (", without a max-pool after it" if has_no_pool else "")
        raise StemError(f"stem={stem} does not fit {path}, whose {form}", f"allowed: {', '.join(fitting)}; "
                         f"in a run: {' or '.join(f'--set pretrain.stem={one}' for one in fitting)}")
    return stem


def _projection(path: Path, held: Contents, n_features: int) -> Projection | None:
    part, is_linear = held.projection, held.family in ("superand", "tsuc")
    if not part.state and not is_linear:
        return None
    if part.state.keys() == {part.named("weight"), part.named("bias")} and not is_linear:
        held.notes.append("the projection is a single linear layer and was left out: use the encoder's embeddings")
        return None
    last = part.get("0.bias" if is_linear else "2.bias")
    with torch.device("meta"):
        projection = Projection(n_features, len(last) if last is not None and last.ndim == 1 else 128,
                                n_layers=1 if is_linear else 2)
    return filled(path, f"projection of {n_features} features", projection, part).eval()


def _heads(path: Path, held: Contents, n_features: int, projection: Projection | None) -> ClusterHeads | None:
    if not held.heads.state:
        return None
    if held.family == "tsuc" and projection is not None:
        return _fixed_heads(path, held.heads, projection.n_out)
    part = held.heads
    first = part.get("0.bias")
    n_clusters = len(first) if first is not None and first.ndim == 1 else 1
    n_heads = sum(name.endswith(".weight") for name in part.state) or 1
    expected = {f"{h}.{name}": shape for h in range(n_heads)
                for name, shape in (("weight", (n_clusters, n_features)), ("bias", (n_clusters,)))}
    compare(path, f"set of cluster heads ({n_heads} of {n_clusters})", expected, part)
    heads = ClusterHeads(n_features, n_clusters, n_heads)
    heads.weight.data = torch.stack([part.state[part.named(f"{h}.weight")].float() for h in range(n_heads)])
    heads.bias.data = torch.stack([part.state[part.named(f"{h}.bias")].float() for h in range(n_heads)])
    return heads.eval()


def _with_second(path: Path, held: Contents, second: Contents, encoder: Encoder, heads: ClusterHeads
                 ) -> tuple[Encoder, ClusterHeads]:
    """Return RUC's two encoders as one, and the head on it whose logits are the sum of those of both networks.

    ``encoder`` and ``heads`` are of the first network, which is whole; the second has to be of the same form.
    """
    shapes = {name.removeprefix("net1."): tuple(value.shape)
              for name, value in (held.encoder.state | held.heads.state).items()}
    compare(path, "net2 of the same form as net1", shapes,
            Part(second.encoder.state | second.heads.state, lambda name: f"net2.{name}"))
    others = _encoder(path, second, encoder.spec.stem), _heads(path, second, encoder.spec.n_features, None)
    both = summed([ClusterNet(encoder, heads), ClusterNet(others[0], cast(ClusterHeads, others[1]))]).eval()
    return cast(Encoder, both.encoder), cast(ClusterHeads, both.heads)


def _fixed_heads(path: Path, part: Part, n_projection: int) -> ClusterHeads:
    """Return TSUC's heads, which its files hold as they were drawn: normalised and sharpened as its code does."""
    names = [f"heads.{h}.weight" for h in range(N_TSUC_HEADS)]
    first = part.get(names[0])
    n_clusters = first.shape[1] if first is not None and first.ndim == 2 else 1
    compare(path, f"set of cluster heads ({N_TSUC_HEADS} of {n_clusters})",
            dict.fromkeys(names, (n_projection, n_clusters)), part)
    drawn = torch.stack([part.state[part.named(name)].float() for name in names])
    return NormalizedHeads(drawn, temperature=TSUC_TEMPERATURE, norm="feature_rows").as_linear().eval()


def _memory(path: Path, part: Part, projection: Projection | None) -> np.ndarray | None:
    if not part.state or projection is None:
        return None
    memory = part.get("memory")
    n_images = len(memory) if memory is not None and memory.ndim == 2 else 1
    compare(path, f"memory of {n_images} images", {"params": (2,), "memory": (n_images, projection.n_out)}, part)
    return part.state[part.named("memory")].float().numpy()


def _head(path: Path, head: object, heads: ClusterHeads | None) -> int | None:
    if heads is None or (head is None and heads.n_heads > 1):
        return None
    number = int(head) if isinstance(head, int | np.integer) else 0 if head is None else -1
    if not 0 <= number < heads.n_heads:
        raise InputError(f"{path} names head {head!r} as its best and has {heads.n_heads}", AGAIN)
    return number
