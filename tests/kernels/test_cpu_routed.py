"""The kernels for blocks of each token's own choice against the reference, with uninitialised memory full of NaN."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from ffn_networks import in_double, partitions, random_choice, random_network, random_partition
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels import cpu_nested, cpu_routed
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Subset
from dynaconv.kernels.cpu_routed import grouped_ffn, kernel_for, masked_ffn, pieces, run, runs, union_ffn
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D, F = 63, 77
EXACT = {"rtol": 0.0, "atol": 1e-12}
KERNELS = (union_ffn, grouped_ffn, masked_ffn)


def network(partition: Partition, **settings: Any) -> BlockedFFN:
    return BlockedFFN(random_network(D, partition.neurons, **settings), partition)


def random_subset(tokens: int, blocks: int, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    choice = random_choice(Subset, tokens, blocks, share=share, seed=seed)
    assert isinstance(choice, Subset)
    return choice.on


def check(ffn: BlockedFFN, x: torch.Tensor, on: torch.Tensor) -> None:
    expected = blocked_ffn(ffn, x, Subset(on))
    for kernel in KERNELS:
        torch.testing.assert_close(kernel(ffn, x, on), expected, **EXACT)
    torch.testing.assert_close(run(ffn, x, Subset(on)), expected, **EXACT)


@pytest.mark.parametrize("gap", [0, 3, 10**6])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cut", sorted(partitions(F)))
def test_odd_shapes(gated: bool, bias: bool, cut: str, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_routed, "GAP", gap)
    torch.manual_seed(1)
    ffn = network(partitions(F)[cut], gated=gated, bias=bias)
    for tokens in range(1, 18):
        x = torch.randn(tokens, D, dtype=torch.float64)
        check(ffn, x, random_subset(tokens, ffn.partition.blocks, tokens / 17, tokens))


@pytest.mark.parametrize("rounded", [False, True], ids=["", "rounded rows"])
@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(1, 77),
    tokens=st.integers(0, 70),
    gated=st.booleans(),
    bias=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_any_blocks(rounded: bool, blocks: int, tokens: int, gated: bool, bias: bool, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    ffn = network(random_partition(F, blocks, seed), gated=gated, bias=bias, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        if rounded:
            patch.setitem(cpu_nested.STEP_COST, torch.float64, 0)
        check(ffn, torch.randn(tokens, D, dtype=torch.float64), random_subset(tokens, blocks, share, seed))


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_hundreds_of_blocks(tokens: int) -> None:
    ffn, x = network(Partition.equal(1000, 3), bias=True), torch.randn(tokens, D, dtype=torch.float64)
    for share in (0.02, 0.5, 0.98):
        check(ffn, x, random_subset(tokens, 334, share))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 1])
def test_half_precision_is_added_up_in_single(dtype: torch.dtype, size: int) -> None:
    ffn = BlockedFFN(random_network(64, 512, dtype=dtype), Partition.equal(512, size))
    x, on = torch.randn(40, 64).to(dtype), random_subset(40, 512 // size)
    expected = blocked_ffn(in_double(ffn), x.double(), Subset(on))
    for kernel in KERNELS:
        found = kernel(ffn, x, on)
        assert found.dtype == dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert float(error) < 4 * torch.finfo(dtype).eps, kernel


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 9])
def test_no_block_and_all_blocks(share: float, bias: bool, tokens: int) -> None:
    ffn, x = network(random_partition(F, 64), bias=bias), torch.randn(tokens, D, dtype=torch.float64)
    check(ffn, x, torch.full((tokens, 64), bool(share)))


@pytest.mark.parametrize("edges", [(0, 30, 50, F), (0, 26, 52, F)])
def test_what_a_token_does_not_use_does_not_reach_it(edges: tuple[int, ...]) -> None:
    ffn = network(Partition.at(edges))
    ffn.weights.up[edges[1] : edges[2]] = torch.inf
    x = torch.randn(4, D, dtype=torch.float64)
    on = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    for kernel in KERNELS:
        assert kernel(ffn, x, on).isfinite().all(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_block_that_no_token_uses_is_not_read(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_routed, "GAP", 0)
    ffn = network(Partition.at((0, 20, 40, F)))
    for part in (ffn.weights.gate, ffn.weights.up, ffn.weights.down.t()):
        assert part is not None
        part[20:40] = torch.nan
    x, on = torch.randn(tokens, D, dtype=torch.float64), torch.tensor([[True, False, True]]).expand(tokens, 3)
    for kernel in (union_ffn, grouped_ffn):
        assert kernel(ffn, x, on).isfinite().all()


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    """To rounding: matrix products take other paths for other numbers of rows."""
    torch.manual_seed(0)
    ffn = network(Partition.equal(F, 4), bias=True)
    row, own = torch.randn(1, D, dtype=torch.float64), random_subset(1, 20)
    alone = blocked_ffn(ffn, row, Subset(own))
    for tokens in range(1, 18):
        x = torch.cat([row, torch.randn(tokens, D, dtype=torch.float64)])
        on = torch.cat([own, random_subset(tokens, 20, seed=tokens)])
        shuffle = torch.randperm(tokens + 1)
        for kernel in KERNELS:
            together = kernel(ffn, x[shuffle], on[shuffle])
            torch.testing.assert_close(together[shuffle.argsort()[:1]], alone, **EXACT)


@pytest.mark.parametrize("strange", [1e30, torch.nan, torch.inf])
def test_what_the_other_rows_hold_never_changes_a_bit(strange: float) -> None:
    torch.manual_seed(0)
    ffn, on = network(random_partition(F, 6), bias=True), random_subset(20, 6)
    x, others = torch.randn(20, D, dtype=torch.float64), torch.arange(20) % 3 != 0
    before = [kernel(ffn, x, on) for kernel in KERNELS]
    x[others] = strange
    for kernel, expected in zip(KERNELS, before, strict=True):
        assert torch.equal(kernel(ffn, x, on)[~others], expected[~others])


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_what_is_used(used: list[bool]) -> None:
    found = runs(used)
    assert [block for first, end in found for block in range(first, end)] == [b for b, on in enumerate(used) if on]
    assert all(first < end for first, end in found)
    assert all(one[1] < other[0] for one, other in pairwise(found)), "runs that touch are one"


@given(st.lists(st.integers(1, 900), max_size=20).filter(lambda steps: len(steps) % 2 == 0))
def test_pieces_are_joined_over_small_gaps(steps: list[int]) -> None:
    edges = [sum(steps[: n + 1]) for n in range(len(steps))]
    used = list(zip(edges[::2], edges[1::2], strict=True))
    found = pieces(used)
    assert [run for piece in found for run in piece] == used
    for piece in found:
        assert all(b[0] - a[1] <= cpu_routed.GAP for a, b in pairwise(piece))
    assert all(b[0][0] - a[-1][1] > cpu_routed.GAP for a, b in pairwise(found))


@pytest.mark.parametrize(("cost", "kernel"), [(0, "grouped"), (D * 10**9, "masked")])
def test_steps_are_weighed_against_arithmetic(cost: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_nested, "STEP_COST_OTHER", cost)
    ffn = network(random_partition(F, 5))
    x, on = torch.randn(40, D, dtype=torch.float64), random_subset(40, 5)
    assert kernel_for(ffn, x, on)[0] == kernel
    check(ffn, x, on)


def test_each_kernel_has_its_case() -> None:
    """What decides is measured, and may change; that these extremes differ may not."""
    wide = BlockedFFN(random_network(256, 16384, dtype=torch.float32), Partition.equal(16384, 64))
    one, few, many = (torch.randn(tokens, 256) for tokens in (1, 4, 1024))
    alternating = (torch.arange(256) % 2 == 0)[None]
    first_half = (torch.arange(256) < 128)[None]
    assert kernel_for(wide, one, first_half)[0] == "union", "one run of a token's own blocks"
    assert kernel_for(wide, few, first_half.expand(4, -1))[0] == "union", "tokens agree"
    coarse = BlockedFFN(wide.weights, Partition.equal(16384, 1024))
    assert kernel_for(coarse, many, random_subset(1024, 16))[0] == "grouped", "much arithmetic in few steps"
    fine = BlockedFFN(wide.weights, Partition.equal(16384, 1))
    assert kernel_for(fine, one, alternating.repeat(1, 64))[0] == "masked", "thousands of scattered neurons"
    assert kernel_for(fine, few, random_subset(4, 16384))[0] == "masked"
    assert kernel_for(wide, few, torch.ones(4, 256, dtype=torch.bool))[0] != "grouped", "there is nothing to leave out"


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products then come in half precision, whatever the weights are in."""
    monkeypatch.setattr(cpu_routed, "GAP", 0)
    ffn = BlockedFFN(random_network(64, 512, dtype=torch.float32), Partition.equal(512, 8))
    for tokens in (1, 40):
        x, on = torch.randn(tokens, 64), random_subset(tokens, 64)
        expected = blocked_ffn(ffn, x, Subset(on))
        with torch.autocast("cpu", torch.bfloat16):
            found = [kernel(ffn, x, on) for kernel in KERNELS]
        for one in found:
            assert float((one.float() - expected).norm() / expected.norm()) < 2e-2
