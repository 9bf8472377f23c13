"""Tiny files in the official layouts of the public data sets, made of random pixels."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

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


def svhn(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write train (deflated), test and extra (plain); return images and digits of each."""
    folder.mkdir(parents=True)
    made = {}
    for seed, (split, n) in enumerate({"train": 12, "test": 3, "extra": 4}.items()):
        images, digits = pixels(n, 32, seed), np.arange(n) % 10
        content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(digits, digits, 10).astype(np.uint8)[:, None]}
        savemat(folder / f"{split}_32x32.mat", content, do_compression=split == "train")
        made[split] = (images, digits)
    return made


def picture(path: Path, label: int, i: int) -> None:
    """Write a JPEG file of one color, red by class and green by number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (label, 100 * i, 50)).save(path, quality=95)


def dogs(folder: Path, lists: str = "") -> dict[str, dict[str, int]]:
    """Write an image of each of the 120 breeds for train and test, and their lists; return file to label from 0.

    Labels do not follow the folders' names, and the lists are in no order, so that nothing else can stand for them.
    """
    made: dict[str, dict[str, int]] = {}
    (folder / lists).mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(("train", "test")):
        breeds = [(f"n{2085620 + 7 * c:08d}-Breed-{c}", c * 7 % 120) for c in np.random.default_rng(i).permutation(120)]
        made[split] = {f"{breed}/{breed[:9]}_{i}.jpg": int(label) for breed, label in breeds}
        for file, label in made[split].items():
            picture(folder / "Images" / file, label, i)
        dogs_list(folder / lists / f"{split}_list.mat", list(made[split]), list(made[split].values()))
    return made


def dogs_list(path: Path, files: list[str], labels: list[int]) -> None:
    """Write one list of Stanford Dogs; ``labels`` count from 0, the file's from 1."""
    cells = np.empty((len(files), 1), object)
    cells[:, 0] = files
    content = {"file_list": cells, "annotation_list": cells.copy(), "labels": np.array(labels, float)[:, None] + 1}
    savemat(path, content, do_compression=True)


def cub200(folder: Path) -> dict[str, dict[str, int]]:
    """Write twelve images of three of the 200 species; return file to label from 0 of each split, in official order."""
    species = [f"{c + 1:03d}.Bird_{c}" for c in range(200)]
    rows = [(f"{species[c]}/Bird_{c}_{i}.jpg", c, i % 2) for c in (0, 7, 199) for i in range(4)]
    for i, (file, label, _) in enumerate(rows):
        picture(folder / "images" / file, label, i % 2)
    tables = {"images": [file for file, _, _ in rows], "image_class_labels": [c + 1 for _, c, _ in rows],
              "train_test_split": [train for _, _, train in rows], "classes": species}
    for name, values in tables.items():
        text = "".join(f"{number} {value}\n" for number, value in enumerate(values, start=1))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {split: {file: c for file, c, train in rows if train == flag} for split, flag in (("train", 1), ("test", 0))}
