"""Training with recorded steps on a CPU: a tape stands in for the CUDA graph."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from phyla.training import loop
from phyla.training.capture import Recorder
from phyla.training.device import Device
from tape import Tape

GRAPH = Device(torch.device("cpu"), engine="graph")
"""A CPU whose steps are recorded; `record_on_tapes` makes that possible."""

# On a CPU the fused optimizers make tensors of their options; on a GPU these are arguments of one kernel.
_ALLOWED = ("lift_fresh",)


class OnTape:
    """A step on a tape; recording it carried it out."""

    has_run = True
    made = 0

    def __init__(self, body: Callable[[], None], generator: torch.Generator, stream: None, pool: None) -> None:
        type(self).made += 1
        with Tape() as self.tape:
            body()

    def replay(self) -> None:
        """Carry it out again."""
        self.tape.replay()


def record_on_tapes(monkeypatch: pytest.MonkeyPatch) -> type[OnTape]:
    """Let loops record their steps on tapes, and return what counts them."""
    class Counted(OnTape):
        made = 0

    monkeypatch.setattr(loop, "Recorder", partial(Recorder, record=Counted))
    return Counted
