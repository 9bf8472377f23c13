"""Attacks: a linear network in closed form, the ball and the space, seeds, no labels, and a network left as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import naive
from phyla.classifier import Classifier
from phyla.errors import CorruptFileError, InputError
from phyla.evaluate import robustness
from phyla.evaluate.robustness import (
    PRESETS,
    Attack,
    attack_curve,
    attacked,
    load_robustness,
    robustness_report,
    save_robustness,
    uphill,
)
from phyla.images.augment import Views
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import EncoderSpec, Ensemble
from phyla.randomness import generator
from phyla.types import Assignment, ImageSet

SIDE = 4
VIEWS = Views("plain", SIDE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
MEAN, STD = (np.array(values).reshape(3, 1, 1) for values in (VIEWS.mean, VIEWS.std))


def linear_net(n_clusters: int = 3, seed: int = 0) -> ClusterNet:
    """Return logits that are linear in the network's input: (B, 3, 4, 4) to (1, B, n_clusters)."""
    heads = ClusterHeads(3 * SIDE * SIDE, n_clusters)
    heads.initialise(generator(seed, "linear"))
    return ClusterNet(nn.Flatten(), heads).eval()


def noise_images(n: int = 24, seed: int = 0) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
    return ImageSet(pixels, [str(i) for i in range(n)])


def deep_net(seed: int = 0, members: int = 1) -> ClusterNet:
    """Return a small network whose three logits are 0 on average over the images of noise."""
    encoder = EncoderSpec(width=2, members=members).build(generator(seed, "encoder")).eval()
    heads = ClusterHeads(encoder.spec.n_features, 3)
    heads.initialise(generator(seed, "heads"))
    with torch.no_grad():
        inputs = torch.from_numpy((pixel_values(noise_images()) - MEAN) / STD).float()
        heads.bias -= heads(encoder(inputs)).mean(dim=1)
    return ClusterNet(encoder, heads)


def pixel_values(images: ImageSet) -> np.ndarray:
    return images.array.transpose(0, 3, 1, 2) / 255


def curve_of(net, images, true=None, epsilons=(4 / 255, 16 / 255), **options):
    attack = Attack(**{"target": "predicted" if true is None else "true"} | options.pop("attack", {}))
    return attack_curve(net, VIEWS, images, true, attack=attack, epsilons=epsilons, **options)


# ── the equations ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_uphill_is_the_gradient_of_the_cross_entropy_but_for_a_factor_a_row():
    draw = np.random.default_rng(0)
    logits, target = draw.normal(size=(5, 4)), np.array([0, 3, 1, 1, 2])
    found = uphill(torch.from_numpy(logits), torch.from_numpy(target)).numpy()
    for z, y, row in zip(logits, target, found, strict=True):
        slope = naive.gradient(lambda at, y=y: -np.log(naive.softmax(at)[y]), z)
        np.testing.assert_allclose(row * (1 - naive.softmax(z)[y]), slope, atol=1e-8)


def test_uphill_does_not_vanish_where_a_probability_rounds_to_one():
    sure = torch.tensor([[80.0, 0.0, 1.0]])
    assert sure.softmax(dim=1)[0, 0] == 1
    np.testing.assert_allclose(uphill(sure, torch.tensor([0]))[0], [-1, 1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 300.0])
def test_a_network_that_is_too_sure_of_itself_is_no_more_robust(scale):
    net, images = linear_net(n_clusters=2), noise_images()
    with torch.no_grad():
        for parameter in net.heads.parameters():
            parameter *= scale
    found = curve_of(net, images)
    assert found.unchanged == curve_of(linear_net(n_clusters=2), images).unchanged
    assert found.unchanged[-1] < 1


def test_fgsm_of_a_linear_network_in_closed_form():
    net, images = linear_net(n_clusters=2), noise_images()
    weight, bias = net.heads.weight[0].detach().double().numpy(), net.heads.bias[0].detach().double().numpy()
    inputs = ((pixel_values(images) - MEAN) / STD).reshape(len(images), -1)
    margin = inputs @ (weight[0] - weight[1]) + bias[0] - bias[1]  # cluster 0 where above 0
    for epsilon in (0.05, 0.2):
        # Every value moves by epsilon against the margin, so that it shrinks by epsilon times the sum of |weights|.
        kept = np.abs(margin) > epsilon * np.abs(weight[0] - weight[1]).sum()
        found = curve_of(net, images, epsilons=(epsilon,),
                         attack={"method": "fgsm", "space": "normalized", "clip": False})
        assert found.unchanged == (1, pytest.approx(kept.mean()))
        assert 0 < kept.mean() < 1


def test_fgsm_in_pixels_moves_each_by_epsilon_and_stays_a_picture():
    net, images = linear_net(n_clusters=2), noise_images()
    start = torch.from_numpy(pixel_values(images)).float()
    logits = lambda x: net((x - torch.tensor(MEAN).float()) / torch.tensor(STD).float())[0]  # noqa: E731
    clean = logits(start).argmax(dim=1)
    found = attacked(logits, start, clean, epsilon=0.1, step=0.1, n_steps=1, low=0.0, high=1.0)
    towards = torch.sign(net.heads.weight[0, 1] - net.heads.weight[0, 0]).reshape(1, 3, SIDE, SIDE).detach()
    expected = (start + 0.1 * torch.where(clean[:, None, None, None] == 0, towards, -towards)).clamp(0, 1)
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("noise", [None, 1.0])
def test_many_steps_stay_in_the_ball_and_the_range(noise):
    net, draw = linear_net(), torch.Generator().manual_seed(0)
    start = torch.rand(6, 3, SIDE, SIDE, generator=draw)
    from_there = None if noise is None else 2 * torch.rand(start.shape, generator=draw) - 1
    found = attacked(lambda x: net(x)[0], start, torch.arange(6) % 3, epsilon=0.03, step=0.02, n_steps=7,
                     noise=from_there, low=0.0, high=1.0)
    assert (found - start).abs().max() <= 0.03 + 1e-6
    assert (found - start).abs().max() > 0.0299
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(attacked(lambda x: net(x)[0], start, torch.arange(6) % 3, epsilon=0.0, step=0.0, n_steps=7,
                                noise=from_there), start)


def test_it_starts_where_the_noise_says():
    net, start = linear_net(), torch.full((2, 3, SIDE, SIDE), 0.5)
    noise = torch.linspace(-1, 1, start.numel()).reshape(start.shape)
    found = attacked(lambda x: net(x)[0], start, torch.tensor([0, 1]), epsilon=0.1, step=0.0, n_steps=1, noise=noise)
    np.testing.assert_allclose(found, start + 0.1 * noise, atol=1e-7)


def test_sizes_of_steps():
    assert [(Attack(method).steps, Attack(method).share) for method in ("fgsm", "bim", "pgd")] == [
        (1, 1), (10, 0.25), (10, 0.25)]
    assert (Attack("bim", n_steps=3, step_share=1.0).steps, Attack("bim", n_steps=3, step_share=1.0).share) == (3, 1)


def test_more_steps_find_more():
    """Against a curved boundary one step of epsilon misses what several find: the loss of the target grows."""
    net, images = deep_net().eval(), noise_images(16)
    start = torch.from_numpy(pixel_values(images)).float()
    logits = lambda x: net(x)[0]  # noqa: E731
    clean = logits(start).argmax(dim=1)
    changed = [attacked(logits, start, clean, epsilon=0.05, step=step, n_steps=n)
               for step, n in ((0.0, 1), (0.05, 1), (0.0125, 10))]
    losses = [nn.functional.cross_entropy(logits(images), clean).item() for images in changed]
    assert losses[0] < losses[1] < losses[2]


# ── spaces ────────────────────────────────────────────────────────────────────────────────────────────────────────


def seen_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return a list that fills with (start, changed, clusters) of every attack."""
    seen = []

    def spy(logits, start, clusters, *, epsilon, **options):
        changed = attacked(logits, start, clusters, epsilon=epsilon, **options)
        seen.append((start, changed, clusters))
        return changed

    monkeypatch.setattr(robustness, "attacked", spy)
    return seen


@pytest.mark.parametrize("method", ["fgsm", "bim", "pgd"])
@pytest.mark.parametrize("clip", [True, False])
def test_each_space_is_kept(monkeypatch, method, clip):
    seen, images = seen_by(monkeypatch), noise_images()
    for space in ("pixel", "normalized"):
        curve_of(linear_net(), images, epsilons=(0.3,), attack={"method": method, "space": space, "clip": clip})
    (pixel, pixel_changed, _), (scaled, scaled_changed, _) = seen
    np.testing.assert_allclose(pixel, pixel_values(images), atol=1e-6)
    np.testing.assert_allclose(scaled, (pixel_values(images) - MEAN) / STD, atol=1e-5)
    for start, changed in ((pixel, pixel_changed), (scaled, scaled_changed)):
        assert 0.29 < (changed - start).abs().max() <= 0.3 + 1e-5
    for values in (pixel_changed.numpy(), scaled_changed.numpy() * STD + MEAN):
        outside = (values.min() < -1e-5 or values.max() > 1 + 1e-5)
        assert bool(outside) != clip


def test_epsilon_means_the_same_in_both_spaces_when_scaled():
    one = replace(VIEWS, std=(0.25, 0.25, 0.25))
    images, net = noise_images(), linear_net()
    pixel, scaled = (attack_curve(net, one, images, attack=Attack("bim", space=space, target="predicted"),
                                  epsilons=(epsilon,)) for space, epsilon in (("pixel", 0.05), ("normalized", 0.2)))
    assert pixel.unchanged == scaled.unchanged
    assert pixel.unchanged[1] < 1


def test_fgsm_is_bim_with_one_full_step():
    images, true = noise_images(), np.arange(24) % 3
    for space in ("pixel", "normalized"):
        fgsm, bim = (curve_of(deep_net(), images, true, attack={"space": space} | attack) for attack in (
            {"method": "fgsm"}, {"method": "bim", "n_steps": 1, "step_share": 1.0}))
        assert fgsm.table() == bim.table()


# ── curves ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_curve_begins_with_the_clean_images_and_drops_nothing_there():
    images, true = noise_images(), np.arange(24) % 3
    found = curve_of(linear_net(), images, true, epsilons=(0.1, 0.02))
    assert found.epsilons == (0, 0.02, 0.1)
    assert found.unchanged[0] == 1
    assert found.drop[0] == 0
    assert found.correct[0] > found.correct[2]
    zero = curve_of(linear_net(), images, true, epsilons=(0,))
    assert zero.table() == [{"epsilon": 0, "right": found.correct[0], "drop": 0, "unchanged": 1}]
    assert (found.n_images, found.n_known) == (24, 24)


def test_share_right_is_by_the_matching_of_clean_images():
    net, images = linear_net(), noise_images()
    clean = net(torch.from_numpy((pixel_values(images) - MEAN) / STD).float())[0].argmax(dim=1).numpy()
    renamed = np.array([2, 0, 1])[clean]  # every image right, once clusters are matched
    found = curve_of(net, images, renamed)
    assert found.correct[0] == 1
    assert found.correct == found.unchanged
    frozen = curve_of(net, images, renamed, mapping=np.array([0, 1, 2]))  # of a split in which they were others
    assert frozen.correct[0] == 0


def test_images_of_unknown_class_are_attacked_and_not_counted_as_right_or_wrong():
    images, true = noise_images(), np.arange(24) % 3
    some = np.where(np.arange(24) < 12, true, -1)
    mapping = np.array([0, 1, 2])
    found = curve_of(linear_net(), images, some, mapping=mapping)
    half = curve_of(linear_net(), images.select(np.arange(12)), true[:12], mapping=mapping)
    assert found.correct == half.correct
    assert (found.n_images, found.n_known) == (24, 12)
    assert 0 < found.unchanged[1] < 1


def test_each_image_is_attacked_at_its_target(monkeypatch):
    seen, images, net = seen_by(monkeypatch), noise_images(), linear_net()
    clean = net(torch.from_numpy((pixel_values(images) - MEAN) / STD).float())[0].argmax(dim=1).numpy()
    true = np.where(np.arange(24) < 8, 0, np.where(np.arange(24) < 16, 7, -1))  # matched, without a cluster, unknown
    for target in ("true", "predicted"):
        curve_of(net, images, true, epsilons=(0.1,), mapping=np.array([2, 1, 0]), attack={"target": target})
    assert seen[0][2].tolist() == [*[2] * 8, *clean[8:]]
    assert seen[1][2].tolist() == clean.tolist()


def test_a_class_without_a_cluster_is_wrong_before_and_after():
    found = curve_of(linear_net(), noise_images(), np.full(24, 7), mapping=np.array([0, 1, 2]))
    assert found.correct == (0, 0, 0)
    assert found.unchanged[-1] < 1  # all the same its prediction is attacked


def test_without_labels_there_are_predictions():
    found = curve_of(linear_net(), noise_images())
    assert found.correct is None
    assert found.drop is None
    assert found.n_known == 0
    assert [set(row) for row in found.table()] == [{"epsilon", "unchanged"}] * 3
    assert 1 == found.unchanged[0] > found.unchanged[1] >= found.unchanged[2]


def test_target_decides_which_way():
    """Towards the truth's own side an image that is wrong cannot be pushed: only its prediction can be attacked."""
    net, images = linear_net(n_clusters=2), noise_images()
    clean = net(torch.from_numpy((pixel_values(images) - MEAN) / STD).float())[0].argmax(dim=1).numpy()
    wrong = 1 - clean
    by_truth, by_prediction = (curve_of(net, images, wrong, mapping=np.array([0, 1]), attack={"target": target})
                               for target in ("true", "predicted"))
    assert by_truth.unchanged[-1] == 1
    assert by_prediction.unchanged[-1] < 1
    assert by_prediction.correct[-1] == pytest.approx(1 - by_prediction.unchanged[-1])


def test_seed_and_batches():
    net, images = deep_net(), noise_images(10)
    once, again, in_parts = (curve_of(net, images, seed=3, epsilons=(0.1,), batch_size=size) for size in (64, 64, 4))
    assert once == again == in_parts
    starts = [robustness._noise(torch.zeros(4, 3, 2, 2), seed, first) for seed, first in ((3, 0), (3, 2), (4, 0))]
    assert torch.equal(starts[0][2:], starts[1][:2])
    assert not torch.equal(starts[0], starts[2])
    assert starts[0].abs().max() <= 1
    assert starts[0].min() < 0 < starts[0].max()


def test_network_is_left_as_it_was():
    net = deep_net().train()
    net.encoder.layer1.eval()  # a part that its owner has frozen
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():  # as a caller may be
        curve_of(net, noise_images(8))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in net.parameters())
    assert net.training
    assert net.encoder.layer4.training
    assert not net.encoder.layer1.training
    assert not net.encoder.layer1[0].training


def test_two_networks_as_one():
    both = deep_net(members=2)
    assert isinstance(both.encoder, Ensemble)
    found = curve_of(both, noise_images(8), epsilons=(0.3,))
    assert found.unchanged[1] < 1


@pytest.mark.gpu
def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from phyla.training.device import choose_device

    images, true = noise_images(), np.arange(24) % 3
    cpu = curve_of(deep_net(), images, true)
    gpu = curve_of(deep_net(), images, true, device=choose_device("cuda", "bf16"))
    np.testing.assert_allclose(gpu.unchanged, cpu.unchanged, atol=0.1)


# ── a run's classifiers ───────────────────────────────────────────────────────────────────────────────────────────


def classifiers() -> dict[str, Classifier]:
    return {"one": Classifier(linear_net(seed=0), VIEWS, SIDE), "two": Classifier(linear_net(seed=1), VIEWS, SIDE)}


def test_report_has_a_curve_for_every_attack_and_classifier():
    images, true = noise_images(), np.arange(24) % 3
    sane = robustness_report(classifiers(), images, true)
    assert [(curve.title, curve.attack) for curve in sane] == [("one", Attack("pgd")), ("two", Attack("pgd"))]
    assert sane[0].epsilons == tuple(n / 255 for n in (0, 1, 2, 4, 8))
    paper = robustness_report(classifiers(), images, true, preset="paper")
    assert [(curve.title, curve.attack.method) for curve in paper] == [
        ("one", "fgsm"), ("two", "fgsm"), ("one", "bim"), ("two", "bim")]
    assert all(curve.attack.space == "normalized" and not curve.attack.clip for curve in paper)
    assert paper[2].attack.share == 1
    assert paper[2].attack.steps == 10


def test_report_attacks_some_images_and_matches_on_all(monkeypatch):
    images, true = noise_images(), np.arange(24) % 3
    known = np.where(np.arange(24) % 2, true, -1)
    asked = []

    def spy(net, views, images, true, **options):
        asked.append((list(images.ids), true.tolist(), options["mapping"].tolist()))
        return attack_curve(net, views, images, true, **options | {"epsilons": ()})

    monkeypatch.setattr(robustness, "attack_curve", spy)
    one_hot = np.eye(3, dtype=np.float32)[(true + 1) % 3]
    given = {"one": Assignment(one_hot, images.ids)}
    robustness_report(classifiers(), images, known, n_images=4, assignments=given)
    ids, classes, mapping = asked[0]
    assert ids == ["1", "7", "15", "23"]
    assert classes == [true[int(name)] for name in ids]
    assert mapping == [2, 0, 1]
    assert asked[1][:2] == asked[0][:2]


def test_report_without_labels_attacks_predictions():
    for true in (None, np.full(24, -1)):
        found = robustness_report(classifiers(), noise_images(), true, n_images=5)
        assert all(curve.correct is None and curve.attack.target == "predicted" for curve in found)
        assert found[0].n_images == 5


def test_curves_are_read_as_they_were_written(tmp_path):
    images, true = noise_images(), np.arange(24) % 3
    curves = [*robustness_report(classifiers(), images, true, split="test"),
              *robustness_report(classifiers(), images, None)]
    assert [curve.split for curve in curves] == ["test", "test", "", ""]
    save_robustness(tmp_path / "robustness.json", curves)
    assert load_robustness(tmp_path / "robustness.json") == curves
    (tmp_path / "other.json").write_text('{"curves": [{"title": "one"}]}', encoding="utf-8")
    with pytest.raises(CorruptFileError, match="no curves"):
        load_robustness(tmp_path / "other.json")


# ── what cannot be ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("options", "says"), [
    ({"method": "fgsm", "n_steps": 3}, "fgsm with n_steps=3"), ({"n_steps": 0}, "n_steps=0"),
    ({"step_share": 0.0}, "step_share must be above 0"), ({"step_share": float("nan")}, "step_share")])
def test_attacks_that_cannot_be(options, says):
    with pytest.raises(InputError, match=says):
        Attack(**options)


def test_words_that_are_not_allowed(unchecked):
    with pytest.raises(InputError, match="did you mean pixel"):
        Attack(space="pixels")


def test_what_cannot_be_attacked():
    images, net = noise_images(), linear_net()
    with pytest.raises(InputError, match="target='true' needs the true class"):
        attack_curve(net, VIEWS, images, attack=Attack(), epsilons=(0.1,))
    with pytest.raises(InputError, match="2 of 3"):
        curve_of(ClusterNet(nn.Flatten(), ClusterHeads(3 * SIDE * SIDE, 3, 2)), images)
    with pytest.raises(InputError, match="at least 2 clusters"):
        curve_of(linear_net(n_clusters=1), images)
    with pytest.raises(InputError, match="takes embeddings"):
        curve_of(ClusterNet(nn.Identity(), ClusterHeads(5, 3)), images)
    with pytest.raises(InputError, match="epsilon must be 0 or above"):
        curve_of(net, images, epsilons=(-0.1,))
    with pytest.raises(InputError, match="3 true classes do not fit 24"):
        curve_of(net, images, np.zeros(3, int))
    with pytest.raises(InputError, match=r"no preset 'sain'.*did you mean sane"):
        robustness_report(classifiers(), images, None, preset="sain")
    with pytest.raises(InputError, match="n_images must be at least 1"):
        robustness_report(classifiers(), images, None, n_images=0)
    with pytest.raises(InputError, match="of other images"):
        robustness_report(classifiers(), images, np.zeros(24, int),
                          assignments={"one": Assignment(np.ones((1, 1), np.float32), ["x"])})


def test_presets_are_whole():
    assert set(PRESETS) == {"sane", "paper"}
    assert all(plan.epsilons[0] == 0 and list(plan.epsilons) == sorted(plan.epsilons)
               for plans in PRESETS.values() for plan in plans)
