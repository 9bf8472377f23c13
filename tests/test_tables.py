"""Tables of assignments: one content in three formats, streamed, for any name, whole or not there."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from phyla.errors import InputError, StorageError
from phyla.tables import COLUMNS, left_open, stdout_csv, stream_csv, write_assignments, write_columns
from phyla.types import Assignment

ODD = ["a,b.png", 'say "cheese".png', "two\nlines.png", "old\rmac.png", "tab\there.png", "größe/日本.png", " spaces ",
       "", "-1", "=1+1", "'", "\\", "plain.png"]


def assignment(n: int = 5, clusters: int = 4, seed: int = 0, ids: list[str] | None = None) -> Assignment:
    p = np.random.default_rng(seed).dirichlet(np.ones(clusters), n).astype(np.float32)
    return Assignment(p, ids or [f"{seed}/{row:03d}.png" for row in range(n)])


def read(path: Path) -> list[list[str]]:
    """Return a table's rows as text, header first, as the reader of the format gives them."""
    if path.suffix.lower() == ".parquet":
        table = pq.read_table(path)
        rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
        return [table.column_names, *([_text(value) for value in row] for row in rows)]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True))


def _text(value: object) -> str:
    return "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 12])
def test_all_formats_hold_the_same(tmp_path, clusters):
    chunks = [assignment(5, clusters, seed) for seed in range(3)]
    tables = {}
    for suffix in (".csv", ".tsv", ".parquet"):
        assert write_assignments(tmp_path / f"t{suffix}", iter(chunks)) == 15
        tables[suffix] = read(tmp_path / f"t{suffix}")
    assert tables[".csv"] == tables[".tsv"] == tables[".parquet"]
    header, *rows = tables[".csv"]
    assert header == COLUMNS and len(rows) == 15
    for chunk, part in zip(chunks, (rows[:5], rows[5:10], rows[10:]), strict=True):
        order = np.argsort(-chunk.probabilities, axis=1)[:, :3]
        for name, p, ranked, row in zip(chunk.ids, chunk.probabilities, order, part, strict=True):
            expected = [text for cluster in ranked for text in (str(cluster), f"{p[cluster]:.6f}")]
            assert row == [name, *expected, *[""] * (6 - len(expected))]


def test_parquet_has_numbers_and_nothing_where_there_is_nothing(tmp_path):
    chunk = assignment(3, 2)
    write_assignments(tmp_path / "t.parquet", [chunk])
    table = pq.read_table(tmp_path / "t.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", *["int64", "float"] * 3]
    assert table["third"].null_count == table["third_probability"].null_count == 3
    np.testing.assert_array_equal(table["confidence"].to_numpy(), chunk.confidence)
    np.testing.assert_array_equal(table["cluster"].to_numpy(), chunk.labels)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".CSV"])
def test_any_name_comes_back_as_it_was(tmp_path, suffix):
    write_assignments(tmp_path / f"t{suffix}", [assignment(len(ODD), 3, ids=ODD)])
    assert [row[0] for row in read(tmp_path / f"t{suffix}")[1:]] == ODD


def test_text_ends_lines_alike_on_every_system_and_names_stay_readable(tmp_path):
    write_assignments(tmp_path / "t.csv", [assignment(2, 3, ids=["größe", "b"])])
    data = (tmp_path / "t.csv").read_bytes()
    assert b"\r" not in data and data.count(b"\n") == 3 and data.endswith(b"\n")
    assert data.decode().splitlines()[1].startswith("größe,"), "quoted only where it must be"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_chunks_are_written_as_they_come(tmp_path, suffix):
    alive = []

    def chunks() -> Iterator[Assignment]:
        for seed in range(4):
            partial = list(tmp_path.glob(".*.part"))
            assert len(partial) == 1 and not (tmp_path / f"t{suffix}").exists()
            alive.append(partial[0].stat().st_size)
            yield assignment(3000, 5, seed)

    assert write_assignments(tmp_path / f"t{suffix}", chunks()) == 12_000
    assert alive == sorted(alive) and alive[-1] > 60_000, "what was given is on disk, not in memory"
    assert [path.name for path in tmp_path.iterdir()] == [f"t{suffix}"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_no_chunk_gives_a_table_without_rows(tmp_path, suffix):
    assert write_assignments(tmp_path / f"t{suffix}", []) == 0
    assert read(tmp_path / f"t{suffix}") == [COLUMNS]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_failure_midway_leaves_what_was_there(tmp_path, suffix):
    def broken() -> Iterator[Assignment]:
        yield assignment()
        raise RuntimeError("the network went away")

    path = tmp_path / f"t{suffix}"
    with pytest.raises(RuntimeError, match="went away"):
        write_assignments(path, broken())
    assert not list(tmp_path.iterdir())
    write_assignments(path, [assignment()])
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="went away"):
        write_assignments(path, broken())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["t.xlsx", "t", "t.csv.gz", ".csv"])
def test_other_endings_are_refused_before_any_work(tmp_path, name):
    def never() -> Iterator[Assignment]:
        raise AssertionError("nothing may be computed")
        yield

    with pytest.raises(InputError, match=r"cannot write a table to .* hint: end the name in .csv, .tsv or .parquet"):
        write_assignments(tmp_path / name, never())
    assert not list(tmp_path.iterdir())


def test_folders_are_made_and_a_place_that_cannot_be_is_one_clear_line(tmp_path):
    assert write_assignments(str(tmp_path / "new" / "folder" / "t.csv"), [assignment()]) == 5
    with pytest.raises(StorageError, match="cannot write"):
        write_assignments(tmp_path / "new" / "folder" / "t.csv" / "below.csv", [assignment()])


def test_text_and_standard_output_hold_the_same(capfd, monkeypatch):
    chunk = assignment(len(ODD), 3, ids=ODD)
    out = io.StringIO()
    stream_csv(out, [chunk])
    text = out.getvalue()
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))][1:] == ODD
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as terminal:  # one that cannot spell every name
        monkeypatch.setattr(sys, "stdout", terminal)
        terminal.write("before\n")
        assert stdout_csv([chunk]) == len(ODD)
        terminal.write("after\n")
        terminal.flush()
        assert terminal.buffer.getvalue().decode() == f"before\n{text}after\n"


def test_another_delimiter_is_the_one_that_is_quoted():
    out = io.StringIO()
    stream_csv(out, [assignment(2, 1, ids=["a;b", "c,d"])], delimiter=";")
    assert [line.split(";1")[0] for line in out.getvalue().split("\n")[1:3]] == ['"a;b";0', "c,d;0"]


def test_columns_of_any_kind_are_written_and_what_is_not_known_is_empty(tmp_path):
    write_columns(tmp_path / "new" / "a.csv", {
        "id": ODD[:3], "group": [None, 0, 12], "score": [1.0, float("nan"), 1 / 3], "odd": [True, False, True]})
    assert read(tmp_path / "new" / "a.csv") == [
        ["id", "group", "score", "odd"], [ODD[0], "", "1", "true"], [ODD[1], "0", "", "false"],
        [ODD[2], "12", "0.333333", "true"]]
    with pytest.raises(ValueError, match="shorter"):
        write_columns(tmp_path / "b.csv", {"id": ["a", "b"], "score": [1.0]})
    assert not (tmp_path / "b.csv").exists()


def test_what_is_below_the_least_confidence_is_in_no_cluster_and_keeps_what_it_might_be(tmp_path):
    p = np.array([[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.9, 0.1, 0.0]], np.float32)
    whole = Assignment(p, ["a", "b", "c"])
    write_assignments(tmp_path / "t.csv", [left_open(whole, 0.5)])
    assert read(tmp_path / "t.csv")[1:] == [
        ["a", "0", "0.500000", "1", "0.300000", "2", "0.100000"],
        ["b", "-1", "0.400000", "3", "0.400000", "2", "0.300000"],
        ["c", "1", "0.900000", "2", "0.100000", "0", "0.000000"]]
    assert left_open(whole, 0) is whole
    for least in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="min_confidence must be from 0 to 1"):
            left_open(whole, least)


@pytest.mark.parametrize("clusters", [1, 2])
def test_of_few_clusters_the_unsure_keep_the_first(clusters):
    found = left_open(Assignment(np.full((2, clusters), 1 / clusters, np.float32), ["a", "b"]), 1.0)
    numbers, shares = found.top(3)
    assert numbers.tolist() == [[[0], [-1, 0]][clusters - 1]] * 2
    assert shares.tolist() == [[[1.0], [0.5, 0.5]][clusters - 1]] * 2
