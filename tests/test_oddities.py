import numpy as np
import pytest

from phyla.oddities import (
    duplicate_groups,
    duplicate_similarity,
    find_oddities,
    identical_groups,
    measure_pixels,
    near_duplicate_pairs,
    outlier_scores,
    outliers,
)
from phyla.types import ImageSet, Neighbors


def near(indices, similarities):
    return Neighbors(np.array(indices), np.array(similarities, np.float32))


def images(pixels):
    return ImageSet(np.asarray(pixels, np.uint8), [f"{i}.png" for i in range(len(pixels))])


def grey(plane):
    """One image of three equal planes."""
    return np.repeat(np.asarray(plane, np.uint8)[:, :, None], 3, axis=2)


def test_pairs_are_named_once_most_alike_first():
    neighbors = near([[1, 2], [0, 2], [1, 0]], [[0.9992, 0.1], [0.9992, 0.9999], [0.9999, 0.1]])
    assert near_duplicate_pairs(neighbors, 0.999).tolist() == [[1, 2], [0, 1]]
    assert near_duplicate_pairs(neighbors, 0.99995).shape == (0, 2)


def test_copies_of_copies_are_one_group_and_groups_are_numbered_by_their_first_image():
    pairs = np.array([[4, 5], [1, 3], [3, 6]])
    assert duplicate_groups(pairs, 7).tolist() == [-1, 0, -1, 0, 1, 1, 0]
    assert duplicate_groups(pairs[:0], 3).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(("last", "wanted"), [([0.5, 0.6, 0.7], 0.94), ([0.9999, 0.9999, 1.0], 0.999)])
def test_the_similarity_of_copies_follows_how_far_apart_the_encoder_puts_images(last, wanted):
    neighbors = near([[1], [0], [0]], [[value] for value in last])
    assert duplicate_similarity(neighbors) == pytest.approx(wanted)  # 1 - 0.15 * (1 - 0.6), or 0.999 at most


def test_outlier_score_is_the_distance_against_all_and_against_ones_neighbors():
    neighbors = near([[1], [0], [3], [2], [0]], [[0.85], [0.85], [0.8], [0.8], [0.2]])
    # distances 0.15 0.15 0.2 0.2 0.8, median 0.2: sqrt(0.15/0.2 * 0.15/0.15), ..., sqrt(0.8/0.2 * 0.8/0.15)
    wanted = [np.sqrt(0.75), np.sqrt(0.75), 1, 1, np.sqrt(64 / 3)]
    np.testing.assert_allclose(outlier_scores(neighbors), wanted, rtol=1e-6)


def test_a_neighbor_of_many_copies_is_no_outlier_for_it():
    neighbors = near([[1], [0], [0], [4], [3]], [[1.0], [1.0], [0.8], [0.8], [0.8]])
    # image 2 is as far from the copies 0 and 1 as 3 from 4: its neighbor's distance 0 counts as 0.6 of the median, 0.2
    np.testing.assert_allclose(outlier_scores(neighbors), [0, 0, np.sqrt(1 / 0.6), 1, 1], rtol=1e-6)
    assert not outliers(outlier_scores(neighbors)).any()


def test_nothing_is_odd_where_most_images_are_copies():
    neighbors = near([[1], [0], [0]], [[1.0], [1.0000001], [0.3]])
    assert outlier_scores(neighbors).tolist() == [1, 1, 1]
    assert not outliers(outlier_scores(neighbors)).any()


def test_only_the_last_of_twenty_neighbors_is_asked():
    similarities = np.tile(np.linspace(0.9, 0.1, 30, dtype=np.float32), (31, 1))
    indices = np.array([[j for j in range(31) if j != i] for i in range(31)])
    similarities[0, 20:] = -0.9
    assert outlier_scores(Neighbors(indices, similarities)).tolist() == [1.0] * 31


def test_the_fence_is_one_and_a_half_interquartile_ranges_above_the_quartile():
    logs = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 12.9, 13.1])  # quartiles 2.25 and 6.75, fence 13.5
    assert not outliers(np.exp(logs)).any()
    logs[-1] = 13.6
    assert outliers(np.exp(logs)).tolist() == [False] * 9 + [True]
    assert outliers(np.array([1.0] * 9 + [1.3, 1.31])).tolist() == [False] * 10 + [True]


def test_measures_of_pixels_by_hand():
    black, white = np.zeros((4, 4)), np.full((4, 4), 255)
    half = np.zeros((4, 4))
    half[:, 2:] = 255
    found = measure_pixels(images([grey(black), grey(white), grey(half)]))
    np.testing.assert_allclose(found.brightness, [0, 255, 127.5])
    np.testing.assert_allclose(found.contrast, [0, 0, 127.5])
    np.testing.assert_allclose(found.highlight, [0, 255, 255])
    # inside of the half: Laplacian -255 left of the edge and 255 right of it; two values of each
    np.testing.assert_allclose(found.sharpness, [np.nan, np.nan, 2.0])


def test_grey_is_the_weighted_mean_of_the_channels():
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    for channel in range(3):
        pixels[channel, ..., channel] = 255
    assert measure_pixels(images(pixels)).brightness.tolist() == [76, 150, 27]  # 255 times 77, 151, 28 of 256, cut


def test_images_too_small_for_a_laplacian_have_no_sharpness():
    found = measure_pixels(images(np.random.default_rng(0).integers(0, 256, (3, 2, 5, 3))))
    assert np.isnan(found.sharpness).all()
    assert not any(which.any() for which in found.hints().values())


def textured(n, draw, size=24):
    return [grey(draw.integers(0, 256, (size, size))) for _ in range(n)]


def test_blank_dark_and_blurred_pictures_are_told_apart():
    draw = np.random.default_rng(0)
    noise = textured(20, draw)
    smooth = np.add.outer(np.arange(24), np.arange(24)) * 5  # a slope: its Laplacian is 0
    dark = draw.integers(0, 30, (24, 24))
    found = measure_pixels(images([*noise, grey(np.full((24, 24), 200)), grey(dark), grey(smooth)])).hints()
    assert {name: np.flatnonzero(which).tolist() for name, which in found.items()} == {
        "blank": [20], "dark": [21], "blurred": [22]}


def test_a_set_that_is_blurred_throughout_has_no_blurred_ones():
    slopes = [grey(np.add.outer(np.arange(24) * i, np.arange(24) * 2)) for i in range(1, 6)]
    assert not measure_pixels(images(slopes)).hints()["blurred"].any()


def test_equal_pixels_are_found_and_others_of_equal_measures_are_not():
    draw = np.random.default_rng(1)
    a, b = textured(2, draw, size=8)
    turned = np.ascontiguousarray(a[::-1, ::-1])  # the same measures, other pixels
    pixels = images([a, b, a, turned, b, a])
    assert identical_groups(pixels, measure_pixels(pixels)).tolist() == [0, 1, 0, -1, 1, 0]


def test_all_oddities_together():
    draw = np.random.default_rng(2)
    a, b, c, d = textured(4, draw, size=8)
    neighbors = near([[1], [0], [3], [2], [0]], [[0.99], [0.99], [0.5], [0.5], [0.4]])
    found = find_oddities(images([a, b, c, d, c]), neighbors)
    assert found.similarity == pytest.approx(1 - 0.15 * 0.5)
    assert found.pairs.tolist() == [[0, 1]]
    assert found.groups.tolist() == [0, 0, 1, -1, 1]
    assert found.identical.tolist() == [-1, -1, 0, -1, 0]
    assert found.oddest(1) == [4]


def test_oddities_without_neighbors_or_pixels():
    pixels = images(textured(3, np.random.default_rng(3)))
    found = find_oddities(pixels, None)
    assert found.similarity is None
    assert found.scores is None
    assert found.oddest(3) == []
    assert not found.outlying.any()
    unseen = find_oddities(pixels, near([[1], [0], [0]], [[0.5], [0.5], [0.4]]), look=False)
    assert unseen.pixels is None
    assert dict(unseen.hints) == {}
    assert unseen.groups.tolist() == [-1, -1, -1]
