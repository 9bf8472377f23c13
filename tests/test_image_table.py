"""The Parquet table of a run: what its other files say, in the columns and types that other tools look for."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import N_DIGITS, N_PICTURES, digits_run, pictures_run
from phyla import image_table
from phyla.errors import CorruptFileError, InputError, StorageError
from phyla.image_table import ODD, export_parquet
from phyla.report.measures import EmbeddingMap
from phyla.tables import COLUMNS
from phyla.types import Assignment

LONE = ["id", "path", "cluster", "name", "confidence", "second", "second_probability", "third", "third_probability",
        *ODD, "x", "y", "neighbors"]


@pytest.fixture
def made(tmp_path, tmp_path_factory):
    """Return a finished run on pictures, their folder, and where a table goes."""
    return *pictures_run(tmp_path_factory, tmp_path), tmp_path / "new" / "images.parquet"


def test_what_the_run_says_is_in_the_table(made):
    run, photos, out = made
    assert export_parquet(run, out) == N_PICTURES
    table, held = pq.read_table(out), pq.read_table(run / "assignments.parquet")
    assert table.column_names == LONE and table.select(COLUMNS).equals(held)
    assert [path.name for path in out.parent.iterdir()] == ["images.parquet"]
    assert table["outlier"].null_count == table["outlier_score"].null_count == 0  # as the report leaves them
    for row in table.to_pylist():
        assert row["path"] == str((photos / row["id"]).absolute()) and row["name"] == f"cluster {row['cluster']}"
    told = json.loads(table.schema.metadata[b"names"])
    assert told == ["cluster 0", "cluster 1", "cluster 2"] and table.schema.metadata[b"source"] == str(photos).encode()


def test_an_image_in_no_cluster_is_called_unsure(made):
    run, _, out = made
    held = pq.read_table(run / "assignments.parquet")
    pq.write_table(held.set_column(1, "cluster", [[-1, *held["cluster"].to_pylist()[1:]]]), run / "assignments.parquet")
    export_parquet(run, out)
    assert [i for i, name in enumerate(pq.read_table(out)["name"].to_pylist()) if name == "unsure"] == [0]


def test_the_map_is_that_of_the_report(made):
    run, _, out = made
    export_parquet(run, out)
    held = pq.read_table(run / "assignments.parquet")
    assignment = Assignment(np.eye(3, dtype=np.float32)[held["cluster"].to_numpy()], held["id"].to_pylist())
    layout = EmbeddingMap.of(np.load(run / "embeddings.npy"), assignment)
    table = pq.read_table(out)
    np.testing.assert_allclose(np.stack([table["x"], table["y"]], axis=1), layout.points, rtol=1e-6)


def test_images_beyond_the_map_are_put_among_those_like_them(made, monkeypatch):
    run, _, out = made
    monkeypatch.setattr(image_table, "MAP_LIMIT", 20)
    values = np.load(run / "embeddings.npy")
    rows, points, _ = image_table.lay_out(values, limit=20)
    other = np.setdiff1d(np.arange(len(values)), rows)[0]
    values[other] = 2 * values[rows[7]]  # the same direction
    np.save(run / "embeddings.npy", values)
    export_parquet(run, out)
    table = pq.read_table(out)
    places = np.stack([table["x"], table["y"]], axis=1)
    np.testing.assert_allclose(places[rows], points, rtol=1e-6)
    assert np.abs(places[other] - points[7]).max() < 0.1 and places.min() >= 0 and places.max() <= 1


def test_neighbors_are_rows_of_the_table_and_distances(made):
    run, _, out = made
    export_parquet(run, out)
    table, (folder,) = pq.read_table(out), run.glob("stages/neighbors-*")
    indices, similar = np.load(folder / "train.npy"), np.load(folder / "train.similarities.npy")
    for row, near in enumerate(table["neighbors"].to_pylist()):
        assert near["ids"] == indices[row, :20].tolist()
        np.testing.assert_allclose(near["distances"], 1 - similar[row, :20], atol=1e-6)
    assert table.schema.field("neighbors").type == pa.struct(
        [("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])


def test_embeddings_are_a_column_of_one_size(made):
    run, _, out = made
    export_parquet(run, out, embeddings=True)
    table, values = pq.read_table(out), np.load(run / "embeddings.npy")
    assert table.column_names == [*LONE, "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), values.shape[1])
    np.testing.assert_array_equal(np.stack(table["embedding"].to_pylist()), values)


def test_what_the_report_found_odd_is_in_the_table(made, caplog):
    run, _, out = made
    ids = pq.read_table(run / "assignments.parquet")["id"].to_pylist()
    rows = [f'"{name}",{1 + row / 10},{"true" if row == 3 else "false"},{row // 2 if row < 4 else ""},,'
            f'{"blurred" if row == 5 else ""},7.5,9.25' for row, name in enumerate(ids)]
    path = run / "oddities.csv"
    header = "id,outlier_score,outlier,duplicate_group,identical_group,hint,brightness,unknown"
    path.write_text("\n".join([header, *rows]))
    export_parquet(run, out)
    table = pq.read_table(out)
    assert [table.schema.field(name).type for name in ODD] == list(ODD.values())
    np.testing.assert_allclose(table["outlier_score"], 1 + np.arange(N_PICTURES) / 10, rtol=1e-6)
    assert np.flatnonzero(table["outlier"]).tolist() == [3]
    assert table["duplicate_group"].to_pylist()[:5] == [0, 0, 1, 1, None]
    assert table["identical_group"].null_count == table["agreement"].null_count == N_PICTURES
    assert table["hint"].to_pylist() == [None] * 5 + ["blurred"] + [None] * (N_PICTURES - 6)
    path.write_text(f"id,outlier\n{ids[0]},true\n")
    with caplog.at_level(logging.WARNING, "phyla"):
        export_parquet(run, out)
    assert "oddities.csv is of other images" in caplog.text
    assert pq.read_table(out)["outlier"].null_count == N_PICTURES
    path.write_text(f"id,outlier\n{ids[0]},perhaps\n")
    with pytest.raises(CorruptFileError, match=r"oddities.csv cannot be read.*delete it"):
        export_parquet(run, out)
    path.unlink()
    export_parquet(run, out)
    assert pq.read_table(out)["outlier"].null_count == N_PICTURES


def test_it_is_written_in_blocks(made, monkeypatch):
    run, _, out = made
    export_parquet(run, out, embeddings=True)
    whole = pq.read_table(out)
    monkeypatch.setattr(image_table, "_BLOCK", 7)
    export_parquet(run, out, embeddings=True)
    assert pq.ParquetFile(out).num_row_groups == -(-N_PICTURES // 7) and pq.read_table(out).equals(whole)


def test_images_that_are_no_files_have_no_path(tmp_path, tmp_path_factory):
    run, out = digits_run(tmp_path_factory, tmp_path), tmp_path / "digits.parquet"
    assert export_parquet(run, out) == N_DIGITS
    table = pq.read_table(out)
    assert table["path"].null_count == N_DIGITS and table.schema.field("path").type == pa.string()


def test_what_has_gone_is_told_and_left_empty(made, caplog):
    run, photos, out = made
    told = json.loads((run / "run.json").read_text())
    told["options"]["data"]["source"] = str(photos) + "-gone"
    (run / "run.json").write_text(json.dumps(told))
    (folder,) = run.glob("stages/neighbors-*")
    (folder / "train.similarities.npy").unlink()
    with caplog.at_level(logging.WARNING, "phyla"):
        export_parquet(run, out)
    assert "photos-gone is no longer there: the table has no paths" in caplog.text
    assert "has no neighbors: that column is empty" in caplog.text
    table = pq.read_table(out)
    assert table["path"].null_count == table["neighbors"].null_count == N_PICTURES


def test_what_cannot_be_is_one_line(made, tmp_path):
    run, _, out = made
    with pytest.raises(InputError, match=r"cannot write a Parquet table to 'a.csv'.*\.parquet"):
        export_parquet(run, tmp_path / "a.csv")
    with pytest.raises(InputError, match="holds no finished run"):
        export_parquet(tmp_path, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="its folder is a file"):
        export_parquet(run, tmp_path / "file" / "a.parquet")
    values = np.load(run / "embeddings.npy")
    np.save(run / "embeddings.npy", values[1:])
    with pytest.raises(InputError, match=rf"holds {N_PICTURES - 1} rows and the table {N_PICTURES}.*phyla run"):
        export_parquet(run, out)
    (run / "embeddings.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CorruptFileError, match=r"embeddings.npy cannot be read.*delete it and bring the run up"):
        export_parquet(run, out)
    assert not out.exists()
