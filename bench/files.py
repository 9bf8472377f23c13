"""Speed card: images a second from JPEG files, ours against timm's network and transforms in a DataLoader.

    python bench/files.py [--quick] [--repeats 3] [--sizes 64 224] [--out files.json]

``decode`` makes uint8 squares of the files; ``embed`` gives the features of a ResNet-18 of them; ``predict`` writes a
CSV file with a row an image. The files are crops of scikit-learn's two photographs, 480 x 360 and 64 x 64. The opponent
is set up as timm's documentation says: ``create_model``, ``create_transform`` for evaluation, ``inference_mode``,
channels last, batches of 256, and a DataLoader with one worker a core that stays alive from turn to turn. Both
networks are ResNet-18 with random weights and have the same threads and batches; both sides read every file in every
turn. Ours decodes at a part of the size where that is still twice what is wanted, in threads.
"""

import csv
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import card
from phyla.classifier import Classifier
from phyla.embed import forward_all
from phyla.images.augment import Views
from phyla.images.folders import stream_images, walk
from phyla.images.stored import FileList, FilePixels
from phyla.labelling import label_files
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import EncoderSpec
from phyla.training.device import choose_device
from phyla.types import ImageSet

BATCH, CLUSTERS = 256, 10
PHOTOGRAPHS, SMALL = (480, 360), (64, 64)


def write_files(folder: Path, n: int, shape: tuple[int, int]) -> Path:
    """Write ``n`` JPEG files, all different, of ``shape`` (width, height)."""
    folder.mkdir()
    draw, photographs = np.random.default_rng(0), load_sample_images().images
    for i in range(n):
        whole = photographs[i % 2]
        top, left = draw.integers(whole.shape[0] - shape[1] + 1), draw.integers(whole.shape[1] - shape[0] + 1)
        crop = whole[top : top + shape[1], left : left + shape[0]]
        Image.fromarray(crop).save(folder / f"{i:05d}.jpg", quality=90)
    return folder


class Ours:
    """A folder of files and our network."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.files = folder, size, FileList(walk(folder))
        encoder = EncoderSpec(stem="imagenet").build(torch.Generator().manual_seed(0))
        net = ClusterNet(encoder, ClusterHeads(encoder.spec.n_features, CLUSTERS))
        self.classifier, self.device = Classifier(net, Views("plain", size), size), choose_device()

    def decode(self) -> int:
        """Decode all files."""
        return sum(len(chunk.ids) for chunk in stream_images(self.files, size=self.size))

    def embed(self) -> Tensor:
        """Return the features of all files."""
        pixels = FilePixels(self.files, np.arange(len(self.files)), self.size)
        images, encoder = ImageSet(pixels, [file.id for file in self.files]), self.classifier.net.encoder
        return forward_all(images, encoder, encoder, self.classifier.views, device=self.device, batch_size=BATCH).cpu()

    def predict(self) -> int:
        """Write a table of all files."""
        table = self.folder.parent / "ours.csv"
        return int(str(label_files(self.classifier, self.folder, table, device=self.device)["labelled"]))


class Theirs:
    """The same with timm and a DataLoader."""

    def __init__(self, folder: Path, size: int) -> None:
        import timm

        self.table, self.device = folder.parent / "theirs.csv", choose_device().device
        self.encoder, self.net = (timm.create_model("resnet18", num_classes=n).eval().to(
            self.device, memory_format=torch.channels_last) for n in (0, CLUSTERS))
        mean_and_std = timm.data.create_transform((3, size, size), is_training=False)
        square = nn.Sequential(*mean_and_std.transforms[:2])
        self.paths = sorted(folder.iterdir())
        self.squares, self.views = (torch.utils.data.DataLoader(
            Files(self.paths, transform), batch_size=BATCH, num_workers=os.cpu_count() or 1, persistent_workers=True,
            pin_memory=self.device.type == "cuda") for transform in (AsBytes(square), mean_and_std))

    def decode(self) -> int:
        """Decode all files into uint8 squares."""
        return sum(len(batch) for batch in self.squares)

    def embed(self) -> Tensor:
        """Return the features of all files."""
        return torch.cat(self._run(self.encoder))

    def predict(self) -> int:
        """Write a table of all files."""
        probabilities, clusters = torch.cat(self._run(self.net)).softmax(1).topk(3)
        with self.table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerows([path.name, *most, *sure] for path, most, sure in zip(
                self.paths, clusters.tolist(), probabilities.tolist(), strict=True))
        return len(self.paths)

    @torch.inference_mode()
    def _run(self, net: nn.Module) -> list[Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=choose_device().precision == "bf16"):
            return [net(batch.to(self.device, non_blocking=True, memory_format=torch.channels_last)).float().cpu()
                    for batch in self.views]


class Files(torch.utils.data.Dataset[Tensor]):
    """Pictures of a list of files, through a transform."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


class AsBytes:
    """A transform whose picture is given as uint8 (size, size, 3)."""

    def __init__(self, square: Callable[[Image.Image], Image.Image]) -> None:
        self.square = square

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(self.square(image)))


def main() -> None:
    """Measure, print, and write the figures."""
    told = card.arguments(__doc__, repeats=3, sizes={"type": int, "nargs": "+", "default": [64, 224]},
                          files={"type": int, "default": 512})
    if card.opponent("timm") is None:
        return
    n, rows = 64 if told.quick else told.files, []
    with tempfile.TemporaryDirectory() as place:
        for shape in (PHOTOGRAPHS, SMALL):
            folder = write_files(Path(place) / f"{shape[0]}", n, shape)
            for size in told.sizes:
                if size > shape[1]:
                    continue
                ours, theirs = Ours(folder, size), Theirs(folder, size)
                for work in ("decode", "embed", "predict"):
                    sides = {"ours": getattr(ours, work), "timm": getattr(theirs, work)}
                    rows.append({"files": f"{shape[0]} x {shape[1]}", "size": size, "work": work}
                                | card.compare(sides, repeats=told.repeats, seconds=0 if told.quick else 3).row())
                    print(card.table(rows[-1:]), flush=True)
    card.finish(told, rows, versions=("timm", "torchvision", "pillow"))


if __name__ == "__main__":
    main()
