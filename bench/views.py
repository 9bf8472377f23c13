"""Speed card: views a second, ours against torchvision's transforms in a DataLoader, measured in turn in one run.

    python bench/views.py [--seconds 3] [--repeats 5] [--out bench.json]

Both make SimCLR's views (resized crop, flip, color jitter, grey) of the same uint8 images and end in normalised float
tensors. The opponent is set up as its documentation says: PIL images in memory, torchvision.transforms.v2, a DataLoader
with one worker a core that stays alive. A figure is the median over repeats, and the ratio is taken repeat by repeat.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from phyla.images.augment import Views

BATCH = 256
N_IMAGES = 1024


def photographs(size: int) -> np.ndarray:
    """Return crops of the two photographs that come with scikit-learn, uint8 (N_IMAGES, size, size, 3)."""
    source, rng = load_sample_images().images, np.random.default_rng(0)
    crops = []
    for i in range(N_IMAGES):
        picture = source[i % 2]
        top, left = rng.integers(picture.shape[0] - size), rng.integers(picture.shape[1] - size)
        crops.append(picture[top : top + size, left : left + size])
    return np.stack(crops)


def ours(pixels: np.ndarray, size: int) -> Iterator[torch.Tensor]:
    """Yield batches of our views without end."""
    views, source, resident = Views("simclr", size), torch.Generator().manual_seed(0), torch.from_numpy(pixels)
    while True:
        yield views(resident[torch.randint(len(resident), (BATCH,), generator=source)], source)


class Pictures(torch.utils.data.Dataset):
    """PIL images in memory with torchvision's SimCLR views."""

    def __init__(self, pixels: np.ndarray, size: int) -> None:
        self.pictures = [Image.fromarray(image) for image in pixels]
        self.transform = v2.Compose([
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    def __len__(self) -> int:
        return len(self.pictures) * 1000

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(self.pictures[row % len(self.pictures)])


def theirs(pixels: np.ndarray, size: int) -> Iterator[torch.Tensor]:
    """Yield batches of torchvision's views without end."""
    loader = torch.utils.data.DataLoader(Pictures(pixels, size), BATCH, shuffle=True, drop_last=True,
                                         num_workers=os.cpu_count() or 1, persistent_workers=True)
    while True:
        yield from loader


def rate(batches: Iterator[torch.Tensor], seconds: float) -> float:
    """Return views a second over at least ``seconds``."""
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        n += len(next(batches))
    return n / (time.perf_counter() - started)


def card(size: int, seconds: float, repeats: int) -> dict[str, object]:
    """Return the figures of one size, both sides measured in turn."""
    pixels = photographs(size)
    sides: dict[str, Callable[[np.ndarray, int], Iterator[torch.Tensor]]] = {"phyla": ours, "torchvision": theirs}
    running = {name: make(pixels, size) for name, make in sides.items()}
    for batches in running.values():
        rate(batches, 1.0)  # start workers, warm caches
    rates: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(repeats):
        for name, batches in running.items():
            rates[name].append(rate(batches, seconds))
    ratios = [a / b for a, b in zip(rates["phyla"], rates["torchvision"], strict=True)]
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    return {"size": size, **medians, "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2)}


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    cards = [card(size, told.seconds, told.repeats) for size in (32, 96, 224)]
    print(f"{'size':>5} {'phyla views/s':>14} {'torchvision views/s':>20} {'ratio':>7} {'range':>14}")
    for row in cards:
        print(f"{row['size']:>5} {row['phyla']:>14,} {row['torchvision']:>20,} {row['ratio']:>7} "
              f"{row['ratio_min']:>6} - {row['ratio_max']}")
    if told.out:
        facts = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
                 "torch": torch.__version__, "torchvision": torchvision.__version__, "cards": cards}
        told.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
