"""Experts out of neurons: equal clusters of neurons that are active on the same tokens.

After MoEfication (arXiv 2110.01786), which clusters by weights, and CMoE (arXiv 2502.04416), which clusters by
activations: a token's large activations then fall into few clusters, and the others can be left out. Here the balanced
assignment is the one that deferred acceptance finds (Gale and Shapley, 1962), which needs F x N numbers, not F x F.

F neurons, N clusters of F / N neurons, S features of a neuron.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

ITERATIONS = 20


@torch.no_grad()
def expert_order(features: Tensor, importance: Tensor, experts: int) -> Tensor:
    """Neurons in the order in which cutting them into ``experts`` equal blocks makes the clusters, (F,) int64.

    The most important expert comes first, and in each the most important neuron.

    Args:
        features: ``(F, S)``; neurons whose features point the same way belong together.
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
