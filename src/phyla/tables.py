"""Assignments as tables: one row an image, CSV or Parquet, written as a stream so that any number of images fits."""

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phyla.errors import InputError
from phyla.storage import atomic
from phyla.types import Assignment

N_TOP = 3
COLUMNS = ["id", "cluster", "confidence", "second", "second_probability", "third", "third_probability"]
FORMATS = (".csv", ".tsv", ".parquet")
UNSURE, UNSURE_CLUSTER = "unsure", -1
"""What an image is called, and the cluster it is given, that is put into none because its confidence is too low."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """What a table says of some images: their ``N_TOP`` most probable clusters, fewer where there are not so many.

    Parameters
    ----------
    ids : one an image
    clusters : int64 (n_images, n_top), the most probable first
    probabilities : float32 (n_images, n_top)
    """

    ids: Sequence[str]
    clusters: np.ndarray
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def top(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first ``n`` clusters and probabilities."""
        return self.clusters[:, :n], self.probabilities[:, :n]


Rows = Assignment | Ranked


def checked_confidence(least: float) -> float:
    """Return ``least``; InputError where it is no confidence, 0 to 1."""
    if not 0 <= least <= 1:
        raise InputError(f"min_confidence must be from 0 to 1, got {least}")
    return least


def left_open(rows: Rows, min_confidence: float) -> Rows:
    """Return ``rows``, those below ``min_confidence`` in no cluster: -1, with the clusters that come first as the next.

    So "cluster" is -1, "confidence" stays the largest probability, and "second" and "third" are, as in every row, the
    most probable clusters besides "cluster".

    Raises
    ------
    InputError
        ``min_confidence`` is not from 0 to 1.
    """
    if checked_confidence(min_confidence) == 0:
        return rows
    clusters, probabilities = rows.top(N_TOP)
    unsure = probabilities[:, :1] < min_confidence
    lower = np.concatenate([np.full_like(clusters[:, :1], UNSURE_CLUSTER), clusters[:, :-1]], axis=1)
    less = np.concatenate([probabilities[:, :1], probabilities[:, :-1]], axis=1)
    return Ranked(rows.ids, np.where(unsure, lower, clusters), np.where(unsure, less, probabilities))


def table_suffix(path: Path | str) -> str:
    """Return the ending of a table's name; InputError where it is none that can be written."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write a table to {path.name!r}", "end the name in .csv, .tsv or .parquet")
    return path.suffix.lower()


def write_assignments(path: Path | str, chunks: Iterable[Rows]) -> int:
    """Write ``chunks`` to a .csv, .tsv or .parquet file, whole or not at all, and return the number of rows."""
    suffix = table_suffix(path)
    with atomic(path) as temporary:
        if suffix == ".parquet":
            return _parquet(temporary, chunks)
        with temporary.open("w", encoding="utf-8", newline="") as out:
            return stream_csv(out, chunks, delimiter="\t" if suffix == ".tsv" else ",")


def stream_csv(out: io.TextIOBase, chunks: Iterable[Rows], *, delimiter: str = ",") -> int:
    """Write a header and one row an image to an open text file; return the number of rows."""
    out.write(delimiter.join(COLUMNS) + "\n")
    n_rows = 0
    for chunk in chunks:
        out.writelines(delimiter.join([_quoted(name, delimiter), *numbers]) + "\n" for name, numbers in _rows(chunk))
        n_rows += len(chunk)
    return n_rows


def stdout_csv(chunks: Iterable[Rows]) -> int:
    """Write CSV to standard output as UTF-8, whatever the terminal's encoding."""
    sys.stdout.flush()
    out = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="", write_through=True)
    try:
        return stream_csv(out, chunks)
    finally:
        out.detach()


def write_columns(path: Path | str, columns: Mapping[str, Sequence[object]]) -> None:
    """Write columns of equal length as CSV, whole or not at all; None and NaN are empty cells."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        out.write(",".join(columns) + "\n")
        out.writelines(",".join(map(_cell, row)) + "\n" for row in zip(*columns.values(), strict=True))


def _cell(value: object) -> str:
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else _quoted(str(value), ",")


def _rows(chunk: Rows) -> Iterator[tuple[str, list[str]]]:
    clusters, probabilities = chunk.top(N_TOP)
    for name, found, sure in zip(chunk.ids, clusters, probabilities, strict=True):
        numbers = []
        for rank in range(N_TOP):
            numbers += [str(found[rank]), f"{sure[rank]:.6f}"] if rank < len(found) else ["", ""]
        yield name, numbers


def _quoted(name: str, delimiter: str) -> str:
    # The csv module leaves a carriage return bare where lines end in a newline alone, and its reader then splits there.
    if any(mark in name for mark in (delimiter, '"', "\n", "\r")):
        return '"' + name.replace('"', '""') + '"'
    return name


def _parquet(path: Path, chunks: Iterable[Rows]) -> int:
    kinds = [pa.string()] + [pa.int64(), pa.float32()] * N_TOP
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    n_rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        for chunk in chunks:
            clusters, probabilities = chunk.top(N_TOP)
            columns: list[object] = [list(chunk.ids)]
            for rank in range(N_TOP):
                there = rank < clusters.shape[1]
                columns += [clusters[:, rank], probabilities[:, rank]] if there else [[None] * len(chunk)] * 2
            arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            n_rows += len(chunk)
    return n_rows
