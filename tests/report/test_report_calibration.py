"""What the report says and draws of confidence: numbers by hand, any number of results, none that is labelled."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from phyla.report import calibration, figures
from phyla.report.calibration import Honesty, judge_results
from phyla.types import Assignment

TRUE = np.array([0, 0, 1, 1])


def assignment(probabilities) -> Assignment:
    p = np.asarray(probabilities, np.float32)
    return Assignment(p, [str(i) for i in range(len(p))])


FOUR = assignment([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.7, 0.3]])  # the last is wrong


def test_honesty_by_hand():
    found = Honesty.of("SCAN", FOUR, TRUE)
    assert found.counts.sum() == 4
    assert sum(found.shares) == pytest.approx(1)
    assert found.mean_confidence == pytest.approx((0.9 + 0.7 + 0.6 + 0.7) / 4)
    assert found.right == 0.75
    assert found.gap == pytest.approx(found.mean_confidence - 0.75)
    assert found.brier == pytest.approx(2 * (0.01 + 0.09 + 0.16 + 0.49) / 4)
    assert found.table() == found.reliability.table()
    assert calibration.summary([found]) == [pytest.approx({
        "result": "SCAN", "mean confidence": found.mean_confidence, "right": 0.75, "gap": found.gap,
        "calibration error": found.reliability.error, "brier score": found.brier,
        "risk-coverage area": found.risk.area})]


def test_bars_are_what_is_kept_and_the_gap():
    found = Honesty.of("SCAN", FOUR, TRUE)
    half, sure = found.bars()[1], found.bars()[2]  # .7 twice, one right; .9 once, right
    assert (half.kept, half.top, half.kind) == (0.5, pytest.approx(0.7), "over")
    assert (sure.kept, sure.top, sure.kind) == (pytest.approx(0.9), 1, "under")
    assert all(bar.left < 0.9 and bar.width == pytest.approx(1 / 15) for bar in found.bars())
    assert found.kinds == ("over", "under")


@pytest.mark.parametrize(("p", "says"), [(1.0, "promises too much, by 0.25"), (0.76, "promises what it keeps"),
                                         (0.6, "promises too little, by 0.15")])
def test_promise_in_words(p, says):
    rows = [[p, 1 - p], [p, 1 - p], [1 - p, p], [p, 1 - p]]
    assert Honesty.of("one", assignment(rows), TRUE).promise == says


@pytest.mark.parametrize("truth", [None, np.full(4, -1)])
def test_without_labels_there_is_confidence_alone(truth):
    found = judge_results({"SCAN": FOUR}, truth)
    assert found[0].reliability is None
    assert found[0].promise == ""
    assert found[0].bars() == []
    assert [row["images"] for row in found[0].table() if row["images"]] == [1, 2, 1]
    assert calibration.risk_plot(found) is None
    assert calibration.risk_table(found) == []
    assert set(calibration.summary(found)[0]) == {"result", "mean confidence"}


@pytest.mark.parametrize(("n_results", "n_images", "n_clusters"), [(1, 1, 1), (1, 9, 3), (2, 40, 5), (7, 60, 12)])
def test_figures_of_any_results(tmp_path, n_results, n_images, n_clusters):
    draw = np.random.default_rng(0)
    results = {f"result ${i}": assignment(draw.dirichlet(np.ones(n_clusters), n_images)) for i in range(n_results)}
    judged = judge_results(results, draw.integers(-1, 3, n_images).clip(-1 if n_images > 1 else 0))
    for name, draw_figure in (("reliability", calibration.reliability), ("risk", calibration.risk_coverage)):
        figure, table = draw_figure(judged)
        assert isinstance(figure, Figure)
        assert {row["result"] for row in table} == set(results)
        assert all(row.keys() == table[0].keys() for row in table)
        figures.save_png(figure, tmp_path / f"{name}.png")
        assert 1000 < (tmp_path / f"{name}.png").stat().st_size < 300_000


def test_risk_starts_level_where_the_surest_are_equally_sure():
    sure = assignment([[1, 0], [1, 0], [0, 1], [0.6, 0.4]])
    plot = calibration.risk_plot(judge_results({"SCAN": sure}, np.array([0, 0, 1, 1])))
    first, second, last = plot.lines[0].points.split()
    assert first.split(",")[0] == "0.0"
    assert first.split(",")[1] == second.split(",")[1] == "100.0"  # nothing wrong: at the bottom
    assert last.split(",")[0] == "100.0"
    assert plot.y_ticks[0] == (100, "0 %")
    assert plot.lines[0].title == f"SCAN (area {1 / 16:.3f})"
