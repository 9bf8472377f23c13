"""The distribution of every random parameter of a view."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from phyla.images import draws
from phyla.images.augment import OPERATIONS, STRONG, Views

N = 40_000
UNLIKELY = 1e-4  # seeds are fixed: a test either passes for good or shows a real change


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_uniform(values, low, high):
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values.numpy(), stats.uniform(low, high - low).cdf).pvalue > UNLIKELY


def assert_equally_frequent(ids, n):
    counts = np.bincount(ids.numpy().ravel(), minlength=n)
    assert len(counts) == n
    assert stats.chisquare(counts).pvalue > UNLIKELY


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_chance(probability):
    assert draws.chance(N, probability, source()).double().mean() == pytest.approx(probability, abs=0.01)


def test_resized_crop_scale_is_uniform_and_ratio_log_uniform():
    """Where every try fits and pixels are fine, the first try counts."""
    box = draws.resized_crop(N, source(), height=2000, width=2000, scale=(0.1, 0.5), ratio=(3 / 4, 4 / 3)).double()
    top, left, height, width = box.unbind(1)
    assert_uniform(height * width / 2000**2, 0.0995, 0.501)
    assert_uniform((width / height).log(), math.log(3 / 4) - 0.002, math.log(4 / 3) + 0.002)
    assert_uniform(top / (2000 - height), 0, 1)
    assert_uniform(left / (2000 - width), 0, 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 96), (40, 90), (8, 8)])
def test_resized_crop_is_distributed_as_torchvisions(height, width):
    n = 3000
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = draws.resized_crop(n, source(1), height=height, width=width, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)).numpy()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > UNLIKELY
    areas = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    assert stats.ks_2samp(*areas).pvalue > UNLIKELY
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()


@pytest.mark.parametrize(("height", "width", "expected"), [
    (10, 100, [0, 43, 10, 13]), (100, 10, [43, 0, 13, 10]), (90, 100, [0, 0, 90, 100]), (1, 1, [0, 0, 1, 1]),
])
def test_resized_crop_falls_back_on_the_central_box(height, width, expected):
    """A crop of the whole area fits only by chance; where none of ten does, the box is torchvision's."""
    box = draws.resized_crop(500, source(), height=height, width=width, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    with torch.random.fork_rng():
        impossible = RandomResizedCrop.get_params(torch.empty(3, height, width), [4.0, 4.0], [3 / 4, 4 / 3])
    assert list(impossible) == expected
    assert (box == torch.tensor(expected)).all(dim=1).any()


def test_crop_is_uniform_over_all_places():
    box = draws.crop(N, source(), height=36, width=34, size=32)
    assert_equally_frequent(box[:, 0] * 3 + box[:, 1], 15)
    assert (box[:, 2:] == 32).all()
    assert (draws.crop(50, source(), height=32, width=32, size=32)[:, :2] == 0).all()


def test_jitter_orders_factors_and_probability():
    ids, magnitudes = draws.jitter(N, source(), probability=0.8, brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1)
    acts = ids[:, 0] >= 0
    assert acts.double().mean() == pytest.approx(0.8, abs=0.01)
    assert torch.equal((ids >= 0).all(dim=1), acts) and torch.equal((ids >= 0).any(dim=1), acts)
    orders = {order: place for place, order in enumerate(itertools.permutations(range(4)))}
    assert_equally_frequent(torch.tensor([orders[tuple(order)] for order in ids[acts].tolist()]), 24)
    for part, (low, high) in enumerate([(0.6, 1.4), (0.7, 1.3), (0.0, 2.5), (-0.1, 0.1)]):
        assert_uniform(magnitudes[ids == part].double(), low - 1e-6, high + 1e-6)


def test_jitter_leaves_out_parts_without_strength():
    ids, _ = draws.jitter(2000, source(), probability=1.0, brightness=0.4, contrast=0.0, saturation=0.4, hue=0.0)
    assert sorted(set(ids.ravel().tolist())) == [-1, 0, 2]  # hue would not be harmless: its 8-bit way loses colors


def test_strong_operations_are_uniform_with_replacement():
    views = Views(kind="strong", size=32)
    ids, _ = draws.operations(N, source(), n_operations=4, ranges=views.ranges())
    assert len(STRONG) == 14 and ids.shape == (N, 4)
    for column in ids.unbind(1):
        assert_equally_frequent(column, 14)
    assert_equally_frequent(ids[:, 0] * 14 + ids[:, 3], 196)  # independent, so repeats occur


@pytest.mark.parametrize(("name", "low", "high"), [
    ("rotate", -30, 30), ("shear_x", -0.1, 0.1), ("shear_y", -0.1, 0.1), ("translate_x", -3.2, 3.2),
    ("translate_y", -3.2, 3.2), ("solarize", 0, 256), ("color", 0.05, 0.95), ("contrast", 0.05, 0.95),
    ("brightness", 0.05, 0.95), ("sharpness", 0.05, 0.95),
])
def test_strong_magnitudes_are_uniform_over_their_range(name, low, high):
    ranges = Views(kind="strong", size=32).ranges()
    ids, magnitudes = draws.operations(N, source(), n_operations=4, ranges=ranges)
    assert_uniform(magnitudes[ids == STRONG.index(name)].double(), low - 1e-5, high + 1e-5)


def test_posterize_keeps_four_to_seven_bits():
    ids, magnitudes = draws.operations(N, source(), n_operations=4, ranges=Views(kind="strong", size=32).ranges())
    bits = magnitudes[ids == STRONG.index("posterize")]
    assert sorted(bits.unique().tolist()) == [4, 5, 6, 7]
    assert_equally_frequent(bits.long() - 4, 4)


def test_a_subset_of_operations_and_other_ranges():
    views = Views(kind="strong", size=8, operations=("rotate", "translate_x"), rotate=5.0, translate=0.25)
    ids, magnitudes = draws.operations(4000, source(), n_operations=3, ranges=views.ranges())
    assert_equally_frequent(ids, 2)
    assert magnitudes[ids == 0].abs().max() == pytest.approx(5, abs=0.02)
    assert magnitudes[ids == 1].abs().max() == pytest.approx(2, abs=0.02)  # a quarter of 8 pixels


@pytest.mark.parametrize(("size", "longest", "mean_area", "no_hole", "largest"), [(32, 16, 0.069, 0.0625, 0.25)])
def test_cutout_of_cifar(size, longest, mean_area, no_hole, largest):
    top, bottom, left, right = draws.cutout(4 * N, source(), size=size, side=longest).unbind(1)
    area = (bottom - top) * (right - left) / size**2
    assert area.mean() == pytest.approx(mean_area, abs=0.0006)
    assert (area == 0).double().mean() == pytest.approx(no_hole, abs=0.003)
    assert area.max() == largest
    whole = (top > 0) & (bottom < size) & (left > 0) & (right < size) & (area > 0)
    sides = bottom[whole] - top[whole]
    assert torch.equal(sides, right[whole] - left[whole]) and set(sides.tolist()) == {2, 4, 6, 8, 10, 12, 14, 16}


def test_cutout_lengths_and_centers_are_uniform():
    """Far from the borders a hole shows its length, and its middle the center."""
    top, bottom, left, _ = draws.cutout(N, source(), size=400, side=16).unbind(1)
    center = (top + bottom) // 2
    inner = (center >= 20) & (center < 380)
    counts = np.bincount((bottom - top)[inner].numpy(), minlength=17)[::2]  # lengths 1; 2, 3; 4, 5; ...; 16
    assert stats.chisquare(counts, np.array([1, *[2] * 7, 1]) / 16 * counts.sum()).pvalue > UNLIKELY
    assert_equally_frequent(center[inner] - 20, 360)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.02


@pytest.mark.parametrize(("size", "middle"), [(32, 17), (96, 17)])
def test_grey_square_of_ruc(size, middle):
    """Seventeen pixels away from the borders, at most; nine at the near one; clipped at the far one."""
    top, bottom, left, right = draws.grey_square(N, source(), size=size, side=16).unbind(1)
    heights = bottom - top
    assert torch.equal(heights, torch.minimum(top + middle, torch.tensor(size)) - top)
    assert heights.max() == 17 and heights.min() == (size - (size - 9))
    assert (top == 0).double().mean() == pytest.approx(9 / size, abs=0.01)  # start below 1: centers below 9
    assert_equally_frequent(top[top > 0] - 1, size - 9)
    assert_equally_frequent(left[left > 0] - 1, size - 9)
    assert (right <= size).all()


def test_ruc_operations_are_two_different_ones_each_with_one_half():
    ids, _ = draws.ruc_operations(N, source(), names=STRONG, n_operations=2, level=1, size=32)
    assert ((ids >= 0).double().mean(0) - 0.5).abs().max() < 0.01
    assert ((ids >= 0).all(dim=1)).double().mean() == pytest.approx(0.25, abs=0.01)
    both = ids[(ids >= 0).all(dim=1)]
    assert (both[:, 0] != both[:, 1]).all()
    assert_equally_frequent(both[:, 0], 14)
    idle = [STRONG.index("identity"), STRONG.index("posterize")]
    effective = (ids >= 0) & ~torch.isin(ids, torch.tensor(idle))
    assert effective.any(dim=1).double().mean() == pytest.approx(0.676, abs=0.01)


@pytest.mark.parametrize(("name", "at_32", "at_96"), [
    ("brightness", 0.109, 0.109), ("color", 0.109, 0.109), ("contrast", 0.109, 0.109), ("sharpness", 0.109, 0.109),
    ("posterize", 8, 8), ("rotate", -41, -41), ("shear_x", -0.27, -0.27), ("shear_y", -0.27, -0.27),
    ("solarize", 231, 231), ("translate_x", -8, -25), ("translate_y", -8, -25), ("identity", 0, 0),
])
def test_ruc_magnitudes_at_the_published_level(name, at_32, at_96):
    assert draws.ruc_magnitude(name, level=1, size=32) == pytest.approx(at_32)
    assert draws.ruc_magnitude(name, level=1, size=96) == pytest.approx(at_96)


def test_ruc_signs_are_fair_and_only_where_they_belong():
    ids, magnitudes = draws.ruc_operations(N, source(), names=STRONG, n_operations=2, level=1, size=32)
    for place, name in enumerate(STRONG):
        values = magnitudes[ids == place]
        assert values.abs().unique().numel() == 1
        signed = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
        assert (values > 0).double().mean() == pytest.approx(0.5 if signed else float(values[0] > 0), abs=0.03)


def test_equal_generators_draw_equally_and_others_do_not():
    views = Views(kind="strong", size=32)
    first, again, other = (views.draw(64, source(seed), height=40, width=40) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.magnitudes, other.magnitudes)


def test_every_operation_has_a_name_and_a_place():
    assert set(OPERATIONS) == {*STRONG, "hue"} and set(draws.JITTER) <= set(OPERATIONS)
