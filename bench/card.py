"""What all speed cards share: sides measured in turn, processes of their own, the machine in words, a table, a file.

A card is a script that measures one thing side by side. Its docstring says what is compared and how; its ``main`` is

    told = arguments(__doc__)
    rows = [{"images": n} | compare(sides(n), repeats=told.repeats).row() for n in sizes]
    finish(told, rows, versions=("scikit-learn",))

A side is a function without arguments, or a generator, that does some work a call and says how many units it was: a
number, or a tensor or array of that many rows; anything else is one unit. Speed is units a second, the median over
repeats; a ratio is taken repeat by repeat, so that what slows the machine for a while slows both. The first side is
ours: above 1 it is the faster one.

A ``Child`` is a side in a process of its own, which also tells its peak of memory: the process's largest resident size
during the work less its size before it. Linux tells it as VmHWM, set back through /proc/self/clear_refs; elsewhere it
is the growth of ru_maxrss. It is right to about 2 MB, as a process reuses what it freed.
"""

import argparse
import ctypes
import gc
import importlib
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phyla.storage import write_json

Side = Callable[[], object] | Generator[object]
Row = dict[str, object]


def arguments(doc: str | None, *, repeats: int = 5, **more: Mapping[str, Any]) -> argparse.Namespace:
    """Return what the command line says; ``more`` are options of this card, by name, as ``add_argument`` takes them."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: the smallest sizes, fewer repeats")
    parser.add_argument("--repeats", type=int, help=f"turns of each side; {repeats}, or 2 with --quick")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures and the machine")
    for name, how in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **how)
    told = parser.parse_args()
    told.repeats = told.repeats or (2 if told.quick else repeats)
    return told


def opponent(name: str, package: str | None = None) -> ModuleType | None:
    """Return the module ``name``, or None, said aloud, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"left out: {name} is not installed (pip install {package or name})", flush=True)
        return None


@dataclass(frozen=True)
class Rates:
    """Units a second of each side, one number a repeat."""

    of: dict[str, list[float]]

    def ratios(self, side: str, to: str) -> list[float]:
        """Return how many times as fast ``side`` is, repeat by repeat."""
        return [a / b for a, b in zip(self.of[side], self.of[to], strict=True)]

    def seconds(self, side: str) -> float:
        """Return the median time of one unit."""
        return 1 / statistics.median(self.of[side])

    def row(self) -> Row:
        """Return the medians, and of every side but the first the ratio of the first to it, with least and most."""
        return {name: short(statistics.median(values)) for name, values in self.of.items()} | self.ratio_row()

    def ratio_row(self) -> Row:
        """Return the ratios of ``row`` alone."""
        row: Row = {}
        ours, *others = self.of
        for name in others:
            found = self.ratios(ours, name)
            row[f"x {name}"] = short(statistics.median(found), 3)
            row[f"x {name} range"] = [short(min(found), 3), short(max(found), 3)]
        return row


def compare(sides: Mapping[str, Side], *, repeats: int, seconds: float = 0.0) -> Rates:
    """Return the speed of every side, in turn; a turn is one call, and as many more as fit into ``seconds``."""
    for side in sides.values():
        _units(side)  # starts workers, warms caches, compiles
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            rates[name].append(_rate(side, seconds))
    return Rates(rates)


def _rate(side: Side, seconds: float) -> float:
    started, units = _now(), 0.0
    while True:
        units += _units(side)
        if (spent := _now() - started) >= seconds:
            return units / spent


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _units(side: Side) -> float:
    done = next(side) if isinstance(side, Generator) else side()
    return float(done) if isinstance(done, int | float) else len(done) if isinstance(done, Tensor | np.ndarray) else 1.0


class Child:
    """A side in a process of its own: ``make(*args)`` there gives the function that each call carries out.

    ``make`` is a function of a card's file, and what it and the work return and take is sent between processes.
    ``bytes`` is the peak of the calls so far (None where the system does not tell), ``seconds`` the time of the last
    inside the process, ``answer`` what it returned.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *args: object) -> None:
        self.name = f"{make.__name__}{args}"
        away = multiprocessing.get_context("spawn")
        self._ours, theirs = away.Pipe()
        self._process = away.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self.bytes: int | None = None
        self.seconds, self.answer = 0.0, None

    def __call__(self) -> object:
        """Return the answer of one more call."""
        try:
            self._ours.send(None)
            self.seconds, self.bytes, self.answer = self._ours.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise SystemExit(f"{self.name}: its process ended with status {self._process.exitcode}") from None
        return self.answer

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Callable[[], object]], args: Sequence[object]) -> None:
    work = make(*args)
    _give_back()
    before = peak(reset=True)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        started = time.perf_counter()
        answer = work()
        seconds, now = time.perf_counter() - started, peak()
        pipe.send((seconds, None if now is None or before is None else now - before, answer))


def _give_back() -> None:
    """Return freed memory to the system where glibc can, so that the work cannot take it unseen."""
    gc.collect()
    if hasattr(trim := ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim"):
        trim.malloc_trim(0)


def peak(*, reset: bool = False) -> int | None:
    """Return the largest resident size so far in bytes, None where the system does not tell; ``reset`` starts anew."""
    if reset and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if (told := _field("/proc/self/status", "VmHWM")) is not None:
        return told * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> float:
    """Return the bytes that could be had now; infinite where the system does not tell."""
    told = _field("/proc/meminfo", "MemAvailable")
    return float("inf") if told is None else told * 1024.0


def _field(file: str, name: str) -> int | None:
    if not Path(file).exists():
        return None
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(name + ":")), None)


def short(value: float, digits: int = 4) -> float | int:
    """Return ``value`` to some significant digits, a whole number where it has no more."""
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def facts(*versions: str) -> Row:
    """Return the machine in words and the versions of Python, torch and the distributions named."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    names = ("torch", *versions)
    return {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", "cpu": _cpu(), **gpu,
            "threads": torch.get_num_threads(), "python": platform.python_version()} | {
                name: _version(name) for name in names}


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def table(rows: Sequence[Row]) -> str:
    """Return rows as columns under the names that any of them has; a pair is a range."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return " - ".join(map(_cell, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def finish(told: argparse.Namespace, rows: Sequence[Row], *, versions: Sequence[str] = (), **more: object) -> None:
    """Print the table of ``rows``; write rows, machine, options and ``more`` as JSON where the command line says."""
    print(table(rows), flush=True)
    if told.out:
        options = {name: value for name, value in vars(told).items() if name != "out"}
        write_json(told.out, facts(*versions) | {"options": options, "rows": list(rows)} | more)
