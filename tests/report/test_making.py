import numpy as np

from phyla.counting import ClassCount
from phyla.report.making import MemberRow, count_plots, count_table, member_table
from phyla.report.page import build_report


def counted(**more):
    told = {"n_classes": 3, "low": 2, "high": 4, "grid": np.array([2, 3, 4]),
            "criteria": {"silhouette": np.array([0.1, 0.4, 0.2]), "stability": np.array([1.0, np.nan, 1.0])},
            "votes": {"silhouette": 3, "stability": 4}, "spread": {"silhouette": [3, 2], "stability": []},
            "notices": ("a cloud & no clusters",)}
    return ClassCount(**told | more)


MEMBERS = (MemberRow("k-means", "lite0", 0, 0.5, 0.25, 0.8), MemberRow("TEMI", "all <2>", 1, None, 0.75, 1.0))


def test_members_come_by_their_weight():
    assert member_table(MEMBERS) == [
        {"member": "TEMI on all <2>", "seed": 1, "score": None, "weight": 0.75, "agrees": 1.0},
        {"member": "k-means on lite0", "seed": 0, "score": 0.5, "weight": 0.25, "agrees": 0.8}]
    assert member_table(()) == []


def test_every_number_tried_is_a_row_and_what_is_not_finite_is_not_known():
    assert count_table(counted()) == [{"classes": 2, "silhouette": 0.1, "stability": 1.0},
                                      {"classes": 3, "silhouette": 0.4, "stability": None},
                                      {"classes": 4, "silhouette": 0.2, "stability": 1.0}]
    assert count_table(None) == count_plots(None) == []


def test_each_criterion_is_drawn_over_the_numbers_with_what_it_picks():
    first, second = count_plots(counted())
    assert (first.y_label, first.lines[0].title) == ("silhouette", "picks 3; 2 to 3 on halves of the images")
    assert (second.y_label, second.lines[0].title) == ("stability", "picks 4")
    same = count_plots(counted(spread={"silhouette": [3, 3]}))[0]
    assert same.lines[0].title == "picks 3; 3 on halves of the images"
    assert first.x_ticks == ((0.0, "2"), (50.0, "3"), (100.0, "4"))
    places = [tuple(map(float, place.split(","))) for place in first.lines[0].points.split()]
    assert [x for x, _ in places] == [0, 50, 100]
    assert places[1][1] < places[2][1] < places[0][1]  # from the top: the highest value first
    assert len(second.lines[0].points.split()) == 2


def test_one_number_alone_and_curves_without_a_value_are_no_reason_to_stop():
    assert count_plots(counted(grid=np.array([3]), criteria={"silhouette": np.array([0.1])})) == []
    nothing = count_plots(counted(criteria={"silhouette": np.full(3, np.nan)}, votes={}))
    assert [plot.lines[0].title for plot in nothing] == ["picks none"]


def test_page_tells_how_the_result_came_about_only_where_that_is_given(make_run, tmp_path):
    given = {"class_count": counted(), "members": MEMBERS}
    page = build_report(make_run(more=given), tmp_path / "a").read_text("utf-8")
    for words in ('id="count"', 'id="members"', "between 2 and 4", "a cloud &amp; no clusters", "TEMI on all &lt;2&gt;",
                  "picks 3; 2 to 3 on halves", 'href="#members"'):
        assert words in page, words
    none = counted(grid=np.array([], np.int64), criteria={}, votes={}, spread={})  # too few images to tell
    assert 'id="count"' in build_report(make_run(more={"class_count": none}), tmp_path / "c").read_text("utf-8")
    plain = build_report(make_run(), tmp_path / "b").read_text("utf-8")
    assert 'id="count"' not in plain
    assert 'id="members"' not in plain
