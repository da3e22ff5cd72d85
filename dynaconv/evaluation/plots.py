"""Pictures where people would rather look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynaconv.frontier import Frontier

PARENT_COLOR, DIAL_COLOR, FLOPS_COLOR = "#c1121f", "#2a6f97", "#a9cbe0"
LIGHTEST = 0.35
"""Where the ramp of budgets begins on matplotlib's ``Blues``, from 0 to 1; lighter ones vanish on white."""
LOW, TICKS = 0.2, (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
"""Costs are drawn on a logarithmic axis where a dial reaches below the first, with ticks at the second."""
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
    for number, (x, point) in enumerate(zip(shares, points, strict=True)):
        above = number % 2 == 0  # in turn, since neighbours may lie close
        place = {"textcoords": "offset points", "xytext": (0, 6 if above else -13), "ha": "center", "fontsize": 8}
        axes.annotate(f"{point.budget:g}", (x, point.quality), **place)
    included = "with" if in_bytes else "without"
    axes.set(xlabel=f"share of the parent's FFNs, {included} routers", ylabel="quality: exp(parent loss - loss)")
    axes.set_title("quality and cost of a token at each budget", fontsize=9)
    axes.legend(loc="lower right", frameon=False)
    axes.margins(0.1, 0.1)
    if 0 < shares[0] < LOW:
        axes.set_xscale("log")
        axes.set(xlim=(shares[0] / 1.3, None))
        axes.set_xticks([tick for tick in TICKS if tick >= shares[0] / 1.3])
        axes.minorticks_off()
    else:
        axes.set(xlim=(0, None))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.25)


def _draw_widths(axes: Any, frontier: Frontier) -> None:
    """One line a budget, the larger the darker, each labelled at its right end."""
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    points, ramp = frontier.points, colormaps["Blues"]
    whole = max((max(point.width_by_layer, default=1.0) for point in points), default=1.0)
    for number, point in enumerate(points):
        part = number / max(1, len(points) - 1)
        layers = range(1, len(point.width_by_layer) + 1)
        active = [width / whole for width in point.width_by_layer]
        axes.plot(layers, active, ".-", linewidth=1.4, color=ramp(LIGHTEST + part * (1 - LIGHTEST)))
    axes.set(xlabel="layer", ylabel="active share of the FFN, mean over tokens", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("active share by layer at each budget", fontsize=9)
    axes.grid(alpha=0.25)
    labelled = sorted((point for point in points if point.width_by_layer), key=lambda point: point.width_by_layer[-1])
    heights = spread([point.width_by_layer[-1] / whole for point in labelled], LABEL_HEIGHT * axes.get_ylim()[1])
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
