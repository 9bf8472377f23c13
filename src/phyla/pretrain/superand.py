"""Super-AND: an encoder that tells images apart, and in rounds learns which of them belong together.

Han et al. 2020 (arXiv 2002.12158), and by its options the two methods it grew from: instance discrimination (Wu et al.
2018) and AND, anchor neighborhood discovery (Huang et al. 2019).

In: images. Out: ``encoder_`` (B, 3, H, W) -> (B, D), ``projection_`` (B, D) -> (B, 128) with unit rows, and
``memory_`` (N, 128), the bank for nearest neighbors.

Differs from the paper: every loss is a mean over the 2B rows, not a sum; augmentation works on relationship vectors,
as the authors' code does.
Differs from the authors' code: those vectors are compared through the memory's Gram matrix, and softmax over the memory
is taken in blocks, so nothing of size 2B x N exists; the memory is written after the gradient, with view 2; the
logarithm of 1 - p is exact where p is nearly 1; no label chooses a checkpoint; it can be stopped and goes on.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from phyla.embed import embed
from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.images.batches import Order, open_pixels
from phyla.neighbors import find_neighbors
from phyla.nets.heads import Projection
from phyla.nets.memory import HIDDEN_LOGIT, Entropy, Memory, memory_softmax
from phyla.nets.resnet import Encoder, EncoderSpec, Scale, Scheme, initialise
from phyla.randomness import generator
from phyla.storage import fingerprint
from phyla.training.agreement import by_first
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Step
from phyla.training.options import faults, make_optimizer
from phyla.training.schedule import learning_rate
from phyla.types import Embeddings, ImageSet

MemoryView = Literal["second", "average"]

_BLOCK = 1024  # rows of the memory whose entropies are taken at once


# ── the equations ───────────────────────────────────────────────────────────────────────────────────────────────────


def and_loss(logits: Float[Tensor, "rows images"], index: Int[Tensor, " batch"], neighbor: Int[Tensor, " images"]
             ) -> Float[Tensor, ""]:
    """Return the loss of finding each image, or an anchor's neighbor, in the memory: the mean over both views.

    Parameters
    ----------
    logits : (2B, N), rows of first views, then of second views, divided by the temperature
    index : which image each row shows; rows r and r + B show ``index[r]``
    neighbor : of every image of the memory, another image; -1: none, the image is no anchor

    Notes
    -----
    With p_r the softmax of row r and W(i) = {i} or, for an anchor, {i, neighbor of i}:
    L = -1/2B sum_r log sum_{j in W(i_r)} p_rj (Huang et al. 2019; Han et al. 2020).
    """
    own = index.repeat(2)
    partner = neighbor[own]
    wanted = logits.gather(1, torch.stack([own, partner.clamp(min=0)], dim=1))
    return _attraction(logits.logsumexp(1), wanted, partner).mean()


def _attraction(log_sum: Float[Tensor, " rows"], wanted: Float[Tensor, "rows 2"], partner: Int[Tensor, " rows"]
                ) -> Float[Tensor, " rows"]:
    absent = torch.stack([torch.zeros_like(partner, dtype=torch.bool), partner < 0], dim=1)
    return log_sum - wanted.masked_fill(absent, -torch.inf).logsumexp(1)


def unification_entropy(logits: Float[Tensor, "rows images"], index: Int[Tensor, " batch"], *, mask_self: bool = True
                        ) -> Float[Tensor, ""]:
    """Return the mean entropy of the rows' softmax over the memory, the own image left out.

    Parameters
    ----------
    logits, index : as in ``and_loss``
    mask_self : put ``HIDDEN_LOGIT`` in the place of the own logit; False: keep it

    Notes
    -----
    L = 1/2B sum_r H(softmax(z_r)), H(p) = -sum_j p_j log p_j (Han et al. 2020). The constant gets no gradient, and
    it stands for minus infinity: it adds 1.2e-6 to the entropy with 40 images, and less with more.
    """
    if mask_self:
        logits = logits.scatter(1, index.repeat(2)[:, None], HIDDEN_LOGIT)
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def augmentation_loss(embeddings: Float[Tensor, "rows features"], *, temperature: float,
                      gram: Float[Tensor, "features features"] | None = None) -> Float[Tensor, ""]:
    """Return the loss of telling an image's other view among the 2B - 1 others, and the others from it.

    Parameters
    ----------
    embeddings : (2B, D), unit rows; row r + B is the other view of row r
    temperature : of the softmax over the batch, > 0
    gram : M'M of a memory M (N, D): rows are then compared by their N similarities to the memory, scaled to length 1,
        which ``gram`` does in D dimensions

    Notes
    -----
    With s_rk = u_r . sg(u_k) / t, sg a stop of the gradient, p_rk the softmax over k != r, and r' the other view of r:
    L = 1/2B sum_r [-log p_rr' - sum_{k not in {r, r'}} log(1 - p_rk)] (Ye et al. 2019, Eq. 6).
    u_r = f_r, or M f_r / |M f_r|, whose products are f_r' G f_k over the lengths sqrt(f_r' G f_r).

    log(1 - p) is exact for the likeliest k of a row, as the log of the others' share; all other p are at most 1/2.
    """
    rows, compared = embeddings, embeddings
    if gram is not None:
        compared = embeddings @ gram
        length = (compared * embeddings).sum(1, keepdim=True).sqrt()
        rows, compared = embeddings / length, compared / length
    logits = compared @ rows.detach().T / temperature
    never = torch.finfo(logits.dtype).min / 2  # finite: two of these still subtract to a number
    logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), never)
    other = torch.arange(len(logits), device=logits.device).roll(len(logits) // 2)[:, None]
    likeliest = logits.argmax(1, keepdim=True)
    total = logits.logsumexp(1, keepdim=True)
    log_p = logits - total
    log_rest = logits.scatter(1, likeliest, never).logsumexp(1, keepdim=True) - total
    log_not = torch.log1p(-log_p.scatter(1, likeliest, never).exp()).scatter(1, likeliest, log_rest)
    return -(log_p.gather(1, other)[:, 0] + log_not.scatter(1, other, 0.0).sum(1)).mean()


class MemoryLosses(NamedTuple):
    """The two losses that look at the whole memory."""

    attraction: Tensor
    unification: Tensor | None


def memory_losses(embeddings: Float[Tensor, "rows features"], bank: Float[Tensor, "images features"],
                  index: Int[Tensor, " batch"], neighbor: Int[Tensor, " images"], *, temperature: float,
                  entropy: Entropy) -> MemoryLosses:
    """Return ``and_loss`` and ``unification_entropy`` of embeddings and a memory, without their (2B, N) logits.

    Parameters
    ----------
    embeddings : (2B, D) unit rows, first views, then second views; they alone receive a gradient
    bank : the memory's rows
    index, neighbor : as in ``and_loss``
    temperature : of the logits, embeddings . bank / temperature
    entropy : masked: the own image left out; all: with it; none: ``unification`` is None
    """
    attraction, unification = rows_of_losses(embeddings, bank, index, neighbor, temperature=temperature,
                                             entropy=entropy)
    return MemoryLosses(attraction.mean(), None if unification is None else unification.mean())


def rows_of_losses(embeddings: Float[Tensor, "rows features"], bank: Float[Tensor, "images features"],
                   index: Int[Tensor, " batch"], neighbor: Int[Tensor, " images"], *, temperature: float,
                   entropy: Entropy) -> MemoryLosses:
    """Return what ``memory_losses`` takes the means of, (2B,) each."""
    own = index.repeat(2)
    partner = neighbor[own]
    found = memory_softmax(embeddings, bank, own, temperature=temperature, entropy=entropy)
    near = bank[torch.stack([own, partner.clamp(min=0)], dim=1)]
    wanted = (embeddings[:, None] * near).sum(2) / temperature
    return MemoryLosses(_attraction(found.log_sum, wanted, partner), found.entropy)


# ── rounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_entropy(memory: Float[Tensor, "images features"], *, temperature: float) -> Float[Tensor, " images"]:
    """Return how widely each row of the memory is related to all: the entropy of softmax(M M' / temperature), nats.

    The row itself counts. The method takes a low entropy, few images alike, for a neighborhood to be trusted.
    """
    with torch.no_grad():
        blocks = torch.split(torch.arange(len(memory), device=memory.device), _BLOCK)
        found = [memory_softmax(memory[rows], memory, rows, temperature=temperature, entropy="all").entropy
                 for rows in blocks]
    return torch.cat([entropy for entropy in found if entropy is not None])


def discover(memory: Float[Tensor, "images features"], n_anchors: int, *, temperature: float) -> Int[Tensor, " images"]:
    """Return the neighbor of every anchor and -1 for all other images; no label is looked at.

    Anchors are the ``n_anchors`` rows of lowest ``memory_entropy``, the lower index first among equals; the neighbor of
    one is the other row of the largest cosine, anchor or not.

    Raises
    ------
    InputError
        More anchors than images, or fewer than none; one image; a memory that is not finite.
    """
    return _neighbor_of_anchors(memory, memory_entropy(memory, temperature=temperature), n_anchors)


def _neighbor_of_anchors(memory: Float[Tensor, "images features"], entropy: Float[Tensor, " images"], n_anchors: int
                         ) -> Int[Tensor, " images"]:
    if not 0 <= n_anchors <= len(memory):
        raise InputError(f"n_anchors must be 0 to the {len(memory)} images, got {n_anchors}")
    found = find_neighbors(memory.numpy(force=True), 1, device=memory.device).indices[:, 0]
    anchors = entropy.argsort(stable=True)[:n_anchors]
    neighbor = torch.full((len(memory),), -1, device=memory.device)
    neighbor[anchors] = torch.from_numpy(found).to(memory.device)[anchors]
    return neighbor


def unification_weight(epoch: int, *, step: float, every: int) -> float:
    """Return the weight of the unification entropy in an epoch of a round: ``step`` more every ``every`` epochs."""
    return step * (epoch // every)


# ── the method ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False, repr=False)
class SuperAND(TransformerMixin, BaseEstimator):
    """Train an encoder with Super-AND; defaults are the published CIFAR-10 configuration.

    Instance discrimination is ``n_rounds=1, augmentation_weight=0, unification_step=0``, and AND the last two alone.

    Parameters
    ----------
    encoder : which network; published: two streams, of pixels and of edges
    views : random views of training, both drawn from it
    n_projection : length of the projection and of the memory's rows
    temperature : of the softmax over the memory, > 0
    batch_temperature : of the softmax over the batch, > 0
    n_rounds, n_epochs : rounds, and epochs of each
    batch_size : images a step, each gives two views
    lr : learning rate at the start of every round
    lr_drop_epoch, lr_drop_every, lr_decay : it is multiplied by the last at this epoch of a round, and every so many
        epochs after it
    momentum, weight_decay : of SGD with Nesterov's momentum; the decay falls on every parameter
    memory_momentum : share of the old row in a row that is written
    memory_view : which view is written: second, as the authors' code does on a CPU, or the average of both
    anchors_per_round : share of the images that become anchors in each round after the first
    augmentation_weight : of the augmentation loss; 1 as published, 0: not computed
    unification_step, unification_every : weight that the unification entropy gains every so many epochs of a round;
        a step of 0: not computed
    mask_self : leave the own image out of that entropy
    convolutions, bn_scale : how fresh weights are drawn; PyTorch 1.1 drew BatchNorm's scale from U(0, 1)
    random_state : seed of weights, memory, order and views
    """

    encoder: EncoderSpec = EncoderSpec(streams="rgb_sobel")
    views: Views = Views(kind="simclr", size=32, jitter=1.0, hue=0.4)
    n_projection: int = 128
    temperature: float = 0.1
    batch_temperature: float = 0.1
    n_rounds: int = 5
    n_epochs: int = 200
    batch_size: int = 128
    lr: float = 0.03
    lr_drop_epoch: int = 120
    lr_drop_every: int = 40
    lr_decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    memory_momentum: float = 0.5
    memory_view: MemoryView = "second"
    anchors_per_round: float = 0.25
    augmentation_weight: float = 1.0
    unification_step: float = 0.2
    unification_every: int = 80
    mask_self: bool = True
    convolutions: Scheme = "uniform"
    bn_scale: Scale = "ones"
    random_state: int = 0

    def fit(self, images: ImageSet, y: None = None, *, device: Device | None = None,
            folder: Path | None = None) -> "SuperAND":
        """Train on ``images``; set ``encoder_``, ``projection_``, ``memory_``, ``neighbor_`` and ``history_``.

        ``memory_`` holds the memory's rows as they are; ``neighbor_``, int64 (n_images,), the neighbors of the last
        round's anchors and -1 for all other images. ``folder`` keeps a checkpoint from which the same call goes on.

        Raises
        ------
        InputError
            An option out of its range, or fewer than two images.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        for fault in self._faults(images):
            raise fault
        device = device or choose_device("cpu")
        encoder, projection, memory = self._build(len(images))
        net = device.place(nn.Sequential(encoder, projection)).train()
        device.place(memory)
        optimizer = make_optimizer("sgd", net.parameters(), device, lr=self.lr, momentum=self.momentum,
                                   weight_decay=self.weight_decay, nesterov=True)
        key = fingerprint(asdict(self), images.fingerprint) if folder else ""
        pixels = open_pixels(images, device.device)
        order = Order(len(images), self.batch_size, self.random_state, device=device.device)
        kept: dict[str, object] = {"neighbor": torch.full((len(images),), -1)}
        encode = device.compiled(encoder)

        def advance(step: Step, batch: Tensor, neighbor: Tensor, entropy: Entropy, weight: float | Tensor) -> None:
            views = torch.cat([step.view(self.views, batch), step.view(self.views, batch)])
            with device.autocast():
                embeddings = encode(views)
            own = projection(embeddings.float())
            found = rows_of_losses(own, memory.rows, step.rows, neighbor, temperature=self.temperature,
                                   entropy=entropy)
            attraction = step.gather_pairs(found.attraction).mean()
            rows = step.gather_pairs(own)
            loss = attraction
            step.log(attraction=attraction)
            if self.augmentation_weight:
                augmentation = augmentation_loss(rows, temperature=self.batch_temperature, gram=memory.gram)
                loss = loss + self.augmentation_weight * augmentation
                step.log(augmentation=augmentation)
            if found.unification is not None:
                unification = step.gather_pairs(found.unification).mean()
                loss = loss + weight * unification
                step.log(unification=unification)
            step.backward(loss, optimizer)
            step.log(loss=loss)
            first, second = rows.detach().chunk(2)
            memory.update(step.indices, second if self.memory_view == "second" else (first + second) / 2)

        run = Loop("pretrain", order, n_epochs=self.n_rounds * self.n_epochs,
                   state={"net": net, "optimizer": optimizer, "memory": memory}, memory=kept, folder=folder,
                   seed=self.random_state, key=key, device=device, pixels=pixels)
        for step in run:
            round_, epoch = divmod(step.epoch, self.n_epochs)
            if round_ and epoch == step.position == 0:
                kept["neighbor"], spread = by_first(device.group, partial(self._discover, memory.rows, round_))
                step.record(memory_entropy=spread)
            neighbor = kept["neighbor"] = _on(device.device, kept["neighbor"])
            weight = unification_weight(epoch, step=self.unification_step, every=self.unification_every)
            step.set_lr(optimizer, learning_rate(epoch, lr=self.lr, drop_epoch=self.lr_drop_epoch,
                                                 drop_every=self.lr_drop_every, decay=self.lr_decay))
            entropy = "none" if not weight else "masked" if self.mask_self else "all"
            step.run(advance, pixels.take(step.rows), neighbor, entropy, weight)
            if step.ends_epoch:
                memory.refresh()
                step.record(round=round_, weight=weight, n_anchors=self.n_anchors(round_, len(images)))

        self.encoder_, self.projection_ = encoder.eval(), projection.eval()
        self.memory_ = Embeddings(memory.rows.float().numpy(force=True).copy(), images.ids)
        self.neighbor_ = _on(torch.device("cpu"), kept["neighbor"]).numpy()
        self.history_ = run.history
        return self

    def transform(self, images: ImageSet) -> np.ndarray:
        """Return the embeddings of ``images``, float32 (n_images, n_features)."""
        check_is_fitted(self)
        return embed(images, self.encoder_, self.views.plain()).values

    def _discover(self, memory: Float[Tensor, "images features"], round_: int) -> tuple[Int[Tensor, " images"], float]:
        """Return the neighbors of a round's anchors, and the mean entropy of the memory."""
        entropy = memory_entropy(memory, temperature=self.temperature)
        neighbor = _neighbor_of_anchors(memory, entropy, self.n_anchors(round_, len(memory)))
        return neighbor, float(entropy.mean())

    def n_anchors(self, round_: int, n_images: int) -> int:
        """Return how many of the images are anchors in a round, counted from 0: none in the first, all in the end."""
        share = self.anchors_per_round * round_ * n_images
        return min(n_images, math.floor(share + 1e-9))  # 0.7 * 10 must not be a little below 7

    def _build(self, n_images: int) -> tuple[Encoder, Projection, Memory]:
        source = generator(self.random_state, "superand weights")
        encoder, projection = self.encoder.build(source), Projection(self.encoder.n_features, self.n_projection, 1)
        initialise(encoder, source, convolutions=self.convolutions, bn_scale=self.bn_scale)
        initialise(projection, source)
        memory = Memory(n_images, self.n_projection, momentum=self.memory_momentum)
        memory.initialise(generator(self.random_state, "superand memory"))
        return encoder, projection, memory

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"n_projection": 1, "n_rounds": 1, "lr_drop_every": 1, "unification_every": 1,
                                       "lr_drop_epoch": 0, "augmentation_weight": 0, "unification_step": 0},
                          above={"temperature": 0, "batch_temperature": 0, "lr_decay": 0})
        for name in ("anchors_per_round", "memory_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                yield InputError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            yield InputError(f"batch_size={self.batch_size} leaves no other image to compare with", "at least 2")

    def _faults(self, images: ImageSet) -> Iterator[InputError]:
        yield from self.option_faults()
        if len(images) < 2:
            yield InputError(f"Super-AND needs at least 2 images, got {len(images)}")


def _on(device: torch.device, value: object) -> Tensor:
    # A checkpoint is read back on the CPU; what is there already stays as it is.
    return torch.as_tensor(value, device=device)
