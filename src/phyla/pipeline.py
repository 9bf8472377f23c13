"""A pipeline is a chain of stages with their options: what a recipe returns and a run carries out.

    images -> pretrain -> embed -> neighbors -> count -> cluster -> refine -> robust -> cut -> evaluate -> report
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.temi import TEMI
from phyla.cluster.tsuc import TSUC
from phyla.cluster.turtle import TURTLE
from phyla.errors import InputError
from phyla.images.gather import Keep
from phyla.index import Index, choose_index
from phyla.members import Members
from phyla.pretrain.frozen import Frozen
from phyla.pretrain.simclr import SimCLR
from phyla.pretrain.superand import SuperAND
from phyla.refine.consensus import Consensus
from phyla.refine.ruc import RUC
from phyla.refine.selflabel import SelfLabel
from phyla.zoo import PublishedClusters, PublishedEncoder, Taken

log = logging.getLogger("phyla")

Pretrainer = SimCLR | SuperAND | PublishedEncoder | Frozen
Clusterer = SCAN | NNM | TSUC | KMeans | TEMI | TURTLE | Members | PublishedClusters
Refiner = SelfLabel | RUC | Consensus

METHODS: Mapping[str, Mapping[str, type]] = {
    "pretrain": {"SimCLR": SimCLR, "SuperAND": SuperAND, "PublishedEncoder": PublishedEncoder, "Frozen": Frozen},
    "cluster": {"SCAN": SCAN, "NNM": NNM, "TSUC": TSUC, "KMeans": KMeans, "TEMI": TEMI, "TURTLE": TURTLE,
                "Members": Members, "PublishedClusters": PublishedClusters},
    "refine": {"SelfLabel": SelfLabel, "Consensus": Consensus},
    "robust": {"RUC": RUC},
}
"""The methods that each stage may carry out."""

TITLES: Mapping[str, str] = {
    "SimCLR": "SimCLR", "SuperAND": "Super-AND", "PublishedEncoder": "published encoder", "Frozen": "frozen encoder",
    "SCAN": "SCAN", "NNM": "NNM", "TSUC": "TSUC", "KMeans": "k-means", "TEMI": "TEMI", "TURTLE": "TURTLE",
    "Members": "best member", "PublishedClusters": "published clusters", "SelfLabel": "self-label", "RUC": "RUC",
    "Consensus": "consensus"}
"""What a table calls the result of a method."""

PARTS = ("data", "pretrain", "embed", "neighbors", "count", "cluster", "refine", "robust", "cut",
         "evaluate")
"""The parts of a pipeline that hold options."""

Layer = Literal["projection", "encoder"]
StageName = Literal["images", "pretrain", "embed", "neighbors", "count", "cluster", "refine", "robust", "cut",
                    "evaluate", "report"]
STAGES: tuple[StageName, ...] = ("images", "pretrain", "embed", "neighbors", "count", "cluster", "refine", "robust",
                                 "cut", "evaluate", "report")
ResultStage = Literal["cluster", "refine", "robust", "cut"]
RESULTS: tuple[ResultStage, ...] = ("cluster", "refine", "robust", "cut")
"""The stages that assign images to clusters, each from what the one before it gave."""


@dataclass(frozen=True)
class Data:
    """Which images.

    Parameters
    ----------
    source : a data set's name, a folder, or a list of files
    split : what is clustered
    pretrain_split : what the encoder learns from; None: the same
    held_out : images that are only predicted, and on which epochs are chosen; None: none
    size : shorter side, in pixels, at which images are stored; None: the data set's own, or chosen from the files
    limit : use this many images, spread evenly; None: all
    select_on : images on which the label-free score chooses an epoch: held_out (published: the test images, without
        their labels) or train; the same where nothing is held out
    """

    source: str
    split: str = "train"
    pretrain_split: str | None = None
    held_out: str | None = None
    size: int | None = None
    limit: int | None = None
    select_on: Literal["held_out", "train"] = "held_out"
    cache: Keep = "auto"


@dataclass(frozen=True)
class EmbedOptions:
    """What the embeddings are: ``layer`` projection (128-d, SCAN for SimCLR) or encoder (512-d or 2048-d)."""

    layer: Layer = "projection"


@dataclass(frozen=True)
class NeighborOptions:
    """How many neighbors: of each image, and of each held-out image (for the label-free score).

    None means ``at_most``, or for small sets half of the images a cluster would have on average. ``rerank`` ranks by
    the overlap of neighborhoods (k-reciprocal, of ``k1`` images, averaged over ``k2``) instead of by the cosine.

    ``index`` is how they are sought: exact compares all with all; ivf looks into part of the set, as much as finds the
    share ``recall`` of the neighbors (the extra ``scale``); auto is ivf above 500,000 images if FAISS is installed.
    """

    n_neighbors: int | None = 20
    n_held_out: int = 5
    at_most: int = 20
    rerank: bool = False
    k1: int = 20
    k2: int = 6
    index: Index = "exact"
    recall: float = 0.95

    def of(self, n_images: int, n_clusters: int | None) -> int:
        """Return how many neighbors each of ``n_images`` gets; ``n_clusters`` None is not known yet."""
        wanted = self.n_neighbors
        if wanted is None:
            wanted = min(self.at_most, max(2, n_images // (2 * (n_clusters or 1))))
        if wanted < n_images:
            return wanted
        log.warning("only %d images: %d neighbors instead of %d", n_images, n_images - 1, wanted)
        return n_images - 1

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, or cannot be carried out here."""
        if not 0 < self.recall <= 1:
            yield InputError(f"recall must be above 0 and at most 1, got {self.recall}")
        if self.rerank and self.index == "ivf":
            yield InputError("rerank=true needs the exact neighbors", "--set neighbors.index=exact")
        try:
            choose_index(self.index, 0)
        except InputError as fault:
            yield fault


@dataclass(frozen=True)
class CountOptions:
    """Within which bounds the number of classes is sought; ``high`` None goes as far as the number of images bears."""

    low: int = 2
    high: int | None = None
    random_state: int = 0

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves."""
        if self.low < 1 or (self.high is not None and self.high < self.low):
            yield InputError(f"the number of classes cannot be sought from {self.low} to {self.high}",
                             "--classes auto, or --classes 5-50")


@dataclass(frozen=True)
class CutOptions:
    """To how many classes the result is merged or split, without fitting anything again."""

    n_clusters: int = 2

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves."""
        if self.n_clusters < 1:
            yield InputError(f"a result cannot be cut to {self.n_clusters} classes", "--classes 1 or more")


@dataclass(frozen=True)
class EvaluateOptions:
    """The baselines beside the result: restarts of k-means, and how many images it is fitted on at most.

    ``knn_neighbors`` vote in the kNN probe of the embeddings: 200 where instance discrimination is published.
    ``calibration_bins`` are those of the expected calibration error.
    ``min_confidence`` is the least confidence with which an image counts as assigned: below it the tables say unsure.
    ``attack`` measures every result under adversarial attack, on ``attack_images`` images at most: sane (in pixels) or
    paper (as RUC's paper has it).
    """

    kmeans_restarts: int = 10
    kmeans_max_images: int = 20_000
    knn_neighbors: int = 20
    calibration_bins: int = 15
    min_confidence: float = 0.0
    attack: Literal["none", "sane", "paper"] = "none"
    attack_images: int = 1000
    random_state: int = 0

    def scorecard(self) -> dict[str, int]:
        """Return the options of the table of scores."""
        return {name: getattr(self, name) for name in (
            "kmeans_restarts", "kmeans_max_images", "knn_neighbors", "calibration_bins", "random_state")}


@dataclass(frozen=True)
class Pipeline:
    """A named chain of stages with all options; what a recipe returns.

    Where there are options of ``count``, the number of classes is estimated, and takes the place of that of the method.
    """

    name: str
    data: Data
    pretrain: Pretrainer
    cluster: Clusterer
    refine: SelfLabel | Consensus | None = None
    robust: RUC | None = None
    count: CountOptions | None = None
    cut: CutOptions | None = None
    embed: EmbedOptions = field(default_factory=EmbedOptions)
    neighbors: NeighborOptions = field(default_factory=NeighborOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)

    @property
    def is_frozen(self) -> bool:
        """Whether images are clustered by their embeddings alone, with an encoder that nothing trains."""
        return isinstance(self.pretrain, Frozen)

    def options(self) -> dict[str, object]:
        """Return every option of every stage, for run.json."""
        parts = {part: getattr(self, part) for part in PARTS}
        told = {part: asdict(value) if value is not None else None for part, value in parts.items()}
        methods = {part: type(parts[part]).__name__ for part in METHODS if parts[part]}
        return {"recipe": self.name, "methods": methods, **told}

    def title(self, stage: ResultStage) -> str:
        """Return what a table calls the result of a stage: "SCAN", "SCAN + self-label", "Super-AND + k-means"."""
        if stage == "cut":
            before: tuple[ResultStage, ...] = ("robust", "refine", "cluster")
            last = next(part for part in before if getattr(self, part) is not None)
            return f"{self.title(last)}, cut to {self.cut.n_clusters if self.cut else 0}"
        methods = [getattr(self, part) for part in RESULTS[: RESULTS.index(stage) + 1]]
        over_members = isinstance(self.refine, Consensus) and stage != "cluster"
        methods = methods[1:] if over_members else methods  # not on top of the best of them
        names = [_title(method) for method in methods if method is not None]
        if isinstance(self.cluster, KMeans) and not over_members:  # not the baseline, which is on pixels too
            names = [TITLES[type(self.pretrain).__name__], *names]
        return " + ".join(names)


def _title(method: Clusterer | Refiner) -> str:
    if isinstance(method, PublishedClusters) and method.result:
        return f"{method.result} (published weights)"
    return TITLES[type(method).__name__]


def check_pipeline(pipeline: Pipeline) -> None:
    """Raise what is wrong with the options by themselves, before any work; InputError."""
    for method in (pipeline.pretrain, pipeline.cluster):
        if isinstance(method, Taken):
            method.checkpoint()  # told before any image is decoded
    n_clusters = pipeline.cluster.n_clusters
    if not pipeline.data.source:
        raise InputError("which images to look at is not known", "phyla run FOLDER --classes 10")
    if n_clusters < 1:
        raise InputError(f"the number of classes must be at least 1, got {n_clusters}", "--classes 10, for example")
    if pipeline.data.limit is not None and pipeline.data.limit < 2:
        raise InputError(f"--limit must be at least 2, got {pipeline.data.limit}")
    if pipeline.robust is not None and n_clusters < 2:
        raise InputError(f"RUC tells classes apart and needs at least 2, got {n_clusters}",
                         "--classes 2, or leave the stage out: --set robust=none")
    if isinstance(pipeline.cluster, KMeans) and pipeline.cluster.temperature == 0:
        raise InputError("cluster.temperature=0 gives no classifier", "--set cluster.temperature=0.1")
    _check_frozen(pipeline)
    for part, stage in ((part, getattr(pipeline, part)) for part in PARTS):
        for fault in stage.option_faults() if hasattr(stage, "option_faults") else ():
            raise InputError(f"{part}: {fault.message}", fault.hint)
        if not 0 <= (getattr(stage, "random_state", 0) or 0) < 2**32:
            raise InputError(f"a seed must be from 0 to {2**32 - 1}, got {getattr(stage, 'random_state', 0)}")


def _check_frozen(pipeline: Pipeline) -> None:
    """Raise where a method of embeddings stands in a chain that trains its encoder, or the other way round."""
    over_members = isinstance(pipeline.refine, Consensus)
    if over_members != isinstance(pipeline.cluster, Members) and over_members:
        raise InputError("a consensus needs members", "--set cluster=members, or --set refine=none")
    if not pipeline.is_frozen:
        return
    if isinstance(pipeline.cluster, TSUC):
        raise InputError("TSUC trains its encoder, and this one is frozen", "--set cluster=members, for example")
    if pipeline.robust is not None or isinstance(pipeline.refine, SelfLabel):
        raise InputError("self-label and RUC train their encoder, and this one is frozen",
                         "--set refine=none --set robust=none")
