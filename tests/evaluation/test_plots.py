"""The picture of a frontier is drawn, and its labels do not lie on each other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from dynamic_models import a_frontier
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.evaluation.plots import _draw_quality, draw_frontier, spread
from dynaconv.frontier import UNITS, Frontier


@given(st.lists(st.floats(0, 100), max_size=10).map(sorted), st.floats(0.1, 10))
def test_labels_keep_their_distance_and_stay_where_they_can(positions: list[float], distance: float) -> None:
    placed = spread(positions, distance)
    assert all(high - low >= distance - 1e-9 for low, high in pairwise(placed))
    assert all(moved >= position for moved, position in zip(placed, positions, strict=True))
    if all(high - low > distance for low, high in pairwise(positions)):
        assert placed == positions


@pytest.mark.parametrize("widths", [(), (1.0,), (1.0, 2.0)])
@pytest.mark.parametrize("name", ["", "$\\frac{$ in a name is no formula"])
def test_any_frontier_is_drawn(tmp_path: Path, widths: tuple[float, ...], name: str) -> None:
    def widened(frontier: Frontier) -> Frontier:
        return replace(frontier, points=tuple(replace(point, width_by_layer=widths) for point in frontier.points))

    for budgets in ((1.0,), (0.5, 1.0)):
        for unit in UNITS:
            frontier = replace(widened(a_frontier(budgets, budgets)), unit=unit)
            draw_frontier(frontier, tmp_path / "frontier.png", name=name)
            assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("unit", UNITS)
def test_quality_is_drawn_against_both_costs_where_both_were_measured(unit: str) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    points = a_frontier((0.25, 0.5, 1.0), (0.8, 0.9, 1.0)).points
    dearer = tuple(replace(point, flops_share=min(1.0, point.budget + 0.1)) for point in points)
    _draw_quality(axes, Frontier(points[-1], dearer, unit=unit))
    drawn = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 3]
    assert drawn == [[0.25, 0.5, 1.0], [0.35, 0.6, 1.0]][: 2 if unit == "bytes" else 1]
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.5", "1"]
