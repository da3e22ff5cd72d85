"""The CPU kernels against the reference, with uninitialised memory full of NaN."""

from __future__ import annotations

import pytest
import torch
from ffn_networks import random_edges, random_network
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels import cpu
from dynaconv.kernels.cpu import Step, capped_ffn, merge, prefix_ffn, staircase_ffn, stairs
from dynaconv.kernels.reference import block_ffn, width_masks
from dynaconv.kernels.weights import FFNWeights

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
        monkeypatch.setattr(cpu, name, value)
    return str(request.param)


def truth(x: torch.Tensor, widths: torch.Tensor, weights: FFNWeights, edges: tuple[int, ...]) -> torch.Tensor:
    return block_ffn(x, width_masks(widths), weights, edges)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", [1, 5, 64])
def test_odd_shapes(step_cost: str, gated: bool, bias: bool, blocks: int) -> None:
    torch.manual_seed(blocks)
    weights, edges = random_network(D, F, gated=gated, bias=bias), random_edges(F, blocks)
    for tokens in range(1, 18):
        x, widths = torch.randn(tokens, D, dtype=torch.float64), torch.randint(0, blocks + 1, (tokens,))
        expected = truth(x, widths, weights, edges)
        torch.testing.assert_close(staircase_ffn(x, widths, weights, edges), expected, **EXACT)
        torch.testing.assert_close(capped_ffn(x, widths, weights, edges), expected, **EXACT)


@pytest.mark.parametrize("blocks", [1, 5, 64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_every_prefix(gated: bool, bias: bool, blocks: int) -> None:
    weights, edges = random_network(D, F, gated=gated, bias=bias), random_edges(F, blocks)
    for width in range(blocks + 1):
        x = torch.randn(1 + width % 3, D, dtype=torch.float64)
        expected = truth(x, torch.full((len(x),), width), weights, edges)
        torch.testing.assert_close(prefix_ffn(x, width, weights, edges), expected, **EXACT)


@pytest.mark.parametrize(
    "widths",
    [
        pytest.param([0] * 70, id="all zero"),
        pytest.param([6] * 70, id="all full"),
        pytest.param([3] * 70, id="all the same"),
        pytest.param([0] * 69 + [6], id="one full, others zero"),
        pytest.param([6] * 69 + [0], id="one zero, others full"),
        pytest.param([1, 5] * 35, id="only two of the classes"),
        pytest.param([2, 0, 4] * 23 + [0], id="none full"),
        pytest.param(list(range(7)) * 10, id="ascending"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_empty_classes_and_extremes(step_cost: str, widths: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    weights, edges = random_network(D, F, bias=bias), (0, 1, 30, 31, 60, 61, F)
    x, wanted = torch.randn(len(widths), D, dtype=torch.float64), torch.tensor(widths)
    torch.testing.assert_close(staircase_ffn(x, wanted, weights, edges), truth(x, wanted, weights, edges), **EXACT)


def test_no_tokens() -> None:
    weights, none = random_network(D, F, bias=True), torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, D, dtype=torch.float64)
    assert staircase_ffn(x, none, weights, (0, 40, F)).shape == (0, D)
    assert capped_ffn(x, none, weights, (0, 40, F)).shape == (0, D)
    assert prefix_ffn(x, 1, weights, (0, 40, F)).shape == (0, D)


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
    weights = random_network(D, F, gated=gated, bias=bias, activation=activation, seed=seed)
    edges, wanted = random_edges(F, blocks, seed), torch.tensor(widths).clamp(max=blocks)
    x = torch.randn(len(widths), D, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in STEP_COSTS[cost].items():
            patch.setattr(cpu, name, value)
        torch.testing.assert_close(staircase_ffn(x, wanted, weights, edges), truth(x, wanted, weights, edges), **EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [2, 9, 130])
def test_lower_precision(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    torch.manual_seed(tokens)
    weights, edges = random_network(256, 1024, bias=True, dtype=dtype), tuple(range(0, 1025, 128))
    exact = FFNWeights(*(part.double() if isinstance(part, torch.Tensor) else part for part in weights))
    x, widths = torch.randn(tokens, 256, dtype=dtype), torch.randint(0, 9, (tokens,))
    expected = truth(x.double(), widths, exact, edges)
    error = (staircase_ffn(x, widths, weights, edges).double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < tolerance


def test_a_row_does_not_depend_on_the_batch_around_it(step_cost: str) -> None:
    """To rounding: matrix products take other paths for other numbers of rows."""
    torch.manual_seed(0)
    weights, edges = random_network(D, F, bias=True), random_edges(F, 6)
    row, width = torch.randn(1, D, dtype=torch.float64), torch.tensor([3])
    alone = staircase_ffn(row, width, weights, edges)
    for tokens in range(1, 18):
        x = torch.cat([row, torch.randn(tokens, D, dtype=torch.float64)])
        widths = torch.cat([width, torch.randint(0, 7, (tokens,))])
        shuffle = torch.randperm(tokens + 1)
        together = staircase_ffn(x[shuffle], widths[shuffle], weights, edges)
        torch.testing.assert_close(together[shuffle.argsort()[:1]], alone, **EXACT)


@pytest.mark.parametrize("strange", [1e30, torch.nan, torch.inf])
def test_what_the_other_rows_hold_never_changes_a_bit(step_cost: str, strange: float) -> None:
    """Bitwise, as long as the widths are the same: no value of one row reaches another."""
    torch.manual_seed(0)
    weights, edges = random_network(D, F, bias=True), random_edges(F, 6)
    x, widths = torch.randn(20, D, dtype=torch.float64), torch.randint(0, 7, (20,))
    before = staircase_ffn(x, widths, weights, edges)
    assert torch.equal(before, staircase_ffn(x, widths, weights, edges))
    others = torch.arange(20) % 3 != 0
    x[others] = strange
    assert torch.equal(staircase_ffn(x, widths, weights, edges)[~others], before[~others])


def test_an_unused_block_is_not_read() -> None:
    weights, edges = random_network(D, F), (0, 20, 40, F)
    for part in (weights.gate, weights.up, weights.down.t()):
        assert part is not None
        part[40:] = torch.nan
    x = torch.randn(5, D, dtype=torch.float64)
    widths = torch.tensor([2, 0, 1, 2, 1])
    assert staircase_ffn(x, widths, weights, edges).isfinite().all()
    assert capped_ffn(x, widths, weights, edges).isfinite().all()
    assert prefix_ffn(x, 2, weights, edges).isfinite().all()


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(0, 500))
def test_steps_cover_each_use_once_and_merging_adds_no_more_than_its_slack(widths: list[int], slack: int) -> None:
    edges = random_edges(F, 12)
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
