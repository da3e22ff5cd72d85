"""The dial is a value: it refuses what it cannot mean, and turning it up never takes anything away."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from dynamic_models import a_frontier
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.dynamic.dial import Dial, as_dial
from dynaconv.dynamic.layout import DialTable, FFNLayout, Layout
from dynaconv.dynamic.thresholds import Thresholds
from dynaconv.kernels.partition import Partition

LAYOUT = Layout(
    partition=Partition.equal(20, 4),
    layers=2,
    ffn=FFNLayout("layers.{layer}.mlp", "gate", "up", "down", "act"),
    dial=DialTable((0.25, 0.5, 1.0), ((0.0, -1.0), (-2.0, -2.0), (-9.0, -9.0))),
    frontier=a_frontier((0.25, 0.5, 1.0), (0.8, 0.9, 1.02)),
)
NEURONS = replace(
    LAYOUT,
    means=(0.25, 0.5),
    dial=DialTable(
        (0.25, 0.5, 1.0),
        thresholds=((3.0, 3.0), (1.0, 1.0), (-9.0, -9.0)),
        exact=((4.0, 4.0), (2.0, 2.0), (-9.0, -9.0)),
    ),
)
UNCALIBRATED = replace(LAYOUT, dial=None, frontier=None)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, float("nan")])
def test_budget_outside_its_range_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        Dial(budget)


@pytest.mark.parametrize("quality", [0.0, -1.0, math.inf, math.nan])
def test_quality_outside_its_range_is_refused(quality: float) -> None:
    with pytest.raises(ValueError, match="not above 0"):
        Dial(quality=quality)


def test_a_dial_is_exactly_one_thing() -> None:
    with pytest.raises(ValueError, match="one of"):
        Dial()
    with pytest.raises(ValueError, match="one of"):
        Dial(budget=0.5, quality=0.9)
    with pytest.raises(ValueError, match="negative"):
        Dial.uniform(-1)


def test_a_dial_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Dial(0.5).budget = 0.7  # type: ignore[misc]


@given(st.floats(0.25, 1.0), st.floats(0.25, 1.0))
def test_thresholds_never_rise_with_the_budget(a: float, b: float) -> None:
    low, high = sorted((a, b))
    pairs = zip(Dial(low).thresholds(LAYOUT), Dial(high).thresholds(LAYOUT), strict=True)
    assert all(x >= y for x, y in pairs)


def test_thresholds_are_those_solved_at_calibrated_budgets() -> None:
    assert Dial(0.25).thresholds(LAYOUT) == (0.0, -1.0)
    assert Dial(0.5).thresholds(LAYOUT) == (-2.0, -2.0)
    assert Dial(0.375).thresholds(LAYOUT) == (-1.0, -1.5)
    assert Dial.full().thresholds(UNCALIBRATED) == (-math.inf, -math.inf)


def test_quality_becomes_the_lowest_budget_that_holds_it() -> None:
    assert Dial(quality=0.85).thresholds(LAYOUT) == pytest.approx(Dial(0.375).thresholds(LAYOUT))
    assert Dial(quality=0.5).thresholds(LAYOUT) == Dial(0.25).thresholds(LAYOUT)
    assert Dial(quality=1.01).thresholds(LAYOUT) == pytest.approx(Dial(0.5 + 0.5 * 11 / 12).thresholds(LAYOUT))
    with pytest.raises(ValueError, match=r"nearest is 1\.02"):
        Dial(quality=1.5).thresholds(LAYOUT)
    with pytest.raises(ValueError, match="no measured frontier"):
        Dial(quality=0.9).thresholds(replace(LAYOUT, frontier=None))
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="not above 0"):
            Dial(quality=wrong)


def test_what_a_model_cannot_follow_says_why() -> None:
    with pytest.raises(ValueError, match=r"lowest calibrated one, 0\.25"):
        Dial(0.1).thresholds(LAYOUT)
    for dial in (Dial(0.5), Dial(quality=0.5)):
        with pytest.raises(ValueError, match="no calibrated dial"):
            dial.thresholds(UNCALIBRATED)
    with pytest.raises(ValueError, match="uniform width"):
        Dial.uniform(3).thresholds(LAYOUT)


def test_numbers_and_sequences_are_dials() -> None:
    assert as_dial(0.5) == Dial(0.5)
    assert as_dial([0.5, Dial.full()]) == (Dial(0.5), Dial(1.0))
    assert [str(d) for d in (Dial(1.0), Dial(quality=0.9), Dial.uniform(3))] == ["full", "quality 0.9", "width 3"]


def test_thresholds_keep_their_memory_while_their_shape_stays() -> None:
    held, cpu = Thresholds(), torch.device("cpu")
    layout = replace(LAYOUT, dial=DialTable((0.5, 1.0), ((1.0, 2.0), (0.0, 0.0))))
    first = held.fill(Dial(0.5), layout, cpu)
    assert first.thresholds.tolist() == [1.0, 2.0] and first.exact is None and first.means is None
    memory = held.values
    with torch.inference_mode():
        assert held.fill(Dial.full(), layout, cpu).thresholds.data_ptr() == memory.data_ptr()
    assert held.values is memory and first.thresholds.tolist() == [-math.inf, -math.inf]
    assert held.fill((Dial(0.5), Dial(0.75)), layout, cpu).thresholds.tolist() == [[1.0, 2.0], [0.5, 1.0]]
    with torch.inference_mode():
        second = Thresholds()
        made_there = second.fill(Dial(0.5), layout, cpu)
    assert second.fill(Dial(0.75), layout, cpu).thresholds.data_ptr() == made_there.thresholds.data_ptr()
    assert made_there.thresholds.tolist() == [0.5, 1.0]


def test_thresholds_of_exact_values_and_means_lie_beside_the_others() -> None:
    layout = NEURONS
    held, cpu = Thresholds(), torch.device("cpu")
    one = held.fill(Dial(0.375), layout, cpu)
    assert one.exact is not None and one.means is not None
    assert [part.tolist() for part in (one.thresholds, one.exact, one.means)] == [[2.0, 2.0], [3.0, 3.0], [0.5, 0.5]]
    each = held.fill((Dial(0.25), Dial(0.75), Dial.full()), layout, cpu)
    assert each.exact is not None and each.means is not None
    assert each.thresholds.tolist() == [[3.0, 3.0], [-4.0, -4.0], [-math.inf, -math.inf]]
    assert each.exact.tolist() == [[4.0, 4.0], [-3.5, -3.5], [-math.inf, -math.inf]]
    assert each.means.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    copy = each.clone()
    held.fill((Dial(0.5),) * 3, layout, cpu)
    assert copy.thresholds.tolist()[0] == [3.0, 3.0] != each.thresholds.tolist()[0]


@given(st.tuples(st.floats(0.25, 1), st.floats(0.25, 1)))
def test_turning_the_dial_up_lowers_every_threshold(budgets: tuple[float, float]) -> None:
    layout = NEURONS
    low, high = (Dial(budget) for budget in sorted(budgets))
    for name in ("thresholds", "exact"):
        pairs = zip(getattr(low, name)(layout), getattr(high, name)(layout), strict=True)
        assert all(a >= b for a, b in pairs)
    for dial in (low, high):
        assert all(e >= t for e, t in zip(dial.exact(layout), dial.thresholds(layout), strict=True))
        assert sum(dial.means(layout)) == pytest.approx(1.0)
