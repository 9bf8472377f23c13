"""The authors' published checkpoints as our encoder, projection and cluster heads.

Read are the files of SCAN (van Gansbeke et al. 2020: pretext, clustering and self-labelling, and what its scripts save
in order to go on), of NNM, whose names are the same, of RUC (Park et al. 2021; the first of its two networks), and of
MoCo v2 (Chen et al. 2020), from which SCAN starts on ImageNet. What a file is shows in its contents, not in its name.
It is understood whole or refused, and no code in it is run.

The weights belong to their authors, SCAN's and MoCo's for non-commercial use (CC BY-NC 4.0): phyla passes none on.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor, nn

from phyla.embed import embed
from phyla.errors import CorruptFileError, DataNotFoundError, InputError, nearest
from phyla.images.augment import Views
from phyla.images.catalog import data_folders
from phyla.nets.heads import ClusterHeads, ClusterNet, Projection
from phyla.nets.resnet import Depth, EncoderSpec, ResNet, Stem
from phyla.storage import Allowed, read_checkpoint
from phyla.training.device import Device
from phyla.types import ImageSet

log = logging.getLogger("phyla")

MOCO_FILE = "moco_v2_800ep_pretrain.pth.tar"
"""The official name of the ResNet-50 that every ImageNet configuration of SCAN starts from."""

_WANTED = f"give a checkpoint of SCAN, NNM or RUC with a ResNet, or MoCo's {MOCO_FILE}"
_AGAIN = "fetch the file again"
_VIEWS = Views(kind="plain", size=224)
_SCALAR = cast(Callable[..., object], np.int64(0).__reduce__()[0])
_ALLOWED: tuple[Allowed, ...] = (
    # SCAN's files hold the best head and the best loss as NumPy numbers, under the names of NumPy 1 or of NumPy 2.
    (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype, type(np.dtype(np.int64)), type(np.dtype(np.float64)))

Kind = Literal["pretext", "scan", "selflabel", "moco"]
State = dict[str, Tensor]
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Published:
    """What a published checkpoint holds.

    Parameters
    ----------
    kind : pretext (SimCLR), scan (clustering), selflabel (self-labelling; RUC too) or moco
    encoder : in evaluation mode, on the CPU
    projection : None where the file has none, or a linear one
    heads : all cluster heads, None where the file has none
    head : the best of ``heads`` if the file says so or there is only one
    facts : n_features, n_projection, n_heads, n_clusters, and ``notes`` on what was left out
    """

    kind: Kind
    encoder: ResNet
    projection: Projection | None
    heads: ClusterHeads | None
    head: int | None
    facts: dict[str, object] = field(default_factory=dict)

    def net(self) -> ClusterNet:
        """Return the encoder with its best head.

        Raises
        ------
        InputError
            The file has no heads, or several and does not say which is best.
        """
        if self.heads is None or self.head is None:
            held = f"{self.heads.n_heads} heads and does not name the best" if self.heads else "no cluster heads"
            raise InputError(f"the checkpoint has {held}", "give one of SCAN's model files")
        return ClusterNet(self.encoder, self.heads.only(self.head)).eval()


def load_published(path: Path | str, *, stem: Stem | None = None) -> Published:
    """Return the networks in a published checkpoint; its depth, width, clusters and heads are seen from the file.

    Parameters
    ----------
    path : a .pth.tar file, in torch's present format or in that before 1.6
    stem : cifar or stl for a ResNet with a 3x3 stem, because their files do not differ; None otherwise

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
        raise DataNotFoundError(f"there is no checkpoint {path}", _WANTED)
    entries = _entries(path, read_checkpoint(path, hint=_AGAIN, allowed=_ALLOWED))
    parts = _parts(path, entries)
    encoder = _encoder(path, parts.encoder, stem)
    projection = _projection(path, parts.projection, encoder.spec.n_features, entries.notes)
    heads = _heads(path, parts.heads, encoder.spec.n_features)
    facts: dict[str, object] = {
        "n_features": encoder.spec.n_features,
        "n_projection": len(parts.projection.state["2.bias"]) if projection else 0,
        "n_heads": heads.n_heads if heads else 0, "n_clusters": heads.n_clusters if heads else 0,
        "notes": entries.notes}
    head = _head(path, entries.head, heads)
    for note in entries.notes:
        log.info("%s: %s", path.name, note)
    return Published(_kind(parts, entries, heads), encoder, projection, heads, head, facts)


@dataclass(eq=False, repr=False)
class PublishedEncoder(TransformerMixin, BaseEstimator):
    """Take the encoder of a published checkpoint instead of training one.

    Parameters
    ----------
    path : the file; "" looks for MoCo's official file in ``$PHYLA_DATA`` and the cache folder
    stem : cifar, stl or imagenet
    views : their plain form is what the encoder is shown
    """

    path: str = ""
    stem: Stem = "imagenet"
    views: Views = _VIEWS

    def fit(self, images: ImageSet | None = None, y: None = None, *, device: Device | None = None,
            folder: Path | None = None) -> "PublishedEncoder":
        """Load the file and set ``encoder_``, ``projection_``, ``history_`` and ``facts_``; nothing is trained.

        ``images`` and ``folder`` are taken because methods that train need them.
        """
        found = load_published(self.checkpoint(), stem=self.stem)
        self.encoder_, self.projection_ = found.encoder, found.projection
        if device is not None:
            device.place(self.encoder_)
        self.history_: list[dict[str, str | int | float]] = []
        self.facts_ = {"kind": found.kind} | found.facts
        return self

    def checkpoint(self) -> Path:
        """Return the file that is loaded; DataNotFoundError when it is not there."""
        if self.path and not Path(self.path).expanduser().exists():
            raise DataNotFoundError(f"there is no checkpoint {self.path}", _WANTED)
        return Path(self.path).expanduser() if self.path else _official()

    def transform(self, images: ImageSet) -> np.ndarray:
        """Return the embeddings of ``images``, float32 (n_images, n_features)."""
        return embed(images, self.encoder_, self.views.plain()).values


def checkpoint_stamp(path: Path) -> str:
    """Return a text that changes when another file is put at ``path``: its size and time."""
    told = path.stat()
    return f"{told.st_size}-{told.st_mtime_ns}"


def _official() -> Path:
    places = [place for root in data_folders() for place in (root / "moco" / MOCO_FILE, root / MOCO_FILE)]
    for place in places:
        if place.exists():
            return place
    raise DataNotFoundError(f"there is no {MOCO_FILE} in {' or '.join(str(root) for root in data_folders())}",
                            "fetch it from the MoCo project (github.com/facebookresearch/moco: v2, 800 epochs) and "
                            f"put it at {places[0]}, or name it: --set pretrain.path=FILE")



class _Entries(NamedTuple):
    """The tensors of a file by name, without ``module.``, and what stood beside them."""

    state: State
    head: object
    names_head: bool
    notes: list[str]


class _Part(NamedTuple):
    """The tensors of one network, and what their names begin with in the file."""

    prefix: str
    state: State


class _Parts(NamedTuple):
    """The networks of a file."""

    is_moco: bool
    encoder: _Part
    projection: _Part
    heads: _Part


def _entries(path: Path, held: object) -> _Entries:
    if not isinstance(held, dict):
        raise InputError(f"{path} holds a {type(held).__name__} and no networks", _WANTED)
    notes = []
    wrapper = next((name for name in ("model", "state_dict", "net1") if isinstance(held.get(name), dict)), None)
    state = held[wrapper] if wrapper else held
    left_out = [str(name) for name in held if wrapper and name not in (wrapper, "head", "best_loss_head")]
    if left_out:
        notes.append(f"left out of the file: {_some(left_out)}")
    other = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        raise InputError(f"{path} holds no networks" + (f" but {_some(other)}" if other else ""), _WANTED)
    names_head = "head" in held or "best_loss_head" in held
    return _Entries({str(name).removeprefix("module."): value for name, value in state.items()},
                    held.get("head", held.get("best_loss_head")), names_head, notes)


def _parts(path: Path, entries: _Entries) -> _Parts:
    state = entries.state
    is_moco = any(name.startswith("encoder_q.") for name in state)
    if is_moco:
        # A file that MoCo itself trained also has the slow encoder and the queue, which serve training alone.
        training = [name for name in state if re.match(r"encoder_k\.|queue(_ptr)?$", name)]
        state = {name: value for name, value in state.items() if name not in training}
        if training:
            entries.notes.append(f"left out {len(training)} entries that serve training: {_some(training)}")
    prefixes = ("encoder_q.", "encoder_q.fc.", "cluster_head.") if is_moco else (
        "backbone.", "contrastive_head.", "cluster_head.")
    parts: dict[str, State] = {prefix: {} for prefix in prefixes}
    strange = []
    for name, value in state.items():
        prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        if prefix is None:
            strange.append(name)
        else:
            parts[prefix][name.removeprefix(prefix)] = value
    if not parts[prefixes[0]]:
        raise InputError(f"{path} holds no encoder: no name begins with backbone. or encoder_q. ({_some(strange)})",
                         _WANTED)
    if strange:
        raise _fault(path, "network of SCAN or MoCo", unexpected=strange)
    return _Parts(is_moco, *(_Part(prefix, parts[prefix]) for prefix in prefixes))


def _kind(parts: _Parts, entries: _Entries, heads: ClusterHeads | None) -> Kind:
    if parts.is_moco:
        return "moco"
    if heads is None:
        return "pretext"
    return "scan" if entries.names_head or heads.n_heads > 1 else "selflabel"


def _encoder(path: Path, part: _Part, stem: Stem | None) -> ResNet:
    first = part.state.get("conv1.weight")
    if first is None or first.ndim != 4:
        raise _fault(path, "ResNet", missing=[part.prefix + "conv1.weight"])
    depth: Depth = "resnet50" if "layer1.0.conv3.weight" in part.state else "resnet18"
    side = first.shape[2]
    fitting: tuple[Stem, ...] = ("imagenet",) if side == 7 else ("cifar", "stl")
    if stem is None and len(fitting) > 1:
        raise InputError(f"{path} fits 32-pixel and 96-pixel images alike: the files do not differ",
                         "say which it is: stem=cifar or stem=stl")
    stem = stem or fitting[0]
    if stem not in fitting:
        raise InputError(f"stem={stem} does not fit {path}, whose first convolution is {side}x{side}",
                         f"allowed: {', '.join(fitting)}")
    with torch.device("meta"):
        encoder = ResNet(EncoderSpec(depth, stem, first.shape[0]))
    return _filled(path, f"{depth} of width {first.shape[0]}", encoder, part).eval()


def _projection(path: Path, part: _Part, n_features: int, notes: list[str]) -> Projection | None:
    if not part.state:
        return None
    if part.state.keys() == {"weight", "bias"}:
        notes.append("the projection is a single linear layer and was left out: use the encoder's embeddings")
        return None
    last = part.state.get("2.bias")
    with torch.device("meta"):
        projection = Projection(n_features, len(last) if last is not None and last.ndim == 1 else 128)
    return _filled(path, f"projection of {n_features} features", projection, part).eval()


def _heads(path: Path, part: _Part, n_features: int) -> ClusterHeads | None:
    if not part.state:
        return None
    first = part.state.get("0.bias")
    n_clusters = len(first) if first is not None and first.ndim == 1 else 1
    n_heads = sum(name.endswith(".weight") for name in part.state) or 1
    expected = {f"{h}.{name}": shape for h in range(n_heads)
                for name, shape in (("weight", (n_clusters, n_features)), ("bias", (n_clusters,)))}
    _compare(path, f"set of cluster heads ({n_heads} of {n_clusters})", expected, part)
    heads = ClusterHeads(n_features, n_clusters, n_heads)
    heads.weight.data = torch.stack([part.state[f"{h}.weight"].float() for h in range(n_heads)])
    heads.bias.data = torch.stack([part.state[f"{h}.bias"].float() for h in range(n_heads)])
    return heads.eval()


def _head(path: Path, head: object, heads: ClusterHeads | None) -> int | None:
    if heads is None or (head is None and heads.n_heads > 1):
        return None
    number = int(head) if isinstance(head, int | np.integer) else 0 if head is None else -1
    if not 0 <= number < heads.n_heads:
        raise InputError(f"{path} names head {head!r} as its best and has {heads.n_heads}", _AGAIN)
    return number


def _filled(path: Path, what: str, net: Net, part: _Part) -> Net:
    wanted = net.state_dict()
    _compare(path, what, {name: tuple(value.shape) for name, value in wanted.items()}, part)
    net.load_state_dict({name: part.state[name].to(value.dtype) for name, value in wanted.items()}, assign=True)
    return net


def _compare(path: Path, what: str, expected: Mapping[str, tuple[int, ...]], part: _Part) -> None:
    found = {name: tuple(value.shape) for name, value in part.state.items()}
    missing = [part.prefix + name for name in expected if name not in found]
    unexpected = [part.prefix + name for name in found if name not in expected]
    misshapen = [f"{part.prefix}{name} {found[name]} instead of {shape}" for name, shape in expected.items()
                 if found.get(name, shape) != shape]
    if missing or unexpected or misshapen:
        raise _fault(path, what, missing=missing, unexpected=unexpected, misshapen=misshapen)
    for name, value in part.state.items():
        if not torch.isfinite(value).all():
            raise CorruptFileError(f"{path} holds numbers that are not finite in {part.prefix}{name}", _AGAIN)


def _fault(path: Path, what: str, **faults: list[str]) -> InputError:
    told = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
    return InputError(f"{path} holds no whole {what}: {', '.join(told)}", _WANTED)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
