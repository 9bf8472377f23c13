"""TSUC: clusters that two views of an image agree on, read off an embedding by fixed random heads.

Han et al. 2020, "Mitigating Embedding and Class Assignment Mismatch in Unsupervised Image Classification" (EmbedUL),
Eqs. 9 to 13: the second of its two stages. The first is Super-AND; any other encoder does as well.

In: images, an encoder (B, 3, H, W) -> (B, D) and perhaps its projection. Out: ``labels_`` (n,), ``probabilities_``
(n, K), ``net_`` with the chosen head, ``head_labels_`` (n_heads, n) of all heads.

Differs from the paper, as the authors' code does: a head's weights have length 1 along the clusters, not the features
(``norm="class_columns"`` is the paper's); the joint distribution is symmetrised; losses are means, not sums.
Differs from the authors' code: the head with the lowest loss is chosen, as the paper says and the code leaves out;
heads are buffers; 1 - p is exact where p is nearly 1; it runs on a current PyTorch.
"""

import copy
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from phyla.embed import forward_all, weights_fingerprint
from phyla.errors import CollapseWarning, InputError
from phyla.images.augment import Views
from phyla.images.batches import Order, open_pixels
from phyla.nets.heads import ClusterNet, Norm, NormalizedHeads, Projection, normalized
from phyla.nets.resnet import initialise
from phyla.quality import effective_clusters, used_clusters
from phyla.randomness import derive_seed, generator
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Step
from phyla.training.options import faults, make_optimizer
from phyla.training.schedule import learning_rate
from phyla.types import ImageSet

log = logging.getLogger("phyla")

EPSILON = 2.2e-16
"""Floor of joint and marginal probabilities inside the logarithms, the authors' value."""


# ── the equations ───────────────────────────────────────────────────────────────────────────────────────────────────


def head_probabilities(embeddings: Float[Tensor, "batch features"], weight: Float[Tensor, "features clusters"], *,
                       temperature: float, norm: Norm) -> Float[Tensor, "batch clusters"]:
    """Return the assignment by one head: softmax(v W' / t), W' the normalised weights.

    Parameters
    ----------
    embeddings : unit rows v (B, D)
    weight : raw prototypes W (D, K), one a column
    temperature : t > 0
    norm : feature_rows: the K weights of each feature have length 1 together, so a prototype has about sqrt(D / K) and
        the temperature is that much lower (0.028 for 0.1, D = 128, K = 10); this is the authors' code and their
        published run. class_columns: every prototype has length 1 (Han et al. 2020, Eq. 13)
    """
    return (embeddings @ normalized(weight, norm) / temperature).softmax(1)


def assignment_loss(first: Float[Tensor, "*heads batch clusters"], second: Float[Tensor, "*heads batch clusters"]
                    ) -> Float[Tensor, "*heads"]:
    """Return minus the mutual information, in nats, of the clusters of two views; leading axes are heads.

    Parameters
    ----------
    first, second : probabilities (..., B, K); row i of both shows image i; gradients flow through both

    Notes
    -----
    P = first' second, made symmetric and of sum 1; L = -sum_cd P_cd (log P_cd - log P_c. - log P_.d), all three kept
    above ``EPSILON`` (Ji et al. 2019, IIC; Han et al. 2020, Eq. 9). It lies between -log K, for even clusters on which
    both views agree, and 0.
    """
    joint = first.transpose(-1, -2) @ second
    joint = (joint + joint.transpose(-1, -2)) / 2
    joint = joint / joint.sum((-1, -2), keepdim=True)
    rows, columns = joint.sum(-1, keepdim=True), joint.sum(-2, keepdim=True)
    joint, rows, columns = (part.clamp(min=EPSILON) for part in (joint, rows, columns))
    return -(joint * (joint.log() - rows.log() - columns.log())).sum((-1, -2))


def consistency_loss(embeddings: Float[Tensor, "rows features"], *, temperature: float) -> Float[Tensor, ""]:
    """Return the loss of telling an image's other view from the views of all other images of the batch.

    Parameters
    ----------
    embeddings : unit rows v (2B, D), first views, then second views of the same images
    temperature : t > 0

    Notes
    -----
    With s_rk = v_r . sg(v_k) / t, sg a stop of the gradient, p_rk the softmax over k != r, r' the other view of r:
    L = 1/2B sum_r [-log p_rr' - sum_{k not in {r, r'}} log(1 - p_rk)] (Han et al. 2020, Eqs. 10 and 11).

    In float32 1 - p is 0 long before p is 1. For the one p of a row that may be near 1, the largest, it is the sum of
    the others.
    """
    logits = embeddings @ embeddings.detach().T / temperature
    n, floor = len(logits), torch.finfo(logits.dtype).min / 4  # not -inf, whose differences are NaN
    place = torch.arange(n, device=logits.device)
    log_p = logits.masked_fill(place[:, None] == place, floor).log_softmax(1)
    is_largest = log_p.argmax(1, keepdim=True) == place
    of_the_others = log_p.masked_fill(is_largest, floor)
    log_not_p = torch.where(is_largest, of_the_others.logsumexp(1, keepdim=True), torch.log1p(-of_the_others.exp()))
    is_partner = place.roll(n // 2)[:, None] == place
    return -torch.where(is_partner, log_p, log_not_p).sum(1).mean()


# ── the method ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False, repr=False)
class TSUC(ClusterMixin, BaseEstimator):
    """Cluster images by the mutual information of two views; defaults are the published CIFAR-10 configuration.

    Parameters
    ----------
    n_clusters : K
    n_heads : heads trained side by side, of which the one with the lowest assignment loss is kept
    norm : feature_rows, as published; class_columns: prototypes of length 1, the paper's text
    temperature : of the heads, > 0; 0.05 was the best of the authors' trials
    consistency_temperature, consistency_weight : of the loss on the embeddings, > 0, and lambda
    prototypes : random, N(0, 1), as published; kmeans: centers of the embeddings before training, less what they share,
        from another start a head
    trainable : whether the heads are trained, too
    layer : projection: heads sit on the unit projection; encoder: on the encoder's embeddings scaled to length 1
    n_projection : length of the projection that is made where none is given
    update : all: encoder and projection; projection: the encoder stays frozen, in evaluation mode
    views : random views of training, both drawn from it
    lr : learning rate at the start
    lr_drop_epoch, lr_drop_every, lr_decay : it is multiplied by the last at this epoch, and every so many after it
    momentum, weight_decay : of SGD with Nesterov's momentum; the decay falls on every parameter
    n_epochs, batch_size : epochs (180 come to the same as the published 300), and images a step, each gives two views
    select : lowest_loss: the weights after the epoch with the lowest mean loss, as published; last: the last epoch's
    random_state : seed of heads, projection, order and views
    """

    n_clusters: int = 10
    n_heads: int = 5
    norm: Norm = "feature_rows"
    temperature: float = 0.1
    consistency_temperature: float = 0.1
    consistency_weight: float = 1.0
    prototypes: Literal["random", "kmeans"] = "random"
    trainable: bool = False
    layer: Literal["projection", "encoder"] = "projection"
    n_projection: int = 128
    update: Literal["all", "projection"] = "all"
    views: Views = Views(kind="simclr", size=32, jitter=1.0, hue=0.4)
    lr: float = 0.01
    lr_drop_epoch: int = 120
    lr_drop_every: int = 40
    lr_decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    n_epochs: int = 300
    batch_size: int = 128
    select: Literal["lowest_loss", "last"] = "lowest_loss"
    random_state: int = 0

    def fit(self, images: ImageSet, y: None = None, *, encoder: nn.Module, projection: Projection | None = None,
            device: Device | None = None, folder: Path | None = None) -> "TSUC":
        """Cluster ``images`` and set ``net_``, ``labels_``, ``probabilities_``, ``history_`` and what was kept.

        That is ``epoch_`` (from 1), ``head_`` (from 0) and, of that epoch, ``head_losses_`` float64 (n_heads,) and
        ``score_``, the lowest of them. ``head_labels_``, int64 (n_heads, n_images), are the clusters by every head, and
        ``heads_net_`` is the network with all of them; it shares encoder and projection with ``net_``.

        Parameters
        ----------
        encoder : to start from, any network of views (B, 3, H, W) to (B, D); it is copied
        projection : of that encoder, to start from; None: a linear one is drawn. Not used with ``layer="encoder"``
        folder : keeps a checkpoint from which the same call goes on

        Raises
        ------
        InputError
            An option out of its range, more clusters than images, a projection of another encoder, nothing to train.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        for fault in self._faults(images):
            raise fault
        device = device or choose_device("cpu")
        key = self._key(images, encoder, projection) if folder else ""
        encoder, projection = self._parts(encoder, projection)
        embedder = device.place(nn.Sequential(encoder, projection)).requires_grad_(True)
        encoder.requires_grad_(self.update == "all")
        heads = device.place(self._heads(images, embedder, projection.n_out, device))
        net = nn.Sequential(encoder, projection, heads).train()
        encoder.train(self.update == "all")
        optimizer = self._optimizer(net, device)
        pixels = open_pixels(images, device.device)
        order = Order(len(images), self.batch_size, self.random_state, device=device.device)
        best: dict[str, Any] = {"loss": math.inf, "epoch": 0, "head_losses": [], "state": {}}
        encode = device.compiled(encoder)

        def advance(step: Step, batch: Tensor) -> None:
            views = torch.cat([step.view(self.views, batch), step.view(self.views, batch)])
            with device.autocast():
                embeddings = encode(views)
            rows = projection(embeddings.float())
            first, second = (step.gather(half, dim=1) for half in heads(rows).softmax(2).chunk(2, dim=1))
            of_heads = assignment_loss(first, second)
            assignment = of_heads.mean()
            consistency = consistency_loss(step.gather_pairs(rows), temperature=self.consistency_temperature)
            loss = self.consistency_weight * consistency + assignment
            step.backward(loss, optimizer)
            step.log(loss=loss, consistency=consistency, assignment=assignment,
                     **{f"head_{head}": each for head, each in enumerate(of_heads.detach())})

        run = Loop("cluster", order, n_epochs=self.n_epochs, state={"net": net, "optimizer": optimizer}, memory=best,
                   folder=folder, seed=self.random_state, key=key, device=device, pixels=pixels)
        for step in run:
            step.set_lr(optimizer, learning_rate(step.epoch, lr=self.lr, drop_epoch=self.lr_drop_epoch,
                                                 drop_every=self.lr_drop_every, decay=self.lr_decay))
            step.run(advance, pixels.take(step.rows))
            if step.ends_epoch:
                step.record(mutual_information=-step.mean("assignment"))
                if step.mean("loss") < best["loss"] or self.select == "last":
                    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
                    of_epoch = [step.mean(f"head_{head}") for head in range(self.n_heads)]
                    best.update(loss=step.mean("loss"), epoch=step.epoch + 1, head_losses=of_epoch, state=state)

        net.load_state_dict(best["state"])
        self.history_, self.epoch_, self.head_losses_ = run.history, best["epoch"], np.array(best["head_losses"])
        self.head_ = int(self.head_losses_.argmin())
        self.score_ = float(self.head_losses_[self.head_])
        self.heads_net_ = ClusterNet(encoder, heads.as_linear(), projection).eval()
        self.net_ = ClusterNet(encoder, self.heads_net_.heads.only(self.head_), projection).eval()
        self._assign(images, device)
        self._tell()
        return self

    def predict_proba(self, images: ImageSet) -> np.ndarray:
        """Return the probabilities of new images by the chosen head, float32 (n_images, K)."""
        check_is_fitted(self)
        found = forward_all(images, self.net_, self.net_.probabilities, self.views.plain())
        return found[:, 0].float().cpu().numpy()

    def predict(self, images: ImageSet) -> np.ndarray:
        """Return the cluster of new images by the chosen head, int64 (n_images,)."""
        return self.predict_proba(images).argmax(axis=1)

    def predict_heads(self, images: ImageSet, device: Device | None = None) -> np.ndarray:
        """Return the cluster of new images by every head, int64 (n_heads, n_images): for the spread over heads.

        ``device`` None is where the network lies.
        """
        check_is_fitted(self)
        net = self.heads_net_
        found = forward_all(images, net, lambda views: net(views).argmax(2).T, self.views.plain(), device=device)
        return found.T.cpu().numpy()

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_clusters": 1, "n_heads": 1, "n_projection": 1, "batch_size": 2,
                                       "consistency_weight": 0, "lr_drop_epoch": 0, "lr_drop_every": 1},
                          above={"temperature": 0, "consistency_temperature": 0, "lr_decay": 0})
        if self.prototypes == "kmeans" and self.norm != "class_columns":
            same = "0.1 * sqrt(n_clusters / features of the encoder)" if self.layer == "encoder" else (
                "0.1 * sqrt(n_clusters / n_projection), here "
                f"{0.1 * math.sqrt(max(0, self.n_clusters) / max(1, self.n_projection)):.3f}")
            yield InputError("prototypes='kmeans' are directions, which norm='feature_rows' would turn",
                             f"set norm=class_columns, and for the same sharpness temperature = {same}")
        if self.update == "projection" and self.layer == "encoder" and not self.trainable:
            yield _nothing_to_train()

    def _faults(self, images: ImageSet) -> Iterator[InputError]:
        yield from self.option_faults()
        if not isinstance(images, ImageSet):
            yield InputError(f"TSUC clusters images, of which it takes random views; got {type(images).__name__}",
                             "pass an ImageSet, or cluster embeddings with SCAN or KMeans")
        if len(images) < max(2, self.n_clusters):
            yield InputError(f"n_clusters={self.n_clusters} needs at least {max(2, self.n_clusters)} images, "
                             f"got {len(images)}", "lower n_clusters or add images")

    def _key(self, images: ImageSet, encoder: nn.Module, projection: Projection | None) -> str:
        given = [None if net is None else weights_fingerprint(net) for net in (encoder, projection)]
        return fingerprint(asdict(self), images.fingerprint, *given)

    def _parts(self, encoder: nn.Module, projection: Projection | None) -> tuple[nn.Module, Projection]:
        encoder = copy.deepcopy(encoder).cpu().eval()
        with torch.no_grad():
            n_features = encoder(torch.zeros(1, 3, self.views.size, self.views.size)).shape[1]
        if self.layer == "encoder":
            return encoder, Projection(n_features, n_features, n_layers=0)
        if projection is not None:
            if projection.n_features != n_features:
                raise InputError(f"the projection takes {projection.n_features} features, the encoder has {n_features}",
                                 "give the projection of this encoder, or none")
            return encoder, copy.deepcopy(projection).cpu()
        log.info("cluster: no projection was given; a linear one to %d features is drawn", self.n_projection)
        with torch.random.fork_rng(devices=()):  # torch's own first draw leaves the global generator alone
            fresh = Projection(n_features, self.n_projection, n_layers=1)
        initialise(fresh, generator(self.random_state, "tsuc projection"))
        return encoder, fresh

    def _heads(self, images: ImageSet, embedder: nn.Module, n_features: int, device: Device) -> NormalizedHeads:
        shape = (self.n_heads, n_features, self.n_clusters)
        if self.prototypes == "random":
            weight = torch.randn(shape, generator=generator(self.random_state, "tsuc heads"))
        else:
            rows = forward_all(images, embedder, embedder, self.views.plain(), device=device, title="embed")
            weight = torch.stack([self._centers(rows.float().cpu().numpy(), head) for head in range(self.n_heads)])
        return NormalizedHeads(weight, temperature=self.temperature, norm=self.norm, trainable=self.trainable)

    def _centers(self, rows: np.ndarray, head: int) -> Float[Tensor, "features clusters"]:
        seed = derive_seed(self.random_state, "tsuc heads", head) % 2**32  # all that NumPy takes
        with warnings.catch_warnings():  # of fewer distinct rows than clusters: the fit tells what comes of it
            warnings.filterwarnings("ignore", category=ConvergenceWarning)
            centers = KMeans(self.n_clusters, n_init=1, random_state=seed).fit(rows).cluster_centers_
        # What all centers share tells no cluster from another. In embeddings that fill a narrow cone it is nearly their
        # whole length, and directions scaled to length 1 would differ by less than the temperature.
        centers -= centers.mean(axis=0)
        return torch.from_numpy(np.ascontiguousarray(centers.T, dtype=np.float32))

    def _optimizer(self, net: nn.Module, device: Device) -> torch.optim.Optimizer:
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        if not trained:
            raise _nothing_to_train()
        return make_optimizer("sgd", trained, device, lr=self.lr, momentum=self.momentum,
                              weight_decay=self.weight_decay, nesterov=True)

    def _assign(self, images: ImageSet, device: Device) -> None:
        chosen, every, n_clusters = self.net_.heads, self.heads_net_.heads, self.n_clusters

        def both(views: Tensor) -> Tensor:
            # Only the chosen head's probabilities are kept: those of all would not fit for a million images. Beside
            # them the other heads' clusters, as floats, which hold whole numbers to 16 million.
            rows = self.net_.embed(views)
            found = chosen.probabilities(rows)[:, 0]
            return torch.cat([found, every(rows).argmax(2).T.to(found.dtype)], dim=1)

        found = forward_all(images, self.net_, both, self.views.plain(), device=device)
        self.probabilities_ = found[:, :n_clusters].float().cpu().numpy()
        self.labels_ = self.probabilities_.argmax(axis=1)
        self.head_labels_ = found[:, n_clusters:].T.long().cpu().numpy()
        self.head_labels_[self.head_] = self.labels_  # the same but where two clusters tie to the last bit

    def _tell(self) -> None:
        n_used = used_clusters(self.labels_, self.n_clusters)
        log.info("cluster: kept epoch %d of %d, head %d of %d, assignment loss %.4f of %s; %d of %d clusters hold an "
                 "image, as even as %.1f", self.epoch_, self.n_epochs, self.head_ + 1, self.n_heads, self.score_,
                 ", ".join(f"{loss:.4f}" for loss in self.head_losses_), n_used, self.n_clusters,
                 effective_clusters(self.labels_))
        if n_used == 1 < self.n_clusters:
            told = f"TSUC put all {len(self.labels_)} images into one of {self.n_clusters} clusters"
            warnings.warn(f"{told}. hint: look at the embeddings, lower the temperature, or train longer",
                          CollapseWarning, stacklevel=3)


def _nothing_to_train() -> InputError:
    return InputError("there is nothing to train: the encoder is frozen, its projection has no layer, and the heads "
                      "stay as they are", "set trainable=true, layer=projection, or update=all")
