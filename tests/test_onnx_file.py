"""An ONNX file says what its classifier says, of any batch, with what a reader needs; else it is not there."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import config
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

import phyla
from commands import pictures_run
from phyla import onnx_file
from phyla.classifier import Classifier
from phyla.embed import forward_all
from phyla.errors import DataNotFoundError, InputError, PhylaError, StorageError
from phyla.images.augment import Views
from phyla.nets.frozen import FrozenSpec, Member
from phyla.nets.heads import ClusterHeads, ClusterNet, MixtureHeads, Projection, SpaceProjection
from phyla.nets.resnet import EncoderSpec
from phyla.onnx_file import OnnxFile, export_onnx, write_onnx
from phyla.types import ImageSet

onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
SIZE, NAMES = 12, ["cats", "dogs", "größe"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier_of(encoder: nn.Module, n_features: int, *, projection: nn.Module | None = None, size: int = SIZE,
                  view: int = 8, heads: nn.Module | None = None) -> Classifier:
    """Return a classifier whose BatchNorm has seen images and whose clusters are told apart."""
    n_seen = projection.n_out if projection is not None else n_features
    if heads is None:
        heads = ClusterHeads(n_seen, 3)
        heads.weight.data = torch.randn(heads.weight.shape, generator=seeded(1))
    encoder.train()
    with torch.no_grad():
        encoder(torch.randn(16, 3, view, view, generator=seeded(0)))
    views = Views("strong", view, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.25), cutout=2)
    return Classifier(ClusterNet(encoder, heads, projection), views, size, NAMES, {"recipe": "test", "seed": 3})


def small() -> Classifier:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for index, weight in enumerate(encoder.parameters()):
        weight.data = torch.randn(weight.shape, generator=seeded(index)) * 0.3
    return classifier_of(encoder, 8)


def session(path: Path):
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def pixels(n: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def same(path: Path, classifier: Classifier, n: int = 5) -> None:
    """Compare all that a file gives with what the classifier gives."""
    images, net = pixels(n, classifier.size), session(path)
    found, seen = net.run(["probabilities", "embedding"], {"images": images})
    np.testing.assert_allclose(found, classifier.predict_proba(images), atol=1e-4)
    rows = ImageSet(images, [str(row) for row in range(n)])
    expected = forward_all(rows, classifier.net, classifier.net.embed, classifier.views.plain()).numpy()
    np.testing.assert_allclose(seen, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    assert found.dtype == seen.dtype == np.float32
    assert n == 1 or np.ptp(found, axis=0).max() > 1e-4  # images are told apart


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Classifier, Path, OnnxFile]:
    """Return a small classifier, the file that it became, and what was said of it."""
    config.update("jaxtyping_disable", True)  # an exporter's sizes are no numbers
    classifier, path = small(), tmp_path_factory.mktemp("onnx") / "new" / "small.onnx"
    try:
        made = write_onnx(classifier, path)
    finally:
        config.update("jaxtyping_disable", False)
    return classifier, path, made


# ── what is in the file ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_number_of_images_gets_what_the_classifier_gives_them(written, n):
    classifier, path, _ = written
    same(path, classifier, n)


def test_what_was_written_is_told(written):
    _, path, made = written
    assert made.path == path and made.n_bytes == path.stat().st_size and made.n_checked == 8
    assert 0 <= made.difference < 1e-5 and [other.name for other in path.parent.iterdir()] == ["small.onnx"]


def test_inputs_and_outputs_have_names_types_and_an_open_batch(written):
    net = session(written[1])
    assert [(one.name, one.type, one.shape) for one in net.get_inputs()] == [
        ("images", "tensor(uint8)", ["batch", SIZE, SIZE, 3])]
    assert [(one.name, one.type, one.shape) for one in net.get_outputs()] == [
        ("probabilities", "tensor(float)", ["batch", 3]), ("embedding", "tensor(float)", ["batch", 8])]
    onnx.checker.check_model(written[1], full_check=True)


def test_the_metadata_say_what_a_reader_needs(written):
    told = session(written[1]).get_modelmeta().custom_metadata_map
    assert json.loads(told["names"]) == NAMES and int(told["size"]) == SIZE and int(told["view"]) == 8
    assert json.loads(told["mean"]) == [0.3, 0.4, 0.5] and json.loads(told["std"]) == [0.2, 0.3, 0.25]
    assert json.loads(told["facts"]) == {"recipe": "test", "seed": 3} and told["phyla"] == phyla.__version__
    assert "bilinear" in told["crop"] and told["encoder"] == '"Sequential"'


def test_frozen_weights_are_told_with_licence_and_training():
    spec = FrozenSpec((Member.of("mobilenetv2", 32), replace(Member.of("mobilenetv2", 64), name="mine.pth")))
    told = onnx_file._metadata(Classifier(ClusterNet(spec.build(), ClusterHeads(2560, 3)), Views("plain", 32), 32))
    known, own = json.loads(told["weights"])
    assert known == {"name": "mobilenetv2", "title": "MobileNetV2", "licence": "MIT", "data": "ImageNet-1k with labels",
                     "supervision": "ImageNet-supervised"}
    assert own == {"name": "mine.pth"} and FrozenSpec.read(json.loads(told["encoder"])) == spec
    assert "weights" not in onnx_file._metadata(small())


def test_no_folder_of_this_machine_is_in_the_file(written):
    held = written[1].read_bytes()
    assert b".py" not in held and str(Path(torch.__file__).parent).encode() not in held


@pytest.mark.parametrize(("listing", "apart"), [(0, 0.02), (1, 1e-4)])
def test_the_scripts_of_the_guide_label_pictures_as_the_classifier_does(written, tmp_path, listing, apart):
    classifier, path, _ = written
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
    (tmp_path / "label.py").write_text(re.findall(r"```python\n(import json.*?)```", guide, re.DOTALL)[listing])
    photo = load_sample_images().images[0]
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(photo[:400]).save(tmp_path / "a.jpg", exif=turned)  # lying on its side, and decoded small
    Image.fromarray(photo[50:80, 100:145]).save(tmp_path / "b.jpg")
    Image.fromarray(photo[:12, :12]).save(tmp_path / "c.png")
    Image.fromarray(photo[::5, ::7, 0]).save(tmp_path / "d.png")  # grey
    names = ["a.jpg", "b.jpg", "c.png", "d.png"]
    done = subprocess.run([sys.executable, "label.py", path, *names], cwd=tmp_path, check=True, capture_output=True,
                          text=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"})
    found = classifier.predict_proba([tmp_path / name for name in names])
    for line, name, row in zip(done.stdout.splitlines(), names, found, strict=True):
        assert line.split()[:2] == [name, NAMES[row.argmax()]]
        assert float(line.split()[2]) == pytest.approx(row.max(), abs=apart)


# ── what is not written ───────────────────────────────────────────────────────────────────────────────────────────


def traced(written):
    """Return what stands for the exporter where it is not what is tested."""
    return lambda net, size: onnx.load(written[1])


def test_a_file_that_disagrees_is_not_left(written, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_traced", traced(written))
    other = small()
    other.net.heads.bias.data[0, 1] += 0.01
    path = tmp_path / "other.onnx"
    path.write_text("earlier")
    with pytest.raises(PhylaError, match=r"gives probabilities that differ by 0.00\d+ .*no file was written"):
        write_onnx(other, path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
    other = small()
    other.net.encoder[0].weight.data *= 1.01
    other.net.heads.weight.data *= 0
    with pytest.raises(PhylaError, match="differ"):
        write_onnx(other, path)


@pytest.mark.parametrize("name", onnx_file.PACKAGES)
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(onnx_file, "find_spec", lambda asked: None if asked == name else object())
    with pytest.raises(InputError, match=rf"needs the package {name}\. hint: pip install 'phyla\[onnx\]'"):
        write_onnx(small(), tmp_path / "a.onnx")


def test_places_that_cannot_be_are_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_traced", lambda net, size: pytest.fail("worked"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="its folder is a file"):
        write_onnx(small(), tmp_path / "file" / "a.onnx")
    with pytest.raises(InputError, match=r"cannot write a network to 'a.pt'.*\.onnx"):
        write_onnx(small(), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"uint8 images \(n, 12, 12, 3\), got uint8 \(2, 9, 9, 3\)"):
        write_onnx(small(), tmp_path / "a.onnx", images=pixels(2, 9))
    with pytest.raises(DataNotFoundError, match="holds no classifier"):
        export_onnx(tmp_path, tmp_path / "a.onnx")


def test_what_the_exporter_cannot_do_is_one_line(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("\n  first line\nsecond line")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(PhylaError, match=r"cannot be put into an ONNX file \(RuntimeError: first line\)"):
        write_onnx(small(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_too_many_stand_beside_the_file(written, tmp_path, monkeypatch):
    classifier, _, _ = written
    monkeypatch.setattr(onnx_file, "_traced", traced(written))
    monkeypatch.setattr(onnx_file, "LARGEST", 500)
    monkeypatch.setattr(onnx_file, "_LEAST_MOVED", 32)
    made = write_onnx(classifier, tmp_path / "big.onnx")
    names = sorted(other.name for other in tmp_path.iterdir())
    assert len(names) == 2 and names[0] == "big.onnx" and re.fullmatch(r"big\.onnx\.[0-9a-f]{16}\.data", names[1])
    assert made.n_bytes == sum(other.stat().st_size for other in tmp_path.iterdir())
    same(tmp_path / "big.onnx", classifier)


def spaces() -> Classifier:
    """Two encoders' parts, moved, stretched and scaled each for itself, layers, and merged outputs of two members."""
    draw = seeded(2)
    projection = SpaceProjection([16, 16], hidden=(12, 10), activation="gelu", out_unit=True)
    projection.shift.copy_(torch.rand(32, generator=draw))
    projection.scale.copy_(1 + torch.rand(32, generator=draw))
    heads = MixtureHeads(10, 5, 2, [0, 1, 2, 0, 1])
    heads.weight.data = 4 * torch.randn(heads.weight.shape, generator=draw)
    return classifier_of(EncoderSpec(width=2, members=2).build(seeded()), 32, projection=projection, heads=heads)


def frozen(*names: str) -> Classifier:
    """Frozen encoders of several sizes, which resize inside the network, and a member of the head on each."""
    spec = FrozenSpec(tuple(Member.of(name, 48 + 16 * place) for place, name in enumerate(names)))
    projection = SpaceProjection(spec.widths)
    heads = MixtureHeads(spec.n_features, 3, len(names))
    heads.weight.data = 30 * torch.randn(heads.weight.shape, generator=seeded())
    views = Views("plain", 40, mean=(0.0,) * 3, std=(1.0,) * 3)
    return Classifier(ClusterNet(spec.build(), heads, projection), views, 40, NAMES)


def told_apart(classifier: Classifier) -> Classifier:
    """Return it with heads moved and scaled so that no weights drawn at random put all images into one cluster."""
    images = ImageSet(pixels(8, classifier.size), [str(row) for row in range(8)])
    net = classifier.net
    rows = forward_all(images, net, net.embed, classifier.views.plain()).float()
    heads = net.heads
    logits = torch.einsum("nd,mkd->nmk", rows, heads.weight.data)
    heads.weight.data /= logits.std(dim=0).mean()
    heads.bias.data = -torch.einsum("d,mkd->mk", rows.mean(dim=0), heads.weight.data)
    return classifier


# ── every kind of network ─────────────────────────────────────────────────────────────────────────────────────────

KINDS = {
    "cifar": lambda: classifier_of(EncoderSpec(width=4).build(seeded()), 32),
    "stl, hidden projection": lambda: classifier_of(EncoderSpec(stem="stl", width=4).build(seeded()), 32, size=16,
                                                    view=16, projection=Projection(32, 16, 2)),
    "imagenet bottlenecks": lambda: classifier_of(EncoderSpec("resnet50", "imagenet", 2).build(seeded()), 64, size=36,
                                                  view=32),
    "edges, unit rows": lambda: classifier_of(EncoderSpec(width=2, streams="rgb_sobel").build(seeded()), 32,
                                              projection=Projection(32, 32, 0)),
    "two that vote": lambda: classifier_of(EncoderSpec(width=2, members=2).build(seeded()), 32),
    "spaces, layers, mixture in groups": lambda: spaces(),
    "frozen": lambda: frozen("mobilenetv2", "lite0"),
    "frozen transformer": lambda: frozen("vit-small"),
    "enlarged": lambda: classifier_of(EncoderSpec(width=2).build(seeded()), 16, size=11, view=19),
}


@pytest.mark.slow  # torch's exporter takes seconds for each
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_can_be_shipped(kind, tmp_path):
    classifier = told_apart(KINDS[kind]())
    made = write_onnx(classifier, tmp_path / "net.onnx")
    assert made.difference < 1e-4
    same(tmp_path / "net.onnx", classifier)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_run_is_checked_on_its_own_images_in_silence(tmp_path, tmp_path_factory, capfd, caplog, monkeypatch):
    run, _ = pictures_run(tmp_path_factory, tmp_path)
    seen = []
    monkeypatch.setattr(onnx_file, "_check", lambda path, images, expected: seen.append(images) or 0.0)
    caplog.clear()
    capfd.readouterr()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(run, tmp_path / "run.onnx")
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert seen[0].shape == (8, 16, 16, 3)
    same(tmp_path / "run.onnx", Classifier.load(run))
