"""Curves equal their definition computed the slow way, and the labels follow from them."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels.partition import Partition
from dynaconv.profile import curves
from dynaconv.profile.curves import (
    FLOOR,
    BlockNorms,
    agreements,
    best_block_errors,
    curve_widths,
    log_errors,
    log_norms,
    relative_errors,
    width_by_cosine,
    width_by_error,
)


def naive(hidden, down, edges, order):
    """r_n and cosines by their definition, every prefix from scratch, in float64."""
    hidden, down = hidden.double()[:, order], down.double()[:, order]
    full = hidden @ down.T
    prefixes = [hidden[:, :edge] @ down[:, :edge].T for edge in edges]
    errors = torch.stack([(y - full).norm(dim=-1) / full.norm(dim=-1) for y in prefixes], -1)
    cosines = torch.stack([torch.cosine_similarity(y, full, dim=-1) for y in prefixes], -1)
    return errors, cosines


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    neurons = draw(st.integers(2, 40))
    inner = sorted(draw(st.sets(st.integers(1, neurons - 1), max_size=8)))
    tokens, width = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    return torch.randn(tokens, neurons), torch.randn(width, neurons), (0, *inner, neurons), torch.randperm(neurons)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_curves_equal_their_definition(case) -> None:
    hidden, down, edges, order = case
    errors, cosines = naive(hidden, down, edges, order)
    found = relative_errors(hidden, down, edges, order)
    both = agreements(hidden, down, edges, order)
    assert found.dtype == torch.float32
    assert torch.equal(found[:, 0], torch.ones(len(hidden)))
    assert torch.equal(found[:, -1], torch.zeros(len(hidden)))
    bound = {"rtol": 1e-4, "atol": 1e-4 * float(errors.max())}  # a full output near zero blows rounding up
    torch.testing.assert_close(found.double(), errors, **bound)
    torch.testing.assert_close(both.errors.double(), errors, **bound)
    torch.testing.assert_close(both.cosines[:, -1], torch.ones(len(hidden)))
    torch.testing.assert_close(both.cosines.double(), cosines, rtol=1e-3, atol=1e-3)


def added_by_blocks(hidden, down, edges):
    """What each block adds, by its definition in float64: (M, N, D)."""
    return torch.stack([hidden[:, a:b].double() @ down[:, a:b].double().T for a, b in pairwise(edges)], 1)


def of_best_blocks(added, norms, widths):
    """Relative error of each token's n best blocks, one token and one width at a time."""
    full, errors = added.sum(1), torch.ones(len(added), len(widths), dtype=torch.float64)
    for token, order in enumerate(norms.argsort(dim=1, descending=True, stable=True)):
        for column, width in enumerate(widths):
            kept = added[token, order[:width]].sum(0)
            errors[token, column] = (kept - full[token]).norm() / full[token].norm()
    return errors


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 400))
def test_what_blocks_add_equals_its_definition(case, parts) -> None:
    hidden, down, edges, _ = case
    partition, widths = Partition.at(edges), range(len(edges))
    parts_before, curves.PARTS = curves.PARTS, parts  # blocks are factored in pieces
    try:
        norms = BlockNorms(down, partition)(hidden)
    finally:
        curves.PARTS = parts_before
    added = added_by_blocks(hidden, down, edges)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), added.norm(dim=-1), rtol=1e-4, atol=1e-4)
    expected = of_best_blocks(added, norms, widths)
    found = best_block_errors(hidden, down, partition, norms, widths)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * max(1.0, float(expected.max())))


@pytest.mark.parametrize("block_size", [1, 3, 16, 40, 100])
def test_blocks_of_any_size_are_measured_and_the_last_may_be_smaller(block_size: int) -> None:
    torch.manual_seed(block_size)
    hidden, down = torch.randn(9, 100), torch.randn(24, 100)
    partition = Partition.equal(100, block_size)
    norms, widths = BlockNorms(down, partition)(hidden), curve_widths(partition, "routed")
    added = added_by_blocks(hidden, down, partition.edges)
    torch.testing.assert_close(norms.double(), added.norm(dim=-1), rtol=1e-5, atol=1e-6)
    found = best_block_errors(hidden, down, partition, norms, widths)
    torch.testing.assert_close(found.double(), of_best_blocks(added, norms, widths), rtol=1e-4, atol=1e-5)
    assert bool((found[:, 0] == 1).all()) and bool((found[:, -1] == 0).all())


@pytest.mark.parametrize("left", [1e-3, 1e-5])
def test_neurons_that_cancel_keep_the_accuracy_of_float32(left: float) -> None:
    """Norms far below those of a block's neurons are as right as those of the sum itself; a Gram matrix loses them."""
    torch.manual_seed(0)
    column, rest = torch.randn(200, 1, dtype=torch.float64), torch.randn(200, 1, dtype=torch.float64)
    down = torch.cat([column, -column + left * rest], 1).float()  # the two neurons of a block all but cancel
    hidden = torch.ones(4, 2) * torch.rand(4, 1)
    found = BlockNorms(down, Partition.equal(2, 2))(hidden)[:, 0]
    exact = (hidden.double() @ down.double().T).norm(dim=-1)
    assert float(((found - exact) / exact).abs().max()) < 10 * torch.finfo(torch.float32).eps / left


def test_curves_of_many_routed_blocks_are_measured_at_few_widths() -> None:
    assert curve_widths(Partition.equal(8, 1), "routed") == tuple(range(9))
    assert curve_widths(Partition.equal(14336, 1), "routed") == (0, 3584, 7168, 10752, 14336)
    assert curve_widths(Partition.equal(100, 9), "routed") == (0, 3, 6, 9, 12)
    assert curve_widths(Partition.at(range(101)), "nested") == tuple(range(101))


def test_what_a_blocks_router_predicts() -> None:
    norms = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    targets = log_norms(norms)
    torch.testing.assert_close(targets[0, :2], norms[0, :2].log())
    assert float(targets[0, 2]) == pytest.approx(math.log(2 * FLOOR))
    assert bool(targets.isfinite().all())
    weighted = log_norms(norms, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(weighted[0] - targets[0], torch.full((3,), math.log(3.0)))


@settings(max_examples=30, deadline=None)
@given(cases())
def test_an_order_is_a_permutation_of_the_neurons(case) -> None:
    hidden, down, edges, order = case
    found = relative_errors(hidden, down, edges, order)
    expected = relative_errors(hidden[:, order], down[:, order], edges)
    # the two sum in another order, and a full output near zero blows rounding up
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_a_known_full_output_saves_the_second_projection() -> None:
    hidden, down, edges = torch.randn(5, 12), torch.randn(4, 12), (0, 4, 8, 12)
    known = agreements(hidden, down, edges, full=hidden @ down.T)
    for with_it, without in zip(known, agreements(hidden, down, edges), strict=True):
        torch.testing.assert_close(with_it, without)


def test_a_token_without_output_has_a_curve_all_the_same() -> None:
    hidden, down = torch.zeros(2, 6), torch.randn(3, 6)
    errors, cosines = agreements(hidden, down, (0, 2, 4, 6))
    assert errors.tolist() == [[1.0, 1.0, 1.0, 0.0]] * 2
    assert cosines.tolist() == [[0.0, 0.0, 0.0, 1.0]] * 2
    assert relative_errors(hidden, down, (0, 2, 4, 6)).tolist() == errors.tolist()


def test_classes_are_the_smallest_width_that_agrees() -> None:
    errors = torch.tensor([[1.0, 0.6, 0.2, 0.0], [1.0, 0.1, 0.3, 0.0], [1.0, 0.9, 0.8, 0.0]])
    assert width_by_error(errors, 0.8).tolist() == [2, 1, 3]
    assert width_by_error(errors, 1.0).tolist() == [3, 3, 3]
    assert width_by_error(errors, 0.0).tolist() == [0, 0, 0]
    cosines = torch.tensor([[0.0, 0.5, 0.9, 1.0], [0.0, 0.85, 0.7, 1.0], [0.0, 0.1, 0.2, 0.9999999]])
    assert width_by_cosine(cosines, 0.8).tolist() == [2, 1, 3]
    assert width_by_cosine(cosines, 1.0).tolist() == [3, 3, 3]


@settings(max_examples=30, deadline=None)
@given(cases())
def test_asking_for_more_agreement_never_narrows(case) -> None:
    hidden, down, edges, order = case
    errors, cosines = agreements(hidden, down, edges, order)
    for label, curve in ((width_by_error, errors), (width_by_cosine, cosines)):
        widths = [label(curve, theta) for theta in (0.1, 0.5, 0.8, 0.95, 1.0)]
        assert all(bool((low <= high).all()) for low, high in pairwise(widths))
        assert int(widths[-1].max()) <= len(edges) - 1


def test_log_errors_are_floored_and_weighted() -> None:
    errors = torch.tensor([[1.0, 0.5, 1e-9, 0.0]])
    expected = torch.tensor([[0.0, 0.5, FLOOR]])
    expected[:, 1:] = expected[:, 1:].log()
    torch.testing.assert_close(log_errors(errors), expected)
    weighted = log_errors(errors, torch.tensor([3.0]))
    torch.testing.assert_close(weighted, expected + torch.tensor(3.0).log())
    assert float(weighted[0, 0]) == pytest.approx(float(torch.tensor(3.0).log()))
