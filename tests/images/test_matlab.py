"""MATLAB 5 files: what SciPy writes, what MATLAB may write, and what must not be read."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from phyla.errors import CorruptFileError
from phyla.images.matlab import read_array, read_shape, read_texts

TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def element(kind: int, data: bytes, order: str) -> bytes:
    """Return an element as MATLAB writes it: in the tag itself when it fits there, else padded to eight bytes."""
    if 0 < len(data) <= 4:
        return struct.pack(f"{order}I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(name: str, kind: int, shape: tuple[int, ...], values: bytes, order: str = "<", flags: int = 0) -> bytes:
    """Return a variable of class ``kind``; ``values`` are elements."""
    head = (element(6, struct.pack(f"{order}II", kind | flags, 0), order)
            + element(5, struct.pack(f"{order}{len(shape)}i", *shape), order) + element(1, name.encode(), order))
    return struct.pack(f"{order}II", 14, len(head) + len(values)) + head + values


def deflated(variable: bytes, order: str = "<") -> bytes:
    data = zlib.compress(variable)
    return struct.pack(f"{order}II", 15, len(data)) + data


def written(path: Path, *variables: bytes, order: str = "<", beginning: bytes = b"MATLAB 5.0 MAT-file") -> Path:
    ending = b"\x00\x01IM" if order == "<" else b"\x01\x00MI"
    path.write_bytes(beginning.ljust(116) + bytes(8) + ending + b"".join(variables))
    return path


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_are_those_that_scipy_writes(tmp_path, dtype, deflate):
    path, draw = tmp_path / "a.mat", np.random.default_rng(0)
    content = {name: draw.integers(0, 100, shape).astype(dtype)
               for name, shape in (("a", (3, 1)), ("images", (4, 5, 3, 2)), ("none", (0, 3)), ("one", (1, 1)))}
    savemat(path, {"text": "before", "struct": {"x": 1}, **content}, do_compression=deflate)
    for name, values in content.items():
        read = read_array(path, name)
        np.testing.assert_array_equal(read, values)
        assert read.dtype == np.dtype(dtype)
        assert read_shape(path, name) == values.shape


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflate", [False, True])
def test_numbers_as_matlab_stores_them(tmp_path, order, deflate):
    wide = matrix("wide", 6, (2, 2), element(4, np.array([1, 2, 300, 4], order + "u2").tobytes(), order), order)
    small = matrix("small", 6, (3, 1), element(2, b"\1\2\3", order), order)
    path = written(tmp_path / "a.mat", *(deflated(v, order) if deflate else v for v in (wide, small)), order=order)
    assert read_array(path, "wide").tolist() == [[1.0, 300.0], [2.0, 4.0]]
    assert read_array(path, "small").tolist() == [[1.0], [2.0], [3.0]]
    assert read_array(path, "small").dtype == np.float64
    np.testing.assert_array_equal(loadmat(path)["wide"], read_array(path, "wide"))  # the file is one


def test_plain_numbers_are_not_copied(tmp_path):
    savemat(tmp_path / "a.mat", {"x": np.zeros((64, 64), np.uint8)})
    read = read_array(tmp_path / "a.mat", "x")
    assert not read.flags.owndata
    assert not read.flags.writeable


@pytest.mark.parametrize("deflate", [False, True])
def test_texts_are_those_that_scipy_writes(tmp_path, deflate):
    cells = np.array([["a/b.jpg", ""], ["größe", "犬"]], object)
    savemat(tmp_path / "a.mat", {"n": 1, "files": cells}, do_compression=deflate)
    assert read_texts(tmp_path / "a.mat", "files") == ["a/b.jpg", "größe", "", "犬"]


@pytest.mark.parametrize(("kind", "codec"), [(4, "utf-16"), (17, "utf-16"), (16, "utf-8"), (18, "utf-32"),
                                             (2, "latin-1")])
@pytest.mark.parametrize("order", "<>")
def test_texts_in_every_encoding(tmp_path, order, kind, codec):
    ends = {"<": "-le", ">": "-be"}[order] if "utf-8" not in codec and "latin" not in codec else ""
    cell = matrix("", 4, (1, 5), element(kind, "größe".encode(codec + ends), order), order)
    path = written(tmp_path / "a.mat", matrix("files", 1, (1, 1), cell, order), order=order)
    assert read_texts(path, "files") == ["größe"]


def test_other_variables_may_be_anything(tmp_path):
    damaged = bytearray(deflated(matrix("X", 9, (100, 100), element(2, np.random.default_rng(0).bytes(10000), "<"))))
    damaged[-2000:] = bytes(2000)
    path = written(tmp_path / "a.mat", matrix("f", 16, (1, 1), b""), bytes(damaged),
                   deflated(matrix("y", 9, (2, 1), element(2, b"\1\2", "<"))))
    assert read_array(path, "y").ravel().tolist() == [1, 2]
    assert read_shape(path, "X") == (100, 100)
    with pytest.raises(CorruptFileError, match="from which 'X' can be read: Error -"):
        read_array(path, "X")


def test_cells_in_cells_do_not_end_the_process(tmp_path):
    n, heads, size = 20_000, [], 0
    for _ in range(n):
        head = matrix("", 1, (1, 1), b"")[8:]
        size += len(head)
        heads.append(struct.pack("<II", 14, size) + head)
        size += 8
    inner = b"".join(reversed(heads))
    path = written(tmp_path / "a.mat", matrix("files", 1, (1, 1), inner))
    with pytest.raises(CorruptFileError, match="one of its cells is not a line of text"):
        read_texts(path, "files")


ONE = element(2, b"\1", "<")
TEXT = matrix("", 4, (1, 2), element(16, b"ab", "<"))


@pytest.mark.parametrize(("variable", "said"), [
    (matrix("other", 9, (1, 1), ONE), "it has no such variable"),
    (matrix("x", 9, (2, 1), ONE), "1 values do not make (2, 1)"),
    (matrix("x", 9, (2**31 - 1, 2**31 - 1), ONE), "1 values do not make"),
    (matrix("x", 9, (-1, 1), ONE), "a variable has the shape (-1, 1)"),
    (matrix("x", 9, (1,), ONE), "a variable has the shape (1,)"),
    (matrix("x", 9, (1, 1), element(99, b"\1", "<")), "its values are of type 99"),
    (matrix("x", 6, (1, 1), ONE + ONE, flags=0x0800), "it is not made of real numbers"),
    (matrix("x", 4, (1, 2), element(16, b"ab", "<")), "it is not made of real numbers"),
    (matrix("x", 2, (1, 1), b""), "it is not made of real numbers"),
    (matrix("x", 9, (1, 1), ONE)[:-12], "it ends"),
    (matrix("x", 9, (1, 1), struct.pack("<I", 5 << 16 | 2) + bytes(4)), "a small element has 5 bytes"),
    (deflated(matrix("x", 9, (1, 1), ONE))[:-3], "it ends 3 bytes too early"),
    (deflated(struct.pack("<II", 14, 2**32 - 1) + matrix("x", 9, (1, 1), ONE)[8:]), "bytes too early"),
    (deflated(struct.pack("<I", 5) + matrix("x", 9, (1, 1), ONE)[4:]), "a deflated element is of type 5"),
    (struct.pack("<II", 15, 4) + b"text", "Error -3 while decompressing"),
    (b"text", "unpack"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_numbers_that_cannot_be_read(tmp_path, variable, said):
    path = written(tmp_path / "train.mat", variable)
    with pytest.raises(CorruptFileError, match=rf"train\.mat is not a MATLAB 5 .*'x'.*{re.escape(said)}"):
        read_array(path, "x")


@pytest.mark.parametrize(("variable", "said"), [
    (matrix("x", 9, (1, 1), ONE), "it is not a cell array"),
    (matrix("x", 1, (1, 1), matrix("", 9, (1, 1), ONE)), "one of its cells is not a line of text"),
    (matrix("x", 1, (1, 1), matrix("", 4, (2, 1), element(16, b"ab", "<"))), "one of its cells is not a line of text"),
    (matrix("x", 1, (1, 1), matrix("", 4, (1, 1), element(9, b"a", "<"))), "one of its texts is of type 9"),
    (matrix("x", 1, (1, 1), matrix("", 4, (1, 1), element(16, b"\xff", "<"))), "utf-8"),
    (matrix("x", 1, (2**31 - 1, 1), TEXT), "unpack"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_texts_that_cannot_be_read(tmp_path, variable, said):
    path = written(tmp_path / "list.mat", variable)
    with pytest.raises(CorruptFileError, match=rf"list\.mat is not a MATLAB 5 .*'x'.*{said}"):
        read_texts(path, "x")


@pytest.mark.parametrize("data", [b"", b"hello", bytes(200), b"MATLAB 5.0 MAT-file".ljust(128)])
def test_files_of_another_kind(tmp_path, data):
    path = tmp_path / "a.mat"
    path.write_bytes(data)
    for read in (read_array, read_texts, read_shape):
        with pytest.raises(CorruptFileError, match=r"a\.mat"):
            read(path, "x")


def test_other_versions_of_matlab_are_named(tmp_path):
    written(tmp_path / "new.mat", beginning=b"MATLAB 7.3 MAT-file, Platform")
    with pytest.raises(CorruptFileError, match=r"it begins with b'MATLAB 7\.3 MAT-file'"):
        read_shape(tmp_path / "new.mat", "x")
    savemat(tmp_path / "old.mat", {"x": 1}, format="4")
    with pytest.raises(CorruptFileError, match="it begins with"):
        read_array(tmp_path / "old.mat", "x")


def test_damage_anywhere_is_an_error_or_a_value(tmp_path):
    path, draw = tmp_path / "a.mat", np.random.default_rng(0)
    whole = written(path, matrix("t", 1, (1, 2), TEXT + TEXT), matrix("x", 9, (1, 1), ONE)).read_bytes()
    n_errors = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in draw.integers(124, len(whole), 2):
            data[place] = draw.integers(256)
        path.write_bytes(data)
        for read, name in ((read_array, "x"), (read_texts, "t"), (read_shape, "x")):
            try:
                read(path, name)
            except CorruptFileError:
                n_errors += 1
    assert 40 < n_errors < 450
