"""How attacks are named and drawn: words, axes, one plot an attack, with labels and without."""

from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from phyla.evaluate.robustness import PRESETS, Attack, RobustnessCurve
from phyla.report import figures, robustness


def curve(title: str = "SCAN", attack: Attack | None = None, **changed) -> RobustnessCurve:
    made = RobustnessCurve(title, attack or Attack("pgd"), (0.0, 4 / 255, 8 / 255), (1.0, 0.7, 0.2), (0.9, 0.6, 0.1),
                           50, 50)
    return replace(made, **changed)


@pytest.mark.parametrize(("attack", "title"), [
    (Attack("fgsm"), "FGSM, one step of epsilon"), (Attack("pgd"), "PGD, 10 steps of epsilon / 4"),
    (Attack("bim", step_share=1.0), "BIM, 10 steps of epsilon"),
    (Attack("bim", n_steps=1), "BIM, 1 step of epsilon / 4"),
    (Attack("bim", n_steps=20, step_share=2.0), "BIM, 20 steps of epsilon × 2"),
    (Attack("bim", step_share=0.4), "BIM, 10 steps of epsilon × 2/5")])
def test_attacks_are_named(attack, title):
    assert robustness.attack_title(attack) == title


def test_epsilon_is_said_as_it_is_usually_written():
    pixel, scaled = Attack("pgd"), PRESETS["paper"][0].attack
    assert [robustness.epsilon_words(pixel, e) for e in (0, 8 / 255, 0.1)] == ["0", "8/255", "0.1"]
    assert robustness.epsilon_words(scaled, 8 / 255) == "0.0314"
    assert robustness.epsilon_axis(pixel, [curve()]) == (
        [(0, "0"), (4 / 255, "4"), (8 / 255, "8")], "epsilon, of 255 levels")
    ticks, label = robustness.epsilon_axis(scaled, [curve(epsilons=(0.0, 0.1, 0.2)), curve(epsilons=(0.0, 0.3, 0.2))])
    assert [words for _, words in ticks] == ["0", "0.1", "0.2", "0.3"]
    assert label == "epsilon, units of the network's input, not clipped"
    assert robustness.epsilon_axis(pixel, [curve(epsilons=(0.0, 0.1))])[1] == "epsilon, black to white is 1"


def test_one_plot_an_attack_and_one_line_a_result():
    other = PRESETS["paper"][0].attack
    curves = [curve(), curve("RUC", correct=(0.95, 0.9, 0.6)), curve(attack=other), curve("RUC", other)]
    plots = robustness.robustness_plots(curves)
    assert [[line.title for line in plot.lines] for plot in plots] == [["SCAN", "RUC"]] * 2
    assert plots[0].lines[1].points == "0.0,5.0 50.0,10.0 100.0,40.0"
    assert plots[0].lines[0].dash != plots[0].lines[1].dash
    assert plots[0].lines[0].marks[-1] == (100, 90)
    assert plots[0].y_label == "images right"
    assert "SCAN from 0.900 to 0.100" in plots[0].shown


def test_without_labels_what_stays_is_drawn():
    plot, = robustness.robustness_plots([curve(correct=None, n_known=0)])
    assert plot.y_label == "images in the same cluster"
    assert plot.lines[0].points.startswith("0.0,0.0")
    assert set(robustness.robustness_table([curve(correct=None)])[0]) == {"attack", "result", "epsilon", "unchanged"}


def test_table_has_every_value():
    table = robustness.robustness_table([curve()])
    assert table[2] == pytest.approx({"attack": "PGD, 10 steps of epsilon / 4", "result": "SCAN", "epsilon": "8/255",
                                      "right": 0.1, "drop": 0.8, "unchanged": 0.2})


@pytest.mark.parametrize("curves", [[curve()], [curve(), curve("$x$", Attack("fgsm"))], [curve(correct=None)],
                                    [curve(epsilons=(0.0,), unchanged=(1.0,), correct=(0.9,))]])
def test_figure_of_any_curves(tmp_path, curves):
    figure, table = robustness.robustness(curves)
    assert isinstance(figure, Figure)
    assert len(table) == sum(len(each.epsilons) for each in curves)
    figures.save_png(figure, tmp_path / "figure.png")
    assert 1000 < (tmp_path / "figure.png").stat().st_size < 300_000


def test_a_curve_of_clean_images_alone_has_no_plot():
    assert robustness.robustness_plots([curve(epsilons=(0.0,), unchanged=(1.0,), correct=(0.9,))]) == []
