"""A result: what one run of a recipe with one seed scored, and what made it, as a small JSON file without paths.

``results/NAME/seed-N.json``: the files of one name differ in their seed alone, and are shown as mean and spread.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePath
from typing import Any

from phyla.errors import CorruptFileError, InputError
from phyla.storage import read_json, write_text

FORMAT = 2


@dataclass(frozen=True)
class Scored:
    """A row of a run's table, with the protocol that its images make it.

    Parameters
    ----------
    method : as the table calls it
    split : whose images
    protocol : train-test, train+test, on-train
    selection : last, label-free or oracle; empty where nothing was chosen
    values : named scores; None for one that was not a finite number
    """

    method: str
    split: str
    protocol: str
    selection: str
    n_images: int
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class RunResult:
    """What one run left to be kept.

    Parameters
    ----------
    name : what it stands under in tables; a shortened schedule ends in -short
    recipe, ablation, protocol, selection, overrides : what was asked for: with these and the seed it can be run again
    seed : of everything random
    scores : the table of the run
    seconds, devices : of each stage
    precision : fp32 or bf16
    machine, versions : what ran it
    options : every option of every stage
    """

    name: str
    recipe: str
    ablation: str
    protocol: str
    selection: str
    overrides: tuple[str, ...]
    seed: int
    scores: tuple[Scored, ...]
    seconds: Mapping[str, float]
    devices: Mapping[str, str]
    precision: str
    machine: str
    versions: Mapping[str, str]
    options: Mapping[str, Any]


def write_result(result: RunResult, folder: Path) -> Path:
    """Write ``folder``/NAME/seed-N.json, a line a fact and a row, and return its path."""
    told: dict[str, Any] = {"format": FORMAT, "phyla": result.versions.get("phyla", "")} | asdict(result)
    told["options"] = without_paths(told["options"])
    lines = []
    for key, value in told.items():
        if key in ("scores", "options"):
            rows = value if key == "scores" else [{part: options} for part, options in value.items()]
            inner = ",\n".join("  " + _line(row) if key == "scores" else "  " + _line(row)[1:-1] for row in rows)
            opening, closing = ("[", "]") if key == "scores" else ("{", "}")
            lines.append(f' "{key}": {opening}\n{inner}\n {closing}')
        else:
            lines.append(f' "{key}": {_line(value)}')
    path = folder / result.name / f"seed-{result.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def read_result(path: Path) -> RunResult:
    """Return the result in a file; CorruptFileError where it is none."""
    told = read_json(path)
    if told.get("format") != FORMAT:
        raise CorruptFileError(f"{path} is no result of a run, or of another version of phyla",
                               "delete it, or make it anew: phyla reproduce RECIPE")
    try:
        held = {field.name: told[field.name] for field in fields(RunResult)}
        held |= {"scores": tuple(Scored(**row) for row in held["scores"]), "overrides": tuple(held["overrides"])}
        return RunResult(**held)
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is no result of a run ({error})", "make it anew: phyla reproduce") from error


def read_results(folder: Path, names: Iterable[str] | None = None) -> dict[str, list[RunResult]]:
    """Return the results below a folder by name, ordered by seed; InputError where one name holds different runs."""
    wanted = None if names is None else set(names)
    found: dict[str, list[RunResult]] = {}
    for path in sorted(folder.glob("*/seed-*.json")):
        if wanted is None or path.parent.name in wanted:
            found.setdefault(path.parent.name, []).append(read_result(path))
    for results in found.values():
        results.sort(key=lambda result: result.seed)
        for other in results[1:]:
            check_alike(results[0], other)
    return found


def check_alike(one: RunResult, other: RunResult) -> None:
    """Raise InputError where two results of one name differ in more than their seed.

    An option that one of the two does not know, being made by another version, is no difference.
    """
    for what in ("recipe", "precision"):
        if getattr(one, what) != getattr(other, what):
            raise _differ(one, other, what, getattr(one, what), getattr(other, what))
    mine, theirs = (dict(_flat(without_paths(result.options))) for result in (one, other))
    for key in mine.keys() & theirs.keys():
        if mine[key] != theirs[key] and not key.endswith("random_state"):
            raise _differ(one, other, key, mine[key], theirs[key])


def without_paths(options: Any) -> Any:
    """Return options in which a file or folder is its name alone, as plain JSON."""
    if isinstance(options, Mapping):
        return {str(key): without_paths(value) for key, value in options.items()}
    if isinstance(options, list | tuple):
        return [without_paths(value) for value in options]
    if isinstance(options, str) and PurePath(options).is_absolute():
        return PurePath(options).name
    return options


def _differ(one: RunResult, other: RunResult, what: str, mine: object, theirs: object) -> InputError:
    return InputError(f"results {one.name}: seed {one.seed} has {what}={mine} and seed {other.seed} {theirs}",
                      "give these runs another --name, or another --results folder")


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _line(value: object) -> str:
    return json.dumps(_finite(value), sort_keys=True, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """Return the value with null for what is not a finite number: every reader of JSON takes it."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
