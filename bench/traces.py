"""The kernels that a GPU ran while a profiler looked on: what each is of, its share of the time, and a list of the top.

What a kernel is of is told by its name, but for views: these are plain element-wise kernels like many others, and stand
out only by their place, after the optimizer of one step and before the first convolution of the next.
"""

import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from card import short

KINDS = (
    ("optimizer", r"multi_tensor|fused_?(sgd|adam)"),
    ("batchnorm", r"batch_?norm|bn_(fw|bw)|_bn_|norm_legit"),
    ("convolution", r"conv|[wd]grad|fprop|implicit|winograd"),
    ("matrix product", r"gemm|nvjet|cutlass|cublas|xmma|splitk"),
    ("memory", r"memcpy|memset|nchwtonhwc|nhwctonchw"),
)
"""A kind and what its kernels are called, tried in this order; all others are element-wise.

A kernel that Inductor wrote is called after the operations that it joins: BatchNorm, if that is one of them."""


class Kernel(NamedTuple):
    """One launch: times in microseconds."""

    name: str
    kind: str
    start: float
    duration: float


def kernels(profile: Any) -> list[Kernel]:
    """Return what a ``torch.profiler.profile`` saw, in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return from_trace(json.loads(path.read_text(encoding="utf-8")))


def from_trace(trace: Any) -> list[Kernel]:
    """Return the kernels of a trace in Chrome's format."""
    seen = sorted((event for event in trace["traceEvents"]
                   if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")),
                  key=lambda event: event["ts"])
    found, before_network = [], True
    for event in seen:
        kind = kind_of(event["name"])
        if kind == "optimizer":
            before_network = True
        elif kind == "convolution":
            before_network = False
        elif before_network and kind == "element-wise" and not event["name"].startswith("triton"):
            kind = "views"
        found.append(Kernel(event["name"], kind, float(event["ts"]), float(event["dur"])))
    return found


def kind_of(name: str) -> str:
    """Return what a kernel is of, by its name."""
    kinds = KINDS[:2] if name.startswith("triton") else KINDS
    return next((kind for kind, pattern in kinds if re.search(pattern, name, re.IGNORECASE)), "element-wise")


def shares(found: list[Kernel], seconds: float) -> dict[str, float | int]:
    """Return the share of ``seconds`` that each kind of kernel ran, largest first, and in which none ran."""
    busy: dict[str, float] = defaultdict(float)
    for kernel in found:
        busy[kernel.kind] += kernel.duration / 1e6
    told = {kind: short(spent / seconds, 3) for kind, spent in sorted(busy.items(), key=lambda item: -item[1])}
    return told | {"idle": short(max(0.0, 1 - _covered(found) / seconds), 3)}


def _covered(found: list[Kernel]) -> float:
    """Return the seconds in which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for kernel in found:
        end = kernel.start + kernel.duration
        total += max(0.0, end - max(kernel.start, until))
        until = max(until, end)
    return total / 1e6


def text(found: list[Kernel], n_steps: int, *, n: int = 20, as_rows: bool = False) -> Any:
    """Return the kernels that took most time: milliseconds and launches a step, kind, name."""
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in found:
        spent[kernel.kind, kernel.name].append(kernel.duration)
    top = sorted(spent.items(), key=lambda item: -sum(item[1]))[:n]
    rows = [(short(sum(times) / 1e3 / n_steps, 3), short(len(times) / n_steps, 3), kind, name[:110])
            for (kind, name), times in top]
    if as_rows:
        return rows
    return "\n".join(f"{ms:>9} ms {launches:>7} x  {kind:<14} {name}" for ms, launches, kind, name in rows)
