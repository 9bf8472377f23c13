"""Self-labelling: the confident predictions on plain images become targets for strongly changed views of them.

van Gansbeke et al. 2020 (SCAN), section 2.3; FixMatch's idea without labels.

In: images and a trained network with one head. Out: ``net_``, ``labels_`` (n,), ``probabilities_`` (n, K).

Differs from the paper: the weak view is no augmentation at all (as the authors' code).
Differs from the authors' code: a step without a confident image is skipped and counted instead of ending the run;
collapse is detected and the better of before and after is kept (``keep="last"`` is theirs); ``ema="teacher"`` is a real
teacher, where ``ema="write_back"`` is the published average, which amounts to a learning rate times (1 - decay) with
frozen BatchNorm statistics.
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
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from phyla.embed import forward_all, weights_fingerprint
from phyla.errors import CollapseWarning, InputError, PhylaWarning
from phyla.images.augment import Views
from phyla.images.batches import Order, open_pixels
from phyla.nets.heads import ClusterNet
from phyla.quality import neighbor_score
from phyla.storage import fingerprint
from phyla.training.device import Device, choose_device
from phyla.training.loop import Loop, Stateful, Step
from phyla.training.options import faults, make_optimizer, neighbor_faults
from phyla.types import ImageSet, Neighbors

log = logging.getLogger("phyla")


def self_label_loss(weak_logits: Float[Tensor, "batch clusters"], strong_logits: Float[Tensor, "batch clusters"], *,
                    threshold: float, balanced: bool) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the cross-entropy of strong views with confident pseudo-labels, and how many were confident.

    Parameters
    ----------
    weak_logits : (B, K) of plain images; gives the pseudo-labels, no gradient
    strong_logits : (B, K) of strong views of the same images
    threshold : an image counts when its largest weak probability is above this
    balanced : every cluster present weighs the same, whatever its number of images

    Notes
    -----
    With q the softmax of the weak logits, m_i = [max_c q_ic > threshold], y_i = argmax_c q_ic, l_i the cross-entropy:
    plain L = sum_i m_i l_i / sum_i m_i; balanced L = mean over clusters present of the mean of their l_i, which equals
    the authors' weights n / n_c (van Gansbeke et al. 2020, section 2.3). No confident image: a zero with a graph.
    """
    confidence, label = weak_logits.detach().softmax(1).max(1)
    confident = confidence > threshold
    n_confident = confident.sum()
    each = nn.functional.cross_entropy(strong_logits, label, reduction="none")
    share = confident.to(each.dtype)
    if balanced:
        count = torch.zeros(strong_logits.shape[1], dtype=each.dtype, device=each.device).index_add_(0, label, share)
        share = share / count[label].clamp(min=1) / (count > 0).sum().clamp(min=1)
    else:
        share = share / n_confident.clamp(min=1)
    return (each * share).sum(), n_confident


@dataclass(eq=False, repr=False)
class SelfLabel(ClusterMixin, BaseEstimator):
    """Refine an assignment with its own confident labels; defaults are the published CIFAR-10 configuration.

    Parameters
    ----------
    views : random strong views; their plain form is the weak view
    threshold : confidence above which an image is used
    balanced : weigh clusters alike (published: on for CIFAR and STL, off for ImageNet)
    ema : off; write_back: the published average, written into the model after every step (decay 0.999); teacher: a
        moving average of the weights makes the pseudo-labels and is the result
    ema_decay : of either average
    weak_mode : batch: pseudo-labels use the batch's own BatchNorm statistics, as published; running: the stored ones
    optimizer, lr, weight_decay, momentum : as in SCAN
    n_epochs, batch_size : published 200 and 1000
    patience : epochs without a confident image after which it stops
    keep : better: the network before or after, by the label-free score; last: after, as published
    margin : share of log K by which the score after may be worse than before and is still kept: SCAN lowers that very
        score and self-labelling does not, so a tie speaks for the later one; 0 where a cluster was emptied
    n_selection_neighbors : neighbors of that score
    random_state : seed of order and views
    """

    views: Views = Views(kind="strong", size=32)
    threshold: float = 0.99
    balanced: bool = True
    ema: Literal["off", "write_back", "teacher"] = "off"
    ema_decay: float = 0.999
    weak_mode: Literal["batch", "running"] = "batch"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    momentum: float = 0.9
    n_epochs: int = 200
    batch_size: int = 1000
    patience: int = 3
    keep: Literal["better", "last"] = "better"
    margin: float = 0.02
    n_selection_neighbors: int = 5
    random_state: int = 0

    def fit(self, images: ImageSet, y: None = None, *, net: ClusterNet, neighbors: Neighbors | None = None,
            watched: tuple[ImageSet, Neighbors] | None = None, device: Device | None = None,
            folder: Path | None = None) -> "SelfLabel":
        """Refine ``net`` on ``images``; set ``net_``, ``labels_``, ``probabilities_``, ``kept_`` and ``history_``.

        Also ``scores_`` (before, after; lower is better), ``skipped_steps_``, ``stopped_`` (why it ended early, or
        None) and ``notices_``, sentences for a report.

        Parameters
        ----------
        net : a network with one head, from SCAN or another method; it is copied
        neighbors : of the images, for the label-free score; without them the last state is kept
        watched : a held-out split and its neighbors on which that score is taken instead
        folder : keeps a checkpoint from which the same call goes on

        Raises
        ------
        InputError
            An option out of its range, a network with several heads or without an encoder, or neighbors of another set.
        NonFiniteLossError
            The loss became NaN or infinite.
        """
        for fault in self._faults(images, net, neighbors, watched):
            raise fault
        device = device or choose_device("cpu")
        key = fingerprint(asdict(self), images.fingerprint, weights_fingerprint(net)) if folder else ""
        before, net = copy.deepcopy(net), copy.deepcopy(net)
        device.place(net).requires_grad_(True)
        teacher = copy.deepcopy(net) if self.ema != "off" else net
        optimizer = make_optimizer(self.optimizer, net.parameters(), device, lr=self.lr, momentum=self.momentum,
                                   weight_decay=self.weight_decay)
        pixels, weak = open_pixels(images, device.device), self.views.plain()
        order = Order(len(images), self.batch_size, self.random_state, device=device.device)
        counters: dict[str, Any] = {"counts": torch.zeros(2, dtype=torch.int64), "idle_epochs": 0}
        state: dict[str, Stateful] = {"net": net, "optimizer": optimizer}
        if teacher is not net:
            state["teacher"] = teacher
        source = teacher if self.ema == "teacher" else net
        weak_forward, forward = device.compiled(source), device.compiled(net)

        def advance(step: Step, batch: Tensor) -> None:
            source.train(self.weak_mode == "batch")
            with torch.no_grad(), device.autocast():  # a context of its own: a cast cached here would have no gradient
                weak_logits = weak_forward(step.view(weak, batch))[0]
            net.train()
            with device.autocast():
                strong_logits = forward(step.view(self.views, batch))[0]
            loss, n_confident = self_label_loss(step.gather(weak_logits.float()), step.gather(strong_logits.float()),
                                                threshold=self.threshold, balanced=self.balanced)
            moves = n_confident > 0
            step.log(confident=n_confident / len(step.indices))
            step.backward(loss, optimizer, only_if=moves)
            step.log(loss=loss, only_if=moves)
            counters["counts"].add_(torch.stack([n_confident, (~moves).long()]))
            self._average(net, teacher, moved=moves)

        run = Loop("refine", order, n_epochs=self.n_epochs, state=state, memory=counters,
                   folder=folder, seed=self.random_state, key=key, device=device, pixels=pixels)
        for step in run:
            counters["counts"] = counters["counts"].to(device.device)  # a checkpoint is read to the CPU
            step.run(advance, pixels.take(step.rows))
            if step.ends_epoch:
                used, skipped = counters["counts"].tolist()
                counters["idle_epochs"] = 0 if used else counters["idle_epochs"] + 1
                counters["counts"][0] = 0
                step.record(skipped_steps=skipped)
                if counters["idle_epochs"] >= self.patience:
                    run.stop(f"no image was confident above {self.threshold} for {self.patience} epochs")

        after = teacher if self.ema == "teacher" else net
        self.history_, self.skipped_steps_, self.stopped_ = run.history, int(counters["counts"][1]), run.stopped
        self._conclude(before, after, images, neighbors, watched, device)
        return self

    def predict_proba(self, images: ImageSet) -> np.ndarray:
        """Return the probabilities of new images, float32 (n_images, K)."""
        check_is_fitted(self)
        return _probabilities(self.net_, images, self.views, None)

    def predict(self, images: ImageSet) -> np.ndarray:
        """Return the cluster of new images, int64 (n_images,)."""
        return self.predict_proba(images).argmax(axis=1)

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least={"patience": 1, "n_selection_neighbors": 1, "batch_size": 2},
                          below_one=("threshold", "ema_decay"))

    def _faults(self, images: ImageSet, net: ClusterNet, neighbors: Neighbors | None,
                watched: tuple[ImageSet, Neighbors] | None) -> Iterator[InputError]:
        yield from self.option_faults()
        if len(images) < 2:
            yield InputError(f"self-labelling needs at least 2 images, got {len(images)}", "add images")
        if net.heads.n_heads != 1:
            yield InputError(f"self-labelling refines one head, got {net.heads.n_heads}", "pass net.only(head)")
        if isinstance(net.encoder, nn.Identity):
            yield InputError("self-labelling needs a network on images, this one takes embeddings",
                             "fit SCAN on images with encoder=..., and pass its net_")
        yield from neighbor_faults((images, neighbors), watched)

    @torch.no_grad()
    def _average(self, net: ClusterNet, teacher: ClusterNet, *, moved: Bool[Tensor, ""]) -> None:
        if self.ema == "off":
            return
        for average, value in zip(teacher.parameters(), net.parameters(), strict=True):
            average.lerp_(value, (1 - self.ema_decay) * moved.to(average.dtype))
        if self.ema == "write_back":  # buffers too: the authors' shadow never updates its own
            net.load_state_dict(teacher.state_dict())
        elif self.weak_mode == "running":  # a teacher that only runs in evaluation mode gathers no statistics itself
            for held, seen in zip(teacher.buffers(), net.buffers(), strict=True):
                held.copy_(seen)

    def _conclude(self, before: ClusterNet, after: ClusterNet, images: ImageSet, neighbors: Neighbors | None,
                  watched: tuple[ImageSet, Neighbors] | None, device: Device) -> None:
        nets = {"before": before, "after": after}
        found = {name: _probabilities(net, images, self.views, device) for name, net in nets.items()}
        self.scores_: dict[str, float] = {}
        shown, near = watched or (images, neighbors)
        if near is not None:
            rows = near.indices[:, : self.n_selection_neighbors]
            for name, net in nets.items():
                judged = found[name] if shown is images else _probabilities(net, shown, self.views, device)
                self.scores_[name] = neighbor_score(judged, rows)
        used = [len(np.unique(found[name].argmax(axis=1))) for name in nets]
        allowed = self.margin * math.log(max(2, before.heads.n_clusters)) if used[1] >= used[0] else 0.0
        worse = bool(self.scores_) and not self.scores_["after"] <= self.scores_["before"] + allowed
        self.kept_ = "before" if worse and self.keep == "better" else "after"
        self.net_, self.probabilities_ = nets[self.kept_].eval(), found[self.kept_]
        self.labels_ = self.probabilities_.argmax(axis=1)
        self.notices_ = self._notices(*used)

    def _notices(self, used_before: int, used_after: int) -> list[str]:
        notices = []
        if used_after < used_before:
            notices.append(f"self-labelling emptied {used_before - used_after} of {used_before} clusters")
            warnings.warn(notices[-1], CollapseWarning, stacklevel=4)
        if self.stopped_:
            notices.append(f"self-labelling stopped early: {self.stopped_}; a lower threshold may help")
            warnings.warn(notices[-1], PhylaWarning, stacklevel=4)
        if self.scores_:
            tie = self.kept_ == "after" and self.scores_["after"] > self.scores_["before"]
            why = "; within the margin" if tie and self.keep == "better" else ""
            notices.append(f"kept the network {self.kept_} self-labelling (neighbor score {self.scores_['before']:.4f} "
                           f"before, {self.scores_['after']:.4f} after; lower is better{why})")
            log.info("refine: %s", notices[-1])
        return notices


def _probabilities(net: ClusterNet, images: ImageSet, views: Views, device: Device | None) -> np.ndarray:
    return forward_all(images, net, net.probabilities, views.plain(), device=device)[:, 0].float().cpu().numpy()
