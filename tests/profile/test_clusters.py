"""Experts: clusters of one size, nobody would rather be elsewhere, and what was planted is found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.data.windows import Batch
from dynaconv.profile import clusters
from dynaconv.profile.clusters import Coactivation, balanced_clusters, deferred_acceptance, expert_order, sampled
from dynaconv.ranks import Ranks


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), clusters=st.integers(1, 6), size=st.integers(1, 7))
def test_assignments_are_balanced_and_stable(seed: int, clusters: int, size: int) -> None:
    similarity = torch.rand(clusters * size, clusters, generator=torch.Generator().manual_seed(seed))
    found = deferred_acceptance(similarity, size)
    assert torch.bincount(found, minlength=clusters).tolist() == [size] * clusters
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
    found = balanced_clusters(sample_of(hidden), 6)
    together = found[:, None] == found
    assert float((together == (owner[:, None] == owner)).float().mean()) > 0.99


def test_experts_lie_in_order_of_importance() -> None:
    hidden, owner = planted()
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1))
    order = expert_order(sample_of(hidden), importance, 6)
    assert torch.equal(order.sort().values, torch.arange(96))
    blocks = order.view(6, 16)
    assert all(len(owner[block].unique()) == 1 for block in blocks)
    worth = importance[blocks].sum(1)
    assert torch.equal(worth, worth.sort(descending=True).values)
    assert bool((importance[blocks].diff(dim=1) <= 0).all())


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
