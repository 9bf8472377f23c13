"""What the options of all methods share: how a value that cannot be used is told, and the optimizer that one names."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import Field, fields
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, runtime_checkable

import torch
from torch import nn

from phyla.errors import InputError, nearest
from phyla.training.device import Device
from phyla.types import Neighbors

_IS_SHARE = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_USUAL: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("above 0 and finite", lambda value: 0 < value < math.inf),
    "weight_decay": ("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "momentum": _IS_SHARE,
    "n_epochs": ("at least 1", lambda value: value >= 1),
}
"""What a field of each of these names must be in any method, in words and as a test; NaN passes none."""


@runtime_checkable
class Options(Protocol):
    """A dataclass whose fields are options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def faults(options: Options, *, least: Mapping[str, float] | None = None,
           above: Mapping[str, float] | None = None, below_one: Sequence[str] = ()) -> Iterator[InputError]:
    """Yield what is wrong with ``options``, an error each: numbers out of their range, and words that are not allowed.

    Fields called lr, momentum, weight_decay and n_epochs are judged in every method, without being named here.

    Parameters
    ----------
    options : a dataclass; a field declared as ``Literal`` must hold one of its words
    least : the least value of some fields, itself allowed
    above : what some fields must be above
    below_one : fields that must be at least 0 and below 1
    """
    held = {field.name for field in fields(options)}
    usual = {name: rule for name, rule in _USUAL.items() if name in held}
    for name, (words, allows) in (usual | dict.fromkeys(below_one, _IS_SHARE)).items():
        if not allows(getattr(options, name)):
            yield InputError(f"{name} must be {words}, got {getattr(options, name)}")
    for word, bounds in (("at least", least), ("above", above)):
        for name, bound in (bounds or {}).items():
            value = getattr(options, name)
            if not (value >= bound if word == "at least" else value > bound):  # not: NaN is neither
                yield InputError(f"{name} must be {word} {bound}, got {value}")
    for field in fields(options):
        value, allowed = getattr(options, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in allowed:
            yield InputError(f"{field.name}={value!r} is not allowed", nearest(str(value), list(allowed)))


def neighbor_faults(*sets: tuple[Sized, Neighbors | None] | None) -> Iterator[InputError]:
    """Yield an error for each of the neighbors that are not of the images they come with."""
    for images, neighbors in (given for given in sets if given is not None):
        if neighbors is not None and neighbors.indices.shape != (len(images), max(1, neighbors.n_neighbors)):
            yield InputError(f"the neighbors belong to another set: {neighbors.n_neighbors} each of {len(neighbors)} "
                             f"images, not of {len(images)}", "find them again for these images")


def make_optimizer(name: Literal["adam", "adamw", "sgd"], parameters: Iterable[nn.Parameter], device: Device, *,
                   lr: float, momentum: float, weight_decay: float, nesterov: bool = False) -> torch.optim.Optimizer:
    """Return Adam (L2 decay inside the gradient), AdamW (decay apart from it) or SGD with momentum.

    Neither Adam takes a ``momentum``. Without momentum ``nesterov`` means nothing. On a GPU, and where steps are
    recorded, one kernel moves everything.
    """
    fused = True if device.device.type == "cuda" or device.engine != "eager" else None
    if name in ("adam", "adamw"):
        recorded = device.engine != "eager" and device.device.type == "cuda"
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        adam = kind(parameters, lr, weight_decay=weight_decay, fused=fused, capturable=recorded)
        adam._warned_capturable_if_run_uncaptured = recorded  # steps that warm up are not to be wondered at
        return adam
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0,
                           fused=fused)
