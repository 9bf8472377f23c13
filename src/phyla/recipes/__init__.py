"""Named pipelines. Each function's docstring is its experiment card: paper, command, cost, expected number."""

from collections.abc import Callable, Mapping

from phyla.errors import InputError, nearest
from phyla.pipeline import Pipeline
from phyla.recipes import frozen, nnm, ruc, scan, small, superand

RECIPES: Mapping[str, Callable[[], Pipeline]] = {
    function.__name__.replace("_", "-"): function
    for module in (scan, nnm, superand, ruc, small, frozen) for function in module.RECIPES
}


def recipe(name: str) -> Pipeline:
    """Return the pipeline called ``name``; InputError with the nearest name when there is none."""
    if name not in RECIPES:
        raise InputError(f"no recipe {name!r}", nearest(name, list(RECIPES)))
    return RECIPES[name]()
