"""How each method is fitted on what earlier stages left, and what it leaves in its own stage's folder.

The runner asks for a stage; here stands, method by method, what it is given. A new method is one function and one line
in a table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from phyla.classifier import Classifier
from phyla.cluster.kmeans import KMeans
from phyla.cluster.nnm import NNM
from phyla.cluster.scan import SCAN, Watched
from phyla.cluster.temi import TEMI
from phyla.cluster.tsuc import TSUC
from phyla.cluster.turtle import TURTLE
from phyla.counting import ClassCount
from phyla.embed import forward_all
from phyla.errors import InputError
from phyla.images.augment import Views
from phyla.index import Indexed, choose_index, find_through_index
from phyla.members import Members
from phyla.mergetree import merge_tree
from phyla.neighbors import find_neighbors
from phyla.nets.heads import ClusterNet, Projection
from phyla.pipeline import Clusterer, Layer, NeighborOptions, Pretrainer, Refiner
from phyla.pretrain.simclr import SimCLR
from phyla.reciprocal import rerank
from phyla.refine.consensus import Consensus
from phyla.refine.ruc import RUC
from phyla.refine.selflabel import SelfLabel
from phyla.report.making import MemberRow
from phyla.rundir import (
    Stage,
    load_assignment,
    load_embeddings,
    load_encoder,
    save_assignment,
    save_embeddings,
    save_encoder,
    save_records,
)
from phyla.spaces import scaled
from phyla.storage import read_array, read_json, write_array, write_json
from phyla.training.device import Device
from phyla.types import Assignment, Embeddings, ImageSet, Neighbors
from phyla.zoo import PublishedClusters

Splits = Sequence[tuple[str, ImageSet]]
"""Name and images of each split, the clustered one first."""

_MEMORY = "memory"
MEMBERS, ROWS, AGREEMENT, TREE = "members.npy", "members.json", "agreement.npy", "tree.npz"
COUNT = "count.json"
_MEMBER_TITLES = {"kmeans": "k-means", "spherical": "spherical k-means", "temi": "TEMI", "turtle": "TURTLE",
                  "scan": "SCAN", "nnm": "NNM"}

_PROJECTED = 1 << 14  # embeddings projected at once


@dataclass(frozen=True, eq=False)
class Given:
    """What a cluster or refine method may take; embeddings and neighbors of a split are read when asked for.

    Parameters
    ----------
    splits : the images, those that are clustered first
    pretrained : folder of the encoder
    layer : which embeddings stand for an image: projection or encoder
    is_frozen : cluster the embeddings instead of the images: nothing trains the encoder
    watched : held-out images on which a label-free score is taken, and their neighbors; None: the clustered ones
    """

    splits: Splits
    pretrained: Path
    layer: Layer
    embeddings: Callable[[str], Embeddings]
    neighbors: Callable[[str], Neighbors]
    watched: tuple[ImageSet, Neighbors] | None
    device: Device
    folder: Path
    is_frozen: bool = False

    @property
    def images(self) -> ImageSet:
        """The images that are clustered."""
        return self.splits[0][1]


@dataclass(frozen=True, eq=False)
class Rivals:
    """Labels, int64 (n, n_images), by each of a method's heads or networks.

    Parameters
    ----------
    kind : heads or networks
    fitted : of the clustered images, known from the fit
    predict : of any other images
    """

    kind: str
    fitted: np.ndarray
    predict: Callable[[ImageSet], np.ndarray]


@dataclass(frozen=True, eq=False)
class Found:
    """What a cluster or refine method left.

    Parameters
    ----------
    net : encoder and one head
    views : their plain form is what ``net`` is shown
    probabilities : float32 (n_images, n_clusters) of the clustered images
    history : records of training
    facts : numbers and notices for done.json
    rivals : labels by each head or network
    of_embeddings : the encoder stayed as it was, so that other images are predicted from their embeddings
    members : probabilities float16 (n_members, n_images, n_clusters) by each of many clusterings
    agreement : float32 (n_images,), how far those agree on each image
    epoch_labels : for a method that published its best epoch by labels, the labels after every epoch (n_epochs, n) of
        the images on which it chose without, and the name of their split
    """

    net: ClusterNet
    views: Views
    probabilities: np.ndarray
    history: Sequence[Mapping[str, object]] = ()
    facts: dict[str, object] = field(default_factory=dict)
    rivals: Rivals | None = None
    epoch_labels: tuple[np.ndarray, str] | None = None
    of_embeddings: bool = False
    members: np.ndarray | None = None
    agreement: np.ndarray | None = None


# ── pretrain ────────────────────────────────────────────────────────────────────────────────────────────────────────


def pretrain(method: Pretrainer, images: ImageSet, *, device: Device, folder: Path) -> dict[str, object]:
    """Fit ``method``, leave encoder, records and, where it has one, memory in ``folder``, and return facts."""
    method.fit(images, device=device, folder=folder)
    save_encoder(folder, method.encoder_, method.projection_)
    save_records(folder / "metrics.jsonl", method.history_)
    memory = None if isinstance(method, SimCLR) else method.memory_
    if memory is not None:
        save_embeddings(folder, memory, _MEMORY)
    about = getattr(method, "about", "")
    return {"n_images": len(images)} | ({"notices": [f"encoder: {about}"]} if about else {})


def load_memory(folder: Path) -> Embeddings | None:
    """Return the memory bank that pretraining left in ``folder``; None where the method has none."""
    return load_embeddings(folder, _MEMORY) if (folder / f"{_MEMORY}.npy").exists() else None


def project(folder: Path, embeddings: Embeddings, layer: Layer) -> Embeddings:
    """Return the projections of ``embeddings`` of ``layer``: what a memory bank holds."""
    if layer == "projection":
        return embeddings
    projection = _required(load_encoder(folder)[1])
    with torch.no_grad():
        rows = [projection(torch.from_numpy(part)).numpy() for part in np.split(
            embeddings.values, range(_PROJECTED, len(embeddings.ids), _PROJECTED))]
    return Embeddings(np.concatenate(rows), embeddings.ids)


def embedder(folder: Path, layer: Layer) -> nn.Module:
    """Return the network whose output stands for an image: the encoder, with its projection if that is the layer."""
    encoder, projection = load_encoder(folder)
    return encoder if layer == "encoder" else nn.Sequential(encoder, _required(projection))


def _required(projection: Projection | None) -> Projection:
    if projection is None:
        raise InputError("this encoder has no projection", "--set embed.layer=encoder")
    return projection


def find(embeddings: Embeddings, n_neighbors: int, options: NeighborOptions, *,
         device: torch.device) -> tuple[Neighbors, Indexed | None]:
    """Return the neighbors of ``embeddings``, as ``options`` say, and how good they are if an index found them.

    Of several encoders, each has the same say: the similarity is the mean of their cosines.
    """
    if len(embeddings.widths) > 1:
        embeddings = Embeddings(scaled(embeddings), embeddings.ids)
    if options.rerank:
        return rerank(embeddings, n_neighbors, k1=options.k1, k2=options.k2, device=device), None
    if choose_index(options.index, len(embeddings)) == "exact":
        return find_neighbors(embeddings, n_neighbors, device=device), None
    found = find_through_index(embeddings, n_neighbors, recall=options.recall, device=device)
    return found.neighbors, found


# ── cluster ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _scan(method: SCAN, given: Given) -> Found:
    encoder, _ = load_encoder(given.pretrained)
    method.fit(given.images, neighbors=given.neighbors("train"), encoder=encoder, device=given.device,
               watched=Watched(*given.watched) if given.watched else None, folder=given.folder)
    notice = (f"clusters: kept epoch {method.epoch_} of {method.n_epochs}, head {method.head_ + 1} of "
              f"{method.n_heads} (lowest neighbor score, {method.score_:.4f})")
    facts = {"score": method.score_, "head": method.head_, "epoch": method.epoch_, "notices": [notice]}
    return Found(method.net_, method.views, method.probabilities_, method.history_, facts)


def _nnm(method: NNM, given: Given) -> Found:
    encoder, _ = load_encoder(given.pretrained)
    method.fit(given.images, neighbors=given.neighbors("train"), encoder=encoder, device=given.device,
               watched=given.watched, folder=given.folder)
    notice = (f"clusters: kept epoch {method.epoch_} of {method.n_epochs}, head {method.head_ + 1} of "
              f"{method.n_heads} (lowest label-free score, {method.score_:.4f})")
    facts = {"score": method.score_, "head": method.head_, "epoch": method.epoch_, "notices": [notice]}
    return Found(method.net_, method.views, method.probabilities_, method.history_, facts,
                 epoch_labels=(method.epoch_labels_, "held_out" if given.watched else "train"))


def _tsuc(method: TSUC, given: Given) -> Found:
    encoder, projection = load_encoder(given.pretrained)
    method.fit(given.images, encoder=encoder, projection=projection, device=given.device, folder=given.folder)
    losses = ", ".join(f"{loss:.3f}" for loss in method.head_losses_)
    notice = (f"clusters: kept epoch {method.epoch_} of {method.n_epochs}, head {method.head_ + 1} of "
              f"{method.n_heads} (lowest assignment loss; the heads' are {losses})")
    facts = {"score": method.score_, "head": method.head_, "epoch": method.epoch_,
             "head_losses": [float(loss) for loss in method.head_losses_], "notices": [notice]}
    return Found(method.net_, method.views, method.probabilities_, method.history_, facts,
                 Rivals("heads", method.head_labels_, partial(method.predict_heads, device=given.device)))


def _published(method: PublishedClusters, given: Given) -> Found:
    method.fit(given.images, neighbors=given.neighbors("train"), device=given.device)
    rivals = None
    if method.head_labels_ is not None:
        rivals = Rivals("heads", method.head_labels_, partial(method.predict_heads, device=given.device))
    facts: dict[str, object] = {"head": method.head_, "notices": [f"clusters: {line}" for line in method.notices_]}
    return Found(method.net_, method.views, method.probabilities_, facts=facts, rivals=rivals)


def _kmeans(method: KMeans, given: Given, views: Views) -> Found:
    method.fit(given.embeddings("train"))
    encoder, projection = load_encoder(given.pretrained)
    seen = _required(projection) if given.layer == "projection" else None
    if seen is None and method.normalize:
        n_features = encoder.spec.n_features
        seen = Projection(n_features, n_features, n_layers=0)
    net = given.device.place(ClusterNet(encoder, method.as_linear(), seen)).eval()
    notice = f"clusters: k-means of the embeddings, the best of {method.n_init} starts by its own objective"
    facts: dict[str, object] = {"inertia": method.inertia_, "notices": [notice]}
    return Found(net, views, method.probabilities_, facts=facts)


def _embedded(method: KMeans | TEMI | TURTLE | SCAN | NNM | Members, given: Given, views: Views) -> Found:
    """Fit ``method`` on the embeddings of a frozen encoder."""
    embeddings = given.embeddings("train")
    if isinstance(method, KMeans):
        method.fit(embeddings)
    elif isinstance(method, TEMI | SCAN | NNM | Members):
        method.fit(embeddings, neighbors=given.neighbors("train"), device=given.device.alone)
    else:
        method.fit(embeddings, device=given.device.alone)
    notices = [f"clusters: {line}" for line in getattr(method, "notices_", ())]
    facts: dict[str, object] = {"notices": notices}
    members = None
    if isinstance(method, Members):
        members = method.members_
        write_json(given.folder / ROWS, {"members": method.rows_})
    return Found(_shipped(method, given), views, method.probabilities_, getattr(method, "history_", ()), facts,
                 of_embeddings=True, members=members)


def _shipped(method: KMeans | TEMI | TURTLE | SCAN | NNM | Members | Consensus, given: Given) -> ClusterNet:
    """Return the encoder with what ``method`` found on its embeddings, as one network."""
    encoder, _ = load_encoder(given.pretrained)
    projection, heads = method.as_parts()
    return given.device.place(ClusterNet(encoder, heads, projection)).eval()


def cluster(method: Clusterer, given: Given, *, views: Views) -> Found:
    """Fit ``method`` and return what it found; ``views`` are those of pretraining, for methods that have none."""
    if given.is_frozen and not isinstance(method, TSUC):
        return _embedded(method, given, views)
    match method:
        case SCAN():
            return _scan(method, given)
        case NNM():
            return _nnm(method, given)
        case TSUC():
            return _tsuc(method, given)
        case KMeans():
            return _kmeans(method, given, views)
        case PublishedClusters():
            return _published(method, given)
        case TEMI() | TURTLE() | Members():
            return _embedded(method, given, views)


CLUSTERS_FROM: Mapping[str, tuple[str, ...]] = {"SCAN": ("pretrain", "neighbors"), "NNM": ("pretrain", "neighbors"),
                                                "TSUC": ("pretrain",), "KMeans": ("pretrain", "embed"),
                                                "TEMI": ("embed", "neighbors"), "TURTLE": ("embed",),
                                                "Members": ("embed", "neighbors"),
                                                "PublishedClusters": ("pretrain", "neighbors")}
"""The stages whose results a cluster method takes: it is made anew when one of them is."""


# ── refine ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def refine(method: Refiner, given: Given, clustered: Path) -> Found:
    """Fit ``method`` on what is in the folder ``clustered``, a network or members, and return what it found."""
    if isinstance(method, Consensus):
        return _consensus(method, given, clustered)
    before = Classifier.load(clustered)
    if isinstance(method, SelfLabel):
        method.fit(given.images, net=before.net, neighbors=given.neighbors("train"), watched=given.watched,
                   device=given.device, folder=given.folder)
        facts: dict[str, object] = {"kept": method.kept_, "skipped_steps": method.skipped_steps_}
        members = None
    else:
        method.fit(given.images, net=before.net, embeddings=given.embeddings("train"),
                   neighbors=given.neighbors("train"), watched=given.watched, device=given.device, folder=given.folder)
        facts = {"temperature": method.temperature_, "clean": [int(method.initial_clean_.sum()),
                                                               int(method.clean_.sum())]}
        members = Rivals("networks", method.member_labels_, partial(_members, method, given.device))
    facts |= {"scores": method.scores_, "notices": method.notices_}
    return Found(method.net_, method.views, method.probabilities_, method.history_, facts, members)


def _consensus(method: Consensus, given: Given, clustered: Path) -> Found:
    members = read_array(clustered / MEMBERS)
    scores = [max(0.0, row["score"]) for row in read_json(clustered / ROWS)["members"]]
    method = replace(method, n_clusters=members.shape[2])
    method.fit(given.embeddings("train"), members=[each.astype(np.float32) for each in members], member_scores=scores,
               neighbors=given.neighbors("train"), device=given.device.alone)
    views = Classifier.load(clustered).views
    told = {"weights": method.weights_.tolist(), "scores": method.member_scores_.tolist(),
            "agrees": (method.aligned_ == method.labels_).mean(axis=1).tolist(),
            "stability": method.stability_.tolist(), "temperature": method.temperature_,
            "notices": [f"consensus: {line}" for line in method.notices_]}
    return Found(_shipped(method, given), views, method.probabilities_, facts=told, of_embeddings=True,
                 agreement=method.agreement_)


def cut(n_clusters: int, given: Given, before: Path) -> Found:
    """Merge or split the classes of the result in ``before``, leave the tree by which, and return what comes out."""
    classifier, assigned = Classifier.load(before), load_assignment(before, "train")
    net = classifier.net
    if given.is_frozen:
        rows = net.seen(given.embeddings("train").values)
    else:
        rows = forward_all(given.images, net, net.embed, classifier.views, device=given.device).float().cpu().numpy()
    tree = merge_tree(assigned, rows, device=given.device.alone)
    tree.save(given.folder / TREE)
    net = ClusterNet(net.encoder, tree.heads(net.heads, n_clusters), net.projection)
    with torch.no_grad():
        found = [net.heads.probabilities(torch.from_numpy(part).to(net.heads.weight.device))[:, 0].float().cpu().numpy()
                 for part in np.split(rows, range(_PROJECTED, len(rows), _PROJECTED))]
    notice = f"cut: {tree.n_clusters} classes became {n_clusters}; 1 to {tree.n_leaves} are possible"
    return Found(net.eval(), classifier.views, np.concatenate(found), facts={"notices": [notice]},
                 of_embeddings=given.is_frozen)


def _members(method: RUC, device: Device, images: ImageSet) -> np.ndarray:
    """Return the labels of each of the two networks alone, int64 (2, n_images)."""
    found = [forward_all(images, net, net.probabilities, method.views.plain(), device=device)[:, 0].argmax(dim=1)
             for net in method.nets_]
    return torch.stack(found).cpu().numpy()


# ── what both leave ─────────────────────────────────────────────────────────────────────────────────────────────────


def save_found(found: Found, splits: Splits, *, size: int, device: Device, folder: Path, about: dict[str, Any],
               embeddings: Callable[[str], Embeddings]) -> None:
    """Write classifier, records and the assignment of every split, and the labels of rival heads where there are."""
    classifier = Classifier(found.net, found.views.plain(), size, facts=about)
    save_records(folder / "metrics.jsonl", found.history)
    for position, (name, images) in enumerate(splits):
        if position == 0:
            p = found.probabilities
        elif found.of_embeddings:
            p = found.net.of_embeddings(embeddings(name).values)
        else:
            p = classifier.predict_proba(images, device=device)
        save_assignment(folder, Assignment(p, images.ids), name)
        if found.rivals is not None:
            labels = found.rivals.fitted if position == 0 else found.rivals.predict(images)
            write_array(folder / f"{name}.{found.rivals.kind}.npy", labels)
        if found.epoch_labels is not None and found.epoch_labels[1] == name:
            write_array(folder / f"{name}.epochs.npy", found.epoch_labels[0])
    for name, array in ((MEMBERS, found.members), (AGREEMENT, found.agreement)):
        if array is not None:
            write_array(folder / name, array)
    classifier.save(folder)


class MadeOf(NamedTuple):
    """What the report tells of how a result was made.

    Parameters
    ----------
    agreement, stability : how far the members of a consensus agree on each image and on each cluster, 0 to 1; None of
        another result
    members : those members; none of another result
    class_count : how the number of classes was estimated; None where it was given
    """

    agreement: np.ndarray | None
    stability: np.ndarray | None
    members: list[MemberRow]
    class_count: ClassCount | None


def made_of(made: Mapping[str, Stage], last: str) -> MadeOf:
    """Return how the result of the stage ``last`` was made, of what the stages ``made`` have left."""
    facts, path = made[last].facts, made[last].folder / AGREEMENT
    count = made["count"].folder / COUNT if "count" in made else None
    members = []
    if "weights" in facts:
        rows = read_json(made["cluster"].folder / ROWS)["members"]
        members = [MemberRow(_MEMBER_TITLES[row["method"]], row["space"], row["number"], row["score"], weight, agrees)
                   for row, weight, agrees in zip(rows, facts["weights"], facts["agrees"], strict=True)]
    stability = np.array(facts["stability"], np.float64) if "stability" in facts else None
    return MadeOf(read_array(path) if path.exists() else None, stability, members,
                  ClassCount.from_facts(read_json(count)) if count else None)


def load_rivals(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Return the labels (n, n_images) of a split by each of a method's heads, of its networks, after its epochs."""
    paths = {kind: folder / f"{split}.{kind}.npy" for kind in ("heads", "networks", "epochs")}
    return {kind: read_array(path) for kind, path in paths.items() if path.exists()}
