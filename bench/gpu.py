"""GPU card: everything that needs a GPU, by one command, most valuable first, in the minutes that there are.

    PYTHONPATH=src python bench/gpu.py --data FOLDER --out OUT [--minutes 9] [--parts smoke epoch ...]

What is measured (``gpu_parts.py``): the machine's own rates; whether recorded and compiled steps train every method as
the eager engine does; seconds of a SimCLR epoch on CIFAR-10, engine by engine, beside the floor of its arithmetic, a
plain loop and lightly's; the kernels of the best engine; steps of all methods; kNN accuracy of the fast path and of the
faithful one; views, neighbors, peaks of memory.

Every row is in OUT/gpu.json as soon as it is known. The same command later, or on another machine with that file copied
there, measures what is missing or failed, and leaves out, aloud, what no longer fits into the time. A failed row says
why, and the others go on; where it left the GPU unusable, or hung, the script starts itself anew. A row that ended the
process is not tried again. OUT/report.txt has the tables.

FOLDER holds CIFAR-10 as ``cifar-10-batches-py``, or as lossless mosaics ``data_batch_*.webp``, ``test_batch.webp`` and
``labels.npz`` (of 10,000 images each, 100 a row; not all need be there), in it or one folder down. ``--data random``
and ``--data photographs`` are images without classes. Speed is always that of 50,000 images: fewer are repeated.
"""

import argparse
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

NEEDED = ("scipy", "sklearn", "jaxtyping", "threadpoolctl", "PIL", "phyla")
WANTED = {"torchvision": "the plain loops", "lightly": "lightly's loop"}

try:
    import gpu_parts
    from card import Row, facts, table
    from driven import photographs
    from gpu_parts import Bench, Item
    from phyla.storage import write_bytes, write_json
    from phyla.types import ImageSet
except ModuleNotFoundError:
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    raise SystemExit(f"not installed, and needed: {', '.join(absent)} (phyla: PYTHONPATH=src)") from None

FILE, REPORT = "gpu.json", "report.txt"
SHORTEST = 5.0  # seconds under which nothing is begun
DIED, NEVER_AGAIN = "the process ended, or hung, while this was measured; --again tries it once more", 1e18


class Store:
    """Rows by part and name, in one file."""

    def __init__(self, folder: Path | None, *, again: bool = False) -> None:
        self.path = folder / FILE if folder else None
        self.parts: dict[str, dict[str, Row]] = {}
        self.notes: list[str] = []
        if self.path is not None and self.path.exists():
            self.parts = json.loads(self.path.read_text(encoding="utf-8"))["parts"]
        for rows in self.parts.values() if again else ():
            for name in [name for name, row in rows.items() if row.get("failed") == DIED]:
                del rows[name]

    def rows(self, part: str) -> Mapping[str, Row]:
        """Return what is known of a part."""
        return self.parts.get(part, {})

    def has(self, part: str, name: str, *, since: float) -> bool:
        """Return whether a row is known; one that failed is known only if it was tried ``since`` then, or is fatal."""
        row = self.rows(part).get(name)
        return row is not None and ("failed" not in row or float(str(row["at"])) >= since)

    def put(self, part: str, name: str, row: Row) -> None:
        """Keep a row, on disk too."""
        self.parts.setdefault(part, {})[name] = row
        if self.path is not None:
            write_json(self.path, facts("numpy", "torchvision", "triton", "lightly") | {"parts": self.parts})

    def say(self, note: str) -> None:
        """Print a note, and keep it for the report."""
        print(note, flush=True)
        self.notes.append(note)


def carry_out(store: Store, bench: Bench, parts: Sequence[str], *, started: float, until: float) -> None:
    """Measure every row of ``parts`` that is missing and fits into the time."""
    for part in parts:
        left_out = []
        for item in gpu_parts.PARTS[part](bench):
            if store.has(part, item.name, since=started):
                continue
            if time.time() + item.seconds > until:
                left_out.append(item.name)
                continue
            store.put(part, item.name, {"failed": DIED, "at": NEVER_AGAIN})
            hung = threading.Timer(3 * item.seconds + 60, _start_anew, (started, until))
            hung.daemon = True
            hung.start()
            try:
                row = _measured(part, item)
            finally:
                hung.cancel()
            store.put(part, item.name, row)
            if "failed" in row and not _is_usable(bench):
                _start_anew(started, until)
        if left_out:
            store.say(f"{part}: no time for {', '.join(left_out)}")


def _measured(part: str, item: Item) -> Row:
    began = time.time()
    try:
        row = item.work()
    except Exception as error:
        trace = traceback.format_exc()
        row = {"failed": f"{type(error).__name__}: {str(error)[:300]}", "trace": trace[-3000:], "at": began}
    took = time.time() - began
    told = row.get("failed") or {name: value for name, value in row.items() if name != "top"}
    print(f"{part}, {item.name} ({took:.1f} s): {told}", flush=True)
    return row | {"took s": round(took, 1)}


def _is_usable(bench: Bench) -> bool:
    try:
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        gpu_parts.free(bench)
        return bool((torch.ones(2, device=bench.device) + 1).sum() == 4)
    except Exception as error:
        print(f"the GPU cannot go on: {str(error)[:200]}", flush=True)
        return False


def _start_anew(started: float, until: float) -> None:
    """Run the same command again in this process's place; what was measured is not measured again."""
    sys.stdout.flush()
    kept = [word for word in sys.argv if word != "--again" and not word.startswith(("--since=", "--until="))]
    os.execv(sys.executable, [sys.executable, *kept, f"--since={started}", f"--until={until}"])


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────────────


Split = tuple[np.ndarray, np.ndarray | None]


def read(data: str) -> tuple[Split, Split | None]:
    """Return pixels and classes of training and of test, as far as they are there."""
    if data == "random":
        return (np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8), None), None
    if data == "photographs":
        return (np.asarray(photographs(2000).array), None), None
    for folder in (Path(data), *(path for path in sorted(Path(data).glob("*")) if path.is_dir())):
        if (folder / "labels.npz").exists():
            return _pack(folder, "data_batch"), _pack(folder, "test_batch")
        if (folder / "data_batch_1").exists():
            return _official(folder.parent, "train"), _official(folder.parent, "test")
    raise SystemExit(f"no CIFAR-10 in {data}: neither data_batch_1 nor labels.npz, there or one folder down")


def _pack(folder: Path, start: str) -> Split:
    """Return the images of the mosaics whose names begin so: 10,000 each, 100 a row, in the order of the name."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with np.load(folder / "labels.npz", allow_pickle=False) as labels:
        names = [name for name in sorted(labels.files) if name.startswith(start)
                 and (folder / f"{name}.webp").exists()]
        true = np.concatenate([labels[name].astype(np.int64) for name in names])
    found = []
    for name in names:
        with Image.open(folder / f"{name}.webp") as mosaic:
            pixels = np.asarray(mosaic.convert("RGB"))
        rows, columns = (side // 32 for side in pixels.shape[:2])
        found.append(pixels.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3))
    return np.concatenate(found), true


def _official(folder: Path, split: str) -> Split:
    from phyla.evaluate.truth import true_labels
    from phyla.images.sources import open_images

    loaded = open_images("cifar10", split=split, data_dir=folder, download=False).images
    return np.asarray(loaded.array), true_labels("cifar10", loaded.ids, split=split, data_dir=folder).labels


def _set(split: Split, name: str) -> ImageSet:
    return ImageSet(split[0], [f"{name}/{row}" for row in range(len(split[0]))], name)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


HIDDEN = ("trace", "top", "took s", "at")


def report(store: Store) -> str:
    """Return a table a part, what was left out, and why rows failed."""
    lines = []
    for part in gpu_parts.PARTS:
        rows = store.rows(part)
        good = [{name: value for name, value in row.items() if name not in HIDDEN} for row in rows.values()
                if "failed" not in row]
        if good:
            lines += [f"\n{part}", table(good)]
        lines += [f"{part}, {name} FAILED: {row['failed']}" for name, row in rows.items() if "failed" in row]
    return "\n".join([*store.notes, *lines])


def bench_of(told: argparse.Namespace, store: Store) -> Bench:
    """Return what the command line asks for."""
    train, test = read(told.data)
    device = torch.device(told.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --device cpu --quick tries the script")
    engines = tuple(told.engines or (("eager", "graph", "compiled") if device.type == "cuda" else ("eager",)))
    for engine in ("graph", "compiled"):
        if engine not in engines:
            store.say(f"left out: the engine {engine}")
    if test is not None and told.quick:
        test = test[0][:64], None if test[1] is None else test[1][:64]
    shown = train if not told.quick else (train[0][:128], None if train[1] is None else train[1][:128])
    return Bench(device, _set(shown, "train"), shown[1], _set(test, "test") if test else None,
                 test[1] if test else None, told.quick, engines, store.rows, store.say)


def run(told: argparse.Namespace) -> Store:
    """Measure what the command line asks for, and return all that is known."""
    started = told.since or time.time()
    until = told.until or started + 60 * told.minutes
    store = Store(told.out, again=told.again)
    for name, without in WANTED.items():
        if importlib.util.find_spec(name) is None:
            store.say(f"left out, as {name} is not installed: {without}")
    bench = bench_of(told, store)
    print(f"{facts()}\n{len(bench.train):,} images, engines {', '.join(bench.engines)}", flush=True)
    carry_out(store, bench, told.parts, started=started, until=until - SHORTEST)
    found = report(store)
    if told.out:
        write_bytes(told.out / REPORT, found.encode())
    print(found, flush=True)
    return store


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="random", help="a folder with CIFAR-10, random, or photographs")
    parser.add_argument("--out", type=Path, help="folder of the results; what is there is not measured again")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all together")
    parser.add_argument("--parts", nargs="+", choices=list(gpu_parts.PARTS), default=list(gpu_parts.PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engines", nargs="+", choices=("eager", "graph", "compiled"))
    parser.add_argument("--quick", action="store_true", help="tiny networks and few images: to try the script")
    parser.add_argument("--again", action="store_true", help="try rows once more that ended the process")
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(words)


if __name__ == "__main__":
    run(options())
