"""Every layout of the published files, made of networks in plain torch, becomes a run of its recipe or is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import official
from authors import LAYOUTS, Hostile, Scan, filled, parallel, views, write
from commands import SMALL, Said, call, pictures
from phyla.checkpoints import CHECKPOINTS
from phyla.classifier import Classifier
from phyla.embed import embed
from phyla.errors import InputError
from phyla.importing import import_run, recipes_for
from phyla.onnx_file import export_onnx
from phyla.published import METRICS, published
from phyla.recipes import RECIPES, recipe
from phyla.recorded import recorded_pipeline
from phyla.rundir import load_encoder
from phyla.zoo import PublishedClusters, PublishedEncoder, load_published, told_by

PLAIN = ("--set", "evaluate.kmeans_restarts=1")


def file_of(layout: str, path: Path, *, legacy: bool = False) -> Path:
    return write(path, LAYOUTS[layout].make(views(LAYOUTS[layout].size, 2)).held, legacy=legacy)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Assert that two outputs agree to 1e-5 of their size, and that they say something."""
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def told(said: Said) -> dict[str, object]:
    assert said.code == 0, said
    return json.loads(said.out)


# ---- the same numbers as the network that the file was made of ------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_of_an_independent_network(tmp_path: Path, layout: str, legacy: bool) -> None:
    kind, name, make, size = LAYOUTS[layout]
    x = views(size)
    made = make(x)
    file = write(tmp_path / "file.pth.tar", made.held, legacy=legacy)
    pretrain = recipe(name).pretrain
    found = load_published(file, stem=pretrain.stem if hasattr(pretrain, "stem") else pretrain.encoder.stem)

    assert found.kind == kind
    with torch.no_grad():
        close(found.encoder(x), made.features)
        assert (found.projection is None) == (made.rows is None)
        if made.rows is not None:
            close(found.projection(found.encoder(x)), made.rows)
        assert (found.heads is None) == (made.logits is None)
        if made.logits is not None:
            wanted = made.logits if made.logits.ndim == 3 else made.logits[None]
            close(found.with_all()(x), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_a_run_of_its_recipe(tmp_path: Path, layout: str) -> None:
    kind, name, make, size = LAYOUTS[layout]
    x = views(size)
    made = make(x)
    facts = import_run(write(tmp_path / "file.pth.tar", made.held, legacy=True), name, tmp_path / "run")

    assert (facts["kind"], facts["recipe"], facts["run"]) == (kind, name, str(tmp_path / "run"))
    assert json.loads(json.dumps(facts)) == facts
    pipeline = recorded_pipeline(tmp_path / "run")
    assert pipeline.name == name and pipeline.pretrain.checkpoint().parent == tmp_path / "run" / "published"
    own = recipe(name)
    if made.logits is None:
        assert pipeline.cluster.get_params() == own.cluster.get_params()
        assert (pipeline.refine is None) == (own.refine is None)
        assert not (tmp_path / "run" / "model.json").exists()
        return
    assert (pipeline.refine, pipeline.robust, pipeline.cluster.n_clusters) == (None, None, own.cluster.n_clusters)
    classifier = tmp_path / "run" / "model.json"
    assert classifier.exists() == (kind != "tsuc")  # which says nothing of its best head
    if classifier.exists():
        net = Classifier.load(tmp_path / "run").net
        with torch.no_grad():
            logits = made.logits if made.logits.ndim == 3 else made.logits[None]
            close(net(x)[0], logits[facts["head"]])


def test_every_recipe_of_a_public_file_is_one_and_takes_that_kind_of_file() -> None:
    stages = {"pretext": "pretrain", "moco": "pretrain", "superand": "pretrain", "scan": "cluster", "tsuc": "cluster",
              "selflabel": "refine", "ruc": "robust"}
    for name, known in CHECKPOINTS.items():
        assert known.layout in stages, name
        for each in known.expected:
            assert not each.recipe or getattr(recipe(each.recipe), stages[known.layout]) is not None, name
            assert all(0 < value < 1 for value in each.values.values()), name
    ids = [known.file_id for known in CHECKPOINTS.values()]
    assert len(set(ids)) == len(ids)
    assert {each.recipe for known in CHECKPOINTS.values() for each in known.expected} - {""} <= set(RECIPES)


def test_the_scores_of_scans_files_are_those_in_the_table_of_its_best_models() -> None:
    rows = {(row.recipe, row.result): row.figures for row in published() if row.table == "README, best models"}
    stages, compared = {"scan": "cluster", "selflabel": "refine"}, 0
    for name, known in CHECKPOINTS.items():
        if name.startswith("scan-") and known.layout in stages and name != "scan-cifar20-selflabel":  # another run's
            figures = rows[known.expected[0].recipe, stages[known.layout]]
            told = {METRICS[short][0]: figure.value / 100 for short, figure in figures.items()}
            assert known.expected[0].values == {key: pytest.approx(told[key]) for key in known.expected[0].values}, name
            compared += 1
    assert compared == 12


@pytest.mark.parametrize("method", [PublishedEncoder, PublishedClusters])
def test_a_stage_knows_its_file_wherever_it_lies_and_whatever_is_said_of_it(tmp_path: Path, method: type) -> None:
    first, second = tmp_path / "a" / "file", tmp_path / "b" / "file"
    for path in (first, second):
        path.parent.mkdir()
    first.write_bytes(b"x")
    shutil.copy2(first, second)
    assert told_by(method(path=str(first))) == told_by(method(path=str(second), about="hello"))
    second.write_bytes(b"longer")
    assert told_by(method(path=str(first))) != told_by(method(path=str(second)))


def test_the_list_of_public_files_says_what_they_are_and_score() -> None:
    listed = told(call("list", "checkpoints", "--json"))["checkpoints"]
    assert set(listed) == set(CHECKPOINTS)
    line = listed["scan-cifar10-selflabel"]
    for part in ("--as scan-cifar10", "Hungarian accuracy 88.3, NMI 79.7, ARI 77.2", "10,000 test images",
                 "18gITFzAbQsGS5vt8hyi5HjbeRDsVLihw", "CC BY-NC 4.0", "selflabel file"):
        assert part in line
    assert "47.23" in listed["scan-cifar20-selflabel"] and "89.24" in listed["superand-cifar10"]
    assert "scan-cifar10-selflabel" in call("list", "checkpoints").out


# ---- file and recipe have to agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "name", "refusal"), [
    ("scan", "scan-cifar20", "has 10 clusters, and recipe scan-cifar20 20 classes. hint: --as scan-cifar10 or nnm-cif"),
    ("scan, 50 layers", "scan-imagenet100", "has 50 clusters, and recipe scan-imagenet100 100 classes"),
    ("scan, 50 layers", "scan-cifar10", "recipe scan-cifar10 has another stem: stem=cifar does not fit"),
    ("scan", "scan-imagenet50", "recipe scan-imagenet50 has another stem: stem=imagenet does not fit"),
    ("superand", "scan-cifar10", "is a Super-AND or AND encoder, and recipe scan-cifar10 has none. hint: --as supera"),
    ("superand", "superand-folder", "recipe superand-folder has another stem"),
    ("tsuc", "scan-cifar10", "is a clustering by TSUC, and recipe scan-cifar10 has none. hint: --as tsuc-cifar10"),
    ("ruc", "scan-cifar10", "is a clustering by RUC, and recipe scan-cifar10 has none. hint: --as ruc-scan-cifar10"),
    ("simclr", "tsuc-cifar10", "is a SimCLR encoder, and recipe tsuc-cifar10 has none"),
    ("moco", "scan-stl10", "recipe scan-stl10 has another stem"),
    ("selflabel", "tsuc-cifar10", "is a self-labelled clustering, and recipe tsuc-cifar10 has none"),
    ("scan", "frozen-kmeans", "takes frozen encoders and no published checkpoint"),
    ("scan", "scan-cifar11", "no recipe 'scan-cifar11'. hint: did you mean scan-cifar10?"),
])
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path: Path, layout: str, name: str, refusal: str) -> None:
    file = file_of(layout, tmp_path / "file.t7")
    assert refusal in call("import", file, "--as", name, "--out", tmp_path / "run").error()
    assert not (tmp_path / "run").exists()


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    simclr, scan = file_of("simclr", tmp_path / "simclr.pth.tar"), file_of("scan", tmp_path / "scan.pth.tar")
    run = ("--as", "scan-cifar10", "--out", tmp_path / "run")
    assert "leave out --head 0" in call("import", simclr, *run, "--head", 0).error()
    assert f"leave out --encoder {scan}" in call("import", simclr, *run, "--encoder", scan).error()
    assert "there is no head 3" in call("import", scan, *run, "--head", 3).error()
    assert "--stem stl is not that of recipe scan-cifar10, cifar" in call("import", scan, *run, "--stem", "stl").error()
    assert "another stem" in call("import", scan, *run, "--encoder", file_of("moco", tmp_path / "moco")).error()
    assert not (tmp_path / "run").exists()


def test_one_head_alone_stands_for_a_clustering_where_a_recipe_has_no_self_labelling(tmp_path: Path) -> None:
    facts = import_run(file_of("selflabel", tmp_path / "file"), "nnm-cifar10", tmp_path / "run")
    assert facts["stage"] == "cluster"
    assert recorded_pipeline(tmp_path / "run").title("cluster") == "NNM (published weights)"


@pytest.mark.parametrize(("layout", "fits"), [
    ("scan", ["scan-cifar10", "nnm-cifar10", "ruc-scan-cifar10"]), ("tsuc", ["tsuc-cifar10"]),
    ("ruc", ["ruc-scan-cifar10"]), ("superand", ["superand-cifar10", "tsuc-cifar10"]),
    ("scan, 50 layers", ["scan-imagenet50"])])
def test_without_a_recipe_those_that_fit_are_named(tmp_path: Path, layout: str, fits: list[str]) -> None:
    stem = "imagenet" if "50 layers" in layout else "cifar"
    assert recipes_for(load_published(file_of(layout, tmp_path / "file"), stem=stem)) == fits


def test_a_network_of_another_width_is_taken_and_said_so(tmp_path: Path) -> None:
    facts = import_run(file_of("scan", tmp_path / "file"), "scan-cifar10", tmp_path / "run")
    assert "the network is not the recipe's: width 4 and not 64" in facts["notes"]


# ---- files that are damaged, hostile or not there -------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_in_any_layout_is_refused_and_not_run(tmp_path: Path, layout: str, legacy: bool) -> None:
    marker, held = tmp_path / "made by the file", LAYOUTS[layout].make(views(LAYOUTS[layout].size, 2)).held
    file = write(tmp_path / "file.t7", held | {"more": Hostile(marker)}, legacy=legacy)
    said = call("import", file, "--as", LAYOUTS[layout].recipe, "--out", tmp_path / "run").error()
    assert "which is code and not weights: it was refused and not run" in said
    assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", ["simclr", "scan to resume", "ruc", "tsuc", "moco"])
def test_a_truncated_file_gives_one_line(tmp_path: Path, layout: str, legacy: bool) -> None:
    file = file_of(layout, tmp_path / "file.t7", legacy=legacy)
    data = file.read_bytes()
    for share in (0, 0.02, 0.6, 0.999):
        file.write_bytes(data[: int(share * len(data))])
        said = call("import", file, "--as", LAYOUTS[layout].recipe, "--out", tmp_path / "run").error(1)
        assert "cannot be read" in said and "fetch the file again" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("held", [[1, 2], {"net": {"a": torch.ones(1)}}, {"state_dict": {"fc.weight": torch.ones(2)}},
                                  torch.nn.Linear(2, 2).state_dict()])
def test_a_foreign_file_gives_one_line(tmp_path: Path, held: object) -> None:
    file = write(tmp_path / "file.pth", held)
    said = call("import", file, "--as", "scan-cifar10", "--out", tmp_path / "run").error()
    assert "give a checkpoint of SCAN" in said
    file.write_bytes(b"<html>Quota exceeded</html>")
    assert "cannot be read" in call("import", file, "--as", "scan-cifar10", "--out", tmp_path / "run").error(1)
    missing = call("import", tmp_path / "none", "--as", "scan-cifar10", "--out", tmp_path / "run").error()
    assert "there is no checkpoint" in missing and not (tmp_path / "run").exists()


# ---- the run folder -------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    file = file_of("scan", tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    said = call("import", file, "--as", "scan-cifar10", "--out", tmp_path / "other").error()
    assert "not empty and not a run folder" in said
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_what_was_imported_may_be_imported_again_until_a_run_is_made_of_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_run(file_of("scan", tmp_path / "scan"), "scan-cifar10", run)
    import_run(file_of("simclr", tmp_path / "simclr"), "scan-cifar10", run)
    assert [path.name for path in (run / "published").iterdir()] == ["simclr"]
    assert not (run / "model.json").exists() and not (run / "model.safetensors").exists()
    import_run(run / "published" / "simclr", "scan-cifar10", run)  # from itself
    assert (run / "published" / "simclr").stat().st_size == (tmp_path / "simclr").stat().st_size
    (run / "stages" / "pretrain-0").mkdir(parents=True)
    (run / "stages" / "pretrain-0" / "done.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run"):
        import_run(tmp_path / "scan", "scan-cifar10", run)


def test_two_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    (tmp_path / "pretext").mkdir()
    simclr = file_of("simclr", tmp_path / "pretext" / "model.pth.tar")
    scan = file_of("scan", tmp_path / "model.pth.tar")
    facts = import_run(scan, "scan-cifar10", tmp_path / "run", encoder=simclr)
    assert "neighbors are of the embeddings of model.pth.tar, a SimCLR encoder" in facts["notes"]
    pipeline = recorded_pipeline(tmp_path / "run")
    assert pipeline.embed.layer == "projection"
    for method, source in ((pipeline.cluster, scan), (pipeline.pretrain, simclr)):
        assert method.checkpoint().read_bytes() == source.read_bytes()


def test_a_ruc_file_of_96_pixels_is_shown_them_as_its_release_did(tmp_path: Path) -> None:
    nets = [filled(lambda: Scan("stl", 4, n_heads=1), seed) for seed in (1, 2)]
    file = write(tmp_path / "ruc.t7", {f"net{i + 1}": parallel(net.state_dict()) for i, net in enumerate(nets)})
    import_run(file, "ruc-scan-stl10", tmp_path / "run")
    pipeline = recorded_pipeline(tmp_path / "run")
    assert pipeline.cluster.views.mean == pipeline.pretrain.views.mean == (0.4914, 0.4822, 0.4465)
    assert pipeline.title("cluster") == "SCAN + self-label + RUC (published weights)"
    assert pipeline.data.pretrain_split is None  # nothing learns from the unlabelled images


# ---- from file to report --------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Tiny files of CIFAR-10: 15 training images and 3 test images."""
    official.cifar10(tmp_path / "data")
    return tmp_path / "data"


def scores(said: Said) -> dict[tuple[str, str], dict[str, float]]:
    return {(row["method"], row["split"]): row for row in told(said)["scores"]}


def expected_labels(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the network of the self-label file says of the training images, and their true classes, both by hand."""
    import pickle

    batches = [pickle.loads((data / "cifar-10-batches-py" / f"data_batch_{b}").read_bytes()) for b in range(1, 6)]
    pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32) / 255
    mean, std = (np.array(each)[:, None, None] for each in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    net = filled(lambda: Scan("cifar", 4, n_heads=1))
    with torch.no_grad():
        logits = net(torch.tensor((pixels - mean) / std, dtype=torch.float32))[0]
    return logits.argmax(dim=1).numpy(), np.concatenate([batch[b"labels"] for batch in batches])


def test_a_self_label_file_is_scored_predicted_with_and_reported(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    file = file_of("selflabel", tmp_path / "selflabel.pth.tar", legacy=True)
    said = call("import", file, "--as", "scan-cifar10", "-o", run)
    assert said.code == 0 and "expected: the authors' file should give: Hungarian accuracy 88.3" in said.out
    assert f"next: phyla evaluate {run}" in said.out and "stage: refine" in said.out
    photos = pictures(tmp_path / "photos", 3)
    assert len(call("predict", run, photos).out.splitlines()) == 4  # before there are images to score
    file.unlink()

    said = call("evaluate", run, "--data", data, "--json", *PLAIN)
    found = scores(said)
    row = found["SCAN + self-label (published weights)", "train"]
    labels, true = expected_labels(data)
    assert len(set(labels)) > 1 and row["ari"] == pytest.approx(adjusted_rand_score(true, labels), abs=1e-6)
    assert ("SCAN + self-label (published weights)", "test") in found and ("k-means on embeddings", "test") in found
    assert any("should give: Hungarian accuracy 88.3" in line for line in told(said)["notices"])
    assert len(call("predict", run, photos).out.splitlines()) == 4
    report = call("report", run, "--data", data)
    assert report.code == 0 and "88.3" in (run / "report.html").read_text(encoding="utf-8")
    assert call("show", run).code == 0

    moved = shutil.move(run, tmp_path / "moved")  # with the file in it
    before = {path.name for path in Path(moved).glob("stages/*") if not path.name.startswith("report-")}
    assert told(call("evaluate", moved, "--data", data, "--json"))["did_work"] is False
    assert {path.name for path in Path(moved).glob("stages/*") if not path.name.startswith("report-")} == before
    assert export_onnx(Path(moved), tmp_path / "model.onnx").difference < 1e-4


def test_a_scan_file_is_scored_as_it_is_and_then_refined(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    pretext, scan = (file_of(name, tmp_path / f"{name}.pth.tar") for name in ("simclr", "scan"))
    facts = told(call("import", scan, "--as", "ruc-scan-cifar10", "--encoder", pretext, "-o", run, "--json"))
    assert (facts["stage"], facts["head"]) == ("cluster", 0)
    found = scores(call("evaluate", run, "--data", data, "--json", *PLAIN))
    assert {method for method, _ in found} >= {"SCAN (published weights)"} and len(found) == 8
    encoder, projection = load_encoder(next(run.glob("stages/pretrain-*")))
    assert projection is not None and encoder.spec.width == 4

    small = {"refine.n_epochs": 1, "refine.batch_size": 5, "refine.threshold": 0.2, "robust.n_epochs": 1,
             "robust.batch_size": 5, "robust.confidence_threshold": 0.1}
    flags = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    refined = call("refine", run, "--data", data, *flags)
    assert refined.code == 0, refined
    assert {path.name.split("-")[0] for path in run.glob("stages/*")} >= {"cluster", "refine", "robust"}
    found = scores(call("evaluate", run, "--data", data, "--json"))
    assert ("SCAN (published weights) + self-label + RUC", "test") in found


def test_the_best_of_tsucs_heads_is_chosen_without_labels_and_all_are_scored(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    facts = told(call("import", file_of("tsuc", tmp_path / "ul.t7"), "--as", "tsuc-cifar10", "-o", run, "--json"))
    assert facts["head"] is None and "predict" not in facts["next"]
    assert "holds no classifier" in call("predict", run, pictures(tmp_path / "photos", 2)).error()
    said = call("evaluate", run, "--data", data, "--json", *PLAIN)
    row = scores(said)["TSUC (published weights)", "train"]
    assert row["heads_best_hungarian_accuracy"] >= row["heads_mean_hungarian_accuracy"] > 0
    assert any("of 5 has the lowest neighbor score" in line for line in told(said)["notices"])
    assert Classifier.load(run).net.heads.n_heads == 1

    named = tmp_path / "named"
    told(call("import", tmp_path / "ul.t7", "--as", "tsuc-cifar10", "-o", named, "--head", 3, "--json"))
    before = Classifier.load(named).net.heads.weight
    told(call("evaluate", named, "--data", data, "--json", *PLAIN))
    torch.testing.assert_close(Classifier.load(named).net.heads.weight, before)


def test_a_memory_is_a_bank_for_knn_where_it_is_of_these_images(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    made = LAYOUTS["superand"].make(views(32, 2)).held
    import_run(write(tmp_path / "first.t7", made), "superand-cifar10", run)
    from phyla.images.sources import open_images

    images = open_images("cifar10", split="train", data_dir=data).images
    found = load_published(tmp_path / "first.t7", stem="cifar")
    rows = embed(images, torch.nn.Sequential(found.encoder, found.projection), recipe("superand-cifar10").pretrain.views
                 .plain()).values
    made["npc"]["memory"] = torch.from_numpy(rows - rows.mean(axis=0))
    facts = import_run(write(tmp_path / "second.t7", made), "superand-cifar10", run)
    assert "89.24" in facts["expected"]
    found_scores = scores(call("evaluate", run, "--data", data, "--json", *PLAIN))
    assert "knn_accuracy_200_memory" in found_scores["embeddings (probes)", "test"]


def test_a_run_goes_on_from_an_imported_encoder(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    file = file_of("simclr", tmp_path / "simclr.pth.tar")
    facts = told(call("import", file, "--as", "scan-cifar10", "-o", run, "--json"))
    assert "65.9" in facts["expected"] and facts["stage"] == "pretrain"
    small = {key: value for key, value in SMALL.items() if not key.startswith("pretrain.")}
    flags = [part for key, value in (small | {"cluster.batch_size": 5, "refine.batch_size": 5}).items()
             for part in ("--set", f"{key}={value}")]
    said = call("run", run, "--data", data, "--json", *flags)
    assert ("SCAN + self-label", "test") in scores(said)
    assert any(line.startswith("encoder: simclr.pth.tar, published weights") for line in told(said)["notices"])


def test_without_its_images_a_run_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHYLA_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    import_run(file_of("selflabel", tmp_path / "file"), "scan-cifar10", tmp_path / "run")
    for verb in ("evaluate", "refine", "run"):
        assert "cifar10" in call(verb, tmp_path / "run", "--offline").error()
    assert "has no result yet" in call("show", tmp_path / "run").error()
