"""How many classes there are: known numbers, degenerate sets, and what each criterion picks from a curve."""

import json

import numpy as np
import pytest

from phyla.counting import ClassCount, before_loss, count_classes, highest, last_above
from phyla.errors import InputError
from phyla.neighbors import find_neighbors
from phyla.spaces import scaled
from phyla.types import Embeddings


def blobs(n_classes: int, n_images: int, *, seed: int = 0, width: int = 24, spread: float = 0.25,
          shares: list[float] | None = None) -> np.ndarray:
    draws = np.random.default_rng(seed)
    labels = draws.choice(n_classes, n_images, p=shares)
    return draws.normal(size=(n_classes, width))[labels] + spread * draws.normal(size=(n_images, width)) + 1.0


@pytest.mark.parametrize(("n_classes", "n_images"), [(2, 120), (3, 120), (7, 200), (12, 300)])
def test_clear_classes_are_counted(n_classes, n_images):
    found = count_classes(blobs(n_classes, n_images), high=n_images // 8, n_repeats=1)
    assert found.n_classes == n_classes
    assert found.low <= n_classes <= found.high <= 1.6 * n_classes
    assert found.notices == ()


def test_uneven_classes_are_counted():
    found = count_classes(blobs(5, 500, shares=[0.5, 0.25, 0.15, 0.06, 0.04]), high=12, n_repeats=2)
    assert found.n_classes == 5


def test_every_criterion_votes_and_the_curves_are_over_the_grid():
    found = count_classes(blobs(4, 160), high=20, n_repeats=2)
    assert set(found.criteria) == set(found.votes) == set(found.spread) and len(found.votes) >= 3
    for name, curve in found.criteria.items():
        assert curve.shape == found.grid.shape and np.isfinite(curve).all()
        assert found.votes[name] in found.grid and set(found.spread[name]) <= set(found.grid.tolist())
    assert found.grid[0] == 2 and found.grid[-1] == 20 and (np.diff(found.grid) > 0).all()
    assert json.loads(json.dumps(found.as_facts()))["n_classes"] == 4


def test_a_seed_gives_one_answer_and_several_spaces_and_neighbors_are_taken():
    rows = blobs(4, 160)
    embeddings = Embeddings(np.hstack([rows, 100 * rows[:, ::-1]]).astype(np.float32), [str(i) for i in range(160)],
                            widths=(24, 24))
    neighbors = find_neighbors(Embeddings(scaled(embeddings, center=True), embeddings.ids), 25)
    first, second = (count_classes(each, high=12, n_repeats=1, neighbors=neighbors)
                     for each in (embeddings, [embeddings.values[:, :24], embeddings.values[:, 24:]]))
    assert first.n_classes == second.n_classes == 4
    assert first.as_facts() == second.as_facts()


def test_one_cloud_is_said_to_be_one():
    rows = np.random.default_rng(0).normal(size=(200, 12))
    found = count_classes(rows, low=1, high=12, n_repeats=1)
    assert found.n_classes == found.low == 1 and "one cloud" in found.notices[0]
    assert count_classes(rows, high=4, n_repeats=1).n_classes == 2


def test_a_large_set_is_counted_on_some_of_it():
    found = count_classes(blobs(3, 900), high=12, max_images=300, n_repeats=1)
    assert found.n_classes == 3 and found.notices == ("counted on 300 of 900 images",)


@pytest.mark.parametrize("n_images", [1, 2, 5, 15])
def test_too_few_images_give_the_least_and_say_so(n_images):
    found = count_classes(blobs(2, n_images))
    assert (found.n_classes, found.low, found.high) == (min(2, n_images),) * 3
    assert "too few" in found.notices[0] and len(found.grid) == 0


def test_fewer_images_than_the_highest_number_need():
    found = count_classes(blobs(3, 90), high=50, n_repeats=1)
    assert found.n_classes == 3 and "at most 11 classes were tried" in found.notices[0]


def test_duplicates_are_no_classes_beyond_the_distinct_ones():
    found = count_classes(np.repeat(blobs(3, 3), 40, axis=0), n_repeats=1)
    assert 2 <= found.n_classes <= 3 and "distinct" in found.notices[0]
    same = count_classes(np.ones((50, 4)), low=1)
    assert same.n_classes == 1 and "the same" in same.notices[0]


def test_most_images_twice_changes_nothing():
    rows = blobs(4, 100)
    assert count_classes(np.vstack([rows, rows]), high=12, n_repeats=1).n_classes == 4


@pytest.mark.parametrize("options", [{"low": 0}, {"low": 5, "high": 4}, {"n_repeats": 0}, {"max_images": 0}])
def test_wrong_numbers_are_refused(options):
    with pytest.raises(InputError, match="do not fit"):
        count_classes(blobs(2, 30), **options)


def test_infinite_embeddings_are_refused():
    with pytest.raises(InputError, match="finite"):
        count_classes(np.full((30, 2), np.nan))


GRID = np.array([2, 3, 4, 6, 8])


@pytest.mark.parametrize(("pick", "curve", "expected"), [
    (highest, [0, 5, 5, 1, 2], 3),
    (last_above, [0.99, 0.6, 0.9, 0.5, 0.1], 4),
    (last_above, [0.5, 0.6, 0.4, 0.3, 0.2], 3),
    (before_loss, [0.99, 0.98, 0.96, 0.90, 0.97], 4),
    (before_loss, [0.90, 0.99, 0.98, 0.97, 0.96], 8),
])
def test_picks_from_a_curve(pick, curve, expected):
    assert pick(GRID, np.array(curve)) == expected


def test_a_count_can_be_made_by_hand():
    assert ClassCount(3, 2, 4, GRID, {}, {}, {}).as_facts()["grid"] == [2, 3, 4, 6, 8]
