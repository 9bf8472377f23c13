"""Carry out a pipeline in a run folder: stages in order, those whose options and inputs are unchanged kept.

Labels are read once, in the evaluate stage, and reach nothing but scores and the report.
"""

import logging
import os
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import phyla
from phyla import stages
from phyla.classifier import Classifier
from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.embed import embed
from phyla.errors import InputError
from phyla.evaluate.robustness import load_robustness, robustness_report, save_robustness
from phyla.evaluate.scorecard import Bank, Split, fill_scorecard
from phyla.evaluate.truth import Truth, true_labels
from phyla.images.catalog import data_set_name
from phyla.images.folders import is_there
from phyla.images.sources import Loaded, open_images
from phyla.index import choose_index
from phyla.pipeline import PARTS, RESULTS, STAGES, Pipeline, Refiner, ResultStage, StageName
from phyla.pretrain.simclr import SimCLR
from phyla.recorded import recorded
from phyla.report.page import ReportInput, build_report
from phyla.rundir import (
    OPTIONS,
    RunDir,
    Stage,
    load_assignment,
    load_embeddings,
    load_neighbors,
    load_records,
    save_embeddings,
    save_neighbors,
)
from phyla.storage import array_fingerprint, read_json, write_json
from phyla.top import Top
from phyla.training.agreement import by_first, first_then_others, on_all
from phyla.training.device import Device, choose_device
from phyla.types import Assignment, Embeddings, ImageSet, Neighbors, Scores
from phyla.zoo import PublishedEncoder, checkpoint_stamp

log = logging.getLogger("phyla")

ROBUSTNESS = "robustness.json"
TOGETHER = ("pretrain", "embed", "cluster", "refine", "robust")
"""The stages in which a network is run over images: all processes share them. The first alone does the others."""


@dataclass(frozen=True)
class Result:
    """What a run left behind: its folder, the table of scores, the decisions it took, and whether it did anything."""

    path: Path
    scores: tuple[Scores, ...]
    notices: tuple[str, ...]
    n_images: int
    did_work: bool


class Runner:
    """Carries out ``pipeline`` in the folder ``out``.

    Parameters
    ----------
    device : where to compute, and with which other processes: each carries out the same, and the first one writes
    data_dir : where data sets are looked for first
    labels : auto: the data set's own; folders: the first folder of each id; or a CSV file; None or none: none at all
    strict : stop at the first image that cannot be read, instead of leaving it out
    download : fetch a missing data set when the network allows
    command : what the user typed, for run.json
    """

    def __init__(self, pipeline: Pipeline, out: Path | str, *, device: Device | None = None,
                 data_dir: Path | None = None, labels: str | None = "auto", strict: bool = False, download: bool = True,
                 command: Sequence[str] = ()) -> None:
        self.pipeline, self.device = _from_anywhere(pipeline), device or choose_device()
        self.data_dir, self.strict, self.download = data_dir, strict, download
        self.labels = labels if labels in ("auto", "folders") else _absolute(labels)
        self.command = list(command)
        on_all(self.device.group, self._validate)
        source = self.pipeline.data.source
        where = data_set_name(source) or (str(Path(source).resolve()) if is_there(Path(source)) else source)
        self.run = RunDir(out, {"format": 1, "recipe": pipeline.name, "source": where},
                          group=self.device.group)
        self.run.device = self.device.label
        self.notices: list[str] = []

    def rebuild_report(self) -> Result:
        """Score and write the report again from what the run made, and return what there is; trains nothing."""
        self.run.may_make = {"evaluate", "report"}
        self.run.remake = {"report"}
        return self.go()

    def go(self, until: StageName = "report") -> Result:
        """Do every stage up to ``until`` that is not done yet, and return what there is."""
        self._images()
        wanted = STAGES[1 : STAGES.index(until) + 1]
        by_first(self.device.group, lambda: self._begin(wanted))
        for name in wanted:
            make: Callable[[], None] = getattr(self, f"_{name}")
            if name in TOGETHER or self.device.group.size == 1:
                make()
            else:
                self._by_first(name, make)
        return by_first(self.device.group, lambda: self._end(until))

    def _begin(self, wanted: Sequence[str]) -> None:
        if "evaluate" in wanted:  # a table of labels that cannot be read is told before the work, not after it
            self.truth("train")
        write_json(self.run.path / OPTIONS, {"options": self.pipeline.options(), "labels": self.labels})

    def _by_first(self, name: str, make: Callable[[], None]) -> None:
        """Do a stage in the first process while the others wait; then all know of it."""
        def made() -> Stage:
            make()
            return self.run.stages[name]

        self.run.stages[name] = by_first(self.device.group, made)

    def _end(self, until: StageName) -> Result:
        """Show at the top of the folder what there is, and return it."""
        stages = self.run.stages.values()
        did = any(not stage.was_kept for stage in stages)
        for stage in stages:
            log.info("%-9s %s", stage.name, "unchanged, kept" if stage.was_kept else f"{stage.facts['seconds']} s")
        self.notices = self._all_notices()
        last = self._last if "cluster" in self.run.stages else None
        top = Top(self.run, [name for name, _ in self._splits()], last)
        if did or not top.is_shown(whole=until == STAGES[-1]):
            top.show(self._facts() | {"notices": self.notices}, self._curves())
        else:
            log.info("nothing to do: every stage of this run is already there, in %s", self.run.path)
        return Result(self.run.path, self.scores, tuple(self.notices), len(self.train), did)

    # ---- stages, in order ---------------------------------------------------------------------------------------

    def _images(self) -> None:
        n_images, n_clusters = len(self.train), self.pipeline.cluster.n_clusters
        if n_images < 2:
            raise InputError("one image is too few to find classes in", "add images")
        if n_images < n_clusters:
            raise InputError(f"{n_images} images are fewer than the {n_clusters} classes asked for",
                             "lower --classes or add images")

    def _pretrain(self) -> None:
        method = self.pipeline.pretrain
        images = self.pretrain_images
        options = {"method": type(method).__name__} | asdict(method)

        def make(folder: Path) -> dict[str, object]:
            return stages.pretrain(method, images, device=self.device, folder=folder)

        inputs = [images.fingerprint]
        if isinstance(method, PublishedEncoder):
            inputs += [checkpoint_stamp(method.checkpoint())]
        self.run.stage("pretrain", options, inputs, make, group=self.device.group)

    def _embed(self) -> None:
        options = asdict(self.pipeline.embed) | {"views": asdict(self.pipeline.pretrain.views.plain())}

        def make(folder: Path) -> dict[str, object]:
            net = stages.embedder(self._folder("pretrain"), self.pipeline.embed.layer)
            views = self.pipeline.pretrain.views.plain()
            for name, images in self._splits():
                found = embed(images, net, views, device=self.device, folder=folder / f".{name}.shards")
                if self.device.group.is_first:  # the others' copy would go at once, and may be large
                    save_embeddings(folder, found, name)
            return {}

        self.run.stage("embed", options, [self._key("pretrain"), *self._image_keys()], make,
                       group=self.device.group)

    def _neighbors(self) -> None:
        n_train, options = self._n_neighbors(len(self.train)), self.pipeline.neighbors

        def make(folder: Path) -> dict[str, object]:
            facts: dict[str, object] = {"n_neighbors": n_train}
            for name, images in self._splits():
                wanted = n_train if name == "train" else min(options.n_held_out, len(images) - 1)
                found, indexed = stages.find(self.embeddings(name), wanted, options, device=self.device.device)
                save_neighbors(folder, found, name)
                if indexed is not None and name == "train":
                    facts |= {"recall": indexed.recall, "notices": [indexed.notice]}
            return facts

        told: dict[str, object] = {"n_neighbors": n_train, "n_held_out": options.n_held_out}
        told |= {"rerank": [options.k1, options.k2]} if options.rerank else {}
        if not options.rerank and choose_index(options.index, len(self.train)) == "ivf":
            told |= {"ivf": options.recall}
        self.run.stage("neighbors", told, [self._key("embed")], make)

    def _cluster(self) -> None:
        method = self.pipeline.cluster
        kind = type(method).__name__

        def make(folder: Path) -> dict[str, object]:
            found = stages.cluster(method, self._given(folder), views=self.pipeline.pretrain.views)
            return self._save(found, folder)

        chosen_on = {"select_on": self.pipeline.data.select_on} if isinstance(method, SCAN | NNM) else {}
        inputs = [self._key(stage) for stage in stages.CLUSTERS_FROM[kind]]
        self.run.stage("cluster", {"method": kind} | chosen_on | asdict(method), [*inputs, *self._image_keys()], make,
                       group=self.device.group)

    def _refine(self) -> None:
        self._refined("refine", self.pipeline.refine)

    def _robust(self) -> None:
        self._refined("robust", self.pipeline.robust)

    def _refined(self, stage: ResultStage, method: Refiner | None) -> None:
        if method is None:
            return
        before = self._last

        def make(folder: Path) -> dict[str, object]:
            return self._save(stages.refine(method, self._given(folder), self._folder(before)), folder)

        options = {"method": type(method).__name__, "select_on": self.pipeline.data.select_on} | asdict(method)
        self.run.stage(stage, options, [self._key(before), self._key("neighbors"), *self._image_keys()], make,
                       group=self.device.group)

    def _given(self, folder: Path) -> stages.Given:
        return stages.Given(
            splits=self._splits(), pretrained=self._folder("pretrain"), layer=self.pipeline.embed.layer,
            embeddings=self.embeddings, neighbors=self.neighbors, watched=self._watched, device=self.device,
            folder=folder)

    def _save(self, found: stages.Found, folder: Path) -> dict[str, object]:
        about = {"recipe": self.pipeline.name, "source": self.pipeline.data.source, "phyla": phyla.__version__}
        stages.save_found(found, self._splits(), size=self.train.size[0], device=self.device, folder=folder,
                          about=about)
        return found.facts

    def _evaluate(self) -> None:
        def make(folder: Path) -> dict[str, object]:
            results = {title: stage for stage, title in self._results().items()}
            splits = [self._split(name, images, results) for name, images in self._splits()]
            own = isinstance(self.pipeline.cluster, KMeans)  # k-means on embeddings is then the result
            rows = fill_scorecard(splits, n_clusters=self.pipeline.cluster.n_clusters,
                                  kmeans_on=("pixels",) if own else ("pixels", "embeddings"), memory=self._memory(),
                                  **self.pipeline.evaluate.scorecard())
            self._attack(folder)
            write_json(folder / "scores.json", {"scores": [asdict(row) for row in rows]})
            return {"labelled": [name for name, _ in self._splits() if self.truth(name) is not None]}

        truths = [self.truth(name) for name in self._named]
        inputs = [self._key("embed"), self._key("neighbors"), *(self._key(stage) for stage in self._results()),
                  *(array_fingerprint(truth.labels) if truth else "unlabelled" for truth in truths)]
        self.run.stage("evaluate", asdict(self.pipeline.evaluate), inputs, make)

    def _attack(self, folder: Path) -> None:
        """Write robustness.json: every result under attack, on the held-out images where there are any."""
        options = self.pipeline.evaluate
        if options.attack == "none":
            return
        split, images = self._splits()[-1]
        classifiers = {title: Classifier.load(self._folder(stage)) for stage, title in self._results().items()}
        found = {title: self.assignment(stage, split) for stage, title in self._results().items()}
        truth = self.truth(split)
        curves = robustness_report(classifiers, images, truth.labels if truth else None, preset=options.attack,
                                   assignments=found, n_images=options.attack_images, split=self._split_name(split),
                                   seed=options.random_state, device=self.device.alone)
        save_robustness(folder / ROBUSTNESS, curves)

    def _report(self) -> None:
        def make(folder: Path) -> dict[str, object]:
            truth, attacked = self.truth("train"), self._folder("evaluate") / ROBUSTNESS
            build_report(ReportInput(
                title=f"{self.train.name}: {self.pipeline.cluster.n_clusters} clusters", images=self.train,
                assignment=self.assignment(self._last), embeddings=self.embeddings("train").values,
                neighbors=self.neighbors("train"), curves=self._curves(), scores=self.scores,
                truth=(truth.labels, truth.names) if truth else None, run=self._told(),
                skipped=self.loaded("train").skipped, notices=self._all_notices(),
                result=self.pipeline.title(self._last),
                results={title: self.assignment(stage) for stage, title in self._results().items()},
                robustness=load_robustness(attacked) if attacked.exists() else ()), folder)
            return {}

        truth = self.truth("train")
        options = {"phyla": phyla.__version__, "recipe": self.pipeline.options(),
                   "skipped": self.loaded("train").skipped, "classes": truth.names if truth else None}
        self.run.stage("report", options, [self._key("evaluate"), self._key(self._last)], make)

    # ---- what stages left -----------------------------------------------------------------------------------------

    def loaded(self, role: str) -> Loaded:
        """Return the images of ``role`` (train, pretrain, held_out) and the files that could not be read."""
        return self._loaded[role]

    @cached_property
    def train(self) -> ImageSet:
        """The images that are clustered."""
        return self.loaded("train").images

    @cached_property
    def pretrain_images(self) -> ImageSet:
        """The images that the encoder learns from."""
        return self.loaded("pretrain").images if self.pipeline.data.pretrain_split else self.train

    @cached_property
    def held_out(self) -> ImageSet | None:
        """The images that are only predicted."""
        return self.loaded("held_out").images if self.pipeline.data.held_out else None

    @property
    def scores(self) -> tuple[Scores, ...]:
        """The table of the evaluate stage; empty before it."""
        if "evaluate" not in self.run.stages:
            return ()
        return tuple(Scores(**row) for row in read_json(self._folder("evaluate") / "scores.json")["scores"])

    def embeddings(self, split: str) -> Embeddings:
        """Return the embeddings of a split (train, held_out)."""
        return load_embeddings(self._folder("embed"), split)

    def neighbors(self, split: str) -> Neighbors:
        """Return the neighbors of a split among its own images."""
        return load_neighbors(self._folder("neighbors"), split)

    def assignment(self, stage: str, split: str = "train") -> Assignment:
        """Return what ``stage`` (cluster, refine) assigned."""
        return load_assignment(self._folder(stage), split)

    def truth(self, split: str) -> Truth | None:
        """Return the true labels of a split, where there are any and they are wanted; for scores alone."""
        return self._truths.get(split)

    @cached_property
    def _truths(self) -> dict[str, Truth]:
        data = self.pipeline.data
        if self.labels is None:
            return {}
        found = {name: true_labels(data.source, images.ids, split=split, data_dir=self.data_dir, labels=self.labels)
                 for name, (split, images) in self._named.items()}
        return {name: truth for name, truth in found.items() if truth is not None}

    @property
    def _watched(self) -> tuple[ImageSet, Neighbors] | None:
        """The held-out images on which the label-free score is taken; None: on the clustered ones."""
        if self.held_out is None or self.pipeline.data.select_on == "train":
            return None
        return self.held_out, self.neighbors("held_out")

    # ---- the small print --------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        if isinstance(self.pipeline.pretrain, PublishedEncoder):
            self.pipeline.pretrain.checkpoint()  # told before any image is decoded
        n_clusters = self.pipeline.cluster.n_clusters
        if not self.pipeline.data.source:
            raise InputError("which images to look at is not known", "phyla run FOLDER --classes 10")
        if n_clusters < 1:
            raise InputError(f"the number of classes must be at least 1, got {n_clusters}", "--classes 10, for example")
        if self.pipeline.data.limit is not None and self.pipeline.data.limit < 2:
            raise InputError(f"--limit must be at least 2, got {self.pipeline.data.limit}")
        if self.pipeline.robust is not None and n_clusters < 2:
            raise InputError(f"RUC tells classes apart and needs at least 2, got {n_clusters}",
                             "--classes 2, or leave the stage out: --set robust=none")
        if isinstance(self.pipeline.cluster, KMeans) and self.pipeline.cluster.temperature == 0:
            raise InputError("cluster.temperature=0 gives no classifier", "--set cluster.temperature=0.1")
        for part, stage in ((part, getattr(self.pipeline, part)) for part in PARTS):
            for fault in stage.option_faults() if hasattr(stage, "option_faults") else ():
                raise InputError(f"{part}: {fault.message}", fault.hint)
            if not 0 <= (getattr(stage, "random_state", 0) or 0) < 2**32:
                raise InputError(f"a seed must be from 0 to {2**32 - 1}, got {getattr(stage, 'random_state', 0)}")

    @cached_property
    def _loaded(self) -> dict[str, Loaded]:
        data = self.pipeline.data
        roles = {"train": data.split, "pretrain": data.pretrain_split, "held_out": data.held_out}
        # The first process downloads and decodes; the others find what it kept.
        return first_then_others(self.device.group, lambda: {role: self._load(split) for role, split in roles.items()
                                                             if split})

    def _load(self, split: str) -> Loaded:
        data = self.pipeline.data
        name = data_set_name(data.source)
        keeps = name is None or name.startswith("imagenet")  # files that took decoding; arrays load fast
        return open_images(data.source, split=split, size=data.size, limit=data.limit, data_dir=self.data_dir,
                           strict=self.strict, download=self.download,
                           cache=self.run.path / "stages" / "images" if keeps else None, keep=data.cache)

    def _splits(self) -> list[tuple[str, ImageSet]]:
        return [("train", self.train)] + ([("held_out", self.held_out)] if self.held_out is not None else [])

    @property
    def _named(self) -> dict[str, tuple[str, ImageSet]]:
        """The sets of images whose labels are asked for: the splits and, if it is another, what is pretrained on."""
        data = self.pipeline.data
        named = {name: (data.held_out or "" if name == "held_out" else data.split, images)
                 for name, images in self._splits()}
        remembers = not isinstance(self.pipeline.pretrain, SimCLR)  # its memory is a bank for kNN
        if remembers and data.pretrain_split:
            named["pretrain"] = (data.pretrain_split, self.pretrain_images)
        return named

    def _image_keys(self) -> list[str]:
        return [images.fingerprint for _, images in self._splits()]

    def _key(self, stage: str) -> str:
        return self.run.stages[stage].key

    def _folder(self, stage: str) -> Path:
        return self.run.stages[stage].folder

    @property
    def _last(self) -> ResultStage:
        return [stage for stage in RESULTS if stage in self.run.stages][-1]

    def _results(self) -> dict[str, str]:
        """Return the stages that assign images to clusters, and what a table calls them."""
        return {stage: self.pipeline.title(stage) for stage in RESULTS if stage in self.run.stages}

    def _split(self, name: str, images: ImageSet, results: dict[str, str]) -> Split:
        truth = self.truth(name)
        assignments = {title: self.assignment(stage, name) for title, stage in results.items()}
        rivals = {title: stages.load_rivals(self._folder(stage), name) for title, stage in results.items()}
        return Split(name=self._split_name(name), images=images, embeddings=self.embeddings(name),
                     neighbors=self.neighbors(name), assignments=assignments, true=truth.labels if truth else None,
                     rivals=rivals)

    def _memory(self) -> Bank | None:
        memory = stages.load_memory(self._folder("pretrain"))
        truth = self.truth("pretrain" if self.pipeline.data.pretrain_split else "train")
        if memory is None or truth is None:
            return None
        shown = {self._split_name(name): stages.project(self._folder("pretrain"), self.embeddings(name),
                                                        self.pipeline.embed.layer) for name, _ in self._splits()}
        return Bank(memory, truth.labels, shown)

    def _split_name(self, name: str) -> str:
        return (self.pipeline.data.held_out if name == "held_out" else self.pipeline.data.split) or name

    def _n_neighbors(self, n_images: int) -> int:
        wanted = self.pipeline.neighbors.n_neighbors
        if wanted is None:
            wanted = min(20, max(2, n_images // (2 * self.pipeline.cluster.n_clusters)))
        if wanted < n_images:
            return wanted
        log.warning("only %d images: %d neighbors instead of %d", n_images, n_images - 1, wanted)
        return n_images - 1

    def _curves(self) -> list[dict[str, object]]:
        return [record for stage in self.run.stages.values() for record in load_records(stage.folder / "metrics.jsonl")]

    def _all_notices(self) -> list[str]:
        return [notice for stage in self.run.stages.values() for notice in stage.facts.get("notices", [])]

    def _facts(self) -> dict[str, object]:
        packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn", "pillow")}
        return {"command": self.command, "options": self.pipeline.options(),
                "device": self.device.label, "labels": self.labels,
                "versions": {"phyla": phyla.__version__, "python": platform.python_version()} | packages,
                "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
                "n_images": {name: len(images) for name, images in self._splits()},
                "stages": {name: {"key": stage.key, "seconds": stage.facts["seconds"], "device": stage.facts["device"]}
                           for name, stage in self.run.stages.items()}}

    def _told(self) -> dict[str, object]:
        facts = self._facts()
        stages = {name: stage.facts["seconds"] for name, stage in self.run.stages.items()}
        return {"recipe": self.pipeline.name, "command": shlex.join(self.command),
                "seed": self.pipeline.cluster.random_state, "device": facts["device"], "machine": facts["machine"],
                "seconds": stages, "versions": facts["versions"], "options": self.pipeline.options()}


def reopen(run: Path, *, data_dir: Path | None = None, labels: str | None = None) -> Runner:
    """Return the runner of an existing run folder; ``labels`` None keeps what the run used."""
    pipeline, held = recorded(run)
    told = read_json(run / "run.json") if (run / "run.json").exists() else {}
    return Runner(pipeline, run, data_dir=data_dir, labels=held if labels is None else labels,
                  command=told.get("command", []))


def _from_anywhere(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with its paths made absolute: the run is opened from other folders, too."""
    source, pretrain = pipeline.data.source, pipeline.pretrain
    if isinstance(pretrain, PublishedEncoder) and pretrain.path:
        pipeline = replace(pipeline, pretrain=replace(pretrain, path=_absolute(pretrain.path) or ""))
    if not source or data_set_name(source) is not None:
        return pipeline
    return replace(pipeline, data=replace(pipeline.data, source=_absolute(source) or source))


def _absolute(path: str | None) -> str | None:
    return None if path in (None, "none") else str(Path(path).expanduser().absolute())
