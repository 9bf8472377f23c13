"""Named pipelines. Each function's docstring is its experiment card: paper, command, cost, expected number.

A user's changes are laid over a recipe by ``change``: a dotted name and a value, checked against the options' types.
"""

import dataclasses
import json
import math
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from phyla.cluster.scan import SCAN
from phyla.errors import DataNotFoundError, InputError, nearest
from phyla.images.augment import STRONG, Views
from phyla.nets.resnet import EncoderSpec, Stem
from phyla.pipeline import Data, EmbedOptions, NeighborOptions, Pipeline
from phyla.pretrain.simclr import SimCLR
from phyla.refine.selflabel import SelfLabel
from phyla.zoo import PublishedEncoder

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of the channels, on the scale 0 to 1."""

CIFAR10: Normalization = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100: Normalization = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS: Normalization = ((0.3, 0.3, 0.3), (0.37, 0.37, 0.37))

DIGIT_OPERATIONS = tuple(name for name in STRONG if name not in ("color", "solarize", "equalize"))
"""Strong operations for small grey digits: without those that do nothing to grey or turn ink into paper."""


def scan_digits() -> Pipeline:
    """Cluster scikit-learn's 1,797 handwritten digits (8x8): the demonstration, and the quickest check of everything.

    Paper: SCAN's stages (van Gansbeke et al. 2020) at a small size; the settings are ours.
    Command: phyla run            Cost: minutes on two cores.
    Expected: see results/scan-digits.json; k-means on pixels 0.793.
    """
    crops = Views("simclr", 8, *DIGITS, flip=0.0, crop_scale=(0.5, 1.0), saturation=0.0, hue=0.0, grey=0.0)
    strong = Views("strong", 8, *DIGITS, flip=0.0, rotate=15.0, cutout=2, operations=DIGIT_OPERATIONS)
    return Pipeline(
        name="scan-digits",
        data=Data("digits"),
        pretrain=SimCLR(encoder=EncoderSpec(width=32), views=crops, temperature=0.5, n_epochs=80,
                        batch_size=256, lr=0.3),
        embed=EmbedOptions(layer="encoder"),
        cluster=SCAN(n_clusters=10, views=strong, n_epochs=25, batch_size=128, lr=1e-3),
        refine=SelfLabel(views=strong, threshold=0.95, n_epochs=30, batch_size=256),
    )


def scan_cifar10() -> Pipeline:
    """Cluster CIFAR-10 as published.

    Paper: SCAN, 50,000 training images, scored on the 10,000 test images.
    Command: phyla run scan-cifar10            Cost: 2.3e17 FLOP; a GPU.
    Expected (authors, mean of 10 runs on one pretext): SCAN 81.8 +- 0.3, self-label 87.6 +- 0.4.
    """
    return _small("scan-cifar10", "cifar10", 10, "cifar", CIFAR10, size=32)


def scan_cifar20() -> Pipeline:
    """Cluster CIFAR-100's images into its 20 super-classes as published.

    Paper: SCAN (where it is called CIFAR100-20).
    Command: phyla run scan-cifar20            Cost: 2.4e17 FLOP; a GPU.
    Expected (authors, mean of 10 runs): SCAN 42.2 +- 3.0, self-label 45.9 +- 2.7.
    """
    return _small("scan-cifar20", "cifar20", 20, "cifar", CIFAR100, size=32, scan_batch=512, scan_epochs=100)


def scan_stl10() -> Pipeline:
    """Cluster STL-10 as published: the encoder learns from 105,000 images, 5,000 are clustered.

    Paper: SCAN, 96x96, scored on the 8,000 test images.
    Command: phyla run scan-stl10            Cost: 9.4e17 FLOP; a GPU.
    Expected (authors, mean of 10 runs): SCAN 75.5 +- 2.0, self-label 76.7 +- 1.9.
    """
    return _small("scan-stl10", "stl10", 10, "stl", IMAGENET, size=96, cutout=32, scan_epochs=100, self_epochs=100,
                  pretrain_split="train+unlabeled")


def scan_imagenet50() -> Pipeline:
    """Cluster 50 ImageNet classes from a MoCo v2 encoder that is not trained further in stage 2.

    Paper: SCAN; options as published, crops taken from the central square instead of the oblong picture. Needs
    moco_v2_800ep_pretrain.pth.tar: found in PHYLA_DATA, or named with --set pretrain.path=FILE.
    Command: phyla run scan-imagenet50 --set pretrain.path=FILE            Cost: 1.1e17 FLOP and self-labelling; a GPU.
    Expected (authors, best run): SCAN 75.1, self-label 76.8.
    """
    return _imagenet("scan-imagenet50", "imagenet50", 50, batch=512)


def scan_imagenet100() -> Pipeline:
    """Cluster 100 ImageNet classes; see scan-imagenet50.

    Expected (authors, best run): SCAN 66.2, self-label 68.9.
    """
    return _imagenet("scan-imagenet100", "imagenet100", 100, batch=1024)


def scan_imagenet200() -> Pipeline:
    """Cluster 200 ImageNet classes; see scan-imagenet50.

    Expected (authors, best run): SCAN 56.3, self-label 58.1.
    """
    return _imagenet("scan-imagenet200", "imagenet200", 200, batch=1024)


def scan_imagenet1000() -> Pipeline:
    """Cluster all of ImageNet with the heads alone; the authors publish no configuration but describe one.

    Batch 4096, learning rate 5, 50 neighbors; self-labelling "does not help" there and is left out.
    Expected (authors, best run): SCAN 39.9.
    """
    return replace(_imagenet("scan-imagenet1000", "imagenet", 1000, batch=4096), refine=None)


def scan_folder() -> Pipeline:
    """Cluster anyone's images, trained from scratch at a small size that two cores can carry.

    Command: phyla run FOLDER --classes 10            Cost: minutes for a thousand images on two cores.
    The settings are ours: a ResNet-18 of half width with an ImageNet stem, 64 pixels.
    """
    simclr = Views("simclr", 64, *IMAGENET)
    strong = Views("strong", 64, *IMAGENET, cutout=21)
    return Pipeline(
        name="scan-folder",
        data=Data("", size=64),
        pretrain=SimCLR(encoder=EncoderSpec(stem="imagenet", width=32), views=simclr, n_epochs=100, batch_size=256,
                        lr=0.3),
        cluster=SCAN(views=strong, n_epochs=30, batch_size=128, lr=3e-4),
        refine=SelfLabel(views=strong, n_epochs=30, batch_size=256, lr=3e-4),
        neighbors=NeighborOptions(n_neighbors=None),
    )


def _small(name: str, source: str, n_clusters: int, stem: Stem, norm: Normalization, *, size: int,
           cutout: int = 16, scan_batch: int = 128, scan_epochs: int = 50, self_epochs: int = 200,
           pretrain_split: str | None = None) -> Pipeline:
    strong = Views("strong", size, *norm, cutout=cutout)
    return Pipeline(
        name=name,
        data=Data(source, held_out="test", pretrain_split=pretrain_split),
        pretrain=SimCLR(encoder=EncoderSpec(stem=stem), views=Views("simclr", size, *norm)),
        cluster=SCAN(n_clusters=n_clusters, views=strong, n_epochs=scan_epochs, batch_size=scan_batch),
        refine=SelfLabel(views=strong, n_epochs=self_epochs, keep="last"),
    )


def _imagenet(name: str, source: str, n_clusters: int, *, batch: int) -> Pipeline:
    simclr = Views("simclr", 224, *IMAGENET)
    return Pipeline(
        name=name,
        data=Data(source, held_out="val", size=256),
        pretrain=PublishedEncoder(stem="imagenet", views=simclr),
        embed=EmbedOptions(layer="encoder"),
        neighbors=NeighborOptions(n_neighbors=50),
        cluster=SCAN(n_clusters=n_clusters, n_heads=10, views=simclr, update="heads", optimizer="sgd", lr=5.0,
                     weight_decay=0.0, n_epochs=100, batch_size=batch),
        refine=SelfLabel(views=Views("strong", 224, *IMAGENET, cutout=75), balanced=False, ema="write_back",
                         optimizer="sgd", lr=0.03, weight_decay=0.0, n_epochs=25, batch_size=512,
                         keep="last"),
    )


PartT = TypeVar("PartT")

RECIPES: Mapping[str, Callable[[], Pipeline]] = {
    function.__name__.replace("_", "-"): function for function in (
        scan_digits, scan_cifar10, scan_cifar20, scan_stl10, scan_imagenet50, scan_imagenet100, scan_imagenet200,
        scan_imagenet1000, scan_folder)
}


def recipe(name: str) -> Pipeline:
    """Return the pipeline called ``name``; InputError with the nearest name when there is none."""
    if name not in RECIPES:
        raise InputError(f"no recipe {name!r}", nearest(name, list(RECIPES)))
    return RECIPES[name]()


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


_PRETRAIN: Mapping[str, type[SimCLR] | type[PublishedEncoder]] = {"SimCLR": SimCLR,
                                                                  "PublishedEncoder": PublishedEncoder}


def with_checkpoint(pipeline: Pipeline, path: str) -> Pipeline:
    """Return the pipeline that takes its encoder from a published checkpoint instead of training one.

    The recipe's stem and views stay; a file without a projection needs ``embed.layer=encoder``.
    """
    own = pipeline.pretrain
    stem = own.stem if isinstance(own, PublishedEncoder) else own.encoder.stem
    return replace(pipeline, pretrain=PublishedEncoder(path=path, stem=stem, views=own.views))


def with_size(pipeline: Pipeline, size: int) -> Pipeline:
    """Return the pipeline with images stored at ``size`` pixels and views of the same size; cutout keeps its share."""
    pipeline = replace(pipeline, data=replace(pipeline.data, size=size))
    for part in ("pretrain", "cluster", "refine"):
        stage = getattr(pipeline, part)
        if stage is not None:
            views = replace(stage.views, size=size, cutout=round(stage.views.cutout * size / stage.views.size))
            pipeline = replace(pipeline, **{part: replace(stage, views=views)})
    return pipeline


def from_options(options: Mapping[str, object]) -> Pipeline:
    """Return the pipeline whose ``options()`` these are."""
    pipeline = recipe(str(options["recipe"]))
    told = options.get("methods")
    if isinstance(told, dict) and told.get("pretrain") != type(pipeline.pretrain).__name__:
        pipeline = replace(pipeline, pretrain=_PRETRAIN[str(told.get("pretrain"))]())
    for part, values in options.items():
        if part == "methods":
            continue
        if part == "refine" and values is None:
            pipeline = replace(pipeline, refine=None)
        elif isinstance(values, dict):
            for key, value in _flat(values, f"{part}."):
                pipeline = change(pipeline, key, value)
    return pipeline


def with_seed(pipeline: Pipeline, seed: int) -> Pipeline:
    """Return the pipeline with ``random_state=seed`` in every stage that has one."""
    for part in ("pretrain", "cluster", "refine", "evaluate"):
        stage = getattr(pipeline, part)
        if stage is not None and "random_state" in {field.name for field in dataclasses.fields(stage)}:
            pipeline = replace(pipeline, **{part: replace(stage, random_state=seed)})
    return pipeline


def change(pipeline: Pipeline, key: str, value: object) -> Pipeline:
    """Return the pipeline with the option ``key`` ("cluster.entropy_weight") set to ``value``.

    ``value`` is a string as typed on a command line, or already of the option's type. ``refine=none`` leaves it out.
    """
    if key == "refine" and str(value).lower() in ("none", "off"):
        return replace(pipeline, refine=None)
    if "." not in key:
        raise InputError(f"option {key!r} names no stage", "write STAGE.OPTION=VALUE, as in cluster.entropy_weight=2")
    return _changed(pipeline, key.split("."), value, key)


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
