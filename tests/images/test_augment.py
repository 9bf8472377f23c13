"""Whole views against Pillow and torchvision with the same draws, and what a recipe promises."""

import json
from dataclasses import asdict

import jaxtyping
import pytest
import torch
import torchvision.transforms.functional as reference
from pictures import from_pil, pictures, resized_crop, to_pil
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from phyla.errors import InputError
from phyla.images import augment, passes
from phyla.images.augment import STRONG, Draws, Views, apply_operations, views_from
from phyla.images.operations import to_float
from tape import HostError, Tape

KINDS = ["plain", "weak", "simclr", "strong", "ruc_weak", "ruc_strong"]
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


def source(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def unchecked(monkeypatch):
    """Switch the tests' own check of annotations off: users meet our errors, not those."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def affine(*coefficients):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, coefficients)


PILLOW = {
    "identity": lambda image, v: image,
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "rotate": lambda image, v: image.rotate(v),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "shear_x": lambda image, v: affine(1, v, 0, 0, 1, 0)(image),
    "shear_y": lambda image, v: affine(1, 0, 0, v, 1, 0)(image),
    "translate_x": lambda image, v: affine(1, 0, v, 0, 1, 0)(image),
    "translate_y": lambda image, v: affine(1, 0, 0, 0, 1, v)(image),
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "hue": reference.adjust_hue,
}


def by_pillow(views: Views, pixels: torch.Tensor, drawn: Draws) -> torch.Tensor:
    """Return the views that Pillow and torchvision make, one image after another, of what was drawn."""
    names = augment.JITTER if views.kind == "simclr" else views.operations
    made = []
    for i, image in enumerate(to_pil(pixels)):
        box = drawn.box[i].tolist()
        if views.kind in ("simclr", "ruc_weak", "ruc_strong"):
            image = resized_crop(image, box, (views.size, views.size))
        else:
            image = reference.resize(image, views.size) if min(image.size) < views.size else image
            image = reference.crop(image, *box)
        image = reference.hflip(image) if drawn.flip[i] else image
        for operation, magnitude in zip(drawn.ids[i].tolist(), drawn.magnitudes[i].tolist(), strict=True):
            image = PILLOW[names[operation]](image, magnitude) if operation >= 0 else image
        image = reference.to_grayscale(image, 3) if drawn.grey[i] else image
        image = image.copy()
        y0, y1, x0, x1 = drawn.hole[i].tolist()
        if views.kind == "ruc_strong":
            ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), (127, 127, 127))  # both edges are drawn
        view = reference.normalize(reference.to_tensor(image), list(views.mean), list(views.std))
        if views.kind == "strong":
            view[:, y0:y1, x0:x1] = 0
        made.append(view)
    return torch.stack(made)


@pytest.mark.parametrize(("stored", "size"), [
    ((32, 32), 32), ((96, 96), 96), ((8, 8), 8), ((40, 51), 32), ((20, 33), 32),
])
@pytest.mark.parametrize("kind", KINDS)
def test_views_are_what_pillow_makes_of_the_same_draws(kind, stored, size):
    pixels = pictures(*stored).repeat(6 if size == 96 else 20, 1, 1, 1)
    views = Views(kind=kind, size=size, **CIFAR)
    ours = views(pixels, source(1))
    theirs = by_pillow(views, pixels, views.draw(len(pixels), source(1), height=stored[0], width=stored[1]))
    levels = (ours - theirs) * torch.tensor(views.std).view(1, 3, 1, 1) * 255
    changed = levels.abs() > 0.01
    assert changed.double().mean() < 1e-3, f"{changed.double().mean():.5f} of all values differ"
    assert changed.any(dim=(1, 2, 3)).double().mean() < 0.05


def test_the_weak_view_of_an_image_of_its_size_is_the_image():
    pixels = pictures(32, 32)
    weak = Views(kind="weak", size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(pixels, source())
    torch.testing.assert_close(weak * 255, to_float(pixels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 32, 32), (1, 8, 8), (3, 20, 50), (2, 64, 41), (2, 1, 1), (2, 2, 3)])
def test_any_batch_of_any_size(kind, shape):
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=source())
    kept = pixels.clone()
    for size in (8, 32):
        out = Views(kind=kind, size=size)(pixels, source(1))
        assert out.shape == (shape[0], 3, size, size) and out.dtype == torch.float32
        assert out.isfinite().all() and out.is_contiguous()
    assert torch.equal(pixels, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_views_and_other_seeds_others(kind):
    pixels, views = pictures(32, 32), Views(kind=kind, size=32)
    first, again, other = views(pixels, source(3)), views(pixels, source(3)), views(pixels, source(4))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind in ("plain", "weak"))


@pytest.mark.parametrize("kind", ["simclr", "strong", "ruc_weak", "ruc_strong"])
def test_each_image_has_its_own_draws(kind):
    pixels = pictures(32, 32)[:1].repeat(50, 1, 1, 1)
    out = Views(kind=kind, size=32)(pixels, source())
    assert len({view.numpy().tobytes() for view in out}) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_influences_another(kind):
    pixels, views = pictures(32, 32).repeat(3, 1, 1, 1), Views(kind=kind, size=32)
    before = views(pixels, source())
    changed = pixels.clone()
    changed[::2] = 255 - changed[::2].flip(1)
    after = views(changed, source())
    assert torch.equal(before[1::2], after[1::2])
    assert not torch.equal(before[::2], after[::2])


@pytest.mark.parametrize("kind", KINDS)
def test_views_do_not_depend_on_how_much_is_worked_on_at_once(kind, monkeypatch):
    pixels, views = pictures(40, 40), Views(kind=kind, size=32)
    at_once = views(pixels, source())
    for block, share in ((2, 100), (2, 5), (1, 3)):
        monkeypatch.setattr(augment, "_CPU_BLOCK", 3 * 40 * 40 * block)
        monkeypatch.setattr(augment, "_CPU_SHARE", 3 * 40 * 40 * share)
        assert torch.equal(views(pixels, source()), at_once)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_have_the_views_of_the_whole(kind):
    pixels, views = pictures(40, 40), Views(kind=kind, size=32)
    whole, first, last = source(), source(), source()
    parts = [views(pixels[:5], first, total=len(pixels)), views(pixels[5:], last, total=len(pixels), start=5)]
    assert torch.equal(torch.cat(parts), views(pixels, whole))
    assert torch.equal(whole.get_state(), first.get_state()) and torch.equal(whole.get_state(), last.get_state())


@pytest.mark.parametrize("shape", [(0, 40, 40), (39, 40, 40), (4, 20, 51), (2, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_static_views_are_the_sorted_ones(kind, shape):
    """Bit for bit, although every image goes through every pass."""
    pixels = pictures(*shape[1:]).repeat(3, 1, 1, 1)[: shape[0]]
    for size, options in ((32, {}), (8, {"operations": ("equalize", "shear_y")}), (8, {"hue": 0.0, "level": 7})):
        views = Views(kind=kind, size=size, **options)
        for seed in range(3):
            assert torch.equal(views(pixels, source(seed), static=True), views(pixels, source(seed), static=False))


@pytest.mark.parametrize("name", [name for name in augment.OPERATIONS if name != "identity"])
def test_an_operation_in_static_passes_changes_its_images_alone(name):
    """Magnitudes of other operations, however odd for this one, do no harm."""
    images = to_float(pictures(20, 33)).repeat(8, 1, 1, 1)
    ids = torch.arange(len(images)).view(-1, 1) % 3 - 1
    magnitudes = torch.linspace(-40, 256, len(images)).view(-1, 1)
    magnitudes[ids == 0] = torch.tensor([0.0, 0.3, 0.5, 1.0, -0.2])[torch.arange(int((ids == 0).sum())) % 5]
    if name == "posterize":
        magnitudes[ids == 0] = torch.arange(int((ids == 0).sum())).float() % 8 + 1
    told = {"ids": ids, "magnitudes": magnitudes, "operations": (name, "identity")}
    at_once = passes.apply_operations(images, **told)
    assert torch.equal(at_once, apply_operations(images.clone(), **told))
    assert torch.equal(at_once[ids[:, 0] != 0], images[ids[:, 0] != 0])


@pytest.mark.parametrize("kind", KINDS)
def test_static_views_can_be_recorded_once_and_replayed(kind):
    """As a CUDA graph does: other images in the same memory, other random numbers, no word from the host."""
    first, others, views = pictures(40, 40), pictures(40, 40).flip(0, 2), Views(kind=kind, size=32)
    expected = views(others, source(8))
    given, generator = first.clone(), source(7)
    views(given, generator, static=True)  # warm: constants are copied to the device
    with Tape() as tape:
        made = views(given, generator, static=True)
    given.copy_(others)
    generator.manual_seed(8)
    tape.replay()
    assert torch.equal(made, expected)


def test_sorted_views_cannot_be_recorded():
    """The test above can fail."""
    pixels, views = pictures(32, 32), Views(kind="strong", size=32)
    views(pixels, source())
    with pytest.raises(HostError), Tape():
        views(pixels, source(), static=False)


@pytest.mark.parametrize(("start", "total"), [(-1, 8), (5, 8), (0, 3)])
def test_a_part_outside_its_batch_is_refused(start, total, unchecked):
    with pytest.raises(InputError, match=f"a batch of total={total} images has none {start} to {start + 3}"):
        Views(kind="plain", size=8)(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), source(), start=start, total=total)


def test_operations_act_in_the_order_drawn():
    """Brightness after inversion of black is not inversion after darkening."""
    images = torch.zeros(3, 3, 4, 4)
    ids = torch.tensor([[0, 1], [1, 0], [-1, 0]])
    magnitudes = torch.tensor([[0.0, 0.5], [0.5, 0.0], [0.5, 0.0]])
    out = apply_operations(images, ids, magnitudes, operations=("solarize", "brightness"))
    assert [view.unique().tolist() for view in out] == [[127], [255], [255]]


def test_without_operations_hole_flip_and_jitter_nothing_happens():
    pixels = pictures(32, 32)
    plain = Views(kind="plain", size=32)(pixels, source())
    still = Views(kind="strong", size=32, n_operations=0, cutout=0, flip=0.0)
    assert torch.equal(still(pixels, source()), plain)
    whole = Views(kind="simclr", size=32, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)
    assert torch.equal(whole(pixels, source()), plain)


def test_a_flip_of_probability_one_mirrors():
    pixels = pictures(32, 32)
    views = Views(kind="strong", size=32, n_operations=0, cutout=0, flip=1.0)
    assert torch.equal(views(pixels, source()), Views(kind="plain", size=32)(pixels, source()).flip(3))


def test_only_chosen_operations_are_drawn():
    views = Views(kind="strong", size=32, operations=("posterize",), n_operations=1, cutout=0, flip=0.0,
                  mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = pictures(32, 32)
    levels = (views(pixels, source()) * 255).round().long()
    assert (levels % 2 == 0).all() and not torch.equal(levels, to_float(pixels).long())


RUC_TABLE = {  # as published at its only level: what Pillow is told, on images of 32 and of 96 pixels; ± by a coin
    "autocontrast": [lambda image, side: ImageOps.autocontrast(image)],
    "brightness": [lambda image, side: ImageEnhance.Brightness(image).enhance(0.109)],
    "color": [lambda image, side: ImageEnhance.Color(image).enhance(0.109)],
    "contrast": [lambda image, side: ImageEnhance.Contrast(image).enhance(0.109)],
    "equalize": [lambda image, side: ImageOps.equalize(image)],
    "identity": [lambda image, side: image],
    "posterize": [lambda image, side: ImageOps.posterize(image, 8)],
    "rotate": [lambda image, side: image.rotate(41), lambda image, side: image.rotate(-41)],
    "sharpness": [lambda image, side: ImageEnhance.Sharpness(image).enhance(0.109)],
    "shear_x": [lambda image, side: affine(1, 0.27, 0, 0, 1, 0)(image),
                lambda image, side: affine(1, -0.27, 0, 0, 1, 0)(image)],
    "shear_y": [lambda image, side: affine(1, 0, 0, 0.27, 1, 0)(image),
                lambda image, side: affine(1, 0, 0, -0.27, 1, 0)(image)],
    "solarize": [lambda image, side: ImageOps.solarize(image, 231)],
    "translate_x": [lambda image, side: affine(1, 0, {32: 8, 96: 25}[side], 0, 1, 0)(image),
                    lambda image, side: affine(1, 0, {32: -8, 96: -25}[side], 0, 1, 0)(image)],
    "translate_y": [lambda image, side: affine(1, 0, 0, 0, 1, {32: 8, 96: 25}[side])(image),
                    lambda image, side: affine(1, 0, 0, 0, 1, {32: -8, 96: -25}[side])(image)],
}


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", STRONG)
def test_ruc_operations_are_those_of_the_published_table(name, side):
    """Each view is the untouched image or one of the table's, all of which occur."""
    views = Views(kind="ruc_strong", size=side, operations=(name,), n_operations=1, cutout=0, flip=0.0,
                  crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = pictures(side, side)[:2].repeat(12, 1, 1, 1)
    made = (views(pixels, source(1)) * 255).round()
    plain = to_pil(pixels[:2])
    table = torch.stack([from_pil([change(image, side) for image in plain])
                         for change in (lambda image, side: image, *RUC_TABLE[name])])
    away = (made.view(12, 1, 2, 3, side, side) - table).abs() > 1  # a level of rounding, as elsewhere
    share = away.double().mean(dim=(3, 4, 5))  # view, entry of the table, image
    assert (share.amin(dim=1) < 1e-3).all(), "a view is none of the table's"
    idle = name in ("identity", "posterize")
    assert set(share.argmin(dim=1).flatten().tolist()) == ({0} if idle else set(range(len(table))))


def test_the_grey_square_of_ruc_is_the_published_rectangle():
    """Both corners that Pillow is given are drawn: 17 pixels inside, fewer at the borders."""
    views = Views(kind="ruc_strong", size=32, n_operations=0, flip=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0),
                  mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = torch.full((400, 32, 32, 3), 255, dtype=torch.uint8)
    made = (views(pixels, source()) * 255).round()
    sizes = set()
    for view, (top, _, left, _) in zip(made, views.draw(400, source(), height=32, width=32).hole.tolist(), strict=True):
        image = Image.new("RGB", (32, 32), (255, 255, 255))
        corners = (left, top, min(32, left + 16), min(32, top + 16))
        ImageDraw.Draw(image).rectangle(corners, (127, 127, 127))
        assert torch.equal(view, from_pil([image])[0])
        sizes.add(tuple(int((view[0] == 127).any(dim=axis).sum()) for axis in (0, 1)))
    assert max(sizes) == (17, 17) and min(min(size) for size in sizes) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_survives_json(kind):
    views = Views(kind=kind, size=96, operations=("rotate", "equalize"), rotate=15.0, **CIFAR)
    again = views_from(json.loads(json.dumps(asdict(views))))
    assert again == views and hash(again) == hash(views)


def test_a_stored_recipe_with_an_unknown_option_is_refused():
    with pytest.raises(InputError, match=r"no option 'rotat'.*did you mean rotate"):
        views_from({"kind": "strong", "size": 32, "rotat": 15.0})


def test_plain_keeps_size_and_normalization():
    assert Views(kind="strong", size=96, rotate=5.0, **CIFAR).plain() == Views(kind="plain", size=96, **CIFAR)


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "simclrr"}, "did you mean simclr"), ({"operations": ("rotat",)}, "did you mean rotate"),
    ({"operations": ("hue",)}, "no operation 'hue'"),
    ({"operations": ("rotate", "rotate")}, "each name once"),
    ({"size": 0}, "size=0"), ({"std": (0.2, 0.0, 0.2)}, "std"),
    ({"mean": (0.5,)}, "mean"), ({"crop_scale": (0.0, 1.0)}, "crop_scale"), ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
    ({"crop_scale": (0.5, 1.5)}, "crop_scale"), ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"), ({"flip": 1.5}, "flip=1.5"),
    ({"jitter": -0.1}, "jitter"), ({"grey": 2.0}, "grey"), ({"brightness": -1.0}, "brightness"),
    ({"hue": 0.6}, "hue=0.6"), ({"rotate": -3.0}, "rotate"), ({"cutout": -1}, "cutout"), ({"level": 0}, "level=0"),
    ({"n_operations": -1}, "n_operations"), ({"operations": ()}, "n_operations=4 drawn from 0 operations"),
    ({"kind": "ruc_strong", "operations": ("rotate",)}, "n_operations=2 drawn from 1 operations"),
])
def test_what_cannot_be_is_said_at_once(options, message, unchecked):
    with pytest.raises(InputError, match=message):
        Views(**{"kind": "strong", "size": 32} | options)


@pytest.mark.parametrize("pixels", [
    torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3), torch.zeros(8, 8, 3, dtype=torch.uint8),
    torch.zeros(2, 0, 8, 3, dtype=torch.uint8),
])
def test_other_layouts_are_refused(pixels, unchecked):
    with pytest.raises(InputError, match="uint8 \\(batch, height, width, 3\\)"):
        Views(kind="plain", size=8)(pixels, source())


def test_strong_is_the_fourteen_operations():
    assert len(STRONG) == 14 and set(STRONG) == set(PILLOW) - {"hue"}
    assert torch.equal(from_pil(to_pil(pictures())), to_float(pictures()))  # the reference's own conversions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_makes_the_views_that_a_cpu_makes(kind):
    pixels, views = pictures(40, 40).repeat(20, 1, 1, 1), Views(kind=kind, size=32)
    host, device = views(pixels, source()), views(pixels.cuda(), source())
    assert device.is_cuda
    differing = ((device.cpu() - host).abs() > 1e-3).double().mean()
    assert differing < 1e-3
    own = torch.Generator(device="cuda").manual_seed(0)
    assert views(pixels.cuda(), own).isfinite().all()
