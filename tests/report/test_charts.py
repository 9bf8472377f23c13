import base64
import io

import numpy as np
import pytest
from PIL import Image

from phyla.report.charts import DARK_PALETTE, MAP_HEIGHT, MAP_WIDTH, OUTLINES, curve_panel, heat_uri, map_groups
from phyla.report.figures import PALETTE, SHAPES
from phyla.report.measures import Curve, EmbeddingMap
from phyla.types import Assignment


def test_map_groups_hold_every_point_once_inside_the_drawing():
    labels = np.array([2, 2, 2, 0])
    assignment = Assignment(np.eye(3, dtype=np.float32)[labels], list("abcd"))
    layout = EmbeddingMap(np.arange(4), np.array([[0, 0], [1, 1], [0.5, 0.5], [0, 1]]), labels, "PCA", 4)
    large, small = map_groups(layout, assignment, ids=list("abcd"), names=["one", "two", "three"])
    assert (large.cluster, large.color, large.shape, len(large.points)) == (2, 2, SHAPES[2], 3)
    assert small.points[0].words == "d · one · confidence 1.00"
    assert small.points[0].position == 3
    first, second = large.points[:2]
    assert 0 < first.x < second.x < MAP_WIDTH
    assert MAP_HEIGHT > first.y > second.y > 0  # up is up
    assert (large.x, large.y) == (MAP_WIDTH / 2, MAP_HEIGHT / 2)


def test_seventy_clusters_look_different():
    assert len({(i % len(PALETTE), i % len(SHAPES)) for i in range(70)}) == 70
    assert len(DARK_PALETTE) == len(PALETTE) == len(set(PALETTE))
    assert set(OUTLINES) == set(SHAPES)


@pytest.mark.parametrize("values", [(1.0,), (2.0, 2.0, 2.0), (0.0, 0.0), (3.0, 1.0, 2.0), (-9.2, -10.5), (1e-9, 2e-9),
                                    (1e9, -1e9)])
def test_curves_stay_in_their_panel(values):
    panel = curve_panel(Curve("s", "q", tuple(float(i + 1) for i in range(len(values))), values))
    places = np.array([[float(x) for x in pair.split(",")] for pair in panel.line.split()])
    assert len(places) == len(values)
    assert ((places >= 0) & (places <= 100)).all()
    assert all(0 <= top <= 100 for top, _ in panel.ticks)
    assert panel.ticks
    assert panel.end == pytest.approx(tuple(places[-1]), abs=0.06)


def test_a_higher_value_is_higher_up():
    panel = curve_panel(Curve("s", "q", (1.0, 2.0), (0.0, 1.0)))
    assert panel.line == "0.0,100.0 100.0,16.7"  # the axis runs from 0 to the round 1.2
    assert panel.ticks[0] == (100.0, "0")


def test_a_long_curve_is_thinned():
    assert len(curve_panel(Curve("s", "q", tuple(map(float, range(5000))), (1.0,) * 5000)).line.split()) == 240


def test_heat_is_solid_where_the_share_is_large():
    image = Image.open(io.BytesIO(base64.b64decode(heat_uri(np.array([[0, 0.5, 1.0]])).split(",")[1])))
    assert np.asarray(image)[0, :, 3].tolist() == [0, 128, 255]
