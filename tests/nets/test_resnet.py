"""The encoders are the published ones: sizes, names, maps, first weights."""

import json
import math
import re
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phyla.errors import InputError
from phyla.nets.heads import Projection
from phyla.nets.resnet import SOBEL, EncoderSpec, ResNet, TwoStream, initialise

STAGES = ("maxpool", "layer1", "layer2", "layer3", "layer4")


def on_paper(spec: EncoderSpec) -> ResNet | TwoStream:
    """The encoder without memory for its weights: enough to count them."""
    with torch.device("meta"):
        return TwoStream(spec) if spec.streams == "rgb_sobel" else ResNet(spec)


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
    ("resnet50", "imagenet", 23_508_032, 318, 2048), ("resnet101", "imagenet", 42_500_160, 624, 2048)])
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
        "resnet50": ((3, 4, 6, 3), 3, "downsample", (1, 2, 3, 4)),
        "resnet101": ((3, 4, 23, 3), 3, "downsample", (1, 2, 3, 4))}[depth]
    names = {"conv1.weight"} | norm("bn1")
    for stage, n in enumerate(blocks, 1):
        for block in (f"layer{stage}.{i}" for i in range(n)):
            for i in range(1, n_convs + 1):
                names |= {f"{block}.conv{i}.weight"} | norm(f"{block}.bn{i}")
        if stage in stages:
            names |= {f"layer{stage}.0.{shortcut}.0.weight"} | norm(f"layer{stage}.0.{shortcut}.1")
    return names


@pytest.mark.parametrize("depth", ["resnet18", "resnet50", "resnet101"])
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
    blocks = [name.rsplit(".", 2)[0] for name in state if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", name)]
    for block in sorted(blocks, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
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
    ("resnet50", "imagenet", {"stride": 2, "padding": 3, "pool": (3, 2, 1)}),
    ("resnet101", "cifar", {"stride": 1, "padding": 1, "pool": None})])
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


def fan_in(layer: nn.Conv2d) -> int:
    return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]


@pytest.mark.parametrize("streams", ["rgb", "rgb_sobel"])
def test_uniform_first_weights_are_those_of_old_pytorch(streams: str) -> None:
    net = EncoderSpec(width=16, streams=streams).build(seeded())
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.bias.data.fill_(3.0)
            layer.running_var.fill_(3.0)
    initialise(net, seeded(1), convolutions="uniform", bn_scale="uniform")
    scales = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            bound, n = 1 / math.sqrt(fan_in(layer)), layer.weight.numel()
            assert layer.weight.abs().max() <= bound, name
            assert layer.weight.abs().max() > bound * (1 - 10 / n), name
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(n)), name
            assert abs(layer.weight.mean().item()) < 5 * bound / math.sqrt(3 * n), name
        if isinstance(layer, nn.BatchNorm2d):
            scales.append(layer.weight.detach())
            assert (layer.bias == 0).all() and (layer.running_mean == 0).all() and (layer.running_var == 1).all()
    drawn = torch.cat(scales)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(1 / 2, abs=5 / math.sqrt(12 * len(drawn)))
    assert drawn.var().item() == pytest.approx(1 / 12, rel=0.1)


def test_each_choice_of_first_weights_leaves_the_other_alone() -> None:
    def drawn(**choices: str) -> dict[str, Tensor]:
        net = EncoderSpec(width=2).build(seeded())
        initialise(net, seeded(1), **choices)
        return dict(net.state_dict())

    plain, uniform = drawn(), drawn(convolutions="uniform")
    assert all((value == 1).all() for name, value in uniform.items() if "bn" in name and name.endswith(".weight"))
    assert not torch.equal(plain["conv1.weight"], uniform["conv1.weight"])
    scaled = drawn(bn_scale="uniform")
    assert torch.equal(plain["conv1.weight"], scaled["conv1.weight"]), "the first draw of both"
    assert (scaled["bn1.weight"] < 1).all()


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
    spec = EncoderSpec("resnet50", "imagenet", 2, "rgb_sobel")
    held = json.dumps(asdict(spec))
    assert EncoderSpec(**json.loads(held)) == spec
    assert {"name": "resnet50", "stem": "imagenet", "width": 2, "streams": "rgb_sobel"}.items() <= asdict(spec).items()
    assert spec.build(seeded()).spec is spec
    first_release = {"name": "resnet18", "stem": "cifar", "width": 4}
    assert EncoderSpec(**first_release) == EncoderSpec("resnet18", "cifar", 4, "rgb")


@pytest.mark.parametrize(("fields", "told"), [
    ({"name": "resnet81"}, "encoder name='resnet81' is not known. hint: did you mean resnet18"),
    ({"stem": "imagnet"}, "did you mean imagenet"), ({"stem": "x"}, "allowed: cifar, imagenet, stl"),
    ({"width": 0}, "at least 1, got 0"), ({"streams": "rgb_sobl"}, "streams='rgb_sobl'.*did you mean rgb_sobel")])
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_spec_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        EncoderSpec(**fields)


# ---- two streams ----------------------------------------------------------------------------------------------------

TWO = EncoderSpec(width=4, streams="rgb_sobel")


def two_streams(spec: EncoderSpec = TWO) -> TwoStream:
    return spec.build(seeded())


def views_of(side: int, n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, side, side, generator=seeded(1), dtype=torch.float64).to(dtype)


def test_two_streams_have_the_published_sizes() -> None:
    spec = EncoderSpec(streams="rgb_sobel")
    with torch.device("meta"):
        net = nn.Sequential(TwoStream(spec), Projection(spec.n_features, 128, n_layers=1))
    parameters = list(net.parameters())
    assert spec.n_features == 1024
    assert all(parameter.requires_grad for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) == 22_468_288
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert sum(buffer.numel() for norm in norms for buffer in norm.buffers()) == 19_240
    assert len(net.state_dict()) == 242


def test_two_streams_cost_what_is_published() -> None:
    macs = 0

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        nonlocal macs
        macs += out.numel() * (fan_in(layer) if isinstance(layer, nn.Conv2d) else layer.in_features)

    spec = EncoderSpec(streams="rgb_sobel")
    net = nn.Sequential(TwoStream(spec), Projection(spec.n_features, 128, n_layers=1)).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert macs / 1e9 == pytest.approx(1.110, abs=5e-4)


def test_two_streams_of_resnet101_have_the_published_form() -> None:
    spec = EncoderSpec("resnet101", streams="rgb_sobel")
    net = on_paper(spec)
    assert spec.n_features == 4096
    assert [len(getattr(net.sobel, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [3, 4, 23, 3]
    assert net.sobel.layer4[0].conv3.weight.shape == (2048, 512, 1, 1)
    narrow = two_streams(EncoderSpec("resnet101", width=2, streams="rgb_sobel"))
    assert narrow(views_of(16)).shape == (3, 4096 * 2 // 64)


def test_both_streams_have_the_names_and_shapes_of_the_plain_network_but_for_the_first_convolution() -> None:
    plain = {name: value.shape for name, value in on_paper(EncoderSpec(width=4)).state_dict().items()}
    state = {name: value.shape for name, value in on_paper(TWO).state_dict().items()}
    assert state.pop("sobel.conv1.weight") == (4, 2, 3, 3)
    wanted = {f"{stream}.{name}": shape for stream in ("rgb", "sobel") for name, shape in plain.items()}
    wanted.pop("sobel.conv1.weight")
    assert state == wanted, "and no filters"


def edges_by_loop(x: Tensor) -> Tensor:
    """Grey, then each derivative written out: nine neighbors, zero outside, rows from top to bottom."""
    n, _, height, width = x.shape
    out = torch.zeros(n, 2, height, width, dtype=x.dtype)
    for image in range(n):
        grey = (x[image, 0] + x[image, 1] + x[image, 2]) / 3

        def at(row: int, column: int, grey: Tensor = grey) -> float:
            return float(grey[row, column]) if 0 <= row < height and 0 <= column < width else 0.0

        for i in range(height):
            for j in range(width):
                out[image, 0, i, j] = (at(i - 1, j - 1) - at(i - 1, j + 1) + 2 * at(i, j - 1) - 2 * at(i, j + 1)
                                       + at(i + 1, j - 1) - at(i + 1, j + 1))
                out[image, 1, i, j] = (at(i - 1, j - 1) + 2 * at(i - 1, j) + at(i - 1, j + 1)
                                       - at(i + 1, j - 1) - 2 * at(i + 1, j) - at(i + 1, j + 1))
    return out


def edges_by_convolutions() -> nn.Sequential:
    """The front end of the paper's network: a 1x1 convolution to grey, then a 3x3 one, both fixed."""
    grey, filters = nn.Conv2d(3, 1, 1).double(), nn.Conv2d(1, 2, 3, padding=1).double()
    horizontal = torch.tensor([1.0, 2.0, 1.0])[:, None] * torch.tensor([1.0, 0.0, -1.0])
    grey.weight.data.fill_(1 / 3)
    filters.weight.data.copy_(torch.stack([horizontal, horizontal.T])[:, None])
    grey.bias.data.zero_()
    filters.bias.data.zero_()
    return nn.Sequential(grey, filters).requires_grad_(False)


def test_edges_are_sobel_derivatives_of_grey() -> None:
    x = views_of(7, n=2, dtype=torch.float64)[..., :5]
    found = two_streams().double().edges(x)
    assert torch.allclose(found, edges_by_loop(x), rtol=0, atol=1e-12)
    assert torch.allclose(found, edges_by_convolutions()(x), rtol=0, atol=1e-12)


def test_edges_have_the_published_sign_and_answer_at_the_border() -> None:
    left = torch.zeros(1, 3, 8, 8)
    left[..., :4] = 1.0
    horizontal, vertical = two_streams().edges(left)[0]
    assert horizontal[4].tolist() == [-4, 0, 0, 4, 4, 0, 0, 0], "bright on the left is positive; zeros lie around"
    assert vertical[4].tolist() == [0] * 8
    assert vertical[0].tolist() == [-3, -4, -4, -3, -1, 0, 0, 0]
    assert torch.equal(two_streams().edges(left.transpose(2, 3))[0, 1], horizontal.T)


def test_the_filters_are_fixed() -> None:
    net = two_streams()
    x = views_of(8).requires_grad_()
    assert net.edges(x).requires_grad and not net.filters.requires_grad  # the image has a gradient: it may be attacked
    assert torch.equal(net.filters, torch.tensor(SOBEL)[:, None])
    assert not any("filters" in name for name in (*net.state_dict(), *dict(net.named_parameters())))
    net(x).sum().backward()
    assert net.filters.grad is None


def test_the_pixels_half_is_first_and_nothing_is_shared() -> None:
    net, x = two_streams().eval(), views_of(16)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(before, torch.cat([net.rgb(x), net.sobel(net.edges(x))], dim=1))
        for value in net.rgb.parameters():
            value.add_(0.1)
        after = net(x)
    assert (before[:, :32] - after[:, :32]).abs().min() > 0
    assert torch.equal(before[:, 32:], after[:, 32:])
    places = [value.untyped_storage().data_ptr() for value in net.state_dict().values()]
    assert len(set(places)) == len(places) == 240


def test_streams_start_from_different_weights() -> None:
    net = two_streams()
    assert not torch.equal(net.rgb.layer1[0].conv1.weight, net.sobel.layer1[0].conv1.weight)


def test_the_gradient_reaches_every_weight_of_both_streams() -> None:
    net = two_streams()
    (net(views_of(32, n=4)) * torch.randn(4, 64, generator=seeded(2))).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_averaging_the_map_is_the_published_pool_at_32_pixels() -> None:
    net = two_streams().eval()
    maps: list[Tensor] = []
    for stream in (net.rgb, net.sobel):
        stream.layer4.register_forward_hook(lambda _, __, out: maps.append(out))
    with torch.no_grad():
        found = net(views_of(32))
    assert [tuple(each.shape[2:]) for each in maps] == [(4, 4), (4, 4)]
    pooled = torch.cat([nn.functional.avg_pool2d(each, 4).flatten(1) for each in maps], dim=1)
    assert torch.allclose(found, pooled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [1, 8, 64, 96])
@pytest.mark.parametrize("stem", ["cifar", "stl", "imagenet"])
def test_two_streams_take_every_size_and_stem(side: int, stem: str) -> None:
    net = two_streams(EncoderSpec(stem=stem, width=2, streams="rgb_sobel")).eval()
    with torch.no_grad():
        found = net(views_of(side))
    assert found.shape == (3, 32) and found.min() >= 0
    assert side == 1 or (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_two_streams_stay_in_the_precision_they_are_given(dtype: torch.dtype) -> None:
    net = two_streams().eval()
    wanted = net(views_of(16))
    found = net.to(dtype)(views_of(16, dtype=dtype))
    assert found.dtype == dtype
    assert torch.allclose(found.float(), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


def test_two_streams_agree_in_channels_last_and_autocast() -> None:
    net, x = two_streams().eval(), views_of(16)
    with torch.no_grad():
        wanted = net(x)
        last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert torch.allclose(last, wanted, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(net(x).float(), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
