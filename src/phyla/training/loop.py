"""The generator of steps: checkpoints, resume, metrics, progress, and a stop when the loss is not finite.

A method writes its own loop and asks this one only for the next step::

    run = Loop("pretrain", order, n_epochs=500, state={"net": net, "optimizer": optimizer}, folder=folder, seed=0)
    for step in run:
        loss = ...
        step.backward(loss, optimizer)
        step.log(loss=loss)
        if step.ends_epoch:
            step.record(score=...)
    run.history

A checkpoint is written between two steps, at most every ``CHECKPOINT_SECONDS``, and holds all that the next step needs;
random numbers come from (seed, step). A run killed at any moment and started again is therefore bit-equal, on one
machine, to one that was never stopped.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypedDict, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from phyla.errors import CorruptFileError, InputError, NonFiniteLossError
from phyla.images.batches import Order
from phyla.progress import bar
from phyla.randomness import generator
from phyla.storage import read_checkpoint, remove_partial, write_checkpoint

log = logging.getLogger("phyla")

FORMAT = 1
CHECKPOINT_SECONDS = 30.0
CHECK_EVERY = 50
"""Steps between two looks at the loss on an accelerator, where each look waits for the device; a CPU looks at each."""

Record = dict[str, str | int | float]


@runtime_checkable
class Stateful(Protocol):
    """A module or an optimizer."""

    def state_dict(self) -> dict[str, object]:
        """Return everything that must be saved."""

    def load_state_dict(self, state: dict[str, object]) -> object:
        """Take back what ``state_dict`` returned."""


class _Held(TypedDict):
    # What a checkpoint holds.
    format: int
    name: str
    key: str
    next: int
    stopped: str | None
    state: dict[str, dict[str, object]]
    memory: dict[str, object]
    history: list[Record]
    sums: dict[str, tuple[Tensor, int]]
    extras: dict[str, float]


class Step:
    """One step of a loop: where it stands, which images it takes, and what it reports."""

    def __init__(self, loop: "Loop", epoch: int, position: int, indices: Int[Tensor, " batch"]) -> None:
        self._loop, self.epoch, self.position, self.indices = loop, epoch, position, indices
        self.index = epoch * loop.order.steps_per_epoch + position
        self.ends_epoch = position == loop.order.steps_per_epoch - 1
        self.generator = generator(loop.seed, loop.name, self.index)

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradient of ``loss`` and move the parameters of ``optimizer``."""
        self._loop.watch(loss, self.index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def log(self, **values: Tensor | float) -> None:
        """Add to the epoch's means; tensors stay on their device until the epoch ends."""
        for name, value in values.items():
            number = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            if number.device.type != "mps":  # Apple's GPUs have no float64
                number = number.double()
            total, count = self._loop.sums.get(name, (torch.zeros_like(number), 0))
            self._loop.sums[name] = (total + number, count + 1)

    def mean(self, name: str) -> float:
        """Return the mean of what was logged as ``name`` in this epoch so far; waits for the device."""
        total, count = self._loop.sums[name]
        return float(total / count)

    def record(self, **values: float) -> None:
        """Put numbers that are known once an epoch into the epoch's record."""
        self._loop.extras.update(values)

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Set the learning rate of this step, and put it into the epoch's record."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._loop.extras.setdefault("lr", lr)


class Loop:
    """Steps over ``n_epochs`` of ``order``; see the module's text.

    Parameters
    ----------
    name : of the stage, in records, progress and random streams
    order : which images make up each step
    n_epochs : epochs to run
    state : everything with a ``state_dict`` that changes from step to step
    memory : a plain dict of tensors and numbers that the method keeps (the best so far, counters); restored in place
    folder : where the checkpoint lies; None keeps nothing on disk
    key : fingerprint of options and inputs; a checkpoint of another key is refused
    seed : of the steps' generators
    """

    def __init__(self, name: str, order: Order, *, n_epochs: int, state: Mapping[str, Stateful], seed: int,
                 memory: dict[str, object] | None = None, folder: Path | None = None, key: str = "",
                 checkpoint_seconds: float | None = None) -> None:
        if n_epochs < 1:
            raise InputError(f"{name}: n_epochs must be at least 1, got {n_epochs}")
        self.name, self.order, self.n_epochs, self.seed, self.key = name, order, n_epochs, seed, key
        self.state, self.memory, self.folder = state, memory if memory is not None else {}, folder
        self.every = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
        self.history: list[Record] = []
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.extras: dict[str, float] = {}
        self.stopped: str | None = None
        self._next, self._saved_at = 0, time.monotonic()
        self._unchecked: list[tuple[int, Tensor]] = []

    @property
    def path(self) -> Path | None:
        """Where the checkpoint lies."""
        return self.folder / "checkpoint.pt" if self.folder else None

    def __iter__(self) -> Iterator[Step]:
        self._resume()
        per_epoch, total = self.order.steps_per_epoch, self.n_epochs * self.order.steps_per_epoch
        permutation: Tensor | None = None
        with bar(self.name, total=total, unit="step", done=self._next) as shown:
            while self._next < total and self.stopped is None:
                epoch, position = divmod(self._next, per_epoch)
                if permutation is None or position == 0:
                    permutation = self.order.epoch(epoch)
                step = Step(self, epoch, position, self.order.indices(epoch, position, permutation))
                yield step
                self._next += 1
                if step.ends_epoch:
                    self._end_epoch(epoch)
                shown.advance(note=self._note(epoch))
                if self._next < total and time.monotonic() - self._saved_at >= self.every:
                    self.save()
        self._check()
        self.save()

    def stop(self, reason: str) -> None:
        """End the loop after this step; ``reason`` is logged and kept in ``stopped``."""
        self.stopped = reason
        log.warning("%s stopped: %s", self.name, reason)

    def watch(self, loss: Tensor, step: int) -> None:
        """Remember ``loss`` and raise NonFiniteLossError once one is seen to be NaN or infinite."""
        self._unchecked.append((step, loss.detach()))
        if loss.device.type == "cpu" or len(self._unchecked) >= CHECK_EVERY:
            self._check()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all, if a folder was given; between two steps, as the loop does."""
        self._check()
        self._check_weights()
        self._saved_at = time.monotonic()
        if self.path is None:
            return
        held = {"format": FORMAT, "name": self.name, "key": self.key, "next": self._next, "stopped": self.stopped,
                "state": {name: part.state_dict() for name, part in self.state.items()},
                "memory": _plain(self.memory), "history": _plain(self.history), "sums": self.sums,
                "extras": _plain(self.extras)}
        write_checkpoint(self.path, held)

    def _check_weights(self) -> None:
        for part in self.state.values():
            values = part.state_dict().values() if isinstance(part, nn.Module) else ()
            if not all(bool(value.isfinite().all()) for value in values if value.is_floating_point()):
                raise NonFiniteLossError(f"{self.name}: the weights are not finite after step {self._next - 1}",
                                         f"lower the learning rate (--set {self.name}.lr=...)")

    def _resume(self) -> None:
        if self.path is None:
            return
        remove_partial(self.path)
        if not self.path.exists():
            return
        held = _read(self.path)
        if held["key"] != self.key or held["name"] != self.name:
            raise InputError(f"{self.path} belongs to a run with other options or images",
                             "use another folder, or delete the file to start over")
        device = self.order.device
        for name, part in self.state.items():
            part.load_state_dict(held["state"][name])
        self.memory.clear()
        self.memory.update(held["memory"])
        self.history, self.extras, self.stopped = held["history"], held["extras"], held["stopped"]
        self.sums = {name: (total.to(device), count) for name, (total, count) in held["sums"].items()}
        self._next = held["next"]
        log.info("%s goes on at step %d of %d", self.name, self._next, self.n_epochs * self.order.steps_per_epoch)

    def _end_epoch(self, epoch: int) -> None:
        self._check()
        means = {name: float(total / count) for name, (total, count) in self.sums.items()}
        self.history.append({"stage": self.name, "epoch": epoch + 1, **means, **self.extras})
        self.sums, self.extras = {}, {}

    def _note(self, epoch: int) -> str:
        last = self.history[-1] if self.history else {}
        loss = f", loss {last['loss']:.3f}" if "loss" in last else ""
        return f"epoch {epoch + 1}/{self.n_epochs}{loss}"

    def _check(self) -> None:
        bad = [step for step, loss in self._unchecked if not math.isfinite(float(loss))]
        self._unchecked = []
        if bad:
            kept = "; the last checkpoint is intact" if self.path is not None and self.path.exists() else ""
            raise NonFiniteLossError(f"{self.name}: the loss is not finite at step {bad[0]}"
                                     f"{' and later ones' if len(bad) > 1 else ''}{kept}",
                                     f"lower the learning rate (--set {self.name}.lr=...) or look for damaged images")


_START_OVER = "delete it: the stage starts over, all finished stages are kept"


def _read(path: Path) -> _Held:
    held = read_checkpoint(path, hint=_START_OVER, verify=True)
    if not isinstance(held, dict) or held.get("format") != FORMAT or held.keys() != _Held.__annotations__.keys():
        raise CorruptFileError(f"{path} is not a checkpoint of this version", _START_OVER)
    return cast(_Held, held)


def _plain(value: object) -> object:
    # A checkpoint is read back without trust, which NumPy's numbers do not pass: np.float64(1.5) becomes 1.5.
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(part) for part in value)
    return value.item() if isinstance(value, np.generic) else value
