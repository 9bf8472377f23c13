"""SCAN: clusters in which an image and its nearest neighbors agree, and which are all used.

van Gansbeke et al. 2020, "SCAN: Learning to Classify Images without Labels", section 2.2, Eq. 2.

In: images, neighbors (n, k), an encoder (B, 3, H, W) -> (B, D); or embeddings (n, D), of one encoder or several, and
their neighbors, when the encoders stay frozen. Out: ``labels_`` (n,), ``probabilities_`` (n, K), ``net_`` with the best
head.

Differs from the paper: one random neighbor a step instead of the sum over all (as the authors' code does).
Differs from the authors' code: the consistency is a logsumexp in float32, so its gradient does not vanish below a
similarity of 1e-12; heads are one matrix product; ``class_prior``, ``forwards="fused"`` and cached views are ours.
"""

import copy
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from phyla.embed import forward_all, weights_fingerprint
from phyla.errors import CollapseWarning, InputError, NonFiniteLossError
from phyla.images.augment import Views
from phyla.images.batches import Order, open_pixels
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterHeads, ClusterNet, Heads, SpaceProjection
from phyla.quality import neighbor_score
from phyla.randomness import derive_seed, generator
from phyla.spaces import Space, head_probabilities, rows_for_heads
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Step
from phyla.training.options import faults, make_optimizer, neighbor_faults
from phyla.types import ImageSet, Neighbors

log = logging.getLogger("phyla")

EPSILON = 1e-8
"""Floor of the mean probability inside the entropy's logarithm, the authors' value."""


class ScanLoss(NamedTuple):
    """The loss and its two parts, one number a head."""

    total: Tensor
    consistency: Tensor
    entropy: Tensor


def scan_loss(anchor_logits: Float[Tensor, "*heads batch clusters"],
              neighbor_logits: Float[Tensor, "*heads batch clusters"], *, entropy_weight: float,
              class_prior: Float[Tensor, " clusters"] | None = None) -> ScanLoss:
    """Return SCAN's loss of anchors and one neighbor each; leading axes are heads and give one loss each.

    Parameters
    ----------
    anchor_logits, neighbor_logits : (..., B, K); gradients flow through both
    entropy_weight : lambda of Eq. 2, 5 in every published configuration
    class_prior : expected share of each cluster (K,), summing to 1; None: uniform

    Notes
    -----
    With P, Q the softmax of both and p the mean of P over the batch (van Gansbeke et al. 2020, Eq. 2):
    L = -1/B sum_i log sum_c P_ic Q_ic  -  lambda H,   H = -sum_c p_c log p_c.
    A ``class_prior`` w puts -KL(p || w) in the place of H; for a uniform w that is H - log K.
    """
    anchor, neighbor = anchor_logits.log_softmax(-1), neighbor_logits.log_softmax(-1)
    consistency = -(anchor + neighbor).logsumexp(-1).mean(-1)
    mean = anchor.exp().mean(-2).clamp(min=EPSILON)
    entropy = -(mean * mean.log()).sum(-1)
    spread = entropy
    if class_prior is not None:
        spread = entropy + (mean * class_prior.to(mean).clamp(min=EPSILON).log()).sum(-1)
    return ScanLoss(consistency - entropy_weight * spread, consistency, entropy)


@dataclass(frozen=True)
class Watched:
    """The images on which the label-free score is taken, and the neighbors of each among them."""

    images: ImageSet
    neighbors: Neighbors


@dataclass(eq=False, repr=False)
class SCAN(ClusterMixin, BaseEstimator):
    """Cluster images by agreement with their neighbors; defaults are the published CIFAR-10 configuration.

    Parameters
    ----------
    n_clusters : K; more than the classes expected gives over-clustering
    n_heads : heads trained side by side, of which the one with the lowest ``neighbor_score`` is kept
    entropy_weight : lambda of Eq. 2
    class_prior : expected share of each cluster when the classes are uneven, summing to 1; None: uniform
    views : random views of anchors and neighbors
    update : all: encoder and heads; heads: the encoder stays frozen, in evaluation mode
    cached_views : with ``update="heads"``: embeddings of this many random views an image are made once and drawn from;
        0 makes fresh views every step, as published
    forwards : two: anchors and neighbors apart, each with its own BatchNorm statistics, as published; fused: one pass
    select : neighbor_score: head and epoch with the lowest score (in which a ``class_prior`` takes the place of
        evenness, as in the loss); last: the last epoch, best head
    n_selection_neighbors : neighbors of the score, 5 as published (the image itself counts as one more)
    optimizer, lr, weight_decay, momentum : adam (L2 decay, not decoupled) or sgd, constant learning rate
    n_epochs, batch_size : every image is an anchor once an epoch
    normalize : of embeddings: scale each row to length 1 first; those of several spaces always are, to 1/sqrt(M) each
    random_state : seed of heads, order, neighbors drawn and views
    """

    n_clusters: int = 10
    n_heads: int = 1
    entropy_weight: float = 5.0
    class_prior: tuple[float, ...] | None = None
    views: Views = Views(kind="strong", size=32)
    update: Literal["all", "heads"] = "all"
    cached_views: int = 0
    forwards: Literal["two", "fused"] = "two"
    select: Literal["neighbor_score", "last"] = "neighbor_score"
    n_selection_neighbors: int = 5
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    momentum: float = 0.9
    n_epochs: int = 50
    batch_size: int = 128
    normalize: bool = False
    random_state: int = 0

    def fit(self, images: ImageSet | Space, y: None = None, *, neighbors: Neighbors | None = None,
            encoder: nn.Module | None = None, watched: Watched | None = None, device: Device | None = None,
            folder: Path | None = None) -> "SCAN":
        """Cluster ``images`` and set ``net_``, ``labels_``, ``probabilities_``, ``history_`` and what was kept.

        That is ``head_`` (from 0), ``epoch_`` (from 1) and ``score_``, the lowest ``neighbor_score``.

        Parameters
        ----------
        images : an ImageSet, with ``encoder``; or embeddings (n, D), in one space or several, on which linear heads are
            trained
        neighbors : of every image; for embeddings they are found when missing (20, or fewer for tiny sets)
        watched : other images to take the label-free score on (a held-out split); the training images when None
        folder : keeps a checkpoint from which the same call goes on

        Raises
        ------
        InputError
            An option out of its range, more clusters than images, no encoder or neighbors for images, or neighbors of
            another set.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        device = device or choose_device("cpu")
        of_rows = None
        if not isinstance(images, ImageSet):
            images, of_rows = rows_for_heads(images, normalize=self.normalize)
        for fault in self._faults(images, encoder, watched):
            raise fault
        neighbors = self._find_neighbors(images) if neighbors is None else neighbors
        for fault in neighbor_faults((images, neighbors)):
            raise fault
        key = self._key(images, neighbors, encoder, watched) if folder else ""
        source = self._open(images, neighbors, encoder, watched, device)
        heads = ClusterHeads(source.n_features, self.n_clusters, self.n_heads)
        heads.initialise(generator(self.random_state, "scan heads"))
        net = ClusterNet(source.encoder, heads)
        device.place(net).requires_grad_(True)
        net.encoder.requires_grad_(source.trains_encoder)
        trained = net if source.trains_encoder else net.heads
        optimizer = make_optimizer(self.optimizer, trained.parameters(), device, lr=self.lr, momentum=self.momentum,
                                   weight_decay=self.weight_decay)
        order = Order(len(images), self.batch_size, self.random_state, device=device.device)
        best: dict[str, Any] = {"score": math.inf, "head": 0, "epoch": 0, "state": {}}
        prior = None if self.class_prior is None else torch.tensor(self.class_prior, device=device.device)
        forward = device.compiled(net)

        def advance(step: Step, *pair: Tensor) -> None:
            anchors, partners = (source.view(step, each) for each in pair)
            with device.autocast():
                if self.forwards == "two":
                    anchor_logits, partner_logits = forward(anchors), forward(partners)
                else:
                    anchor_logits, partner_logits = forward(torch.cat([anchors, partners])).chunk(2, dim=1)
            loss = scan_loss(step.gather(anchor_logits.float(), dim=1), step.gather(partner_logits.float(), dim=1),
                             entropy_weight=self.entropy_weight, class_prior=prior)
            step.backward(loss.total.sum(), optimizer)
            step.log(loss=loss.total.mean(), consistency=loss.consistency.mean(), entropy=loss.entropy.mean())

        run = Loop("cluster", order, n_epochs=self.n_epochs, state={"net": net, "optimizer": optimizer}, memory=best,
                   folder=folder, seed=self.random_state, key=key, device=device, pixels=source.pixels,
                   wants=source.wanted)
        for step in run:
            net.train(source.trains_encoder)
            step.run(advance, *source.pair(step))
            if step.ends_epoch:
                scores = self._scores(source.watched_probabilities(net), source.watched_neighbors)
                head = int(np.argmin(scores))
                if not math.isfinite(scores[head]):
                    raise NonFiniteLossError(f"cluster: the weights are not finite after step {step.index}",
                                             "lower the learning rate (--set cluster.lr=...)")
                step.record(neighbor_score=scores[head], head=head)
                if scores[head] < best["score"] or self.select == "last":
                    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
                    best.update(score=scores[head], head=head, epoch=step.epoch + 1, state=state)

        net.load_state_dict(best["state"])
        self.head_, self.epoch_, self.score_ = best["head"], best["epoch"], best["score"]
        self.history_ = run.history
        kept = net.only(self.head_)  # before all images are predicted: with ten heads ImageNet's would not fit
        self.probabilities_ = source.probabilities(kept)[:, 0].float().cpu().numpy()
        self.labels_ = self.probabilities_.argmax(axis=1)
        self.net_ = source.whole(kept).eval()
        self._projection = of_rows
        if of_rows is not None:
            self.n_features_in_ = of_rows.n_features
        self._tell()
        return self

    def predict_proba(self, images: ImageSet | Space) -> np.ndarray:
        """Return the probabilities of new images (or embeddings, if fitted on them), float32 (n_images, K)."""
        check_is_fitted(self)
        heads, encoder = self.net_.heads, self.net_.encoder
        if isinstance(images, ImageSet):
            if isinstance(encoder, nn.Identity):
                raise InputError("this SCAN was fitted on embeddings and has no encoder", "embed the images first")
            found = forward_all(images, self.net_, self.net_.probabilities, self.views.plain())
            return found[:, 0].float().cpu().numpy()
        return head_probabilities(images, self._projection, heads)

    def predict(self, images: ImageSet | Space) -> np.ndarray:
        """Return the cluster of new images, int64 (n_images,)."""
        return self.predict_proba(images).argmax(axis=1)

    def as_parts(self) -> tuple[SpaceProjection, Heads]:
        """Return what maps the spaces of a fit on embeddings, beside one another, to the same probabilities.

        Raises
        ------
        InputError
            The fit was on images: ``net_`` is all of it.
        """
        check_is_fitted(self)
        if self._projection is None:
            raise InputError("this SCAN was fitted on images and has no parts", "net_ is the network")
        return copy.deepcopy(self._projection), copy.deepcopy(self.net_.heads)

    def _find_neighbors(self, images: ImageSet | np.ndarray) -> Neighbors:
        if isinstance(images, ImageSet):
            raise InputError("SCAN on images needs their neighbors", "phyla.neighbors.find_neighbors(embeddings, 20)")
        return find_neighbors(images, min(20, len(images) - 1))

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_clusters": 1, "n_heads": 1, "n_selection_neighbors": 1, "cached_views": 0,
                                       "batch_size": 2})
        if self.cached_views and self.update == "all":
            yield InputError("cached_views needs a frozen encoder", "set update=heads, or cached_views=0")
        prior = self.class_prior
        if prior is not None and not (len(prior) == self.n_clusters and min(prior) >= 0
                                      and abs(sum(prior) - 1) < 1e-3):
            yield InputError(f"class_prior needs {self.n_clusters} shares of 0 to 1 that sum to 1, got {prior}")

    def _faults(self, images: ImageSet | np.ndarray, encoder: nn.Module | None,
                watched: Watched | None) -> Iterator[InputError]:
        yield from self.option_faults()
        if len(images) < max(2, self.n_clusters):
            yield InputError(f"n_clusters={self.n_clusters} needs at least {max(2, self.n_clusters)} images, "
                             f"got {len(images)}", "lower n_clusters or add images")
        if isinstance(images, ImageSet) and encoder is None:
            yield InputError("SCAN on images needs an encoder", "fit SimCLR first and pass encoder=simclr.encoder_")
        if not isinstance(images, ImageSet) and (encoder is not None or watched is not None):
            yield InputError("embeddings come without an encoder and watched images", "pass the images instead")
        if watched is not None:
            yield from neighbor_faults((watched.images, watched.neighbors))

    def _key(self, images: ImageSet | np.ndarray, neighbors: Neighbors, encoder: nn.Module | None,
             watched: Watched | None) -> str:
        content = images.fingerprint if isinstance(images, ImageSet) else images
        start = None if encoder is None else weights_fingerprint(encoder)
        judges = None if watched is None else [watched.images.fingerprint, watched.neighbors.fingerprint]
        return fingerprint(asdict(self), content, neighbors.fingerprint, start, judges)

    def _tell(self) -> None:
        log.info("cluster: kept epoch %d of %d, head %d of %d, neighbor score %.4f", self.epoch_, self.n_epochs,
                 self.head_ + 1, self.n_heads, self.score_)
        n_used = len(np.unique(self.labels_))
        if n_used < self.n_clusters:
            log.info("cluster: %d of %d clusters hold an image", n_used, self.n_clusters)
        if n_used == 1 < self.n_clusters:
            told = f"SCAN put all {len(self.labels_)} images into one of {self.n_clusters} clusters"
            warnings.warn(f"{told}. hint: raise entropy_weight, train longer, or look at the embeddings",
                          CollapseWarning, stacklevel=3)

    def _open(self, images: ImageSet | np.ndarray, neighbors: Neighbors, encoder: nn.Module | None,
              watched: Watched | None, device: Device) -> "_FromImages | _FromEmbeddings":
        if not isinstance(images, ImageSet) or encoder is None:
            plain = torch.from_numpy(images).to(device.device)
            return _FromEmbeddings(plain, plain[None], neighbors, nn.Identity(), None, None)
        encoder = copy.deepcopy(encoder)
        if not self.cached_views:
            return _FromImages(images, neighbors, encoder, watched, self, device)

        def embedded(shown: ImageSet, views: Views, seed: int = 0) -> Tensor:
            return forward_all(shown, encoder, encoder, views, device=device, seed=seed, title="embed views").float()

        seeds = [derive_seed(self.random_state, "cached views", view) for view in range(self.cached_views)]
        drawn = torch.stack([embedded(images, self.views, seed) for seed in seeds])
        held_out = embedded(watched.images, self.views.plain()) if watched else None
        return _FromEmbeddings(embedded(images, self.views.plain()), drawn, neighbors, encoder, watched, held_out)

    def _scores(self, probabilities: Tensor, neighbors: Neighbors) -> list[float]:
        near = torch.from_numpy(neighbors.indices[:, : self.n_selection_neighbors]).to(probabilities.device)
        scores = [neighbor_score(probabilities[:, head], near) for head in range(self.n_heads)]
        if self.class_prior is None:
            return scores
        # As in the loss, -KL(p || prior) for H: the plain score would choose an epoch before the prior takes hold.
        weight = torch.tensor(self.class_prior).clamp(min=EPSILON).log()
        means = probabilities.float().mean(dim=0).cpu()
        return [score - float(mean @ weight) for score, mean in zip(scores, means, strict=True)]


class _Pairs:
    """Draws one neighbor of each anchor: the anchor itself is one of the k + 1 candidates, as published."""

    def __init__(self, neighbors: Neighbors, device: torch.device) -> None:
        own = np.arange(len(neighbors))[:, None]
        self.table = torch.from_numpy(np.concatenate([own, neighbors.indices], axis=1)).to(device)

    def draw(self, step: Step) -> Tensor:
        """Return a neighbor of each of the step's rows; the numbers are drawn for the whole batch."""
        source = step.generator
        column = torch.randint(self.table.shape[1], step.indices.shape, generator=source, device=source.device)
        return self.table[step.rows, column[step.part].to(step.rows.device, non_blocking=True)]


class _FromImages:
    """Fresh views of pixels every step; the encoder runs in the loop."""

    def __init__(self, images: ImageSet, neighbors: Neighbors, encoder: nn.Module, watched: Watched | None,
                 options: SCAN, device: Device) -> None:
        self.images, self.encoder, self.device, self.views = images, encoder, device, options.views
        self.watched = watched or Watched(images, neighbors)
        self.trains_encoder = options.update == "all"
        self.pixels, self.pairs = open_pixels(images, device.device), _Pairs(neighbors, device.device)
        with torch.no_grad():
            self.n_features = encoder.cpu().eval()(torch.zeros(1, 3, options.views.size, options.views.size)).shape[1]

    @property
    def watched_neighbors(self) -> Neighbors:
        return self.watched.neighbors

    def wanted(self, step: Step) -> Tensor:
        """Return the anchors, then one neighbor of each."""
        return torch.cat([step.rows, self.pairs.draw(step)])

    def pair(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the pixels of the anchors and of their neighbors."""
        anchors, partners = self.pixels.take(self.wanted(step)).chunk(2)
        return anchors, partners

    def view(self, step: Step, pixels: Tensor) -> Tensor:
        """Return what the network is shown."""
        return step.view(self.views, pixels)

    def watched_probabilities(self, net: ClusterNet) -> Tensor:
        return forward_all(self.watched.images, net, net.probabilities, self.views.plain(), device=self.device)

    def probabilities(self, net: ClusterNet) -> Tensor:
        return forward_all(self.images, net, net.probabilities, self.views.plain(), device=self.device)

    def whole(self, net: ClusterNet) -> ClusterNet:
        return net


class _FromEmbeddings:
    """Embeddings made once: ``drawn`` (R, n, D) for training, ``plain`` (n, D) for prediction."""

    trains_encoder = False
    pixels, wanted = None, None

    def __init__(self, plain: Tensor, drawn: Tensor, neighbors: Neighbors, frozen: nn.Module,
                 watched: Watched | None, watched_plain: Tensor | None) -> None:
        self.plain, self.drawn, self.frozen = plain, drawn, frozen
        self.watched_neighbors = watched.neighbors if watched else neighbors
        self.watched_plain = plain if watched_plain is None else watched_plain
        self.encoder, self.n_features = nn.Identity(), plain.shape[1]
        self.pairs = _Pairs(neighbors, plain.device)

    def pair(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return embeddings of one view of the anchors, and of one neighbor each."""
        partners = self.pairs.draw(step)
        return self._drawn(step, step.rows), self._drawn(step, partners)

    def view(self, step: Step, embeddings: Tensor) -> Tensor:
        """Return what the network is shown."""
        return embeddings

    def _drawn(self, step: Step, rows: Tensor) -> Tensor:
        source = step.generator
        view = torch.randint(len(self.drawn), step.indices.shape, generator=source, device=source.device)
        return self.drawn[view[step.part].to(rows.device, non_blocking=True), rows]

    def watched_probabilities(self, net: ClusterNet) -> Tensor:
        with torch.no_grad():
            return net.heads.probabilities(self.watched_plain)

    def probabilities(self, net: ClusterNet) -> Tensor:
        with torch.no_grad():
            return net.heads.probabilities(self.plain)

    def whole(self, net: ClusterNet) -> ClusterNet:
        return ClusterNet(self.frozen, net.heads)
