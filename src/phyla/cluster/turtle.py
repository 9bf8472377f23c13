"""TURTLE: the labels that linear classifiers of several embedding spaces learn best.

Gadetsky, Jiang and Brbic 2024, "Let Go of Your Labels with Unsupervised Transfer", section 3; the search is a bilevel
one with a first-order gradient.

In: embeddings (n, d_m) of the same images in M spaces, raw. Out: ``labels_`` (n,), ``probabilities_`` (n, K), and one
linear head: the mean over the spaces of a softmax of each.

Differs from the paper: nothing where the options are the defaults, but that several tries run side by side. Differs
from the authors' code: slopes are written out instead of traced; ``class_prior``, ``n_components``, ``scale``, the
choice by ridge regression or by the objective, and chance taken off the score that chooses are ours.

Tensors in here have clusters before images, (..., K, B): a softmax along the last of few clusters is many times slower.
"""

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from phyla.errors import CollapseWarning, InputError
from phyla.images.batches import Order
from phyla.nets.heads import MixtureHeads, SpaceProjection
from phyla.quality import generalization_score
from phyla.randomness import generator
from phyla.spaces import Space, SpaceMap, spaces_of
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Step
from phyla.training.options import faults

log = logging.getLogger("phyla")

EPSILON = 1e-12
"""Floor of a mean probability inside a logarithm."""

_ROWS = 1 << 16  # rows predicted at once


class TurtleLoss(NamedTuple):
    """The outer loss and its two parts, one number a try: sums over the spaces."""

    total: Tensor
    cross_entropy: Tensor
    entropy: Tensor


def inner_loss(logits: Float[Tensor, "*tries clusters batch"], targets: Float[Tensor, "*tries clusters batch"]
               ) -> Float[Tensor, "*tries"]:
    """Return the cross-entropy of one space's classifier to the targets, which take no gradient.

    Notes
    -----
    -1/B sum_i sum_c t_ci log softmax(logits_i)_c.
    """
    return -(targets.detach() * logits.log_softmax(-2)).sum(-2).mean(-1)


def inner_slopes(logits: Float[Tensor, "*tries clusters batch"], targets: Float[Tensor, "*tries clusters batch"]
                 ) -> Float[Tensor, "*tries clusters batch"]:
    """Return the gradient of ``inner_loss`` with respect to the logits: (softmax - targets) / B."""
    return (logits.softmax(-2) - targets) / logits.shape[-1]


def task_probabilities(tasks: Float[Tensor, "spaces *tries clusters batch"]) -> Float[Tensor, "*tries clusters batch"]:
    """Return tau, the mean over the spaces of the softmax of each one's task logits."""
    return tasks.softmax(-2).mean(0)


def outer_loss(tasks: Float[Tensor, "spaces *tries clusters batch"],
               logits: Float[Tensor, "spaces *tries clusters batch"], *, entropy_weight: float,
               class_prior: Float[Tensor, " clusters"] | None = None) -> TurtleLoss:
    """Return the loss of the labels; the gradient flows through the tasks alone, not through the classifiers.

    Parameters
    ----------
    tasks : logits of the labels in each space
    logits : of the classifiers that learned these labels in each space
    entropy_weight : gamma, 10 as published
    class_prior : expected share of each cluster (K,), summing to 1; None: uniform

    Notes
    -----
    L = sum_m CE(logits_m, tau) - gamma sum_m H(mean_i softmax(tasks_m)_i). A ``class_prior`` w puts -KL(. || w) in the
    place of H; for a uniform w that is H - log K.
    """
    targets = task_probabilities(tasks)
    cross_entropy = -(targets * logits.detach().log_softmax(-2)).sum(-2).mean(-1).sum(0)
    mean = tasks.softmax(-2).mean(-1).clamp(min=EPSILON)
    entropy = -(mean * mean.log()).sum(-1).sum(0)
    spread = entropy
    if class_prior is not None:
        spread = entropy + (mean * class_prior.to(mean).clamp(min=EPSILON).log()).sum(-1).sum(0)
    return TurtleLoss(cross_entropy - entropy_weight * spread, cross_entropy, entropy)


def outer_slopes(tasks: Float[Tensor, "spaces *tries clusters batch"],
                 logits: Float[Tensor, "spaces *tries clusters batch"], *, entropy_weight: float,
                 class_prior: Float[Tensor, " clusters"] | None = None
                 ) -> tuple[TurtleLoss, Float[Tensor, "spaces *tries clusters batch"]]:
    """Return ``outer_loss`` and its gradient with respect to ``tasks``.

    Notes
    -----
    dL/dtau = -1/B sum_m log softmax(logits_m), of which each space's share 1/M; dH/dp_c = -(log p_c + 1) of the mean p;
    then a softmax backwards: q (d - sum_c q_c d_c).
    """
    each = tasks.softmax(-2)
    wanted = -logits.log_softmax(-2).sum(0)
    cross_entropy = (each.mean(0) * wanted).sum(-2).mean(-1)
    mean = each.mean(-1, keepdim=True).clamp(min=EPSILON)
    logs = mean.log()
    entropy = -(mean * logs).sum((-2, -1)).sum(0)
    spread = entropy
    if class_prior is not None:
        expected = class_prior.to(mean).clamp(min=EPSILON).log()[:, None]
        spread = entropy + (mean * expected).sum((-2, -1)).sum(0)
        logs = logs - expected
    up = wanted / len(tasks) + entropy_weight * (logs + 1)
    slopes = each * (up - (each * up).sum(-2, keepdim=True)) / tasks.shape[-1]
    return TurtleLoss(cross_entropy - entropy_weight * spread, cross_entropy, entropy), slopes


class Tasks(nn.Module):
    """The labels of several tries in one space, as weight-normalised linear maps: (B, D + 1) to (tries, K, B).

    The last feature is 1, for the bias. A weight is ``length * direction / |direction|``, and so is its slope given
    back. Nothing is traced.
    """

    def __init__(self, n_tries: int, n_clusters: int, n_features: int, source: torch.Generator) -> None:
        super().__init__()
        drawn = _uniform(n_tries, n_clusters, n_features + 1, source=source)
        self.direction = nn.Parameter(drawn[..., :-1].clone(), requires_grad=False)
        self.length = nn.Parameter(drawn[..., :-1].norm(dim=2, keepdim=True), requires_grad=False)
        self.bias = nn.Parameter(drawn[..., -1:].clone(), requires_grad=False)

    def weight(self) -> Float[Tensor, "tries clusters features"]:
        """Return the plain linear maps, the bias last."""
        return torch.cat([self.length * self.direction / self.direction.norm(dim=2, keepdim=True), self.bias], dim=2)

    def slopes(self, plain: Float[Tensor, "tries clusters features"]) -> list[Tensor]:
        """Return the gradients of direction, length and bias, from that of ``weight()``."""
        norm = self.direction.norm(dim=2, keepdim=True)
        unit, pulled = self.direction / norm, plain[..., :-1]
        along = (pulled * unit).sum(dim=2, keepdim=True)
        return [self.length / norm * (pulled - along * unit), along, plain[..., -1:]]


class Adam(nn.Module):
    """Adam (Kingma and Ba 2015) of several tries, each with a learning rate of its own, (n_tries, 1, 1).

    Its state lies in buffers, as weights do; it moves parameters by slopes that are given to it.
    """

    def __init__(self, parameters: Sequence[Tensor], rates: Float[Tensor, "tries 1 1"]) -> None:
        super().__init__()
        self.register_buffer("rates", rates)
        self.register_buffer("n_steps", torch.zeros((), dtype=rates.dtype))
        for place, parameter in enumerate(parameters):
            self.register_buffer(f"mean{place}", torch.zeros_like(parameter))
            self.register_buffer(f"square{place}", torch.zeros_like(parameter))

    def restart(self) -> None:
        """Forget all slopes."""
        for buffer in list(self.buffers())[1:]:
            buffer.zero_()

    def move(self, parameters: Sequence[Tensor], slopes: Sequence[Tensor], *, betas: tuple[float, float] = (0.9, 0.999),
             epsilon: float = 1e-8) -> None:
        """Take one step."""
        rates, n_steps, *moments = self.buffers()
        n_steps += 1
        first, second = 1 - betas[0] ** n_steps, 1 - betas[1] ** n_steps
        rate, root = rates / first, second.rsqrt()
        for parameter, slope, mean, square in zip(parameters, slopes, moments[::2], moments[1::2], strict=True):
            mean.lerp_(slope, 1 - betas[0])
            square.mul_(betas[1]).addcmul_(slope, slope, value=1 - betas[1])
            parameter.sub_(rate * mean / square.sqrt().mul_(root).add_(epsilon))


class _Search(nn.Module):
    """All that moves: tasks and classifiers of every space, and what their steps remember."""

    losses: Tensor

    def __init__(self, spaces: list[Tensor], n_clusters: int, rates: Float[Tensor, "2 tries"], seed: int) -> None:
        super().__init__()
        n_tries = rates.shape[1]
        source = generator(seed, "turtle tasks")
        widths = [space.shape[1] for space in spaces]
        self.tasks = [Tasks(n_tries, n_clusters, width - 1, source).to(spaces[0]) for width in widths]
        self.held = nn.ModuleList(self.tasks)
        self.weights = nn.ParameterList(nn.Parameter(space.new_zeros(n_tries, n_clusters, width), requires_grad=False)
                                        for space, width in zip(spaces, widths, strict=True))
        outer, inner = rates.to(spaces[0])[:, :, None, None]
        self.adam, self.inner_adam = Adam(self.moved(), outer), Adam(list(self.weights), inner)
        self.adam.to(spaces[0].device), self.inner_adam.to(spaces[0].device)
        self.register_buffer("losses", spaces[0].new_zeros(n_tries))

    def moved(self) -> list[Tensor]:
        """Return the parameters of the tasks, in the order of their slopes."""
        return [value for tasks in self.tasks for value in tasks.parameters()]

    def plain(self) -> list[Tensor]:
        """Return the linear maps of the tasks, (tries, K, D + 1) a space."""
        return [tasks.weight() for tasks in self.tasks]

    def slopes(self, plain: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of ``moved()``, from those of ``plain()``."""
        return [value for tasks, each in zip(self.tasks, plain, strict=True) for value in tasks.slopes(each)]

    def restart(self, drawn: Sequence[Tensor]) -> None:
        """Set the classifiers to ``drawn`` and forget how they moved."""
        for weight, start in zip(self.weights, drawn, strict=True):
            weight.copy_(start)
        self.inner_adam.restart()

    def draw(self, source: torch.Generator) -> list[Tensor]:
        """Return classifiers as a fresh linear layer has them."""
        return [_uniform(*weight.shape, source=source).to(weight) for weight in self.weights]


@dataclass(kw_only=True, eq=False, repr=False)
class TURTLE(ClusterMixin, BaseEstimator):
    """Cluster embeddings by how well linear classifiers learn the labels; defaults are the published ones, for a GPU.

    Parameters
    ----------
    n_clusters : K
    n_tries : searches from different starts, side by side; the one with the best score is kept
    outer_lr, inner_lr : of the labels and of the classifiers; of several, each try takes a pair of them in turn
    start : cold: at every step the classifiers start anew; warm: they go on
    n_inner : steps of the classifiers in each step of the labels
    n_steps : of the labels, in whole epochs
    batch_size : images a step; many for each cluster, as their mean is to be even
    entropy_weight : gamma; lower it where the classes are uneven
    class_prior : expected share of each cluster, summing to 1; None: even
    scale : raw: the embeddings as they are, as published; unit: rows of length sqrt(n_features); standard: features of
        mean 0 and variance 1
    n_components : search in so many principal directions of each space, which is faster; what comes out takes the
        embeddings all the same. None: in all features, as published
    select : the try with the highest ``generalization_score``, less what chance gives: of logistic regression, as
        published, or of ridge, far faster; objective: with the lowest loss in the last epoch
    random_state : seed of starts and order; None draws one

    Attributes
    ----------
    labels_ : int64 (n_images,)
    probabilities_ : float32 (n_images, n_clusters)
    try_, scores_, score_ : which try was kept, the score of each (the loss, if ``select`` is objective), and its own
    all_labels_ : int64 (n_tries, n_images), of every try
    history_ : a record an epoch
    """

    n_clusters: int = 10
    n_tries: int = 1
    outer_lr: float | tuple[float, ...] = 1e-3
    inner_lr: float | tuple[float, ...] = 1e-3
    start: Literal["cold", "warm"] = "cold"
    n_inner: int = 10
    n_steps: int = 6000
    batch_size: int = 10_000
    entropy_weight: float = 10.0
    class_prior: tuple[float, ...] | None = None
    scale: Literal["raw", "unit", "standard"] = "raw"
    n_components: int | None = None
    select: Literal["logistic", "ridge", "objective"] = "logistic"
    random_state: int | None = 0

    @classmethod
    def quick(cls, n_clusters: int = 10, *, random_state: int | None = 0) -> "TURTLE":
        """Return options for two cores: small steps of classifiers that go on, eight tries in 256 directions.

        The numbers are in docs/methods/turtle.md.
        """
        return cls(n_clusters=n_clusters, n_tries=8, inner_lr=1e-2, start="warm", n_inner=1, n_steps=1500,
                   batch_size=max(1000, 20 * n_clusters), n_components=256, select="ridge", random_state=random_state)

    def fit(self, embeddings: Space, y: None = None, *, device: Device | None = None, folder: Path | None = None
            ) -> "TURTLE":
        """Cluster ``embeddings``, in one space or several, and set what is listed under Attributes.

        Parameters
        ----------
        folder : keeps a checkpoint from which the same call goes on

        Raises
        ------
        InputError
            An option out of its range, or more clusters than images.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        device = device or choose_device("cpu")
        spaces = spaces_of(embeddings)
        for fault in self._faults(len(spaces[0]), folder):
            raise fault
        seed = int(np.random.default_rng().integers(1 << 31)) if self.random_state is None else self.random_state
        key = fingerprint(asdict(self), *spaces) if folder else ""
        maps = [SpaceMap.of(space, scale=self.scale, n_components=self.n_components, device=device) for space in spaces]
        rows = [each(space, device) for each, space in zip(maps, spaces, strict=True)]
        search = _Search(rows, self.n_clusters, self._rates(), seed)
        order = Order(len(rows[0]), self.batch_size, seed, device=device.device)
        prior = None if self.class_prior is None else torch.tensor(self.class_prior, device=device.device)

        def advance(step: Step, *drawn: Tensor) -> None:
            batch = [each[step.indices] for each in rows]  # whole in every process: a step is too small to share
            if drawn:
                search.restart(drawn)
            tasks = _applied(search.plain(), batch)
            targets = task_probabilities(tasks)
            for _ in range(self.n_inner):
                slopes = inner_slopes(_applied(search.weights, batch), targets.expand_as(tasks))
                search.inner_adam.move(list(search.weights), _pulled(slopes, batch))
            loss, slopes = outer_slopes(tasks, _applied(search.weights, batch), entropy_weight=self.entropy_weight,
                                        class_prior=prior)
            search.adam.move(search.moved(), search.slopes(_pulled(slopes, batch)))
            search.losses += loss.total / order.steps_per_epoch
            run.watch(loss.total.sum(), step.index)
            step.log(loss=loss.total.mean(), cross_entropy=loss.cross_entropy.mean(), entropy=loss.entropy.mean())

        run = Loop("cluster", order, n_epochs=math.ceil(self.n_steps / order.steps_per_epoch), folder=folder, seed=seed,
                   key=key, device=device, state={"search": search})
        for step in run:
            if step.position == 0:
                search.losses.zero_()
            fresh = self.start == "cold" or step.index == 0
            step.run(advance, *(search.draw(generator(seed, "turtle classifiers", step.index)) if fresh else []))

        self.history_ = run.history
        self._choose(search, rows, maps)
        self.n_features_in_ = sum(self._widths)
        self.probabilities_ = self._assign(spaces)
        self.labels_ = self.probabilities_.argmax(axis=1).astype(np.int64)
        self._tell()
        return self

    def predict_proba(self, embeddings: Space) -> np.ndarray:
        """Return the probabilities of new images, float32 (n_images, K)."""
        check_is_fitted(self)
        spaces = spaces_of(embeddings)
        widths = tuple(each.shape[1] for each in spaces)
        if widths != self._widths:
            raise InputError(f"embeddings of {widths} features do not fit the {self._widths} of the fit",
                             "embed with the encoders of the fit")
        return self._assign(spaces)

    def predict(self, embeddings: Space) -> np.ndarray:
        """Return the cluster of new images, int64 (n_images,)."""
        return self.predict_proba(embeddings).argmax(axis=1).astype(np.int64)

    def as_parts(self) -> tuple[SpaceProjection | None, MixtureHeads]:
        """Return what maps the spaces beside one another, (n, D), to the same probabilities."""
        check_is_fitted(self)
        return copy.deepcopy(self._projection), copy.deepcopy(self._heads)

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_clusters": 1, "n_tries": 1, "n_inner": 1, "n_steps": 1, "batch_size": 2,
                                       "entropy_weight": 0})
        for name, rates in (("outer_lr", self.outer_lr), ("inner_lr", self.inner_lr)):
            if not _several(rates) or not all(0 < rate < math.inf for rate in _several(rates)):
                yield InputError(f"{name} must be above 0 and finite, or several such, got {rates}")
        if self.n_components is not None and self.n_components < 1:
            yield InputError(f"n_components must be at least 1 or None, got {self.n_components}")
        prior = self.class_prior
        if prior is not None and not (len(prior) == self.n_clusters and min(prior) >= 0
                                      and abs(sum(prior) - 1) < 1e-3):
            yield InputError(f"class_prior needs {self.n_clusters} shares of 0 to 1 that sum to 1, got {prior}")

    def _faults(self, n_images: int, folder: Path | None) -> Iterator[InputError]:
        yield from self.option_faults()
        if n_images < max(2, self.n_clusters):
            yield InputError(f"n_clusters={self.n_clusters} needs at least {max(2, self.n_clusters)} images, "
                             f"got {n_images}", "lower n_clusters or add images")
        if folder is not None and self.random_state is None:
            yield InputError("a fit that can go on needs a seed", "set random_state, or give no folder")

    def _rates(self) -> Float[Tensor, "2 tries"]:
        pairs = list(product(_several(self.outer_lr), _several(self.inner_lr)))
        return torch.tensor([pairs[place % len(pairs)] for place in range(self.n_tries)]).T

    def _choose(self, search: _Search, rows: list[Tensor], maps: list[SpaceMap]) -> None:
        """Keep the try with the best score: its labels and, folded into weights for raw embeddings, its tasks."""
        weights = search.plain()
        labels = torch.cat([task_probabilities(_applied(weights, [each[start : start + _ROWS] for each in rows]))
                            .argmax(dim=1).cpu() for start in range(0, len(rows[0]), _ROWS)], dim=1)
        self.all_labels_ = labels.numpy()
        if self.select == "objective":
            self.scores_ = search.losses.double().cpu().numpy()
        else:
            n_folds = min(10, labels.shape[1])
            features = [each[:, :-1].cpu().numpy() for each in rows]
            self.scores_ = np.asarray(generalization_score(self.all_labels_, features, n_folds=n_folds, adjusted=True,
                                                           classifier=self.select))
        self.try_ = int(self.scores_.argmin() if self.select == "objective" else self.scores_.argmax())
        self.score_ = float(self.scores_[self.try_])
        self._widths = tuple(each.n_features for each in maps)
        self._projection = SpaceProjection(self._widths, unit=True).eval() if self.scale == "unit" else None
        heads = MixtureHeads(sum(self._widths), self.n_clusters, len(maps))
        for member, (weight, each) in enumerate(zip(weights, maps, strict=True)):
            first = sum(self._widths[:member])
            plain, bias = each.folded(weight[self.try_], n_spaces=len(maps))
            heads.weight.data[member, :, first : first + each.n_features] = plain
            heads.bias.data[member] = bias
        self._heads = heads.requires_grad_(False).eval()

    def _assign(self, spaces: list[np.ndarray]) -> np.ndarray:
        project, found = self._projection or nn.Identity(), []
        for start in range(0, len(spaces[0]), _ROWS):
            each = [torch.from_numpy(space[start : start + _ROWS].astype(np.float32)) for space in spaces]
            found.append(self._heads.probabilities(project(torch.cat(each, dim=1)))[:, 0])
        return torch.cat(found).numpy()

    def _tell(self) -> None:
        log.info("cluster: kept try %d of %d, score %.4f", self.try_ + 1, self.n_tries, self.score_)
        n_used = len(np.unique(self.labels_))
        if n_used < self.n_clusters:
            log.info("cluster: %d of %d clusters hold an image", n_used, self.n_clusters)
        if n_used == 1 < self.n_clusters:
            warnings.warn(f"TURTLE put all {len(self.labels_)} images into one of {self.n_clusters} clusters. hint: "
                          "raise entropy_weight, or look at the embeddings", CollapseWarning, stacklevel=3)


def _applied(weights: Sequence[Tensor] | nn.ParameterList, rows: list[Tensor]
             ) -> Float[Tensor, "spaces tries clusters batch"]:
    """Return the logits of every space and try: one matrix product a space."""
    return torch.stack([(weight.flatten(0, 1) @ each.T).view(*weight.shape[:2], -1)
                        for weight, each in zip(weights, rows, strict=True)])


def _pulled(slopes: Float[Tensor, "spaces tries clusters batch"], rows: list[Tensor]) -> list[Tensor]:
    """Return the gradients of weights from those of their logits."""
    return [(slope.flatten(0, 1) @ each).view(*slope.shape[:2], -1) for slope, each in zip(slopes, rows, strict=True)]


def _uniform(*shape: int, source: torch.Generator) -> Tensor:
    """Return weights as a linear layer has them at first, the bias last: U(+-1/sqrt(n_features))."""
    return (torch.rand(shape, generator=source) * 2 - 1) / math.sqrt(shape[-1] - 1)


def _several(rates: float | tuple[float, ...]) -> tuple[float, ...]:
    return tuple(rates) if isinstance(rates, tuple | list) else (rates,)
