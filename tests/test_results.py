"""A run's result as a file: whole, without paths, and refused where it is another's or damaged."""

import json
import math
from dataclasses import replace

import pytest

from phyla.errors import CorruptFileError, InputError
from phyla.experiment import Experiment
from phyla.results import RunResult, Scored, check_alike, read_result, read_results, without_paths, write_result
from phyla.resulttables import command_of, experiment_of, published_table, results_table


@pytest.fixture
def one():
    asked = Experiment("scan-digits", changes=("cluster.lr=0.01",))
    return RunResult(
        name=asked.name, recipe="scan-digits", ablation="", protocol="", selection="", overrides=asked.changes, seed=3,
        scores=(Scored("SCAN", "train", "on-train", "label-free", 60, {"hungarian_accuracy": 0.5, "nmi": 0.4,
                                                                       "ari": 0.3}),),
        seconds={"pretrain": 1.5}, devices={"pretrain": "CPU, 1 threads, fp32"}, precision="fp32", machine="Linux",
        versions={"phyla": "0.1.0"}, options=json.loads(json.dumps(asked.pipeline(3).options())))


def test_a_result_is_read_as_it_was_written(one, tmp_path):
    path = write_result(one, tmp_path)
    assert path == tmp_path / "scan-digits-changed" / "seed-3.json" and read_result(path) == one


def test_a_number_that_is_none_is_null(one, tmp_path):
    odd = replace(one, scores=(replace(one.scores[0], values={"nmi": math.nan}),))
    assert read_result(write_result(odd, tmp_path)).scores[0].values == {"nmi": None}


def test_paths_become_names(tmp_path):
    told = {"pretrain": {"path": str(tmp_path / "moco.pth.tar"), "lr": 0.1, "several": [str(tmp_path), "x"]}}
    assert without_paths(told) == {"pretrain": {"path": "moco.pth.tar", "lr": 0.1, "several": [tmp_path.name, "x"]}}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "name": "x"}'])
def test_a_file_that_is_no_result_is_named(text, tmp_path):
    path = tmp_path / "name" / "seed-0.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=r"seed-0\.json"):
        read_results(tmp_path)


def test_results_of_one_name_differ_in_their_seed_alone(one, tmp_path):
    other = replace(one, seed=10, options=json.loads(json.dumps(one.options)))
    for part in other.options.values():
        if isinstance(part, dict) and "random_state" in part:
            part["random_state"] = 10
    for each in (other, one):
        write_result(each, tmp_path)
    assert [result.seed for result in read_results(tmp_path)["scan-digits-changed"]] == [3, 10]
    other.options["cluster"]["lr"] = 1.0
    with pytest.raises(InputError, match=r"seed 3 has cluster\.lr=0\.01 and seed 10 1\.0"):
        check_alike(one, other)
    with pytest.raises(InputError, match="precision=fp32"):
        check_alike(one, replace(one, precision="bf16"))


def test_an_option_that_one_version_did_not_have_is_no_difference(one):
    older = json.loads(json.dumps(one.options))
    del older["cluster"]["normalize"]
    check_alike(one, replace(one, options=older))


def test_the_command_makes_it_again(one):
    assert command_of([one]) == "phyla reproduce scan-digits --seeds 3, --set cluster.lr=0.01"
    asked = Experiment("nnm-digits", "off", called="mine")
    mine = replace(one, name="mine", recipe="nnm-digits", ablation="off", overrides=(), precision="bf16")
    assert experiment_of(mine) == asked
    assert command_of([replace(mine, seed=0), replace(mine, seed=1)]) == (
        "phyla reproduce nnm-digits --seeds 2 --ablation off --name mine --precision bf16")


def test_a_table_shows_mean_spread_and_command(one, tmp_path):
    write_result(one, tmp_path)
    lines = results_table(tmp_path, ["scan-*"]).splitlines()
    assert "| scan-digits-changed | 60 train | SCAN | 0.500 | 0.400 | 0.300 |  | 1 |" in lines
    assert lines[-2] == command_of([one])
    with pytest.raises(InputError, match="are called nnm"):
        results_table(tmp_path, ["nnm-*"])


def test_the_table_of_what_papers_say_has_every_row(tmp_path):
    from phyla.published import published

    lines = published_table(tmp_path).splitlines()
    assert len(lines) == 2 + len(published())
    assert all(line.count("|") == 9 for line in lines)
    assert any("`scan-cifar10 --protocol train+test`" in line for line in lines)
    assert any("`nnm-stl10 --ablation visit-order --selection last`" in line for line in lines)
