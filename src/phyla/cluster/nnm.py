"""NNM: clusters in which an image agrees with its neighbor, with the nearest of its batch and with the nearest of all.

Dang et al. 2021, "Nearest Neighbor Matching for Deep Clustering" (CVPR 2021).

In: images, their neighbors (n, k), an encoder (B, 3, H, W) -> (B, D); or embeddings (n, D), of one encoder or several,
and their neighbors: then linear heads are trained and an image has one view. Out: ``labels_`` (n,), ``probabilities_``
(n, K), ``net_`` with the best head.

Differs from the authors' code: the targets of the match over all images belong to the images they are for (theirs,
``global_targets="visit_order"``, to others); head and epoch are chosen without labels, not by the highest accuracy;
logarithms and lengths are taken in log space, so no gradient vanishes. The equations are those of the released code.
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
from jaxtyping import Float, Int
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
from phyla.training.agreement import by_first
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Step
from phyla.training.options import faults, make_optimizer, neighbor_faults
from phyla.types import ImageSet, Neighbors

log = logging.getLogger("phyla")

EPSILON = 1e-8
"""Floor of the mean probability inside the entropy's logarithm, the authors' value."""

_ROWS = 1 << 16  # rows of probabilities summed at once


class NnmLoss(NamedTuple):
    """The loss and its four parts, one number a head."""

    total: Tensor
    consistency: Tensor
    class_contrast: Tensor
    global_match: Tensor
    entropy: Tensor


def nnm_loss(anchor: Float[Tensor, "*heads batch clusters"], augmented: Float[Tensor, "*heads batch clusters"],
             neighbor: Float[Tensor, "*heads batch clusters"], batch_match: Int[Tensor, " batch"],
             global_targets: Float[Tensor, "*heads batch clusters"] | None, *, entropy_weight: float,
             global_weight: float = 1.0) -> NnmLoss:
    """Return NNM's loss of one batch; leading axes are heads and give one loss each.

    Parameters
    ----------
    anchor, augmented, neighbor : logits (..., B, K) of two views of each image and of one neighbor; all get a gradient
    batch_match : for each row another row of the batch, see ``batch_match``
    global_targets : probabilities (..., B, K) of each image's nearest other image, without gradient; None: no such term
    entropy_weight : of the entropy, 5 in every published configuration
    global_weight : of the term with ``global_targets``, 1 as published

    Notes
    -----
    With P, P', Q the softmax of the three, R the rows ``batch_match`` of P, G the targets, anchors A = [P; P'],
    positives B = [Q; R] (2B rows each), Z = [A; B] and G four times over:
    L = m(A, B) + c(A, B) + w (m(Z, G) + c(Z, G)) - lambda H(mean of A), m the mean of -log(row · row), c
    ``class_contrast``. Equal to the released code except where that cuts: log(p · q) at -100, lengths at 1e-12.
    """
    first, second, partner = (logits.log_softmax(-1) for logits in (anchor, augmented, neighbor))
    anchors = torch.cat([first, second], dim=-2)
    positives = torch.cat([partner, first[..., batch_match, :]], dim=-2)
    consistency, contrast = _disagreement(anchors, positives), class_contrast(anchors, positives)
    matched = torch.zeros_like(consistency)
    if global_targets is not None:
        smallest = torch.finfo(global_targets.dtype).tiny  # a softmax may have come out as 0
        targets = global_targets.detach().clamp(min=smallest).log().to(first.dtype)
        every, four = torch.cat([anchors, positives], dim=-2), torch.cat([targets] * 4, dim=-2)
        matched = _disagreement(every, four) + class_contrast(every, four)
    mean = anchors.exp().mean(-2).clamp(min=EPSILON)
    entropy = -(mean * mean.log()).sum(-1)
    total = consistency + contrast + global_weight * matched - entropy_weight * entropy
    return NnmLoss(total, consistency, contrast, matched, entropy)


def class_contrast(anchors: Float[Tensor, "*heads rows clusters"], positives: Float[Tensor, "*heads rows clusters"]
                   ) -> Float[Tensor, "*heads"]:
    """Return the cross-entropy of telling which column of ``positives`` is the same cluster as one of ``anchors``.

    Both are log-probabilities (..., rows, K). With all columns scaled to length 1 and S the K x K table of their
    products, it is the mean over c of -log(exp S_cc / sum_k exp S_ck): from log(1 + (K - 1) / e), for even one-hot rows
    that agree, to about log K, for rows that have nothing to do with each other.
    """
    products = _unit_columns(anchors).transpose(-1, -2) @ _unit_columns(positives)
    return -products.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)


def _unit_columns(rows: Float[Tensor, "*heads rows clusters"]) -> Float[Tensor, "*heads rows clusters"]:
    return (rows - (2 * rows).logsumexp(-2, keepdim=True) / 2).exp()


def _disagreement(first: Float[Tensor, "*heads rows clusters"], second: Float[Tensor, "*heads rows clusters"]
                  ) -> Float[Tensor, "*heads"]:
    return -(first + second).logsumexp(-1).mean(-1)


def batch_match(features: Float[Tensor, "batch features"]) -> Int[Tensor, " batch"]:
    """Return for each row the nearest other row of the batch by Euclidean distance; the lowest index among equals.

    Equal are squared distances that differ by less than 1e-10 of the largest squared length, centered.

    Raises
    ------
    InputError
        There is one row only.
    """
    if len(features) < 2:
        raise InputError("a batch of one image has no other to match", "use batch_size of at least 2")
    rows = (features.cpu() if features.device.type == "mps" else features).detach().double()  # mps has no doubles
    rows = rows - rows.mean(dim=0)
    squares = rows.square().sum(dim=1)
    apart = torch.addmm(squares + squares[:, None], rows, rows.T, alpha=-2)
    steps = apart.mul_(1e10 / squares.max().clamp(min=torch.finfo(torch.float64).tiny)).round_()
    return steps.fill_diagonal_(torch.inf).argmin(dim=1).to(features.device)


def global_matches(features: Float[Tensor, "images features"], probabilities: Float[Tensor, "images heads clusters"], *,
                   visited: Int[Tensor, " images"] | None = None, nearest: Int[Tensor, " images"] | None = None
                   ) -> Float[Tensor, "heads images clusters"]:
    """Return for each image what every head says of its nearest other image by Euclidean distance.

    Parameters
    ----------
    features : of all images, in the order of their index, and so are ``probabilities``
    visited : a permutation. Row i is then that of image ``visited[i]``, which is what the released code reads: it
        writes rows in the order of a shuffled pass and reads them by the index of the image
    nearest : of each image its nearest other; None: found
    """
    near = _nearest(features) if nearest is None else nearest
    table = probabilities[near.to(probabilities.device)].transpose(0, 1)
    return (table if visited is None else table[:, visited.to(table.device)]).contiguous()


def _nearest(features: Float[Tensor, "images features"]) -> Int[Tensor, " images"]:
    held = features.float().cpu().numpy()
    near = find_neighbors(held, 1, device=features.device, normalize=False, metric="euclidean", title="")
    return torch.from_numpy(near.indices[:, 0])


def selection_score(probabilities: Float[Tensor, "images clusters"], neighbors: Int[Tensor, "images near"]) -> float:
    """Return the label-free score by which NNM chooses head and epoch: lower is better.

    ``quality.neighbor_score`` (to the neighbors and the image itself, less the entropy of the mean, all of weight 1)
    plus ``class_contrast`` of the probabilities with themselves. No table of n x n: rows are gathered, columns summed.
    """
    p = (probabilities.cpu() if probabilities.device.type == "mps" else probabilities).detach()
    products = torch.zeros(p.shape[1], p.shape[1], dtype=torch.float64, device=p.device)
    for start in range(0, len(p), _ROWS):
        part = p[start : start + _ROWS].double()
        products += part.T @ part
    length = products.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    contrast = -(products / length / length[:, None]).log_softmax(1).diagonal().mean()
    return neighbor_score(p, neighbors.to(p.device)) + float(contrast)


@dataclass(eq=False, repr=False)
class NNM(ClusterMixin, BaseEstimator):
    """Cluster images by agreement with neighbors, batch and whole; defaults are the published CIFAR-10 configuration.

    Parameters
    ----------
    n_clusters : K; more than the classes expected gives over-clustering
    n_heads : heads trained side by side, of which the one with the lowest ``selection_score`` is kept
    entropy_weight : lambda
    global_targets : aligned: each image is matched with the nearest of all images; visit_order: with the nearest of
        some other image, as the released code does; off: no such term
    global_view : what the table of all images is made from: augmented (random views, as published) or clean
    global_weight : of that term, 0 or more; 0 is off
    views : random views of anchors and neighbors
    update : all: encoder and heads; heads: the encoder stays frozen, in evaluation mode
    forwards : two: each view of a step by itself, with its own BatchNorm statistics, as published; fused: one pass
    select : label_free: head and epoch with the lowest ``selection_score``; last: the last epoch, best head
    n_selection_neighbors : neighbors of the score, 5 as published (the image itself counts as one more)
    optimizer, lr, weight_decay, momentum : adam (L2 decay, not decoupled) or sgd, constant learning rate
    n_epochs, batch_size : every image is an anchor once an epoch
    drop_last : leave the short last batch of an epoch out; kept as published, unless it is a single image, which has no
        other to match
    normalize : of embeddings: scale each row to length 1 first; those of several spaces always are, to 1/sqrt(M) each
    random_state : seed of heads, order, neighbors drawn and views
    """

    n_clusters: int = 10
    n_heads: int = 3
    entropy_weight: float = 5.0
    global_targets: Literal["aligned", "visit_order", "off"] = "aligned"
    global_view: Literal["augmented", "clean"] = "augmented"
    global_weight: float = 1.0
    views: Views = Views(kind="strong", size=32)
    update: Literal["all", "heads"] = "all"
    forwards: Literal["two", "fused"] = "two"
    select: Literal["label_free", "last"] = "label_free"
    n_selection_neighbors: int = 5
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    momentum: float = 0.9
    n_epochs: int = 100
    batch_size: int = 200
    drop_last: bool = False
    normalize: bool = False
    random_state: int = 0

    def fit(self, images: ImageSet | Space, y: None = None, *, neighbors: Neighbors | None = None,
            encoder: nn.Module | None = None, device: Device | None = None,
            watched: tuple[ImageSet, Neighbors] | None = None, folder: Path | None = None) -> "NNM":
        """Cluster ``images`` and set ``net_``, ``labels_``, ``probabilities_``, ``history_`` and what was kept.

        That is ``head_`` (from 0), ``epoch_`` (from 1) and ``score_``, the lowest ``selection_score``. And
        ``epoch_labels_``, int16 or int32 (n_epochs, n_watched): the labels of the watched images by the head that
        scored lowest after each epoch. Nothing is chosen by them here.

        Parameters
        ----------
        images : an ImageSet, with ``encoder``, to start from; or embeddings (n, D), in one space or several
        neighbors : of every image; for embeddings they are found when missing (20, or fewer for tiny sets)
        watched : a held-out split and its neighbors, on which the label-free score is taken; None: ``images``
        folder : keeps a checkpoint from which the same call goes on

        Raises
        ------
        InputError
            An option out of its range, fewer images than clusters, no encoder or neighbors, or those of another set.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        device = device or choose_device("cpu")
        of_rows = None
        if not isinstance(images, ImageSet):
            images, of_rows = rows_for_heads(images, normalize=self.normalize)
        for fault in self._faults(images, neighbors, encoder, watched):
            raise fault
        source, neighbors = self._open(images, neighbors, encoder, watched, device)
        key = self._key(images, neighbors, encoder, watched) if folder else ""
        heads = ClusterHeads(source.n_features, self.n_clusters, self.n_heads)
        heads.initialise(generator(self.random_state, "nnm heads"))
        net = ClusterNet(source.encoder, heads)
        device.place(net).requires_grad_(True)
        net.encoder.requires_grad_(source.trains_encoder)
        trained = net if source.trains_encoder else net.heads
        optimizer = make_optimizer(self.optimizer, trained.parameters(), device, lr=self.lr, momentum=self.momentum,
                                   weight_decay=self.weight_decay)
        order = self._order(len(images), device)
        kind = torch.int16 if self.n_clusters <= torch.iinfo(torch.int16).max else torch.int32
        held: dict[str, Any] = {"score": math.inf, "head": 0, "epoch": 0, "state": {}, "targets": None,
                                "labels": torch.zeros(self.n_epochs, source.n_watched, dtype=kind)}
        embed = device.compiled(net.embed)

        def advance(step: Step, batch: Tensor, partners: Tensor, targets: Tensor | None) -> None:
            views = [source.view(step, each) for each in (batch, batch, partners)]
            with device.autocast():
                if self.forwards == "two":
                    features = [embed(each) for each in views]
                else:
                    features = list(embed(torch.cat(views)).chunk(3))
                logits = [net.heads(each) for each in features]
            anchor, augmented, partner = (step.gather(each.float(), dim=1) for each in logits)
            loss = nnm_loss(anchor, augmented, partner, batch_match(step.gather(features[0])), targets,
                            entropy_weight=self.entropy_weight, global_weight=self.global_weight)
            step.backward(loss.total.sum(), optimizer)
            step.log(loss=loss.total.mean(), consistency=loss.consistency.mean(), entropy=loss.entropy.mean(),
                     class_contrast=loss.class_contrast.mean(), global_match=loss.global_match.mean())

        run = Loop("cluster", order, n_epochs=self.n_epochs, state={"net": net, "optimizer": optimizer}, memory=held,
                   folder=folder, seed=self.random_state, key=key, device=device, pixels=source.pixels,
                   wants=source.wanted)
        for step in run:
            net.train(source.trains_encoder)
            step.run(advance, *source.pair(step), source.targets(held, step.indices))
            if step.ends_epoch:
                p = source.watched_probabilities(net)
                scores = self._scores(p, source.watched_neighbors)
                head = int(np.argmin(scores))
                if not math.isfinite(scores[head]):
                    raise NonFiniteLossError(f"cluster: the weights are not finite after step {step.index}",
                                             "lower the learning rate (--set cluster.lr=...)")
                step.record(score=scores[head], head=head)
                if self._matches_all and step.epoch + 1 < self.n_epochs:
                    held["targets"] = source.match_all(net, step.epoch)
                held["labels"][step.epoch] = p[:, head].argmax(dim=1).to(kind).cpu()
                if scores[head] < held["score"] or self.select == "last":
                    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
                    held.update(score=scores[head], head=head, epoch=step.epoch + 1, state=state)

        net.load_state_dict(held["state"])
        self.head_, self.epoch_, self.score_ = held["head"], held["epoch"], held["score"]
        self.history_, self.epoch_labels_ = run.history, held["labels"].numpy()
        self.net_ = net.only(self.head_).eval()
        self.probabilities_ = source.probabilities(self.net_)[:, 0].float().cpu().numpy()
        self.labels_ = self.probabilities_.argmax(axis=1)
        self._projection = of_rows
        if of_rows is not None:
            self.n_features_in_ = of_rows.n_features
        self._tell()
        return self

    def predict_proba(self, images: ImageSet | Space) -> np.ndarray:
        """Return the probabilities of new images, or of embeddings if fitted on them, float32 (n_images, K)."""
        check_is_fitted(self)
        if not isinstance(images, ImageSet):
            return head_probabilities(images, self._projection, self.net_.heads)
        if isinstance(self.net_.encoder, nn.Identity):
            raise InputError("this NNM was fitted on embeddings and has no encoder", "embed the images first")
        found = forward_all(images, self.net_, self.net_.probabilities, self.views.plain())
        return found[:, 0].float().cpu().numpy()

    def predict(self, images: ImageSet | Space) -> np.ndarray:
        """Return the cluster of new images, int64 (n_images,)."""
        return self.predict_proba(images).argmax(axis=1)

    def as_parts(self) -> tuple[SpaceProjection, Heads]:
        """Return what maps the spaces of a fit on embeddings, beside one another, to the same probabilities."""
        check_is_fitted(self)
        if self._projection is None:
            raise InputError("this NNM was fitted on images and has no parts", "net_ is the network")
        return copy.deepcopy(self._projection), copy.deepcopy(self.net_.heads)

    def _open(self, images: ImageSet | np.ndarray, neighbors: Neighbors | None, encoder: nn.Module | None,
              watched: tuple[ImageSet, Neighbors] | None, device: Device
              ) -> tuple["_FromImages | _FromEmbeddings", Neighbors]:
        if not isinstance(images, ImageSet):
            near = find_neighbors(images, min(20, len(images) - 1)) if neighbors is None else neighbors
            return _FromEmbeddings(torch.from_numpy(images).to(device.device), near, self, device), near
        if encoder is None:
            raise InputError("NNM needs an encoder", "fit SimCLR first and pass encoder=simclr.encoder_")
        if neighbors is None:
            raise InputError("NNM needs the neighbors of the images", "phyla.neighbors.find_neighbors(embeddings, 20)")
        return _FromImages(images, neighbors, copy.deepcopy(encoder), watched, self, device), neighbors

    @property
    def _matches_all(self) -> bool:
        return self.global_targets != "off" and self.global_weight > 0

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_clusters": 1, "n_heads": 1, "n_selection_neighbors": 1, "batch_size": 2,
                                       "global_weight": 0})

    def _faults(self, images: ImageSet | np.ndarray, neighbors: Neighbors | None, encoder: nn.Module | None,
                watched: tuple[ImageSet, Neighbors] | None) -> Iterator[InputError]:
        yield from self.option_faults()
        if len(images) < max(2, self.n_clusters):
            yield InputError(f"n_clusters={self.n_clusters} needs at least {max(2, self.n_clusters)} images, "
                             f"got {len(images)}", "lower n_clusters or add images")
        yield from neighbor_faults((images, neighbors), watched)
        if isinstance(images, np.ndarray) and (encoder is not None or watched is not None):
            yield InputError("embeddings come without an encoder and watched images", "pass the images instead")

    def _key(self, images: ImageSet | np.ndarray, neighbors: Neighbors, encoder: nn.Module | None,
             watched: tuple[ImageSet, Neighbors] | None) -> str:
        judges = None if watched is None else [part.fingerprint for part in watched]
        start = None if encoder is None else weights_fingerprint(encoder)
        content = images.fingerprint if isinstance(images, ImageSet) else images
        return fingerprint(asdict(self), content, neighbors.fingerprint, start, judges)

    def _order(self, n_images: int, device: Device) -> Order:
        alone = n_images % min(self.batch_size, n_images) == 1
        return Order(n_images, self.batch_size, self.random_state, drop_last=self.drop_last or alone,
                     device=device.device)

    def _scores(self, probabilities: Tensor, neighbors: Neighbors) -> list[float]:
        near = torch.from_numpy(neighbors.indices[:, : self.n_selection_neighbors])
        return [selection_score(probabilities[:, head], near) for head in range(self.n_heads)]

    def _tell(self) -> None:
        log.info("cluster: kept epoch %d of %d, head %d of %d, score %.4f", self.epoch_, self.n_epochs, self.head_ + 1,
                 self.n_heads, self.score_)
        if (n_used := len(np.unique(self.labels_))) < self.n_clusters:
            log.info("cluster: %d of %d clusters hold an image", n_used, self.n_clusters)
        if n_used == 1 < self.n_clusters:
            told = f"NNM put all {len(self.labels_)} images into one of {self.n_clusters} clusters"
            warnings.warn(f"{told}. hint: raise entropy_weight, train longer, or look at the embeddings",
                          CollapseWarning, stacklevel=3)


class _Pairs:
    """Draws one neighbor of each anchor, and reads the table of targets."""

    def __init__(self, neighbors: Neighbors, options: NNM, device: Device) -> None:
        self.options, self.device = options, device
        own = np.arange(len(neighbors))[:, None]  # the image itself is one of the k + 1 candidates, as published
        self.table = torch.from_numpy(np.concatenate([own, neighbors.indices], axis=1)).to(device.device)

    def wanted(self, step: Step) -> Int[Tensor, " images"]:
        """Return the anchors, then one neighbor of each; the numbers are drawn for the whole batch."""
        source = step.generator
        column = torch.randint(self.table.shape[1], step.indices.shape, generator=source, device=source.device)
        partners = self.table[step.rows, column[step.part].to(step.rows.device, non_blocking=True)]
        return torch.cat([step.rows, partners])

    def targets(self, held: dict[str, Any], indices: Tensor) -> Tensor | None:
        """Return the targets of a batch, (n_heads, B, K); None before there are any."""
        if held["targets"] is None:
            return None
        held["targets"] = held["targets"].to(self.device.device)  # a checkpoint is read to the CPU
        return held["targets"][:, indices]

    def visited(self, n_images: int, epoch: int) -> Tensor | None:
        """Return the order in which the released code would have written the table; None: rows are aligned."""
        source = generator(self.options.random_state, "visit order", epoch)
        return torch.randperm(n_images, generator=source) if self.options.global_targets == "visit_order" else None


class _FromImages(_Pairs):
    """Views of a step, the table of all images, and probabilities: everything that needs pixels."""

    def __init__(self, images: ImageSet, neighbors: Neighbors, encoder: nn.Module,
                 watched: tuple[ImageSet, Neighbors] | None, options: NNM, device: Device) -> None:
        super().__init__(neighbors, options, device)
        self.images, self.encoder = images, encoder
        self.watched_images, self.watched_neighbors = watched or (images, neighbors)
        self.n_watched = len(self.watched_images)
        self.trains_encoder = options.update == "all"
        self.pixels = open_pixels(images, device.device)
        with torch.no_grad():
            side = options.views.size
            self.n_features = encoder.cpu().eval()(torch.zeros(1, 3, side, side)).shape[1]

    def pair(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the pixels of the anchors and of their neighbors."""
        anchors, partners = self.pixels.take(self.wanted(step)).chunk(2)
        return anchors, partners

    def view(self, step: Step, pixels: Tensor) -> Tensor:
        """Return what the network is shown."""
        return step.view(self.options.views, pixels)

    def match_all(self, net: ClusterNet, epoch: int) -> Tensor:
        """Return the table of targets after ``epoch``, (n_heads, n_images, K): one search, for all processes."""
        options = self.options
        views = options.views if options.global_view == "augmented" else options.views.plain()
        seed = derive_seed(options.random_state, "all images", epoch)
        features = forward_all(self.images, net, net.embed, views, device=self.device, seed=seed).float()
        with torch.no_grad():
            probabilities = net.heads.probabilities(features)
        visited = self.visited(len(features), epoch)
        return by_first(self.device.group, lambda: global_matches(features, probabilities, visited=visited))

    def watched_probabilities(self, net: ClusterNet) -> Tensor:
        return forward_all(self.watched_images, net, net.probabilities, self.options.views.plain(), device=self.device)

    def probabilities(self, net: ClusterNet) -> Tensor:
        return forward_all(self.images, net, net.probabilities, self.options.views.plain(), device=self.device)


class _FromEmbeddings(_Pairs):
    """Embeddings made once: a view of an image is its embedding, and its nearest other image stays the same."""

    trains_encoder, pixels = False, None
    nearest: Tensor | None

    def __init__(self, rows: Tensor, neighbors: Neighbors, options: NNM, device: Device) -> None:
        super().__init__(neighbors, options, device)
        self.rows, self.watched_neighbors, self.n_watched, self.n_features = rows, neighbors, *rows.shape
        self.encoder, self.nearest = nn.Identity(), None

    def pair(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the anchors and of their neighbors."""
        anchors, partners = self.rows[self.wanted(step)].chunk(2)
        return anchors, partners

    def view(self, step: Step, embeddings: Tensor) -> Tensor:
        return embeddings

    def match_all(self, net: ClusterNet, epoch: int) -> Tensor:
        """Return the same table."""
        if self.nearest is None:
            self.nearest = by_first(self.device.group, lambda: _nearest(self.rows))
        return global_matches(self.rows, self.probabilities(net), visited=self.visited(len(self.rows), epoch),
                              nearest=self.nearest)

    def probabilities(self, net: ClusterNet) -> Tensor:
        with torch.no_grad():
            return net.heads.probabilities(self.rows)

    watched_probabilities = probabilities
