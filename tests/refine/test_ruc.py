"""RUC: its equations against loops and golden values, a pass against the published one, and the contract."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

import naive
from phyla.classifier import Classifier
from phyla.errors import CollapseWarning, InputError, NonFiniteLossError, PhylaWarning
from phyla.evaluate.matching import hungarian_accuracy
from phyla.images.augment import Views
from phyla.images.batches import Order
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterHeads, ClusterNet, Projection, summed
from phyla.nets.resnet import EncoderSpec, Ensemble, ResNet
from phyla.overrides import change
from phyla.quality import label_free_temperature, neighbor_agreement, supported_share
from phyla.randomness import generator
from phyla.recipes import recipe
from phyla.refine import ruc
from phyla.refine.ruc import (
    RUC,
    Marks,
    co_refine,
    guess,
    masked_losses,
    mixed_losses,
    mixing_share,
    neighbor_vote,
    ramp,
    sharpen,
    smoothed_cross_entropy,
)
from phyla.training.device import choose_device
from phyla.training.schedule import cosine
from phyla.types import Embeddings, ImageSet, Neighbors

# Noise has no classes: on it clusters may get lost, and where that matters a test asks for the warning.
pytestmark = [pytest.mark.usefixtures("warm"), pytest.mark.filterwarnings("ignore::phyla.errors.PhylaWarning")]
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ruc.npz", allow_pickle=False)
VIEWS = Views("ruc_strong", 16, cutout=4)


def tiny(**options: object) -> RUC:
    """Return a method for the noise: two batches a pass, the last one short."""
    return RUC(**({"views": VIEWS, "split": "confidence", "confidence_threshold": 0.93, "refurbish_threshold": 0.55,
                   "n_epochs": 2, "batch_size": 20, "ramp_length": 4} | options))


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[f"ruc_{name}"])


def table(batch: int, clusters: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Return logits in float64."""
    return scale * torch.randn(batch, clusters, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(net: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in net.state_dict().values()])


def equal(a: RUC, b: RUC) -> bool:
    same = [torch.equal(flat(x), flat(y)) for x, y in zip([*a.nets_, a.net_], [*b.nets_, b.net_], strict=True)]
    arrays = ("probabilities_", "labels_", "clean_", "initial_clean_", "member_labels_")
    return all(same) and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)


@pytest.fixture
def net(noise: ImageSet, encoder: ResNet) -> ClusterNet:
    """Return an untrained network of four clusters, of which about half of the noise is clearly in one."""
    heads = ClusterHeads(32, 4)
    heads.initialise(torch.Generator().manual_seed(1))
    views = VIEWS.plain()(torch.from_numpy(noise.array), generator(0))
    with torch.no_grad():
        for _ in range(20):
            seen = encoder.train()(views)  # which sets the statistics of BatchNorm
        heads.weight *= 20
        heads.bias.copy_(-heads(seen)[0].mean(dim=0))
    return ClusterNet(encoder.eval(), heads)


@pytest.fixture
def noise_embeddings(noise: ImageSet) -> Embeddings:
    return Embeddings(noise.array.reshape(len(noise), -1)[:, ::40].astype(np.float32), noise.ids)


# ── the equations ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("batch", "clusters"), [(1, 2), (9, 5)])
def test_targets_are_the_formulas(batch, clusters, temperature):
    p = torch.stack([table(batch, clusters, seed).softmax(1) for seed in range(4)])
    labels, weight = torch.arange(batch) % clusters, torch.linspace(0, 1, batch, dtype=torch.float64)
    for ours, theirs in (
        (sharpen(p[0], temperature=temperature), [naive.sharpen(row, temperature=temperature) for row in p[0]]),
        (guess(p, temperature=temperature), naive.guess(p, temperature=temperature)),
        (co_refine(labels, p[0], weight, temperature=temperature),
         naive.co_refine(labels, p[0], weight, temperature=temperature)),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize(("n_clean", "n_noisy"), [(5, 4), (1, 7), (0, 4), (4, 0)])
def test_losses_are_the_formulas(n_clean, n_noisy):
    x, t = table(n_clean, 3, 1), table(n_clean, 3, 3).softmax(1)
    u, v = table(n_noisy, 3, 2), table(n_noisy, 3, 4).softmax(1)
    expected = naive.mixed_losses(x, t, u, v, noisy_weight=25.0)
    np.testing.assert_allclose(mixed_losses(x, t, u, v, noisy_weight=25.0), expected, rtol=1e-12)
    order = torch.randperm(n_clean + n_noisy, generator=torch.Generator().manual_seed(0))
    clean = (torch.arange(n_clean + n_noisy) < n_clean)[order]
    masked = masked_losses(torch.cat([x, u])[order], torch.cat([t, v])[order], clean, noisy_weight=25.0)
    np.testing.assert_allclose(masked, expected, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_smoothed_cross_entropy_is_the_formula_on_the_rows_that_count(smoothing):
    logits, labels = table(7, 4), torch.tensor([0, 3, 1, 1, 2, 0, 3])
    expected = naive.smoothed_cross_entropy(logits, labels, smoothing=smoothing)
    assert float(smoothed_cross_entropy(logits, labels, smoothing=smoothing)) == pytest.approx(expected, rel=1e-12)
    rows = torch.tensor([True, False, True, True, False, False, True])
    some = smoothed_cross_entropy(logits, labels, smoothing=smoothing, rows=rows)
    expected = naive.smoothed_cross_entropy(logits[rows], labels[rows], smoothing=smoothing)
    assert float(some) == pytest.approx(expected, rel=1e-12)


def test_golden_targets():
    temperature = float(GOLDEN["ruc_sharpen_temperature"])
    np.testing.assert_allclose(guess(golden("guess_inputs"), temperature=temperature), GOLDEN["ruc_guess"], rtol=1e-9)
    refined = co_refine(golden("corefine_labels"), golden("corefine_peer"), golden("corefine_weight"),
                        temperature=temperature)
    np.testing.assert_allclose(refined, GOLDEN["ruc_corefine"], rtol=1e-9)


@pytest.mark.parametrize(("epoch", "name"), [(0, "0"), (50.5, "50.5"), (200, "200")])
def test_golden_mixed_losses(epoch, name):
    x, u = golden("logits_x").requires_grad_(), golden("logits_u").requires_grad_()
    weight = float(GOLDEN["ruc_unlabeled_weight"]) * ramp(epoch)
    clean, noisy = mixed_losses(x, golden("targets_x"), u, golden("targets_u"), noisy_weight=weight)
    assert clean.item() == pytest.approx(float(GOLDEN[f"ruc_Lx_epoch{name}"]), rel=1e-9)
    assert noisy.item() == pytest.approx(float(GOLDEN[f"ruc_Lu_epoch{name}"]), rel=1e-9)
    (clean + noisy).backward()
    np.testing.assert_allclose(x.grad, GOLDEN["ruc_grad_x"], rtol=1e-9, atol=1e-14)
    share = ramp(epoch) / ramp(200)
    np.testing.assert_allclose(u.grad, share * GOLDEN["ruc_grad_u_epoch200"], rtol=1e-9, atol=1e-14)


def test_golden_smoothed_cross_entropy():
    logits = golden("smooth_logits").requires_grad_()
    loss = smoothed_cross_entropy(logits, golden("smooth_labels"), smoothing=float(GOLDEN["ruc_smoothing"]))
    loss.backward()
    assert loss.item() == pytest.approx(float(GOLDEN["ruc_smooth_value"]), rel=1e-9)
    np.testing.assert_allclose(logits.grad, GOLDEN["ruc_smooth_grad"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_golden_vote(as_tensor):
    values, labels = GOLDEN["ruc_vote_embeddings"], GOLDEN["ruc_vote_labels"]
    given = (torch.from_numpy(values), torch.from_numpy(labels)) if as_tensor else (values, labels)
    voters = int(GOLDEN["ruc_vote_k"])
    clean, tied = neighbor_vote(*given, n_neighbors=voters), GOLDEN["ruc_vote_tied"]
    assert clean.dtype == bool and np.array_equal(clean[~tied], GOLDEN["ruc_vote_clean"][~tied])
    assert clean.tolist() == naive.neighbor_vote(values, labels, voters), "the tied ones by the rule"


def test_known_values():
    np.testing.assert_allclose(sharpen(torch.tensor([[0.5, 0.3, 0.2]]), temperature=0.5)[0], [0.6579, 0.2368, 0.1053],
                               atol=5e-5)
    assert [ramp(t) for t in (0, 19, 20, 100, 200, 999)] == [0.1, 0.1, 0.1, 0.5, 1.0, 1.0]
    assert ramp(3, length=4) == 0.75
    assert cosine(100, n_epochs=200, lr=0.01) == pytest.approx(0.005)


@pytest.mark.parametrize(("clusters", "floor"), [(10, 1.7918), (20, 2.1654)])
def test_smoothing_by_a_half_is_least_where_the_label_has_half_the_probability(clusters, floor):
    logits = torch.zeros(1, clusters, dtype=torch.float64)
    logits[0, 0] = math.log(clusters - 1)
    logits.requires_grad_()
    loss = smoothed_cross_entropy(logits, torch.tensor([0]), smoothing=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(floor, abs=5e-5) and logits.softmax(1)[0, 0].item() == pytest.approx(0.5)
    assert logits.grad.abs().max() < 1e-15


def test_a_label_without_a_trusted_peer_stays_one_hot():
    peer = table(5, 3).softmax(1)
    one_hot = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]]
    assert torch.equal(co_refine(torch.tensor([0, 1, 2, 0, 1]), peer, torch.zeros(5), temperature=0.5), one_hot)
    trusted = co_refine(torch.tensor([0, 1, 2, 0, 1]), peer, torch.ones(5), temperature=1.0)
    torch.testing.assert_close(trusted, peer)


def test_targets_and_losses_follow_a_permutation_of_clusters_and_images():
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(8, generator=draw), torch.randperm(5, generator=draw)
    place = columns.argsort()
    p, labels, weight = table(8, 5).softmax(1), torch.arange(8) % 5, torch.rand(8, generator=draw)
    refined = co_refine(labels, p, weight, temperature=0.5)
    torch.testing.assert_close(co_refine(place[labels], p[:, columns], weight, temperature=0.5), refined[:, columns])
    clean, logits = torch.rand(8, generator=draw) < 0.5, table(8, 5, 9)
    losses = masked_losses(logits, refined, clean, noisy_weight=2.0)
    other = masked_losses(logits[rows][:, columns] + 7, refined[rows][:, columns], clean[rows], noisy_weight=2.0)
    torch.testing.assert_close(other, losses)
    strong = smoothed_cross_entropy(logits, labels, smoothing=0.5, rows=clean)
    again = smoothed_cross_entropy(logits[rows][:, columns], place[labels][rows], smoothing=0.5, rows=clean[rows])
    torch.testing.assert_close(again, strong)


@pytest.mark.parametrize("clean", [True, False])
def test_an_empty_side_gives_zero_with_a_graph(clean):
    logits = table(6, 3).requires_grad_()
    side = torch.full((6,), clean)
    losses = masked_losses(logits, table(6, 3, 1).softmax(1), side, noisy_weight=25.0)
    empty = losses[1] if clean else losses[0]
    assert empty.item() == 0 and empty.requires_grad and losses[0 if clean else 1] > 0
    strong = smoothed_cross_entropy(logits, torch.zeros(6, dtype=torch.int64), smoothing=0.5, rows=side)
    assert (strong.item() == 0) == (not clean)
    (sum(losses) + strong).backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


def test_very_sharp_targets_do_not_vanish():
    p = torch.full((1, 10), 0.1)
    p[0, :2] = torch.tensor([0.101, 0.099])
    sharp = sharpen(p, temperature=0.005)  # 0.1 ** 200 is zero in float32
    assert sharp.isfinite().all() and float(sharp.sum()) == pytest.approx(1) and int(sharp.argmax()) == 0


def test_gradients_are_those_of_the_formulas():
    logits, targets = table(6, 3), table(6, 3, 1).softmax(1)
    clean = torch.tensor([True, False, True, True, False, False])

    def total(z: np.ndarray) -> float:
        return sum(naive.mixed_losses(z[clean], targets[clean], z[~clean], targets[~clean], noisy_weight=9.0))

    moved = logits.clone().requires_grad_()
    sum(masked_losses(moved, targets, clean, noisy_weight=9.0)).backward()
    np.testing.assert_allclose(moved.grad, naive.gradient(total, logits.numpy()), atol=1e-7)


def test_mixing_shares_are_of_the_beta_distribution_folded_at_a_half():
    source = torch.Generator().manual_seed(0)
    shares = np.array([mixing_share(4.0, source) for _ in range(2000)])
    assert shares.min() >= 0.5 and len(np.unique(shares)) == 2000
    folded = np.random.default_rng(0).beta(4, 4, 200_000)
    assert shares.mean() == pytest.approx(np.maximum(folded, 1 - folded).mean(), abs=0.01)
    assert mixing_share(4.0, generator(3, "x")) == mixing_share(4.0, generator(3, "x"))
    assert np.mean([mixing_share(0.1, source) for _ in range(500)]) > 0.85, "small alphas hardly mix"


# ── the vote and the marks ────────────────────────────────────────────────────────────────────────────────────────

FIVE = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [0.0, 1.0], [0.1, 1.0]])


@pytest.mark.parametrize(("voters", "labels", "expected"), [
    (1, [0, 0, 1, 1, 0], [True, True, True, True, True]),  # each votes for itself alone
    (2, [0, 0, 1, 1, 0], [True, True, False, False, True]),  # ties of two: the lower label
    (3, [0, 0, 1, 1, 1], [True, True, False, True, True]),
    (5, [0, 0, 1, 1, 1], [False, False, True, True, True]),  # all vote
])
def test_votes_of_five_points_worked_by_hand(voters, labels, expected):
    assert neighbor_vote(FIVE, np.array(labels), n_neighbors=voters).tolist() == expected


def test_the_own_vote_counts():
    """Two of label 0 and one of label 1 beside each other: without its own vote the last of 0 would be a tie."""
    points, labels = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]]), np.array([1, 1, 0])
    with_self = neighbor_vote(points, labels, n_neighbors=3)
    others = find_neighbors(points, 2).indices
    without = [bool(np.bincount(labels[near]).argmax() == own) for near, own in zip(others, labels, strict=True)]
    assert with_self.tolist() == [True, True, False] and without == [False, False, False]


def test_vote_is_the_formula_in_any_block(monkeypatch):
    draw = np.random.default_rng(0)
    values, labels = draw.normal(size=(70, 6)), draw.integers(0, 4, 70)
    expected = naive.neighbor_vote(values, labels, 9)
    assert neighbor_vote(values, labels, n_neighbors=9).tolist() == expected
    monkeypatch.setattr("phyla.quality._GATHERED", 40)
    assert neighbor_vote(values, labels, n_neighbors=9).tolist() == expected
    assert neighbor_vote(Embeddings(values, [str(i) for i in range(70)]), torch.from_numpy(labels),
                         n_neighbors=9).tolist() == expected
    with pytest.raises(InputError, match="n_neighbors=71"):
        neighbor_vote(values, labels, n_neighbors=71)


def test_marks_grow_and_never_shrink():
    marks = Marks(torch.tensor([0, 1, 2, 0, 1]), torch.tensor([True, False, False, True, False]))
    p = torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.05, 0.95], [0.6, 0.4, 0.0]])
    marks.refurbish(torch.tensor([0, 1, 2]), p, threshold=0.9)
    assert marks.clean.tolist() == [True, True, False, True, False], "at the threshold counts; below does not"
    assert marks.labels.tolist() == [0, 2, 2, 0, 1], "a trusted label is never replaced"
    marks.refurbish(torch.tensor([1, 4]), torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]), threshold=0.9)
    assert marks.clean.tolist() == [True, True, False, True, True] and marks.labels.tolist() == [0, 2, 2, 0, 2]
    assert marks.initial.tolist() == [True, False, False, True, False]
    torch.testing.assert_close(marks.confidence, torch.tensor([0.9, 0.5, 0.6, 0.0, 1.0]))
    marks.end_pass(1)
    torch.testing.assert_close(marks.weight, torch.tensor([[0.0] * 5, [0.9, 0.5, 0.6, 0.0, 1.0]]))


def test_equal_confidences_weigh_nothing():
    marks = Marks(torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
    marks.confidence.fill_(0.7)
    marks.end_pass(0)
    assert torch.equal(marks.weight, torch.zeros(2, 3))


# ── a pass ────────────────────────────────────────────────────────────────────────────────────────────────────────


def published(method: RUC, net: ClusterNet, images: ImageSet, labels: Tensor, clean: Tensor
              ) -> tuple[list[ClusterNet], Tensor, Tensor]:
    """Return both networks, the labels and the mask after training as published: with lists of rows, and stacked so.

    Only the draws are ours: the order of the images, the views, the share and the partners.
    """
    nets = []
    for member in range(2):
        heads = ClusterHeads(net.heads.weight.shape[2], net.heads.n_clusters)
        heads.initialise(generator(method.random_state, "ruc heads", member))
        nets.append(ClusterNet(copy.deepcopy(net.encoder), heads.double()).train())
    optimizers = [torch.optim.SGD(each.parameters(), lr=method.lr, momentum=method.momentum, nesterov=True,
                                  weight_decay=method.weight_decay) for each in nets]
    order, n = Order(len(images), method.batch_size, method.random_state, drop_last=False), len(images)
    weights = [torch.zeros(n), torch.zeros(n)]
    weak, pixels = replace(method.views, kind="ruc_weak"), torch.from_numpy(images.array)
    for at in range(2 * method.n_epochs):
        e, a = divmod(at, 2)
        f_a, f_b, seen = nets[a], nets[1 - a], torch.zeros(n)
        for group in optimizers[a].param_groups:
            group["lr"] = method.lr * (1 + math.cos(math.pi * e / method.n_epochs)) / 2
        for it in range(order.steps_per_epoch):
            source = generator(method.random_state, "robust", at * order.steps_per_epoch + it)
            idx = order.indices(at, it)
            o, w1, w2, s = (views(pixels[idx], source) for views in (method.views.plain(), weak, weak, method.views))
            inside, y, w = clean[idx], labels[idx], weights[1 - a][idx]
            z_o, z_1, z_2, z_s = (f_a(x)[0] for x in (o, w1, w2, s))
            with torch.no_grad():
                r_o, r_1, r_2 = (f_b(x)[0].softmax(1) for x in (o, w1, w2))
                q = (z_1.softmax(1) + z_2.softmax(1) + r_1 + r_2)[~inside] / 4
                q = q**2 / (q**2).sum(1, keepdim=True)
                one_hot = nn.functional.one_hot(y[inside], r_o.shape[1])
                p = (1 - w[inside, None]) * one_hot + w[inside, None] * r_o[inside]
                p = p**2 / (p**2).sum(1, keepdim=True)
                confidence, predicted = z_o.softmax(1).max(1)
                seen[idx] = confidence.float()
                new = ~inside & (confidence >= method.refurbish_threshold)
                clean[idx[new]], labels[idx[new]] = True, predicted[new]
            share = mixing_share(method.mixup_alpha, source)
            partner = torch.randperm(2 * len(idx), generator=source)
            # Ours lie as [w1; w2], the published stack as [w1_X; w2_X; w1_U; w2_U]: the same pairs, found there.
            double = inside.repeat(2)
            stack = torch.cat([double.nonzero()[:, 0], (~double).nonzero()[:, 0]])
            views, targets = torch.cat([w1, w2])[stack], torch.cat([p, p, q, q])
            there = stack.argsort()[partner[stack]]
            mixed, mixed_t = (share * x + (1 - share) * x[there] for x in (views, targets))
            g, n_x = f_a(mixed)[0], 2 * int(inside.sum())
            loss = 0.0
            if n_x:
                soft = torch.full_like(z_s[inside], method.smoothing / (z_s.shape[1] - 1))
                soft[torch.arange(n_x // 2), y[inside]] = 1 - method.smoothing
                loss = -(mixed_t[:n_x] * g[:n_x].log_softmax(1)).sum(1).mean()
                loss = loss - (soft * z_s[inside].log_softmax(1)).sum(1).mean()
            if n_x < len(g):
                rho = min(max((e + it / (n // method.batch_size + 1)) / method.ramp_length, 0.1), 1.0)
                loss = loss + method.noisy_weight * rho * ((g[n_x:].softmax(1) - mixed_t[n_x:]) ** 2).mean()
            optimizers[a].zero_grad()
            loss.backward()
            optimizers[a].step()
        weights[a] = (seen - seen.min()) / (seen.max() - seen.min())
    return nets, labels, clean


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch, net: ClusterNet) -> ClusterNet:
    """Return the network in float64, with views in float64."""
    draw = Views.__call__
    monkeypatch.setattr(Views, "__call__", lambda self, *a, **k: draw(self, *a, **k).double())
    return net.double()


@pytest.mark.parametrize("options", [{}, {"refurbish_threshold": 0.0}, {"confidence_threshold": 0.0}],
                         ids=["usual", "all promoted at once", "all clean"])
def test_fixed_shapes_do_what_lists_of_rows_do(noise, exact, options):
    method = tiny(**options)
    p = exact.eval().probabilities(VIEWS.plain()(torch.from_numpy(noise.array), generator(0)))[:, 0].detach()
    confidence, labels = p.max(dim=1)
    start = confidence >= method.confidence_threshold
    assert (3 < int(start.sum()) < 29) == (method.confidence_threshold > 0)
    nets, labels, clean = published(method, exact, noise, labels.clone(), start.clone())
    fitted = method.fit(noise, net=exact)
    assert np.array_equal(fitted.initial_clean_, start.numpy()) and np.array_equal(fitted.clean_, clean.numpy())
    assert options or 0 < int(clean.sum() - start.sum()) < int((~start).sum()), "some, but not all, are promoted"
    for ours, theirs in zip(fitted.nets_, nets, strict=True):
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-9)


def test_every_weight_receives_a_gradient_in_its_own_pass_alone(noise, net, monkeypatch):
    seen: list[dict[int, Tensor]] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        seen.append({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    fitted = tiny(n_epochs=1).fit(noise, net=net.requires_grad_(False), device=choose_device("cpu", "bf16"))
    for at, grads in enumerate(seen):
        assert grads.keys() == {id(p) for p in fitted.nets_[at // 2].parameters()}
        assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    assert len(seen) == 4


def test_ten_steps_give_the_recorded_losses(noise, net, monkeypatch, recorded):
    seen = []
    original = ruc.Loop.watch
    monkeypatch.setattr(ruc.Loop, "watch", lambda self, loss, at: seen.append(loss.item()) or original(self, loss, at))
    tiny(n_epochs=3).fit(noise, net=net)
    recorded("ruc", seen[:10])


def test_two_networks_start_from_the_encoder_and_heads_of_their_own(noise, net):
    fitted = tiny(n_epochs=1, lr=1e-12).fit(noise, net=net)
    start = dict(net.encoder.named_parameters())
    for member in fitted.nets_:
        assert member.projection is None
        for name, value in member.encoder.named_parameters():
            torch.testing.assert_close(value, start[name], rtol=0, atol=1e-6)
        weight = member.heads.weight.detach()
        assert weight.abs().max() < 1 / math.sqrt(32) and weight.std() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.2)
    first, second = (member.heads.weight for member in fitted.nets_)
    assert not torch.allclose(first, second, atol=0.01)


def test_a_projection_is_dropped_and_the_encoder_keeps_its_width(noise, encoder):
    heads = ClusterHeads(8, 4)
    heads.initialise(torch.Generator().manual_seed(1))
    fitted = tiny(n_epochs=1, confidence_threshold=0.0).fit(noise, net=ClusterNet(encoder, heads, Projection(32, 8)))
    assert [member.heads.weight.shape for member in fitted.nets_] == [(1, 4, 32)] * 2


def test_both_networks_see_whole_batches_or_only_what_is_used(noise, net, monkeypatch):
    rows: list[tuple[int, int]] = []
    forward = ClusterNet.forward
    monkeypatch.setattr(ClusterNet, "forward", lambda self, views: (
        rows.append((len(views), int(self.training))), forward(self, views))[1])
    seen = {}
    for forwards in ("faithful", "cheap"):
        rows.clear()
        fitted = tiny(n_epochs=1, forwards=forwards).fit(noise, net=net)
        seen[forwards] = [n for n, training in rows if training]
        assert fitted.initial_clean_.sum() == 15
    assert seen["faithful"] == ([20] * 7 + [40] + [12] * 7 + [24]) * 2  # three views of either, strong, mixed
    assert sum(seen["cheap"]) < 0.85 * sum(seen["faithful"])
    sure = seen["cheap"][1]
    assert 1 < sure < 19 and seen["cheap"][:8] == [20, sure, *[20 - sure] * 4, 20, 40]


@pytest.mark.parametrize("threshold", [0.0, 0.9999])
def test_cheap_needs_no_side(noise, net, threshold):
    """With all images clean, or a single one, no batch of one image reaches BatchNorm."""
    small = replace(VIEWS, size=8, cutout=2)  # a single pixel in the last stage
    confidence = net.probabilities(small.plain()(torch.from_numpy(noise.array), generator(0)))[:, 0].amax(dim=1)
    bound = confidence.max().item() if threshold else 0.0
    fitted = tiny(views=small, forwards="cheap", confidence_threshold=bound, n_epochs=1, refurbish_threshold=2.0)
    fitted.fit(noise, net=net)
    assert fitted.clean_.sum() == (1 if threshold else 32) and np.isfinite(fitted.probabilities_).all()
    if not threshold:  # no image to guess: each saw plain, strong and mixed views, and its peer's plain ones, twice
        counts = [int(each.encoder.bn1.num_batches_tracked) for each in (*fitted.nets_, net)]
        assert counts[:2] == [counts[2] + 8] * 2


def test_a_lone_last_image_waits_for_another_pass(noise, net):
    small = replace(VIEWS, size=8, cutout=2)
    few = noise.select(np.arange(21))
    fitted = tiny(views=small, n_epochs=1, confidence_threshold=0.0).fit(few, net=net)
    assert len(fitted.labels_) == 21


# ── the split ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_splits_are_the_confidence_the_vote_and_both(noise, noise_embeddings, net):
    p = net.probabilities(VIEWS.plain()(torch.from_numpy(noise.array), generator(0)))[:, 0].detach().numpy()
    sure = p.max(axis=1) >= 0.93
    voters = 32 // 8
    vote = neighbor_vote(noise_embeddings, p.argmax(axis=1), n_neighbors=voters)
    expected = {"confidence": sure, "metric": vote, "hybrid": sure & vote}
    assert len({mask.tobytes() for mask in expected.values()}) == 3
    for split, mask in expected.items():
        fitted = tiny(split=split, n_epochs=1, lr=1e-9).fit(noise, net=net, embeddings=noise_embeddings)
        assert np.array_equal(fitted.initial_clean_, mask) and fitted.n_voters_ == voters
        told = any("asked 4 and not 100 neighbors" in notice for notice in fitted.notices_)
        assert told == (split != "confidence")
        assert np.array_equal(fitted.initial_labels_, p.argmax(axis=1))


def test_few_images_still_have_three_voters(noise, noise_embeddings, net):
    few = noise.select(np.arange(12))
    near = Embeddings(noise_embeddings.values[:12], few.ids)
    assert tiny(split="metric", n_epochs=1).fit(few, net=net, embeddings=near).n_voters_ == 3
    method = tiny(split="metric", n_epochs=1, n_neighbors=2).fit(few, net=net, embeddings=near)
    assert method.n_voters_ == 2 and not any("asked" in notice for notice in method.notices_)


def test_without_a_trusted_label_it_refuses_and_says_what_to_do(noise, net):
    with pytest.raises(InputError, match=r"no label is trusted: the largest confidence is 0.9996") as raised:
        tiny(confidence_threshold=0.99999).fit(noise, net=net)
    typed = re.findall(r"--set (\S+?)(?:,|$)", str(raised.value.hint))
    typed = [text.split(" ")[0] for text in typed]
    assert typed == ["robust.split=metric", "robust.confidence_threshold=0.90", "robust=none"]
    pipeline = recipe("ruc-digits")
    for text in typed:
        pipeline = change(pipeline, *text.split("="))
    assert pipeline.robust is None, "each of them can be typed"
    lower = float(typed[1].split("=")[1])
    assert tiny(confidence_threshold=lower, n_epochs=1).fit(noise, net=net).initial_clean_.any(), "and helps"


def test_a_cluster_without_a_trusted_image_is_warned_of(noise, net):
    with pytest.warns(PhylaWarning, match="of 4 clusters have no trusted image and may get lost. hint: lower conf"):
        fitted = tiny(confidence_threshold=0.998, n_epochs=1).fit(noise, net=net)
    assert any("no trusted image" in notice for notice in fitted.notices_)


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found(colors: tuple[ImageSet, np.ndarray], color_neighbors: Neighbors) -> ClusterNet:
    """Return a network that finds the three colors."""
    from phyla.cluster.scan import SCAN

    encoder = EncoderSpec(width=4).build(generator(0, "test"))
    calm = Views("strong", 8, cutout=2, n_operations=1)
    return SCAN(n_clusters=3, views=calm, n_epochs=25, batch_size=30, lr=0.003).fit(
        colors[0], neighbors=color_neighbors, encoder=encoder).net_


@pytest.fixture(scope="module")
def color_embeddings(colors: tuple[ImageSet, np.ndarray]) -> Embeddings:
    return Embeddings(colors[0].array.mean(axis=(1, 2)).astype(np.float32), colors[0].ids)


def refine(**options: object) -> RUC:
    calm = Views("ruc_strong", 8, cutout=2, n_operations=0, crop_scale=(0.5, 1.0))
    return RUC(**({"views": calm, "confidence_threshold": 0.6, "n_epochs": 3, "batch_size": 20, "ramp_length": 3,
                   "lr": 0.03} | options))


@pytest.fixture(scope="module")
def fitted(colors: tuple[ImageSet, np.ndarray], color_neighbors: Neighbors, color_embeddings: Embeddings,
           found: ClusterNet) -> RUC:
    return refine(temperature="label_free").fit(colors[0], net=found, embeddings=color_embeddings,
                                                neighbors=color_neighbors)


def test_clusters_are_learnt_anew(colors, found, fitted, color_neighbors):
    images, true = colors
    assert hungarian_accuracy(true, fitted.labels_) > 0.95
    assert min(hungarian_accuracy(true, labels) for labels in fitted.member_labels_) > 0.85
    assert fitted.labels_.dtype == fitted.member_labels_.dtype == np.int64 and fitted.member_labels_.shape == (2, 60)
    assert (fitted.labels_ == fitted.initial_labels_).mean() > 0.95, "cluster ids stay raw"
    assert fitted.scores_ == {"before": neighbor_agreement(fitted.initial_labels_, color_neighbors),
                              "after": neighbor_agreement(fitted.labels_, color_neighbors)}
    assert fitted.probabilities_.dtype == np.float32
    np.testing.assert_allclose(fitted.probabilities_.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(fitted.predict_proba(images), fitted.probabilities_)
    assert np.array_equal(fitted.predict(images), fitted.labels_) and not fitted.net_.training
    assert [(r["epoch"], r["network"]) for r in fitted.history_] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert [*fitted.history_[0]] == ["stage", "epoch", "loss", "clean_loss", "noisy_loss", "strong_loss", "confidence",
                                     "lr", "network", "n_clean", "promoted"]
    lr = [record["lr"] for record in fitted.history_]
    assert lr == pytest.approx([0.03, 0.03, 0.0225, 0.0225, 0.0075, 0.0075])
    counts = [int(fitted.initial_clean_.sum()), *(record["n_clean"] for record in fitted.history_)]
    assert np.diff(counts).tolist() == [r["promoted"] for r in fitted.history_] and counts[-1] == fitted.clean_.sum()


def test_the_given_network_is_copied(noise, net):
    before = flat(net)
    tiny(n_epochs=1).fit(noise, net=net)
    assert torch.equal(flat(net), before) and not net.encoder.training and net.training


def test_the_result_is_the_sum_of_the_logits(colors, fitted, tmp_path):
    views = fitted.views.plain()(torch.from_numpy(colors[0].array), generator(0))
    with torch.no_grad():
        both = sum(member(views)[0] for member in fitted.nets_)
        torch.testing.assert_close(fitted.net_(views)[0] * fitted.temperature_, both, rtol=1e-4, atol=1e-5)
    assert isinstance(fitted.net_.encoder, Ensemble) and fitted.net_.encoder.spec.members == 2
    Classifier(fitted.net_, fitted.views.plain(), 8).save(tmp_path)
    again = Classifier.load(tmp_path)
    np.testing.assert_allclose(again.predict_proba(colors[0]), fitted.probabilities_, atol=1e-6)


def test_sums_of_encoders_of_any_kind(encoder):
    def member(inner: nn.Module, seed: int) -> ClusterNet:
        heads = ClusterHeads(32, 4)
        heads.initialise(torch.Generator().manual_seed(seed))
        return ClusterNet(inner, heads)

    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(192, 32))
    other = EncoderSpec(width=4).build(generator(1, "test"))
    for inner in (encoder, foreign):
        pair = [member(copy.deepcopy(inner), seed).eval() for seed in (1, 2)]
        torch.testing.assert_close(summed(pair)(x), pair[0](x) + pair[1](x))
        assert isinstance(summed(pair).encoder, Ensemble) == (inner is encoder)
    two = summed([member(encoder, 1), member(other, 2)]).eval()  # and RUC of a network that is such a sum
    four = summed([two, copy.deepcopy(two)]).eval()
    torch.testing.assert_close(four(x), 2 * two(x))
    assert four.encoder.spec == replace(encoder.spec, members=4) and four.encoder.spec.n_features == 128


def test_a_label_free_temperature_makes_the_confidence_the_support(colors, color_embeddings, fitted):
    assert fitted.temperature_ != 1
    near = find_neighbors(color_embeddings, fitted.n_voters_ - 1)
    logits = torch.from_numpy(fitted.probabilities_).log() * fitted.temperature_
    assert fitted.temperature_ == pytest.approx(label_free_temperature(logits, near), rel=1e-3)
    wanted = min(supported_share(fitted.labels_, near), 1 - 0.5 / 60)
    assert fitted.probabilities_.max(axis=1).mean() == pytest.approx(wanted, abs=1e-4)
    assert any(f"temperature of {fitted.temperature_:.3f}" in notice for notice in fitted.notices_)


@pytest.mark.parametrize(("temperature", "divisor"), [("none", 1.0), ("average", 2.0)])
def test_other_temperatures(noise, net, temperature, divisor):
    method = tiny(n_epochs=1, temperature=temperature).fit(noise, net=net)
    views = VIEWS.plain()(torch.from_numpy(noise.array), generator(0))
    with torch.no_grad():
        expected = (sum(member(views)[0] for member in method.nets_) / divisor).softmax(dim=1)
    np.testing.assert_allclose(method.probabilities_, expected, atol=1e-5)
    assert method.temperature_ == divisor and method.scores_ == {}


def test_scores_and_temperature_are_taken_on_the_watched_images(colors, color_embeddings, found):
    images = colors[0]
    held_out = images.select(np.arange(12))
    near = find_neighbors(held_out.array.reshape(12, -1)[:, :9].astype(np.float32), 3)
    method = refine(n_epochs=1, temperature="label_free").fit(images, net=found, embeddings=color_embeddings,
                                                             watched=(held_out, near))
    assert method.scores_["after"] == neighbor_agreement(method.predict(held_out), near)
    logits = torch.from_numpy(method.predict_proba(held_out)).double().log() * method.temperature_
    assert method.temperature_ == pytest.approx(label_free_temperature(logits, near), rel=1e-3)


def test_a_collapse_is_warned_of(colors, found, monkeypatch):
    monkeypatch.setattr(ruc, "smoothed_cross_entropy", lambda logits, *a, **k: 50 * nn.functional.cross_entropy(
        logits, torch.zeros(len(logits), dtype=torch.int64)))
    with pytest.warns(CollapseWarning, match="RUC emptied 2 of 3 clusters"):
        method = refine(split="confidence").fit(colors[0], net=found)
    assert len(np.unique(method.labels_)) == 1 and any("emptied 2 of 3" in notice for notice in method.notices_)


def test_emptied_clusters_never_raise_the_confidence(colors, color_neighbors, found, monkeypatch):
    monkeypatch.setattr(ruc, "label_free_temperature", lambda logits, near: 0.141)
    options = {"split": "confidence", "temperature": "label_free", "n_epochs": 1}
    healthy = refine(**options | {"n_epochs": 3}).fit(colors[0], net=found, neighbors=color_neighbors)
    assert len(np.unique(healthy.labels_)) == 3 and healthy.temperature_ == 0.141
    assert not any("fewer clusters" in notice or "is not used" in notice for notice in healthy.notices_)

    monkeypatch.setattr(ruc, "smoothed_cross_entropy", lambda logits, *a, **k: 50 * nn.functional.cross_entropy(
        logits, torch.zeros(len(logits), dtype=torch.int64)))
    with pytest.warns(CollapseWarning, match="RUC emptied 2 of 3 clusters"):
        lost = refine(**options).fit(colors[0], net=found, neighbors=color_neighbors)
    assert lost.temperature_ == 1.0 and lost.scores_["after"] == 1.0
    assert any("label-free temperature, 0.141, is not used" in notice for notice in lost.notices_)
    assert any(notice.endswith("1.0000 after; fewer clusters raise it by themselves") for notice in lost.notices_)
    monkeypatch.setattr(ruc, "label_free_temperature", lambda logits, near: 3.0)
    cooled = refine(**options).fit(colors[0], net=found, neighbors=color_neighbors)
    assert cooled.temperature_ == 3.0, "lowering the confidence is always allowed"


# ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("call", "forwards"), [(2, "faithful"), (4, "cheap"), (7, "faithful")],
                         ids=["first pass", "second pass", "second epoch"])
def test_killed_and_started_again_it_ends_bit_equal(noise, noise_embeddings, net, killed, tmp_path, monkeypatch,
                                                    call, forwards):
    def fit(folder: Path | None = None) -> RUC:
        return tiny(forwards=forwards, split="metric").fit(noise, net=net, embeddings=noise_embeddings, folder=folder)

    whole = fit()
    assert 0 < whole.initial_clean_.sum() < whole.clean_.sum(), "labels change on the way"
    with killed(ruc, "masked_losses", call):
        fit(tmp_path)
    steps = []
    monkeypatch.setattr(ruc, "masked_losses", lambda *a, **k: steps.append(0) or masked_losses(*a, **k))
    for _ in range(2):  # and a finished fit is not done again
        again = fit(tmp_path)
        assert len(steps) == 8 - (call - 1) and equal(again, whole) and again.history_ == whole.history_


def test_checkpoint_of_other_options_images_embeddings_or_network_is_refused(noise, noise_embeddings, net, tmp_path):
    def fit(images: ImageSet = noise, scale: float = 1.0, **options: object) -> RUC:
        near = Embeddings(scale * noise_embeddings.values, images.ids)
        return tiny(n_epochs=1, split="metric", **options).fit(images, net=net, embeddings=near, folder=tmp_path)

    fit()
    for other in ({"lr": 0.02}, {"images": ImageSet(255 - noise.array, noise.ids)}, {"scale": 2.0}):
        with pytest.raises(InputError, match="other options or images"):
            fit(**other)
    with torch.no_grad():
        net.heads.bias += 1e-3
    with pytest.raises(InputError, match="other options or images"):
        fit()


def test_same_seed_same_networks_and_another_seed_others(noise, net):
    once, again, other = (tiny(n_epochs=1, random_state=seed).fit(noise, net=net) for seed in (0, 0, 1))
    assert equal(once, again) and not equal(once, other)


# ── the contract, and misuse ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
def test_scikit_learn_contract(noise, net):
    method = tiny(n_epochs=1)
    assert method.get_params() == clone(method).get_params() == RUC(**method.get_params()).get_params()
    assert method.set_params(lr=0.03) is method and method.lr == 0.03
    odd = object()
    assert RUC(split=odd).split is odd, "the constructor stores and does not judge"
    with pytest.raises(NotFittedError):
        method.predict(noise)
    assert np.array_equal(method.fit_predict(noise, net=net), method.labels_)


def test_defaults_are_the_published_configuration():
    expected = {"split": "hybrid", "confidence_threshold": 0.99, "n_neighbors": 100, "refurbish_threshold": 0.99,
                "refurbish_rise": 0.0, "noisy_weight": 25.0, "ramp_length": 200, "sharpen_temperature": 0.5,
                "mixup_alpha": 4.0, "smoothing": 0.5, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4,
                "n_epochs": 200, "batch_size": 250, "forwards": "faithful", "temperature": "none"}
    published = RUC().get_params()
    assert {name: published[name] for name in expected} == expected
    views = Views("ruc_strong", 32)
    assert published["views"] == views and (views.crop_scale, views.flip, views.cutout) == ((0.2, 1.0), 0.5, 16)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "said"), [
    ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"), ({"batch_size": 1}, "batch_size must be at least 2"),
    ({"n_neighbors": 0}, "n_neighbors"), ({"refurbish_every": 0}, "refurbish_every"),
    ({"confidence_threshold": math.nan}, "confidence_threshold must be at least 0, got nan"),
    ({"noisy_weight": -1.0}, "noisy_weight"), ({"ramp_length": 0}, "ramp_length"), ({"lr": 0.0}, "lr must be above 0"),
    ({"sharpen_temperature": 0.0}, "sharpen_temperature"), ({"mixup_alpha": 0.0}, "mixup_alpha"),
    ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1, got 1.0"), ({"smoothing": math.nan}, "smoothing"),
    ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"), ({"batch_size": 0}, "batch_size must be at least 2"),
    ({"momentum": -1.0}, "momentum must be at least 0 and below 1, got -1.0"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
    ({"split": "hybird"}, "split='hybird' is not allowed. hint: did you mean hybrid"),
    ({"forwards": "two"}, "forwards='two'"), ({"temperature": "auto"}, "temperature='auto'"),
    ({"views": Views("strong", 16)}, "views of kind 'strong' are not allowed. hint: use the kind ruc_strong"),
    ({"split": "hybrid"}, "split='hybrid' needs the embeddings"), ({"split": "metric"}, "split='metric' needs"),
    ({"temperature": "label_free"}, "temperature='label_free' needs neighbors"),
])
def test_options_that_cannot_be_used_are_refused_before_any_work(noise, net, options, said):
    with pytest.raises(InputError, match=said):
        tiny(**options).fit(noise, net=net)
    if "needs" not in said:
        assert re.search(said, str(next(tiny(**options).option_faults()))), "and can be told without the images"


def test_networks_embeddings_and_neighbors_that_do_not_fit_are_refused(noise, noise_neighbors, noise_embeddings, net):
    for heads in (ClusterHeads(32, 4, 3), ClusterHeads(32, 1)):
        with pytest.raises(InputError, match="refines one head of at least 2 clusters, got"):
            tiny().fit(noise, net=ClusterNet(net.encoder, heads))
    with pytest.raises(InputError, match="this one takes embeddings"):
        tiny().fit(noise, net=ClusterNet(nn.Identity(), net.heads))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        tiny().fit(noise.select(np.array([0])), net=net)
    few = noise.select(np.arange(9))
    with pytest.raises(InputError, match="the embeddings belong to another set: 32 rows, 9 images"):
        tiny().fit(few, net=net, embeddings=noise_embeddings)
    for shown in ({"neighbors": noise_neighbors}, {"watched": (noise.select(np.arange(8)), noise_neighbors)}):
        with pytest.raises(InputError, match="neighbors belong to another set: 5 each of 32 images"):
            tiny().fit(few, net=net, **shown)


def test_a_loss_that_is_not_finite_ends_the_fit_and_says_where(noise, net, monkeypatch):
    calls = []

    def broken(*tensors: Tensor, **options: float) -> tuple[Tensor, Tensor]:
        calls.append(0)
        clean, noisy = masked_losses(*tensors, **options)
        return clean * (math.nan if len(calls) == 4 else 1.0), noisy

    monkeypatch.setattr(ruc, "masked_losses", broken)
    with pytest.raises(NonFiniteLossError, match="robust: the loss is not finite at step 3"):
        tiny().fit(noise, net=net)
