"""Read numbers and lists of texts out of MATLAB 5 files (.mat, what MATLAB saves up to version 7), and nothing else.

A file is a header and a row of variables, each of them plain or deflated. Other kinds of variables (structs, objects,
functions, cells in cells) are stepped over or refused, and nothing is read by recursion: SciPy's reader, which knows
them all, ends the process on a quarter of a megabyte of cells in cells.

Private to ``images.formats`` and ``images.finegrained``.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from phyla.errors import CorruptFileError

_HEADER_BYTES = 128
_BEGINNING = b"MATLAB 5.0 MAT-file"
_PEEK = 1024  # bytes inflated to learn a variable's name and shape; MATLAB needs at most 8 an axis and 128 besides
_DEFLATE_AT_MOST = 1032  # bytes that one deflated byte can stand for

_MATRIX, _COMPRESSED = 14, 15
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _CHAR = 1, 4
_NUMBERS = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800

Order = Literal["<", ">"]


class _Variable(NamedTuple):
    """What stands before a variable's values; they begin at ``start`` of its bytes."""

    name: str
    kind: int
    shape: tuple[int, ...]
    is_complex: bool
    start: int


def read_array(path: Path, name: str) -> np.ndarray:
    """Return the numeric variable ``name``, in MATLAB's shape and type; what is not deflated is a memory map.

    Raises
    ------
    CorruptFileError
        It is no MATLAB 5 file, it is damaged, or it has no such variable of real numbers.
    """
    try:
        variable, body, order = _found(path, name)
        if variable.kind not in _NUMBERS or variable.is_complex:
            raise ValueError("it is not made of real numbers")
        stored, data, _ = _element(body, variable.start, order)
        if stored not in _STORED:
            raise ValueError(f"its values are of type {stored}")
        values = np.frombuffer(data, order + _STORED[stored])
        if values.size != math.prod(variable.shape):
            raise ValueError(f"{values.size} values do not make {variable.shape}")
        # MATLAB stores numbers in the smallest type that holds them: 120.0 as a byte.
        return values.reshape(variable.shape, order="F").astype(_NUMBERS[variable.kind], copy=False)
    except (ValueError, struct.error, zlib.error, MemoryError) as error:
        raise _damaged(path, name, error) from error


def read_shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of variable ``name`` without reading its values; raises as ``read_array``."""
    try:
        return next(variable.shape for variable, _, _ in _variables(path) if variable.name == name)
    except StopIteration:
        raise _damaged(path, name, ValueError("it has no such variable")) from None
    except (ValueError, struct.error, zlib.error) as error:
        raise _damaged(path, name, error) from error


def read_texts(path: Path, name: str) -> list[str]:
    """Return the cell array of texts ``name``, column by column; raises as ``read_array``."""
    try:
        variable, body, order = _found(path, name)
        if variable.kind != _CELL:
            raise ValueError("it is not a cell array")
        texts, at = [], variable.start
        for _ in range(math.prod(variable.shape)):
            _, cell, at = _element(body, at, order)
            texts.append(_text(cell, order))
        return texts
    except (ValueError, struct.error, zlib.error, MemoryError) as error:
        raise _damaged(path, name, error) from error


def _damaged(path: Path, name: str, error: Exception) -> CorruptFileError:
    return CorruptFileError(f"{path} is not a MATLAB 5 file from which {name!r} can be read: "
                            f"{error or type(error).__name__}", "delete it and get it again")


def _text(cell: memoryview, order: Order) -> str:
    variable = _described(cell, order)
    if variable.kind != _CHAR or math.prod(variable.shape) != variable.shape[-1]:
        raise ValueError("one of its cells is not a line of text")
    stored, data, _ = _element(cell, variable.start, order)
    if stored not in _TEXT:
        raise ValueError(f"one of its texts is of type {stored}")
    wide = _TEXT[stored].startswith(("utf-16", "utf-32"))  # these need to be told the byte order
    return bytes(data).decode(_TEXT[stored] + ({"<": "-le", ">": "-be"}[order] if wide else ""))


# ── elements ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _found(path: Path, name: str) -> tuple[_Variable, memoryview, Order]:
    for variable, element, order in _variables(path):
        if variable.name == name:
            return variable, _inflated(element, order), order
    raise ValueError("it has no such variable")


def _variables(path: Path) -> Iterator[tuple[_Variable, tuple[int, memoryview], Order]]:
    """Yield each variable, its type and bytes in the file, and the byte order."""
    data = np.memmap(path, np.uint8, "r").data
    order = _order(data)
    at = _HEADER_BYTES
    while at < len(data):
        kind, body, at = _element(data, at, order)
        if kind == _COMPRESSED:
            yield _described(memoryview(zlib.decompressobj().decompress(body, _PEEK))[8:], order), (kind, body), order
        elif kind == _MATRIX:
            yield _described(body, order), (kind, body), order


def _order(data: memoryview) -> Order:
    orders: dict[bytes, Order] = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}
    if bytes(data[: len(_BEGINNING)]) != _BEGINNING or bytes(data[124:_HEADER_BYTES]) not in orders:
        raise ValueError(f"it begins with {bytes(data[:len(_BEGINNING)])!r}")
    return orders[bytes(data[124:_HEADER_BYTES])]


def _inflated(element: tuple[int, memoryview], order: Order) -> memoryview:
    kind, body = element
    if kind != _COMPRESSED:
        return body
    kind, size = struct.unpack(f"{order}II", zlib.decompressobj().decompress(body, 8))
    # Told the size, zlib inflates into one block; joining blocks would take the memory twice.
    whole = zlib.decompress(body, bufsize=max(1, min(size + 8, len(body) * _DEFLATE_AT_MOST)))
    inner, values, _ = _element(memoryview(whole), 0, order)
    if inner != _MATRIX:
        raise ValueError(f"a deflated element is of type {inner}")
    return values


def _element(data: memoryview, at: int, order: Order) -> tuple[int, memoryview, int]:
    """Return the type and bytes of the element at ``at``, and where the next one begins."""
    kind, size = struct.unpack_from(f"{order}II", data, at)
    start = at + 8
    if kind >> 16:  # up to four bytes stand in the tag itself
        kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if size > 4:
            raise ValueError(f"a small element has {size} bytes")
        after = at + 8
    else:
        after = start + size + (0 if kind == _COMPRESSED else -size % 8)
    if start + size > len(data):
        raise ValueError(f"it ends {start + size - len(data)} bytes too early")
    return kind, data[start : start + size], after


def _described(body: memoryview, order: Order) -> _Variable:
    _, flags, at = _element(body, 0, order)
    _, axes, at = _element(body, at, order)
    _, name, at = _element(body, at, order)
    (word,) = struct.unpack_from(f"{order}I", flags)
    shape = tuple(int(n) for n in np.frombuffer(axes, f"{order}i4"))
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"a variable has the shape {shape}")
    return _Variable(bytes(name).decode("latin-1"), word & 0xFF, shape, bool(word & _COMPLEX), at)
