"""What the methods of each stage leave in a run, whichever of them a recipe names: memory, rival heads, classifiers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import phyla
from commands import N_DIGITS, N_PICTURES, call, pictures
from phyla.cluster.kmeans import KMeans
from phyla.embed import embed
from phyla.errors import InputError
from phyla.evaluate.robustness import load_robustness
from phyla.nets.heads import Projection
from phyla.nets.resnet import EncoderSpec
from phyla.overrides import change
from phyla.pipeline import METHODS, TITLES, EmbedOptions, Pipeline
from phyla.recipes import RECIPES, recipe
from phyla.refine.selflabel import SelfLabel
from phyla.rundir import load_encoder, save_encoder
from phyla.runner import Runner
from phyla.stages import CLUSTERS_FROM, embedder, load_memory, load_rivals, project
from phyla.storage import write_text
from phyla.types import Embeddings
from phyla.zoo import Published, PublishedEncoder

pytestmark = pytest.mark.filterwarnings("ignore::phyla.errors.PhylaWarning")

SMALL = {"pretrain.encoder.width": 4, "pretrain.n_epochs": 1, "pretrain.n_rounds": 2, "pretrain.batch_size": 20,
         "pretrain.n_projection": 8, "evaluate.kmeans_restarts": 1, "evaluate.knn_neighbors": 5}
SMALL_TSUC = {"cluster.n_epochs": 2, "cluster.batch_size": 20, "cluster.n_heads": 3, "cluster.layer": "projection",
              "cluster.prototypes": "random", "cluster.norm": "feature_rows"}


@pytest.fixture(autouse=True)
def plain_report(monkeypatch):
    """Write a page of a line in the place of the report, which has tests of its own."""
    monkeypatch.setattr("phyla.runner.build_report", _page)


def _page(data, folder):
    write_text(folder / "report.html", data.title)


def small(name: str, **more: object) -> Pipeline:
    pipeline = recipe(name)
    told = SMALL | (SMALL_TSUC if name.startswith("tsuc") else {}) | {"data.limit": N_DIGITS}
    for key, value in (told | {key.replace("__", "."): value for key, value in more.items()}).items():
        pipeline = change(pipeline, key, value)
    return pipeline


def scores(run: Path) -> dict[str, dict[str, float]]:
    return {row["method"]: row["values"] for row in json.loads((run / "scores.json").read_text())["scores"]}


@pytest.fixture(scope="module")
def superand(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "superand"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phyla.runner.build_report", _page)
        Runner(small("superand-digits"), out).go()
    return out


@pytest.fixture(scope="module")
def tsuc(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tsuc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phyla.runner.build_report", _page)
        Runner(small("tsuc-digits"), out).go()
    return out


def only(run: Path, stage: str) -> Path:
    return next(run.glob(f"stages/{stage}-*"))


# ── Super-AND ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_memory_is_kept_with_the_ids_of_the_images(superand):
    memory = load_memory(only(superand, "pretrain"))
    assert memory.values.shape == (N_DIGITS, 8)
    assert list(memory.ids) == list(Runner(small("superand-digits"), superand).train.ids)
    np.testing.assert_allclose(np.linalg.norm(memory.values, axis=1), 1, atol=1e-5)
    assert load_memory(only(superand, "embed")) is None


def test_neighbors_vote_in_the_embeddings_and_in_both_banks(superand):
    found = scores(superand)
    probes = found["embeddings (probes)"]
    assert {"knn_accuracy_5", "knn_accuracy_5_memory", "knn_accuracy_5_recomputed"} <= set(probes)
    assert all(0 <= probes[name] <= 1 for name in probes)
    # k-means on embeddings is the result, so it is no baseline beside itself.
    assert list(found) == ["k-means on pixels", "Super-AND + k-means", "embeddings (probes)"]


def test_the_saved_classifier_gives_what_kmeans_gave(superand):
    held = np.load(only(superand, "cluster") / "train.npy")
    images = Runner(small("superand-digits"), superand).train
    np.testing.assert_allclose(phyla.load(superand).predict_proba(images), held, atol=1e-4)


def test_kmeans_on_projections_makes_a_classifier_too(tmp_path):
    pipeline = small("superand-digits", embed__layer="projection")
    Runner(pipeline, tmp_path / "run").go()
    classifier = phyla.load(tmp_path / "run")
    assert classifier.net.projection.n_out == 8
    held = np.load(only(tmp_path / "run", "cluster") / "train.npy")
    np.testing.assert_allclose(classifier.predict_proba(Runner(pipeline, tmp_path / "run").train), held, atol=1e-4)
    probes = scores(tmp_path / "run")["embeddings (probes)"]
    assert probes["knn_accuracy_5"] == probes["knn_accuracy_5_recomputed"]  # they are the same rows


def test_a_finished_run_has_nothing_to_do(superand, tsuc):
    assert not Runner(small("superand-digits"), superand).go().did_work
    assert not Runner(small("tsuc-digits"), tsuc).go().did_work


# ── TSUC ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_head_is_scored_and_one_is_the_result(tsuc):
    heads = load_rivals(only(tsuc, "cluster"), "train")["heads"]
    assert heads.shape == (3, N_DIGITS)
    facts = json.loads((only(tsuc, "cluster") / "done.json").read_text())["facts"]
    chosen = np.load(only(tsuc, "cluster") / "train.npy").argmax(1)
    np.testing.assert_array_equal(heads[facts["head"]], chosen)
    assert facts["head"] == int(np.argmin(facts["head_losses"]))
    row = scores(tsuc)["TSUC"]
    assert row["heads_best_hungarian_accuracy"] >= row["heads_mean_hungarian_accuracy"] >= 0
    assert row["heads_best_hungarian_accuracy"] >= row["hungarian_accuracy"]


def test_tsuc_is_saved_with_its_projection_and_one_plain_head(tsuc):
    classifier = phyla.load(tsuc)
    assert classifier.net.projection.n_layers == 1 and classifier.net.heads.n_heads == 1
    held = np.load(only(tsuc, "cluster") / "train.npy")
    images = Runner(small("tsuc-digits"), tsuc).train
    np.testing.assert_allclose(classifier.predict_proba(images), held, atol=1e-4)


def test_other_neighbors_do_not_train_tsuc_again(tsuc, tmp_path):
    runner = Runner(small("tsuc-digits", neighbors__n_neighbors=7), tsuc)
    runner.go()
    assert [name for name, stage in runner.run.stages.items() if not stage.was_kept] == ["neighbors", "evaluate",
                                                                                         "report"]


def test_self_labelling_refines_tsuc(tmp_path):
    pipeline = small("tsuc-digits")
    views = replace(pipeline.pretrain.views, kind="strong", cutout=2, operations=("rotate",))
    pipeline = replace(pipeline, refine=SelfLabel(views=views, threshold=0.1, n_epochs=1, batch_size=20, keep="last"))
    Runner(pipeline, tmp_path / "run").go()
    assert "TSUC + self-label" in scores(tmp_path / "run")
    held = np.load(only(tmp_path / "run", "refine") / "train.npy")
    images = Runner(pipeline, tmp_path / "run").train
    np.testing.assert_allclose(phyla.load(tmp_path / "run").predict_proba(images), held, atol=1e-4)


def test_tsuc_on_held_out_images_has_rows_of_both_splits(tmp_path, monkeypatch):
    from test_pipeline import mnist

    mnist(tmp_path, 40, 24)
    pipeline = small("tsuc-digits", data__source="mnist", data__held_out="test", data__limit=None)
    Runner(pipeline, tmp_path / "run", data_dir=tmp_path).go()
    rows = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    assert [row["split"] for row in rows if row["method"] == "TSUC"] == ["train", "test"]
    assert all("heads_mean_hungarian_accuracy" in row["values"] for row in rows if row["method"] == "TSUC")
    assert load_rivals(only(tmp_path / "run", "cluster"), "held_out")["heads"].shape == (3, 24)
    probes = [row["values"] for row in rows if row["method"] == "embeddings (probes)"]
    assert all("knn_accuracy_5_memory" in values for values in probes)


# ── NNM and RUC ─────────────────────────────────────────────────────────────────────────────────────────────────────


SMALL_NNM = {"pretrain.encoder.width": 4, "pretrain.n_epochs": 1, "pretrain.batch_size": 20, "cluster.n_epochs": 3,
             "cluster.batch_size": 20, "data.limit": N_DIGITS, "evaluate.kmeans_restarts": 1}


def changed(name: str, told: dict[str, object]) -> Pipeline:
    pipeline = recipe(name)
    for key, value in told.items():
        pipeline = change(pipeline, key, value)
    return pipeline


def test_the_best_epoch_by_labels_stands_beside_nnm_and_is_not_it(tmp_path):
    pipeline = changed("nnm-digits", SMALL_NNM)
    Runner(pipeline, tmp_path / "run").go()
    epochs = load_rivals(only(tmp_path / "run", "cluster"), "train")["epochs"]
    assert epochs.shape == (3, N_DIGITS)
    found = scores(tmp_path / "run")
    oracle = found["NNM (oracle: best epoch by labels)"]
    assert oracle["hungarian_accuracy"] >= found["NNM"]["hungarian_accuracy"]
    facts = json.loads((only(tmp_path / "run", "cluster") / "done.json").read_text())["facts"]
    chosen = np.load(only(tmp_path / "run", "cluster") / "train.npy").argmax(1)
    np.testing.assert_array_equal(epochs[facts["epoch"] - 1], chosen)


def test_the_oracle_is_of_the_split_that_was_watched(tmp_path):
    from test_pipeline import mnist

    mnist(tmp_path, 40, 40)  # as many of either split: the rows could be taken for one another
    told = SMALL_NNM | {"data.source": "mnist", "data.held_out": "test", "data.limit": None}
    Runner(changed("nnm-digits", told), tmp_path / "run", data_dir=tmp_path).go("evaluate")
    cluster = only(tmp_path / "run", "cluster")
    assert "epochs" in load_rivals(cluster, "held_out") and not load_rivals(cluster, "train")
    rows = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    assert [row["split"] for row in rows if "oracle" in row["method"]] == ["test"]


def test_neighbors_may_be_ranked_again(tmp_path):
    pipeline = changed("nnm-digits", SMALL_NNM)
    plain, again = Runner(pipeline, tmp_path / "run"), Runner(
        changed("nnm-digits", SMALL_NNM | {"neighbors.rerank": True, "neighbors.k1": 8}), tmp_path / "run")
    plain.go("neighbors")
    again.go("neighbors")
    assert [name for name, stage in again.run.stages.items() if not stage.was_kept] == ["neighbors"]
    assert (plain.neighbors("train").indices != again.neighbors("train").indices).any()


def test_neighbors_may_come_from_an_index_whose_recall_is_told(tmp_path):
    pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'phyla[scale]'")
    told = {"neighbors.index": "ivf", "neighbors.recall": 0.9}
    exact, indexed = (Runner(changed("nnm-digits", SMALL_NNM | more), tmp_path / "run") for more in ({}, told))
    exact.go("neighbors")
    result = indexed.go("neighbors")
    assert [name for name, stage in indexed.run.stages.items() if not stage.was_kept] == ["neighbors"]
    facts = indexed.run.stages["neighbors"].facts
    assert 0.85 < facts["recall"] <= 1
    assert result.notices == (f"neighbors: IVF, {facts['notices'][0].split(', ')[1]}, recall {facts['recall']:.3f} on "
                              f"{N_DIGITS // 2} exact rows",)
    exact.go("neighbors")
    assert exact.run.stages["neighbors"].was_kept, "an index leaves the key of an exact search alone"


@pytest.mark.parametrize(("told", "says"), [
    ({"neighbors.index": "ivf", "neighbors.rerank": True}, "rerank=true needs the exact neighbors"),
    ({"neighbors.recall": 0.0}, "recall must be above 0"),
])
def test_options_of_the_index_are_judged_before_the_work(tmp_path, told, says):
    with pytest.raises(InputError, match=says):
        Runner(changed("nnm-digits", SMALL_NNM | told), tmp_path / "run")


def test_ruc_comes_on_top_of_a_refined_result(tmp_path):
    told = SMALL_NNM | {"refine.n_epochs": 1, "refine.batch_size": 20, "refine.threshold": 0.1, "refine.keep": "last",
                        "robust.n_epochs": 1, "robust.batch_size": 20, "robust.confidence_threshold": 0.05,
                        "robust.n_neighbors": 5, "evaluate.attack_images": 10}
    pipeline = changed("ruc-digits", told)
    runner = Runner(pipeline, tmp_path / "run")
    runner.go()
    found = scores(tmp_path / "run")
    titles = ["SCAN", "SCAN + self-label", "SCAN + self-label + RUC"]
    assert [name for name in found if name in titles] == titles
    assert {"network_1_hungarian_accuracy", "network_2_hungarian_accuracy"} <= set(found[titles[2]])
    classifier = phyla.load(tmp_path / "run")
    assert classifier.net.encoder.spec.members == 2
    held = np.load(only(tmp_path / "run", "robust") / "train.npy")
    np.testing.assert_allclose(classifier.predict_proba(runner.train), held, atol=1e-4)
    curves = load_robustness(only(tmp_path / "run", "evaluate") / "robustness.json")
    assert {curve.title for curve in curves} == set(titles) and all(curve.n_images == 10 for curve in curves)
    without = Runner(changed("ruc-digits", told | {"robust": "none"}), tmp_path / "run")
    without.go()
    fresh = [name for name, stage in without.run.stages.items() if not stage.was_kept]
    assert fresh == ["evaluate", "report"] and phyla.load(tmp_path / "run").net.encoder.spec.members == 1


# ── the command line and the tables of methods ──────────────────────────────────────────────────────────────────────


def test_a_folder_may_take_another_recipe(tmp_path):
    photos = pictures(tmp_path / "photos")
    told = SMALL | SMALL_TSUC | {"data.size": 16, "pretrain.views.size": 16, "cluster.views.size": 16,
                                 "pretrain.n_rounds": 1}
    flags = [part for key, value in told.items() for part in ("--set", f"{key}={value}")]
    done = call("run", photos, "--recipe", "superand-folder", "--classes", 3, *flags, "--out", tmp_path / "run")
    assert done.code == 0, done
    assert len(np.load(only(tmp_path / "run", "cluster") / "train.npy")) == N_PICTURES
    assert not call("run", tmp_path / "run", "--json").code


def test_a_recipe_for_a_data_set_is_refused_for_a_folder(tmp_path):
    photos = pictures(tmp_path / "photos", 3)
    said = call("run", photos, "--recipe", "tsuc-cifar10", "--classes", 3).error()
    assert "recipe tsuc-cifar10 is made for cifar10" in said and "superand-folder" in said
    assert "--recipe is for a folder" in call("run", "scan-digits", "--recipe", "superand-folder").error()


def test_every_method_of_a_pipeline_has_a_title_and_inputs():
    for part, methods in METHODS.items():
        assert all(type(method()).__name__ == name and name in TITLES for name, method in methods.items()), part
    assert set(CLUSTERS_FROM) == set(METHODS["cluster"])
    used = {type(getattr(recipe(name), part)).__name__ for name in RECIPES for part in METHODS}
    assert {name for methods in METHODS.values() for name in methods} - {"PublishedClusters"} <= used  # by an import


def test_an_encoder_is_saved_and_loaded_with_any_projection(tmp_path):
    for n_layers, n_out in ((2, 8), (1, 8)):
        encoder, projection = EncoderSpec(width=2, streams="rgb_sobel").build(), Projection(32, n_out, n_layers)
        save_encoder(tmp_path, encoder, projection)
        again, beside = load_encoder(tmp_path)
        assert again.spec == encoder.spec and beside.spec() == projection.spec()
        assert all((a == b).all() for a, b in zip(beside.parameters(), projection.parameters(), strict=True))
    values = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    shown = project(tmp_path, Embeddings(values, list("abcde")), "encoder")
    np.testing.assert_allclose(np.linalg.norm(shown.values, axis=1), 1, atol=1e-6)
    save_encoder(tmp_path, encoder, None)
    assert load_encoder(tmp_path)[1] is None
    with pytest.raises(InputError, match="no projection"):
        embedder(tmp_path, EmbedOptions().layer)


def test_a_kmeans_without_temperature_makes_no_classifier():
    fitted = KMeans(n_clusters=2, temperature=0).fit(np.eye(4))
    with pytest.raises(InputError, match="temperature=0 gives no classifier"):
        fitted.as_linear()


@pytest.mark.parametrize("fits", [True, False])
def test_a_memory_bank_of_other_images_is_left_out(monkeypatch, tmp_path, caplog, fits):
    """A bank has no ids: one of as many other images would give a kNN accuracy that means nothing."""
    images = Runner(small("superand-digits"), tmp_path / "run").train
    views = recipe("superand-digits").pretrain.views
    encoder, projection = EncoderSpec(width=4, streams="rgb_sobel").build().eval(), Projection(64, 8, 1).eval()
    rows = embed(images, nn.Sequential(encoder, projection), views.plain()).values
    rows = rows - rows.mean(axis=0) if fits else np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)
    monkeypatch.setattr("phyla.zoo.load_published", lambda path, stem: Published(
        "superand", encoder, projection, None, None, memory=rows))
    (tmp_path / "file.t7").touch()
    fitted = PublishedEncoder(path=str(tmp_path / "file.t7"), stem="cifar", views=views).fit(images)
    assert (fitted.memory_ is not None) == fits
    assert ("memory bank is left out" in caplog.text) != fits
