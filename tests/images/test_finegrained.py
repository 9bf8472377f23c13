"""The lists of Stanford Dogs and CUB-200-2011: files in order, labels, names, and lists that cannot be."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

import official
from phyla.errors import CorruptFileError
from phyla.images import finegrained

# ── Stanford Dogs ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_dogs_come_in_the_order_of_the_list(tmp_path):
    made = official.dogs(tmp_path)
    for split in ("train", "test"):
        path = tmp_path / f"{split}_list.mat"
        assert finegrained.dogs_files(path) == list(made[split])
        assert finegrained.dogs_labels(path, 120) == made[split]
        names = finegrained.dogs_names(path, 120)
        assert len(set(names)) == 120
        assert [names[label] for label in made[split].values()] == [
            file.split("/")[0].split("-", 1)[1] for file in made[split]]


def test_the_list_of_dogs_needs_no_labels_for_its_files(tmp_path):
    cells = np.array([["n1-a/1.jpg"]], object)
    savemat(tmp_path / "list.mat", {"file_list": cells})
    assert finegrained.dogs_files(tmp_path / "list.mat") == ["n1-a/1.jpg"]
    with pytest.raises(CorruptFileError, match=r"list\.mat .*'labels'"):
        finegrained.dogs_labels(tmp_path / "list.mat", 120)


@pytest.mark.parametrize(("labels", "said"), [
    ([0, 1, 2], "should give 2 labels of 1 to 120"), ([0, 120], "should give 2 labels of 1 to 120"),
    ([-1, 0], "should give 2 labels of 1 to 120"), ([0, 0.5], "should give 2 labels of 1 to 120"),
    ([0, float("nan")], "should give 2 labels of 1 to 120")])
def test_labels_of_dogs_that_cannot_be(tmp_path, labels, said):
    official.dogs_list(tmp_path / "list.mat", ["n1-a/1.jpg", "n1-a/2.jpg"], labels)
    with pytest.raises(CorruptFileError, match=said):
        finegrained.dogs_labels(tmp_path / "list.mat", 120)


def test_a_list_without_all_the_breeds_has_no_names(tmp_path):
    official.dogs_list(tmp_path / "list.mat", ["n1-a/1.jpg", "n2-b/2.jpg"], [0, 1])
    with pytest.raises(CorruptFileError, match="has images of 2 classes instead of 120"):
        finegrained.dogs_names(tmp_path / "list.mat", 120)


ODD = ["../a/1.jpg", "/etc/x", "..", "a/..", "a\\b/1.jpg", "C:a/1.jpg", "1.jpg", "a/b/1.jpg", ".hidden/1.jpg", "a/", ""]


@pytest.mark.parametrize("name", ODD)
def test_a_list_does_not_lead_out_of_its_folder(tmp_path, name):
    official.dogs_list(tmp_path / "list.mat", ["n1-a/1.jpg", name], [0, 1])
    with pytest.raises(CorruptFileError, match=r"list\.mat names '.*', which is not an image in a class folder"):
        finegrained.dogs_files(tmp_path / "list.mat")


def test_dogs_named_twice_or_not_at_all(tmp_path):
    official.dogs_list(tmp_path / "list.mat", ["n1-a/1.jpg", "n1-a/1.jpg"], [0, 1])
    with pytest.raises(CorruptFileError, match="names a file twice"):
        finegrained.dogs_files(tmp_path / "list.mat")
    savemat(tmp_path / "list.mat", {"file_list": np.empty((0, 1), object)})
    with pytest.raises(CorruptFileError, match="names no image"):
        finegrained.dogs_files(tmp_path / "list.mat")


# ── CUB-200-2011 ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def birds(tmp_path) -> Path:
    official.cub200(tmp_path / "birds")
    return tmp_path / "birds"


def test_birds_come_by_number(tmp_path):
    made = official.cub200(tmp_path)
    images, split = tmp_path / "images.txt", tmp_path / "train_test_split.txt"
    for part in ("train", "test"):
        assert finegrained.cub_files(images, split, part) == list(made[part])
    rows = images.read_text().splitlines()
    images.write_text("\n".join(reversed(rows)) + "\n\n")
    assert finegrained.cub_files(images, split, "train") == list(made["train"])
    labels = finegrained.cub_labels(images, tmp_path / "image_class_labels.txt", 200)
    assert labels == made["train"] | made["test"]
    names = finegrained.cub_names(tmp_path / "classes.txt", 200)
    assert (len(names), names[0], names[199]) == (200, "Bird_0", "Bird_199")


@pytest.mark.parametrize(("text", "said"), [
    ("1 001.a/1.jpg\n1 001.a/2.jpg\n", "line 2: '1 001.a/2.jpg' is not a new number and a value"),
    ("1 001.a/1.jpg\n\nx 001.a/2.jpg\n", "line 3: 'x 001"), ("1\n", "line 1: '1' is not"),
    ("٣ 001.a/1.jpg\n", "line 1"), ("9" * 5000 + " x", "line 1"),
    ("1 ../../secret.jpg\n", "which is not an image in a class folder"), ("", "names no image"),
    ("1 001.a/1.jpg\n2 001.a/1.jpg\n", "names a file twice")])
def test_lists_of_birds_that_cannot_be(birds, text, said):
    (birds / "images.txt").write_text(text, encoding="utf-8")
    with pytest.raises(CorruptFileError) as raised:
        finegrained.cub_files(birds / "images.txt", birds / "train_test_split.txt", "train")
    assert said in str(raised.value)
    assert "images.txt" in str(raised.value)


def test_lists_of_birds_that_disagree(birds):
    images, split, labels = (birds / f"{name}.txt" for name in ("images", "train_test_split", "image_class_labels"))
    text = split.read_text()
    split.write_text(text.replace("12 1\n", ""))
    with pytest.raises(CorruptFileError, match=r"split\.txt tells of 11 images and not of the 12 of images\.txt"):
        finegrained.cub_files(images, split, "test")
    split.write_text(text.replace("12 1\n", "12 2\n"))
    with pytest.raises(CorruptFileError, match="says '2' of an image"):
        finegrained.cub_files(images, split, "test")
    split.write_text(text.replace(" 1\n", " 0\n"))
    with pytest.raises(CorruptFileError, match="puts no image into the split train"):
        finegrained.cub_files(images, split, "train")
    labels.write_text(labels.read_text().replace("12 200", "12 201"))
    with pytest.raises(CorruptFileError, match=r"labels\.txt says '201' of an image"):
        finegrained.cub_labels(images, labels, 200)
    (birds / "classes.txt").write_text("1 001.a\n3 003.c\n")
    with pytest.raises(CorruptFileError, match="should name the classes 1 to 200"):
        finegrained.cub_names(birds / "classes.txt", 200)


def test_lists_of_birds_that_are_no_text(birds):
    (birds / "images.txt").write_bytes(b"1 \xff\xfe/1.jpg\n")
    with pytest.raises(CorruptFileError, match=r"images\.txt is not text"):
        finegrained.cub_files(birds / "images.txt", birds / "train_test_split.txt", "train")
