"""NNM: its loss against loops, known and golden values; its matches; what a fit trains, keeps, resumes and refuses."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

import naive
from phyla.cluster import nnm
from phyla.cluster.nnm import NNM, NnmLoss, batch_match, class_contrast, global_matches, nnm_loss, selection_score
from phyla.errors import CollapseWarning, InputError, NonFiniteLossError
from phyla.evaluate.matching import hungarian_accuracy
from phyla.images.augment import Views
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterHeads
from phyla.training.device import choose_device
from phyla.types import ImageSet, Neighbors

pytestmark = pytest.mark.usefixtures("warm")
GOLDEN = Path(__file__).parents[1] / "golden" / "nnm.npz"
WIDE = Views("strong", 16, cutout=4)
CALM = Views("strong", 8, cutout=2, n_operations=1)
INPUTS = ("anchor", "augmented", "neighbor")

may_collapse = pytest.mark.filterwarnings("ignore:NNM put all")
"""For fits of a step or two, after which BatchNorm's running statistics mean nothing yet."""


def tiny(**options: object) -> NNM:
    defaults = {"n_clusters": 3, "n_heads": 2, "views": WIDE, "n_epochs": 2, "batch_size": 12, "lr": 0.003}
    return NNM(**(defaults | options))


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 6, clusters: int = 4, *heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return three logits, a match and targets."""
    parts = [logits(*heads, rows, clusters, seed=seed) for seed in (1, 2, 3)]
    match = (torch.arange(rows) + 1 + torch.arange(rows) % 2) % rows
    return *parts, match, logits(*heads, rows, clusters, seed=4).softmax(-1)


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.fixture
def fitted(noise, noise_neighbors, encoder) -> Callable[..., NNM]:
    """Return a fit on the images of noise."""
    def fit(folder: Path | None = None, watched: tuple[ImageSet, Neighbors] | None = None, **options: object) -> NNM:
        return tiny(**options).fit(noise, neighbors=noise_neighbors, encoder=encoder, folder=folder, watched=watched)

    return fit


@pytest.fixture
def seen(monkeypatch) -> list[tuple[NnmLoss, Tensor, Tensor | None]]:
    """Return what will be the losses, matches and targets of the steps of a fit."""
    steps: list[tuple[NnmLoss, Tensor, Tensor | None]] = []

    def spy(anchor: Tensor, augmented: Tensor, neighbor: Tensor, match: Tensor, targets: Tensor | None,
            **options: float) -> NnmLoss:
        steps.append((nnm_loss(anchor, augmented, neighbor, match, targets, **options), match, targets))
        return steps[-1][0]

    monkeypatch.setattr(nnm, "nnm_loss", spy)
    return steps


# ── the equations ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("with_targets", [False, True])
@pytest.mark.parametrize(("rows", "clusters", "weight", "share"), [(2, 2, 5.0, 1.0), (6, 4, 5.0, 0.5),
                                                                   (9, 10, 2.0, 2.0), (5, 1, 1.0, 1.0)])
def test_loss_is_the_formula_in_every_order(rows, clusters, weight, share, with_targets):
    one, two, three, match, targets = batch(rows, clusters)
    given = targets if with_targets else None
    for parts in ((one, two, three), (two, one, three), (three, two, one), (one, three, two)):
        expected = naive.nnm_loss(*(part.numpy() for part in parts), match.numpy(),
                                  None if given is None else given.numpy(), entropy_weight=weight, global_weight=share)
        found = nnm_loss(*parts, match, given, entropy_weight=weight, global_weight=share)
        assert [float(part) for part in found] == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kind", ["local", "full"])
def test_golden_values_and_gradients(kind):
    held = np.load(GOLDEN, allow_pickle=False)
    given = [torch.from_numpy(held[f"nnm_{name}_logits"]).requires_grad_() for name in INPUTS]
    targets = torch.from_numpy(held["nnm_global_targets"][held["nnm_index"]]) if kind == "full" else None
    loss = nnm_loss(*given, torch.from_numpy(held["nnm_batch_match"]), targets,
                    entropy_weight=float(held["nnm_entropy_weight"]))
    for name in ("total", "consistency", "class_contrast", "entropy"):
        assert getattr(loss, name).item() == pytest.approx(float(held[f"nnm_{kind}_{name}"]), rel=1e-9)
    parts = loss.consistency + loss.class_contrast + loss.global_match - 5 * loss.entropy
    assert loss.total.item() == pytest.approx(parts.item())
    assert (loss.global_match.item() != 0) == (kind == "full")
    loss.total.backward()
    for name, logit in zip(INPUTS, given, strict=True):
        np.testing.assert_allclose(logit.grad, held[f"nnm_{kind}_grad_{name}"], rtol=1e-9, atol=1e-14)


def test_golden_matches_of_a_batch():
    held = np.load(GOLDEN, allow_pickle=False)
    assert batch_match(torch.from_numpy(held["nnm_features"])).tolist() == held["nnm_batch_match"].tolist()


def test_gradient_is_that_of_the_formula_and_reaches_all_three_views():
    one, two, three, match, targets = batch(4, 3)
    at = torch.stack([one, two, three]).requires_grad_()
    nnm_loss(at[0], at[1], at[2], match, targets, entropy_weight=5.0).total.backward()
    slopes = naive.gradient(lambda z: naive.nnm_loss(z[0], z[1], z[2], match.numpy(), targets.numpy(),
                                                     entropy_weight=5.0)[0], at.detach().numpy())
    np.testing.assert_allclose(at.grad, slopes, atol=1e-7)
    assert all(part.abs().max() > 1e-3 for part in at.grad)


def test_targets_receive_no_gradient():
    *parts, match, targets = batch()
    targets.requires_grad_()
    nnm_loss(*(part.requires_grad_() for part in parts), match, targets, entropy_weight=5.0).total.backward()
    assert targets.grad is None and parts[0].grad.any()


@pytest.mark.parametrize(("clusters", "least"), [(10, 1.461), (15, 1.817), (20, 2.078), (50, 2.946), (100, 3.622),
                                                 (200, 4.307)])
def test_class_contrast_lies_between_its_floor_and_chance(clusters, least):
    sure = (60 * torch.eye(clusters, dtype=torch.float64)).log_softmax(1).repeat(4, 1)
    assert float(class_contrast(sure, sure)) == pytest.approx(math.log1p((clusters - 1) / math.e))
    assert float(class_contrast(sure, sure)) == pytest.approx(least, abs=6e-4)
    random = sure[torch.randint(clusters, (50 * clusters,), generator=torch.Generator().manual_seed(0))]
    other = random[torch.randperm(len(random), generator=torch.Generator().manual_seed(1))]
    assert float(class_contrast(random, other)) == pytest.approx(math.log(clusters), rel=0.02)


def test_uniform_predictions_cost_what_the_formula_says():
    for clusters in (2, 10):
        flat, match = torch.zeros(6, clusters, dtype=torch.float64), torch.tensor([1, 0, 3, 2, 5, 4])
        loss = nnm_loss(flat, flat, flat, match, flat.softmax(1), entropy_weight=5.0)
        even = math.log(clusters)
        expected = [(even + even) * 2 - 5 * even, even, even, 2 * even, even]
        assert [float(part) for part in loss] == pytest.approx(expected)


def test_perfect_one_hot_agreement():
    sure, match = 60 * torch.eye(4, dtype=torch.float64).repeat(2, 1), torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    loss = nnm_loss(sure, sure, sure, match, sure.softmax(1), entropy_weight=5.0)
    floor = math.log1p(3 / math.e)
    assert [float(part) for part in loss] == pytest.approx([2 * floor - 5 * math.log(4), 0, floor, floor, math.log(4)],
                                                           abs=1e-12)


def test_two_images_worked_by_hand():
    # P = (3/4 1/4), (1/4 3/4) in both views and in the neighbors; each row's match is the other row
    three = math.log(3)
    rows = torch.tensor([[three, 0.0], [0.0, three]], dtype=torch.float64)
    loss = nnm_loss(rows, rows, rows, torch.tensor([1, 0]), None, entropy_weight=5.0)
    assert float(loss.consistency) == pytest.approx(-(math.log(10 / 16) + math.log(6 / 16)) / 2)
    # columns of A: (3 1 3 1)/√20 and (1 3 1 3)/√20, of the positives (3 1 1 3)/√20 and (1 3 3 1)/√20: all products 4/5
    assert float(loss.class_contrast) == pytest.approx(math.log(2))
    alone = nnm_loss(rows, rows, rows, torch.tensor([0, 1]), None, entropy_weight=5.0)
    # were each row its own match, products would be 1 and 12/20
    assert float(alone.class_contrast) == pytest.approx(math.log(1 + math.exp(-8 / 20)))
    assert float(loss.entropy) == pytest.approx(math.log(2))


def test_loss_does_not_change_with_the_order_of_images_or_clusters_or_a_shift():
    *parts, match, targets = batch(8, 5)
    loss = nnm_loss(*parts, match, targets, entropy_weight=5.0)
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(8, generator=draw), torch.randperm(5, generator=draw)
    moved = torch.argsort(rows)[match[rows]]
    for changed in (nnm_loss(*(part[rows] for part in parts), moved, targets[rows], entropy_weight=5.0),
                    nnm_loss(*(part[:, columns] for part in parts), match, targets[:, columns], entropy_weight=5.0),
                    nnm_loss(*(part + logits(8, 1, seed=9) for part in parts), match, targets, entropy_weight=5.0)):
        assert all(torch.allclose(x, y) for x, y in zip(changed, loss, strict=True))


def test_leading_axes_are_heads():
    *parts, match, targets = batch(6, 4, 3)
    for given in (targets, None):
        together = nnm_loss(*parts, match, given, entropy_weight=5.0)
        for head in range(3):
            alone = nnm_loss(*(part[head] for part in parts), match, None if given is None else given[head],
                             entropy_weight=5.0)
            assert all(torch.allclose(x[head], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("gap", [30.0, 60.0, 1000.0])
def test_gradient_of_a_contradiction_never_vanishes(gap):
    first = torch.tensor([[gap, 0.0], [gap, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, gap], [0.0, gap]])
    loss = nnm_loss(first, first, other, torch.tensor([1, 0]), None, entropy_weight=0.0)
    loss.consistency.backward()
    # P with Q disagrees, P' with the matched P agrees: half of the pairs, each half a unit, over two images
    assert first.grad[0].tolist() == pytest.approx([0.125, -0.125], rel=1e-3)
    targets = torch.tensor([[0.0, 1.0], [0.0, 1.0]])  # a softmax that came out as 0 has a logarithm of -87
    again = nnm_loss(first, first, first, torch.tensor([1, 0]), targets, entropy_weight=0.0)
    assert all(part.isfinite() for part in again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(dtype):
    *parts, match, _ = batch(6, 5)
    given = [(1e4 * part).to(dtype).requires_grad_() for part in parts]
    loss = nnm_loss(*given, match, given[1].softmax(1), entropy_weight=5.0)
    loss.total.backward()
    assert all(part.isfinite() for part in loss)
    assert all(part.grad.isfinite().all() and part.grad.any() for part in given)


def test_weight_of_the_match_over_all_images():
    *parts, match, targets = batch()
    losses = [nnm_loss(*parts, match, targets, entropy_weight=5.0, global_weight=w) for w in (0.0, 1.0, 2.5)]
    local = nnm_loss(*parts, match, None, entropy_weight=5.0)
    assert losses[0].total == local.total and local.global_match == 0 and losses[0].global_match > 0
    assert torch.allclose(losses[2].total - local.total, 2.5 * (losses[1].total - local.total))


# ── matches and score ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batch_matches_are_brute_force(dtype):
    features = logits(64, 12, seed=5).to(dtype)
    found = batch_match(features)
    assert found.tolist() == naive.nearest_other(features.double().tolist())
    assert found.dtype == torch.int64 and (found != torch.arange(64)).all()


def test_batch_matches_of_equal_rows_go_to_the_lowest_index():
    assert batch_match(torch.ones(5, 3)).tolist() == [1, 0, 0, 0, 0]
    assert batch_match(torch.full((33, 7), 0.1)).tolist() == [1] + [0] * 32
    twins = logits(4, 6, seed=6, scale=1e3).float().repeat(3, 1)
    assert batch_match(twins).tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3]
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert batch_match(line).tolist() == [1, 0, 1, 2]
    with pytest.raises(InputError, match="no other to match"):
        batch_match(torch.ones(1, 3))


def test_matches_over_all_images_are_brute_force():
    features, said = logits(70, 6, seed=7).float(), logits(70, 2, 5, seed=8).softmax(-1)
    near = naive.nearest_other(features.double().tolist())
    found = global_matches(features, said)
    assert found.shape == (2, 70, 5) and torch.equal(found, said[near].transpose(0, 1))


@pytest.mark.parametrize(("mode", "right"), [("aligned", True), ("visit_order", False)])
def test_row_of_an_image_is_about_that_image_if_aligned(mode, right):
    """Pairs of images that lie together and are of one class: the target of an image must be its own class."""
    of_class = torch.arange(60) // 2 % 6
    features = (100.0 * (torch.arange(60) // 2) + torch.arange(60) % 2)[:, None]
    planted = nn.functional.one_hot(of_class, 6).double()[:, None]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    table = global_matches(features, planted, visited=None if mode == "aligned" else order)[0]
    hits = int((table.argmax(1) == of_class).sum())
    assert hits == 60 if right else hits < 25
    if not right:
        assert torch.equal(table[torch.argsort(order)].argmax(1), of_class), "rows stand in the order of the visit"


@may_collapse
@pytest.mark.parametrize("mode", ["aligned", "visit_order", "off"])
def test_fit_reads_the_table_by_the_index_of_the_image(fitted, seen, monkeypatch, mode):
    planted = nn.functional.one_hot(torch.arange(32) % 3, 3).float().expand(2, 32, 3)
    batches, orders = [], []

    def plant(features: Tensor, probabilities: Tensor, *, visited: Tensor | None) -> Tensor:
        assert features.shape == (32, 32) and probabilities.shape == (32, 2, 3)
        orders.append(visited)
        return planted if visited is None else planted[:, visited]

    made = nnm._FromImages.pair
    monkeypatch.setattr(nnm, "global_matches", plant)
    monkeypatch.setattr(nnm._FromImages, "pair", lambda self, step: batches.append(step.indices) or made(self, step))
    fitted(n_epochs=4, global_targets=mode)
    assert len(seen) == len(batches) == 12
    assert all(targets is None for _, _, targets in seen[:3]), "the first epoch has no table yet"
    if mode == "off":
        assert not orders and all(targets is None for _, _, targets in seen)
        return
    assert len(orders) == 3, "none is made after the last epoch"
    hits = [bool((targets.argmax(-1) == rows % 3).all())
            for (_, _, targets), rows in zip(seen[3:], batches[3:], strict=True)]
    assert all(hits) if mode == "aligned" else not any(hits)
    if mode == "visit_order":
        assert not torch.equal(orders[0], orders[1]), "a new order every epoch"
        assert all(torch.equal(order.sort().values, torch.arange(32)) for order in orders)


def test_score_is_the_formula():
    p = logits(40, 4, seed=1).softmax(1)
    near = torch.randint(40, (40, 5), generator=torch.Generator().manual_seed(2))
    assert selection_score(p, near) == pytest.approx(naive.nnm_score(p.tolist(), near.tolist()), rel=1e-12)


def test_score_of_known_assignments(monkeypatch):
    sure = torch.eye(5).repeat(6, 1)
    near = torch.arange(30).add(5).remainder(30)[:, None]
    floor = math.log1p(4 / math.e)
    assert selection_score(sure, near) == pytest.approx(floor - math.log(5))
    assert selection_score(torch.full((30, 5), 0.2), near) == pytest.approx(math.log(5))
    alone = torch.zeros(30, 5)
    alone[:, 2] = 1  # empty columns have no product with any column
    expected = (math.log(math.e + 4) - 1 + 4 * math.log(5)) / 5
    assert selection_score(alone, near) == pytest.approx(expected)
    monkeypatch.setattr(nnm, "_ROWS", 7)
    assert selection_score(sure, near) == pytest.approx(floor - math.log(5)), "whatever the block"


# ── what a fit does ───────────────────────────────────────────────────────────────────────────────────────────────


@may_collapse
def test_history_tells_every_part_of_the_loss(fitted):
    found = fitted(n_epochs=3, lr=1e-9, n_clusters=10, batch_size=32)
    for record in found.history_:
        parts = record["consistency"] + record["class_contrast"] + record["global_match"] - 5 * record["entropy"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
        assert record["consistency"] == pytest.approx(math.log(10), abs=0.4), "a fresh network is nearly undecided"
        assert record["class_contrast"] == pytest.approx(math.log(10), abs=0.1)
        assert {"score", "head", "epoch", "stage"} <= record.keys()
    assert found.history_[0]["global_match"] == 0 < found.history_[1]["global_match"]


@may_collapse
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("update", "optimizer"), [("all", "Adam"), ("heads", "SGD")])
def test_what_trains_receives_a_gradient_and_what_is_frozen_none(noise, noise_neighbors, encoder, monkeypatch, update,
                                                                 optimizer, precision):
    gradients: dict[int, Tensor] = {}
    kind = getattr(torch.optim, optimizer)
    step = kind.step

    def watched(self: torch.optim.Optimizer) -> None:
        gradients.update({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})
        step(self)

    nets = []
    loop = nnm.Loop
    monkeypatch.setattr(kind, "step", watched)
    monkeypatch.setattr(nnm, "Loop", lambda *a, **k: nets.append(k["state"]["net"]) or loop(*a, **k))
    before = copy.deepcopy(encoder)
    found = tiny(update=update, optimizer=optimizer.lower()).fit(
        noise, neighbors=noise_neighbors, encoder=encoder.train(), device=choose_device("cpu", precision))
    trained = nets[0] if update == "all" else nets[0].heads
    assert gradients.keys() == {id(p) for p in trained.parameters()}
    assert all(grad.isfinite().all() and grad.any() for grad in gradients.values())
    assert equal(encoder, before) and encoder.training, "the caller's encoder is never changed"
    assert equal(found.net_.encoder, before) == (update == "heads")


def test_ten_steps_give_the_recorded_losses(fitted, seen, recorded):
    fitted(n_epochs=5, batch_size=16, lr=1e-3)
    recorded("nnm", [loss.total.sum().item() for loss, _, _ in seen])


def test_a_step_takes_each_image_and_one_of_its_neighbors_or_itself(noise, noise_neighbors, encoder,
                                                                              monkeypatch):
    source = nnm._FromImages(noise, noise_neighbors, encoder, None, tiny(), choose_device("cpu"))
    taken: list[Tensor] = []
    take = source.pixels.take
    monkeypatch.setattr(source.pixels, "take", lambda rows: taken.append(rows) or take(rows))
    for step in nnm.Loop("cluster", nnm.Order(32, 32, 0), n_epochs=40, state={}, seed=0):
        batch, partner = source.pair(step)
        assert batch.shape == partner.shape == (32, 16, 16, 3)
    anchors, partners = (torch.cat([rows.chunk(2)[part] for rows in taken]).numpy() for part in range(2))
    table = np.concatenate([np.arange(32)[:, None], noise_neighbors.indices], axis=1)
    columns = table[anchors] == partners[:, None]
    assert (columns.sum(axis=1) == 1).all()
    shares = columns.mean(axis=0)  # of 1,280 draws: the deviation is 0.01
    assert shares == pytest.approx([1 / 6] * 6, abs=0.045), "the image itself is one of k + 1 candidates"


@may_collapse
def test_matches_of_a_batch_come_from_the_anchors_embeddings(fitted, monkeypatch):
    met = []
    monkeypatch.setattr(nnm, "batch_match", lambda features: met.append(features) or batch_match(features))
    fitted(n_epochs=1, batch_size=16)
    assert [tuple(features.shape) for features in met] == [(16, 32), (16, 32)]
    lengths = met[0].norm(dim=1)
    assert not torch.allclose(lengths, torch.ones_like(lengths)), "not normalised"


@may_collapse
@pytest.mark.parametrize(("view", "alike"), [("clean", True), ("augmented", False)])
def test_table_of_all_images_is_made_in_evaluation_mode_of_the_views_asked_for(fitted, noise, monkeypatch, view, alike):
    tables, modes = [], []
    make = nnm._FromImages.match_all

    def spy(self: nnm._FromImages, net: nn.Module, epoch: int) -> Tensor:
        with torch.no_grad():
            modes.append(net.training)
            features = copy.deepcopy(net).eval().embed(WIDE.plain()(torch.from_numpy(noise.array), torch.Generator()))
            tables.append((global_matches(features, net.heads.probabilities(features)), make(self, net, epoch)))
        return tables[-1][1]

    monkeypatch.setattr(nnm._FromImages, "match_all", spy)
    fitted(n_epochs=3, update="heads", global_view=view)
    assert len(tables) == 2
    assert all(torch.allclose(mine, made, atol=1e-5) == alike for mine, made in tables)


@may_collapse
@pytest.mark.parametrize(("n", "batch_size", "drop_last", "sizes"), [
    (32, 12, False, [12, 12, 8]), (32, 12, True, [12, 12]), (32, 31, False, [31]), (32, 100, False, [32]),
    (31, 10, False, [10, 10, 10]), (5, 2, False, [2, 2]),
])
def test_short_last_batch_is_kept_unless_it_is_one_image(noise, encoder, seen, n, batch_size, drop_last, sizes):
    some = noise.select(np.arange(n))
    near = find_neighbors(some.array.reshape(n, -1).astype(np.float32), 3)
    found = tiny(n_epochs=1, batch_size=batch_size, drop_last=drop_last).fit(some, neighbors=near, encoder=encoder)
    assert [len(match) for _, match, _ in seen] == sizes
    assert found.labels_.shape == (n,) and found.epoch_labels_.shape == (1, n)


@may_collapse
def test_the_head_and_epoch_with_the_lowest_score_are_kept(noise, noise_neighbors, encoder):
    method = tiny(n_heads=3, n_epochs=6, lr=3.0, optimizer="sgd", momentum=0.0, update="heads", batch_size=16)
    found = method.fit(noise, neighbors=noise_neighbors, encoder=encoder)
    scores = [record["score"] for record in found.history_]
    assert found.epoch_ == 1 + int(np.argmin(scores)) < 6, "at this learning rate the last epoch is not the best"
    assert found.score_ == min(scores) and found.head_ == found.history_[found.epoch_ - 1]["head"]
    near = torch.from_numpy(noise_neighbors.indices)
    assert selection_score(torch.from_numpy(found.probabilities_), near) == pytest.approx(found.score_, rel=1e-5)
    assert np.array_equal(found.epoch_labels_[found.epoch_ - 1], found.labels_)
    last = clone(method).set_params(select="last").fit(noise, neighbors=noise_neighbors, encoder=encoder)
    assert last.epoch_ == 6 and last.score_ == scores[-1]
    assert np.array_equal(last.epoch_labels_[-1], last.labels_)
    assert np.array_equal(last.epoch_labels_, found.epoch_labels_), "what is kept changes nothing of the training"


@may_collapse
def test_score_and_labels_of_epochs_are_those_of_the_watched_images(fitted, noise):
    held_out = noise.select(np.arange(10))
    few = find_neighbors(held_out.array.reshape(10, -1).astype(np.float32), 4)
    found = fitted(n_selection_neighbors=2, watched=(held_out, few), n_epochs=3)
    expected = selection_score(torch.from_numpy(found.predict_proba(held_out)), torch.from_numpy(few.indices[:, :2]))
    assert found.score_ == pytest.approx(expected, rel=1e-5)
    assert found.probabilities_.shape == (32, 3) and found.epoch_labels_.shape == (3, 10)
    assert np.array_equal(found.epoch_labels_[found.epoch_ - 1], found.predict(held_out))
    assert found.epoch_labels_.dtype == np.int16


@may_collapse
def test_weight_zero_is_off_and_makes_no_table(fitted, monkeypatch):
    monkeypatch.setattr(nnm, "global_matches", lambda *a, **k: pytest.fail("no table is needed"))
    none, off = fitted(global_weight=0.0), fitted(global_targets="off")
    assert equal(none.net_, off.net_) and none.history_ == off.history_


# ── what comes out ────────────────────────────────────────────────────────────────────────────────────────────────


def test_recovers_colors(colors, color_neighbors, encoder):
    images, true = colors
    found = tiny(n_heads=1, views=CALM, n_epochs=20, batch_size=30).fit(
        images, neighbors=color_neighbors, encoder=encoder)
    assert hungarian_accuracy(true, found.labels_) > 0.95
    assert np.array_equal(found.predict(images), found.labels_)
    assert found.labels_.dtype == np.int64 and found.probabilities_.dtype == np.float32
    np.testing.assert_array_equal(found.predict_proba(images), found.probabilities_)
    np.testing.assert_allclose(found.probabilities_.sum(axis=1), 1, rtol=1e-5)
    assert not found.net_.training and found.net_.heads.n_heads == 1


def test_all_images_in_one_cluster_is_a_collapse_and_warned_of(fitted):
    with pytest.warns(CollapseWarning, match="all 32 images into one of 3 clusters"):
        fitted(entropy_weight=-5.0, n_epochs=3, lr=0.3, select="last", update="heads", optimizer="sgd")


def test_one_cluster_and_duplicated_images_are_no_trouble(encoder):
    same = ImageSet(np.full((10, 16, 16, 3), 90, np.uint8), [str(i) for i in range(10)])
    near = find_neighbors(np.ones((10, 2), np.float32), 3)
    found = tiny(n_clusters=1, batch_size=5).fit(same, neighbors=near, encoder=encoder)
    assert found.labels_.tolist() == [0] * 10
    with pytest.warns(CollapseWarning):
        found = tiny(n_clusters=2, batch_size=5).fit(same, neighbors=near, encoder=encoder)
    assert np.isfinite(found.probabilities_).all()


# ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"global_targets": "visit_order"}, {"update": "heads", "select": "last"},
                                     {"global_view": "clean", "optimizer": "sgd"}])
@pytest.mark.parametrize("call", [2, 6])
@may_collapse
def test_killed_and_started_again_it_ends_bit_equal(fitted, killed, tmp_path, monkeypatch, options, call):
    whole = fitted(n_epochs=3, batch_size=16, **options)  # 3 epochs of 2 steps
    with killed(nnm, "nnm_loss", call):
        fitted(tmp_path, n_epochs=3, batch_size=16, **options)
    steps = []
    monkeypatch.setattr(nnm, "nnm_loss", lambda *a, **k: steps.append(0) or nnm_loss(*a, **k))
    for _ in range(2):  # and a finished fit is not done again
        again = fitted(tmp_path, n_epochs=3, batch_size=16, **options)
        assert len(steps) == 6 - (call - 1)
        assert equal(again.net_, whole.net_) and again.history_ == whole.history_
        assert np.array_equal(again.probabilities_, whole.probabilities_)
        assert np.array_equal(again.epoch_labels_, whole.epoch_labels_)
        assert (again.head_, again.epoch_, again.score_) == (whole.head_, whole.epoch_, whole.score_)


@may_collapse
def test_checkpoint_holds_the_table_of_targets(fitted, killed, tmp_path):
    with killed(nnm, "nnm_loss", 6):
        fitted(tmp_path, n_epochs=3, batch_size=16)
    memory = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["memory"]
    assert memory["targets"].shape == (2, 32, 3) and torch.allclose(memory["targets"].sum(2), torch.ones(2, 32))
    assert memory["labels"].shape == (3, 32)


@may_collapse
def test_checkpoint_of_other_options_images_neighbors_or_encoder_is_refused(noise, noise_neighbors, encoder, tmp_path):
    def fit(images: ImageSet = noise, neighbors: Neighbors = noise_neighbors, **options: object) -> None:
        tiny(n_epochs=1, **options).fit(images, neighbors=neighbors, encoder=encoder, folder=tmp_path)

    fit()
    fit()
    others = Neighbors(noise_neighbors.indices[:, :4], noise_neighbors.similarities[:, :4])
    for changed in ({"global_targets": "off"}, {"images": ImageSet(255 - noise.array, noise.ids)},
                    {"neighbors": others}):
        with pytest.raises(InputError, match="other options or images"):
            fit(**changed)
    with torch.no_grad():
        encoder.bn1.bias += 1
    with pytest.raises(InputError, match="other options or images"):
        fit()


@may_collapse
def test_same_seed_same_clusters_and_another_seed_others(fitted):
    once, again, other = (fitted(random_state=seed) for seed in (0, 0, 1))
    assert equal(once.net_, again.net_) and not equal(once.net_, other.net_)


# ── the contract, and misuse ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
@may_collapse
def test_scikit_learn_contract(fitted, noise, noise_neighbors, encoder):
    method = tiny(entropy_weight=4.0)
    assert method.get_params() == clone(method).get_params() == NNM(**method.get_params()).get_params()
    assert method.set_params(lr=0.3) is method and method.lr == 0.3
    odd = object()
    assert NNM(n_clusters=odd).n_clusters is odd, "the constructor stores and does not judge"
    with pytest.raises(NotFittedError):
        method.predict(noise)
    labels = tiny().fit_predict(noise, neighbors=noise_neighbors, encoder=encoder)
    assert np.array_equal(labels, fitted().labels_)


def test_defaults_are_the_published_configuration():
    expected = {"n_clusters": 10, "n_heads": 3, "entropy_weight": 5.0, "global_targets": "aligned",
                "global_view": "augmented", "global_weight": 1.0, "update": "all", "select": "label_free",
                "n_selection_neighbors": 5, "optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-4, "n_epochs": 100,
                "batch_size": 200, "drop_last": False}
    published = NNM().get_params()
    assert {name: published[name] for name in expected} == expected
    assert published["views"] == Views("strong", 32, cutout=16)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "said"), [
    ({"n_clusters": 0}, "n_clusters must be at least 1, got 0"), ({"n_heads": 0}, "n_heads must be at least 1"),
    ({"n_clusters": 33}, r"n_clusters=33 needs at least 33 images, got 32\. hint: lower n_clusters"),
    ({"n_selection_neighbors": 0}, "n_selection_neighbors must be at least 1"), ({"batch_size": 1}, "batch_size must"),
    ({"n_epochs": 0}, "n_epochs must be at least 1"), ({"global_weight": math.nan}, "global_weight must be"),
    ({"global_weight": -1.0}, "global_weight must be at least 0, got -1"),
    ({"optimizer": "adamw"}, r"optimizer='adamw' is not allowed\. hint: did you mean adam"),
    ({"update": "head"}, r"update='head' is not allowed\. hint: did you mean heads"),
    ({"global_targets": "align"}, "did you mean aligned"), ({"global_view": "plain"}, "global_view='plain'"),
    ({"select": "oracle"}, "select='oracle'"),
    ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"), ({"batch_size": 0}, "batch_size must be at least 2"),
    ({"momentum": -1.0}, "momentum must be at least 0 and below 1, got -1.0"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
])
def test_options_that_cannot_be_used_are_refused_before_any_work(fitted, options, said):
    with pytest.raises(InputError, match=said):
        fitted(**options)
    if "needs at least" not in said:
        assert re.search(said, str(next(tiny(**options).option_faults()))), "and can be told without the images"


def test_an_encoder_and_neighbors_of_these_images_are_needed(noise, noise_neighbors, encoder):
    with pytest.raises(InputError, match="needs an encoder"):
        tiny().fit(noise, neighbors=noise_neighbors)
    with pytest.raises(InputError, match="needs the neighbors"):
        tiny().fit(noise, encoder=encoder)
    none = np.empty((32, 0), np.int64)
    for wrong in (find_neighbors(np.eye(40), 5), Neighbors(none, none.astype(np.float32))):
        with pytest.raises(InputError, match="belong to another set"):
            tiny().fit(noise, neighbors=wrong, encoder=encoder)
        with pytest.raises(InputError, match="belong to another set"):
            tiny().fit(noise, neighbors=noise_neighbors, encoder=encoder, watched=(noise, wrong))
    one = noise.select(np.arange(1))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        tiny(n_clusters=1).fit(one, neighbors=noise_neighbors, encoder=encoder)


def test_a_loss_that_is_not_finite_ends_the_fit_and_says_where(fitted, monkeypatch):
    calls = []

    def broken(*logits: Tensor | None, **options: float) -> NnmLoss:
        calls.append(0)
        loss = nnm_loss(*logits, **options)
        return loss._replace(total=loss.total * (math.nan if len(calls) == 3 else 1.0))

    monkeypatch.setattr(nnm, "nnm_loss", broken)
    with pytest.raises(NonFiniteLossError, match="cluster: the loss is not finite at step 2"):
        fitted()


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_weights_lost_in_the_last_step_of_an_epoch_are_noticed(fitted, monkeypatch, n_epochs):
    step = torch.optim.Adam.step

    def breaking(self: torch.optim.Adam) -> None:
        step(self)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.fill_(math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", breaking)
    with pytest.raises(NonFiniteLossError, match="cluster: the weights are not finite"):
        fitted(n_epochs=n_epochs, batch_size=32)


def test_many_heads_are_as_many_fits_of_one_head(noise, noise_neighbors, encoder, tmp_path, monkeypatch):
    both = ClusterHeads(32, 3, 2)
    both.initialise(torch.Generator().manual_seed(0))

    def fit(name: str, *heads: int) -> dict[str, Tensor]:
        def same(self: ClusterHeads, generator: torch.Generator) -> None:
            self.weight.data = both.weight.data[list(heads)].clone()
            self.bias.data = both.bias.data[list(heads)].clone()

        monkeypatch.setattr(ClusterHeads, "initialise", same)
        tiny(n_heads=len(heads), n_epochs=2, update="heads", lr=0.03, select="last").fit(
            noise, neighbors=noise_neighbors, encoder=encoder, folder=tmp_path / name)
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]["net"]

    together, first, second = fit("both", 0, 1), fit("first", 0), fit("second", 1)
    for part in ("heads.weight", "heads.bias"):
        torch.testing.assert_close(together[part][:1], first[part], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[part][1:], second[part], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first["heads.weight"], second["heads.weight"], atol=1e-2)


# ── embeddings ────────────────────────────────────────────────────────────────────────────────────────────────────


def blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return 60 Gaussian embeddings in 8 dimensions, in three blobs, and their classes."""
    true = np.repeat(np.arange(3), 20)
    return (np.random.default_rng(seed).normal(0, 0.3, (60, 8)) + 2 * np.eye(8)[true]).astype(np.float32), true


def on_rows(**options: object) -> NNM:
    return tiny(**{"n_epochs": 20, "batch_size": 20, "lr": 0.05} | options)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"global_targets": "off"}], ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_recovers_blobs_of_embeddings_and_gives_the_parts(options, several):
    rows, true = blobs()
    given = [rows[:, :3], 40 * rows[:, 3:]] if several else rows
    found = on_rows(**options).fit(given)
    assert hungarian_accuracy(true, found.labels_) == 1.0 and found.n_features_in_ == 8
    np.testing.assert_allclose(found.predict_proba(given), found.probabilities_, atol=1e-6)
    projection, heads = found.as_parts()
    raw = torch.from_numpy(np.concatenate(given, axis=1) if several else rows)
    with torch.no_grad():
        np.testing.assert_allclose(heads.probabilities(projection(raw))[:, 0], found.probabilities_, atol=1e-5)
    with pytest.raises(InputError, match="embeddings of 2 features do not fit heads of"):
        found.predict(rows[:, :2])


def test_neighbors_of_embeddings_are_found_or_given_and_the_nearest_found_once(monkeypatch):
    rows, _ = blobs()
    once = on_rows(n_epochs=3).fit(rows)
    calls, nearest = [], nnm._nearest
    monkeypatch.setattr(nnm, "_nearest", lambda features: calls.append(0) or nearest(features))
    again = on_rows(n_epochs=3).fit(rows, neighbors=find_neighbors(rows, 20))
    assert np.array_equal(once.probabilities_, again.probabilities_) and len(calls) == 1
    with pytest.raises(InputError, match="belong to another set"):
        on_rows().fit(rows, neighbors=find_neighbors(rows[:30], 5))


@pytest.mark.parametrize("call", [2, 5])
def test_a_fit_on_embeddings_goes_on_bit_equal(killed, tmp_path, call):
    rows, _ = blobs()
    whole = on_rows(n_epochs=3).fit(rows)
    with killed(nnm, "nnm_loss", call):
        on_rows(n_epochs=3).fit(rows, folder=tmp_path)
    again = on_rows(n_epochs=3).fit(rows, folder=tmp_path)
    assert equal(again.net_, whole.net_) and again.history_ == whole.history_


def test_images_and_embeddings_are_not_mixed_up(fitted, noise):
    rows, _ = blobs()
    with pytest.raises(InputError, match="without an encoder and watched images"):
        on_rows().fit(rows, encoder=nn.Identity())
    with pytest.raises(InputError, match="has no encoder"):
        on_rows(n_epochs=1).fit(rows).predict(noise)
    of_images = fitted(n_epochs=1)
    with pytest.raises(InputError, match="the fit was on images"):
        of_images.predict(rows)
    with pytest.raises(InputError, match="has no parts"):
        of_images.as_parts()
