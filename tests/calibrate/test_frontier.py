"""Choosing a point: never more than the budget, never less than the quality, and nothing left on the table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.calibrate.frontier import Frontier, OperatingPoint, select_by_budget, select_by_quality
from dynaconv.errors import ArtifactError, ConfigError, QualityError

BUDGETS = st.lists(st.integers(1, 100), min_size=1, max_size=10, unique=True).map(sorted)
SHARES = st.floats(0, 1, exclude_min=True)


def point(budget: float, quality: float = 1.0) -> OperatingPoint:
    return OperatingPoint(budget, budget, 1e6 * budget, 1e6 * budget, 2.0, quality, 0.9, None)


@st.composite
def frontiers(draw: st.DrawFn) -> list[OperatingPoint]:
    """Points by ascending budget; quality need not rise with it, as measured ones do not always."""
    return [point(budget / 100, draw(st.floats(0.1, 1.2))) for budget in draw(BUDGETS)]


@given(frontiers(), SHARES)
def test_a_budget_is_never_overspent_and_all_of_it_is_used(points: list[OperatingPoint], budget: float) -> None:
    paid = [candidate for candidate in points if candidate.budget <= budget]
    if not paid:
        with pytest.raises(QualityError, match=f"{points[0].budget:g}"):
            select_by_budget(points, budget)
        return
    choice = select_by_budget(points, budget)
    assert choice.point.budget == max(candidate.budget for candidate in paid)
    assert choice.budget == budget
    if choice.above is not None:
        assert choice.point.budget < budget < choice.above.budget
        assert not [candidate for candidate in points if choice.point.budget < candidate.budget < choice.above.budget]
    else:
        assert budget == choice.point.budget or choice.point is points[-1]


@given(frontiers(), st.floats(0.05, 1.3))
def test_the_cheapest_point_that_holds_the_quality(points: list[OperatingPoint], quality: float) -> None:
    holding = [candidate for candidate in points if candidate.quality >= quality]
    if not holding:
        best = max(points, key=lambda candidate: candidate.quality)
        with pytest.raises(QualityError) as caught:
            select_by_quality(points, quality)
        assert f"{best.quality:.4f}" in str(caught.value), "it says the nearest"
        assert f"budget {best.budget:g}" in str(caught.value)
        return
    choice = select_by_quality(points, quality)
    assert choice.point.quality >= quality
    assert choice.point.flops_per_token == min(candidate.flops_per_token for candidate in holding)
    assert choice.above is None


@given(frontiers())
def test_the_quality_that_is_suggested_can_be_reached(points: list[OperatingPoint]) -> None:
    with pytest.raises(QualityError) as caught:
        select_by_quality(points, 2.0)
    assert caught.value.hint is not None
    suggested = float(caught.value.hint.removeprefix("--quality ").partition(",")[0])
    assert select_by_quality(points, suggested).point.quality >= suggested


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_budget_outside_its_range(budget: float) -> None:
    with pytest.raises(ConfigError, match="outside"):
        select_by_budget([point(0.5)], budget)


@pytest.mark.parametrize("quality", [0.0, -1.0, float("nan")])
def test_a_quality_outside_its_range(quality: float) -> None:
    with pytest.raises(ConfigError, match="not above 0"):
        select_by_quality([point(0.5)], quality)


def row(budget: float) -> dict[str, float]:
    names = ("active_share", "flops_per_token", "bytes_per_token", "loss", "quality", "agreement", "tokens_per_s")
    return {"budget": budget, **dict.fromkeys(names, 0.5), "something_new": 1.0}


PARENT = {"loss": 2.0, "flops_per_token": 1.0, "bytes_per_token": 1.0, "tokens_per_s": None}


def test_points_are_read_in_order_and_unknown_fields_left_out() -> None:
    frontier = Frontier.from_json({"parent": PARENT, "frontier": [row(1.0), row(0.25)]})
    assert [read.budget for read in frontier.points] == [0.25, 1.0]
    assert (frontier.parent.quality, frontier.parent.active_share, frontier.parent.tokens_per_s) == (1.0, 1.0, None)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"parent": PARENT},
        {"parent": {}, "frontier": [row(1.0)]},
        {"parent": PARENT, "frontier": []},
        {"parent": 3, "frontier": 4},
    ],
)
def test_a_damaged_frontier(content: dict[str, object]) -> None:
    with pytest.raises(ArtifactError):
        Frontier.from_json(content)
