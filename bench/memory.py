"""Speed card: Super-AND's losses over a memory of N images, streamed against the formulas with all logits at once.

    python bench/memory.py [--losses and+ue] [--images 10000 30000 ...] [--repeats 5] [--out bench.json]

Both sides take the same 256 rows of 128 features and the same memory, forward and backward, and must agree on loss and
gradient. ``and`` is instance discrimination over all N images; ``and+ue`` adds the entropy without the own image. The
plain side is logits, log-softmax, gather, entropy and autograd.

Each side has a process of its own, and both take a step in turn; a time is the median over repeats. The peak is what a
step needs beyond the memory and the inputs: the process's largest resident size during the steps less its size before
them, after a tiny step that loads the libraries. Linux tells it as VmHWM, set back through /proc/self/clear_refs; where
there is none it is the growth of ru_maxrss. It is right to about 2 MB, as a process reuses what it freed. The plain
side is left out where its peak, in proportion to the size before, would take more than half of the free memory.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from phyla.nets.memory import HIDDEN_LOGIT, memory_softmax

ROWS, FEATURES, TEMPERATURE, UE_WEIGHT = 256, 128, 0.1, 0.2
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
SIDES = ("streamed", "plain")


def streamed(rows: Tensor, bank: Tensor, own: Tensor, entropy: bool) -> Tensor:
    """Return the loss by phyla's one pass over the memory."""
    found = memory_softmax(rows, bank, own, temperature=TEMPERATURE, entropy="masked" if entropy else "none")
    loss = (found.log_sum - (rows * bank[own]).sum(dim=1) / TEMPERATURE).mean()
    return loss if found.entropy is None else loss + UE_WEIGHT * found.entropy.mean()


def plain(rows: Tensor, bank: Tensor, own: Tensor, entropy: bool) -> Tensor:
    """Return the loss by the formulas, with the logits (R, N) of all images."""
    logits = rows @ bank.T / TEMPERATURE
    loss = -logits.log_softmax(dim=1).gather(1, own[:, None]).mean()
    if not entropy:
        return loss
    log_p = logits.scatter(1, own[:, None], HIDDEN_LOGIT).log_softmax(dim=1)
    return loss - UE_WEIGHT * (log_p.exp() * log_p).sum(dim=1).mean()


def status(field: str) -> int | None:
    """Return a field of /proc/self/status in bytes, None where there is no such file."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(field + ":"))


def peak(*, reset: bool = False) -> int | None:
    """Return the largest resident size so far in bytes, None where the system does not tell; ``reset`` starts anew."""
    if reset and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    if (told := status("VmHWM")) is not None:
        return told
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def inputs(n_images: int, n_rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (R, D) and a memory (N, D), both of length 1, and the image of each row; the same for each side."""
    draw = torch.Generator().manual_seed(0)
    bank = torch.empty(n_images, FEATURES).normal_(generator=draw)
    for block in bank.split(4096):  # in place: a copy would count as this process's peak
        block /= block.norm(dim=1, keepdim=True)
    own = torch.randint(n_images, (n_rows,), generator=draw)
    noise = 0.1 * torch.randn(n_rows, FEATURES, generator=draw)
    rows = torch.nn.functional.normalize(bank[own] + noise, dim=1)
    return rows.requires_grad_(), bank, own


def serve(side: str, n_images: int, entropy: bool) -> None:
    """Take one step for every line on standard input, and answer with seconds, bytes, loss and gradient's length."""
    loss_of: Callable[[Tensor, Tensor, Tensor, bool], Tensor] = {"streamed": streamed, "plain": plain}[side]
    loss_of(*inputs(8, 4), entropy).backward()
    rows, bank, own = inputs(n_images)
    before = peak(reset=True)
    for _ in sys.stdin:
        rows.grad, started = None, time.perf_counter()
        loss = loss_of(rows, bank, own, entropy)
        loss.backward()
        seconds, now = time.perf_counter() - started, peak()
        print(json.dumps({"seconds": seconds, "bytes": None if now is None or before is None else now - before,
                          "loss": loss.item(), "gradient": rows.grad.norm().item()}), flush=True)


class Side:
    """One side's process for one size."""

    def __init__(self, side: str, n_images: int, losses: str) -> None:
        told = [sys.executable, __file__, "--serve", side, "--images", str(n_images), "--losses", losses]
        self.process = subprocess.Popen(told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.answers = f"{side} of {n_images:,} images", []

    def step(self) -> dict[str, float]:
        """Return the answer to one more step."""
        print(file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name}: the process ended early, with status {self.process.wait()}")
        self.answers.append(json.loads(line))
        return self.answers[-1]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def card(n_images: int, losses: str, repeats: int, *, with_plain: bool) -> dict[str, object]:
    """Return the figures of one size, both sides measured in turn."""
    sides = {name: Side(name, n_images, losses) for name in SIDES if with_plain or name != "plain"}
    try:
        for turn in range(repeats + 1):
            answers = [side.step() for side in sides.values()]
            if turn == 0:
                check(answers)
    finally:
        for side in sides.values():
            side.close()
    row: dict[str, object] = {"images": n_images}
    for name, side in sides.items():
        seconds = statistics.median(answer["seconds"] for answer in side.answers[1:])  # the first step warms up
        row |= {f"{name}_ms": round(seconds * 1e3, 2), f"{name}_ns_per_image": round(seconds * 1e9 / n_images, 1),
                f"{name}_peak_mb": None if (most := side.answers[-1]["bytes"]) is None else round(most / 1e6, 1)}
    if with_plain:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(*(side.answers[1:] for side in sides.values()),
                                                              strict=True)]
        row |= {"ratio": round(statistics.median(ratios), 2), "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2)}
    return row


def check(answers: list[dict[str, float]]) -> None:
    """Stop where the sides do not compute the same."""
    for name in ("loss", "gradient"):
        if max(found := [answer[name] for answer in answers]) > 1.001 * min(found):
            raise SystemExit(f"the sides differ in {name}: {found}")


def free_memory() -> float:
    """Return the bytes that could be had now; infinite where the system does not tell."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if "MemAvailable" in line)


def printed(row: dict[str, object]) -> str:
    """Return one line of the table."""
    def cell(value: object, width: int) -> str:
        return f"{'-' if value is None else value:>{width}}"

    ours = f"{row['images']:>10,} {cell(row['streamed_ms'], 11)} {cell(row['streamed_ns_per_image'], 9)} " \
           f"{cell(row['streamed_peak_mb'], 8)}"
    if "plain_ms" not in row:
        return f"{ours}   plain left out: {row['left_out']}"
    return f"{ours} {cell(row['plain_ms'], 11)} {cell(row['plain_ns_per_image'], 9)} {cell(row['plain_peak_mb'], 9)} " \
           f"{cell(row['ratio'], 6)} {row['ratio_min']:>6} - {row['ratio_max']}"


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--losses", choices=("and", "and+ue"), default="and+ue")
    parser.add_argument("--images", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.serve:
        return serve(told.serve, told.images[0], told.losses == "and+ue")
    print(f"{told.losses}, {ROWS} rows of {FEATURES} features, forward and backward\n"
          f"{'images':>10} {'streamed ms':>11} {'ns/image':>9} {'peak MB':>8} {'plain ms':>11} {'ns/image':>9} "
          f"{'peak MB':>9} {'ratio':>6} {'range':>14}")
    cards: list[dict[str, object]] = []
    bytes_per_image = ROWS * 4.0  # of the plain side; measured from its first size on
    for n_images in sorted(told.images):
        need, free = bytes_per_image * n_images, free_memory()
        row = card(n_images, told.losses, told.repeats, with_plain=need <= free / 2)
        if row.get("plain_peak_mb") is not None:
            bytes_per_image = row["plain_peak_mb"] * 1e6 / n_images
        elif "plain_ms" not in row:
            row["left_out"] = f"it needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        cards.append(row)
        print(printed(row), flush=True)
    if told.out:
        facts = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
                 "threads": torch.get_num_threads(), "torch": torch.__version__, "losses": told.losses, "rows": ROWS,
                 "features": FEATURES, "repeats": told.repeats,
                 "peak": "VmHWM" if status("VmHWM") is not None else "ru_maxrss", "cards": cards}
        told.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
