"""Consensus: what many cheap clusterings of the same embeddings agree on, as one classifier with honest confidence.

Cluster ensembles (Strehl and Ghosh 2002), voting after alignment (Dudoit and Fridlyand 2003), and a classifier trained
on what the members agree on. ICCE (2025) found the same on top of TEMI: many heads, one consensus, adaptive neighbors.

In: embeddings in one space or several, and members: assignments (n, K_m) by any methods, seeds and spaces. Without
members it makes its own: k-means of principal components of each space and of all, and of the graph of neighbors.
Out: ``labels_`` (n,), ``probabilities_`` (n, K) of one linear classifier, and how far the members agree.
No step sees a true label.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from phyla.ensembles import (
    Member,
    Table,
    adjusted_rand,
    agreed,
    cluster_stability,
    effective_counts,
    one_hot,
    pair_agreement,
    transported,
)
from phyla.errors import InputError
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterHeads, SpaceProjection
from phyla.principal import graph_coordinates, principal_axes, principal_rows
from phyla.quality import label_free_temperature, matching_temperature
from phyla.randomness import derive_seed, generator
from phyla.spaces import Space, scaled, spaces_of
from phyla.training.device import Device, choose_device
from phyla.training.options import faults, neighbor_faults
from phyla.types import SUM_TOLERANCE, Neighbors

Prior = Literal["estimated", "uniform"]
Calibration = Literal["agreement", "pairs", "neighbors", "none"]

_LEAST = {"n_clusters": 2, "n_restarts": 1, "n_components": 1, "n_neighbors": 1, "n_rounds": 1, "n_steps": 1,
          "stability_power": 0, "smoothing": 0, "hidden": 0, "weight_decay": 0}
_AXES = 256  # principal axes in which the classifier is trained: its weights are those of all features
_ROWS = 1 << 14  # rows classified at once
_BATCH = 1 << 14  # rows of a step
_LEAST_NEAR = 3  # neighbors before a fall in similarity is looked for
_NEAR, _COORDINATES, _PLAIN = (10, 20, 50), (1.5, 2, 3), 4  # of the members it makes itself
_COLLAPSED, _FAR = 0.5, 0.5  # of n_clusters in use, and of the median stability: with less a member has no weight




@dataclass(frozen=True, eq=False)
class Near:
    """Images that lie near each image: ``indices`` int64 (n_images, k) and ``counts``, 1 where one counts, else 0."""

    indices: np.ndarray
    counts: np.ndarray


def near_images(neighbors: Neighbors) -> Near:
    """Return the neighbors that name one another, up to where the similarity of a row falls most.

    The fall is sought from the third neighbor on, so that a pair of near duplicates is no neighborhood of its own.
    """
    n_images, n_neighbors = neighbors.indices.shape
    own = np.repeat(np.arange(n_images), n_neighbors)
    there, back = own * n_images + neighbors.indices.ravel(), neighbors.indices.ravel() * n_images + own
    mutual = np.isin(back, there).reshape(n_images, n_neighbors)
    if n_neighbors > _LEAST_NEAR:
        falls = neighbors.similarities[:, :-1] - neighbors.similarities[:, 1:]
        last = falls[:, _LEAST_NEAR - 1 :].argmax(axis=1) + _LEAST_NEAR - 1
        mutual &= np.arange(n_neighbors) <= last[:, None]
    return Near(neighbors.indices, mutual.astype(np.float32))


def smoothed(votes: Table, near: Near, *, share: float) -> Table:
    """Return (1 - share) of each row of ``votes`` and ``share`` of the mean over its near images; alone, its own."""
    found, counts = torch.zeros_like(votes), torch.from_numpy(near.counts).to(votes)
    for column, which in enumerate(torch.from_numpy(near.indices).to(votes.device).T):
        found += counts[:, column, None] * votes[which]
    n_near = counts.sum(dim=1, keepdim=True)
    return torch.where(n_near > 0, (1 - share) * votes + share * found / n_near.clamp(min=1), votes)


def mean_likeness(likeness: Float[Tensor, "members members"]) -> np.ndarray:
    """Return each member's mean adjusted Rand index with the others, float64; 1 where there is no other."""
    if len(likeness) == 1:
        return np.ones(1)
    return ((likeness.sum(dim=1) - likeness.diagonal()) / (len(likeness) - 1)).numpy()


def unusable(counts: np.ndarray, scores: np.ndarray, n_clusters: int) -> Iterator[tuple[int, str]]:
    """Yield the place of each member that is to have no weight, and why: collapsed, or like none of the others.

    Parameters
    ----------
    counts : effective clusters of each member
    scores : its mean likeness to the others
    """
    typical = float(np.median(scores))
    for place, (count, score) in enumerate(zip(counts, scores, strict=True)):
        if count < _COLLAPSED * n_clusters:
            yield place, f"collapsed to {count:.1f} clusters of {n_clusters}"
        elif score < _FAR * typical:
            yield place, f"it agrees with the others to {score:.2f}, where {typical:.2f} is usual"


def most_sure(targets: Table, share: float) -> Float[Tensor, " images"]:
    """Return how much each image counts in training: its largest target; 0 but for the surest ``share`` of each."""
    sure, labels = targets.max(dim=1)
    if share >= 1:
        return sure
    order = torch.argsort(sure, descending=True, stable=True)
    order = order[torch.argsort(labels[order], stable=True)]  # clusters in turn, the surest first
    sizes = torch.bincount(labels, minlength=targets.shape[1])
    rank = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    kept = rank < (share * sizes[labels[order]]).ceil()
    return sure * torch.zeros_like(sure).scatter_(0, order, kept.to(sure))


def train(net: nn.Module, rows: Float[Tensor, "images features"], labels: Int[Tensor, " images"],
          trust: Float[Tensor, " images"], *, n_steps: int, lr: float, weight_decay: float, draw: torch.Generator
          ) -> None:
    """Fit a softmax classifier to ``labels``, each image counting by its ``trust``; the net is changed in place.

    The loss is the trusted mean of the cross-entropy plus weight_decay / (2 n_images) times the squared weights.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr)
    decay, n_images = weight_decay / len(rows), len(rows)
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / n_steps))
        some = None if n_images <= _BATCH else torch.randint(n_images, (_BATCH,), generator=draw).to(rows.device)
        x, y, t = (rows, labels, trust) if some is None else (rows[some], labels[some], trust[some])
        each = nn.functional.cross_entropy(net(x), y, reduction="none")
        squared = sum(weight.square().sum() for weight in net.parameters() if weight.ndim == 2)
        loss = (each * t).sum() / t.sum().clamp(min=1e-12) + decay / 2 * squared
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def own_members(spaces: Sequence[np.ndarray], *, n_clusters: int, n_restarts: int, n_components: int, seed: int,
                device: Device) -> list[np.ndarray]:
    """Return labels (n_images,) of many cheap clusterings: k-means from each start, in each table of coordinates.

    The tables of each space, and of all together: ``n_components`` half-whitened principal components, and coordinates
    in the graphs of 10, 20 and 50 neighbors, 1.5, 2 and 3 for each cluster.
    """
    found, n_images = list[np.ndarray](), len(spaces[0])
    views: list[Space] = [*spaces, list(spaces)] if len(spaces) > 1 else list(spaces)
    for place, view in enumerate(views):
        rows = scaled(view, center=True)
        tables = [principal_rows(rows, n_components)]
        near = find_neighbors(principal_rows(rows, 2 * n_components, whiten=0), min(_NEAR[-1], n_images - 1),
                              device=device.device, title="")
        for n_near in sorted({min(each, near.n_neighbors) for each in _NEAR}):
            widths = sorted({min(int(each * n_clusters), n_images - 1) for each in _COORDINATES})
            coordinates = graph_coordinates(near, widths[-1], n_neighbors=n_near)
            tables += [scaled(coordinates[:, :width]) for width in widths]
        for number, table in enumerate(tables):
            for restart in range(n_restarts * (_PLAIN if number == 0 else 1)):
                chosen = derive_seed(seed, "consensus member", place, number, restart) % 2**31
                found.append(_kmeans(table, n_clusters, chosen))
    return found


def _kmeans(table: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    with warnings.catch_warnings():  # of fewer distinct points than clusters
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        return KMeans(n_clusters, n_init=1, max_iter=50, random_state=seed).fit(table).labels_


def _table(member: np.ndarray, n_images: int, place: int) -> Member:
    """Return a member as a table of probabilities, checked."""
    given = np.asarray(member)
    if given.shape[:1] != (n_images,) or given.ndim not in (1, 2) or 0 in given.shape:
        raise InputError(f"member {place} must be labels ({n_images},) or probabilities ({n_images}, n_clusters), got "
                         f"{given.shape}", "give members of the same images")
    if given.ndim == 1:
        if given.dtype.kind not in "iu" or given.min() < 0:
            raise InputError(f"labels of member {place} must be whole numbers from 0", "number its clusters")
        return one_hot(torch.from_numpy(given.astype(np.int64)), int(given.max()) + 1, like=torch.zeros(()))
    table = torch.from_numpy(np.require(given, np.float32, "W"))
    if not bool(torch.isfinite(table).all()) or bool((table < 0).any()) or not torch.allclose(
            table.sum(dim=1), torch.ones(n_images), atol=SUM_TOLERANCE):
        raise InputError(f"rows of member {place} must be probabilities that sum to 1", "apply a softmax first")
    return table


def _classifier(n_features: int, n_clusters: int, hidden: int, draw: torch.Generator) -> nn.Sequential:
    """Return a linear classifier of weights 0, or one with a hidden layer, whose second layer starts at 0."""
    last = nn.Linear(hidden or n_features, n_clusters)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if not hidden:
        return nn.Sequential(last)
    first = nn.Linear(n_features, hidden)
    nn.init.trunc_normal_(first.weight, std=n_features**-0.5, generator=draw)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.GELU(), last)


def _folded(net: nn.Sequential, widths: Sequence[int], spaces: Sequence[np.ndarray], axes: Tensor
            ) -> tuple[SpaceProjection, ClusterHeads]:
    """Return the classifier of principal components as one of raw features: projection and head, on the CPU."""
    linear = [layer for layer in net.float().cpu() if isinstance(layer, nn.Linear)]
    first, last, deep = linear[0], linear[-1], len(linear) > 1
    projection = SpaceProjection(widths, hidden=(len(first.weight),) * 2 if deep else ())
    outer = [layer for layer in projection.layers if isinstance(layer, nn.Linear)]
    projection.shift.copy_(torch.from_numpy(np.concatenate([space.mean(axis=0) for space in spaces])))
    head = ClusterHeads(projection.n_out, len(last.weight))
    with torch.no_grad():
        if deep:
            outer[0].weight.copy_(first.weight @ axes.T)
            outer[0].bias.copy_(first.bias)
            outer[1].weight.copy_(torch.eye(len(first.weight)))  # what follows the last activation
            outer[1].bias.zero_()
        head.weight.copy_((last.weight if deep else last.weight @ axes.T)[None])
        head.bias.copy_(last.bias[None])
    return projection, head


@dataclass(kw_only=True, repr=False, eq=False)
class Consensus(ClusterMixin, BaseEstimator):
    """Bring many assignments into one, and train one classifier on what they agree on.

    Parameters
    ----------
    n_clusters : at least 2; members may have other numbers of clusters, where at least one has this
    prior : estimated: sizes are what the members find; uniform: equal sizes are imposed (optimal transport)
    stability_power : a member's weight is its mean agreement with the others, to this power; 0 weighs all alike
    adaptive : average each image's votes with those of its near images: neighbors that name one another, cut where
        similarity falls most
    smoothing : the share of the near images in that average, 0 to 1
    confident_share : of the images, those that the members agree on most teach the first round
    n_rounds : of training; each after the first learns from the classifier's own sharpened answers, too
    n_steps : of Adam in each round
    lr, weight_decay : of Adam; of the squared weights, in the sum over all images
    hidden : features of a hidden layer of the classifier; 0: it is linear
    calibration : pairs: mean confidence is how far two members agree with each other; agreement: how far they agree
        with the result, of which each is a part; neighbors: the share of images that their neighbors support; none: as
        trained
    n_restarts, n_components, n_neighbors : of the members it makes itself: k-means starts in each space, principal
        components, and neighbors in the graph
    random_state : seed; None draws one

    Attributes
    ----------
    labels_ : int64 (n_images,)
    probabilities_ : float32 (n_images, n_clusters), of the classifier, temperature included
    member_scores_ : float64 (n_members,): each member's mean adjusted Rand index with the others
    weights_ : float64 (n_members,), summing to 1; 0 for a member left out
    aligned_ : int64 (n_members, n_images): members' labels in the numbering of ``labels_``
    agreement_ : float32 (n_images,): the share of the members, by weight, that give the image its label
    stability_ : float64 (n_clusters,): how far each cluster is the same images in every member, 0 to 1
    expected_accuracy_ : what the members' agreement lets expect
    temperature_ : that the logits were divided by
    notices_ : what a person should know, a line each

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.repeat(np.eye(3), 10, axis=0) + np.arange(90).reshape(30, 3) % 7 / 50
    >>> labels = Consensus(n_clusters=3, n_restarts=2, n_neighbors=5).fit_predict(rows)
    >>> len(set(labels[:10])), len(set(labels))
    (1, 3)
    """

    n_clusters: int = 10
    prior: Prior = "estimated"
    stability_power: float = 2.0
    adaptive: bool = True
    smoothing: float = 0.5
    confident_share: float = 0.8
    n_rounds: int = 2
    n_steps: int = 150
    lr: float = 0.02
    weight_decay: float = 1.0
    hidden: int = 0
    calibration: Calibration = "pairs"
    n_restarts: int = 1
    n_components: int = 64
    n_neighbors: int = 20
    random_state: int | None = 0

    def fit(self, embeddings: Space, y: None = None, *, members: Sequence[np.ndarray] | None = None,
            member_scores: Sequence[float] | None = None, neighbors: Neighbors | None = None,
            device: Device | None = None) -> "Consensus":
        """Find the consensus of ``members`` and train the classifier on ``embeddings``.

        Parameters
        ----------
        embeddings : n_images rows, in one space or several
        members : probabilities (n_images, K_m) or labels (n_images,) each; None makes some from the embeddings
        member_scores : how good each member is by a label-free score, at least 0: a factor of its weight
        neighbors : of the same images; None finds them where they are used

        Raises
        ------
        InputError
            An option out of its range, more clusters than images, members of other images, or none that can be used.
        """
        spaces = spaces_of(embeddings)
        for fault in [*self.option_faults(), *self._faults(spaces, neighbors)]:
            raise fault
        device = device or choose_device("cpu")
        self.notices_: list[str] = []
        self.widths_ = tuple(space.shape[1] for space in spaces)
        self.n_features_in_ = sum(self.widths_)
        seed = int(np.random.default_rng().integers(2**31)) if self.random_state is None else self.random_state
        rows = scaled(spaces, center=True)
        if neighbors is None and (self.adaptive or self.calibration == "neighbors"):
            neighbors = find_neighbors(rows, min(self.n_neighbors, len(rows) - 1), device=device.device, title="")
        given = own_members(spaces, n_clusters=self.n_clusters, n_restarts=self.n_restarts, device=device,
                            n_components=self.n_components, seed=seed) if members is None else members
        tables = [_table(member, len(rows), place).to(device.device) for place, member in enumerate(given)]
        if not tables:
            raise InputError("there are no members", "give some, or None to have them made")
        votes = self._vote(tables, member_scores)
        near = near_images(neighbors) if self.adaptive and neighbors is not None else None
        targets = votes if near is None else smoothed(votes, near, share=self.smoothing)
        self._learn(spaces, rows, targets, near, seed, device)
        self._judge(spaces, neighbors)
        return self

    def predict(self, embeddings: Space) -> np.ndarray:
        """Return the most probable cluster of each row, int64 (n_images,)."""
        return self.predict_proba(embeddings).argmax(axis=1).astype(np.int64)

    def predict_proba(self, embeddings: Space) -> np.ndarray:
        """Return the probability of each cluster for each row, float32 (n_images, n_clusters)."""
        check_is_fitted(self)
        spaces = spaces_of(embeddings)
        n_features = sum(space.shape[1] for space in spaces)
        if n_features != self.n_features_in_:
            raise InputError(f"embeddings of {n_features} features do not fit a classifier of {self.n_features_in_}",
                             "embed both with the same encoders")
        return self._logits(spaces).softmax(dim=1).numpy()

    def as_parts(self) -> tuple[SpaceProjection, ClusterHeads]:
        """Return what maps raw embeddings, spaces beside one another, to the probabilities: projection and one head."""
        check_is_fitted(self)
        return self._projection, self._head

    def option_faults(self) -> Iterator[InputError]:
        """Yield what is wrong with the options by themselves, an error each: what can be told before any work."""
        yield from faults(self, least=_LEAST)
        for name, least in (("smoothing", 0.0), ("confident_share", 0.01)):
            if not least <= getattr(self, name) <= 1:
                yield InputError(f"{name} must be {least} to 1, got {getattr(self, name)}")

    def _faults(self, spaces: Sequence[np.ndarray], neighbors: Neighbors | None) -> Iterator[InputError]:
        n_images = len(spaces[0])
        if self.n_clusters >= n_images:
            yield InputError(f"n_clusters={self.n_clusters} needs more than {self.n_clusters} images, got {n_images}",
                             "lower n_clusters or add images")
        yield from neighbor_faults((spaces[0], neighbors))

    def _vote(self, tables: Sequence[Member], scores: Sequence[float] | None) -> Table:
        """Score, weigh and align the members; return the mean of their votes."""
        likeness = adjusted_rand(tables)
        self.member_scores_ = mean_likeness(likeness)
        given = np.ones(len(tables)) if scores is None else np.asarray(scores, np.float64)
        if given.shape != (len(tables),) or not (given >= 0).all():
            raise InputError(f"{len(tables)} members need as many scores of at least 0, got {given.tolist()[:20]}")
        left_out = dict(unusable(effective_counts(tables).numpy(), self.member_scores_, self.n_clusters))
        self.notices_ += [f"member {place} left out: {why}" for place, why in left_out.items()]
        weights = given * np.maximum(self.member_scores_, 0) ** self.stability_power
        weights[list(left_out)] = 0
        if not weights.any() and len(left_out) < len(tables):
            weights = np.array([place not in left_out for place in range(len(tables))], np.float64)
            self.notices_.append("no member scores above 0: all of them weigh alike")
        fitting = [place for place, table in enumerate(tables)
                   if table.shape[1] == self.n_clusters and weights[place] > 0]
        if not fitting:
            raise InputError(f"no member with {self.n_clusters} clusters can be used: " + ("; ".join(self.notices_) or
                             f"they have {sorted({table.shape[1] for table in tables})}"),
                             "add members with as many clusters as are wanted")
        self.weights_ = weights / weights.sum()
        used = torch.from_numpy(self.weights_).to(tables[0])
        best = max(fitting, key=lambda place: self.weights_[place])
        votes, maps = agreed(tables, used, start=tables[best])
        self._aligned = [(table @ each).argmax(dim=1) for table, each in zip(tables, maps, strict=True)]
        return votes

    def _learn(self, spaces: Sequence[np.ndarray], rows: np.ndarray, votes: Table, near: Near | None, seed: int,
               device: Device) -> None:
        """Train the classifier on the votes, and again on what it and they say together."""
        axes = principal_axes(rows, _AXES)
        known = torch.from_numpy(rows @ axes).to(device.device)
        stretch = 1 / float(known.square().mean().sqrt().clamp(min=1e-12))
        known *= stretch
        net = _classifier(known.shape[1], self.n_clusters, self.hidden, generator(seed, "consensus head")).to(known)
        targets = self._balanced(votes)
        for turn in range(self.n_rounds):
            trust = most_sure(targets, self.confident_share if turn == 0 else 1.0)
            train(net, known, targets.argmax(dim=1), trust, n_steps=self.n_steps, lr=self.lr,
                  weight_decay=self.weight_decay, draw=generator(seed, "consensus rows", turn))
            if turn + 1 < self.n_rounds:
                with torch.no_grad():
                    both = (votes + net(known).softmax(dim=1)) / 2
                targets = self._balanced(both if near is None else smoothed(both, near, share=self.smoothing))
        self._projection, self._head = _folded(net, self.widths_, spaces, torch.from_numpy(axes) * stretch)

    def _balanced(self, targets: Table) -> Table:
        even = torch.full_like(targets[0], 1 / self.n_clusters)
        return transported(targets, even) if self.prior == "uniform" else targets

    def _judge(self, spaces: Sequence[np.ndarray], neighbors: Neighbors | None) -> None:
        """Set the temperature, and say how far the members agree with the classifier."""
        logits = self._logits(spaces)
        labels = logits.argmax(dim=1)
        others = [each.cpu() for each in self._aligned]
        used = torch.from_numpy(self.weights_)
        self.aligned_ = torch.stack(others).numpy()
        self.agreement_ = (used @ (torch.stack(others) == labels).double()).float().numpy()
        self.stability_ = cluster_stability(labels, others, used, self.n_clusters).numpy()
        agreed_on = pair_agreement(others, used, self.n_clusters) if self.calibration == "pairs" else self.agreement_
        self.expected_accuracy_ = float(agreed_on.mean())
        if self.calibration in ("agreement", "pairs"):
            self.temperature_ = matching_temperature(logits, min(self.expected_accuracy_, 1 - 0.5 / len(labels)))
        elif self.calibration == "neighbors" and neighbors is not None:
            self.temperature_ = label_free_temperature(logits, neighbors)
        else:
            self.temperature_ = 1.0
        with torch.no_grad():
            for parameter in self._head.parameters():
                parameter.div_(self.temperature_)
        self.labels_ = labels.numpy()
        self.probabilities_ = (logits / self.temperature_).softmax(dim=1).numpy()

    def _logits(self, spaces: Sequence[np.ndarray]) -> Float[Tensor, "images clusters"]:
        found = []
        with torch.no_grad():
            for start in range(0, len(spaces[0]), _ROWS):
                part = np.concatenate([space[start : start + _ROWS] for space in spaces], axis=1)
                found.append(self._head(self._projection(torch.from_numpy(part).float()))[0])
        return torch.cat(found)
