"""What is done with a finished run: tables of new images, folders of sorted images, published checkpoints taken in."""

import errno
import json
import logging
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from commands import N_PICTURES, digits_run, picture, pictures_run, table
from phyla.classifier import Classifier
from phyla.errors import CorruptFileError, DataNotFoundError, InputError, StorageError
from phyla.importing import import_checkpoint
from phyla.nets.resnet import EncoderSpec
from phyla.prediction import export_folders, predict_table
from phyla.progress import shown_by
from phyla.rundir import load_encoder

WIDTH = 2


@pytest.fixture
def made(tmp_path, tmp_path_factory):
    """Return a finished run and the folder of pictures it was made from, which may be changed."""
    run, photos = pictures_run(tmp_path_factory, tmp_path)
    mine = shutil.copytree(photos, tmp_path / "photos")
    told = json.loads((run / "run.json").read_text())
    told["options"]["data"]["source"] = str(mine)
    (run / "run.json").write_text(json.dumps(told))
    return run, mine


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_images_get_what_the_run_gave_them(made, tmp_path):
    run, photos = made
    told = predict_table(Classifier.load(run), photos, tmp_path / "new.csv")
    assert told == {"labelled": N_PICTURES, "skipped": 0, "out": str(tmp_path / "new.csv")}
    new, held = table(tmp_path / "new.csv"), table(run / "assignments.csv")
    for name in ("id", "cluster"):
        assert [row[name] for row in new] == [row[name] for row in held]
    for name in ("confidence", "second_probability", "third_probability"):
        np.testing.assert_allclose([float(row[name]) for row in new], [float(row[name]) for row in held], atol=2e-5)


def test_all_forms_of_the_table_say_the_same(made, tmp_path, capsysbinary):
    run, photos = made
    picture(photos / "c" / 'odd "ü", name.png', 77)
    classifier = Classifier.load(run)
    for name in ("t.csv", "t.tsv", "t.parquet"):
        predict_table(classifier, photos, tmp_path / name)
    predict_table(classifier, photos, None)
    assert capsysbinary.readouterr().out == (tmp_path / "t.csv").read_bytes()
    told = predict_table(classifier, photos, None, as_json=True)
    as_json = json.loads(capsysbinary.readouterr().out)
    assert told["labelled"] == len(as_json) == N_PICTURES + 1 and told["out"] is None
    rows, parquet = table(tmp_path / "t.csv"), pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert [list(row) for row in (rows[0], parquet[0], as_json[0])] == [list(rows[0])] * 3
    for one, two, three in zip(rows, parquet, as_json, strict=True):
        assert one["id"] == two["id"] == three["id"] and int(one["third"]) == two["third"] == three["third"]
        assert float(one["confidence"]) == pytest.approx(two["confidence"], abs=1e-6)
        assert two["confidence"] == pytest.approx(three["confidence"], abs=1e-6)
    assert len((tmp_path / "t.tsv").read_text("utf-8").splitlines()) == len(rows) + 1


def test_files_that_cannot_be_read_are_named_and_left_out(made, tmp_path, caplog):
    run, photos = made
    whole = (photos / "a" / "00.jpg").read_bytes()
    (photos / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, "phyla"):
        told = predict_table(Classifier.load(run), photos, tmp_path / "new.csv")
    assert (told["labelled"], told["skipped"]) == (N_PICTURES, 1) and "skipped 'a/cut.jpg'" in caplog.text
    assert "a/cut.jpg" not in [row["id"] for row in table(tmp_path / "new.csv")]
    (tmp_path / "new.csv").write_text("earlier")
    with pytest.raises(CorruptFileError, match=r"'a/cut.jpg' is damaged.*leave out --strict"):
        predict_table(Classifier.load(run), photos, tmp_path / "new.csv", strict=True)
    assert (tmp_path / "new.csv").read_text() == "earlier"


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_to_label_is_an_error_and_no_table(made, tmp_path, capsys, as_json):
    run, _ = made
    classifier = Classifier.load(run)
    (tmp_path / "texts").mkdir()
    with pytest.raises(InputError, match="no image in"):
        predict_table(classifier, tmp_path / "texts", None, as_json=as_json)
    with pytest.raises(DataNotFoundError, match="there is no folder or file"):
        predict_table(classifier, tmp_path / "nowhere", None, as_json=as_json)
    assert capsys.readouterr().out == ""
    (tmp_path / "texts" / "a.jpg").write_text("text")
    with pytest.raises(InputError, match=r"none of the 1 images of .*texts can be read"):
        predict_table(classifier, tmp_path / "texts", tmp_path / "new.csv", as_json=as_json)
    assert not (tmp_path / "new.csv").exists()


def test_a_table_of_an_unknown_kind_is_refused_before_the_work(made, tmp_path):
    run, photos = made
    with pytest.raises(InputError, match=r"cannot write a table to 'new.xls'.*csv"):
        predict_table(Classifier.load(run), photos, tmp_path / "new.xls")


def test_progress_counts_every_file(made, tmp_path):
    run, photos = made
    (photos / "bad.jpg").write_bytes(b"")
    bars = []

    class Counter:
        def start(self, description, total, unit, done):
            bars.append([description, total, 0])
            return self

        def advance(self, n=1, note=""):
            bars[-1][2] += n

        def stop(self, bar):
            pass

    with shown_by(Counter()):
        predict_table(Classifier.load(run), photos, tmp_path / "new.csv")
    assert bars == [["predict", N_PICTURES + 1, N_PICTURES + 1]]


def test_images_below_the_least_confidence_are_in_no_cluster_in_every_form(made, tmp_path, capsys):
    run, photos = made
    classifier, held = Classifier.load(run), table(run / "assignments.csv")
    least = float(np.median([float(row["confidence"]) for row in held])) + 1e-4
    predict_table(classifier, photos, tmp_path / "t.csv", min_confidence=least)
    rows = table(tmp_path / "t.csv")
    open_ = [row["cluster"] == "-1" for row in rows]
    assert open_ == [float(row["confidence"]) < least for row in rows] and 0 < sum(open_) < N_PICTURES
    firsts = [row["second"] if row["cluster"] == "-1" else row["cluster"] for row in rows]
    assert firsts == [row["cluster"] for row in held]
    predict_table(classifier, photos, None, min_confidence=least)
    assert capsys.readouterr().out == (tmp_path / "t.csv").read_text(encoding="utf-8")
    predict_table(classifier, photos, None, min_confidence=least, as_json=True)
    assert [row["cluster"] for row in json.loads(capsys.readouterr().out)] == [int(row["cluster"]) for row in rows]
    for out in (None, tmp_path / "u.csv"):
        with pytest.raises(InputError, match="min_confidence must be from 0 to 1"):
            predict_table(classifier, photos, out, min_confidence=2)


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("link", [False, True])
def test_images_are_sorted_into_a_folder_a_cluster(made, tmp_path, link):
    run, photos = made
    out = tmp_path / "sorted"
    assert export_folders(run, out, link=link) == N_PICTURES
    for row in table(run / "assignments.csv"):
        target = out / f"cluster {row['cluster']}" / row["id"].replace("/", "__")
        assert target.read_bytes() == (photos / row["id"]).read_bytes() and target.is_symlink() == link
    assert len([path for path in out.rglob("*") if path.is_file()]) == N_PICTURES
    assert len(list(photos.rglob("*.jpg"))) == N_PICTURES


def test_what_is_doubtful_is_kept_apart(made, tmp_path):
    run, _ = made
    sure = [float(row["confidence"]) for row in table(run / "assignments.csv")]
    middle = float(np.median(sure))
    export_folders(run, tmp_path / "sorted", min_confidence=middle)
    assert len(list((tmp_path / "sorted" / "unsure").iterdir())) == sum(value < middle for value in sure) > 0


def test_what_is_in_no_cluster_of_the_table_is_unsure_too(made, tmp_path):
    run, _ = made
    rows = pq.read_table(run / "assignments.parquet")
    pq.write_table(rows.set_column(1, "cluster", [[-1, *rows["cluster"].to_pylist()[1:]]]), run / "assignments.parquet")
    export_folders(run, tmp_path / "sorted")
    assert [path.name for path in (tmp_path / "sorted" / "unsure").iterdir()] == [
        rows["id"].to_pylist()[0].replace("/", "__")]


def test_names_of_clusters_become_names_of_folders(made, tmp_path):
    run, _ = made
    told = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(told | {"names": ["cats/dogs: both", "..", "ünï"]}))
    export_folders(run, tmp_path / "sorted")
    assert {path.name for path in (tmp_path / "sorted").iterdir()} <= {"cats_dogs_ both", "_", "ünï"}
    assert sum(path.is_file() for path in (tmp_path / "sorted").rglob("*")) == N_PICTURES


def test_images_that_differ_in_their_folders_alone_are_both_there(made, tmp_path):
    run, photos = made
    rows = pq.read_table(run / "assignments.parquet")
    ids = ["a/00.jpg", "a__00.jpg", *rows["id"].to_pylist()[2:]]
    shutil.copy(photos / "a" / "03.jpg", photos / "a__00.jpg")
    clusters = rows.set_column(0, "id", [ids]).set_column(1, "cluster", [[0] * len(ids)])
    pq.write_table(clusters, run / "assignments.parquet")
    assert export_folders(run, tmp_path / "sorted") == N_PICTURES
    names = {path.name for path in (tmp_path / "sorted" / "cluster 0").iterdir()}
    assert {"a__00.jpg", "a__00~2.jpg"} <= names and len(names) == N_PICTURES


def test_nothing_is_written_over_or_mixed(made, tmp_path):
    run, photos = made
    for folder in (photos, photos / "a"):
        with pytest.raises(InputError, match=r"is not empty.*nothing is written over"):
            export_folders(run, folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, not a folder"):
        export_folders(run, tmp_path / "file")
    assert len(list(photos.rglob("*.jpg"))) == N_PICTURES


def test_images_that_are_gone_are_counted(made, tmp_path, caplog):
    run, photos = made
    (photos / "a" / "00.jpg").unlink()
    with caplog.at_level(logging.WARNING, "phyla"):
        assert export_folders(run, tmp_path / "sorted") == N_PICTURES - 1
    assert "1 images of the run are no longer in" in caplog.text


def test_a_full_disk_is_told(made, tmp_path, monkeypatch):
    def full(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="no space left while writing"):
        export_folders(made[0], tmp_path / "sorted")


def test_only_files_can_be_sorted(tmp_path, tmp_path_factory, monkeypatch):
    run = digits_run(tmp_path_factory, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder called like the data set is not what the run was made from
    with pytest.raises(InputError, match="made from 'digits', which is no folder here"):
        export_folders(run, tmp_path / "sorted")
    with pytest.raises(InputError, match="holds no finished run"):
        export_folders(tmp_path, tmp_path / "sorted")
    (run / "assignments.parquet").unlink()
    with pytest.raises(InputError, match="holds no finished run"):
        export_folders(run, tmp_path / "sorted")


# ── published checkpoints ─────────────────────────────────────────────────────────────────────────────────────────


def published(path, *, n_heads, n_clusters=10, head=None):
    """Write a checkpoint as SCAN does: a ResNet-18 for 32 pixels, and cluster heads or a projection."""
    source = torch.Generator().manual_seed(0)
    net = EncoderSpec(width=WIDTH).build(source)
    n_features = net.spec.n_features
    state = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    for number in range(n_heads):
        state[f"cluster_head.{number}.weight"] = torch.randn(n_clusters, n_features, generator=source)
        state[f"cluster_head.{number}.bias"] = torch.randn(n_clusters, generator=source)
    if not n_heads:
        shapes = {"0.weight": (n_features, n_features), "0.bias": (n_features,), "2.weight": (128, n_features),
                  "2.bias": (128,)}
        state |= {f"contrastive_head.{name}": torch.randn(shape, generator=source) for name, shape in shapes.items()}
    torch.save({"model": state, "head": head} if head is not None else state, path)
    return path


@pytest.mark.parametrize(("n_clusters", "mean"), [(10, (0.4914, 0.4822, 0.4465)), (20, (0.5071, 0.4867, 0.4408))])
def test_a_checkpoint_with_heads_becomes_a_classifier(tmp_path, n_clusters, mean):
    file = published(tmp_path / "scan.pth.tar", n_heads=3, n_clusters=n_clusters, head=2)
    told = import_checkpoint(file, tmp_path / "out", "cifar")
    assert told["kind"] == "scan" and told["written"] == str(tmp_path / "out" / "model.safetensors")
    classifier = Classifier.load(tmp_path / "out")
    state = torch.load(file, weights_only=True)["model"]
    assert torch.equal(classifier.net.heads.weight[0], state["cluster_head.2.weight"])
    assert classifier.size == classifier.views.size == 32 and classifier.views.mean == mean
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 36, 3), dtype=np.uint8)
    np.testing.assert_allclose(classifier.predict_proba(pixels).sum(1), 1, rtol=1e-5)


def test_a_checkpoint_without_heads_becomes_an_encoder(tmp_path):
    told = import_checkpoint(published(tmp_path / "simclr.pth.tar", n_heads=0), tmp_path / "out", "cifar")
    assert told["kind"] == "pretext" and told["written"] == str(tmp_path / "out" / "encoder.safetensors")
    encoder, projection = load_encoder(tmp_path / "out")
    assert encoder.spec == EncoderSpec(width=WIDTH) and projection is not None
    assert json.loads(json.dumps(told)) == told


def test_a_checkpoint_that_does_not_name_its_best_head_is_refused(tmp_path):
    with pytest.raises(InputError, match="3 heads and does not name the best"):
        import_checkpoint(published(tmp_path / "scan.pth.tar", n_heads=3), tmp_path / "out", "cifar")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_one_is_refused(tmp_path):
    (tmp_path / "text.pth.tar").write_text("text")
    with pytest.raises(CorruptFileError, match=r"text.pth.tar cannot be read"):
        import_checkpoint(tmp_path / "text.pth.tar", tmp_path / "out", "cifar")
    with pytest.raises(DataNotFoundError, match="there is no checkpoint"):
        import_checkpoint(tmp_path / "none.pth.tar", tmp_path / "out", None)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_stem_gets_the_nearest_name(tmp_path):
    with pytest.raises(InputError, match=r"stem='cifr' is not known. hint: did you mean cifar\?"):
        import_checkpoint(published(tmp_path / "simclr.pth.tar", n_heads=0), tmp_path / "out", "cifr")
