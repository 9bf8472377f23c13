"""TEMI: its loss against loops and other losses; its heads; what the fit trains, keeps, resumes and refuses."""

import math
import re

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

import naive
from phyla.cluster import temi
from phyla.cluster.scan import scan_loss
from phyla.cluster.temi import TEMI, TemiHeads, TemiLoss, agreement, moved_marginal, temi_loss
from phyla.errors import CollapseWarning, InputError, NonFiniteLossError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterNet
from phyla.types import Embeddings, Neighbors

pytestmark = pytest.mark.usefixtures("warm")


def tiny(**options: object) -> TEMI:
    return TEMI(**({"n_clusters": 3, "n_heads": 2, "hidden": (64, 32), "n_epochs": 3, "batch_size": 20, "lr": 0.03,
                    "warmup_epochs": 1, "teacher_momentum": 0.8, "n_neighbors": 5} | options))


ENOUGH = {"n_heads": 4, "n_epochs": 100, "batch_size": 60, "lr": 0.005, "warmup_epochs": 5, "teacher_momentum": 0.9}
"""A hundred steps: until then two of three blobs may share a cluster."""


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shares(*shape: int, seed: int = 9) -> Tensor:
    return logits(*shape, seed=seed, scale=1.0).softmax(-1)


def blobs(sizes: tuple[int, ...] = (20, 20, 20), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian embeddings in 8 dimensions, one blob a class, and their classes."""
    draw = np.random.default_rng(seed)
    true = np.repeat(np.arange(len(sizes)), sizes)
    return (draw.normal(0, 0.3, (len(true), 8)) + 2 * np.eye(8)[true]).astype(np.float32), true


# ── the equations ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("heads", "batch", "clusters"), [(1, 1, 2), (3, 4, 3), (2, 5, 7), (2, 3, 1)])
@pytest.mark.parametrize(("beta", "weighted", "divided"), [(0.6, True, True), (1.0, False, True), (1.0, False, False)])
def test_loss_is_the_formula_whichever_comes_first(heads, batch, clusters, beta, weighted, divided):
    student, teacher = logits(2, heads, batch, clusters, seed=1), logits(2, heads, batch, clusters, seed=2)
    marginal = shares(heads, clusters) if divided else None
    expected = naive.temi_loss(student.numpy(), teacher.numpy(), marginal, beta=beta, weighted=weighted)
    for s, t in ((student, teacher), (student.flip(0), teacher.flip(0))):
        loss = temi_loss(s, t, beta=beta, marginal=marginal, weights=agreement(t) if weighted else None)
        assert loss.total.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_that_of_the_formula_and_flows_through_the_student_alone():
    student, teacher, marginal = logits(2, 2, 3, 4, seed=1), logits(2, 2, 3, 4, seed=2), shares(2, 4)
    at, still = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    temi_loss(at, still, beta=0.6, marginal=marginal, weights=agreement(still)).total.sum().backward()
    slopes = naive.gradient(lambda z: math.fsum(naive.temi_loss(z, teacher.numpy(), marginal, beta=0.6, weighted=True)),
                            student.numpy())
    np.testing.assert_allclose(at.grad, slopes, atol=1e-7)
    assert still.grad is None
    assert torch.autograd.gradcheck(lambda z: temi_loss(z, teacher, beta=0.7, marginal=marginal,
                                                        entropy_weight=2.0).total, at)


def test_without_marginal_weights_and_teacher_it_is_scan():
    both = logits(2, 6, 4, seed=1)
    found = temi_loss(both, both, beta=1.0, entropy_weight=5.0)
    expected = [scan_loss(a, b, entropy_weight=5.0) for a, b in ((both[0], both[1]), (both[1], both[0]))]
    assert float(found.total) == pytest.approx(float(sum(each.total for each in expected)) / 2, rel=1e-12)
    assert float(found.entropy) == pytest.approx(float(sum(each.entropy for each in expected)) / 2, rel=1e-12)


def test_perfect_even_agreement_is_worth_log_k_and_indifference_nothing():
    sure = 60 * torch.eye(4, dtype=torch.float64).repeat(3, 1)[None, None].expand(2, 1, 12, 4)
    even = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert float(temi_loss(sure, sure, beta=1.0, marginal=even).total) == pytest.approx(-math.log(4))
    assert float(temi_loss(sure, sure, beta=0.6, marginal=even, weights=agreement(sure)).total) == pytest.approx(
        -math.log(4))
    flat = torch.zeros(2, 1, 12, 4, dtype=torch.float64)
    assert float(temi_loss(flat, flat, beta=1.0, marginal=even).total) == pytest.approx(0, abs=1e-12)
    assert agreement(flat).tolist() == pytest.approx([0.25] * 12)


def test_weights_are_the_mean_over_heads_and_small_for_pairs_that_teachers_part():
    sure = 60 * torch.eye(3, dtype=torch.float64)
    teacher = torch.stack([torch.stack([sure, sure]), torch.stack([sure, sure[[0, 2, 1]]])])  # two heads, three pairs
    assert agreement(teacher).tolist() == pytest.approx([1, 0.5, 0.5])


def test_loss_does_not_change_with_the_order_of_images_clusters_or_heads_or_a_shift():
    student, teacher, marginal = logits(2, 3, 6, 5, seed=1), logits(2, 3, 6, 5, seed=2), shares(3, 5)

    def total(s: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return temi_loss(s, t, beta=0.6, marginal=m, weights=agreement(t)).total

    whole, draw = total(student, teacher, marginal), torch.Generator().manual_seed(0)
    rows, columns, heads = (torch.randperm(n, generator=draw) for n in (6, 5, 3))
    torch.testing.assert_close(total(student[:, :, rows], teacher[:, :, rows], marginal), whole)
    torch.testing.assert_close(total(student[..., columns], teacher[..., columns], marginal[:, columns]), whole)
    torch.testing.assert_close(total(student[:, heads], teacher[:, heads], marginal[heads]), whole[heads])
    torch.testing.assert_close(total(student + logits(2, 3, 6, 1), teacher - 7, marginal), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_and_an_unused_cluster_give_finite_losses_and_gradients(dtype):
    student = (1e4 * logits(2, 2, 6, 5, seed=1)).to(dtype).requires_grad_()
    teacher = (1e4 * logits(2, 2, 6, 5, seed=2)).to(dtype)
    loss = temi_loss(student, teacher, beta=0.6, marginal=torch.zeros(2, 5, dtype=dtype), weights=agreement(teacher))
    loss.total.sum().backward()
    assert all(part.isfinite().all() for part in loss) and student.grad.isfinite().all()


def test_marginal_moves_towards_the_teachers_mean():
    teacher, before = logits(2, 3, 4, 5, seed=1), shares(3, 5)
    expected = 0.9 * before + 0.1 * torch.cat(list(teacher.softmax(-1)), dim=1).mean(1)
    torch.testing.assert_close(moved_marginal(before, teacher, momentum=0.9), expected)


# ── the heads ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_heads_are_as_many_networks_of_their_own():
    heads = TemiHeads(6, 4, 3, hidden=(5, 7), temperature=0.2).double()
    heads.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.1 * logits(*parameter.shape, seed=parameter.numel())
    rows = logits(9, 6)
    for head in range(3):
        deep = nn.functional.gelu(rows @ heads.first[head].T + heads.first_bias[head])
        deep = deep @ heads.second[head].T + heads.second_bias[head]
        unit = deep / deep.norm(dim=1, keepdim=True)
        prototypes = heads.length[head, :, None] * heads.direction[head] / heads.direction[head].norm(dim=1)[:, None]
        torch.testing.assert_close(heads(rows)[head], unit @ prototypes.T / 0.2)


def test_fresh_heads_are_small_and_their_prototypes_of_length_one():
    heads = TemiHeads(400, 10, 2)
    heads.initialise(torch.Generator().manual_seed(0))
    for weight in (heads.first, heads.second):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.01)
    assert not heads.first_bias.any() and not heads.second_bias.any()
    assert (0.1 * heads.prototypes()).norm(dim=2).detach().numpy() == pytest.approx(np.ones((2, 10)), rel=1e-5)


# ── what a fit does ───────────────────────────────────────────────────────────────────────────────────────────────


def test_ten_steps_give_the_recorded_losses(monkeypatch, recorded):
    seen: list[TemiLoss] = []
    monkeypatch.setattr(temi, "temi_loss", lambda *a, **k: seen.append(temi_loss(*a, **k)) or seen[-1])
    tiny(n_epochs=5, batch_size=30).fit(blobs()[0])
    recorded("temi", [loss.total.mean().item() for loss in seen])


def test_every_weight_moves_and_the_prototypes_after_the_first_epoch_only(monkeypatch):
    made: list[nn.Module] = []
    loop = temi.Loop
    monkeypatch.setattr(temi, "Loop", lambda *a, **k: made.extend(k["state"].values()) or loop(*a, **k))
    rows, _ = blobs()
    before = TemiHeads(8, 3, 2, hidden=(64, 32))
    before.initialise(temi.generator(0, "temi heads"))
    for n_epochs, moved in ((1, set()), (2, {"direction", "length"})):
        made.clear()
        tiny(n_epochs=n_epochs).fit(rows)
        student, teacher = made[0].state_dict(), made[1].heads.state_dict()
        changed = {name for name, value in before.state_dict().items() if not torch.equal(student[name], value)}
        assert changed == {"first", "first_bias", "second", "second_bias"} | moved
        assert {name for name in changed if torch.equal(teacher[name], student[name])} == set(), "and it lags behind"


def test_teacher_is_the_moving_average_of_the_student(monkeypatch):
    seen, follow = [], temi._Teacher.follow

    def watched(self: temi._Teacher, student: TemiHeads, *, momentum: float) -> None:
        start = self.heads.first.clone()
        follow(self, student, momentum=momentum)
        seen.append((self.heads.first - momentum * start - (1 - momentum) * student.first.detach()).abs().max())

    monkeypatch.setattr(temi._Teacher, "follow", watched)
    tiny().fit(blobs()[0])
    assert len(seen) == 9 and float(max(seen)) < 1e-6


def test_anchors_come_with_one_of_their_neighbors(monkeypatch):
    rows, _ = blobs()
    near = find_neighbors(rows, 3)
    pairs, forward = [], TemiHeads.forward
    monkeypatch.setattr(TemiHeads, "forward", lambda self, x: pairs.append(x) or forward(self, x))
    tiny(n_epochs=20, batch_size=60, unit=False, lr=1e-3).fit(rows, neighbors=near)
    shown = torch.stack(pairs[::2])  # student and teacher are shown the same
    index = (shown[:, :, None] == torch.from_numpy(rows)).all(3).int().argmax(2).numpy()
    anchors, partners = index[:, :60], index[:, 60:]
    assert all(np.array_equal(np.sort(each), np.arange(60)) for each in anchors), "every image once an epoch"
    columns = near.indices[anchors.ravel()] == partners.ravel()[:, None]
    assert columns.sum(axis=1).all()
    assert columns.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.05)


def test_neighbors_found_are_at_most_half_of_an_even_cluster():
    rows, _ = blobs()
    once = tiny(n_neighbors=50).fit(rows)
    again = tiny(n_neighbors=50).fit(rows, neighbors=find_neighbors(rows, 10))
    assert np.array_equal(once.probabilities_, again.probabilities_)


def test_learning_rate_follows_the_batch_and_rises_at_the_start():
    fitted = tiny(n_epochs=4, warmup_epochs=2, batch_size=60, lr=0.01).fit(blobs()[0])
    rates = [record["lr"] for record in fitted.history_]
    assert rates == pytest.approx([0.01 * 60 / 256 * factor for factor in (0.5, 1, 1, 1)])


def test_the_head_with_the_lowest_loss_of_the_last_epoch_is_kept():
    fitted = tiny(n_heads=5).fit(blobs()[0])
    assert fitted.head_losses_.shape == (5,) and fitted.head_ == fitted.head_losses_.argmin()
    assert fitted.score_ == fitted.head_losses_.min() and len(set(fitted.head_losses_.tolist())) == 5
    assert fitted.head_losses_.mean() == pytest.approx(fitted.history_[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"objective": "pmi"}, {"embed_norm": True}, {"n_components": 4},
                                     {"unit": False}], ids=str)
def test_recovers_blobs_in_two_spaces(options):
    rows, true = blobs()
    as_noun = options == {}
    given = Embeddings(rows, [str(i) for i in range(60)], widths=(5, 3)) if as_noun else [rows[:, :5], 9 * rows[:, 5:]]
    fitted = tiny(**ENOUGH | options).fit(given)
    assert hungarian_accuracy(true, fitted.labels_) == 1.0
    assert fitted.labels_.dtype == np.int64 and fitted.probabilities_.dtype == np.float32
    np.testing.assert_allclose(fitted.probabilities_.sum(axis=1), 1, rtol=1e-5)
    assert np.array_equal(fitted.predict(given), fitted.labels_)


@pytest.mark.parametrize("options", [{}, {"embed_norm": True}, {"n_components": 4}, {"unit": False},
                                     {"embed_norm": True, "n_components": 3, "unit": False}], ids=str)
def test_parts_give_the_probabilities_of_the_head(options):
    rows, _ = blobs()
    wide = np.concatenate([3 * rows, 40 + rows[:, :5]], axis=1)
    spaces, made, initialise = [wide[:, :8], wide[:, 8:]], [], TemiHeads.initialise
    patch = pytest.MonkeyPatch()
    with patch.context() as held:
        held.setattr(TemiHeads, "initialise", lambda self, g: made.append(self) or initialise(self, g))
        fitted = tiny(lr=0.003, **options).fit(spaces)
    projection, head = fitted.as_parts()
    entry = fitted._entry(spaces)
    trained, _ = fitted._reduced(entry, spaces, temi.choose_device("cpu"))
    with torch.no_grad():
        expected = made[0](trained)[fitted.head_].softmax(1).numpy()
        found = ClusterNet(nn.Identity(), head, projection).probabilities(torch.from_numpy(wide))[:, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found, fitted.probabilities_, atol=1e-6)
    assert fitted.probabilities_.std() > 0.05, "not all alike"


def test_objectives_are_the_losses_of_their_names(monkeypatch):
    seen = []
    monkeypatch.setattr(temi, "temi_loss", lambda *a, **k: seen.append(k) or temi_loss(*a, **k))
    for objective in ("temi", "pmi", "scan"):
        tiny(objective=objective, n_epochs=1, batch_size=60, lr=1e-3).fit(blobs()[0])
    full, plain, scan = seen
    assert full["weights"].shape == (60,) and full["marginal"].shape == (2, 3) and full["beta"] == 0.6
    assert plain["weights"] is None and plain["marginal"].shape == (2, 3) and plain["beta"] == 0.6
    assert scan == {"beta": 1.0, "entropy_weight": 5.0}


def test_constant_features_and_more_components_than_features_change_nothing_much():
    rows, true = blobs()
    padded = np.concatenate([rows, np.full((60, 2), 7, np.float32)], axis=1)
    fitted = tiny(**ENOUGH, embed_norm=True, n_components=500).fit(padded)
    assert hungarian_accuracy(true, fitted.labels_) == 1.0


def test_steps_in_the_place_of_epochs():
    fitted = tiny(n_epochs=77, n_steps=20, lr=0.01).fit(blobs()[0])
    assert len(fitted.history_) == 7, "of three steps each"
    assert [record["lr"] for record in fitted.history_[:2]] == pytest.approx([0.01 * 20 / 256 * 0.5, 0.01 * 20 / 256])
    assert len(tiny(n_steps=1).fit(blobs()[0]).history_) == 2
    assert TEMI.quick(500).batch_size == 2000 and TEMI.quick(7).n_steps == 800


# ── degenerate ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_cluster_and_duplicated_images_are_no_trouble():
    same = np.ones((10, 4), np.float32)
    assert tiny(n_clusters=1, batch_size=5).fit(same).labels_.tolist() == [0] * 10
    with pytest.warns(CollapseWarning, match="all 10 images into one of 2 clusters"):
        fitted = tiny(n_clusters=2, batch_size=5, embed_norm=True, n_components=2).fit(same)
    assert np.isfinite(fitted.probabilities_).all()
    zeros = np.zeros((10, 4), np.float32)
    with pytest.warns(CollapseWarning):
        assert np.isfinite(tiny(n_clusters=2, batch_size=5).fit(zeros).probabilities_).all()


# ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", [2, 5, 9])
def test_killed_and_started_again_it_ends_bit_equal(killed, tmp_path, monkeypatch, call):
    rows, _ = blobs()
    whole = tiny().fit(rows)
    with killed(temi, "temi_loss", call):
        tiny().fit(rows, folder=tmp_path)
    steps = []
    monkeypatch.setattr(temi, "temi_loss", lambda *a, **k: steps.append(0) or temi_loss(*a, **k))
    for _ in range(2):  # and a finished fit is not done again
        again = tiny().fit(rows, folder=tmp_path)
        assert len(steps) == 9 - (call - 1)
        assert np.array_equal(again.probabilities_, whole.probabilities_) and again.history_ == whole.history_
        assert np.array_equal(again.head_losses_, whole.head_losses_) and again.head_ == whole.head_


def test_checkpoint_of_other_options_images_or_neighbors_is_refused(tmp_path):
    rows, _ = blobs()
    tiny(n_epochs=1).fit(rows, folder=tmp_path)
    near = find_neighbors(rows, 4)
    for changed in ({"lr": 0.02}, {"rows": rows + 1}, {"near": near}):
        with pytest.raises(InputError, match="other options or images"):
            tiny(n_epochs=1, lr=changed.get("lr", 0.03)).fit(changed.get("rows", rows), neighbors=changed.get("near"),
                                                             folder=tmp_path)


def test_same_seed_same_clusters_and_another_seed_or_none_others(tmp_path):
    rows, _ = blobs()
    once, again, other, free = (tiny(random_state=seed).fit(rows) for seed in (0, 0, 1, None))
    assert np.array_equal(once.probabilities_, again.probabilities_)
    assert not np.array_equal(once.probabilities_, other.probabilities_)
    assert not np.array_equal(free.probabilities_, tiny(random_state=None).fit(rows).probabilities_)
    with pytest.raises(InputError, match="random_state=None cannot be gone on with"):
        tiny(random_state=None).fit(rows, folder=tmp_path)


# ── the contract, and misuse ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
def test_scikit_learn_contract():
    rows, _ = blobs()
    method = tiny(beta=0.7)
    assert method.get_params() == clone(method).get_params() == TEMI(**method.get_params()).get_params()
    odd = object()
    assert TEMI(n_clusters=odd).n_clusters is odd, "the constructor stores and does not judge"
    for needs_fit in (lambda: method.predict(rows), method.as_parts):
        with pytest.raises(NotFittedError):
            needs_fit()
    assert np.array_equal(tiny().fit_predict(rows), tiny().fit(rows).labels_)


def test_defaults_are_the_published_configuration():
    expected = {"n_heads": 16, "beta": 0.6, "temperature": 0.1, "teacher_momentum": 0.996, "marginal_momentum": 0.9,
                "embed_norm": False, "hidden": (512, 256), "n_components": None, "n_neighbors": 50, "lr": 1e-4,
                "warmup_epochs": 20, "frozen_epochs": 1, "weight_decay": 1e-4, "n_epochs": 100, "batch_size": 1024}
    published = TEMI().get_params()
    assert {name: published[name] for name in expected} == expected


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "said"), [
    ({"n_clusters": 0}, "n_clusters must be at least 1, got 0"), ({"n_heads": 0}, "n_heads must be at least 1"),
    ({"n_clusters": 61}, "n_clusters=61 needs at least 61 images, got 60.* hint: lower n_clusters"),
    ({"beta": 0}, "beta must be above 0"), ({"temperature": 0.0}, "temperature must be above 0"),
    ({"teacher_momentum": 1.0}, "teacher_momentum must be at least 0 and below 1"),
    ({"marginal_momentum": -0.1}, "marginal_momentum must be at least 0"), ({"n_epochs": 0}, "n_epochs must be"),
    ({"hidden": (8,)}, "hidden needs two numbers"), ({"hidden": (8, 0)}, "hidden needs two numbers"),
    ({"n_components": 0}, "n_components must be at least 1, got 0"), ({"n_steps": 0}, "n_steps must be at least 1"),
    ({"n_neighbors": 0}, "n_neighbors must be"),
    ({"objective": "temmi"}, "objective='temmi' is not allowed. hint: did you mean temi"),
    ({"lr": math.nan}, "lr must be above 0 and finite"), ({"batch_size": 0}, "batch_size must be at least 1"),
])
def test_options_that_cannot_be_used_are_refused_before_any_work(options, said):
    with pytest.raises(InputError, match=said):
        tiny(**options).fit(blobs()[0])
    if "needs at least" not in said:
        assert re.search(said, str(next(tiny(**options).option_faults()))), "and can be told without the images"


def test_embeddings_and_neighbors_that_cannot_be_used_are_refused():
    rows, _ = blobs()
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        tiny(n_clusters=1).fit(rows[:1])
    with pytest.raises(InputError, match="belong to another set"):
        tiny().fit(rows[:30], neighbors=find_neighbors(rows, 5))
    none = np.empty((60, 0), np.int64)
    with pytest.raises(InputError, match="belong to another set"):
        tiny().fit(rows, neighbors=Neighbors(none, none.astype(np.float32)))
    fitted = tiny(n_epochs=1).fit(rows)
    with pytest.raises(InputError, match="embeddings of 5 features do not fit heads of 8"):
        fitted.predict(rows[:, :5])


def test_a_loss_that_is_not_finite_ends_the_fit_and_says_where(monkeypatch):
    calls = []

    def broken(*given: Tensor, **options: object) -> TemiLoss:
        calls.append(0)
        loss = temi_loss(*given, **options)
        return loss._replace(total=loss.total * (math.nan if len(calls) == 3 else 1.0))

    monkeypatch.setattr(temi, "temi_loss", broken)
    with pytest.raises(NonFiniteLossError, match="cluster: the loss is not finite at step 2"):
        tiny().fit(blobs()[0])
