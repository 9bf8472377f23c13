"""Frozen encoders: what the registry says is so by timm's own records; features stand in a row; sizes are met."""

import io
import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

from phyla.errors import InputError
from phyla.nets.frozen import (
    FROZEN,
    FrozenEncoder,
    FrozenSpec,
    Member,
    build_encoder,
    encoder_form,
    folded,
    resize_matrix,
)
from phyla.nets.resnet import EncoderSpec
from phyla.randomness import generator

LITE = Member.of("lite0", 32)


@pytest.fixture(scope="module")
def pair() -> FrozenEncoder:
    """Two small convolutional networks of different inputs, with BatchNorm's statistics away from their start."""
    members = (LITE, Member.of("mobilenetv2", 64))
    nets = [lively(member.build()) for member in members]
    return FrozenEncoder(FrozenSpec(members), nets)


def lively(net: nn.Module) -> nn.Module:
    source = generator(1, "statistics")
    for value in net.buffers():
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand(value.shape, generator=source))
    return net


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if "large" in known.architecture else []) for name, known in
    FROZEN.items()])
def test_the_registry_says_what_timm_says(name):
    known, member = FROZEN[name], Member.of(name)
    own = timm.get_pretrained_cfg(f"{known.architecture}.{known.tag}", allow_unregistered=False)
    with torch.device("meta"):
        net, whole = member.build().eval(), timm.create_model(known.architecture, num_classes=own.num_classes)
        shown = net(torch.zeros(2, 3, known.size, known.size))
    assert shown.shape == (2, known.n_features)
    assert known.size == (224 if "DINOv2" in known.title else own.input_size[1])
    if known.package.startswith("efficientnet"):
        assert np.allclose(known.norm, [(127 / 255,) * 3, (128 / 255,) * 3], atol=1e-6)
    else:
        assert known.norm == (tuple(own.mean), tuple(own.std))
    assert own.interpolation == member.interpolation == "bicubic"
    held = net if name == "mobilenetv2" else whole  # that package leaves the classifier out
    assert known.megabytes == pytest.approx(sum(v.numel() for v in held.state_dict().values()) * 4e-6, abs=0.1)
    if known.licence != "MIT":
        assert known.licence.lower().replace(" ", "-") == own.license
    assert known.n_out in (0, own.num_classes) and (known.n_out > 0) == known.title.startswith("CLIP")
    assert known.supervision == "ImageNet-supervised" if known.package else known.data


def test_features_stand_in_a_row_and_each_network_sees_its_own_size(pair):
    views = torch.rand(3, 3, 48, 48, generator=generator(0, "views"))
    whole = pair(views)
    assert pair.widths == (1280, 1280) and pair.spec.n_features == 2560 and pair.spec.size == 64
    for part, member, net in zip(whole.split(pair.widths, dim=1), pair.spec.members, pair.members, strict=True):
        resized = nn.functional.interpolate(views, size=(member.size,) * 2, mode="bicubic",
                                            antialias=member.size < 48).clamp(0, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (member.mean, member.std))
        torch.testing.assert_close(part, net((resized - mean) / std), rtol=1e-4, atol=1e-4)
        assert part.std() > 1e-3


def test_an_image_of_the_right_size_is_not_resampled(pair):
    views = torch.rand(2, 3, 32, 32, generator=generator(0, "views"))
    assert pair._resized(views, 32, "bicubic") is views
    assert pair._resized(views, 64, "bicubic").shape == (2, 3, 64, 64)
    assert float(pair._resized((views > 0.5).float(), 64, "bicubic").max()) <= 1


@pytest.mark.parametrize(("given", "wanted"), [(48, 32), (32, 48), (40, 40), (5, 64)])
def test_resizing_is_torch_s_with_antialiasing_only_to_shrink(given, wanted):
    line = torch.rand(1, 1, given, 3, generator=generator(0, "line"))
    expected = nn.functional.interpolate(line, size=(wanted, 3), mode="bicubic", antialias=wanted < given)
    torch.testing.assert_close(resize_matrix(given, wanted, "bicubic") @ line, expected)
    torch.testing.assert_close(resize_matrix(given, wanted, "bicubic").sum(dim=1), torch.ones(wanted))


def test_images_that_are_not_square_are_pressed_into_the_input(pair):
    assert pair(torch.rand(1, 3, 40, 50)).shape == (1, 2560)


def test_folding_batchnorm_changes_rounding_alone():
    plain = lively(LITE.build()).eval()
    views = torch.rand(2, 3, 32, 32, generator=generator(0, "views"))
    with torch.no_grad():
        before = plain(views)
        after = folded(plain)(views)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_it_stays_in_evaluation_mode_and_takes_no_gradient(pair):
    assert not any(module.training for module in pair.train().modules())
    assert not any(parameter.requires_grad for parameter in pair.parameters())


def test_many_images_are_taken_in_blocks_of_one_length(pair, monkeypatch):
    monkeypatch.setattr("phyla.nets.frozen._TOGETHER", 4)
    lengths, views = [], torch.rand(10, 3, 32, 32, generator=generator(0, "views"))
    held = [block.register_forward_hook(lambda _, given, __: lengths.append(len(given[0]))) for block in pair.members]
    found = pair(views)
    for handle in held:
        handle.remove()
    assert lengths == [4] * 6 and len(found) == 10
    torch.testing.assert_close(found[8:], pair(views[8:]), rtol=1e-4, atol=1e-4)


def test_its_form_is_json_and_rebuilds_it_without_weights_from_anywhere(pair):
    own = Member("mine", "phyla", 8, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 32, own=EncoderSpec(width=4))
    encoder = FrozenEncoder(FrozenSpec((LITE, own)), [LITE.build(), own.own.build(generator(0, "own"))])
    form = json.loads(json.dumps(encoder_form(encoder)))
    again = build_encoder(form)
    assert again.spec == encoder.spec and again.widths == (1280, 32) and again.spec.name == "lite0,mine"
    again.load_state_dict(encoder.state_dict())
    views = torch.rand(2, 3, 16, 16, generator=generator(0, "views"))
    assert torch.equal(again(views), encoder(views))
    assert encoder_form(own.own.build()) == {"name": "resnet18", "stem": "cifar", "width": 4, "streams": "rgb",
                                             "members": 1}


def test_building_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    LITE.build()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_can_be_exported_for_other_runtimes():
    own = Member("mine", "phyla", 16, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 32, own=EncoderSpec(width=4))
    encoder = FrozenEncoder(FrozenSpec((own,)), [own.own.build(generator(0, "own"))])
    views = torch.rand(40, 3, 24, 24, generator=generator(0, "views"))
    exported = torch.export.export(encoder.prepare(24, 24), (views,),
                                   dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(views[:5]), encoder(views[:5]), rtol=1e-4, atol=1e-4)


def test_bf16_leaves_the_pixels_as_they_are(pair):
    views = torch.rand(2, 3, 48, 48, generator=generator(0, "views"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pair._resized(views, 32, "bicubic"), pair._resized(views, 32, "bicubic").float())
        assert pair(views).dtype == torch.float32


@pytest.mark.parametrize(("name", "size", "said"), [
    ("lite9", 0, "did you mean lite"), ("dinov2-small", 160, "patches of 14 pixels.*154 or 168"),
    ("lite0", 16, "at least 32")])
def test_what_cannot_be_built_is_said(name, size, said):
    with pytest.raises(InputError, match=said):
        Member.of(name, size)


def test_a_deep_copy_and_a_pickle_free_file_hold_it_whole(pair):
    file = io.BytesIO()
    torch.save(pair.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == pair.state_dict().keys()
    assert "norms" not in pair.state_dict()
