"""README's tables are those that results/ give, every result is what its command runs, and shown commands exist."""

import json
import re
import shutil
from pathlib import Path

import pytest

from commands import call
from phyla.results import RunResult, read_results, without_paths
from phyla.resulttables import experiment_of, stale, write_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def flat(table, prefix=""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.fixture
def copy(tmp_path):
    """Return a copy of what tables are written into and from."""
    for name in ("README.md", "docs", "results"):
        of = ROOT / name
        shutil.copytree(of, tmp_path / name) if of.is_dir() else shutil.copy(of, tmp_path / name)
    return tmp_path


def test_every_table_is_written_from_the_results():
    assert stale(RESULTS) == []


@pytest.mark.parametrize("page", ["README.md", "docs/concepts/frozen-encoders.md"])
def test_a_number_edited_by_hand_is_found(copy, page):
    path = copy / page
    text = path.read_text(encoding="utf-8")
    number = re.compile(r"(?<=\| )0\.\d\d(\d)(?= ± )")
    begin = text.index("results: begin")
    found = number.search(text, begin)
    path.write_text(text[: found.start(1)] + str((int(found[1]) + 1) % 10) + text[found.end(1):], encoding="utf-8")
    assert stale(copy / "results") == [path]
    assert write_tables(copy / "results") == [path] and stale(copy / "results") == []
    assert path.read_text(encoding="utf-8") == text


def test_a_result_that_changes_makes_the_table_stale(copy):
    path = copy / "results" / "scan-digits" / "seed-1.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'"hungarian_accuracy": 0\.\d+', '"hungarian_accuracy": 0.5', text), encoding="utf-8")
    assert copy / "README.md" in stale(copy / "results")


def test_the_verb_writes_the_tables(copy):
    path = copy / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("| SCAN + self-label |", "| other |"), encoding="utf-8")
    said = call("reproduce", "--table", "--results", copy / "results")
    assert said.code == 0 and said.out == f"{path}\n" and path.read_text(encoding="utf-8") == text
    assert call("reproduce", "--table", "--results", copy / "results").out == ""


def test_a_table_of_results_that_are_not_there_is_one_line(copy):
    path = copy / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(" digits fashion-small cifar10-small (", " nothing ("), encoding="utf-8")
    assert "no results in" in call("reproduce", "--table", "--results", copy / "results").error()
    assert "no page beside" in call("reproduce", "--table", "--results", copy / "docs" / "results").error()


def test_results_hold_several_seeds_and_what_made_them():
    found = read_results(RESULTS)
    assert found
    for name, results in found.items():
        assert len(results) >= 3, name
        for result in results:
            assert isinstance(result, RunResult) and result.name == name
            assert result.machine and {"phyla", "python", "torch"} <= set(result.versions)
            assert result.seconds.keys() == result.devices.keys() >= {"pretrain", "cluster", "evaluate"}
            assert result.scores and all(row.protocol for row in result.scores)


def test_every_result_is_what_its_command_runs():
    for name, results in read_results(RESULTS).items():
        for result in results:
            asked = experiment_of(result)
            assert asked.name == name
            wanted = dict(flat(json.loads(json.dumps(without_paths(asked.pipeline(result.seed).options())))))
            for key, value in flat(dict(result.options)):
                assert wanted.get(key, value) == value, (name, key)  # an option that has gone since is no difference


def test_a_name_without_short_is_of_the_whole_schedule():
    for name, results in read_results(RESULTS).items():
        assert experiment_of(results[0]).is_short == name.endswith("-short")


def test_results_of_frozen_encoders_hold_three_seeds_of_every_method():
    found = sorted((RESULTS / "frozen").glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert len(set(result["seeds"])) == 3 and result["rows"], path.name
        assert {"versions", "machine", "device", "set", "encoder", "n_images"} <= set(result)
        assert all(len(values) == 3 for row in result["rows"] for values in row["values"].values())


def test_the_commands_in_the_documents_exist():
    from typer.main import get_command

    from phyla.cli import app

    verbs = set(get_command(app).commands)
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for block in re.findall(r"^```(?:\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for verb in re.findall(r"^(?:\$ )?phyla ([a-z]+)", block, re.MULTILINE):
                assert verb in verbs, f"{path.name}: phyla {verb}"
