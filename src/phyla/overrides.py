"""Changes laid over a recipe: a dotted name and a value, a TOML file, a seed, a size, an encoder, what a run recorded.

Every name and value is checked against the options' types before any work is done.
"""

import dataclasses
import json
import math
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from phyla.errors import DataNotFoundError, InputError, nearest
from phyla.pipeline import METHODS, CountOptions, CutOptions, Pipeline
from phyla.pretrain.frozen import Frozen
from phyla.recipes import recipe
from phyla.zoo import PublishedClusters, PublishedEncoder

PartT = TypeVar("PartT")

FAST: Mapping[str, Mapping[str, str]] = {"SCAN": {"forwards": "fused"}, "NNM": {"forwards": "fused"},
                                         "RUC": {"forwards": "cheap"}}
"""Options that save time and change values: what the published code passes through the network apart goes in one pass,
what it passes and does not use is left out. Results on digits, beside the published way, are in results/."""

_OPTIONAL = ("refine", "robust", "count", "cut")
_PLAIN: Mapping[str, type] = {"count": CountOptions, "cut": CutOptions}


def from_file(path: Path | str) -> Pipeline:
    """Return the recipe that a TOML file names (``recipe = "scan-cifar10"``), with the file's tables laid over it."""
    path = Path(path)
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataNotFoundError(f"there is no file {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}", 'text is quoted and a number is not: lr = 0.1') from error
    name = told.pop("recipe", None)
    if not isinstance(name, str):
        raise InputError(f"{path} names no recipe", 'start it with: recipe = "scan-cifar10"')
    pipeline = recipe(name)
    for key, value in _flat(told):
        pipeline = change(pipeline, key, value)
    return pipeline


def with_checkpoint(pipeline: Pipeline, path: str) -> Pipeline:
    """Return the pipeline that takes its encoder from a published checkpoint instead of training one.

    The recipe's stem and views stay; a file without a projection needs ``embed.layer=encoder``.
    """
    own = pipeline.pretrain
    if isinstance(own, Frozen):
        raise InputError(f"recipe {pipeline.name} takes frozen encoders, and {path} is a published checkpoint",
                         "phyla run FOLDER --recipe scan-folder --encoder " + path)
    stem = own.stem if isinstance(own, PublishedEncoder) else own.encoder.stem
    return replace(pipeline, pretrain=PublishedEncoder(path=path, stem=stem, views=own.views))


def with_encoder(pipeline: Pipeline, encoder: str) -> Pipeline:
    """Return the pipeline with another encoder: frozen ones by name or file, or that of a published checkpoint.

    A published checkpoint ends in .pth.tar or .t7. A frozen encoder takes the place of one that would be trained; the
    methods that come after must be able to do without (see ``check_pipeline``).
    """
    if encoder.lower().endswith((".pth.tar", ".t7")):
        return with_checkpoint(pipeline, encoder)
    own = pipeline.pretrain
    return replace(pipeline, pretrain=replace(own, encoder=encoder) if isinstance(own, Frozen) else
                   Frozen(encoder=encoder), embed=replace(pipeline.embed, layer="encoder"))


def with_refinement(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline of an imported result with what its recipe does after it; any other as it is."""
    taken = pipeline.cluster
    if not isinstance(taken, PublishedClusters) or pipeline.refine is not None or pipeline.robust is not None:
        return pipeline
    own = recipe(pipeline.name)
    return replace(pipeline, refine=own.refine if taken.fills == "cluster" else None,
                   robust=own.robust if taken.fills != "robust" else None)


def with_classes(pipeline: Pipeline, classes: str) -> Pipeline:
    """Return the pipeline that looks for ``classes``: a number, auto, or bounds between which it is estimated, 5-50."""
    bounds = re.fullmatch(r"\s*(\d+)\s*(?:-|\.\.|to)\s*(\d+)\s*", classes)
    if classes.strip().lower() == "auto" or bounds:
        low, high = (int(bounds[1]), int(bounds[2])) if bounds else (2, None)
        return replace(pipeline, count=CountOptions(low, high, random_state=pipeline.cluster.random_state or 0))
    if not re.fullmatch(r"\s*[+-]?\d+\s*", classes):
        raise InputError(f"--classes {classes} is no number of classes", "--classes 10, --classes auto, --classes 5-50")
    return change(replace(pipeline, count=None), "cluster.n_clusters", classes.strip())


def with_cut(pipeline: Pipeline, n_clusters: int) -> Pipeline:
    """Return the pipeline whose result is cut to ``n_clusters``; to the number it was fitted with is no cut."""
    is_own = n_clusters == pipeline.cluster.n_clusters
    return replace(pipeline, cut=None if is_own else CutOptions(n_clusters))


def with_size(pipeline: Pipeline, size: int) -> Pipeline:
    """Return the pipeline with images stored at ``size`` pixels and views of the same size; cutout keeps its share.

    The grey square of RUC's views keeps its pixels. Frozen encoders are shown images of that size.
    """
    if isinstance(pipeline.pretrain, Frozen):  # it is shown images of any size, and resizes them itself
        return replace(pipeline, pretrain=replace(pipeline.pretrain, size=size))
    pipeline = replace(pipeline, data=replace(pipeline.data, size=size))
    for part in METHODS:
        stage = getattr(pipeline, part)
        if hasattr(stage, "views"):
            fixed = stage.views.kind == "ruc_strong"  # its square has 16 pixels whatever the size, as published
            cutout = stage.views.cutout if fixed else round(stage.views.cutout * size / stage.views.size)
            views = replace(stage.views, size=size, cutout=cutout)
            pipeline = replace(pipeline, **{part: replace(stage, views=views)})
    return pipeline


def from_options(options: Mapping[str, object]) -> Pipeline:
    """Return the pipeline whose ``options()`` these are."""
    pipeline = recipe(str(options["recipe"]))
    told = options.get("methods")
    for part, name in told.items() if isinstance(told, dict) else ():
        if name != type(getattr(pipeline, part)).__name__:
            pipeline = replace(pipeline, **{part: METHODS[part][name]()})
    for part, values in options.items():
        if part == "methods":
            continue
        if part in _OPTIONAL and values is None:
            pipeline = replace(pipeline, **{part: None})  # type: ignore[arg-type]
        elif isinstance(values, dict):
            if part in _PLAIN:
                pipeline = replace(pipeline, **{part: _PLAIN[part]()})
            for key, value in _flat(values, f"{part}."):
                pipeline = change(pipeline, key, value)
    return pipeline


def with_fast(pipeline: Pipeline, *, alone: bool = True) -> Pipeline:
    """Return the pipeline with the options of ``FAST``.

    ``alone`` says that one process takes steps that are not recorded: RUC's can pick rows by their values only then.
    """
    for part in METHODS:
        kind = type(getattr(pipeline, part)).__name__
        for name, value in FAST.get(kind, {}).items() if alone or kind != "RUC" else ():
            pipeline = change(pipeline, f"{part}.{name}", value)
    return pipeline


def with_seed(pipeline: Pipeline, seed: int) -> Pipeline:
    """Return the pipeline with ``random_state=seed`` in every stage that has one."""
    for part in (*METHODS, "count", "evaluate"):
        stage = getattr(pipeline, part)
        if stage is not None and hasattr(stage, "random_state"):
            pipeline = replace(pipeline, **{part: replace(stage, random_state=seed)})
    return pipeline


def change(pipeline: Pipeline, key: str, value: object) -> Pipeline:
    """Return the pipeline with the option ``key`` ("cluster.entropy_weight") set to ``value``.

    ``value`` is a string as typed on a command line, or already of the option's type. A stage's own name sets its
    method ("robust" to "ruc", with that method's defaults), and ``refine=none`` or ``robust=none`` leaves it out.
    """
    if key in _OPTIONAL and str(value).lower() in ("none", "off"):
        return replace(pipeline, **{key: None})  # type: ignore[arg-type]
    if key in METHODS:
        return _with_method(pipeline, key, str(value))
    if "." not in key:
        raise InputError(f"option {key!r} names no stage", "write STAGE.OPTION=VALUE, as in cluster.entropy_weight=2")
    return _changed(pipeline, key.split("."), value, key)


def _with_method(pipeline: Pipeline, part: str, name: str) -> Pipeline:
    """Return the pipeline with another method in a stage: its defaults, on the same images, clusters and seed."""
    known = {method.lower(): kind for method, kind in METHODS[part].items()}
    if name.lower() not in known:
        raise InputError(f"{part}={name} is no method of that stage", nearest(name.lower(), list(known)))
    method, shown = known[name.lower()](), pipeline.pretrain
    kept: dict[str, object] = {}
    if hasattr(method, "views"):
        kept["views"] = replace(method.views, size=shown.views.size, mean=shown.views.mean, std=shown.views.std,
                                flip=shown.views.flip)
    for field, source in (("n_clusters", pipeline.cluster), ("random_state", pipeline.cluster), ("encoder", shown)):
        if hasattr(method, field) and hasattr(source, field):
            kept[field] = getattr(source, field)
    return replace(pipeline, **{part: replace(method, **kept)})


def _changed(part: PartT, names: list[str], value: object, key: str) -> PartT:
    fields = {field.name: field for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    name, *rest = names
    if name not in fields or (name == "name" and isinstance(part, Pipeline)):
        allowed = [known for known in fields if known != "name" or not isinstance(part, Pipeline)]
        raise InputError(f"no option {key!r}: {type(part).__name__} has no {name!r}", nearest(name, allowed))
    if rest:
        inner = getattr(part, name)
        if not dataclasses.is_dataclass(inner):
            raise InputError(f"no option {key!r}: {name} has no parts" if inner is not None else
                             f"no option {key!r}: this recipe has no {name} stage")
        return dataclasses.replace(part, **{name: _changed(inner, rest, value, key)})  # type: ignore[type-var]
    parsed = _parsed(value, get_type_hints(type(part))[name], key)
    return dataclasses.replace(part, **{name: parsed})  # type: ignore[type-var]


def _parsed(value: object, kind: object, key: str) -> object:
    """Return ``value`` as ``kind``, read from text where it is text."""
    if get_origin(kind) in (Union, types.UnionType):
        options = get_args(kind)
        if type(None) in options and (value is None or str(value).lower() in ("none", "")):
            return None
        kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{key}={value} is not allowed", nearest(str(value), [str(o) for o in get_args(kind)]))
        return value
    if get_origin(kind) is tuple:
        parts = value if isinstance(value, list | tuple) else str(value).strip("[]() ").split(",")
        kinds = get_args(kind)
        named = [part.strip() if isinstance(part, str) else part for part in parts]
        named = [part for part in named if part != ""]
        if Ellipsis not in kinds and len(named) != len(kinds):
            raise InputError(f"{key} takes {len(kinds)} values, got {len(named)}", "write them with commas between")
        return tuple(_parsed(part, kinds[0], key) for part in named)
    return _scalar(value, kind, key)


def _scalar(value: object, kind: object, key: str) -> object:
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "on": True,
                    "false": False, "0": False, "no": False, "off": False}[str(value).lower()]
        if kind is int:
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            return int(value)  # type: ignore[call-overload]
        if kind is float:
            number = float(value)  # type: ignore[arg-type]
            if not math.isfinite(number):
                raise ValueError
            return number
        if kind is str:
            return str(value)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{key}={value} is not {_WORDS.get(kind, 'allowed')}") from error
    raise InputError(f"{key} cannot be set as one value", f"set one of its parts: {key}.NAME={json.dumps(value)}")


_WORDS: Mapping[object, str] = {bool: "true or false", int: "a whole number", float: "a number"}


def _flat(table: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for key, value in table.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
