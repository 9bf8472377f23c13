"""The one door for images: data sets by name, folders, lists, array files; sizes, limits, caches, errors."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import official
from phyla.errors import CorruptFileError, DataNotFoundError, InputError
from phyla.images import finegrained, formats, gather, sources
from phyla.images.catalog import DATASETS
from phyla.images.decode import square
from phyla.images.folders import stream_images
from phyla.images.imagenet import CLASS_IDS
from phyla.images.sources import Loaded, evenly, from_array, open_images
from phyla.images.stored import FilePixels

REAL = os.environ.get("PHYLA_DATA", "")


def needs(name: str) -> pytest.MarkDecorator:
    there = bool(REAL) and (Path(REAL) / name).is_dir()
    return pytest.mark.skipif(not there, reason=f"needs {name} in the folder PHYLA_DATA names")


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PHYLA_DATA", raising=False)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Return a folder of 12 photographs in two folders, and three files that are none."""
    folder = tmp_path / "my photos"
    for i, pixels in enumerate(official.pixels(12, 40)):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "cats" / "zero.jpg").write_bytes(b"")
    (folder / "dogs" / "text.jpg").write_text("no picture")
    whole = (folder / "dogs" / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def opened(source: str | Path, data: Path, **options: object) -> Loaded:
    return open_images(source, data_dir=data, download=False, **options)


# ── data sets ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cifar10(tmp_path):
    images, _ = official.cifar10(tmp_path)
    train, test = opened("cifar10", tmp_path).images, opened("CIFAR-10", tmp_path, split="val").images
    np.testing.assert_array_equal(np.concatenate([train.array, test.array]), images)
    assert list(train.ids) == [f"train/{i:05d}" for i in range(15)]
    assert test.ids[0] == "test/00000"
    assert (train.name, test.name) == ("CIFAR-10 train", "CIFAR-10 test")


@pytest.mark.parametrize("name", ["cifar20", "cifar100"])
def test_cifar100(tmp_path, name):
    images, _, _ = official.cifar100(tmp_path / "cifar100")
    np.testing.assert_array_equal(opened(name, tmp_path).images.array, images[:6])
    np.testing.assert_array_equal(opened(name, tmp_path, split="test").images.array, images[6:])


def test_the_test_split_of_cifar100_may_be_an_npz(tmp_path):
    images = official.pixels(3, 32)
    (tmp_path / "cifar100-test").mkdir()
    np.savez(tmp_path / "cifar100-test" / "cifar100_test.npz", images=images, fine=[1, 2, 3], coarse=[1, 1, 1])
    np.testing.assert_array_equal(opened("cifar20", tmp_path, split="test").images.array, images)
    with pytest.raises(DataNotFoundError, match="CIFAR-20, split train"):
        opened("cifar20", tmp_path)


def test_stl10_and_its_two_training_splits(tmp_path):
    made = official.stl10(tmp_path / "stl10")
    for split in ("train", "unlabeled", "test"):
        np.testing.assert_array_equal(opened("stl10", tmp_path, split=split).images.array, made[split][0])
    both = opened("stl10", tmp_path, split="train+unlabeled").images
    np.testing.assert_array_equal(both.array, np.concatenate([made["train"][0], made["unlabeled"][0]]))
    assert list(both.ids)[3:5] == ["train/00003", "unlabeled/00000"]
    some = opened("stl10", tmp_path, split="train+unlabeled", limit=3).images
    assert list(some.ids) == ["train/00000", "unlabeled/00000", "unlabeled/00004"]
    np.testing.assert_array_equal(some.array, both.array[[0, 4, 8]])


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_becomes_rgb(tmp_path, name):
    images, _ = official.mnist(tmp_path / name, zipped=name == "mnist")
    loaded = opened(name, tmp_path, split="test").images
    np.testing.assert_array_equal(loaded.array, np.repeat(images[5:, ..., None], 3, 3))


def test_svhn_and_its_three_splits(tmp_path):
    made = official.svhn(tmp_path / "svhn")
    for split, (images, _) in made.items():
        loaded = opened("SVHN", tmp_path, split=split).images
        np.testing.assert_array_equal(loaded.array, images)
        assert list(loaded.ids) == [f"{split}/{i:05d}" for i in range(len(images))]
        assert loaded.name == f"SVHN {split}"
    np.testing.assert_array_equal(opened("svhn", tmp_path, limit=3).images.array, made["train"][0][[0, 6, 11]])
    assert opened("svhn", tmp_path, split="val", size=16).images.array.shape == (3, 16, 16, 3)
    (tmp_path / "svhn" / "test_32x32.mat").write_bytes(b"<html>")
    with pytest.raises(CorruptFileError, match=r"test_32x32\.mat is not a MATLAB 5 file"):
        opened("svhn", tmp_path, split="test")


@pytest.mark.parametrize("split", ["train", "extra"])
def test_only_the_split_that_is_wanted_is_fetched(tmp_path, monkeypatch, split):
    official.svhn(tmp_path / "made")
    fetched = []

    def fetch(archive, folder):
        fetched.append(archive.filename)
        (tmp_path / "made" / archive.filename).replace(folder / archive.filename)

    monkeypatch.setattr("phyla.images.download.fetch", fetch)
    assert len(open_images("svhn", split=split, data_dir=tmp_path / "data").images) == {"train": 12, "extra": 4}[split]
    assert fetched == [f"{split}_32x32.mat"]
    assert (tmp_path / "data" / "svhn" / fetched[0]).exists()


@pytest.mark.parametrize("lists", ["", "lists"])
def test_dogs_are_decoded_in_the_order_of_their_list(tmp_path, lists):
    made = official.dogs(tmp_path / "dogs", lists)
    for i, split in enumerate(("train", "test")):
        images = opened("Stanford-Dogs", tmp_path, split=split, size=8).images
        assert list(images.ids) == [f"{split}/{file}" for file in made[split]]
        np.testing.assert_allclose(images.array[:, 4, 4, 0], list(made[split].values()), atol=4)
        np.testing.assert_allclose(images.array[:, 4, 4, 1], 100 * i, atol=6)
    some = opened("dogs", tmp_path, split="val", limit=2).images
    assert some.size == (96, 96)
    assert list(some.ids) == [f"test/{list(made['test'])[row]}" for row in (0, 119)]
    assert some.name == "Stanford Dogs test"


def test_birds_are_decoded_by_their_numbers(tmp_path):
    made = official.cub200(tmp_path / "cub200" / "CUB_200_2011")
    for i, (split, part) in enumerate((("test", "test"), ("train", "train"), ("val", "test"))):
        images = opened("cub200", tmp_path, split=split, size=8).images
        assert list(images.ids) == [f"{part}/{file}" for file in made[part]]
        np.testing.assert_allclose(images.array[:, 4, 4, 0], list(made[part].values()), atol=4)
        np.testing.assert_allclose(images.array[:, 4, 4, 1], 100 * (i == 1), atol=6)
    some = opened("CUB-200-2011", tmp_path, limit=3).images
    assert some.size == (96, 96)
    assert [name.split("/")[1] for name in some.ids] == ["001.Bird_0", "008.Bird_7", "200.Bird_199"]


def test_listed_files_that_are_not_there_are_left_out(tmp_path):
    made = official.cub200(tmp_path / "CUB_200_2011")
    first = next(iter(made["train"]))
    (tmp_path / "CUB_200_2011" / "images" / first).unlink()
    loaded = opened("cub200", tmp_path, size=8)
    assert len(loaded.images) == 5
    assert [name for name, _ in loaded.skipped] == [f"train/{first}"]
    with pytest.raises(CorruptFileError, match=first):
        opened("cub200", tmp_path, size=8, strict=True)


def test_images_without_their_lists_or_lists_without_images(tmp_path):
    official.dogs(tmp_path / "dogs")
    (tmp_path / "dogs" / "train_list.mat").unlink()
    with pytest.raises(DataNotFoundError) as raised:
        open_images("dogs", data_dir=tmp_path)  # the network is not asked
    assert "dogs has Images and lacks train_list.mat" in str(raised.value)
    assert "for research only" in str(raised.value)
    assert len(opened("dogs", tmp_path, split="test", size=8).images) == 120
    (tmp_path / "dogs" / "Images").rename(tmp_path / "elsewhere")
    with pytest.raises(DataNotFoundError, match=r"has test_list\.mat and lacks Images"):
        opened("dogs", tmp_path, split="test")


def test_pixels_are_read_without_reading_a_label(tmp_path, monkeypatch):
    official.svhn(tmp_path / "svhn")
    official.dogs(tmp_path / "dogs")
    official.cub200(tmp_path / "cub200")
    for name in ("image_class_labels", "classes"):
        (tmp_path / "cub200" / f"{name}.txt").unlink()
    read = []

    def noted(path, name, _real=formats.read_array):
        read.append(name)
        return _real(path, name)

    for module in (formats, finegrained):
        monkeypatch.setattr(module, "read_array", noted)
        for name in vars(module):
            if name.endswith(("_labels", "_names")):
                monkeypatch.setattr(module, name, None)
    for name in ("svhn", "dogs", "cub200"):
        assert len(opened(name, tmp_path, size=8).images) > 5
    assert read == ["X"]


def test_digits_need_no_file():
    images = open_images("digits").images
    assert images.array.shape == (1797, 8, 8, 3)
    assert images.array.max() == 255
    assert images.name == "Digits train"


def test_imagenet_and_its_subsets(tmp_path):
    official.imagenet(tmp_path / "imagenet" / "ILSVRC2012_img_train", CLASS_IDS["imagenet200"], per_class=1)
    official.imagenet(tmp_path / "imagenet" / "ILSVRC2012_img_val", CLASS_IDS["imagenet50"])
    train = opened("imagenet50", tmp_path, size=8).images
    assert len(train) == 50
    assert train.size == (8, 8)
    assert train.ids[0] == "train/n01601694/n01601694_0.JPEG"
    val = opened("imagenet50", tmp_path, split="test", size=8).images
    assert list(val.ids[:3]) == ["val/n01601694/n01601694_0.JPEG", "val/n01601694/n01601694_1.JPEG",
                                 "val/n01669191/n01669191_0.JPEG"]
    assert val.array[1, 4, 4].tolist() == pytest.approx([0, 100, 50], abs=6)
    assert opened("imagenet50", tmp_path, split="val", limit=2).images.size == (256, 256)
    with pytest.raises(InputError, match="should hold 15 class folders"):
        opened("imagenetdogs", tmp_path, size=8)


def test_another_size_than_its_own(tmp_path):
    images, _ = official.cifar10(tmp_path)
    small = opened("cifar10", tmp_path, split="test", size=16).images
    np.testing.assert_array_equal(small.array, np.stack([square(image, 16) for image in images[-3:]]))
    assert open_images("digits", size=20, limit=4).images.array.shape == (4, 20, 20, 3)


@pytest.mark.parametrize("name", DATASETS)
def test_a_missing_data_set_says_where_it_goes(tmp_path, name):
    if name == "digits":
        return
    with pytest.raises(DataNotFoundError) as raised:
        opened(name, tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / DATASETS[name].homes[0]) in str(raised.value)


def test_phyla_data_is_looked_in(tmp_path, monkeypatch):
    official.cifar10(tmp_path / "there")
    monkeypatch.setenv("PHYLA_DATA", str(tmp_path / "there"))
    assert len(open_images("cifar10", download=False).images) == 15


# ── folders and lists ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder(photos, caplog):
    loaded = open_images(photos)
    assert list(loaded.images.ids) == [*(f"cats/{i:02d}.png" for i in range(1, 12, 2)),
                                       *(f"dogs/{i:02d}.png" for i in range(0, 12, 2))]
    np.testing.assert_array_equal(loaded.images.array[0], official.pixels(12, 40)[1])
    assert loaded.images.size == (40, 40)
    assert loaded.images.name == "my photos"
    assert [name for name, _ in loaded.skipped] == ["cats/zero.jpg", "cut.png", "dogs/text.jpg"]
    assert all(any(name in message for message in caplog.messages) for name, _ in loaded.skipped)


def test_strict_names_the_file(photos):
    with pytest.raises(CorruptFileError, match=r"cats/zero\.jpg"):
        open_images(photos, strict=True)


@pytest.mark.parametrize("cache", [False, True])
def test_the_stream_gives_what_loading_gives(photos, tmp_path, cache):
    loaded = open_images(photos, size=24, cache=tmp_path / "kept" if cache else None)
    chunks = list(stream_images(photos, size=24, chunk=4))
    np.testing.assert_array_equal(np.concatenate([chunk.pixels for chunk in chunks]), loaded.images.array)
    assert [name for chunk in chunks for name in chunk.ids] == list(loaded.images.ids)
    assert [skip for chunk in chunks for skip in chunk.skipped] == list(loaded.skipped)


def test_a_list_of_files(photos):
    (photos / "files.csv").write_text("label,path\n1,dogs/02.png\n2,cats/01.png\n")
    images = open_images(photos / "files.csv").images
    assert list(images.ids) == ["dogs/02.png", "cats/01.png"]
    np.testing.assert_array_equal(images.array, official.pixels(12, 40)[[2, 1]])


def test_bad_files_only(tmp_path):
    (tmp_path / "words").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "words" / name).write_text("words")
    with pytest.raises(InputError, match=r"none of the 2 images of words can be read: 'a\.jpg' is not an image"):
        open_images(tmp_path / "words")


def test_a_one_pixel_image_joins_the_others(photos):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(photos / "one.png")
    images = open_images(photos).images
    assert (images.array[list(images.ids).index("one.png")] == [1, 2, 3]).all()


def test_a_limit_takes_evenly_spaced_images(photos):
    ids = list(open_images(photos).images.ids)
    assert list(open_images(photos, limit=15).images.ids) == ids
    loaded = open_images(photos, limit=5)
    assert set(loaded.images.ids) < set(ids)
    assert len(loaded.images) + len(loaded.skipped) == 5


def test_evenly():
    assert evenly(10, None).tolist() == evenly(10, 10).tolist() == evenly(10, 99).tolist() == list(range(10))
    assert evenly(10, 1).tolist() == [0]
    assert evenly(9, 3).tolist() == [0, 4, 8]
    for n, limit in ((7, 6), (100, 99), (5000, 1234)):
        assert len(set(evenly(n, limit).tolist())) == limit


# ── kept pixels ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cache_is_used_the_next_time(photos, tmp_path, monkeypatch, caplog):
    first = open_images(photos, cache=tmp_path / "kept")
    assert isinstance(first.images.pixels, np.memmap)
    monkeypatch.setattr(sources, "stream_images", None)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "phyla"):
        again = open_images(photos, cache=tmp_path / "kept")
    assert again.images.fingerprint == first.images.fingerprint
    assert again.skipped == first.skipped
    assert len(caplog.messages) == 3


@pytest.mark.parametrize("keep", ["memory", "file", "off"])
def test_however_pixels_are_kept_they_are_the_same(photos, tmp_path, keep):
    plain = open_images(photos, size=24)
    loaded = open_images(photos, size=24, cache=tmp_path / "kept", keep=keep)
    kinds = {"memory": np.ndarray, "file": np.memmap, "off": FilePixels}
    assert type(loaded.images.pixels) is kinds[keep]
    assert loaded.images.fingerprint == plain.images.fingerprint and loaded.skipped == plain.skipped
    np.testing.assert_array_equal(np.asarray(loaded.images.array), plain.images.array)
    np.testing.assert_array_equal(loaded.images.select(np.array([5, 0])).array, plain.images.array[[5, 0]])


def test_files_that_are_not_kept_are_looked_at_once(photos, tmp_path, monkeypatch):
    first = open_images(photos, size=24, cache=tmp_path, keep="off")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "stream_images", None)
        again = open_images(photos, size=24, cache=tmp_path, keep="off")
        assert again.images.fingerprint == first.images.fingerprint and again.skipped == first.skipped
    assert not list(tmp_path.glob("*.npy"))
    Image.new("RGB", (40, 40), "red").save(photos / "dogs" / "00.png")
    assert open_images(photos, size=24, cache=tmp_path, keep="off").images.fingerprint != first.images.fingerprint


def test_a_cache_forgets_what_changed(photos, tmp_path):
    kept = tmp_path / "kept"
    first = open_images(photos, cache=kept)
    Image.new("RGB", (40, 40), "red").save(photos / "dogs" / "00.png")
    second = open_images(photos, cache=kept)
    assert second.images.fingerprint != first.images.fingerprint
    assert open_images(photos, size=16, cache=kept).images.size == (16, 16)
    assert list(open_images(photos, limit=1, cache=kept).images.ids) == ["cats/01.png"]
    with pytest.raises(CorruptFileError, match=r"zero\.jpg"):
        open_images(photos, strict=True, cache=kept)


def test_what_memory_does_not_hold_goes_into_the_cache_folder(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "MEMORY_BYTES", 1000)
    official.cifar10(tmp_path)
    np.save(tmp_path / "a.npy", official.pixels(4, 12))
    for loaded in (open_images(photos), opened("cifar10", tmp_path), open_images(tmp_path / "a.npy", size=16),
                   opened("cifar10", tmp_path)):
        assert isinstance(loaded.images.pixels, np.memmap)
    files = sorted((tmp_path / "cache" / "pixels").glob("*.npy"))
    assert [file.name.rsplit("-", 1)[0] for file in files] == ["CIFAR-10-train", "a", "my-photos"]
    monkeypatch.setattr(gather, "MEMORY_BYTES", 1 << 30)
    np.testing.assert_array_equal(opened("cifar10", tmp_path).images.array, np.load(files[0]))


# ── array files ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_array_files(tmp_path):
    pixels = official.pixels(6, 12)
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "b.npz", images=pixels.transpose(0, 3, 1, 2), labels=np.arange(6), ids=list("abcdef"))
    np.testing.assert_array_equal(open_images(tmp_path / "a.npy").images.array, pixels)
    assert isinstance(open_images(tmp_path / "a.npy").images.pixels, np.memmap)
    some = open_images(str(tmp_path / "b.npz"), limit=2).images
    np.testing.assert_array_equal(some.array, pixels[[0, 5]])
    assert (list(some.ids), some.name) == (["a", "f"], "b")
    small = open_images(tmp_path / "a.npy", size=6, limit=3).images
    np.testing.assert_array_equal(small.array, np.stack([square(image, 6) for image in pixels[[0, 2, 5]]]))
    assert list(small.ids) == ["00000", "00002", "00005"]


def test_from_array_is_here_too():
    assert len(from_array(official.pixels(2, 8))) == 2


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_opened(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("hello")
    (tmp_path / "a.zip").write_bytes(b"PK")
    for source, kind, said in [
        ("cifer10", InputError, "'cifer10' is neither a data set nor a folder here. hint: did you mean cifar10"),
        ("photographs", InputError, "hint: allowed: cifar10"),
        ("./cifar", DataNotFoundError, "there is no folder or file cifar"),
        (tmp_path / "nope", DataNotFoundError, "nope"), ("nope.jpg", DataNotFoundError, "nope.jpg"),
        ("x" * 5000, InputError, "neither a data set nor a folder"), ("a\0b/c", DataNotFoundError, "no folder or file"),
        ("empty", InputError, "no image in empty. hint: looked through all its folders for files ending in .bmp"),
        ("words", InputError, "no image in words"), ("a.zip", InputError, "unpack archives first"),
        (photos / "dogs" / "00.png", InputError, "is one image, and classes are found among many"),
    ]:
        with pytest.raises(kind) as raised:
            open_images(source, download=False)
        assert said in str(raised.value)
        assert raised.value.exit_code == 2


def test_values_that_cannot_be(photos):
    for options, said in (({"limit": 0}, "limit=0"), ({"limit": -3}, "limit=-3"), ({"size": 0}, "size=0"),
                          ({"size": -1}, "size=-1"), ({"size": 10**6}, "size=1000000")):
        with pytest.raises(InputError, match=said):
            open_images(photos, **options)
    with pytest.raises(InputError, match="has no split"):
        open_images("digits", split="trian")


def test_a_folder_called_like_a_data_set(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos.rename("digits")
    assert len(open_images("digits", limit=3).images) == 3
    assert open_images("digits", limit=3).images.ids[0] == "train/00000"
    for source in ("./digits", "digits/", Path("digits")):
        assert open_images(source).images.ids[0] == "cats/01.png"


def test_a_folder_called_like_a_data_set_that_is_not_here(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(photos)
    with pytest.raises(DataNotFoundError, match=r"; the dogs in this folder is meant by \./dogs\. hint"):
        open_images("dogs", data_dir=tmp_path / "data")
    assert len(open_images("./dogs").images) == 6


def test_loaded_knows_no_label(tmp_path):
    official.cifar10(tmp_path)
    loaded = opened("cifar10", tmp_path)
    assert set(vars(loaded)) == {"images", "skipped"}
    assert set(vars(loaded.images)) == {"pixels", "ids", "name", "digest"}
    assert "label" not in json.dumps(list(loaded.images.ids))


# ── real data ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.data
@needs("cifar10")
def test_real_cifar10_has_the_published_mean():
    images = opened("cifar10", Path(REAL), split="test").images
    assert images.array.shape == (10000, 32, 32, 3)
    mean = images.array.mean((0, 1, 2)) / 255
    assert mean.round(4).tolist() == [0.4942, 0.4851, 0.4504]


@pytest.mark.data
@needs("stl10")
def test_real_stl10_stands_upright():
    images = opened("stl10", Path(REAL), limit=500).images
    assert images.array.shape == (500, 96, 96, 3)
    rows = images.array.astype(float).mean((2, 3))
    # Skies are above: the upper rows are the brighter ones, which the left columns are not.
    assert (rows[:, :32].mean(1) > rows[:, -32:].mean(1)).mean() > 0.6


@pytest.mark.data
@needs("fashion-mnist")
def test_real_fashion_mnist():
    images = opened("fashion-mnist", Path(REAL), split="test").images
    assert images.array.shape == (10000, 28, 28, 3)
    assert images.array.mean() == pytest.approx(73.1466, abs=1e-3)


@pytest.mark.data
@needs("clothing")
def test_real_photographs_stream_and_load_alike():
    folder = Path(REAL) / "clothing" / "by-class"
    loaded = open_images(folder, limit=100)
    assert loaded.images.size == (64, 64)
    assert loaded.skipped == ()
    streamed = {name: pixels for chunk in stream_images(folder, size=64)
                for name, pixels in zip(chunk.ids, chunk.pixels, strict=True)}
    assert len(streamed) == 1120
    for name, pixels in zip(loaded.images.ids, loaded.images.array, strict=True):
        np.testing.assert_array_equal(streamed[name], pixels)
