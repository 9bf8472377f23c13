"""Several seeds of a recipe: a result each, gone on with after a stop, and nothing that passes for another."""

import json
import shutil

import pytest

from commands import call
from phyla.errors import InputError
from phyla.experiment import Experiment
from phyla.pipeline import check_pipeline
from phyla.reproduce import reproduce
from phyla.results import read_result, read_results
from phyla.training.device import choose_device

KM = ("pretrain.n_epochs=1", "pretrain.batch_size=20", "pretrain.encoder.width=4", "cluster=kmeans", "refine=none",
      "cluster.n_init=1", "evaluate.kmeans_restarts=1", "data.limit=60")
"""The quickest chain there is: an encoder of one epoch, and k-means."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder below which two seeds of a tiny run and their results lie."""
    place = tmp_path_factory.mktemp("made")
    reproduce(Experiment("scan-digits", changes=KM), (0, 4), runs=place / "runs", results=place / "results",
              device=choose_device("cpu"))
    return place


def again(place, *changes, seeds=(0,), **asked):
    return reproduce(Experiment("scan-digits", changes=(*KM, *changes), **asked), seeds, runs=place / "runs",
                     results=place / "results", device=choose_device("cpu"))


def test_each_seed_leaves_a_run_folder_and_a_result(made):
    found = read_results(made / "results")
    assert list(found) == ["scan-digits-short"]
    assert [result.seed for result in found["scan-digits-short"]] == [0, 4]
    for seed in (0, 4):
        assert (made / "runs" / "scan-digits" / f"seed-{seed}" / "run.json").exists()
    first = found["scan-digits-short"][0]
    assert set(first.seconds) == {"pretrain", "embed", "neighbors", "cluster", "evaluate"}
    assert {"phyla", "python", "torch"} <= set(first.versions) and first.machine and first.precision == "fp32"
    rows = {row.method: row for row in first.scores}
    assert rows["SimCLR + k-means"].protocol == "on-train" and 0 < rows["SimCLR + k-means"].values["nmi"] < 1


def test_pretext_seeds_vary_too(made):
    one, other = read_results(made / "results")["scan-digits-short"]
    for part in ("pretrain", "cluster"):
        assert (one.options[part]["random_state"], other.options[part]["random_state"]) == (0, 4)
    keys = {path.name for path in (made / "runs").glob("scan-digits/seed-*/stages/pretrain-*")}
    assert len(keys) == 2


def test_a_result_names_no_path_of_the_machine(made):
    for path in (made / "results").rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(made) not in text and json.loads(text)["options"]["data"]["source"] == "digits"


def test_given_again_nothing_is_done_and_the_result_is_the_same(made, monkeypatch):
    before = {path: path.read_bytes() for path in (made / "results").rglob("*.json")}
    monkeypatch.setattr("phyla.stages.pretrain", lambda *_, **__: pytest.fail("trained again"))
    again(made, seeds=(0, 4))
    assert {path: path.read_bytes() for path in (made / "results").rglob("*.json")} == before


def test_after_a_kill_it_goes_on_with_what_is_there(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "place")
    shutil.rmtree(tmp_path / "place" / "results")
    for stage in (tmp_path / "place" / "runs").glob("scan-digits/seed-4/stages/[!p]*"):
        shutil.rmtree(stage)
    monkeypatch.setattr("phyla.stages.pretrain", lambda *_, **__: pytest.fail("trained again"))
    again(tmp_path / "place", seeds=(0, 4))
    ours, first = (read_results(place / "results")["scan-digits-short"] for place in (tmp_path / "place", made))
    assert [result.scores for result in ours] == [result.scores for result in first]


def test_another_recipe_takes_the_encoder_that_is_there(made, tmp_path, monkeypatch):
    shutil.copytree(made / "runs", tmp_path / "runs")
    monkeypatch.setattr("phyla.stages.pretrain", lambda *_, **__: pytest.fail("trained again"))
    [result] = reproduce(Experiment("nnm-digits", changes=KM), (4,), runs=tmp_path / "runs",
                         results=tmp_path / "results", device=choose_device("cpu"))
    assert result.name == "nnm-digits-short"


def test_runs_of_one_name_that_differ_are_refused_before_any_work(made, monkeypatch):
    monkeypatch.setattr("phyla.reproduce.Runner", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(InputError, match=r"seed 1 has pretrain\.lr=0\.1 and seed 0 0\.3.*another --name"):
        again(made, "pretrain.lr=0.1", seeds=(1,))


def test_a_name_of_its_own_keeps_the_two_apart(made, tmp_path):
    shutil.copytree(made, tmp_path / "place")
    [result] = again(tmp_path / "place", "cluster.n_init=2", called="twice")
    assert result.name == "twice-short" and len(read_results(tmp_path / "place" / "results")) == 2


def test_an_option_that_cannot_be_stops_before_any_seed(tmp_path):
    said = call("reproduce", "scan-digits", "--seeds", "2", "--set", "cluster.lr=-1", "--out", tmp_path / "runs",
                "--results", tmp_path / "results")
    assert "lr" in said.error() and not (tmp_path / "runs").exists()


def test_the_verb_tells_mean_and_spread_on_stdout(made):
    asked = [part for change in KM for part in ("--set", change)]
    place = ("--out", made / "runs", "--results", made / "results", "--seeds", "0,4")
    said = call("reproduce", "scan-digits", *asked, *place)
    lines = said.out.splitlines()
    assert said.code == 0 and lines[0] == "scan-digits-short, seeds 0, 4"
    assert any(line.split("  ")[0] == "SimCLR + k-means" and "±" in line for line in lines)
    told = json.loads(call("reproduce", "scan-digits", *asked, *place, "--json", "--quiet").out)
    row = next(row for row in told["rows"] if row["method"] == "SimCLR + k-means")
    values = [next(scored for scored in read_result(made / "results" / "scan-digits-short" / f"seed-{seed}.json").scores
                   if scored.method == row["method"]).values["nmi"] for seed in (0, 4)]
    assert row["scores"]["nmi"]["mean"] == pytest.approx(sum(values) / 2)


@pytest.mark.parametrize("recipe", ["scan-cifar10", "nnm-stl10", "ruc-scan-cifar20", "tsuc-stl10", "scan-imagenet200"])
def test_published_recipes_are_ready_for_a_machine_that_has_the_data(recipe, monkeypatch):
    monkeypatch.setattr("phyla.zoo.PublishedEncoder.checkpoint", lambda _: None)
    for seed in (0, 1):
        check_pipeline(Experiment(recipe).pipeline(seed))
    assert Experiment(recipe).name == recipe
