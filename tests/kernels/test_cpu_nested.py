"""The CPU kernels for prefixes of blocks against the reference, with uninitialised memory full of NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn_networks import in_double, partitions, random_network, random_partition
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels import cpu_nested
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Prefix
from dynaconv.kernels.cpu_nested import Step, capped_ffn, merge, prefix_ffn, run, staircase_ffn, stairs
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D, F = 63, 77
EXACT = {"rtol": 0.0, "atol": 1e-12}
STEP_COSTS = {  # how float64, which the tests compute in, is treated: real costs would make one step of so few rows
    "every step": {"STEP_COST_OTHER": 0},
    "some steps merged": {"STEP_COST_OTHER": D * 50},
    "one step": {"STEP_COST_OTHER": D * 10**6},
    "rounded rows": {"STEP_COST": {torch.float64: 0}},
    "rounded and merged": {"STEP_COST": {torch.float64: D * 50}},
}


@pytest.fixture(params=STEP_COSTS)
def step_cost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in STEP_COSTS[request.param].items():
        monkeypatch.setattr(cpu_nested, name, value)
    return str(request.param)


def truth(ffn: BlockedFFN, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    return blocked_ffn(ffn, x, Prefix(widths))


CUT = sorted(partitions(F))


def network(partition: Partition, **settings: Any) -> BlockedFFN:
    return BlockedFFN(random_network(D, partition.neurons, **settings), partition)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cut", CUT)
def test_odd_shapes(step_cost: str, gated: bool, bias: bool, cut: str) -> None:
    torch.manual_seed(1)
    ffn = network(partitions(F)[cut], gated=gated, bias=bias)
    for tokens in range(1, 18):
        x, widths = torch.randn(tokens, D, dtype=torch.float64), torch.randint(0, ffn.partition.blocks + 1, (tokens,))
        expected = truth(ffn, x, widths)
        for kernel in (staircase_ffn, capped_ffn):
            torch.testing.assert_close(kernel(ffn, x, widths), expected, **EXACT)
        torch.testing.assert_close(run(ffn, x, Prefix(widths)), expected, **EXACT)


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_every_width(gated: bool, bias: bool, cut: str) -> None:
    ffn = network(partitions(F)[cut], gated=gated, bias=bias)
    for width in range(ffn.partition.blocks + 1):
        x = torch.randn(1 + width % 3, D, dtype=torch.float64)
        expected = truth(ffn, x, torch.full((len(x),), width))
        torch.testing.assert_close(prefix_ffn(ffn, x, width), expected, **EXACT)


@pytest.mark.parametrize(
    "widths",
    [
        pytest.param([0] * 70, id="all zero"),
        pytest.param([6] * 70, id="all full"),
        pytest.param([3] * 70, id="all the same"),
        pytest.param([0] * 69 + [6], id="one full, others zero"),
        pytest.param([6] * 69 + [0], id="one zero, others full"),
        pytest.param([1, 5] * 35, id="only two of the widths"),
        pytest.param([2, 0, 4] * 23 + [0], id="none full"),
        pytest.param(list(range(7)) * 10, id="ascending"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_unused_widths_and_extremes(step_cost: str, widths: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    ffn = network(Partition.at((0, 1, 30, 31, 60, 61, F)), bias=bias)
    x, wanted = torch.randn(len(widths), D, dtype=torch.float64), torch.tensor(widths)
    expected = truth(ffn, x, wanted)
    for kernel in (staircase_ffn, capped_ffn):
        torch.testing.assert_close(kernel(ffn, x, wanted), expected, **EXACT)


def test_hundreds_of_blocks(step_cost: str) -> None:
    torch.manual_seed(0)
    ffn = network(Partition.equal(1000, 3), bias=True)
    x, widths = torch.randn(70, D, dtype=torch.float64), torch.randint(0, 335, (70,))
    torch.testing.assert_close(staircase_ffn(ffn, x, widths), truth(ffn, x, widths), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_no_tokens(bias: bool) -> None:
    ffn, none = network(Partition.at((0, 40, F)), bias=bias), torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, D, dtype=torch.float64)
    for found in (staircase_ffn(ffn, x, none), capped_ffn(ffn, x, none), prefix_ffn(ffn, x, 1)):
        assert found.shape == (0, D)
    assert run(ffn, x, Prefix(none)).shape == (0, D)


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 64),
    widths=st.lists(st.integers(0, 64), min_size=1, max_size=90),
    gated=st.booleans(),
    bias=st.booleans(),
    activation=st.integers(0, 2),
    cost=st.sampled_from(sorted(STEP_COSTS)),
    seed=st.integers(0, 1000),
)
def test_any_widths(
    blocks: int, widths: list[int], gated: bool, bias: bool, activation: int, cost: str, seed: int
) -> None:
    torch.manual_seed(seed)
    ffn = network(random_partition(F, blocks, seed), gated=gated, bias=bias, activation=activation, seed=seed)
    wanted = torch.tensor(widths).clamp(max=blocks)
    x = torch.randn(len(widths), D, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in STEP_COSTS[cost].items():
            patch.setattr(cpu_nested, name, value)
        torch.testing.assert_close(staircase_ffn(ffn, x, wanted), truth(ffn, x, wanted), **EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("tokens", [2, 9, 130])
def test_lower_precision(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    torch.manual_seed(tokens)
    ffn = BlockedFFN(random_network(256, 1024, bias=True, dtype=dtype), Partition.equal(1024, 128))
    x, widths = torch.randn(tokens, 256).to(dtype), torch.randint(0, 9, (tokens,))
    expected, found = truth(in_double(ffn), x.double(), widths), staircase_ffn(ffn, x, widths)
    assert found.dtype == dtype
    error = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < tolerance


def test_a_row_does_not_depend_on_the_batch_around_it(step_cost: str) -> None:
    """To rounding: matrix products take other paths for other numbers of rows."""
    torch.manual_seed(0)
    ffn = network(random_partition(F, 6), bias=True)
    row, width = torch.randn(1, D, dtype=torch.float64), torch.tensor([3])
    alone = staircase_ffn(ffn, row, width)
    for tokens in range(1, 18):
        x = torch.cat([row, torch.randn(tokens, D, dtype=torch.float64)])
        widths = torch.cat([width, torch.randint(0, 7, (tokens,))])
        shuffle = torch.randperm(tokens + 1)
        together = staircase_ffn(ffn, x[shuffle], widths[shuffle])
        torch.testing.assert_close(together[shuffle.argsort()[:1]], alone, **EXACT)


@pytest.mark.parametrize("strange", [1e30, torch.nan, torch.inf])
def test_what_the_other_rows_hold_never_changes_a_bit(step_cost: str, strange: float) -> None:
    """Bitwise, as long as the widths are the same: no value of one row reaches another."""
    torch.manual_seed(0)
    ffn = network(random_partition(F, 6), bias=True)
    x, widths = torch.randn(20, D, dtype=torch.float64), torch.randint(0, 7, (20,))
    before = staircase_ffn(ffn, x, widths)
    assert torch.equal(before, staircase_ffn(ffn, x, widths))
    others = torch.arange(20) % 3 != 0
    x[others] = strange
    assert torch.equal(staircase_ffn(ffn, x, widths)[~others], before[~others])


@pytest.mark.parametrize("kernel", [staircase_ffn, capped_ffn])
def test_an_infinite_neuron_of_an_unused_block_stays_out(kernel: Any, step_cost: str) -> None:
    ffn = network(Partition.at((0, 30, 50, F)), bias=True)
    ffn.weights.up[30:50] = torch.inf
    x = torch.randn(4, D, dtype=torch.float64)
    assert kernel(ffn, x, torch.tensor([1, 3, 0, 2])).isfinite().all(1).tolist() == [True, False, True, False]


def test_an_unused_block_is_not_read() -> None:
    ffn = network(Partition.at((0, 20, 40, F)))
    for part in (ffn.weights.gate, ffn.weights.up, ffn.weights.down.t()):
        assert part is not None
        part[40:] = torch.nan
    x = torch.randn(5, D, dtype=torch.float64)
    widths = torch.tensor([2, 0, 1, 2, 1])
    assert staircase_ffn(ffn, x, widths).isfinite().all()
    assert capped_ffn(ffn, x, widths).isfinite().all()
    assert prefix_ffn(ffn, x, 2).isfinite().all()


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(0, 500))
def test_steps_cover_each_use_once_and_merging_adds_no_more_than_its_slack(widths: list[int], slack: int) -> None:
    edges = random_partition(F, 12).edges
    ordered = sorted(widths, reverse=True)
    steps = stairs(ordered, edges)
    used = [[position < edges[width] for position in range(F)] for width in ordered]
    assert covered(steps, len(widths)) == used
    joined = merge(steps, slack)
    assert [step.start for step in joined[1:]] == [step.stop for step in joined[:-1]]
    assert all(
        rows.count(True) >= want.count(True) for rows, want in zip(covered(joined, len(widths)), used, strict=True)
    )
    for step in joined:
        inside = [old for old in steps if step.start <= old.start < step.stop]
        waste = sum((step.rows - old.rows) * (old.stop - old.start) for old in inside)
        assert waste <= slack


def covered(steps: list[Step], rows: int) -> list[list[bool]]:
    """Which neuron of which row the steps compute; fails where one is computed twice."""
    found = [[False] * F for _ in range(rows)]
    for count, start, stop in steps:
        for row in range(count):
            for neuron in range(start, stop):
                assert not found[row][neuron]
                found[row][neuron] = True
    return found
