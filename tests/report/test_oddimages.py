import numpy as np
import pytest

from phyla.oddities import Oddities, PixelMeasures
from phyla.report import oddimages
from phyla.types import Assignment


def odd(groups=(), *, identical=None, outlying=(), n=20, blank=(), similarity=0.97):
    """Oddities of n images: ``groups`` of rows that are copies, rows that are outliers, rows that are blank."""
    held = np.full(n, -1)
    for number, rows in enumerate(groups):
        held[list(rows)] = number
    contrast = np.full(n, 50, np.float32)
    contrast[list(blank)] = 0
    flags = np.zeros(n, bool)
    flags[list(outlying)] = True
    many = np.full(n, 200, np.float32)
    return Oddities(similarity, np.empty((0, 2), np.int64), held, np.full(n, -1) if identical is None else identical,
                    None if similarity is None else np.ones(n), flags,
                    PixelMeasures(many, many, contrast, np.ones(n, np.float32)))


def assigned(labels):
    return Assignment(np.eye(2, dtype=np.float32)[labels], [str(i) for i in range(len(labels))])


HALVES = assigned([0] * 10 + [1] * 10)


def test_copies_are_counted_in_images_groups_and_those_equal_to_the_pixel():
    identical = np.full(20, -1)
    identical[[0, 1]] = 0
    found = oddimages.check_duplicates(odd([(0, 1, 2), (4, 5)], identical=identical), HALVES)
    assert found.severity == "warning"  # 5 of 20 are more than a fifth
    assert found.message.startswith("5 of 20 images")
    assert "in 2 groups; 2 of them are equal to the pixel." in found.message
    assert "0.97 or more" in found.message
    assert "spread" not in found.message
    assert oddimages.check_duplicates(odd([(4, 5)]), HALVES).severity == "note"
    assert oddimages.check_duplicates(odd(), HALVES).severity == "passed"
    assert oddimages.check_duplicates(None, HALVES).severity == "not_applicable"
    assert oddimages.check_duplicates(odd(similarity=None), HALVES).severity == "not_applicable"


def test_groups_torn_between_clusters_are_told():
    assert "1 group is spread over several clusters" in oddimages.check_duplicates(odd([(9, 10)]), HALVES).message
    groups = np.array([0, 0, 1, 1, 2, 2, -1])
    assert oddimages.torn_groups(groups, np.array([5, 6, 5, 5, 1, 2, 3])) == 2
    assert oddimages.torn_groups(np.full(7, -1), groups) == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_an_encoder_that_sees_nothing_but_copies_is_told_apart_from_true_copies(frozen):
    all_alike = odd([range(11)])
    found = oddimages.check_duplicates(all_alike, HALVES, frozen=frozen)
    assert found.title == "The encoder hardly tells images apart"
    assert ("pretraining" in found.advice) != frozen
    true_copies = oddimages.check_duplicates(odd([range(11)], identical=all_alike.groups), HALVES, frozen=frozen)
    assert true_copies.title == "Near-duplicates"


@pytest.mark.parametrize(("n_odd", "severity"), [(0, "passed"), (1, "note"), (2, "warning")])
def test_outliers_are_counted(n_odd, severity):
    found = oddimages.check_outliers(odd(outlying=range(n_odd)))
    assert found.severity == severity  # two of twenty are more than a twentieth
    assert n_odd == 0 or found.message.startswith(f"{n_odd} image")
    assert oddimages.check_outliers(odd(similarity=None)).severity == "not_applicable"


@pytest.mark.parametrize(("n_blank", "severity"), [(0, "passed"), (4, "note"), (5, "warning")])
def test_poor_pictures_are_counted(n_blank, severity):
    found = oddimages.check_pictures(odd(blank=range(n_blank)))
    assert found.severity == severity
    assert n_blank == 0 or f"{n_blank} blank" in found.message
    assert oddimages.check_pictures(None).severity == "not_applicable"
