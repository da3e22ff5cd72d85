"""Pictures where people would rather look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynaconv.frontier import Frontier

PARENT_COLOR, DIAL_COLOR, FLOPS_COLOR = "#c1121f", "#2a6f97", "#a9cbe0"
LIGHTEST = 0.35
"""Where the ramp of budgets begins on matplotlib's ``Blues``, from 0 to 1; lighter ones vanish on white."""
LABEL_HEIGHT = 0.055
"""Least distance between two labels at the ends of lines, as a share of the height of the axes."""


def draw_frontier(frontier: Frontier, path: Path, *, name: str = "") -> None:
    """Quality against the share of FFN bytes and FLOPs with the parent marked, and the active blocks of each layer.

    Args:
        frontier: What was measured.
        path: PNG to write.
        name: Name of the model, for the title; no title where it is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _draw_quality(left, frontier)
    _draw_widths(right, frontier)
    if name:
        figure.suptitle(name, fontsize=11, parse_math=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _draw_quality(axes: Any, frontier: Frontier) -> None:
    from matplotlib.ticker import PercentFormatter

    points, in_bytes = frontier.points, frontier.unit == "bytes"
    shares, qualities = [point.bytes_share for point in points], [point.quality for point in points]
    read = "FFN bytes read" if in_bytes else "active neurons"
    axes.plot(shares, qualities, "o-", color=DIAL_COLOR, zorder=3, label=f"{read}, with the budgets")
    if in_bytes:
        computed = [point.flops_share for point in points]
        axes.plot(computed, qualities, ".-", color=FLOPS_COLOR, linewidth=1.2, label="FFN FLOPs computed")
    axes.plot(1.0, 1.0, "*", color=PARENT_COLOR, markersize=14, zorder=4, label="dense parent")
    axes.axhline(1.0, color=PARENT_COLOR, linewidth=0.8, linestyle=":")
    for x, point in zip(shares, points, strict=True):
        place = {"textcoords": "offset points", "xytext": (-6, 6), "ha": "right", "fontsize": 8}
        axes.annotate(f"{point.budget:g}", (x, point.quality), **place)
    included = "with" if in_bytes else "without"
    axes.set(xlabel=f"share of the parent's FFNs, {included} routers", ylabel="quality: exp(parent loss - loss)")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title("quality and cost of a token at each budget", fontsize=9)
    axes.legend(loc="best", frameon=False)
    axes.margins(0.1, 0.1)
    axes.set(xlim=(0, None))
    axes.grid(alpha=0.25)


def _draw_widths(axes: Any, frontier: Frontier) -> None:
    """One line a budget, the larger the darker, each labelled at its right end."""
    from matplotlib import colormaps

    points, ramp = frontier.points, colormaps["Blues"]
    for number, point in enumerate(points):
        part = number / max(1, len(points) - 1)
        layers = range(1, len(point.width_by_layer) + 1)
        axes.plot(layers, point.width_by_layer, ".-", linewidth=1.4, color=ramp(LIGHTEST + part * (1 - LIGHTEST)))
    axes.set(xlabel="layer", ylabel="active blocks, mean over tokens", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("active blocks by layer at each budget", fontsize=9)
    axes.grid(alpha=0.25)
    labelled = sorted((point for point in points if point.width_by_layer), key=lambda point: point.width_by_layer[-1])
    heights = spread([point.width_by_layer[-1] for point in labelled], LABEL_HEIGHT * axes.get_ylim()[1])
    for height, point in zip(heights, labelled, strict=True):
        axes.annotate(
            f"{point.budget:g}",
            (len(point.width_by_layer), height),
            textcoords="offset points",
            xytext=(8, 0),
            va="center",
            fontsize=8,
            annotation_clip=False,
        )


def spread(positions: Sequence[float], distance: float) -> list[float]:
    """Ascending ``positions``, moved upwards as little as keeps them ``distance`` apart."""
    placed: list[float] = []
    for position in positions:
        placed.append(max(position, placed[-1] + distance) if placed else position)
    return placed
