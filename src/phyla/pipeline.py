"""A pipeline is a chain of stages with their options: what a recipe returns and a run carries out.

    images -> pretrain -> embed -> neighbors -> cluster -> refine -> evaluate -> report
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

from phyla.cluster.scan import SCAN
from phyla.pretrain.simclr import SimCLR
from phyla.refine.selflabel import SelfLabel
from phyla.zoo import PublishedEncoder

STAGES = ("images", "pretrain", "embed", "neighbors", "cluster", "refine", "evaluate", "report")
PARTS = ("data", "pretrain", "embed", "neighbors", "cluster", "refine", "evaluate")
"""The parts of a pipeline that hold options."""

StageName = Literal["images", "pretrain", "embed", "neighbors", "cluster", "refine", "evaluate", "report"]


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


@dataclass(frozen=True)
class EmbedOptions:
    """What the embeddings are: ``layer`` projection (128-d, SCAN for SimCLR) or encoder (512-d or 2048-d)."""

    layer: Literal["projection", "encoder"] = "projection"


@dataclass(frozen=True)
class NeighborOptions:
    """How many neighbors: of each image, and of each held-out image (for the label-free score).

    None means 20, or for small sets half of the images a cluster would have on average.
    """

    n_neighbors: int | None = 20
    n_held_out: int = 5


@dataclass(frozen=True)
class EvaluateOptions:
    """The baselines beside the result: restarts of k-means, and how many images it is fitted on at most."""

    kmeans_restarts: int = 10
    kmeans_max_images: int = 20_000
    knn_neighbors: int = 20
    random_state: int = 0


@dataclass(frozen=True)
class Pipeline:
    """A named chain of stages with all options; what a recipe returns."""

    name: str
    data: Data
    pretrain: SimCLR | PublishedEncoder
    cluster: SCAN
    refine: SelfLabel | None = None
    embed: EmbedOptions = field(default_factory=EmbedOptions)
    neighbors: NeighborOptions = field(default_factory=NeighborOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)

    def options(self) -> dict[str, object]:
        """Return every option of every stage, for run.json."""
        parts = {part: getattr(self, part) for part in PARTS}
        told = {part: asdict(value) if value is not None else None for part, value in parts.items()}
        methods = {part: type(parts[part]).__name__ for part in ("pretrain", "cluster", "refine") if parts[part]}
        return {"recipe": self.name, "methods": methods, **told}
