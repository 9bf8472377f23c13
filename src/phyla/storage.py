"""Files written whole or not at all, files read without trust, and fingerprints of what made them."""

import errno
import glob
import hashlib
import json
import logging
import os
import pickle
import re
import sys
import time
import tokenize
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from phyla.errors import CorruptFileError, InputError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger("phyla")


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
        with temporary.open("r+b") as written:  # Windows flushes only what is open for writing
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        ours = error.errno in _PLACE_ERRORS and str(error.filename) == str(temporary)
        if isinstance(error, StorageError) or not (ours or is_refusal(error)):
            raise
        raise storage_error(path, error) from error
    except BaseException:
        _remove(temporary)
        raise


def is_refusal(error: OSError) -> bool:
    """Return whether a write failed for want of space, permission or a working disk, and not by a mistake of ours."""
    return error.errno in _WRITE_ERRORS


@contextmanager
def claimed(path: Path | str) -> Iterator[None]:
    """Let one process at a time into the block, by a lock on the file ``path``, which is removed at the end.

    A process that is killed lets go of it. Where the file system knows no locks, nobody is kept out.
    """
    path = Path(path)
    with _locked(path):
        try:
            yield
        finally:
            _remove(path)


def is_claimed(path: Path | str) -> bool:
    """Return whether some process is inside ``claimed(path)``."""
    try:
        with Path(path).open("r+b") as file:
            return not _lock(file.fileno(), wait=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _locked(path: Path) -> BinaryIO:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except OSError as error:
            raise storage_error(path, error) from error
        if not _lock(file.fileno(), wait=False):
            _log.info("another process is at %s: waiting for it", path)
            _lock(file.fileno(), wait=True)
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever had it has removed it


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Return whether the file is locked for this process, or cannot be."""
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(1)
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        _log.debug("no locks here")
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):  # what stopped the writing may also stop this, and is the error to report
        path.unlink(missing_ok=True)


def remove_partial(path: Path | str) -> None:
    """Delete what writers of ``path`` that were killed have left beside it."""
    path = Path(path)
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        _remove(partial)


_AGAIN = "delete it and give the command again"
_PLACE_ERRORS = {errno.ENOENT, errno.EISDIR, errno.ENOTEMPTY, errno.EINVAL}  # when they are about our own file
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG,
                 errno.ENAMETOOLONG, errno.EIO, errno.EEXIST}


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return the one clear line for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space left while writing {path}",
                            "free some space and give the same command again; what was finished is kept")
    reason = "its folder is a file" if error.errno == errno.EEXIST else error.strerror or error
    told = StorageError(f"cannot write {path}: {reason}", "choose another place, one you may write in")
    told.exit_code = 2  # the user's to mend, where a full disk or a failing one may not be
    return told


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 ``text`` with plain newlines to ``path``, whole or not at all.

    A file name that is not valid UTF-8 becomes an escape such as ``\\udce9``, which JSON reads back as it was.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path | str, value: object) -> None:
    """Write ``value`` as readable JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=True) + "\n")


def read_json(path: Path | str) -> dict[str, Any]:
    """Return the JSON object in ``path``; CorruptFileError when it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is not readable JSON ({error})", _AGAIN) from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds no JSON object", _AGAIN)
    return value


def write_array(path: Path | str, array: np.ndarray) -> None:
    """Write ``array`` as a .npy file without pickling, whole or not at all."""
    with atomic(path) as temporary, temporary.open("wb") as out:
        np.save(out, array, allow_pickle=False)


def read_array(path: Path | str) -> np.ndarray:
    """Return the array in a .npy file; CorruptFileError when it is damaged."""
    try:
        with Path(path).open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, tokenize.TokenError) as error:
        raise CorruptFileError(f"{path} is not a readable array ({error})", _AGAIN) from error


def write_tensors(path: Path | str, tensors: "Mapping[str, Tensor]") -> None:
    """Write named tensors, from any device, as a .safetensors file, whole or not at all."""
    from safetensors.torch import save

    write_bytes(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def write_checkpoint(path: Path | str, value: object) -> None:
    """Write tensors, numbers, text and lists and dicts of them with ``torch.save``, whole or not at all."""
    import torch

    with atomic(path) as temporary, temporary.open("wb") as out:
        try:
            torch.save(value, out)
        except RuntimeError as error:
            raise _cause(error) from error


def _cause(error: RuntimeError) -> Exception:
    # torch's writer reports a failed write in words of its own; the system's error is underneath, or was lost.
    under = error.__context__
    if isinstance(under, OSError):
        return OSError(under.errno, under.strerror)
    lost = re.search("unexpected pos|failed writing|write failed|no space left", str(error), re.IGNORECASE)
    return OSError(errno.ENOSPC, "No space left on device") if lost else error


Allowed = Callable[..., object] | tuple[Callable[..., object], str]


def read_checkpoint(path: Path | str, *, hint: str, allowed: Sequence[Allowed] = (), verify: bool = False) -> object:
    """Return what ``torch.save`` wrote to ``path``, on the CPU; no code in the file is run.

    Parameters
    ----------
    hint : what to do about a damaged file
    allowed : functions and classes that the file may name besides torch's own, or (function, name in the file)
    verify : compare all bytes with their checksums, which torch writes and does not read

    Raises
    ------
    CorruptFileError
        The file is damaged or something else.
    InputError
        The file names a function or class that is not allowed, or may not be opened.
    """
    import torch

    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"wrong checksum of {damaged}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allowed)):
            warnings.simplefilter("ignore")  # torch remarks on odd bytes before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch's readers raise nearly anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek before the start of a file cut short
            raise InputError(f"{path} cannot be opened: {error.strerror or error}", hint) from error
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(f"{path} names {refused[1]}, which is code and not weights: it was refused and not run",
                             "use only files from a source you trust") from error
        told = (str(error).splitlines() or [type(error).__name__])[0][:120]
        if isinstance(error, pickle.UnpicklingError | KeyError):  # what torch says of it is about its own options
            told = "torch did not write it, or it is damaged"
        raise CorruptFileError(f"{path} cannot be read ({told})", hint) from error


def fingerprint(*parts: object) -> str:
    """Return 16 hex digits that change when any of the ``parts`` changes: plain values, arrays and paths."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return array_fingerprint(value)  # its text would leave the middle of it out
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} has no lasting fingerprint; give its values")


def chained_digest(rows: np.ndarray, before: str = "") -> str:
    """Return 32 hex digits of ``rows``, one after another, following those that gave the digest ``before``.

    However rows are cut into blocks, the last digest is the same: it can be taken while they are read, and go on later.
    """
    digest = bytes.fromhex(before)
    for row in rows:
        step = hashlib.blake2b(digest, digest_size=16)
        step.update(np.ascontiguousarray(row).data)
        digest = step.digest()
    return digest.hex()


def array_fingerprint(array: np.ndarray) -> str:
    """Return 16 hex digits of an array's shape, dtype and bytes, read in blocks of rows."""
    digest = hashlib.blake2b(repr((array.shape, array.dtype.str)).encode(), digest_size=8)
    rows = max(1, (1 << 24) // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        digest.update(np.ascontiguousarray(array[start : start + rows]).data)
    return digest.hexdigest()
