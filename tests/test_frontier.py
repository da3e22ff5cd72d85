"""One rule from quality to budget: never less than asked, nothing cheaper left. A file is read as it was written."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.frontier import (
    DamagedFrontierError,
    Frontier,
    InvalidRequestError,
    OperatingPoint,
    UnreachableError,
    budget_for_quality,
)

BUDGETS = st.lists(st.integers(1, 100), min_size=1, max_size=10, unique=True).map(sorted)
SHARES = st.floats(0, 1, exclude_min=True)


def point(budget: float, quality: float = 1.0) -> OperatingPoint:
    return OperatingPoint(budget, budget, 1e6 * budget, 1e6 * budget, 2.0, quality, 0.9, None)


PARENT = OperatingPoint(1.0, 1.0, 1e6, 1e6, 2.0, 1.0, 1.0, 90.0)


@st.composite
def frontiers(draw: st.DrawFn) -> Frontier:
    """Quality need not rise with the budget, as measured ones do not always."""
    return Frontier(PARENT, tuple(point(budget / 100, draw(st.floats(0.1, 1.2))) for budget in draw(BUDGETS)))


@given(frontiers(), SHARES)
def test_a_budget_lies_at_a_measured_point_or_between_its_two_neighbours(frontier: Frontier, budget: float) -> None:
    if budget < frontier.budgets[0]:
        with pytest.raises(UnreachableError, match=f"{frontier.budgets[0]:g}"):
            frontier.at(budget)
        return
    found = frontier.at(budget)
    assert found.budget == budget
    assert found.below.budget == max(measured for measured in frontier.budgets if measured <= budget)
    if found.above is None:
        assert budget == found.below.budget or found.below is frontier.points[-1]
        assert found.quality == found.below.quality
        return
    assert found.below.budget < budget < found.above.budget
    assert not [measured for measured in frontier.budgets if found.below.budget < measured < found.above.budget]
    low, high = sorted((found.below.quality, found.above.quality))
    assert low - 1e-12 <= found.quality <= high + 1e-12


@given(frontiers(), st.floats(0.05, 1.3))
def test_the_lowest_budget_that_holds_the_quality(frontier: Frontier, quality: float) -> None:
    best = max(frontier.points, key=lambda candidate: candidate.quality)
    if best.quality < quality:
        with pytest.raises(UnreachableError) as caught:
            frontier.budget_for_quality(quality)
        assert f"{best.quality:.4f}" in str(caught.value), "it says the nearest"
        assert f"budget {best.budget:g}" in str(caught.value)
        return
    budget = frontier.budget_for_quality(quality)
    found = frontier.at(budget)
    assert found.quality == pytest.approx(max(quality, found.quality), abs=1e-9), "it is held"
    assert all(lower.quality < quality for lower in frontier.points if lower.budget < budget), "nor is one cheaper"
    if found.above is not None:
        assert found.quality == pytest.approx(quality, abs=1e-9), "and nothing is paid for more than was asked"


@given(frontiers())
def test_a_measured_quality_is_held_by_its_measured_budget(frontier: Frontier) -> None:
    for low, high in pairwise(frontier.points):
        if all(lower.quality < high.quality for lower in frontier.points if lower.budget <= low.budget):
            assert frontier.budget_for_quality(high.quality) == high.budget, "exactly"


def test_between_two_points_and_above_one() -> None:
    assert budget_for_quality((0.25, 0.5, 1.0), (0.8, 0.9, 1.0), 0.85) == pytest.approx(0.375)
    assert budget_for_quality((0.25, 0.5, 1.0), (0.8, 0.9, 1.0), 0.5) == 0.25
    assert budget_for_quality((0.25, 0.5, 1.0), (0.9, 1.1, 1.3), 1.2) == pytest.approx(0.75)
    assert budget_for_quality((0.25, 0.5, 1.0), (0.9, 1.1, 0.8), 1.0) == pytest.approx(0.375)


@given(frontiers())
def test_the_quality_that_is_suggested_can_be_reached(frontier: Frontier) -> None:
    with pytest.raises(UnreachableError) as caught:
        frontier.budget_for_quality(2.0)
    assert caught.value.hint is not None
    suggested = float(caught.value.hint.removeprefix("quality ").partition(",")[0])
    assert frontier.at(frontier.budget_for_quality(suggested)).quality >= suggested - 1e-12


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_budget_outside_its_range(budget: float) -> None:
    with pytest.raises(InvalidRequestError, match="outside"):
        Frontier(PARENT, (point(0.5),)).at(budget)


@pytest.mark.parametrize("quality", [0.0, -1.0, float("nan")])
def test_a_quality_outside_its_range(quality: float) -> None:
    with pytest.raises(InvalidRequestError, match="not above 0"):
        Frontier(PARENT, (point(0.5),)).budget_for_quality(quality)


def row(budget: float) -> dict[str, Any]:
    names = ("active_share", "flops_per_token", "bytes_per_token", "loss", "quality", "agreement", "tokens_per_s")
    return {"budget": budget, **dict.fromkeys(names, 0.5), "something_new": 1.0}


DENSE = {"loss": 2.0, "flops_per_token": 1.0, "bytes_per_token": 1.0, "tokens_per_s": None}


def test_points_are_read_in_order_and_unknown_fields_left_out() -> None:
    frontier = Frontier.from_json({"parent": DENSE, "frontier": [row(1.0), row(0.25)]})
    assert frontier.budgets == (0.25, 1.0)
    assert (frontier.parent.quality, frontier.parent.active_share, frontier.parent.tokens_per_s) == (1.0, 1.0, None)


@given(frontiers(), st.none() | st.integers(1, 10**9))
def test_what_is_written_is_read(frontier: Frontier, tokens: int | None) -> None:
    points = tuple(
        OperatingPoint(**{**vars(each), "tokens_per_s": 3.5, "width_by_layer": (1.0, 2.5)}) for each in frontier.points
    )
    whole = Frontier(frontier.parent, points, tokens)
    assert Frontier.from_json(whole.to_json()) == whole
    assert whole.to_json()["parent"]["perplexity"] == whole.parent.perplexity


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    frontier = Frontier(PARENT, (point(0.1 + 0.2, 1 / 3), point(1.0)), 1000)
    frontier.save(tmp_path / "frontier.json")
    assert Frontier.load(tmp_path / "frontier.json") == frontier


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"parent": DENSE},
        {"parent": {}, "frontier": [row(1.0)]},
        {"parent": DENSE, "frontier": []},
        {"parent": 3, "frontier": 4},
        {"parent": DENSE, "frontier": [row(0.5), row(0.5)]},
        {"parent": DENSE, "frontier": [row(1.5)]},
        {"parent": DENSE, "frontier": [{**row(0.5), "quality": "0.5"}]},
        {"parent": DENSE, "frontier": [{**row(0.5), "loss": float("nan")}]},
        {"parent": DENSE, "frontier": [{**row(0.5), "width_by_layer": 3}]},
    ],
)
def test_a_damaged_frontier(content: Any) -> None:
    kept = copy.deepcopy(content)
    with pytest.raises(DamagedFrontierError, match=r"here\.json"):
        Frontier.from_json(content, where="here.json")
    assert repr(content) == repr(kept)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DamagedFrontierError, match="missing"):
        Frontier.load(tmp_path / "frontier.json")
    (tmp_path / "frontier.json").write_text("{")
    with pytest.raises(DamagedFrontierError, match="not valid JSON"):
        Frontier.load(tmp_path / "frontier.json")
