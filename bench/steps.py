"""Speed card: a whole training step of every method, against the same step as people write it.

    python bench/steps.py [--methods simclr scan ...] [--device cpu] [--repeats 5] [--out bench.json]

Ours is the method's own ``fit``, driven a step at a time (``driven.py``): views, networks, losses, backward, optimizer,
buffers, records. The plain side (``plain.py``) is a PyTorch loop over a DataLoader with one worker a core that makes
views by PIL and torchvision, in float32; SimCLR also meets lightly's, as its CIFAR-10 example has it. Both train the
same network from the same weights on the same photographs, 32 x 32, and first each method's loss is computed by both
sides of the same views: they must agree to 0.1 %.

Super-AND is measured over a memory of 50,000 images: its first 80 epochs of a round, the others (+ue), and these with
next to no network, which leaves views, losses, memory and optimizer. On a CPU networks are narrower and batches smaller
than published so that a step takes about a second; on a GPU they are those published. Sides take turns of a few
seconds.

"cpu ms" is the processor time of a step in all processes of a side, on Linux and a CPU. Clocks favor the side with more
processes where other programs want the cores, too; processor time hardly sees them.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

import driven
import plain
from card import Rates, Row, Side, arguments, compare, finish, short
from driven import Steps, first_step, photographs
from phyla.training.device import Device, choose_device
from phyla.types import ImageSet

TOLERANCE = 1e-3
MEMORY = 50_000
PAUSE = 0.5  # seconds in which a worker that has work uses some processor time


def check(name: str, fit: driven.Fit) -> tuple[driven.First, float]:
    """Return the first step of a method on a CPU and how far the plain loss of the same views is from its own.

    Raises
    ------
    SystemExit
        Further than ``TOLERANCE``: the sides would not do the same work.
    """
    first = first_step(lambda: fit(choose_device("cpu")))
    more = {"mixing": first.mixing} if first.mixing is not None else {}
    made = plain.METHODS[name](first.state, **more)
    for net in made.nets:
        net.train()
    theirs = float(made.loss(first.views, first.rows).detach())
    apart = abs(theirs - first.loss) / max(abs(first.loss), 1e-9)
    if not apart < TOLERANCE:
        raise SystemExit(f"{name}: the loss of the same views is {first.loss} here and {theirs} as people write it")
    return first, apart


def sides(name: str, images: ImageSet, fit: driven.Fit, first: driven.First, batch: int, device: Device
          ) -> dict[str, Side]:
    """Return what is measured, ours first; each call is one step."""
    near = (np.arange(len(images))[:, None] + np.arange(1, 21)) % len(images)
    pixels, on = np.asarray(images.array), device.device
    found: dict[str, Side] = {"phyla": Steps(lambda: fit(device), warm=4)}
    batches = plain.loader(plain.data(name, pixels, near), batch, on)
    found["plain"] = plain.steps(plain.METHODS[name](first.state), batches, on)
    if name == "simclr":
        lightly = plain.lightly_simclr(first.state, pixels)
        if lightly is None:
            print("left out: lightly is not installed (pip install lightly)", flush=True)
        else:
            found["lightly"] = plain.steps(lightly[0], plain.loader(lightly[1], batch, on), on)
    return found


def processor(side: Side, n_steps: int = 6) -> float | None:
    """Return the processor seconds of a step, worker processes included; None where the system does not tell."""
    if not Path("/proc/self/stat").exists():
        return None
    before, started = _settled(), time.process_time()
    for _ in range(n_steps):
        side() if callable(side) else next(side)
    spent = time.process_time() - started
    return (spent + _settled() - before) / n_steps


def _settled() -> float:
    """Return the processor seconds of all workers so far, once they have filled their queues and wait."""
    while True:
        before = _workers()
        time.sleep(PAUSE)
        if _workers() == before:
            return before


def _workers() -> float:
    total = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == os.getpid():
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def card(name: str, told: argparse.Namespace, device: Device) -> Row:
    """Return the figures of one method."""
    is_gpu = device.device.type != "cpu"
    width = told.width or (64 if is_gpu else 4 if "superand" in name else 16)
    batch = told.batch or (driven.BATCH[name] if is_gpu or "superand" in name else 64)
    n_images = told.images or (MEMORY if "superand" in name else 100 * batch)
    images = photographs(n_images)
    fit = driven.METHODS[name](images, width=width, batch=batch)
    first, apart = check(name, fit)
    running = sides(name, images, fit, first, batch, device)
    rates: Rates = compare(running, repeats=told.repeats, seconds=told.seconds)
    row: Row = {"method": name, "width": width, "batch": batch, "images": n_images, "loss apart": short(apart, 2)}
    row |= {f"{side} ms": short(1e3 * rates.seconds(side)) for side in running} | rates.ratio_row()
    if not is_gpu:
        spent = {side: processor(running[side]) for side in running}
        row |= {f"{side} cpu ms": None if each is None else short(1e3 * each) for side, each in spent.items()}
        ours = spent.pop("phyla")
        row |= {f"x {side} cpu": short(each / ours, 3) for side, each in spent.items() if each and ours}
    for side in running.values():
        side.close()  # type: ignore[union-attr]
    return row


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    told = arguments(
        __doc__, methods={"nargs": "+", "choices": list(driven.METHODS), "default": list(driven.METHODS)},
        device={"default": "auto"}, precision={"default": "fp32"}, engine={"default": "auto"},
        width={"type": int}, batch={"type": int}, images={"type": int},
        seconds={"type": float, "default": 5.0, "help": "of a turn"})
    if told.quick:
        told.seconds, told.width, told.batch, told.images = 0.2, told.width or 4, told.batch or 16, told.images or 2000
    device = choose_device(told.device, told.precision, engine=told.engine)
    torch.backends.cudnn.benchmark = True  # as PyTorch's tuning guide says, for all sides
    print(f"{device.label}; a step, ms", flush=True)
    rows: list[Row] = []
    for name in told.methods:
        rows.append(card(name, told, device))
        print(rows[-1], flush=True)
    finish(told, rows, versions=("torchvision", "lightly", "pillow"), device_label=device.label)


if __name__ == "__main__":
    main()
