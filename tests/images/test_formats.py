"""The byte-level readers: every official layout, made here, and what happens to damaged or hostile files."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

import official
from phyla.errors import CorruptFileError, InputError
from phyla.images import formats
from phyla.images.imagenet import CLASS_IDS

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def test_cifar_batches_follow_one_another_upright(tmp_path):
    images, labels = official.cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    paths = [folder / name for name in BATCHES]
    np.testing.assert_array_equal(formats.cifar_pixels(paths), images[: 5 * official.N])
    np.testing.assert_array_equal(formats.cifar_labels(paths, "cifar10"), labels[: 5 * official.N])
    assert formats.cifar_names(folder / "batches.meta", "cifar10")[3] == "class 3"


def test_cifar_keys_may_be_text(tmp_path):
    images, fine, coarse = official.cifar100(tmp_path)
    test = [tmp_path / "cifar-100-python" / "test"]
    np.testing.assert_array_equal(formats.cifar_pixels(test), images[6:])
    np.testing.assert_array_equal(formats.cifar_labels(test, "cifar100"), fine[6:])
    np.testing.assert_array_equal(formats.cifar_labels(test, "cifar20"), coarse[6:])
    assert formats.cifar_names(tmp_path / "cifar-100-python" / "meta", "cifar20")[19] == "coarse 19"


def python2_pickle(data: np.ndarray) -> bytes:
    """Return what Python 2 and its NumPy wrote: byte strings for text, and names from before NumPy 2."""
    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    n = len(data)
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + string(b"b") + b"tR"
             b"(K\x01(K" + bytes([n]) + b"M\x00\x0ctcnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR"
             b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
             + struct.pack("<I", data.nbytes) + data.tobytes() + b"tb")
    labels = b"](" + b"".join(b"K" + bytes([i]) for i in range(n)) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + labels + b"u."


def test_pickles_of_python_2(tmp_path):
    images = official.pixels(4, 32)
    path = tmp_path / "data_batch_1"
    path.write_bytes(python2_pickle(official.planes(images)))
    np.testing.assert_array_equal(formats.cifar_pixels([path]), images)
    np.testing.assert_array_equal(formats.cifar_labels([path], "cifar10"), np.arange(4))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_and_order(tmp_path, protocol):
    content = {"data": np.asfortranarray(official.planes(official.pixels(2, 32))), "big": np.arange(3, dtype=">i4")}
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = formats.read_pickle(path)
    np.testing.assert_array_equal(read["data"], content["data"])
    np.testing.assert_array_equal(read["big"], [0, 1, 2])


class Runs:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_that_would_run_a_command_is_refused(tmp_path):
    import os

    made = tmp_path / "made"
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Runs(os.system, f"touch {made}")}, protocol=2))
    with pytest.raises(CorruptFileError, match=r"data_batch_1 .*system"):
        formats.cifar_pixels([path])
    assert not made.exists()


@pytest.mark.parametrize("value", [
    Runs(eval, "1"), Runs(getattr, "a", "upper"), Runs(np.fromfile, "/etc/hostname"), Path("x"), {1}.union,
    Runs(np.ndarray, (2,), "O", b"\1" * 16), np.array(["text"], dtype=object), np.float64(1.0),
    np.zeros(1, dtype=[("a", "O")]), Runs(np.dtype, "O"),
], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_of_anything_else_is_refused(tmp_path, value, protocol):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": value}, protocol=protocol))
    with pytest.raises(CorruptFileError, match="data_batch_1"):
        formats.cifar_pixels([path])


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02}q\x00", b"\x80\x05\x95", pickle.dumps([1]),
                                  pickle.dumps({"data": np.zeros((2, 5), np.uint8)}), pickle.dumps({})])
def test_a_damaged_cifar_file_is_named(tmp_path, data):
    path = tmp_path / "test_batch"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="test_batch"):
        formats.cifar_pixels([path])


def test_missing_labels_are_named(tmp_path):
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}))
    with pytest.raises(CorruptFileError, match="fine_labels"):
        formats.cifar_labels([path], "cifar100")
    with pytest.raises(CorruptFileError, match="label_names"):
        formats.cifar_names(path, "cifar10")


def test_npz(tmp_path):
    images, path = official.pixels(3, 32), tmp_path / "cifar100_test.npz"
    np.savez(path, images=images, fine=np.uint8([7, 8, 9]), coarse=np.uint8([1, 2, 3]))
    np.testing.assert_array_equal(formats.npz_pixels(path), images)
    assert formats.npz_labels(path, "cifar100").tolist() == [7, 8, 9]
    assert formats.npz_labels(path, "cifar20").tolist() == [1, 2, 3]
    assert formats.npz_labels(path, "cifar20").dtype == np.int64


@pytest.mark.parametrize("damage", ["text", "cut", "other"])
def test_a_damaged_npz_is_named(tmp_path, damage):
    path = tmp_path / "cifar100_test.npz"
    np.savez(path, **({"a": np.zeros(2)} if damage == "other" else {"images": official.pixels(3, 32)}))
    if damage != "other":
        path.write_bytes(b"hello" if damage == "text" else path.read_bytes()[:2000])
    with pytest.raises(CorruptFileError, match=r"cifar100_test\.npz"):
        formats.npz_pixels(path)


def test_stl_is_stored_by_columns_and_counts_from_one(tmp_path):
    made = official.stl10(tmp_path)
    folder = tmp_path / "stl10_binary"
    for split, (images, labels) in made.items():
        np.testing.assert_array_equal(formats.stl_pixels(folder / f"{split}_X.bin"), images)
        if labels is not None:
            np.testing.assert_array_equal(formats.stl_labels(folder / f"{split}_y.bin"), labels)
    assert formats.lines(folder / "class_names.txt")[1] == "stl 1"


def test_a_damaged_stl_file_is_named(tmp_path):
    path = tmp_path / "train_X.bin"
    for size in (0, 27647):
        path.write_bytes(b"\0" * size)
        with pytest.raises(CorruptFileError, match=r"train_X\.bin"):
            formats.stl_pixels(path)
    for labels in (b"", b"\0\1", b"\1\x0b"):
        path.write_bytes(labels)
        with pytest.raises(CorruptFileError, match=r"train_X\.bin"):
            formats.stl_labels(path)


def test_svhn_lies_along_the_last_axis_and_calls_zero_ten(tmp_path):
    made = official.svhn(tmp_path / "svhn")
    for split, (images, digits) in made.items():
        path = tmp_path / "svhn" / f"{split}_32x32.mat"
        np.testing.assert_array_equal(formats.svhn_pixels(path), images)
        labels = formats.svhn_labels(path)
        np.testing.assert_array_equal(labels, digits)
        assert labels.dtype == np.int64
    assert set(made["train"][1]) == set(range(10))
    assert loadmat(tmp_path / "svhn" / "train_32x32.mat")["y"][:3].ravel().tolist() == [10, 1, 2]


def test_svhn_without_labels_has_pixels(tmp_path):
    images, path = official.pixels(3, 32), tmp_path / "train_32x32.mat"
    savemat(path, {"X": images.transpose(1, 2, 3, 0)})
    np.testing.assert_array_equal(formats.svhn_pixels(path), images)
    with pytest.raises(CorruptFileError, match=r"train_32x32\.mat .*'y'.*no such variable"):
        formats.svhn_labels(path)


@pytest.mark.parametrize("images", [np.zeros((32, 32, 3, 2)), np.zeros((32, 32, 1, 2), np.uint8),
                                    np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3, 0), np.uint8), "text"])
def test_svhn_of_another_shape_is_named(tmp_path, images):
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": images})
    with pytest.raises(CorruptFileError, match=r"train_32x32\.mat.*'X'"):
        formats.svhn_pixels(path)


@pytest.mark.parametrize("labels", [[1, 2], [1, 2, 3, 4], [0, 1, 2], [1, 2, 11], [1, 2, 2.5]])
def test_svhn_labels_that_cannot_be_are_named(tmp_path, labels):
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": np.zeros((32, 32, 3, 3), np.uint8), "y": np.array(labels)[:, None]})
    with pytest.raises(CorruptFileError, match=r"train_32x32\.mat should give 3 labels of 1 to 10"):
        formats.svhn_labels(path)


def test_a_damaged_svhn_file_is_named(tmp_path):
    official.svhn(tmp_path / "svhn")
    path = tmp_path / "svhn" / "train_32x32.mat"
    for data in (b"", b"<html>Not Found</html>", path.read_bytes()[:-3000]):
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match=r"train_32x32\.mat"):
            formats.svhn_pixels(path)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx(tmp_path, zipped):
    images, labels = official.mnist(tmp_path / "raw", zipped=zipped)
    end = ".gz" if zipped else ""
    np.testing.assert_array_equal(formats.idx_pixels(tmp_path / "raw" / f"t10k-images-idx3-ubyte{end}"), images[5:])
    np.testing.assert_array_equal(formats.idx_labels(tmp_path / "raw" / f"train-labels-idx1-ubyte{end}"), labels[:5])


IDX = struct.pack(">4I", 0x803, 2, 3, 3) + bytes(18)


@pytest.mark.parametrize("data", [b"", b"\0\0", IDX[:-1], IDX + b"\0", b"\0\0\x09\x03" + IDX[4:],
                                  gzip.compress(IDX)[:-9], b"\x1f\x8bnot gzip"])
def test_a_damaged_idx_file_is_named(tmp_path, data):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="train-images-idx3-ubyte"):
        formats.idx_pixels(path)


def test_digits_are_scaled_from_sixteen():
    images, labels = formats.digits_pixels(), formats.digits_labels()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 255
    assert images[0, 0, 2] == 80  # 5 of 16 is 79.7
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_imagenet_folders(tmp_path):
    official.imagenet(tmp_path, CLASS_IDS["imagenet10"])
    (tmp_path / "n00000001").mkdir()
    (tmp_path / "n02056570" / "notes.txt").write_text("no image")
    classes = formats.imagenet_classes(tmp_path, CLASS_IDS["imagenet10"], 10)
    assert classes == CLASS_IDS["imagenet10"]
    files = formats.imagenet_files(tmp_path, classes)
    assert len(files) == 20
    assert files[:2] == ["n02056570/n02056570_0.JPEG", "n02056570/n02056570_1.JPEG"]
    assert formats.imagenet_names(tmp_path, classes) == classes
    (tmp_path / "LOC_synset_mapping.txt").write_text("n02056570 king penguin, Aptenodytes patagonica\n")
    assert formats.imagenet_names(tmp_path, classes)[:2] == ("king penguin", classes[1])


def test_imagenet_says_which_classes_are_missing(tmp_path):
    official.imagenet(tmp_path, CLASS_IDS["imagenet10"][:8])
    said = "should hold 10 class folders and holds 8 of them; missing: n04467665, n07747607"
    with pytest.raises(InputError, match=said):
        formats.imagenet_classes(tmp_path, CLASS_IDS["imagenet10"], 10)
    with pytest.raises(InputError, match="should hold 1000 class folders and holds 8"):
        formats.imagenet_classes(tmp_path, (), 1000)
