"""Anything that holds images -> ImageSet: data sets by name, folders, list files, array files, arrays.

    open_images("cifar10")        open_images("photos/")        open_images("files.csv", size=64)
    open_images("stl10", split="train+unlabeled")               from_array(pixels)

Pixels only: labels are read by ``evaluate.truth``, from the same places, by the ids given here.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from phyla.errors import DataNotFoundError, InputError, nearest
from phyla.images import finegrained, formats
from phyla.images.arrays import from_array, read_array_file
from phyla.images.catalog import DATASETS, Found, data_set_name, locate, not_found, split_parts
from phyla.images.decode import SUFFIXES, checked_size, square
from phyla.images.folders import Chunk, ImageFile, default_size, is_there, stream_images, walk
from phyla.images.gather import Keep, Loaded, Source, gather, how_kept, kept_file, looked_at
from phyla.images.stored import FileList, FilePixels, files_fingerprint, stamp
from phyla.types import ImageSet

__all__ = ["Loaded", "evenly", "from_array", "open_images"]

_ROWS = 1024  # images of an array that are resized and copied in one go


def open_images(source: str | Path, *, split: str = "train", size: int | None = None, data_dir: Path | None = None,
                limit: int | None = None, strict: bool = False, download: bool = True,
                cache: Path | None = None, keep: Keep = "auto", largest: int = 96) -> Loaded:
    """Return the images of a data set, folder, list file (.txt, .csv, .tsv) or array file (.npy, .npz).

    Parameters
    ----------
    source : a data set's name, or a path; a folder that is called like a data set is meant by ``./name``
    split : which part of a data set; files have none
    size : height and width in pixels; None keeps that of a data set or array, and chooses what suits files
    data_dir : where data sets lie or are put; None for ``$PHYLA_DATA`` or the cache folder
    limit : at most so many images, evenly spaced over all of them
    strict : stop at the first file that cannot be read instead of leaving it out
    download : get a missing data set from its official address
    cache : folder that keeps the decoded pixels of files, read through a memory map now and next time
    keep : the pixels of files in memory, in a file, or not at all (off: decoded whenever they are asked for); auto is
        a file where ``cache`` is given, memory up to 4 GB where it is not, a file above, and off where that would take
        more than 100 GB or half of the free disk
    largest : the size that is chosen for files at most; 16 at least

    Raises
    ------
    DataNotFoundError
        There is nothing at the path, or the data set is not here and cannot be had: says where to put which files.
    InputError
        No image can be found or read in it, or the name, split, size or limit cannot be used.
    CorruptFileError
        A data set's file is damaged; with ``strict``, any image file.
    """
    checked_size(size)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} leaves no image", "give 1 or more, or leave it out")
    name = data_set_name(source) if isinstance(source, str) else None
    if name is not None:
        return _open_data_set(name, split, size, data_dir, limit, strict, download, cache, keep)
    path = _existing(source)
    if path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        array, ids = read_array_file(path)
        return _open_array(from_array(array, ids, name=path.stem), size, limit, [str(path.resolve()), stamp(path)])
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        raise InputError(f"{path} is one image, and classes are found among many",
                         f"give its folder, {path.parent}, or a list of files")
    return _open_files(walk(path), path.resolve().name or str(path), size, limit, strict, cache, keep, largest)


def evenly(n: int, limit: int | None) -> np.ndarray:
    """Return at most ``limit`` of ``n`` row numbers, evenly spaced, int64; the first and the last are among them."""
    if limit is None or limit >= n:
        return np.arange(n)
    return np.linspace(0, n - 1, limit).round().astype(np.int64)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if is_there(path):
        return path
    if isinstance(source, str) and path.name == source and not path.suffix:
        raise InputError(f"{source!r} is neither a data set nor a folder here", nearest(source.lower(), list(DATASETS)))
    raise DataNotFoundError(f"there is no folder or file {path}", "check the path; quote it if it holds spaces")


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open_files(files: Iterable[ImageFile], name: str, size: int | None, limit: int | None, strict: bool,
                cache: Path | None, keep: Keep, largest: int = 96) -> Loaded:
    packed = FileList(files)
    if limit is not None:
        packed = FileList(packed[row] for row in evenly(len(packed), limit).tolist())
    size = size or default_size(packed, largest=largest)

    def chunks(start: int) -> Iterator[Chunk]:
        return stream_images((packed[row] for row in range(start, len(packed))), size=size, strict=strict)

    source = Source(name, [file.id for file in packed], size, chunks, strict)
    how = how_kept(keep, source.n_bytes, cache)
    if how == "memory":
        return gather(source)
    file = kept_file(cache, name, source.shape, files_fingerprint(packed))
    return gather(source, file) if how == "file" else looked_at(source, file, partial(FilePixels, packed, size=size))


# ── arrays and data sets by name ──────────────────────────────────────────────────────────────────────────────────


def _open_array(images: ImageSet, size: int | None, limit: int | None, what: object) -> Loaded:
    rows = evenly(len(images), limit)
    if size is None or images.size == (size, size):
        return Loaded(images if len(rows) == len(images) else images.select(rows))
    return _gathered([np.asarray(images.array)], images.ids, rows, size, images.name, what)


def _open_data_set(name: str, split: str, size: int | None, data_dir: Path | None, limit: int | None, strict: bool,
                   download: bool, cache: Path | None, keep: Keep) -> Loaded:
    found = {part: _obtained(name, part, data_dir, download) for part in split_parts(name, split)}
    title = f"{DATASETS[name].title} {'+'.join(found)}"
    size = size or DATASETS[name].size
    if next(iter(found.values())).layout.reader in ("imagenet", "dogs", "cub"):
        files = [file for part, place in found.items() for file in _image_files(name, part, place)]
        return _open_files(files, title, size, limit, strict, cache, keep)
    arrays = {part: _pixels(place) for part, place in found.items()}
    ids = [f"{part}/{row:05d}" for part, array in arrays.items() for row in range(len(array))]
    rows = evenly(len(ids), limit)
    stamps = [stamp(path) for place in found.values() for path in place.paths]
    return _gathered(list(arrays.values()), ids, rows, size, title, stamps)


def _obtained(name: str, part: str, data_dir: Path | None, download: bool) -> Found:
    if found := locate(name, part, "images", data_dir):
        return found
    reason = ""
    if download and DATASETS[name].archives:
        from phyla.images.download import NotReachableError, download_folder, fetch

        folder = download_folder(DATASETS[name].homes[0], data_dir)
        try:
            for archive in DATASETS[name].archives:
                if archive.split in (None, part):
                    fetch(archive, folder)
        except NotReachableError as error:
            reason = f", and it cannot be downloaded ({error})"
        if found := locate(name, part, "images", data_dir):
            return found
    if is_there(Path(name)):
        reason += f"; the {name} in this folder is meant by ./{name}"
    raise not_found(name, part, "images", data_dir, reason)


def _pixels(found: Found) -> np.ndarray:
    """Return one split as uint8 (n, height, width, 3), or (n, height, width) when it is grey."""
    match found.layout.reader:
        case "cifar":
            return formats.cifar_pixels(found.paths)
        case "npz":
            return formats.npz_pixels(found.paths[0])
        case "stl":
            return formats.stl_pixels(found.paths[0])
        case "svhn":
            return formats.svhn_pixels(found.paths[0])
        case "idx":
            return formats.idx_pixels(found.paths[0])
    return formats.digits_pixels()


def _image_files(name: str, part: str, found: Found) -> list[ImageFile]:
    """Return the files of one split, their ids ``part/class folder/name``, in the data set's own order."""
    folder, *lists = found.paths
    match found.layout.reader:
        case "dogs":
            files = finegrained.dogs_files(lists[0])
        case "cub":
            files = finegrained.cub_files(lists[0], lists[1], part)
        case _:
            classes = formats.imagenet_classes(folder, DATASETS[name].class_ids, DATASETS[name].n_classes)
            files = formats.imagenet_files(folder, classes)
    return [ImageFile(f"{part}/{file}", str(folder / file)) for file in files]


def _gathered(arrays: Sequence[np.ndarray], ids: Sequence[str], rows: np.ndarray, size: int, name: str,
              what: object) -> Loaded:
    chosen = [ids[int(row)] for row in rows]
    source = Source(name, chosen, size, lambda start: _chunks(arrays, ids, rows[start:], size))
    if how_kept("auto", source.n_bytes, None) == "memory":
        return gather(source)
    return gather(source, kept_file(None, name, source.shape, [what, chosen]))


def _chunks(arrays: Sequence[np.ndarray], ids: Sequence[str], rows: np.ndarray, size: int) -> Iterator[Chunk]:
    """Yield the chosen rows of arrays laid end to end, in colour and of one size; only a chunk is copied at a time."""
    start = 0
    for array in arrays:
        own = rows[(rows >= start) & (rows < start + len(array))]
        for at in range(0, len(own), _ROWS):
            some = own[at : at + _ROWS]
            pixels = array[some - start]
            if pixels.shape[1:3] != (size, size):
                pixels = np.stack([square(image, size) for image in pixels])
            elif pixels.ndim == 3:
                pixels = np.repeat(pixels[..., None], 3, axis=3)
            yield Chunk([ids[int(row)] for row in some], pixels, [])
        start += len(array)
