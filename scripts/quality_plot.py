"""The picture of ``bench_quality.py``: loss over the parent's against the share of the FFN bytes, a line a method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OWN = ("default", "tune", "routed", "nested", "static-half")  # our recipes, trained or not, are drawn thicker
LINEAR = 0.01  # nats; the loss axis is linear below and logarithmic above, so that gains over the parent show too
HIGHEST = 3.0  # nats; what is worse is not worth a look
TICKS = (0.0625, 0.125, 0.25, 0.5, 1.0)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draws the curves in ``content``, what the result file holds, into the PNG ``path``; seeds share a colour."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes, colours = figure.subplots(), [colormaps["tab20"](i) for i in range(20)]
    for i, (name, seeds) in enumerate(sorted(content["curves"].items())):
        own = name.startswith(OWN)
        width, style = (2.2, "o-") if own else (1.1, "s:" if name.startswith("oracle") else "s--")
        for seed, points in enumerate(seeds):
            x, y = zip(*points, strict=True)
            label = None if seed else name
            axes.plot(x, y, style, color=colours[i % len(colours)], markersize=4, linewidth=width, label=label)
    axes.axhline(0.0, color="#444444", linewidth=1.0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_yscale("symlog", linthresh=LINEAR)
    losses = [loss for seeds in content["curves"].values() for points in seeds for _, loss in points]
    axes.set_ylim(min(losses, default=0.0) - LINEAR / 4, min(HIGHEST, 1.2 * max(losses, default=1.0)))
    axes.set(xlabel="share of the parent's FFN bytes read for a token", ylabel="nats a token over the parent")
    settings = content["settings"]
    axes.set_title(f"{settings['model']} on {settings['valid']}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
