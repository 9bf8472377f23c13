"""What `gpu.py` measures, part by part: each part lists its rows, most valuable first, and how long each may take."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import driven
from card import Row, short
from driven import Steps
from phyla.embed import embed
from phyla.evaluate.probes import knn_accuracy
from phyla.images.augment import Views
from phyla.neighbors import find_neighbors
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain.simclr import SimCLR
from phyla.training.capture import WARM_UP
from phyla.training.device import Device
from phyla.types import ImageSet
from traces import kernels, shares, text

BYTES_PER_VIEW = 20.0e6
"""What stock kernels move for one 32-pixel view of a ResNet-18 in bf16, forward and backward, counted over its 614,400
convolution outputs: convolutions, BatchNorm's statistics, its scaling with ReLU, the sums of shortcuts, and back."""


@dataclass(frozen=True)
class Bench:
    """What is measured on what: the images, their classes for scores alone, the device, and how much of all."""

    device: torch.device
    train: ImageSet
    train_true: np.ndarray | None
    test: ImageSet | None
    test_true: np.ndarray | None
    quick: bool
    engines: tuple[str, ...]
    known: Callable[[str], Mapping[str, Row]]  # rows of a part that are there
    say: Callable[[str], None]

    def on(self, engine: str, precision: str = "bf16") -> Device:
        """Return the device with an engine."""
        kind: Any = engine
        of: Any = precision
        return Device(self.device, of, channels_last=True, engine=kind)

    @property
    def width(self) -> int:
        """Channels of the first stage: as published, or a sixteenth."""
        return 4 if self.quick else 64

    def batch(self, name: str) -> int:
        """Return the batch size of a method: as published, or small."""
        return 16 if self.quick else driven.BATCH[name]

    def many(self, n_images: int) -> ImageSet:
        """Return so many images: those that there are, over and over."""
        n = min(n_images, 64) if self.quick else n_images
        rows = np.arange(n) % len(self.train)
        return ImageSet(np.asarray(self.train.array)[rows], [str(row) for row in range(n)], self.train.name)


@dataclass(frozen=True)
class Item:
    """One row of a part: its name, how many seconds it may take, and what measures it."""

    name: str
    seconds: float
    work: Callable[[], Row]


# ── ceilings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def machine(bench: Bench) -> Iterator[Item]:
    """Yield the two rates that every floor is made of, and what convolutions reach by themselves."""
    yield Item("gemm", 5, lambda: _gemm(bench))
    yield Item("copy", 5, lambda: _copy(bench))
    for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4)):
        yield Item(f"conv {channels}", 6, lambda c=channels, s=side: _convolution(bench, c, s))  # type: ignore[misc]


def _timed(bench: Bench, work: Callable[[], object], *, warm: int = 3, repeats: int = 10) -> float:
    """Return the median seconds of ``work``."""
    times = []
    for turn in range(warm + repeats):
        _wait(bench)
        started = time.perf_counter()
        work()
        _wait(bench)
        times.append(time.perf_counter() - started)
        if turn >= warm + 2 and sum(times) > 3:
            break
    return statistics.median(times[warm:])


def _wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def _gemm(bench: Bench) -> Row:
    n = 256 if bench.quick else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _timed(bench, lambda: a @ b)
    return {"of": f"bf16 matrix product, {n} cubed", "TFLOP/s": short(2 * n**3 / seconds / 1e12)}


def _copy(bench: Bench) -> Row:
    n = 1 << (20 if bench.quick else 32)
    source = torch.empty(n, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = _timed(bench, lambda: target.copy_(source))
    return {"of": f"copy of {n >> 20} MiB, read and written", "TB/s": short(2 * n / seconds / 1e12)}


def _convolution(bench: Bench, channels: int, side: int) -> Row:
    batch = 8 if bench.quick else 1024
    layer = torch.nn.Conv2d(channels, channels, 3, 1, 1, bias=False, device=bench.device, dtype=torch.bfloat16)
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)
    with torch.backends.cudnn.flags(benchmark=True):
        seconds = _timed(bench, lambda: layer(x).backward(gradient))
    flops = 3 * 2 * batch * side**2 * channels**2 * 9
    return {"of": f"3x3 convolution of {batch} x {channels} x {side} x {side}, forward and backward",
            "TFLOP/s": short(flops / seconds / 1e12)}


@cache
def flops(width: int, size: int) -> float:
    """Return the operations of one image's forward pass through the ResNet-18 of the CIFAR stem."""
    net = EncoderSpec(width=width).build().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops())


def floor(bench: Bench, forwards: float) -> float | None:
    """Return the seconds that so many forward passes of one image take at the rate of a large matrix product."""
    rate = bench.known("machine").get("gemm", {}).get("TFLOP/s")
    return forwards * flops(bench.width, bench.train.size[0]) / (rate * 1e12) if isinstance(rate, int | float) else None


# ── does every engine train every method the same? ──────────────────────────────────────────────────────────────────


SMOKE_STEPS = 30
AGREES = 0.05


def smoke(bench: Bench) -> Iterator[Item]:
    """Yield every method recorded as a graph, against the same draws kernel by kernel and against the eager engine."""
    for name in _methods():
        if "graph" in bench.engines:
            yield Item(f"{name}, graph", 20, lambda name=name: _same(bench, name, "graph"))  # type: ignore[misc]


def smoke_compiled(bench: Bench) -> Iterator[Item]:
    """Yield the same of the compiled engine, which is slow to start."""
    for name in _methods():
        if "compiled" in bench.engines:
            yield Item(f"{name}, compiled", 60, lambda name=name: _same(bench, name, "compiled"))  # type: ignore[misc]


def _methods() -> list[str]:
    return [name for name in driven.METHODS if "no network" not in name]


def _same(bench: Bench, name: str, engine: str) -> Row:
    n_steps = 8 if bench.quick else SMOKE_STEPS
    fit = driven.METHODS[name](bench.many(1000), width=4 if bench.quick else 16, batch=16 if bench.quick else 64)
    # bf16, as on a GPU by default; with its CPU kernels a tape of the tests would only be slow
    precision = "bf16" if bench.device.type == "cuda" else "fp32"
    as_is = _losses(bench, fit, bench.on("graph", precision), n_steps, record=False)
    tried = _losses(bench, fit, bench.on(engine, precision), n_steps)
    eager = _losses(bench, fit, bench.on("eager", precision), n_steps)
    late = slice(n_steps // 2, None)
    apart = [abs(a - b) / max(abs(a), 1e-6) for a, b in zip(as_is.losses, tried.losses, strict=True)]
    means = [statistics.fmean(of.losses[late]) for of in (as_is, tried, eager)]
    spread = max(statistics.pstdev(eager.losses[late]), 1e-3 * abs(means[2]))
    agrees = abs(means[1] - means[0]) <= max(AGREES * abs(means[0]), spread)
    return {"method": name, "engine": engine, "ok": bool(agrees and tried.recordings > 0 and tried.fault is None),
            "recordings": tried.recordings, "loss": short(means[1]), "same draws, as it is": short(means[0]),
            "eager": short(means[2]), "apart after recording": short(apart[min(WARM_UP, n_steps - 1)], 2),
            "apart at most": short(max(apart), 2), "ms": short(tried.ms, 3), "ms eager": short(eager.ms, 3),
            "fault": tried.fault}


@dataclass
class Told:
    """Losses of some steps, the time of one of the last, and whether they were recorded."""

    losses: list[float]
    ms: float
    recordings: int
    fault: str | None


def _losses(bench: Bench, fit: driven.Fit, device: Device, n_steps: int, *, record: bool = True) -> Told:
    faults: list[str] = []
    with _Driving(bench, lambda: fit(device)) as steps:
        recorder = steps.loop.recorder
        if recorder is not None:
            recorder.is_off = not record
            recorder.record = _told(recorder.record, faults)
        losses, times = [], []
        for _ in range(n_steps):
            (total, count), n_epochs, started = _sums(steps), len(steps.loop.history), time.perf_counter()
            steps()
            _wait(bench)
            times.append(time.perf_counter() - started)
            ended = len(steps.loop.history) > n_epochs  # then the sums are those of the next epoch
            now = float(steps.loop.history[-1]["loss"]) * (count + 1) if ended else _sums(steps)[0]
            losses.append(now - total)
        recordings = 0 if recorder is None else len(recorder.recordings)
    return Told(losses, 1e3 * statistics.median(times[n_steps // 2 :]), recordings, faults[0] if faults else None)


def _sums(steps: Steps) -> tuple[float, float]:
    held = steps.loop.sums.get("loss")
    total, count = (0.0, 0.0) if held is None else held.tolist()
    return total, count


def _told(record: Callable[..., Any], faults: list[str]) -> Callable[..., Any]:
    def told(*given: Any) -> Any:
        try:
            return record(*given)
        except BaseException:
            faults.append(_last_lines(traceback.format_exc()))
            raise

    return told


def _last_lines(trace: str) -> str:
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    ours = [line for line in lines if "src/phyla/" in line.replace("\\", "/") and line.startswith("File")]
    return " | ".join([*ours[-2:], lines[-1]])[:600]


class _Driving:
    """Steps that are ended, and the memory that they held freed, however the block is left."""

    def __init__(self, bench: Bench, fit: Callable[[], object], *, warm: int = 0) -> None:
        self.bench, self.fit, self.warm = bench, fit, warm

    def __enter__(self) -> Steps:
        if self.bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.steps = Steps(self.fit, warm=self.warm)
        return self.steps

    def __exit__(self, *error: object) -> None:
        self.steps.close()
        del self.steps
        free(self.bench)


def free(bench: Bench) -> None:
    """Give back what is held no more."""
    if "compiled" in bench.engines:
        torch.compiler.reset()
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _peak(bench: Bench) -> float | None:
    return short(torch.cuda.max_memory_allocated() / 1e9, 3) if bench.device.type == "cuda" else None


# ── SimCLR on CIFAR-10 ──────────────────────────────────────────────────────────────────────────────────────────────


EPOCH_IMAGES = 50_000


def epoch(bench: Bench) -> Iterator[Item]:
    """Yield the seconds of an epoch of 50,000 images, two views each, by engine, precision and batch size."""
    for engine, precision, batch, seconds in (
            ("graph", "bf16", 512, 20), ("eager", "bf16", 512, 25), ("compiled", "bf16", 512, 75),
            ("graph", "bf16", 1024, 20), ("compiled", "bf16", 1024, 75), ("eager", "fp32", 512, 40),
            ("graph", "fp32", 512, 35), ("eager", "bf16", 1024, 25)):
        if engine in bench.engines:
            given = engine, precision, 16 if bench.quick else batch
            yield Item(f"{engine} {precision} {batch}", seconds,
                       lambda given=given: _epoch(bench, *given))  # type: ignore[misc]
    yield Item("plain fp32 512", 45, lambda: _plain_epoch(bench, "plain"))
    yield Item("lightly fp32 512", 45, lambda: _plain_epoch(bench, "lightly"))


def _epoch(bench: Bench, engine: str, precision: str, batch: int) -> Row:
    images = bench.many(EPOCH_IMAGES)
    fit = driven.simclr(images, width=bench.width, batch=batch)
    n_steps = len(images) // batch
    with _Driving(bench, lambda: fit(bench.on(engine, precision)), warm=WARM_UP + 5) as steps:
        seconds = _timed(bench, lambda: steps(n_steps), warm=0, repeats=3) * len(images) / (n_steps * batch)
        recorder = steps.loop.recorder
        recorded = recorder is not None and bool(recorder.recordings)
    row = {"engine": engine, "precision": precision, "batch": batch, "recorded": recorded,
           "exact": f"{3 * n_steps} steps"}
    return row | _as_epoch(bench, seconds, len(images)) | {"peak GB": _peak(bench)}


def _as_epoch(bench: Bench, seconds: float, n_images: int) -> Row:
    """Return the seconds of an epoch in figures, with its floor of arithmetic and that of stock kernels' memory."""
    forwards = 2 * 3 * n_images
    least = floor(bench, forwards)
    rate = bench.known("machine").get("copy", {}).get("TB/s")
    moved = 2 * n_images * BYTES_PER_VIEW / (rate * 1e12) if isinstance(rate, int | float) else None
    total = forwards * flops(bench.width, bench.train.size[0])
    return {"s/epoch": short(seconds), "views/s": round(2 * n_images / seconds),
            "TFLOP/s": short(total / seconds / 1e12, 3), "floor s": None if least is None else short(least, 3),
            "x floor": None if least is None else short(seconds / least, 3),
            "bytes s": None if moved is None else short(moved, 3)}


def _plain_epoch(bench: Bench, side: str) -> Row:
    import plain

    batch, images = 16 if bench.quick else 512, bench.many(EPOCH_IMAGES)
    first = driven.first_step(lambda: driven.simclr(images, width=bench.width, batch=batch)(bench.on("eager", "fp32")))
    pixels, n_steps = np.asarray(images.array), 2 if bench.quick else 15
    if side == "plain":
        made, shown = plain.simclr(first.state), plain.data("simclr", pixels, np.empty((0, 0)))
    else:
        found = plain.lightly_simclr(first.state, pixels)
        if found is None:
            raise ImportError("lightly is not installed")
        made, shown = found
    batches = plain.loader(shown, batch, bench.device, workers=0 if bench.quick else None)
    running = plain.steps(made, batches, bench.device)
    with torch.backends.cudnn.flags(benchmark=True):
        for _ in range(1 if bench.quick else 40):  # past what the workers had made before
            next(running)
        seconds = _timed(bench, lambda: [next(running) for _ in range(n_steps)], warm=0, repeats=3) / n_steps
    running.close()
    free(bench)
    return {"engine": side, "precision": "fp32", "batch": batch, "recorded": False,
            "exact": f"{3 * n_steps} steps, scaled to an epoch"} | _as_epoch(
                bench, seconds * len(images) / batch, len(images))


# ── where the time goes ─────────────────────────────────────────────────────────────────────────────────────────────


def profile(bench: Bench) -> Iterator[Item]:
    """Yield the kernels of ten steps of the best engine, and of the graph and the eager one if they are others."""
    if bench.device.type != "cuda":
        return
    found = bench.known("epoch")
    order = sorted((row["s/epoch"], name) for name, row in found.items()  # type: ignore[type-var]
                   if "failed" not in row and row["engine"] in bench.engines and row["batch"] == 512)
    known = [name for _, name in order]
    for name in dict.fromkeys([*known[:1], *(name for name in ("graph bf16 512", "eager bf16 512") if name in known)]):
        engine, precision, batch = name.split()
        yield Item(name, 70 if engine == "compiled" else 25,
                   lambda given=(engine, precision, int(batch)): _profile(bench, *given))  # type: ignore[misc]


def _profile(bench: Bench, engine: str, precision: str, batch: int) -> Row:
    fit, n_steps = driven.simclr(bench.many(EPOCH_IMAGES), width=bench.width, batch=batch), 10
    with _Driving(bench, lambda: fit(bench.on(engine, precision)), warm=WARM_UP + 7) as steps:
        steps(n_steps)
        _wait(bench)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as told:
            started = time.perf_counter()
            steps(n_steps)
            _wait(bench)
            seconds = time.perf_counter() - started
    found = kernels(told)
    bench.say(f"\n{engine} {precision}, batch {batch}: a step of {1e3 * seconds / n_steps:.2f} ms\n"
              + text(found, n_steps))
    return {"engine": engine, "precision": precision, "batch": batch, "ms": short(1e3 * seconds / n_steps),
            "kernels a step": round(len(found) / n_steps)} | shares(found, seconds) | {
                "top": [list(each) for each in text(found, n_steps, as_rows=True)]}


# ── does the fast path learn what the faithful one learns? ──────────────────────────────────────────────────────────


def accuracy(bench: Bench) -> Iterator[Item]:
    """Yield the kNN accuracy after 20 epochs of the faithful path and of the fast ones, labels for the score alone."""
    if bench.test is None or bench.train_true is None:
        bench.say("accuracy left out: these images have no classes")
        return
    rates = {name: row.get("s/epoch") for name, row in bench.known("epoch").items()}
    for engine, precision in (("graph", "bf16"), ("eager", "fp32"), ("compiled", "bf16")):
        if engine in bench.engines:
            each = rates.get(f"{engine} {precision} 512")
            seconds = 15 + 20 * (each if isinstance(each, int | float) else 6.0) * len(bench.train) / EPOCH_IMAGES
            yield Item(f"{engine} {precision}", seconds + (60 if engine == "compiled" else 0),
                       lambda given=(engine, precision): _accuracy(bench, *given))  # type: ignore[misc]


def _accuracy(bench: Bench, engine: str, precision: str) -> Row:
    assert bench.test is not None and bench.train_true is not None and bench.test_true is not None
    n_epochs = 1 if bench.quick else 20
    method = SimCLR(EncoderSpec(width=bench.width), Views("simclr", bench.train.size[0]), n_epochs=n_epochs,
                    batch_size=bench.batch("simclr"))
    started = time.perf_counter()
    method.fit(bench.train, device=bench.on(engine, precision))
    _wait(bench)
    seconds, judge = time.perf_counter() - started, bench.on("eager", "fp32")
    bank, queries = (embed(images, method.encoder_, method.views.plain(), device=judge)
                     for images in (bench.train, bench.test))
    found = knn_accuracy(bank, bench.train_true, queries=queries, queries_true=bench.test_true,
                         n_neighbors=min(200, len(bank)))
    loss = method.history_[-1]["loss"]
    del method
    free(bench)
    return {"engine": engine, "precision": precision, "images": len(bench.train), "epochs": n_epochs,
            "s": short(seconds), "loss": short(float(loss)), "kNN accuracy": short(found)}


# ── the other methods, and the tools ────────────────────────────────────────────────────────────────────────────────


def steps(bench: Bench) -> Iterator[Item]:
    """Yield the time of a step of every method as published, beside the floor of its passes through the network."""
    for engine, seconds in (("graph", 15), ("eager", 15)):
        for name in _methods():
            if engine in bench.engines and name != "simclr":
                yield Item(f"{name}, {engine}", seconds,
                           lambda given=(name, engine): _step(bench, *given))  # type: ignore[misc]


def _step(bench: Bench, name: str, engine: str) -> Row:
    batch = bench.batch(name)
    fit = driven.METHODS[name](bench.many(EPOCH_IMAGES), width=bench.width, batch=batch)
    n_steps = 2 if bench.quick else 10
    with _Driving(bench, lambda: fit(bench.on(engine)), warm=WARM_UP + 3) as running:
        seconds = _timed(bench, lambda: running(n_steps), warm=0, repeats=3) / n_steps
        recorder = running.loop.recorder
        recorded = recorder is not None and bool(recorder.recordings)
    least = floor(bench, driven.FORWARDS[name] * batch)
    return {"method": name, "engine": engine, "batch": batch, "recorded": recorded, "ms": short(1e3 * seconds),
            "floor ms": None if least is None else short(1e3 * least, 3),
            "x floor": None if least is None else short(seconds / least, 3), "peak GB": _peak(bench)}


def plain_steps(bench: Bench) -> Iterator[Item]:
    """Yield the same of the steps as people write them, with workers for the views."""
    for name in _methods():
        if name != "simclr":
            yield Item(name, 25, lambda name=name: _plain_step(bench, name))  # type: ignore[misc]


def _plain_step(bench: Bench, name: str) -> Row:
    import plain

    batch, images = bench.batch(name), bench.many(EPOCH_IMAGES)
    fit = driven.METHODS[name](images, width=bench.width, batch=batch)
    first = driven.first_step(lambda: fit(bench.on("eager", "fp32")))
    near = (np.arange(len(images))[:, None] + np.arange(1, 21)) % len(images)
    batches = plain.loader(plain.data(name, np.asarray(images.array), near), batch, bench.device,
                           workers=0 if bench.quick else None)
    running = plain.steps(plain.METHODS[name](first.state), batches, bench.device)
    n_steps = 1 if bench.quick else 10
    with torch.backends.cudnn.flags(benchmark=True):
        for _ in range(n_steps if bench.quick else 40):
            next(running)
        seconds = _timed(bench, lambda: [next(running) for _ in range(n_steps)], warm=0, repeats=3) / n_steps
    running.close()
    free(bench)
    graph = bench.known("steps").get(f"{name}, graph", {}).get("ms")
    return {"method": name, "batch": batch, "plain fp32 ms": short(1e3 * seconds),
            "x graph bf16": short(1e3 * seconds / graph, 3) if isinstance(graph, int | float) else None}


def tools(bench: Bench) -> Iterator[Item]:
    """Yield views a second by themselves, and the time of neighbors of 50,000 and a million rows."""
    for kind in ("simclr", "strong", "ruc_strong"):
        for drawn in dict.fromkeys((bench.device.type, "cpu")):
            yield Item(f"views {kind}, drawn on {drawn}", 5,
                       lambda given=(kind, drawn): _views(bench, *given))  # type: ignore[misc]
    yield Item("neighbors 50k", 15, lambda: _neighbors(bench, 50_000))
    yield Item("neighbors 1M", 90, lambda: _neighbors(bench, 1_000_000))


def _views(bench: Bench, kind: Any, drawn: str) -> Row:
    n = 32 if bench.quick else 1024
    views, source = Views(kind, bench.train.size[0]), torch.Generator(drawn).manual_seed(0)
    pixels = torch.from_numpy(np.array(bench.many(n).array)).to(bench.device)
    seconds = _timed(bench, lambda: views(pixels, source))
    return {"of": f"views {kind}, {len(pixels)} at once, drawn on {drawn}", "per second": round(len(pixels) / seconds),
            "ms": short(1e3 * seconds)}


def _neighbors(bench: Bench, n_rows: int) -> Row:
    n = n_rows // (500 if bench.quick else 1)
    source = torch.Generator(bench.device).manual_seed(0)
    rows = torch.randn(n, 128, generator=source, device=bench.device).cpu().numpy()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _timed(bench, lambda: find_neighbors(rows, 20, device=bench.device, title=""), warm=0, repeats=1)
    return {"of": f"20 neighbors of {n} x 128", "s": short(seconds), "peak GB": _peak(bench)}


PARTS: Mapping[str, Callable[[Bench], Iterator[Item]]] = {
    "machine": machine, "smoke": smoke, "epoch": epoch, "profile": profile, "accuracy": accuracy, "steps": steps,
    "tools": tools, "plain": plain_steps, "compiled": smoke_compiled,
}
"""Most valuable first."""
