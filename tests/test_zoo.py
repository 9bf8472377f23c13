"""Published checkpoints, written here in miniature with the published names, become our networks or are refused."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import Tensor, nn

from authors import Hostile
from phyla.embed import embed
from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.images.augment import Views
from phyla.layouts import MOCO_FILE
from phyla.nets.heads import ClusterHeads, Projection
from phyla.nets.resnet import EncoderSpec, ResNet
from phyla.types import ImageSet
from phyla.zoo import PublishedEncoder, load_published

WIDTH = 4
State = dict[str, Tensor]


def made(depth: str = "resnet18", stem: str = "cifar") -> ResNet:
    """An encoder whose every number differs from a fresh one, BatchNorm's included."""
    source = torch.Generator().manual_seed(1)
    net = EncoderSpec(depth, stem, WIDTH).build(source)
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.add_(7)
        elif value.ndim == 1:  # of BatchNorm, small enough that fifty layers neither vanish nor overflow
            value.copy_(0.5 + 0.2 * torch.rand(value.shape, generator=source))
    return net.eval()


def backbone(net: ResNet, prefix: str = "backbone.") -> State:
    return {prefix + name: value for name, value in net.state_dict().items()}


def mlp(n_features: int, prefix: str = "contrastive_head.", n_out: int = 128) -> State:
    source = torch.Generator().manual_seed(2)
    shapes = {"0.weight": (n_features, n_features), "0.bias": (n_features,), "2.weight": (n_out, n_features),
              "2.bias": (n_out,)}
    return {prefix + name: torch.randn(shape, generator=source) for name, shape in shapes.items()}


def heads(n_features: int, n_clusters: int = 10, n_heads: int = 1) -> State:
    source = torch.Generator().manual_seed(3)
    return {f"cluster_head.{h}.{name}": torch.randn(shape, generator=source) for h in range(n_heads)
            for name, shape in (("weight", (n_clusters, n_features)), ("bias", (n_clusters,)))}


def parallel(state: State) -> State:
    return {f"module.{name}": value for name, value in state.items()}


def write(path: Path, value: object, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def images(net: ResNet) -> Tensor:
    side = 96 if net.spec.stem == "stl" else 32
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(4))


def same_encoder(found: ResNet, wanted: ResNet) -> None:
    views = images(wanted)
    with torch.no_grad():
        embeddings = wanted(views)
        assert embeddings.std() > 1e-3
        assert torch.equal(found(views), embeddings)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.pth.tar"


# ---- each kind of file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["cifar", "stl"])
def test_a_pretext_file_gives_encoder_and_projection(file: Path, stem: str) -> None:
    net = made(stem=stem)
    state = backbone(net) | mlp(32)
    found = load_published(write(file, state), stem=stem)

    assert (found.kind, found.heads, found.head) == ("pretext", None, None)
    assert found.encoder.spec == EncoderSpec("resnet18", stem, WIDTH)
    assert found.facts == {"n_features": 32, "n_projection": 128, "n_heads": 0, "n_clusters": 0, "notes": []}
    same_encoder(found.encoder, net)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))
    hidden = torch.relu(x @ state["contrastive_head.0.weight"].T + state["contrastive_head.0.bias"])
    wanted = hidden @ state["contrastive_head.2.weight"].T + state["contrastive_head.2.bias"]
    assert torch.allclose(found.projection(x), nn.functional.normalize(wanted, dim=1), atol=1e-6)
    assert not found.encoder.training and not found.projection.training
    assert all(parameter.requires_grad for parameter in found.encoder.parameters())
    with pytest.raises(InputError, match="no cluster heads"):
        found.net()


def test_a_resumable_pretext_file_is_read_like_the_bare_one(file: Path) -> None:
    net = made()
    optimizer = {"state": {}, "param_groups": [{"lr": 0.4}]}
    held = {"optimizer": optimizer, "model": backbone(net) | mlp(32), "epoch": 500}
    found = load_published(write(file, held), stem="cifar")
    assert found.kind == "pretext"
    assert found.facts["notes"] == ["left out of the file: optimizer, epoch"]
    same_encoder(found.encoder, net)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("numpy_1", [False, True])
def test_a_scan_file_gives_all_heads_and_names_the_best(file: Path, legacy: bool, numpy_1: bool) -> None:
    net, state = made("resnet50", "imagenet"), heads(32 * WIDTH, n_clusters=6, n_heads=3)
    write(file, {"model": backbone(net) | state, "head": np.int64(2)}, legacy=legacy)
    if numpy_1:
        rename_to_numpy_1(file, legacy=legacy)
    found = load_published(file)

    assert (found.kind, found.head, found.projection) == ("scan", 2, None)
    assert type(found.head) is int
    assert found.encoder.spec == EncoderSpec("resnet50", "imagenet", WIDTH)
    assert found.facts == {"n_features": 128, "n_projection": 0, "n_heads": 3, "n_clusters": 6, "notes": []}
    same_encoder(found.encoder, net)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(5))
    for h in range(3):
        wanted = x @ state[f"cluster_head.{h}.weight"].T + state[f"cluster_head.{h}.bias"]
        assert torch.allclose(found.heads(x)[h], wanted, atol=1e-4)
    views = images(net)
    with torch.no_grad():
        assert torch.allclose(found.net()(views)[0], found.heads(net(views))[2], atol=1e-4)


def rename_to_numpy_1(path: Path, *, legacy: bool) -> None:
    """Make the file name NumPy's scalar as files written under NumPy 1 do."""
    def renamed(data: bytes) -> bytes:
        return data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")

    if legacy:
        path.write_bytes(renamed(path.read_bytes()))
    else:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in entries.items():
                archive.writestr(name, renamed(data) if name.endswith("data.pkl") else data)
    assert b"numpy.core.multiarray\n" in path.read_bytes()


def test_a_resumable_scan_file_is_unwrapped_from_data_parallel(file: Path) -> None:
    net = made()
    held = {"optimizer": {}, "model": parallel(backbone(net) | heads(32, n_heads=2)), "epoch": 3,
            "best_loss": np.float64(-1.8), "best_loss_head": np.int64(1)}
    found = load_published(write(file, held), stem="cifar")
    assert (found.kind, found.head, found.facts["n_heads"]) == ("scan", 1, 2)
    same_encoder(found.encoder, net)


def test_heads_without_a_named_best_are_kept_without_one(file: Path) -> None:
    held = {"model": backbone(made()) | heads(32, n_heads=2), "best_loss_head": None}
    found = load_published(write(file, held), stem="cifar")
    assert (found.kind, found.head) == ("scan", None)
    with pytest.raises(InputError, match="2 heads and does not name the best"):
        found.net()


def test_a_head_may_be_chosen_and_sits_on_the_encoder_even_beside_a_projection(file: Path) -> None:
    net, state = made(), heads(32, n_heads=3)
    found = load_published(write(file, {"model": backbone(net) | mlp(32) | state, "head": 2}), stem="cifar")
    assert found.projection is not None and found.memory is None
    with torch.no_grad():
        embeddings = net(images(net))
        for chosen, head in ((found.net(), 2), (found.net(head=0), 0), (found.net(head=1), 1)):
            wanted = embeddings @ state[f"cluster_head.{head}.weight"].T + state[f"cluster_head.{head}.bias"]
            assert chosen.projection is None
            assert torch.allclose(chosen(images(net))[0], wanted, atol=1e-4)
    with pytest.raises(InputError, match=r"there is no head 3.*0 to 2"):
        found.net(head=3)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_self_label_file_has_one_head(file: Path, wrapped: bool) -> None:
    net = made(stem="stl")
    state = backbone(net) | heads(32)
    held = {"optimizer": {}, "model": parallel(state), "epoch": 200} if wrapped else state
    found = load_published(write(file, held), stem="stl")
    assert (found.kind, found.head, found.facts["n_clusters"]) == ("selflabel", 0, 10)
    same_encoder(found.encoder, net)


def test_moco_v2_gives_encoder_and_projection(file: Path) -> None:
    net = made("resnet50", "imagenet")
    state = parallel(backbone(net, "encoder_q.") | mlp(128, "encoder_q.fc."))
    found = load_published(write(file, {"epoch": 800, "arch": "resnet50", "state_dict": state}))
    assert (found.kind, found.heads, found.facts["n_projection"]) == ("moco", None, 128)
    same_encoder(found.encoder, net)
    assert torch.equal(found.projection[2].weight.data, state["module.encoder_q.fc.2.weight"])


def test_what_moco_needs_for_training_alone_is_left_out(file: Path) -> None:
    net, other = made("resnet50", "imagenet"), EncoderSpec("resnet50", "imagenet", WIDTH).build()
    state = backbone(net, "encoder_q.") | mlp(128, "encoder_q.fc.") | backbone(other, "encoder_k.")
    state |= {"queue": torch.zeros(128, 16), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    found = load_published(write(file, {"state_dict": parallel(state)}))
    assert found.kind == "moco"
    assert f"left out {318 + 2} entries that serve training" in found.facts["notes"][0]
    same_encoder(found.encoder, net)


@pytest.mark.parametrize("prefix", ["backbone.", "encoder_q."])
def test_a_linear_projection_is_left_out_and_said_so(file: Path, prefix: str) -> None:
    net = made("resnet50", "imagenet")
    head = "contrastive_head." if prefix == "backbone." else "encoder_q.fc."
    state = backbone(net, prefix) | {head + "weight": torch.ones(128, 128), head + "bias": torch.ones(128)}
    found = load_published(write(file, state))
    assert found.projection is None
    assert "single linear layer" in found.facts["notes"][0]


def test_half_precision_becomes_single(file: Path) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in backbone(made()).items()}
    found = load_published(write(file, state | heads(32)), stem="cifar")
    dtypes = {value.dtype for value in found.net().state_dict().values()}
    assert dtypes == {torch.float32, torch.int64}


def test_loading_leaves_the_global_generator_alone(file: Path) -> None:
    write(file, backbone(made()) | mlp(32) | heads(32))
    before = torch.get_rng_state()
    load_published(file, stem="cifar")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("depth", "stem", "n_heads", "n_encoder", "n_pretext", "n_scan"), [
    ("resnet18", "cifar", 1, 120, 124, 122), ("resnet50", "imagenet", 10, 318, 322, 338)])
def test_our_networks_have_as_many_entries_as_the_published_files(
    depth: str, stem: str, n_heads: int, n_encoder: int, n_pretext: int, n_scan: int
) -> None:
    with torch.device("meta"):
        encoder = ResNet(EncoderSpec(depth, stem))
        projection = Projection(encoder.spec.n_features)
        stacked = ClusterHeads(encoder.spec.n_features, 10, n_heads)
    assert len(encoder.state_dict()) == n_encoder
    assert len(encoder.state_dict()) + len(projection.state_dict()) == n_pretext
    assert len(encoder.state_dict()) + n_heads * len(stacked.state_dict()) == n_scan


# ---- the stem, which the file does not tell -----------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_a_three_pixel_stem_has_to_be_named(file: Path) -> None:
    write(file, backbone(made()) | mlp(32))
    with pytest.raises(InputError, match="say which it is: stem=cifar or stem=stl"):
        load_published(file)
    with pytest.raises(InputError, match=r"stem=imagenet does not fit .*3x3.*allowed: cifar, stl; "
                       r"in a run: --set pretrain\.stem=cifar or --set pretrain\.stem=stl$"):
        load_published(file, stem="imagenet")
    with pytest.raises(InputError, match="did you mean cifar"):
        load_published(file, stem="cifar10")


def test_a_seven_pixel_stem_is_imagenet(file: Path) -> None:
    write(file, backbone(made("resnet18", "imagenet")) | mlp(32))
    assert load_published(file).encoder.spec.stem == "imagenet"
    with pytest.raises(InputError, match=r"stem=stl does not fit .*7x7.*allowed: imagenet"):
        load_published(file, stem="stl")


# ---- files that are something else --------------------------------------------------------------------------------


def test_every_encoder_key_is_required(file: Path) -> None:
    whole = backbone(made()) | mlp(32)
    for name in [name for name in whole if name.startswith("backbone.")][::10]:
        write(file, {key: value for key, value in whole.items() if key != name})
        with pytest.raises(InputError, match=f"1 missing \\({name}\\)"):
            load_published(file, stem="cifar")


@pytest.mark.parametrize(("change", "told"), [
    ({"backbone.layer2.0.downsample.0.bias": torch.ones(1)}, r"1 unexpected \(backbone.layer2.0.downsample.0.bias\)"),
    ({"backbone.bn1.weight": torch.ones(5)}, r"1 misshapen \(backbone.bn1.weight \(5,\) instead of \(4,\)\)"),
    ({"contrastive_head.2.bias": torch.ones(64)}, r"contrastive_head.2.weight \(128, 32\) instead of \(64, 32\)"),
    ({"contrastive_head.2.bias": torch.tensor(1.0)}, "1 misshapen"),
    ({"backbone.conv1.weight": torch.ones(4)}, r"1 missing \(backbone.conv1.weight\)"),
    ({"cluster_head.0.weight": torch.ones(10, 32)}, r"1 missing \(cluster_head.0.bias\)"),
    ({"cluster_head.0.bias": torch.ones(10)}, r"1 missing \(cluster_head.0.weight\)"),
    (heads(32, n_heads=3) | {"cluster_head.1.weight": torch.ones(11, 32)}, "cluster_head.1.weight"),
    ({"cluster_head.best": torch.ones(2)}, "unexpected"),
    ({"fc.weight": torch.ones(2)}, r"1 unexpected \(fc.weight\)"),
    ({"note": "hello"}, r"holds no networks but note"),
])
def test_a_file_with_a_flaw_is_refused_by_name(file: Path, change: dict[str, object], told: str) -> None:
    write(file, backbone(made()) | mlp(32) | change)
    with pytest.raises(InputError, match=told):
        load_published(file, stem="cifar")


def test_many_flaws_are_counted_and_the_first_are_named(file: Path) -> None:
    short = {name: value for name, value in backbone(made()).items() if ".layer4." not in name}
    told = r"holds no whole resnet18 of width 4: 30 missing \(\S+, \S+, \S+ and 27 more\)"
    with pytest.raises(InputError, match=told):
        load_published(write(file, short), stem="cifar")


@pytest.mark.parametrize("held", [{}, [1, 2], torch.ones(3), {"epoch": 3}, {"model": {}},
                                  {name: value for name, value in made().state_dict().items()}])
def test_a_file_without_published_names_is_refused(file: Path, held: object) -> None:
    with pytest.raises(InputError, match="give a checkpoint of SCAN"):
        load_published(write(file, held), stem="cifar")


@pytest.mark.parametrize("head", [1, -1, "best", np.int64(7)])
def test_a_best_head_that_is_not_there_is_refused(file: Path, head: object) -> None:
    write(file, {"model": backbone(made()) | heads(32), "head": head})
    with pytest.raises(InputError, match="as its best and has 1"):
        load_published(file, stem="cifar")


def test_numbers_that_are_not_finite_are_refused(file: Path) -> None:
    state = backbone(made()) | heads(32)
    state["backbone.layer3.0.bn2.running_var"][1] = torch.nan
    with pytest.raises(CorruptFileError, match=r"not finite in backbone\.layer3\.0\.bn2\.running_var"):
        load_published(write(file, state), stem="cifar")


# ---- files that are damaged, hostile or not there -----------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_damaged(file: Path, legacy: bool, share: float) -> None:
    data = write(file, backbone(made()) | mlp(32), legacy=legacy).read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CorruptFileError, match=r"cannot be read .*hint: fetch the file again"):
        load_published(file, stem="cifar")


@pytest.mark.parametrize("data", [b"<html>404</html>", b"\x80\x02}q\x00.", b"PK\x03\x04", bytes(range(256)) * 9])
def test_something_else_under_the_name_is_damaged_or_refused(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises((CorruptFileError, InputError)) as caught:
        load_published(file, stem="cifar")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"<html>404</html>", b"hello", b"\x93NUMPY\x01\x00",
                                  pickle.dumps({"a": 1}, protocol=4)])
def test_what_torch_did_not_write_is_said_to_be_that(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"cannot be read \(torch did not write it, or it is damaged\)"):
        load_published(file, stem="cifar")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_and_not_run(file: Path, tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "made by the file"
    write(file, {"model": backbone(made()) | heads(32), "head": Hostile(marker)}, legacy=legacy)
    with pytest.raises(InputError, match=r"names (posix|nt)\.mkdir, which is code and not weights"):
        load_published(file, stem="cifar")
    assert not marker.exists()


def test_nothing_more_than_numpy_numbers_is_let_in(file: Path) -> None:
    write(file, {"model": backbone(made()) | heads(32), "head": np.arange(2)})
    with pytest.raises(InputError, match=r"names numpy\.\S+, which is code"):
        load_published(file, stem="cifar")


def test_the_allowed_names_do_not_stay_allowed(file: Path) -> None:
    write(file, {"model": backbone(made()) | heads(32), "head": np.int64(0)})
    before = set(torch.serialization.get_safe_globals())
    load_published(file, stem="cifar")
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=rf"there is no checkpoint .*gone\.pth.*{MOCO_FILE}"):
        load_published(tmp_path / "gone.pth")


def test_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        load_published(tmp_path)


# ---- in the place of a pretext method -----------------------------------------------------------------------------


def test_the_published_encoder_stands_in_for_a_trained_one(file: Path) -> None:
    net = made()
    write(file, backbone(net) | mlp(32))
    method = clone(PublishedEncoder(path=str(file), stem="cifar", views=Views("simclr", 32)))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    shown = ImageSet(pictures, ["a", "b", "c"])
    assert method.fit(shown) is method
    assert method.history_ == []
    assert method.facts_["kind"] == "pretext"
    assert method.projection_(torch.ones(1, 32)).shape == (1, 128)
    np.testing.assert_array_equal(method.transform(shown), embed(shown, net, Views("plain", 32)).values)


def test_the_published_encoder_may_lack_a_projection(file: Path) -> None:
    write(file, backbone(made()) | heads(32))
    assert PublishedEncoder(path=str(file), stem="cifar").fit().projection_ is None


def test_the_official_moco_file_is_looked_for_where_data_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHYLA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataNotFoundError) as caught:
        PublishedEncoder().fit()
    for told in (MOCO_FILE, str(tmp_path / "data" / "moco"), str(tmp_path / "cache"), "pretrain.path"):
        assert told in str(caught.value)
    (tmp_path / "cache").mkdir()
    net = made("resnet50", "imagenet")
    state = parallel(backbone(net, "encoder_q.") | mlp(128, "encoder_q.fc."))
    write(tmp_path / "cache" / MOCO_FILE, {"state_dict": state})
    same_encoder(PublishedEncoder().fit().encoder_, net)
