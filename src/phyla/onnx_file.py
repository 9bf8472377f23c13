"""A classifier as one ONNX file: pixels as they are stored in, probabilities and embeddings out.

Whoever has ONNX Runtime, NumPy and Pillow labels images with it, without torch and without phyla. The network in the
file crops, resizes and normalizes as the plain view does. What is left to do is to cut the centre square of a picture
and resize it; the file's metadata say to which size, and what the clusters are called.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from phyla import __version__
from phyla.classifier import Classifier
from phyla.embed import forward_all
from phyla.errors import CorruptFileError, InputError, PhylaError
from phyla.images import geometry
from phyla.images.arrays import from_array
from phyla.images.augment import Views
from phyla.images.catalog import data_set_name
from phyla.images.decode import read_image
from phyla.images.folders import find_images
from phyla.images.sources import evenly
from phyla.nets.frozen import FROZEN, AnyEncoder, FrozenEncoder, encoder_form
from phyla.storage import atomic, fingerprint, read_json

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-4
"""How far the file's probabilities may be from the classifier's; its embeddings, as a share of the largest value."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
HOW_TO_CROP = ("RGB, upright; the centre square (side = the shorter side, left and top rounded down), resized to "
               "size x size with Pillow's bilinear filter and reducing_gap=2.0")
LARGEST = 2**31 - 2**22
"""Bytes of weights in one file: a protocol buffer holds 2 GB, and the network itself needs some."""

_LEAST_MOVED, _ALIGNED = 1024, 4096  # bytes: smaller arrays stay in the network's file; pages can be mapped
_N_CHECKED = 8  # images, in two batches of different sizes
_CHATTER = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class OnnxFile:
    """What was written, and how well it agrees with the classifier.

    Parameters
    ----------
    path : the file
    n_bytes : its size, and that of the weights if they are beside it
    difference : the largest of any probability, on the images it was checked on
    n_checked : how many these were
    """

    path: Path
    n_bytes: int
    difference: float
    n_checked: int


def write_onnx(classifier: Classifier, path: Path | str, *, images: np.ndarray | None = None) -> OnnxFile:
    """Return what was written: ``classifier`` as an ONNX file, checked by ONNX Runtime before it is there.

    Its input is ``images`` uint8 (batch, size, size, 3), any batch; its outputs are ``probabilities`` float32 (batch,
    n_clusters) and ``embedding`` float32 (batch, n_features), what the head sees.

    Parameters
    ----------
    path : ends in .onnx; weights of more than 2 GB go into NAME.onnx.data beside it, as the format wants
    images : uint8 (n, size, size, 3), on which the file is checked; None: random ones

    Raises
    ------
    InputError
        A package is missing, the name does not end in .onnx, or the images are not of the classifier's size.
    PhylaError
        The file would not say what the classifier says, or the network cannot be put into one.
    StorageError
        It cannot be written.
    """
    path = Path(path)
    _require()
    if path.suffix.lower() != ".onnx":
        raise InputError(f"cannot write a network to {path.name!r}", "end the name in .onnx")
    checked = _random(classifier.size) if images is None else images
    if checked.shape[1:] != (classifier.size, classifier.size, 3) or checked.dtype != np.uint8:
        raise InputError(f"the check needs uint8 images (n, {classifier.size}, {classifier.size}, 3), got "
                         f"{checked.dtype} {checked.shape}")
    with atomic(path) as temporary:
        temporary.touch()  # told now rather than after the work, if it cannot be
        net = _Whole(classifier)
        expected = _expected(net, checked)  # first: what a network keeps from its first pass must be no tracer's
        model = _traced(net, classifier.size)
        _describe(model, _metadata(classifier))
        data = _save(model, temporary, path)
        try:
            difference = _check(temporary, checked, expected)
        except BaseException:
            if data is not None:
                data.unlink(missing_ok=True)
            raise
    return OnnxFile(path, sum(file.stat().st_size for file in (path, data) if file), difference, len(checked))


def export_onnx(run: Path, path: Path) -> OnnxFile:
    """Return what was written: the classifier of ``run`` as an ONNX file, checked on images of the run if it has files.

    ``run`` may also be a folder that ``Classifier.save`` wrote; errors are those of ``write_onnx``.
    """
    classifier = Classifier.load(run)
    return write_onnx(classifier, path, images=_own_images(run, classifier.size))


def _own_images(run: Path, size: int) -> np.ndarray | None:
    """Return some images of a run, uint8 (n, size, size, 3); None where they are no files or have gone."""
    told = read_json(run / "run.json") if (run / "run.json").exists() else {}
    source = str(told.get("options", {}).get("data", {}).get("source", ""))
    is_files = data_set_name(source) is None and Path(source).suffix.lower() not in (".npy", ".npz")
    if not source or not is_files or not Path(source).exists():
        return None
    files, found = find_images(source), []
    for row in evenly(len(files), _N_CHECKED):
        with suppress(CorruptFileError):  # what cannot be read was told when the run was made
            found.append(read_image(files[row].path, size))
    return np.stack(found) if found else None


def _require() -> None:
    for name in PACKAGES:
        if find_spec(name) is None:
            raise InputError(f"an ONNX file needs the package {name}", "pip install 'phyla[onnx]'")


def _random(size: int) -> np.ndarray:
    """Return images from nearly flat to pure noise: what a network makes of noise alone may be all alike."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (_N_CHECKED, size, size, 3))
    flat = draw.integers(0, 256, (_N_CHECKED, 1, 1, 3))
    share = np.linspace(0.1, 1, _N_CHECKED).reshape(-1, 1, 1, 1)
    return (share * noise + (1 - share) * flat).astype(np.uint8)


# ── the network ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Whole(nn.Module):
    """Stored pixels (B, size, size, 3) to probabilities (B, K) and embeddings (B, D).

    The plain view is written out, for `Views` works in threads and keeps constants, which cannot be traced.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.net = copy.deepcopy(classifier.net).cpu().float().eval()
        self.views = classifier.views.plain()
        self.lines, self.top = _lines(self.views, classifier.size)
        mean, std = (torch.tensor(value, dtype=torch.float64).view(1, 3, 1, 1)
                     for value in (self.views.mean, self.views.std))
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (mean / std).float())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.net.embed(self._view(images))
        return self.net.heads.probabilities(embedding)[:, 0].float(), embedding.float()

    def _view(self, images: Tensor) -> Tensor:
        kept = slice(self.top, self.top + self.views.size)
        pixels = images.permute(0, 3, 1, 2).float()
        if self.lines is not None:
            pixels = _resampled(pixels, self.lines)
        return pixels[:, :, kept, kept] * self.scale - self.shift


def _lines(views: Views, size: int) -> tuple[Tensor | None, int]:
    """Return the weights of stored lines in each line of the enlarged image, (n, size), and where the crop begins.

    There are none where stored images are large enough. Weights are whole numbers, of which 2**22 are one.
    """
    if size >= views.size:
        return None, geometry.center_box(size, size, views.size)[0]
    whole = torch.tensor([[0, 0, size, size]])
    lines, _ = geometry.crop_lines(whole, (size, size), (views.size, views.size))
    weights = torch.zeros(views.size, size, dtype=torch.float64)
    return weights.scatter_add_(1, lines.places[:, 0].T, lines.weights[:, 0].T.double()), 0


def _resampled(pixels: Tensor, weights: Tensor) -> Tensor:
    """Return images enlarged as `geometry.resample` does it; float64 holds its whole numbers exactly."""
    wide = ((pixels.double() @ weights.T) / 2**22 + 0.5).floor()
    return ((weights @ wide) / 2**22 + 0.5).floor().float()


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _traced(net: _Whole, size: int) -> "ModelProto":
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with _silence(), torch.no_grad():
        try:
            program = torch.onnx.export(
                net, (pixels,), dynamo=True, input_names=["images"], output_names=["probabilities", "embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
        except Exception as error:  # the exporter raises what it likes, with pages of advice to its own developers
            told = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise PhylaError(f"the network cannot be put into an ONNX file ({type(error).__name__}: {told})",
                             "phyla predict labels images with it all the same") from error
    if program is None:
        raise PhylaError("torch made no ONNX file and did not say why")
    return program.model_proto


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's remarks, which are for its developers, from the terminal; errors come through."""
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _metadata(classifier: Classifier) -> dict[str, str]:
    """Return what a reader of the file needs besides the network, text by name; lists and objects are JSON."""
    views, encoder = classifier.views, classifier.net.encoder
    held = encoder_form(encoder) if isinstance(encoder, AnyEncoder) else type(encoder).__name__
    told: dict[str, object] = {"names": list(classifier.names), "mean": list(views.mean), "std": list(views.std),
                               "encoder": held, "facts": classifier.facts}
    if isinstance(encoder, FrozenEncoder):
        told["weights"] = [_origin(member.name) for member in encoder.spec.members]
    plain = {"size": str(classifier.size), "view": str(views.size), "crop": HOW_TO_CROP,
             "normalization": "in the network: (pixels / 255 - mean) / std of the centre square of view x view",
             "phyla": __version__}
    return plain | {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in told.items()}


def _origin(name: str) -> dict[str, str]:
    """Return what must be said of the published weights ``name``; of a user's own, what they are called."""
    if name not in FROZEN:
        return {"name": name}
    known = FROZEN[name]
    return {"name": name, "title": known.title, "licence": known.licence, "supervision": known.supervision,
            "data": known.data}


def _describe(model: "ModelProto", about: Mapping[str, str]) -> None:
    from onnx.helper import set_model_props

    set_model_props(model, dict(about))
    model.producer_name, model.producer_version = "phyla", __version__
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]  # where in whose source each came from: names of this machine's folders
        node.ClearField("doc_string")
    model.graph.name = "phyla"
    model.graph.doc_string = "images uint8 (batch, size, size, 3) to probabilities and embedding; see the metadata"



def _save(model: "ModelProto", temporary: Path, path: Path) -> Path | None:
    """Write the network to ``temporary``; weights that are too many for it into a file beside ``path``, returned."""
    weights, data = model.graph.initializer, None
    if sum(len(weight.raw_data) for weight in weights) >= LARGEST:
        # Named by what is in it, so that no earlier network ever stands beside the weights of another.
        digest = fingerprint(*(hashlib.sha256(weight.raw_data).hexdigest() for weight in weights))
        data = path.with_name(f"{path.name}.{digest}.data")
        _move_weights(model, data)
    temporary.write_bytes(model.SerializeToString())
    return data


def _move_weights(model: "ModelProto", data: Path) -> None:
    from onnx.external_data_helper import set_external_data

    with atomic(data) as temporary, temporary.open("wb") as out:
        for weight in model.graph.initializer:
            if len(weight.raw_data) >= _LEAST_MOVED:
                out.write(bytes(-out.tell() % _ALIGNED))
                set_external_data(weight, data.name, offset=out.tell(), length=len(weight.raw_data))
                out.write(weight.raw_data)
                weight.ClearField("raw_data")


def _check(path: Path, images: np.ndarray, expected: tuple[np.ndarray, np.ndarray]) -> float:
    """Return how far the file's probabilities are from the classifier's; PhylaError where they are too far."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"images": part}) for part in (images[:1], images[1:]) if len(part)]
    found = [np.concatenate(part) for part in zip(*parts, strict=True)]
    far = [float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True)]
    limits = (TOLERANCE, TOLERANCE * max(1.0, float(np.abs(expected[1]).max())))
    for name, value, limit in zip(("probabilities", "embeddings"), far, limits, strict=True):
        if not value <= limit:
            raise PhylaError(f"ONNX Runtime {onnxruntime.__version__} gives {name} that differ by {value:.2g} from the "
                             f"classifier's, more than {limit:.2g}: no file was written",
                             "try other versions of torch and onnxruntime")
    return far[0]


def _expected(whole: _Whole, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the classifier makes of ``images``, by the way on which it labels any."""
    net, n = whole.net, whole.net.heads.n_clusters

    def both(views: Tensor) -> Tensor:
        seen = net.embed(views)
        return torch.cat([net.heads.probabilities(seen)[:, 0].float(), seen.float()], dim=1)

    rows = forward_all(from_array(images), net, both, whole.views).numpy()
    return rows[:, :n], rows[:, n:]
