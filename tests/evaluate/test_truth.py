"""True labels: found again by id, from data sets, class folders and tables."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import official
from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.evaluate.truth import Truth, true_labels
from phyla.images.imagenet import CLASS_IDS
from phyla.images.sources import open_images

REAL = os.environ.get("PHYLA_DATA", "")


def needs(name: str) -> pytest.MarkDecorator:
    there = bool(REAL) and (Path(REAL) / name).is_dir()
    return pytest.mark.skipif(not there, reason=f"needs {name} in the folder PHYLA_DATA names")


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PHYLA_DATA", raising=False)


# ── data sets ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_labels_follow_the_ids_whatever_their_order(tmp_path):
    _, labels = official.cifar10(tmp_path)
    ids = open_images("cifar10", data_dir=tmp_path, download=False).images.ids
    truth = true_labels("cifar10", ids, data_dir=tmp_path)
    assert truth is not None
    np.testing.assert_array_equal(truth.labels, labels[:15])
    assert truth.labels.dtype == np.int64
    assert truth.names == tuple(f"class {c}" for c in range(10))
    assert (len(truth), truth.n_classes, truth.known.all()) == (15, 10, True)
    some = true_labels("CIFAR-10", ["train/00007", "train/00002"], data_dir=tmp_path)
    assert some is not None
    assert some.labels.tolist() == [labels[7], labels[2]]
    limited = open_images("cifar10", split="test", data_dir=tmp_path, limit=2, download=False).images
    held_out = true_labels("cifar10", limited.ids, split="val", data_dir=tmp_path)
    assert held_out is not None
    assert held_out.labels.tolist() == [labels[15], labels[17]]


def test_ids_that_are_not_the_data_sets(tmp_path):
    official.cifar10(tmp_path)
    truth = true_labels("cifar10", ["train/00001", "test/00001", "train/99999", "train/x", "other"], data_dir=tmp_path)
    assert truth is not None
    assert truth.labels.tolist() == [1, -1, -1, -1, -1]
    assert truth.known.tolist() == [True, False, False, False, False]
    with pytest.raises(InputError, match=r"none of the ids, such as 'a\.png'"):
        true_labels("cifar10", ["a.png"], data_dir=tmp_path)


def test_fine_and_coarse(tmp_path):
    _, fine, coarse = official.cifar100(tmp_path)
    ids = [f"test/{i:05d}" for i in range(6)]
    for name, labels, word in (("cifar100", fine, "fine"), ("cifar20", coarse, "coarse")):
        truth = true_labels(name, ids, split="test", data_dir=tmp_path)
        assert truth is not None
        np.testing.assert_array_equal(truth.labels, labels[6:])
        assert truth.names[3] == f"{word} 3"


def test_names_without_a_meta_file(tmp_path):
    labels = {"fine": np.uint8([99, 4]), "coarse": np.uint8([2, 0])}
    np.savez(tmp_path / "cifar100_test.npz", images=official.pixels(2, 32), **labels)
    fine = true_labels("cifar100", ["test/00000", "test/00001"], split="test", data_dir=tmp_path)
    coarse = true_labels("cifar20", ["test/00000", "test/00001"], split="test", data_dir=tmp_path)
    assert fine is not None
    assert coarse is not None
    assert [fine.names[label] for label in fine.labels] == ["worm", "beaver"]
    assert [coarse.names[label] for label in coarse.labels] == ["flowers", "aquatic_mammals"]


def test_stl10_counts_from_zero_and_does_not_know_all(tmp_path):
    made = official.stl10(tmp_path)
    ids = open_images("stl10", split="train+unlabeled", data_dir=tmp_path, download=False).images.ids
    truth = true_labels("stl10", ids, split="train+unlabeled", data_dir=tmp_path)
    assert truth is not None
    assert truth.labels.tolist() == [*made["train"][1], -1, -1, -1, -1, -1]
    assert truth.names[9] == "stl 9"
    unknown = true_labels("stl10", ids[4:], split="train+unlabeled", data_dir=tmp_path)
    assert unknown is not None
    assert not unknown.known.any()


def test_labels_that_are_not_there_are_no_reason_to_stop(tmp_path, caplog):
    official.stl10(tmp_path)
    (tmp_path / "stl10_binary" / "test_y.bin").unlink()
    with caplog.at_level(logging.WARNING, "phyla"):
        assert true_labels("stl10", ["test/00000"], split="test", data_dir=tmp_path) is None
    assert "no label files of STL-10, split test" in caplog.text
    assert true_labels("stl10", ["unlabeled/00000"], split="unlabeled", data_dir=tmp_path) is None


def test_a_damaged_label_file_is_named(tmp_path):
    official.stl10(tmp_path)
    (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(b"\0\0\0\0")
    with pytest.raises(CorruptFileError, match=r"train_y\.bin"):
        true_labels("stl10", ["train/00000"], data_dir=tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, zipped):
    _, labels = official.mnist(tmp_path / "fashion-mnist" / "FashionMNIST" / "raw", zipped=zipped)
    truth = true_labels("fashion-mnist", ["test/00003", "test/00001"], split="test", data_dir=tmp_path)
    assert truth is not None
    assert truth.labels.tolist() == [labels[8], labels[6]]
    assert truth.names[9] == "Ankle boot"


def test_digits():
    truth = true_labels("digits", ["train/00000", "train/01796"])
    assert truth is not None
    assert truth.labels.tolist() == [0, 8]
    assert truth.names == tuple("0123456789")


def test_imagenet_classes_are_numbered_as_in_the_subset(tmp_path):
    official.imagenet(tmp_path / "imagenet" / "val", CLASS_IDS["imagenet10"])
    images = open_images("imagenet10", split="val", size=8, limit=7, data_dir=tmp_path).images
    truth = true_labels("imagenet10", images.ids, split="val", data_dir=tmp_path)
    assert truth is not None
    np.testing.assert_allclose(images.array[:, 4, 4, 0], truth.labels, atol=4)  # the colour tells the class
    assert truth.labels.tolist() == [0, 1, 3, 5, 6, 8, 9]
    assert truth.names == CLASS_IDS["imagenet10"]


def test_svhn_calls_ten_zero(tmp_path):
    made = official.svhn(tmp_path / "svhn")
    for split, (_, digits) in made.items():
        ids = open_images("svhn", split=split, data_dir=tmp_path, download=False).images.ids
        truth = true_labels("svhn", ids, split=split, data_dir=tmp_path)
        assert truth is not None
        np.testing.assert_array_equal(truth.labels, digits)
        assert truth.names == tuple("0123456789")
    (tmp_path / "svhn" / "test_32x32.mat").write_bytes(b"cut")
    with pytest.raises(CorruptFileError, match=r"test_32x32\.mat"):
        true_labels("svhn", ["test/00000"], split="test", data_dir=tmp_path)


@pytest.mark.parametrize(("name", "write"), [("dogs", official.dogs), ("cub200", official.cub200)])
def test_fine_grained_labels_come_from_the_lists(tmp_path, name, write):
    made = write(tmp_path / name)
    for split in ("train", "test"):
        images = open_images(name, split=split, size=8, limit=5, data_dir=tmp_path).images
        truth = true_labels(name, images.ids, split=split, data_dir=tmp_path)
        assert truth is not None
        assert truth.labels.tolist() == [made[split][image.split("/", 1)[1]] for image in images.ids]
        np.testing.assert_allclose(images.array[:, 4, 4, 0], truth.labels, atol=4)  # the color tells the class
        assert truth.n_classes == {"dogs": 120, "cub200": 200}[name]
        folders = [image.split("/")[1] for image in images.ids]
        assert all(folder.endswith(truth.names[label]) for folder, label in zip(folders, truth.labels, strict=True))
        assert truth.names[truth.labels[0]] == folders[0].split("-" if name == "dogs" else ".", 1)[1]
    ids = ["test/no/such.jpg", images.ids[1], "train/" + images.ids[1], images.ids[1].replace("test/", "train/", 1)]
    truth = true_labels(name, ids, split="test", data_dir=tmp_path)
    assert truth is not None
    assert truth.labels.tolist() == [-1, made["test"][images.ids[1].split("/", 1)[1]], -1, -1]
    with pytest.raises(InputError, match=r"none of the ids, such as 'a\.png'"):
        true_labels(name, ["a.png"], data_dir=tmp_path)


def test_birds_without_their_labels_are_no_reason_to_stop(tmp_path, caplog):
    official.cub200(tmp_path / "CUB_200_2011")
    (tmp_path / "CUB_200_2011" / "image_class_labels.txt").unlink()
    ids = open_images("cub200", size=8, data_dir=tmp_path).images.ids
    with caplog.at_level(logging.WARNING, "phyla"):
        assert true_labels("cub200", ids, data_dir=tmp_path) is None
    assert "no label files of CUB-200-2011, split train" in caplog.text


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def photos(tmp_path) -> Path:
    for i, name in enumerate(["b/1.png", "b/deep/2.png", "a/3.png", "4.png", "10/5.png"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(path)
    return tmp_path / "photos"


def test_the_first_folder_is_the_class_only_when_asked(photos):
    ids = open_images(photos).images.ids
    assert true_labels(photos, ids) is None
    truth = true_labels(str(photos), ids, labels="folders")
    assert truth is not None
    assert list(ids) == ["10/5.png", "4.png", "a/3.png", "b/1.png", "b/deep/2.png"]
    assert truth.labels.tolist() == [0, -1, 1, 2, 2]
    assert truth.names == ("10", "a", "b")
    with pytest.raises(InputError, match="no image lies in a class folder"):
        true_labels(photos, ["4.png"], labels="folders")


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(photos: Path, text: str, name: str = "labels.csv") -> Path:
    (photos.parent / name).write_text(text, encoding="utf-8-sig")
    return photos.parent / name


def test_a_table_is_matched_by_id(photos, caplog):
    ids = open_images(photos).images.ids
    rows = ["file,Class", "a/3.png,10", '"b\\deep\\2.png",9', "./4.png,", "else.png,200", f"{photos / 'b' / '1.png'},9"]
    path = table(photos, "\n".join(rows))
    with caplog.at_level(logging.WARNING, "phyla"):
        truth = true_labels(photos, ids, labels=path)
    assert truth is not None
    assert truth.names == ("9", "10", "200")
    assert list(ids) == ["10/5.png", "4.png", "a/3.png", "b/1.png", "b/deep/2.png"]
    assert truth.labels.tolist() == [-1, -1, 1, 0, 0]
    assert "gives no class for 2 of 5 images" in caplog.text


def test_a_tsv_and_a_list_that_has_labels_itself(photos):
    path = table(photos, "image\tlabel\nphotos/a/3.png\tcat\nphotos/4.png\tant\n", "list.tsv")
    ids = open_images(path).images.ids
    truth = true_labels(path, ids, labels=str(path))
    assert truth is not None
    assert truth.labels.tolist() == [1, 0]
    assert truth.names == ("ant", "cat")
    assert true_labels(path, ids) is None


def test_a_data_set_can_be_given_other_labels(photos):
    path = table(photos, "path,label\ntrain/00001,odd\ntrain/00000,even\n")
    truth = true_labels("digits", ["train/00000", "train/00001"], labels=path)
    assert truth is not None
    assert truth.labels.tolist() == [0, 1]


def test_tables_that_do_not_help(photos):
    ids = ["a/3.png"]
    with pytest.raises(DataNotFoundError, match="no table of labels"):
        true_labels(photos, ids, labels="nope.csv")
    with pytest.raises(InputError, match="no column called label or class"):
        true_labels(photos, ids, labels=table(photos, "path\na/3.png\n"))
    with pytest.raises(InputError, match=r"says both 'x' and 'y' of 'a/3\.png'"):
        true_labels(photos, ids, labels=table(photos, "path,label\na/3.png,x\na/3.png,y\n"))
    with pytest.raises(InputError, match=r"names none of the 1 images: it has '3\.png', they are called 'a/3\.png'"):
        true_labels(photos, ids, labels=table(photos, "path,label\n3.png,x\n"))


def test_truth_is_checked():
    for labels in ([[0]], [3], [-2]):
        with pytest.raises(InputError, match="labels must be"):
            Truth(np.array(labels), ("a", "b"))
    assert Truth(np.array([], dtype=np.int64), ()).n_classes == 0


# ── real data ─────────────────────────────────────────────────────────────────────────────────────────────────────

# The coarse class of each fine class, as the data set's authors publish it.
COARSE_OF_FINE = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15,
    0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
    10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19,
    18, 1, 2, 15, 6, 0, 17, 8, 14, 13]


@pytest.mark.data
@needs("cifar100-test")
def test_real_coarse_classes_are_those_of_the_fine_ones():
    ids = [f"test/{i:05d}" for i in range(10000)]
    fine = true_labels("cifar100", ids, split="test", data_dir=Path(REAL))
    coarse = true_labels("cifar20", ids, split="test", data_dir=Path(REAL))
    assert fine is not None
    assert coarse is not None
    np.testing.assert_array_equal(coarse.labels, np.array(COARSE_OF_FINE)[fine.labels])
    assert np.bincount(fine.labels).tolist() == [100] * 100


@pytest.mark.data
@pytest.mark.parametrize(("name", "split", "each"), [
    pytest.param("cifar10", "train", 5000, marks=needs("cifar10")),
    pytest.param("cifar10", "test", 1000, marks=needs("cifar10")),
    pytest.param("stl10", "train", 500, marks=needs("stl10")),
    pytest.param("fashion-mnist", "test", 1000, marks=needs("fashion-mnist"))])
def test_real_classes_are_balanced(name, split, each):
    truth = true_labels(name, [f"{split}/{i:05d}" for i in range(10 * each)], split=split, data_dir=Path(REAL))
    assert truth is not None
    assert np.bincount(truth.labels).tolist() == [each] * 10
    assert len(set(truth.names)) == 10


@pytest.mark.data
@needs("clothing")
def test_real_class_folders():
    folder = Path(REAL) / "clothing" / "by-class"
    truth = true_labels(folder, open_images(folder, size=16).images.ids, labels="folders")
    assert truth is not None
    assert np.bincount(truth.labels).tolist() == [112] * 10
    assert truth.names[0] == "dress"
