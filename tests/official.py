"""Tiny files in the official layouts of the public data sets, made of random pixels."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image

N = 3  # images a CIFAR batch


def pixels(n: int, side: int, seed: int = 0) -> np.ndarray:
    """Return random images, uint8 (n, side, side, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def planes(images: np.ndarray) -> np.ndarray:
    """Return images as CIFAR stores them, uint8 (n, 3072): red plane, green plane, blue plane."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), -1))


def cifar10(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write five training batches and a test batch; return all images and labels in that order."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, labels = pixels(6 * N, 32), np.arange(6 * N) % 10
    for i, name in enumerate([*(f"data_batch_{b}" for b in range(1, 6)), "test_batch"]):
        own = slice(i * N, (i + 1) * N)
        content = {b"data": planes(images[own]), b"labels": labels[own].tolist(), b"filenames": [b"x.png"] * N}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {c}".encode() for c in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    return images, labels


def cifar100(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write both splits of CIFAR-100, six images each; return images, fine and coarse labels."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    images, fine, coarse = pixels(12, 32), np.arange(12) * 8, np.arange(12) % 20
    for name, own in (("train", slice(0, 6)), ("test", slice(6, 12))):
        content = {"data": planes(images[own]), "fine_labels": fine[own].tolist(),
                   "coarse_labels": coarse[own].tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))
    meta = {"fine_label_names": [f"fine {i}" for i in range(100)],
            "coarse_label_names": [f"coarse {i}" for i in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(meta))
    return images, fine, coarse


def stl10(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Write train, unlabeled and test; return images and labels (counted from 0) of each."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    made: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for seed, (split, n) in enumerate({"train": 4, "unlabeled": 5, "test": 3}.items()):
        images = pixels(n, 96, seed)
        labels = None if split == "unlabeled" else (np.arange(n) * 3) % 10
        # Channel, then column, then row.
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        if labels is not None:
            (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        made[split] = (images, labels)
    (folder / "class_names.txt").write_text("\n".join(f"stl {c}" for c in range(10)) + "\n")
    return made


def mnist(folder: Path, *, zipped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Write four IDX files of 5 training and 4 test images; return all grey images and labels."""
    folder.mkdir(parents=True)
    images, labels = pixels(9, 28)[..., 0], np.arange(9) % 10
    for name, own in (("train", slice(0, 5)), ("t10k", slice(5, 9))):
        x, y = images[own], labels[own]
        files = {f"{name}-images-idx3-ubyte": struct.pack(">4I", 0x803, *x.shape) + x.tobytes(),
                 f"{name}-labels-idx1-ubyte": struct.pack(">2I", 0x801, len(y)) + y.astype(np.uint8).tobytes()}
        for file, data in files.items():
            if zipped:
                (folder / f"{file}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / file).write_bytes(data)
    return images, labels


def imagenet(folder: Path, classes: tuple[str, ...], per_class: int = 2) -> None:
    """Write class folders of JPEG files of one colour; the colour tells the class and the number of the image."""
    for c, wnid in enumerate(classes):
        (folder / wnid).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", (12, 10), (c, 100 * i, 50)).save(folder / wnid / f"{wnid}_{i}.JPEG", quality=95)
