"""Frozen encoders of photographs: anyone's folder without a GPU, and each method of embeddings by itself."""

from dataclasses import replace

from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.temi import TEMI
from phyla.cluster.turtle import TURTLE
from phyla.members import LINEAR, Members
from phyla.pipeline import Clusterer, Data, EmbedOptions, NeighborOptions, Pipeline
from phyla.pretrain.frozen import Frozen
from phyla.refine.consensus import Consensus


def frozen_folder() -> Pipeline:
    """Cluster anyone's photographs by the embeddings of a frozen encoder: many clusterings, and their consensus.

    Command: phyla run FOLDER --classes 10, or --classes auto            Cost: minutes for thousands on two cores, most
    of it embedding.
    The encoder is the best at hand (`phyla list encoders`); --encoder NAME,NAME takes others, or several.
    Expected: see docs/methods/consensus.md.
    """
    return Pipeline(
        name="frozen-folder",
        data=Data(""),
        pretrain=Frozen(),
        embed=EmbedOptions(layer="encoder"),
        neighbors=NeighborOptions(n_neighbors=None, at_most=50),
        cluster=Members(),
        refine=Consensus(),
    )


def frozen_kmeans() -> Pipeline:
    """Cluster photographs by k-means of frozen embeddings: what everybody tries first.

    Command: phyla run FOLDER --recipe frozen-kmeans --classes 10            Cost: embedding, and seconds.
    Expected: see docs/methods/consensus.md.
    """
    return _with(KMeans(), "frozen-kmeans")


def frozen_spherical() -> Pipeline:
    """Cluster photographs by k-means of frozen embeddings whose centers are kept at length 1.

    Command: phyla run FOLDER --recipe frozen-spherical --classes 10            Cost: embedding, and seconds.
    Expected: see docs/methods/consensus.md.
    """
    return _with(KMeans(spherical=True), "frozen-spherical")


def frozen_temi() -> Pipeline:
    """Cluster photographs by TEMI alone: heads that agree with their teachers on neighbors.

    Paper: TEMI (BMVC 2023).
    Command: phyla run FOLDER --recipe frozen-temi --classes 10            Cost: embedding, and minutes on two cores.
    Expected: see docs/methods/consensus.md.
    """
    return _with(TEMI.quick(), "frozen-temi")


def frozen_turtle() -> Pipeline:
    """Cluster photographs by TURTLE alone: the labels that linear classifiers separate best in every space.

    Paper: TURTLE (ICML 2024).
    Command: phyla run FOLDER --recipe frozen-turtle --classes 10            Cost: embedding, and minutes on two cores.
    Expected: see docs/methods/consensus.md.
    """
    return _with(TURTLE.quick(), "frozen-turtle")


def frozen_scan() -> Pipeline:
    """Cluster photographs by SCAN's loss on frozen embeddings: linear heads, no views.

    Command: phyla run FOLDER --recipe frozen-scan --classes 10            Cost: embedding, and a minute on two cores.
    Expected: see docs/methods/consensus.md.
    """
    return _with(SCAN(**LINEAR), "frozen-scan")


def frozen_nnm() -> Pipeline:
    """Cluster photographs by NNM's loss on frozen embeddings: linear heads, no views.

    Command: phyla run FOLDER --recipe frozen-nnm --classes 10            Cost: embedding, and a minute on two cores.
    Expected: see docs/methods/consensus.md.
    """
    return _with(NNM(n_epochs=20, **LINEAR), "frozen-nnm")


def _with(method: Clusterer, name: str) -> Pipeline:
    return replace(frozen_folder(), name=name, cluster=method, refine=None)


RECIPES = (frozen_folder, frozen_kmeans, frozen_spherical, frozen_temi, frozen_turtle, frozen_scan, frozen_nnm)
