"""Files are whole or not there, errors are one line, fingerprints change when and only when something does."""

import errno
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phyla.errors import CorruptFileError, InputError, StorageError
from phyla.storage import (
    array_fingerprint,
    atomic,
    fingerprint,
    read_array,
    read_checkpoint,
    read_json,
    remove_partial,
    storage_error,
    write_array,
    write_bytes,
    write_checkpoint,
    write_json,
    write_tensors,
    write_text,
)

WRITERS = {
    "bytes": lambda path: write_bytes(path, b"new"), "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": 1}), "array": lambda path: write_array(path, np.ones(3)),
    "checkpoint": lambda path: write_checkpoint(path, {"new": torch.ones(3)}),
    "tensors": lambda path: write_tensors(path, {"new": torch.ones(3)})}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "kept.bin"
    path.write_bytes(b"old")
    return path


def alone(path: Path) -> bool:
    """Whether nothing but ``path`` lies in its folder."""
    return [entry.name for entry in path.parent.iterdir()] == [path.name]


# ---- whole or not at all ------------------------------------------------------------------------------------------


def test_the_old_file_stands_until_the_new_one_is_whole(old: Path) -> None:
    with atomic(old) as temporary:
        temporary.write_bytes(b"new")
        assert old.read_bytes() == b"old"
        assert temporary.parent == old.parent, "a move between disks would not be atomic"
    assert old.read_bytes() == b"new"
    assert alone(old)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError("no number"), SystemExit(1),
                                   FileNotFoundError(errno.ENOENT, "gone")])
def test_a_failure_leaves_the_old_file_and_nothing_else(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, atomic(old) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert caught.value is error
    assert old.read_bytes() == b"old"
    assert alone(old)


def test_a_failure_before_the_first_byte_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), atomic(tmp_path / "a" / "b"):
        raise ValueError("no")
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_folders_are_made_and_old_files_replaced(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "a b" / "é\n" / "file" if sys.platform != "win32" else tmp_path / "a b" / "é" / "file"
    WRITERS[writer](path)
    first = path.read_bytes()
    path.write_bytes(b"something longer than what is written, to be replaced" * 100)
    WRITERS[writer](str(path))
    assert path.read_bytes() == first
    assert alone(path)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("number", "told"), [
    (errno.ENOSPC, "no space left while writing"), (errno.EDQUOT, "no space left while writing"),
    (errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied"), (errno.EIO, "error")])
def test_a_disk_that_refuses_is_one_line(old: Path, writer: str, number: int, told: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=told) as caught:
        WRITERS[writer](old)
    assert str(old) in str(caught.value) and "\n" not in str(caught.value)
    assert ". hint: " in str(caught.value)
    assert old.read_bytes() == b"old"
    assert alone(old)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_really_full_is_one_line(old: Path, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        return opened(Path("/dev/full") if path.suffix == ".part" else path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match=r"no space left while writing .*kept\.bin\. hint: free some space"):
        WRITERS[writer](old)
    monkeypatch.undo()
    assert old.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the system")
def test_a_write_that_the_system_cuts_off_is_reported_as_what_it_is(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.raises(StorageError, match="File too large"):
            write_checkpoint(tmp_path / "a.pt", {"a": torch.ones(100_000)})
        with pytest.raises(StorageError, match="File too large"):
            write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_what_torch_cannot_write_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(value: object, out: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        write_checkpoint(tmp_path / "a.pt", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_one_line(old: Path) -> None:
    for path in (old / "a", old / "a" / "b"):
        with pytest.raises(StorageError, match=r"cannot write .*(its folder is a file|Not a directory)"):
            write_bytes(path, b"new")
    assert old.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of the system")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        write_bytes(tmp_path / "a", b"new")


@pytest.mark.skipif(sys.platform == "win32", reason="names of the system")
def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="name too long"):
        write_bytes(tmp_path / ("x" * 300), b"new")


def test_storage_errors_are_system_errors_with_a_hint() -> None:
    error = storage_error(Path("a"), OSError(errno.ENOSPC, "x"))
    assert isinstance(error, OSError) and error.exit_code == 1
    assert str(error) == "no space left while writing a. hint: " + str(error.hint)
    assert str(StorageError("cannot write a")) == "cannot write a"


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = [".a[1].pt.12.part", ".a[1].pt.99999.part", "a[1].pt", ".a1.pt.12.part", ".b.pt.12.part", "a[1].pt.part"]
    for name in names:
        (tmp_path / name).touch()
    remove_partial(tmp_path / "a[1].pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
    remove_partial(tmp_path / "no folder" / "a.pt")


# ---- read back, or refused ----------------------------------------------------------------------------------------


def test_json_is_readable_by_people_and_comes_back(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"b": [1, 2.5, None], "a": {"größe": "日本"}}
    write_json(path, value)
    assert read_json(path) == value
    text = path.read_bytes().decode()
    assert text.index('"a"') < text.index('"b"') and "größe" in text and text.endswith("}\n") and "\r" not in text


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1', b"[1]", b"3", b"\xff\xfe", b"null"])
def test_what_is_not_a_json_object_is_damaged(old: Path, data: bytes) -> None:
    old.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"kept\.bin (is not readable JSON|holds no JSON object).*hint: delete"):
        read_json(old)


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), np.float32([[1.5]]), np.zeros((0, 4), np.int64),
                                   np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(["a", "bc"])])
def test_arrays_come_back(tmp_path: Path, array: np.ndarray) -> None:
    write_array(tmp_path / "a.npy", array)
    found = read_array(tmp_path / "a.npy")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_arrays_of_objects_are_not_written(old: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        write_array(old, np.array([{}], dtype=object))
    assert old.read_bytes() == b"old"


def test_damaged_arrays_are_refused_whatever_the_damage(tmp_path: Path) -> None:
    path, source = tmp_path / "a.npy", np.random.default_rng(0)
    write_array(path, np.arange(100.0))
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 8, 60, 127, 128, 300, len(whole) - 1)]
    damaged += [whole[:10] + b"{'descr': (" + whole[21:], b"x" * 200, b"PK\x03\x04"]
    for _ in range(50):
        data = bytearray(whole)
        for place in source.integers(0, 70, 3):
            data[place] = source.integers(128, 256)
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match=r"a\.npy is not a readable array"):
            read_array(path)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptFileError):
        read_array(tmp_path / "a.npy")


def test_tensors_come_back_from_any_layout(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": whole.T, "part": whole[:, 1:3], "trained": whole.clone().requires_grad_(),
               "n": torch.tensor(3)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_checkpoints_come_back(tmp_path: Path) -> None:
    value = {"a": torch.arange(3), "b": [1, 2.5, None, "text", {"c": (True,)}]}
    write_checkpoint(tmp_path / "a.pt", value)
    found = read_checkpoint(tmp_path / "a.pt", hint="", verify=True)
    assert isinstance(found, dict) and torch.equal(found["a"], value["a"]) and found["b"] == value["b"]


def test_damaged_checkpoints_are_refused_or_the_same_whatever_the_damage(tmp_path: Path) -> None:
    path, source = tmp_path / "a.pt", np.random.default_rng(0)
    value = {"a": torch.randn(40, generator=torch.Generator().manual_seed(0))}
    for legacy in (False, True):
        torch.save(value, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for i in range(60):
            data = bytearray(whole[: source.integers(len(whole))] if i % 3 == 0 else whole)
            for place in source.integers(0, max(len(data), 1), 3 if i % 3 else 0):
                data[place] = source.integers(0, 256)
            path.write_bytes(data)
            try:
                found = read_checkpoint(path, hint="start over", verify=not legacy)
            except (CorruptFileError, InputError) as error:
                assert "\n" not in str(error) and "a.pt" in str(error)
                continue
            assert legacy or torch.equal(found["a"], value["a"]), "with checksums no damage passes"  # type: ignore[index]


def test_names_in_a_checkpoint_are_allowed_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": np.int64(3)}, path)
    with pytest.raises(InputError, match=r"names numpy\S+scalar, which is code and not weights: it was refused"):
        read_checkpoint(path, hint="")
    scalar = np.int64(0).__reduce__()[0]
    dtypes: list[Any] = [np.dtype, type(np.dtype(np.int64))]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    assert read_checkpoint(path, hint="", allowed=[*names, *dtypes]) == {"a": 3}


def test_a_checkpoint_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError, match=r"cannot be opened: .*\. hint: start over"):
            read_checkpoint(path, hint="start over")


# ---- fingerprints -------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_on_every_machine() -> None:
    assert fingerprint("a", 1, {"b": [2.5, None], "c": True}) == "bd2370db9ed40759"
    assert array_fingerprint(np.arange(6, dtype=np.uint8).reshape(2, 3)) == "8967f2e0b91d332e"


def test_a_fingerprint_sees_every_difference() -> None:
    values: list[tuple[object, ...]] = [
        (), ("",), (None,), (0,), (1,), (1.5,), ("1",), (True,), ([1],), ([1, 2],), ([2, 1],), (1, 2), ({"a": 1},),
        ({"b": 1},), ({"a": 2},), ({"a": {"b": 1}},), (Path("a/b"),), (Path("a/c"),), (np.arange(5000),),
        (np.arange(5000) * (np.arange(5000) != 2500),)]  # their texts are equal: the middle is left out
    assert len({fingerprint(*value) for value in values}) == len(values)


def test_a_fingerprint_sees_no_difference_that_is_none() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint((1, 2)) == fingerprint([1, 2])
    assert fingerprint(np.int64(3), np.float32(0.5), np.bool_(True)) == fingerprint(3, 0.5, True)
    assert fingerprint(Path("a") / "b") == fingerprint("a/b")


def test_what_has_no_lasting_value_has_no_fingerprint() -> None:
    @dataclass
    class Options:
        n: int = 1

    for value in (Options(), object(), {1, 2}, torch.ones(2)):
        with pytest.raises(TypeError, match="has no lasting fingerprint"):
            fingerprint(value)


def test_an_arrays_fingerprint_is_of_its_shape_type_and_bytes(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 3, 4), dtype=np.uint8)
    changed = array.copy()
    changed[31, 2, 1] ^= 1
    others = [changed, array.reshape(50, 12), array.astype(np.int8), array[::-1], array[:49], array.astype(np.float32)]
    assert len({array_fingerprint(other) for other in [array, *others]}) == 1 + len(others)

    np.save(tmp_path / "a.npy", array)
    same = [array.copy(), np.asfortranarray(array), np.load(tmp_path / "a.npy", mmap_mode="r"),
            np.repeat(array, 2, axis=0)[::2]]
    assert {array_fingerprint(other) for other in same} == {array_fingerprint(array)}


def test_large_and_empty_arrays_have_fingerprints() -> None:
    rows = np.arange(5 << 20, dtype=np.int64).reshape(-1, 4)  # 40 MiB: several blocks
    assert array_fingerprint(rows) == array_fingerprint(rows.copy())
    changed = rows.copy()
    changed[-1, -1] += 1
    assert array_fingerprint(changed) != array_fingerprint(rows)
    empty = [np.zeros((0, 3)), np.zeros((3, 0)), np.zeros((0,)), np.zeros((0, 3), np.uint8)]
    assert len({array_fingerprint(array) for array in empty}) == len(empty)


def test_a_fingerprint_is_what_a_json_file_gives_back(tmp_path: Path) -> None:
    options = {"views": {"mean": (0.1, 0.2)}, "n": 3}
    assert fingerprint(json.loads(json.dumps(options))) == fingerprint(options)


def test_a_checkpoint_cut_anywhere_is_damaged(tmp_path):
    """Torch seeks before the start of some files that were cut short, which the system calls an invalid argument."""
    whole = tmp_path / "whole.pt"
    write_checkpoint(whole, {"weights": torch.randn(40_000)})
    data = whole.read_bytes()
    for n_bytes in (10, 4_000, 5_000, 20_000, 60_000, 70_000, len(data) - 100):
        (tmp_path / "cut.pt").write_bytes(data[:n_bytes])
        with pytest.raises(CorruptFileError, match="cannot be read"):
            read_checkpoint(tmp_path / "cut.pt", hint="fetch it again")
