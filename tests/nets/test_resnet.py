"""The encoders are the published ones: sizes, names, maps, first weights."""

import math
import re
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phyla.errors import InputError
from phyla.nets.resnet import EncoderSpec, ResNet, initialise

STAGES = ("maxpool", "layer1", "layer2", "layer3", "layer4")


def on_paper(spec: EncoderSpec) -> ResNet:
    """The encoder without memory for its weights: enough to count them."""
    with torch.device("meta"):
        return ResNet(spec)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def map_sides(net: ResNet, side: int) -> list[int]:
    """Sides of the maps after the stem and after each stage."""
    sides: list[int] = []
    for name in STAGES:
        getattr(net, name).register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, side, side))
    return sides


@pytest.mark.parametrize(("name", "stem", "n_parameters", "n_entries", "n_features"), [
    ("resnet18", "cifar", 11_168_832, 120, 512), ("resnet18", "stl", 11_168_832, 120, 512),
    ("resnet50", "imagenet", 23_508_032, 318, 2048)])
def test_the_published_sizes(name: str, stem: str, n_parameters: int, n_entries: int, n_features: int) -> None:
    spec = EncoderSpec(name, stem)
    net = on_paper(spec)
    assert sum(parameter.numel() for parameter in net.parameters()) == n_parameters
    assert len(net.state_dict()) == n_entries
    assert spec.n_features == n_features


def published_names(depth: str) -> set[str]:
    """The names in the published files, which for ResNet-50 are torchvision's."""
    def norm(name: str) -> set[str]:
        parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return {f"{name}.{part}" for part in parts}

    blocks, n_convs, shortcut, stages = {
        "resnet18": ((2, 2, 2, 2), 2, "shortcut", (2, 3, 4)),
        "resnet50": ((3, 4, 6, 3), 3, "downsample", (1, 2, 3, 4))}[depth]
    names = {"conv1.weight"} | norm("bn1")
    for stage, n in enumerate(blocks, 1):
        for block in (f"layer{stage}.{i}" for i in range(n)):
            for i in range(1, n_convs + 1):
                names |= {f"{block}.conv{i}.weight"} | norm(f"{block}.bn{i}")
        if stage in stages:
            names |= {f"layer{stage}.0.{shortcut}.0.weight"} | norm(f"layer{stage}.0.{shortcut}.1")
    return names


@pytest.mark.parametrize("depth", ["resnet18", "resnet50"])
def test_the_published_names(depth: str) -> None:
    assert set(on_paper(EncoderSpec(depth)).state_dict()) == published_names(depth)


def by_hand(state: dict[str, Tensor], x: Tensor, *, stride: int, padding: int,
            pool: tuple[int, int, int] | None) -> Tensor:
    """The paper's network in evaluation mode, one operation after the other, from the published names."""
    def conv_norm(x: Tensor, conv: str, norm: str, *, stride: int = 1, padding: int = 0) -> Tensor:
        x = nn.functional.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
        mean, var, scale, shift = (state[f"{norm}.{part}"].view(-1, 1, 1) for part in (
            "running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = conv_norm(x, "conv1", "bn1", stride=stride, padding=padding).relu()
    x = nn.functional.max_pool2d(x, *pool) if pool else x
    blocks = [name.rsplit(".", 2)[0] for name in state if re.fullmatch(r"layer\d\.\d\.conv1\.weight", name)]
    for block in sorted(blocks):
        step = 2 if block.endswith(".0") and not block.startswith("layer1") else 1
        paddings = (0, 1, 0) if f"{block}.conv3.weight" in state else (1, 1)
        strided = 2 if len(paddings) == 3 else 1  # the 3x3 convolution strides: the second of three, the first of two
        out = x
        for i, pad in enumerate(paddings, 1):
            out = conv_norm(out, f"{block}.conv{i}", f"{block}.bn{i}", stride=step if i == strided else 1, padding=pad)
            out = out.relu() if i < len(paddings) else out
        for side in ("shortcut", "downsample"):
            if f"{block}.{side}.0.weight" in state:
                x = conv_norm(x, f"{block}.{side}.0", f"{block}.{side}.1", stride=step)
        x = (out + x).relu()
    return x.flatten(2).mean(2)


@pytest.mark.parametrize(("depth", "stem", "stem_options"), [
    ("resnet18", "cifar", {"stride": 1, "padding": 1, "pool": None}),
    ("resnet18", "stl", {"stride": 1, "padding": 1, "pool": (2, 2, 1)}),
    ("resnet50", "imagenet", {"stride": 2, "padding": 3, "pool": (3, 2, 1)})])
def test_the_network_is_the_one_on_paper(depth: str, stem: str, stem_options: dict[str, Any]) -> None:
    net = EncoderSpec(depth, stem, width=4).build(seeded()).double().eval()
    for name, value in net.state_dict().items():
        if value.ndim == 1:  # statistics and scales that tell the channels apart
            value.copy_(0.5 + torch.rand(value.shape, generator=seeded(len(name)), dtype=torch.float64))
    views = torch.randn(2, 3, 48, 48, generator=seeded(1), dtype=torch.float64)
    with torch.no_grad():
        wanted = by_hand(net.state_dict(), views, **stem_options)
        assert wanted.std() > 0
        assert ((net(views) - wanted).abs() <= 1e-9 * wanted.abs().max()).all()


def test_resnet18_has_shortcuts_where_the_shape_changes() -> None:
    names = on_paper(EncoderSpec()).state_dict()
    assert {name.split(".shortcut.")[0] for name in names if ".shortcut." in name} == {
        "layer2.0", "layer3.0", "layer4.0"}
    assert names["layer2.0.shortcut.0.weight"].shape == (128, 64, 1, 1)
    assert names["conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.parametrize(("name", "stem", "side", "sides"), [
    ("resnet18", "cifar", 32, [32, 32, 16, 8, 4]), ("resnet18", "stl", 96, [49, 49, 25, 13, 7]),
    ("resnet50", "imagenet", 224, [56, 56, 28, 14, 7]), ("resnet18", "cifar", 8, [8, 8, 4, 2, 1]),
    ("resnet18", "cifar", 1, [1, 1, 1, 1, 1]), ("resnet18", "stl", 1, [1, 1, 1, 1, 1]),
    ("resnet18", "imagenet", 1, [1, 1, 1, 1, 1])])
def test_the_maps_have_the_published_sides(name: str, stem: str, side: int, sides: list[int]) -> None:
    assert map_sides(EncoderSpec(name, stem, width=2).build(seeded()), side) == sides


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "cifar"), ("resnet18", "stl"), ("resnet50", "imagenet")])
def test_embeddings_are_not_negative_and_differ_between_images(name: str, stem: str) -> None:
    spec = EncoderSpec(name, stem, width=4)
    views = torch.randn(3, 3, 40, 56, generator=seeded(1))
    embeddings = spec.build(seeded())(views)
    assert embeddings.shape == (3, spec.n_features)
    assert embeddings.min() >= 0
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3


def test_the_embedding_is_the_mean_of_the_last_map() -> None:
    net = EncoderSpec(width=4).build(seeded()).eval()
    maps: list[Tensor] = []
    net.layer4.register_forward_hook(lambda _, __, out: maps.append(out))
    with torch.no_grad():
        embeddings = net(torch.randn(2, 3, 32, 32, generator=seeded(1)))
    assert torch.allclose(embeddings, nn.functional.adaptive_avg_pool2d(maps[0], 1).flatten(1), atol=1e-6)


def test_first_weights_are_kaiming_normal_by_fan_out_and_batch_norm_is_neutral() -> None:
    net = EncoderSpec(width=32).build(seeded())
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            wanted, n = math.sqrt(2 / fan_out), layer.weight.numel()
            assert layer.weight.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(n)), name
            assert abs(layer.weight.mean().item()) < 5 * wanted / math.sqrt(n), name
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all(), f"{name}: no residual scale starts at zero, as published"
            assert (layer.bias == 0).all() and (layer.running_mean == 0).all() and (layer.running_var == 1).all()


def test_initialise_draws_linear_layers_as_torch_does_and_forgets_statistics() -> None:
    net = nn.Sequential(nn.Linear(100, 400), nn.BatchNorm2d(3))
    net[1].running_mean.fill_(5.0)
    net[1].num_batches_tracked.fill_(5)
    initialise(net, seeded())
    for values in (net[0].weight, net[0].bias):
        assert values.abs().max() <= 0.1
        assert values.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.1)
    assert (net[1].running_mean == 0).all() and net[1].num_batches_tracked == 0


def test_the_seed_decides_every_weight_and_the_global_generator_is_left_alone() -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([value.flatten() for value in EncoderSpec(width=4).build(seeded(seed)).parameters()])

    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, weights(0))
    changed = (first != weights(1)).float().mean()
    assert changed > 0.9, "all but BatchNorm's ones and zeros"


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "cifar"), ("resnet18", "stl"), ("resnet50", "imagenet")])
def test_the_gradient_reaches_every_weight(name: str, stem: str) -> None:
    net = EncoderSpec(name, stem, width=4).build(seeded())
    views = torch.randn(4, 3, 32, 32, generator=seeded(1))
    (net(views) * torch.randn(4, net.spec.n_features, generator=seeded(2))).sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_float64_stays_float64() -> None:
    net = EncoderSpec(width=2).build(seeded()).double()
    assert net(torch.zeros(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_a_spec_is_what_a_file_can_hold() -> None:
    spec = EncoderSpec("resnet50", "imagenet", 16)
    assert EncoderSpec(**asdict(spec)) == spec
    assert asdict(spec) == {"name": "resnet50", "stem": "imagenet", "width": 16}
    assert spec.build(seeded()).spec is spec


@pytest.mark.parametrize(("fields", "told"), [
    ({"name": "resnet81"}, "encoder name='resnet81' is not known. hint: did you mean resnet18"),
    ({"stem": "imagnet"}, "did you mean imagenet"), ({"stem": "x"}, "allowed: cifar, imagenet, stl"),
    ({"width": 0}, "at least 1, got 0")])
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_spec_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        EncoderSpec(**fields)
