"""TSUC: its equations against loops, known and golden values; what the fit trains, chooses, resumes and refuses."""

import copy
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

import naive
from phyla.cluster import tsuc
from phyla.cluster.tsuc import TSUC, assignment_loss, consistency_loss, head_probabilities, learning_rate
from phyla.errors import CollapseWarning, InputError, NonFiniteLossError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.images.augment import Views
from phyla.images.batches import Order
from phyla.nets.heads import NormalizedHeads, Projection
from phyla.nets.resnet import initialise
from phyla.pretrain.superand import augmentation_loss
from phyla.randomness import generator
from phyla.training.device import choose_device
from phyla.types import ImageSet

pytestmark = pytest.mark.usefixtures("warm")
GOLDEN = Path(__file__).parents[1] / "golden" / "tsuc.npz"
VIEWS = Views("simclr", 8, jitter=1.0, hue=0.4)
WIDE = Views("simclr", 16, jitter=1.0, hue=0.4)
NORMS = ("feature_rows", "class_columns")

may_collapse = pytest.mark.filterwarnings("ignore:TSUC put all")
"""For fits of a step or two, after which BatchNorm's running statistics mean nothing yet."""


def tiny(**options: object) -> TSUC:
    return TSUC(**({"n_clusters": 3, "n_heads": 3, "n_projection": 8, "views": WIDE, "n_epochs": 2, "batch_size": 16}
                   | options))


def unit_rows(n: int, width: int, seed: int = 0) -> Tensor:
    rows = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(rows, dim=1)


def probabilities(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=source)).softmax(-1)


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN, allow_pickle=False))


def small_example() -> tuple[Tensor, Tensor]:
    """Return eight unit rows of eight features, and the weights of a head of three clusters, both by formula."""
    r, d, k = np.arange(1, 9)[:, None], np.arange(1, 9), np.arange(1, 4)
    rows = np.cos(0.4 * r + 0.9 * d + 0.03 * r * d)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows), torch.from_numpy(np.sin(1.1 * d[:, None] * k + 0.2))


# ── a head ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("norm", NORMS)
def test_head_is_the_formula(norm):
    rows, weight = unit_rows(5, 6), torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = head_probabilities(rows, weight, temperature=0.1, norm=norm)
    expected = naive.head_probabilities(rows.numpy(), weight.numpy(), temperature=0.1, norm=norm)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert not np.allclose(found, head_probabilities(rows, weight, temperature=0.1, norm=NORMS[norm == NORMS[0]]))
    every = NormalizedHeads(torch.stack([weight, -weight]), temperature=0.1, norm=norm)(rows).softmax(2)
    assert torch.allclose(every[0], found, rtol=1e-12), "the module of many heads"


@pytest.mark.parametrize("norm", NORMS)
def test_golden_head_and_assignment(norm):
    held = golden()
    rows = torch.from_numpy(held["tsuc_embeddings"]).requires_grad_()
    found = head_probabilities(rows, torch.from_numpy(held["tsuc_head_weight"]),
                               temperature=float(held["tsuc_temperature"]), norm=norm)
    np.testing.assert_allclose(found.detach(), held[f"tsuc_probabilities_{norm}"], rtol=1e-9)
    loss = assignment_loss(*found.chunk(2))
    assert loss.item() == pytest.approx(float(held[f"tsuc_assignment_{norm}"]), rel=1e-9)
    loss.backward()
    np.testing.assert_allclose(rows.grad, held[f"tsuc_assignment_{norm}_grad"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("norm", "first_row", "value", "slope"), [
    ("feature_rows", (0.998516149, 0.001145162, 0.000338689), -0.326395015, 1.765359856),
    ("class_columns", (0.962901714, 0.033680507, 0.003417779), -0.284222468, None)])
def test_known_head_of_three_clusters(norm, first_row, value, slope):
    rows, weight = small_example()
    rows.requires_grad_()
    found = head_probabilities(rows, weight, temperature=0.1, norm=norm)
    assert found[0].tolist() == pytest.approx(first_row, abs=6e-10)
    loss = assignment_loss(*found.chunk(2))
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=6e-10)
    if slope is not None:
        assert rows.grad.norm().item() == pytest.approx(slope, abs=6e-10)


def test_heads_of_unit_feature_rows_are_sharper_by_the_root_of_features_over_clusters():
    rows = unit_rows(2000, 128)
    weight = torch.randn(128, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    published = head_probabilities(rows, weight, temperature=0.1, norm="feature_rows")
    as_sharp = head_probabilities(rows, weight, temperature=0.1 * math.sqrt(10 / 128), norm="class_columns")
    paper = head_probabilities(rows, weight, temperature=0.1, norm="class_columns")
    confidence = [float(p.max(1).values.mean()) for p in (published, as_sharp, paper)]
    assert confidence[0] == pytest.approx(confidence[1], abs=0.01) and confidence[0] > confidence[2] + 0.3


@pytest.mark.parametrize(("norm", "low", "high"), [("feature_rows", 0.37, 0.5), ("class_columns", 0.0, 0.04)])
def test_only_unit_feature_rows_begin_where_the_published_log_does(norm, low, high):
    # Its first batch, of 128, has a mutual information of 0.434. Two views of a trained encoder are alike to about 0.9.
    first, other = unit_rows(128, 128, seed=1), unit_rows(128, 128, seed=2)
    across = nn.functional.normalize(other - (first * other).sum(1, keepdim=True) * first, dim=1)
    heads = torch.randn(20, 128, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for cosine in (0.85, 0.9):
        views = first, cosine * first + math.sqrt(1 - cosine**2) * across
        found = [-float(assignment_loss(*(head_probabilities(rows, weight, temperature=0.1, norm=norm)
                                          for rows in views))) for weight in heads]
        assert low < np.mean(found) < high


# ── the assignment loss ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("batch", "clusters"), [(1, 2), (4, 3), (9, 10), (5, 1)])
def test_assignment_loss_is_the_formula_and_symmetric(batch, clusters):
    first, second = probabilities(batch, clusters, seed=1), probabilities(batch, clusters, seed=2)
    for a, b in ((first, second), (second, first)):
        expected = naive.assignment_loss(a.numpy(), b.numpy())
        assert float(assignment_loss(a, b)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_assignment_gradient_is_that_of_the_formula():
    at = torch.stack([probabilities(4, 3, seed=1), probabilities(4, 3, seed=2)]).requires_grad_()
    assignment_loss(at[0], at[1]).backward()
    slopes = naive.gradient(lambda p: naive.assignment_loss(p[0], p[1]), at.detach().numpy())
    np.testing.assert_allclose(at.grad, slopes, atol=1e-8)


@pytest.mark.parametrize("clusters", [2, 3, 10])
def test_agreement_on_even_clusters_costs_minus_log_k_and_independence_nothing(clusters):
    sure = torch.eye(clusters, dtype=torch.float64).repeat(4, 1)
    assert float(assignment_loss(sure, sure)) == pytest.approx(-math.log(clusters), rel=1e-12)
    turned = float(assignment_loss(sure, sure.roll(1, 1)))  # tells as much, but P made symmetric leaves two for each
    assert turned == pytest.approx(-math.log(clusters) + (math.log(2) if clusters > 2 else 0), abs=1e-12)
    pairs = torch.cartesian_prod(torch.arange(clusters), torch.arange(clusters))
    first, second = (torch.eye(clusters, dtype=torch.float64)[side] for side in pairs.T)
    assert float(assignment_loss(first, second)) == pytest.approx(0, abs=1e-12)
    flat = torch.full((6, clusters), 1 / clusters, dtype=torch.float64)
    assert float(assignment_loss(flat, flat)) == pytest.approx(0, abs=1e-12)
    assert float(assignment_loss(sure[:1], sure[:1])) == pytest.approx(0, abs=1e-12), "one cluster tells nothing"


def test_three_images_worked_by_hand():
    # Sure and in agreement, one in each cluster, and one that the views put apart: P is 1/3 1/6; 1/6 1/3, with even
    # shares, so the mutual information is 2/3 log(1/3 / 1/4) + 1/3 log(1/6 / 1/4).
    first = torch.tensor([[1.0, 0], [0, 1], [1, 0]], dtype=torch.float64)
    second = torch.tensor([[1.0, 0], [0, 1], [0, 1]], dtype=torch.float64)
    expected = -(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert float(assignment_loss(first, second)) == pytest.approx(expected, rel=1e-12)


def test_assignment_loss_lies_between_minus_log_k_and_zero():
    for seed in range(50):
        first, second = (probabilities(6, 4, seed=2 * seed + i, scale=8.0) for i in (0, 1))
        assert -math.log(4) - 1e-12 <= float(assignment_loss(first, second)) <= 1e-12


def test_assignment_loss_does_not_change_with_the_order_of_images_or_clusters():
    first, second = probabilities(8, 5, seed=1), probabilities(8, 5, seed=2)
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(8, generator=draw), torch.randperm(5, generator=draw)
    loss = assignment_loss(first, second)
    assert torch.allclose(assignment_loss(first[rows], second[rows]), loss)
    assert torch.allclose(assignment_loss(first[:, columns], second[:, columns]), loss)
    assert not torch.allclose(assignment_loss(first, second[rows]), loss), "but the views belong together"


def test_leading_axes_are_heads():
    first, second = probabilities(3, 6, 4, seed=1), probabilities(3, 6, 4, seed=2)
    together = assignment_loss(first, second)
    assert together.shape == (3,)
    assert torch.allclose(together, torch.stack([assignment_loss(*pair) for pair in zip(first, second, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_probabilities_have_a_finite_loss_and_gradient(dtype):
    logits = torch.tensor([[2000.0, 0, -2000], [-2000, 2000, 0], [2000, 0, -2000]], dtype=dtype, requires_grad=True)
    sure = logits.softmax(1)
    assert (sure == 0).any() and (sure[:, 2] == 0).all(), "a cluster that no image ever reaches"
    loss = assignment_loss(sure, sure.flip(0))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


# ── the consistency loss ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "width", "temperature"), [(1, 3, 0.1), (2, 3, 1.0), (5, 4, 0.1), (9, 16, 0.5)])
def test_consistency_is_the_formula(n, width, temperature):
    rows = unit_rows(2 * n, width)
    expected = naive.augmentation_loss(rows.numpy(), rows.numpy(), temperature=temperature)
    assert float(consistency_loss(rows, temperature=temperature)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_consistency_gradient_is_that_of_the_formula_with_the_other_rows_held():
    rows = unit_rows(6, 4).requires_grad_()
    consistency_loss(rows, temperature=0.1).backward()
    held = rows.detach().numpy()
    slopes = naive.gradient(lambda v: naive.augmentation_loss(v, held, temperature=0.1), held)
    np.testing.assert_allclose(rows.grad, slopes, atol=1e-7)
    free = naive.gradient(lambda v: naive.augmentation_loss(v, v, temperature=0.1), held)
    assert not np.allclose(rows.grad, free, atol=1e-2), "rows that are compared with get no gradient"


def test_golden_consistency():
    held = golden()
    rows = torch.from_numpy(held["tsuc_embeddings"]).requires_grad_()
    loss = consistency_loss(rows, temperature=float(held["tsuc_temperature"]))
    loss.backward()
    assert loss.item() == pytest.approx(float(held["tsuc_consistency"]), rel=1e-9)
    np.testing.assert_allclose(rows.grad, held["tsuc_consistency_grad"], rtol=1e-9, atol=1e-14)


def test_known_consistency_of_eight_rows():
    rows = small_example()[0].requires_grad_()
    loss = consistency_loss(rows, temperature=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(15.858756605, abs=6e-10)
    assert rows.grad.norm().item() == pytest.approx(5.755975977, abs=6e-10)


def test_rows_that_are_all_alike_cost_log_255_and_254_chances_missed():
    same = unit_rows(1, 4).expand(256, 4)
    expected = math.log(255) - 254 * math.log(1 - 1 / 255)
    assert expected == pytest.approx(6.54, abs=0.01)
    assert float(consistency_loss(same, temperature=0.1)) == pytest.approx(expected)


def test_consistency_knows_neither_the_order_of_images_nor_a_rotation_nor_which_view_is_first():
    rows = unit_rows(10, 6)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(unit_rows(6, 6, seed=1))[0]
    loss = consistency_loss(rows, temperature=0.1)
    for same in (rows[torch.cat([order, order + 5])], rows @ turn, rows.roll(5, 0)):
        assert torch.allclose(consistency_loss(same, temperature=0.1), loss)
    assert not torch.allclose(consistency_loss(rows[torch.cat([order, torch.arange(5, 10)])], temperature=0.1), loss)


@pytest.mark.parametrize("temperature", [0.1, 0.02, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_p_comes_to_one_the_loss_is_a_number_and_pulls(dtype, temperature):
    # Each view is nearest to one of another image: p of a negative comes to 1, which log(1 - exp(log p)) cannot bear.
    apart = torch.eye(3, dtype=dtype)
    rows = torch.cat([apart, apart.roll(1, 0)]).requires_grad_()
    loss = consistency_loss(rows, temperature=temperature)
    loss.backward()
    total = float(np.logaddexp(1 / temperature, math.log(4)))  # one alike, four at right angles
    expected = 2 * total - math.log(4) - 3 * math.log1p(-math.exp(-total))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert rows.grad.isfinite().all() and rows.grad.abs().max() > 0.1 / temperature
    agreed = torch.cat([apart, apart]).requires_grad_()
    best = consistency_loss(agreed, temperature=temperature)
    best.backward()
    assert 0 <= best < 0.01 and agreed.grad.isfinite().all()


def test_consistency_is_super_ands_augmentation_loss_without_a_memory():
    rows = unit_rows(12, 5)
    at, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    mine, its = consistency_loss(at, temperature=0.1), augmentation_loss(other, temperature=0.1)
    mine.backward()
    its.backward()
    assert float(mine.detach()) == pytest.approx(float(its.detach()), rel=1e-12)
    torch.testing.assert_close(at.grad, other.grad, rtol=1e-9, atol=1e-12)


# ── the learning rate ─────────────────────────────────────────────────────────────────────────────────────────────


def test_learning_rate_is_the_published_table():
    published = {0: 1e-2, 79: 1e-2, 80: 1e-2, 119: 1e-2, 120: 1e-3, 159: 1e-3, 160: 1e-4, 199: 1e-4, 200: 1e-5,
                 240: 1e-6, 279: 1e-6, 280: 1e-7, 299: 1e-7}
    method = TSUC()
    found = {epoch: learning_rate(epoch, lr=method.lr, drop_epoch=method.lr_drop_epoch, drop_every=method.lr_drop_every,
                                  decay=method.lr_decay) for epoch in published}
    assert found == pytest.approx(published)


@may_collapse
def test_every_step_has_the_rate_of_its_epoch(noise, encoder, monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    fitted = tiny(n_epochs=4, lr=0.2, lr_drop_epoch=1, lr_drop_every=2, lr_decay=0.5).fit(noise, encoder=encoder)
    expected = [0.2, 0.1, 0.1, 0.05]
    assert rates == pytest.approx([rate for rate in expected for _ in range(2)])
    assert [record["lr"] for record in fitted.history_] == pytest.approx(expected)


# ── what a fit trains ─────────────────────────────────────────────────────────────────────────────────────────────


@may_collapse
def test_first_step_is_the_equations_on_two_views_in_one_pass_and_sgd_with_decay(noise, encoder):
    projection = Projection(32, 8)
    initialise(projection, generator(0, "test"))
    given, held = copy.deepcopy(encoder).train(), copy.deepcopy(projection)
    batch = torch.from_numpy(noise.array)[Order(32, 32, 0).epoch(0)]
    source, device = generator(0, "cluster", 0), choose_device("cpu")
    rows = held(given(device.arrange(torch.cat([WIDE(batch, source), WIDE(batch, source)]))))
    weight = torch.randn(3, 8, 3, generator=generator(0, "tsuc heads"))
    of_heads = torch.stack([assignment_loss(*head_probabilities(rows, w, temperature=0.2, norm="feature_rows").chunk(2))
                            for w in weight])
    consistency = consistency_loss(rows, temperature=0.3)
    (0.5 * consistency + of_heads.mean()).backward()
    options = {"n_epochs": 1, "batch_size": 32, "temperature": 0.2, "consistency_temperature": 0.3, "lr": 0.1,
               "consistency_weight": 0.5, "weight_decay": 0.1, "momentum": 0.9}
    fitted = tiny(**options).fit(noise, encoder=encoder, projection=projection)
    record = fitted.history_[0]
    assert record["consistency"] == pytest.approx(consistency.item(), rel=1e-4)
    assert [record[f"head_{h}"] for h in range(3)] == pytest.approx(of_heads.tolist(), rel=1e-3, abs=1e-6)
    assert record["assignment"] == pytest.approx(of_heads.mean().item(), rel=1e-3, abs=1e-6)
    assert record["mutual_information"] == -record["assignment"]
    assert record["loss"] == pytest.approx(0.5 * record["consistency"] + record["assignment"], rel=1e-6)
    net = fitted.net_
    for before, now, trained in ((encoder, net.encoder, given), (projection, net.projection, held)):
        for (name, old), new, parameter in zip(before.named_parameters(), now.parameters(), trained.parameters(),
                                               strict=True):
            slope = parameter.grad + 0.1 * old
            expected = old - 0.1 * 1.9 * slope  # Nesterov's first step looks ahead by the momentum
            torch.testing.assert_close(new.detach(), expected.detach(), rtol=1e-3, atol=1e-4, msg=name)


@may_collapse
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("options", "trained"), [
    ({}, ["encoder", "projection"]), ({"trainable": True}, ["encoder", "projection", "heads"]),
    ({"update": "projection"}, ["projection"]), ({"layer": "encoder"}, ["encoder"]),
    ({"update": "projection", "layer": "encoder", "trainable": True}, ["heads"])])
def test_what_trains_receives_a_gradient_and_what_is_frozen_none(noise, encoder, monkeypatch, options, trained,
                                                                 precision):
    seen: dict[int, Tensor] = {}
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        seen.update({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})
        step(self)

    nets = []
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(tsuc, "Loop", lambda *a, **k: nets.append(k["state"]["net"]) or Loop(*a, **k))
    tiny(n_epochs=1, **options).fit(noise, encoder=encoder, device=choose_device("cpu", precision))
    parts = dict(zip(("encoder", "projection", "heads"), nets[0], strict=True))
    assert seen.keys() == {id(p) for name in trained for p in parts[name].parameters()}
    assert all(grad.isfinite().all() and grad.any() for grad in seen.values())
    for name in parts.keys() - {*trained}:
        assert all(p.grad is None for p in parts[name].parameters()), "no backward pass through what is frozen"


Loop = tsuc.Loop


@may_collapse
def test_ten_steps_give_the_recorded_losses(noise, encoder, monkeypatch, recorded):
    seen = []
    backward = tsuc.Loop.watch
    monkeypatch.setattr(tsuc.Loop, "watch", lambda self, loss, step: seen.append(loss.item()) or backward(
        self, loss, step))
    tiny(n_epochs=5, lr=1e-3).fit(noise, encoder=encoder)
    recorded("tsuc", seen)


@may_collapse
def test_heads_stay_as_drawn_unless_they_are_trained(noise, encoder):
    weight = torch.randn(3, 8, 3, generator=generator(0, "tsuc heads"))
    drawn = NormalizedHeads(weight, temperature=0.1, norm="feature_rows").as_linear()
    fixed, trained = (tiny(trainable=trainable, lr=0.1).fit(noise, encoder=encoder) for trainable in (False, True))
    assert equal(fixed.heads_net_.heads, drawn)
    assert not equal(trained.heads_net_.heads, drawn)
    lengths = (0.1 * trained.heads_net_.heads.weight).norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5), "trained ones are normalised all the same"


@may_collapse
def test_a_frozen_encoder_stays_as_it_was_statistics_included(noise, encoder):
    before = copy.deepcopy(encoder)
    fitted = tiny(update="projection", lr=0.1).fit(noise, encoder=encoder)
    assert equal(fitted.net_.encoder, before)
    start = tiny(update="projection", lr=1e-30).fit(noise, encoder=encoder)
    assert not equal(fitted.net_.projection, start.net_.projection)


@may_collapse
def test_the_callers_networks_are_never_changed(noise, encoder):
    projection = Projection(32, 8)
    initialise(projection, generator(0, "test"))
    before, held = copy.deepcopy(encoder), copy.deepcopy(projection)
    fitted = tiny(lr=0.1).fit(noise, encoder=encoder.train(), projection=projection)
    assert equal(encoder, before) and encoder.training and equal(projection, held)
    assert not equal(fitted.net_.encoder, before) and not equal(fitted.net_.projection, held)
    assert all(p.requires_grad for p in encoder.parameters())


@may_collapse
def test_simclrs_projection_of_two_layers_is_where_heads_sit(noise, encoder):
    projection = Projection(32, 6, n_layers=2)
    initialise(projection, generator(0, "test"))
    fitted = tiny(lr=1e-30).fit(noise, encoder=encoder, projection=projection)
    assert fitted.net_.heads.weight.shape == (1, 3, 6)
    assert fitted.net_.projection.spec() == {"n_features": 32, "n_out": 6, "n_layers": 2}
    assert equal(fitted.net_.projection, projection)


@may_collapse
def test_without_a_projection_a_linear_one_is_drawn_from_the_seed_and_told_of(noise, encoder, caplog):
    caplog.set_level(logging.INFO, "phyla")
    fitted = tiny(lr=1e-30).fit(noise, encoder=encoder)
    assert "no projection was given; a linear one to 8 features is drawn" in caplog.text
    fresh = Projection(32, 8, n_layers=1)
    initialise(fresh, generator(0, "tsuc projection"))
    assert equal(fitted.net_.projection, fresh)


@may_collapse
def test_heads_can_sit_on_the_encoder_itself(noise, encoder):
    unused = Projection(32, 6)
    fitted = tiny(layer="encoder").fit(noise, encoder=encoder, projection=unused)
    assert fitted.net_.projection.spec() == {"n_features": 32, "n_out": 32, "n_layers": 0}
    assert fitted.net_.heads.weight.shape == (1, 3, 32)


@may_collapse
def test_an_encoder_may_be_any_frozen_module(noise):
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    fitted = tiny(update="projection").fit(noise, encoder=pooled)
    assert fitted.net_.projection.n_features == 48 and fitted.predict(noise).shape == (32,)


@may_collapse
def test_global_randomness_changes_nothing_and_is_not_drawn_from(noise, encoder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    once = tiny(n_epochs=1).fit(noise, encoder=encoder)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert equal(once.heads_net_, tiny(n_epochs=1).fit(noise, encoder=encoder).heads_net_)
    other = tiny(n_epochs=1, random_state=1).fit(noise, encoder=encoder)
    assert not equal(once.heads_net_.heads, other.heads_net_.heads)
    assert not equal(once.heads_net_.encoder, other.heads_net_.encoder)


# ── prototypes from the data ──────────────────────────────────────────────────────────────────────────────────────


class MeanColor(nn.Module):
    """The mean of each channel, and a constant: colors of images lie apart in it before any training."""

    def __init__(self, constant: float = 0.0) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4)."""
        return nn.functional.pad(x.mean(dim=(2, 3)), (0, 1), value=self.constant)


CALM = Views("simclr", 8, hue=0.0, grey=0.0, saturation=0.1, brightness=0.1, contrast=0.1, crop_scale=(0.5, 1.0))


def calm(**options: object) -> TSUC:
    return tiny(**({"views": CALM, "batch_size": 30} | options))


@may_collapse  # of the random heads, in the narrow cone
@pytest.mark.parametrize("constant", [0.0, 10.0])
def test_centers_of_the_embeddings_can_be_the_prototypes(colors, constant):
    images, true = colors
    encoder = MeanColor(constant)  # with 10 all embeddings lie in a narrow cone
    options = {"layer": "encoder", "update": "projection", "trainable": True, "lr": 1e-30, "n_epochs": 1,
               "norm": "class_columns"}
    fitted = calm(prototypes="kmeans", **options).fit(images, encoder=encoder)
    assert hungarian_accuracy(true, fitted.labels_) == 1.0, "before a step is made"
    assert fitted.head_losses_.max() < -0.5, "-0.003 in the narrow cone, if what the centers share were left in them"
    drawn = calm(**options).fit(images, encoder=encoder)
    assert fitted.head_losses_.max() < drawn.head_losses_.min()
    columns = 0.1 * fitted.heads_net_.heads.weight
    assert torch.allclose(columns.norm(dim=2), torch.ones(3, 3), atol=1e-5)
    order = [tuple(labels) for labels in fitted.head_labels_]
    assert len(set(order)) > 1, "each head has a start of its own"
    again = calm(prototypes="kmeans", **options).fit(images, encoder=encoder)
    assert equal(again.heads_net_, fitted.heads_net_)
    other = calm(prototypes="kmeans", random_state=3, **options).fit(images, encoder=encoder)
    assert not equal(other.heads_net_, fitted.heads_net_)


# ── what is chosen ────────────────────────────────────────────────────────────────────────────────────────────────


@may_collapse
def test_the_epoch_and_the_head_with_the_lowest_loss_are_kept(noise, encoder):
    options = {"n_heads": 4, "n_epochs": 4, "lr": 1.0, "lr_drop_epoch": 99}
    fitted = tiny(**options).fit(noise, encoder=encoder)
    totals = [record["loss"] for record in fitted.history_]
    assert fitted.epoch_ == 1 + int(np.argmin(totals)) < 4, "at this learning rate the last epoch is not the best"
    kept = fitted.history_[fitted.epoch_ - 1]
    assert fitted.head_losses_.tolist() == [kept[f"head_{h}"] for h in range(4)]
    assert fitted.head_losses_.mean() == pytest.approx(kept["assignment"])
    assert fitted.head_ == int(np.argmin(fitted.head_losses_)) and fitted.score_ == fitted.head_losses_.min()
    assert len(set(fitted.head_losses_)) == 4
    until_then = tiny(**(options | {"n_epochs": fitted.epoch_, "select": "last"})).fit(noise, encoder=encoder)
    assert equal(until_then.heads_net_, fitted.heads_net_), "the weights are those at that epoch's end"
    last = tiny(**(options | {"select": "last"})).fit(noise, encoder=encoder)
    assert last.epoch_ == 4 and last.history_ == fitted.history_ and not equal(last.net_, fitted.net_)
    assert last.head_losses_.tolist() == [last.history_[3][f"head_{h}"] for h in range(4)]


@pytest.mark.usefixtures("unchecked")
def test_labels_choose_nothing(colors):
    images, true = colors
    plain = calm().fit(images, encoder=MeanColor())
    told = calm().fit(images, true, encoder=MeanColor())
    assert equal(plain.net_, told.net_) and plain.head_ == told.head_


@may_collapse
def test_the_net_is_the_chosen_head_and_every_head_is_at_hand(noise, encoder):
    fitted = tiny(n_heads=4, lr=0.05).fit(noise, encoder=encoder)
    every, chosen = fitted.heads_net_, fitted.net_
    assert (every.heads.n_heads, chosen.heads.n_heads) == (4, 1)
    assert torch.equal(chosen.heads.weight[0], every.heads.weight[fitted.head_])
    assert chosen.encoder is every.encoder and not chosen.training and not every.training
    assert fitted.head_labels_.shape == (4, 32) and fitted.head_labels_.dtype == np.int64
    assert np.array_equal(fitted.head_labels_[fitted.head_], fitted.labels_)
    assert np.array_equal(fitted.predict_heads(noise), fitted.head_labels_)
    assert np.array_equal(fitted.predict_heads(noise, device=choose_device("cpu")), fitted.head_labels_)
    for head in range(4):
        alone = every.only(head).eval()
        views = WIDE.plain()(torch.from_numpy(noise.array), torch.Generator())
        assert np.array_equal(alone(views)[0].argmax(1), fitted.head_labels_[head])
    assert len({tuple(labels) for labels in fitted.head_labels_}) > 1
    assert fitted.probabilities_.dtype == np.float32 and fitted.labels_.dtype == np.int64
    np.testing.assert_array_equal(fitted.predict_proba(noise), fitted.probabilities_)
    np.testing.assert_array_equal(fitted.predict(noise), fitted.labels_)
    np.testing.assert_allclose(fitted.probabilities_.sum(axis=1), 1, rtol=1e-5)


@may_collapse
def test_every_epoch_is_recorded_and_the_result_told(noise, encoder, caplog):
    caplog.set_level(logging.INFO, "phyla")
    fitted = tiny(n_epochs=3).fit(noise, encoder=encoder)
    assert [record["epoch"] for record in fitted.history_] == [1, 2, 3]
    names = {"stage", "epoch", "loss", "consistency", "assignment", "head_0", "head_1", "head_2", "mutual_information",
             "lr"}
    assert all(record.keys() == names for record in fitted.history_)
    n_used = len(np.unique(fitted.labels_))
    assert f"kept epoch {fitted.epoch_} of 3, head {fitted.head_ + 1} of 3" in caplog.text
    assert f"{n_used} of 3 clusters hold an image, as even as " in caplog.text


# ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"trainable": True}, {"norm": "class_columns", "temperature": 0.05},
                                     {"norm": "class_columns", "prototypes": "kmeans"}], ids=str)
def test_recovers_colors_from_images(colors, options):
    images, true = colors
    small = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16), nn.ReLU())
    initialise(small, generator(0, "test"))
    fitted = calm(n_epochs=12, lr=0.03, lr_drop_epoch=8, lr_drop_every=2, **options).fit(images, encoder=small)
    assert hungarian_accuracy(true, fitted.labels_) == 1.0
    assert fitted.score_ < -0.95 * math.log(3)
    of_heads = [hungarian_accuracy(true, labels) for labels in fitted.head_labels_]
    if "prototypes" in options:
        assert min(of_heads) == 1.0
    else:
        assert fitted.history_[-1]["mutual_information"] > fitted.history_[0]["mutual_information"]
        assert min(of_heads) < 0.7, "one of the random heads has bad luck, and the loss tells which"
        assert int(np.argmin(of_heads)) == int(np.argmax(fitted.head_losses_))


def test_recovers_colors_over_an_encoder_that_stays_frozen(colors):
    images, true = colors
    fitted = calm(n_epochs=12, lr=0.1, update="projection").fit(images, encoder=MeanColor())
    assert hungarian_accuracy(true, fitted.labels_) > 0.95


def test_all_images_in_one_cluster_is_a_collapse_and_warned_of(noise):
    constant = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.fill_(1.0)
    with pytest.warns(CollapseWarning, match="TSUC put all 32 images into one of 3 clusters.*hint"):
        tiny(update="projection", n_epochs=1).fit(noise, encoder=constant)


@may_collapse
def test_one_cluster_few_images_and_duplicates_are_no_trouble(noise, encoder):
    one = tiny(n_clusters=1).fit(noise, encoder=encoder)
    assert one.labels_.tolist() == [0] * 32 and one.score_ == pytest.approx(0, abs=1e-6)
    two = noise.select(np.array([0, 1]))
    assert tiny(n_clusters=2).fit(two, encoder=encoder).labels_.shape == (2,)
    same = ImageSet(np.zeros((6, 16, 16, 3), np.uint8), [str(row) for row in range(6)], "black")
    for options in ({}, {"prototypes": "kmeans", "norm": "class_columns"}):
        fitted = tiny(**options).fit(same, encoder=encoder)
        assert np.isfinite(fitted.probabilities_).all() and np.isfinite(fitted.head_losses_).all()


# ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────────


@may_collapse
@pytest.mark.parametrize("options", [{}, {"trainable": True, "prototypes": "kmeans", "norm": "class_columns"},
                                     {"update": "projection"}, {"layer": "encoder"}], ids=str)
@pytest.mark.parametrize("call", [2, 5])
def test_killed_and_started_again_it_ends_bit_equal(noise, encoder, killed, tmp_path, monkeypatch, options, call):
    def fit(folder: Path | None = None) -> TSUC:
        return tiny(n_epochs=3, lr=0.5, **options).fit(noise, encoder=encoder, folder=folder)  # 3 epochs of 2 steps

    whole = fit()
    with killed(tsuc, "assignment_loss", call):
        fit(tmp_path)
    steps = []
    monkeypatch.setattr(tsuc, "assignment_loss", lambda *a: steps.append(0) or assignment_loss(*a))
    for _ in range(2):  # and a finished fit is not done again
        again = fit(tmp_path)
        assert len(steps) == 6 - (call - 1)
        assert equal(again.heads_net_, whole.heads_net_) and again.history_ == whole.history_
        assert np.array_equal(again.probabilities_, whole.probabilities_)
        assert np.array_equal(again.head_labels_, whole.head_labels_)
        assert np.array_equal(again.head_losses_, whole.head_losses_)
        assert (again.head_, again.epoch_, again.score_) == (whole.head_, whole.epoch_, whole.score_)


@may_collapse
def test_checkpoint_of_other_options_images_encoder_or_projection_is_refused(noise, encoder, tmp_path):
    projection = Projection(32, 8)
    initialise(projection, generator(0, "test"))

    def fit(images: ImageSet = noise, given: Projection | None = projection, lr: float = 0.01) -> None:
        tiny(n_epochs=1, lr=lr).fit(images, encoder=encoder, projection=given, folder=tmp_path)

    fit()
    fit()
    others = copy.deepcopy(projection)
    others[0].bias.data += 1
    for changed in ({"lr": 0.02}, {"images": ImageSet(255 - noise.array, noise.ids)}, {"given": others},
                    {"given": None}):
        with pytest.raises(InputError, match="other options or images"):
            fit(**changed)
    with torch.no_grad():
        encoder.bn1.bias += 1
    with pytest.raises(InputError, match="other options or images"):
        fit()


# ── the contract, and misuse ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
def test_scikit_learn_contract(noise):
    method = tiny(temperature=0.2)
    assert method.get_params() == clone(method).get_params() == TSUC(**method.get_params()).get_params()
    assert method.set_params(lr=0.3) is method and method.lr == 0.3
    odd = object()
    assert TSUC(n_clusters=odd).n_clusters is odd, "the constructor stores and does not judge"
    for ask in (method.predict, method.predict_proba, method.predict_heads):
        with pytest.raises(NotFittedError):
            ask(noise)


def test_defaults_are_the_published_configuration():
    expected = {"n_clusters": 10, "n_heads": 5, "norm": "feature_rows", "temperature": 0.1, "n_projection": 128,
                "consistency_temperature": 0.1, "consistency_weight": 1.0, "prototypes": "random", "trainable": False,
                "layer": "projection", "update": "all", "lr": 0.01, "lr_drop_epoch": 120, "lr_drop_every": 40,
                "lr_decay": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "n_epochs": 300, "batch_size": 128,
                "select": "lowest_loss"}
    published = TSUC().get_params()
    assert {name: published[name] for name in expected} == expected
    assert published["views"] == Views("simclr", 32, jitter=1.0, hue=0.4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "said"), [
    ({"n_clusters": 0}, "n_clusters must be at least 1, got 0"), ({"n_heads": 0}, "n_heads must be at least 1"),
    ({"n_clusters": 33}, "n_clusters=33 needs at least 33 images, got 32.* hint: lower n_clusters"),
    ({"temperature": 0.0}, "temperature must be above 0"), ({"batch_size": 1}, "batch_size must be at least 2"),
    ({"consistency_temperature": math.nan}, "consistency_temperature must be above 0, got nan"),
    ({"consistency_weight": -1.0}, "consistency_weight must be at least 0"), ({"n_epochs": 0}, "n_epochs must be"),
    ({"lr_drop_every": 0}, "lr_drop_every must be at least 1"), ({"n_projection": 0}, "n_projection must be at least"),
    ({"norm": "class_column"}, "norm='class_column' is not allowed. hint: did you mean class_columns"),
    ({"update": "heads"}, "update='heads' is not allowed"), ({"select": "best"}, "select='best'"),
    ({"layer": "heads"}, "layer='heads'"), ({"prototypes": "k-means"}, "did you mean kmeans"),
    ({"prototypes": "kmeans", "n_clusters": 4}, "hint: set norm=class_columns.* here 0.071"),
    ({"prototypes": "kmeans", "layer": "encoder"}, r"temperature = 0\.1 \* sqrt\(n_clusters / features of the enc"),
    ({"prototypes": "kmeans", "n_clusters": 0}, "n_clusters must be"), ({"lr_decay": -0.1}, "lr_decay must be above 0"),
    ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"), ({"batch_size": 0}, "batch_size must be at least 2"),
    ({"momentum": -1.0}, "momentum must be at least 0 and below 1, got -1.0"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
    ({"update": "projection", "layer": "encoder"}, "nothing to train.*hint: set trainable=true"),
])
def test_options_that_cannot_be_used_are_refused_before_any_work(noise, encoder, options, said):
    with pytest.raises(InputError, match=said):
        tiny(**options).fit(noise, encoder=encoder)
    if "needs at least" not in said:
        assert re.search(said, str(next(tiny(**options).option_faults()))), "and can be told without the images"


def test_parts_that_do_not_fit_together_are_refused(noise, encoder):
    with pytest.raises(InputError, match=r"takes 16 features, the encoder has 32.*hint: give the projection of this"):
        tiny().fit(noise, encoder=encoder, projection=Projection(16, 8))
    with pytest.raises(InputError, match="nothing to train"):
        tiny(update="projection").fit(noise, encoder=encoder, projection=Projection(32, 32, n_layers=0))
    with pytest.raises(InputError, match="at least 3 images, got 1"):
        tiny().fit(noise.select(np.array([0])), encoder=encoder)


@pytest.mark.usefixtures("unchecked")
def test_embeddings_are_refused_with_a_word_on_what_takes_them(encoder):
    with pytest.raises(InputError, match=r"TSUC clusters images.*got ndarray.*hint: pass an ImageSet, or .*KMeans"):
        tiny().fit(np.ones((20, 4), np.float32), encoder=encoder)


def test_a_loss_that_is_not_finite_ends_the_fit_and_says_where(noise, encoder, monkeypatch):
    calls = []

    def broken(first: Tensor, second: Tensor) -> Tensor:
        calls.append(0)
        return assignment_loss(first, second) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(tsuc, "assignment_loss", broken)
    with pytest.raises(NonFiniteLossError, match="cluster: the loss is not finite at step 2"):
        tiny().fit(noise, encoder=encoder)


def test_weights_lost_in_the_very_last_step_are_noticed(noise, encoder, monkeypatch):
    step = torch.optim.SGD.step

    def breaking(self: torch.optim.SGD) -> None:
        step(self)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(math.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", breaking)
    with pytest.raises(NonFiniteLossError, match="cluster: the weights are not finite"):
        tiny(n_epochs=1, batch_size=32).fit(noise, encoder=encoder)
