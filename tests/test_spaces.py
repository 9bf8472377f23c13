"""Several encoders' embeddings are taken apart, checked, and put beside one another with the same weight."""

import numpy as np
import pytest
import torch

from phyla.errors import InputError
from phyla.nets.heads import SpaceProjection
from phyla.spaces import Space, SpaceMap, scaled, spaces_of
from phyla.training.device import choose_device
from phyla.types import Embeddings

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(5, 2)).astype(np.float32), RNG.normal(size=(5, 3)).astype(np.float32)
BOTH = Embeddings(np.concatenate([FIRST, SECOND], axis=1), list("abcde"), widths=(2, 3))


@pytest.mark.parametrize("given", [BOTH, [FIRST, SECOND], (FIRST, SECOND)])
def test_spaces_come_from_widths_or_a_list(given: Space) -> None:
    first, second = spaces_of(given)
    assert np.array_equal(first, FIRST)
    assert np.array_equal(second, SECOND)


@pytest.mark.parametrize("given", [FIRST, Embeddings(FIRST, list("abcde")), [FIRST]])
def test_one_array_is_one_space(given: Space) -> None:
    (only,) = spaces_of(given)
    assert np.allclose(only, FIRST)


def test_doubles_stay_doubles_and_the_rest_becomes_single() -> None:
    assert spaces_of(FIRST.astype(np.float64))[0].dtype == np.float64
    assert spaces_of(np.arange(6).reshape(3, 2))[0].dtype == np.float32


def test_scaled_spaces_have_the_mean_cosine_as_inner_product() -> None:
    rows = scaled([FIRST * 100, SECOND])
    cosines = [(each / np.linalg.norm(each, axis=1, keepdims=True)) for each in (FIRST, SECOND)]
    assert np.allclose(rows @ rows.T, sum(each @ each.T for each in cosines) / 2, atol=1e-6)
    assert np.allclose(rows, SpaceProjection([2, 3])(torch.from_numpy(BOTH.values)).numpy(), atol=1e-6)


def test_scaling_can_center_first_and_leaves_empty_rows() -> None:
    rows = scaled(FIRST, center=True)
    moved = FIRST - FIRST.mean(axis=0)
    assert np.allclose(rows, moved / np.linalg.norm(moved, axis=1, keepdims=True), atol=1e-6)
    assert np.array_equal(scaled(np.zeros((2, 3), np.float32)), np.zeros((2, 3)))
    assert np.isfinite(scaled(np.full((2, 3), 1e30, np.float32))).all()


@pytest.mark.parametrize(("wrong", "told"), [([], "no embedding space"), ([FIRST, SECOND[:3]], "same images"),
                                             ([FIRST, np.full((5, 2), np.nan)], "finite"), (FIRST[0], "n_features")])
def test_what_is_no_space_is_refused(wrong: Space, told: str) -> None:
    with pytest.raises(InputError, match=told):
        spaces_of(wrong)


def test_widths_must_fit_the_embeddings() -> None:
    with pytest.raises(InputError, match="widths"):
        Embeddings(FIRST, list("abcde"), widths=(1, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scaled_rows_keep_their_precision(dtype: type[np.floating]) -> None:
    assert scaled([FIRST.astype(dtype), SECOND.astype(dtype)]).dtype == dtype


@pytest.mark.parametrize("scale", ["raw", "unit", "standard"])
@pytest.mark.parametrize("n_components", [None, 2, 3, 99])
def test_a_head_found_in_a_map_is_given_back_for_raw_embeddings(scale: str, n_components: int | None) -> None:
    rows = (RNG.normal(size=(40, 5)) * [1, 2, 3, 0, 5] + 7).astype(np.float32)
    rows.flags.writeable = False  # as of a memory map: nothing is written to it
    device = choose_device("cpu")
    each = SpaceMap.of(rows, scale=scale, n_components=n_components, device=device)
    mapped = each(rows, device)
    assert mapped.shape == (40, 1 + (n_components if n_components in (2, 3) else 5))
    weight = torch.randn(3, mapped.shape[1], generator=torch.Generator().manual_seed(0))
    plain, bias = each.folded(weight, n_spaces=2)
    raw = torch.from_numpy(rows.copy())
    shown = SpaceProjection((5, 5), unit=True)(torch.cat([raw, raw], dim=1))[:, :5] if scale == "unit" else raw
    torch.testing.assert_close(shown @ plain.T + bias, mapped @ weight.T, rtol=1e-4, atol=1e-4)
    if scale == "standard" and n_components is None:
        torch.testing.assert_close(mapped[:, :5].std(dim=0, unbiased=False), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))
