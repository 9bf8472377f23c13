"""Streams are named by seed and purpose: the same everywhere, and never shared."""

import numpy as np
import pytest
import torch

from phyla.randomness import derive_seed, generator


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(0, "order", 0) == 4819849257279361181
    assert derive_seed(1, "simclr weights") == 3018730454496924680


def test_drawn_numbers_are_the_same_on_every_machine() -> None:
    assert torch.randperm(8, generator=generator(0, "order", 0)).tolist() == [7, 1, 3, 0, 6, 2, 5, 4]


def test_every_seed_purpose_and_step_has_its_own_stream() -> None:
    names = [(seed, purpose, step) for seed in (0, 1, 2, -1) for purpose in ("order", "views", "order0", "")
             for step in range(50)]
    names += [(0,), (1,), (0, "order"), (0, 0), (0, "0"), (0, 1), (10,), (0, "order", 0, 0), (2**63,), (2**70,)]
    names += [(seed, "weights") for seed in range(1000)]
    seeds = {derive_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_numbers() -> None:
    assert derive_seed(np.int64(3), "order", np.int32(5)) == derive_seed(3, "order", 5)
    assert derive_seed(3, np.str_("order")) == derive_seed(3, "order")


def test_a_generator_is_fresh_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generator(0, "views", 3)
    drawn = torch.rand(4, generator=first)
    assert torch.equal(drawn, torch.rand(4, generator=generator(0, "views", 3)))
    assert not torch.equal(drawn, torch.rand(4, generator=first))
    assert torch.equal(torch.get_rng_state(), before)


def test_neighboring_streams_do_not_look_alike() -> None:
    drawn = torch.stack([torch.rand(1000, generator=generator(0, "views", step)) for step in range(20)])
    correlation = torch.corrcoef(drawn) - torch.eye(20)
    assert correlation.abs().max() < 0.15
