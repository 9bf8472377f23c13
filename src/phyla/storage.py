"""Files written whole or not at all, and fingerprints of what made them."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from phyla.errors import CorruptFileError, StorageError


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends well.

    A reader sees the old file or the new one, never half of one. If the block fails the temporary file is removed
    and what stood at ``path`` is untouched.

    Raises
    ------
    StorageError
        The disk is full, or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, StorageError) or error.errno not in _WRITE_ERRORS:
            raise
        raise storage_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG,
                 errno.ENAMETOOLONG, errno.EIO, errno.EEXIST}


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return the one clear line for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space left while writing {path}",
                            "free some space and give the same command again: it goes on where it was")
    return StorageError(f"cannot write {path}: {error.strerror or error}", "choose a place you may write with --out")


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 ``text`` with plain newlines to ``path``, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: object) -> None:
    """Write ``value`` as readable JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=True) + "\n")


def read_json(path: Path | str) -> dict[str, object]:
    """Return the JSON object in ``path``; CorruptFileError when it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is not readable JSON ({error})", "delete it and give the command again") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds no JSON object", "delete it and give the command again")
    return value


def write_array(path: Path | str, array: np.ndarray) -> None:
    """Write ``array`` as a .npy file without pickling, whole or not at all."""
    with atomic(path) as temporary, temporary.open("wb") as out:
        np.save(out, array, allow_pickle=False)


def read_array(path: Path | str) -> np.ndarray:
    """Return the array in a .npy file; CorruptFileError when it is damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptFileError(f"{path} is not a readable array ({error})", "delete it and give the command again") from error


def fingerprint(*parts: object) -> str:
    """Return 16 hex digits that change when any of the JSON-able ``parts`` changes."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def array_fingerprint(array: np.ndarray) -> str:
    """Return 16 hex digits of an array's shape, dtype and bytes, read in blocks of rows."""
    digest = hashlib.blake2b(repr((array.shape, array.dtype.str)).encode(), digest_size=8)
    rows = max(1, (1 << 24) // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        digest.update(np.ascontiguousarray(array[start : start + rows]).data)
    return digest.hexdigest()
