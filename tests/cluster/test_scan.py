"""SCAN: its loss against loops, known and golden values; what the fit trains, keeps, resumes, recovers and refuses."""

import copy
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
from phyla.cluster import scan
from phyla.cluster.scan import SCAN, ScanLoss, Watched, scan_loss
from phyla.errors import CollapseWarning, InputError, NonFiniteLossError
from phyla.evaluate.matching import hungarian_accuracy, many_to_one_accuracy
from phyla.images.augment import Views
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterHeads
from phyla.quality import neighbor_score
from phyla.training.device import choose_device
from phyla.types import Embeddings, ImageSet, Neighbors

pytestmark = pytest.mark.usefixtures("warm")
GOLDEN = Path(__file__).parents[1] / "golden" / "losses.npz"
VIEWS = Views("strong", 8, cutout=2)
WIDE = Views("strong", 16, cutout=4)


def tiny(**options: object) -> SCAN:
    return SCAN(**({"n_clusters": 3, "views": VIEWS, "n_epochs": 2, "batch_size": 20, "lr": 0.01} | options))


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blobs(sizes: tuple[int, ...] = (20, 20, 20), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian embeddings in 8 dimensions, one blob a class, and their classes."""
    draw = np.random.default_rng(seed)
    true = np.repeat(np.arange(len(sizes)), sizes)
    return (draw.normal(0, 0.3, (len(true), 8)) + 2 * np.eye(8)[true]).astype(np.float32), true


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


may_collapse = pytest.mark.filterwarnings("ignore:SCAN put all")
"""For fits of a step or two, after which BatchNorm's running statistics mean nothing yet."""


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return the weights at the end of a fit, all heads."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["net"]


# ── the equation ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("batch", "clusters", "weight"), [(1, 2, 5.0), (4, 3, 5.0), (7, 10, 2.0), (5, 1, 1.0)])
def test_loss_is_the_formula_in_both_orders(batch, clusters, weight):
    first, second = logits(batch, clusters, seed=1), logits(batch, clusters, seed=2)
    for a, b in ((first, second), (second, first)):
        expected = naive.scan_loss(a.numpy(), b.numpy(), entropy_weight=weight)
        assert [float(part) for part in scan_loss(a, b, entropy_weight=weight)] == pytest.approx(expected, rel=1e-12)


def test_consistency_is_symmetric_and_entropy_is_that_of_the_anchors():
    first, second = logits(6, 4, seed=1), logits(6, 4, seed=2)
    one, other = (scan_loss(a, b, entropy_weight=5.0) for a, b in ((first, second), (second, first)))
    assert torch.allclose(one.consistency, other.consistency)
    assert not torch.allclose(one.entropy, other.entropy)
    assert torch.allclose(one.total, one.consistency - 5 * one.entropy)


def test_golden_values_and_gradients():
    held = np.load(GOLDEN, allow_pickle=False)
    anchor, neighbor = (torch.from_numpy(held[f"scan_{of}_logits"]).requires_grad_() for of in ("anchor", "neighbor"))
    loss = scan_loss(anchor, neighbor, entropy_weight=float(held["scan_entropy_weight"]))
    for name, part in loss._asdict().items():
        assert part.item() == pytest.approx(float(held[f"scan_{name}"]), rel=1e-9)
    loss.total.backward()
    np.testing.assert_allclose(anchor.grad, held["scan_grad_anchor"], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(neighbor.grad, held["scan_grad_neighbor"], rtol=1e-9, atol=1e-14)


def test_gradient_is_that_of_the_formula():
    at = torch.stack([logits(4, 3, seed=1), logits(4, 3, seed=2)]).requires_grad_()
    scan_loss(at[0], at[1], entropy_weight=5.0).total.backward()
    slopes = naive.gradient(lambda z: naive.scan_loss(z[0], z[1], entropy_weight=5.0)[0], at.detach().numpy())
    np.testing.assert_allclose(at.grad, slopes, atol=1e-7)


def test_uniform_predictions_cost_log_k_times_one_minus_lambda():
    for clusters in (2, 10, 1000):
        flat = torch.zeros(6, clusters, dtype=torch.float64)
        loss = scan_loss(flat, flat, entropy_weight=5.0)
        assert float(loss.consistency) == pytest.approx(math.log(clusters))
        assert float(loss.entropy) == pytest.approx(math.log(clusters))
        assert float(loss.total) == pytest.approx(math.log(clusters) * (1 - 5))


def test_perfect_one_hot_agreement_costs_minus_lambda_log_k():
    sure = 50 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    loss = scan_loss(sure, sure, entropy_weight=5.0)
    assert float(loss.consistency) == pytest.approx(0, abs=1e-12)
    assert float(loss.total) == pytest.approx(-5 * math.log(4))
    collapsed = 50 * torch.eye(4, dtype=torch.float64)[[0] * 12]
    assert float(scan_loss(collapsed, collapsed, entropy_weight=5.0).total) == pytest.approx(0, abs=1e-5)


def test_four_points_worked_by_hand():
    # P: 3/4 1/4, 3/4 1/4, 1/4 3/4, 1/2 1/2; Q: the same, then the other way round, then certain, then the same
    half, three, one = 0.0, math.log(3), math.log(1)
    anchor = torch.tensor([[three, one], [three, one], [one, three], [half, half]], dtype=torch.float64)
    neighbor = torch.tensor([[three, one], [one, three], [-800.0, 0.0], [half, half]], dtype=torch.float64)
    agreement = [10 / 16, 6 / 16, 3 / 4, 1 / 2]
    mean = (9 / 16, 7 / 16)
    loss = scan_loss(anchor, neighbor, entropy_weight=2.0)
    assert float(loss.consistency) == pytest.approx(-sum(math.log(a) for a in agreement) / 4)
    assert float(loss.entropy) == pytest.approx(-sum(m * math.log(m) for m in mean))


def test_loss_does_not_change_with_the_order_of_images_or_clusters_or_a_shift():
    anchor, neighbor = logits(8, 5, seed=1), logits(8, 5, seed=2)
    loss = scan_loss(anchor, neighbor, entropy_weight=5.0)
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(8, generator=draw), torch.randperm(5, generator=draw)
    for a, b in ((anchor[rows], neighbor[rows]), (anchor[:, columns], neighbor[:, columns]),
                 (anchor + logits(8, 1, seed=3), neighbor + logits(8, 1, seed=4))):
        assert all(torch.allclose(x, y) for x, y in zip(scan_loss(a, b, entropy_weight=5.0), loss, strict=True))


def test_leading_axes_are_heads():
    anchor, neighbor = logits(3, 6, 4, seed=1), logits(3, 6, 4, seed=2)
    together = scan_loss(anchor, neighbor, entropy_weight=5.0)
    for head in range(3):
        alone = scan_loss(anchor[head], neighbor[head], entropy_weight=5.0)
        assert all(torch.allclose(x[head], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("gap", [1.0, 30.0, 60.0, 1000.0])
def test_gradient_of_a_contradiction_never_vanishes(gap):
    anchor, neighbor = (torch.tensor([row], requires_grad=True) for row in ([gap, 0.0], [0.0, gap]))
    scan_loss(anchor, neighbor, entropy_weight=0.0).total.backward()
    # d/da of -log(sum p q) at p = q reversed: 1/2 - p for the larger logit, so nearly one half each at any gap above 5
    expected = 1 / (1 + math.exp(-gap)) - 0.5
    assert anchor.grad[0].tolist() == pytest.approx([expected, -expected], rel=1e-4)
    assert neighbor.grad[0].tolist() == pytest.approx([-expected, expected], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(dtype):
    anchor = (1e4 * logits(6, 5, seed=1)).to(dtype).requires_grad_()
    neighbor = (1e4 * logits(6, 5, seed=2)).to(dtype).requires_grad_()
    loss = scan_loss(anchor, neighbor, entropy_weight=5.0)
    loss.total.backward()
    assert all(part.isfinite() for part in loss)
    assert anchor.grad.isfinite().all() and neighbor.grad.isfinite().all() and neighbor.grad.any()


def test_class_prior_puts_the_divergence_from_it_in_the_place_of_the_entropy():
    anchor, neighbor = logits(6, 3, seed=1), logits(6, 3, seed=2)
    prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    found = scan_loss(anchor, neighbor, entropy_weight=5.0, class_prior=prior)
    mean = anchor.softmax(1).mean(0)
    divergence = sum(float(m) * math.log(float(m) / float(w)) for m, w in zip(mean, prior, strict=True))
    assert float(found.total) == pytest.approx(float(found.consistency) + 5 * divergence)
    plain = scan_loss(anchor, neighbor, entropy_weight=5.0)
    even = scan_loss(anchor, neighbor, entropy_weight=5.0, class_prior=torch.full((3,), 1 / 3, dtype=torch.float64))
    assert float(even.total) == pytest.approx(float(plain.total) + 5 * math.log(3)), "a constant apart"
    assert found.entropy == plain.entropy, "the entropy that is logged stays the entropy"


# ── what a fit does ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fresh_network_starts_at_minus_nine_point_two(noise, noise_neighbors, encoder):
    fitted = tiny(n_clusters=10, views=WIDE, lr=1e-9, n_epochs=1, batch_size=32).fit(
        noise, neighbors=noise_neighbors, encoder=encoder)
    start = fitted.history_[0]
    assert start["loss"] == pytest.approx(math.log(10) * (1 - 5), abs=0.5), "-9.2, were the first logits all equal"
    assert start["consistency"] == pytest.approx(math.log(10), abs=0.4)
    assert start["loss"] == pytest.approx(start["consistency"] - 5 * start["entropy"], rel=1e-5)


@may_collapse
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("update", "optimizer"), [("all", "Adam"), ("heads", "SGD")])
def test_what_trains_receives_a_gradient_and_what_is_frozen_none(noise, noise_neighbors, encoder, monkeypatch, update,
                                                                 optimizer, precision):
    seen: dict[int, Tensor] = {}
    kind = getattr(torch.optim, optimizer)
    step = kind.step

    def watched(self: torch.optim.Optimizer) -> None:
        seen.update({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})
        step(self)

    nets = []
    monkeypatch.setattr(kind, "step", watched)
    monkeypatch.setattr(scan, "Loop", lambda *a, **k: nets.append(k["state"]["net"]) or Loop(*a, **k))
    tiny(views=WIDE, n_epochs=1, update=update, optimizer=optimizer.lower()).fit(
        noise, neighbors=noise_neighbors, encoder=encoder, device=choose_device("cpu", precision))
    trained = nets[0] if update == "all" else nets[0].heads
    assert seen.keys() == {id(p) for p in trained.parameters()}
    assert all(grad.isfinite().all() and grad.any() for grad in seen.values())
    if update == "heads":
        assert all(p.grad is None for p in nets[0].encoder.parameters()), "no backward pass through a frozen encoder"


Loop = scan.Loop


def test_ten_steps_give_the_recorded_losses(noise, noise_neighbors, encoder, monkeypatch, recorded):
    seen = []
    monkeypatch.setattr(scan, "scan_loss", lambda *a, **k: seen.append(scan_loss(*a, **k)) or seen[-1])
    tiny(views=WIDE, n_epochs=5, batch_size=16, lr=1e-3).fit(noise, neighbors=noise_neighbors, encoder=encoder)
    recorded("scan", [loss.total.item() for loss in seen])


def test_images_come_with_one_of_their_neighbors_or_themselves(monkeypatch):
    rows, _ = blobs()
    near = find_neighbors(rows, 3)
    pairs = []
    draw = scan._Pairs.draw
    monkeypatch.setattr(scan._Pairs, "draw", lambda self, step: pairs.append(
        (step.rows, draw(self, step))) or pairs[-1][1])
    tiny(n_epochs=40, batch_size=60).fit(rows, neighbors=near)
    anchors, partners = (torch.cat(part).numpy() for part in zip(*pairs, strict=True))
    table = np.concatenate([np.arange(60)[:, None], near.indices], axis=1)
    columns = (table[anchors] == partners[:, None])
    assert (columns.sum(axis=1) == 1).all()
    shares = columns.mean(axis=0)  # of 2,400 draws: the deviation is 0.009
    assert shares == pytest.approx([0.25] * 4, abs=0.04), "the image itself is one of k + 1 candidates"
    assert all(len(np.unique(a)) == 60 for a, _ in pairs), "every image is an anchor once an epoch"


def test_fused_forwards_see_other_batch_statistics_only_where_the_encoder_trains(noise, noise_neighbors, encoder):
    def first_loss(**options: object) -> float:
        fitted = tiny(views=WIDE, n_epochs=1, batch_size=32, **options).fit(
            noise, neighbors=noise_neighbors, encoder=encoder)
        return fitted.history_[0]["consistency"]

    two, fused = (first_loss(update="heads", forwards=forwards) for forwards in ("two", "fused"))
    assert two == pytest.approx(fused, rel=1e-6)
    two, fused = (first_loss(update="all", forwards=forwards) for forwards in ("two", "fused"))
    assert two != pytest.approx(fused, rel=1e-5)


@may_collapse
@pytest.mark.parametrize("forwards", ["two", "fused"])
def test_running_statistics_are_updated_once_a_forward(noise, noise_neighbors, encoder, forwards):
    fitted = tiny(views=WIDE, n_epochs=1, batch_size=16, forwards=forwards).fit(
        noise, neighbors=noise_neighbors, encoder=encoder)
    assert int(fitted.net_.encoder.bn1.num_batches_tracked) == {"two": 4, "fused": 2}[forwards]


@pytest.mark.parametrize("cached_views", [0, 3])
def test_updating_heads_leaves_the_encoder_as_it_was(noise, noise_neighbors, encoder, cached_views):
    before = copy.deepcopy(encoder)
    fitted = tiny(views=WIDE, update="heads", cached_views=cached_views).fit(
        noise, neighbors=noise_neighbors, encoder=encoder)
    assert equal(fitted.net_.encoder, before) and equal(encoder, before)
    fresh = ClusterHeads(32, 3)
    fresh.initialise(scan.generator(0, "scan heads"))
    assert not torch.equal(fitted.net_.heads.weight, fresh.weight)


def test_the_callers_encoder_is_never_changed(noise, noise_neighbors, encoder):
    before = copy.deepcopy(encoder)
    fitted = tiny(views=WIDE, n_epochs=1).fit(noise, neighbors=noise_neighbors, encoder=encoder.train())
    assert equal(encoder, before) and encoder.training
    assert not equal(fitted.net_.encoder, before)


def test_many_heads_are_as_many_fits_of_one_head(tmp_path, monkeypatch):
    rows, _ = blobs()
    both = ClusterHeads(8, 3, 2)
    both.initialise(torch.Generator().manual_seed(0))

    def fit(name: str, *heads: int) -> dict[str, Tensor]:
        def same(self: ClusterHeads, generator: torch.Generator) -> None:
            self.weight.data = both.weight.data[list(heads)].clone()
            self.bias.data = both.bias.data[list(heads)].clone()

        monkeypatch.setattr(ClusterHeads, "initialise", same)
        tiny(n_heads=len(heads), n_epochs=5).fit(rows, folder=tmp_path / name)
        return checkpoint(tmp_path / name)

    together, first, second = fit("both", 0, 1), fit("first", 0), fit("second", 1)
    for part in ("heads.weight", "heads.bias"):
        torch.testing.assert_close(together[part][:1], first[part], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[part][1:], second[part], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first["heads.weight"], second["heads.weight"], atol=1e-2)


def test_the_head_and_epoch_with_the_lowest_score_are_kept():
    rows, _ = blobs()
    near = find_neighbors(rows, 5)
    fitted = tiny(n_heads=4, n_epochs=12, lr=3.0, optimizer="sgd", momentum=0.0, batch_size=6).fit(rows, neighbors=near)
    scores = [record["neighbor_score"] for record in fitted.history_]
    assert fitted.epoch_ == 1 + int(np.argmin(scores)) < 12, "at this learning rate the last epoch is not the best"
    assert fitted.score_ == min(scores) and fitted.head_ == fitted.history_[fitted.epoch_ - 1]["head"]
    assert neighbor_score(fitted.probabilities_, near) == pytest.approx(fitted.score_, rel=1e-6)
    last = clone(fitted).set_params(select="last").fit(rows, neighbors=near)
    assert last.epoch_ == 12 and last.score_ == scores[-1]
    assert neighbor_score(last.probabilities_, near) == pytest.approx(scores[-1], rel=1e-6)


def test_score_is_taken_on_the_watched_images_and_its_number_of_neighbors(noise, noise_neighbors, encoder):
    held_out = noise.select(np.arange(10))
    few = find_neighbors(held_out.array.reshape(10, -1).astype(np.float32), 4)
    for options in ({}, {"update": "heads", "cached_views": 2}):
        fitted = tiny(views=WIDE, n_selection_neighbors=2, **options).fit(
            noise, neighbors=noise_neighbors, encoder=encoder, watched=Watched(held_out, few))
        expected = neighbor_score(fitted.predict_proba(held_out), few.indices[:, :2])
        assert fitted.score_ == pytest.approx(expected, rel=1e-5)
        assert fitted.probabilities_.shape == (32, 3)


@may_collapse
def test_cached_views_are_drawn_once_from_the_fits_own_seed(noise, noise_neighbors, encoder, monkeypatch):
    held = []
    make = scan._FromEmbeddings.__init__
    monkeypatch.setattr(scan._FromEmbeddings, "__init__", lambda self, *a: held.append(a) or make(self, *a))
    for seed in (0, 0, 1):
        fitted = tiny(views=WIDE, update="heads", cached_views=3, random_state=seed).fit(
            noise, neighbors=noise_neighbors, encoder=encoder)
    (plain, drawn, *_), (_, again, *_), (_, other, *_) = held
    assert drawn.shape == (3, 32, 32) and torch.equal(drawn, again) and not torch.allclose(drawn, other)
    assert not torch.allclose(drawn[0], drawn[1]), "each view is drawn anew"
    with torch.no_grad():
        expected = encoder.eval()(WIDE.plain()(torch.from_numpy(noise.array), torch.Generator()))
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fitted.predict_proba(noise), fitted.probabilities_, atol=1e-5)


# ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("as_noun", [False, True])
def test_recovers_blobs_of_embeddings(as_noun):
    rows, true = blobs()
    given = Embeddings(rows, [str(i) for i in range(60)]) if as_noun else rows
    fitted = tiny(n_epochs=30, lr=0.05).fit(given)
    assert hungarian_accuracy(true, fitted.labels_) == 1.0
    assert np.array_equal(fitted.predict(given), fitted.labels_)
    new, classes = blobs(seed=1)
    assert hungarian_accuracy(classes, fitted.predict(new)) == 1.0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_parts_of_a_fit_on_embeddings(normalize, several):
    rows, true = blobs()
    given = [rows[:, :3], 40 * rows[:, 3:]] if several else rows
    fitted = tiny(n_epochs=30, lr=0.05, normalize=normalize).fit(given)
    assert hungarian_accuracy(true, fitted.labels_) == 1.0 and fitted.n_features_in_ == 8
    np.testing.assert_allclose(fitted.predict_proba(given), fitted.probabilities_, atol=1e-6)
    projection, heads = fitted.as_parts()
    raw = torch.from_numpy(np.concatenate(given, axis=1) if several else rows)
    with torch.no_grad():
        np.testing.assert_allclose(heads.probabilities(projection(raw))[:, 0], fitted.probabilities_, atol=1e-5)


def test_parts_of_a_fit_on_images_are_the_network(noise, noise_neighbors, encoder):
    fitted = tiny(views=WIDE, update="heads", n_epochs=1).fit(noise, neighbors=noise_neighbors, encoder=encoder)
    with pytest.raises(InputError, match="has no parts"):
        fitted.as_parts()
    with pytest.raises(InputError, match="the fit was on images"):
        fitted.predict(noise.array.reshape(32, -1).astype(np.float32))


def test_recovers_colors_from_images(colors, color_neighbors, encoder):
    images, true = colors
    calm = Views("strong", 8, cutout=2, n_operations=1)
    fitted = tiny(views=calm, n_epochs=25, batch_size=30, lr=0.003).fit(
        images, neighbors=color_neighbors, encoder=encoder)
    assert hungarian_accuracy(true, fitted.labels_) > 0.95
    assert np.array_equal(fitted.predict(images), fitted.labels_)
    assert fitted.labels_.dtype == np.int64 and fitted.probabilities_.dtype == np.float32
    np.testing.assert_array_equal(fitted.predict_proba(images), fitted.probabilities_)
    np.testing.assert_allclose(fitted.probabilities_.sum(axis=1), 1, rtol=1e-5)
    assert not fitted.net_.training and fitted.net_.heads.n_heads == 1


def test_more_clusters_than_classes_divide_the_classes():
    rows, true = blobs()
    fitted = tiny(n_clusters=6, n_epochs=30, lr=0.05).fit(rows)
    assert fitted.probabilities_.shape == (60, 6)
    assert len(np.unique(fitted.labels_)) > 3 and many_to_one_accuracy(true, fitted.labels_) == 1.0


def test_class_prior_moves_the_sizes():
    rows, true = blobs((45, 15))

    def fit(prior: tuple[float, ...] | None) -> SCAN:
        return tiny(n_clusters=2, class_prior=prior, n_epochs=60, lr=0.1).fit(rows)

    even, uneven = fit(None), fit((0.25, 0.75))
    assert even.probabilities_.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.1)
    assert hungarian_accuracy(true, even.labels_) < 0.9, "an even use of clusters divides the large class"
    assert uneven.probabilities_.mean(axis=0) == pytest.approx([0.25, 0.75], abs=0.05)
    assert np.bincount(uneven.labels_).tolist() == [15, 45] and hungarian_accuracy(true, uneven.labels_) == 1.0
    score = neighbor_score(uneven.probabilities_, find_neighbors(rows, 20).indices[:, :5])
    expected = score - uneven.probabilities_.mean(axis=0) @ np.log([0.25, 0.75])
    assert uneven.score_ == pytest.approx(expected, abs=1e-5), "the epoch is chosen by the prior too"


def test_all_images_in_one_cluster_is_a_collapse_and_warned_of():
    rows, _ = blobs()
    with pytest.warns(CollapseWarning, match="all 60 images into one of 3 clusters"):
        tiny(entropy_weight=-5.0, n_epochs=20, lr=0.1, select="last").fit(rows)


def test_one_cluster_and_duplicated_images_are_no_trouble():
    same = np.ones((10, 4), np.float32)
    assert tiny(n_clusters=1, batch_size=5).fit(same).labels_.tolist() == [0] * 10
    with pytest.warns(CollapseWarning):
        fitted = tiny(n_clusters=2, batch_size=5).fit(same)
    assert np.isfinite(fitted.probabilities_).all()


# ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["images", "heads", "cached", "embeddings"])
@pytest.mark.parametrize("call", [2, 5])
def test_killed_and_started_again_it_ends_bit_equal(noise, noise_neighbors, encoder, killed, tmp_path, monkeypatch,
                                                    path, call):
    options = {"images": {}, "heads": {"update": "heads"}, "cached": {"update": "heads", "cached_views": 2},
               "embeddings": {}}[path]

    def fit(folder: Path | None = None) -> SCAN:
        method = tiny(views=WIDE, n_epochs=3, batch_size=16, **options)  # 3 epochs of 2 steps
        if path == "embeddings":
            return method.fit(noise.array.reshape(32, -1) / np.float32(255), neighbors=noise_neighbors, folder=folder)
        return method.fit(noise, neighbors=noise_neighbors, encoder=encoder, folder=folder)

    whole = fit()
    with killed(scan, "scan_loss", call):
        fit(tmp_path)
    steps = []
    monkeypatch.setattr(scan, "scan_loss", lambda *a, **k: steps.append(0) or scan_loss(*a, **k))
    for _ in range(2):  # and a finished fit is not done again
        again = fit(tmp_path)
        assert len(steps) == 6 - (call - 1)
        assert equal(again.net_, whole.net_) and again.history_ == whole.history_
        assert np.array_equal(again.probabilities_, whole.probabilities_)
        assert (again.head_, again.epoch_, again.score_) == (whole.head_, whole.epoch_, whole.score_)


def test_checkpoint_of_other_options_images_neighbors_or_encoder_is_refused(noise, noise_neighbors, encoder, tmp_path):
    def fit(images: ImageSet = noise, neighbors: Neighbors = noise_neighbors, lr: float = 0.01) -> None:
        tiny(views=WIDE, n_epochs=1, lr=lr).fit(images, neighbors=neighbors, encoder=encoder, folder=tmp_path)

    fit()
    fit()
    others = Neighbors(noise_neighbors.indices[:, :4], noise_neighbors.similarities[:, :4])
    for changed in ({"lr": 0.02}, {"images": ImageSet(255 - noise.array, noise.ids)}, {"neighbors": others}):
        with pytest.raises(InputError, match="other options or images"):
            fit(**changed)
    with torch.no_grad():
        encoder.bn1.bias += 1
    with pytest.raises(InputError, match="other options or images"):
        fit()


def test_same_seed_same_clusters_and_another_seed_others():
    rows, _ = blobs()
    once, again, other = (tiny(random_state=seed).fit(rows) for seed in (0, 0, 1))
    assert equal(once.net_, again.net_) and not equal(once.net_, other.net_)


# ── the contract, and misuse ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
def test_scikit_learn_contract():
    rows, _ = blobs()
    method = tiny(entropy_weight=4.0)
    assert method.get_params() == clone(method).get_params() == SCAN(**method.get_params()).get_params()
    assert method.set_params(lr=0.3) is method and method.lr == 0.3
    odd = object()
    assert SCAN(n_clusters=odd).n_clusters is odd, "the constructor stores and does not judge"
    with pytest.raises(NotFittedError):
        method.predict(rows)
    assert np.array_equal(tiny().fit_predict(rows), tiny().fit(rows).labels_)


def test_defaults_are_the_published_configuration():
    expected = {"n_clusters": 10, "n_heads": 1, "entropy_weight": 5.0, "class_prior": None, "update": "all",
                "cached_views": 0, "forwards": "two", "select": "neighbor_score", "n_selection_neighbors": 5,
                "optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-4, "n_epochs": 50, "batch_size": 128}
    published = SCAN().get_params()
    assert {name: published[name] for name in expected} == expected
    assert published["views"] == Views("strong", 32, cutout=16)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "said"), [
    ({"n_clusters": 0}, "n_clusters must be at least 1, got 0"), ({"n_heads": 0}, "n_heads must be at least 1"),
    ({"n_clusters": 61}, "n_clusters=61 needs at least 61 images, got 60.* hint: lower n_clusters"),
    ({"n_selection_neighbors": 0}, "n_selection_neighbors must be at least 1"), ({"batch_size": 1}, "batch_size must"),
    ({"n_epochs": 0}, "n_epochs must be at least 1"), ({"cached_views": -1}, "cached_views must be at least 0"),
    ({"cached_views": 2}, "cached_views needs a frozen encoder.*update=heads"),
    ({"class_prior": (0.5, 0.5)}, "class_prior needs 3 shares"), ({"class_prior": (0.5, 0.6, -0.1)}, "needs 3 shares"),
    ({"class_prior": (1.0, 1.0, 1.0)}, "sum to 1"), ({"class_prior": (0.5, 0.5, math.nan)}, "sum to 1"),
    ({"optimizer": "adamw"}, "optimizer='adamw' is not allowed. hint: did you mean adam"),
    ({"update": "head"}, "update='head' is not allowed. hint: did you mean heads"),
    ({"forwards": "one"}, "forwards='one'"), ({"select": "best"}, "select='best'"),
    ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"), ({"batch_size": 0}, "batch_size must be at least 2"),
    ({"momentum": -1.0}, "momentum must be at least 0 and below 1, got -1.0"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
])
def test_options_that_cannot_be_used_are_refused_before_any_work(options, said):
    rows, _ = blobs()
    with pytest.raises(InputError, match=said):
        tiny(**options).fit(rows)
    if "needs at least" not in said:
        assert re.search(said, str(next(tiny(**options).option_faults()))), "and can be told without the images"


def test_images_need_an_encoder_and_neighbors_of_their_own(noise, noise_neighbors, encoder):
    with pytest.raises(InputError, match="needs an encoder"):
        tiny().fit(noise, neighbors=noise_neighbors)
    with pytest.raises(InputError, match="needs their neighbors"):
        tiny().fit(noise, encoder=encoder)
    none = np.empty((32, 0), np.int64)
    for wrong in (find_neighbors(blobs()[0], 5), Neighbors(none, none.astype(np.float32))):
        with pytest.raises(InputError, match="belong to another set"):
            tiny().fit(noise, neighbors=wrong, encoder=encoder)
        with pytest.raises(InputError, match="belong to another set"):
            tiny().fit(noise, neighbors=noise_neighbors, encoder=encoder, watched=Watched(noise, wrong))


def test_embeddings_that_cannot_be_used_are_refused(noise, noise_neighbors, encoder):
    rows, _ = blobs()
    with pytest.raises(InputError, match="without an encoder"):
        tiny().fit(rows, encoder=encoder)
    with pytest.raises(InputError, match="at least 3 images, got 1"):
        tiny().fit(rows[:1])
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        tiny(n_clusters=1).fit(rows[:1])
    broken = rows.copy()
    broken[7, 2] = np.nan
    with pytest.raises(InputError, match="finite"):
        tiny().fit(broken)
    fitted = tiny(n_epochs=1).fit(rows)
    with pytest.raises(InputError, match="embeddings of 5 features do not fit heads of 8"):
        fitted.predict(rows[:, :5])
    with pytest.raises(InputError, match="has no encoder"):
        fitted.predict(noise)


def test_a_loss_that_is_not_finite_ends_the_fit_and_says_where(monkeypatch):
    rows, _ = blobs()
    calls = []

    def broken(*logits: Tensor, **options: object) -> ScanLoss:
        calls.append(0)
        loss = scan_loss(*logits, **options)
        return loss._replace(total=loss.total * (math.nan if len(calls) == 3 else 1.0))

    monkeypatch.setattr(scan, "scan_loss", broken)
    with pytest.raises(NonFiniteLossError, match="cluster: the loss is not finite at step 2"):
        tiny().fit(rows)


def test_weights_lost_in_the_very_last_step_are_noticed(monkeypatch):
    rows, _ = blobs()
    step = torch.optim.Adam.step

    def breaking(self: torch.optim.Adam) -> None:
        step(self)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", breaking)
    with pytest.raises(NonFiniteLossError, match="cluster: the weights are not finite"):
        tiny(n_epochs=1, batch_size=60).fit(rows)
