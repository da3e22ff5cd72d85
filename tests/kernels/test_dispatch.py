"""Which kernel runs when, and that each gives the reference's result."""

from __future__ import annotations

import pytest
import torch
from ffn_networks import random_edges, random_network
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels.dispatch import decide, nested_ffn
from dynaconv.kernels.reference import block_ffn, width_masks

EDGES = (0, 3, 7, 20, 21)


@pytest.mark.parametrize(
    ("widths", "kernel"),
    [
        ([4, 4, 4], "dense"),
        ([4], "dense"),
        ([2, 2], "prefix"),
        ([2], "prefix"),
        ([0], "prefix"),
        ([0, 0], "prefix"),
        ([4, 3], "capped"),
        ([0, 2, 1], "capped"),
        ([], "dense"),
    ],
)
def test_the_kernel_follows_from_the_widths(widths: list[int], kernel: str) -> None:
    weights, wanted = random_network(9, 21, bias=True), torch.tensor(widths, dtype=torch.int64)
    x = torch.randn(len(widths), 9, dtype=torch.float64)
    decision = decide(x, wanted, weights, EDGES)
    assert decision.kernel == kernel
    assert decision.reason
    expected = block_ffn(x, width_masks(wanted), weights, EDGES)
    torch.testing.assert_close(nested_ffn(x, wanted, weights, EDGES), expected, rtol=0, atol=1e-12)


def test_many_tokens_take_the_staircase() -> None:
    weights, edges = random_network(63, 77), (0, 30, 60, 77)
    few, many = torch.tensor([3, 1, 0, 2]), torch.tensor([3, 1, 0, 2] * 200)
    assert decide(torch.randn(4, 63, dtype=torch.float64), few, weights, edges).kernel == "capped"
    x = torch.randn(800, 63, dtype=torch.float64)
    assert decide(x, many, weights, edges).kernel == "staircase"
    expected = block_ffn(x, width_masks(many), weights, edges)
    torch.testing.assert_close(nested_ffn(x, many, weights, edges), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("who", ["x", "up", "down_bias"])
def test_a_wanted_gradient_takes_the_reference(who: str) -> None:
    weights, widths = random_network(9, 21, bias=True), torch.tensor([4, 1])
    x = torch.randn(2, 9, dtype=torch.float64)
    wants = x if who == "x" else getattr(weights, who)
    wants.requires_grad_()
    assert decide(x, widths, weights, EDGES).kernel == "reference"
    nested_ffn(x, widths, weights, EDGES).sum().backward()
    found, wants.grad = wants.grad, None
    block_ffn(x, width_masks(widths), weights, EDGES).sum().backward()
    torch.testing.assert_close(found, wants.grad, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert decide(x, widths, weights, EDGES).kernel == "capped"
        assert not nested_ffn(x, widths, weights, EDGES).requires_grad


def test_another_device_takes_the_reference() -> None:
    weights, widths = random_network(9, 21), torch.tensor([4, 1], device="meta")
    decision = decide(torch.empty(2, 9, device="meta"), widths, weights, EDGES)
    assert decision.kernel == "reference"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 16), max_size=20), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_any_widths_give_the_references_result(widths: list[int], gated: bool, bias: bool, seed: int) -> None:
    weights, edges = random_network(31, 77, gated=gated, bias=bias, seed=seed), random_edges(77, 16, seed)
    wanted = torch.tensor(widths, dtype=torch.int64)
    x = torch.randn(len(widths), 31, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = block_ffn(x, width_masks(wanted), weights, edges)
    torch.testing.assert_close(nested_ffn(x, wanted, weights, edges), expected, rtol=0, atol=1e-12)
    assert not nested_ffn(x, wanted, weights, edges).isnan().any()


@given(st.integers(1, 4), st.integers(1, 4))
def test_turning_a_token_up_never_changes_what_it_had(low: int, more: int) -> None:
    """Nesting: the wider result is the narrower one plus the blocks between."""
    weights, edges = random_network(9, 21, seed=low), (0, 3, 5, 7, 9, 11, 13, 20, 21)
    x, between = torch.randn(1, 9, dtype=torch.float64), (1 << low + more) - (1 << low)
    narrow = nested_ffn(x, torch.tensor([low]), weights, edges)
    wide = nested_ffn(x, torch.tensor([low + more]), weights, edges)
    added = block_ffn(x, torch.tensor([between]), weights, edges)
    torch.testing.assert_close(wide, narrow + added, rtol=0, atol=1e-12)
