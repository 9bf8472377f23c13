"""TEMI: clusters that an embedding and its neighbor share, found by many small heads that teach themselves.

Adaloglou et al. 2023, "Exploring the Limits of Deep Image Clustering using Pretrained Models" (BMVC 2023).

In: embeddings of one or several frozen encoders, (n, D), and neighbors (n, k), found when missing. Out: ``labels_``
(n,), ``probabilities_`` (n, K), and ``as_parts``: one projection and one linear head.

Differs from the authors' code, of which only a description was read: all heads are one batched product, and the
embeddings and their neighbors stay on the device; ``n_components`` and ``teacher_momentum`` below 0.996 are for short
training, and ours. What the description leaves open, and how it was settled, stands in docs/methods/temi.md.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterHeads, SpaceProjection
from phyla.randomness import generator
from phyla.spaces import Space, head_probabilities, scaled, spaces_of
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Step
from phyla.training.options import faults, make_optimizer, neighbor_faults
from phyla.training.schedule import warm_up
from phyla.types import Neighbors

log = logging.getLogger("phyla")

EPSILON = 1e-8
"""Floor of a cluster's share inside a logarithm, SCAN's value."""

_ROWS = 1 << 14  # rows at once


class TemiLoss(NamedTuple):
    """The loss and what it is made of, one number a head."""

    total: Tensor
    information: Tensor
    entropy: Tensor


def temi_loss(student_logits: Float[Tensor, "2 *heads batch clusters"],
              teacher_logits: Float[Tensor, "2 *heads batch clusters"], *, beta: float,
              marginal: Float[Tensor, "*heads clusters"] | None = None, weights: Float[Tensor, " batch"] | None = None,
              entropy_weight: float = 0.0) -> TemiLoss:
    """Return TEMI's loss of anchors and one neighbor each; axes between the first and the batch are heads.

    Parameters
    ----------
    student_logits, teacher_logits : of the anchors, then of their neighbors, already divided by the temperature; the
        gradient flows through the student's alone
    beta : 1 is mutual information, and tends to leave clusters unused; below 1 spreads over them, 0.6 as published
    marginal : share of each cluster by the teacher; None: left out
    weights : of the pairs, see ``agreement``; None: 1, the plain mutual information (PMI)
    entropy_weight : of the entropy of the student's mean, which is 0 in TEMI

    Notes
    -----
    With q the student's and t the teacher's softmax, x' the neighbor of x, m the marginal and w the weight:
    pmi(x, x') = log sum_c (q_xc t_x'c)^beta / m_c,  L = -1/2B sum_x w_x [pmi(x, x') + pmi(x', x)].
    SCAN is beta = 1 without marginal and weights, and entropy_weight = 5.
    """
    student = student_logits.log_softmax(-1)
    pairs = beta * (student + teacher_logits.detach().log_softmax(-1).flip(0))  # each with the teacher of the other
    if marginal is not None:
        pairs = pairs - marginal.clamp(min=EPSILON).log().unsqueeze(-2)
    information = pairs.logsumexp(-1)
    weighted = information if weights is None else information * weights
    mean = student.exp().mean(-2).clamp(min=EPSILON)
    entropy = -(mean * mean.log()).sum(-1).mean(0)
    return TemiLoss(-weighted.mean((0, -1)) - entropy_weight * entropy, information.detach().mean((0, -1)), entropy)


def agreement(teacher_logits: Float[Tensor, "2 heads batch clusters"]) -> Float[Tensor, " batch"]:
    """Return how surely the teachers put anchor and neighbor into one cluster, 0 to 1: the weight of each pair.

    w(x, x') = 1/H sum_h sum_c t_xc t_x'c: the mean over all heads, shared by all, without a gradient.
    """
    first, second = teacher_logits.detach().softmax(-1)
    return (first * second).sum(-1).mean(0)


def moved_marginal(marginal: Float[Tensor, "heads clusters"], teacher_logits: Float[Tensor, "2 heads batch clusters"],
                   *, momentum: float) -> Float[Tensor, "heads clusters"]:
    """Return the shares after a batch: momentum * marginal + (1 - momentum) * the teachers' mean over its rows."""
    return momentum * marginal + (1 - momentum) * teacher_logits.detach().softmax(-1).mean((0, 2))


class TemiHeads(nn.Module):
    """Many heads on one embedding as batched products: linear, GELU, linear, length 1, prototypes; (B, D) to (H, B, K).

    Parameters
    ----------
    n_features, n_clusters, n_heads : D, K and H
    hidden : features after the first and after the second layer
    temperature : > 0, divides the logits

    Notes
    -----
    A prototype is ``length * direction / |direction|``, both trained; the length starts at 1.
    """

    def __init__(self, n_features: int, n_clusters: int, n_heads: int, *, hidden: tuple[int, int] = (512, 256),
                 temperature: float = 0.1) -> None:
        super().__init__()
        wide, narrow = hidden
        self.first, self.first_bias = _parameter(n_heads, wide, n_features), _parameter(n_heads, wide)
        self.second, self.second_bias = _parameter(n_heads, narrow, wide), _parameter(n_heads, narrow)
        self.direction, self.length = _parameter(n_heads, n_clusters, narrow), _parameter(n_heads, n_clusters)
        self.temperature = temperature

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights from N(0, 0.02²), cut at ±2; biases 0, lengths 1."""
        for weight in (self.first, self.second, self.direction):
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        nn.init.ones_(self.length)

    def forward(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "heads batch clusters"]:
        """Return the logits of every head, divided by the temperature."""
        n_heads, wide, _ = self.first.shape
        rows = nn.functional.linear(embeddings, self.first.flatten(0, 1), self.first_bias.flatten())
        rows = nn.functional.gelu(rows).reshape(len(rows), n_heads, wide).transpose(0, 1)
        rows = torch.baddbmm(self.second_bias[:, None], rows, self.second.transpose(1, 2))
        return torch.bmm(nn.functional.normalize(rows, dim=2), self.prototypes().transpose(1, 2))

    def prototypes(self) -> Float[Tensor, "heads clusters features"]:
        """Return what the logits are products with."""
        return nn.functional.normalize(self.direction, dim=2) * (self.length / self.temperature)[..., None]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class _Teacher(nn.Module):
    """The moving average of the student, the share of each cluster by it, and the losses of this epoch so far."""

    marginal: Tensor
    losses: Tensor

    def __init__(self, student: TemiHeads) -> None:
        super().__init__()
        self.heads = copy.deepcopy(student).requires_grad_(False)
        n_heads, n_clusters = student.length.shape
        self.register_buffer("marginal", torch.full((n_heads, n_clusters), 1 / n_clusters))
        self.register_buffer("losses", torch.zeros(n_heads))

    def follow(self, student: TemiHeads, *, momentum: float) -> None:
        """Move the weights to ``momentum`` of themselves and the rest of the student's."""
        with torch.no_grad():
            torch._foreach_lerp_(list(self.heads.parameters()), list(student.parameters()), 1 - momentum)


@dataclass(eq=False, repr=False)
class TEMI(ClusterMixin, BaseEstimator):
    """Cluster embeddings by what they share with a neighbor; defaults are the published ones, for a GPU.

    Parameters
    ----------
    n_clusters : K
    n_heads : heads trained side by side, of which the one with the lowest loss in the last epoch is kept
    beta : below 1 spreads over the clusters, 1 may leave some unused: lower it where clusters stay empty, raise it
        where the classes are very uneven
    objective : temi; pmi: all pairs have weight 1; scan: SCAN's loss between student and teacher, ``beta`` unused
    temperature : of both softmaxes, > 0
    teacher_momentum : share of its own weights that the teacher keeps at a step
    marginal_momentum : the same of the clusters' shares
    embed_norm : standardize each feature first, as published for ImageNet
    unit : scale the rows of each space to length 1
    hidden : features after the two hidden layers of a head
    n_components : train on this many principal components of the embeddings, which is much faster and hardly another
        result; the head that comes out takes the embeddings all the same. None: on all features, as published
    n_neighbors : found by cosine where none are given, 50, for ImageNet 25; at most half of what an even cluster holds
    lr : of 256 images a step, and in proportion for others; constant after the warm-up
    warmup_epochs : over which the learning rate rises
    frozen_epochs : in which the prototypes do not move
    weight_decay : of AdamW
    n_epochs, batch_size : every image is an anchor once an epoch; a short last batch is left out
    n_steps : train for about as many steps instead, in whole epochs and two at least, of which the learning rate rises
        in a tenth: ``n_epochs`` and ``warmup_epochs`` then say nothing. None: as they say
    keep_heads : leave ``head_probabilities_``, too: what every head makes of the images
    random_state : seed of heads, order and neighbors drawn; None draws one

    Attributes
    ----------
    labels_ : int64 (n_images,)
    probabilities_ : float32 (n_images, n_clusters)
    head_, head_losses_, score_ : which head was kept, the loss of each in the last epoch, and its own
    head_probabilities_ : float16 (n_heads, n_images, n_clusters), with ``keep_heads``
    history_ : a record an epoch
    """

    n_clusters: int = 10
    n_heads: int = 16
    beta: float = 0.6
    objective: Literal["temi", "pmi", "scan"] = "temi"
    temperature: float = 0.1
    teacher_momentum: float = 0.996
    marginal_momentum: float = 0.9
    embed_norm: bool = False
    unit: bool = True
    hidden: tuple[int, int] = (512, 256)
    n_components: int | None = None
    n_neighbors: int = 50
    lr: float = 1e-4
    warmup_epochs: int = 20
    frozen_epochs: int = 1
    weight_decay: float = 1e-4
    n_epochs: int = 100
    batch_size: int = 1024
    n_steps: int | None = None
    keep_heads: bool = False
    random_state: int | None = 0

    @classmethod
    def quick(cls, n_clusters: int = 10, *, random_state: int | None = 0) -> "TEMI":
        """Return options for two cores: 800 small steps whatever the number of images, with a teacher close behind.

        On sets of thousands they end far better than the published ones, by the loss as by labels: a teacher of
        momentum 0.996 needs a hundred thousand steps. The numbers are in docs/methods/temi.md.
        """
        return cls(n_clusters=n_clusters, n_heads=4, teacher_momentum=0.9, hidden=(256, 128), n_components=128, lr=3e-3,
                   n_steps=800, batch_size=max(256, 4 * n_clusters), random_state=random_state)

    def fit(self, embeddings: Space, y: None = None, *, neighbors: Neighbors | None = None,
            device: Device | None = None, folder: Path | None = None) -> "TEMI":
        """Cluster ``embeddings``, in one space or several, and set what is listed under Attributes.

        Parameters
        ----------
        neighbors : of every image; found by the mean cosine over the spaces where missing
        folder : keeps a checkpoint from which the same call goes on

        Raises
        ------
        InputError
            An option out of its range, more clusters than images, or neighbors of another set.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        device = device or choose_device("cpu")
        spaces = spaces_of(embeddings)
        for fault in self._faults(len(spaces[0]), folder):
            raise fault
        near = self._find_neighbors(spaces, device) if neighbors is None else neighbors
        for fault in neighbor_faults((spaces[0], near)):
            raise fault
        seed = int(np.random.default_rng().integers(1 << 31)) if self.random_state is None else self.random_state
        key = fingerprint(asdict(self), *spaces, near.fingerprint) if folder else ""
        entry = self._entry(spaces)
        rows, basis = self._reduced(entry, spaces, device)
        table = torch.from_numpy(near.indices).to(device.device)
        student = TemiHeads(rows.shape[1], self.n_clusters, self.n_heads, hidden=self.hidden,
                            temperature=self.temperature)
        student.initialise(generator(seed, "temi heads"))
        teacher = _Teacher(student).to(device.device)
        student.to(device.device)
        optimizer = make_optimizer("adamw", student.parameters(), device, lr=self.lr, momentum=0.0,
                                   weight_decay=self.weight_decay)
        order = Order(len(rows), self.batch_size, seed, device=device.device)
        n_epochs, n_rising = self._durations(order.steps_per_epoch)
        forward = device.compiled(student)

        def advance(step: Step, column: Tensor, frozen: bool) -> None:
            for part in (student.direction, student.length):
                part.requires_grad_(not frozen)
            pairs = rows[torch.cat([step.rows, table[step.rows, column[step.part]]])]
            with device.autocast():
                own = forward(pairs)
                with torch.no_grad():
                    taught = teacher.heads(pairs)
            own, taught = (torch.stack([step.gather(half, dim=1) for half in each.float().chunk(2, dim=1)])
                           for each in (own, taught))
            teacher.marginal.copy_(moved_marginal(teacher.marginal, taught, momentum=self.marginal_momentum))
            loss = self._loss(own, taught, teacher.marginal)
            step.backward(loss.total.mean(), optimizer)
            teacher.follow(student, momentum=self.teacher_momentum)
            teacher.losses += loss.total.detach() / order.steps_per_epoch
            step.log(loss=loss.total.mean(), information=loss.information.mean(), entropy=loss.entropy.mean())

        run = Loop("cluster", order, n_epochs=n_epochs, folder=folder, seed=seed, key=key, device=device,
                   state={"student": student, "teacher": teacher, "optimizer": optimizer})
        for step in run:
            if step.position == 0:
                teacher.losses.zero_()
            step.set_lr(optimizer, self.lr * order.rows / 256 * warm_up(step.index, steps=n_rising))
            column = torch.randint(table.shape[1], step.indices.shape, generator=step.generator,
                                   device=step.generator.device)
            step.run(advance, column.to(device.device, non_blocking=True), step.epoch < self.frozen_epochs)

        self.history_ = run.history
        self.head_losses_ = teacher.losses.double().cpu().numpy()
        self.head_ = int(self.head_losses_.argmin())
        self.score_ = float(self.head_losses_[self.head_])
        self._keep(entry, student, basis)
        if self.keep_heads:
            self.head_probabilities_ = self._of_heads(student, rows)
        self.n_features_in_ = self._projection.n_features
        self.probabilities_ = head_probabilities(spaces, self._projection, self._heads)
        self.labels_ = self.probabilities_.argmax(axis=1).astype(np.int64)
        self._tell()
        return self

    def predict_proba(self, embeddings: Space) -> np.ndarray:
        """Return the probabilities of new images, float32 (n_images, K)."""
        check_is_fitted(self)
        return head_probabilities(embeddings, self._projection, self._heads)

    def predict(self, embeddings: Space) -> np.ndarray:
        """Return the cluster of new images, int64 (n_images,)."""
        return self.predict_proba(embeddings).argmax(axis=1).astype(np.int64)

    def as_parts(self) -> tuple[SpaceProjection, ClusterHeads]:
        """Return what maps the spaces beside one another, (n, D), to the same probabilities."""
        check_is_fitted(self)
        return copy.deepcopy(self._projection), copy.deepcopy(self._heads)

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_clusters": 1, "n_heads": 1, "n_neighbors": 1, "warmup_epochs": 0,
                                       "frozen_epochs": 0, "batch_size": 1},
                          above={"beta": 0, "temperature": 0}, below_one=("teacher_momentum", "marginal_momentum"))
        if len(self.hidden) != 2 or min(self.hidden) < 1:
            yield InputError(f"hidden needs two numbers of features, at least 1 each, got {self.hidden}")
        if self.n_components is not None and self.n_components < 1:
            yield InputError(f"n_components must be at least 1, got {self.n_components}", "None for all features")
        if self.n_steps is not None and self.n_steps < 1:
            yield InputError(f"n_steps must be at least 1, got {self.n_steps}", "None to go by n_epochs")

    def _faults(self, n_images: int, folder: Path | None) -> Iterator[InputError]:
        yield from self.option_faults()
        if n_images < max(2, self.n_clusters):
            yield InputError(f"n_clusters={self.n_clusters} needs at least {max(2, self.n_clusters)} images, "
                             f"got {n_images}", "lower n_clusters or add images")
        if folder is not None and self.random_state is None:
            yield InputError("a fit with random_state=None cannot be gone on with", "set random_state, or no folder")

    def _durations(self, steps_per_epoch: int) -> tuple[int, int]:
        """Return the epochs, and the steps in which the learning rate rises."""
        if self.n_steps is None:
            return self.n_epochs, self.warmup_epochs * steps_per_epoch
        n_epochs = max(2, round(self.n_steps / steps_per_epoch))
        return n_epochs, n_epochs * steps_per_epoch // 10

    def _loss(self, student: Tensor, teacher: Tensor, marginal: Tensor) -> TemiLoss:
        if self.objective == "scan":
            return temi_loss(student, teacher, beta=1.0, entropy_weight=5.0)
        weights = agreement(teacher) if self.objective == "temi" else None
        return temi_loss(student, teacher, beta=self.beta, marginal=marginal, weights=weights)

    def _find_neighbors(self, spaces: list[np.ndarray], device: Device) -> Neighbors:
        n_images = len(spaces[0])
        k = min(self.n_neighbors, max(1, n_images // (2 * self.n_clusters)), n_images - 1)
        return find_neighbors(scaled(spaces), k, device=device.device)

    def _entry(self, spaces: list[np.ndarray]) -> SpaceProjection:
        """Return what is done to the embeddings before the first layer."""
        entry = SpaceProjection([each.shape[1] for each in spaces], unit=self.unit)
        if self.embed_norm:
            mean, spread = (np.concatenate([of(each, axis=0, dtype=np.float64) for each in spaces])
                            for of in (np.mean, np.std))
            entry.shift.copy_(torch.from_numpy(mean))
            entry.scale.copy_(torch.from_numpy(1 / np.where(spread > 0, spread, 1)))
        return entry

    def _reduced(self, entry: SpaceProjection, spaces: list[np.ndarray], device: Device
                 ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the rows that heads are trained on, and the mean and the axes (D, n) of their principal components."""
        held = torch.from_numpy(np.concatenate(spaces, axis=1, dtype=np.float32)).to(device.device)
        with torch.no_grad():
            rows = entry.to(device.device)(held)
            if self.n_components is None or self.n_components >= rows.shape[1]:
                return rows, None
            mean = rows.mean(0)
            wide = (rows - mean).T @ (rows - mean)
            axes = torch.linalg.eigh(wide.double().cpu())[1][:, -self.n_components :].to(rows)
            return (rows - mean) @ axes, (mean, axes)

    def _keep(self, entry: SpaceProjection, heads: TemiHeads, basis: tuple[Tensor, Tensor] | None) -> None:
        """Set the projection and the linear head that the chosen head is."""
        first, bias = heads.first[self.head_].detach(), heads.first_bias[self.head_].detach()
        if basis is not None:
            mean, axes = basis
            first = first @ axes.T
            bias = bias - first @ mean
        projection = SpaceProjection(entry.widths, unit=self.unit, hidden=self.hidden, out_unit=True).to(first.device)
        projection.shift.copy_(entry.shift)
        projection.scale.copy_(entry.scale)
        head = ClusterHeads(self.hidden[1], self.n_clusters).to(first.device)
        for held, found in ((projection.layers[0].weight, first), (projection.layers[0].bias, bias),
                            (projection.layers[1].weight, heads.second[self.head_]),
                            (projection.layers[1].bias, heads.second_bias[self.head_]),
                            (head.weight, heads.prototypes()[self.head_][None])):
            held.data = found.detach().clone()
        self._projection, self._heads = projection.eval(), head.eval()

    def _of_heads(self, student: TemiHeads, rows: Tensor) -> np.ndarray:
        found = np.empty((self.n_heads, len(rows), self.n_clusters), np.float16)
        with torch.no_grad():
            for start in range(0, len(rows), _ROWS):
                found[:, start : start + _ROWS] = student(rows[start : start + _ROWS]).softmax(dim=2).cpu().numpy()
        return found

    def _tell(self) -> None:
        log.info("cluster: kept head %d of %d, loss %.4f", self.head_ + 1, self.n_heads, self.score_)
        n_used = len(np.unique(self.labels_))
        if n_used < self.n_clusters:
            log.info("cluster: %d of %d clusters hold an image", n_used, self.n_clusters)
        if n_used == 1 < self.n_clusters:
            told = f"TEMI put all {len(self.labels_)} images into one of {self.n_clusters} clusters"
            warnings.warn(f"{told}. hint: lower beta, train longer, or look at the embeddings",
                          CollapseWarning, stacklevel=3)
