"""From quality to budget, never less than asked and nothing cheaper left; from FLOPs, never more than asked.

A file is read as it was written, and so are those of earlier versions.
"""

from __future__ import annotations

import copy
from dataclasses import replace
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
    budget_for_flops,
    budget_for_quality,
)

BUDGETS = st.lists(st.integers(1, 100), min_size=1, max_size=10, unique=True).map(sorted)
SHARES = st.floats(0, 1, exclude_min=True)


def point(budget: float, quality: float = 1.0, flops: float | None = None) -> OperatingPoint:
    return OperatingPoint(
        budget=budget,
        bytes_share=budget,
        flops_share=budget if flops is None else flops,
        active_share=budget / 2,
        exact_share=budget / 4,
        flops_per_token=1e6 * budget,
        bytes_per_token=1e6 * budget,
        loss=2.0,
        quality=quality,
        agreement=0.9,
    )


PARENT = replace(point(1.0), active_share=1.0, exact_share=1.0, agreement=1.0, tokens_per_s=90.0)


@st.composite
def frontiers(draw: st.DrawFn) -> Frontier:
    """Neither quality nor FLOPs need rise with the budget, as measured ones do not always."""
    qualities, flops = st.floats(0.1, 1.2), st.floats(0.1, 1.1)
    return Frontier(PARENT, tuple(point(budget / 100, draw(qualities), draw(flops)) for budget in draw(BUDGETS)))


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


@given(frontiers(), SHARES)
def test_the_highest_budget_that_the_flops_pay_for(frontier: Frontier, flops: float) -> None:
    least = min(frontier.points, key=lambda candidate: candidate.flops_share)
    if least.flops_share > flops:
        with pytest.raises(UnreachableError) as caught:
            frontier.budget_for_flops(flops)
        assert f"{least.flops_share:.4f}, at budget {least.budget:g}" in str(caught.value), "it says the lowest"
        return
    budget = frontier.budget_for_flops(flops)
    found = frontier.at(budget)
    assert found.interpolated("flops_share") <= flops + 1e-9, "no more is spent"
    assert all(higher.flops_share > flops for higher in frontier.points if higher.budget > budget), "nor less"
    if found.above is not None:
        assert found.interpolated("flops_share") == pytest.approx(flops, abs=1e-9)


@given(frontiers(), SHARES, SHARES)
def test_more_flops_never_mean_a_lower_budget(frontier: Frontier, one: float, other: float) -> None:
    least = min(candidate.flops_share for candidate in frontier.points)
    low, high = sorted((max(one, min(least, 1.0)), max(other, min(least, 1.0))))
    if least <= low:
        assert frontier.budget_for_flops(low) <= frontier.budget_for_flops(high)


@given(frontiers())
def test_measured_flops_pay_for_their_measured_budget(frontier: Frontier) -> None:
    for number, measured in enumerate(frontier.points):
        dearer = all(higher.flops_share > measured.flops_share for higher in frontier.points[number + 1 :])
        if dearer and measured.flops_share <= 1:
            assert frontier.budget_for_flops(measured.flops_share) == measured.budget, "exactly"


def test_flops_between_two_points_and_around_the_full_dial() -> None:
    budgets, shares = (0.25, 0.5, 0.875, 1.0), (0.3, 0.6, 1.05, 1.0)
    assert budget_for_flops(budgets, shares, 0.45) == pytest.approx(0.375)
    assert budget_for_flops(budgets, shares, 0.825) == pytest.approx(0.6875)
    assert budget_for_flops(budgets, shares, 1.0) == 1.0, "where no router runs"


@given(frontiers())
def test_the_flops_that_are_suggested_can_be_reached(frontier: Frontier) -> None:
    with pytest.raises(UnreachableError) as caught:
        frontier.budget_for_flops(0.05)
    assert caught.value.hint is not None
    suggested = float(caught.value.hint.removeprefix("a FLOPs share of "))
    if suggested <= 1:
        frontier.budget_for_flops(suggested)


@pytest.mark.parametrize(
    ("unit", "routers", "said", "unsaid"),
    [
        ("bytes", 0.125, "0.25 or more: the routers alone, 0.125 of the parent's FFN bytes", "calibrate.budgets"),
        ("bytes", 0.05, "calibrate.budgets=[0.1,...]", "no"),
        ("bytes", None, "0.25 or more: the routers are read for every token", "alone"),
        ("neurons", None, "nearest is 0.25", "routers"),
    ],
)
def test_a_budget_below_the_lowest_is_told_the_lowest_and_why(
    unit: str, routers: float | None, said: str, unsaid: str
) -> None:
    frontier = Frontier(PARENT, (point(0.25), point(1.0)), unit=unit, router_bytes_share=routers)
    with pytest.raises(UnreachableError) as caught:
        frontier.at(0.1)
    assert said in str(caught.value) and "budget 0.25" in str(caught.value)
    assert unsaid == "no" or unsaid not in str(caught.value)


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


@pytest.mark.parametrize("flops", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_flops_share_outside_its_range(flops: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"FLOPs share .* is outside"):
        Frontier(PARENT, (point(0.5),)).budget_for_flops(flops)


@pytest.mark.parametrize("quality", [0.0, -1.0, float("nan")])
def test_a_quality_outside_its_range(quality: float) -> None:
    with pytest.raises(InvalidRequestError, match="not above 0"):
        Frontier(PARENT, (point(0.5),)).budget_for_quality(quality)


OLD = ("active_share", "flops_per_token", "bytes_per_token", "loss", "quality", "agreement", "tokens_per_s")
ADDED = ("bytes_share", "flops_share", "exact_share")


def row(budget: float, names: tuple[str, ...] = (*OLD, *ADDED)) -> dict[str, Any]:
    return {"budget": budget, **dict.fromkeys(names, 0.5), "something_new": 1.0}


DENSE = {"loss": 2.0, "flops_per_token": 1.0, "bytes_per_token": 1.0, "tokens_per_s": None}


def test_points_are_read_in_order_and_unknown_fields_left_out() -> None:
    frontier = Frontier.from_json({"unit": "bytes", "parent": DENSE, "frontier": [row(1.0), row(0.25)]})
    assert (frontier.budgets, frontier.unit, frontier.router_bytes_share) == ((0.25, 1.0), "bytes", None)
    assert (frontier.parent.quality, frontier.parent.active_share, frontier.parent.tokens_per_s) == (1.0, 1.0, None)
    assert (frontier.parent.bytes_share, frontier.parent.flops_share, frontier.parent.exact_share) == (1.0, 1.0, 1.0)
    assert frontier.points[0].prompted_loss is None and frontier.parent.prompted_quality is None


@given(BUDGETS, SHARES)
def test_a_file_without_a_unit_counts_neurons(budgets: list[int], share: float) -> None:
    points = [{**row(budget / 100, OLD), "active_share": share} for budget in budgets]
    frontier = Frontier.from_json({"parent": DENSE, "frontier": points})
    assert frontier.unit == "neurons" and not frontier.reads_low_bit_values
    for read in frontier.points:
        assert read.bytes_share == read.flops_share == read.exact_share == read.active_share == share
    assert Frontier.from_json(frontier.to_json()) == frontier, "and still does where it is written again"


@pytest.mark.parametrize("gap", [0.0, 1e-9, 0.01])
def test_low_bit_values_are_those_of_neurons_that_are_active_and_not_exact(gap: float) -> None:
    low = replace(point(0.5), exact_share=point(0.5).active_share - gap)
    assert Frontier(PARENT, (low, PARENT)).reads_low_bit_values == (gap == 0.01)


@given(frontiers(), st.none() | st.integers(1, 10**9))
def test_what_is_written_is_read(frontier: Frontier, tokens: int | None) -> None:
    points = tuple(
        replace(each, tokens_per_s=3.5, prompted_loss=1.5, prompted_quality=0.9, width_by_layer=(1.0, 2.5))
        for each in frontier.points
    )
    parent = replace(frontier.parent, prompted_loss=1.4, prompted_quality=1.0)
    whole = Frontier(parent, points, tokens, router_bytes_share=0.125)
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
        {"parent": DENSE, "frontier": [row(0.5)], "unit": "bits"},
        {"parent": DENSE, "frontier": [row(0.5)], "unit": None},
        {"parent": DENSE, "frontier": [row(0.5)], "unit": []},
        {"parent": DENSE, "frontier": [row(0.5)], "unit": "bytes", "router_bytes_share": "0.1"},
        *({"parent": DENSE, "frontier": [row(0.5, OLD)], "unit": unit} for unit in ("bytes", 1)),
        *({"parent": DENSE, "frontier": [{**row(0.5), name: None}], "unit": "bytes"} for name in ADDED),
        {"parent": DENSE, "frontier": [{**row(0.5), "prompted_loss": "1"}], "unit": "bytes"},
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
