"""phyla finds the classes in images that nobody has labelled.

    images -> pretrain -> encoder -> embed -> neighbors -> cluster -> refine -> classifier, report
    (ids + pixels)                   (n, d)    (n, k)      (n, K)     (n, K)
                                                   true labels -> evaluate -> scores

Every arrow is one named, saved, typed array; every box is one folder or one file. Nothing heavy is imported here: the
public names below are loaded when they are first used.

>>> import phyla
>>> result = phyla.run("scan-digits", "runs/digits")     # doctest: +SKIP
>>> phyla.load("runs/digits").predict(["new.png"])       # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pathlib import Path

    from phyla.classifier import Classifier
    from phyla.pipeline import Pipeline
    from phyla.runner import Result

_HOMES = {
    "Assignment": "phyla.types", "Embeddings": "phyla.types", "ImageSet": "phyla.types", "Neighbors": "phyla.types",
    "Scores": "phyla.types", "Classifier": "phyla.classifier", "Pipeline": "phyla.pipeline",
    "KMeans": "phyla.cluster.kmeans",
    "SCAN": "phyla.cluster.scan", "SelfLabel": "phyla.refine.selflabel", "SimCLR": "phyla.pretrain.simclr",
    "SuperAND": "phyla.pretrain.superand", "TEMI": "phyla.cluster.temi", "TSUC": "phyla.cluster.tsuc",
    "TURTLE": "phyla.cluster.turtle",
    "count_classes": "phyla.counting", "find_neighbors": "phyla.neighbors", "from_array": "phyla.images.arrays",
    "open_images": "phyla.images.sources", "recipe": "phyla.recipes",
}

__all__ = sorted([*_HOMES, "load", "run"])


def load(run: "Path | str") -> "Classifier":
    """Return the classifier of a finished run folder: ``load(RUN).predict(pictures)``."""
    from phyla.classifier import Classifier

    return Classifier.load(run)


def run(pipeline: "Pipeline | str", out: "Path | str", *, device: str = "auto",
        labels: str | None = "auto") -> "Result":
    """Carry out a recipe (by name, or a Pipeline) in the folder ``out`` and return its scores and notices.

    The same call goes on after a stop, and does nothing when everything is there. In a program that torchrun started,
    its processes share the work.
    """
    from phyla.launch import joined
    from phyla.recipes import recipe
    from phyla.runner import Runner

    chosen = recipe(pipeline) if isinstance(pipeline, str) else pipeline
    return Runner(chosen, out, device=joined(device), labels=labels, command=["phyla.run"]).go()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'phyla' has no attribute {name!r}")
    module = import_module(_HOMES[name])
    # A submodule of the same name (phyla.embed) is bound here by its import; the function replaces it.
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
