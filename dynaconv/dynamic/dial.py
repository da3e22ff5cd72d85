"""The dial: how much of a model a call may use. A value, not a mode. Ships with every exported model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynaconv.dynamic.layout import DialTable, Layout
from dynaconv.frontier import check_budget, check_flops, check_quality

UNITS = ("budget", "flops", "quality", "width")


@dataclass(frozen=True)
class Dial:
    """How much of the model to use: a cost, a quality, or one fixed width. Immutable; travels with the call.

    Turning it up never takes a block away from a token whose hidden state is the same.

    Attributes:
        budget: Share of the parent's FFN bytes read for a token, on average, the router's counted, in (0, 1]. 1 is the
            full dial: the parent's own function.
        flops: Share of the parent's FFN FLOPs computed for a token, likewise; turned into a budget by the measured
            frontier.
        quality: exp(parent loss - loss) to hold, above 0; turned into a budget by the measured frontier. Above 1
            where the model is better than its parent.
        width: The same number of blocks for every token, from 0; needs no calibration.
        prompt: What ``generate`` reads the prompt at; the full dial where it is ``None``.
        controlled: ``generate`` holds the mean cost of what it generates at the budget, whatever the text; otherwise it
            uses the calibrated thresholds as they are.

    Raises:
        ValueError: Not exactly one of the first four is given, or it is out of its range.
    """

    budget: float | None = None
    quality: float | None = None
    width: int | None = None
    flops: float | None = None
    prompt: Dial | float | None = None
    controlled: bool = True

    def __post_init__(self) -> None:
        given = [name for name in UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a dial is one of {', '.join(UNITS)}; given: {', '.join(given) or 'none'}")
        if self.budget is not None:
            check_budget(self.budget)
        if self.flops is not None:
            check_flops(self.flops)
        if isinstance(self.prompt, (int, float)):
            object.__setattr__(self, "prompt", Dial(budget=float(self.prompt)))
        if self.quality is not None:
            check_quality(self.quality)
        if self.width is not None and self.width < 0:
            raise ValueError(f"width {self.width} is negative")

    @classmethod
    def full(cls) -> Dial:
        """All blocks for all tokens: the parent's function."""
        return cls(budget=1.0)

    @classmethod
    def uniform(cls, width: int) -> Dial:
        """``width`` blocks for every token."""
        return cls(width=width)

    def __str__(self) -> str:
        if self.is_full:
            return "full"
        name = next(name for name in UNITS if getattr(self, name) is not None)
        return f"{name} {getattr(self, name):g}"

    @property
    def is_full(self) -> bool:
        """Whether every block is on whatever the calibration says."""
        return self.budget == 1.0

    def thresholds(self, layout: Layout) -> tuple[float, ...]:
        """The threshold of each of the L sites' routers; minus infinity at the full dial.

        Between two calibrated budgets thresholds are interpolated linearly, so they stay monotone in the dial.

        Raises:
            ValueError: The model has no calibrated dial, the budget lies below the lowest calibrated one, or no
                measured point reaches the quality.
        """
        budget = self.resolved(layout)
        if budget == 1.0:
            return (-math.inf,) * layout.layers
        table = _calibrated(layout.dial)
        return _interpolated(table.budgets, table.thresholds, budget)

    def exact(self, layout: Layout) -> tuple[float, ...]:
        """The thresholds above which blocks have exact values, of each of the L sites; empty where all active ones do.

        Raises:
            ValueError: As :meth:`thresholds`.
        """
        budget, table = self.resolved(layout), layout.dial
        if table is None or not table.exact:
            return ()
        return (-math.inf,) * layout.layers if budget == 1.0 else _interpolated(table.budgets, table.exact, budget)

    def slope(self, layout: Layout) -> float:
        """How much thresholds rise, on average over sites, for each unit of budget less around this dial.

        Raises:
            ValueError: As :meth:`thresholds`.
        """
        budget, table = self.resolved(layout), _calibrated(layout.dial)
        means = [sum(row) / len(row) for row in table.thresholds]
        right = min(max(1, sum(known <= budget for known in table.budgets)), len(means) - 1)
        if right < 1:
            return 0.0
        return (means[right - 1] - means[right]) / (table.budgets[right] - table.budgets[right - 1])

    def means(self, layout: Layout) -> tuple[float, ...]:
        """The weight of each of the G sets of means at this dial; empty where neurons that are off give nothing.

        Raises:
            ValueError: As :meth:`thresholds`.
        """
        if not layout.means:
            return ()
        count = len(layout.means)
        sets = tuple(tuple(float(i == j) for j in range(count)) for i in range(count))
        return _interpolated(layout.means, sets, max(self.resolved(layout), layout.means[0]))

    def resolved(self, layout: Layout) -> float:
        """The budget that this dial means for the model of ``layout``.

        Raises:
            ValueError: It is a width, the model was not calibrated, no measured point reaches the quality, or all cost
                more FLOPs.
        """
        if self.budget is not None:
            return self.budget
        if self.width is not None:
            raise ValueError("a uniform width has no budget, and no router threshold")
        _calibrated(layout.dial)
        if layout.frontier is None:
            asked = "a quality" if self.flops is None else "a share of FLOPs"
            raise ValueError(f"this model has no measured frontier to find {asked} on: run `dynaconv calibrate`")
        if self.flops is not None:
            return layout.frontier.budget_for_flops(self.flops)
        assert self.quality is not None
        return layout.frontier.budget_for_quality(self.quality)


def _calibrated(table: DialTable | None) -> DialTable:
    if table is None:
        raise ValueError("this model has no calibrated dial: run `dynaconv calibrate`, or use Dial.uniform(width)")
    return table


def _interpolated(budgets: Sequence[float], rows: Sequence[tuple[float, ...]], budget: float) -> tuple[float, ...]:
    """The row of ``budget``, linear between the rows of the two ``budgets`` beside it."""
    if budget < budgets[0]:
        raise ValueError(f"budget {budget:g} is below the lowest calibrated one, {budgets[0]:g}")
    right = sum(known <= budget for known in budgets)  # torch.compile cannot follow bisect
    if right == len(budgets):
        return rows[-1]
    low, high = budgets[right - 1], budgets[right]
    part = (budget - low) / (high - low)
    return tuple(a + part * (b - a) for a, b in zip(rows[right - 1], rows[right], strict=True))


DialLike = Dial | float | Sequence[Dial | float]


def as_dial(value: DialLike) -> Dial | tuple[Dial, ...]:
    """A number means a budget; a sequence means one dial a sequence of the batch."""
    if isinstance(value, Dial):
        return value
    if isinstance(value, (int, float)):
        return Dial(budget=float(value))
    return tuple(dial if isinstance(dial, Dial) else Dial(budget=float(dial)) for dial in value)
