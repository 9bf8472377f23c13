"""The device is checked to exist, once, and decides precision and memory format."""

import pytest
import torch

from phyla.errors import InputError
from phyla.nets.resnet import EncoderSpec
from phyla.training.device import Device, choose_device


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


@pytest.mark.usefixtures("no_accelerator")
def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    chosen = choose_device()
    assert (chosen.device.type, chosen.precision) == ("cpu", "fp32")
    assert chosen.label == f"CPU, {torch.get_num_threads()} threads, fp32"
    assert choose_device("cpu", "bf16").precision == "bf16"


@pytest.mark.usefixtures("two_gpus")
def test_auto_is_a_gpu_in_bf16_where_there_is_one() -> None:
    assert choose_device() == Device(torch.device("cuda"), "bf16", channels_last=True)
    assert choose_device("cuda:1", "fp32") == Device(torch.device("cuda:1"), "fp32", channels_last=True)
    assert choose_device("cuda:1").label == "GPU 1, bf16"
    with pytest.raises(InputError, match="'cuda:2' is not on this machine: 2 CUDA devices found"):
        choose_device("cuda:2")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_device().precision == "fp32"


@pytest.mark.usefixtures("no_accelerator")
def test_apples_gpu_comes_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == Device(torch.device("mps"), "fp32", channels_last=False)
    assert choose_device().label == "mps, fp32"


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(("name", "told"), [
    ("cuda", "'cuda' is not on this machine: 0 CUDA devices found. hint: use --device cpu or auto"),
    ("mps", "'mps' is not on this machine"), ("gpu", "'gpu' is not known. hint: allowed: auto, cpu, cuda, cuda:N, mps"),
    ("", "'' is not known"), ("cuda:x", "is not known"), ("cuda:-1", "is not known"),
    ("meta", "'meta' is not supported")])
def test_a_device_that_is_not_there_is_refused(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        choose_device(name)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"precision 'fp16' is not known\. hint: allowed: auto, fp32, bf16"):
        choose_device("cpu", "fp16")


@pytest.mark.usefixtures("two_gpus")
def test_an_engine_is_taken_where_it_runs() -> None:
    assert [choose_device("cuda", engine=engine).engine for engine in ("auto", "eager", "graph", "compiled")] == [
        "eager", "eager", "graph", "compiled"]
    assert choose_device("cuda:0", engine="graph").label == "GPU 0, bf16, graph"
    with pytest.raises(InputError, match=r"engine 'graph' needs CUDA, and the device is cpu\. hint: use --engine auto"):
        choose_device("cpu", engine="graph")
    with pytest.raises(InputError, match="engine 'jit' is not known"):
        choose_device("cpu", engine="jit")


def test_batchnorm_is_synced_or_local() -> None:
    assert [choose_device("cpu", batchnorm=kind).synced for kind in ("synced", "local")] == [True, False]
    assert choose_device("cpu", batchnorm="local").label == choose_device("cpu").label  # one process: no difference
    with pytest.raises(InputError, match=r"batchnorm 'none' is not known\. hint: allowed: synced, local"):
        choose_device("cpu", batchnorm="none")


def test_bf16_is_autocast_and_leaves_the_weights_alone() -> None:
    net, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with Device(torch.device("cpu"), "bf16").autocast():
        assert net(x).dtype == torch.bfloat16
    with Device(torch.device("cpu"), "fp32").autocast():
        assert net(x).dtype == torch.float32
    assert net.weight.dtype == torch.float32


def test_the_memory_format_changes_no_number_by_much() -> None:
    net = EncoderSpec(width=4).build(torch.Generator().manual_seed(0)).eval()
    views = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = net(views)
        device = Device(torch.device("cpu"), channels_last=True)
        placed, arranged = device.place(net), device.arrange(views)
        assert placed is net
        assert arranged.is_contiguous(memory_format=torch.channels_last)
        assert net.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(net(arranged), plain, atol=1e-5)


def test_without_channels_last_views_stay_as_they_are() -> None:
    views = torch.zeros(2, 3, 4, 4)
    assert Device(torch.device("cpu")).arrange(views) is views
