import numpy as np

from phyla.oddities import Oddities, PixelMeasures, find_oddities
from phyla.report.look import N_COPIES, N_GROUPS, choose_look, oddity_columns
from phyla.types import ImageSet


def odd(n, *, pairs=(), groups=None, identical=None, scores=None, outlying=(), contrast=50):
    flags, many, none = np.zeros(n, bool), np.full(n, 200, np.float32), np.full(n, -1)
    flags[list(outlying)] = True
    return Oddities(0.99, np.array(pairs, np.int64).reshape(-1, 2), none if groups is None else np.array(groups),
                    none if identical is None else np.array(identical), np.ones(n) if scores is None else scores, flags,
                    PixelMeasures(many, many, np.full(n, contrast, np.float32), np.ones(n, np.float32)))


def test_outliers_come_oddest_first_and_ordinary_images_do_not_come():
    found = choose_look(odd(5, scores=np.array([1, 9.0, 1, 3, 5]), outlying=[1, 3]), np.zeros(5))
    assert found.outliers == (1, 3)
    assert (found.copies, dict(found.hinted)) == ((), {})


def test_equal_copies_come_first_then_the_likest_pair_and_torn_groups_are_marked():
    found = choose_look(odd(7, pairs=[[5, 6], [3, 4], [0, 1]], groups=[0, 0, 1, 1, 1, 2, 2],
                            identical=[-1, -1, 0, -1, 0, -1, -1]), np.array([0, 1, 0, 0, 0, 1, 1])).copies
    assert [group.rows for group in found] == [(2, 4), (5, 6), (2, 3), (0, 1)]  # 4 is as 2 there
    assert [group.size for group in found] == [2, 2, 3, 2]
    assert [group.exact for group in found] == [True, False, False, False]
    assert [group.torn for group in found] == [False, False, False, True]


def test_images_that_are_all_equal_are_one_group_not_two():
    found = choose_look(odd(3, pairs=[[0, 1]], groups=[0, 0, 0], identical=[0, 0, 0]), np.zeros(3)).copies
    assert [(group.rows, group.exact) for group in found] == [((0, 1, 2), True)]


def test_no_more_copies_are_shown_than_fit():
    groups = np.repeat(np.arange(N_GROUPS + 2), N_COPIES + 1)
    firsts = np.arange(N_GROUPS + 2) * (N_COPIES + 1)
    pairs = np.stack([firsts, firsts + 1], axis=1)
    for identical in (None, groups):
        found = choose_look(odd(len(groups), pairs=pairs, groups=groups, identical=identical), np.zeros(len(groups)))
        assert len(found.copies) == N_GROUPS
        assert all(len(group.rows) == N_COPIES and group.size == N_COPIES + 1 for group in found.copies)
        assert len(found.rows) == N_GROUPS * N_COPIES


def test_hinted_pictures_are_shown_by_their_hint():
    assert dict(choose_look(odd(3, contrast=0), np.zeros(3)).hinted) == {"blank": (0, 1, 2)}


def test_columns_have_a_value_an_image_and_say_what_is_not_known():
    found = oddity_columns(["a", "b"], odd(2, groups=[-1, 0], scores=np.array([1, 2.5]), outlying=[1], contrast=0),
                           agreement=np.array([0.5, np.nan]))
    assert list(found) == ["id", "outlier_score", "outlier", "duplicate_group", "identical_group", "hint", "brightness",
                           "contrast", "sharpness", "agreement"]
    assert (found["outlier"], found["duplicate_group"], found["hint"]) == ([False, True], [None, 0], ["blank"] * 2)
    images = ImageSet(np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"])
    unknown = oddity_columns(["a", "b"], find_oddities(images, None, look=False))
    assert unknown["outlier_score"] == unknown["sharpness"] == unknown["agreement"] == [None, None]
