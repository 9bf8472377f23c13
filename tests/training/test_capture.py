"""Recorded steps, on a tape instead of a GPU, train what steps that run as they are train, to the last bit."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.tsuc import TSUC
from phyla.errors import InputError, NonFiniteLossError
from phyla.images.augment import Views
from phyla.images.batches import Order
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain.simclr import SimCLR
from phyla.pretrain.superand import SuperAND
from phyla.randomness import generator
from phyla.refine.ruc import RUC
from phyla.refine.selflabel import SelfLabel
from phyla.training import capture
from phyla.training.device import Device
from phyla.training.loop import Loop, Step
from phyla.training.options import make_optimizer
from phyla.types import ImageSet, Neighbors
from recording import GRAPH, record_on_tapes
from tape import HostError

pytestmark = pytest.mark.filterwarnings("ignore::phyla.errors.PhylaWarning")
SPEC = EncoderSpec(width=4)
STRONG = Views("strong", 8, cutout=3)
N_STEPS = 5 * 3  # epochs of 48 digits in batches of 16


def net() -> ClusterNet:
    heads = ClusterHeads(32, 3)
    heads.initialise(generator(0, "test"))
    return ClusterNet(SPEC.build(generator(0, "test")), heads)


def fits() -> dict[str, Callable[[ImageSet, Neighbors], Any]]:
    of_images = {"n_epochs": 5, "batch_size": 16}
    encoder = SPEC.build(generator(0, "test"))
    near = {"encoder": encoder, "device": GRAPH}

    def superand(images: ImageSet, _: Neighbors) -> Any:
        return SuperAND(encoder=SPEC, views=Views("simclr", 8), n_projection=8, n_rounds=2, n_epochs=5, batch_size=16,
                        unification_every=2, lr_drop_epoch=3).fit(images, device=GRAPH)

    return {
        "simclr": lambda images, _: SimCLR(encoder=SPEC, views=Views("simclr", 8), warmup="4 steps", **of_images).fit(
            images, device=GRAPH),
        "superand": superand,
        "scan": lambda images, found: SCAN(n_clusters=3, n_heads=2, views=STRONG, **of_images).fit(
            images, neighbors=found, **near),
        "scan on cached views": lambda images, found: SCAN(
            n_clusters=3, n_heads=2, views=STRONG, update="heads", cached_views=2, **of_images).fit(
            images, neighbors=found, **near),
        "nnm": lambda images, found: NNM(n_clusters=3, n_heads=2, views=STRONG, n_epochs=5, batch_size=20).fit(
            images, neighbors=found, **near),
        "tsuc": lambda images, _: TSUC(n_clusters=3, n_heads=2, views=Views("simclr", 8), **of_images).fit(
            images, **near),
        "selflabel": lambda images, found: SelfLabel(views=STRONG, threshold=0.36, ema="teacher", **of_images).fit(
            images, net=net(), neighbors=found, device=GRAPH),
        "ruc": lambda images, found: RUC(views=Views("ruc_strong", 8, cutout=3), split="confidence", n_epochs=4,
                                         confidence_threshold=0.35, refurbish_threshold=0.4, batch_size=16).fit(
            images, net=net(), neighbors=found, device=GRAPH),
    }


def weights(fitted: Any) -> list[torch.Tensor]:
    nets = [value for name, value in sorted(vars(fitted).items()) if isinstance(value, nn.Module) and name[-1] == "_"]
    return [value for each in nets for value in each.state_dict().values()]


@pytest.mark.parametrize("name", sorted(fits()))
def test_recorded_steps_are_the_steps_themselves(name, digits, near, monkeypatch):
    tapes = record_on_tapes(monkeypatch)
    recorded = fits()[name](digits, near)
    assert tapes.made > 0
    monkeypatch.setattr(capture, "WARM_UP", 10**6)
    made = tapes.made
    as_they_are = fits()[name](digits, near)
    assert tapes.made == made
    assert len(weights(recorded)) > 5
    for ours, theirs in zip(weights(recorded), weights(as_they_are), strict=True):
        assert torch.equal(ours, theirs)
    assert recorded.history_ == as_they_are.history_


def train(body: Callable[[Step, nn.Parameter, torch.optim.Optimizer], None], *, n_epochs: int = 5) -> Loop:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1, fused=True)
    run = Loop("x", Order(12, 4, 0), n_epochs=n_epochs, state={"optimizer": optimizer}, seed=0, device=GRAPH)
    for step in run:
        step.set_lr(optimizer, 0.1 / (1 + step.index))
        body(step, weight, optimizer)
    return run


def test_what_changes_from_step_to_step_reaches_a_replay(monkeypatch):
    record_on_tapes(monkeypatch)
    seen = torch.zeros(15, 8)

    def advance(step: Step, value: torch.Tensor, rows: torch.Tensor, at: torch.Tensor) -> None:
        drawn = torch.rand(1, generator=step.generator)
        seen.index_copy_(0, at, torch.cat([value[None], rows, step.indices.float()[:3], drawn])[None])
        step.log(value=value)

    def body(step: Step, *_: Any) -> None:
        rows, at = torch.full((3,), 10.0 * step.index), torch.tensor([step.index])
        step.run(advance, float(step.index), rows, at)

    run = train(body)
    for index in range(15):
        epoch, position = divmod(index, 3)
        indices = run.order.indices(epoch, position)
        drawn = torch.rand(1, generator=generator(0, "x", index))
        expected = torch.cat([torch.tensor([index] + 3 * [10.0 * index]), indices.float()[:3], drawn])
        assert torch.equal(seen[index], expected)
    assert [record["value"] for record in run.history] == [1.0, 4.0, 7.0, 10.0, 13.0], "each epoch's own mean"


def test_words_numbers_and_shapes_make_another_recording(monkeypatch):
    tapes = record_on_tapes(monkeypatch)
    ran: list[object] = []

    def advance(step: Step, word: str) -> None:
        ran.append(word)

    train(lambda step, *_: step.run(advance, "even" if step.index % 2 == 0 else "odd"))
    assert tapes.made == 2
    assert ran.count("even") == ran.count("odd") == capture.WARM_UP + 1, "Python runs no more once it is recorded"


def test_a_loss_that_is_not_finite_is_found_with_its_step(monkeypatch):
    record_on_tapes(monkeypatch)

    def advance(step: Step, weight: torch.Tensor, factor: torch.Tensor) -> None:
        step._loop.watch(weight.detach().sum() * factor, step.index)

    def body(step: Step, weight: nn.Parameter, _: Any) -> None:
        step.run(advance, weight.detach(), float("nan") if step.index in (7, 8) else 1.0)

    with pytest.raises(NonFiniteLossError, match="x: the loss is not finite at step 7"):
        train(body)


def test_a_step_whose_condition_fails_moves_nothing_and_logs_nothing(monkeypatch):
    record_on_tapes(monkeypatch)
    weights = []

    def advance(step: Step, weight: nn.Parameter, moves: torch.Tensor) -> None:
        loss, moves = held["weight"].sum(), moves > 0
        step.backward(loss, held["optimizer"], only_if=moves)
        step.log(loss=loss, only_if=moves)

    held: dict[str, Any] = {}

    def body(step: Step, weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        held.update(weight=weight, optimizer=optimizer)
        step.run(advance, weight.detach(), torch.tensor(float(step.index % 2)))
        weights.append(weight.detach().clone())

    run = train(body, n_epochs=4)
    moved = [not torch.equal(a, b) for a, b in zip([torch.ones(3), *weights], weights, strict=False)]
    assert moved == [index % 2 == 1 for index in range(12)]
    assert run.history[0]["loss"] == pytest.approx(3.0), "the one step that moved"


@pytest.mark.parametrize("nesterov", [False, True])
def test_first_steps_that_are_stopped_leave_the_momentum_of_none(nesterov, monkeypatch):
    def unwritten(like: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full_like(like, torch.nan if like.is_floating_point() else 0)

    monkeypatch.setattr(torch, "empty_like", unwritten)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1, 0.9, nesterov=nesterov, fused=True)
    run = Loop("x", Order(16, 4, 0), n_epochs=1, state={"optimizer": optimizer}, seed=0, device=GRAPH)
    for step in run:
        step.backward(weight.sum(), optimizer, only_if=torch.tensor(step.index >= 2))
    plain = nn.Parameter(torch.ones(3))
    moved = torch.optim.SGD([plain], 0.1, 0.9, nesterov=nesterov, fused=True)
    monkeypatch.undo()
    for _ in range(2):
        plain.grad = torch.ones(3)
        moved.step()
    assert torch.equal(weight, plain)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_checkpoint_of_another_engine_leaves_an_optimizer_its_own_way(name, tmp_path):
    def trained(device: Device, n_epochs: int) -> torch.optim.Optimizer:
        weight = nn.Parameter(torch.ones(3))
        optimizer = make_optimizer(name, [weight], device, lr=0.1, momentum=0.9, weight_decay=0.0)
        run = Loop("x", Order(12, 4, 0), n_epochs=n_epochs, state={"optimizer": optimizer}, seed=0, folder=tmp_path,
                   device=device)
        for step in run:
            step.backward(weight.sum(), optimizer)
        return optimizer

    for device, n_epochs in ((Device(torch.device("cpu")), 1), (GRAPH, 2), (Device(torch.device("cpu")), 3)):
        optimizer = trained(device, n_epochs)
        assert [group["fused"] for group in optimizer.param_groups] == [True if device is GRAPH else None]
        assert len(optimizer.state) == 1


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so(monkeypatch, caplog):
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("phyla.training.loop.Recorder", lambda *a: capture.Recorder(*a, record=refuse))
    ran = []
    train(lambda step, *_: step.run(lambda step: ran.append(step.index)))
    assert len(ran) == 15
    told = [record.getMessage() for record in caplog.records]
    assert told == ["steps run kernel by kernel: they cannot be recorded (operation not permitted when stream is "
                    "capturing)"]


def test_what_cannot_be_recorded_draws_what_it_would_have_drawn(monkeypatch):
    def broken(body: Callable[[], None], generator: torch.Generator, *_: Any) -> None:
        body()
        spoiled.append(generator)
        raise RuntimeError("no")

    monkeypatch.setattr("phyla.training.loop.Recorder", lambda *a: capture.Recorder(*a, record=broken))
    drawn: dict[int, float] = {}
    spoiled: list[torch.Generator] = []

    def advance(step: Step) -> None:
        assert step.generator not in spoiled, "a graph's generator gives nothing after a recording that broke off"
        drawn[step.index] = float(torch.rand(1, generator=step.generator))

    def body(step: Step, *_: Any) -> None:
        torch.rand(1, generator=step.generator)  # as a method does that draws outside
        step.run(advance)

    train(body)
    for index, value in drawn.items():
        assert value == float(torch.rand(2, generator=generator(0, "x", index))[1])
    assert len(drawn) == 15


def test_a_recorded_run_goes_on_from_its_checkpoint(digits, tmp_path, monkeypatch):
    record_on_tapes(monkeypatch)
    method = SimCLR(encoder=SPEC, views=Views("simclr", 8), n_epochs=5, batch_size=16)
    whole = method.fit(digits, device=GRAPH)
    monkeypatch.setattr("phyla.training.loop.CHECKPOINT_SECONDS", 0.0)
    seen = []
    watch = Loop.watch

    def stop(run: Loop, loss: torch.Tensor, index: int) -> None:
        seen.append(index)
        if len(seen) == 3:
            raise KeyboardInterrupt
        watch(run, loss, index)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Loop, "watch", stop)
        copy.deepcopy(method).fit(digits, device=GRAPH, folder=tmp_path)
    again = method.fit(digits, device=GRAPH, folder=tmp_path)
    assert again.history_ == whole.history_
    for ours, theirs in zip(weights(again), weights(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_picked_by_what_they_hold_are_refused(digits, near):
    with pytest.raises(InputError, match="forwards='cheap' picks rows by what they hold"):
        RUC(views=Views("ruc_strong", 8), forwards="cheap", split="confidence").fit(digits, net=net(), device=GRAPH)


def test_the_tape_would_notice_a_look_at_a_value(monkeypatch):
    record_on_tapes(monkeypatch)
    with pytest.raises(HostError):
        train(lambda step, weight, _: step.run(lambda step, rows: step.log(value=float(rows.sum())), weight.detach()))


def test_numbers_of_numpy_are_copied_like_others(monkeypatch):
    record_on_tapes(monkeypatch)
    run = train(lambda step, *_: step.run(lambda step, value: step.log(value=value), np.float64(step.index)))
    assert run.history[-1]["value"] == 13.0
