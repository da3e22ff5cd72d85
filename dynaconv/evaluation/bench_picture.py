"""Tokens a second against the bytes that a step of decoding reads."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from dynaconv.evaluation.bench import Speeds
from dynaconv.evaluation.plots import DIAL_COLOR, PARENT_COLOR

MEMORY_COLOR = "#8d99ae"
GB = 1e9


def draw_speeds(speeds: Speeds, path: Path, *, sequences: int = 1, name: str = "") -> None:
    """Parent and dials, what their bytes promise, and what the memory allows.

    Args:
        speeds: What was measured.
        path: Picture to write; its ending says of which kind.
        sequences: How many were decoded together.
        name: Of the model, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes, parent, dials = figure.subplots(), speeds.parent, speeds.dials
    low, high = (pick(one.bytes_per_step for one in (parent, *dials)) for pick in (min, max))
    reads = [low + (high - low) * step / 100 for step in range(101)]
    in_gb = [read / GB for read in reads]
    limit = [sequences * speeds.bandwidth / read for read in reads]
    promise = [parent.tokens_per_s * parent.bytes_per_step / read for read in reads]
    axes.plot(in_gb, limit, ":", color=MEMORY_COLOR, label=f"what memory allows, {speeds.bandwidth / GB:.1f} GB/s")
    axes.plot(in_gb, promise, "--", color=PARENT_COLOR, linewidth=1, label="what the parent's speed promises")
    points = [(one.bytes_per_step / GB, one.tokens_per_s) for one in dials]
    axes.plot(*zip(*points, strict=True), "o-", color=DIAL_COLOR, zorder=3, label="measured, with the dials")
    axes.plot(parent.bytes_per_step / GB, parent.tokens_per_s, "*", color=PARENT_COLOR, markersize=14, zorder=4)
    for one, point in zip(dials, points, strict=True):
        axes.annotate(f"{one.dial:g}", point, textcoords="offset points", xytext=(-5, -13), ha="center", fontsize=8)
    axes.annotate(
        "parent",
        (parent.bytes_per_step / GB, parent.tokens_per_s),
        textcoords="offset points",
        xytext=(0, 10),
        ha="center",
        fontsize=8,
    )
    axes.set(
        xlabel="GB read for a step of decoding", ylabel="tokens a second", xlim=(0, 1.08 * high / GB), ylim=(0, None)
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    if name:
        axes.set_title(fill(name, 70), fontsize=9, parse_math=False)
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else None)
