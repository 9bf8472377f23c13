"""What the arguments of a command ask for: which pipeline, in which folder, with whose labels."""

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from phyla.errors import DataNotFoundError, InputError, closest
from phyla.images.folders import default_size, walk
from phyla.images.stored import FileList
from phyla.nets.weights import default_encoder
from phyla.overrides import (
    change,
    from_file,
    with_classes,
    with_encoder,
    with_fast,
    with_refinement,
    with_seed,
    with_size,
)
from phyla.pipeline import Pipeline
from phyla.recipes import RECIPES, recipe
from phyla.recorded import recorded_labels, recorded_pipeline

log = logging.getLogger("phyla")

PHOTOGRAPH = 48
"""Side in pixels from which on pictures are taken for photographs, for which encoders of photographs are good."""


class Asked(NamedTuple):
    """What the arguments of a verb ask for: a pipeline, its folder, and where true labels are from."""

    pipeline: Pipeline
    folder: Path
    labels: str | None


def resolve(what: str, out: Path | None, *, folder_recipe: str | None, classes: str | None, seed: int | None,
            limit: int | None, size: int | None, encoder: str | None, fast: bool, alone: bool,
            changes: Sequence[str], least: float | None = None, refining: bool = False) -> Asked:
    """Return the pipeline of a recipe, TOML file, folder or run, changed as the other arguments say.

    ``least`` is the confidence below which an image is put into no cluster of the tables. ``alone`` says that one
    process takes steps that are not recorded (see ``with_fast``). ``refining`` asks for what the recipe of an imported
    run does after its result (see ``with_refinement``).
    """
    pairs = [as_pair(text) for text in changes]
    path, labels = Path(what), "auto"
    is_folder = what not in RECIPES and path.suffix != ".toml" and not (path / "options.json").exists()
    if folder_recipe is not None and not is_folder:
        raise InputError("--recipe is for a folder or list of images", f"phyla run FOLDER --recipe {folder_recipe}")
    if (path / "options.json").exists():
        pipeline, out, labels = recorded_pipeline(path), out or path, recorded_labels(path) or "none"
        pipeline = with_refinement(pipeline) if refining else pipeline
    elif what in RECIPES:
        pipeline = recipe(what)
    elif path.suffix == ".toml" and path.is_file():
        pipeline = from_file(path)
    elif path.exists():
        if classes is None and "cluster.n_clusters" not in dict(pairs):
            told = shlex.quote(what)
            raise InputError("how many classes to look for is not known",
                             f"phyla run {told} --classes 10, or --classes auto to have the number estimated")
        folder_recipe = folder_recipe or usual_recipe(path, encoder)
        pipeline = _on_folder(recipe(folder_recipe), path)
    else:
        pipeline = _missing(what)
    pipeline = _changed(pipeline, encoder=encoder, size=size, classes=classes, limit=limit, seed=seed)
    if least is not None:
        pipeline = change(pipeline, "evaluate.min_confidence", least)
    if fast:
        pipeline = with_fast(pipeline, alone=alone)
    for key, value in pairs:
        pipeline = change(pipeline, key, value)
    name = pipeline.name
    if is_folder:
        name = f"{path.resolve().name if path.is_dir() else path.stem}-{classes or pipeline.cluster.n_clusters}"
        name += f"-{folder_recipe}" if folder_recipe not in ("frozen-folder", "scan-folder") else ""
    return Asked(pipeline, out or Path("runs") / name, labels)


def usual_recipe(path: Path, encoder: str | None) -> str:
    """Return the recipe for the pictures at ``path``: frozen-folder, or scan-folder where no frozen encoder is of use.

    That is with pictures below ``PHOTOGRAPH`` pixels, and with published checkpoints.
    """
    if encoder is not None:
        return "scan-folder" if is_checkpoint(encoder) else "frozen-folder"
    if path.is_file() and path.suffix.lower() not in (".txt", ".csv", ".tsv"):
        return "scan-folder"  # an array: of what, nobody says
    side = default_size(FileList(walk(path)))
    if side < PHOTOGRAPH:
        log.debug("the pictures are small (%d pixels): an encoder is trained from them; --encoder NAME takes a "
                  "frozen one", side)
        return "scan-folder"
    try:
        default_encoder()
    except DataNotFoundError as missing:
        log.warning("no frozen encoder is at hand, so one is trained from your images, which takes longer and is "
                    "seldom as good. hint: %s", missing.hint)
        return "scan-folder"
    return "frozen-folder"


def is_checkpoint(encoder: str) -> bool:
    """Return whether ``--encoder`` names a file of one of the published systems."""
    return encoder.lower().endswith((".pth.tar", ".t7"))


def _changed(pipeline: Pipeline, *, encoder: str | None, size: int | None, classes: str | None, limit: int | None,
             seed: int | None) -> Pipeline:
    if encoder is not None:
        pipeline = with_encoder(pipeline, encoder)
    if size is not None:
        pipeline = with_size(pipeline, size)
    if classes is not None:
        pipeline = with_classes(pipeline, classes)
    if limit is not None:
        pipeline = change(pipeline, "data.limit", limit)
    return pipeline if seed is None else with_seed(pipeline, seed)


def _on_folder(pipeline: Pipeline, path: Path) -> Pipeline:
    if pipeline.data.source:
        raise InputError(f"recipe {pipeline.name} is made for {pipeline.data.source}", "allowed for a folder: "
                         "frozen-folder, scan-folder, superand-folder")
    return change(pipeline, "data.source", str(path.absolute()))


def as_pair(text: str) -> tuple[str, str]:
    """Return the option and the value of a change as it is typed, ``cluster.lr=0.1``; InputError without a value."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text} has no value", "write --set STAGE.OPTION=VALUE")
    return key.strip(), value.strip()


def _missing(what: str) -> Pipeline:
    if "/" in what or os.sep in what or Path(what).suffix:
        raise DataNotFoundError(f"there is no folder or file {what}", "check the path; quote it if it holds spaces")
    if closest(what, list(RECIPES)) is None:
        raise DataNotFoundError(f"there is no folder, file or recipe {what!r}",
                                "check the name and where you are; phyla list recipes shows the recipes")
    return recipe(what)
