"""The classifier: saved and loaded it says the same, of pictures in any form; damaged is told apart from missing."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from phyla.classifier import Classifier
from phyla.embed import forward_all
from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.images.augment import Views
from phyla.images.decode import read_image
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import EncoderSpec, ResNet
from phyla.types import ImageSet

VIEWS = Views("strong", 8, mean=(0.3, 0.4, 0.5), cutout=2)


def same(found: np.ndarray, expected: np.ndarray, name: str = "") -> None:
    """Compare to the last bits: a convolution may sum an image of a batch in another order than the one before it."""
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.fixture
def classifier(encoder: ResNet) -> Classifier:
    """Return a classifier of 12-pixel pictures into three clusters, untrained but for BatchNorm's statistics."""
    heads = ClusterHeads(32, 3)
    heads.initialise(torch.Generator().manual_seed(1))
    for seed in range(20):
        encoder(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    return Classifier(ClusterNet(encoder, heads), VIEWS, 12, ["cats", "dogs", "größe"], {"recipe": "test", "seed": 0})


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Return four real pictures, uint8 (60, 80, 3)."""
    return [image[top : top + 60, 200:280].copy() for image in load_sample_images().images for top in (100, 250)]


def test_what_it_is_not_sure_of_is_left_open(classifier, photographs):
    found = classifier.predict_proba(photographs)
    middle = float(np.median(found.max(axis=1)))
    sure = found.max(axis=1) >= middle
    labels = classifier.predict(photographs, min_confidence=middle)
    assert labels.dtype == np.int64 and 0 < sure.sum() < len(sure)
    np.testing.assert_array_equal(labels, np.where(sure, classifier.predict(photographs), -1))
    with pytest.raises(InputError, match=r"from 0 to 1, got 60"):
        classifier.predict(photographs, min_confidence=60)


# ── save and load ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_loaded_it_gives_the_same_probabilities_bit_for_bit(classifier, noise, tmp_path):
    classifier.save(tmp_path / "new" / "run")
    loaded = Classifier.load(str(tmp_path / "new" / "run"))
    np.testing.assert_array_equal(loaded.predict_proba(noise), classifier.predict_proba(noise))
    assert loaded.names == ["cats", "dogs", "größe"] and loaded.facts == {"recipe": "test", "seed": 0}
    assert loaded.views == VIEWS and loaded.size == 12 and loaded.n_clusters == 3 and not loaded.net.training
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == ["model.json", "model.safetensors"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "new" / "run").iterdir()}
    loaded.save(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before


@pytest.mark.parametrize("spec", [{"name": "resnet50", "stem": "imagenet", "width": 2}, {"stem": "stl", "width": 3}])
def test_every_kind_of_encoder_comes_back(spec, noise, tmp_path):
    encoder = EncoderSpec(**spec).build(torch.Generator().manual_seed(0))
    heads = ClusterHeads(encoder.spec.n_features, 2)
    heads.initialise(torch.Generator().manual_seed(0))
    first = Classifier(ClusterNet(encoder, heads), Views("simclr", 16), 16)
    first.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    assert loaded.net.encoder.spec == encoder.spec and loaded.names == ["cluster 0", "cluster 1"]
    np.testing.assert_array_equal(loaded.predict_proba(noise), first.predict_proba(noise))


def test_names_and_heads_must_fit(classifier):
    with pytest.raises(InputError, match="3 clusters need 3 names, got 2"):
        Classifier(classifier.net, VIEWS, 12, ["a", "b"])
    with pytest.raises(InputError, match="one head, got 2"):
        Classifier(ClusterNet(classifier.net.encoder, ClusterHeads(32, 3, 2)), VIEWS, 12)
    net = classifier.net.train()
    assert Classifier(net, VIEWS, 12).names == ["cluster 0", "cluster 1", "cluster 2"] and not net.training


def test_a_foreign_encoder_can_predict_and_says_that_it_cannot_be_saved(classifier, tmp_path):
    class Means(nn.Module):
        def forward(self, views: torch.Tensor) -> torch.Tensor:
            return views.mean(dim=(2, 3)).repeat(1, 11)[:, :32]

    foreign = Classifier(ClusterNet(Means(), classifier.net.heads), VIEWS, 12)
    assert foreign.predict(np.zeros((2, 12, 12, 3), np.uint8)).shape == (2,)
    with pytest.raises(InputError, match="only phyla's own encoders can be saved, got Means"):
        foreign.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_one_is_told_apart_from_a_damaged_one(classifier, tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        with pytest.raises(DataNotFoundError, match=r"holds no classifier .* hint: give the folder of a finished run"):
            Classifier.load(folder)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _changed(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = json.loads((folder / "model.json").read_text(encoding="utf-8")) | values
        (folder / "model.json").write_text(json.dumps({k: v for k, v in held.items() if v != "gone"}), encoding="utf-8")

    return change


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("damage", "said"), [
    (_cut, "cannot be read"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be read"),
    (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
    (lambda folder: (folder / "model.json").write_text('{"format": 1, "enc'), "is not readable JSON"),
    (lambda folder: (folder / "model.json").write_text("[]"), "holds no JSON object"),
    (lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe"), "is not readable JSON"),
    (_changed(format=3), "has format 3, this version reads 1 to 2"), (_changed(format="gone"), "has format None"),
    (_changed(encoder={"name": "resnet19"}), "cannot be read .*resnet19"), (_changed(encoder="gone"), "cannot be read"),
    (_changed(encoder=[1, 2]), "cannot be read"), (_changed(n_clusters=4), "cannot be read"),
    (_changed(n_clusters=-1), "cannot be read"), (_changed(names=["a"]), "3 names, got 1"),
    (_changed(views={"kind": "strong", "size": 8, "colour": 1}), "no option 'colour'"), (_changed(views=[1]), "read"),
])
def test_damaged_files_are_one_clear_line(classifier, tmp_path, damage, said):
    classifier.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CorruptFileError, match=said) as raised:
        Classifier.load(tmp_path)
    assert raised.value.hint and "\n" not in str(raised.value)


# ── pictures of every kind ────────────────────────────────────────────────────────────────────────────────────────


def test_probabilities_are_those_of_the_network_on_plain_views(classifier, noise):
    small = ImageSet(noise.array[:, :12, :12].copy(), noise.ids)
    expected = forward_all(small, classifier.net, classifier.net.probabilities, VIEWS.plain())[:, 0]
    found = classifier.predict_proba(small)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32 and found.shape == (32, 3)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    labels = classifier.predict(small)
    assert labels.dtype == np.int64 and np.array_equal(labels, found.argmax(axis=1))
    np.testing.assert_allclose(classifier.predict_proba(small, batch_size=5), found, atol=1e-5)


def test_one_picture_is_the_same_in_every_form(classifier, photographs, tmp_path):
    for row, image in enumerate(photographs):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
    paths = [tmp_path / f"{row}.png" for row in range(4)]
    forms = {
        "paths": paths, "strings": [str(path) for path in paths], "PIL": [Image.open(path) for path in paths],
        "arrays": photographs, "array": np.stack(photographs), "tensor": torch.from_numpy(np.stack(photographs)),
        "tensors": [torch.from_numpy(image) for image in photographs],
        "set": ImageSet(np.stack(photographs), list("abcd")), "real": np.stack(photographs) / 255,
        "channels first": np.stack(photographs).transpose(0, 3, 1, 2).copy(), "tuple": tuple(paths),
        "mixed": [paths[0], photographs[1], Image.fromarray(photographs[2]), str(paths[3])],
    }
    expected = classifier.predict_proba(ImageSet(np.stack([read_image(path, 12) for path in paths]), list("abcd")))
    assert np.ptp(expected, axis=0).max() > 1e-3, "the pictures differ"
    for name, form in forms.items():
        same(classifier.predict_proba(form), expected, name)
    assert np.array_equal(classifier.predict(paths), expected.argmax(axis=1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_in_memory_are_read_as_their_files_are(classifier, photographs, tmp_path, mode):
    image = Image.fromarray(photographs[0]).convert("L" if mode == "LA" else "RGB")
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(photographs[1]).convert("L"))
    image = Image.fromarray(photographs[0][..., 0].astype(np.uint16) * 200) if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    image.save(path)
    found = classifier.predict_proba([image, Image.open(path), path])
    same(found[0], found[2])
    same(found[1], found[2])


def test_a_turned_photograph_is_turned_back(classifier, photographs, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photographs[0]).save(tmp_path / "turned.png", exif=exif)
    upright = Image.fromarray(photographs[0]).transpose(Image.Transpose.ROTATE_270)
    with Image.open(tmp_path / "turned.png") as turned:
        found = classifier.predict_proba([tmp_path / "turned.png", turned, upright])
    same(found[0], found[1])
    same(found[0], found[2])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (300, 7), (12, 12), (8, 8), (500, 500)])
def test_any_size_and_grey_can_be_labelled(classifier, shape):
    grey = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = classifier.predict_proba([grey, np.repeat(grey[..., None], 3, axis=2), Image.fromarray(grey)])
    assert found.shape == (3, 3) and np.isfinite(found).all()
    same(found[0], found[1])
    same(found[0], found[2])


def test_what_is_no_list_of_pictures_is_refused(classifier, noise, tmp_path):
    for empty in ([], np.zeros((0, 12, 12, 3), np.uint8), ImageSet(np.zeros((0, 12, 12, 3), np.uint8), [])):
        with pytest.raises(InputError, match=r"no (image|picture)"):
            classifier.predict(empty)


@pytest.mark.usefixtures("unchecked")
def test_one_picture_instead_of_a_list_is_explained(classifier, tmp_path):
    for one in ("photo.jpg", tmp_path, Image.new("RGB", (9, 9))):
        with pytest.raises(InputError, match=r"pictures come as a list, got one .* hint: \[picture\] for one"):
            classifier.predict(one)
    with pytest.raises(InputError, match="looks like one image"):
        classifier.predict(np.zeros((9, 9, 3), np.uint8))


def test_a_file_that_cannot_be_read_is_named(classifier, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    for path in (tmp_path / "text.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(CorruptFileError, match=re.escape(path.name)):
            classifier.predict([path])


# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_says_what_a_batch_says_and_names_what_it_skips(classifier, noise, tmp_path):
    for name, pixels in zip(noise.ids, noise.array, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for row in range(3):  # a whole chunk of files that are none
        (tmp_path / "noise" / f"00 broken {row}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    chunks = list(classifier.predict_stream(tmp_path, chunk=3))
    assert len(chunks) == 12 and chunks[0][0] is None
    assert [name for _, skipped in chunks for name, _ in skipped] == [f"noise/00 broken {row}.png" for row in range(3)]
    parts = [assignment for assignment, _ in chunks if assignment is not None]
    assert [name for part in parts for name in part.ids] == [f"{name}.png" for name in noise.ids]
    expected = classifier.predict_proba([tmp_path / f"{name}.png" for name in noise.ids])
    np.testing.assert_allclose(np.concatenate([part.probabilities for part in parts]), expected, atol=1e-5)
    with pytest.raises(CorruptFileError, match="00 broken 0"):
        list(classifier.predict_stream(tmp_path, strict=True))


def test_a_stream_holds_a_few_chunks_of_pixels_at_a_time(classifier, noise, tmp_path, monkeypatch):
    (tmp_path / "noise").mkdir()
    for name, pixels in zip(noise.ids, noise.array, strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    sizes = []
    predict = classifier.predict_proba
    monkeypatch.setattr(classifier, "predict_proba",
                        lambda images, **options: sizes.append(len(images)) or predict(images, **options))
    assert sum(len(part) for part, _ in classifier.predict_stream(tmp_path, chunk=10) if part) == 32
    assert sizes == [10, 10, 10, 2]
