"""The picture of a frontier is drawn, and its labels do not lie on each other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.evaluation.plots import draw_frontier, spread
from dynaconv.frontier import Frontier, OperatingPoint


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
    def point(budget: float) -> OperatingPoint:
        return OperatingPoint(budget, budget, 1e6, 1e6, 2.0, 1.0, 1.0, None, widths)

    for points in ((point(1.0),), (point(0.5), point(1.0))):
        draw_frontier(Frontier(point(1.0), points), tmp_path / "frontier.png", name=name)
        assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
