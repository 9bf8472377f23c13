"""RUC's, Super-AND's, AND's and TSUC's files: networks of the same form, built from plain torch, are taken over.

The network is that in ``authors.py``; nothing of it is phyla's.
"""

import json
import pickle
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from authors import HELD_SOBEL, Hostile, Paper
from phyla.errors import CorruptFileError, InputError
from phyla.images.augment import Views
from phyla.nets.heads import Projection
from phyla.nets.resnet import EncoderSpec, Ensemble, ResNet, TwoStream
from phyla.types import ImageSet
from phyla.zoo import Published, PublishedEncoder, load_published

WIDTH, N_OUT, N_IMAGES, N_CLUSTERS = 8, 24, 30, 7
State = dict[str, Tensor]
File = dict[str, object]


def paper(depth: str = "resnet18", *, two: bool = True, width: int = WIDTH, seed: int = 1) -> Paper:
    """A network whose every number differs from a fresh one, BatchNorm's included."""
    source = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        net = Paper(depth, width if depth == "resnet18" else 2, N_OUT, two=two)
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif value.ndim == 1 and not name.startswith("sobel."):
            value.copy_(0.5 + 0.2 * torch.rand(value.shape, generator=source))
        elif value.ndim == 4 and not name.startswith("sobel."):
            value.copy_(torch.randn(value.shape, generator=source) * (2 / value[0].numel()) ** 0.5)
    return net.eval()


def stage_1(net: Paper, **changes: object) -> File:
    source = torch.Generator().manual_seed(2)
    npc = {"params": torch.tensor([0.1, 0.5]), "memory": F.normalize(torch.randn(N_IMAGES, N_OUT, generator=source))}
    anchors = {"samples_num": torch.tensor(N_IMAGES), "anchor_indexes": torch.arange(7), "instance_indexes":
               torch.arange(7, N_IMAGES), "position": torch.arange(N_IMAGES), "neighbours": torch.zeros(7, 1).long(),
               "entropy": torch.rand(N_IMAGES, generator=source), "consistency": torch.tensor(0.874)}
    return {"net": net.state_dict(), "npc": npc, "ANs_discovery": anchors, "acc": 0.8924, "round": 4,
            "epoch": 173} | changes


def stage_2(net: Paper, **changes: object) -> File:
    source = torch.Generator().manual_seed(3)
    fc = {f"heads.{h}.weight": torch.randn(N_OUT, N_CLUSTERS, generator=source) for h in range(5)}
    return {"net": net.state_dict(), "fc": fc, "acc_list": [64.87, 72.31, 60.81, 80.98, 79.97]} | changes


def changed(held: File, part: str, **tensors: Tensor | None) -> File:
    """The file with tensors of one part put in (names have ``__`` for dots) or, where None, taken out."""
    new = {name.replace("__", "."): value for name, value in tensors.items()}
    state = held[part] | new
    return held | {part: {name: value for name, value in state.items() if value is not None}}


def parallel(held: File) -> File:
    return held | {part: {f"module.{name}": value for name, value in held[part].items()} for part in ("net", "fc")
                   if part in held}


def write(path: Path, held: object, *, legacy: bool = False) -> Path:
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    return path


def views(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def same_network(found: Published, net: Paper) -> None:
    """Features and embeddings agree with the network that the file was made of, to 1e-5 of their size."""
    x = views()
    with torch.no_grad():
        features, rows = net.features(x), net(x)
        assert features.std() > 1e-3 and (rows[0] - rows[1]).abs().max() > 1e-3
        assert torch.allclose(found.encoder(x), features, rtol=1e-5, atol=1e-5 * features.abs().max().item())
        assert torch.allclose(found.projection(found.encoder(x)), rows, rtol=0, atol=1e-5)


def head_logits(net: Paper, weight: Tensor) -> Tensor:
    """Each feature's weights over the classes are divided by their length, in a loop, and the result by 0.1."""
    with torch.no_grad():
        rows = net(views())
    normed = torch.stack([row / sum(float(w) ** 2 for w in row) ** 0.5 for row in weight])
    return rows @ normed / 0.1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.t7"


def refusal(path: Path, held: object, stem: str | None = None) -> str:
    """The one line by which a file is refused."""
    with pytest.raises((InputError, CorruptFileError)) as caught:
        load_published(write(path, held), stem=stem)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# ---- stage 1: encoder, projection, memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("in_parallel", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_superand_file_gives_encoder_projection_and_memory(file: Path, in_parallel: bool, legacy: bool) -> None:
    net = paper()
    held = stage_1(net)
    found = load_published(write(file, parallel(held) if in_parallel else held, legacy=legacy))

    assert (found.kind, found.heads, found.head) == ("superand", None, None)
    assert found.encoder.spec == EncoderSpec("resnet18", "cifar", WIDTH, "rgb_sobel")
    assert found.projection.spec() == {"n_features": 128, "n_out": N_OUT, "n_layers": 1}
    same_network(found, net)
    assert found.memory.dtype == np.float32
    np.testing.assert_array_equal(found.memory, held["npc"]["memory"].numpy())
    assert found.facts == {"n_features": 128, "n_projection": N_OUT, "n_heads": 0, "n_clusters": 0,
                           "n_memory": N_IMAGES, "notes": ["left out of the file: ANs_discovery"],
                           "reported": {"acc": 0.8924, "round": 4, "epoch": 173}}
    assert not found.encoder.training and not found.projection.training
    assert all(value.device.type == "cpu" for value in (*found.encoder.state_dict().values(), found.encoder.filters))
    assert all(parameter.requires_grad for parameter in found.encoder.parameters())
    with pytest.raises(InputError, match="no cluster heads"):
        found.net()


def test_what_the_file_reports_is_plain_numbers_also_where_it_holds_tensors(file: Path) -> None:
    held = stage_1(paper(), acc=torch.tensor(0.5), round=np.int64(3), epoch=None)
    found = load_published(write(file, held))
    assert found.facts["reported"] == {"acc": 0.5, "round": 3, "epoch": "None"}
    assert json.loads(json.dumps(found.facts)) == found.facts


@pytest.mark.parametrize("depth", ["resnet50", "resnet101"])
@pytest.mark.parametrize("two", [True, False])
def test_bottlenecks_are_taken_over_under_the_names_of_these_files(file: Path, depth: str, two: bool) -> None:
    net = paper(depth, two=two)
    assert "layer1.0.shortcut.0.weight" in net.state_dict()
    found = load_published(write(file, parallel(stage_1(net)), legacy=True))
    assert found.encoder.spec == EncoderSpec(depth, "cifar", 2, "rgb_sobel" if two else "rgb")
    assert found.facts["n_features"] == (128 if two else 64)
    same_network(found, net)


def test_an_and_file_has_one_stream_and_what_its_training_needs_is_left_out(file: Path) -> None:
    net = paper(two=False)
    held = stage_1(net, session="20190321-101500", optimizer={
        "state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]})
    found = load_published(write(file, parallel(held), legacy=True))
    assert (found.kind, type(found.encoder)) == ("superand", ResNet)
    assert found.encoder.spec == EncoderSpec("resnet18", "cifar", WIDTH)
    assert found.facts["notes"] == ["left out of the file: ANs_discovery, session, optimizer"]
    assert found.memory.shape == (N_IMAGES, N_OUT)
    same_network(found, net)


class Python2Pickler(pickle._Pickler):
    """Writes text as Python 2 wrote it, in bytes: AND asks for 2.7."""

    def save_text(self, value: str) -> None:
        data = value.encode()
        self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {str: save_text}


def test_a_file_written_under_python_2_is_read(file: Path) -> None:
    net = paper(two=False)
    module = types.ModuleType("pickle_2")
    module.Pickler, module.dump = Python2Pickler, pickle.dump
    torch.save(parallel(stage_1(net, session="one")), file, pickle_module=module, pickle_protocol=2,
               _use_new_zipfile_serialization=False)
    assert b"U\x18module.layer1.0.bn1.bias" in file.read_bytes()
    same_network(load_published(file), net)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_written_on_a_gpu_is_read_without_one(file: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
                                                      ) -> None:
    net = paper()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        write(file, stage_1(net), legacy=legacy)
    assert b"cuda:0" in file.read_bytes()
    same_network(load_published(file), net)


def test_a_published_network_has_246_entries_and_22_million_parameters(file: Path) -> None:
    with torch.device("meta"):
        net = Paper("resnet18", 64, 128, two=True)
    state = {f"module.{name}": torch.zeros((), dtype=value.dtype).expand(value.shape)  # a storage of one number
             for name, value in net.state_dict().items()}
    state |= {f"module.{name}": torch.tensor(value).reshape(net.state_dict()[name].shape)
              for name, value in HELD_SOBEL.items()}
    assert len(state) == 246
    npc = {"params": torch.tensor([0.1, 0.5]), "memory": torch.zeros(()).expand(50_000, 128)}
    found = load_published(write(file, {"net": state, "npc": npc, "acc": 0.0, "round": 0, "epoch": 0}, legacy=True))
    parts = (found.encoder, found.projection)
    assert sum(parameter.numel() for part in parts for parameter in part.parameters()) == 22_468_288
    assert sum(len(part.state_dict()) for part in parts) == 242
    assert sum(value.numel() for name, value in found.encoder.named_buffers() if name != "filters") == 19_240
    assert found.memory.shape == (50_000, 128) and found.encoder.spec.n_features == 1024


def test_loading_leaves_the_global_generator_alone(file: Path) -> None:
    write(file, stage_2(paper()))
    before = torch.get_rng_state()
    load_published(file)
    assert torch.equal(torch.get_rng_state(), before)


# ---- stage 2: heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_parallel", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_tsuc_file_gives_five_heads_on_the_projection(file: Path, in_parallel: bool, legacy: bool) -> None:
    net = paper()
    held = stage_2(net)
    found = load_published(write(file, parallel(held) if in_parallel else held, legacy=legacy))

    assert (found.kind, found.head, found.memory) == ("tsuc", None, None)
    assert found.facts == {"n_features": 128, "n_projection": N_OUT, "n_heads": 5, "n_clusters": N_CLUSTERS,
                           "n_memory": 0, "notes": [],
                           "reported": {"acc_list": [64.87, 72.31, 60.81, 80.98, 79.97]}}
    same_network(found, net)
    for head in range(5):
        wanted = head_logits(net, held["fc"][f"heads.{head}.weight"])
        chosen = found.net(head=head)
        with torch.no_grad():
            assert torch.allclose(chosen(views())[0], wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
            assert torch.allclose(chosen.probabilities(views())[:, 0], wanted.softmax(dim=1), rtol=0, atol=1e-5)
    assert chosen.projection is found.projection and not chosen.training


@pytest.mark.parametrize("acc_list", [[1.0, 2.0, 3.0, 4.0, 99.0], [99.0, 1.0, 1.0, 1.0, 1.0], None])
def test_no_head_is_chosen_by_what_was_measured_with_labels(file: Path, acc_list: list[float] | None) -> None:
    found = load_published(write(file, stage_2(paper(), acc_list=acc_list)))
    assert found.head is None
    with pytest.raises(InputError, match=r"has 5 heads and does not name the best.*choose one of 0, 1, 2, 3, 4"):
        found.net()
    with pytest.raises(InputError, match=r"there is no head 5.*0 to 4"):
        found.net(head=5)


def test_a_tsuc_file_may_hold_its_memory_too(file: Path) -> None:
    net = paper()
    found = load_published(write(file, stage_1(net) | stage_2(net)))
    assert found.kind == "tsuc" and found.memory.shape == (N_IMAGES, N_OUT)


# ---- RUC: two networks, whose logits are added ----------------------------------------------------------------------


def ruc_networks(n_clusters: int = N_CLUSTERS) -> list[tuple[Paper, Tensor, Tensor]]:
    """Two networks that differ in every number, each with the weight and the bias of its head."""
    source = torch.Generator().manual_seed(5)
    return [(paper(two=False, seed=seed), torch.randn(n_clusters, 8 * WIDTH, generator=source),
             torch.randn(n_clusters, generator=source)) for seed in (1, 2)]


def ruc_state(net: Paper, weight: Tensor, bias: Tensor, *, prefix: str = "module.") -> State:
    """One network as RUC's release saves it; its ResNet has no linear layer."""
    state = {f"backbone.{name}": value for name, value in net.state_dict().items() if not name.startswith("linear.")}
    state |= {"cluster_head.0.weight": weight, "cluster_head.0.bias": bias}
    return {prefix + name: value for name, value in state.items()}


def ruc_file(**changes: object) -> File:
    return {f"net{i + 1}": ruc_state(*network) for i, network in enumerate(ruc_networks())} | changes


def ruc_logits(networks: list[tuple[Paper, Tensor, Tensor]]) -> Tensor:
    """What the networks say of the views, summed; each is run alone and has a part in it."""
    with torch.no_grad():
        logits = [net.features(views()) @ weight.T + bias for net, weight, bias in networks]
    assert (logits[0] - logits[1]).abs().max() > 0.1 and min(each.std() for each in logits) > 0.1
    return logits[0] + logits[1]


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("prefixes", [("module.", "module."), ("", ""), ("", "module.")])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_logits_of_a_ruc_file_are_the_sum_of_both_networks(file: Path, prefixes: tuple[str, str], legacy: bool
                                                               ) -> None:
    networks = ruc_networks()
    held = {f"net{i + 1}": ruc_state(*network, prefix=prefixes[i]) for i, network in enumerate(networks)}
    found = load_published(write(file, held, legacy=legacy), stem="cifar")

    assert (found.kind, found.head, found.projection, found.memory) == ("ruc", 0, None, None)
    assert found.encoder.spec == EncoderSpec("resnet18", "cifar", WIDTH, members=2)
    assert isinstance(found.encoder, Ensemble) and not found.net().training and not found.encoder.training
    assert found.facts == {"n_features": 128, "n_projection": 0, "n_heads": 1, "n_clusters": N_CLUSTERS,
                           "n_networks": 2, "notes": ["the encoder is RUC's two networks side by side, and the logits "
                                                      "are the sum of theirs"]}
    with torch.no_grad():
        assert close(found.net()(views())[0], ruc_logits(networks))
        assert close(found.encoder(views()), torch.cat([net.features(views()) for net, *_ in networks], dim=1))


def test_what_stands_beside_the_two_networks_is_named(file: Path) -> None:
    found = load_published(write(file, ruc_file(epoch=3)), stem="cifar")
    assert found.facts["notes"][1:] == ["left out of the file: epoch"]


def test_the_encoder_of_a_ruc_file_stands_in_for_a_trained_one(file: Path, tmp_path: Path) -> None:
    from phyla.rundir import load_encoder, save_encoder

    write(file, ruc_file())
    method = PublishedEncoder(path=str(file), stem="cifar", views=Views("simclr", 32)).fit()
    assert (method.facts_["kind"], method.facts_["n_networks"], method.projection_) == ("ruc", 2, None)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    rows = torch.from_numpy(method.transform(ImageSet(pixels, ["a", "b", "c"])))
    x = Views("plain", 32)(torch.from_numpy(pixels), torch.Generator())
    with torch.no_grad():
        assert close(rows, torch.cat([net.features(x) for net, *_ in ruc_networks()], dim=1))
    save_encoder(tmp_path / "kept", method.encoder_, method.projection_)
    again, _ = load_encoder(tmp_path / "kept")
    with torch.no_grad():
        assert close(again(views()), method.encoder_(views()))


@pytest.mark.parametrize(("absent", "changes"), [
    ("net1", {}), ("net2", {}), ("net2", {"net2": {}}), ("net1", {"net1": None}), ("net2", {"net2": torch.ones(3)})])
def test_a_ruc_file_of_one_network_is_refused(file: Path, absent: str, changes: File) -> None:
    held = ruc_file()
    del held[absent]
    assert f"has no {absent}: RUC's logits are the sum of two networks" in refusal(file, held | changes, "cifar")


@pytest.mark.parametrize(("network", "told"), [
    (lambda: (paper(two=False, width=4), torch.ones(N_CLUSTERS, 32), torch.ones(N_CLUSTERS)),
     "net2.backbone.conv1.weight (4, 3, 3, 3) instead of (8, 3, 3, 3)"),
    (lambda: (paper(two=False), torch.ones(5, 64), torch.ones(5)),
     "2 misshapen (net2.cluster_head.0.weight (5, 64) instead of (7, 64), net2.cluster_head.0.bias (5,)"),
    (lambda: (paper("resnet50", two=False), torch.ones(N_CLUSTERS, 64), torch.ones(N_CLUSTERS)),
     "net2.backbone.layer1.0.conv3.weight")])
def test_two_networks_of_different_form_are_refused(file: Path, network: object, told: str) -> None:
    said = refusal(file, ruc_file(net2=ruc_state(*network())), "cifar")
    assert "no whole net2 of the same form as net1: " in said and told in said


@pytest.mark.parametrize("network", ["net1", "net2"])
@pytest.mark.parametrize(("entry", "value", "told"), [
    ("backbone.layer4.1.bn2.running_var", None, "1 missing ({}.backbone.layer4.1.bn2.running_var)"),
    ("cluster_head.0.bias", None, "network of RUC: 1 missing ({}.cluster_head.0.bias)"),
    ("cluster_head.1.bias", torch.ones(N_CLUSTERS), "network of RUC: 1 unexpected ({}.cluster_head.1.bias)"),
    ("contrastive_head.0.bias", torch.ones(64), "1 unexpected ({}.contrastive_head.0.bias)"),
    ("fc.weight", torch.ones(2), "1 unexpected ({}.fc.weight)"),
    ("backbone.bn1.bias", torch.ones(5), "{}.backbone.bn1.bias (5,) instead of (8,)"),
    ("backbone.layer1.0.bn1.weight", torch.full((WIDTH,), torch.nan), "not finite in {}.backbone.layer1.0.bn1.weight"),
    ("cluster_head.0.weight", torch.full((N_CLUSTERS, 64), torch.inf), "not finite in {}.cluster_head.0.weight"),
    ("note", "hello", "holds no networks but module.note")])
def test_a_flaw_of_either_network_is_told_with_its_name(file: Path, network: str, entry: str, value: object, told: str
                                                        ) -> None:
    held = ruc_file()
    state = held[network] | {f"module.{entry}": value}
    held[network] = {name: each for name, each in state.items() if each is not None}
    assert told.format(network) in refusal(file, held, "cifar")


def test_a_ruc_file_has_to_be_given_its_stem(file: Path) -> None:
    assert "say which it is: stem=cifar or stem=stl" in refusal(file, ruc_file())


# ---- the stem and the place of a pretext method ---------------------------------------------------------------------


def test_these_files_have_one_stem(file: Path) -> None:
    write(file, stage_1(paper()))
    assert load_published(file, stem="cifar").encoder.spec == load_published(file).encoder.spec
    for stem in ("stl", "imagenet"):
        with pytest.raises(InputError, match=rf"stem={stem} does not fit .* without a max-pool.*allowed: cifar; "
                           r"in a run: --set pretrain\.stem=cifar$"):
            load_published(file, stem=stem)


@pytest.mark.parametrize("name", ["scan-stl10", "superand-folder"])
def test_a_recipe_of_another_stem_takes_the_file_by_the_option_that_the_refusal_names(file: Path, name: str) -> None:
    from phyla.overrides import change, with_checkpoint
    from phyla.recipes import recipe

    pipeline = with_checkpoint(recipe(name), str(write(file, stage_1(paper()))))
    with pytest.raises(InputError) as caught:
        pipeline.pretrain.fit()
    key, _, value = str(caught.value).rpartition("--set ")[2].partition("=")
    taken = change(pipeline, key, value).pretrain.fit()
    assert taken.encoder_.spec == EncoderSpec("resnet18", "cifar", WIDTH, "rgb_sobel")


@pytest.mark.parametrize("stage", [stage_1, stage_2])
def test_the_published_encoder_stands_in_for_a_trained_one(file: Path, stage: object) -> None:
    net = paper()
    write(file, stage(net))
    method = PublishedEncoder(path=str(file), stem="cifar", views=Views("simclr", 32)).fit()
    assert isinstance(method.encoder_, TwoStream) and isinstance(method.projection_, Projection)
    assert method.facts_["kind"] == ("superand" if stage is stage_1 else "tsuc")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    rows = torch.from_numpy(method.transform(ImageSet(pixels, ["a", "b", "c"])))
    x = Views("plain", 32)(torch.from_numpy(pixels), torch.Generator())
    with torch.no_grad():
        assert torch.allclose(rows, net.features(x), rtol=1e-4, atol=1e-5)
        assert torch.allclose(method.projection_(rows), net(x), rtol=0, atol=1e-5)


def test_other_sizes_are_pooled_over_the_whole_map(file: Path) -> None:
    found = load_published(write(file, stage_1(paper())))
    with torch.no_grad():
        assert found.encoder(torch.randn(2, 3, 96, 96)).shape == (2, 128)


# ---- files that are not whole ---------------------------------------------------------------------------------------


def names(*, two: bool) -> Iterator[str]:
    return iter(list(paper(two=two).state_dict())[::19])


@pytest.mark.parametrize("two", [True, False])
def test_every_entry_of_the_network_is_required(file: Path, two: bool) -> None:
    net = paper(two=two)
    for name in names(two=two):
        held = changed(stage_1(net), "net", **{name.replace(".", "__"): None})
        assert f"1 missing ({name})" in refusal(file, held)


@pytest.mark.parametrize(("entry", "value", "told"), [
    ("linear.weight", None, "projection of 128 features: 1 missing (linear.weight)"),
    ("linear.weight", torch.ones(N_OUT, 64), f"linear.weight ({N_OUT}, 64) instead of ({N_OUT}, 128)"),
    ("linear.bias", torch.tensor(1.0), "misshapen"),
    ("linear2.weight", torch.ones(2, 2), "1 unexpected (linear2.weight)"),
    ("sobel.2.weight", torch.ones(2, 2), "Sobel front end: 1 unexpected (sobel.2.weight)"),
    ("conv1_sobel.weight", torch.ones(WIDTH, 3, 3, 3), f"conv1_sobel.weight ({WIDTH}, 3, 3, 3) instead of"),
    ("conv1.weight", torch.ones(WIDTH, 3), "1 missing (conv1.weight)"),
    ("conv1.weight", torch.ones(WIDTH, 3, 7, 7), "1 misshapen (conv1.weight"),
    ("bn1_sobel.weight", torch.ones(5), f"bn1_sobel.weight (5,) instead of ({WIDTH},)"),
    ("layer5.0.conv1.weight", torch.ones(5), "1 unexpected (layer5.0.conv1.weight)"),
    ("layer2_sobel.0.downsample.0.weight", torch.ones(5), "1 unexpected (layer2_sobel.0.downsample.0.weight)"),
    ("bn1.running_var", torch.full((WIDTH,), torch.nan), "not finite in bn1.running_var"),
    ("linear.bias", torch.full((N_OUT,), torch.inf), "not finite in linear.bias"),
    ("note", "hello", "holds no networks but module.note"),
])
def test_a_flaw_of_the_network_is_told_by_its_name_in_the_file(file: Path, entry: str, value: Tensor | None, told: str
                                                               ) -> None:
    assert told in refusal(file, parallel(changed(stage_1(paper()), "net", **{entry.replace(".", "__"): value})))


def test_a_stream_too_many_or_too_few_is_told(file: Path) -> None:
    two, one = stage_1(paper()), stage_1(paper(two=False))
    one_more = changed(one, "net", **{name.replace(".", "__"): torch.tensor(value).reshape(two["net"][name].shape)
                                      for name, value in HELD_SOBEL.items()})
    assert "120 missing (conv1_sobel.weight" in refusal(file, one_more)
    half = {name: value for name, value in two["net"].items() if "_sobel" not in name}
    assert "120 missing (conv1_sobel.weight, bn1_sobel.weight" in refusal(file, two | {"net": half})
    bare = {name: value for name, value in two["net"].items() if not name.startswith("sobel.")}
    assert "Sobel front end: 4 missing (sobel.0.weight" in refusal(file, two | {"net": bare})


@pytest.mark.parametrize(("entry", "value"), [
    ("sobel.0.weight", [0.299, 0.587, 0.114]), ("sobel.0.bias", [0.1]), ("sobel.1.bias", [0.0, 1e-3]),
    ("sobel.1.weight", HELD_SOBEL["sobel.1.weight"][9:] + HELD_SOBEL["sobel.1.weight"][:9]),
    ("sobel.1.weight", [-value for value in HELD_SOBEL["sobel.1.weight"]]),
    ("sobel.1.weight", [value / 8 for value in HELD_SOBEL["sobel.1.weight"]])])
def test_other_filters_are_refused(file: Path, entry: str, value: list[float]) -> None:
    net = paper()
    shape = net.state_dict()[entry].shape
    held = changed(stage_1(net), "net", **{entry.replace(".", "__"): torch.tensor(value).reshape(shape)})
    assert f"has other Sobel filters than Super-AND's: {entry} is" in refusal(file, held)


@pytest.mark.parametrize(("changes", "told"), [
    ({"memory": None}, "memory of 1 images: 1 missing (npc.memory)"),
    ({"params": None}, "1 missing (npc.params)"),
    ({"labels": torch.ones(3)}, "1 unexpected (npc.labels)"),
    ({"memory": torch.ones(N_IMAGES, 64)}, f"npc.memory ({N_IMAGES}, 64) instead of ({N_IMAGES}, {N_OUT})"),
    ({"memory": torch.ones(N_OUT)}, f"npc.memory ({N_OUT},) instead of (1, {N_OUT})"),
    ({"params": torch.ones(3)}, "npc.params (3,) instead of (2,)"),
    ({"memory": torch.full((N_IMAGES, N_OUT), torch.nan)}, "not finite in npc.memory"),
    ({"memory": [1.0, 2.0]}, "holds no networks but memory")])
def test_a_flaw_of_the_memory_is_told(file: Path, changes: dict[str, Tensor | None], told: str) -> None:
    assert told in refusal(file, changed(stage_1(paper()), "npc", **changes))


@pytest.mark.parametrize(("changes", "told"), [
    ({"heads__4__weight": None}, "(5 of 7): 1 missing (fc.heads.4.weight)"),
    ({"heads__0__weight": None}, "1 missing (fc.heads.0.weight)"),
    ({"heads__5__weight": torch.ones(N_OUT, N_CLUSTERS)}, "1 unexpected (fc.heads.5.weight)"),
    ({"heads__0__bias": torch.ones(N_CLUSTERS)}, "1 unexpected (fc.heads.0.bias)"),
    ({"heads__2__weight": torch.ones(N_OUT, 11)}, f"fc.heads.2.weight ({N_OUT}, 11) instead of ({N_OUT}, 7)"),
    ({"heads__2__weight": torch.ones(64, N_CLUSTERS)}, "1 misshapen (fc.heads.2.weight"),
    ({"heads__0__weight": torch.ones(N_OUT)}, f"fc.heads.0.weight ({N_OUT},) instead of ({N_OUT}, 1)"),
    ({"heads__3__weight": torch.full((N_OUT, N_CLUSTERS), torch.inf)}, "not finite in fc.heads.3.weight")])
def test_a_flaw_of_the_heads_is_told(file: Path, changes: dict[str, Tensor | None], told: str) -> None:
    assert told in refusal(file, parallel(changed(stage_2(paper()), "fc", **changes)))


@pytest.mark.parametrize("held", [{"net": {}, "npc": {}}, {"net": {"a": torch.ones(1)}, "npc": {}, "fc": {}}])
def test_empty_parts_are_refused(file: Path, held: File) -> None:
    assert "give a checkpoint of SCAN" in refusal(file, held)


def test_a_network_of_the_same_form_for_other_ends_is_refused(file: Path) -> None:
    supervised = {"net": paper(two=False).state_dict(), "acc": 95.0, "epoch": 200}
    assert "holds net, and neither npc (Super-AND, AND) nor fc (TSUC)" in refusal(file, supervised)


# ---- files that are damaged or hostile ------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_damaged(file: Path, legacy: bool, share: float) -> None:
    data = write(file, stage_1(paper()), legacy=legacy).read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CorruptFileError, match=r"^[^\n]*cannot be read [^\n]*hint: fetch the file again$"):
        load_published(file)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("part", ["acc", "ANs_discovery", "npc", "net"])
def test_code_in_a_file_is_refused_and_not_run(file: Path, tmp_path: Path, part: str, legacy: bool) -> None:
    marker = tmp_path / "made by the file"
    held = stage_1(paper())
    hostile = Hostile(marker)
    write(file, held | {part: {**held[part], "more": hostile} if isinstance(held[part], dict) else hostile},
          legacy=legacy)
    with pytest.raises(InputError, match=r"names (posix|nt)\.mkdir, which is code and not weights"):
        load_published(file)
    assert not marker.exists()


# ---- the command line -----------------------------------------------------------------------------------------------


def test_a_superand_file_becomes_an_encoder_with_its_memory(file: Path, tmp_path: Path) -> None:
    from commands import call
    from phyla.rundir import load_encoder

    net = paper()
    held = stage_1(net)
    said = call("import", write(file, parallel(held), legacy=True), "--out", tmp_path / "mine", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert told["kind"] == "superand" and told["encoder"]["streams"] == "rgb_sobel"
    np.testing.assert_array_equal(np.load(told["memory"]), held["npc"]["memory"].numpy())
    encoder, projection = load_encoder(tmp_path / "mine")
    with torch.no_grad():
        assert torch.allclose(projection(encoder(views())), net(views()), rtol=0, atol=1e-5)
    said = call("import", file, "--out", tmp_path / "none", "--head", "1")
    assert said.code == 2 and "has no cluster heads" in said.err and not (tmp_path / "none").exists()


def test_a_ruc_file_becomes_one_classifier(file: Path, tmp_path: Path) -> None:
    from commands import call
    from phyla.classifier import Classifier

    said = call("import", write(file, ruc_file(), legacy=True), "--out", tmp_path / "mine", "--stem", "cifar", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert (told["kind"], told["n_networks"], told["encoder"]["members"], told["head"]) == ("ruc", 2, 2, 0)
    classifier = Classifier.load(tmp_path / "mine")
    with torch.no_grad():
        assert close(classifier.net(views())[0], ruc_logits(ruc_networks()))
    assert classifier.facts["kind"] == "ruc"


@pytest.mark.parametrize(("stem", "n_clusters", "size", "mean"), [
    ("cifar", 10, 32, (0.4914, 0.4822, 0.4465)), ("cifar", 20, 32, (0.5071, 0.4867, 0.4408)),
    ("stl", 10, 96, (0.4914, 0.4822, 0.4465))])
def test_a_ruc_file_scales_pixels_as_its_release_did(file: Path, tmp_path: Path, stem: str, n_clusters: int, size: int,
                                                     mean: tuple[float, ...]) -> None:
    from phyla.classifier import Classifier
    from phyla.importing import import_checkpoint

    held = {f"net{i + 1}": ruc_state(*network) for i, network in enumerate(ruc_networks(n_clusters))}
    import_checkpoint(write(file, held), tmp_path / "mine", stem)
    classifier = Classifier.load(tmp_path / "mine")
    assert (classifier.views.size, classifier.views.mean) == (size, mean)


def test_a_tsuc_file_becomes_a_classifier_with_the_head_that_is_named(file: Path, tmp_path: Path) -> None:
    from commands import call
    from phyla.classifier import Classifier

    net = paper()
    held = stage_2(net)
    write(file, held)
    said = call("import", file, "--out", tmp_path / "mine")
    assert said.code == 2 and "choose one of 0, 1, 2, 3, 4" in said.err and not (tmp_path / "mine").exists()
    said = call("import", file, "--out", tmp_path / "mine", "--head", "3")
    assert said.code == 0 and "head: 3" in said.out
    classifier = Classifier.load(tmp_path / "mine")
    wanted = head_logits(net, held["fc"]["heads.3.weight"]).softmax(dim=1)
    with torch.no_grad():
        assert torch.allclose(classifier.net.probabilities(views())[:, 0], wanted, rtol=0, atol=1e-5)
    assert classifier.facts["head"] == 3
    assert (classifier.views.mean, classifier.views.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def test_a_tsuc_file_of_twenty_clusters_is_of_cifar_100(file: Path, tmp_path: Path) -> None:
    from phyla.classifier import Classifier
    from phyla.importing import import_checkpoint

    fc = {f"heads.{h}.weight": torch.randn(N_OUT, 20, generator=torch.Generator().manual_seed(h)) for h in range(5)}
    import_checkpoint(write(file, stage_2(paper(), fc=fc)), tmp_path / "mine", None, head=0)
    views_ = Classifier.load(tmp_path / "mine").views
    assert (views_.mean, views_.std) == ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023))
