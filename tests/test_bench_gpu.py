"""The script for a GPU machine, tried on a CPU: its parts, what it does again, and how a trace of kernels is read."""

import io
import json
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recording import record_on_tapes

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu
import gpu_parts
import traces
from gpu_parts import Item

pytestmark = pytest.mark.filterwarnings("ignore:.*have no trusted image")  # of RUC, with a network that knows nothing


def run(out, *words):
    """Return what is known after a quick run, and what it printed."""
    told = io.StringIO()
    with redirect_stdout(told):
        store = gpu.run(gpu.options(["--device", "cpu", "--quick", "--data", "random", "--out", str(out), *words]))
    return store, told.getvalue()


@pytest.fixture(autouse=True)
def few(monkeypatch, request, unchecked):
    """Keep one method and the small things, so that a run takes a second."""
    if "mosaics" in request.node.name:
        return
    monkeypatch.setattr(gpu, "read", lambda data: ((np.random.default_rng(0).integers(
        0, 256, (48, 8, 8, 3), np.uint8), np.arange(48) % 3), (np.zeros((8, 8, 8, 3), np.uint8), np.zeros(8, int))))
    monkeypatch.setattr(gpu_parts, "_methods", lambda: ["tsuc"])
    monkeypatch.setattr(gpu_parts.Bench, "width", 1)
    monkeypatch.setattr(gpu_parts, "_convolution", lambda bench, channels, side: {"of": "convolution"})


def test_every_part_gives_rows_and_a_second_call_measures_nothing_again(tmp_path, monkeypatch):
    for part, shown in (("epoch", slice(1, 2)), ("tools", slice(-3, None))):  # no loaders here
        usual = gpu_parts.PARTS[part]
        monkeypatch.setitem(gpu_parts.PARTS, part, lambda bench, usual=usual, shown=shown: list(usual(bench))[shown])
    parts = ("machine", "epoch", "profile", "accuracy", "steps", "tools")
    store, told = run(tmp_path, "--parts", *parts)
    failed = [row["failed"] for part in parts for row in store.rows(part).values() if "failed" in row]
    assert failed == []
    assert set(store.parts) == set(parts) - {"profile"}, "a CPU has no kernels to look at"
    assert store.rows("accuracy")["eager fp32"]["kNN accuracy"] >= 0
    assert store.rows("steps")["tsuc, eager"]["x floor"] > 0
    assert "left out: the engine graph" in told and told.rstrip().splitlines()[-1].split()[-1] == "-"
    before = (tmp_path / "gpu.json").read_bytes()
    monkeypatch.setattr(gpu_parts, "_timed", lambda *_, **__: pytest.fail("measured again"))
    assert "x floor" in run(tmp_path, "--parts", *parts)[1]
    assert (tmp_path / "gpu.json").read_bytes() == before
    assert (tmp_path / "report.txt").read_text().count("neighbors of") == 2


def test_recorded_steps_are_held_against_the_same_draws(tmp_path, monkeypatch):
    record_on_tapes(monkeypatch)
    store, _ = run(tmp_path, "--engines", "eager", "graph", "--parts", "smoke")
    row = store.rows("smoke")["tsuc, graph"]
    assert row["ok"] and row["recordings"] == 1 and row["apart at most"] == 0 and row["fault"] is None


def test_a_step_that_cannot_be_recorded_is_told_with_its_place(tmp_path, monkeypatch):
    counted = record_on_tapes(monkeypatch)

    def refuse(self, *given):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(counted, "__init__", refuse)
    row = run(tmp_path, "--engines", "eager", "graph", "--parts", "smoke")[0].rows("smoke")["tsuc, graph"]
    assert not row["ok"] and row["recordings"] == 0
    assert row["fault"] == "RuntimeError: operation not permitted when stream is capturing"


def test_a_fault_names_the_lines_of_phyla_that_it_came_through():
    trace = """Traceback (most recent call last):
      File "/x/src/phyla/training/capture.py", line 98, in run
        recording = self.record()
      File "/x/src/phyla/cluster/tsuc.py", line 200, in advance
        loss.item()
      File "/x/torch/_tensor.py", line 1, in item
    RuntimeError: not now
    """
    told = gpu_parts._last_lines(trace)
    assert "capture.py" in told and "tsuc.py\", line 200" in told and told.endswith("RuntimeError: not now")


def test_what_fails_or_does_not_fit_leaves_the_rest_alone(tmp_path, monkeypatch):
    tried = []

    def work(name, error=None):
        def measured():
            tried.append(name)
            if error:
                raise error
            return {"of": name}
        return measured

    items = [Item("breaks", 1, work("breaks", ValueError("no such kernel"))), Item("long", 1e6, work("long")),
             Item("works", 1, work("works"))]
    monkeypatch.setitem(gpu_parts.PARTS, "tools", lambda bench: items)
    told = run(tmp_path, "--parts", "tools")[1]
    assert "tools: no time for long" in told and "tools, breaks FAILED: ValueError: no such kernel" in told
    held = json.loads((tmp_path / "gpu.json").read_text())["parts"]["tools"]
    assert held["works"]["of"] == "works" and "measured" in held["breaks"]["trace"]
    items[0] = Item("breaks", 1, work("breaks"))
    assert "FAILED" not in run(tmp_path, "--parts", "tools", "--minutes", "1e9")[1]
    assert tried == ["breaks", "works", "breaks", "long"]


def test_a_gpu_left_unusable_is_taken_up_by_a_new_process(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(gpu, "_is_usable", lambda bench: False)
    monkeypatch.setattr(gpu.os, "execv", lambda program, words: called.append(words))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    monkeypatch.setitem(gpu_parts.PARTS, "tools", lambda bench: [Item("breaks", 1, lambda: 1 / 0)])
    run(tmp_path, "--parts", "tools")
    assert called[0][1:3] == ["gpu.py", "--quick"] and called[0][3].startswith("--since=")
    since = called[0][3].removeprefix("--since=")
    assert "breaks" in run(tmp_path, "--parts", "tools", "--since", since)[1] and len(called) == 1, "not tried again"


def test_a_row_that_ends_the_process_is_not_tried_again_unasked(tmp_path, monkeypatch):
    tried = []

    def work():
        tried.append(len(tried))
        if len(tried) == 1:
            raise KeyboardInterrupt  # as a kill would
        return {"of": "it"}

    monkeypatch.setitem(gpu_parts.PARTS, "tools", lambda bench: [Item("ends", 1, work)])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--parts", "tools")
    assert "tools, ends FAILED: the process ended" in run(tmp_path, "--parts", "tools")[1] and tried == [0]
    assert "FAILED" not in run(tmp_path, "--parts", "tools", "--again")[1] and tried == [0, 1]


def test_a_row_that_hangs_is_left_by_a_new_process(tmp_path, monkeypatch):
    called, waits, timer = [], threading.Event(), threading.Timer
    monkeypatch.setattr(gpu.os, "execv", lambda program, words: (called.append(words), waits.set()))
    monkeypatch.setattr(gpu.threading, "Timer", lambda after, *given: timer(0.01, *given))
    monkeypatch.setitem(gpu_parts.PARTS, "tools", lambda bench: [Item("hangs", 1, lambda: {"of": waits.wait(5)})])
    run(tmp_path, "--parts", "tools")
    assert len(called) == 1


def test_images_come_from_mosaics_however_many_there_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 32, 32, 3), np.uint8)
    folder = tmp_path / "cifar10-pack"
    folder.mkdir()
    for name, tiles in zip(("data_batch_1", "data_batch_3", "test_batch"), pixels, strict=True):
        mosaic = tiles.reshape(4, 10, 32, 32, 3).swapaxes(1, 2).reshape(128, 320, 3)
        Image.fromarray(mosaic).save(folder / f"{name}.webp", lossless=True)
    true = {name: np.full(40, row, np.uint8) for row, name in enumerate(
        ("data_batch_1", "data_batch_2", "data_batch_3", "test_batch"))}
    np.savez(folder / "labels.npz", **true)
    (train, classes), (test, _) = gpu.read(str(tmp_path))
    assert np.array_equal(train, pixels[:2].reshape(-1, 32, 32, 3)) and np.array_equal(test, pixels[2])
    assert classes.tolist() == [0] * 40 + [2] * 40, "data_batch_2 is not here"
    with pytest.raises(SystemExit, match="no CIFAR-10 in"):
        gpu.read(str(folder / "none"))


def test_kernels_are_told_apart():
    names = {"sm90_xmma_fprop_implicit_gemm_bf16": "convolution", "nvjet_tst_128x256": "matrix product",
             "void cudnn::bn_fw_tr_1C11_kernel_NCHW": "batchnorm", "Memcpy DtoD": "memory",
             "void at::native::batch_norm_collect_statistics_channels_last_kernel": "batchnorm",
             "triton_red_fused__native_batch_norm_legit_functional_relu_3": "batchnorm",
             "triton_poi_fused_convolution_1": "element-wise", "vectorized_elementwise_kernel": "element-wise",
             "multi_tensor_apply_kernel<FusedSgdMathFunctor>": "optimizer", "cudnn::nchwToNhwcKernel": "memory"}
    assert {name: traces.kind_of(name) for name in names} == names


def test_views_are_what_comes_before_the_network_and_idle_is_when_nothing_runs():
    step = [("vectorized_elementwise_kernel", 2), ("sm90_wgrad", 3), ("vectorized_elementwise_kernel", 1),
            ("multi_tensor_apply_kernel", 1)]
    events, at = [{"ph": "M", "name": "not a kernel"}], 0.0
    for name, length in step * 2:
        events.append({"ph": "X", "cat": "kernel", "name": name, "ts": at, "dur": length})
        at += length
    events.append({"ph": "X", "cat": "kernel", "name": "nvjet_", "ts": 0.5, "dur": 1.0})  # beside another
    found = traces.from_trace({"traceEvents": events})
    assert traces.shares(found, 20e-6) == {"convolution": 0.3, "views": 0.2, "element-wise": 0.1, "optimizer": 0.1,
                                           "matrix product": 0.05, "idle": 0.3}
    assert traces.text(found, 2, n=1).split() == ["0.003", "ms", "1", "x", "convolution", "sm90_wgrad"]


def test_a_stop_from_outside_leaves_no_alarm_behind(tmp_path, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_parts.PARTS, "tools", lambda bench: [Item("slow", 1, stopped)])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--parts", "tools")
    assert not any(isinstance(thread, threading.Timer) and not thread.finished.is_set()
                   for thread in threading.enumerate())
