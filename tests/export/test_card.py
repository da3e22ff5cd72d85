"""The model card says what a budget is, what it costs, and whether low-bit values are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dynamic_models import a_frontier

from dynaconv.dynamic.layout import FFNLayout, Layout, RouterLayout
from dynaconv.export.card import model_card
from dynaconv.frontier import Frontier, OperatingPoint
from dynaconv.kernels.partition import Partition

FRONTIER = a_frontier((0.25, 1.0), (0.9, 1.0))


def card(frontier: Frontier, block_size: int = 1) -> str:
    ffn = FFNLayout("model.layers.{layer}.mlp", "gate_proj", "up_proj", "down_proj", "hidden_act")
    router = RouterLayout("linear", linear=True)
    layout = Layout(Partition.equal(16, block_size), layers=1, ffn=ffn, router=router, frontier=frontier)
    return model_card(layout, "parent", {})


def table(text: str) -> list[list[str]]:
    """The cells of the card's table, header first."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def with_points(**changes: float) -> Frontier:
    def changed(point: OperatingPoint) -> OperatingPoint:
        return replace(point, tokens_per_s=7.0, **changes)

    return replace(FRONTIER, parent=changed(FRONTIER.parent), points=tuple(map(changed, FRONTIER.points)))


def test_the_table_has_a_row_a_point_beside_the_parent() -> None:
    header, rule, parent, *points = table(card(with_points()))
    assert set(rule) == {"---"} and len(rule) == len(header)
    assert [row[0] for row in (parent, *points)] == ["dense parent", "0.25", "1"]
    assert header[:5] == ["dial", "FFN bytes", "FFN FLOPs", "active neurons", "loss"]
    assert points[0][1:4] == ["0.250"] * 3
    assert {len(row) for row in (header, parent, *points)} == {len(header)}


@pytest.mark.parametrize("low_bit", [False, True])
def test_it_says_whether_low_bit_values_are_read(low_bit: bool) -> None:
    text = card(with_points(exact_share=0.125) if low_bit else with_points())
    assert ("computed from low-bit values" in text) == low_bit
    assert ("no low-bit values" in text) != low_bit
    assert ("exact neurons" in table(text)[0]) == low_bit


def test_the_prompted_quality_is_there_where_it_was_measured() -> None:
    header, _, _, point, _ = table(card(with_points(prompted_quality=0.95)))
    assert point[header.index("prompted quality")] == "0.9500"
    assert "rompted quality" not in card(with_points())


def test_it_says_what_a_budget_is() -> None:
    assert "the share of the parent's FFN bytes read for a token, routers included." in card(FRONTIER)
    old = card(replace(FRONTIER, unit="neurons"))
    assert "the share of the FFN's neurons that are active, routers not counted." in old
    assert "FFN bytes" not in old and "FFN FLOPs" not in old


@pytest.mark.parametrize(
    ("block_size", "said"),
    [(1, "says which of the FFN's 16 neurons a token uses"), (4, "cut into 4 blocks of neurons, and")],
)
def test_it_says_what_tokens_choose(block_size: int, said: str) -> None:
    assert said in card(FRONTIER, block_size)
