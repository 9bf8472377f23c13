"""Tables of results: what stands in which row and column, and the commands below them."""

import pytest

from phyla.errors import InputError
from phyla.experiment import Experiment
from phyla.recipes import recipe
from phyla.results import RunResult, Scored, write_result
from phyla.resulttables import options_table, side_by_side, written

METHODS = {"scan": {"k-means on pixels": 0.4, "k-means on embeddings": 0.5, "SCAN": 0.6, "SCAN + self-label": 0.7},
           "nnm": {"k-means on embeddings": 0.55, "NNM": 0.65}}


@pytest.fixture
def results(tmp_path):
    """Return a folder of results of SCAN and NNM, two seeds, two splits of which the test images score 0.1 less."""
    for begins, values in METHODS.items():
        for seed in (0, 1):
            name = f"{begins}-fashion-small"
            found = [(split, method, value - less + 0.02 * seed) for split, less in (("train", 0.0), ("test", 0.1))
                     for method, value in values.items()]
            rows = tuple(Scored(method, split, "", "", 2000, {"hungarian_accuracy": value, "nmi": 0.9})
                         for split, method, value in found)
            write_result(RunResult(name, name, "", "", "", (), seed, rows, {}, {}, "fp32", "", {},
                                   recipe(name).options()), tmp_path)
    return tmp_path


def test_methods_stand_side_by_side(results):
    lines = side_by_side(results, "hungarian_accuracy", ["fashion-small"]).splitlines()
    assert lines[0] == "| method | fashion-small, 2,000 train | fashion-small, 2,000 test |"
    assert lines[2] == "| k-means on pixels | 0.410 ± 0.014 | 0.310 ± 0.014 |"
    assert "| SimCLR + k-means | 0.510 ± 0.014 | 0.410 ± 0.014 |" in lines, "of SCAN's runs, not of NNM's"
    assert "| NNM | 0.660 ± 0.014 | 0.560 ± 0.014 |" in lines
    assert "| TSUC + RUC |  |  |" in lines, "nobody ran it"
    assert lines[-2] == "for recipe in nnm-fashion-small scan-fashion-small; do phyla reproduce $recipe --seeds 2; done"


def test_a_page_names_the_score_and_the_sets(results):
    block = "<!-- side by side: begin {} (written by `make table`) -->\nold\n<!-- results: end -->\nafter"
    page = written(block.format("nmi fashion-small"), results)
    assert "| SCAN | 0.900 ± 0.000 | 0.900 ± 0.000 |" in page and "old" not in page and page.endswith("-->\nafter")
    with pytest.raises(InputError, match=r"are called scan-nothing.*phyla reproduce"):
        written(block.format("nmi nothing"), results)


def test_options_stand_below_one_another(results):
    row = Scored("SCAN", "train", "", "", 2000, {"hungarian_accuracy": 0.25, "nmi": 0.5})
    for seed in (0, 1):
        asked = Experiment("scan-fashion-small", "entropy-2")
        write_result(RunResult(asked.name, asked.recipe, "entropy-2", "", "", (), seed, (row,), {}, {}, "bf16", "", {},
                               asked.pipeline(seed).options()), results)
    lines = options_table(results, ["scan-fashion-small"]).splitlines()
    told = ["as it is | 2,000 train | SCAN | 0.610 ± 0.014 | 0.900 ± 0.000 | ",
            "as it is | 2,000 test | SCAN | 0.510 ± 0.014 | 0.900 ± 0.000 | ",
            "`cluster.entropy_weight=2`, in bf16 | 2,000 train | SCAN | 0.250 ± 0.000 | 0.500 ± 0.000 | "]
    assert lines[2:5] == [f"| scan-fashion-small | {each} | 2 |" for each in told]
    assert lines[-2] == "phyla reproduce scan-fashion-small --seeds 2 --ablation entropy-2 --precision bf16"
    with pytest.raises(InputError, match="are of scan-nothing"):
        options_table(results, ["scan-nothing"])
