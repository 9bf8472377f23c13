"""Attack a classifier: how many images stay right when each pixel may change a little, in the worst direction.

FGSM (Goodfellow et al. 2015) takes one step of size epsilon along the sign of the loss's gradient in the image; BIM
(Kurakin et al. 2017) several smaller ones that stay within epsilon of the image; PGD (Madry et al. 2018) is BIM from a
random start within epsilon. The loss is the cross-entropy of a target cluster. The network is in evaluation mode and in
full precision, and only images have gradients.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from phyla.classifier import Classifier
from phyla.embed import device_of, forward_all
from phyla.errors import CorruptFileError, InputError, nearest
from phyla.evaluate.calibration import Rows, clusters_of_classes
from phyla.evaluate.matching import match_clusters
from phyla.images.augment import Views
from phyla.images.batches import in_order, open_pixels
from phyla.nets.heads import ClusterNet
from phyla.progress import Bar, bar
from phyla.randomness import generator
from phyla.storage import read_json, write_json
from phyla.training.device import Device
from phyla.training.options import faults
from phyla.types import Assignment, ImageSet

Images = Float[Tensor, "batch 3 height width"]
Logits = Callable[[Images], Float[Tensor, "batch clusters"]]

_STEPS = {"fgsm": 1, "bim": 10, "pgd": 10}
_STEP_SHARES = {"fgsm": 1.0, "bim": 0.25, "pgd": 0.25}


@dataclass(frozen=True)
class Attack:
    """How images are changed.

    Parameters
    ----------
    method : fgsm, bim or pgd
    n_steps : None for 1 (fgsm) or 10 (bim, pgd)
    step_share : size of a step as a share of epsilon; None for 1 (fgsm) or 1/4 (bim, pgd)
    space : what epsilon is measured in: pixel, where channels run from 0 to 1; or normalized, the units of the
        network's input, of which one is a standard deviation of the data set's pixels
    target : what the loss is of: the cluster matched with the true class (of an image without one: the prediction), or
        the prediction for the clean image, which needs no labels
    clip : whether changed images keep to values that real pixels have
    """

    method: Literal["fgsm", "bim", "pgd"] = "pgd"
    n_steps: int | None = None
    step_share: float | None = None
    space: Literal["pixel", "normalized"] = "pixel"
    target: Literal["true", "predicted"] = "true"
    clip: bool = True

    def __post_init__(self) -> None:
        for fault in faults(self):
            raise fault
        if self.steps < 1 or (self.method == "fgsm" and self.steps > 1):
            raise InputError(f"{self.method} with n_steps={self.n_steps} cannot be made",
                             "1 for fgsm, 1 or more for bim and pgd")
        if not self.share > 0:
            raise InputError(f"step_share must be above 0, got {self.step_share}")

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return _STEPS[self.method] if self.n_steps is None else self.n_steps

    @property
    def share(self) -> float:
        """The size of a step, as a share of epsilon."""
        return _STEP_SHARES[self.method] if self.step_share is None else self.step_share


class Plan(NamedTuple):
    """An attack, and how far it may go."""

    attack: Attack
    epsilons: tuple[float, ...]


_AS_PUBLISHED = Attack("fgsm", space="normalized", clip=False)

PRESETS: Mapping[str, tuple[Plan, ...]] = {
    "sane": (Plan(Attack("pgd"), (0, 1 / 255, 2 / 255, 4 / 255, 8 / 255)),),
    "paper": (Plan(_AS_PUBLISHED, (0, 0.1, 0.2, 0.3, 0.4, 0.5)),
              Plan(replace(_AS_PUBLISHED, method="bim", step_share=1.0), (0, 0.01, 0.02, 0.03, 0.04, 0.05))),
}
"""sane: what the field measures. paper: the equations as RUC prints them, with a step of BIM that is epsilon."""


@dataclass(frozen=True)
class RobustnessCurve:
    """What an attack leaves of a classifier, for rising epsilon; the first is 0, the clean images.

    Parameters
    ----------
    title : whose it is
    attack : with what
    epsilons : from 0, in the units of ``attack.space``
    unchanged : share of images whose prediction is that for the clean image
    correct : share of images of known class in the cluster matched with it on clean images; None without labels
    n_images, n_known : that were attacked, and of these of known class
    split : which images they are; empty where there is but one split
    """

    title: str
    attack: Attack
    epsilons: tuple[float, ...]
    unchanged: tuple[float, ...]
    correct: tuple[float, ...] | None
    n_images: int
    n_known: int
    split: str = ""

    @property
    def drop(self) -> tuple[float, ...] | None:
        """The share right of clean images less that of attacked ones."""
        return None if self.correct is None else tuple(self.correct[0] - share for share in self.correct)

    def table(self) -> Rows:
        """Return one row an epsilon: right and drop where there are labels, and unchanged."""
        rows: Rows = []
        for i, epsilon in enumerate(self.epsilons):
            row: dict[str, float | int | None] = {"epsilon": epsilon}
            if self.correct is not None:
                row |= {"right": self.correct[i], "drop": self.correct[0] - self.correct[i]}
            rows.append(row | {"unchanged": self.unchanged[i]})
        return rows


def uphill(logits: Float[Tensor, "batch clusters"], clusters: Int[Tensor, " batch"]) -> Float[Tensor, "batch clusters"]:
    """Return the direction in which the cross-entropy of ``clusters`` grows: its gradient in the logits, scaled by row.

    Notes
    -----
    The gradient is p_c - [c is the target]; divided by 1 - p_target it is the softmax over the other clusters, and -1
    at the target. An attack takes the sign of what it becomes in the image, so the division changes one thing only: a
    probability that rounds to 1 would make the gradient vanish, and a network that is too sure of itself seem robust.
    """
    target = clusters[:, None]
    return logits.detach().scatter(1, target, -torch.inf).softmax(dim=1).scatter(1, target, -1.0)


def attacked(logits: Logits, start: Images, clusters: Int[Tensor, " batch"], *, epsilon: float, step: float,
             n_steps: int, noise: Images | None = None, low: Tensor | float = -torch.inf,
             high: Tensor | float = torch.inf) -> Images:
    """Return images within ``epsilon`` of ``start`` on which ``clusters`` are less probable.

    Parameters
    ----------
    logits : of the network, for images in the space of ``start``
    clusters : int64 (batch,), the target of each image
    step : size of each step, in the unit of ``epsilon``
    noise : -1 to 1, where in the ball to start, in units of epsilon; None for its center
    low, high : values that images may have

    Notes
    -----
    x_0 = x, or x + epsilon * noise; x_i = clip(x_(i-1) + step * sign(gradient)), first to x ± epsilon and then to low
    and high.
    """
    low, high = (torch.as_tensor(bound, dtype=start.dtype, device=start.device) for bound in (low, high))
    least, most = torch.maximum(start - epsilon, low), torch.minimum(start + epsilon, high)
    images = start if noise is None else (start + epsilon * noise).clamp(least, most)
    for _ in range(n_steps):
        with torch.enable_grad():
            moving = images.detach().requires_grad_()
            found = logits(moving)
            gradient, = torch.autograd.grad((found * uphill(found, clusters)).sum(), moving)
        images = (images + step * gradient.sign()).clamp(least, most)
    return images.detach()


def attack_curve(net: ClusterNet, views: Views, images: ImageSet, true: np.ndarray | None = None, *,
                 attack: Attack, epsilons: Sequence[float], mapping: np.ndarray | None = None, title: str = "",
                 seed: int = 0, device: Device | None = None, batch_size: int = 128) -> RobustnessCurve:
    """Return how often ``net`` stays right, and keeps to its prediction, under an attack of growing size.

    Parameters
    ----------
    net : with one head; it is not changed, but moved to ``device``
    views : their plain form is what ``net`` is shown
    images : all are attacked
    true : int (n_images,), -1 where the class is not known; None without labels
    epsilons : 0 and up; 0 is added in front
    mapping : int64 (n_clusters,), the class of each cluster or -1, known from more clean images; None to match on these
    title : names the curve and its progress bar
    seed : of random starts, which depend on the position of an image alone, and not on the batch or epsilon
    device : None for where ``net`` is; computes in float32 whatever its precision
    batch_size : images at once; changes nothing but speed

    Raises
    ------
    InputError
        Several heads, one cluster, a network on embeddings, an epsilon below 0, or ``attack.target`` "true" without
        labels.
    """
    true = np.full(len(images), -1) if true is None else np.asarray(true)
    _check(net, true, images, attack, epsilons)
    device = replace(device or device_of(net), precision="fp32")
    rising = tuple(sorted({0.0, *map(float, epsilons)}))
    if mapping is None and (true >= 0).any():
        mapping, _ = match_clusters(true, _labels(net, views, images, device), n_clusters=net.heads.n_clusters)
    wanted = _wanted(true, mapping)
    modes = {module: module.training for module in net.modules()}
    device.place(net).eval()
    try:
        with bar(title and f"attack {title}", total=len(images) * (len(rising) - 1), unit="image") as shown:
            found = _predictions(net, views.plain(), images, wanted if attack.target == "true" else None,
                                 plan=Plan(attack, rising), seed=seed, device=device, batch_size=batch_size,
                                 shown=shown)
    finally:
        for module, mode in modes.items():
            module.training = mode
    known = true >= 0
    unchanged = tuple(float((labels == found[0]).mean()) for labels in found)
    correct = tuple(float((labels == wanted)[known].mean()) for labels in found) if known.any() else None
    return RobustnessCurve(title, attack, rising, unchanged, correct, len(images), int(known.sum()))


def robustness_report(classifiers: Mapping[str, Classifier], images: ImageSet, true: np.ndarray | None, *,
                      preset: str = "sane", assignments: Mapping[str, Assignment] | None = None, n_images: int = 1000,
                      split: str = "", seed: int = 0, device: Device | None = None,
                      batch_size: int = 128) -> list[RobustnessCurve]:
    """Return a curve for every attack of a preset and every classifier, attack by attack.

    Parameters
    ----------
    classifiers : by title
    images, true : a split and its true classes, -1 where unknown, or None: the attack is then on the predictions
    preset : a name in ``PRESETS``
    assignments : of the whole split, by title, to match clusters with classes; what is missing is predicted
    n_images : attacked at most, the same for all: spread evenly over the images of known class, if any is known
    split : what the images are called, for the report
    """
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}", nearest(preset, list(PRESETS)))
    if n_images < 1:
        raise InputError(f"n_images must be at least 1, got {n_images}")
    some = None if true is None or not (np.asarray(true) >= 0).any() else np.asarray(true)
    pool = np.arange(len(images)) if some is None else np.flatnonzero(some >= 0)
    rows = pool[np.unique(np.linspace(0, len(pool) - 1, min(n_images, len(pool))).astype(int))]
    chosen, chosen_true = images.select(rows), None if some is None else some[rows]
    mappings = {} if some is None else {
        title: match_clusters(some, _all_labels(title, classifier, images, assignments, device),
                              n_clusters=classifier.n_clusters).mapping for title, classifier in classifiers.items()}
    curves = []
    for attack, epsilons in PRESETS[preset]:
        used = attack if some is not None else replace(attack, target="predicted")
        for title, classifier in classifiers.items():
            curve = attack_curve(classifier.net, classifier.views, chosen, chosen_true, attack=used, epsilons=epsilons,
                                 mapping=mappings.get(title), title=title, seed=seed, device=device,
                                 batch_size=batch_size)
            curves.append(replace(curve, split=split))
    return curves


def save_robustness(path: Path | str, curves: Sequence[RobustnessCurve]) -> None:
    """Write curves as JSON, whole or not at all."""
    write_json(path, {"curves": [asdict(curve) for curve in curves]})


def load_robustness(path: Path | str) -> list[RobustnessCurve]:
    """Return the curves that ``save_robustness`` wrote; CorruptFileError when the file holds something else."""
    try:
        return [_curve(held) for held in read_json(path)["curves"]]
    except (KeyError, TypeError, InputError) as error:
        raise CorruptFileError(f"{path} holds no curves of robustness ({error})",
                               "give the run's command again to rebuild it") from error


def _curve(held: Mapping[str, Any]) -> RobustnessCurve:
    correct = None if held["correct"] is None else tuple(held["correct"])
    return RobustnessCurve(held["title"], Attack(**held["attack"]), tuple(held["epsilons"]), tuple(held["unchanged"]),
                           correct, held["n_images"], held["n_known"], held["split"])


def _check(net: ClusterNet, true: np.ndarray, images: ImageSet, attack: Attack, epsilons: Sequence[float]) -> None:
    if net.heads.n_heads != 1 or net.heads.n_clusters < 2:
        raise InputError(f"an attack needs one head of at least 2 clusters, got {net.heads.n_heads} of "
                         f"{net.heads.n_clusters}", "pass net.only(head)")
    if isinstance(net.encoder, nn.Identity):
        raise InputError("an attack changes images, and this network takes embeddings", "pass one with an encoder")
    if len(true) != len(images) or not len(images):
        raise InputError(f"{len(true)} true classes do not fit {len(images)} images")
    if attack.target == "true" and not (true >= 0).any():
        raise InputError("target='true' needs the true class of some image", "set target='predicted'")
    if not all(0 <= epsilon < np.inf for epsilon in epsilons):
        raise InputError(f"epsilon must be 0 or above, and finite, got {list(epsilons)}")


def _labels(net: ClusterNet, views: Views, images: ImageSet, device: Device) -> np.ndarray:
    found = forward_all(images, net, lambda batch: net(batch)[0].argmax(dim=1), views.plain(), device=device)
    return found.cpu().numpy()


def _all_labels(title: str, classifier: Classifier, images: ImageSet, assignments: Mapping[str, Assignment] | None,
                device: Device | None) -> np.ndarray:
    if assignments is None or title not in assignments:
        return _labels(classifier.net, classifier.views, images, device or device_of(classifier.net))
    if list(assignments[title].ids) != list(images.ids):
        raise InputError(f"the assignment of {title!r} is of other images, or in another order")
    return assignments[title].labels


def _wanted(true: np.ndarray, mapping: np.ndarray | None) -> np.ndarray:
    """Return the cluster matched with each image's class, -1 where there is none."""
    if mapping is None:
        return np.full(len(true), -1)
    clusters = clusters_of_classes(mapping, int(max(true.max(initial=-1), mapping.max(initial=-1))) + 1)
    return np.where(true >= 0, clusters[true], -1)


def _predictions(net: ClusterNet, views: Views, images: ImageSet, wanted: np.ndarray | None, *, plan: Plan, seed: int,
                 device: Device, batch_size: int, shown: Bar) -> np.ndarray:
    """Return the predicted cluster for each epsilon, the first of which is 0, int64 (n_epsilons, n_images)."""
    space = _Space(net, views, plan.attack.space, device)
    low, high = space.range if plan.attack.clip else (-torch.inf, torch.inf)
    pixels, noise_free = open_pixels(images, device.device), plan.attack.method != "pgd"
    found = torch.empty(len(plan.epsilons), len(images), dtype=torch.int64)
    for rows in in_order(len(images), batch_size, device.device):
        start = space.start(pixels.take(rows))
        places = slice(int(rows[0]), int(rows[-1]) + 1)
        clean = space.labels(start)
        found[0, places] = clean.cpu()
        target = clean
        if wanted is not None:
            asked = torch.from_numpy(wanted[places]).to(clean)
            target = torch.where(asked >= 0, asked, clean)
        noise = None if noise_free else _noise(start, seed, places.start)
        for place, epsilon in enumerate(plan.epsilons[1:], 1):
            changed = attacked(space.logits, start, target, epsilon=epsilon, step=epsilon * plan.attack.share,
                               n_steps=plan.attack.steps, noise=noise, low=low, high=high)
            found[place, places] = space.labels(changed).cpu()
            shown.advance(len(rows))
    return found.numpy()


def _noise(start: Images, seed: int, first: int) -> Images:
    drawn = [torch.rand(start.shape[1:], generator=generator(seed, "attack", first + row)) for row in range(len(start))]
    return torch.stack(drawn).to(start).mul_(2).sub_(1)


class _Space:
    """The space in which images are changed, and the network seen from there."""

    def __init__(self, net: ClusterNet, views: Views, name: str, device: Device) -> None:
        self.net, self.device, self.is_pixel = net, device, name == "pixel"
        self.views = replace(views, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # values from 0 to 1
        mean, std = (torch.tensor(values, device=device.device).view(1, 3, 1, 1) for values in (views.mean, views.std))
        self.mean, self.std = mean, std
        nothing = torch.zeros_like(mean)
        self.range = (nothing, nothing + 1) if self.is_pixel else ((0 - mean) / std, (1 - mean) / std)

    def start(self, pixels: Tensor) -> Images:
        """Return the plain views of stored pixels, in this space."""
        images = self.views(pixels, generator(0, "plain")).clamp(0, 1)
        return images if self.is_pixel else (images - self.mean) / self.std

    def logits(self, images: Images) -> Float[Tensor, "batch clusters"]:
        """Return the logits of images of this space."""
        return self.net(self.device.arrange((images - self.mean) / self.std if self.is_pixel else images))[0]

    def labels(self, images: Images) -> Int[Tensor, " batch"]:
        """Return the most probable clusters of images of this space."""
        with torch.no_grad():
            return self.logits(images).argmax(dim=1)
