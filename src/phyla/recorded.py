"""What a run folder says it was: its pipeline, where its true labels were from, and what made it."""

import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import phyla
from phyla.errors import InputError
from phyla.images.catalog import data_set_name
from phyla.overrides import from_options
from phyla.pipeline import Pipeline
from phyla.rundir import OPTIONS, PUBLISHED, RunDir
from phyla.storage import read_json
from phyla.zoo import Taken


def recorded_pipeline(run: Path) -> Pipeline:
    """Return the pipeline whose result a run folder shows; of one that shows none yet, as it was last given."""
    return recorded(run)[0]


def recorded_labels(run: Path) -> str | None:
    """Return where the true labels of ``recorded_pipeline`` are from; None for none."""
    return recorded(run)[1]


def recorded(run: Path) -> tuple[Pipeline, str | None]:
    """Return both; InputError where there is no run, or one that this version cannot read."""
    if not (run / OPTIONS).exists():
        raise InputError(f"{run} is not a run folder", "give the folder of a run, such as runs/scan-digits")
    shown = run / "run.json"  # a later command that failed must not change what the folder is
    held = read_json(shown if shown.exists() else run / OPTIONS)
    try:
        return _at_home(from_options(held["options"]), run), held["labels"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{run} is not of this version of phyla ({error})",
                         "give the recipe again") from error


def from_anywhere(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with its paths made absolute: the run is opened from other folders, too."""
    pipeline = _with_files(pipeline, lambda path: absolute(path) or "")
    source = pipeline.data.source
    if not source or data_set_name(source) is not None:
        return pipeline
    return replace(pipeline, data=replace(pipeline.data, source=absolute(source) or source))


def _at_home(pipeline: Pipeline, run: Path) -> Pipeline:
    """Return the pipeline with published files taken from the run folder, should it have been moved with them."""
    def found(path: str) -> str:
        kept = run / PUBLISHED / Path(path).name
        return str(kept.absolute()) if not Path(path).exists() and kept.exists() else path

    return _with_files(pipeline, found)


def _with_files(pipeline: Pipeline, where: Callable[[str], str]) -> Pipeline:
    for part in ("pretrain", "cluster"):
        method = getattr(pipeline, part)
        if isinstance(method, Taken) and method.path:
            pipeline = replace(pipeline, **{part: replace(method, path=where(method.path))})
    return pipeline


def absolute(path: str | None) -> str | None:
    """Return a path as it is from any folder; None for none."""
    return None if path in (None, "none") else str(Path(path).expanduser().absolute())


def facts(pipeline: Pipeline, run: RunDir, *, command: Sequence[str], labels: str | None,
          n_images: Mapping[str, int]) -> dict[str, Any]:
    """Return what run.json says of a run: command, options, versions, machine, and the stages it has."""
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn", "pillow")}
    return {"command": list(command), "options": pipeline.options(), "device": run.device, "labels": labels,
            "versions": {"phyla": phyla.__version__, "python": platform.python_version()} | packages,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "n_images": dict(n_images),
            "stages": {name: {"key": stage.key, "seconds": stage.facts["seconds"], "device": stage.facts["device"]}
                       for name, stage in run.stages.items()}}


def brief(told: Mapping[str, Any]) -> dict[str, object]:
    """Return what the report shows of ``facts``."""
    options = told["options"]
    return {"recipe": options["recipe"], "command": shlex.join(told["command"]),
            "seed": options["cluster"]["random_state"], "device": told["device"], "machine": told["machine"],
            "seconds": {name: stage["seconds"] for name, stage in told["stages"].items()},
            "versions": told["versions"], "options": options}
