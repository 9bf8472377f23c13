"""What is done with a finished run: label new images, sort images into folders."""

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

import pyarrow.parquet as pq

from phyla.classifier import Classifier
from phyla.errors import InputError
from phyla.images.catalog import data_set_name
from phyla.images.folders import find_images, walk
from phyla.images.stored import FileList
from phyla.labelling import Share, label_files
from phyla.progress import bar
from phyla.storage import read_json, storage_error
from phyla.tables import COLUMNS, N_TOP, UNSURE, UNSURE_CLUSTER, Rows, checked_confidence, left_open, stdout_csv
from phyla.training.device import Device
from phyla.types import Assignment

log = logging.getLogger("phyla")


def predict_table(classifier: Classifier, images: Path, out: Path | None, *, embeddings: Path | None = None,
                  device: Device | None = None, strict: bool = False, as_json: bool = False,
                  share: Share | None = None, min_confidence: float = 0.0) -> dict[str, object]:
    """Label the images of a folder, list or file as a table on stdout or in ``out``; constant memory.

    Returns how many were labelled and skipped. Unreadable files are named in the log and left out of the table. What
    goes into files is made in shards: after a stop or kill the same call makes those that are missing.

    Parameters
    ----------
    embeddings : a .npy file, written besides; without ``out`` nothing goes to stdout then
    as_json : a JSON list on stdout instead of CSV; ``out`` goes by its name
    share : as for ``label_files``
    min_confidence : images below it are put into no cluster (``left_open``)

    Raises
    ------
    InputError
        There is no image, or not one that can be read.
    """
    if out is not None or embeddings is not None:
        return label_files(classifier, images, out, embeddings=embeddings, device=device, strict=strict, share=share,
                           min_confidence=min_confidence)
    if share is not None or (device is not None and device.group.size > 1):
        raise InputError("shards need a file to become", "give --out or --embeddings")
    skipped, min_confidence = 0, checked_confidence(min_confidence)
    files = FileList(walk(images))  # before the first line is written

    def chunks() -> Iterator[Rows]:
        nonlocal skipped
        with bar("predict", total=len(files), unit="image") as shown:
            for made in classifier.output_stream(files, device=device, strict=strict):
                skipped += len(made.skipped)
                shown.advance(len(made.ids) + len(made.skipped))
                if made.ids:
                    yield left_open(Assignment(made.probabilities, made.ids), min_confidence)
        if skipped == len(files):
            raise InputError(f"none of the {len(files)} images of {images} can be read",
                             "check that they open in an image viewer")

    labelled = _stdout_json(chunks()) if as_json else stdout_csv(chunks())
    return {"labelled": labelled, "skipped": skipped, "out": None}


def _stdout_json(chunks: Iterable[Rows]) -> int:
    """Write one JSON list, an object a line, with the columns of the other tables; return the number of rows."""
    n_rows = 0
    for chunk in chunks:
        clusters, probabilities = chunk.top(N_TOP)
        for name, found, sure in zip(chunk.ids, clusters.tolist(), probabilities.tolist(), strict=True):
            values = [value for rank in zip(found, sure, strict=True) for value in rank]
            row = dict(zip(COLUMNS, [name, *values], strict=False))
            sys.stdout.write(f"{',' if n_rows else '['}\n{json.dumps(row)}")
            n_rows += 1
    sys.stdout.write("\n]\n")
    return n_rows


def export_folders(run: Path, folders: Path, *, min_confidence: float = 0.0, link: bool = False) -> int:
    """Copy or link the images of a run into one folder a cluster below ``folders``; return how many.

    An image below ``min_confidence``, or in no cluster, goes into ``unsure``. The run must have been made from a folder
    or list of files, and ``folders`` must be empty or new: nothing is written over, and no earlier export is mixed with
    this one.
    """
    source, table = _exported(run, folders)
    names = [_folder_name(name) for name in Classifier.load(run).names]
    where = {file.id: file.path for file in find_images(source)}
    rows = pq.read_table(table, columns=["id", "cluster", "confidence"]).to_pylist()
    missing = 0
    with bar("export", total=len(rows), unit="image") as shown:
        for row in rows:
            unsure = row["confidence"] < min_confidence or row["cluster"] == UNSURE_CLUSTER
            place = folders / (UNSURE if unsure else names[row["cluster"]])
            if row["id"] in where:
                _put(Path(where[row["id"]]), _free(place / _file_name(row["id"])), link=link)
            else:
                missing += 1
            shown.advance()
    if missing:
        log.warning("%d images of the run are no longer in %s", missing, source)
    return len(rows) - missing


def _exported(run: Path, folders: Path) -> tuple[Path, Path]:
    """Return what a run was made from and its table of assignments, checked to be files that can be sorted."""
    table = run / "assignments.parquet"
    if not (run / "run.json").exists() or not table.exists():
        raise InputError(f"{run} holds no finished run", "give the folder of one, such as runs/NAME")
    name = str(read_json(run / "run.json")["options"]["data"]["source"])
    source = Path(name)
    if data_set_name(name) is not None or not source.exists() or source.suffix.lower() in (".npy", ".npz"):
        raise InputError(f"the run was made from {name!r}, which is no folder here", "only files can be sorted")
    try:
        if folders.exists() and any(folders.iterdir()):
            raise InputError(f"{folders} is not empty", "give an empty or new folder: nothing is written over")
    except NotADirectoryError as error:
        raise InputError(f"{folders} is a file, not a folder", "give an empty or new folder") from error
    return source, table


def _folder_name(name: str) -> str:
    return re.sub(r"[/\\:*?\"<>|\x00-\x1f]", "_", name).strip(". ") or "_"


def _file_name(image: str) -> str:
    name = re.sub(r"[\x00-\x1f:*?\"<>|\\]", "_", image.lstrip("/").replace("/", "__"))
    # An id made of a name that is not text ends in a digest: it goes before the ending, so that viewers know the file.
    return re.sub(r"^(.*)(\.\w+)~([0-9a-f]{8})$", r"\1~\3\2", name)


def _free(path: Path) -> Path:
    """Return ``path``, or the first like it that is not taken: two images may differ in their folders alone."""
    tries = (path.with_name(f"{path.stem}~{n}{path.suffix}") for n in count(2))
    return path if not os.path.lexists(path) else next(other for other in tries if not os.path.lexists(other))


def _put(source: Path, target: Path, *, link: bool) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                target.symlink_to(source.resolve())
                return
            except OSError:  # Windows without the right to make links
                log.debug("no symbolic link for %s: a copy", target)
        shutil.copyfile(source, target)
    except OSError as error:
        raise storage_error(target, error) from error
