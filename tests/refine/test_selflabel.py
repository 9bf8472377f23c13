"""Self-labelling: its loss against loops, known and golden values; what the fit trains, averages, keeps and refuses."""

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
from phyla.errors import CollapseWarning, InputError, NonFiniteLossError, PhylaWarning
from phyla.evaluate.matching import hungarian_accuracy
from phyla.images.augment import Views
from phyla.images.batches import Order
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import ResNet
from phyla.quality import neighbor_score
from phyla.refine import selflabel
from phyla.refine.selflabel import SelfLabel, self_label_loss
from phyla.training.device import choose_device
from phyla.types import ImageSet, Neighbors

pytestmark = pytest.mark.usefixtures("warm")
GOLDEN = Path(__file__).parents[1] / "golden" / "losses.npz"
WIDE = Views("strong", 16, cutout=4)
SLOW = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 0.0}


def tiny(**options: object) -> SelfLabel:
    """Return a method that trusts every pseudo-label: of four clusters one has more than a quarter."""
    return SelfLabel(**({"views": WIDE, "threshold": 0.25, "n_epochs": 3, "batch_size": 16} | SLOW | options))


@pytest.fixture
def net(encoder: ResNet) -> ClusterNet:
    """Return an untrained network of four clusters."""
    heads = ClusterHeads(32, 4)
    heads.initialise(torch.Generator().manual_seed(1))
    return ClusterNet(encoder, heads)


def logits(batch: int, clusters: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(batch, clusters, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def statistics(net: nn.Module) -> Tensor:
    return torch.cat([b.flatten().double() for b in net.buffers()])


# ── the equation ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("batch", "clusters", "threshold"), [(1, 2, 0.5), (9, 3, 0.6), (30, 7, 0.9), (8, 4, 0.0)])
def test_loss_is_the_formula_in_both_orders(batch, clusters, threshold, balanced):
    first, second = logits(batch, clusters, seed=1), logits(batch, clusters, seed=2)
    for weak, strong in ((first, second), (second, first)):
        loss, n = self_label_loss(weak, strong, threshold=threshold, balanced=balanced)
        expected, count = naive.self_label_loss(weak.numpy(), strong.numpy(), threshold=threshold, balanced=balanced)
        assert float(loss) == pytest.approx(expected, rel=1e-12) and int(n) == count


@pytest.mark.parametrize("balanced", [True, False])
def test_golden_values_and_gradients(balanced):
    held = np.load(GOLDEN, allow_pickle=False)
    weak = torch.from_numpy(held["selflabel_weak_logits"]).requires_grad_()
    strong = torch.from_numpy(held["selflabel_strong_logits"]).requires_grad_()
    loss, n = self_label_loss(weak, strong, threshold=float(held["selflabel_threshold"]), balanced=balanced)
    loss.backward()
    name = "balanced" if balanced else "plain"
    assert loss.item() == pytest.approx(float(held[f"selflabel_{name}_value"]), rel=1e-9)
    assert int(n) == int(held["selflabel_n_confident"])
    np.testing.assert_allclose(strong.grad, held[f"selflabel_{name}_grad"], rtol=1e-9, atol=1e-14)
    assert weak.grad is None, "pseudo-labels are given, not learnt"


@pytest.mark.parametrize("balanced", [True, False])
def test_gradient_is_that_of_the_formula(balanced):
    weak, strong = logits(7, 3, seed=1), logits(7, 3, seed=2).requires_grad_()
    self_label_loss(weak, strong, threshold=0.6, balanced=balanced)[0].backward()
    slopes = naive.gradient(lambda z: naive.self_label_loss(weak.numpy(), z, threshold=0.6, balanced=balanced)[0],
                            strong.detach().numpy())
    np.testing.assert_allclose(strong.grad, slopes, atol=1e-7)


def test_balanced_is_the_mean_over_present_clusters_and_equals_the_authors_weights():
    weak, strong = logits(40, 5, seed=1, scale=6.0), logits(40, 5, seed=2)
    weak[:, 4] = -50.0  # one cluster is in no pseudo-label
    loss, n = self_label_loss(weak, strong, threshold=0.8, balanced=True)
    confidence, label = weak.softmax(1).max(1)
    kept = confidence > 0.8
    each = nn.functional.cross_entropy(strong, label, reduction="none")
    present = [each[kept & (label == c)] for c in range(5) if (kept & (label == c)).any()]
    assert len(present) == 4
    assert float(loss) == pytest.approx(float(torch.stack([part.mean() for part in present]).mean()))
    count = torch.bincount(label[kept], minlength=5)
    weight = torch.where(count > 0, int(n) / count.clamp(min=1).double(), 1.0)
    published = nn.functional.cross_entropy(strong[kept], label[kept], weight=weight)
    assert float(loss) == pytest.approx(float(published), rel=1e-9)


def test_known_values():
    sure, flat_logits = 50 * torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for balanced in (True, False):
        loss, n = self_label_loss(sure, sure, threshold=0.99, balanced=balanced)
        assert float(loss) == pytest.approx(0, abs=1e-12) and int(n) == 4
        loss, _ = self_label_loss(sure, flat_logits, threshold=0.99, balanced=balanced)
        assert float(loss) == pytest.approx(math.log(4))
    at = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)  # exactly three quarters
    assert int(self_label_loss(at, at, threshold=float(at.softmax(1).max()), balanced=True)[1]) == 0, "above, not at"


def test_four_points_worked_by_hand():
    weak = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.1, 0.0]], dtype=torch.float64)
    strong = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(4)], [7.0, 0.0]], dtype=torch.float64)
    each = (math.log(2), math.log(4 / 3), math.log(5 / 4))
    plain, n = self_label_loss(weak, strong, threshold=0.99, balanced=False)
    assert float(plain) == pytest.approx(sum(each) / 3) and int(n) == 3
    balanced, _ = self_label_loss(weak, strong, threshold=0.99, balanced=True)
    assert float(balanced) == pytest.approx(((each[0] + each[1]) / 2 + each[2]) / 2)


@pytest.mark.parametrize("balanced", [True, False])
def test_without_a_confident_image_the_loss_is_zero_with_a_graph(balanced):
    strong = logits(6, 3, seed=2).requires_grad_()
    loss, n = self_label_loss(torch.zeros(6, 3, dtype=torch.float64), strong, threshold=0.99, balanced=balanced)
    assert loss.item() == 0 and int(n) == 0
    loss.backward()
    assert not strong.grad.any() and strong.grad.isfinite().all()


@pytest.mark.parametrize("balanced", [True, False])
def test_loss_does_not_change_with_the_order_of_images_or_clusters_or_a_shift(balanced):
    weak, strong = logits(12, 5, seed=1), logits(12, 5, seed=2)
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(12, generator=draw), torch.randperm(5, generator=draw)
    loss, n = self_label_loss(weak, strong, threshold=0.5, balanced=balanced)
    for a, b in ((weak[rows], strong[rows]), (weak[:, columns], strong[:, columns]),
                 (weak + logits(12, 1, seed=3), strong + logits(12, 1, seed=4))):
        other, count = self_label_loss(a, b, threshold=0.5, balanced=balanced)
        assert torch.allclose(other, loss) and count == n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_gradients_that_do_not_vanish(dtype):
    weak = torch.tensor([[60.0, 0.0], [0.0, 1e4]], dtype=dtype)
    strong = weak.flip(1).requires_grad_()
    loss, n = self_label_loss(weak, strong, threshold=0.99, balanced=True)
    loss.backward()
    assert int(n) == 2 and loss.isfinite()
    torch.testing.assert_close(strong.grad.float(), torch.tensor([[-0.5, 0.5], [0.5, -0.5]]))


# ── what a step does ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_receives_a_gradient(noise, net, monkeypatch, precision):
    seen: dict[int, Tensor] = {}
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD) -> None:
        seen.update({id(p): p.grad.clone() for group in self.param_groups for p in group["params"]})
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    frozen = net.requires_grad_(False)  # as SCAN leaves the encoder when it trains heads alone
    fitted = tiny(n_epochs=1).fit(noise, net=frozen, device=choose_device("cpu", precision))
    assert seen.keys() == {id(p) for p in fitted.net_.parameters()}
    assert all(grad.isfinite().all() and grad.any() for grad in seen.values())


def test_ten_steps_give_the_recorded_losses(noise, net, monkeypatch, recorded):
    seen = []
    monkeypatch.setattr(selflabel, "self_label_loss",
                        lambda *a, **k: seen.append(self_label_loss(*a, **k)) or seen[-1])
    tiny(n_epochs=5, optimizer="adam", lr=1e-4, weight_decay=1e-4).fit(noise, net=net)
    recorded("selflabel", [loss.item() for loss, _ in seen])


@pytest.mark.parametrize("ema", ["off", "write_back", "teacher"])
@pytest.mark.parametrize("weak_mode", ["batch", "running"])
def test_pseudo_labels_come_from_plain_images_with_the_statistics_asked_for(noise, net, monkeypatch, ema, weak_mode):
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer += 0.5  # so that the stored statistics differ from a batch's
    seen = []
    monkeypatch.setattr(selflabel, "self_label_loss",
                        lambda weak, *a, **k: seen.append(weak) or self_label_loss(weak, *a, **k))
    modes = []
    forward = ClusterNet.forward
    monkeypatch.setattr(ClusterNet, "forward", lambda self, views: modes.append(self.training) or forward(self, views))
    tiny(n_epochs=1, ema=ema, weak_mode=weak_mode).fit(noise, net=net.eval())
    assert modes == [weak_mode == "batch", True] * 2, "strong views always train"
    batch = torch.from_numpy(noise.array)[Order(32, 16, 0).epoch(0)[:16]]
    with torch.no_grad():
        expected = net.train(weak_mode == "batch")(WIDE.plain()(batch, torch.Generator()))[0]
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    assert not seen[0].requires_grad


def test_published_average_is_a_smaller_learning_rate_with_frozen_statistics(noise, net):
    """Two parameter paths agree to rounding while both move; 0.9 stands for the published 0.999, to move enough."""
    start = copy.deepcopy(net)
    averaged = tiny(ema="write_back", ema_decay=0.9, lr=0.05, keep="last").fit(noise, net=net).net_
    slower = tiny(lr=0.05 * (1 - 0.9), keep="last").fit(noise, net=net).net_
    moved, apart = (flat(slower) - flat(start)).norm(), (flat(slower) - flat(averaged)).norm()
    assert moved > 0.05 and apart < 1e-3 * moved
    assert torch.equal(statistics(averaged), statistics(start)), "running means, variances and counts stay as they came"
    assert not torch.equal(statistics(slower), statistics(start))


def test_published_average_keeps_statistics_frozen_in_skipped_steps_too(noise, net):
    start = copy.deepcopy(net)
    with pytest.warns(PhylaWarning, match="stopped early"):
        fitted = tiny(threshold=0.999, ema="write_back", keep="last", patience=1).fit(noise, net=net)
    assert fitted.skipped_steps_ == 2 and equal(fitted.net_, start)


def test_a_teacher_is_the_average_of_the_weights_and_is_the_result(noise, net, tmp_path):
    fitted = tiny(ema="teacher", ema_decay=0.9, n_epochs=1, batch_size=32, keep="last").fit(
        noise, net=net, folder=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    start, teacher, student = net.state_dict(), state["teacher"], state["net"]
    for name, _ in net.named_parameters():
        torch.testing.assert_close(teacher[name], 0.9 * start[name] + 0.1 * student[name])
        assert torch.equal(fitted.net_.state_dict()[name], teacher[name])
    assert not torch.equal(teacher["encoder.bn1.running_mean"], student["encoder.bn1.running_mean"]), \
        "the teacher's statistics are of plain images, the student's of strong views"


def test_a_teacher_makes_the_pseudo_labels(noise, net, monkeypatch):
    weak, teachers = [], []
    average = SelfLabel._average

    def watched(self: SelfLabel, net: ClusterNet, teacher: ClusterNet, *, moved: bool) -> None:
        average(self, net, teacher, moved=moved)
        teachers.append(copy.deepcopy(teacher))

    monkeypatch.setattr(SelfLabel, "_average", watched)
    monkeypatch.setattr(selflabel, "self_label_loss",
                        lambda logits, *a, **k: weak.append(logits) or self_label_loss(logits, *a, **k))
    tiny(ema="teacher", ema_decay=0.9, n_epochs=1, lr=0.1).fit(noise, net=net)
    batch = torch.from_numpy(noise.array)[Order(32, 16, 0).epoch(0)[16:]]
    with torch.no_grad():
        expected = teachers[0].train()(WIDE.plain()(batch, torch.Generator()))[0]
    torch.testing.assert_close(weak[1], expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_differs_from_none_and_without_memory_is_none(noise, net):
    def weights(**options: object) -> Tensor:
        return flat(tiny(keep="last", **options).fit(noise, net=net).net_)

    plain = weights()
    assert torch.equal(weights(ema="teacher", ema_decay=0.0), plain)
    slow = weights(ema="teacher", ema_decay=0.99)
    assert not torch.allclose(slow, plain, atol=1e-3)
    assert (slow - flat(net)).norm() < 0.2 * (plain - flat(net)).norm()


def test_a_teacher_in_running_mode_takes_the_students_statistics(noise, net, tmp_path):
    tiny(ema="teacher", weak_mode="running", n_epochs=1).fit(noise, net=net, folder=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    for name, _ in net.named_buffers():
        assert torch.equal(state["teacher"][name], state["net"][name])


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found(colors: tuple[ImageSet, np.ndarray], color_neighbors: Neighbors) -> ClusterNet:
    """Return a network that is nearly sure of the three colors: fitted to them, label-free, in a second."""
    from phyla.cluster.scan import SCAN
    from phyla.nets.resnet import EncoderSpec
    from phyla.randomness import generator

    encoder = EncoderSpec(width=4).build(generator(0, "test"))
    calm = Views("strong", 8, cutout=2, n_operations=1)
    return SCAN(n_clusters=3, views=calm, n_epochs=25, batch_size=30, lr=0.003).fit(
        colors[0], neighbors=color_neighbors, encoder=encoder).net_


def refine(**options: object) -> SelfLabel:
    calm = Views("strong", 8, cutout=2, n_operations=1)
    return SelfLabel(**({"views": calm, "threshold": 0.6, "n_epochs": 4, "batch_size": 30, "lr": 1e-3} | options))


def test_confident_clusters_become_surer_and_stay_right(colors, color_neighbors, found):
    images, true = colors
    before = copy.deepcopy(found)
    fitted = refine(n_epochs=10).fit(images, net=found, neighbors=color_neighbors)
    assert fitted.kept_ == "after" and fitted.scores_["after"] < fitted.scores_["before"] + 0.02 * math.log(3)
    assert hungarian_accuracy(true, fitted.labels_) == 1.0
    assert fitted.skipped_steps_ == 0 and fitted.stopped_ is None
    assert equal(found, before) and not equal(fitted.net_, before), "the network given is copied"
    assert np.array_equal(fitted.predict(images), fitted.labels_) and not fitted.net_.training
    np.testing.assert_array_equal(fitted.predict_proba(images), fitted.probabilities_)
    np.testing.assert_allclose(fitted.probabilities_.sum(axis=1), 1, rtol=1e-5)
    assert fitted.probabilities_.dtype == np.float32 and fitted.labels_.dtype == np.int64
    score = neighbor_score(fitted.probabilities_, color_neighbors.indices[:, :5])
    assert fitted.scores_["after"] == pytest.approx(score)
    assert [*fitted.history_[0]] == ["stage", "epoch", "confident", "loss", "skipped_steps"]


def towards_first(weak: Tensor, strong: Tensor, *, threshold: float, balanced: bool) -> tuple[Tensor, Tensor]:
    """Stand for a self-labelling that pulls every image into the first cluster."""
    return nn.functional.cross_entropy(strong, torch.zeros(len(strong), dtype=torch.int64)), torch.tensor(len(strong))


@pytest.mark.parametrize(("keep", "kept"), [("better", "before"), ("last", "after")])
def test_a_collapse_is_warned_of_and_undone_unless_the_last_is_wanted(colors, color_neighbors, found, monkeypatch, keep,
                                                                      kept):
    monkeypatch.setattr(selflabel, "self_label_loss", towards_first)
    with pytest.warns(CollapseWarning, match="emptied 2 of 3 clusters"):
        fitted = refine(n_epochs=15, lr=0.02, keep=keep).fit(colors[0], net=found, neighbors=color_neighbors)
    assert fitted.kept_ == kept and fitted.scores_["after"] > fitted.scores_["before"]
    assert equal(fitted.net_, found) == (kept == "before")
    assert len(np.unique(fitted.labels_)) == (3 if kept == "before" else 1)
    assert np.array_equal(fitted.predict(colors[0]), fitted.labels_)
    assert any("emptied 2 of 3" in notice for notice in fitted.notices_)
    assert any(f"kept the network {kept} self-labelling" in notice for notice in fitted.notices_)


def test_margin_decides_a_near_tie_but_never_for_an_emptied_cluster(colors, color_neighbors, found, monkeypatch):
    images = colors[0]
    monkeypatch.setattr(selflabel, "neighbor_score", lambda p, near: next(scores))
    for after, margin, kept in ((-0.99, 0.02, "after"), (-0.99, 0.0, "before"), (-0.9, 0.02, "before"),
                                (-1.0, 0.0, "after"), (math.nan, 0.5, "before")):
        scores = iter([-1.0, after])
        fitted = refine(n_epochs=1, lr=1e-6, margin=margin).fit(images, net=found, neighbors=color_neighbors)
        assert fitted.kept_ == kept
    monkeypatch.setattr(selflabel, "self_label_loss", towards_first)
    scores = iter([-1.0, -0.99])
    with pytest.warns(CollapseWarning):
        assert refine(n_epochs=15, lr=0.02).fit(images, net=found, neighbors=color_neighbors).kept_ == "before"


def test_without_neighbors_the_last_state_is_kept(colors, found):
    fitted = refine(n_epochs=1).fit(colors[0], net=found)
    assert fitted.kept_ == "after" and fitted.scores_ == {} and fitted.notices_ == []


def test_score_is_taken_on_the_watched_images(colors, color_neighbors, found):
    images = colors[0]
    held_out = images.select(np.arange(12))
    near = find_neighbors(held_out.array.mean(axis=(1, 2)).astype(np.float32), 3)
    fitted = refine(n_epochs=1, n_selection_neighbors=2).fit(images, net=found, neighbors=color_neighbors,
                                                            watched=(held_out, near))
    assert fitted.scores_["after"] == pytest.approx(neighbor_score(fitted.predict_proba(held_out), near.indices[:, :2]))
    assert len(fitted.labels_) == 60


def test_no_image_ever_confident_stops_with_advice_and_keeps_a_model(noise, noise_neighbors, net):
    with pytest.warns(PhylaWarning, match="no image was confident above 0.999 for 2 epochs; a lower threshold may"):
        fitted = tiny(threshold=0.999, patience=2, n_epochs=9).fit(noise, net=net, neighbors=noise_neighbors)
    assert fitted.stopped_ and fitted.skipped_steps_ == 4 and len(fitted.history_) == 2
    assert torch.equal(flat(fitted.net_), flat(net)) and fitted.probabilities_.shape == (32, 4)
    assert [(r["confident"], r["skipped_steps"]) for r in fitted.history_] == [(0, 2), (0, 4)]
    assert not any("loss" in record for record in fitted.history_)


def test_steps_without_a_confident_image_are_skipped_and_counted(noise, net, monkeypatch):
    calls = []

    def sometimes(weak: Tensor, strong: Tensor, *, threshold: float, balanced: bool) -> tuple[Tensor, Tensor]:
        calls.append(0)
        return self_label_loss(weak, strong, threshold=0.9999 if len(calls) != 4 else threshold, balanced=balanced)

    monkeypatch.setattr(selflabel, "self_label_loss", sometimes)
    with pytest.warns(PhylaWarning, match="stopped early"):
        fitted = tiny(n_epochs=9, patience=2, keep="last").fit(noise, net=net)  # of two steps; the fourth trains
    assert len(fitted.history_) == 4, "the count of idle epochs starts again"
    assert fitted.skipped_steps_ == 7 and [r["confident"] for r in fitted.history_] == [0, 0.5, 0, 0]
    assert not torch.equal(flat(fitted.net_), flat(net))


# ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"ema": "write_back"}, {"ema": "teacher", "ema_decay": 0.9},
                                     {"optimizer": "adam", "lr": 1e-3, "weak_mode": "running"}],
                         ids=["plain", "write_back", "teacher", "adam"])
@pytest.mark.parametrize("call", [2, 5])
def test_killed_and_started_again_it_ends_bit_equal(noise, net, killed, tmp_path, monkeypatch, options, call):
    def fit(folder: Path | None = None) -> SelfLabel:
        return tiny(keep="last", **options).fit(noise, net=net, folder=folder)  # 3 epochs of 2 steps

    whole = fit()
    with killed(selflabel, "self_label_loss", call):
        fit(tmp_path)
    steps = []
    monkeypatch.setattr(selflabel, "self_label_loss", lambda *a, **k: steps.append(0) or self_label_loss(*a, **k))
    for _ in range(2):  # and a finished fit is not done again
        again = fit(tmp_path)
        assert len(steps) == 6 - (call - 1)
        assert equal(again.net_, whole.net_) and again.history_ == whole.history_
        assert np.array_equal(again.probabilities_, whole.probabilities_)


def test_a_stop_survives_the_end_of_the_process(noise, net, killed, tmp_path):
    def fit() -> SelfLabel:
        with pytest.warns(PhylaWarning, match="stopped early"):
            return tiny(threshold=0.999, patience=2, n_epochs=9).fit(noise, net=net, folder=tmp_path)

    with killed(selflabel, "self_label_loss", 4):
        tiny(threshold=0.999, patience=2, n_epochs=9).fit(noise, net=net, folder=tmp_path)
    first, second = fit(), fit()
    assert first.skipped_steps_ == second.skipped_steps_ == 4 and first.stopped_ == second.stopped_


def test_checkpoint_of_other_options_images_or_network_is_refused(noise, net, tmp_path):
    tiny(n_epochs=1).fit(noise, net=net, folder=tmp_path)
    tiny(n_epochs=1).fit(noise, net=net, folder=tmp_path)
    other = ImageSet(255 - noise.array, noise.ids)
    for method, images in ((tiny(n_epochs=1, lr=0.02), noise), (tiny(n_epochs=1), other)):
        with pytest.raises(InputError, match="other options or images"):
            method.fit(images, net=net, folder=tmp_path)
    with torch.no_grad():
        net.heads.bias += 1
    with pytest.raises(InputError, match="other options or images"):
        tiny(n_epochs=1).fit(noise, net=net, folder=tmp_path)


def test_same_seed_same_network_and_another_seed_another(noise, net):
    once, again, other = (tiny(n_epochs=1, random_state=seed, keep="last").fit(noise, net=net) for seed in (0, 0, 1))
    assert equal(once.net_, again.net_) and not equal(once.net_, other.net_)


# ── the contract, and misuse ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unchecked")
def test_scikit_learn_contract(noise, net):
    method = tiny(threshold=0.8)
    assert method.get_params() == clone(method).get_params() == SelfLabel(**method.get_params()).get_params()
    assert method.set_params(lr=0.3) is method and method.lr == 0.3
    odd = object()
    assert SelfLabel(threshold=odd).threshold is odd, "the constructor stores and does not judge"
    with pytest.raises(NotFittedError):
        method.predict(noise)
    assert np.array_equal(tiny(n_epochs=1).fit_predict(noise, net=net), tiny(n_epochs=1).fit(noise, net=net).labels_)


def test_defaults_are_the_published_configuration():
    expected = {"threshold": 0.99, "balanced": True, "ema": "off", "ema_decay": 0.999, "weak_mode": "batch",
                "optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-4, "n_epochs": 200, "batch_size": 1000}
    published = SelfLabel().get_params()
    assert {name: published[name] for name in expected} == expected
    assert published["views"] == Views("strong", 32, cutout=16)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "said"), [
    ({"threshold": 1.0}, "threshold must be at least 0 and below 1, got 1.0"), ({"threshold": -0.1}, "got -0.1"),
    ({"threshold": math.nan}, "got nan"), ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
    ({"patience": 0}, "patience must be at least 1"), ({"batch_size": 1}, "batch_size must be at least 2"),
    ({"n_selection_neighbors": 0}, "n_selection_neighbors"), ({"n_epochs": 0}, "n_epochs must be at least 1"),
    ({"ema": "write-back"}, "ema='write-back' is not allowed. hint: did you mean write_back"),
    ({"weak_mode": "eval"}, "weak_mode='eval'"), ({"keep": "best"}, "keep='best'"), ({"optimizer": "lamb"}, "'lamb'"),
    ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"), ({"batch_size": 0}, "batch_size must be at least 2"),
    ({"momentum": -1.0}, "momentum must be at least 0 and below 1, got -1.0"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
])
def test_options_that_cannot_be_used_are_refused_before_any_work(noise, net, options, said):
    with pytest.raises(InputError, match=said):
        tiny(**options).fit(noise, net=net)
    assert re.search(said, str(next(tiny(**options).option_faults()))), "and can be told without the images"


def test_networks_and_neighbors_that_do_not_fit_are_refused(noise, noise_neighbors, net):
    with pytest.raises(InputError, match=r"refines one head, got 3. hint: pass net.only"):
        tiny().fit(noise, net=ClusterNet(net.encoder, ClusterHeads(32, 4, 3)))
    with pytest.raises(InputError, match="this one takes embeddings"):
        tiny().fit(noise, net=ClusterNet(nn.Identity(), net.heads))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        tiny().fit(noise.select(np.array([0])), net=net)
    few = noise.select(np.arange(9))
    for shown in ({"neighbors": noise_neighbors}, {"watched": (noise.select(np.arange(8)), noise_neighbors)}):
        with pytest.raises(InputError, match="belong to another set: 5 each of 32 images"):
            tiny().fit(few, net=net, **shown)


def test_a_loss_that_is_not_finite_ends_the_fit_and_says_where(noise, net, monkeypatch):
    calls = []

    def broken(*logits: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        calls.append(0)
        loss, n = self_label_loss(*logits, **options)
        return loss * (math.nan if len(calls) == 4 else 1.0), n

    monkeypatch.setattr(selflabel, "self_label_loss", broken)
    with pytest.raises(NonFiniteLossError, match="refine: the loss is not finite at step 3"):
        tiny().fit(noise, net=net)


def test_broken_weights_are_no_lack_of_confidence(noise, net):
    with torch.no_grad():
        net.heads.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="refine: the loss is not finite at step 0"):
        tiny().fit(noise, net=net)
