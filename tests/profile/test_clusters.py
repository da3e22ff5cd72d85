"""Experts: clusters of one size, nobody would rather be elsewhere, and what was planted is found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.data.windows import Batch
from dynaconv.kernels.partition import Partition
from dynaconv.profile import clusters
from dynaconv.profile.clusters import Coactivation, balanced_clusters, deferred_acceptance, expert_order, sampled
from dynaconv.ranks import Ranks


def naive_acceptance(similarity: torch.Tensor, room: list[int]) -> torch.Tensor:
    """Deferred acceptance as it is written in books, one cluster at a time."""
    open_to, held = similarity.clone(), torch.full((len(similarity),), -1)
    while len(free := (held < 0).nonzero()[:, 0]):
        held[free] = open_to[free].argmax(1)
        for cluster in held[free].unique().tolist():
            asking = (held == cluster).nonzero()[:, 0]
            if len(asking) > room[cluster]:
                liked = similarity[asking, cluster].argsort(descending=True, stable=True)
                turned_away = asking[liked[room[cluster] :]]
                held[turned_away], open_to[turned_away, cluster] = -1, -torch.inf
    return held


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clusters=st.integers(1, 6),
    size=st.integers(1, 7),
    last=st.integers(1, 7),
    ties=st.booleans(),
)
def test_assignments_are_balanced_stable_and_the_naive_ones(
    seed: int, clusters: int, size: int, last: int, ties: bool
) -> None:
    room = [size] * (clusters - 1) + [min(size, last)]
    similarity = torch.rand(sum(room), clusters, generator=torch.Generator().manual_seed(seed))
    if ties:
        similarity = (3 * similarity).round()
    found = deferred_acceptance(similarity, torch.tensor(room))
    assert torch.equal(found, naive_acceptance(similarity, room))
    assert torch.bincount(found, minlength=clusters).tolist() == room
    for neuron, own in enumerate(found.tolist()):
        for cluster in range(clusters):
            wants = similarity[neuron, cluster] > similarity[neuron, own]
            worst = similarity[found == cluster, cluster].min()
            assert not (wants and similarity[neuron, cluster] > worst), "both would rather have each other"


def planted(neurons: int = 96, clusters: int = 6, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (M, F) where each token excites one of the clusters, and the cluster of each neuron."""
    generator = torch.Generator().manual_seed(5)
    owner = torch.arange(neurons)[torch.randperm(neurons, generator=generator)] % clusters
    excited = torch.randint(0, clusters, (tokens,), generator=generator)
    noise = torch.randn(tokens, neurons, generator=generator)
    return noise * (0.1 + 2.0 * (owner == excited[:, None])), owner


def sample_of(hidden: torch.Tensor) -> torch.Tensor:
    """Features of activations that come in two batches of windows of 60 tokens."""
    together, batches = Coactivation(torch.ones(96), 10), torch.arange(600).view(2, 5, 60)
    for rows, ids in zip(hidden.chunk(2), batches, strict=True):
        together.add(rows, Batch(ids))
    return together.features()


def test_planted_experts_are_found() -> None:
    hidden, owner = planted()
    found = balanced_clusters(sample_of(hidden), [16] * 6)
    together = found[:, None] == found
    assert float((together == (owner[:, None] == owner)).float().mean()) > 0.99


def test_experts_lie_in_order_of_importance() -> None:
    hidden, owner = planted()
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1))
    order = expert_order(sample_of(hidden), importance, Partition.equal(96, 16))
    assert torch.equal(order.sort().values, torch.arange(96))
    blocks = order.view(6, 16)
    assert all(len(owner[block].unique()) == 1 for block in blocks)
    worth = importance[blocks].sum(1)
    assert torch.equal(worth, worth.sort(descending=True).values)
    assert bool((importance[blocks].diff(dim=1) <= 0).all())


@pytest.mark.parametrize("block_size", [1, 2, 16, 20, 36, 95, 96])
def test_experts_of_any_size_are_cut_where_the_partition_cuts(block_size: int) -> None:
    hidden, _ = planted()
    features, partition = sample_of(hidden), Partition.equal(96, block_size)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1))
    order = expert_order(features, importance, partition)
    assert torch.equal(order.sort().values, torch.arange(96))
    if block_size in (1, 96):
        assert torch.equal(order, importance.argsort(descending=True, stable=True))
        return
    blocks = order.split(list(partition.sizes))
    cluster = balanced_clusters(features, partition.sizes)
    assert all(len(cluster[block].unique()) == 1 for block in blocks), "each block is a cluster, the smaller one last"
    worth = torch.stack([importance[block].sum() for block in blocks])[: 96 // block_size]
    assert torch.equal(worth, worth.sort(descending=True).values)


def test_windows_are_sampled_by_their_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 99, (3, 8))
    both = sampled(Batch(ids), 4)
    assert [int(((both >= 8 * row) & (both < 8 * row + 8)).sum()) for row in range(3)] == [4, 4, 4]
    assert torch.equal(both[4:8] - 8, sampled(Batch(ids[1:2]), 4)), "the others in the batch do not matter"
    padded = sampled(Batch(ids, torch.arange(8) < torch.tensor([8, 3, 8])[:, None]), 4)
    assert torch.equal(padded[4:7], torch.tensor([8, 9, 10])), "all there are"
    assert torch.equal(padded[7:], both[8:] - 5), "places count real tokens"
    monkeypatch.setattr(clusters, "SAMPLED", 10)
    hidden, sizes = torch.randn(24, 7), torch.rand(7)
    together = Coactivation(sizes, 3)
    together.add(hidden, Batch(ids))
    assert torch.equal(together.features(), (hidden[both].abs() * sizes).t())
    assert torch.equal(together.features(Ranks.single("cpu")), together.features())
