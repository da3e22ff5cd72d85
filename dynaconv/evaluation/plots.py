"""Pictures where people would rather look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_frontier(content: Mapping[str, Any], path: Path) -> None:
    """Quality against FLOPs a token, the parent marked, and the widths of the layers beneath it.

    Args:
        content: What ``frontier.json`` holds.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    points, parent = content["frontier"], content["parent"]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    cost = [point["flops_per_token"] / parent["flops_per_token"] for point in points]
    left.plot(cost, [point["quality"] for point in points], "o-", color="#2a6f97", label="dial")
    left.plot(1.0, 1.0, "*", color="#c1121f", markersize=14, label="dense parent")
    left.axhline(1.0, color="#c1121f", linewidth=0.8, linestyle=":")
    for x, point in zip(cost, points, strict=True):
        label, offset = f"{point['budget']:g}", (6, -12)
        left.annotate(label, (x, point["quality"]), textcoords="offset points", xytext=offset, fontsize=8)
    left.set(xlabel="FLOPs a token, share of the parent's", ylabel="quality: exp(parent loss - loss)")
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_title("points are labelled with the budget: the active FFN share asked for", fontsize=9)
    left.legend(loc="upper left", frameon=False)
    left.margins(0.06, 0.1)
    left.grid(alpha=0.25)
    _draw_widths(right, [point["width_by_layer"] for point in points], [point["budget"] for point in points])
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _draw_widths(axes: Any, widths: Sequence[Sequence[float]], budgets: Sequence[float]) -> None:
    for row, budget in zip(widths, budgets, strict=True):
        layers = range(1, len(row) + 1)
        axes.plot(layers, row, ".-", linewidth=1.2, label=f"{budget:g}")
    axes.set(xlabel="layer", ylabel="mean width in blocks", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("where the budget goes", fontsize=9)
    axes.grid(alpha=0.25)
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(title="budget", fontsize=8, title_fontsize=8, frameon=False, reverse=True, **beside)
