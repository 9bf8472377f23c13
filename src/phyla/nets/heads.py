"""Heads on an encoder: projections, many cluster heads in one matmul, mixtures of heads, sums of networks."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from phyla.errors import InputError, nearest
from phyla.nets.resnet import Ensemble, ResNet, TwoStream

Norm = Literal["feature_rows", "class_columns"]
Activation = Literal["gelu", "relu"]

_ROWS = 1 << 14  # embeddings at once


class Projection(nn.Sequential):
    """Linear layers with a ReLU between, and rows of length 1: (B, D) to (B, n_out); no BatchNorm.

    Parameters
    ----------
    n_features, n_out : D and the length of a row; equal where there is no layer
    n_layers : 2 (SimCLR as SCAN trains it), 1 (Super-AND), or 0: the embeddings themselves, scaled to length 1
    """

    def __init__(self, n_features: int, n_out: int = 128, n_layers: int = 2) -> None:
        if n_layers not in (0, 1, 2) or (n_layers == 0 and n_out != n_features):
            raise InputError(f"a projection of {n_layers} layers from {n_features} to {n_out} features cannot be made",
                             "0 (as many features as there are), 1 or 2 layers")
        hidden = [nn.Linear(n_features, n_features), nn.ReLU()] if n_layers == 2 else []
        super().__init__(*hidden, *([nn.Linear(n_features, n_out)] if n_layers else []))
        self.n_features, self.n_out, self.n_layers = n_features, n_out, n_layers

    def forward(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "batch projection"]:
        """Return unit rows in float32 or better."""
        projected = super().forward(embeddings)  # type: ignore[no-untyped-call]
        return nn.functional.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=1)

    def spec(self) -> dict[str, int]:
        """Return the arguments that make a projection of this form, for a file."""
        return {"n_features": self.n_features, "n_out": self.n_out, "n_layers": self.n_layers}


class SpaceProjection(nn.Module):
    """What stands between the embeddings of frozen encoders and linear heads: (B, sum of widths) to (B, n_out).

    Rows are moved by ``shift`` and stretched by ``scale`` (buffers; 0 and 1 unless set), each encoder's part of them is
    scaled to length 1/sqrt(number of encoders), and then come the layers.

    Parameters
    ----------
    widths : features of each encoder, beside one another in a row
    unit : scale each encoder's part, so that an inner product is the mean of the encoders' cosines
    hidden : features after each linear layer; none as a rule
    activation : between two layers
    out_unit : scale the result to length 1
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int], *, unit: bool = True, hidden: Sequence[int] = (),
                 activation: Activation = "gelu", out_unit: bool = False) -> None:
        super().__init__()
        if not widths or min(*widths, *hidden, 1) < 1:
            raise InputError(f"a projection needs widths of at least 1, got {tuple(widths)} and {tuple(hidden)}")
        if activation not in get_args(Activation):
            raise InputError(f"activation={activation!r} is not known", nearest(activation, list(get_args(Activation))))
        self.widths, self.unit, self.hidden = tuple(widths), unit, tuple(hidden)
        self.activation, self.out_unit = activation, out_unit
        self.register_buffer("shift", torch.zeros(self.n_features))
        self.register_buffer("scale", torch.ones(self.n_features))
        sizes = [self.n_features, *hidden]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    @property
    def n_features(self) -> int:
        """Features of what it takes."""
        return sum(self.widths)

    @property
    def n_out(self) -> int:
        """Features of the result."""
        return self.hidden[-1] if self.hidden else self.n_features

    def forward(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "batch projection"]:
        """Return the projected rows in float32 or better."""
        rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        rows = (rows - self.shift) * self.scale
        if self.unit:
            share = 1 / math.sqrt(len(self.widths))
            parts = torch.split(rows, list(self.widths), dim=1)
            rows = torch.cat([nn.functional.normalize(part, dim=1) * share for part in parts], dim=1)
        for position, layer in enumerate(self.layers):
            if position:
                rows = nn.functional.gelu(rows) if self.activation == "gelu" else rows.relu()
            rows = layer(rows)
        return nn.functional.normalize(rows, dim=1) if self.out_unit else rows

    def spec(self) -> dict[str, object]:
        """Return the arguments that make a projection of this form, and its kind, for a file."""
        return {"kind": "spaces", "widths": list(self.widths), "unit": self.unit, "hidden": list(self.hidden),
                "activation": self.activation, "out_unit": self.out_unit}


class ClusterHeads(nn.Module):
    """``n_heads`` independent linear heads on one embedding, computed as one matrix product.

    The parameters are ``weight`` (n_heads, n_clusters, n_features) and ``bias`` (n_heads, n_clusters).
    """

    def __init__(self, n_features: int, n_clusters: int, n_heads: int = 1) -> None:
        super().__init__()
        for name, value in (("n_features", n_features), ("n_clusters", n_clusters), ("n_heads", n_heads)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.weight = nn.Parameter(torch.zeros(n_heads, n_clusters, n_features))
        self.bias = nn.Parameter(torch.zeros(n_heads, n_clusters))

    @property
    def n_heads(self) -> int:
        """Number of heads."""
        return self.weight.shape[0]

    @property
    def n_clusters(self) -> int:
        """Clusters of each head."""
        return self.weight.shape[1]

    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw weight and bias from U(+-1/sqrt(n_features)), PyTorch's default for a linear layer."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def forward(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "heads batch clusters"]:
        """Return the logits of every head."""
        flat = nn.functional.linear(embeddings, self.weight.flatten(0, 1), self.bias.flatten())
        return flat.reshape(flat.shape[0], *self.bias.shape).transpose(0, 1)

    def probabilities(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "batch heads clusters"]:
        """Return the softmax of every head in float32 or better, images first."""
        logits = self.forward(embeddings)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.softmax(dim=2).transpose(0, 1)

    def only(self, head: int) -> "ClusterHeads":
        """Return a copy that keeps one head, ``head`` from 0 to n_heads - 1."""
        if not 0 <= head < self.n_heads:
            raise InputError(f"there is no head {head}", f"allowed: 0 to {self.n_heads - 1}")
        kept = ClusterHeads(self.weight.shape[2], self.n_clusters)
        kept.weight.data = self.weight.data[head : head + 1].clone()
        kept.bias.data = self.bias.data[head : head + 1].clone()
        return kept


    def spec(self) -> dict[str, object]:
        """Return the arguments that make heads of this form, for a file."""
        return {"n_features": self.weight.shape[2], "n_clusters": self.n_clusters, "n_heads": self.n_heads}


class MixtureHeads(nn.Module):
    """Linear heads that are averaged, and whose outputs are summed in groups: one head to whoever uses it.

    With M members and L outputs each, the probability of cluster c is the mean over the members of the sum over the
    outputs j of group c of softmax(logits_m)_j. One member a space is TURTLE's classifier; groups are merged clusters.

    Parameters
    ----------
    n_features, n_outputs, n_members : D, L and M: ``weight`` is (M, L, D) and ``bias`` (M, L)
    groups : the cluster of each output, from 0; None: each output is a cluster
    """

    groups: Tensor

    def __init__(self, n_features: int, n_outputs: int, n_members: int = 1,
                 groups: Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        for name, value in (("n_features", n_features), ("n_outputs", n_outputs), ("n_members", n_members)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        held = torch.arange(n_outputs) if groups is None else torch.as_tensor(groups, dtype=torch.int64).clone()
        if held.shape != (n_outputs,) or not torch.equal(torch.unique(held), torch.arange(int(held.max()) + 1)):
            raise InputError(f"groups must give each of {n_outputs} outputs a cluster, all from 0 on used, got "
                             f"{held.tolist()[:20]}")
        self.weight = nn.Parameter(torch.zeros(n_members, n_outputs, n_features))
        self.bias = nn.Parameter(torch.zeros(n_members, n_outputs))
        self.register_buffer("groups", held)
        self._n_clusters = int(held.max()) + 1  # not asked of the device at every step

    @property
    def n_heads(self) -> int:
        """1: the mixture is one head."""
        return 1

    @property
    def n_clusters(self) -> int:
        """Groups of outputs."""
        return self._n_clusters

    def forward(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "heads batch clusters"]:
        """Return the logarithms of the probabilities, which are logits as good as any, of the one head."""
        flat = nn.functional.linear(embeddings, self.weight.flatten(0, 1), self.bias.flatten())
        logits = flat if flat.dtype == torch.float64 else flat.float()
        each = logits.reshape(flat.shape[0], *self.bias.shape).softmax(dim=2).mean(dim=1)
        summed = each.new_zeros(flat.shape[0], self._n_clusters).index_add(1, self.groups, each)
        return summed.clamp(min=torch.finfo(each.dtype).tiny).log()[None]

    def probabilities(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "batch heads clusters"]:
        """Return the probabilities of the one head in float32 or better, images first."""
        return self.forward(embeddings).softmax(dim=2).transpose(0, 1)

    def only(self, head: int) -> "MixtureHeads":
        """Return a copy; ``head`` is 0."""
        if head != 0:
            raise InputError(f"there is no head {head}", "a mixture is one head, 0")
        return copy.deepcopy(self)

    def spec(self) -> dict[str, object]:
        """Return the arguments that make heads of this form, and their kind, for a file."""
        return {"kind": "mixture", "n_features": self.weight.shape[2], "n_outputs": self.weight.shape[1],
                "n_members": self.weight.shape[0], "groups": self.groups.tolist()}


class NestedHeads(nn.Module):
    """One head: log P(leaf) = log P(its cluster) + log softmax over the leaves of that cluster, summed in groups.

    Parameters
    ----------
    inner : spec of the heads of the clusters, one head
    parents : the cluster of each leaf, rising from 0; ``weight`` is (n_leaves, n_features) and ``bias`` (n_leaves,)
    groups : the group of each leaf, from 0; None: each leaf is one
    """

    table: Tensor
    place: Tensor
    parents: Tensor
    groups: Tensor

    def __init__(self, inner: dict[str, object], parents: Sequence[int], groups: Sequence[int] | None = None) -> None:
        super().__init__()
        self.inner: Heads = build_heads(inner)
        own = torch.as_tensor(parents, dtype=torch.int64)
        held = torch.arange(len(own)) if groups is None else torch.as_tensor(groups, dtype=torch.int64)
        counts = torch.bincount(own, minlength=self.inner.n_clusters)
        if self.inner.n_heads != 1 or len(counts) != self.inner.n_clusters or not bool((counts > 0).all()) \
                or not torch.equal(own, own.sort().values):
            raise InputError(f"leaves must be of all {self.inner.n_clusters} clusters of one head, in order")
        if held.shape != own.shape or not torch.equal(torch.unique(held), torch.arange(int(held.max()) + 1)):
            raise InputError(f"groups must give each of {len(own)} leaves a group, all from 0 on used")
        first = counts.cumsum(0) - counts
        seat = torch.arange(len(own)) - first[own]
        table = torch.full((len(counts), int(counts.max())), -1)
        table[own, seat] = torch.arange(len(own))
        n_features = int(self.inner.spec()["n_features"])  # type: ignore[call-overload]
        self.weight = nn.Parameter(torch.zeros(len(own), n_features))
        self.bias = nn.Parameter(torch.zeros(len(own)))
        for name, value in (("table", table), ("place", own * table.shape[1] + seat), ("parents", own),
                            ("groups", held)):
            self.register_buffer(name, value.clone())
        self._n_clusters = int(held.max()) + 1

    @classmethod
    def of(cls, inner: ClusterHeads | MixtureHeads, weight: Float[Tensor, "leaves features"],
           bias: Float[Tensor, " leaves"], parents: Sequence[int], groups: Sequence[int]) -> "NestedHeads":
        """Return heads with the parameters of ``inner`` and these of the leaves."""
        made = cls(inner.spec(), parents, groups)
        made.inner = copy.deepcopy(inner)
        made.weight.data, made.bias.data = weight.clone(), bias.clone()
        return made.to(inner.weight.device)

    @property
    def n_heads(self) -> int:
        """1."""
        return 1

    @property
    def n_clusters(self) -> int:
        """Groups of leaves."""
        return self._n_clusters

    def forward(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "heads batch clusters"]:
        """Return the logarithms of the probabilities of the groups."""
        outer = self.inner(embeddings)[0]
        outer = (outer if outer.dtype == torch.float64 else outer.float()).log_softmax(dim=1)
        near = nn.functional.linear(embeddings, self.weight, self.bias).to(outer.dtype)
        seated = near[:, self.table.clamp(min=0)].masked_fill(self.table < 0, -torch.inf)  # (B, clusters, most leaves)
        each = (outer[:, :, None] + seated.log_softmax(dim=2)).flatten(1)[:, self.place].exp()
        summed = each.new_zeros(each.shape[0], self._n_clusters).index_add(1, self.groups, each)  # len: no open batch
        return summed.clamp(min=torch.finfo(each.dtype).tiny).log()[None]

    def probabilities(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "batch heads clusters"]:
        """Return the probabilities of the groups in float32 or better, images first."""
        return self.forward(embeddings).softmax(dim=2).transpose(0, 1)

    def only(self, head: int) -> "NestedHeads":
        """Return a copy; ``head`` is 0."""
        if head != 0:
            raise InputError(f"there is no head {head}", "nested heads are one head, 0")
        return copy.deepcopy(self)

    def spec(self) -> dict[str, object]:
        """Return the arguments that make heads of this form, and their kind, for a file."""
        return {"kind": "nested", "inner": self.inner.spec(), "parents": self.parents.tolist(),
                "groups": self.groups.tolist()}


class NormalizedHeads(nn.Module):
    """Heads without bias whose weights are normalised, and which sharpen by a temperature: rows (B, D) to (H, B, K).

    Parameters
    ----------
    weight : raw prototypes (n_heads, n_features, n_clusters)
    temperature : > 0, divides the logits
    norm : feature_rows: every feature's K weights have length 1 together, so a prototype has length about
        sqrt(D / K); class_columns: every prototype has length 1
    trainable : whether the raw prototypes are parameters, or buffers that stay as they are
    """

    weight: Tensor

    def __init__(self, weight: Float[Tensor, "heads features clusters"], *, temperature: float, norm: Norm,
                 trainable: bool = False) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"temperature must be above 0, got {temperature}")
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.temperature, self.norm = temperature, norm

    def forward(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "heads batch clusters"]:
        """Return the logits of every head, divided by the temperature."""
        n_heads, _, n_clusters = self.weight.shape
        prototypes = normalized(self.weight, self.norm).transpose(0, 1).flatten(1)
        return (embeddings @ prototypes / self.temperature).reshape(-1, n_heads, n_clusters).transpose(0, 1)

    def as_linear(self) -> "ClusterHeads":
        """Return plain linear heads that give the same logits: temperature and norm are in their weights."""
        n_heads, n_features, n_clusters = self.weight.shape
        heads = ClusterHeads(n_features, n_clusters, n_heads).to(self.weight)
        prototypes = normalized(self.weight.detach(), self.norm) / self.temperature
        heads.weight.data = prototypes.transpose(1, 2).contiguous()
        return heads


def normalized(weight: Float[Tensor, "*heads features clusters"], norm: Norm
               ) -> Float[Tensor, "*heads features clusters"]:
    """Return ``weight`` with rows (feature_rows) or columns (class_columns) of length 1; zeros stay."""
    return nn.functional.normalize(weight, dim=-1 if norm == "feature_rows" else -2)


Heads = ClusterHeads | MixtureHeads | NestedHeads
AnyProjection = Projection | SpaceProjection


def build_projection(form: Mapping[str, Any]) -> AnyProjection:
    """Return the projection whose ``spec()`` this is, with fresh weights."""
    told = dict(form)
    return SpaceProjection(**told) if told.pop("kind", None) == "spaces" else Projection(**told)


def build_heads(form: Mapping[str, Any]) -> Heads:
    """Return the heads whose ``spec()`` this is, with weights of 0."""
    told = dict(form)
    kinds: Mapping[object, type[Heads]] = {"mixture": MixtureHeads, "nested": NestedHeads}
    return kinds.get(told.pop("kind", None), ClusterHeads)(**told)


class ClusterNet(nn.Module):
    """An encoder with cluster heads: views (B, 3, H, W) to logits (n_heads, B, n_clusters).

    With ``nn.Identity`` as the encoder it takes embeddings (B, D). A ``projection`` stands between encoder and heads.
    """

    def __init__(self, encoder: nn.Module, heads: Heads, projection: AnyProjection | None = None) -> None:
        super().__init__()
        self.encoder, self.projection, self.heads = encoder, projection, heads

    def forward(self, views: Float[Tensor, "batch ..."]) -> Float[Tensor, "heads batch clusters"]:
        """Return the logits of every head."""
        return self.heads(self.embed(views))

    def embed(self, views: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch features"]:
        """Return what the heads see."""
        embeddings = self.encoder(views)
        return embeddings if self.projection is None else self.projection(embeddings)

    def probabilities(self, views: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch heads clusters"]:
        """Return the softmax of every head in float32 or better, images first."""
        return self.heads.probabilities(self.embed(views))

    def of_embeddings(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the probabilities of embeddings (n, D) that were made before, float32 (n, n_clusters); one head."""
        return self._over(embeddings, lambda rows: self.heads.probabilities(self._projected(rows))[:, 0])

    def seen(self, embeddings: np.ndarray) -> np.ndarray:
        """Return what the heads see of embeddings (n, D) that were made before, float32 (n, n_projection)."""
        return self._over(embeddings, self._projected)

    def _projected(self, rows: Tensor) -> Tensor:
        return rows if self.projection is None else self.projection(rows)

    def _over(self, embeddings: np.ndarray, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        with torch.no_grad():
            parts = [function(torch.from_numpy(embeddings[start : start + _ROWS]).to(self.heads.weight.device))
                     for start in range(0, len(embeddings), _ROWS)]
        return torch.cat(parts).float().cpu().numpy()

    def only(self, head: int) -> "ClusterNet":
        """Return a copy with one head; encoder and projection are copied too."""
        return ClusterNet(copy.deepcopy(self.encoder), self.heads.only(head), copy.deepcopy(self.projection))


class _Beside(nn.Module):
    """Encoders that are none of ours: their embeddings stand in a row."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([member(x) for member in self.members], dim=1)


def summed(nets: Sequence[ClusterNet]) -> ClusterNet:
    """Return one network with one head whose logits are the sum of those of ``nets``; it shares their encoders."""
    first = nets[0].heads.weight
    heads = ClusterHeads(sum(net.heads.weight.shape[2] for net in nets), first.shape[1]).to(first)
    heads.weight.data = torch.cat([net.heads.weight.data for net in nets], dim=2)
    heads.bias.data = torch.stack([net.heads.bias.data for net in nets]).sum(dim=0)
    encoders = [net.encoder for net in nets]
    members = [one for encoder in encoders for one in (encoder.members if isinstance(encoder, Ensemble) else [encoder])]
    ours = [one for one in members if isinstance(one, ResNet | TwoStream)]
    return ClusterNet(Ensemble(ours) if len(ours) == len(members) else _Beside(encoders), heads)
