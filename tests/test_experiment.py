"""What is reproduced, and the name of its results: nothing that was changed or cut short has the name of the whole."""

import pytest

from phyla.errors import InputError
from phyla.experiment import (
    Experiment,
    clustered_protocol,
    protocol_of,
    seeds_of,
    selections,
    with_protocol,
    with_selection,
)
from phyla.recipes import recipe


@pytest.mark.parametrize(("text", "seeds"), [("5", (0, 1, 2, 3, 4)), ("1", (0,)), ("0,3,7", (0, 3, 7)), ("7,", (7,)),
                                             ("3, 3,1", (3, 1))])
def test_seeds_are_a_number_of_them_or_a_list(text, seeds):
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", ",", "a", "-1", "1.5", "0"])
def test_other_seeds_are_one_line(text):
    with pytest.raises(InputError, match="--seeds"):
        seeds_of(text)


@pytest.mark.parametrize(("name", "asked"), [
    ("scan-cifar10", {}),
    ("nnm-cifar10-visit-order", {"recipe": "nnm-cifar10", "ablation": "visit-order"}),
    ("scan-cifar10-train+test", {"protocol": "train+test"}),
    ("scan-cifar10-last", {"selection": "last"}),
    ("scan-cifar10-short", {"changes": ("pretrain.n_epochs=100",)}),
    ("scan-cifar10-short", {"changes": ("cluster.n_epochs=49",)}),
    ("scan-cifar10-short", {"changes": ("refine.n_epochs=1", "cluster.lr=0.1")}),
    ("scan-cifar10-short", {"changes": ("data.limit=49999",)}),
    ("superand-cifar10-short", {"recipe": "superand-cifar10", "changes": ("pretrain.n_rounds=3",)}),
    ("scan-cifar10-changed", {"changes": ("cluster.lr=0.1",)}),
    ("scan-cifar10-changed", {"changes": ("pretrain.n_epochs=501",)}),
    ("ours", {"changes": ("cluster.lr=0.1",), "called": "ours"}),
    ("ours-short", {"changes": ("cluster.n_epochs=1",), "called": "ours"}),
    ("ours-short", {"changes": ("cluster.n_epochs=1",), "called": "ours-short"}),
    ("scan-cifar10", {"changes": ("cluster.lr=0.0001",)}),
])
def test_the_name_says_what_is_not_as_published(name, asked):
    assert Experiment(**({"recipe": "scan-cifar10"} | asked)).name == name


def test_no_name_makes_a_short_schedule_pass_for_the_published_one():
    asked = Experiment("scan-cifar10", changes=("pretrain.n_epochs=499",), called="scan-cifar10")
    assert asked.is_short and asked.name == "scan-cifar10-short"


@pytest.mark.parametrize("called", ["../x", "a/b", ".hidden", "a b", "-x"])
def test_a_name_that_is_no_folder_is_one_line(called):
    with pytest.raises(InputError, match="cannot be called"):
        _ = Experiment("scan-cifar10", called=called).name


def test_a_seed_changes_every_stage_and_set_is_laid_over_it():
    pipeline = Experiment("ruc-scan-cifar10").pipeline(7)
    assert {getattr(pipeline, part).random_state for part in ("pretrain", "cluster", "refine", "robust")} == {7}
    pipeline = Experiment("ruc-scan-cifar10", ablation="one-pretext").pipeline(7)
    assert (pipeline.pretrain.random_state, pipeline.cluster.random_state) == (0, 7)


@pytest.mark.parametrize(("name", "protocol", "split", "held_out", "learned"), [
    ("scan-cifar10", "train-test", "train", "test", None),
    ("scan-cifar10", "on-train", "train", None, None),
    ("scan-cifar10", "train+test", "train+test", None, None),
    ("scan-stl10", "train+test", "train+test", None, "train+test+unlabeled"),
    ("tsuc-stl10", "train-test", "train", "test", "train+unlabeled"),
    ("ruc-scan-stl10", "on-train", "train", None, "train+unlabeled"),
    ("nnm-imagenet10", "train+test", "train+val", None, None),
])
def test_protocols(name, protocol, split, held_out, learned):
    pipeline = with_protocol(recipe(name), protocol)
    assert (pipeline.data.split, pipeline.data.held_out) == (split, held_out) and protocol_of(pipeline) == protocol
    assert clustered_protocol(pipeline) == ("train+test" if protocol == "train+test" else "on-train")
    assert learned is None or pipeline.data.pretrain_split == learned


def test_a_protocol_that_the_data_or_we_do_not_have_is_one_line():
    with pytest.raises(InputError, match="no split"):
        with_protocol(recipe("scan-digits"), "train-test")
    with pytest.raises(InputError, match=r"no protocol 'train'"):
        with_protocol(recipe("scan-cifar10"), "train")
    with pytest.raises(InputError, match="data set with splits"):
        with_protocol(recipe("scan-folder"), "train+test")


def test_selections():
    whole = recipe("ruc-scan-cifar10")
    assert selections(whole) == {"SCAN": "label-free", "SCAN + self-label": "last", "SCAN + self-label + RUC": "last"}
    for selection in ("last", "label-free"):
        found = selections(with_selection(whole, selection))
        assert (found["SCAN"], found["SCAN + self-label"]) == (selection, selection)
    for name in ("nnm-cifar10", "tsuc-cifar10"):
        assert set(selections(with_selection(recipe(name), "last")).values()) == {"last"}
        assert with_selection(recipe(name), "label-free").options() == recipe(name).options()


def test_an_oracle_selects_nothing():
    with pytest.raises(InputError, match="labels never choose"):
        with_selection(recipe("nnm-cifar10"), "oracle")
    with pytest.raises(InputError, match=r"no selection 'lst'.*last"):
        with_selection(recipe("nnm-cifar10"), "lst")
