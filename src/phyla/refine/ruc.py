"""RUC: two networks learn a clustering anew from the images whose labels look right, and correct the others' labels.

Park et al. 2021 (RUC). An add-on to any clustering by a network: what it needs is the labels and the encoder.

In: images, a trained network with one head and, to judge labels by neighbors, embeddings of the same images.
Out: ``nets_``, two networks; ``net_``, one network whose logits are the sum of theirs; ``labels_`` (n,),
``probabilities_`` (n, K); ``clean_`` (n,), the images whose label was trusted at the end.

Differs from the paper, as the authors' code: the smoothing is constant, the loss of unsure images is a mean over
clusters too (25 is 2.5 in the paper's sum for 10 clusters), a label is corrected at once and by the network in training
alone, and a confidence at the threshold counts.
Differs from the authors' code: cluster ids stay as they came (theirs are renamed after the true classes), a batch
without a clean or an unsure image gives a zero term and not NaN, and ties of a vote go to the lowest id.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from phyla.embed import forward_all, weights_fingerprint
from phyla.errors import CollapseWarning, InputError, PhylaWarning
from phyla.images.augment import Views
from phyla.images.batches import Order, open_pixels
from phyla.neighbors import find_in_bank, find_neighbors
from phyla.nets.heads import ClusterHeads, ClusterNet, summed
from phyla.quality import count_votes, label_free_temperature, neighbor_agreement
from phyla.randomness import generator
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Stateful, Step
from phyla.training.options import faults, make_optimizer, neighbor_faults
from phyla.training.schedule import cosine, staircase
from phyla.types import Embeddings, ImageSet, Neighbors

log = logging.getLogger("phyla")

_LEAST = {"batch_size": 2, "n_neighbors": 1, "refurbish_every": 1, "ramp_length": 1, "confidence_threshold": 0,
          "refurbish_threshold": 0, "noisy_weight": 0}

Forward = Callable[[Tensor], Tensor]
Probabilities = Float[Tensor, "batch clusters"]


def sharpen(p: Probabilities, *, temperature: float) -> Probabilities:
    """Return p_c^(1/temperature), scaled to sum to 1: below 1 the largest grows."""
    raised = (p / p.amax(dim=1, keepdim=True)) ** (1 / temperature)  # of the largest first: no row may vanish
    return raised / raised.sum(dim=1, keepdim=True)


def co_refine(labels: Int[Tensor, " batch"], peer: Probabilities, weight: Float[Tensor, " batch"], *,
              temperature: float) -> Probabilities:
    """Return targets of clean images: their label, to a share of ``weight`` replaced by the peer's probabilities.

    sharpen((1 - w_i) onehot(y_i) + w_i r_i, temperature), w from 0 (all label) to 1 (all peer): the peer's confidence.
    """
    one_hot = torch.zeros_like(peer).scatter_(1, labels[:, None], 1.0)  # torch's own looks at the labels on a CPU
    return sharpen((1 - weight)[:, None] * one_hot + weight[:, None] * peer, temperature=temperature)


def guess(probabilities: Float[Tensor, "views batch clusters"], *, temperature: float) -> Probabilities:
    """Return targets of unsure images: the sharpened mean of what networks say of several views."""
    return sharpen(probabilities.mean(dim=0), temperature=temperature)


def mixed_losses(clean_logits: Float[Tensor, "clean clusters"], clean_targets: Float[Tensor, "clean clusters"],
                 noisy_logits: Float[Tensor, "noisy clusters"], noisy_targets: Float[Tensor, "noisy clusters"], *,
                 noisy_weight: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the cross-entropy of clean rows, and the weighted squared distance of noisy ones; see masked_losses."""
    logits, targets = torch.cat([clean_logits, noisy_logits]), torch.cat([clean_targets, noisy_targets])
    clean = torch.arange(len(logits), device=logits.device) < len(clean_logits)
    return masked_losses(logits, targets, clean, noisy_weight=noisy_weight)


def masked_losses(logits: Probabilities, targets: Probabilities, clean: Bool[Tensor, " batch"], *,
                  noisy_weight: float | Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the two losses of mixed rows, the ``clean`` ones and the others of one table.

    Its shapes do not depend on how many are clean, so no step waits for a GPU to count them.

    Notes
    -----
    With g the softmax of the logits and T the targets: the mean over clean rows of -sum_c T_c log g_c, and
    ``noisy_weight`` times the mean over the other rows *and over clusters* of (g_c - T_c)^2. No row: 0 with a graph.
    """
    share = _share(clean, logits.dtype), _share(~clean, logits.dtype)
    cross_entropy = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
    distance = (logits.softmax(dim=1) - targets).square().mean(dim=1)
    return (cross_entropy * share[0]).sum(), noisy_weight * (distance * share[1]).sum()


def smoothed_cross_entropy(logits: Probabilities, labels: Int[Tensor, " batch"], *, smoothing: float,
                           rows: Bool[Tensor, " batch"] | None = None) -> Float[Tensor, ""]:
    """Return the mean cross-entropy with 1 - smoothing on the label and smoothing / (K - 1) on each other cluster.

    ``rows`` says which count, None for all; without any it is 0 with a graph. The least it can be is the entropy of
    those targets: 1.7918 for smoothing 0.5 of 10 clusters.
    """
    rows = torch.ones_like(labels, dtype=torch.bool) if rows is None else rows
    log_p = logits.log_softmax(dim=1)
    label = log_p.gather(1, labels[:, None])[:, 0]
    others = (log_p.sum(dim=1) - label) / (logits.shape[1] - 1)
    return -(((1 - smoothing) * label + smoothing * others) * _share(rows, logits.dtype)).sum()


def _share(rows: Bool[Tensor, " batch"], dtype: torch.dtype) -> Float[Tensor, " batch"]:
    """Return 1 / n for each of the n ``rows``, 0 for the others."""
    return rows.to(dtype) / rows.sum().clamp(min=1)


def ramp(epoch: float, *, length: float = 200) -> float:
    """Return the share of the noisy weight at ``epoch``: epoch / length, at least 0.1 and at most 1."""
    return min(max(epoch / length, 0.1), 1.0)


def mixing_share(alpha: float, source: torch.Generator) -> float:
    """Return MixUp's share of the first of two images: of x from Beta(alpha, alpha) and 1 - x the larger."""
    seed = int(torch.randint(1 << 62, (), generator=source))
    drawn = float(np.random.default_rng(seed).beta(alpha, alpha))
    return max(drawn, 1 - drawn)


def neighbor_vote(embeddings: Embeddings | np.ndarray | Tensor, labels: np.ndarray | Tensor, *, n_neighbors: int,
                  device: torch.device | str | None = None) -> np.ndarray:
    """Return which images carry the label that most of their neighbors carry, bool (n_images,).

    Parameters
    ----------
    embeddings : (n_images, n_features); the nearest are those of largest cosine
    labels : int (n_images,), 0 and up
    n_neighbors : voters an image, 1 to n_images (else InputError), with equal votes; the image itself is one of them,
        as published. Of labels with equal votes the lowest wins
    """
    bank = embeddings.numpy(force=True) if isinstance(embeddings, Tensor) else embeddings
    of = labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)
    indices, _ = find_in_bank(bank, bank, n_neighbors=n_neighbors, device=device)
    clean = np.empty(len(of), bool)
    for rows, votes in count_votes(of, indices):
        clean[rows] = votes.argmax(axis=1) == of[rows]
    return clean


class Marks(nn.Module):
    """What the passes know of the images and change, as buffers, so that a checkpoint holds it.

    Parameters
    ----------
    labels : int64 (n_images,); of images that are not clean they are not used
    clean : bool (n_images,); it only ever grows

    ``initial`` is the first ``clean``, ``confidence`` (n_images,) the largest probability that an image last had in
    training, ``weight`` (2, n_images) the same after a network's last pass, scaled to 0 to 1; 0 before the first.
    """

    labels: Tensor
    clean: Tensor
    initial: Tensor
    confidence: Tensor
    weight: Tensor

    def __init__(self, labels: Int[Tensor, " images"], clean: Bool[Tensor, " images"]) -> None:
        super().__init__()
        unknown = torch.zeros(3, len(labels), device=labels.device)
        for name, value in zip(("labels", "clean", "initial", "confidence", "weight"),
                               (labels, clean, clean, unknown[0], unknown[1:]), strict=True):
            self.register_buffer(name, value.clone())

    def refurbish(self, rows: Int[Tensor, " batch"], p: Probabilities, *, threshold: float | Tensor) -> None:
        """Note the confidence of ``rows``, and make those clean that reach the threshold, with that label."""
        confidence, label = p.max(dim=1)
        promoted = ~self.clean[rows] & (confidence >= threshold)
        self.labels[rows] = torch.where(promoted, label, self.labels[rows])
        self.clean[rows] = self.clean[rows] | promoted
        self.confidence[rows] = confidence.to(self.confidence.dtype)

    def end_pass(self, who: int) -> None:
        """Scale the confidences of network ``who`` to 0 to 1 over all images: its weight in its peer's targets."""
        low, high = self.confidence.aminmax()
        self.weight[who] = (self.confidence - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)


@dataclass(eq=False, repr=False)
class RUC(ClusterMixin, BaseEstimator):
    """Refine an assignment by learning it anew from its clean part; defaults are the published CIFAR-10 configuration.

    Parameters
    ----------
    views : random strong views; the weak ones are their crops and flips alone, the plain ones nothing random
    split : what makes an image clean. confidence: its probability reaches the threshold; metric: its neighbors vote
        for its label; hybrid: both
    confidence_threshold : of the network given
    n_neighbors : voters, the image itself among them; lowered to half the images of a mean cluster where it is more
    refurbish_threshold, refurbish_rise, refurbish_every : confidence in training at which an image becomes clean, and
        how much it rises each so many epochs (published CIFAR-20, STL-10: 0.90, 0.02, 40); above 1 none ever does
    noisy_weight : of the loss of images that are not clean, at the end of the ramp (CIFAR-20 100, STL-10 50)
    ramp_length : epochs over which it rises, from a tenth
    sharpen_temperature : of the targets
    mixup_alpha : of the Beta distribution of MixUp
    smoothing : of the labels of strong views
    lr, momentum, weight_decay : of SGD with Nesterov's momentum; lr falls to 0 by half a cosine, epoch by epoch
    n_epochs, batch_size : an epoch is a pass of either network over all images
    forwards : faithful: both networks see whole batches; cheap: only what is used, in BatchNorm's smaller batches
    temperature : of the result's softmax. none: of the sum of the logits; average: 2, the softmax of their mean;
        label_free: the mean confidence is made the share of images whose neighbors vote for their cluster, but never
        raised where clusters were emptied, because fewer clusters win more votes by themselves
    random_state : seed of heads, order, views and MixUp
    """

    views: Views = Views(kind="ruc_strong", size=32)
    split: Literal["hybrid", "confidence", "metric"] = "hybrid"
    confidence_threshold: float = 0.99
    n_neighbors: int = 100
    refurbish_threshold: float = 0.99
    refurbish_rise: float = 0.0
    refurbish_every: int = 40
    noisy_weight: float = 25.0
    ramp_length: int = 200
    sharpen_temperature: float = 0.5
    mixup_alpha: float = 4.0
    smoothing: float = 0.5
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    n_epochs: int = 200
    batch_size: int = 250
    forwards: Literal["faithful", "cheap"] = "faithful"
    temperature: Literal["none", "average", "label_free"] = "none"
    random_state: int = 0

    def fit(self, images: ImageSet, y: None = None, *, net: ClusterNet, embeddings: Embeddings | None = None,
            neighbors: Neighbors | None = None, watched: tuple[ImageSet, Neighbors] | None = None,
            device: Device | None = None, folder: Path | None = None) -> "RUC":
        """Refine the clustering of ``net`` on ``images``; set ``net_``, ``nets_``, ``labels_``, ``probabilities_``.

        Also ``member_labels_`` int64 (2, n_images), of each network alone; ``clean_`` and ``initial_clean_`` bool
        (n_images,); ``temperature_``; ``history_``, one record a pass; ``scores_``, the share of neighbors in the same
        cluster before and after; and ``notices_``, sentences for a report.

        Parameters
        ----------
        net : a network with one head, from any method; it is copied, and only its encoder and its answers are used
        embeddings : of the same images, best from pretraining: needed but for split="confidence"
        neighbors : of the images, for ``scores_``, and for a label-free temperature where there are no embeddings
        watched : a held-out split and its neighbors, for these two instead
        folder : keeps a checkpoint from which the same call goes on

        Raises
        ------
        InputError
            An option out of its range, no clean image, a network with several heads or without an encoder, or
            embeddings or neighbors of another set.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        for fault in self._faults(images, net, embeddings, neighbors, watched):
            raise fault
        device = device or choose_device("cpu")
        self._check(device)
        used = embeddings.fingerprint if embeddings is not None and self.split != "confidence" else None
        key = fingerprint(asdict(self), images.fingerprint, weights_fingerprint(net), used) if folder else ""
        self.notices_: list[str] = []
        before = copy.deepcopy(net)
        marks = self._divide(before, images, embeddings, device)
        nets = [self._fresh(before, member, device) for member in range(2)]
        optimizers = [make_optimizer("sgd", each.parameters(), device, lr=self.lr, momentum=self.momentum,
                                     weight_decay=self.weight_decay, nesterov=True) for each in nets]
        weak, pixels = replace(self.views, kind="ruc_weak"), open_pixels(images, device.device)
        recipes = (self.views.plain(), weak, weak, self.views)
        lone = len(images) % min(self.batch_size, len(images)) == 1  # BatchNorm has nothing to say of one image
        order = Order(len(images), self.batch_size, self.random_state, drop_last=lone, device=device.device)
        state: dict[str, Stateful] = {"marks": marks, "net 0": nets[0], "net 1": nets[1],
                                      "optimizer 0": optimizers[0], "optimizer 1": optimizers[1]}
        counts: dict[str, Any] = {"clean": int(marks.clean.sum())}
        forwards, n_clusters = [device.compiled(each) for each in nets], net.heads.n_clusters

        def advance(step: Step, batch: Tensor, who: int, threshold: float | Tensor, noisy_weight: float | Tensor,
                    *mixing: Any) -> None:
            # MixUp mixes any two images of the batch, so all are drawn everywhere; a network sees this process's share.
            plain, first, second, strong = (step.view(recipe, batch, whole=True) for recipe in recipes)
            own, peer, rows = forwards[who], forwards[1 - who], step.indices
            clean, labels, weight = marks.clean[rows], marks.labels[rows], marks.weight[1 - who, rows]
            with torch.no_grad():
                shown = [each[step.part] for each in (plain, first, second)]
                known = [each[step.part] for each in (clean, labels, weight)]
                own_p = step.gather(_probabilities(own, shown[0], device, n_clusters=n_clusters))
                targets = step.gather(self._targets(own, peer, shown, known, device, n_clusters=n_clusters))
            marks.refurbish(rows, own_p, threshold=threshold)
            share, partner = mixing or self._mixing(step.generator, len(rows), device)
            mixed, mixed_targets = (share * each + (1 - share) * each[partner]
                                    for each in (torch.cat([first, second]), targets.repeat(2, 1)))
            both = device.group.part(len(mixed))
            with device.autocast():
                strong_logits, mixed_logits = own(strong[step.part])[0], own(device.arrange(mixed[both]))[0]
            clean_loss, noisy_loss = masked_losses(device.group.gather(_full(mixed_logits), len(mixed)), mixed_targets,
                                                   clean.repeat(2), noisy_weight=noisy_weight)
            strong_loss = smoothed_cross_entropy(step.gather(_full(strong_logits)), labels, smoothing=self.smoothing,
                                                 rows=clean)
            loss = clean_loss + noisy_loss + strong_loss
            step.backward(loss, optimizers[who])
            step.log(loss=loss, clean_loss=clean_loss, noisy_loss=noisy_loss, strong_loss=strong_loss,
                     confidence=own_p.amax(dim=1).mean())

        run = Loop("robust", order, n_epochs=2 * self.n_epochs, state=state, memory=counts, folder=folder,
                   seed=self.random_state, key=key, device=device, pixels=pixels, wants=lambda step: step.indices)
        for step in run:
            epoch, who = divmod(step.epoch, 2)
            step.set_lr(optimizers[who], cosine(epoch, n_epochs=self.n_epochs, lr=self.lr))
            # What the host draws cannot be part of a recorded step; else it comes after the views, as it always did.
            mixing = () if device.engine == "eager" else self._mixing(
                generator(self.random_state, "mixup", step.index), len(step.indices), device)
            threshold = staircase(epoch, start=self.refurbish_threshold, rise=self.refurbish_rise,
                                  every=self.refurbish_every)
            reached = ramp(epoch + step.position / (len(images) // order.rows + 1), length=self.ramp_length)
            step.run(advance, pixels.take(step.indices), who, threshold, self.noisy_weight * reached, *mixing)
            if step.ends_epoch:
                marks.end_pass(who)
                n_before, n_clean = counts["clean"], int(marks.clean.sum())
                counts["clean"] = n_clean
                step.record(epoch=epoch + 1, network=who + 1, n_clean=n_clean, promoted=n_clean - n_before)

        self.history_ = run.history
        self.clean_, self.initial_clean_ = marks.clean.cpu().numpy(), marks.initial.cpu().numpy()
        self.nets_, self.net_ = [each.eval() for each in nets], summed(nets).eval()
        self.temperature_ = self._temperature(images, embeddings, neighbors, watched, device)
        for parameter in self.net_.heads.parameters():
            parameter.data /= self.temperature_
        self._conclude(before, images, watched or (images, neighbors), device)
        return self

    def predict_proba(self, images: ImageSet) -> np.ndarray:
        """Return the probabilities of new images, float32 (n_images, K)."""
        check_is_fitted(self)
        return forward_all(images, self.net_, self.net_.probabilities, self.views.plain())[:, 0].cpu().numpy()

    def predict(self, images: ImageSet) -> np.ndarray:
        """Return the cluster of new images, int64 (n_images,)."""
        return self.predict_proba(images).argmax(axis=1)

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least=_LEAST, above={"sharpen_temperature": 0, "mixup_alpha": 0},
                          below_one=("smoothing",))
        if self.views.kind != "ruc_strong":
            yield InputError(f"views of kind {self.views.kind!r} are not allowed", "use the kind ruc_strong")

    def _faults(self, images: ImageSet, net: ClusterNet, embeddings: Embeddings | None, neighbors: Neighbors | None,
                watched: tuple[ImageSet, Neighbors] | None) -> Iterator[InputError]:
        yield from self.option_faults()
        if len(images) < 2:
            yield InputError(f"RUC needs at least 2 images, got {len(images)}", "add images")
        if net.heads.n_heads != 1 or net.heads.n_clusters < 2:
            yield InputError(f"RUC refines one head of at least 2 clusters, got {net.heads.n_heads} of "
                             f"{net.heads.n_clusters}", "pass net.only(head)")
        if isinstance(net.encoder, nn.Identity):
            yield InputError("RUC needs a network on images, this one takes embeddings",
                             "cluster images with an encoder, and pass that net_")
        if embeddings is None and self.split != "confidence":
            yield InputError(f"split={self.split!r} needs the embeddings of the images",
                             "pass embeddings=..., or set split=confidence")
        if embeddings is not None and list(embeddings.ids) != list(images.ids):
            yield InputError(f"the embeddings belong to another set: {len(embeddings)} rows, {len(images)} images",
                             "embed these images")
        if self.temperature == "label_free" and (embeddings, neighbors, watched) == (None, None, None):
            yield InputError("temperature='label_free' needs neighbors", "pass embeddings=... or neighbors=...")
        yield from neighbor_faults((images, neighbors), watched)

    def _check(self, device: Device) -> None:
        if self.forwards == "cheap" and (device.group.size > 1 or device.engine != "eager"):
            raise InputError("forwards='cheap' picks rows by what they hold, which neither a recorded step nor several "
                             "processes can", "set forwards=faithful, or leave out --devices and --engine")

    def _divide(self, net: ClusterNet, images: ImageSet, embeddings: Embeddings | None, device: Device) -> Marks:
        """Return the labels of ``net``, and which of them are trusted."""
        p = forward_all(images, net, net.probabilities, self.views.plain(), device=device)[:, 0]
        confidence, labels = p.max(dim=1)
        clean = torch.ones_like(labels, dtype=torch.bool)
        if self.split != "metric":
            clean &= confidence >= self.confidence_threshold
        self.n_voters_ = min(self.n_neighbors, max(3, len(images) // (2 * p.shape[1])), len(images))
        if self.split != "confidence" and embeddings is not None:
            vote = neighbor_vote(embeddings, labels, n_neighbors=self.n_voters_, device=device.device)
            clean &= torch.from_numpy(vote).to(clean.device)
            if self.n_voters_ < self.n_neighbors:
                self._note(f"RUC asked {self.n_voters_} and not {self.n_neighbors} neighbors: half a mean cluster")
        if not clean.any():
            lower = 0.9 * min(self.confidence_threshold, float(confidence.max()))
            raise InputError(f"no label is trusted: the largest confidence is {float(confidence.max()):.4f}",
                             f"--set robust.split=metric, a lower --set robust.confidence_threshold={lower:.2f}, or "
                             "leave the stage out: --set robust=none")
        self.initial_labels_, trusted = labels.cpu().numpy(), clean.cpu().numpy()
        n_used = len(np.unique(self.initial_labels_))
        if lost := n_used - len(np.unique(self.initial_labels_[trusted])):
            self._note(f"{lost} of {n_used} clusters have no trusted image and may get lost")
            warnings.warn(f"{self.notices_[-1]}. hint: lower confidence_threshold", PhylaWarning, stacklevel=3)
        return Marks(labels, clean)

    def _fresh(self, net: ClusterNet, member: int, device: Device) -> ClusterNet:
        """Return a copy of the encoder of ``net`` with a new head on its embedding."""
        width = net.projection.n_features if net.projection is not None else net.heads.weight.shape[2]
        heads = ClusterHeads(width, net.heads.n_clusters)
        heads.initialise(generator(self.random_state, "ruc heads", member))
        fresh = ClusterNet(copy.deepcopy(net.encoder), heads.to(net.heads.weight))
        return device.place(fresh).requires_grad_(True).train()

    def _mixing(self, source: torch.Generator, n_images: int, device: Device) -> tuple[float, Int[Tensor, " rows"]]:
        """Return MixUp's share, and with which of the two views of all images each of them is mixed."""
        share = mixing_share(self.mixup_alpha, source)
        return share, torch.randperm(2 * n_images, generator=source).to(device.device, non_blocking=True)

    def _targets(self, own: Forward, peer: Forward, views: Sequence[Tensor], known: Sequence[Tensor], device: Device,
                 *, n_clusters: int) -> Tensor:
        """Return the target of every image: its refined label where that is clean, else what the networks guess."""
        clean, labels, weight = known
        sure, unsure = (_chosen(rows, all_rows=self.forwards == "faithful") for rows in (clean, ~clean))
        plain, *weak = views
        seen = _probabilities(peer, plain[sure], device, n_clusters=n_clusters)
        refined = co_refine(labels[sure], seen, weight[sure], temperature=self.sharpen_temperature)
        guesses = [_probabilities(net, view[unsure], device, n_clusters=n_clusters)
                   for net in (own, peer) for view in weak]
        guessed = guess(torch.stack(guesses), temperature=self.sharpen_temperature)
        targets = torch.zeros(2, len(clean), refined.shape[1], dtype=refined.dtype, device=clean.device)
        targets[0, sure], targets[1, unsure] = refined, guessed
        return torch.where(clean[:, None], targets[0], targets[1])

    def _conclude(self, before: ClusterNet, images: ImageSet, judge: tuple[ImageSet, Neighbors | None],
                  device: Device) -> None:
        start, end = int(self.initial_clean_.sum()), int(self.clean_.sum())
        self._note(f"RUC trusted {start} of {len(images)} labels at the start, and {end - start} more by the end")
        self.member_labels_ = np.stack([self._labels(net, images, device) for net in self.nets_])
        p = forward_all(images, self.net_, self.net_.probabilities, self.views.plain(), device=device)
        self.probabilities_ = p[:, 0].cpu().numpy()
        self.labels_ = self.probabilities_.argmax(axis=1)
        self._note(f"the mean confidence is {self.probabilities_.max(axis=1).mean():.3f} at a temperature of "
                   f"{self.temperature_:.3f} of the summed logits")
        self.scores_: dict[str, float] = {}
        n_before, n_after = len(np.unique(self.initial_labels_)), len(np.unique(self.labels_))
        if judge[1] is not None:
            for name, net in (("before", before), ("after", self.net_)):
                self.scores_[name] = neighbor_agreement(self._labels(net, judge[0], device), judge[1])
            self._note(f"neighbors in the same cluster: {self.scores_['before']:.4f} before RUC, "
                       f"{self.scores_['after']:.4f} after"
                       + ("; fewer clusters raise it by themselves" if n_after < n_before else ""))
        if n_after < n_before:
            self._note(f"RUC emptied {n_before - n_after} of {n_before} clusters")
            warnings.warn(self.notices_[-1], CollapseWarning, stacklevel=3)

    def _labels(self, net: ClusterNet, images: ImageSet, device: Device) -> np.ndarray:
        found = forward_all(images, net, lambda views: net(views)[0].argmax(dim=1), self.views.plain(), device=device)
        return found.cpu().numpy()

    def _temperature(self, images: ImageSet, embeddings: Embeddings | None, neighbors: Neighbors | None,
                     watched: tuple[ImageSet, Neighbors] | None, device: Device) -> float:
        if self.temperature != "label_free":
            return 2.0 if self.temperature == "average" else 1.0
        shown, near = watched or (images, neighbors)
        if embeddings is not None and watched is None:  # as many voters as for the split judge better than a few
            near = find_neighbors(embeddings, max(1, self.n_voters_ - 1), device=device.device)
        logits = forward_all(shown, self.net_, lambda views: self.net_(views)[0], self.views.plain(), device=device)
        found = 1.0 if near is None else label_free_temperature(logits, near)
        if found < 1 and len(np.unique(self._labels(self.net_, images, device))) < len(np.unique(self.initial_labels_)):
            self._note(f"the label-free temperature, {found:.3f}, is not used: with emptied clusters it only flatters")
            return 1.0
        return found

    def _note(self, notice: str) -> None:
        self.notices_.append(notice)
        log.info("robust: %s", notice)


def _probabilities(net: Forward, views: Tensor, device: Device, *, n_clusters: int) -> Tensor:
    if not len(views):  # a network is not asked, and BatchNorm does not count it
        return views.new_zeros(0, n_clusters)
    with device.autocast():
        logits = net(device.arrange(views))[0]
    return _full(logits).softmax(dim=1)


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _chosen(rows: Bool[Tensor, " batch"], *, all_rows: bool) -> Int[Tensor, " chosen"] | slice:
    """Return the places of ``rows``: none, or at least two, because BatchNorm has nothing to say of one."""
    if all_rows:
        return slice(None)
    n = int(rows.sum())
    return (~rows).int().argsort(stable=True)[: max(n, 2) if n else 0]
