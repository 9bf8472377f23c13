"""What is to be reproduced: a recipe with named changes, a protocol, and the name its results stand under.

A schedule shorter than the recipe's, or fewer images, ends the name in ``-short``: it never passes for the published
one. Any other change that has no name of its own ends it in ``-changed``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from phyla.asked import as_pair
from phyla.errors import InputError, nearest
from phyla.images.catalog import DATASETS, data_set_name, split_parts
from phyla.overrides import change, with_seed
from phyla.pipeline import RESULTS, Pipeline
from phyla.published import ablation as changes_of
from phyla.recipes import recipe as pipeline_of

SCHEDULE = ("n_epochs", "n_rounds")
PROTOCOLS = ("train-test", "train+test", "on-train")
SELECTIONS = ("last", "label-free")
_CHOOSES = {"SCAN": "neighbor_score", "NNM": "label_free", "TSUC": "lowest_loss"}


@dataclass(frozen=True)
class Experiment:
    """A recipe and what is changed of it; empty strings change nothing.

    Parameters
    ----------
    recipe : its name
    ablation : a named change of it
    protocol : train-test, train+test, on-train; else the recipe's
    selection : last or label-free, of the clustering and of what refines it; else the recipe's
    changes : options as typed after --set, laid over all of these
    called : the name of the results; else it is made of the parts
    """

    recipe: str
    ablation: str = ""
    protocol: str = ""
    selection: str = ""
    changes: tuple[str, ...] = ()
    called: str = ""

    def pipeline(self, seed: int) -> Pipeline:
        """Return what is run with one seed; InputError where a part of it cannot be."""
        return _laid(self.named(seed), self.changes)

    @property
    def name(self) -> str:
        """What the results are called: recipe-ablation-protocol-selection, -short or -changed where that is so."""
        return _name(self)

    @property
    def is_short(self) -> bool:
        """Whether it trains for less than the recipe with its ablation, or on fewer images."""
        return _is_short(self)

    @property
    def is_as_named(self) -> bool:
        """Whether nothing is changed that has no name of its own: only then is it held against published numbers."""
        return _is_as_named(self)

    def told(self) -> str:
        """Return the name before it is known whether the schedule is short; InputError where it is none."""
        asked = (self.recipe, self.ablation, self.protocol, self.selection)
        name = self.called or "-".join(part for part in asked if part)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", name):
            raise InputError(f"results cannot be called {name!r}", "letters, digits, . + _ and -")
        return name

    def ablated(self, seed: int = 0) -> Pipeline:
        """Return the recipe with its ablation alone."""
        changes = changes_of(self.recipe, self.ablation) if self.ablation else ()
        return _laid(with_seed(pipeline_of(self.recipe), seed), changes)

    def named(self, seed: int = 0) -> Pipeline:
        """Return the pipeline without the changes that have no name of their own."""
        pipeline = self.ablated(seed)
        pipeline = with_protocol(pipeline, self.protocol) if self.protocol else pipeline
        return with_selection(pipeline, self.selection) if self.selection else pipeline


@cache
def _name(asked: Experiment) -> str:
    name = asked.told()
    if asked.is_short:
        return name if name.endswith("-short") else f"{name}-short"
    return name if asked.called or asked.is_as_named else f"{name}-changed"


@cache
def _is_short(asked: Experiment) -> bool:
    return is_shorter(asked.pipeline(0), asked.ablated())


@cache
def _is_as_named(asked: Experiment) -> bool:
    return asked.pipeline(0).options() == asked.named().options()


def _laid(pipeline: Pipeline, changes: Sequence[str]) -> Pipeline:
    for text in changes:
        pipeline = change(pipeline, *as_pair(text))
    return pipeline


def seeds_of(text: str) -> tuple[int, ...]:
    """Return the seeds that ``--seeds`` asks for: 5 is 0 to 4, 0,3,7 are these, and 7, is one."""
    told = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in told if part) or not any(told):
        raise InputError(f"--seeds {text} is neither a number of seeds nor a list of them",
                         "--seeds 5 for 0 to 4, --seeds 0,3,7 for these, --seeds 7, for one")
    numbers = [int(part) for part in told if part]
    seeds = tuple(range(numbers[0])) if len(told) == 1 else tuple(dict.fromkeys(numbers))
    if not seeds:
        raise InputError("--seeds 0 asks for no run", "--seeds 5 for the seeds 0 to 4, --seeds 0, for the seed 0")
    return seeds


def protocol_of(pipeline: Pipeline) -> str:
    """Return the protocol of a pipeline: of its score on the images that nothing was fitted to, where it has some."""
    if pipeline.data.held_out is not None:
        return "train-test"
    return clustered_protocol(pipeline)


def clustered_protocol(pipeline: Pipeline) -> str:
    """Return the protocol of a score on the clustered images themselves."""
    return "train+test" if {"test", "val"} & set(pipeline.data.split.split("+")[1:]) else "on-train"


def with_protocol(pipeline: Pipeline, protocol: str) -> Pipeline:
    """Return the pipeline that clusters and scores the images of a protocol; InputError where the data has no such."""
    if protocol not in PROTOCOLS:
        raise InputError(f"no protocol {protocol!r}", nearest(protocol, list(PROTOCOLS)))
    if protocol == protocol_of(pipeline):
        return pipeline
    name = data_set_name(pipeline.data.source)
    if name is None:
        raise InputError(f"protocol {protocol} needs a data set with splits, and this recipe has none",
                         "name one: --set data.source=cifar10")
    test = "val" if "val" in DATASETS[name].splits else "test"
    split = f"train+{test}" if protocol == "train+test" else "train"
    pipeline = change(pipeline, "data.split", split)
    learned = pipeline.data.pretrain_split
    if learned and "unlabeled" in learned:
        pipeline = change(pipeline, "data.pretrain_split", f"{split}+unlabeled")
    held_out = test if protocol == "train-test" else None
    for part in filter(None, (split, held_out)):
        split_parts(name, part)  # the data set may have no test images
    return change(pipeline, "data.held_out", held_out)


def with_selection(pipeline: Pipeline, selection: str) -> Pipeline:
    """Return the pipeline whose clustering and refinement keep the last epoch, or choose without labels."""
    if selection == "oracle":
        raise InputError("--selection oracle: true labels never choose a result here",
                         "what they would choose stands beside each result as its oracle, where a run keeps it")
    if selection not in SELECTIONS:
        raise InputError(f"no selection {selection!r}", nearest(selection, list(SELECTIONS)))
    is_last = selection == "last"
    if hasattr(pipeline.cluster, "select"):
        chooses = _CHOOSES[type(pipeline.cluster).__name__]
        pipeline = change(pipeline, "cluster.select", "last" if is_last else chooses)
    if hasattr(pipeline.refine, "keep"):
        pipeline = change(pipeline, "refine.keep", "last" if is_last else "better")
    return pipeline


def selections(pipeline: Pipeline) -> dict[str, str]:
    """Return what chooses the result of each stage that trains, last or label-free, by the title of the result."""
    found = {}
    for stage in RESULTS:
        method = getattr(pipeline, stage)
        chosen = getattr(method, "select", getattr(method, "keep", None))
        if method is not None and (chosen is not None or stage == "robust"):
            found[pipeline.title(stage)] = "last" if chosen in ("last", None) else "label-free"
    return found


def is_shorter(pipeline: Pipeline, whole: Pipeline) -> bool:
    """Return whether a pipeline trains for fewer epochs or rounds than ``whole``, or on fewer images."""
    if pipeline.data.limit is not None and pipeline.data.limit < (whole.data.limit or float("inf")):
        return True
    for part in ("pretrain", "cluster", "refine", "robust"):
        mine, theirs = getattr(pipeline, part), getattr(whole, part)
        if type(mine) is type(theirs) and any(getattr(mine, name, 0) < getattr(theirs, name, 0) for name in SCHEDULE):
            return True
    return False
