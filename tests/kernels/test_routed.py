"""The kernels for blocks of each token's own choice against the reference, with uninitialised memory full of NaN."""

from __future__ import annotations

import pytest
import torch
from ffn_networks import random_edges, random_network
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels import cpu, dispatch, routed
from dynaconv.kernels.dispatch import decide_routed, routed_ffn
from dynaconv.kernels.reference import bit_masks, block_ffn, blocks_on
from dynaconv.kernels.routed import grouped_ffn, grouping_pays, runs, union_ffn
from dynaconv.kernels.weights import FFNWeights

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D, F = 63, 77
EXACT = {"rtol": 0.0, "atol": 1e-12}


def random_masks(tokens: int, blocks: int, share: float = 0.5) -> torch.Tensor:
    return bit_masks(torch.rand(tokens, blocks) < share)


@pytest.mark.parametrize("gap", [0, 3, 10**6])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", [1, 5, 64])
def test_odd_shapes(gated: bool, bias: bool, blocks: int, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "GAP", gap)
    torch.manual_seed(blocks)
    weights, edges = random_network(D, F, gated=gated, bias=bias), random_edges(F, blocks)
    for tokens in range(1, 18):
        x, masks = torch.randn(tokens, D, dtype=torch.float64), random_masks(tokens, blocks, tokens / 17)
        expected = block_ffn(x, masks, weights, edges)
        for kernel in (union_ffn, grouped_ffn, routed_ffn):
            torch.testing.assert_close(kernel(x, masks, weights, edges), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_single(dtype: torch.dtype) -> None:
    weights, edges, x = random_network(64, 512, dtype=dtype), tuple(range(0, 513, 8)), torch.randn(40, 64).to(dtype)
    masks = random_masks(40, 64)
    exact = FFNWeights(*(one.float() if isinstance(one, torch.Tensor) else one for one in weights))
    expected = block_ffn(x.float(), masks, exact, edges)
    for kernel in (union_ffn, grouped_ffn):
        found = kernel(x, masks, weights, edges)
        assert found.dtype == dtype
        error = (found.float() - expected).norm() / expected.norm()
        assert float(error) < 4 * torch.finfo(dtype).eps, kernel


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_no_block_and_all_blocks(share: float, bias: bool) -> None:
    weights, edges, x = random_network(D, F, bias=bias), random_edges(F, 64), torch.randn(9, D, dtype=torch.float64)
    masks = random_masks(9, 64, share)
    assert masks.tolist() == [-1 if share else 0] * 9, "bit 63 is the sign"
    for kernel in (union_ffn, grouped_ffn):
        torch.testing.assert_close(kernel(x, masks, weights, edges), block_ffn(x, masks, weights, edges), **EXACT)


def test_what_a_token_does_not_use_does_not_reach_it() -> None:
    weights, edges = random_network(D, F), (0, 30, 50, F)
    weights.up[30:50] = torch.inf
    x = torch.randn(4, D, dtype=torch.float64)
    masks = torch.tensor([0b101, 0b111, 0b001, 0b100])
    for kernel in (union_ffn, grouped_ffn):
        assert kernel(x, masks, weights, edges).isfinite().all(1).tolist() == [True, False, True, True]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_masks_are_bits(values: list[int]) -> None:
    masks = torch.tensor(values)
    on = blocks_on(masks, 64)
    assert torch.equal(bit_masks(on), masks)
    for value, row in zip(values, on.tolist(), strict=True):
        covered = [block for first, end in runs(value, 64) for block in range(first, end)]
        assert covered == [block for block, used in enumerate(row) if used]


@pytest.mark.parametrize(("cost", "kernel"), [(0, "grouped"), (D * 10**9, "union")])
def test_steps_are_weighed_against_arithmetic(cost: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "STEP_COST_OTHER", cost)
    weights, edges = random_network(D, F), random_edges(F, 5)
    x, masks = torch.randn(40, D, dtype=torch.float64), random_masks(40, 5)
    assert grouping_pays(x, masks, edges) == (kernel == "grouped")
    assert decide_routed(x, masks, weights, edges).kernel == kernel
    assert decide_routed(x[:1], masks[:1], weights, edges) is dispatch.ONE
    everything = random_masks(40, 5, 1.0)
    assert decide_routed(x, everything, weights, edges).kernel == "union", "there is nothing to leave out"
    torch.testing.assert_close(routed_ffn(x, masks, weights, edges), block_ffn(x, masks, weights, edges), **EXACT)


def test_pieces_are_joined_over_small_gaps() -> None:
    assert routed.pieces([(0, 10), (10 + routed.GAP, 900), (901 + routed.GAP, 2000)]) == [
        [(0, 10), (10 + routed.GAP, 900)],
        [(901 + routed.GAP, 2000)],
    ]
    assert routed.pieces([]) == []


def test_no_tokens_and_gradients() -> None:
    weights, edges = random_network(D, F), random_edges(F, 5)
    none = routed_ffn(torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), weights, edges)
    assert none.shape == (0, D)
    x, masks = torch.randn(6, D, dtype=torch.float64, requires_grad=True), random_masks(6, 5)
    assert decide_routed(x, masks, weights, edges) is dispatch.GRADIENT
    routed_ffn(x, masks, weights, edges).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    with torch.no_grad():
        assert decide_routed(x, masks, weights, edges) is not dispatch.GRADIENT
