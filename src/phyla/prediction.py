"""What is done with a finished run: label new images, sort images into folders, take in a published checkpoint."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from phyla.classifier import Classifier
from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.images.folders import find_images
from phyla.nets.heads import ClusterNet
from phyla.progress import bar
from phyla.recipes import CIFAR10, IMAGENET
from phyla.rundir import save_encoder
from phyla.storage import read_json, storage_error
from phyla.tables import stdout_csv, write_assignments
from phyla.training.device import Device
from phyla.types import Assignment
from phyla.zoo import load_published

log = logging.getLogger("phyla")


def predict_table(classifier: Classifier, images: Path, out: Path | None, *, device: Device | None = None,
                  strict: bool = False) -> dict[str, object]:
    """Label the images of a folder, list or file as a table on stdout or in ``out``; constant memory.

    Returns how many were labelled and skipped. Unreadable files are named in the log and left out of the table.
    """
    skipped = 0

    def chunks() -> Iterator[Assignment]:
        nonlocal skipped
        with bar("predict", total=len(find_images(images)), unit="image") as shown:
            for assignment, unreadable in classifier.predict_stream(images, device=device, strict=strict):
                skipped += len(unreadable)
                shown.advance((len(assignment) if assignment else 0) + len(unreadable))
                if assignment:
                    yield assignment

    labelled = stdout_csv(chunks()) if out is None else write_assignments(out, chunks())
    return {"labelled": labelled, "skipped": skipped, "out": str(out) if out else None}


def export_folders(run: Path, folders: Path, *, min_confidence: float = 0.0, link: bool = False) -> int:
    """Copy or link the images of a run into one folder a cluster below ``folders``; return how many.

    An image below ``min_confidence`` goes into ``unsure``. The run must have been made from a folder or list of files.
    """
    facts = read_json(run / "run.json") if (run / "run.json").exists() else None
    if facts is None:
        raise InputError(f"{run} holds no finished run", "give the folder of one, such as runs/NAME")
    source = Path(str(facts["options"]["data"]["source"]))
    if not source.exists():
        raise InputError(f"the run was made from {str(source)!r}, which is no folder here", "only files can be sorted")
    names = Classifier.load(run).names
    where = {file.id: file.path for file in find_images(source)}
    rows = pq.read_table(run / "assignments.parquet", columns=["id", "cluster", "confidence"]).to_pylist()
    n_done = 0
    with bar("export", total=len(rows), unit="image") as shown:
        for row in rows:
            name, cluster, sure = row["id"], row["cluster"], row["confidence"]
            target = folders / ("unsure" if sure < min_confidence else names[int(cluster)]) / name.replace("/", "__")
            if name in where:
                _put(Path(where[name]), target, link=link)
                n_done += 1
            shown.advance()
    if n_done < len(rows):
        log.warning("%d images of the run are no longer in %s", len(rows) - n_done, source)
    return n_done


def _put(source: Path, target: Path, *, link: bool) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            target.unlink(missing_ok=True)
            try:
                target.symlink_to(source.resolve())
                return
            except OSError:  # Windows without the right to make links: a hard link, or at last a copy
                log.debug("no symbolic link for %s", target)
        shutil.copyfile(source, target)
    except OSError as error:
        raise storage_error(target, error) from error


def import_checkpoint(path: Path, out: Path, stem: str | None) -> dict[str, object]:
    """Write a published checkpoint as a classifier (it has heads) or as an encoder; return what it was."""
    found = load_published(path, stem=stem)  # type: ignore[arg-type]
    facts: dict[str, object] = {"kind": found.kind, "encoder": asdict(found.encoder.spec), **found.facts}
    size, norm = {"cifar": (32, CIFAR10), "stl": (96, IMAGENET), "imagenet": (224, IMAGENET)}[found.encoder.spec.stem]
    views = Views("plain", size, *norm)
    if found.heads is None:
        save_encoder(out, found.encoder, found.projection)
        return facts | {"written": str(out / "encoder.safetensors")}
    net = ClusterNet(found.encoder, found.heads).only(found.head or 0)
    Classifier(net, views, 256 if size == 224 else size, facts={"imported": path.name, "kind": found.kind}).save(out)
    return facts | {"written": str(out / "model.safetensors")}
