"""Mean and spread beside the published figure: inside its band, above, below, or not to be compared."""

from dataclasses import replace

import pytest

from phyla.experiment import Experiment
from phyla.results import RunResult, Scored
from phyla.standings import Spread, spreads, standing_facts, standing_lines, standings

SCAN10 = Experiment("scan-cifar10")


def result(seed, *rows, asked=SCAN10):
    return RunResult(name=asked.name, recipe=asked.recipe, ablation=asked.ablation, protocol=asked.protocol,
                     selection=asked.selection, overrides=asked.changes, seed=seed, scores=rows, seconds={}, devices={},
                     precision="fp32", machine="", versions={}, options=asked.pipeline(seed).options())


def row(method, accuracy, *, protocol="train-test", selection="", split="test", **values):
    return Scored(method, split, protocol, selection, 10_000, {"hungarian_accuracy": accuracy} | values)


def verdict(results, *, table, result_of, metric="acc", asked=SCAN10):
    found = [standing for standing in standings(asked, results) if standing.row.table == table
             and standing.row.result == result_of and standing.metric == metric]
    assert len(found) == 1
    return found[0]


def refined(*accuracies, **more):
    return [result(seed, row("SCAN + self-label", value, **({"selection": "last"} | more)))
            for seed, value in enumerate(accuracies)]


PAPER = {"table": "paper, mean of 10 runs", "result_of": "refine"}  # 87.6 +- 0.4
BEST = {"table": "README, best models", "result_of": "refine"}  # 88.3


@pytest.mark.parametrize(("ours", "told"), [
    ((0.872, 0.880), "inside"), ((0.873,), "inside"), ((0.860, 0.862), "below by 1.1"),
    ((0.883, 0.885), "above by 0.4"),
])
def test_the_band_is_the_published_spread(ours, told):
    assert verdict(refined(*ours), **PAPER).verdict == told


def test_without_a_published_spread_the_band_is_ours():
    assert verdict(refined(0.872, 0.888), **BEST).verdict == "inside"
    assert verdict(refined(0.872, 0.874), **BEST).verdict.startswith("below")
    assert verdict(refined(0.883), **BEST).verdict == "no spread on either side, not compared"


def test_ours_is_in_percent_with_its_spread():
    ours = verdict(refined(0.87, 0.88), **PAPER).ours
    assert (ours.mean, ours.n) == (pytest.approx(87.5), 2) and ours.sd == pytest.approx(0.7071, abs=1e-4)


def test_a_short_or_changed_run_is_shown_and_not_compared():
    for changes, told in ((("pretrain.n_epochs=5",), "shorter schedule, not compared"),
                          (("cluster.lr=0.1",), "other options, not compared")):
        asked = Experiment("scan-cifar10", changes=changes)
        found = verdict([replace(each, overrides=changes) for each in refined(0.876)], asked=asked, **PAPER)
        assert found.verdict == told and found.ours.mean == pytest.approx(87.6)


def test_another_protocol_or_selection_is_not_compared():
    assert verdict(refined(0.876, protocol="on-train"), **PAPER).verdict == "no such score in these runs"
    assert verdict(refined(0.876, selection="label-free"), **PAPER).verdict == "ours is chosen label-free, theirs last"


def test_an_oracle_is_held_against_an_oracle():
    asked = Experiment("nnm-cifar10")
    oracle = "NNM (oracle: best epoch by labels)"
    both = [result(seed, row("NNM", 0.7, selection="label-free"), row(oracle, 0.843 + seed / 100, selection="oracle"),
                   asked=asked) for seed in (0, 1)]
    found = verdict(both, table="Table 2", result_of="cluster", asked=asked)
    assert found.ours.mean == pytest.approx(84.8) and found.verdict == "inside"
    alone = [result(0, row("NNM", 0.7, selection="label-free"), asked=asked)]
    assert verdict(alone, table="Table 2", result_of="cluster", asked=asked).verdict == (
        "ours is chosen label-free, theirs oracle")


def test_the_mean_of_heads_is_held_against_the_mean_of_heads():
    asked = Experiment("tsuc-cifar10")
    heads = {"heads_mean_hungarian_accuracy": 0.718, "heads_best_hungarian_accuracy": 0.81}
    of_train = row("TSUC", 0.79, protocol="on-train", selection="label-free", split="train", **heads)
    runs = [result(0, of_train, asked=asked)]
    found = [standing for standing in standings(asked, runs) if standing.row.selection == "mean of heads"]
    assert [standing.ours.mean for standing in found] == [pytest.approx(71.8)]


def test_a_row_that_one_seed_lacks_is_left_out():
    runs = [result(0, row("SCAN", 0.8), row("other", 0.1)), result(1, row("SCAN", 0.9))]
    [(kept, values)] = spreads(runs)
    assert kept.method == "SCAN" and values["hungarian_accuracy"] == Spread.of([0.8, 0.9])


def test_what_is_told():
    runs = refined(0.872, 0.880)
    lines = standing_lines(SCAN10, runs)
    assert lines[0] == "scan-cifar10, seeds 0, 1"
    line = next(line for line in lines if line.startswith("SCAN + self-label, accuracy (SCAN, paper"))
    assert line.split("  ")[-1].strip() == "inside" and "87.6 ± 0.4" in line
    facts = standing_facts(SCAN10, runs)
    assert facts["seeds"] == [0, 1] and {entry["paper"] for entry in facts["published"]} >= {"SCAN", "NNM"}


def test_one_seed_has_no_spread():
    assert Spread.of([0.5]).text() == "0.500" and Spread.of([0.5, 0.7]).text() == "0.600 ± 0.141"
