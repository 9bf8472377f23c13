"""Read the public data sets byte by byte: pixels by one function, labels by another.

Private to ``images.sources``, which asks for pixels only, and ``evaluate.truth``, which asks for labels. Nothing here
looks for files (see ``images.catalog``); every function is told the path, and a file that is not what it should be
raises CorruptFileError with its name.
"""

import gzip
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from phyla.errors import CorruptFileError, InputError
from phyla.images.matlab import read_array, read_shape

_AGAIN = "delete it and get it again"
CIFAR_LABEL_KEYS = {"cifar10": "labels", "cifar20": "coarse_labels", "cifar100": "fine_labels"}
_CIFAR_NAME_KEYS = {"cifar10": "label_names", "cifar20": "coarse_label_names", "cifar100": "fine_label_names"}
IMAGENET_SUFFIXES = (".jpeg", ".jpg", ".png")


# ── CIFAR: pickled dictionaries, read without running anything they name ──────────────────────────────────────────


class _PickledDtype:
    """What a pickle says of a dtype: kind and width; byte order arrives later as state."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[biuf][1248]", self.code):
            raise pickle.UnpicklingError(f"an array of type {self.code!r}")
        self.order = "|"

    def __setstate__(self, state: Sequence[Any]) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else str(state[1])
        self.order = order if order in ("<", ">", "=", "|") else "|"


class _PickledArray:
    """What a pickle says of an array; NumPy builds it only after everything has been checked."""

    def __init__(self, state: Sequence[Any] | None = None) -> None:
        self.state = state

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        if self.state is None:
            raise pickle.UnpicklingError("an array without contents")
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _PickledDtype) or not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array of objects")
        flat = np.frombuffer(data, np.dtype(dtype.order + dtype.code))
        return flat.reshape(tuple(int(n) for n in shape), order="F" if fortran else "C")


def _new_array(*_: object) -> _PickledArray:
    return _PickledArray()


def _array_from_buffer(data: object, dtype: object, shape: object, order: object) -> _PickledArray:
    return _PickledArray((1, shape, dtype, order == "F", data))


def _latin1(text: str, encoding: object) -> bytes:
    # Python 3 writes bytes into an old pickle as text and a call of codecs.encode; only that one encoding is meant.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _ndarray_type(*_: object) -> None:
    raise pickle.UnpicklingError("an array made outside of numpy's own pickling")


# Names that NumPy's own pickles mention, from Python 2 to NumPy 2, and what each may do here.
_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): _ndarray_type,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")},
}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler for numbers, text, lists, dictionaries and numeric arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants to use {module}.{name}, which no data set needs") from None


def read_pickle(path: Path) -> dict[str, object]:
    """Return the dictionary in a CIFAR pickle, keys as text, without running anything the file names.

    Raises
    ------
    CorruptFileError
        The file is damaged, or names anything but NumPy's array reconstruction.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
        return {_text(key): v.array() if isinstance(v, _PickledArray) else v for key, v in content.items()}
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything, from UnpicklingError to OverflowError
        raise CorruptFileError(f"{path} is not a CIFAR file that can be trusted: {error}", _AGAIN) from error


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def cifar_pixels(paths: Sequence[Path]) -> np.ndarray:
    """Return the images of CIFAR batches in order, uint8 (n, 32, 32, 3)."""
    batches = []
    for path in paths:
        data = read_pickle(path).get("data")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise CorruptFileError(f"{path} holds no uint8 (n, 3072) images under the key 'data'", _AGAIN)
        batches.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return np.concatenate(batches)


def cifar_labels(paths: Sequence[Path], data_set: str) -> np.ndarray:
    """Return the labels of CIFAR batches in order, int64 (n,)."""
    key = CIFAR_LABEL_KEYS[data_set]
    batches = []
    for path in paths:
        labels = read_pickle(path).get(key)
        if not isinstance(labels, (list, np.ndarray)):
            raise CorruptFileError(f"{path} holds no {key!r}", _AGAIN)
        batches.append(np.asarray(labels, dtype=np.int64))
    return np.concatenate(batches)


def cifar_names(path: Path, data_set: str) -> tuple[str, ...]:
    """Return the class names in ``batches.meta`` or ``meta``."""
    names = read_pickle(path).get(_CIFAR_NAME_KEYS[data_set])
    if not isinstance(names, list):
        raise CorruptFileError(f"{path} holds no {_CIFAR_NAME_KEYS[data_set]!r}", _AGAIN)
    return tuple(_text(name) for name in names)


def _npz(path: Path, key: str) -> np.ndarray:
    try:
        # Opened here: NumPy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            return content[key]
    except (ValueError, KeyError, EOFError, zlib.error, BadZipFile, NotImplementedError) as error:
        raise CorruptFileError(f"{path} has no readable array {key!r} ({error})", _AGAIN) from error


def npz_pixels(path: Path) -> np.ndarray:
    """Return the array ``images`` of an .npz file, uint8 (n, height, width, 3)."""
    images = _npz(path, "images")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise CorruptFileError(f"{path}: 'images' is {images.dtype} {images.shape}, not uint8 (n, h, w, 3)", _AGAIN)
    return images


def npz_labels(path: Path, data_set: str) -> np.ndarray:
    """Return the array ``fine`` or ``coarse`` of an .npz file, int64 (n,)."""
    return _npz(path, CIFAR_LABEL_KEYS[data_set].removesuffix("_labels")).astype(np.int64)


# ── STL-10: raw bytes, each image stored channel by channel and column by column ──────────────────────────────────


def stl_pixels(path: Path) -> np.ndarray:
    """Return a STL-10 file's images as a memory map turned upright, uint8 (n, 96, 96, 3): rows are read when used."""
    if path.stat().st_size == 0 or path.stat().st_size % (3 * 96 * 96):
        raise CorruptFileError(f"{path} is {path.stat().st_size} bytes, not a multiple of one image's 27648", _AGAIN)
    return np.memmap(path, np.uint8, "r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)


def stl_labels(path: Path) -> np.ndarray:
    """Return a STL-10 file's labels counted from 0, int64 (n,); the file counts from 1."""
    labels = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64) - 1
    if not len(labels) or labels.min() < 0 or labels.max() > 9:
        raise CorruptFileError(f"{path} should hold bytes from 1 to 10 and does not", _AGAIN)
    return labels


def lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a list of class names, without the blank ones."""
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


# ── SVHN: a MATLAB file a split, images X along the last axis and labels y ────────────────────────────────────────


def svhn_pixels(path: Path) -> np.ndarray:
    """Return the cropped digits of a SVHN file, uint8 (n, 32, 32, 3)."""
    images = read_array(path, "X")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3) or not images.size:
        raise CorruptFileError(f"{path}: 'X' is {images.dtype} {images.shape}, not uint8 (32, 32, 3, n)", _AGAIN)
    return images.transpose(3, 0, 1, 2)


def svhn_labels(path: Path) -> np.ndarray:
    """Return the digit of each image of a SVHN file, int64 (n,); the file says 10 where the digit is 0."""
    labels = read_array(path, "y").ravel()
    n_images = read_shape(path, "X")[-1]
    if len(labels) != n_images or not np.isin(labels, np.arange(1, 11)).all():
        raise CorruptFileError(f"{path} should give {n_images} labels of 1 to 10 and does not", _AGAIN)
    return labels.astype(np.int64) % 10


# ── IDX: MNIST and Fashion-MNIST, plain or gzipped ────────────────────────────────────────────────────────────────


def _idx(path: Path, n_axes: int) -> np.ndarray:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        magic, *shape = struct.unpack_from(f">{1 + n_axes}I", data)
        if magic != 0x0800 + n_axes:  # 8 says unsigned bytes, then the number of axes
            raise ValueError(f"it begins with {magic:#010x}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * n_axes).reshape(shape)
    except (ValueError, EOFError, struct.error, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptFileError(f"{path} is not an IDX file of {n_axes} axes: {error}", _AGAIN) from error


def idx_pixels(path: Path) -> np.ndarray:
    """Return the grey images of an IDX file, uint8 (n, height, width)."""
    return _idx(path, 3)


def idx_labels(path: Path) -> np.ndarray:
    """Return the labels of an IDX file, int64 (n,)."""
    return _idx(path, 1).astype(np.int64)


# ── scikit-learn's digits ─────────────────────────────────────────────────────────────────────────────────────────


def digits_pixels() -> np.ndarray:
    """Return scikit-learn's 1,797 digits, uint8 (1797, 8, 8); their 0..16 becomes 0..255."""
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images * (255 / 16)).astype(np.uint8)


def digits_labels() -> np.ndarray:
    """Return the digit shown by each of scikit-learn's digits, int64 (1797,)."""
    from sklearn.datasets import load_digits

    return load_digits().target.astype(np.int64)


# ── ImageNet: one folder a class ──────────────────────────────────────────────────────────────────────────────────


def imagenet_classes(folder: Path, wanted: Sequence[str], n_classes: int) -> tuple[str, ...]:
    """Return the class ids in index order: ``wanted``, or for the whole set every id among the folders, sorted.

    Raises
    ------
    InputError
        Folders are missing, so that indices would not be those of the data set.
    """
    there = sorted(entry.name for entry in folder.iterdir() if re.fullmatch(r"n\d{8}", entry.name) and entry.is_dir())
    missing = sorted(set(wanted) - set(there))
    if missing or (not wanted and len(there) != n_classes):
        said = f"; missing: {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}" if missing else ""
        n_there = len(set(wanted) & set(there)) if wanted else len(there)
        raise InputError(f"{folder} should hold {n_classes} class folders and holds {n_there} of them{said}",
                         "sort the images into one folder a class id (n01440764 and so on), or give the folder itself "
                         "as the source to use whatever it holds")
    return tuple(wanted) if wanted else tuple(there)


def imagenet_files(folder: Path, classes: Sequence[str]) -> list[str]:
    """Return the image files of each class, ``n01440764/name.JPEG``, class by class and sorted by name."""
    return [f"{wnid}/{name}" for wnid in classes
            for name in sorted(p.name for p in (folder / wnid).iterdir() if p.suffix.lower() in IMAGENET_SUFFIXES)]


def imagenet_names(folder: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Return a readable name for each class id where a ``LOC_synset_mapping.txt`` lies near, else the ids."""
    for place in (folder, *folder.parents[:4]):
        mapping = place / "LOC_synset_mapping.txt"
        if mapping.is_file():
            names = dict(line.split(" ", 1) for line in lines(mapping) if " " in line)
            return tuple(names.get(wnid, wnid).split(",")[0] for wnid in classes)
    return tuple(classes)
