"""A pipeline is a chain of stages with their options: what a recipe returns and a run carries out.

    images -> pretrain -> embed -> neighbors -> cluster -> refine -> robust -> evaluate -> report
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.tsuc import TSUC
from phyla.errors import InputError
from phyla.images.gather import Keep
from phyla.index import Index, choose_index
from phyla.pretrain.simclr import SimCLR
from phyla.pretrain.superand import SuperAND
from phyla.refine.ruc import RUC
from phyla.refine.selflabel import SelfLabel
from phyla.zoo import PublishedEncoder

Pretrainer = SimCLR | SuperAND | PublishedEncoder
Clusterer = SCAN | NNM | TSUC | KMeans
Refiner = SelfLabel | RUC

METHODS: Mapping[str, Mapping[str, type]] = {
    "pretrain": {"SimCLR": SimCLR, "SuperAND": SuperAND, "PublishedEncoder": PublishedEncoder},
    "cluster": {"SCAN": SCAN, "NNM": NNM, "TSUC": TSUC, "KMeans": KMeans},
    "refine": {"SelfLabel": SelfLabel},
    "robust": {"RUC": RUC},
}
"""The methods that each stage may carry out."""

TITLES: Mapping[str, str] = {"SimCLR": "SimCLR", "SuperAND": "Super-AND", "PublishedEncoder": "published encoder",
                             "SCAN": "SCAN", "NNM": "NNM", "TSUC": "TSUC", "KMeans": "k-means",
                             "SelfLabel": "self-label", "RUC": "RUC"}
"""What a table calls the result of a method."""

STAGES = ("images", "pretrain", "embed", "neighbors", "cluster", "refine", "robust", "evaluate", "report")
PARTS = ("data", "pretrain", "embed", "neighbors", "cluster", "refine", "robust", "evaluate")
"""The parts of a pipeline that hold options."""

Layer = Literal["projection", "encoder"]
StageName = Literal["images", "pretrain", "embed", "neighbors", "cluster", "refine", "robust", "evaluate", "report"]
ResultStage = Literal["cluster", "refine", "robust"]
RESULTS: tuple[ResultStage, ...] = ("cluster", "refine", "robust")
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

    None means 20, or for small sets half of the images a cluster would have on average. ``rerank`` ranks by the overlap
    of neighborhoods (k-reciprocal, of ``k1`` images, averaged over ``k2``) instead of by the cosine.

    ``index`` is how they are sought: exact compares all with all; ivf looks into part of the set, as much as finds the
    share ``recall`` of the neighbors (the extra ``scale``); auto is ivf above 500,000 images if FAISS is installed.
    """

    n_neighbors: int | None = 20
    n_held_out: int = 5
    rerank: bool = False
    k1: int = 20
    k2: int = 6
    index: Index = "exact"
    recall: float = 0.95

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
class EvaluateOptions:
    """The baselines beside the result: restarts of k-means, and how many images it is fitted on at most.

    ``knn_neighbors`` vote in the kNN probe of the embeddings: 200 where instance discrimination is published.
    ``calibration_bins`` are those of the expected calibration error.
    ``attack`` measures every result under adversarial attack, on ``attack_images`` images at most: sane (in pixels) or
    paper (as RUC's paper has it).
    """

    kmeans_restarts: int = 10
    kmeans_max_images: int = 20_000
    knn_neighbors: int = 20
    calibration_bins: int = 15
    attack: Literal["none", "sane", "paper"] = "none"
    attack_images: int = 1000
    random_state: int = 0

    def scorecard(self) -> dict[str, int]:
        """Return the options of the table of scores."""
        return {name: getattr(self, name) for name in (
            "kmeans_restarts", "kmeans_max_images", "knn_neighbors", "calibration_bins", "random_state")}


@dataclass(frozen=True)
class Pipeline:
    """A named chain of stages with all options; what a recipe returns."""

    name: str
    data: Data
    pretrain: Pretrainer
    cluster: Clusterer
    refine: SelfLabel | None = None
    robust: RUC | None = None
    embed: EmbedOptions = field(default_factory=EmbedOptions)
    neighbors: NeighborOptions = field(default_factory=NeighborOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)

    def options(self) -> dict[str, object]:
        """Return every option of every stage, for run.json."""
        parts = {part: getattr(self, part) for part in PARTS}
        told = {part: asdict(value) if value is not None else None for part, value in parts.items()}
        methods = {part: type(parts[part]).__name__ for part in METHODS if parts[part]}
        return {"recipe": self.name, "methods": methods, **told}

    def title(self, stage: ResultStage) -> str:
        """Return what a table calls the result of a stage: "SCAN", "SCAN + self-label", "Super-AND + k-means"."""
        methods = [getattr(self, part) for part in RESULTS[: RESULTS.index(stage) + 1]]
        names = [TITLES[type(method).__name__] for method in methods if method is not None]
        if isinstance(self.cluster, KMeans):  # not the baseline of every table, which is on pixels too
            names = [TITLES[type(self.pretrain).__name__], *names]
        return " + ".join(names)
