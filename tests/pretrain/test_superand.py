"""Super-AND: its losses against loops, known and golden values; discovery; the fit in rounds, cut short and misused."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import naive
from phyla.errors import InputError, NonFiniteLossError
from phyla.images.augment import Views
from phyla.images.batches import Order
from phyla.nets.memory import Memory
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain import superand
from phyla.pretrain.superand import (
    SuperAND,
    and_loss,
    augmentation_loss,
    discover,
    learning_rate,
    memory_entropy,
    memory_losses,
    rows_of_losses,
    unification_entropy,
    unification_weight,
)
from phyla.randomness import generator
from phyla.training.device import choose_device
from phyla.types import ImageSet

pytestmark = pytest.mark.usefixtures("warm")
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "superand.npz", allow_pickle=False)
VIEWS = Views("simclr", 8, jitter=1.0, hue=0.4)
EXACT = {"rel": 1e-9, "abs": 1e-9}


def tiny(**options: object) -> SuperAND:
    return SuperAND(**({"encoder": EncoderSpec(width=4, streams="rgb_sobel"), "views": VIEWS, "n_projection": 16,
                        "n_rounds": 2, "n_epochs": 2, "batch_size": 16, "unification_every": 1} | options))


def unit_rows(n: int, width: int, seed: int) -> Tensor:
    rows = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normalize(rows, dim=1)


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def none(n: int) -> Tensor:
    return torch.full((n,), -1)


def some(n: int) -> Tensor:
    """Return the next image as the neighbor of every third one."""
    images = torch.arange(n)
    return torch.where(images % 3 == 0, (images + 1) % n, -1)


def weights(method: SuperAND) -> dict[str, Tensor]:
    return {**method.encoder_.state_dict(prefix="encoder."), **method.projection_.state_dict(prefix="projection."),
            "memory": torch.from_numpy(method.memory_.values), "neighbor": torch.from_numpy(method.neighbor_)}


def equal(a: SuperAND, b: SuperAND) -> bool:
    mine, others = weights(a), weights(b)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


class Small:
    """Forty memory rows and four images' two views that can be written down."""

    n, d = torch.arange(1, 41, dtype=torch.float64)[:, None], torch.arange(1, 9, dtype=torch.float64)
    r = torch.arange(1, 9, dtype=torch.float64)[:, None]
    memory = normalize(torch.sin(0.7 * n + 1.3 * d + 0.05 * n * d), dim=1)
    embeddings = normalize(torch.cos(0.4 * r + 0.9 * d + 0.03 * r * d), dim=1)
    index = torch.tensor([3, 17, 25, 38])

    @classmethod
    def logits(cls, embeddings: Tensor) -> Tensor:
        return embeddings @ cls.memory.T / 0.1


# ── the equations against loops ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n_images", "batch", "temperature"), [(2, 1, 1.0), (7, 3, 0.5), (30, 5, 0.1)])
def test_losses_over_the_memory_are_the_formulas(n_images, batch, temperature):
    memory, rows = unit_rows(n_images, 6, 0), unit_rows(2 * batch, 6, 1)
    logits, index = rows @ memory.T / temperature, torch.randperm(n_images, generator=generator(batch, "index"))[:batch]
    for neighbor in (none(n_images), some(n_images)):
        assert and_loss(logits, index, neighbor).item() == pytest.approx(
            naive.and_loss(logits.numpy(), index.numpy(), neighbor.numpy()), rel=1e-12)
    for mask_self in (True, False):
        assert unification_entropy(logits, index, mask_self=mask_self).item() == pytest.approx(
            naive.unification_entropy(logits.numpy(), index.numpy(), mask_self=mask_self), rel=1e-11)


def test_gradients_over_the_memory_are_those_of_the_formulas():
    index, neighbor = torch.tensor([0, 5, 3]), some(8)
    logits = (unit_rows(6, 4, 1) @ unit_rows(8, 4, 0).T / 0.5).requires_grad_()
    for ours, loops in (
        (and_loss(logits, index, neighbor), lambda z: naive.and_loss(z, index.numpy(), neighbor.numpy())),
        (unification_entropy(logits, index), lambda z: naive.unification_entropy(z, index.numpy())),
        (unification_entropy(logits, index, mask_self=False),
         lambda z: naive.unification_entropy(z, index.numpy(), mask_self=False)),
    ):
        found, = torch.autograd.grad(ours, logits, retain_graph=True)
        np.testing.assert_allclose(found, naive.gradient(loops, logits.detach().numpy()), atol=1e-7)


@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.1), (2, 1.0), (5, 0.1), (8, 0.3)])
def test_augmentation_is_the_formula_on_embeddings_and_on_relationships(batch, temperature):
    rows, memory = unit_rows(2 * batch, 6, 1), unit_rows(11, 6, 2)
    plain = naive.augmentation_loss(rows.numpy(), rows.numpy(), temperature=temperature)
    assert augmentation_loss(rows, temperature=temperature).item() == pytest.approx(plain, rel=1e-9, abs=1e-12)
    wide = naive.relationships(rows.numpy(), memory.numpy())
    related = naive.augmentation_loss(wide, wide, temperature=temperature)
    found = augmentation_loss(rows, temperature=temperature, gram=memory.T @ memory)
    assert found.item() == pytest.approx(related, rel=1e-9, abs=1e-12)


def test_augmentation_moves_the_first_operand_alone():
    rows, memory = unit_rows(6, 4, 1).requires_grad_(), unit_rows(9, 4, 2).numpy()
    fixed, wide = rows.detach().numpy(), naive.relationships(rows.detach().numpy(), memory)
    found, = torch.autograd.grad(augmentation_loss(rows, temperature=0.5), rows)
    slopes = naive.gradient(lambda z: naive.augmentation_loss(z, fixed, temperature=0.5), fixed)
    np.testing.assert_allclose(found, slopes, atol=1e-7)
    gram = torch.from_numpy(memory.T @ memory)
    found, = torch.autograd.grad(augmentation_loss(rows, temperature=0.5, gram=gram), rows)
    slopes = naive.gradient(
        lambda z: naive.augmentation_loss(naive.relationships(z, memory), wide, temperature=0.5), fixed)
    np.testing.assert_allclose(found, slopes, atol=1e-7)


# ── golden and known values ───────────────────────────────────────────────────────────────────────────────────────


def test_golden_values_of_the_written_example():
    rows, first, second = Small.embeddings.clone().requires_grad_(), none(40), discover(Small.memory, 20,
                                                                                        temperature=0.1)
    logits, gram = Small.logits(rows), Small.memory.T @ Small.memory
    attraction = and_loss(logits, Small.index, first), and_loss(logits, Small.index, second)
    assert [loss.item() for loss in attraction] == pytest.approx([6.699244405, 5.797386817], abs=1e-9)
    augmentation = augmentation_loss(rows, temperature=0.1, gram=gram)
    assert augmentation.item() == pytest.approx(16.771754298, abs=1e-9)
    slope, = torch.autograd.grad(attraction[0] + augmentation, rows, retain_graph=True)
    assert slope.norm().item() == pytest.approx(7.342502292, abs=1e-9)
    assert slope[0, :3].tolist() == pytest.approx([0.704931596, 1.057691031, -0.630259871], abs=1e-9)
    slope, = torch.autograd.grad(attraction[1] + augmentation, rows)
    assert (attraction[1] + augmentation).item() == pytest.approx(22.569141115, abs=1e-9)
    assert slope.norm().item() == pytest.approx(7.289942720, abs=1e-9)


def test_golden_values_of_the_written_example_entropies():
    logits = Small.logits(Small.embeddings)
    assert unification_entropy(logits, Small.index).item() == pytest.approx(1.075262244, abs=1e-9)
    assert unification_entropy(logits, Small.index, mask_self=False).item() == pytest.approx(1.094679507, abs=1e-9)
    spread = memory_entropy(Small.memory, temperature=0.1)
    np.testing.assert_allclose(spread, naive.memory_entropies(Small.memory.numpy(), temperature=0.1), rtol=1e-12)
    # The written value of the third, 0.448316711, is 2.4e-9 away from the formula; the other three agree.
    assert spread[:4].tolist() == pytest.approx([0.394628653, 0.436101053, 0.448316709, 0.366561105], abs=1e-9)
    order = [3, 0, 6, 1, 2, 4, 5, 15, 23, 9, 10, 7, 14, 12, 19, 18, 11, 17, 20, 24]
    nearest = [2, 7, 0, 8, 9, 11, 12, 8, 16, 2, 17, 14, 7, 5, 26, 25, 4, 10, 13, 31]
    assert spread.argsort()[:20].tolist() == order
    for n_anchors in (10, 20):
        expected = none(40)
        expected[torch.tensor(order[:n_anchors])] = torch.tensor(nearest[:n_anchors])
        assert torch.equal(discover(Small.memory, n_anchors, temperature=0.1), expected)


def test_without_the_stop_the_gradient_is_twice_as_large():
    rows = Small.embeddings.clone().requires_grad_()
    loss = augmentation_loss(rows, temperature=0.1)
    assert loss.item() == pytest.approx(15.858756605, abs=1e-9)
    slope, = torch.autograd.grad(loss, rows)
    assert slope.norm().item() == pytest.approx(5.755975977, abs=1e-9)
    both = naive.gradient(lambda z: naive.augmentation_loss(z, z, temperature=0.1), Small.embeddings.numpy())
    assert np.linalg.norm(both) == pytest.approx(12.016825577, abs=1e-6)


@pytest.mark.parametrize("form", ["plain", "streamed"])
def test_golden_arrays(form):
    rows, memory, index = golden("superand_embeddings").requires_grad_(), golden("superand_memory"), golden(
        "superand_index")

    def losses(neighbor: Tensor, mask_self: bool = True) -> tuple[Tensor, Tensor]:
        if form == "streamed":
            return memory_losses(rows, memory, index, neighbor, temperature=0.1,
                                 entropy="masked" if mask_self else "all")
        logits = rows @ memory.T / 0.1
        return and_loss(logits, index, neighbor), unification_entropy(logits, index, mask_self=mask_self)

    cases = [(augmentation_loss(rows, temperature=0.1), "tsuc_consistency"),
             (losses(none(60))[1], "superand_ue_masked")]
    for name, neighbor in (("round0", none(60)), ("round2", golden("superand_neighbor_round2"))):
        augmentation = augmentation_loss(rows, temperature=0.1, gram=memory.T @ memory)
        cases.append((losses(neighbor)[0] + augmentation, f"superand_and_plus_aug_{name}"))
    for value, name in cases:
        slope, = torch.autograd.grad(value, rows)
        assert value.item() == pytest.approx(float(GOLDEN[name]), **EXACT)
        np.testing.assert_allclose(slope, GOLDEN[f"{name}_grad"], rtol=1e-9, atol=1e-12)
    unmasked = losses(none(60), mask_self=False)[1]
    assert unmasked.item() == pytest.approx(float(GOLDEN["superand_ue_unmasked"]), **EXACT)


def test_golden_discovery():
    memory = golden("superand_memory")
    np.testing.assert_allclose(memory_entropy(memory, temperature=0.1), GOLDEN["superand_entropy"], rtol=1e-9)
    for round_ in (1, 2, 3, 4):
        assert torch.equal(discover(memory, 15 * round_, temperature=0.1), golden(f"superand_neighbor_round{round_}"))


def test_known_values():
    flat, index = torch.zeros(6, 8, dtype=torch.float64), torch.tensor([1, 4, 7])
    assert and_loss(flat, index, none(8)).item() == pytest.approx(math.log(8))
    assert and_loss(flat, index, (torch.arange(8) + 1) % 8).item() == pytest.approx(math.log(4)), "two of eight will do"
    assert unification_entropy(flat, index, mask_self=False).item() == pytest.approx(math.log(8))
    assert unification_entropy(flat, index).item() == pytest.approx(math.log(7), abs=1e-4), "seven others"
    same = unit_rows(1, 5, 0).expand(256, 5)
    uniform = math.log(255) - 254 * math.log(1 - 1 / 255)  # the published batch of 128: 6.54
    assert augmentation_loss(same, temperature=0.1).item() == pytest.approx(uniform) == pytest.approx(6.54, abs=0.005)
    assert augmentation_loss(same, temperature=0.1, gram=torch.eye(5).double()).item() == pytest.approx(uniform)
    apart = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    assert augmentation_loss(apart, temperature=0.01).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_a_certain_mistake_has_a_finite_loss_and_gradient(dtype, temperature):
    """Both first views are one vector, both second views its opposite: p of a wrong pair is 1 - 2 exp(-2/t)."""
    rows = torch.tensor([[1.0, 0.0]] * 2 + [[-1.0, 0.0]] * 2, dtype=dtype).requires_grad_()
    expected = 4 / temperature - math.log(2)  # -log of the partner's share, 2/t; -log of all but the wrong, 2/t - log 2
    for gram in (None, torch.eye(2, dtype=dtype)):
        loss = augmentation_loss(rows, temperature=temperature, gram=gram)
        slope, = torch.autograd.grad(loss, rows)
        assert loss.item() == pytest.approx(expected, rel=1e-5) and slope.isfinite().all()
    assert augmentation_loss(torch.ones(2, 1), temperature=0.1).item() == 0, "one image: nothing to take it for"


def test_losses_do_not_change_with_the_order_or_a_rotation():
    memory, rows, index, neighbor = unit_rows(12, 5, 0), unit_rows(8, 5, 1), torch.tensor([2, 0, 9, 5]), some(12)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    order = torch.tensor([3, 1, 0, 2])

    def all_of(memory: Tensor, rows: Tensor, index: Tensor) -> list[float]:
        logits = rows @ memory.T / 0.1
        return [and_loss(logits, index, neighbor).item(), unification_entropy(logits, index).item(),
                augmentation_loss(rows, temperature=0.1, gram=memory.T @ memory).item()]

    expected = pytest.approx(all_of(memory, rows, index), rel=1e-9)
    assert all_of(memory @ turn, rows @ turn, index) == expected
    assert all_of(memory, rows[torch.cat([order, order + 4])], index[order]) == expected
    assert all_of(memory, rows.roll(4, 0), index) == expected, "first and second views"
    longer = augmentation_loss(rows, temperature=0.1, gram=9 * memory.T @ memory)
    assert longer.item() == pytest.approx(all_of(memory, rows, index)[2]), "a relationship has a direction alone"


# ── the streamed losses ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
@pytest.mark.parametrize("entropy", ["none", "masked", "all"])
def test_streamed_losses_are_the_plain_ones(temperature, entropy):
    memory, rows, index = unit_rows(1500, 6, 0), unit_rows(10, 6, 1), torch.tensor([0, 700, 1023, 1024, 1499])
    memory[7] *= 1.15  # a row that was never written is not of length 1
    for neighbor in (none(1500), some(1500)):
        results = []
        for form in ("plain", "streamed"):
            at = rows.clone().requires_grad_()
            if form == "streamed":
                found = memory_losses(at, memory, index, neighbor, temperature=temperature, entropy=entropy)
            else:
                logits = at @ memory.T / temperature
                spread = unification_entropy(logits, index, mask_self=entropy == "masked")
                found = and_loss(logits, index, neighbor), None if entropy == "none" else spread
            total = found[0] if found[1] is None else found[0] + 0.3 * found[1]
            results.append((found, torch.autograd.grad(total, at)[0]))
        (plain, slope), (streamed, streamed_slope) = results
        assert streamed.attraction.item() == pytest.approx(plain[0].item(), rel=1e-9)
        assert (streamed.unification is None) == (entropy == "none")
        if plain[1] is not None:
            assert streamed.unification.item() == pytest.approx(plain[1].item(), rel=1e-9)
        np.testing.assert_allclose(streamed_slope, slope, rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remember the size of the largest tensor made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        parts = made if isinstance(made, tuple | list) else [made]
        self.size = max([self.size, *(part.numel() for part in parts if isinstance(part, Tensor))])
        return made


def test_no_table_of_all_logits_is_made():
    memory, rows, index = unit_rows(8000, 4, 0), unit_rows(64, 4, 1).requires_grad_(), torch.arange(32)
    sizes = {}
    for form in ("plain", "streamed"):
        with Largest() as largest:
            if form == "plain":
                logits = rows @ memory.T / 0.1
                loss = and_loss(logits, index, some(8000)) + unification_entropy(logits, index)
            else:
                loss = sum(memory_losses(rows, memory, index, some(8000), temperature=0.1, entropy="masked"))
            loss.backward()
        sizes[form] = largest.size
    assert sizes["plain"] == 64 * 8000 and sizes["streamed"] <= 64 * 1024


# ── rounds ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_anchors", [0, 1, 9, 25])
def test_discovery_is_that_of_the_loops_whatever_the_block(n_anchors, monkeypatch):
    memory = unit_rows(25, 5, 3)
    expected = naive.discover(memory.numpy(), n_anchors, temperature=0.2)
    for block in (1, 7, 1024):
        monkeypatch.setattr(superand, "_BLOCK", block)
        found = discover(memory, n_anchors, temperature=0.2)
        assert found.tolist() == expected and found.dtype == torch.int64
    assert int((found >= 0).sum()) == n_anchors
    np.testing.assert_allclose(memory_entropy(memory, temperature=0.2),
                               naive.memory_entropies(memory.numpy(), temperature=0.2), rtol=1e-9)


def test_discovery_prefers_the_lower_index_among_equals():
    same = torch.eye(1, 4).expand(6, 4).contiguous()
    assert discover(same, 3, temperature=0.1).tolist() == [1, 0, 0, -1, -1, -1]
    pairs = torch.eye(3).repeat(2, 1)  # rows 0 and 3, 1 and 4, 2 and 5 are one
    assert discover(pairs, 6, temperature=0.1).tolist() == [3, 4, 5, 0, 1, 2]


def test_neighbors_are_those_of_the_largest_cosine_and_anchors_need_not_be_neighbors():
    memory = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 3.0], [-1.0, 0.2]])
    assert discover(memory, 4, temperature=0.1)[0].item() == 1, "not the longer row"
    assert discover(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 2, temperature=0.1).tolist() == [1, 0], "two images"


@pytest.mark.parametrize(("n_images", "n_anchors", "said"), [
    (5, 6, "n_anchors must be 0 to the 5 images, got 6"), (5, -1, "got -1"), (1, 1, "at least 2 images, got 1")])
def test_discovery_refuses_what_cannot_be(n_images, n_anchors, said):
    with pytest.raises(InputError, match=said):
        discover(unit_rows(n_images, 3, 0), n_anchors, temperature=0.1)


def test_published_schedules():
    published = SuperAND()
    rates = [learning_rate(epoch, lr=published.lr, drop_epoch=published.lr_drop_epoch,
                           drop_every=published.lr_drop_every, decay=published.lr_decay)
             for epoch in (0, 79, 80, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.03] * 4 + [0.003] * 2 + [0.0003] * 2)
    shares = [unification_weight(epoch, step=published.unification_step, every=published.unification_every)
              for epoch in (0, 79, 80, 159, 160, 199)]
    assert shares == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    assert [published.n_anchors(round_, 50_000) for round_ in range(6)] == [0, 12_500, 25_000, 37_500, 50_000, 50_000]
    assert [published.n_anchors(round_, 7) for round_ in range(5)] == [0, 1, 3, 5, 7]
    assert SuperAND(anchors_per_round=0.29).n_anchors(1, 100) == 29, "0.29 * 100 is a little below 29 in binary"


def test_rounds_restart_rate_and_weight_and_keep_all_else(digits, monkeypatch):
    memories, rates, momenta = [], [], []
    find, step = superand._neighbor_of_anchors, torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        rates.append(self.param_groups[0]["lr"])
        momenta.append(bool(self.state))
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(superand, "_neighbor_of_anchors", lambda rows, *rest: memories.append(
        (len(rates), rows.clone())) or find(rows, *rest))
    fitted = tiny(n_rounds=3, n_epochs=3, lr=0.1, lr_drop_epoch=1, lr_drop_every=1, unification_every=2).fit(digits)
    assert [at for at, _ in memories] == [9, 18], "once, before the first step of every round but the first"
    assert rates == pytest.approx(3 * [rate for rate in (0.1, 0.01, 0.001) for _ in range(3)])
    assert momenta == [False] + 26 * [True], "momentum is carried over"
    told = [{name: record[name] for name in ("round", "weight", "n_anchors", "lr")} for record in fitted.history_]
    assert told == [{"round": r, "weight": w, "n_anchors": 12 * r, "lr": pytest.approx(lr)}
                    for r in range(3) for w, lr in ((0, 0.1), (0, 0.01), (0.2, 0.001))]
    assert ["memory_entropy" in record for record in fitted.history_] == 3 * [False] + 2 * [True, False, False]
    assert ["unification" in record for record in fitted.history_] == 3 * [False, False, True]
    expected = discover(memories[-1][1], 24, temperature=0.1)
    assert fitted.neighbor_.tolist() == expected.tolist() and (fitted.neighbor_ >= 0).sum() == 24


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
    fitted = tiny(n_rounds=1, n_epochs=1).fit(digits, device=choose_device("cpu", precision))
    trained = [*fitted.encoder_.parameters(), *fitted.projection_.parameters()]
    assert {id(p) for p in trained} == gradients.keys() and all(gradients.values())
    assert fitted.memory_.values.dtype == np.float32


@pytest.mark.parametrize("memory_view", ["second", "average"])
def test_first_step_is_the_equations_and_nesterov_and_then_the_memory(digits, memory_view):
    method = tiny(n_rounds=1, n_epochs=1, batch_size=24, lr=0.1, weight_decay=0.1, memory_view=memory_view)
    images = digits.select(np.arange(24))
    encoder, projection, memory = method._build(24)
    net = torch.nn.Sequential(encoder, projection).train()
    before, old = {name: value.clone() for name, value in net.named_parameters()}, memory.rows.clone()
    index = Order(24, 24, 0).epoch(0)
    batch, source = torch.from_numpy(images.array)[index], generator(0, "pretrain", 0)
    rows = net(choose_device("cpu").arrange(torch.cat([VIEWS(batch, source), VIEWS(batch, source)])))
    attraction = and_loss(rows @ old.T / 0.1, index, none(24))
    augmentation = augmentation_loss(rows, temperature=0.1, gram=old.T @ old)
    (attraction + augmentation).backward()
    fitted = method.fit(images)
    record = fitted.history_[0]
    assert record["attraction"] == pytest.approx(attraction.item(), rel=1e-5)
    assert record["augmentation"] == pytest.approx(augmentation.item(), rel=1e-4)
    assert record["loss"] == pytest.approx((attraction + augmentation).item(), rel=1e-4)
    after = dict(torch.nn.Sequential(fitted.encoder_, fitted.projection_).named_parameters())
    for name, parameter in net.named_parameters():
        expected = before[name] - 0.1 * 1.9 * (parameter.grad + 0.1 * before[name])
        torch.testing.assert_close(after[name].detach(), expected, rtol=1e-3, atol=1e-5)
    first, second = rows.detach().chunk(2)
    written = second if memory_view == "second" else (first + second) / 2
    expected = normalize(0.5 * old[index] + 0.5 * written, dim=1)
    torch.testing.assert_close(torch.from_numpy(fitted.memory_.values)[index], expected, rtol=1e-4, atol=1e-5)
    assert list(fitted.memory_.ids) == list(images.ids)


def test_gram_is_that_of_the_rows_and_computed_anew_once_an_epoch(digits, monkeypatch):
    calls, grams = [], []
    refresh = Memory.refresh
    monkeypatch.setattr(Memory, "refresh", lambda memory: calls.append(len(grams)) or refresh(memory))
    monkeypatch.setattr(superand, "augmentation_loss", lambda rows, *, temperature, gram: grams.append(gram.clone())
                        or augmentation_loss(rows, temperature=temperature, gram=gram))
    seen = []
    monkeypatch.setattr(superand, "rows_of_losses", lambda rows, bank, *a, **k: seen.append(bank.clone())
                        or rows_of_losses(rows, bank, *a, **k))
    tiny().fit(digits)
    assert calls == [0, 3, 6, 9, 12], "when it is drawn, then after each epoch of three steps"
    for rows, gram in zip(seen, grams, strict=True):
        torch.testing.assert_close(gram, rows.T @ rows)


def test_all_parts_make_the_loss_with_their_weights(digits):
    fitted = tiny(n_epochs=3, augmentation_weight=0.5, unification_step=0.2, mask_self=False).fit(digits)
    for record in fitted.history_:
        total = record["attraction"] + 0.5 * record["augmentation"] + record["weight"] * record.get("unification", 0)
        assert record["loss"] == pytest.approx(total, rel=1e-6)
    assert [record["weight"] for record in fitted.history_] == pytest.approx(2 * [0, 0.2, 0.4])


def test_entropy_is_asked_for_as_the_options_say(digits, monkeypatch):
    asked = []
    monkeypatch.setattr(superand, "rows_of_losses", lambda *a, entropy, **k: asked.append(entropy) or rows_of_losses(
        *a, entropy=entropy, **k))
    for mask_self, name in ((True, "masked"), (False, "all")):
        asked.clear()
        tiny(n_rounds=1, batch_size=48, mask_self=mask_self).fit(digits)
        assert asked == ["none", name]


@pytest.mark.parametrize("n_rounds", [1, 2])
def test_ancestors_compute_nothing_that_they_do_not_need(digits, monkeypatch, n_rounds):
    """One round is instance discrimination, several are AND."""
    asked = []
    monkeypatch.setattr(superand, "rows_of_losses", lambda *a, entropy, **k: asked.append(entropy) or rows_of_losses(
        *a, entropy=entropy, **k))
    monkeypatch.setattr(superand, "augmentation_loss", lambda *_, **__: pytest.fail("not a part of these methods"))
    fitted = tiny(n_rounds=n_rounds, augmentation_weight=0, unification_step=0).fit(digits)
    assert set(asked) == {"none"}
    assert (fitted.neighbor_ >= 0).sum() == (n_rounds - 1) * 12
    assert all(record["loss"] == record["attraction"] and "unification" not in record for record in fitted.history_)


def test_first_loss_is_that_of_chance(noise):
    """Both losses start near a uniform guess, among 32 images and among 31 other views."""
    record = tiny(views=Views("simclr", 16), n_rounds=1, n_epochs=1, batch_size=32, n_projection=128).fit(
        noise).history_[0]
    assert record["attraction"] == pytest.approx(math.log(32) + 0.5 / (128 * 0.1**2), abs=0.3)
    uniform = math.log(63) - 62 * math.log(1 - 1 / 63)
    assert uniform - 1.5 < record["augmentation"] < uniform + 1.5


def test_ten_steps_give_the_recorded_losses(noise, monkeypatch, recorded):
    seen: list[float] = []
    watch = superand.Loop.watch
    monkeypatch.setattr(superand.Loop, "watch", lambda run, loss, step: seen.append(loss.item()) or watch(
        run, loss, step))
    tiny(views=Views("simclr", 16), n_epochs=3, n_rounds=2, lr=0.001).fit(noise)
    recorded("superand", seen[:10])  # the last of these are in the second round


def test_same_seed_same_weights_and_another_seed_others(digits):
    once = tiny(n_epochs=1).fit(digits)
    torch.manual_seed(5)
    assert equal(once, tiny(n_epochs=1).fit(digits)), "global randomness changes nothing"
    assert not equal(once, tiny(n_epochs=1, random_state=1).fit(digits))


@pytest.mark.parametrize("call", [2, 6, 7, 8, 11, 12])
def test_killed_and_started_again_it_ends_bit_equal(digits, killed, tmp_path, monkeypatch, call):
    whole = tiny().fit(digits)  # 2 rounds of 2 epochs of 3 steps
    with killed(superand, "rows_of_losses", call):
        tiny().fit(digits, folder=tmp_path)
    steps, found = [], []
    find = superand._neighbor_of_anchors
    monkeypatch.setattr(superand, "rows_of_losses", lambda *a, **k: steps.append(0) or rows_of_losses(*a, **k))
    monkeypatch.setattr(superand, "_neighbor_of_anchors", lambda *a: found.append(0) or find(*a))
    again = tiny().fit(digits, folder=tmp_path)
    assert len(steps) == 12 - (call - 1) and len(found) == (call <= 7), "it goes on where it was"
    assert equal(again, whole) and again.history_ == whole.history_
    assert equal(tiny().fit(digits, folder=tmp_path), whole), "a finished fit is not done again"
    assert len(steps) == 12 - (call - 1)


def test_killed_at_discovery_it_ends_bit_equal(digits, killed, tmp_path):
    whole = tiny().fit(digits)
    with killed(superand, "_neighbor_of_anchors", 1):
        tiny().fit(digits, folder=tmp_path)
    again = tiny().fit(digits, folder=tmp_path)
    assert equal(again, whole) and again.history_ == whole.history_


def test_checkpoint_of_other_options_or_images_is_refused(digits, tmp_path):
    tiny(n_epochs=1, n_rounds=1).fit(digits, folder=tmp_path)
    others = ImageSet(255 - digits.array, digits.ids)
    for method, images in ((tiny(n_epochs=1, n_rounds=1, lr=0.2), digits), (tiny(n_epochs=1, n_rounds=1), others)):
        with pytest.raises(InputError, match="other options or images"):
            method.fit(images, folder=tmp_path)


def test_images_of_a_kind_become_neighbors(colors):
    images, true = colors
    fitted = tiny(encoder=EncoderSpec(width=4), views=Views("simclr", 8, jitter=0.0, grey=0.0), n_rounds=3, n_epochs=4,
                  batch_size=30, lr_drop_epoch=3).fit(images)
    losses = [record["attraction"] for record in fitted.history_]
    assert losses[3] < losses[0] - 0.1 and losses[-1] < losses[0] - 0.5
    anchors = np.flatnonzero(fitted.neighbor_ >= 0)
    assert len(anchors) == 30
    assert np.mean(true[fitted.neighbor_[anchors]] == true[anchors]) > 0.9
    rows = fitted.memory_.values
    assert np.mean(true[(rows @ rows.T - 2 * np.eye(60)).argmax(axis=1)] == true) > 0.9


@pytest.mark.parametrize(("n_images", "options"), [
    (2, {}), (3, {"batch_size": 2}), (5, {"n_rounds": 6, "n_epochs": 1}), (4, {"anchors_per_round": 1.0})])
def test_few_images_suffice(digits, n_images, options):
    fitted = tiny(**options).fit(digits.select(np.arange(n_images)))
    assert fitted.memory_.values.shape == (n_images, 16) and np.isfinite(fitted.memory_.values).all()
    assert (fitted.neighbor_ != np.arange(n_images)).all() and fitted.neighbor_.dtype == np.int64


# ── the contract ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
def test_scikit_learn_contract(digits):
    method = tiny(temperature=0.2)
    assert method.get_params() == clone(method).get_params() == SuperAND(**method.get_params()).get_params()
    assert method.set_params(lr=0.3) is method and method.lr == 0.3
    odd = object()
    assert SuperAND(temperature=odd).temperature is odd, "the constructor stores and does not judge"
    with pytest.raises(NotFittedError):
        method.transform(digits)
    assert tiny(n_rounds=1, n_epochs=1).fit_transform(digits).shape == (48, 64)


def test_transform_gives_one_finite_row_an_image_in_order(digits):
    fitted = tiny(n_rounds=1, n_epochs=1).fit(digits)
    rows = fitted.transform(digits)
    assert rows.shape == (48, 64) and rows.dtype == np.float32 and np.isfinite(rows).all()
    np.testing.assert_allclose(fitted.transform(digits.select(np.array([7, 3]))), rows[[7, 3]], rtol=1e-4, atol=1e-5)
    assert not fitted.encoder_.training and not fitted.projection_.training


def test_defaults_are_the_published_configuration():
    published = SuperAND().get_params()
    expected = {"n_projection": 128, "temperature": 0.1, "batch_temperature": 0.1, "n_rounds": 5, "n_epochs": 200,
                "batch_size": 128, "lr": 0.03, "lr_drop_epoch": 120, "lr_drop_every": 40, "lr_decay": 0.1,
                "momentum": 0.9, "weight_decay": 5e-4, "memory_momentum": 0.5, "memory_view": "second",
                "anchors_per_round": 0.25, "augmentation_weight": 1.0, "unification_step": 0.2,
                "unification_every": 80, "mask_self": True}
    assert {name: published[name] for name in expected} == expected
    assert published["encoder"] == EncoderSpec("resnet18", "cifar", 64, "rgb_sobel")
    assert published["views"] == Views("simclr", 32, jitter=1.0, hue=0.4)


def test_published_network_has_the_published_size():
    encoder, projection, memory = SuperAND(bn_scale="uniform")._build(10)
    net = torch.nn.Sequential(encoder, projection)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 22_468_288
    statistics = [value for name, value in net.named_buffers() if "running" in name or "tracked" in name]
    assert sum(value.numel() for value in statistics) == 19_240
    norms = [layer.weight for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert all(scale.min() >= 0 and scale.max() <= 1 and scale.std() > 0.2 for scale in norms)
    lengths = memory.rows.norm(dim=1)
    assert memory.rows.shape == (10, 128) and not torch.allclose(lengths, torch.ones(10)), "random, of length about 1"


@pytest.mark.parametrize(("options", "said"), [
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"), ({"temperature": math.nan}, "above 0, got nan"),
    ({"batch_temperature": -1.0}, "batch_temperature must be above 0, got -1.0"),
    ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"), ({"n_rounds": 0}, "n_rounds must be at least 1, got 0"),
    ({"batch_size": 1}, "batch_size=1 leaves no other image"), ({"n_projection": 0}, "n_projection must be at least 1"),
    ({"lr_drop_every": 0}, "lr_drop_every must be at least 1"), ({"lr_drop_epoch": -1}, "lr_drop_epoch must be at lea"),
    ({"unification_every": 0}, "unification_every must be at least 1"), ({"lr_decay": 0.0}, "lr_decay must be above 0"),
    ({"augmentation_weight": -1.0}, "augmentation_weight must be at least 0, got -1.0"),
    ({"unification_step": -0.2}, "unification_step must be at least 0, got -0.2"),
    ({"anchors_per_round": 1.5}, "anchors_per_round must be 0 to 1, got 1.5"),
    ({"memory_momentum": 2.0}, "memory_momentum must be 0 to 1, got 2.0"), ({"batch_size": 0}, "batch_size=0 leaves"),
    ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"), ({"lr": 0.0}, "lr must be above 0 and finite, got 0.0"),
    ({"momentum": 2.0}, "momentum must be at least 0 and below 1, got 2.0"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
])
def test_options_that_cannot_be_used_are_refused(digits, options, said):
    with pytest.raises(InputError, match=said):
        tiny(**options).fit(digits)
    assert re.search(said, str(next(tiny(**options).option_faults()))), "and can be told without the images"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "said"), [
    ({"memory_view": "secnd"}, "memory_view='secnd' is not allowed. hint: did you mean second?"),
    ({"bn_scale": "one"}, "bn_scale='one' is not allowed. hint: did you mean ones?"),
    ({"convolutions": "kaiming"}, "convolutions='kaiming' is not allowed"),
])
def test_words_that_are_not_known_are_refused(digits, options, said):
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        tiny(**options).fit(digits)


def test_one_image_is_refused(digits):
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        tiny().fit(digits.select(np.array([0])))


def test_plain_momentum_free_sgd_is_possible(digits):
    assert len(tiny(n_rounds=1, n_epochs=1, momentum=0.0).fit(digits).history_) == 1


def test_a_loss_that_is_not_finite_ends_the_fit_and_says_where(digits, monkeypatch, tmp_path):
    calls = []

    def broken(*args: object, **options: object) -> superand.MemoryLosses:
        calls.append(0)
        found = rows_of_losses(*args, **options)
        return found._replace(attraction=found.attraction * (math.nan if len(calls) == 5 else 1.0))

    monkeypatch.setattr(superand, "rows_of_losses", broken)
    with pytest.raises(NonFiniteLossError, match="pretrain: the loss is not finite at step 4"):
        tiny().fit(digits, folder=tmp_path)


# ── real data ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("bn_scale", ["ones", "uniform"])
def test_the_first_batch_of_all_of_cifar10_has_the_published_loss(monkeypatch, bn_scale):
    """The authors' log starts at 17.71: ln 50,000 + 0.39 of attraction, and 6.54 of an even guess among 255 views."""
    from phyla.images.sources import open_images

    root = os.environ.get("PHYLA_DATA")
    if not root or not Path(root, "cifar10").exists():
        pytest.skip("needs real data: PHYLA_DATA/cifar10 is not here")
    images = open_images("cifar10", data_dir=Path(root)).images
    assert len(images) == 50_000
    seen: list[float] = []

    class SeenEnoughError(Exception):
        pass

    def watched(run: object, loss: Tensor, step: int) -> None:
        seen.append(loss.item())
        raise SeenEnoughError

    monkeypatch.setattr(superand.Loop, "watch", watched)
    views = Views("simclr", 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), jitter=1.0, hue=0.4)
    with pytest.raises(SeenEnoughError):
        SuperAND(views=views, bn_scale=bn_scale).fit(images)
    assert 17 < seen[0] < 18.5
