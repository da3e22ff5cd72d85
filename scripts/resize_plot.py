"""The picture of ``bench_resize.py``: held-out loss against training tokens, and where clones cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RANDOM = "#444444"
COLOURS = ("#c1121f", "#2a6f97", "#e09f3e", "#6a994e")
TITLES = {"subclone": "half the width of a trained {large}", "hyperclone": "twice the width of a trained small base"}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draws ``content``, what the result file holds, into the PNG ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    comparisons = content["comparisons"][: len(TITLES)]
    for axes, comparison in zip(figure.subplots(1, len(TITLES)), comparisons, strict=True):
        _panel(axes, comparison, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _panel(axes: Any, comparison: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    start, optimizer = comparison["start"], comparison["optimizer"]
    found = content["summary"][f"{start}, {optimizer}"]
    random = found["random"]
    _lines(axes, _curves(content, "random", "", random), RANDOM, "random init", 1.8)
    target = min(random["end_losses"])
    axes.axhline(target, color=RANDOM, linewidth=0.8, linestyle=":")
    lowest = target
    for colour, (variant, each) in zip(COLOURS, found["variants"].items(), strict=False):
        label = f"{start}{' ' + variant if variant else ''}"
        _lines(axes, _curves(content, start, variant, each), colour, label, 1.2 if variant else 1.8)
        lowest = min(lowest, *each["end_losses"])
    _mark_crossing(axes, found["variants"][""], random["tokens"], target)
    top = random["tokens"] / 1e6
    axes.set(xlim=(-0.01 * top, 1.02 * top), ylim=(min(lowest - 0.1, target - 0.3), target + 2.2))
    axes.set(xlabel="training tokens, millions", ylabel="held-out loss, nats a token")
    axes.set_title(f"{TITLES[start].format(large=content['settings']['model'])}; {optimizer}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _curves(
    content: Mapping[str, Any], start: str, variant: str, ends: Mapping[str, Any]
) -> list[Sequence[Sequence[float]]]:
    names = ("learning_rate", "tokens", "optimizer", "source")
    wanted = {"start": start, "variant": variant, **{name: ends[name] for name in names}}
    return [row["curve"] for row in content["rows"] if all(row[name] == value for name, value in wanted.items())]


def _lines(axes: Any, curves: Sequence[Sequence[Sequence[float]]], colour: str, label: str, width: float) -> None:
    for i, curve in enumerate(curves):
        x, y = [tokens / 1e6 for tokens, _ in curve], [loss for _, loss in curve]
        axes.plot(x, y, ".-", color=colour, linewidth=width, markersize=3, alpha=0.85, label=label if i == 0 else None)


def _mark_crossing(axes: Any, clone: Mapping[str, Any], budget: int, target: float) -> None:
    reached, factors = clone["tokens_to_reach_of_best"], clone["factors_of_best"]
    if None in reached:
        return
    crossing, colour = sum(reached) / len(reached) / 1e6, COLOURS[0]
    ends = (crossing, target), (budget / 1e6, target)
    axes.annotate("", *ends, arrowprops={"arrowstyle": "<->", "color": colour, "shrinkA": 0, "shrinkB": 0})
    text = f"{min(factors):.1f} to {max(factors):.1f} times fewer tokens\nto the loss of the best random init"
    placed = {"textcoords": "offset points", "ha": "center", "va": "top", "color": colour, "fontsize": 9}
    axes.annotate(text, ((crossing + budget / 1e6) / 2, target), (0, -6), **placed)
