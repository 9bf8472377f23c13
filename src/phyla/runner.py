"""Carry out a pipeline in a run folder: stages in order, those whose options and inputs are unchanged kept.

Labels are read once, in the evaluate stage, and reach nothing but scores and the report.
"""

import logging
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from torch import nn

import phyla
from phyla.classifier import Classifier
from phyla.cluster.scan import SCAN, Watched
from phyla.embed import embed
from phyla.errors import InputError
from phyla.evaluate.scorecard import Split, fill_scorecard
from phyla.evaluate.truth import Truth, true_labels
from phyla.images.catalog import data_set_name
from phyla.images.folders import is_there
from phyla.images.sources import Loaded, open_images
from phyla.neighbors import find_neighbors
from phyla.pipeline import STAGES, Pipeline, StageName
from phyla.recipes import from_options
from phyla.refine.selflabel import SelfLabel
from phyla.report.page import ReportInput, build_report
from phyla.rundir import (
    OPTIONS,
    RunDir,
    is_placed,
    load_assignment,
    load_embeddings,
    load_encoder,
    load_neighbors,
    load_records,
    place,
    save_assignment,
    save_embeddings,
    save_encoder,
    save_neighbors,
    save_records,
)
from phyla.storage import array_fingerprint, read_json, write_json
from phyla.tables import write_assignments
from phyla.training.device import Device, choose_device
from phyla.types import Assignment, Embeddings, ImageSet, Neighbors, Scores
from phyla.zoo import PublishedEncoder, checkpoint_stamp

log = logging.getLogger("phyla")


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
    device : where to compute
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
        self._validate()
        source = self.pipeline.data.source
        where = data_set_name(source) or (str(Path(source).resolve()) if is_there(Path(source)) else source)
        self.run = RunDir(out, {"format": 1, "recipe": pipeline.name, "source": where})
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
        if "evaluate" in wanted:  # a table of labels that cannot be read is told before the work, not after it
            self.truth("train")
        write_json(self.run.path / OPTIONS, {"options": self.pipeline.options(), "labels": self.labels})
        for name in wanted:
            getattr(self, f"_{name}")()
        stages = self.run.stages.values()
        did = any(not stage.was_kept for stage in stages)
        for stage in stages:
            log.info("%-9s %s", stage.name, "unchanged, kept" if stage.was_kept else f"{stage.facts['seconds']} s")
        self.notices = self._all_notices()
        if did or not self._is_shown(whole=until == STAGES[-1]):
            self._publish()
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
            method.fit(images, device=self.device, folder=folder)
            save_encoder(folder, method.encoder_, method.projection_)
            save_records(folder / "metrics.jsonl", method.history_)
            return {"n_images": len(images)}

        inputs = [images.fingerprint]
        if isinstance(method, PublishedEncoder):
            inputs += [checkpoint_stamp(method.checkpoint())]
        self.run.stage("pretrain", options, inputs, make)

    def _embed(self) -> None:
        options = asdict(self.pipeline.embed) | {"views": asdict(self.pipeline.pretrain.views.plain())}

        def make(folder: Path) -> dict[str, object]:
            encoder, projection = load_encoder(self._folder("pretrain"))
            net: nn.Module = encoder
            if self.pipeline.embed.layer == "projection":
                if projection is None:
                    raise InputError("this encoder has no projection", "--set embed.layer=encoder")
                net = nn.Sequential(encoder, projection)
            views = self.pipeline.pretrain.views.plain()
            for name, images in self._splits():
                save_embeddings(folder, embed(images, net, views, device=self.device), name)
            return {}

        self.run.stage("embed", options, [self._key("pretrain"), *self._image_keys()], make)

    def _neighbors(self) -> None:
        n_train = self._n_neighbors(len(self.train))

        def make(folder: Path) -> dict[str, object]:
            for name, images in self._splits():
                wanted = n_train if name == "train" else min(self.pipeline.neighbors.n_held_out, len(images) - 1)
                found = find_neighbors(self.embeddings(name), wanted, device=self.device.device)
                save_neighbors(folder, found, name)
            return {"n_neighbors": n_train}

        options = {"n_neighbors": n_train, "n_held_out": self.pipeline.neighbors.n_held_out}
        self.run.stage("neighbors", options, [self._key("embed")], make)

    def _cluster(self) -> None:
        method = self.pipeline.cluster

        def make(folder: Path) -> dict[str, object]:
            encoder, _ = load_encoder(self._folder("pretrain"))
            method.fit(self.train, neighbors=self.neighbors("train"), encoder=encoder, device=self.device,
                       watched=Watched(*self._watched) if self._watched else None, folder=folder)
            self._save_model(folder, method)
            notice = (f"clusters: kept epoch {method.epoch_} of {method.n_epochs}, head {method.head_ + 1} of "
                      f"{method.n_heads} (lowest neighbor score, {method.score_:.4f})")
            return {"score": method.score_, "head": method.head_, "epoch": method.epoch_, "notices": [notice]}

        self.run.stage("cluster", {"method": "SCAN", "select_on": self.pipeline.data.select_on} | asdict(method),
                       [self._key("pretrain"), self._key("neighbors"), *self._image_keys()], make)

    def _refine(self) -> None:
        method = self.pipeline.refine
        if method is None:
            return

        def make(folder: Path) -> dict[str, object]:
            before = Classifier.load(self._folder("cluster"))
            method.fit(self.train, net=before.net, neighbors=self.neighbors("train"), watched=self._watched,
                       device=self.device, folder=folder)
            self._save_model(folder, method)
            return {"kept": method.kept_, "scores": method.scores_, "skipped_steps": method.skipped_steps_,
                    "notices": method.notices_}

        self.run.stage("refine", {"method": "SelfLabel", "select_on": self.pipeline.data.select_on} | asdict(method),
                       [self._key("cluster"), self._key("neighbors"), *self._image_keys()], make)

    def _evaluate(self) -> None:
        def make(folder: Path) -> dict[str, object]:
            results = {title: stage for stage, title in self._results().items()}
            splits = [self._split(name, images, results) for name, images in self._splits()]
            rows = fill_scorecard(splits, n_clusters=self.pipeline.cluster.n_clusters, **asdict(self.pipeline.evaluate))
            write_json(folder / "scores.json", {"scores": [asdict(row) for row in rows]})
            return {"labelled": [name for name, _ in self._splits() if self.truth(name) is not None]}

        truths = [self.truth(name) for name, _ in self._splits()]
        inputs = [self._key("embed"), self._key("neighbors"), *(self._key(stage) for stage in self._results()),
                  *(array_fingerprint(truth.labels) if truth else "unlabelled" for truth in truths)]
        self.run.stage("evaluate", asdict(self.pipeline.evaluate), inputs, make)

    def _report(self) -> None:
        def make(folder: Path) -> dict[str, object]:
            truth = self.truth("train")
            build_report(ReportInput(
                title=f"{self.train.name}: {self.pipeline.cluster.n_clusters} clusters", images=self.train,
                assignment=self.assignment(self._last), embeddings=self.embeddings("train").values,
                neighbors=self.neighbors("train"), curves=self._curves(), scores=self.scores,
                truth=(truth.labels, truth.names) if truth else None, run=self._told(),
                skipped=self.loaded("train").skipped, notices=self._all_notices()), folder)
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
        named = {"train": data.split, "held_out": data.held_out or ""}
        found = {name: true_labels(data.source, images.ids, split=named[name], data_dir=self.data_dir,
                                   labels=self.labels) for name, images in self._splits() if self.labels is not None}
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
        for stage in (self.pipeline.pretrain, self.pipeline.cluster, self.pipeline.refine, self.pipeline.evaluate):
            if not 0 <= getattr(stage, "random_state", 0) < 2**32:
                raise InputError(f"a seed must be from 0 to {2**32 - 1}, got {getattr(stage, 'random_state', 0)}")

    @cached_property
    def _loaded(self) -> dict[str, Loaded]:
        data = self.pipeline.data
        roles = {"train": data.split, "pretrain": data.pretrain_split, "held_out": data.held_out}
        return {role: self._load(split) for role, split in roles.items() if split}

    def _load(self, split: str) -> Loaded:
        data = self.pipeline.data
        name = data_set_name(data.source)
        keeps = name is None or name.startswith("imagenet")  # files that took decoding; arrays load fast
        return open_images(data.source, split=split, size=data.size, limit=data.limit, data_dir=self.data_dir,
                           strict=self.strict, download=self.download,
                           cache=self.run.path / "stages" / "images" if keeps else None)

    def _splits(self) -> list[tuple[str, ImageSet]]:
        return [("train", self.train)] + ([("held_out", self.held_out)] if self.held_out is not None else [])

    def _image_keys(self) -> list[str]:
        return [images.fingerprint for _, images in self._splits()]

    def _key(self, stage: str) -> str:
        return self.run.stages[stage].key

    def _folder(self, stage: str) -> Path:
        return self.run.stages[stage].folder

    @property
    def _last(self) -> str:
        return "refine" if "refine" in self.run.stages else "cluster"

    def _results(self) -> dict[str, str]:
        titles = {"cluster": "SCAN", "refine": "SCAN + self-label"}
        return {stage: title for stage, title in titles.items() if stage in self.run.stages}

    def _split(self, name: str, images: ImageSet, results: dict[str, str]) -> Split:
        shown = self.pipeline.data.held_out if name == "held_out" else self.pipeline.data.split
        truth = self.truth(name)
        assignments = {title: self.assignment(stage, name) for title, stage in results.items()}
        return Split(name=shown or name, images=images, embeddings=self.embeddings(name),
                     neighbors=self.neighbors(name), assignments=assignments, true=truth.labels if truth else None)

    def _n_neighbors(self, n_images: int) -> int:
        wanted = self.pipeline.neighbors.n_neighbors
        if wanted is None:
            wanted = min(20, max(2, n_images // (2 * self.pipeline.cluster.n_clusters)))
        if wanted < n_images:
            return wanted
        log.warning("only %d images: %d neighbors instead of %d", n_images, n_images - 1, wanted)
        return n_images - 1

    def _save_model(self, folder: Path, method: SCAN | SelfLabel) -> None:
        classifier = Classifier(method.net_, self.pipeline.cluster.views.plain(), self.train.size[0], facts={
            "recipe": self.pipeline.name, "source": self.pipeline.data.source, "phyla": phyla.__version__})
        save_records(folder / "metrics.jsonl", method.history_)
        save_assignment(folder, Assignment(method.probabilities_, self.train.ids), "train")
        if self.held_out is not None:
            found = classifier.predict_proba(self.held_out, device=self.device)
            save_assignment(folder, Assignment(found, self.held_out.ids), "held_out")
        classifier.save(folder)

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

    # ---- the top of the folder --------------------------------------------------------------------------------------

    def _placed(self) -> dict[str, Path]:
        """Return the files at the top of the folder that are a stage's, and where the stage has them."""
        made = self.run.stages
        placed = {f"{name}.npy": self._folder(stage) / "train.npy"
                  for stage, name in (("embed", "embeddings"), ("neighbors", "neighbors")) if stage in made}
        if "cluster" in made:
            placed |= {name: self._folder(self._last) / name for name in ("model.safetensors", "model.json")}
        if "evaluate" in made:
            placed["scores.json"] = self._folder("evaluate") / "scores.json"
        if "report" in made:
            placed |= {path.name: path for path in sorted(self._folder("report").iterdir())
                       if path.suffix in (".html", ".png")}
        return placed

    def _tables(self) -> dict[str, str]:
        """Return the tables at the top of the folder, and the split that each is of."""
        titles = {"train": "assignments", "held_out": "assignments-held-out"}
        splits = [name for name, _ in self._splits()] if "cluster" in self.run.stages else []
        return {f"{titles[split]}.{kind}": split for split in splits for kind in ("csv", "parquet")}

    def _is_shown(self, *, whole: bool) -> bool:
        """Return whether the top of the folder shows these stages; those of a part may be followed by others."""
        path = self.run.path / "run.json"
        held = read_json(path) if path.exists() else {}
        shown = {name: stage["key"] for name, stage in held.get("stages", {}).items()}
        ours = {name: stage.key for name, stage in self.run.stages.items()}
        if not whole:
            return ours.items() <= shown.items()
        return (ours == shown and all((self.run.path / name).exists() for name in held.get("files", []))
                and all(is_placed(source, self.run.path / name) for name, source in self._placed().items()))

    def _publish(self) -> None:
        top = self.run.path
        path, placed, tables = top / "run.json", self._placed(), self._tables()
        files = [*placed, *tables, "metrics.jsonl"]
        earlier = read_json(path).get("files", []) if path.exists() else []
        for name in {Path(str(file)).name for file in earlier} - set(files):
            (top / name).unlink(missing_ok=True)  # of other options: its stage still has it
        for name, source in placed.items():
            place(source, top / name)
        for name, split in tables.items():
            write_assignments(top / name, [self.assignment(self._last, split)])
        save_records(top / "metrics.jsonl", self._curves())
        write_json(path, self._facts() | {"notices": self.notices, "files": files})


def recorded_pipeline(run: Path) -> Pipeline:
    """Return the pipeline whose result a run folder shows; of one that shows none yet, as it was last given."""
    return _recorded(run)[0]


def recorded_labels(run: Path) -> str | None:
    """Return where the true labels of ``recorded_pipeline`` are from; None for none."""
    return _recorded(run)[1]


def reopen(run: Path, *, data_dir: Path | None = None, labels: str | None = None) -> Runner:
    """Return the runner of an existing run folder; ``labels`` None keeps what the run used."""
    pipeline, recorded = _recorded(run)
    told = read_json(run / "run.json") if (run / "run.json").exists() else {}
    return Runner(pipeline, run, data_dir=data_dir, labels=recorded if labels is None else labels,
                  command=told.get("command", []))


def _recorded(run: Path) -> tuple[Pipeline, str | None]:
    if not (run / OPTIONS).exists():
        raise InputError(f"{run} is not a run folder", "give the folder of a run, such as runs/scan-digits")
    shown = run / "run.json"  # a later command that failed must not change what the folder is
    held = read_json(shown if shown.exists() else run / OPTIONS)
    try:
        return from_options(held["options"]), held["labels"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{run} is not of this version of phyla ({error})",
                         "give the recipe again") from error


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
