"""The run folder: one place for everything a run makes.

``stages/NAME-KEY/`` holds what a stage made, where KEY is the fingerprint of its options and inputs: a stage that is
there is not run again, and a changed option leaves what was made before untouched. The top of the folder shows the
current result: run.json, metrics.jsonl, the arrays, model.safetensors, assignments, report.html.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phyla.errors import CorruptFileError, InputError
from phyla.nets.heads import Projection
from phyla.nets.resnet import EncoderSpec, ResNet
from phyla.storage import atomic, fingerprint, read_array, read_json, storage_error, write_array, write_json, write_text
from phyla.types import Assignment, Embeddings, Neighbors

MARKER = "phyla-run.json"


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

    Attributes
    ----------
    stages : the stages asked for so far
    may_make : names of the stages that may be made; None: all
    remake : names of the stages that are made even if they are there
    """

    def __init__(self, path: Path | str, identity: dict[str, object] | None = None) -> None:
        self.path = Path(path)
        self.stages: dict[str, Stage] = {}
        self.may_make: set[str] | None = None
        self.remake: set[str] = set()
        if identity is not None:
            self._claim(identity)

    def _claim(self, identity: dict[str, object]) -> None:
        marker = self.path / MARKER
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = not marker.exists() and any(self.path.iterdir())
        except FileExistsError as error:
            raise InputError(f"{self.path} is a file, not a folder", "choose another --out") from error
        except OSError as error:
            raise storage_error(self.path, error) from error
        if foreign:
            raise InputError(f"{self.path} is not empty and not a run folder", "choose another --out")
        if not marker.exists():
            write_json(marker, identity)
            return
        held = read_json(marker)
        if held != identity:
            told = ", ".join(f"{name} {held.get(name)!r} (now {value!r})" for name, value in identity.items()
                             if held.get(name) != value)
            raise InputError(f"{self.path} holds another run: {told}", "choose another --out; nothing was changed")

    def stage(self, name: str, options: object, inputs: Sequence[str],
              make: Callable[[Path], dict[str, object]]) -> Stage:
        """Return the finished stage ``name``: kept if its options and inputs are unchanged, made by ``make`` if not.

        ``make`` is given the stage's folder, writes its results there and returns facts for ``done.json``.
        """
        key = fingerprint(name, options, list(inputs))
        folder = self.path / "stages" / f"{name}-{key[:10]}"
        done = folder / "done.json"
        kept = done.exists() and name not in self.remake
        if not kept:
            if self.may_make is not None and name not in self.may_make:
                raise InputError(f"the {name} stage of {self.path} is not done, or its images changed since",
                                 f"bring it up to date first: phyla run {self.path}")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise storage_error(folder, error) from error
            started = time.monotonic()
            facts = make(folder)
            write_json(done, {"key": key, "options": options, "inputs": list(inputs), "facts": facts,
                              "seconds": round(time.monotonic() - started, 2)})
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        held = read_json(done)
        self.stages[name] = Stage(name, key, folder, dict(held["facts"]) | {"seconds": held["seconds"]}, kept)
        return self.stages[name]


def save_encoder(folder: Path, encoder: ResNet, projection: Projection | None) -> None:
    """Write encoder.safetensors (encoder and, where there is one, its projection) and encoder.json."""
    parts: dict[str, nn.Module | None] = {"encoder": encoder, "projection": projection}
    weights = {f"{part}.{name}": value.detach().cpu().contiguous() for part, net in parts.items() if net is not None
               for name, value in net.state_dict().items()}
    with atomic(folder / "encoder.safetensors") as temporary:
        save_file(weights, temporary)
    write_json(folder / "encoder.json", asdict(encoder.spec))


def load_encoder(folder: Path) -> tuple[ResNet, Projection | None]:
    """Return the encoder and projection that ``save_encoder`` wrote."""
    path = folder / "encoder.safetensors"
    try:
        encoder = EncoderSpec(**read_json(folder / "encoder.json")).build()
        held = load_file(path)
        weights: dict[str, dict[str, Tensor]] = {"encoder": {}, "projection": {}}
        for name, value in held.items():
            part, _, inner = name.partition(".")
            weights[part][inner] = value
        encoder.load_state_dict(weights["encoder"])
        if not weights["projection"]:
            return encoder.eval(), None
        projection = Projection(encoder.spec.n_features, len(weights["projection"]["2.bias"]))
        projection.load_state_dict(weights["projection"])
    except (SafetensorError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise CorruptFileError(f"the encoder {path} cannot be read ({str(error).splitlines()[0][:120]})",
                               f"delete {folder} and give the command again: that stage is made anew") from error
    return encoder.eval(), projection.eval()


def save_embeddings(folder: Path, embeddings: Embeddings, name: str = "embeddings") -> None:
    """Write NAME.npy and NAME.ids.json."""
    write_array(folder / f"{name}.npy", embeddings.values)
    write_text(folder / f"{name}.ids.json", json.dumps(list(embeddings.ids)))


def load_embeddings(folder: Path, name: str = "embeddings") -> Embeddings:
    """Return what ``save_embeddings`` wrote."""
    return Embeddings(read_array(folder / f"{name}.npy"), load_ids(folder / f"{name}.ids.json"))


def save_neighbors(folder: Path, neighbors: Neighbors, name: str = "neighbors") -> None:
    """Write NAME.npy and NAME.similarities.npy."""
    write_array(folder / f"{name}.npy", neighbors.indices)
    write_array(folder / f"{name}.similarities.npy", neighbors.similarities)


def load_neighbors(folder: Path, name: str = "neighbors") -> Neighbors:
    """Return what ``save_neighbors`` wrote."""
    return Neighbors(read_array(folder / f"{name}.npy"), read_array(folder / f"{name}.similarities.npy"))


def save_assignment(folder: Path, assignment: Assignment, name: str = "assignment") -> None:
    """Write NAME.npy (probabilities) and NAME.ids.json."""
    write_array(folder / f"{name}.npy", assignment.probabilities)
    write_text(folder / f"{name}.ids.json", json.dumps(list(assignment.ids)))


def load_assignment(folder: Path, name: str = "assignment") -> Assignment:
    """Return what ``save_assignment`` wrote."""
    return Assignment(read_array(folder / f"{name}.npy"), load_ids(folder / f"{name}.ids.json"))


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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

