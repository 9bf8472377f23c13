"""The authors' networks in plain torch, written anew from the papers and the names in their files; nothing is phyla's.

And their files, in every layout, of networks so small that a test can make them.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
HELD_SOBEL = {"sobel.0.weight": [1 / 3] * 3, "sobel.0.bias": [0.0], "sobel.1.bias": [0.0, 0.0],
              "sobel.1.weight": [1.0, 0.0, -1.0, 2.0, 0.0, -2.0, 1.0, 0.0, -1.0,
                                 1.0, 2.0, 1.0, 0.0, 0.0, 0.0, -1.0, -2.0, -1.0]}
File = dict[str, object]


class Block(nn.Module):
    """Convolutions of the given sizes, each with BatchNorm, and a shortcut; the names are those in the files."""

    def __init__(self, n_in: int, channels: list[int], kernels: list[int], stride: int, beside: str = "shortcut"
                 ) -> None:
        super().__init__()
        self.depth, self.beside = len(channels), beside
        strided, before = kernels.index(3), n_in
        for i, (n, kernel) in enumerate(zip(channels, kernels, strict=True)):
            step = stride if i == strided else 1
            self.add_module(f"conv{i + 1}", nn.Conv2d(before, n, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(n))
            before = n
        changes = stride > 1 or n_in != before
        self.add_module(beside, nn.Sequential(*([nn.Conv2d(n_in, before, 1, stride, bias=False),
                                                 nn.BatchNorm2d(before)] if changes else [])))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = F.relu(out) if i < self.depth else out
        return F.relu(out + getattr(self, self.beside)(x))


class Paper(nn.Module):
    """Super-AND's network at 32 pixels: one stream or two, then a linear layer and rows of length 1."""

    def __init__(self, depth: str, width: int, n_out: int, *, two: bool) -> None:
        super().__init__()
        self.streams = ["", "_sobel"] if two else [""]
        for suffix in self.streams:
            self.add_module(f"conv1{suffix}", nn.Conv2d(2 if suffix else 3, width, 3, 1, 1, bias=False))
            self.add_module(f"bn1{suffix}", nn.BatchNorm2d(width))
            n_in = width
            for stage, n in enumerate(BLOCKS[depth]):
                w, blocks = width << stage, []
                for i in range(n):
                    form = ([w, w], [3, 3]) if depth == "resnet18" else ([w, w, 4 * w], [1, 3, 1])
                    blocks.append(Block(n_in, *form, stride=2 if stage and not i else 1))
                    n_in = form[0][-1]
                self.add_module(f"layer{stage + 1}{suffix}", nn.Sequential(*blocks))
        if two:
            self.sobel = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=1))
            for name, value in self.sobel.state_dict().items():
                value.copy_(torch.tensor(HELD_SOBEL[f"sobel.{name}"]).reshape(value.shape))
        self.linear = nn.Linear(n_in * len(self.streams), n_out)

    def features(self, x: Tensor) -> Tensor:
        rows = []
        for suffix in self.streams:
            out = F.relu(getattr(self, f"bn1{suffix}")(getattr(self, f"conv1{suffix}")(self.sobel(x) if suffix else x)))
            for stage in range(1, 5):
                out = getattr(self, f"layer{stage}{suffix}")(out)
            rows.append(F.avg_pool2d(out, 4).flatten(1))
        return torch.cat(rows, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(self.features(x))
        return out / out.norm(dim=1, keepdim=True)


class Trunk(nn.Module):
    """SCAN's ResNets: 18 for 32 pixels (cifar) and 96 (stl), with ``shortcut``; 50 for 224, with ``downsample``."""

    def __init__(self, stem: str, width: int, fc: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, is_deep = stem, stem == "imagenet"
        kernel, stride = (7, 2) if is_deep else (3, 1)
        self.conv1, self.bn1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)
        n_in = width
        for stage, n in enumerate(BLOCKS["resnet50" if is_deep else "resnet18"]):
            w, blocks = width << stage, []
            for i in range(n):
                form = ([w, w, 4 * w], [1, 3, 1]) if is_deep else ([w, w], [3, 3])
                blocks.append(Block(n_in, *form, stride=2 if stage and not i else 1,
                                    beside="downsample" if is_deep else "shortcut"))
                n_in = form[0][-1]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.n_features = n_in
        if fc is not None:
            self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        if self.stem == "stl":
            out = F.max_pool2d(out, 2, 2, padding=1)
        elif self.stem == "imagenet":
            out = F.max_pool2d(out, 3, 2, padding=1)
        for stage in range(1, 5):
            out = getattr(self, f"layer{stage}")(out)
        return F.avg_pool2d(out, 7, 1).flatten(1) if self.stem == "stl" else out.mean(dim=(2, 3))


class Scan(nn.Module):
    """SCAN's model: a ResNet with a projection, or with so many heads."""

    def __init__(self, stem: str, width: int, *, n_heads: int = 0, n_clusters: int = 10) -> None:
        super().__init__()
        self.backbone = Trunk(stem, width)
        n = self.backbone.n_features
        if n_heads:
            self.cluster_head = nn.ModuleList(nn.Linear(n, n_clusters) for _ in range(n_heads))
        else:
            self.contrastive_head = mlp(n)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every head, or the projection with rows of length 1."""
        features = self.backbone(x)
        if hasattr(self, "cluster_head"):
            return torch.stack([head(features) for head in self.cluster_head])
        return unit(self.contrastive_head(features))


class Moco(nn.Module):
    """MoCo as it is while it trains: the query encoder, the slow key encoder and the queue."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (Trunk("imagenet", width, mlp(32 * width)) for _ in range(2))
        self.register_buffer("queue", torch.randn(128, 16))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


def mlp(n: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 128))


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def filled(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """Return a network whose every number differs from a fresh one, BatchNorm's included; in evaluation mode."""
    source = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        net = make()
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif "sobel." in name or not value.is_floating_point():
            continue
        elif value.ndim == 1:
            value.copy_(0.5 + 0.2 * torch.rand(value.shape, generator=source))
        else:
            value.copy_(torch.randn(value.shape, generator=source) * (2 / value[0].numel()) ** 0.5)
    return net.eval()


def parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state as DataParallel names it."""
    return {f"module.{name}": value for name, value in state.items()}


def optimizer(net: nn.Module) -> File:
    """Return what an optimizer leaves after a step, as a resume file has it."""
    trained = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trained.step()
    return trained.state_dict()


class Made(NamedTuple):
    """A file of the authors' and what its network gives: features of the encoder, rows of the projection, logits."""

    held: File
    features: Tensor
    rows: Tensor | None
    logits: Tensor | None


class Layout(NamedTuple):
    """How a file is laid out: the kind it is, a recipe it fits, how it is made, and the size of the views."""

    kind: str
    recipe: str
    make: Callable[[Tensor], Made]
    size: int = 32


def _scan(stem: str, wrap: Callable[[nn.Module], File], *, n_heads: int = 0, n_clusters: int = 10, width: int = 4
          ) -> Callable[[Tensor], Made]:
    def make(x: Tensor) -> Made:
        net = filled(lambda: Scan(stem, width, n_heads=n_heads, n_clusters=n_clusters))
        with torch.no_grad():
            features, out = net.backbone(x), net(x)
        return Made(wrap(net), features, None if n_heads else out, out if n_heads else None)

    return make


def _moco(wrap: Callable[[nn.Module], File]) -> Callable[[Tensor], Made]:
    def make(x: Tensor) -> Made:
        net = filled(lambda: Moco(2))
        with torch.no_grad():
            features = net.encoder_q(x)
            return Made(wrap(net), features, unit(net.encoder_q.fc(features)), None)

    return make


def _ruc(x: Tensor) -> Made:
    nets = [filled(lambda: Scan("cifar", 4, n_heads=1), seed) for seed in (1, 2)]
    with torch.no_grad():
        features = torch.cat([net.backbone(x) for net in nets], dim=1)
        return Made({f"net{i + 1}": parallel(net.state_dict()) for i, net in enumerate(nets)}, features, None,
                    nets[0](x) + nets[1](x))


def _superand(*, two: bool, heads: bool = False, **more: object) -> Callable[[Tensor], Made]:
    def make(x: Tensor) -> Made:
        net, source = filled(lambda: Paper("resnet18", 4, 24, two=two)), torch.Generator().manual_seed(2)
        held: File = {"net": parallel(net.state_dict())} | more
        with torch.no_grad():
            features, rows, logits = net.features(x), net(x), None
        if heads:
            drawn = [torch.randn(24, 10, generator=source) for _ in range(5)]
            held |= {"fc": parallel({f"heads.{h}.weight": each for h, each in enumerate(drawn)}),
                     "acc_list": [64.87, 72.31, 60.81, 80.98, 79.97]}
            logits = torch.stack([rows @ (each / each.norm(dim=1, keepdim=True)) / 0.1 for each in drawn])
        else:
            memory = unit(torch.randn(30, 24, generator=source))
            held |= {"npc": {"params": torch.tensor([0.1, 0.5]), "memory": memory}, "acc": 0.89, "round": 4,
                     "epoch": 173, "ANs_discovery": {"position": torch.arange(30), "entropy": torch.rand(30)}}
        return Made(held, features, rows, logits)

    return make


LAYOUTS: dict[str, Layout] = {
    "simclr": Layout("pretext", "scan-cifar10", _scan("cifar", lambda net: net.state_dict())),
    "simclr of DataParallel": Layout("pretext", "scan-cifar20", _scan("cifar", lambda net: parallel(net.state_dict()))),
    "simclr, 96 pixels": Layout("pretext", "scan-stl10", _scan("stl", lambda net: net.state_dict()), 96),
    "simclr to resume": Layout("pretext", "nnm-cifar10", _scan("cifar", lambda net: {
        "optimizer": optimizer(net), "model": net.state_dict(), "epoch": 500})),
    "scan": Layout("scan", "scan-cifar10", _scan("cifar", lambda net: {
        "model": net.state_dict(), "head": np.int64(0)}, n_heads=1)),
    "scan, 96 pixels": Layout("scan", "scan-stl10", _scan("stl", lambda net: {
        "model": net.state_dict(), "head": np.int64(0)}, n_heads=1), 96),
    "scan, 50 layers": Layout("scan", "scan-imagenet50", _scan("imagenet", lambda net: {
        "model": parallel(net.state_dict()), "head": np.int64(7)}, n_heads=10, n_clusters=50, width=2), 64),
    "scan to resume": Layout("scan", "scan-cifar20", _scan("cifar", lambda net: {
        "optimizer": optimizer(net), "model": parallel(net.state_dict()), "epoch": 50, "best_loss": np.float64(-1.9),
        "best_loss_head": np.int64(0)}, n_heads=1, n_clusters=20)),
    "selflabel": Layout("selflabel", "scan-cifar10", _scan("cifar", lambda net: net.state_dict(), n_heads=1)),
    "selflabel, 50 layers": Layout("selflabel", "scan-imagenet100", _scan(
        "imagenet", lambda net: net.state_dict(), n_heads=1, n_clusters=100, width=2), 64),
    "selflabel to resume": Layout("selflabel", "ruc-scan-cifar10", _scan("cifar", lambda net: {
        "optimizer": optimizer(net), "model": parallel(net.state_dict()), "epoch": 200}, n_heads=1)),
    "moco": Layout("moco", "scan-imagenet50", _moco(lambda net: {"epoch": 800, "arch": "resnet50", "state_dict": {
        name: value for name, value in parallel(net.state_dict()).items() if "encoder_q" in name}}), 64),
    "moco of one's own": Layout("moco", "nnm-imagenetdogs", _moco(lambda net: {
        "epoch": 200, "arch": "resnet50", "state_dict": parallel(net.state_dict()),
        "optimizer": optimizer(net.encoder_q)}), 64),
    "nnm": Layout("scan", "nnm-cifar10", _scan("cifar", lambda net: {
        "model": net.state_dict(), "head": np.int64(2)}, n_heads=3)),
    "nnm to resume": Layout("scan", "nnm-cifar20", _scan("cifar", lambda net: {
        "optimizer": optimizer(net), "model": parallel(net.state_dict()), "epoch": 99, "best_loss": np.float64(-1.7),
        "best_acc": np.float64(0.47), "best_loss_head": np.int64(1),
        "clustering_results": [torch.rand(9, 20) for _ in range(3)]}, n_heads=3, n_clusters=20)),
    "ruc": Layout("ruc", "ruc-scan-cifar10", _ruc),
    "superand": Layout("superand", "superand-cifar10", _superand(two=True)),
    "and": Layout("superand", "and-cifar10", _superand(two=False, session="20190321-101500")),
    "tsuc": Layout("tsuc", "tsuc-cifar10", _superand(two=True, heads=True)),
}
"""Every layout of the published files, each made of a network above."""


def views(size: int, n: int = 3) -> Tensor:
    """Return fixed views for a network."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(4))


def write(path: Path, held: object, *, legacy: bool = False) -> Path:
    """Write a file in torch's present format, or in that before 1.6, in which the authors' files are."""
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    return path


class Hostile:
    """Makes a folder when a careless reader loads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)
