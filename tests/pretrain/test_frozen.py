"""The stage method of frozen encoders: it loads, it embeds, it trains nothing."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from phyla.classifier import Classifier
from phyla.errors import DataNotFoundError, InputError
from phyla.images.augment import Views
from phyla.nets.frozen import FrozenEncoder
from phyla.nets.heads import ClusterNet, MixtureHeads, SpaceProjection
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain.frozen import Frozen, stored_size
from phyla.randomness import generator
from phyla.rundir import load_encoder, save_encoder
from phyla.storage import write_json
from phyla.training.device import choose_device

SHOWN = Views("plain", 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose encoder, of 32 features, saw images of 8 pixels."""
    folder = tmp_path / "mine"
    save_encoder(folder, EncoderSpec(width=4).build(generator(0, "test")), None)
    write_json(folder / "run.json", {"options": {"pretrain": {
        "views": {"size": 8, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}}}})
    return folder


def test_it_embeds_with_what_it_loaded_and_trains_nothing(run, noise):
    method = Frozen(encoder=str(run), views=SHOWN).fit(noise, device=choose_device("cpu"))
    assert method.projection_ is None and method.memory_ is None and method.history_ == []
    assert method.encoder_.spec.widths == (32,) and method.facts_["widths"] == [32]
    assert "mine at 8 pixels, 32 features" in method.facts_["notices"][0]
    found = method.transform(noise)
    pixels = torch.from_numpy(noise.array).permute(0, 3, 1, 2).float() / 255
    small = nn.functional.interpolate(pixels, size=(8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    small = (small - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    with torch.no_grad():
        np.testing.assert_allclose(found, EncoderSpec(width=4).build(generator(0, "test")).eval()(small).numpy(),
                                   rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32 and len(clone(method).fit_transform(noise)) == len(noise)


def test_its_encoder_is_saved_and_loaded_without_the_weights_it_came_from(run, noise, tmp_path):
    method = Frozen(encoder=str(run), views=SHOWN).fit()
    save_encoder(tmp_path / "stage", method.encoder_, None)
    expected = method.transform(noise)
    for path in run.iterdir():
        path.unlink()
    encoder, projection = load_encoder(tmp_path / "stage")
    assert isinstance(encoder, FrozenEncoder) and projection is None and encoder.spec == method.encoder_.spec
    method.encoder_ = encoder
    np.testing.assert_array_equal(method.transform(noise), expected)
    again = Frozen(encoder=str(tmp_path / "stage"), views=SHOWN).fit()  # and is an encoder to another run
    assert again.encoder_.spec == encoder.spec
    np.testing.assert_array_equal(again.transform(noise), expected)


def test_a_classifier_on_it_is_whole_in_its_files(run, noise, tmp_path):
    encoder = Frozen(encoder=str(run)).fit().encoder_
    heads = MixtureHeads(32, 4, 2, groups=[0, 1, 2, 1])
    heads.weight.data.normal_(generator=generator(1, "heads"))
    made = Classifier(ClusterNet(encoder, heads, SpaceProjection((32,))), SHOWN, 16, facts={"recipe": "test"})
    made.save(tmp_path / "run")
    loaded = Classifier.load(tmp_path / "run")
    assert loaded.n_clusters == 3 and loaded.net.encoder.spec == encoder.spec
    views = torch.rand(2, 3, 16, 16)
    exported = torch.export.export(loaded.net, (views,)).module()  # what resizes is there before any picture was
    torch.testing.assert_close(exported(views), loaded.net(views))
    np.testing.assert_array_equal(loaded.predict_proba(noise), made.predict_proba(noise))
    with pytest.raises(InputError, match="this network with torch"):
        Classifier(ClusterNet(nn.Identity(), heads), SHOWN, 16).save(tmp_path / "other")


@pytest.mark.parametrize(("options", "said"), [
    ({"encoder": "lite9"}, "no encoder 'lite9'"), ({"encoder": ",", "size": 0}, "no encoder is named"),
    ({"encoder": "lite0,lite0"}, "named twice"), ({"encoder": "dinov2-small", "size": 100}, "patches of 14"),
    ({"size": -1}, "at least 0"), ({"views": Views("plain", 32)}, "mean 0 and std 1")])
def test_options_that_cannot_be_are_told_before_any_work(options, said):
    with pytest.raises(InputError, match=said):
        Frozen(**options).fit()
    assert [str(fault) for fault in Frozen(**options).option_faults()]


def test_photographs_are_stored_at_the_largest_input():
    assert stored_size("") == 224 and stored_size("lite0,lite2") == 260 and stored_size("lite0", size=96) == 96
    assert stored_size("dinov2-small") == 224 and stored_size("weights/mine.pth") == 224


def test_the_stamp_changes_with_what_lies_at_a_path(run):
    method = Frozen(encoder=str(run))
    before = method.stamp()
    assert before == method.stamp() and Frozen().stamp() == "" == Frozen(encoder="lite0").stamp()
    (run / "encoder.safetensors").write_bytes(b"other")
    assert method.stamp() != before


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataNotFoundError, match="there is no file or folder"):
        Frozen(encoder=str(tmp_path / "gone.pth")).fit()
