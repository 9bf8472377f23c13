"""A finished run as one Parquet table for other tools: a row an image, with all that the run knows of it.

DuckDB asks it questions, FiftyOne and Embedding Atlas show it; the columns are those that they look for. It is written
block by block, from files that are not read whole, so that any number of images fits.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from phyla import __version__
from phyla.errors import CorruptFileError, InputError
from phyla.images.catalog import data_set_name
from phyla.images.folders import find_images
from phyla.progress import bar
from phyla.report.measures import MAP_LIMIT, lay_out
from phyla.rundir import load_neighbors
from phyla.storage import atomic, read_json
from phyla.tables import COLUMNS, UNSURE, UNSURE_CLUSTER
from phyla.types import Neighbors

log = logging.getLogger("phyla")

N_NEIGHBORS = 20
"""Neighbors an image in the table, at most."""

ODD = {"outlier_score": pa.float32(), "outlier": pa.bool_(), "duplicate_group": pa.int64(),
       "identical_group": pa.int64(), "hint": pa.string(), "agreement": pa.float32()}
"""Columns of oddities.csv that are in the table."""

_BLOCK = 8192  # rows written together
_NEAREST = 5  # images on the map among which another image is put


def export_parquet(run: Path, out: Path, *, embeddings: bool = False) -> int:
    """Write what a run knows of each of its images to ``out``, whole or not at all; return how many images.

    The columns are those of assignments.parquet, ``path`` (absolute; null unless the run was made from files), ``name``
    of the cluster, what the report found odd (``ODD``), ``x`` and ``y`` (the map of the report), and ``neighbors``:
    ``ids``, rows of this table from 0, with their cosine ``distances``.

    Parameters
    ----------
    embeddings : add ``embedding``, a list of float32 of one size, what the encoder makes of the image

    Raises
    ------
    InputError
        There is no finished run, or ``out`` does not end in .parquet.
    CorruptFileError
        A file of the run is damaged.
    """
    if out.suffix.lower() != ".parquet":
        raise InputError(f"cannot write a Parquet table to {out.name!r}", "end the name in .parquet")
    held = _held(run)
    with atomic(out) as temporary, bar("export", total=len(held.table), unit="image") as shown:
        temporary.touch()  # told now rather than after the work, if it cannot be
        schema, places = _schema(held, embeddings=embeddings), _places(held.embeddings)
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(held.table), _BLOCK):
                block = _block(held, places, start, embeddings=embeddings)
                writer.write_table(pa.Table.from_pydict(block, schema))
                shown.advance(min(_BLOCK, len(held.table) - start))
    return len(held.table)


@dataclass(frozen=True, eq=False)
class _Held:
    """What a run folder holds of its images, rows in one order."""

    table: pa.Table
    odd: pa.Table
    names: list[str]
    paths: dict[str, str]
    embeddings: np.ndarray
    neighbors: Neighbors | None
    about: dict[str, str]


def _held(run: Path) -> _Held:
    table = run / "assignments.parquet"
    if not (run / "run.json").exists() or not table.exists():
        raise InputError(f"{run} holds no finished run", "give the folder of one, such as runs/NAME")
    facts, path = read_json(run / "run.json"), run / "embeddings.npy"
    with _at_the_top(path):
        values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    rows: pa.Table = pq.read_table(table)
    source = str(facts["options"]["data"]["source"])
    if len(values) != rows.num_rows:
        raise InputError(f"{path} holds {len(values)} rows and the table {rows.num_rows}",
                         f"bring the run up to date: phyla run {run}")
    names = [str(name) for name in read_json(run / "model.json")["names"]]
    about = {"phyla": __version__, "source": source, "names": json.dumps(names, ensure_ascii=False)}
    ids = rows["id"].combine_chunks()
    paths = _paths(source, ids.to_pylist())
    return _Held(rows, _oddities(run, ids), names, paths, values, _neighbors(run, facts), about)


@contextmanager
def _at_the_top(path: Path) -> Iterator[None]:
    """Turn what a damaged file at the top of a run folder raises into one line: its stage still has it."""
    try:
        yield
    except (ValueError, EOFError, OSError) as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise CorruptFileError(f"{path} cannot be read ({told})",
                               f"delete it and bring the run up to date: phyla run {path.parent}") from error


def _oddities(run: Path, ids: pa.Array) -> pa.Table:
    """Return what the report found odd about each image: the columns of ``ODD``, null where it is not known."""
    path = run / "oddities.csv"
    if path.exists():
        options = csv.ConvertOptions(column_types={"id": pa.string()} | ODD, include_columns=["id", *ODD],
                                     include_missing_columns=True, strings_can_be_null=True, null_values=[""],
                                     quoted_strings_can_be_null=False)
        with _at_the_top(path):
            table = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=options)
        if table["id"].combine_chunks().equals(ids):
            return table.select(list(ODD))
        log.warning("%s is of other images: it was left out", path)
    return pa.table({name: pa.nulls(len(ids), kind) for name, kind in ODD.items()})


def _paths(source: str, ids: list[str]) -> dict[str, str]:
    """Return the absolute path of each image that is a file and still there."""
    if data_set_name(source) is not None or Path(source).suffix.lower() in (".npy", ".npz"):
        return {}
    if not Path(source).exists():
        log.warning("%s is no longer there: the table has no paths", source)
        return {}
    found = {file.id: str(Path(file.path).absolute()) for file in find_images(source)}
    if missing := sum(name not in found for name in ids):
        log.warning("%d images of the run are no longer in %s", missing, source)
    return found


def _neighbors(run: Path, facts: dict[str, object]) -> Neighbors | None:
    stages = facts.get("stages")
    made = stages.get("neighbors") if isinstance(stages, dict) else None
    folder = run / "stages" / f"neighbors-{made['key'][:10]}" if made else run
    if not (folder / "train.similarities.npy").exists():
        log.warning("%s has no neighbors: that column is empty", run)
        return None
    return load_neighbors(folder, "train")


# ── the map ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _places(embeddings: np.ndarray) -> np.ndarray:
    """Return the place of each image on the report's map, float32 (n, 2), each axis from 0 to 1.

    The map is of 3,000 images at most. Any other is put among the five of these that are most like it, the nearer to
    one the more it is like it.
    """
    rows, points, _ = lay_out(embeddings, limit=MAP_LIMIT)
    places = np.empty((len(embeddings), 2), np.float32)
    shown = _unit_rows(embeddings[rows])
    others = np.setdiff1d(np.arange(len(embeddings)), rows)
    for start in range(0, len(others), _BLOCK):
        block = others[start : start + _BLOCK]
        alike = _unit_rows(embeddings[block]) @ shown.T
        nearest = np.argpartition(-alike, min(_NEAREST, len(rows)) - 1, axis=1)[:, :_NEAREST]
        weights = 1 / np.maximum(1 - np.take_along_axis(alike, nearest, axis=1), 1e-4)
        places[block] = (weights[..., None] * points[nearest]).sum(axis=1) / weights.sum(axis=1, keepdims=True)
    places[rows] = points
    return places


def _unit_rows(values: np.ndarray) -> np.ndarray:
    rows = np.asarray(values, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _schema(held: _Held, *, embeddings: bool) -> pa.Schema:
    near = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])
    told = [(name, held.table.schema.field(name).type) for name in COLUMNS]
    columns = [told[0], ("path", pa.string()), told[1], ("name", pa.string()), *told[2:], *ODD.items(),
               ("x", pa.float32()), ("y", pa.float32()), ("neighbors", near)]
    if embeddings:
        columns.append(("embedding", pa.list_(pa.float32(), held.embeddings.shape[1])))
    return pa.schema(columns, metadata=held.about)


def _block(held: _Held, places: np.ndarray, start: int, *, embeddings: bool) -> dict[str, object]:
    told = held.table.slice(start, _BLOCK)
    rows = slice(start, start + len(told))
    block: dict[str, object] = {name: told[name].combine_chunks() for name in COLUMNS}
    block |= {name: held.odd[name].slice(start, len(told)).combine_chunks() for name in ODD}
    block["path"] = [held.paths.get(name) for name in told["id"].to_pylist()]
    block["name"] = [UNSURE if cluster == UNSURE_CLUSTER else held.names[cluster]
                     for cluster in told["cluster"].to_pylist()]
    block["x"], block["y"] = places[rows, 0], places[rows, 1]
    block["neighbors"] = _near(held.neighbors, rows)
    if embeddings:
        values = np.ascontiguousarray(held.embeddings[rows], dtype=np.float32)
        block["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return block


def _near(neighbors: Neighbors | None, rows: slice) -> object:
    if neighbors is None:
        return [None] * (rows.stop - rows.start)
    ids, similar = neighbors.indices[rows, :N_NEIGHBORS], neighbors.similarities[rows, :N_NEIGHBORS]
    ends = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * ids.shape[1])
    far = np.maximum(1 - similar.astype(np.float32), 0)
    columns = [pa.ListArray.from_arrays(ends, pa.array(values.ravel())) for values in (ids, far)]
    return pa.StructArray.from_arrays(columns, ["ids", "distances"])
