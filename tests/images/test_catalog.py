"""The table of data sets: class ids, names, where files are found, and what is said when they are not."""

import hashlib
import os

import pytest

import official
from phyla.errors import DataNotFoundError, InputError
from phyla.images.catalog import (
    DATASETS,
    cache_folder,
    data_folders,
    data_set_name,
    found_splits,
    locate,
    not_found,
    split_parts,
)
from phyla.images.imagenet import CLASS_IDS

# Of the sorted, newline-terminated lists that the authors of SCAN published.
SHA256 = {"imagenet50": "1bf348de16b5d843b7e410a1ca302345dc74c27e9093bd327addec0c216da1f9",
          "imagenet100": "cc76c3260eea6dd829d363702c89f321195dc45e060091558160ebff95d3f938",
          "imagenet200": "8f129a78304272c83c39eb362ffd340395f60422b27a4134b71d448613a49766"}


@pytest.mark.parametrize("name", SHA256)
def test_imagenet_subsets_are_the_published_ones(name):
    ids = CLASS_IDS[name]
    assert hashlib.sha256("".join(f"{wnid}\n" for wnid in sorted(ids)).encode()).hexdigest() == SHA256[name]
    assert list(ids) == sorted(ids)
    assert len(ids) == DATASETS[name].n_classes


def test_imagenet_subsets_nest_and_have_their_sizes():
    assert set(CLASS_IDS["imagenet50"]) < set(CLASS_IDS["imagenet100"]) < set(CLASS_IDS["imagenet200"])
    assert [len(CLASS_IDS[name]) for name in ("imagenet10", "imagenetdogs")] == [10, 15]


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_is_complete(name):
    entry = DATASETS[name]
    assert entry.note
    assert entry.size > 0
    named_by_files = any(layout.reader in ("imagenet", "dogs", "cub") for layout in entry.layouts)
    assert len(entry.classes) == (0 if named_by_files else entry.n_classes)
    assert bool(entry.archives) != bool(entry.site) or name == "digits"
    assert len(set(entry.classes)) == len(entry.classes)
    for split in entry.splits:
        for part in split_parts(name, split):
            assert any(part in layout.images for layout in entry.layouts)
    for archive in entry.archives:
        assert len(archive.md5) == 32
        assert archive.url.startswith("http")
        assert archive.split in (None, *entry.splits)


def test_names_are_found_in_any_spelling():
    assert data_set_name("CIFAR-10") == "cifar10"
    assert data_set_name("fashion_mnist") == data_set_name("FashionMNIST") == "fashion-mnist"
    assert data_set_name("Stanford Dogs") == data_set_name("stanford-dogs") == data_set_name("dogs") == "dogs"
    assert data_set_name("CUB_200_2011") == data_set_name("cub-200") == "cub200"
    assert data_set_name("photos") is None


def test_no_two_data_sets_share_a_name():
    for name, entry in DATASETS.items():
        assert data_set_name(name) == data_set_name(entry.title) == name


def test_val_and_test_are_one():
    assert split_parts("cifar10", "val") == ("test",)
    assert split_parts("imagenet50", "test") == ("val",)
    assert split_parts("stl10", "train+unlabeled") == ("train", "unlabeled")
    with pytest.raises(InputError, match=r"CIFAR-10 has no split 'tset'. hint: did you mean test"):
        split_parts("cifar10", "tset")
    with pytest.raises(InputError, match="Digits has no split 'test'"):
        split_parts("digits", "test")


@pytest.mark.parametrize("below", ["", "cifar10", "cifar-10"])
def test_cifar10_is_found_in_the_usual_places(tmp_path, below):
    official.cifar10(tmp_path / below)
    found = locate("cifar10", "train", "images", tmp_path)
    assert found is not None
    assert [path.name for path in found.paths] == [f"data_batch_{i}" for i in range(1, 6)]
    assert found_splits("cifar10", tmp_path) == ("train", "test")
    (tmp_path / below / "cifar-10-batches-py" / "data_batch_4").unlink()
    assert locate("cifar10", "train", "images", tmp_path) is None
    assert found_splits("cifar10", tmp_path) == ("test",)


def test_the_folder_itself_may_be_given(tmp_path):
    official.cifar10(tmp_path)
    assert locate("cifar10", "test", "images", tmp_path / "cifar-10-batches-py") is not None


@pytest.mark.parametrize(("name", "below"), [("mnist", "MNIST/raw"), ("mnist", "mnist"), ("mnist", "mnist/MNIST/raw"),
                                             ("fashion-mnist", "fashion-mnist/FashionMNIST/raw"),
                                             ("fashion-mnist", "FashionMNIST/raw")])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_found_in_the_usual_places(tmp_path, name, below, zipped):
    official.mnist(tmp_path / below, zipped=zipped)
    assert found_splits(name, tmp_path) == ("train", "test")
    other = "mnist" if name == "fashion-mnist" else "fashion-mnist"
    assert found_splits(other, tmp_path) == ()


def test_stl10_without_its_unlabeled_images(tmp_path):
    official.stl10(tmp_path / "stl10")
    (tmp_path / "stl10" / "stl10_binary" / "unlabeled_X.bin").unlink()
    assert found_splits("stl10", tmp_path) == ("train", "test")
    assert locate("stl10", "unlabeled", "labels", tmp_path) is None


@pytest.mark.parametrize("below", ["ILSVRC2012_img_val", "imagenet/val", "imagenet/ILSVRC2012_img_val",
                                   "imagenet/ILSVRC/Data/CLS-LOC/val"])
def test_imagenet_is_found_in_the_usual_places(tmp_path, below):
    (tmp_path / below).mkdir(parents=True)
    assert found_splits("imagenet50", tmp_path) == ("val",)


@pytest.mark.parametrize("below", ["", "svhn", "SVHN"])
def test_svhn_is_found_in_the_usual_places(tmp_path, below):
    official.svhn(tmp_path / "data" / below)
    assert found_splits("svhn", tmp_path / "data") == ("train", "test", "extra")
    (tmp_path / "data" / below / "test_32x32.mat").unlink()
    assert found_splits("svhn", tmp_path / "data") == ("train", "extra")


@pytest.mark.parametrize("lists", ["", "lists"])
@pytest.mark.parametrize(("below", "images"), [("", "Images"), ("dogs", "Images"), ("StanfordDogs", "images")])
def test_dogs_are_found_in_the_usual_places(tmp_path, below, images, lists):
    (tmp_path / below / images).mkdir(parents=True)
    (tmp_path / below / lists).mkdir(exist_ok=True)
    (tmp_path / below / lists / "test_list.mat").touch()
    assert found_splits("dogs", tmp_path) == ("test",)
    assert locate("dogs", "test", "labels", tmp_path) is not None


@pytest.mark.parametrize("below", ["", "cub200", "CUB_200_2011", "cub200/CUB_200_2011"])
def test_birds_are_found_in_the_usual_places(tmp_path, below):
    official.cub200(tmp_path / below)
    assert found_splits("cub200", tmp_path) == ("train", "test")
    (tmp_path / below / "classes.txt").unlink()
    assert found_splits("cub200", tmp_path) == ("train", "test")
    assert locate("cub200", "train", "labels", tmp_path) is None


def test_an_own_folder_goes_before_the_root(tmp_path):
    for below in ("train", "imagenet/train"):
        (tmp_path / below).mkdir(parents=True)
    found = locate("imagenet", "train", "images", tmp_path)
    assert found is not None
    assert found.paths == (tmp_path / "imagenet" / "train",)


def test_the_places_searched(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PHYLA_DATA", raising=False)
    assert data_folders() == [cache_folder()] == [tmp_path / "cache"]
    monkeypatch.setenv("PHYLA_DATA", str(tmp_path / "data"))
    assert data_folders() == [tmp_path / "data", tmp_path / "cache"]
    assert data_folders(tmp_path) == [tmp_path]


@pytest.mark.skipif(os.name == "nt", reason="the platform's place on POSIX")
def test_the_cache_folder_without_a_wish(tmp_path, monkeypatch):
    monkeypatch.delenv("PHYLA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "phyla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "phyla"


def test_what_is_missing_and_where_to_put_it(tmp_path):
    error = not_found("stl10", "test", "images", tmp_path)
    assert isinstance(error, DataNotFoundError)
    assert error.exit_code == 2
    text = str(error)
    assert "\n" not in text
    assert str(tmp_path / "stl10") in text
    assert "test_X.bin" in text
    assert "stanford" in text
    assert "data_batch_1" in str(not_found("cifar10", "train", "images", tmp_path))
    assert "3 more" in str(not_found("cifar10", "train", "images", tmp_path))
    assert "registration" in str(not_found("imagenet50", "val", "images", tmp_path))


def test_research_only_is_said_where_nothing_is_downloaded(tmp_path):
    for name, files in (("dogs", "Images, train_list.mat"), ("cub200", "CUB_200_2011/images")):
        text = str(not_found(name, "train", "images", tmp_path)).replace("\\", "/")
        assert f"no {files}" in text
        assert "for research only" in text
        assert DATASETS[name].archives == ()


def test_what_lacks_beside_what_is_there(tmp_path):
    (tmp_path / "dogs" / "Images").mkdir(parents=True)
    text = str(not_found("dogs", "test", "images", tmp_path))
    assert f"Stanford Dogs, split test: {tmp_path / 'dogs'} has Images and lacks test_list.mat" in text
    official.cub200(tmp_path / "cub200" / "CUB_200_2011")
    for name in ("images", "train_test_split"):
        (tmp_path / "cub200" / "CUB_200_2011" / f"{name}.txt").unlink()
    assert "CUB_200_2011 has images and lacks images.txt, train_test_split.txt" in str(
        not_found("cub200", "train", "images", tmp_path))
    official.cifar10(tmp_path / "cifar10")
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_4").unlink()
    assert "has data_batch_1 and lacks data_batch_4." in str(not_found("cifar10", "train", "images", tmp_path))
