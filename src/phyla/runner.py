"""Carry out a pipeline in a run folder: stages in order, those whose options and inputs are unchanged kept.

Labels are read once, in the evaluate stage, and reach nothing but scores and the report.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import phyla
from phyla import stages
from phyla.classifier import Classifier
from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.counting import count_classes
from phyla.embed import embed
from phyla.errors import InputError
from phyla.evaluate.robustness import load_robustness, robustness_report, save_robustness
from phyla.evaluate.scorecard import Bank, Split, fill_scorecard
from phyla.evaluate.truth import Truth, true_labels
from phyla.images.augment import Views
from phyla.images.catalog import data_set_name
from phyla.images.folders import is_there
from phyla.images.gather import shared_folder
from phyla.images.sources import Loaded, open_images
from phyla.index import choose_index
from phyla.pipeline import RESULTS, STAGES, CountOptions, Pipeline, Refiner, ResultStage, StageName, check_pipeline
from phyla.pretrain.frozen import Frozen, stored_size
from phyla.pretrain.simclr import SimCLR
from phyla.recorded import absolute, brief, facts, from_anywhere, recorded
from phyla.report.page import ReportInput, build_report
from phyla.rowcache import rows_folder
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
from phyla.zoo import told_by

log = logging.getLogger("phyla")

ROBUSTNESS = "robustness.json"
TOGETHER = ("pretrain", "embed", "cluster", "refine", "robust", "cut")
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
        self.pipeline, self.device = from_anywhere(pipeline), device or choose_device()
        self.data_dir, self.strict, self.download = data_dir, strict, download
        self.labels = labels if labels in ("auto", "folders") else absolute(labels)
        self.command = list(command)
        on_all(self.device.group, lambda: check_pipeline(self.pipeline))
        source = self.pipeline.data.source
        where = data_set_name(source) or (str(Path(source).resolve()) if is_there(Path(source)) else source)
        self.run = RunDir(out, {"format": 1, "recipe": pipeline.name, "source": where}, group=self.device.group)
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
        asked = STAGES[1 : STAGES.index(until) + 1]
        wanted: list[StageName] = [name for name in asked if name != "count" or self.pipeline.count is not None]
        by_first(self.device.group, lambda: self._begin(wanted))
        for name in wanted:
            make: Callable[[], None] = getattr(self, f"_{name}")
            if name in TOGETHER or self.device.group.size == 1:
                make()
            else:
                self._by_first(name, make)
            if name == "count":
                self._counted()
        return by_first(self.device.group, lambda: self._end(until))

    def _begin(self, wanted: Sequence[StageName]) -> None:
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
        top = Top(self.run, [name for name, _ in self._splits()], last, self.pipeline.evaluate.min_confidence)
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
        if n_images < n_clusters and self.pipeline.count is None:
            raise InputError(f"{n_images} images are fewer than the {n_clusters} classes asked for",
                             "lower --classes or add images")

    def _pretrain(self) -> None:
        method = self.pipeline.pretrain
        images = self.pretrain_images
        options, files = told_by(method)

        def make(folder: Path) -> dict[str, object]:
            return stages.pretrain(method, images, device=self.device, folder=folder)

        learned_from = [method.stamp()] if isinstance(method, Frozen) else [images.fingerprint]
        inputs = [*learned_from, *files]
        self.run.stage("pretrain", options, inputs, make, group=self.device.group)

    def _embed(self) -> None:
        views = self._views.plain()
        options = asdict(self.pipeline.embed) | {"views": asdict(views)}

        def make(folder: Path) -> dict[str, object]:
            net = stages.embedder(self._folder("pretrain"), self.pipeline.embed.layer)
            for name, images in self._splits():
                found = embed(images, net, views, device=self.device, folder=folder / f".{name}.shards",
                              cache=rows_folder() if self.pipeline.is_frozen else None)
                if self.device.group.is_first:  # the others' copy would go at once, and may be large
                    save_embeddings(folder, found, name)
            return {"widths": list(getattr(net, "widths", ()))}

        self.run.stage("embed", options, [self._key("pretrain"), *self._image_keys()], make,
                       group=self.device.group)

    def _neighbors(self) -> None:
        options = self.pipeline.neighbors
        n_train = options.of(len(self.train), None if self.pipeline.count else self.pipeline.cluster.n_clusters)

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

    def _count(self) -> None:
        """Estimate the number of classes, which from then on is that of the pipeline."""
        options = self.pipeline.count or CountOptions()

        def make(folder: Path) -> dict[str, object]:
            found = count_classes(self.embeddings("train"), low=options.low, high=options.high,
                                  neighbors=self.neighbors("train"), random_state=options.random_state,
                                  device=self.device.alone)
            write_json(folder / stages.COUNT, found.as_facts())
            told = [f"about {found.n_classes}, and probably between {found.low} and {found.high}", *found.notices]
            return {"n_classes": found.n_classes, "notices": [f"classes: {line}" for line in told]}

        self.run.stage("count", asdict(options), [self._key("neighbors")], make)

    def _counted(self) -> None:
        found = replace(self.pipeline.cluster, n_clusters=self.run.stages["count"].facts["n_classes"])
        self.pipeline = replace(self.pipeline, cluster=found)

    def _cluster(self) -> None:
        method = self.pipeline.cluster
        options, files = told_by(method)

        def make(folder: Path) -> dict[str, object]:
            found = stages.cluster(method, self._given(folder), views=self._views)
            return self._save(found, folder)

        chosen_on = {"select_on": self.pipeline.data.select_on} if isinstance(method, SCAN | NNM) else {}
        inputs = [self._key(stage) for stage in stages.CLUSTERS_FROM[options["method"]]] + files
        self.run.stage("cluster", options | chosen_on, [*inputs, *self._image_keys()], make, group=self.device.group)

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

    def _cut(self) -> None:
        options, before = self.pipeline.cut, self._last
        if options is None:
            return

        def make(folder: Path) -> dict[str, object]:
            return self._save(stages.cut(options.n_clusters, self._given(folder), self._folder(before)), folder)

        self.run.stage("cut", asdict(options), [self._key(before), *self._image_keys()], make, group=self.device.group)

    def _given(self, folder: Path) -> stages.Given:
        return stages.Given(
            splits=self._splits(), pretrained=self._folder("pretrain"), layer=self.pipeline.embed.layer,
            embeddings=self.embeddings, neighbors=self.neighbors, watched=self._watched, device=self.device,
            folder=folder, is_frozen=self.pipeline.is_frozen)

    def _save(self, found: stages.Found, folder: Path) -> dict[str, object]:
        about = {"recipe": self.pipeline.name, "source": self.pipeline.data.source, "phyla": phyla.__version__}
        stages.save_found(found, self._splits(), size=self.train.size[0], device=self.device, folder=folder,
                          about=about, embeddings=self.embeddings)
        return found.facts

    def _evaluate(self) -> None:
        def make(folder: Path) -> dict[str, object]:
            results = {title: stage for stage, title in self._results().items()}
            splits = [self._split(name, images, results) for name, images in self._splits()]
            own = isinstance(self.pipeline.cluster, KMeans)  # k-means on embeddings is then the result
            against = [] if self.pipeline.is_frozen else ["pixels"]  # nobody looks for photographs' classes in pixels
            rows = fill_scorecard(splits, n_clusters=self.assignment(self._last).n_clusters,
                                  kmeans_on=against if own else [*against, "embeddings"], memory=self._memory(),
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
            made = stages.made_of(self.run.stages, self._last)
            build_report(ReportInput(
                title=f"{self.train.name}: {self.assignment(self._last).n_clusters} clusters", images=self.train,
                assignment=self.assignment(self._last), embeddings=self.embeddings("train").values,
                neighbors=self.neighbors("train"), curves=self._curves(), scores=self.scores,
                truth=(truth.labels, truth.names) if truth else None, run=brief(self._facts()),
                skipped=self.loaded("train").skipped, notices=self._all_notices(),
                result=self.pipeline.title(self._last),
                results={title: self.assignment(stage) for stage, title in self._results().items()},
                robustness=load_robustness(attacked) if attacked.exists() else (),
                agreement=made.agreement, stability=made.stability, members=made.members,
                class_count=made.class_count, frozen=self.pipeline.is_frozen,
                min_confidence=self.pipeline.evaluate.min_confidence), folder)
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
        found = load_embeddings(self._folder("embed"), split)
        return replace(found, widths=tuple(self.run.stages["embed"].facts.get("widths", ())))

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
                           cache=self._pixel_folder if keeps else None, keep=data.cache, largest=self._largest)

    @property
    def _largest(self) -> int:
        """The side in pixels at which files are stored at most where nobody says."""
        method = self.pipeline.pretrain
        return stored_size(method.encoder, size=method.size) if isinstance(method, Frozen) else 96

    @property
    def _views(self) -> Views:
        """How an image is embedded and predicted: frozen encoders see it whole, at the size it is stored at."""
        views = self.pipeline.pretrain.views
        return replace(views, size=self.train.size[0]) if self.pipeline.is_frozen else views

    @property
    def _pixel_folder(self) -> Path:
        """Where decoded files are kept: for the run alone, or, where embedding is quick, for other runs as well."""
        return shared_folder() if self.pipeline.is_frozen else self.run.path / "stages" / "images"

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

    def _curves(self) -> list[dict[str, object]]:
        return [record for stage in self.run.stages.values() for record in load_records(stage.folder / "metrics.jsonl")]

    def _all_notices(self) -> list[str]:
        return [notice for stage in self.run.stages.values() for notice in stage.facts.get("notices", [])]

    def _facts(self) -> dict[str, object]:
        return facts(self.pipeline, self.run, command=self.command, labels=self.labels,
                     n_images={name: len(images) for name, images in self._splits()})


def reopen(run: Path, *, data_dir: Path | None = None, labels: str | None = None) -> Runner:
    """Return the runner of an existing run folder; ``labels`` None keeps what the run used."""
    pipeline, held = recorded(run)
    told = read_json(run / "run.json") if (run / "run.json").exists() else {}
    return Runner(pipeline, run, data_dir=data_dir, labels=held if labels is None else labels,
                  command=told.get("command", []))
