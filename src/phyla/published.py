"""What the papers say: a row for each published number, and named ablations of recipes.

``published.toml`` holds the numbers, in percent, with their protocol and a recipe, or with the reason why there is
none; ``ablations.toml`` the changes of a recipe that a paper, or a question about it, asks for.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from phyla.errors import InputError, nearest

Protocol = Literal["train-test", "train+test", "on-train"]
"""Which images are clustered and which scored: train-test: clusters of the train images, scored on the test images;
train+test: of both, scored on both; on-train: clustered and scored are the same train images."""

Selection = Literal["last", "label-free", "oracle"]
"""What chooses among epochs or heads: nothing, the last epoch; a score without labels; true labels (only reported)."""

METRICS: Mapping[str, tuple[str, str]] = {
    "acc": ("hungarian_accuracy", "accuracy"), "nmi": ("nmi", "NMI"), "ari": ("ari", "ARI"), "ami": ("ami", "AMI"),
    "top5": ("top5_accuracy", "top-5 accuracy"), "many": ("many_to_one_accuracy", "many-to-one accuracy"),
    "ece": ("expected_calibration_error", "calibration error"), "knn": ("knn_accuracy_200_memory", "kNN accuracy"),
    "knn200": ("knn_accuracy_200", "kNN accuracy"), "purity": ("neighbor_purity", "neighbor purity"),
    **{f"fgsm{n}": (f"fgsm_drop_{n / 10:g}", f"drop at {n / 10:g}") for n in range(1, 6)},
    **{f"bim{n}": (f"bim_drop_{n / 100:g}", f"drop at {n / 100:g}") for n in range(1, 6)}}
"""Short names in ``published.toml``: of a score as a run calls it, and in words."""


@dataclass(frozen=True)
class Figure:
    """A published number in percent, and its standard deviation where one is told."""

    value: float
    sd: float | None = None

    def text(self) -> str:
        """Return ``87.6 ± 0.4``, or the number alone."""
        return _digits(self.value) + (f" ± {_digits(self.sd)}" if self.sd is not None else "")


@dataclass(frozen=True)
class Published:
    """A row of a paper's table.

    Parameters
    ----------
    paper, table : where it stands
    method, data : as the paper calls the method; the data set as phyla does
    figures : by short name of ``METRICS``
    protocol, selection : as the authors did
    seeds : runs behind the number; 0 where nobody says
    of : mean of the runs, best of them, or one number
    recipe, ablation : what does it here; no recipe has its reason in ``why``
    result : the stage of the recipe whose result it is, or the row of a run's table
    source : where the number was read
    note : what to know before comparing
    """

    paper: str
    table: str
    method: str
    data: str
    figures: Mapping[str, Figure]
    protocol: Protocol
    selection: str
    seeds: int
    of: str
    recipe: str
    ablation: str
    result: str
    why: str
    source: str
    note: str

    def numbers(self) -> str:
        """Return every figure with the name of its metric."""
        told = [f"{METRICS[key][1]} {figure.text()}" for key, figure in self.figures.items()]
        return ", ".join(told) or "none published"


@cache
def published() -> tuple[Published, ...]:
    """Return every published row, in the order of the file."""
    rows = []
    for table in _read("published.toml")["tables"]:
        common = {key: value for key, value in table.items() if key != "rows"}
        rows += [_row(told) for row in table["rows"] for told in _of_each_set(common | row)]
    return tuple(rows)


def published_for(recipe: str, ablation: str = "") -> tuple[Published, ...]:
    """Return the rows that a recipe, changed by an ablation, is to be held against."""
    return tuple(row for row in published() if (row.recipe, row.ablation) == (recipe, ablation))


@cache
def ablations(recipe: str) -> Mapping[str, tuple[str, ...]]:
    """Return the ablations of a recipe: name to changes, as typed after ``--set``."""
    found: dict[str, tuple[str, ...]] = {}
    for pattern, table in _read("ablations.toml").items():
        if fnmatchcase(recipe, pattern):
            found |= {name: tuple(changes) for name, changes in table.items()}
    return found


def ablation(recipe: str, name: str) -> tuple[str, ...]:
    """Return the changes that an ablation makes; InputError with the nearest name where there is none."""
    known = ablations(recipe)
    if name not in known:
        raise InputError(f"recipe {recipe} has no ablation {name!r}", nearest(name, list(known)))
    return known[name]


def _of_each_set(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row once for each data set that its numbers are of; as it is where they name none."""
    by_set = {key: row[key] for key in METRICS if isinstance(row.get(key), dict)}
    if not by_set:
        yield row
        return
    rest = {key: value for key, value in row.items() if key not in by_set}
    for data in dict.fromkeys(name for numbers in by_set.values() for name in numbers):
        own = {key: numbers[data] for key, numbers in by_set.items() if data in numbers}
        yield rest | own | {"data": data, "recipe": rest.get("recipe", "").format(data=data)}


def _row(told: dict[str, Any]) -> Published:
    figures = {key: _figure(told.pop(key)) for key in METRICS if key in told}
    usual: dict[str, Any] = {"ablation": "", "recipe": "", "result": "", "why": "", "note": "", "selection": "last",
                             "seeds": 0, "of": "one"}
    row = Published(figures=figures, **(usual | told))
    if row.protocol not in get_args(Protocol):
        raise InputError(f"{row.paper}, {row.table}: protocol {row.protocol!r}", "published.toml")
    return row


def _digits(value: float) -> str:
    return f"{value:.1f}" if round(value, 1) == value else f"{value:g}"


def _figure(told: float | list[float]) -> Figure:
    return Figure(*(float(part) for part in told)) if isinstance(told, list) else Figure(float(told))


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files("phyla") / name).read_text(encoding="utf-8"))
