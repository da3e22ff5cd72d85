"""Experts out of neurons: equal clusters of neurons that matter to the same tokens.

After MoEfication (arXiv 2110.01786), which clusters by weights, and CMoE (arXiv 2502.04416), which clusters by
activations: a token's large activations then fall into few clusters, and the others can be left out. Here the balanced
assignment is the one that deferred acceptance finds (Gale and Shapley, 1962), which needs F x N numbers, not F x F.

Neurons are told apart by what they add on some thousand tokens. Random projections of all tokens were tried in their
place: as good untrained, and no better after fine-tuning.

F neurons, N clusters of F / N neurons, S sampled tokens, M tokens of a batch.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dynaconv.data.windows import Batch
from dynaconv.ranks import Ranks

ITERATIONS = 20
SAMPLED = 2048  # tokens, or up to one a window more


class Coactivation:
    """How much each neuron adds to the output on a sample of tokens, as many of every window.

    Args:
        sizes: ``(F,)`` norms of the neurons' down columns.
        windows: Windows of all processes.
    """

    def __init__(self, sizes: Tensor, windows: int) -> None:
        self.sizes, self.share, self.rows = sizes, math.ceil(SAMPLED / windows), list[Tensor]()

    def add(self, hidden: Tensor, batch: Batch) -> None:
        """Samples ``(M, F)`` activations of the real tokens of ``batch``."""
        self.rows.append(hidden[sampled(batch, self.share).to(hidden.device)].abs().float() * self.sizes)

    def features(self, ranks: Ranks | None = None) -> Tensor:
        """``(F, S)`` float32, of all processes."""
        rows = torch.cat(self.rows)
        if ranks is not None:
            counts = torch.zeros(ranks.world, dtype=torch.int64)
            counts[ranks.rank] = len(rows)
            ends = ranks.sum(counts).cumsum(0)
            whole = rows.new_zeros(int(ends[-1]), rows.shape[1])
            whole[ends[ranks.rank] - len(rows) : ends[ranks.rank]] = rows
            rows = ranks.sum(whole)
        return rows.t()


def sampled(batch: Batch, share: int) -> Tensor:
    """Places of up to ``share`` real tokens of every window, among all real ones of the batch, ascending.

    Drawn by each window's own tokens: it does not matter which process has the window.
    """
    places, start = [], 0
    for row, window in enumerate(batch.input_ids.cpu()):
        ids = window if batch.attention_mask is None else window[batch.attention_mask[row].cpu()]
        generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes()))
        places.append(start + torch.randperm(len(ids), generator=generator)[:share].sort().values)
        start += len(ids)
    return torch.cat(places)


@torch.no_grad()
def expert_order(features: Tensor, importance: Tensor, experts: int) -> Tensor:
    """Neurons in the order in which cutting them into ``experts`` equal blocks makes the clusters, (F,) int64.

    The most important expert comes first, and in each the most important neuron.

    Args:
        features: ``(F, S)``; neurons whose rows point the same way belong together.
        importance: ``(F,)``.
        experts: N, which divides F.
    """
    cluster = balanced_clusters(features, experts)
    worth = torch.zeros(experts, dtype=torch.float64).index_add_(0, cluster, importance.double().cpu())
    place = worth.argsort(descending=True, stable=True).argsort()[cluster]
    by_importance = importance.cpu().argsort(descending=True, stable=True)
    return by_importance[place[by_importance].argsort(stable=True)]


@torch.no_grad()
def balanced_clusters(features: Tensor, clusters: int, iterations: int = ITERATIONS) -> Tensor:
    """Spherical k-means with clusters of equal size, from a fixed random start: the cluster of each neuron, (F,) int64.

    Args:
        features: ``(F, S)``.
        clusters: N, which divides F.
        iterations: At most; it ends where nothing moves any more.
    """
    points = normalize(features.float().cpu(), dim=1)
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:clusters]
    centres, found = points[start], torch.full((len(points),), -1)
    for _ in range(iterations):
        assigned = deferred_acceptance(points @ normalize(centres, dim=1).t(), len(points) // clusters)
        if torch.equal(assigned, found):
            break
        found = assigned
        centres = torch.zeros_like(centres).index_add_(0, found, points)
    return found


def deferred_acceptance(similarity: Tensor, size: int) -> Tensor:
    """Assigns each neuron to a cluster so that no neuron and cluster would both rather have each other.

    Neurons ask the cluster most like them, which keeps the ``size`` most like itself; those turned away ask their next.

    Args:
        similarity: ``(F, N)``.
        size: F / N, the neurons of each cluster.

    Returns:
        ``(F,)`` int64, each cluster ``size`` times.
    """
    open_to, held = similarity.clone(), torch.full((len(similarity),), -1)
    while len(free := (held < 0).nonzero()[:, 0]):
        held[free] = open_to[free].argmax(1)
        for cluster in held[free].unique().tolist():
            asking = (held == cluster).nonzero()[:, 0]
            if len(asking) > size:
                turned_away = asking[similarity[asking, cluster].argsort(descending=True, stable=True)[size:]]
                held[turned_away], open_to[turned_away, cluster] = -1, -torch.inf
    return held
