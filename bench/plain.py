"""Every method's step as people write it, from its equations: what the cards compare phyla's steps with.

Views are made one image at a time by PIL and torchvision in workers of a DataLoader, everything is float32, views are
seen one after the other where the published code does so, heads are a loop, and autograd does the rest. What PyTorch's
tuning guide says is done: workers that stay alive, pinned memory and non-blocking copies on CUDA, channels last,
gradients set to None. What only slows is not: no value is printed or fetched between steps, and the published code's
loops over single elements are one operation here.

A method is a function of the state from which phyla's own fit started (its networks and buffers, which are copied).
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from phyla.cluster.scan import SCAN
from phyla.nets.heads import ClusterNet

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Transform = Callable[[Image.Image], Any]


@dataclass
class Plain:
    """A method as people write it.

    Parameters
    ----------
    nets : what is trained or asked, placed by `steps`
    make_optimizer : of the placed networks
    loss : of views, a list of (B, 3, H, W), and rows (B,)
    after : what follows the optimizer
    """

    nets: list[nn.Module]
    make_optimizer: Callable[[], torch.optim.Optimizer]
    loss: Callable[[Sequence[Tensor], Tensor], Tensor]
    after: Callable[[Tensor], None] = lambda rows: None


# ── views of one image ──────────────────────────────────────────────────────────────────────────────────────────────


def _tensor() -> list[nn.Module]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def plain_view(size: int) -> Transform:
    """Return the central square."""
    return v2.Compose([v2.CenterCrop(size), *_tensor()])


def simclr_view(size: int, *, jitter: float = 0.8, hue: float = 0.1) -> Transform:
    """Return a resized crop, flip, color jitter and grey."""
    return v2.Compose([
        v2.RandomResizedCrop(size, scale=(0.2, 1.0)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, hue)], p=jitter), v2.RandomGrayscale(0.2), *_tensor()])


def weak_view(size: int) -> Transform:
    """Return a resized crop and flip."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=(0.2, 1.0)), v2.RandomHorizontalFlip(), *_tensor()])


def strong_view(size: int) -> Transform:
    """Return SCAN's strong view: four operations drawn with replacement, and a hole of the mean color."""
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(size), _operations_of_scan, *_tensor(), _hole])


def ruc_view(size: int) -> Transform:
    """Return RUC's strong view: two different operations, each with probability one half, and a grey square."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=(0.2, 1.0)), v2.RandomHorizontalFlip(), _operations_of_ruc,
                       *_tensor()])


def _sheared(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


OPERATIONS: Mapping[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "rotate": lambda image, value: image.rotate(value),
    "solarize": lambda image, value: ImageOps.solarize(image, int(value)),
    "color": lambda image, value: ImageEnhance.Color(image).enhance(value),
    "contrast": lambda image, value: ImageEnhance.Contrast(image).enhance(value),
    "brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    "sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(value),
    "shear_x": lambda image, value: _sheared(image, 1, value, 0, 0, 1, 0),
    "shear_y": lambda image, value: _sheared(image, 1, 0, 0, value, 1, 0),
    "translate_x": lambda image, value: _sheared(image, 1, 0, value * image.width, 0, 1, 0),
    "translate_y": lambda image, value: _sheared(image, 1, 0, 0, 0, 1, value * image.height),
    "posterize": lambda image, value: ImageOps.posterize(image, int(value)),
}

_NAMES = tuple(OPERATIONS)
_WEAKER = (0.05, 0.95)
_RANGES = {"rotate": (-30, 30), "solarize": (0, 256), "color": _WEAKER, "contrast": _WEAKER, "brightness": _WEAKER,
           "sharpness": _WEAKER, "shear_x": (-0.1, 0.1), "shear_y": (-0.1, 0.1), "translate_x": (-0.1, 0.1),
           "translate_y": (-0.1, 0.1), "posterize": (4, 8)}
_RUC_VALUES = {"rotate": 41, "solarize": 231, "color": 0.109, "contrast": 0.109, "brightness": 0.109,
               "sharpness": 0.109, "shear_x": 0.27, "shear_y": 0.27, "translate_x": 0.27, "translate_y": 0.27,
               "posterize": 8}
_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def _operations_of_scan(image: Image.Image) -> Image.Image:
    for place in torch.randint(len(_NAMES), (4,)).tolist():
        low, high = _RANGES.get(_NAMES[place], (0, 0))
        image = OPERATIONS[_NAMES[place]](image, low + (high - low) * float(torch.rand(())))
    return image


def _hole(view: Tensor, longest: int = 16) -> Tensor:
    size = view.shape[1]
    y, x, length = (int(torch.randint(most, ())) for most in (size, size, longest))
    half = (length + 1) // 2
    view[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return view


def _operations_of_ruc(image: Image.Image) -> Image.Image:
    for place in torch.randperm(len(_NAMES))[:2].tolist():
        name = _NAMES[place]
        sign, acts = (torch.rand(2) < 0.5).tolist()
        if acts:
            value = _RUC_VALUES.get(name, 0)
            image = OPERATIONS[name](image, -value if sign and name in _SIGNED else value)
    left, top = (max(0, int(float(torch.rand(())) * side - 8)) for side in image.size)
    ImageDraw.Draw(image := image.copy()).rectangle((left, top, left + 16, top + 16), (127, 127, 127))
    return image


# ── the data and the loop ───────────────────────────────────────────────────────────────────────────────────────────


class Shown(Dataset[Any]):
    """Images as torchvision's data sets hold them: an array, of which each is made a PIL image when it is asked for.

    ``near`` adds a view of a neighbor, drawn from the image itself and its neighbors.
    """

    def __init__(self, pixels: np.ndarray, views: Sequence[Transform], near: np.ndarray | None = None) -> None:
        self.pixels, self.views, self.near = pixels, views, near

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        image = Image.fromarray(self.pixels[row])
        made = [view(image) for view in self.views]
        if self.near is not None:
            column = int(torch.randint(self.near.shape[1] + 1, ()))
            other = row if column == 0 else int(self.near[row, column - 1])
            made.append(self.views[0](Image.fromarray(self.pixels[other])))
        return *made, row


def loader(data: Dataset[Any], batch: int, device: torch.device, *, workers: int | None = None) -> DataLoader[Any]:
    """Return batches in random order from one worker a core that stays alive."""
    n = (os.cpu_count() or 1) if workers is None else workers
    return DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=n, persistent_workers=n > 0,
                      pin_memory=device.type == "cuda")


def steps(plain: Plain, batches: DataLoader[Any], device: torch.device) -> Iterator[int]:
    """Yield 1 after every step, without end."""
    for net in plain.nets:
        net.to(device, memory_format=torch.channels_last).train()
    optimizer = plain.make_optimizer()
    while True:
        for *given, rows in batches:
            views = [view.to(device, memory_format=torch.channels_last, non_blocking=True) for view in given]
            rows = rows.to(device, non_blocking=True)
            loss = plain.loss(views, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plain.after(rows)
            yield 1


# ── the methods ─────────────────────────────────────────────────────────────────────────────────────────────────────


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Return NT-Xent of unit rows (2B, D), first views, then second views."""
    similar = z @ z.T / temperature
    similar = similar.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return functional.cross_entropy(similar, partner)


def simclr(state: Mapping[str, Any]) -> Plain:
    """Return SimCLR: both views in one pass."""
    net = copy.deepcopy(state["net"])
    return Plain([net], lambda: torch.optim.SGD(net.parameters(), 0.4, momentum=0.9, weight_decay=1e-4),
                 lambda views, rows: nt_xent(net(torch.cat(list(views))), 0.1))


def scan(state: Mapping[str, Any]) -> Plain:
    """Return SCAN: anchors and neighbors in passes of their own, a loop over heads."""
    encoder, heads, net = _apart(state["net"])

    def loss(views: Sequence[Tensor], rows: Tensor) -> Tensor:
        anchors, neighbors = (encoder(view) for view in views)
        total = torch.zeros((), device=anchors.device)
        for head in heads:
            p, q = head(anchors).softmax(1), head(neighbors).softmax(1)
            total = total + agreement(p, q) - SCAN.entropy_weight * evenness(p)
        return total

    return Plain([net], lambda: torch.optim.Adam(net.parameters(), 1e-4, weight_decay=1e-4), loss)


def agreement(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean of -log(p . q) of rows, as a binary cross-entropy with ones."""
    products = torch.bmm(p[:, None], q[:, :, None]).flatten().clamp(max=1.0)
    return functional.binary_cross_entropy(products, torch.ones_like(products))


def evenness(p: Tensor) -> Tensor:
    """Return the entropy of the mean row."""
    mean = p.mean(0).clamp(min=1e-8)
    return -(mean * mean.log()).sum()


def selflabel(state: Mapping[str, Any], *, threshold: float = 0.05) -> Plain:
    """Return self-labelling: rows picked by a mask, clusters weighed by their counts."""
    encoder, (head,), net = _apart(state["net"])

    def loss(views: Sequence[Tensor], rows: Tensor) -> Tensor:
        with torch.no_grad():
            confidence, label = head(encoder(views[0])).softmax(1).max(1)
        logits, confident = head(encoder(views[1])), confidence > threshold
        chosen = label[confident]
        present, counts = torch.unique(chosen, return_counts=True)
        weight = torch.ones(logits.shape[1], device=logits.device)
        weight[present] = len(chosen) / counts
        return functional.cross_entropy(logits[confident], chosen, weight=weight)

    return Plain([net], lambda: torch.optim.Adam(net.parameters(), 1e-4, weight_decay=1e-4), loss)


def nnm(state: Mapping[str, Any]) -> Plain:
    """Return NNM without the targets of all images: three passes, a loop over heads."""
    encoder, heads, net = _apart(state["net"])

    def loss(views: Sequence[Tensor], rows: Tensor) -> Tensor:
        first, second, partner = (encoder(view) for view in views)
        apart = torch.cdist(first.detach(), first.detach())
        match = apart.fill_diagonal_(float("inf")).argmin(1)
        total = torch.zeros((), device=first.device)
        for head in heads:
            p, other, q = (head(rows).softmax(1) for rows in (first, second, partner))
            anchors, positives = torch.cat([p, other]), torch.cat([q, p[match]])
            table = functional.normalize(anchors, dim=0).T @ functional.normalize(positives, dim=0)
            contrast = functional.cross_entropy(table, torch.arange(len(table), device=table.device))
            total = total + agreement(anchors, positives) + contrast - 5 * evenness(anchors)
        return total

    return Plain([net], lambda: torch.optim.Adam(net.parameters(), 1e-4, weight_decay=1e-4), loss)


def tsuc(state: Mapping[str, Any]) -> Plain:
    """Return TSUC: one pass, a loop over heads."""
    net, heads = copy.deepcopy(state["net"][:2]), copy.deepcopy(state["net"][2])
    prototypes = [functional.normalize(weight, dim=1) for weight in heads.weight]

    def loss(views: Sequence[Tensor], rows: Tensor) -> Tensor:
        z = net(torch.cat(list(views)))
        total = torch.zeros((), device=z.device)
        for weight in prototypes:
            first, second = (z @ weight / 0.1).softmax(1).chunk(2)
            joint = first.T @ second
            joint = (joint + joint.T) / 2
            joint = (joint / joint.sum()).clamp(min=2.2e-16)
            total = total - (joint * (joint.log() - joint.sum(0).log() - joint.sum(1, keepdim=True).log())).sum()
        return telling_apart(z, 0.1) + total / len(prototypes)

    return Plain([net], lambda: torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, nesterov=True,
                                                weight_decay=5e-4), loss)


def telling_apart(u: Tensor, temperature: float) -> Tensor:
    """Return the loss of telling the other view of each unit row (2B, any) from all other rows, and these from it."""
    others = 1 - torch.eye(len(u), device=u.device)
    e = (u @ u.detach().T / temperature).exp() * others
    p = e / e.sum(1, keepdim=True)
    partner = torch.arange(len(u), device=u.device).roll(len(u) // 2)
    rest = others.scatter(1, partner[:, None], 0.0)
    return -(p.gather(1, partner[:, None])[:, 0].log() + ((1 - p).log() * rest).sum(1)).mean()


def superand(state: Mapping[str, Any], *, entropy: bool = False) -> Plain:
    """Return Super-AND: logits (2B, N) of all images, relationship vectors over all images, autograd."""
    net, memory = copy.deepcopy(state["net"]), copy.deepcopy(state["memory"].rows)
    seen: dict[str, Tensor] = {}

    def loss(views: Sequence[Tensor], rows: Tensor) -> Tensor:
        f = net(torch.cat(list(views)))
        own = rows.repeat(2)[:, None]
        z = f @ memory.T / 0.1
        total = -z.log_softmax(1).gather(1, own).mean() + telling_apart(functional.normalize(z, dim=1), 0.1)
        if entropy:
            log_p = z.scatter(1, own, -10.0).log_softmax(1)
            total = total - 0.2 * (log_p.exp() * log_p).sum(1).mean()
        seen["second"] = f.detach()[len(rows) :]
        return total

    def after(rows: Tensor) -> None:
        memory[rows] = functional.normalize(0.5 * memory[rows] + 0.5 * seen["second"], dim=1)

    return Plain([net], lambda: torch.optim.SGD(net.parameters(), 0.03, momentum=0.9, nesterov=True,
                                                weight_decay=5e-4), loss, after)


def ruc(state: Mapping[str, Any], *, mixing: tuple[float, Tensor] | None = None) -> Plain:
    """Return RUC's pass of the first network: seven passes for targets, and one of what MixUp made."""
    own, peer = copy.deepcopy(state["net 0"]), copy.deepcopy(state["net 1"])
    clean, labels, weights = (copy.deepcopy(getattr(state["marks"], name)) for name in ("clean", "labels", "weight"))
    confidences, told = torch.zeros(len(labels), device=labels.device), {}

    def loss(views: Sequence[Tensor], rows: Tensor) -> Tensor:
        logits = [own(view)[0] for view in views]
        with torch.no_grad():
            of_peer = [peer(view)[0].softmax(1) for view in views[:3]]
            of_own = [each.softmax(1) for each in logits]
            guess = _sharp(torch.stack([*of_own[1:3], *of_peer[1:]]).mean(0))
            one_hot = functional.one_hot(labels[rows], logits[0].shape[1]).float()
            weight = weights[1, rows][:, None]
            refined = _sharp((1 - weight) * one_hot + weight * of_peer[0])
        sure, label = clean[rows], labels[rows]
        targets = torch.where(sure[:, None], refined, guess).repeat(2, 1)
        told["confidence"], told["label"] = of_own[0].max(1)
        drawn = float(np.random.default_rng().beta(4.0, 4.0)) if mixing is None else mixing[0]
        share = max(drawn, 1 - drawn)
        order = torch.randperm(len(targets), device=targets.device) if mixing is None else mixing[1]
        images = torch.cat(list(views[1:3]))
        mixed, mixed_targets = (share * each + (1 - share) * each[order] for each in (images, targets))
        g, both = own(mixed)[0], sure.repeat(2)
        clean_loss = -(mixed_targets[both] * g[both].log_softmax(1)).sum(1).mean()
        noisy_loss = 25 * 0.1 * (g[~both].softmax(1) - mixed_targets[~both]).square().mean()
        smooth = torch.full_like(one_hot, 0.5 / (one_hot.shape[1] - 1)).scatter(1, label[:, None], 0.5)
        strong_loss = -(smooth[sure] * logits[3][sure].log_softmax(1)).sum(1).mean()
        return clean_loss + noisy_loss + strong_loss

    def after(rows: Tensor) -> None:
        confidences[rows] = told["confidence"]
        promoted = ~clean[rows] & (told["confidence"] >= 0.99)
        labels[rows] = torch.where(promoted, told["label"], labels[rows])
        clean[rows] |= promoted

    return Plain([own, peer], lambda: torch.optim.SGD(own.parameters(), 0.01, momentum=0.9, nesterov=True,
                                                      weight_decay=5e-4), loss, after)


def _sharp(p: Tensor) -> Tensor:
    raised = p.square()
    return raised / raised.sum(1, keepdim=True)


def _apart(net: ClusterNet) -> tuple[nn.Module, list[nn.Linear], nn.Module]:
    """Return the encoder, a layer for every head, and both as one module."""
    encoder, heads = copy.deepcopy(net.encoder), []
    for weight, bias in zip(net.heads.weight.detach(), net.heads.bias.detach(), strict=True):
        head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        head.weight.data, head.bias.data = weight.clone(), bias.clone()
        heads.append(head)
    return encoder, heads, nn.ModuleList([encoder, *heads])


METHODS: Mapping[str, Callable[..., Plain]] = {
    "simclr": simclr, "scan": scan, "selflabel": selflabel, "nnm": nnm, "ruc": ruc, "tsuc": tsuc, "superand": superand,
    "superand, no network": superand, "superand+ue": lambda state: superand(state, entropy=True),
    "superand+ue, no network": lambda state: superand(state, entropy=True),
}
"""Every method by the name that it has in `driven.METHODS`."""


def data(name: str, pixels: np.ndarray, near: np.ndarray) -> Shown:
    """Return the images of a method with the views that it takes, in the order of its loss."""
    size = pixels.shape[1]
    if name == "scan":
        return Shown(pixels, [strong_view(size)], near)
    if name == "nnm":
        return Shown(pixels, [strong_view(size)] * 2, near)
    if name == "selflabel":
        return Shown(pixels, [plain_view(size), strong_view(size)])
    if name == "ruc":
        return Shown(pixels, [plain_view(size), weak_view(size), weak_view(size), ruc_view(size)])
    view = simclr_view(size) if name == "simclr" else simclr_view(size, jitter=1.0, hue=0.4)
    return Shown(pixels, [view] * 2)


# ── lightly ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def lightly_simclr(state: Mapping[str, Any], pixels: np.ndarray) -> tuple[Plain, Shown] | None:
    """Return SimCLR by lightly as its CIFAR-10 example has it, on our encoder; None where it is not installed.

    Two passes, NTXentLoss, a projection with BatchNorm, SGD without momentum, and its own transform without blur.
    """
    try:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform
    except ImportError:
        return None
    encoder, criterion = copy.deepcopy(state["net"][0]), NTXentLoss()
    n = encoder.spec.n_features
    net = nn.Sequential(encoder, SimCLRProjectionHead(n, n, 128))
    both = SimCLRTransform(input_size=pixels.shape[1], gaussian_blur=0.0)
    plain = Plain([net], lambda: torch.optim.SGD(net.parameters(), lr=0.06),
                  lambda views, rows: criterion(net(views[0]), net(views[1])))
    return plain, Paired(pixels, both)


class Paired(Shown):
    """Images whose one transform makes all views at once."""

    def __init__(self, pixels: np.ndarray, both: Callable[[Image.Image], Sequence[Tensor]]) -> None:
        super().__init__(pixels, [])
        self.both = both

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return *self.both(Image.fromarray(self.pixels[row])), row
