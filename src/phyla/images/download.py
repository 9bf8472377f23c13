"""Get a public data set's official files: resumed where they stopped, checked by md5, unpacked whole or not at all."""

import hashlib
import logging
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from phyla import __version__
from phyla.errors import CorruptFileError, InputError
from phyla.images.catalog import Archive, data_folders
from phyla.progress import bar
from phyla.storage import storage_error

_log = logging.getLogger("phyla")
BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 20
ATTEMPTS = 4
"""A dropped connection is taken up again where it stopped, so often in all."""


class NotReachableError(Exception):
    """The address did not answer, or refused; ``args[0]`` says how."""


def download_folder(home: str, data_dir: Path | str | None) -> Path:
    """Return the folder that downloads of one data set go to: ``home`` under the first data folder that can be written.

    Raises
    ------
    StorageError
        None of them can be written.
    """
    refused = OSError("no data folder")
    place = Path(home)
    for root in data_folders(data_dir):
        place = root / home
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError as error:
            refused = error
    raise storage_error(place, refused)


def fetch(archive: Archive, folder: Path) -> None:
    """Bring one archive into ``folder``, unpacked when it is a .tar.gz; what is there already is not fetched again.

    A download that breaks off leaves ``<file>.part`` and is continued from there, now or by the next call.

    Raises
    ------
    NotReachableError
        The network or the server does not allow it.
    CorruptFileError
        What arrived is not the official file.
    StorageError
        It cannot be written.
    """
    target = folder / archive.filename
    if not target.exists():
        part = target.with_name(f"{target.name}.part")
        _receive(archive.url, part)
        if not part.exists():
            raise NotReachableError(f"{archive.url} sent nothing")
        if (digest := _md5(part)) != archive.md5:
            part.unlink()
            raise CorruptFileError(f"{archive.url} arrived with md5 {digest} instead of {archive.md5}",
                                   "give the command again; if it stays so, get the file by hand")
        part.replace(target)
    if archive.filename.endswith((".tar.gz", ".tgz")):
        _unpack(target, folder)
        target.unlink()  # the unpacked files are as large again, 2.6 GB for STL-10


def _receive(url: str, part: Path) -> None:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is not an http address")
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            _append(url, part)
            return
        except HTTPError as error:
            error.close()
            if error.code == 416:  # nothing lies beyond what is here: it is complete, or not the same file
                return
            if error.code < 500:
                raise NotReachableError(f"{url} answered {error.code} {error.reason}") from error
            reason = f"{url} answered {error.code} {error.reason}"
        except _WriteError as error:
            raise storage_error(part, error.cause) from error.cause
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = f"{url}: {getattr(error, 'reason', None) or error}"
            if not part.exists() and attempt:
                break  # no network at all: two tries tell
        time.sleep(0.2 * attempt)
    raise NotReachableError(reason)


class _WriteError(Exception):
    """Keeps a full disk apart from a broken connection: both are OSErrors."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


def _append(url: str, part: Path) -> None:
    held = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": f"phyla/{__version__}"} | ({"Range": f"bytes={held}-"} if held else {})
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as answer:
        if answer.status != 206:
            held = 0  # the server sends the whole file whatever was asked
        length = answer.headers.get("Content-Length")
        total = held + int(length) if length else None
        _log.info("downloading %s into %s, from byte %d", url, part.parent, held)
        with bar(f"downloading {url.rsplit('/', 1)[1]}", total=total, unit="B", done=held) as shown:
            received = _write(answer, part, "ab" if held else "wb", shown.advance)
        if length and received < int(length):
            raise ConnectionError(f"it broke off after {held + received} of {total} bytes")


def _write(answer: HTTPResponse, part: Path, mode: Literal["ab", "wb"], advance: Callable[[int], None]) -> int:
    received = 0
    while block := answer.read(BLOCK_BYTES):
        try:
            with part.open(mode if received == 0 else "ab") as out:
                out.write(block)
        except OSError as error:
            raise _WriteError(error) from error
        received += len(block)
        advance(len(block))
    return received


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Path, folder: Path) -> None:
    # Into a folder beside, then moved: a half-unpacked set would look like a whole one.
    beside = Path(tempfile.mkdtemp(prefix=".unpack-", dir=folder))
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(beside, filter="data")
            else:  # Python before 3.11.4: no links, no devices, nothing outside
                tar.extractall(beside, [m for m in tar if m.isreg() and ".." not in m.name and m.name[0] != "/"])
        for entry in beside.iterdir():
            if not (folder / entry.name).exists():
                entry.replace(folder / entry.name)
            elif entry.is_dir():
                for file in entry.iterdir():
                    file.replace(folder / entry.name / file.name)
    except (tarfile.TarError, EOFError) as error:
        raise CorruptFileError(f"{archive} cannot be unpacked: {error}",
                               "delete it and give the command again") from error
    except OSError as error:
        raise storage_error(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
