"""The one door through which true labels enter: from a data set's own files, class folders, or a table.

Images carry ids and no labels; a label is found again by its image's id. So it does not matter how many images were
taken, in which order, or which were left out.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phyla.errors import DataNotFoundError, InputError
from phyla.images import finegrained, formats
from phyla.images.catalog import DATASETS, Found, data_set_name, locate, split_parts
from phyla.images.folders import PATH_COLUMNS, image_id, read_columns

_log = logging.getLogger("phyla")
LABEL_COLUMNS = ("label", "class", "target", "category")
UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Truth:
    """True classes of some images.

    Parameters
    ----------
    labels : int64 (n_images,), in the order of the ids asked for; -1 where the class is not known
    names : the class of each index
    """

    labels: np.ndarray
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        labels, n_classes = self.labels, len(self.names)
        if labels.ndim != 1 or (len(labels) and not UNKNOWN <= labels.min() <= labels.max() < n_classes):
            raise InputError(f"labels must be (n_images,) of -1 to {n_classes - 1}, got {labels.dtype} {labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def known(self) -> np.ndarray:
        """Which images have a true class, bool (n_images,)."""
        return self.labels >= 0

    @property
    def n_classes(self) -> int:
        """Named classes, whether or not one of these images is in each."""
        return len(self.names)


def true_labels(source: str | Path, ids: Sequence[str], *, split: str = "train", data_dir: Path | None = None,
                labels: Literal["auto", "folders"] | str | Path = "auto") -> Truth | None:
    """Return the true classes of the images called ``ids``, or None when nobody says what they are.

    Parameters
    ----------
    source : what the images were opened from
    ids : as ``open_images`` gave them; a part of them, or in another order, will do
    split, data_dir : as given to ``open_images``
    labels : "auto" takes a data set's own labels and has none for anything else; "folders" takes the first folder of
        each id as its class; a .csv or .tsv file gives a column path and a column label

    Raises
    ------
    DataNotFoundError
        There is no such table.
    InputError
        The table lacks a column, says two things of one image, or names none of these images.
    CorruptFileError
        A data set's label file is damaged.
    """
    name = data_set_name(source) if isinstance(source, str) else None
    if labels not in ("auto", "folders"):
        return _from_table(Path(labels).expanduser(), Path(source), ids)
    if name is not None:
        return _from_data_set(name, ids, split, data_dir)
    return _from_folders(ids) if labels == "folders" else None


def _truth(classes: Sequence[str | None], among: Iterable[str | None]) -> Truth:
    """Return the classes as indices into all that occur ``among`` the table or ids, sorted as numbers if all are."""
    names = {label for label in among if label is not None}
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    order = sorted(names, key=lambda name: (int(name), name) if numbers else (0, name))
    index = {label: i for i, label in enumerate(order)}
    return Truth(np.array([UNKNOWN if label is None else index[label] for label in classes], np.int64), tuple(order))


# ── class folders and tables ──────────────────────────────────────────────────────────────────────────────────────


def _from_folders(ids: Sequence[str]) -> Truth:
    classes = [name.split("/", 1)[0] if "/" in name else None for name in (name.lstrip("/") for name in ids)]
    if not any(classes):
        raise InputError("no image lies in a class folder", "give the folder that holds one folder a class")
    return _truth(classes, classes)


def _from_table(table: Path, source: Path, ids: Sequence[str]) -> Truth:
    if not table.is_file():
        raise DataNotFoundError(f"there is no table of labels {table}",
                                "give a .csv or .tsv file with the columns path and label, or 'folders'")
    wanted = set(ids)
    told: dict[str, str | None] = {}
    for path, label in read_columns(table, PATH_COLUMNS, LABEL_COLUMNS):
        key, value = _as_id(path, source, wanted), label.strip() or None
        if told.setdefault(key, value) != value:
            raise InputError(f"{table} says both {told[key]!r} and {value!r} of {path!r}", "leave one of the two lines")
    classes = [told.get(name) for name in ids]
    if not any(classes):
        raise InputError(f"{table} names none of the {len(ids)} images: it has {next(iter(told), 'no line')!r}, "
                         f"they are called {ids[0] if len(ids) else 'nothing'!r}",
                         "write paths as they are below the images' folder, with forward slashes")
    if missing := classes.count(None):
        _log.warning("%s gives no class for %d of %d images", table, missing, len(ids))
    return _truth(classes, told.values())


def _as_id(path: str, source: Path, wanted: set[str]) -> str:
    if path in wanted:
        return path
    posix = Path(path.strip().replace("\\", "/"))
    if posix.is_absolute() and posix.is_relative_to(source.absolute()):
        posix = posix.relative_to(source.absolute())
    return image_id(posix.as_posix())


# ── data sets by name ─────────────────────────────────────────────────────────────────────────────────────────────


def _from_data_set(name: str, ids: Sequence[str], split: str, data_dir: Path | None) -> Truth | None:
    parts = {part: locate(name, part, "labels", data_dir) for part in split_parts(name, split)}
    found = {part: place for part, place in parts.items() if place}
    if not found:
        _log.warning("no label files of %s, split %s: the run goes on without true labels", DATASETS[name].title, split)
        return None
    place = next(iter(found.values()))
    if place.layout.reader == "imagenet":
        return _from_imagenet(name, place, ids)
    known = {part: _labels(name, place) for part, place in found.items()}
    labels = np.full(len(ids), UNKNOWN, np.int64)
    for row, image in enumerate(ids):
        part, _, own = image.partition("/")
        if part in known:
            labels[row] = _label(known[part], own)
    if len(ids) and (labels < 0).all() and all(part in found for part in parts):
        raise InputError(f"none of the ids, such as {ids[0]!r}, is one of {DATASETS[name].title}, split {split}",
                         f"they begin with {' or '.join(parts)} and a slash")
    return Truth(labels, _names(name, place))


def _label(known: np.ndarray | Mapping[str, int], own: str) -> int:
    """Return the label of one image of a split, by its number or by its path; UNKNOWN where there is no such image."""
    if isinstance(known, Mapping):
        return known.get(own, UNKNOWN)
    return int(known[int(own)]) if own.isdecimal() and int(own) < len(known) else UNKNOWN


def _labels(name: str, found: Found) -> np.ndarray | dict[str, int]:
    """Return the labels of one split: in the order of its images, or by the path that an id has after the split."""
    match found.layout.reader:
        case "cifar":
            return formats.cifar_labels(found.paths, name)
        case "npz":
            return formats.npz_labels(found.paths[0], name)
        case "stl":
            return formats.stl_labels(found.paths[0])
        case "svhn":
            return formats.svhn_labels(found.paths[0])
        case "idx":
            return formats.idx_labels(found.paths[0])
        case "dogs":
            return finegrained.dogs_labels(found.paths[0], DATASETS[name].n_classes)
        case "cub":
            return finegrained.cub_labels(found.paths[0], found.paths[1], DATASETS[name].n_classes)
    return formats.digits_labels()


def _names(name: str, found: Found) -> tuple[str, ...]:
    if found.layout.reader == "dogs":
        return finegrained.dogs_names(found.paths[0], DATASETS[name].n_classes)
    if found.layout.reader == "cub":
        return finegrained.cub_names(found.paths[2], DATASETS[name].n_classes)
    file = found.folder / (found.layout.names or "")
    if not found.layout.names or not file.is_file():
        return DATASETS[name].classes
    names = formats.cifar_names(file, name) if found.layout.reader == "cifar" else formats.lines(file)
    return names if len(names) == DATASETS[name].n_classes else DATASETS[name].classes


def _from_imagenet(name: str, found: Found, ids: Sequence[str]) -> Truth:
    folder = found.paths[0]
    classes = formats.imagenet_classes(folder, DATASETS[name].class_ids, DATASETS[name].n_classes)
    index = {wnid: i for i, wnid in enumerate(classes)}
    wnids = [image.split("/")[1] if image.count("/") > 1 else "" for image in ids]
    labels = np.array([index.get(wnid, UNKNOWN) for wnid in wnids], np.int64)
    return Truth(labels, formats.imagenet_names(folder, classes))
