"""The reference against its definition, its gradients, and its bit masks."""

from __future__ import annotations

import pytest
import torch
from ffn_networks import looped_ffn, random_edges, random_network
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels.reference import block_ffn, blocks_on, masked_ffn, width_masks


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_any_choice_of_blocks_is_what_the_loops_give(gated: bool, bias: bool, activation: int) -> None:
    torch.manual_seed(1)
    weights, edges = random_network(7, 11, gated=gated, bias=bias, activation=activation), random_edges(11, 4)
    masks = torch.arange(16)  # every subset of four blocks, none and all among them
    x = torch.randn(16, 7, dtype=torch.float64)
    on = [[bool(mask >> n & 1) for n in range(4)] for mask in range(16)]
    torch.testing.assert_close(
        block_ffn(x, masks, weights, edges), looped_ffn(x, on, weights, edges), rtol=0, atol=1e-12
    )


def test_no_block_is_the_down_bias_or_zeros() -> None:
    x, none = torch.randn(3, 7, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    biased, plain = random_network(7, 11, bias=True), random_network(7, 11)
    assert biased.down_bias is not None
    assert torch.equal(block_ffn(x, none, biased, (0, 5, 11)), biased.down_bias.expand(3, 7))
    assert torch.equal(block_ffn(x, none, plain, (0, 5, 11)), torch.zeros(3, 7, dtype=torch.float64))


@given(st.lists(st.integers(0, 64), min_size=1, max_size=20))
def test_width_masks_are_the_first_bits(widths: list[int]) -> None:
    on = blocks_on(width_masks(torch.tensor(widths)), 64)
    assert on.tolist() == [[n < width for n in range(64)] for width in widths]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8), st.integers(1, 64))
def test_every_bit_of_a_mask_is_its_block(masks: list[int], blocks: int) -> None:
    signed = torch.tensor([mask - 2**64 if mask >= 2**63 else mask for mask in masks])
    assert blocks_on(signed, blocks).tolist() == [[bool(mask >> n & 1) for n in range(blocks)] for mask in masks]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 64), st.booleans(), st.integers(0, 1000))
def test_a_mask_of_zeros_and_ones_is_the_block_mask(tokens: int, blocks: int, gated: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weights, edges = random_network(13, 77, gated=gated, bias=True, seed=seed), random_edges(77, blocks, seed)
    x, masks = torch.randn(tokens, 13, dtype=torch.float64), torch.randint(-(2**63), 2**63 - 1, (tokens,))
    expected = block_ffn(x, masks, weights, edges)
    found = masked_ffn(x, blocks_on(masks, blocks).float(), weights, edges)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_the_float_mask(gated: bool) -> None:
    torch.manual_seed(2)
    weights, edges = random_network(5, 9, gated=gated, bias=True), (0, 2, 3, 9)
    parts = [part.requires_grad_() for part in weights if isinstance(part, torch.Tensor)]
    x, on = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.rand(4, 3, dtype=torch.float64)

    def run(x: torch.Tensor, on: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return masked_ffn(x, on, weights, edges)

    assert torch.autograd.gradcheck(run, (x, on.requires_grad_(), *parts))


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_the_block_mask(gated: bool) -> None:
    torch.manual_seed(3)
    weights, edges = random_network(5, 9, gated=gated, bias=True), (0, 2, 3, 9)
    parts = [part.requires_grad_() for part in weights if isinstance(part, torch.Tensor)]
    x, masks = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0b101, 0b010, 0, 0b111])

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return block_ffn(x, masks, weights, edges)

    assert torch.autograd.gradcheck(run, (x, *parts))


def test_the_gradient_of_a_mask_entry_reaches_only_its_block() -> None:
    weights, edges = random_network(5, 9), (0, 2, 3, 9)
    x = torch.randn(1, 5, dtype=torch.float64)
    on = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    masked_ffn(x, on, weights, edges).sum().backward()
    first = block_ffn(x, torch.tensor([0b001]), weights, edges).sum()
    assert on.grad is not None
    torch.testing.assert_close(on.grad[0, 0], first, rtol=0, atol=1e-12)


def test_an_infinite_neuron_of_an_unused_block_stays_out() -> None:
    weights, edges = random_network(5, 9), (0, 4, 9)
    weights.up[7] = torch.inf
    x = torch.randn(3, 5, dtype=torch.float64)
    assert block_ffn(x, torch.tensor([0, 1, 1]), weights, edges).isfinite().all()
    assert not block_ffn(x, torch.tensor([3, 3, 3]), weights, edges).isfinite().all()
