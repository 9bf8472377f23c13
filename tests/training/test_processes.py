"""Two processes train what one trains: losses, gradients, memory, marks and what is chosen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN
from phyla.cluster.tsuc import TSUC
from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.images.batches import Order
from phyla.nets.heads import ClusterHeads, ClusterNet
from phyla.nets.resnet import EncoderSpec
from phyla.pretrain.simclr import SimCLR
from phyla.pretrain.superand import SuperAND
from phyla.randomness import generator
from phyla.refine.ruc import RUC
from phyla.refine.selflabel import SelfLabel
from phyla.training.device import Device
from phyla.training.group import ALONE, Group
from phyla.training.loop import Loop
from phyla.types import Embeddings, ImageSet, Neighbors
from processes import Processes

pytestmark = pytest.mark.filterwarnings("ignore::phyla.errors.PhylaWarning")
SPEC = EncoderSpec(width=4)
STRONG, SIMCLR = Views("strong", 8, cutout=3), Views("simclr", 8)
METHODS = ("simclr", "superand", "scan", "scan on cached views", "nnm", "tsuc", "selflabel", "ruc")


def net() -> ClusterNet:
    heads = ClusterHeads(32, 3)
    heads.initialise(generator(0, "test"))
    return ClusterNet(SPEC.build(generator(0, "test")), heads)


def fit(name: str, images: ImageSet, near: Neighbors, device: Device, folder: Path | None = None, **more: Any) -> Any:
    """Return a method fitted on 48 digits, in batches of 15, so that two processes have unequal parts."""
    options = {"n_epochs": 2, "batch_size": 15} | more
    encoder, where = SPEC.build(generator(0, "test")), {"device": device, "folder": folder}
    match name:
        case "simclr":
            return SimCLR(encoder=SPEC, views=SIMCLR, symmetric=True, **options).fit(images, **where)
        case "superand":
            return SuperAND(encoder=SPEC, views=SIMCLR, n_projection=8, n_rounds=2, unification_every=1,
                            **options).fit(images, **where)
        case "scan" | "scan on cached views":
            cached = {"update": "heads", "cached_views": 2} if "cached" in name else {}
            return SCAN(n_clusters=3, n_heads=2, views=STRONG, **cached, **options).fit(
                images, neighbors=near, encoder=encoder, **where)
        case "nnm":  # the last batch of an epoch has three images
            return NNM(n_clusters=3, n_heads=2, views=STRONG, **options).fit(
                images, neighbors=near, encoder=encoder, **where)
        case "tsuc":
            return TSUC(n_clusters=3, n_heads=2, views=SIMCLR, **options).fit(images, encoder=encoder, **where)
        case "selflabel":
            return SelfLabel(views=STRONG, threshold=0.36, ema="teacher", **options).fit(
                images, net=net(), neighbors=near, **where)
    embeddings = Embeddings(images.array.reshape(len(images), -1).astype(np.float32), images.ids)
    return RUC(views=Views("ruc_strong", 8, cutout=3), confidence_threshold=0.34, refurbish_threshold=0.4,
               n_neighbors=5, **options).fit(images, net=net(), embeddings=embeddings, neighbors=near, **where)


def weights(fitted: Any) -> list[torch.Tensor]:
    nets = [value for name, value in sorted(vars(fitted).items()) if isinstance(value, nn.Module) and name[-1] == "_"]
    return [value for each in nets for value in each.state_dict().values()]


def in_double(patched: pytest.MonkeyPatch) -> None:
    """Let everything be computed in float64, in which only a wrong sum differs by 1e-6."""
    draw = Views.__call__
    patched.setattr(Views, "__call__", lambda self, *a, **k: draw(self, *a, **k).double())
    patched.setattr(torch.Tensor, "float", torch.Tensor.double)


def watched(group: Group, name: str, images: ImageSet, near: Neighbors, alone: bool, **more: Any) -> dict[str, Any]:
    """Return the losses, the gradients of the first step, and what the fit left."""
    if alone and not group.is_first:
        return {}
    losses: list[float] = []
    gradients: list[torch.Tensor] = []
    watch, steps = Loop.watch, {kind: kind.step for kind in (torch.optim.SGD, torch.optim.Adam)}

    def seen(self: Loop, loss: torch.Tensor, index: int) -> None:
        losses.append(loss.item())
        watch(self, loss, index)

    def stepped(self: torch.optim.Optimizer) -> None:
        if len(losses) == 1:
            gradients.extend(p.grad.clone() for each in self.param_groups for p in each["params"])
        steps[type(self)](self)

    with pytest.MonkeyPatch.context() as patched:
        in_double(patched)
        torch.set_default_dtype(torch.float64)
        patched.setattr(Loop, "watch", seen)
        for kind in steps:
            patched.setattr(kind, "step", stepped)
        try:
            fitted = fit(name, images, near, Device(torch.device("cpu"), group=ALONE if alone else group), **more)
        finally:
            torch.set_default_dtype(torch.float32)
    left = {key: getattr(fitted, key).values if key == "memory_" else getattr(fitted, key) for key in LEFT
            if hasattr(fitted, key)}
    return {"losses": losses, "gradients": gradients, "left": left, "weights": weights(fitted)}


LEFT = ("memory_", "neighbor_", "labels_", "clean_", "head_losses_", "epoch_labels_", "probabilities_")


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_those_of_one_process(processes: Processes, digits, near, name):
    whole, _ = processes.run(watched, name, digits, near, True)
    first, second = processes.run(watched, name, digits, near, False)
    assert len(whole["losses"]) == len(first["losses"]) >= 6
    assert first["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert len(first["gradients"]) == len(whole["gradients"]) > 0
    for ours, theirs in zip(first["gradients"], whole["gradients"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    for ours, theirs, others in zip(first["weights"], whole["weights"], second["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours, others), "the processes never part"
    assert first["left"].keys() == second["left"].keys() == whole["left"].keys()
    for key, value in first["left"].items():
        np.testing.assert_allclose(value, whole["left"][key], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(value, second["left"][key])


def resumed(group: Group, name: str, images: ImageSet, near: Neighbors, folder: Path) -> list[dict[str, Any]]:
    """Fit whole, and stopped in the middle and again; only the first process has a folder."""
    device, found = Device(torch.device("cpu"), group=group), []
    own = folder if group.is_first else None
    watch = Loop.watch

    def stop(self: Loop, loss: torch.Tensor, index: int) -> None:
        if index == 4:
            raise KeyboardInterrupt
        watch(self, loss, index)

    found.append(fit(name, images, near, device))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("phyla.training.loop.CHECKPOINT_SECONDS", 0.0)
        patched.setattr(Loop, "watch", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(name, images, near, device, own)
    found.append(fit(name, images, near, device, own))
    return [{"weights": weights(fitted), "history": fitted.history_} for fitted in found]


@pytest.mark.parametrize("name", ["superand", "ruc"])
def test_all_go_on_from_the_checkpoint_of_the_first(processes: Processes, digits, near, tmp_path, name):
    for whole, again in processes.run(resumed, name, digits, near, tmp_path):
        assert again["history"] == whole["history"]
        for ours, theirs in zip(again["weights"], whole["weights"], strict=True):
            assert torch.equal(ours, theirs)


def statistics(group: Group, images: ImageSet, near: Neighbors) -> list[torch.Tensor]:
    device = Device(torch.device("cpu"), group=group, synced=False)
    return weights(fit("simclr", images, near, device))


def test_batchnorm_of_each_process_alone_still_ends_in_one_network(processes: Processes, digits, near):
    first, second = processes.run(statistics, digits, near)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
    synced = weights(fit("simclr", digits, near, Device(torch.device("cpu"))))
    assert not all(torch.allclose(ours, theirs) for ours, theirs in zip(first, synced, strict=True))


def test_more_processes_than_images_in_a_batch_are_refused():
    device = Device(torch.device("cpu"), group=Group(0, 3))
    with pytest.raises(InputError, match="x: a batch of 2 images is too small for 3 processes"):
        Loop("x", Order(10, 2, 0), n_epochs=1, state={}, seed=0, device=device)
