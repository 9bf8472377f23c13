"""Lines of the page: places in percent, ends of axes."""

import pytest

from phyla.report.lines import Line, nice_top, plot_lines, share_ticks


def test_places_are_percent_of_the_axes():
    lines = [Line(f"line {i}", (0.0, 1.0, 2.0), (0.0, 0.5, 1.0)) for i in range(11)]
    plot = plot_lines(lines, title="t", x_ticks=[(0, "0"), (1, "one"), (2, "2")], y_ticks=share_ticks(1.0),
                      x_label="steps", y_label="share", marked=True)
    assert plot.lines[0].points == "0.0,100.0 50.0,50.0 100.0,0.0"
    assert plot.lines[0].marks == ((0, 100), (50, 50), (100, 0))
    assert plot.x_ticks == ((0, "0"), (50, "one"), (100, "2"))
    assert plot.y_ticks[0] == (100, "0 %")
    assert plot.y_ticks[-1] == (0, "100 %")
    assert plot.lines[0].dash == ""
    assert plot.lines[10].color == plot.lines[0].color
    assert len({(line.color, line.dash) for line in plot.lines}) == 11  # no two look the same
    assert "line 3 from 0.000 to 1.000" in plot.shown
    bare = plot_lines(lines[:1], title="", x_ticks=[(0, ""), (2, "")], y_ticks=share_ticks(1.0), x_label="", y_label="",
                      marked=False)
    assert bare.lines[0].marks == ()


@pytest.mark.parametrize(("highest", "top"), [(0, 0.05), (0.05, 0.05), (0.21, 0.3), (0.31, 0.5), (0.6, 1), (1, 1)])
def test_axes_end_just_above_what_they_show(highest, top):
    assert nice_top(highest) == top
    ticks = share_ticks(top)
    assert ticks[0] == (0, "0 %")
    assert ticks[-1][0] == pytest.approx(top)
    assert len({words for _, words in ticks}) == len(ticks)
