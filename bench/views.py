"""Speed card: views a second, against torchvision, kornia and lightly as their documentation sets them up.

    python bench/views.py [--sizes 32 96 224] [--seconds 3] [--repeats 5] [--out bench.json]

All make SimCLR's views (resized crop, flip, color jitter, grey) of the same images and end in normalised float tensors,
in batches of 256. Ours takes uint8 arrays. torchvision is transforms.v2 on PIL images in memory, in a DataLoader with
one worker a core that stays alive. lightly is its SimCLRTransform in the same DataLoader, two views an image, with our
strengths and no blur, which no other side has. kornia is an AugmentationSequential on float tensors that lie ready; at
224 pixels a batch of it can take a minute on a CPU. A turn of a loader is whole epochs of 1,024 images: its workers
begin with it and end with it, and do not fetch ahead while another side is measured. Opponents that are not installed
are left out.
"""

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2

from card import Side, arguments, compare, finish, opponent
from phyla.images.augment import Views

BATCH = 256
N_IMAGES = 1024
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def photographs(size: int) -> np.ndarray:
    """Return crops of the two photographs that come with scikit-learn, uint8 (N_IMAGES, size, size, 3)."""
    source, rng = load_sample_images().images, np.random.default_rng(0)
    crops = []
    for i in range(N_IMAGES):
        picture = source[i % 2]
        top, left = rng.integers(picture.shape[0] - size), rng.integers(picture.shape[1] - size)
        crops.append(picture[top : top + size, left : left + size])
    return np.stack(crops)


def batches(images: Tensor) -> Iterator[Tensor]:
    """Yield 256 images after the other, without end."""
    while True:
        yield from images.split(BATCH)


def ours(pixels: np.ndarray, size: int) -> Iterator[Tensor]:
    """Yield batches of our views without end."""
    views, source = Views("simclr", size), torch.Generator().manual_seed(0)
    for batch in batches(torch.from_numpy(pixels)):
        yield views(batch, source)


class Pictures(torch.utils.data.Dataset):
    """PIL images in memory, transformed when asked for."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Image.Image], object]) -> None:
        self.pictures, self.transform = [Image.fromarray(image) for image in pixels], transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> object:
        return self.transform(self.pictures[row])


def epochs(pixels: np.ndarray, transform: Callable[[Image.Image], object]) -> Callable[[], int]:
    """Return what makes an epoch of transformed images and tells how many views they were."""
    loader = torch.utils.data.DataLoader(Pictures(pixels, transform), BATCH, shuffle=True, drop_last=True,
                                         num_workers=os.cpu_count() or 1, persistent_workers=True)

    def epoch() -> int:
        return sum(len(batch) if isinstance(batch, Tensor) else sum(map(len, batch)) for batch in loader)

    return epoch


def by_torchvision(pixels: np.ndarray, size: int) -> Callable[[], int]:
    """Return what makes an epoch of torchvision's views."""
    return epochs(pixels, v2.Compose([
        v2.RandomResizedCrop(size, scale=(0.2, 1.0)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]))


def by_lightly(lightly: ModuleType, pixels: np.ndarray, size: int) -> Callable[[], int]:
    """Return what makes an epoch of lightly's views, two an image."""
    transform = lightly.SimCLRTransform(input_size=size, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.4, cj_hue=0.1,
                                        min_scale=0.2, gaussian_blur=0.0, normalize={"mean": MEAN, "std": STD})
    return epochs(pixels, transform)


def by_kornia(kornia: ModuleType, pixels: np.ndarray, size: int) -> Iterator[Tensor]:
    """Yield batches of kornia's views without end."""
    change = kornia.AugmentationSequential(
        kornia.RandomResizedCrop((size, size), scale=(0.2, 1.0)), kornia.RandomHorizontalFlip(p=0.5),
        kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), kornia.RandomGrayscale(p=0.2),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)), data_keys=["input"])
    for batch in batches(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(255)):
        yield change(batch)


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    told = arguments(__doc__, sizes={"type": int, "nargs": "+", "help": "sides of a view, pixels; 32 96 224"},
                     seconds={"type": float, "help": "least time of a turn; 3, or 1 with --quick"})
    told.sizes = told.sizes or ([32] if told.quick else [32, 96, 224])
    told.seconds = told.seconds or (1.0 if told.quick else 3.0)
    kornia, lightly = opponent("kornia.augmentation", "kornia"), opponent("lightly.transforms", "lightly")
    rows = []
    for size in told.sizes:
        pixels = photographs(size)
        sides: dict[str, Side] = {"phyla": ours(pixels, size), "torchvision": by_torchvision(pixels, size)}
        if lightly:
            sides["lightly"] = by_lightly(lightly, pixels, size)
        if kornia:
            sides["kornia"] = by_kornia(kornia, pixels, size)
        rows.append({"size": size} | compare(sides, repeats=told.repeats, seconds=told.seconds).row())
    finish(told, rows, versions=("torchvision", "lightly", "kornia"))


if __name__ == "__main__":
    main()
