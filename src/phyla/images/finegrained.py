"""Read the lists of Stanford Dogs and CUB-200-2011: which images, by one function, and their classes by another.

Private to ``images.sources``, which asks for files only, and ``evaluate.truth``, which asks for labels. Both sets are
JPEG files in one folder a class, ``class/name.jpg``, with lists that say which of them a split takes. As in
``images.formats`` every function is told the path, and a list that is not what it should be raises CorruptFileError.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from phyla.errors import CorruptFileError
from phyla.images.matlab import read_array, read_texts

_AGAIN = "delete it and get it again"
# A list must not lead out of the images' folder: no way up, no drive, no root.
_FILE = re.compile(r"[^./\\:][^/\\:]*/[^./\\:][^/\\:]*")
_LINE = re.compile(r"([0-9]{1,9}) +(\S.*)")


def _checked(path: Path, files: Iterable[str]) -> list[str]:
    names = list(files)
    odd = next((name for name in names if not _FILE.fullmatch(name)), None)
    if odd is not None:
        raise CorruptFileError(f"{path} names {odd!r}, which is not an image in a class folder", _AGAIN)
    if not names or len(set(names)) != len(names):
        raise CorruptFileError(f"{path} names {'a file twice' if names else 'no image'}", _AGAIN)
    return names


# ── Stanford Dogs: a MATLAB file a split, with the cell array `file_list` and the numbers `labels` ────────────────


def dogs_files(path: Path) -> list[str]:
    """Return the images of ``train_list.mat`` or ``test_list.mat`` in its order, ``n02085620-Chihuahua/name.jpg``."""
    return _checked(path, read_texts(path, "file_list"))


def dogs_labels(path: Path, n_classes: int) -> dict[str, int]:
    """Return the class of each image of a list, counted from 0; the file counts from 1."""
    files, labels = dogs_files(path), read_array(path, "labels").ravel()
    if len(labels) != len(files) or not np.isin(labels, np.arange(1, n_classes + 1)).all():
        raise CorruptFileError(f"{path} should give {len(files)} labels of 1 to {n_classes} and does not", _AGAIN)
    return {file: int(label) - 1 for file, label in zip(files, labels, strict=True)}


def dogs_names(path: Path, n_classes: int) -> tuple[str, ...]:
    """Return the class names of a list by index, ``Chihuahua`` of the folder ``n02085620-Chihuahua``."""
    folders = {label: file.split("/")[0] for file, label in dogs_labels(path, n_classes).items()}
    if len(folders) != n_classes:
        raise CorruptFileError(f"{path} has images of {len(folders)} classes instead of {n_classes}", _AGAIN)
    return tuple(folders[label].partition("-")[2] or folders[label] for label in range(n_classes))


# ── CUB-200-2011: text files, a number and a value a line ─────────────────────────────────────────────────────────


def _numbered(path: Path) -> dict[int, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not text: {error}", _AGAIN) from error
    values: dict[int, str] = {}
    for row, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.strip())
        if not found or int(found[1]) in values:
            raise CorruptFileError(f"{path}, line {row}: {line[:80]!r} is not a new number and a value", _AGAIN)
        values[int(found[1])] = found[2]
    return values


def _told(path: Path, images: Path, allowed: Iterable[str]) -> dict[int, str]:
    """Return what a list says of every image, each time one of ``allowed``."""
    values, names = _numbered(path), _numbered(images)
    if values.keys() != names.keys():
        raise CorruptFileError(f"{path} tells of {len(values)} images and not of the {len(names)} of {images.name}",
                               _AGAIN)
    if odd := set(values.values()) - set(allowed):
        raise CorruptFileError(f"{path} says {min(odd)[:80]!r} of an image, which it cannot be", _AGAIN)
    return values


def cub_files(images: Path, split: Path, part: str) -> list[str]:
    """Return the images of one split by number, ``001.Black_footed_Albatross/name.jpg``.

    Parameters
    ----------
    images : images.txt, number and file
    split : train_test_split.txt, number and 1 (train) or 0 (test)
    part : "train" or "test"
    """
    numbers = _numbered(images)
    _checked(images, numbers.values())
    flag = "1" if part == "train" else "0"
    told = _told(split, images, "01")
    files = [numbers[number] for number in sorted(numbers) if told[number] == flag]
    if not files:
        raise CorruptFileError(f"{split} puts no image into the split {part}", _AGAIN)
    return files


def cub_labels(images: Path, labels: Path, n_classes: int) -> dict[str, int]:
    """Return the class of every image, whatever its split, counted from 0; image_class_labels.txt counts from 1."""
    told = _told(labels, images, (str(label) for label in range(1, n_classes + 1)))
    return {file: int(told[number]) - 1 for number, file in _numbered(images).items()}


def cub_names(path: Path, n_classes: int) -> tuple[str, ...]:
    """Return the class names of classes.txt by index, ``Black_footed_Albatross`` of ``001.Black_footed_Albatross``."""
    names = _numbered(path)
    if sorted(names) != list(range(1, n_classes + 1)):
        raise CorruptFileError(f"{path} should name the classes 1 to {n_classes} and does not", _AGAIN)
    return tuple(names[label].partition(".")[2] or names[label] for label in range(1, n_classes + 1))
