"""Experts: clusters of one size, nobody would rather be elsewhere, and what was planted is found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.data.windows import Batch
from dynaconv.profile.accumulators import Coactivation
from dynaconv.profile.clusters import balanced_clusters, deferred_acceptance, expert_order
from dynaconv.profile.measure import random_signs


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


def test_planted_experts_are_found_in_a_sketch() -> None:
    hidden, owner = planted()
    sketch = Coactivation(96)
    sketch.add(hidden, torch.ones(96), random_signs(Batch(torch.arange(600).view(10, 60))))
    found = balanced_clusters(sketch.features(), 6)
    together = found[:, None] == found
    assert float((together == (owner[:, None] == owner)).float().mean()) > 0.99


def test_experts_lie_in_order_of_importance() -> None:
    hidden, owner = planted()
    sketch, importance = Coactivation(96), torch.rand(96, generator=torch.Generator().manual_seed(1))
    sketch.add(hidden, torch.ones(96), random_signs(Batch(torch.arange(600).view(10, 60))))
    order = expert_order(sketch.features(), importance, 6)
    assert torch.equal(order.sort().values, torch.arange(96))
    blocks = order.view(6, 16)
    assert all(len(owner[block].unique()) == 1 for block in blocks)
    worth = importance[blocks].sum(1)
    assert torch.equal(worth, worth.sort(descending=True).values)
    assert bool((importance[blocks].diff(dim=1) <= 0).all())


def test_signs_are_the_windows_own() -> None:
    ids = torch.randint(0, 99, (3, 8))
    both = random_signs(Batch(ids))
    assert torch.equal(both[8:16], random_signs(Batch(ids[1:2])))
    assert set(both.unique().tolist()) == {-1, 1}
    mask = torch.arange(8) < torch.tensor([8, 5, 8])[:, None]
    padded = random_signs(Batch(ids, mask))
    assert len(padded) == 21
    assert torch.equal(padded[8:13], random_signs(Batch(ids[1:2, :5]))), "padding changes nothing"
    assert float(both.float().mean().abs()) < 0.1


def test_a_sketch_counts_who_is_most_active(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, sizes = torch.randn(40, 24), torch.rand(24) + 0.1
    signs = random_signs(Batch(torch.arange(40)[None]))
    whole, parts = Coactivation(24), Coactivation(24)
    whole.add(hidden, sizes, signs)
    for start in (0, 15):
        stop = 15 if start == 0 else 40
        parts.merge(_added(hidden[start:stop], sizes, signs[start:stop]))
    marked = torch.zeros(40, 24)
    marked.scatter_(1, (hidden.abs() * sizes).topk(3, dim=1).indices, 1.0)
    torch.testing.assert_close(whole.features(), marked.T @ signs.float())
    torch.testing.assert_close(parts.features(), whole.features())


def _added(hidden: torch.Tensor, sizes: torch.Tensor, signs: torch.Tensor) -> Coactivation:
    made = Coactivation(hidden.shape[1])
    made.add(hidden, sizes, signs)
    return made
