"""A published checkpoint becomes a classifier, an encoder, or, as a recipe whose result it is, a run folder.

Nothing is fitted, and no image is needed. The run of an imported file is like any other: its stages are made from the
file when the images are at hand.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, cast

from phyla.checkpoints import CHECKPOINTS, expected_of
from phyla.classifier import Classifier
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.tsuc import TSUC
from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.nets.resnet import Stem
from phyla.pipeline import Pipeline
from phyla.pretrain.simclr import SimCLR
from phyla.pretrain.superand import SuperAND
from phyla.recipes import recipe
from phyla.recipes.settings import CIFAR10, CIFAR100, CIFAR100_SUPERAND, IMAGENET
from phyla.refine.ruc import RUC
from phyla.refine.selflabel import SelfLabel
from phyla.rundir import OPTIONS, PUBLISHED, save_encoder
from phyla.runner import Runner
from phyla.storage import atomic, storage_error, write_array, write_json
from phyla.zoo import Fills, Kind, Published, PublishedClusters, PublishedEncoder, StemError, load_published


class _Form(NamedTuple):
    """What a kind of file is, and the stage of a recipe that it stands for: one of these methods is there."""

    title: str
    part: str
    methods: tuple[type, ...]


_FORMS: dict[Kind, _Form] = {
    "pretext": _Form("a SimCLR encoder", "pretrain", (SimCLR, PublishedEncoder)),
    "moco": _Form("MoCo's encoder", "pretrain", (PublishedEncoder,)),
    "superand": _Form("a Super-AND or AND encoder", "pretrain", (SuperAND,)),
    "scan": _Form("a clustering by SCAN or NNM", "cluster", (SCAN, NNM)),
    "tsuc": _Form("a clustering by TSUC", "cluster", (TSUC,)),
    "selflabel": _Form("a self-labelled clustering", "refine", (SelfLabel,)),
    "ruc": _Form("a clustering by RUC", "robust", (RUC,)),
}


def import_run(path: Path, name: str, out: Path, *, encoder: Path | None = None, head: int | None = None,
               stem: str | None = None) -> dict[str, object]:
    """Make ``out`` a run folder of the recipe ``name`` whose result is the checkpoint at ``path``; return what it was.

    The file is copied into the folder. Where it has heads, ``phyla predict`` works at once; what needs images is made
    when a command asks for it.

    Parameters
    ----------
    encoder : another file, whose encoder makes embeddings and neighbors in place of that in ``path``
    head : of several; None takes the one that the file names, else the one with the lowest label-free score
    stem : only checked: the recipe says it

    Raises
    ------
    InputError
        File and recipe do not agree in kind, stem or number of classes, or the folder holds a run.
    """
    pipeline, path = recipe(name), path.expanduser()
    found = _loaded(path, pipeline, stem)
    part = _part(path, found, pipeline)
    if found.heads is None and (head is not None or encoder is not None):
        given = f"--head {head}" if head is not None else f"--encoder {encoder}"
        raise InputError(f"{path} has no cluster heads", f"leave out {given}")
    if head is not None:
        found.net(head)  # refuses one that is not there
    notes = [*map(str, found.facts["notes"]), *_differences(found, pipeline)]  # type: ignore[call-overload]
    about = f"{path.name}, published weights with nothing fitted here; {_expected(name, found.kind)}"
    pipeline = _taken(pipeline, path, found, part, head, about)
    if encoder is not None:
        pipeline, more = _with_encoder(pipeline, encoder.expanduser())
        notes += more
    elif found.heads is not None:
        notes.append("neighbors are of this encoder's own embeddings; --encoder FILE takes those of the pretext")
    pipeline = _kept_in(out, pipeline)
    has_classifier = _write_classifier(out, pipeline, path, found, head)
    write_json(out / OPTIONS, {"options": pipeline.options(), "labels": "auto"})
    return {"run": str(out), "recipe": name, "kind": found.kind, "stage": part,
            "encoder": asdict(found.encoder.spec), **found.facts, "notes": notes,
            "head": found.head if head is None else head, "expected": _expected(name, found.kind),
            "next": f"phyla evaluate {out}" + (f", or phyla predict {out} FOLDER" if has_classifier else "")}


def recipes_for(found: Published) -> list[str]:
    """Return the recipes of public files as whose result ``found`` can be imported: of its kind, stem and classes."""
    names = dict.fromkeys(each.recipe for known in CHECKPOINTS.values() for each in known.expected if each.recipe)
    return [name for name in names if _stem(recipe(name)) == found.encoder.spec.stem
            and _fault(found, recipe(name)) is None]


# ---- does the file fit ----------------------------------------------------------------------------------------------


def _stem(pipeline: Pipeline) -> Stem | None:
    method = pipeline.pretrain
    if isinstance(method, PublishedEncoder):
        return method.stem
    return method.encoder.stem if isinstance(method, SimCLR | SuperAND) else None


def _loaded(path: Path, pipeline: Pipeline, stem: str | None) -> Published:
    wanted = _stem(pipeline)
    if wanted is None:
        raise InputError(f"recipe {pipeline.name} takes frozen encoders and no published checkpoint",
                         "phyla list checkpoints shows recipes that do")
    if stem is not None and stem != wanted:
        raise InputError(f"--stem {stem} is not that of recipe {pipeline.name}, {wanted}", "leave --stem out")
    try:
        return load_published(path, stem=wanted)
    except StemError as error:
        raise InputError(f"recipe {pipeline.name} has another stem: {error.message}",
                         "phyla list checkpoints shows which recipe is of which file") from error


def _part(path: Path, found: Published, pipeline: Pipeline) -> str:
    """Return the stage of the recipe that the file stands for; InputError where there is none."""
    fault = _fault(found, pipeline)
    if fault is not None:
        others = recipes_for(found)
        raise InputError(f"{path} {fault}", f"--as {' or '.join(others)}" if others else
                         "no recipe of a public file fits it; leave --as out for a classifier or an encoder")
    return _FORMS[found.kind].part if _has_stage(found.kind, pipeline) else "cluster"


def _fault(found: Published, pipeline: Pipeline) -> str | None:
    form, n_clusters = _FORMS[found.kind], pipeline.cluster.n_clusters
    # One head without a note of which is best is what self-labelling leaves, and what others may.
    is_one_head = found.kind == "selflabel" and pipeline.refine is None and isinstance(pipeline.cluster, SCAN | NNM)
    if not _has_stage(found.kind, pipeline) and not is_one_head:
        return f"is {form.title}, and recipe {pipeline.name} has none"
    if found.heads is not None and found.heads.n_clusters != n_clusters:
        return f"has {found.heads.n_clusters} clusters, and recipe {pipeline.name} {n_clusters} classes"
    return None


def _has_stage(kind: Kind, pipeline: Pipeline) -> bool:
    return isinstance(getattr(pipeline, _FORMS[kind].part), _FORMS[kind].methods)


def _differences(found: Published, pipeline: Pipeline) -> list[str]:
    own = getattr(pipeline.pretrain, "encoder", None)
    spec = replace(found.encoder.spec, members=1)
    if own is None or own == spec:
        return []
    told = ", ".join(f"{name} {value} and not {getattr(own, name)}" for name, value in asdict(spec).items()
                     if value != getattr(own, name))
    return [f"the network is not the recipe's: {told}"]


def _expected(name: str, kind: Kind) -> str:
    known = expected_of(name, kind)
    if not known:
        return "no score is known of such a file"
    return "the authors' file should give: " + " | ".join(each.text() for each in known)


# ---- the run folder -------------------------------------------------------------------------------------------------


def _taken(pipeline: Pipeline, path: Path, found: Published, part: str, head: int | None, about: str) -> Pipeline:
    """Return the recipe with the stages up to ``part`` taken from the file, and none after it where it has clusters."""
    has_heads, stem = found.heads is not None, found.encoder.spec.stem
    views = pipeline.pretrain.views
    if found.kind == "ruc" and stem == "stl":
        views = replace(views, mean=CIFAR10[0], std=CIFAR10[1])  # what RUC's release shows its networks of STL-10
    cluster = pipeline.cluster
    if has_heads:
        fills = cast(Fills, part)
        cluster = PublishedClusters(n_clusters=cluster.n_clusters, path=str(path), stem=stem, head=head, fills=fills,
                                    views=views.plain(), result=pipeline.title(fills), about=about)
    layer = pipeline.embed.layer if found.projection is not None else "encoder"
    split = pipeline.data.pretrain_split if found.memory is not None else None  # of no use but to its memory
    pretrain = PublishedEncoder(path=str(path), stem=stem, views=views, about="" if has_heads else about)
    return replace(pipeline, pretrain=pretrain, cluster=cluster, embed=replace(pipeline.embed, layer=layer),
                   data=replace(pipeline.data, pretrain_split=split),
                   refine=None if has_heads else pipeline.refine, robust=None if has_heads else pipeline.robust)


def _with_encoder(pipeline: Pipeline, path: Path) -> tuple[Pipeline, list[str]]:
    """Return an imported pipeline whose embeddings are of another file's encoder, and notes on it."""
    own = recipe(pipeline.name)
    pretext = _loaded(path, own, None)
    layer = own.embed.layer if pretext.projection is not None else "encoder"
    taken = PublishedEncoder(path=str(path), stem=pretext.encoder.spec.stem, views=own.pretrain.views)
    notes = [f"neighbors are of the embeddings of {path.name}, {_FORMS[pretext.kind].title}"]
    return replace(pipeline, pretrain=taken, embed=replace(pipeline.embed, layer=layer)), notes


def _kept_in(out: Path, pipeline: Pipeline) -> Pipeline:
    """Claim ``out`` as the run's folder, copy the files into it, and return the pipeline that reads them there."""
    if (out / "run.json").exists() or any(out.glob("stages/*/done.json")):
        raise InputError(f"{out} holds a run", "choose another --out; nothing was changed")
    Runner(pipeline, out)
    kept: dict[str, Path] = {}
    for part in ("cluster", "pretrain"):
        method = getattr(pipeline, part)
        if isinstance(method, PublishedClusters | PublishedEncoder):
            source = method.checkpoint()
            taken = kept.get(source.name, source)
            name = source.name if taken.samefile(source) else f"encoder-{source.name}"
            kept[name] = source
            path = str((out / PUBLISHED / name).absolute())
            pipeline = replace(pipeline, **{part: replace(method, path=path)})
    _copy(kept, out / PUBLISHED)
    return pipeline


def _copy(files: dict[str, Path], folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        for name, source in files.items():
            target = folder / name
            if target.exists() and target.samefile(source):
                continue
            with atomic(target) as temporary:
                shutil.copyfile(source, temporary)
            shutil.copystat(source, target)  # by size and time a stage knows its file
        for old in folder.iterdir():
            if old.name not in files:
                old.unlink()
    except OSError as error:
        raise storage_error(folder, error) from error


def _write_classifier(out: Path, pipeline: Pipeline, path: Path, found: Published, head: int | None) -> bool:
    """Put the classifier at the top of the folder, where one head is known; return whether one is."""
    for name in ("model.json", "model.safetensors"):
        (out / name).unlink(missing_ok=True)  # of an earlier import
    taken = found.head if head is None else head
    if found.heads is None or taken is None or not isinstance(pipeline.cluster, PublishedClusters):
        return False
    views = pipeline.cluster.views
    facts: dict[str, object] = {"recipe": pipeline.name, "source": pipeline.data.source, "imported": path.name,
                                "kind": found.kind, "head": taken}
    Classifier(found.net(taken), views, pipeline.data.size or views.size, facts=facts).save(out)
    return True


# ---- without a recipe -----------------------------------------------------------------------------------------------


def import_checkpoint(path: Path, out: Path, stem: str | None, *, head: int | None = None) -> dict[str, object]:
    """Write a published checkpoint as a classifier (it has heads) or as an encoder; return what it was.

    ``head`` is needed where a file has several and does not name the best, as TSUC's do.
    """
    found = load_published(path, stem=stem)  # type: ignore[arg-type]
    facts: dict[str, object] = {"kind": found.kind, "encoder": asdict(found.encoder.spec), **found.facts,
                                "recipes": recipes_for(found)}
    cifar100 = CIFAR100_SUPERAND if found.kind == "tsuc" else CIFAR100  # their deviations differ
    cifar = cifar100 if found.facts["n_clusters"] in (20, 100) else CIFAR10
    stl = CIFAR10 if found.kind == "ruc" else IMAGENET  # RUC's release shows STL-10 with CIFAR-10's mean and deviation
    sizes = {"cifar": (32, cifar), "stl": (96, stl), "imagenet": (224, IMAGENET)}
    size, norm = sizes[found.encoder.spec.stem]
    views = Views("plain", size, *norm)
    if found.heads is None:
        if head is not None:
            raise InputError(f"{path} has no cluster heads", f"leave out --head {head}")
        save_encoder(out, found.encoder, found.projection)
        if found.memory is not None:
            write_array(out / "memory.npy", found.memory)
            facts |= {"memory": str(out / "memory.npy")}
        return facts | {"written": str(out / "encoder.safetensors")}
    size = 256 if size == 224 else size  # stored, then cropped
    net = found.net(head)
    taken = found.head if head is None else head
    Classifier(net, views, size, facts={"imported": path.name, "kind": found.kind, "head": taken}).save(out)
    return facts | {"head": taken, "written": str(out / "model.safetensors")}
