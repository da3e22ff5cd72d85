"""The dial is a value: it refuses what it cannot mean, and turning it up never takes anything away."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.dynamic.dial import Dial, as_dial
from dynaconv.dynamic.layout import DialTable

TABLE = DialTable((0.25, 0.5, 1.0), ((0.0, 1.0), (2.0, 2.0), (9.0, 9.0)), (0.8, 0.9, 1.0))


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, float("nan")])
def test_budget_outside_its_range_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        Dial(budget)


def test_a_dial_is_exactly_one_thing() -> None:
    with pytest.raises(ValueError, match="one of"):
        Dial()
    with pytest.raises(ValueError, match="one of"):
        Dial(budget=0.5, quality=0.9)


def test_a_dial_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Dial(0.5).budget = 0.7  # type: ignore[misc]


@given(st.floats(0.25, 1.0), st.floats(0.25, 1.0))
def test_levels_never_fall_as_the_budget_rises(a: float, b: float) -> None:
    low, high = sorted((a, b))
    pairs = zip(Dial(low).levels(TABLE, 2), Dial(high).levels(TABLE, 2), strict=True)
    assert all(x <= y for x, y in pairs)


def test_levels_are_those_measured_at_measured_budgets() -> None:
    assert Dial(0.25).levels(TABLE, 2) == (0.0, 1.0)
    assert Dial(0.5).levels(TABLE, 2) == (2.0, 2.0)
    assert Dial(0.375).levels(TABLE, 2) == (1.0, 1.5)
    assert Dial.full().levels(None, 2) == (math.inf, math.inf)


def test_quality_becomes_the_lowest_budget_that_holds_it() -> None:
    assert Dial(quality=0.85).resolved(TABLE) == pytest.approx(0.375)
    assert Dial(quality=0.85).levels(TABLE, 2) == pytest.approx((1.0, 1.5))
    assert Dial(quality=0.5).resolved(TABLE) == 0.25
    with pytest.raises(ValueError, match=r"nearest is 0\.7"):
        Dial(quality=0.9).levels(DialTable((1.0,), ((1.0,),), (0.7,)), 1)


def test_a_quality_above_the_parents_is_one_like_any_other() -> None:
    tuned = DialTable((0.5, 1.0), ((0.0,), (9.0,)), (0.9, 1.3))
    assert Dial(quality=1.1).resolved(tuned) == pytest.approx(0.75)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="not above 0"):
            Dial(quality=wrong)


def test_budget_below_the_calibrated_range_says_what_the_lowest_is() -> None:
    with pytest.raises(ValueError, match=r"lowest calibrated one, 0\.25"):
        Dial(0.1).levels(TABLE, 2)
    with pytest.raises(ValueError, match="no calibrated dial"):
        Dial(0.5).levels(None, 2)


def test_numbers_and_sequences_are_dials() -> None:
    assert as_dial(0.5) == Dial(0.5)
    assert as_dial([0.5, Dial.full()]) == (Dial(0.5), Dial(1.0))
    assert [str(d) for d in (Dial(1.0), Dial(quality=0.9), Dial.uniform(3))] == ["full", "quality 0.9", "width 3"]
