"""The picture of ``bench_resize.py``: held-out loss against training tokens, and where clones cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RANDOM = "#444444"
COLOURS = ("#c1121f", "#2a6f97", "#e09f3e", "#6a994e")
TITLES = {
    "subclone": "half the width, from the trained {large}",
    "hyperclone": "twice the width, from a trained small base",
}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draws ``content``, what the result file holds, into the PNG ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, start in zip(figure.subplots(1, 2), TITLES, strict=True):
        _panel(axes, start, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _panel(axes: Any, start: str, content: Mapping[str, Any]) -> None:
    summary = content["summary"]
    random, found = summary["random"], summary[start]
    _lines(axes, _curves(content, "random", "", random["learning_rate"]), RANDOM, "random init", 1.8)
    target = sum(random["end_losses"]) / len(random["end_losses"])
    axes.axhline(target, color=RANDOM, linewidth=0.8, linestyle=":")
    lowest = target
    for colour, (variant, each) in zip(COLOURS, found["variants"].items(), strict=False):
        curves = _curves(content, start, variant, each["learning_rate"])
        _lines(axes, curves, colour, f"{start}{' ' + variant if variant else ''}", 1.2 if variant else 1.8)
        lowest = min(lowest, *each["end_losses"])
    _mark_crossing(axes, found["variants"][""], random["tokens"], target)
    top = random["tokens"] / 1e6
    axes.set(xlim=(-0.01 * top, 1.02 * top), ylim=(lowest - 0.15, target + 2.2))
    axes.set(xlabel="training tokens, millions", ylabel="held-out loss, nats a token")
    axes.set_title(TITLES[start].format(large=content["settings"]["model"]), fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _curves(content: Mapping[str, Any], start: str, variant: str, rate: float) -> list[Sequence[Sequence[float]]]:
    wanted = (start, variant, rate)
    rows = [row for row in content["rows"] if (row["start"], row["variant"], row["learning_rate"]) == wanted]
    return [row["curve"] for row in rows]


def _lines(axes: Any, curves: Sequence[Sequence[Sequence[float]]], colour: str, label: str, width: float) -> None:
    for i, curve in enumerate(curves):
        x, y = [tokens / 1e6 for tokens, _ in curve], [loss for _, loss in curve]
        axes.plot(x, y, ".-", color=colour, linewidth=width, markersize=3, alpha=0.85, label=label if i == 0 else None)


def _mark_crossing(axes: Any, clone: Mapping[str, Any], budget: int, target: float) -> None:
    reached = clone["tokens_to_reach"]
    if None in reached:
        return
    mean = sum(reached) / len(reached)
    arrow = {"arrowstyle": "<->", "color": COLOURS[0], "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (mean / 1e6, target), (budget / 1e6, target), arrowprops=arrow)
    low, high = min(clone["factors"]), max(clone["factors"])
    text = f"the same loss with {low:.1f} to {high:.1f} times fewer tokens"
    middle = (mean + budget) / 2e6
    axes.annotate(text, (middle, target), (0, 6), textcoords="offset points", ha="center", color=COLOURS[0], fontsize=9)
