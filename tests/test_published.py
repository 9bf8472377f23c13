"""The published numbers: each with a recipe that exists or a reason, and ablations that change what they say."""

import tomllib
from pathlib import Path

import pytest

import phyla
from phyla.errors import InputError
from phyla.experiment import Experiment, clustered_protocol, protocol_of
from phyla.images.catalog import DATASETS
from phyla.overrides import change, with_seed
from phyla.pipeline import RESULTS, check_pipeline
from phyla.published import METRICS, Figure, ablation, ablations, published, published_for
from phyla.recipes import recipe
from phyla.resulttables import asked_by

ROWS = published()
PAPERS = ("SCAN", "NNM", "RUC", "Super-AND", "TSUC")


@pytest.fixture(autouse=True)
def no_checkpoint(monkeypatch):
    monkeypatch.setattr("phyla.zoo.PublishedEncoder.checkpoint", lambda _: None)


def test_every_paper_and_data_set_is_there():
    assert tuple(dict.fromkeys(row.paper for row in ROWS)) == PAPERS
    assert {row.data for row in ROWS} >= {"cifar10", "cifar20", "cifar100", "stl10", "imagenet10", "imagenetdogs",
                                          "imagenet50", "imagenet100", "imagenet200", "imagenet"}
    assert {row.data for row in ROWS} <= set(DATASETS)


def test_every_row_has_a_recipe_or_says_why_not():
    for row in ROWS:
        assert bool(row.recipe) != bool(row.why), row
        assert row.source and row.method and row.table, row


@pytest.mark.parametrize("asked", sorted({(row.recipe, row.ablation) for row in ROWS if row.recipe}), ids="-".join)
def test_the_recipe_of_a_row_can_be_run_and_has_its_row(asked):
    experiment = Experiment(*asked)
    pipeline = experiment.pipeline(0)
    check_pipeline(pipeline)
    assert experiment.is_as_named and not experiment.name.endswith(("-short", "-changed"))
    for row in published_for(*asked):
        assert pipeline.data.source == row.data
        assert row.protocol in (protocol_of(pipeline), clustered_protocol(pipeline)) or asked_by(row).protocol, row
        check_pipeline(asked_by(row).pipeline(0))
        if row.result in RESULTS:
            assert getattr(pipeline, row.result) is not None, row
        else:
            assert row.result in ("k-means on embeddings", "k-means on pixels", "embeddings (probes)"), row


def test_numbers_are_percent():
    for row in ROWS:
        assert all(0 < figure.value <= 100 and 0 <= (figure.sd or 0) < 10 for figure in row.figures.values()), row
        assert set(row.figures) <= set(METRICS)


def test_numbers_that_decide_whether_one_is_reproduced():
    def figure(name, metric, **wanted):
        found = [row for row in published_for(name) if all(getattr(row, key) == value for key, value in wanted.items())]
        assert len(found) == 1, found
        return found[0].figures[metric]

    paper = "paper, mean of 10 runs"
    assert figure("scan-cifar10", "acc", table=paper, result="cluster") == Figure(81.8, 0.3)
    assert figure("scan-cifar10", "acc", table=paper, result="refine") == Figure(87.6, 0.4)
    assert figure("scan-cifar10", "acc", table="README, best models", result="refine") == Figure(88.3)
    assert figure("tsuc-cifar10", "acc", table="README, six trainings of both stages") == Figure(78.8, 3.2)
    assert figure("ruc-scan-stl10", "acc", table="results, last epoch", result="robust") == Figure(86.6)
    assert figure("nnm-stl10", "acc", table="Table 2", result="cluster") == Figure(80.8)
    assert figure("superand-cifar10", "knn", table="kNN, ResNet-18") == Figure(89.2)


EACH = ("scan-cifar10", "scan-cifar20", "scan-stl10", "nnm-cifar10", "ruc-scan-cifar10", "ruc-digits",
        "superand-cifar10", "tsuc-digits", "tsuc-cifar10", "and-cifar10", "instance-cifar10")
"""A recipe for each table of ablations, and two where one has an ablation's options already."""


def test_every_ablation_changes_a_recipe():
    known, changing = set(), set()
    for name in EACH:
        whole = with_seed(recipe(name), 3)
        for changes in ablations(name).values():
            pipeline = whole
            for text in changes:
                pipeline = change(pipeline, *text.split("=", 1))
            known.add(changes)
            if pipeline.options() != whole.options():
                changing.add(changes)
    assert known == changing
    held = tomllib.loads((Path(phyla.__file__).parent / "ablations.toml").read_text(encoding="utf-8"))
    assert known == {tuple(changes) for table in held.values() for changes in table.values()}


def test_an_ablation_that_is_not_there_is_one_line():
    with pytest.raises(InputError, match=r"recipe nnm-cifar10 has no ablation 'visit'.*visit-order"):
        ablation("nnm-cifar10", "visit")
