"""SimCLR: its loss against loops, known and golden values; the fit against itself, cut short, resumed and misused."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor

import naive
from phyla.errors import InputError, NonFiniteLossError
from phyla.images.augment import Views
from phyla.images.batches import Order
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain import simclr
from phyla.pretrain.simclr import SimCLR, nt_xent
from phyla.randomness import generator
from phyla.training.device import choose_device
from phyla.types import ImageSet

pytestmark = pytest.mark.usefixtures("warm")
GOLDEN = Path(__file__).parents[1] / "golden" / "losses.npz"
VIEWS = Views("simclr", 8)


def tiny(**options: object) -> SimCLR:
    return SimCLR(**({"encoder": EncoderSpec(width=4), "views": VIEWS, "n_projection": 16, "n_epochs": 2,
                      "batch_size": 16, "lr": 0.1} | options))


def unit_rows(n: int, width: int, seed: int) -> Tensor:
    rows = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def weights(method: SimCLR) -> dict[str, Tensor]:
    return {**method.encoder_.state_dict(prefix="encoder."), **method.projection_.state_dict(prefix="projection.")}


def equal(a: SimCLR, b: SimCLR) -> bool:
    mine, others = weights(a), weights(b)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


# ── the equation ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "width", "temperature"), [(2, 3, 1.0), (5, 4, 0.1), (9, 16, 0.5)])
def test_loss_is_the_formula_in_both_directions(n, width, temperature):
    first, second = unit_rows(n, width, 1), unit_rows(n, width, 2)
    for a, b in ((first, second), (second, first)):
        assert float(nt_xent(a, b, temperature=temperature)) == pytest.approx(
            naive.nt_xent(a.numpy(), b.numpy(), temperature=temperature), rel=1e-12)
    one, other = (nt_xent(a, b, temperature=temperature) for a, b in ((first, second), (second, first)))
    assert not math.isclose(one, other, rel_tol=1e-6), "only first views are anchors"


def test_golden_value_and_gradient():
    held = np.load(GOLDEN, allow_pickle=False)
    pair = torch.from_numpy(np.stack([held["nt_xent_first"], held["nt_xent_second"]], axis=1)).requires_grad_()
    loss = nt_xent(pair[:, 0], pair[:, 1], temperature=float(held["nt_xent_temperature"]))
    loss.backward()
    assert loss.item() == pytest.approx(float(held["nt_xent_value"]), rel=1e-9)
    np.testing.assert_allclose(pair.grad, held["nt_xent_grad"], rtol=1e-9, atol=1e-14)


def test_known_values():
    same = unit_rows(1, 4, 0).expand(6, 4)
    assert float(nt_xent(same, same, temperature=0.1)) == pytest.approx(math.log(11)), "2B - 1 equal candidates"
    axes = torch.eye(4, dtype=torch.float64)
    four = math.log(1 + 6 * math.exp(-2))  # the partner at similarity 1, three first and three second views at 0
    assert float(nt_xent(axes, axes, temperature=0.5)) == pytest.approx(four)
    assert float(nt_xent(axes, axes, temperature=0.01)) == pytest.approx(0, abs=1e-12)


def test_gradient_is_that_of_the_formula():
    first, second = unit_rows(4, 3, 5), unit_rows(4, 3, 6)
    at = torch.stack([first, second]).requires_grad_()
    nt_xent(at[0], at[1], temperature=0.5).backward()
    slopes = naive.gradient(lambda z: naive.nt_xent(z[0], z[1], temperature=0.5), at.detach().numpy())
    np.testing.assert_allclose(at.grad, slopes, atol=1e-7)


def test_loss_does_not_change_with_the_order_or_a_rotation_and_is_safe_in_float32():
    first, second = unit_rows(8, 5, 3), unit_rows(8, 5, 4)
    loss = nt_xent(first, second, temperature=0.1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(nt_xent(first[order], second[order], temperature=0.1), loss)
    assert torch.allclose(nt_xent(first @ turn, second @ turn, temperature=0.1), loss)
    extreme = torch.stack([first[:2], first[:2].flip(0)]).float().requires_grad_()
    hard = nt_xent(extreme[0], extreme[1], temperature=0.001)
    hard.backward()
    assert hard.isfinite() and torch.isfinite(extreme.grad).all() and extreme.grad.abs().max() > 0


# ── the fit ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_receives_a_gradient(digits, monkeypatch, precision):
    gradients: dict[int, bool] = {}
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        gradients.update({id(p): bool(p.grad.isfinite().all() and p.grad.any()) for g in self.param_groups
                          for p in g["params"]})
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    fitted = tiny(n_epochs=1).fit(digits, device=choose_device("cpu", precision))
    trained = [*fitted.encoder_.parameters(), *fitted.projection_.parameters()]
    assert {id(p) for p in trained} == gradients.keys() and all(gradients.values())


def test_ten_steps_give_the_recorded_losses(noise, monkeypatch, recorded):
    seen = []
    monkeypatch.setattr(simclr, "nt_xent", lambda *a, **k: seen.append(nt_xent(*a, **k)) or seen[-1])
    tiny(views=Views("simclr", 16), n_epochs=5, lr=0.001).fit(noise)
    recorded("simclr", [loss.item() for loss in seen])


def test_first_step_is_the_equation_on_two_views_and_sgd_with_decay(digits):
    method = tiny(n_epochs=1, batch_size=48, weight_decay=0.1, momentum=0.0)
    net = torch.nn.Sequential(*method._build()).train()
    before = {name: value.clone() for name, value in net.named_parameters()}
    batch = torch.from_numpy(digits.array)[Order(48, 48, 0).epoch(0)]
    source = generator(0, "pretrain", 0)
    device = choose_device("cpu")
    first, second = net(device.arrange(torch.cat([VIEWS(batch, source), VIEWS(batch, source)]))).chunk(2)
    loss = nt_xent(first, second, temperature=0.1)
    loss.backward()
    fitted = method.fit(digits)
    assert fitted.history_[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert fitted.history_[0]["lr"] == pytest.approx(0.1)
    after = dict(torch.nn.Sequential(fitted.encoder_, fitted.projection_).named_parameters())
    for name, parameter in net.named_parameters():
        expected = before[name] - 0.1 * (parameter.grad + 0.1 * before[name])
        torch.testing.assert_close(after[name].detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("warmup", "rise"), [("0 epochs", [1] * 9), ("5 steps", [0.2, 0.4, 0.6, 0.8, *[1] * 5])])
def test_learning_rate_falls_along_a_cosine_by_epoch_after_the_warm_up(digits, monkeypatch, warmup, rise):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    fitted = tiny(n_epochs=3, lr=0.4, warmup=warmup).fit(digits)  # of three steps
    fall = [4e-4 + 0.5 * (0.4 - 4e-4) * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3) for _ in range(3)]
    assert rates == pytest.approx([up * down for up, down in zip(rise, fall, strict=True)])
    assert [record["lr"] for record in fitted.history_] == pytest.approx(rates[::3])


def test_symmetric_takes_both_directions(digits, monkeypatch):
    calls = []
    monkeypatch.setattr(simclr, "nt_xent", lambda a, b, *, temperature: calls.append((a, b)) or nt_xent(
        a, b, temperature=temperature))
    fitted = tiny(n_epochs=1, batch_size=48, symmetric=True).fit(digits)
    (a, b), (c, d) = calls
    assert a is d and b is c
    both = 0.5 * (nt_xent(a, b, temperature=0.1) + nt_xent(b, a, temperature=0.1))
    assert fitted.history_[0]["loss"] == pytest.approx(both.item())


def test_same_seed_same_weights_and_another_seed_others(digits):
    once = tiny(n_epochs=1).fit(digits)
    assert equal(once, tiny(n_epochs=1).fit(digits))
    assert not equal(once, tiny(n_epochs=1, random_state=1).fit(digits))


def test_global_randomness_changes_nothing(digits):
    torch.manual_seed(5)
    once = tiny(n_epochs=1).fit(digits)
    torch.manual_seed(6)
    assert equal(once, tiny(n_epochs=1).fit(digits))


@pytest.mark.parametrize("call", [2, 4, 6])
def test_killed_and_started_again_it_ends_bit_equal(digits, killed, tmp_path, monkeypatch, call):
    whole = tiny().fit(digits)  # 2 epochs of 3 steps
    with killed(simclr, "nt_xent", call):
        tiny().fit(digits, folder=tmp_path)
    steps = []
    monkeypatch.setattr(simclr, "nt_xent", lambda *a, **k: steps.append(0) or nt_xent(*a, **k))
    again = tiny().fit(digits, folder=tmp_path)
    assert len(steps) == 6 - (call - 1), "it goes on where it was"
    assert equal(again, whole) and again.history_ == whole.history_
    assert equal(tiny().fit(digits, folder=tmp_path), whole), "a finished fit is not done again"
    assert len(steps) == 6 - (call - 1)


def test_checkpoint_of_other_options_or_images_is_refused(digits, tmp_path):
    tiny(n_epochs=1).fit(digits, folder=tmp_path)
    others = ImageSet(255 - digits.array, digits.ids)
    for method, images in ((tiny(n_epochs=1, lr=0.2), digits), (tiny(n_epochs=1), others)):
        with pytest.raises(InputError, match="other options or images"):
            method.fit(images, folder=tmp_path)


def test_two_views_of_an_image_come_nearer_than_two_images(colors):
    images, true = colors
    fitted = tiny(n_epochs=6, batch_size=30, lr=0.1).fit(images)
    losses = [record["loss"] for record in fitted.history_]
    assert losses[-1] < losses[0] - 0.3
    rows = fitted.transform(images)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    alike = rows @ rows.T - 2 * np.eye(len(rows))
    assert np.mean(true[alike.argmax(axis=1)] == true) > 0.9


# ── the contract ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
def test_scikit_learn_contract(digits):
    method = tiny(temperature=0.2)
    assert method.get_params() == clone(method).get_params() == SimCLR(**method.get_params()).get_params()
    assert method.set_params(lr=0.3) is method and method.lr == 0.3
    odd = object()
    assert SimCLR(temperature=odd).temperature is odd, "the constructor stores and does not judge"
    with pytest.raises(NotFittedError):
        method.transform(digits)
    assert tiny(n_epochs=1).fit_transform(digits).shape == (48, 32)


def test_transform_gives_one_finite_row_an_image_in_order(digits):
    fitted = tiny(n_epochs=1).fit(digits)
    rows = fitted.transform(digits)
    assert rows.shape == (48, 32) and rows.dtype == np.float32 and np.isfinite(rows).all()
    np.testing.assert_allclose(fitted.transform(digits.select(np.array([7, 3]))), rows[[7, 3]], rtol=1e-4, atol=1e-5)
    assert not fitted.encoder_.training and not fitted.projection_.training


def test_defaults_are_the_published_configuration():
    published = SimCLR().get_params()
    expected = {"n_projection": 128, "temperature": 0.1, "n_epochs": 500, "batch_size": 512, "lr": 0.4,
                "lr_floor": 0.001, "momentum": 0.9, "weight_decay": 1e-4, "warmup": "0 epochs", "symmetric": False}
    assert {name: published[name] for name in expected} == expected
    assert published["encoder"] == EncoderSpec("resnet18", "cifar", 64)


@pytest.mark.parametrize(("options", "said"), [
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"), ({"temperature": math.nan}, "above 0, got nan"),
    ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"), ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 1}, "batch_size=1 leaves no other image"), ({"n_projection": 0}, "n_projection must be at least 1"),
    ({"warmup": "ten"}, "duration 'ten'"), ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"),
    ({"momentum": 2.0}, "momentum must be at least 0 and below 1, got 2.0"), ({"lr_floor": -1.0}, "lr_floor must be"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
])
def test_options_that_cannot_be_used_are_refused(digits, options, said):
    with pytest.raises(InputError, match=said):
        tiny(**options).fit(digits)
    assert re.search(said, str(next(tiny(**options).option_faults()))), "and can be told without the images"


def test_too_few_images_are_refused_and_two_suffice(digits):
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        tiny().fit(digits.select(np.array([0])))
    assert len(tiny(n_epochs=1).fit(digits.select(np.array([0, 1]))).history_) == 1


def test_a_loss_that_is_not_finite_ends_the_fit_and_says_where(digits, monkeypatch, tmp_path):
    calls = []

    def broken(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
        calls.append(0)
        return nt_xent(first, second, temperature=temperature) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(simclr, "nt_xent", broken)
    with pytest.raises(NonFiniteLossError, match="pretrain: the loss is not finite at step 4"):
        tiny().fit(digits, folder=tmp_path)
