"""What the options of all methods share: how a value that cannot be used is told, and the optimizer that one names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, fields
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, runtime_checkable

import torch
from torch import nn

from phyla.errors import InputError, nearest


@runtime_checkable
class Options(Protocol):
    """A dataclass whose fields are options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def faults(options: Options, *, least: Mapping[str, float] | None = None,
           above: Mapping[str, float] | None = None) -> Iterator[InputError]:
    """Yield what is wrong with ``options``, an error each: numbers out of their range, and words that are not allowed.

    Parameters
    ----------
    options : a dataclass; a field declared as ``Literal`` must hold one of its words
    least : the least value of some fields, itself allowed
    above : what some fields must be above
    """
    for word, bounds in (("at least", least), ("above", above)):
        for name, bound in (bounds or {}).items():
            value = getattr(options, name)
            if not (value >= bound if word == "at least" else value > bound):  # not: NaN is neither
                yield InputError(f"{name} must be {word} {bound}, got {value}")
    for field in fields(options):
        value, allowed = getattr(options, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in allowed:
            yield InputError(f"{field.name}={value!r} is not allowed", nearest(str(value), list(allowed)))


def make_optimizer(name: Literal["adam", "sgd"], parameters: Iterable[nn.Parameter], *, lr: float, momentum: float,
                   weight_decay: float) -> torch.optim.Optimizer:
    """Return Adam (L2 decay inside the gradient, not AdamW; it takes no ``momentum``) or SGD with momentum."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay)
