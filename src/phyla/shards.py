"""Long work cut into shards: each finished one is a file, a restart makes only what is missing, and the end joins them.

A work folder holds one ``.npz`` a shard and ``manifest.json``, which says what is being made. Shards are written whole
or not at all and do not depend on one another, so that several processes or machines can share them, and a kill costs
the shard it fell into.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from phyla.errors import CorruptFileError, InputError
from phyla.storage import atomic, claimed, read_json, write_json

SHARD = 4096
"""Images in a shard: seconds to a minute of work."""

FORMAT = 1
MANIFEST = "manifest.json"

Arrays = dict[str, np.ndarray]


class Shards:
    """The shards of one piece of work over ``n`` items in order.

    Parameters
    ----------
    folder : of the work; hidden, beside what will come of it
    n : items
    what : everything that decides the result, JSON-able: with another, the work starts over
    keys : besides, what decides the result of each shard, such as a fingerprint of its files; as many as shards
    size : items in a shard
    """

    def __init__(self, folder: Path, n: int, *, what: Mapping[str, object], keys: Sequence[str] | None = None,
                 size: int = SHARD) -> None:
        self.folder, self.n, self.size = folder, n, size
        told = {"format": FORMAT, "n": n, "size": size, "what": dict(what)}
        self.what = json.loads(json.dumps(told))  # as it is read back
        count = -(-n // size)
        self._names = [f"{i:05d}-{keys[i]}.npz" if keys is not None else f"{i:05d}.npz" for i in range(count)]

    def __len__(self) -> int:
        return len(self._names)

    def begin(self, *, shared: bool = False) -> None:
        """Take up the work that is there, or start over where it is of something else.

        With ``shared``, others are at it: what is of something else is an InputError.
        """
        manifest = self.folder / MANIFEST
        with claimed(self.folder.with_name(f"{self.folder.name}.lock")):
            told = None
            with suppress(FileNotFoundError, CorruptFileError):
                told = read_json(manifest)
            if told == self.what:
                return
            if told is not None and shared:
                raise InputError(f"{self.folder} holds shards of another classifier, of other options or images",
                                 "give all workers the same arguments, or delete that folder")
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(manifest, self.what)

    def span(self, shard: int) -> range:
        """Return the items of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.n))

    def missing(self, share: tuple[int, int] = (0, 1)) -> list[int]:
        """Return the shards that are not there, of those of worker i of n in ``share``: i, i + n, i + 2n, ..."""
        return [shard for shard in range(share[0], len(self), share[1]) if not self._path(shard).exists()]

    def write(self, shard: int, **arrays: np.ndarray) -> None:
        """Write a finished shard, whole or not at all."""
        with atomic(self._path(shard)) as temporary, temporary.open("wb") as out:
            np.savez(out, allow_pickle=False, **arrays)

    def read(self, shard: int, *names: str) -> Arrays:
        """Return the arrays of a finished shard, or those called ``names``.

        Raises
        ------
        CorruptFileError
            It is damaged or gone.
        """
        path = self._path(shard)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                return {name: held[name] for name in names or held.files}
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise CorruptFileError(f"{path} cannot be read ({error})",
                                   "delete it and give the command again: that shard alone is made anew") from error

    def remove(self) -> None:
        """Delete the work folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, shard: int) -> Path:
        return self.folder / self._names[shard]


def work_folder(result: Path) -> Path:
    """Return the hidden folder beside ``result`` in which its shards are made."""
    return result.with_name(f".{result.name}.shards")
