"""The picture of ``bench_quality.py``: held-out loss against active FFN share, for every recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {
    "routed": "#7b2cbf",
    "nested": "#c1121f",
    "nested-uniform": "#2a6f97",
    "nested-difficulty": "#e09f3e",
    "static-half": "#6a994e",
}
DENSE = "#444444"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draws the summary in ``content``, what the result file holds, into the PNG ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes, losses = figure.subplots(), content["summary"]["loss"]
    for weights, colour in COLOURS.items():
        by_share = losses.get(weights, {})
        for seed in range(max((len(each) for each in by_share.values()), default=0)):
            points = sorted((float(share), each[seed]) for share, each in by_share.items() if seed < len(each))
            x, y = zip(*points, strict=True)
            label = None if seed else weights
            axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.5, alpha=0.85, label=label)
    for name, style in (("dense", "-"), ("parent", ":")):
        for loss in losses.get(name, {}).get("1", [])[:1]:
            label = {"dense": "dense, trained on the same tokens", "parent": "dense parent"}[name]
            axes.axhline(loss, color=DENSE, linewidth=1.0, linestyle=style, label=label)
    settings = content["settings"]
    axes.set(xlabel="active share of the FFNs", ylabel="held-out loss, nats a token")
    axes.set_title(f"{settings['model']}, {settings['tokens'] / 1e6:g} million tokens of fine-tuning", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
