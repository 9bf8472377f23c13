"""The cards of bench/: both sides do the same work, and what drives a method changes nothing."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from phyla.images.augment import Views
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain.simclr import SimCLR
from phyla.training.device import choose_device

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import driven
import plain
import steps

CPU = choose_device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no trusted image")  # of RUC, with a network that knows nothing


@pytest.mark.parametrize("name", list(driven.METHODS))
def test_the_plain_side_computes_the_loss_of_a_methods_own_step(name, digits):
    first, apart = steps.check(name, driven.METHODS[name](digits, width=2, batch=12))
    assert apart < 1e-5 and math.isfinite(first.loss) and len(first.rows) == 12


def test_a_card_stops_where_the_sides_differ(digits, monkeypatch):
    monkeypatch.setattr(plain, "nt_xent", lambda z, temperature: z.sum())
    with pytest.raises(SystemExit, match="simclr: the loss of the same views"):
        steps.check("simclr", driven.METHODS["simclr"](digits, width=2, batch=12))


@pytest.mark.parametrize("name", ["simclr", "scan", "ruc", "superand+ue"])
def test_the_plain_side_trains_from_a_loader(name, digits):
    first, _ = steps.check(name, driven.METHODS[name](digits, width=2, batch=12))
    near = (np.arange(48)[:, None] + np.arange(1, 4)) % 48
    made = plain.METHODS[name](first.state)
    before = [value.clone() for value in made.nets[0].parameters()]
    batches = plain.loader(plain.data(name, digits.array, near), 12, CPU.device, workers=0)
    side = plain.steps(made, batches, CPU.device)
    assert [next(side) for _ in range(5)] == [1] * 5, "more than an epoch"
    assert any(not torch.equal(a, b) for a, b in zip(before, made.nets[0].parameters(), strict=True))


def test_driven_steps_are_those_of_the_fit(digits):
    method = SimCLR(encoder=EncoderSpec(width=2), views=Views("simclr", 8), n_epochs=2, batch_size=16)
    whole, driver = method.fit(digits, device=CPU).history_[0], driven.Steps(lambda: method.fit(digits, device=CPU))
    for _ in range(3):
        driver()
    assert driver.step.index == 3 and driver.loop.history[0] == whole
    driver.close()


def test_what_a_fit_raises_reaches_the_card(digits):
    with pytest.raises(ValueError, match="lr must be above 0"):
        driven.Steps(lambda: SimCLR(lr=-1.0).fit(digits))
    driver = driven.Steps(lambda: SimCLR(EncoderSpec(width=1), Views("simclr", 8), n_epochs=1, batch_size=48).fit(
        digits, device=CPU))
    with pytest.raises(RuntimeError, match="came to its end"):
        driver()
