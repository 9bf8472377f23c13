"""Many assignments of the same images: how far they agree, one numbering for their clusters, one mean of them.

A member is a table of probabilities ``(n, K_m)``, float32 or float64, on any device; members may differ in K_m. All
that is asked of pairs of members comes from contingency tables, which count the images once a member: nothing of size
n x n is held.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from phyla.errors import InputError

Table = Float[Tensor, "images clusters"]
Member = Float[Tensor, "images _"]
Weights = Float[Tensor, " members"]


def one_hot(labels: Int[Tensor, " images"], n_clusters: int, *, like: Tensor) -> Table:
    """Return 1 at the label of each row and 0 elsewhere, (n_images, n_clusters), as ``like`` in dtype and device."""
    table = like.new_zeros(len(labels), n_clusters)
    return table.scatter_(1, labels[:, None], 1.0)


def hardened(member: Table) -> Table:
    """Return the member with probability 1 for its most probable cluster, the lowest of equal ones."""
    return one_hot(member.argmax(dim=1), member.shape[1], like=member)


def adjusted_rand(members: Sequence[Member]) -> Float[Tensor, "members members"]:
    """Return the adjusted Rand index of the labels of every two members, float64 (M, M) on the CPU; 1 on the diagonal.

    About 0 for members that have nothing in common, 1 for equal partitions, however numbered. Of two members of one
    cluster each it is 1, of one such and another 0.
    """
    labels = np.stack([member.argmax(dim=1).cpu().numpy() for member in members])
    starts = np.cumsum([0, *(member.shape[1] for member in members)])
    places, n_images = labels + starts[:-1, None], labels.shape[1]
    within = np.empty((len(members),) * 2)
    for one, member in enumerate(members):
        cells = np.bincount((places + labels[one] * starts[-1]).ravel(), minlength=member.shape[1] * starts[-1])
        counts = cells.reshape(member.shape[1], starts[-1]).astype(np.float64)
        within[one] = np.add.reduceat((counts * (counts - 1) / 2).sum(axis=0), starts[:-1])
    own = np.diag(within)
    expected = np.outer(own, own) / max(1.0, n_images * (n_images - 1) / 2)
    most = (own[:, None] + own[None]) / 2
    with np.errstate(invalid="ignore"):
        found = np.where(most > expected, (within - expected) / (most - expected), 1.0)
    return torch.from_numpy(found)


def effective_counts(members: Sequence[Member]) -> Float[Tensor, " members"]:
    """Return the exponential of the entropy of each member's cluster sizes: 1 after a collapse, K_m when even."""
    shares = [torch.bincount(m.argmax(dim=1), minlength=m.shape[1]).double().cpu() / len(m) for m in members]
    return torch.stack([torch.special.entr(share).sum().exp() for share in shares])


def align(contingency: Float[Tensor, "own reference"]) -> Float[Tensor, "own reference"]:
    """Return which reference cluster each of a member's clusters is: a table of which ``member @ table`` is aligned.

    Parameters
    ----------
    contingency : (K_m, K), the mass that each cluster of the member shares with each of the reference's

    Notes
    -----
    Where both have as many clusters: one to one, so that as much mass as can be lies on matched pairs (Hungarian
    method). Where they differ the clusters serve as prototypes: a row is how the reference's clusters share the images
    of the member's, so that ``member @ table`` is the member's co-association, rows summing to 1, times the reference.
    A cluster without mass is spread evenly.
    """
    n_own, n_reference = contingency.shape
    if n_own == n_reference:
        rows, columns = linear_sum_assignment(contingency.double().cpu().numpy(), maximize=True)
        table = torch.zeros_like(contingency)
        table[torch.from_numpy(rows), torch.from_numpy(columns)] = 1
        return table
    mass = contingency.sum(dim=1, keepdim=True)
    return torch.where(mass > 0, contingency / mass.clamp(min=torch.finfo(mass.dtype).tiny), 1 / n_reference)


def aligned(members: Sequence[Member], reference: Table) -> list[Table]:
    """Return every member in the clusters of ``reference``, (n_images, K) each; see ``align``."""
    return [member @ align(member.T @ reference) for member in members]


def weighted_average(members: Sequence[Member], weights: Weights) -> Table:
    """Return the mean of aligned members by their weights, which need not sum to 1; rows sum to 1 as the members' do.

    Raises
    ------
    InputError
        A weight below 0, or none above.
    """
    if len(weights) != len(members) or not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
        raise InputError(f"{len(members)} members need as many weights of at least 0, some above, got "
                         f"{weights.tolist()[:20]}")
    share = (weights / weights.sum()).tolist()
    return torch.stack([member * part for member, part in zip(members, share, strict=True)]).sum(dim=0)


def co_association(members: Sequence[Member], weights: Weights, rows: Int[Tensor, " rows"]
                   ) -> Float[Tensor, "rows images"]:
    """Return how probably each image of ``rows`` lies in one cluster with every image, in the mean of the members."""
    share = (weights / weights.sum()).tolist()
    return torch.stack([part * (m[rows] @ m.T) for m, part in zip(members, share, strict=True)]).sum(dim=0)


def agreed(members: Sequence[Member], weights: Weights, *, start: Table, n_rounds: int = 20
           ) -> tuple[Table, list[Tensor]]:
    """Return the weighted mean of the members in one numbering, and the table by which each of them is aligned.

    Every member is aligned to the labels of the mean, at first to those of ``start`` (n_images, K), and the mean is
    taken anew, until its labels stay or for ``n_rounds``.
    """
    sizes = [member.shape[1] for member in members]
    beside, reference = torch.cat(list(members), dim=1), hardened(start)
    tables, average, share = list[Tensor](), start, (weights / weights.sum()).to(beside)
    for _ in range(max(1, n_rounds)):
        tables = [align(shared) for shared in torch.split(beside.T @ reference, sizes)]
        average = beside @ torch.cat([table * part for table, part in zip(tables, share, strict=True)])
        before, reference = reference, hardened(average)
        if torch.equal(before, reference):
            break
    return average, tables


def pair_agreement(labels: Sequence[Int[Tensor, " images"]], weights: Weights, n_clusters: int
                   ) -> Float[Tensor, " images"]:
    """Return for each image how probably two members drawn by their weights give it one label, float64, 0 to 1.

    Parameters
    ----------
    labels : of members that are aligned to one another; a member is not paired with itself

    Notes
    -----
    With v_c the weight of the members for cluster c of an image, (sum_c v_c² - sum_m w_m²) / (1 - sum_m w_m²). A single
    member agrees with itself.
    """
    share = (weights / weights.sum()).double().cpu()
    votes = torch.zeros(len(labels[0]), n_clusters, dtype=torch.float64)
    for each, part in zip(labels, share, strict=True):
        votes.scatter_add_(1, each.cpu()[:, None], part.expand(len(each), 1))
    alone = float(share.square().sum())
    return (votes.square().sum(dim=1) - alone) / (1 - alone) if alone < 1 else torch.ones(len(votes)).double()


def cluster_stability(labels: Int[Tensor, " images"], members: Sequence[Int[Tensor, " images"]], weights: Weights,
                      n_clusters: int) -> Float[Tensor, " clusters"]:
    """Return how far each cluster is the same set of images in every member: the mean Jaccard index, 0 to 1, float64.

    Parameters
    ----------
    labels : of the consensus
    members : labels of members aligned to it; ``weights`` are theirs in the mean
    """
    found = torch.zeros(n_clusters, dtype=torch.float64)
    for other, weight in zip(members, (weights / weights.sum()).tolist(), strict=True):
        both = torch.bincount(labels[labels == other], minlength=n_clusters)
        either = torch.bincount(labels, minlength=n_clusters) + torch.bincount(other, minlength=n_clusters) - both
        found += weight * both.double().cpu() / either.clamp(min=1).double().cpu()
    return found


def transported(probabilities: Table, prior: Float[Tensor, " clusters"], *, n_rounds: int = 200, tolerance: float = 1e-6
                ) -> Table:
    """Return the table nearest in relative entropy whose rows sum to 1 and whose columns have the shares of ``prior``.

    Sinkhorn's algorithm: columns and rows are scaled in turn, until the shares are met to ``tolerance``. An entry of 0
    stays 0. A share can be met only up to what its column can hold.
    """
    p, prior = probabilities.clamp(min=0), prior / prior.sum()
    tiny = torch.finfo(p.dtype).tiny
    for _ in range(n_rounds):
        p = p * (prior / p.mean(dim=0).clamp(min=tiny))
        p = p / p.sum(dim=1, keepdim=True).clamp(min=tiny)
        if float((p.mean(dim=0) - prior).abs().max()) < tolerance:
            break
    return p
