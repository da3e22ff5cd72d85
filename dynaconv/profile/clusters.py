"""Experts out of neurons: clusters, of one size but for the last, of neurons that matter to the same tokens.

After MoEfication (arXiv 2110.01786), which clusters by weights, and CMoE (arXiv 2502.04416), which clusters by
activations: a token's large activations then fall into few clusters, and the others can be left out. Here the balanced
assignment is the one that deferred acceptance finds (Gale and Shapley, 1962), which needs F x N numbers, not F x F.

Neurons are told apart by what they add on some thousand tokens. Random projections of all tokens were tried in their
place: as good untrained, and no better after fine-tuning.

F neurons, N clusters, S sampled tokens, M tokens of a batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dynaconv.data.windows import Batch
from dynaconv.kernels.partition import Partition
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
        self.rows = [rows]  # not a second copy of the sample
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
def expert_order(features: Tensor, importance: Tensor, partition: Partition) -> Tensor:
    """Neurons in the order in which cutting them into the blocks of ``partition`` makes the clusters, (F,) int64.

    The most important expert comes first, but for a smaller one, which is last; in each the most important neuron.

    Args:
        features: ``(F, S)``; neurons whose rows point the same way belong together.
        importance: ``(F,)``.
        partition: Blocks of one size, of which the last may be smaller.
    """
    by_importance = importance.cpu().argsort(descending=True, stable=True)
    if partition.blocks in (1, partition.neurons):  # one cluster, or one a neuron
        return by_importance
    cluster = balanced_clusters(features, partition.sizes)
    worth = torch.zeros(partition.blocks, dtype=torch.float64).index_add_(0, cluster, importance.double().cpu())
    if partition.uniform_size is None:
        worth[-1] = -torch.inf
    place = worth.argsort(descending=True, stable=True).argsort()[cluster]
    return by_importance[place[by_importance].argsort(stable=True)]


@torch.no_grad()
def balanced_clusters(features: Tensor, sizes: Sequence[int], iterations: int = ITERATIONS) -> Tensor:
    """Spherical k-means with clusters of given sizes, from a fixed random start: each neuron's cluster, (F,) int64.

    Args:
        features: ``(F, S)``.
        sizes: Neurons of each of the N clusters; together F.
        iterations: At most; it ends where nothing moves any more.
    """
    points = normalize(features.float().cpu(), dim=1)
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[: len(sizes)]
    centres, found, room = points[start], torch.full((len(points),), -1), torch.tensor(sizes)
    for _ in range(iterations):
        assigned = deferred_acceptance(points @ normalize(centres, dim=1).t(), room)
        if torch.equal(assigned, found):
            break
        found = assigned
        centres = torch.zeros_like(centres).index_add_(0, found, points)
    return found


def deferred_acceptance(similarity: Tensor, room: Tensor) -> Tensor:
    """Assigns each neuron to a cluster so that no neuron and cluster would both rather have each other.

    Neurons ask the cluster most like them, which keeps those most like itself as far as it has room; those turned away
    ask their next. Among equals the first neuron and the first cluster come first.

    Args:
        similarity: ``(F, N)``.
        room: ``(N,)`` int64, the neurons that each cluster takes; together F.

    Returns:
        ``(F,)`` int64.
    """
    open_to, held = similarity.clone(), torch.full((len(similarity),), -1)
    free = torch.arange(len(similarity))
    while len(free):
        held[free] = open_to[free].argmax(1)
        asked = torch.zeros(len(room), dtype=torch.bool).index_fill_(0, held[free], True)
        asking = asked[held].nonzero()[:, 0]  # of the other clusters none turns away
        liked = similarity[asking, held[asking]].argsort(descending=True, stable=True)
        asking = asking[liked][held[asking[liked]].argsort(stable=True)]  # by cluster, then by similarity
        wanted = held[asking]
        counts = torch.bincount(wanted, minlength=len(room))
        place = torch.arange(len(asking)) - (counts.cumsum(0) - counts)[wanted]
        free = asking[place >= room[wanted]]
        open_to[free, held[free]] = -torch.inf
        held[free] = -1
    return held
