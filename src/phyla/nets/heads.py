"""Heads that sit on an encoder: a projection for contrastive learning, and many cluster heads in one matmul."""

import copy
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phyla.errors import InputError


class Projection(nn.Sequential):
    """Two linear layers with a ReLU, and rows of length 1: (B, D) to (B, n_out); no BatchNorm (SCAN, section 5.1)."""

    def __init__(self, n_features: int, n_out: int = 128) -> None:
        super().__init__(nn.Linear(n_features, n_features), nn.ReLU(), nn.Linear(n_features, n_out))

    def forward(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "batch projection"]:
        """Return unit rows in float32 or better."""
        projected = super().forward(embeddings)  # type: ignore[no-untyped-call]
        return nn.functional.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=1)


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
        return flat.reshape(len(flat), *self.bias.shape).transpose(0, 1)

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


class ClusterNet(nn.Module):
    """An encoder with cluster heads: views (B, 3, H, W) to logits (n_heads, B, n_clusters).

    With ``nn.Identity`` as the encoder it takes embeddings (B, D).
    """

    def __init__(self, encoder: nn.Module, heads: ClusterHeads) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, heads

    def forward(self, views: Float[Tensor, "batch ..."]) -> Float[Tensor, "heads batch clusters"]:
        """Return the logits of every head."""
        return self.heads(self.encoder(views))

    def probabilities(self, views: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch heads clusters"]:
        """Return the softmax of every head in float32 or better, images first."""
        return self.heads.probabilities(self.encoder(views))

    def only(self, head: int) -> "ClusterNet":
        """Return a copy with one head; the encoder is copied too."""
        return ClusterNet(copy.deepcopy(self.encoder), self.heads.only(head))
