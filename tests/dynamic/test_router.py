"""Routers: every kind's width rises with its level, reaches both ends, and is solved to a budget."""

from __future__ import annotations

import math

import pytest
import torch
from dynamic_models import ROUTERS
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.dynamic.router import Router, solve_level

EDGES = (0, 3, 7, 8, 16, 20)
KINDS = ("gate", "curve", "class", "blocks")


def router(kind: str, seed: int) -> Router:
    torch.manual_seed(seed)
    made = Router(6, EDGES, ROUTERS[kind])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), parts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_width_never_falls_as_the_level_rises(kind: str, seed: int, parts: tuple[float, float]) -> None:
    made = router(kind, seed)
    scores = made(torch.randn(50, 6))
    bottom, top = made.level_range()
    low, high = (bottom + part * (top - bottom) for part in sorted(parts))
    assert bool((made.widths(scores, low) <= made.widths(scores, high)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_are_reached(kind: str) -> None:
    made = router(kind, 0)
    scores = made(torch.randn(200, 6))
    assert bool((made.widths(scores, math.inf) == 5).all())
    assert bool((made.widths(scores, made.level_range()[1]) == 5).all())
    lowest = made.widths(scores, made.level_range()[0])
    assert int(lowest.max()) <= 1  # a class router's smallest class is one block


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_per_sequence_is_the_level_of_each(kind: str) -> None:
    made = router(kind, 3)
    scores = made(torch.randn(2, 9, 6))
    low, high = made.level_range()
    levels = torch.tensor([low + 0.4 * (high - low), low + 0.7 * (high - low)])
    both = made.widths(scores, levels[:, None])
    for row in range(2):
        assert torch.equal(both[row], made.widths(scores[row], float(levels[row])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_solved_level_spends_the_budget(kind: str, budget: float) -> None:
    routers = [router(kind, seed) for seed in range(3)]
    scores = [made(torch.randn(4000, 6)) for made in routers]
    level = solve_level(routers[0], scores, budget)
    share = torch.tensor(EDGES) / EDGES[-1]
    spent = sum(float(share[made.widths(s, level)].mean()) for made, s in zip(routers, scores, strict=True)) / 3
    assert spent == pytest.approx(budget, abs=0.01)


@pytest.mark.parametrize("kind", ["gate", "blocks"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.floats(0.1, 0.95))
def test_no_block_hangs_on_how_a_score_was_rounded(kind: str, seed: int, budget: float) -> None:
    made = router(kind, seed)
    scores = made(torch.randn(300, 6)).detach()
    level = solve_level(made, [scores], budget)
    margins = made.margins(scores, level).flatten()  # a block goes on or off where its margin is 0
    last_on, first_off = float(margins[margins > 0].min()), float(-margins[margins <= 0].max())
    assert last_on == pytest.approx(first_off, abs=2e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), parts=st.tuples(st.floats(0, 1), st.floats(0, 1)), width=st.integers(0, 4))
def test_no_block_is_lost_as_the_dial_rises(seed: int, parts: tuple[float, float], width: int) -> None:
    made = router("blocks", seed)
    scores, (bottom, top) = made(torch.randn(50, 6)).detach(), made.level_range()
    low, high = (bottom + part * (top - bottom) for part in sorted(parts))
    assert not bool((made.choose(scores, low) & ~made.choose(scores, high)).any())
    fewer, more = made.most_wanted(scores, width), made.most_wanted(scores, width + 1)
    assert bool((fewer.sum(-1) == width).all()) and not bool((fewer & ~more).any())
    for row, on in zip(scores, fewer, strict=True):
        assert width == 0 or float(row[on].min()) >= float(row[~on].max())


def test_gate_scores_are_bounded_and_start_silent() -> None:
    fresh = Router(6, EDGES, ROUTERS["gate"])
    assert float(fresh(torch.randn(10, 6)).detach().abs().max()) == 0.0
    loud = router("gate", 0)
    with torch.no_grad():
        loud.output.weight.mul_(1e4)  # type: ignore[union-attr]
    assert float(loud(torch.randn(100, 6)).detach().abs().max()) <= 3.0


def test_curve_width_is_the_cheapest_trade() -> None:
    made = Router(6, EDGES, ROUTERS["curve"])
    scores = torch.randn(40, 5)
    level, share = 0.7, torch.tensor(EDGES) / EDGES[-1]
    errors = torch.cat([scores.exp(), torch.zeros(40, 1)], dim=1)
    expected = [min(range(6), key=lambda n: float(row[n] + math.exp(-level) * share[n])) for row in errors]
    assert made.widths(scores, level).tolist() == expected
