"""Durations with units and learning rates, at the values the published configurations have."""

import math
from itertools import pairwise

import pytest

from phyla.errors import InputError
from phyla.training.schedule import cosine, n_steps, staircase, step_decay, warm_up


def steps(duration: str) -> int:
    return n_steps(duration, steps_per_epoch=97, batch_size=512, total_steps=48_500)


@pytest.mark.parametrize(("duration", "wanted"), [
    ("20 epochs", 1940), ("1 epoch", 97), ("0.5 epochs", 48), ("500 steps", 500), ("1 step", 1), ("0 epochs", 0),
    ("51200 images", 100), ("1 image", 0), ("5 %", 2425), ("5%", 2425), ("100%", 48_500), (" 7steps ", 7)])
def test_durations_become_steps(duration: str, wanted: int) -> None:
    assert steps(duration) == wanted


@pytest.mark.parametrize("duration", ["", "20", "epochs", "-5 epochs", "5 minutes", "5 epochs %", "5 s", "5 s%", "5 %s",
                                      "1e3 steps", "5 5 steps", "5 EPOCHS!", "nan steps", "%", "1. epochs", 5, None])
@pytest.mark.usefixtures("unchecked")
def test_anything_else_is_refused_with_examples(duration: str) -> None:
    with pytest.raises(InputError, match=r"is not a number and a unit\. hint: for example '20 epochs'"):
        steps(duration)


def test_cosine_has_the_published_values() -> None:
    def simclr(epoch: int) -> float:
        return cosine(epoch, n_epochs=500, lr=0.4, floor=0.4 * 0.1**3)

    assert simclr(0) == pytest.approx(0.4, abs=1e-15)
    assert simclr(250) == pytest.approx((0.4 + 4e-4) / 2)
    assert simclr(500) == pytest.approx(4e-4)
    assert simclr(499) == pytest.approx(4e-4 + 0.5 * (0.4 - 4e-4) * (1 + math.cos(math.pi * 499 / 500)))
    assert simclr(10_000) == simclr(500), "the rate does not rise again"
    rates = [simclr(epoch) for epoch in range(501)]
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_cosine_falls_to_zero_without_a_floor() -> None:
    assert cosine(4, n_epochs=4, lr=1.0) == pytest.approx(0.0, abs=1e-16)


def test_step_decay_counts_the_milestones_strictly_below() -> None:
    rates = [step_decay(epoch, lr=1.0, milestones=(2, 4)) for epoch in range(7)]
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert step_decay(3, lr=2.0, milestones=(), decay=0.5) == 2.0
    assert step_decay(3, lr=2.0, milestones=(1, 2), decay=0.5) == 0.5


def test_a_staircase_rises_every_so_many_epochs() -> None:
    steps = [staircase(epoch, start=0.90, rise=0.02, every=40) for epoch in (0, 39, 40, 79, 199)]
    assert steps == pytest.approx([0.90, 0.90, 0.92, 0.92, 0.98])
    assert staircase(199, start=0.99, rise=0.0, every=40) == 0.99


def test_warm_up_rises_from_one_step_to_one_and_stays() -> None:
    assert [warm_up(step, steps=4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warm_up(0, steps=0) == 1.0
