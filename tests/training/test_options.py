"""Options out of their range are told by name, and an optimizer is the one that was named."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import nn

from phyla.training.device import choose_device
from phyla.training.options import faults, make_optimizer


@dataclass
class Some:
    n: int = 1
    temperature: float = 0.1
    kind: Literal["large", "small"] = "large"
    text: str = "anything"


@dataclass
class Training:
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    n_epochs: int = 1
    share: float = 0.5


def told(**values: object) -> list[str]:
    return [str(fault) for fault in faults(Some(**values), least={"n": 1}, above={"temperature": 0})]


def test_what_is_in_its_range_has_no_fault() -> None:
    assert told() == told(kind="small", text="", n=9, temperature=1e-9) == []


@pytest.mark.parametrize(("values", "said"), [
    ({"n": 0}, "n must be at least 1, got 0"), ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"temperature": math.nan}, "temperature must be above 0, got nan"), ({"n": math.nan}, "n must be at least 1"),
    ({"kind": "smal"}, "kind='smal' is not allowed. hint: did you mean small?"),
    ({"kind": 3}, "kind=3 is not allowed. hint: allowed: large, small"),
])
def test_a_fault_names_the_option_the_value_and_what_is_allowed(values: dict[str, object], said: str) -> None:
    (found,) = told(**values)
    assert found.startswith(said)


@pytest.mark.parametrize(("values", "said"), [
    ({"lr": 0.0}, "lr must be above 0 and finite, got 0.0"), ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"),
    ({"lr": math.inf}, "lr must be above 0 and finite, got inf"), ({"lr": math.nan}, "lr must be above 0 and finite"),
    ({"momentum": -0.1}, "momentum must be at least 0 and below 1, got -0.1"),
    ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"), ({"momentum": math.nan}, "momentum must"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
    ({"weight_decay": math.inf}, "weight_decay must be at least 0 and finite, got inf"),
    ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"),
    ({"share": 1.0}, "share must be at least 0 and below 1, got 1.0"), ({"share": -0.5}, "share must be at least 0"),
])
def test_what_every_training_has_is_judged_by_its_name(values: dict[str, float], said: str) -> None:
    (found,) = faults(Training(**values), below_one=("share",))
    assert str(found).startswith(said)


def test_the_ends_of_what_is_allowed_have_no_fault() -> None:
    assert not list(faults(Training(lr=1e-12, momentum=0.0, share=0.0), below_one=("share",)))
    assert not list(faults(Training(lr=30.0, momentum=0.999, weight_decay=5.0, n_epochs=9999), below_one=("share",)))


def test_every_fault_is_told() -> None:
    assert len(told(n=-1, temperature=-1.0, kind="")) == 3


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(("name", "kind", "expected"), [
    ("adam", torch.optim.Adam, {"lr": 0.3, "weight_decay": 0.02, "betas": (0.9, 0.999)}),
    ("sgd", torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.02, "momentum": 0.8, "nesterov": False})])
def test_the_optimizer_is_the_one_that_was_named(name: str, kind: type, expected: dict[str, object]) -> None:
    weight = nn.Parameter(torch.zeros(2))
    made = make_optimizer(name, [weight], choose_device("cpu"), lr=0.3, momentum=0.8, weight_decay=0.02)
    assert type(made) is kind and made.param_groups[0]["params"] == [weight]
    assert {key: made.param_groups[0][key] for key in expected} == expected
