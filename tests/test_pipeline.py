"""A run from images to report: what it leaves, what it does again and what not, and what it refuses."""

import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import phyla
from commands import (
    N_DIGITS,
    N_PICTURES,
    TINY_PICTURES,
    call,
    digits_run,
    flags,
    picture,
    pictures,
    pictures_run,
    small,
    stage_files,
    table,
    top_files,
)
from phyla.errors import CorruptFileError, InputError
from phyla.nets.resnet import EncoderSpec
from phyla.overrides import change, from_options, with_checkpoint
from phyla.pipeline import STAGES, Data
from phyla.quality import neighbor_score
from phyla.recorded import recorded_labels, recorded_pipeline
from phyla.runner import Runner, reopen
from phyla.storage import write_text
from phyla.tables import COLUMNS
from phyla.training.device import choose_device
from phyla.zoo import PublishedEncoder

pytestmark = pytest.mark.filterwarnings("ignore::phyla.errors.PhylaWarning")

REPORT = {"report.html", "health.json", "oddities.csv", "map.png", "prototypes.png", "confidence.png", "curves.png",
          "retrieval.png", "probabilities.png"}
TOP = {"run.json", "options.json", "phyla-run.json", "metrics.jsonl", "embeddings.npy", "neighbors.npy",
       "model.safetensors", "model.json", "assignments.csv", "assignments.parquet", "scores.json", *REPORT}
MADE = [stage for stage in STAGES[1:] if stage not in ("robust", "count", "cut")]


@pytest.fixture
def plain_report(monkeypatch):
    """Write a page of a line in the place of the report, which has tests of its own."""
    def write(data, folder):
        write_text(folder / "report.html", f"{data.title} {len(data.scores)} {data.truth is not None}")

    monkeypatch.setattr("phyla.runner.build_report", write)


@pytest.fixture
def run(tmp_path, tmp_path_factory, request):
    """Return a finished run whose report is the real one; what is done to it after that writes the plain one."""
    made = digits_run(tmp_path_factory, tmp_path)
    request.getfixturevalue("plain_report")
    return made


def redone(out: Path, pipeline=None, **how) -> list[str]:
    """Carry out a pipeline in ``out`` and return the stages that were not kept."""
    runner = Runner(pipeline or small(), out, **how)
    result = runner.go()
    fresh = [name for name, stage in runner.run.stages.items() if not stage.was_kept]
    assert result.did_work == bool(fresh)
    return fresh


# ── what a run leaves ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_run_folder_holds_everything_and_nothing_else(run):
    assert {path.name for path in run.iterdir()} == TOP | {"stages", "confusion_matrix.png", "reliability.png",
                                                     "risk_coverage.png"}
    names = {path.name for path in run.glob("stages/*/*")}
    assert not {name for name in names if name.endswith(".part")} | ({"checkpoint.pt"} & names)
    assert sorted(path.name.rsplit("-", 1)[0] for path in run.glob("stages/*")) == sorted(MADE)
    ids = [f"train/{round(row):05d}" for row in np.linspace(0, 1796, N_DIGITS)]
    rows = table(run / "assignments.csv")
    assert [row["id"] for row in rows] == ids and list(rows[0]) == COLUMNS
    assert np.load(run / "embeddings.npy").shape == (N_DIGITS, 32)
    assert np.load(run / "neighbors.npy").shape == (N_DIGITS, 20)
    curves = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["epoch"]) for record in curves] == [
        ("pretrain", 1), ("cluster", 1), ("cluster", 2), ("refine", 1)]


def test_run_json_says_what_was_run_and_with_what(run):
    facts = json.loads((run / "run.json").read_text())
    assert from_options(facts["options"]).options() == small().options()
    assert facts["command"][:3] == ["phyla", "run", "scan-digits"]
    assert set(facts["stages"]) == set(MADE) and facts["n_images"] == {"train": N_DIGITS}
    assert facts["versions"]["phyla"] == phyla.__version__
    assert torch.__version__.startswith(facts["versions"]["torch"])
    assert facts["labels"] == "auto" and facts["notices"]
    assert {run / name for name in facts["files"]} <= set(run.iterdir())


def test_the_classifier_gives_what_the_table_says(run):
    held = np.load(next(run.glob("stages/refine-*/train.npy")))
    images = Runner(small(), run).train
    found = phyla.load(run).predict_proba(images)
    np.testing.assert_allclose(found, held, atol=1e-5)
    rows = table(run / "assignments.csv")
    assert [int(row["cluster"]) for row in rows] == held.argmax(1).tolist()


def test_pictures_without_labels_go_the_whole_way(tmp_path, tmp_path_factory):
    run, photos = pictures_run(tmp_path_factory, tmp_path)
    assert {path.name for path in run.iterdir()} >= TOP and not (run / "confusion_matrix.png").exists()
    scores = json.loads((run / "scores.json").read_text())["scores"]
    assert [row["method"] for row in scores] == ["k-means on pixels", "k-means on embeddings", "SCAN",
                                                 "SCAN + self-label"]
    assert all("mean_confidence" in row["values"] and "nmi" not in row["values"] for row in scores)
    assert json.loads((run / "run.json").read_text())["options"]["data"]["source"] == str(photos)


def test_folders_are_labels_where_they_are_asked_for(tmp_path, tmp_path_factory, request):
    run, _ = pictures_run(tmp_path_factory, tmp_path)
    request.getfixturevalue("plain_report")
    model = (run / "model.safetensors").read_bytes()
    runner = reopen(run, labels="folders")
    result = runner.go()
    fresh = [name for name, stage in runner.run.stages.items() if not stage.was_kept]
    assert fresh == ["evaluate", "report"] and (run / "model.safetensors").read_bytes() == model
    assert {"hungarian_accuracy", "nmi", "ari"} <= set(result.scores[0].values)
    assert recorded_labels(run) == "folders"
    assert redone(run, recorded_pipeline(run), labels="folders") == []


def mnist(root: Path, n_train: int, n_test: int) -> None:
    """Write random pixels in the layout of MNIST."""
    (root / "mnist").mkdir(parents=True)
    for name, n in (("train", n_train), ("t10k", n_test)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8).tobytes()
        labels = (np.arange(n) % 10).astype(np.uint8).tobytes()
        (root / "mnist" / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, n, 28, 28) + pixels)
        (root / "mnist" / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + labels)


def test_held_out_images_are_predicted_scored_and_judge_the_epochs(tmp_path, plain_report):
    mnist(tmp_path / "data", 30, 20)
    pipeline = small(data__source="mnist", data__size="8", data__held_out="test", data__limit="none")
    result = Runner(pipeline, tmp_path / "run", data_dir=tmp_path / "data").go()
    rows = table(tmp_path / "run" / "assignments-held-out.csv")
    assert [row["id"] for row in rows] == [f"test/{row:05d}" for row in range(20)]
    assert [(row.split, row.n_images) for row in result.scores if row.method == "SCAN"] == [("train", 30), ("test", 20)]
    neighbors = np.load(next((tmp_path / "run").glob("stages/neighbors-*/held_out.npy")))
    assert neighbors.shape == (20, 5)
    assert (tmp_path / "run" / "report.html").read_text().split()[-2:] == ["10", "True"]  # rows of both splits
    without = change(pipeline, "data.held_out", "none")
    Runner(without, tmp_path / "run", data_dir=tmp_path / "data").go("evaluate")
    assert not list((tmp_path / "run").glob("assignments-held-out.*"))


def test_the_encoder_may_learn_from_more_images_than_are_clustered(tmp_path):
    mnist(tmp_path / "data", 30, 20)
    pipeline = small(data__source="mnist", data__size="8", data__split="test", data__pretrain_split="train")
    runner = Runner(pipeline, tmp_path / "run", data_dir=tmp_path / "data")
    runner.go("embed")
    assert runner.run.stages["pretrain"].facts["n_images"] == 30
    assert np.load(tmp_path / "run" / "embeddings.npy").shape[0] == 20


def test_the_python_call_is_a_run(tmp_path, plain_report):
    result = phyla.run(small(), tmp_path / "run", device="cpu", labels=None)
    assert result.n_images == N_DIGITS and result.path == tmp_path / "run"
    assert phyla.load(result.path).n_clusters == 10
    assert not phyla.run(small(), tmp_path / "run", device="cpu", labels="none").did_work


# ── what is done again ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_run_does_nothing_and_says_so(run):
    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*")
                if path.is_file() and path.name != "options.json"}

    before = state()
    said = call("run", "scan-digits", "--limit", N_DIGITS, *flags(), "--out", run)
    assert said.code == 0 and "nothing to do" in said.err and state() == before
    assert "SCAN + self-label" in said.out  # the scores are shown all the same


def after(stage: str) -> list[str]:
    return list(MADE[MADE.index(stage):])


@pytest.mark.parametrize(("option", "value", "stages"), [
    ("data.limit", "50", after("pretrain")),
    ("pretrain.lr", "0.1", after("pretrain")),
    ("embed.layer", "projection", after("embed")),
    ("neighbors.n_neighbors", "7", after("neighbors")),
    ("cluster.entropy_weight", "2", after("cluster")),
    ("cluster.views.cutout", "1", after("cluster")),
    ("refine.threshold", "0.5", after("refine")),
    ("refine", "none", after("evaluate")),
    ("evaluate.knn_neighbors", "5", after("evaluate")),
])
def test_a_changed_option_runs_only_what_depends_on_it(run, option, value, stages):
    earlier = top_files(run)
    assert redone(run, change(small(), option, value)) == stages
    assert "run.json" in (changed := {name for name, data in top_files(run).items() if data != earlier.get(name)})
    assert ("model.safetensors" in changed) == ("cluster" in stages or option.startswith("refine"))
    assert redone(run) == []  # the earlier options: nothing is run, and the earlier result is shown again
    assert {k: v for k, v in top_files(run).items() if k != "run.json"} == {
        k: v for k, v in earlier.items() if k != "run.json"}
    assert json.loads((run / "run.json").read_text())["options"] == json.loads(json.dumps(small().options()))


def test_a_run_takes_what_another_recipes_run_has_made(run, tmp_path):
    before = stage_files(run)
    pipeline = change(change(change(small(), "cluster", "nnm"), "cluster.n_epochs", 1), "refine", "none")
    runner = Runner(pipeline, tmp_path / "nnm")
    runner.run.lenders = (run,)
    runner.go("cluster")
    assert {name for name, stage in runner.run.stages.items() if stage.was_kept} == {"pretrain", "embed", "neighbors"}
    alone = Runner(pipeline, tmp_path / "alone")
    alone.go("cluster")
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("nnm", "alone")]
    assert models[0] == models[1]
    assert stage_files(run) == before


def test_small_recipes_go_the_whole_way(tmp_path, plain_report):
    mnist(tmp_path / "data", 40, 20)
    (tmp_path / "data" / "mnist").rename(tmp_path / "data" / "fashion-mnist")
    told = {"pretrain__batch_size": 20, "data__limit": 20, "robust__n_epochs": 1, "robust__batch_size": 20}
    pipeline = small("ruc-fashion-small", **told)
    result = Runner(pipeline, tmp_path / "run", data_dir=tmp_path / "data").go()
    assert [row.n_images for row in result.scores if row.method == "SCAN + self-label + RUC"] == [20, 20]


def test_another_seed_is_another_run_of_every_stage(run):
    said = call("cluster", run, "--seed", "1", "--quiet")
    assert said.code == 0 and len(list(run.glob("stages/pretrain-*"))) == 2
    assert recorded_pipeline(run).cluster.random_state == 1 == recorded_pipeline(run).pretrain.random_state


def test_a_changed_folder_is_looked_at_anew(tmp_path, plain_report):
    photos = pictures(tmp_path / "photos", 12)
    pipeline = small("scan-folder", data__source=str(photos), data__limit="none", cluster__n_clusters="3",
                     **TINY_PICTURES)

    def embedded() -> list[str]:
        runner = Runner(pipeline, tmp_path / "run")
        runner.go("embed")
        return [name for name, stage in runner.run.stages.items() if not stage.was_kept]

    assert embedded() == ["pretrain", "embed"] and embedded() == []
    picture(photos / "a" / "new.jpg", 50)
    assert embedded() == ["pretrain", "embed"]
    picture(photos / "a" / "00.jpg", 51)
    assert embedded() == ["pretrain", "embed"]
    (photos / "a" / "new.jpg").unlink()
    picture(photos / "a" / "00.jpg", 0)
    assert embedded() == []


def test_what_is_missing_at_the_top_is_put_back(run, caplog):
    before = top_files(run)
    for name in TOP - {"phyla-run.json", "options.json"} | {"confusion_matrix.png"}:
        (run / name).unlink()
        assert redone(run) == []
        now = top_files(run)
        assert now.keys() == before.keys()
        assert {key for key in now if now[key] != before[key]} <= {"run.json"}


def test_damaged_weights_at_the_top_are_put_back(run):
    before = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").write_bytes(before[:100])
    with pytest.raises(CorruptFileError, match="give the run's command again"):
        phyla.load(run)
    assert redone(run) == []
    assert (run / "model.safetensors").read_bytes() == before and phyla.load(run).n_clusters == 10


def test_what_a_person_edits_at_the_top_stays_out_of_the_stages(run):
    told = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(told | {"names": [f"digit {n}" for n in range(10)]}))
    assert redone(run) == [] and phyla.load(run).names[3] == "digit 3"


def test_a_part_of_the_chain_leaves_a_finished_run_as_it_is(run):
    before = top_files(run)
    for name in ("pretrain", "embed", "neighbors", "cluster", "refine", "evaluate"):
        assert not Runner(small(), run).go(name).did_work
    assert top_files(run) == before


def test_a_part_of_the_chain_with_other_options_shows_nothing_of_the_earlier_ones(run):
    before = top_files(run)
    Runner(change(small(), "cluster.lr", 0.01), run).go("cluster")
    assert set(top_files(run)) == TOP - REPORT - {"scores.json"}
    assert list(json.loads((run / "run.json").read_text())["stages"]) == ["cluster", "embed", "neighbors", "pretrain"]
    assert redone(run) == [] and top_files(run).keys() == before.keys()


def test_without_labels_nothing_of_them_is_left_at_the_top(run):
    assert redone(run, labels=None) == ["evaluate", "report"]
    assert not (run / "confusion_matrix.png").exists()
    assert redone(run) == [] and (run / "confusion_matrix.png").exists()


def test_the_report_is_rebuilt_from_what_is_there(run):
    for path in run.glob("stages/report-*/*.html"):
        path.unlink()
    result = reopen(run).rebuild_report()
    assert result.did_work and (run / "report.html").read_text().endswith("True")
    assert json.loads((run / "run.json").read_text())["command"][:3] == ["phyla", "run", "scan-digits"]
    shutil.rmtree(next(run.glob("stages/refine-*")))
    with pytest.raises(InputError, match=r"the refine stage .* is not done.*phyla run"):
        reopen(run).rebuild_report()


def test_a_run_is_gone_on_with_from_anywhere(tmp_path, monkeypatch, plain_report):
    pictures(tmp_path / "photos", 6)
    monkeypatch.chdir(tmp_path)
    made = [*flags(cluster__n_clusters=2, **TINY_PICTURES), "--quiet"]
    assert call("embed", "photos/", *made, "--out", "run").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "nothing to do" in call("embed", tmp_path / "run").err
    assert "nothing to do" in call("embed", "../photos", *made[:-1], "--out", "../run").err


def test_a_folder_called_like_a_data_set_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "cifar10", 6)
    assert call("embed", "cifar10", *flags(cluster__n_clusters=2, **TINY_PICTURES), "--out", "run").code == 0
    assert np.load("run/embeddings.npy").shape[0] == 6


def test_a_run_among_the_images_is_not_taken_for_images(tmp_path, monkeypatch):
    pictures(tmp_path, 6)
    monkeypatch.chdir(tmp_path)
    made = ["evaluate", ".", "--classes", "2", *flags(**TINY_PICTURES), "--quiet"]
    assert call(*made).code == 0
    run = next(tmp_path.glob("runs/*"))
    picture(run / "map.png", 3)  # a figure of the report
    assert "nothing to do" in call("evaluate", ".", "--classes", "2", *flags(**TINY_PICTURES)).err
    assert len(table(run / "assignments.csv")) == 6


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are text there")
def test_a_folder_whose_name_is_not_text_goes_through(tmp_path, plain_report):
    photos = pictures(Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9")), 6)
    made = ["run", photos, "--classes", "2", *flags(**TINY_PICTURES), "--out", tmp_path / "run"]
    assert call(*made, "--quiet").code == 0
    assert "nothing to do" in call(*made).err and "nothing to do" in call("run", tmp_path / "run").err
    assert call("show", tmp_path / "run").out.startswith("command   phyla run ")


def test_a_published_checkpoint_takes_the_place_of_training(tmp_path):
    def checkpoint(seed: int) -> None:
        net = EncoderSpec(width=4).build(torch.Generator().manual_seed(seed))
        torch.save({f"backbone.{name}": value for name, value in net.state_dict().items()}, tmp_path / "a.pth.tar")

    def embedded() -> np.ndarray:
        Runner(pipeline, tmp_path / "run").go("embed")
        return np.load(tmp_path / "run" / "embeddings.npy")

    checkpoint(0)
    pipeline = with_checkpoint(small(), str(tmp_path / "a.pth.tar"))
    first = embedded()
    assert first.shape == (N_DIGITS, 32) and not Runner(pipeline, tmp_path / "run").go("embed").did_work
    assert isinstance(recorded_pipeline(tmp_path / "run").pretrain, PublishedEncoder)
    checkpoint(1)
    assert not np.allclose(embedded(), first)
    (tmp_path / "a.pth.tar").unlink()
    with pytest.raises(InputError, match="there is no checkpoint"):
        embedded()


def test_epochs_are_chosen_on_the_held_out_or_the_training_images(tmp_path):
    mnist(tmp_path / "data", 30, 20)
    pipeline = small(data__source="mnist", data__size="8", data__held_out="test", data__limit="none")
    scores = []
    for select_on in ("held_out", "train"):
        runner = Runner(change(pipeline, "data.select_on", select_on), tmp_path / "run", data_dir=tmp_path / "data")
        runner.go("cluster")
        cluster = runner.run.stages["cluster"]
        split = "train" if select_on == "train" else "held_out"
        images = {"train": runner.train, "held_out": runner.held_out}[split]
        found = runner.assignment("cluster", split).probabilities
        scores.append(cluster.facts["score"])
        assert scores[-1] == pytest.approx(neighbor_score(found, runner.neighbors(split).indices[:, :5]), abs=1e-4)
        assert len(images) == len(found)
    assert scores[0] != scores[1]


# ── labels never steer ────────────────────────────────────────────────────────────────────────────────────────────


def test_where_pixels_are_kept_changes_no_result_and_no_key(tmp_path):
    photos = pictures(tmp_path / "photos", 12)
    (photos / "a" / "bad.jpg").write_bytes(b"")
    made = []
    for keep in ("file", "off"):
        pipeline = small("scan-folder", data__source=str(photos), data__limit="none", data__cache=keep,
                         cluster__n_clusters="3", **TINY_PICTURES)
        result = Runner(pipeline, tmp_path / keep, labels=None).go("embed")
        made.append({name: data for name, data in stage_files(result.path).items() if "stages/images" not in name})
        assert bool(list(tmp_path.glob(f"{keep}/stages/images/*.npy"))) == (keep == "file")
    assert len(made[0]) > 3 and made[0] == made[1]


def test_labels_change_the_scores_and_nothing_else(tmp_path):
    photos = pictures(tmp_path / "photos", 12)
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("path,label\n" + "".join(f"{'abc'[i % 3]}/{i:02d}.jpg,{i * 7 % 4}\n" for i in range(12)))
    pipeline = small("scan-folder", data__source=str(photos), data__limit="none", cluster__n_clusters="3",
                     **TINY_PICTURES)
    made, nmi = [], []
    for number, labels in enumerate((None, "folders", str(wrong))):
        result = Runner(pipeline, tmp_path / str(number), labels=labels).go("evaluate")
        made.append({name: data for name, data in stage_files(result.path).items() if "scores.json" not in name})
        nmi.append(result.scores[0].values.get("nmi"))
    assert any(name.endswith("model.safetensors") for name in made[0])
    names = [{name for name in files if not name.startswith("stages/evaluate")} for files in made]
    assert names[0] == names[1] == names[2]
    assert all(made[0][name] == made[1][name] == made[2][name] for name in names[0])
    assert nmi[0] is None and len(set(nmi)) == 3


def test_a_table_of_labels_is_read_before_the_work(tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\nnothing,1\n")
    with pytest.raises(InputError, match="names none of the 60 images"):
        Runner(small(), tmp_path / "run", labels=str(tmp_path / "labels.csv")).go()
    assert not list(tmp_path.glob("run/stages/pretrain-*"))


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("changes", "wanted"), [
    ({"cluster__n_clusters": 0}, "at least 1, got 0"),
    ({"cluster__n_clusters": -3}, "at least 1, got -3"),
    ({"cluster__n_clusters": 61}, "60 images are fewer than the 61 classes"),
    ({"data__limit": 1}, "at least 2, got 1"),
    ({"data__limit": 5}, "5 images are fewer than the 10 classes"),
    ({"data__source": ""}, "phyla run FOLDER"),
    ({"cluster__random_state": -1}, "seed must be from 0"),
    ({"evaluate__random_state": 2**32}, "seed must be from 0"),
])
def test_what_cannot_be_run_is_refused_before_any_work(tmp_path, changes, wanted):
    with pytest.raises(InputError, match=wanted):
        Runner(small(**changes), tmp_path / "run").go()
    assert not list(tmp_path.glob("run/stages/pretrain-*"))


@pytest.mark.parametrize(("name", "typed", "wanted"), [
    ("superand-digits", "pretrain.lr=-1", "pretrain: lr must be above 0 and finite, got -1"),
    ("superand-digits", "pretrain.momentum=2", "pretrain: momentum must be at least 0 and below 1, got 2"),
    ("scan-digits", "pretrain.weight_decay=-1", "pretrain: weight_decay must be at least 0"),
    ("scan-digits", "cluster.n_epochs=0", "cluster: n_epochs must be at least 1, got 0"),
    ("scan-digits", "refine.batch_size=0", "refine: batch_size must be at least 2, got 0"),
    ("nnm-digits", "cluster.lr=-1", "cluster: lr must be above 0"),
    ("tsuc-digits", "cluster.momentum=-1", "cluster: momentum must be at least 0"),
    ("tsuc-digits", "cluster.norm=feature_rows", "cluster: prototypes='kmeans' are directions.*norm=class_columns"),
    ("ruc-digits", "robust.views.kind=strong", "robust: views of kind 'strong' are not allowed.*ruc_strong"),
    ("ruc-digits", "robust.smoothing=2", "robust: smoothing must be at least 0 and below 1, got 2"),
    ("ruc-digits", "cluster.n_clusters=1", "at least 2, got 1.*--classes 2, or leave .*--set robust=none"),
    ("superand-digits", "cluster.n_init=0", "cluster: n_init must be at least 1, got 0"),
    ("superand-digits", "cluster.temperature=0", "cluster.temperature=0 gives no.*--set cluster.temperature=0.1"),
])
def test_options_that_do_not_fit_are_told_before_an_image_is_read(tmp_path, monkeypatch, name, typed, wanted):
    monkeypatch.setattr("phyla.runner.open_images", lambda *args, **options: pytest.fail("an image was asked for"))
    said = call("run", name, "--set", typed, "--out", tmp_path / "run")
    assert re.search(wanted, said.error()) and not (tmp_path / "run" / "stages").exists()


def test_classes_of_one_are_refused_with_what_can_be_typed(tmp_path):
    said = call("run", "ruc-digits", "--classes", "1", "--out", tmp_path / "run")
    assert said.error().endswith("hint: --classes 2, or leave the stage out: --set robust=none")


def test_refused_options_do_not_become_those_of_the_run(run):
    said = call("run", run, "--classes", "61")
    assert "fewer than the 61 classes" in said.error()
    assert recorded_pipeline(run).cluster.n_clusters == 10 and redone(run) == []


def test_one_image_is_too_few(tmp_path):
    pictures(tmp_path / "photos", 1)
    pipeline = small("scan-folder", data__source=str(tmp_path / "photos"), cluster__n_clusters="1", **TINY_PICTURES)
    with pytest.raises(InputError, match="one image is too few"):
        Runner(pipeline, tmp_path / "run").go()


def test_a_set_of_two_images_goes_through(tmp_path, plain_report):
    pictures(tmp_path / "photos", 2)
    pipeline = small("scan-folder", data__source=str(tmp_path / "photos"), cluster__n_clusters="2", **TINY_PICTURES)
    result = Runner(pipeline, tmp_path / "run", labels="folders").go()
    assert result.n_images == 2 and np.load(tmp_path / "run" / "neighbors.npy").tolist() == [[1], [0]]


def test_a_run_folder_of_something_else_is_refused_and_left_alone(run):
    before = top_files(run)
    with pytest.raises(InputError, match=r"holds another run: recipe 'scan-digits' \(now 'scan-cifar10'\)"):
        Runner(small("scan-cifar10", data__source="digits"), run)
    with pytest.raises(InputError, match=r"source 'digits' \(now 'mnist'\)"):
        Runner(small(data__source="mnist"), run)
    assert top_files(run) == before


def test_a_data_set_goes_by_any_spelling(run):
    assert redone(run, small(data__source="digits")) == []
    assert Runner(small(data__source="Digits"), run).run.path == run


def test_a_bare_folder_is_no_run(tmp_path):
    for reading in (reopen, recorded_pipeline, recorded_labels):
        with pytest.raises(InputError, match="is not a run folder"):
            reading(tmp_path)
    (tmp_path / "options.json").write_text('{"labels": "auto"}')
    with pytest.raises(InputError, match=r"not of this version.*give the recipe again"):
        recorded_pipeline(tmp_path)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    pictures(tmp_path / "photos", 3)
    runner = Runner(small("scan-folder", data__source="~/photos"), tmp_path / "run", device=choose_device("cpu"))
    assert runner.pipeline.data == Data(str(tmp_path / "photos"), size=64, limit=N_DIGITS)
    assert len(runner.train) == 3 <= N_PICTURES
