"""The run folder: one place for everything a run makes.

``stages/NAME-KEY/`` holds what a stage made, where KEY is the fingerprint of its options and inputs: a stage that is
there is not run again, and a changed option leaves what was made before untouched. The top of the folder shows the
current result: run.json, metrics.jsonl, the arrays, model.safetensors, assignments, report.html.
"""

import errno
import filecmp
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from phyla.errors import CorruptFileError, InputError, PhylaError, StorageError
from phyla.images.folders import RUN_MARKER
from phyla.nets.frozen import AnyEncoder, build_encoder, encoder_form
from phyla.nets.heads import Projection
from phyla.storage import (
    atomic,
    fingerprint,
    read_array,
    read_json,
    storage_error,
    write_array,
    write_json,
    write_tensors,
    write_text,
)
from phyla.training.agreement import by_first, check_alike
from phyla.training.group import ALONE, Group
from phyla.types import Assignment, Embeddings, Neighbors

MARKER = RUN_MARKER
OPTIONS = "options.json"
PUBLISHED = "published"
"""A folder in that of a run, for the published files that it was imported from."""
LINKED = (".npy", ".safetensors")
_SCRATCH = "PHYLA_SCRATCH"  # in the environment: a folder that `--devices` deletes after its processes


@dataclass(frozen=True)
class Stage:
    """One finished stage: its folder, its key, and what it noted about itself."""

    name: str
    key: str
    folder: Path
    facts: dict[str, Any]
    was_kept: bool


class RunDir:
    """A run folder, opened for writing.

    Parameters
    ----------
    path : the folder; made when it is not there
    identity : which images and recipe it belongs to; a folder of others is refused
    group : the processes of the run; the first one alone writes here

    Attributes
    ----------
    stages : the stages asked for so far
    may_make : names of the stages that may be made; None: all
    remake : names of the stages that are made even if they are there
    device : in words, what stages are made on; kept with each
    lenders : other run folders: a stage that one of them has finished, of the same options and inputs, is taken
    """

    def __init__(self, path: Path | str, identity: dict[str, object] | None = None, *, group: Group = ALONE) -> None:
        self.path = Path(path)
        self.stages: dict[str, Stage] = {}
        self.may_make: set[str] | None = None
        self.remake: set[str] = set()
        self.device = ""
        self.lenders: tuple[Path, ...] = ()
        if identity is not None:
            by_first(group, lambda: self._claim(identity))

    def _claim(self, identity: dict[str, object]) -> None:
        marker = self.path / MARKER
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            entries = {entry.name for entry in self.path.iterdir()}
        except OSError as error:
            raise _unusable(self.path, error) from error
        # Without its marker a folder is still ours when it holds what only we write; hidden files do not count.
        is_ours = MARKER in entries or {OPTIONS, "stages"} <= entries
        if not is_ours and any(not name.startswith(".") for name in entries):
            raise InputError(f"{self.path} is not empty and not a run folder", "choose another --out")
        if MARKER in entries:
            held = read_json(marker)
            if held != identity and not any(self.path.glob("stages/*/done.json")):
                write_json(marker, identity)  # a first command that failed before anything was made claims nothing
            elif held != identity:
                told = ", ".join(f"{name} {held.get(name)!r} (now {value!r})" for name, value in identity.items()
                                 if held.get(name) != value)
                raise InputError(f"{self.path} holds another run: {told}", "choose another --out; nothing was changed")
        else:
            try:
                write_json(marker, identity)
            except StorageError as error:
                raise _unusable(self.path, error) from error
        for partial in (*self.path.glob(".*.part"), *self.path.glob("stages/*/.*.part")):
            partial.unlink(missing_ok=True)  # left by a run that was killed while it wrote

    def stage(self, name: str, options: object, inputs: Sequence[str],
              make: Callable[[Path], dict[str, object]], *, group: Group = ALONE) -> Stage:
        """Return the finished stage ``name``: kept if its options and inputs are unchanged, made by ``make`` if not.

        One that a lender has is as good as kept. ``make`` is given the stage's folder, writes its results there and
        returns facts for ``done.json``. Where a ``group`` makes the stage together, each process but the first gets a
        folder of its own that is then deleted.

        Raises
        ------
        CorruptFileError
            A file of a kept stage is gone, or is not as the stage left it.
        """
        key = fingerprint(name, options, list(inputs))
        check_alike(group, key, what=f"images or options in the {name} stage")
        folder = self.path / "stages" / f"{name}-{key[:10]}"
        done = folder / "done.json"
        kept = by_first(group, lambda: self._is_kept(name, done) or self._is_lent(name, folder))
        held: dict[str, object] = {"key": key, "options": options, "inputs": list(inputs)}
        if not kept:
            started = time.monotonic()
            with _workplace(folder, group) as place:
                held["facts"] = make(place)
            held["seconds"] = round(time.monotonic() - started, 2)
        self.stages[name] = by_first(group, lambda: self._finished(name, folder, held, kept=kept))
        return self.stages[name]

    def _is_kept(self, name: str, done: Path) -> bool:
        """Return whether a stage need not be made; else make its folder ready."""
        if done.exists() and name not in self.remake:
            return True
        if self.may_make is not None and name not in self.may_make:
            raise InputError(f"the {name} stage of {self.path} is not done, or its images changed since",
                             f"bring it up to date first: phyla run {self.path}")
        try:
            done.parent.mkdir(parents=True, exist_ok=True)
            done.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(done.parent, error) from error
        return False

    def _is_lent(self, name: str, folder: Path) -> bool:
        """Return whether a lender has the stage; its files are then in ``folder``, and ``done.json`` came last."""
        lenders = () if name in self.remake else self.lenders
        for theirs in (lender / "stages" / folder.name for lender in lenders):
            if theirs.resolve() != folder.resolve() and _is_whole(theirs):
                for path in sorted(theirs.iterdir(), key=lambda path: path.name == "done.json"):
                    if path.name != "checkpoint.pt" and not path.name.startswith("."):
                        place(path, folder / path.name)
                return True
        return False

    def _finished(self, name: str, folder: Path, made: Mapping[str, object], *, kept: bool) -> Stage:
        done = folder / "done.json"
        if not kept:
            write_json(done, dict(made) | {"files": _digests(folder), "device": self.device})
        with reading(done):
            held = read_json(done)
            told = {"seconds": float(held["seconds"]), "device": held.get("device", "")}
            facts = dict(held["facts"]) | told
            if kept:
                _check(folder, dict(held.get("files", {})))
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        return Stage(name, str(made["key"]), folder, facts, kept)


@contextmanager
def _workplace(folder: Path, group: Group) -> Iterator[Path]:
    """Give the folder in which a process makes a stage: the stage's own to the first, one that is deleted to others."""
    if group.is_first:
        yield folder
        return
    with TemporaryDirectory(prefix="phyla-", dir=os.environ.get(_SCRATCH)) as own:
        yield Path(own)


def _unusable(path: Path, error: OSError) -> PhylaError:
    if isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return storage_error(path, error)
    is_file = isinstance(error, FileExistsError | NotADirectoryError)
    reason = "a file is in the way" if is_file else error.strerror or str(error)
    return InputError(f"{path} cannot be a run folder: {reason}", "choose another --out")


def _digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file that a stage left; hidden files are being written, a checkpoint goes."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name not in ("done.json", "checkpoint.pt") and not path.name.startswith("."):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return found


def _is_whole(folder: Path) -> bool:
    """Return whether a stage is finished and as it was left; one of another run that is not is no reason to stop."""
    try:
        _check(folder, dict(read_json(folder / "done.json")["files"]))
    except (PhylaError, KeyError, TypeError, ValueError, OSError):
        return False
    return True


def _check(folder: Path, files: Mapping[str, str]) -> None:
    now = _digests(folder)
    for name, digest in files.items():
        if now.get(name) != digest:
            raise CorruptFileError(f"{folder / name} is {'changed or damaged' if name in now else 'missing'}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file of a stage raises inside this block into one line that says what to delete."""
    try:
        yield
    except (SafetensorError, PhylaError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        foreign = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        told = error.message if isinstance(error, PhylaError) else foreign
        message = told if str(path.parent) in told else f"{path} cannot be read ({told})"
        raise CorruptFileError(message, f"delete {path.parent} and give the command again: that stage is made anew, "
                                        "the others are kept") from error


def save_encoder(folder: Path, encoder: AnyEncoder, projection: Projection | None) -> None:
    """Write encoder.safetensors (encoder and, where there is one, its projection) and encoder.json."""
    parts: dict[str, nn.Module | None] = {"encoder": encoder, "projection": projection}
    weights = {f"{part}.{name}": value for part, net in parts.items() if net is not None
               for name, value in net.state_dict().items()}
    write_tensors(folder / "encoder.safetensors", weights)
    form = projection.spec() if projection is not None else None
    write_json(folder / "encoder.json", encoder_form(encoder) | {"projection": form})


def load_encoder(folder: Path) -> tuple[AnyEncoder, Projection | None]:
    """Return the encoder and projection that ``save_encoder`` wrote; nothing is fetched."""
    path = folder / "encoder.safetensors"
    with reading(path):
        held = read_json(folder / "encoder.json")
        form = held.pop("projection", None)
        encoder = build_encoder(held)
        weights: dict[str, dict[str, Tensor]] = {"encoder": {}, "projection": {}}
        for name, value in load_file(path).items():
            part, _, inner = name.partition(".")
            weights[part][inner] = value
        encoder.load_state_dict(weights["encoder"])
        projection = Projection(**form).eval() if form else None
        if projection is not None:
            projection.load_state_dict(weights["projection"])
    return encoder.eval(), projection


def save_embeddings(folder: Path, embeddings: Embeddings, name: str = "embeddings") -> None:
    """Write NAME.npy and NAME.ids.json."""
    write_array(folder / f"{name}.npy", embeddings.values)
    write_text(folder / f"{name}.ids.json", json.dumps(list(embeddings.ids)))


def load_embeddings(folder: Path, name: str = "embeddings") -> Embeddings:
    """Return what ``save_embeddings`` wrote."""
    path = folder / f"{name}.npy"
    with reading(path):
        return Embeddings(read_array(path), load_ids(folder / f"{name}.ids.json"))


def save_neighbors(folder: Path, neighbors: Neighbors, name: str = "neighbors") -> None:
    """Write NAME.npy and NAME.similarities.npy."""
    write_array(folder / f"{name}.npy", neighbors.indices)
    write_array(folder / f"{name}.similarities.npy", neighbors.similarities)


def load_neighbors(folder: Path, name: str = "neighbors") -> Neighbors:
    """Return what ``save_neighbors`` wrote."""
    path = folder / f"{name}.npy"
    with reading(path):
        return Neighbors(read_array(path), read_array(folder / f"{name}.similarities.npy"))


def save_assignment(folder: Path, assignment: Assignment, name: str = "assignment") -> None:
    """Write NAME.npy (probabilities) and NAME.ids.json."""
    write_array(folder / f"{name}.npy", assignment.probabilities)
    write_text(folder / f"{name}.ids.json", json.dumps(list(assignment.ids)))


def load_assignment(folder: Path, name: str = "assignment") -> Assignment:
    """Return what ``save_assignment`` wrote."""
    path = folder / f"{name}.npy"
    with reading(path):
        return Assignment(read_array(path), load_ids(folder / f"{name}.ids.json"))


def load_ids(path: Path) -> list[str]:
    """Return the ids in a JSON list."""
    return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]


def save_records(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def load_records(path: Path) -> list[dict[str, object]]:
    """Return the JSON objects of a file with one a line; none when there is no file."""
    if not path.exists():
        return []
    with reading(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def place(source: Path, target: Path) -> None:
    """Show a stage's file at the top of the run folder: arrays and weights as a hard link where that can be.

    Anything else is a copy, because people edit it and what the stage has must stay.
    """
    if target.exists() and target.samefile(source):  # moving a link onto its own file would leave both names
        return
    with atomic(target) as temporary:
        temporary.unlink(missing_ok=True)
        if source.suffix not in LINKED or not _link(source, temporary):
            shutil.copyfile(source, temporary)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # not on this file system
        return False
    return True


def is_placed(source: Path, target: Path) -> bool:
    """Return whether ``target`` is there and, if it holds an array or weights, is still what the stage made."""
    if not target.exists() or source.suffix not in LINKED:
        return target.exists()
    return target.samefile(source) or filecmp.cmp(source, target, shallow=False)
