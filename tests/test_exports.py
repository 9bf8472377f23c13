"""What a run is shipped as: several things in one command, and no option that would do nothing."""

from pathlib import Path

import pytest

from commands import N_PICTURES, pictures_run
from phyla import exports
from phyla.errors import InputError
from phyla.exports import export_run
from phyla.onnx_file import OnnxFile


def test_everything_asked_for_is_written_and_told(tmp_path, tmp_path_factory, monkeypatch):
    run, _ = pictures_run(tmp_path_factory, tmp_path)
    network = tmp_path / "net.onnx"
    monkeypatch.setattr(exports, "export_onnx", lambda run, path: OnnxFile(path, 2_340_000, 1.2e-7, 8))
    told = export_run(run, onnx=network, parquet=tmp_path / "t.parquet", folders=tmp_path / "sorted")
    assert told == [f"{N_PICTURES} images in {tmp_path / 'sorted'}", f"{N_PICTURES} images in {tmp_path / 't.parquet'}",
                    f"classifier of 2.3 MB in {network}, probabilities within 1e-07 of torch's on 8 images"]
    assert (tmp_path / "t.parquet").exists() and len(list((tmp_path / "sorted").rglob("*.jpg"))) == N_PICTURES
    assert export_run(run, onnx=network) == told[2:]


@pytest.mark.parametrize(("options", "match"), [
    ({}, r"nothing to export.*--onnx FILE, --parquet FILE"),
    ({"onnx": Path("a.onnx"), "embeddings": True}, "column of the Parquet table"),
    ({"parquet": Path("a.parquet"), "link": True}, "are for folders"),
    ({"onnx": Path("a.onnx"), "min_confidence": 0.5}, "are for folders"),
])
def test_an_option_that_would_do_nothing_is_an_error(tmp_path, options, match):
    with pytest.raises(InputError, match=match):
        export_run(tmp_path, **options)
