"""New images, any number of them, labelled shard by shard, and the shards joined into one table and one array.

A kill costs the shard it fell into, and several machines that see the same folders can share the shards; the result is
the same file, byte for byte. Memory holds a shard, and forty bytes a file name.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import numpy as np

from phyla.classifier import Classifier, Output
from phyla.embed import device_of, weights_fingerprint
from phyla.errors import InputError
from phyla.images.folders import report_skipped, walk
from phyla.images.gather import DECODING
from phyla.images.stored import FileList, files_fingerprint
from phyla.progress import Bar, bar
from phyla.shards import SHARD, Shards, work_folder
from phyla.storage import atomic, claimed
from phyla.tables import N_TOP, Ranked, checked_confidence, left_open, table_suffix, write_assignments
from phyla.training.agreement import by_first
from phyla.training.device import Device

log = logging.getLogger("phyla")

CHUNK = 256  # images a forward pass; divides a shard

Share = tuple[int, int]


def share_from(text: str) -> Share:
    """Return what "2/8", the second of eight workers, stands for: (1, 8)."""
    first, _, n = text.partition("/")
    if not (first.isdecimal() and n.isdecimal() and 1 <= int(first) <= int(n)):
        raise InputError(f"--shard {text} is no share of the work", "--shard 1/8 to --shard 8/8, for eight workers")
    return int(first) - 1, int(n)


def label_files(classifier: Classifier, images: Path, out: Path | None, *, embeddings: Path | None = None,
                device: Device | None = None, strict: bool = False, share: Share | None = None,
                min_confidence: float = 0.0) -> dict[str, object]:
    """Write what ``classifier`` makes of the images of a folder, list or file; return counts, None for what others do.

    Parameters
    ----------
    out : a .csv, .tsv or .parquet file: the table of labels
    embeddings : a .npy file: float32 (n, d), what the head sees, in the order of the table; their ids are in
        NAME.ids.json beside it
    device : the processes of its group deal the shards out among themselves, and the first one joins them
    share : (i, n): make only the shards of worker i of n, from 0, and join them if they are the last; None: all
    min_confidence : images below it are put into no cluster (``left_open``)

    Raises
    ------
    InputError
        There is no image, or not one that can be read; or other workers are at something else.
    """
    target, min_confidence = _target(out, embeddings), checked_confidence(min_confidence)
    device = device or device_of(classifier.net)
    files = FileList(walk(images))
    shards = _shards(classifier, files, target, device, with_embeddings=embeddings is not None)
    group = device.group
    by_first(group, lambda: shards.begin(shared=share is not None))
    first, n = share or (0, 1)
    made = _fill(shards, classifier, files, (first + n * group.rank, n * group.size), device.alone, strict=strict,
                 embeddings=embeddings is not None)
    group.wait()
    told: dict[str, object] = {"labelled": None, "skipped": None, "out": str(out) if out else None}
    if embeddings is not None:
        told["embeddings"] = str(embeddings)
    if group.is_first:
        with claimed(target.with_name(f".{target.name}.lock")):
            if missing := len(shards.missing()):
                if share is None:
                    raise InputError(f"{missing} of {len(shards)} shards in {shards.folder} have gone",
                                     "let one command at a time write a table, or share it with --shard")
                if shards.folder.exists():
                    log.info("%d of %d shards are there; whoever makes the last one writes the result",
                             len(shards) - missing, len(shards))
                return told  # else another worker has joined them while this one waited
            told |= _join(shards, files, images, out, embeddings, strict=strict, made=made,
                          min_confidence=min_confidence)
    return told


def _target(out: Path | None, embeddings: Path | None) -> Path:
    if out is not None:
        table_suffix(out)
    if embeddings is not None and embeddings.suffix != ".npy":
        raise InputError(f"cannot write embeddings to {embeddings.name!r}", "end the name in .npy")
    target = out or embeddings
    if target is None:
        raise InputError("shards need a file to become", "give --out or --embeddings")
    return target


def _shards(classifier: Classifier, files: FileList, target: Path, device: Device, *,
            with_embeddings: bool) -> Shards:
    what = {"classifier": weights_fingerprint(classifier.net), "views": asdict(classifier.views.plain()),
            "size": classifier.size, "decoding": DECODING, "precision": device.precision,
            "embeddings": with_embeddings}
    # By shard, so that a file that was mended costs its own shard alone.
    keys = [files_fingerprint(files[at : at + SHARD]) for at in range(0, len(files), SHARD)]
    return Shards(work_folder(target), len(files), what=what, keys=keys, size=SHARD)


# ── shards ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fill(shards: Shards, classifier: Classifier, files: FileList, share: Share, device: Device, *, strict: bool,
          embeddings: bool) -> set[int]:
    """Make the shards of ``share`` that are missing, and return which these were."""
    missing = shards.missing(share)
    own = range(share[0], len(shards), share[1])
    total, todo = (sum(len(shards.span(shard)) for shard in some) for some in (own, missing))
    if todo < total:
        log.info("predict goes on: %d of %d images are done", total - todo, total)
    if not missing:
        return set()
    wanted = chain.from_iterable(files[span.start : span.stop] for span in map(shards.span, missing))
    outputs = classifier.output_stream(wanted, device=device, chunk=CHUNK, strict=strict, embeddings=embeddings)
    with bar("predict", total=total, unit="image", done=total - todo) as shown:
        for shard in missing:
            n_chunks = -(-len(shards.span(shard)) // CHUNK)
            shards.write(shard, **_packed(_counted(islice(outputs, n_chunks), shown)))
    return set(missing)


def _counted(outputs: Iterator[Output], shown: Bar) -> Iterator[Output]:
    for made in outputs:
        yield made
        shown.advance(len(made.ids) + len(made.skipped))


def _packed(outputs: Iterator[Output]) -> dict[str, np.ndarray]:
    """Return a shard's arrays: the best clusters and, where there are, embeddings of its readable files in order."""
    clusters, probabilities, embeddings = [], [], []
    skipped: list[tuple[str, str]] = []
    for made in outputs:
        order = np.argsort(-made.probabilities, axis=1, kind="stable")[:, :N_TOP]
        clusters.append(order.astype(np.int64))
        probabilities.append(np.take_along_axis(made.probabilities, order, axis=1))
        skipped += made.skipped
        if made.embeddings is not None:
            embeddings.append(made.embeddings)
    arrays = {"clusters": np.concatenate(clusters), "probabilities": np.concatenate(probabilities),
              "skipped": np.frombuffer(json.dumps(skipped).encode(), np.uint8)}
    return arrays | ({"embeddings": np.concatenate(embeddings)} if embeddings else {})


# ── joining ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _join(shards: Shards, files: FileList, images: Path, out: Path | None, embeddings: Path | None, *, strict: bool,
          made: set[int], min_confidence: float) -> dict[str, object]:
    n_skipped, n_rows = 0, 0
    for shard in range(len(shards)):
        skipped = _skipped(shards, shard)
        n_skipped += len(skipped)
        if strict or shard not in made:  # the others were named when they were met
            report_skipped(skipped, strict=strict)
    if n_skipped == len(files):
        shards.remove()
        raise InputError(f"none of the {len(files)} images of {images} can be read",
                         "check that they open in an image viewer")
    if embeddings is not None:
        _write_embeddings(embeddings, shards, lambda: _ranked(shards, files))
    if out is not None:
        write_assignments(out, (left_open(chunk, min_confidence) for chunk in _ranked(shards, files)))
    n_rows = len(files) - n_skipped
    shards.remove()
    return {"labelled": n_rows, "skipped": n_skipped}


def _skipped(shards: Shards, shard: int) -> list[tuple[str, str]]:
    held = shards.read(shard, "skipped")["skipped"]
    return [(str(name), str(why)) for name, why in json.loads(held.tobytes() or b"[]")]


def _ranked(shards: Shards, files: FileList) -> Iterator[Ranked]:
    for shard in range(len(shards)):
        held, left_out = shards.read(shard, "clusters", "probabilities"), {name for name, _ in _skipped(shards, shard)}
        span = shards.span(shard)
        ids = [file.id for file in files[span.start : span.stop] if file.id not in left_out]
        yield Ranked(ids, held["clusters"], held["probabilities"])


def _write_embeddings(path: Path, shards: Shards, ranked: Callable[[], Iterator[Ranked]]) -> None:
    """Write NAME.npy, float32 (n, d), and NAME.ids.json, a shard at a time."""
    names, n_rows = path.with_name(f"{path.stem}.ids.json"), 0
    with atomic(names) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        out.write("[")
        for chunk in ranked():
            out.writelines(f"{', ' if n_rows + i else ''}{json.dumps(name)}" for i, name in enumerate(chunk.ids))
            n_rows += len(chunk)
        out.write("]")
    width = None
    with atomic(path) as temporary, temporary.open("wb") as raw:
        for shard in range(len(shards)):
            values = shards.read(shard).get("embeddings")
            if values is None or not len(values):
                continue  # not one of its files could be read
            if width is None:
                width = values.shape[1]
                header: Mapping[str, object] = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, width)}
                np.lib.format.write_array_header_1_0(raw, dict(header))
            raw.write(np.ascontiguousarray(values, dtype="<f4").data)
