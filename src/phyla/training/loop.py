"""The generator of steps: checkpoints, resume, metrics, progress, and a stop when the loss is not finite.

A method writes its own loop and asks this one only for the next step::

    def advance(step, pixels):
        loss = ...
        step.backward(loss, optimizer)
        step.log(loss=loss)

    run = Loop("pretrain", order, n_epochs=500, state={"net": net, "optimizer": optimizer}, folder=folder, seed=0,
               device=device)
    for step in run:
        step.run(advance, pixels.take(step.rows))
        if step.ends_epoch:
            step.record(score=...)
    run.history

The body of a step is a function of its own so that it serves three engines: it runs as it is, or a GPU records it once
and replays it (``training/capture.py``), or several processes each run it on their ``rows`` of the batch
(``training/group.py``).

A checkpoint is written between two steps, at most every ``CHECKPOINT_SECONDS``, and holds all that the next step needs;
random numbers come from (seed, step). A run on a CPU that is killed at any moment and started again is therefore
bit-equal, on one machine, to one that was never stopped; on a GPU sums may be taken in another order.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from phyla.errors import CorruptFileError, InputError, NonFiniteLossError
from phyla.images.augment import Views
from phyla.images.batches import Order, Pixels, Resident
from phyla.progress import bar
from phyla.randomness import derive_seed, generator
from phyla.storage import read_checkpoint, remove_partial, write_checkpoint
from phyla.training.agreement import by_first
from phyla.training.capture import Body, Recorder
from phyla.training.device import Device

log = logging.getLogger("phyla")

FORMAT = 2
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
    sums: dict[str, Tensor]
    extras: dict[str, float]


class Step:
    """One step of a loop: where it stands, which images it takes, and what it reports.

    ``indices`` are the images of the whole batch, ``rows`` those that this process shows: all, where there is one.
    """

    def __init__(self, loop: "Loop", epoch: int, position: int, indices: Int[Tensor, " batch"],
                 source: torch.Generator | None = None) -> None:
        self._loop, self.epoch, self.position, self.indices = loop, epoch, position, indices
        self.index = epoch * loop.order.steps_per_epoch + position
        self.ends_epoch = position == loop.order.steps_per_epoch - 1
        self.generator = generator(loop.seed, loop.name, self.index) if source is None else source
        self.part = loop.device.group.part(len(indices))
        self.rows = indices[self.part]

    def run(self, body: Body, *arguments: Any) -> None:
        """Carry out ``body(step, *arguments)``, the part of the step that a GPU may record and repeat.

        Inside, all that differs from step to step is read from ``indices``, ``rows``, ``generator`` and the arguments,
        of which tensors and floats may differ freely; ``index`` and its like belong outside.
        """
        if self._loop.recorder is None:
            body(self, *arguments)
        else:
            self._loop.recorder.run(body, self, arguments)

    def view(self, views: Views, pixels: UInt8[Tensor, "batch height width 3"], *, whole: bool = False
             ) -> Float[Tensor, "batch 3 size size"]:
        """Return one view of each of ``pixels``, those of ``rows`` (``whole``: of ``indices``), as networks want it.

        The views do not depend on how many processes share the batch.
        """
        start = 0 if whole else self.part.start
        recorded = self._loop.recorder is not None
        made = views(pixels, self.generator, total=len(self.indices), start=start, static=recorded or None)
        return self._loop.device.arrange(made)

    def gather(self, rows: Tensor, *, dim: int = 0) -> Tensor:
        """Return what all processes made of their rows, in the order of ``indices``; the loss is taken of these.

        ``dim`` is the axis of the rows.
        """
        group = self._loop.device.group
        return rows if group.size == 1 else group.gather(rows.movedim(dim, 0), len(self.indices)).movedim(0, dim)

    def gather_pairs(self, rows: Tensor) -> Tensor:
        """Return the same of rows of first views, then of second views: those of all first views, then all second."""
        group = self._loop.device.group
        return rows if group.size == 1 else torch.cat([self.gather(half) for half in rows.chunk(2)])

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer, *,
                 only_if: Bool[Tensor, ""] | None = None) -> None:
        """Take the gradient of ``loss`` and move the parameters of ``optimizer``; none where ``only_if`` is false.

        ``loss`` is that of the whole batch, in every process.
        """
        self._loop.watch(loss, self.index)
        waits = only_if is not None and not optimizer.defaults.get("fused")
        if waits and not bool(only_if):
            return
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._loop.device.group.add_gradients(parameters, means=self._loop.statistics)
        if only_if is None or waits:
            optimizer.step()
        else:  # as a loss scaler stops a step without the host knowing of it
            _begin_momentum(optimizer)
            optimizer.grad_scale, optimizer.found_inf = None, (~only_if).float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    def log(self, *, only_if: Bool[Tensor, ""] | None = None, **values: Tensor | float) -> None:
        """Add to the epoch's means, where ``only_if`` is not false; tensors stay on their device until it ends."""
        for name, value in values.items():
            number = value.detach() if isinstance(value, Tensor) else self._loop.number(value)
            if number.device.type != "mps":  # Apple's GPUs have no float64
                number = number.double()
            added = torch.stack([number, torch.ones_like(number)])
            if only_if is not None:
                added = added.where(only_if, torch.zeros_like(added))
            self._loop.sums.setdefault(name, torch.zeros_like(added)).add_(added)

    def mean(self, name: str) -> float:
        """Return the mean of what was logged as ``name`` in this epoch so far; waits for the device."""
        total, count = self._loop.sums[name].tolist()
        return float(total / count)

    def record(self, **values: float) -> None:
        """Put numbers that are known once an epoch into the epoch's record."""
        self._loop.extras.update(values)

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Set the learning rate of this step, and put it into the epoch's record."""
        for group in optimizer.param_groups:
            held = group["lr"]
            if self._loop.recorder is None:
                group["lr"] = lr
            elif isinstance(held, Tensor) and held.device.type == self._loop.device.device.type:
                held.fill_(lr)  # where a recorded step reads it
            else:  # of a fresh optimizer, or of a checkpoint that was read
                group["lr"] = torch.full((), lr, device=self._loop.device.device)
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
    device : its engine and its group; None: steps run as they are, in one process
    pixels : a store that reads images while the device computes is told of each step before its turn
    wants : which images a step will take from it; None: its ``rows``
    """

    def __init__(self, name: str, order: Order, *, n_epochs: int, state: Mapping[str, Stateful], seed: int,
                 memory: dict[str, object] | None = None, folder: Path | None = None, key: str = "",
                 device: Device | None = None, pixels: Pixels | None = None,
                 wants: Callable[[Step], Int[Tensor, " images"]] | None = None,
                 checkpoint_seconds: float | None = None) -> None:
        self.device = device or Device(order.device)
        self.pixels, self.wants = None if isinstance(pixels, Resident) else pixels, wants or (lambda step: step.rows)
        if n_epochs < 1:
            raise InputError(f"{name}: n_epochs must be at least 1, got {n_epochs}")
        if order.rows < self.device.group.size:
            raise InputError(f"{name}: a batch of {order.rows} images is too small for {self.device.group.size} "
                             "processes", "raise batch_size or lower --devices")
        self.name, self.order, self.n_epochs, self.seed, self.key = name, order, n_epochs, seed, key
        self.state, self.memory, self.folder = state, memory if memory is not None else {}, folder
        self.every = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
        self.history: list[Record] = []
        self.sums: dict[str, Tensor] = {}  # total and count of what was logged in this epoch
        self.extras: dict[str, float] = {}
        self.stopped: str | None = None
        self._next, self._saved_at = 0, time.monotonic()
        self._permutations: dict[int, Tensor] = {}
        self._unchecked: list[tuple[int, Tensor]] = []
        self.recorder = None if self.device.engine == "eager" else Recorder(
            torch.Generator(self.device.device), self.device.device)
        self._number = torch.zeros((), dtype=torch.int64, device=self.device.device)  # of a recorded step
        self._first_bad = torch.full_like(self._number, _NEVER)

    @cached_property
    def statistics(self) -> list[Tensor]:
        """BatchNorm's running statistics where each process has its own batch's: they are averaged at every step."""
        if self.device.synced or self.device.group.size == 1:
            return []
        norms = [layer for part in self.state.values() if isinstance(part, nn.Module) for layer in part.modules()
                 if isinstance(layer, nn.BatchNorm2d)]
        return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]

    @property
    def path(self) -> Path | None:
        """Where the checkpoint lies."""
        return self.folder / "checkpoint.pt" if self.folder else None

    def __iter__(self) -> Iterator[Step]:
        self._resume()
        total = self.n_epochs * self.order.steps_per_epoch
        with self.device.tuned(), bar(self.name, total=total, unit="step", done=self._next) as shown:
            self._announce(self._next, total)
            while self._next < total and self.stopped is None:
                self._announce(self._next + 1, total)
                step = self._step(self._next)
                yield step
                self._next += 1
                if step.ends_epoch:
                    self._end_epoch(step.epoch)
                elif self.recorder is not None and self._next % CHECK_EVERY == 0:
                    self._check()
                shown.advance(note=self._note(step.epoch))
                if self._next < total and time.monotonic() - self._saved_at >= self.every:
                    self.save()
        self._check()
        self.save()
        for part in self.state.values():
            if self.recorder is not None and isinstance(part, torch.optim.Optimizer):
                part.zero_grad(set_to_none=True)  # gradients lie in the recordings' memory, which would stay with them

    def _step(self, index: int, *, early: bool = False) -> Step:
        """Return a step; one that is ``early`` is only to be looked at, and leaves the fixed places alone."""
        epoch, position = divmod(index, self.order.steps_per_epoch)
        if epoch not in self._permutations:
            self._permutations = {at: order for at, order in self._permutations.items() if at == epoch - 1}
            self._permutations[epoch] = self.order.epoch(epoch)
        indices = self.order.indices(epoch, position, self._permutations[epoch])
        if self.recorder is None:
            return Step(self, epoch, position, indices)
        source = torch.Generator(self.device.device) if early else self.recorder.generator
        source.manual_seed(derive_seed(self.seed, self.name, index))
        if not early:
            indices = self.recorder.place("indices", indices)
            self._number.fill_(index)
        return Step(self, epoch, position, indices, source)

    def _announce(self, index: int, total: int) -> None:
        if self.pixels is not None and index < total:
            self.pixels.expect(self.wants(self._step(index, early=True)))

    def number(self, value: float) -> Tensor:
        """Return ``value`` as a tensor on the loop's device, in double precision where that has it."""
        device = self.device.device
        return torch.full((), value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def stop(self, reason: str) -> None:
        """End the loop after this step; ``reason`` is logged and kept in ``stopped``."""
        self.stopped = reason
        log.warning("%s stopped: %s", self.name, reason)

    def watch(self, loss: Tensor, step: int) -> None:
        """Remember ``loss`` and raise NonFiniteLossError once one is seen to be NaN or infinite."""
        if self.recorder is not None:
            bad = self._number.where(~loss.detach().isfinite(), torch.full_like(self._number, _NEVER))
            torch.minimum(self._first_bad, bad, out=self._first_bad)
            return
        self._unchecked.append((step, loss.detach()))
        if loss.device.type == "cpu" or len(self._unchecked) >= CHECK_EVERY:
            self._check()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all, if a folder was given; between two steps, as the loop does."""
        self._check()
        self._check_weights()
        self._saved_at = time.monotonic()
        if self.path is None or not self.device.group.is_first:
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

    def _held(self) -> _Held | None:
        if self.path is None:
            return None
        remove_partial(self.path)
        if not self.path.exists():
            return None
        held = _read(self.path)
        if held["key"] != self.key or held["name"] != self.name:
            raise InputError(f"{self.path} belongs to a run with other options or images",
                             "use another folder, or delete the file to start over")
        return held

    def _resume(self) -> None:
        held = by_first(self.device.group, self._held)  # what is wrong with it is told to all, and none waits
        if held is None:
            return
        device = self.order.device
        for name, part in self.state.items():
            if isinstance(part, torch.optim.Optimizer):
                _keep_way(part, held["state"][name])
            part.load_state_dict(held["state"][name])
        self.memory.clear()
        self.memory.update(held["memory"])
        self.history, self.extras, self.stopped = held["history"], held["extras"], held["stopped"]
        self.sums = {name: sums.to(device) for name, sums in held["sums"].items()}
        self._next = held["next"]
        log.info("%s goes on at step %d of %d", self.name, self._next, self.n_epochs * self.order.steps_per_epoch)

    def _end_epoch(self, epoch: int) -> None:
        self._check()
        sums = {name: held.tolist() for name, held in self.sums.items()}
        means = {name: total / count for name, (total, count) in sums.items() if count}
        self.history.append({"stage": self.name, "epoch": epoch + 1, **means, **self.extras})
        self.extras = {}
        if self.recorder is None:
            self.sums = {}
        for held in self.sums.values():  # a recorded step adds to where they lie
            held.zero_()

    def _note(self, epoch: int) -> str:
        last = self.history[-1] if self.history else {}
        loss = f", loss {last['loss']:.3f}" if "loss" in last else ""
        return f"epoch {epoch + 1}/{self.n_epochs}{loss}"

    def _check(self) -> None:
        bad = [step for step, loss in self._unchecked if not math.isfinite(float(loss))]
        self._unchecked = []
        if self.recorder is not None and (first := int(self._first_bad)) < _NEVER:
            bad = [first]
        if bad:
            kept = "; the last checkpoint is intact" if self.path is not None and self.path.exists() else ""
            raise NonFiniteLossError(f"{self.name}: the loss is not finite at step {bad[0]}"
                                     f"{' and later ones' if len(bad) > 1 else ''}{kept}",
                                     f"lower the learning rate (--set {self.name}.lr=...) or look for damaged images")


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    # Of a first step that is stopped, SGD's momentum would be memory that nobody wrote; from zero all steps are alike.
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _keep_way(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    # How an optimizer computes is of this device and engine, not of those that wrote the checkpoint.
    for held, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        held.update({name: own[name] for name in ("fused", "foreach", "capturable") if name in own})


_NEVER = 1 << 62
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
