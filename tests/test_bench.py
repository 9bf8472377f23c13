"""The cards of bench/: both sides do the same work, and what drives a method changes nothing."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from phyla.images.augment import Views
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain.simclr import SimCLR
from phyla.training.device import choose_device

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import cards
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell")
def test_processor_time_counts_the_workers_and_not_the_waiting(monkeypatch):
    monkeypatch.setattr(steps, "PAUSE", 0.15)

    class Burns(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, row: int) -> int:
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
            return row

    batches = iter(torch.utils.data.DataLoader(Burns(), 1, num_workers=1))
    assert steps.processor((1 for _ in batches), n_steps=4) > 0.03
    assert steps.processor(lambda: time.sleep(0.05), n_steps=2) < 0.03


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


def test_the_page_of_speed_is_written_from_the_cards():
    assert f"{cards.BEGIN}\n{cards.block()}\n{cards.END}" in cards.PAGE.read_text(encoding="utf-8")


def test_a_card_becomes_a_table_with_its_machine(tmp_path, monkeypatch):
    facts = {"cpu": "a processor", "threads": 2, "torch": "2.15.0"}
    rows = [{"method": "scan", "phyla ms": 1234.5, "x plain": 1.5, "x plain range": [1.25, 2]},
            {"method": "simclr", "phyla ms": 20, "x plain": 0.9, "x plain range": [0.5, 1], "x lightly": 3}]
    parts = {"steps": {"a": {"method": "scan", "ms": 5, "recorded": True}, "b": {"failed": "no", "at": 1.0}}}
    held_by = {"steps": {"rows": rows, "options": {"repeats": 5}}, "gpu-one": {"gpu": "a GPU", "parts": parts}}
    for name, held in held_by.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(facts | held))
    monkeypatch.setattr(cards, "CARDS", tmp_path)
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{cards.BEGIN}\nold\n{cards.END}\nafter\n")
    monkeypatch.setattr(cards, "PAGE", page)
    cards.write_page()
    told = page.read_text()
    assert told.startswith("before\n") and told.endswith("\nafter\n") and "old" not in told
    assert "a processor, 2 threads; torch 2.15.0, medians of 5." in told and "a GPU; torch 2.15.0." in told
    assert "| method | phyla ms | x plain | x lightly |" in told
    assert "| scan | 1,234.5 | **1.5** (1.25 to 2) |  |" in told and "| scan | 5 | yes |" in told
